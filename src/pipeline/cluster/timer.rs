//! Work of a task that is done at an interval, among other work.

use std::time::{Duration, Instant};

/// Something that is done at an interval.
#[derive(Debug)]
pub(super) struct Timer {
    every: Duration,
    pub(super) due: Instant,
}

impl Timer {
    pub(super) fn new(every: Duration) -> Self {
        let due = Instant::now();
        Timer { every, due }
    }

    pub(super) fn is_due(&mut self) -> bool {
        let is_due = Instant::now() >= self.due;
        if is_due {
            self.due = Instant::now() + self.every;
        }
        is_due
    }
}
