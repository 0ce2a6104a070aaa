//! The coarse clock of the data plane, kept by the reaper.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;

/// Milliseconds since the server started (monotonic) and the wall-clock second of the `Date`
/// field, each one load to read.
pub(super) struct Clock {
    started: Instant,
    // Both are plain readings: nothing else is published through them, so relaxed will do.
    now_ms: AtomicU64,
    unix_s: AtomicU64,
}

impl Clock {
    pub(super) fn start() -> Self {
        let clock = Self {
            started: Instant::now(),
            now_ms: AtomicU64::new(0),
            unix_s: AtomicU64::new(0),
        };
        clock.tick();
        clock
    }

    /// Brings both readings up to date; deadlines and dates are as exact as this is called often.
    pub(super) fn tick(&self) {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.now_ms.store(now_ms, Ordering::Relaxed);
        // A wall clock before 1970 shows a wrong date and harms nothing else.
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.unix_s.store(wall.as_secs(), Ordering::Relaxed);
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.now_ms.load(Ordering::Relaxed)
    }
}

/// The text of the `Date` field, formatted once a second by each connection that answers.
#[derive(Default)]
pub(super) struct DateText {
    unix_s: u64,
    text: String,
}

impl DateText {
    /// An IMF-fixdate (RFC 9110 5.6.7).
    pub(super) fn at(&mut self, clock: &Clock) -> &str {
        let unix_s = clock.unix_s.load(Ordering::Relaxed);
        if unix_s != self.unix_s || self.text.is_empty() {
            self.unix_s = unix_s;
            self.text.clear();
            let second = i64::try_from(unix_s).unwrap_or_default();
            let time = Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH);
            // The only error is a year beyond four digits; the text is then empty and retried.
            let _ = DateTimePrinter::new().print_timestamp_rfc9110(&time, &mut self.text);
        }
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_is_an_imf_fixdate() {
        let clock = Clock::start();
        let mut date = DateText::default();
        clock.unix_s.store(784_111_777, Ordering::Relaxed);
        assert_eq!(date.at(&clock), "Sun, 06 Nov 1994 08:49:37 GMT");
        clock.unix_s.store(784_111_778, Ordering::Relaxed);
        assert_eq!(date.at(&clock), "Sun, 06 Nov 1994 08:49:38 GMT");
    }
}
