//! Keeping the journal's segments until the standbys have what is in them.
//!
//! A segment of which everything is decided is in the write-ahead log of PostgreSQL up to where
//! that log ends now. Once every standby's slot is beyond that place, a failover to any of them
//! loses none of its orders, and it may go.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::restore::Watermarks;
use crate::queue::journal::JournalQueue;
use crate::store::StoreError;
use crate::store::postgres::Database;

const CHECK: Duration = Duration::from_secs(1);

/// Runs until it is dropped.
///
/// Places of one timeline mean nothing on another: after a promotion nothing is confirmed until what
/// it lost has been brought back, and then everything is noted anew.
pub async fn keep(
    journal: Arc<JournalQueue>,
    database: Database,
    slots: Vec<String>,
    watermarks: Arc<Watermarks>,
) {
    let mut timeline = None;
    let mut restores_before = None;
    let mut waiting: VecDeque<(u64, u64)> = VecDeque::new();
    let mut noted = 0;
    let mut tick = tokio::time::interval(CHECK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        // Before the place in the log is read, so that it lies behind everything in them.
        let decided = journal.settled_up_to();
        let progress = async {
            let timeline = database.timeline().await?;
            Ok::<_, StoreError>((timeline, database.wal_progress(&slots).await?))
        };
        let (now, (written, confirmed)) = match progress.await {
            Ok(progress) => progress,
            Err(error) => {
                tracing::warn!(reason = %error, "how far the standbys are is not known; segments of the journal are kept");
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
        if decided > noted {
            noted = decided;
            waiting.push_back((decided, written));
        }
        let confirmed = confirmed.unwrap_or(0);
        while let Some((number, place)) = waiting.front().copied()
            && place <= confirmed
        {
            journal.confirm(number);
            waiting.pop_front();
        }
    }
}
