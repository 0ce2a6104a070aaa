//! The place of a broker's log in the database: the group up to which every order is settled. A start and a restore
//! read from there on. A failover that loses commits takes the place back with them, so what was lost is read
//! again: nothing is noted until it is restored.

use std::sync::Arc;
use std::time::Duration;

use super::restore::Watermarks;
use crate::queue::OrderQueue;
use crate::store::StoreError;
use crate::store::postgres::order_log::{self, LogName};
use crate::store::postgres::{Database, NodeLease};

const INTERVAL: Duration = Duration::from_secs(1);
/// Number of intervals after which the log is looked at.
const LOOK_EVERY: u32 = 30;
/// The same while nothing is appended: otherwise nobody would know that the broker is away until the first order of a
/// sale is refused.
const LOOK_IDLE_EVERY: u32 = 5;

/// Moves the place once a second, until the future is dropped or another process has taken over. A journal keeps its
/// place by deleting segments. After a failover the database is told anew which log is in use, because it may have
/// lost that too.
pub async fn keep(
    queue: Arc<dyn OrderQueue>,
    database: Database,
    lease: NodeLease,
    log: LogName,
    watermarks: Arc<Watermarks>,
) {
    let mut tick = tokio::time::interval(INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut noted, mut of_restore) = (0, watermarks.restores());
    let (mut told, mut ticks, mut last) = (false, 0, None);
    loop {
        tick.tick().await;
        let Some(durable) = queue.durable() else {
            continue;
        };
        let end = durable.last_position();
        let is_idle = std::mem::replace(&mut last, end) == end;
        ticks += 1;
        if ticks >= if is_idle { LOOK_IDLE_EVERY } else { LOOK_EVERY } {
            durable.look();
            ticks = 0;
        }
        // Read first: what is settled now is in a database on which nothing is missing, if that one takes the note.
        let (span, restores) = (durable.settled_up_to(), watermarks.restores());
        let Some(timeline) = watermarks.whole_timeline() else {
            continue;
        };
        let place = durable.position_of(span);
        let is_anew = restores != of_restore;
        let result = match place {
            _ if is_anew => order_log::note(&database, lease, &log, place).await,
            Some(place) if span > noted => {
                order_log::note_place(&database, lease, place, &timeline).await
            }
            _ => continue,
        };
        match result {
            Ok(()) => {
                durable.note(span);
                (noted, of_restore, told) = (span, restores, false);
            }
            // The lease's renewal finds out by itself, and ends the process; or the database was failed over.
            Err(StoreError::Fenced { .. }) => {}
            Err(error) if !told => {
                tracing::warn!(reason = %error, "the place of the order log could not be moved; retrying");
                told = true;
            }
            Err(_) => {}
        }
    }
}
