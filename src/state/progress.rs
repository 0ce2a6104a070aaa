//! Whether orders are written while orders wait.
//!
//! Each part of the service may look sound while no order becomes a row. So progress is a fact of its
//! own: for how long orders have waited, now or until they were given up, since a worker last decided
//! one.

use std::time::{Duration, Instant};

use crate::sync::{AtomicU64, Guarded, Ordering};

/// When orders were last decided, and since when others have waited. Observations only, and every
/// moment but the start is found again: each access is relaxed.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    /// All in milliseconds since just before the start; 0 for never, or not now.
    decided_ms: AtomicU64,
    waiting_since_ms: AtomicU64,
    /// The first order given up at its deadline since the last decision.
    given_up_ms: AtomicU64,
    /// Why a worker's last attempt failed, and when.
    failure: Guarded<Option<(u64, String)>>,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            started: Instant::now(),
            decided_ms: AtomicU64::new(0),
            waiting_since_ms: AtomicU64::new(0),
            given_up_ms: AtomicU64::new(0),
            failure: Guarded::default(),
        }
    }
}

impl Progress {
    /// A worker has decided orders: they are rows or dead letters, or it found that all it took had
    /// been given up.
    pub fn decided(&self) {
        self.decided_at(self.now_ms());
    }

    fn decided_at(&self, now_ms: u64) {
        self.decided_ms.store(now_ms, Ordering::Relaxed);
        self.given_up_ms.store(0, Ordering::Relaxed);
    }

    /// An order was given up at its deadline, before any worker claimed it.
    pub fn given_up(&self) {
        note_first(&self.given_up_ms, self.now_ms());
    }

    /// A worker's attempt failed, and is made again.
    pub fn failed(&self, reason: &str) {
        self.failed_at(reason, self.now_ms());
    }

    fn failed_at(&self, reason: &str, now_ms: u64) {
        self.failure
            .with(|failure| *failure = Some((now_ms, reason.to_owned())));
    }

    /// Notes whether any order waits for a worker's decision now. To be called again and again.
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

    /// For how long orders have waited, or been given up, and none was decided. Zero while nothing
    /// waits.
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

    /// Why a worker's last attempt failed, unless orders were decided since.
    pub fn failure(&self) -> Option<String> {
        let decided = self.decided_ms.load(Ordering::Relaxed);
        self.failure.with(|failure| {
            let failure = failure.as_ref().filter(|(at, _)| *at >= decided);
            failure.map(|(_, reason)| reason.clone())
        })
    }

    fn now_ms(&self) -> u64 {
        let ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
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
        // Another look does not begin anew.
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
