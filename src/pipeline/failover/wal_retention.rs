//! Retention of the order log's spans until the standbys have their orders.
//!
//! All orders of a settled span lie in PostgreSQL's write-ahead log before its current end (LSN). Once the
//! slot of every standby has passed that LSN, a failover to any of them loses none of these orders, and the
//! span may be forgotten.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::restore::Watermarks;
use crate::queue::OrderQueue;
use crate::store::StoreError;
use crate::store::postgres::{Database, replication};

const CHECK: Duration = Duration::from_secs(1);

/// Runs until the future is dropped.
///
/// LSNs are only comparable within a timeline. After a promotion, nothing is confirmed until the lost orders
/// are restored; then LSNs are recorded again.
pub async fn keep(
    queue: Arc<dyn OrderQueue>,
    database: Database,
    slots: Vec<String>,
    watermarks: Arc<Watermarks>,
) {
    let Some(log) = queue.durable() else { return };
    let mut timeline = None;
    let mut restores_before = None;
    let mut waiting: VecDeque<(u64, u64)> = VecDeque::new();
    let mut noted = 0;
    let mut tick = tokio::time::interval(CHECK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        // Read before the LSN, so that the LSN lies behind all orders of these spans.
        let settled = log.settled_up_to();
        let progress = async {
            let timeline = replication::timeline(&database).await?;
            Ok::<_, StoreError>((
                timeline,
                replication::wal_progress(&database, &slots).await?,
            ))
        };
        let (now, (written, confirmed)) = match progress.await {
            Ok(progress) => progress,
            Err(error) => {
                tracing::warn!(reason = %error, "the progress of the standbys is unknown; keeping the order log");
                continue;
            }
        };
        if timeline
            .replace(now.clone())
            .is_some_and(|before| before != now)
        {
            restores_before = Some(watermarks.restores());
            waiting.clear();
            noted = 0;
        }
        if restores_before.is_some_and(|before| watermarks.restores() == before) {
            continue;
        }
        restores_before = None;
        if settled > noted {
            noted = settled;
            waiting.push_back((settled, written));
        }
        let confirmed = confirmed.unwrap_or(0);
        while let Some((number, place)) = waiting.front().copied()
            && place <= confirmed
        {
            log.confirm(number);
            waiting.pop_front();
        }
    }
}
