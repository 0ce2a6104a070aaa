//! Pauses between attempts.

use std::time::Duration;

use rand::Rng;

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Full jitter over a doubling range: workers that failed together do not come back together.
pub(super) struct Backoff {
    range: Duration,
    attempts: u32,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Backoff {
            range: BACKOFF_MIN,
            attempts: 0,
        }
    }

    /// Attempts that have failed.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// How long to wait before the next attempt.
    pub(super) fn next(&mut self) -> Duration {
        self.attempts += 1;
        let wait = rand::rng().random_range(BACKOFF_MIN / 2..=self.range);
        self.range = (self.range * 2).min(BACKOFF_MAX);
        wait
    }
}
