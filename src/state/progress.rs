//! Whether orders are written while orders wait.
//!
//! Each part of the service may look sound while no order becomes a row. Progress is therefore
//! measured on its own: the time since a worker last decided an order, during which orders have
//! waited or have been abandoned.

use std::time::{Duration, Instant};

use crate::clock;
use crate::sync::{AtomicU64, Guarded, Ordering};

/// Times of the last decisions and of the oldest wait. Observations only, and every value but the
/// start is refreshed: each access is relaxed.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    /// These three in milliseconds since just before the start; 0 for never, or not now.
    decided_ms: AtomicU64,
    waiting_since_ms: AtomicU64,
    /// First order abandoned at its deadline since the last decision.
    given_up_ms: AtomicU64,
    /// Time and reason of a worker's last failed attempt.
    failure: Guarded<Option<(u64, String)>>,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            started: clock::now(),
            decided_ms: AtomicU64::new(0),
            waiting_since_ms: AtomicU64::new(0),
            given_up_ms: AtomicU64::new(0),
            failure: Guarded::default(),
        }
    }
}

impl Progress {
    /// Notes that a worker has decided orders: they are rows or dead letters, or every order of the
    /// batch had been abandoned.
    pub fn decided(&self) {
        self.decided_at(self.now_ms());
    }

    fn decided_at(&self, now_ms: u64) {
        self.decided_ms.store(now_ms, Ordering::Relaxed);
        self.given_up_ms.store(0, Ordering::Relaxed);
    }

    /// Notes that an order was abandoned at its deadline, before any worker claimed it.
    pub fn given_up(&self) {
        note_first(&self.given_up_ms, self.now_ms());
    }

    /// Notes a worker's failed attempt, which will be retried.
    pub fn failed(&self, reason: &str) {
        self.failed_at(reason, self.now_ms());
    }

    fn failed_at(&self, reason: &str, now_ms: u64) {
        self.failure
            .with(|failure| *failure = Some((now_ms, reason.to_owned())));
    }

    /// Notes whether any order waits for a worker's decision now. Call it periodically.
    pub fn look(&self, anything_waits: bool) {
        self.look_at(anything_waits, self.now_ms());
    }

    fn look_at(&self, anything_waits: bool, now_ms: u64) {
        if anything_waits {
            note_first(&self.waiting_since_ms, now_ms);
        } else {
            self.waiting_since_ms.store(0, Ordering::Relaxed);
        }
    }

    /// Time for which orders have waited, or have been abandoned, without a decision. Zero while
    /// nothing waits.
    pub fn stalled_for(&self) -> Duration {
        Duration::from_millis(self.stalled_ms(self.now_ms()))
    }

    fn stalled_ms(&self, now_ms: u64) -> u64 {
        let noted = [&self.waiting_since_ms, &self.given_up_ms];
        let noted = noted.map(|moment| moment.load(Ordering::Relaxed));
        let Some(since) = noted.into_iter().filter(|moment| *moment > 0).min() else {
            return 0;
        };
        now_ms.saturating_sub(since.max(self.decided_ms.load(Ordering::Relaxed)))
    }

    /// The reason of a worker's last failed attempt, unless orders were decided since.
    pub fn failure(&self) -> Option<String> {
        let decided = self.decided_ms.load(Ordering::Relaxed);
        self.failure.with(|failure| {
            let failure = failure.as_ref().filter(|(at, _)| *at >= decided);
            failure.map(|(_, reason)| reason.clone())
        })
    }

    fn now_ms(&self) -> u64 {
        let ms = u64::try_from(clock::since(self.started).as_millis()).unwrap_or(u64::MAX);
        ms.saturating_add(1)
    }
}

fn note_first(moment: &AtomicU64, now_ms: u64) {
    let _ = moment.compare_exchange(0, now_ms, Ordering::Relaxed, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_service_is_not_stalled() {
        let progress = Progress::default();
        progress.look_at(false, 1);
        assert_eq!(progress.stalled_ms(9_000), 0);
        progress.look_at(true, 9_000);
        progress.look_at(false, 9_020);
        assert_eq!(progress.stalled_ms(99_000), 0);
    }

    #[test]
    fn what_waits_is_stalled_until_something_is_decided() {
        let progress = Progress::default();
        progress.decided_at(5);
        progress.look_at(true, 100);
        // Another observation does not restart the time.
        progress.look_at(true, 2_000);
        assert_eq!(progress.stalled_ms(7_100), 7_000);
        progress.failed_at("the database is away", 7_100);
        assert_eq!(progress.failure().as_deref(), Some("the database is away"));
        progress.decided_at(7_200);
        assert_eq!(progress.stalled_ms(7_300), 100, "others wait since");
        assert_eq!(progress.failure(), None, "that is over");
    }

    #[test]
    fn orders_that_were_given_up_tell_though_none_waits_any_more() {
        let progress = Progress::default();
        note_first(&progress.given_up_ms, 50);
        progress.look_at(false, 60);
        assert_eq!(progress.stalled_ms(7_050), 7_000);
        progress.decided_at(7_060);
        assert_eq!(progress.stalled_ms(9_000), 0);
    }
}
