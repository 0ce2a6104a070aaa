//! How fast the database takes orders, of late.

use std::time::{Duration, Instant};

use crate::sync::{AtomicU64, Guarded, Ordering};

/// Half of the weight lies within the last so many milliseconds of writing.
const HALF_LIFE_MS: f64 = 1_000.0;

/// An average of rows a second that forgets exponentially.
#[derive(Debug)]
pub struct Pace {
    rows_a_second: AtomicU64,
    changing: Guarded<Option<Instant>>,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            rows_a_second: AtomicU64::new(0),
            changing: Guarded::new(None),
        }
    }
}

impl Pace {
    /// Notes that `rows` were committed, which took `took` on one of `workers` connections.
    pub fn note(&self, rows: usize, took: Duration, workers: usize) {
        let seconds = took.as_secs_f64().max(1e-6);
        let rate = rows as f64 / seconds * workers as f64;
        self.changing.with(|last| {
            let weight = match last.replace(Instant::now()) {
                None => 1.0,
                Some(_) => 1.0 - 0.5_f64.powf(seconds * 1_000.0 / HALF_LIFE_MS),
            };
            let before = self.rows_a_second.load(Ordering::Relaxed) as f64;
            let after = before + (rate - before) * weight;
            self.rows_a_second.store(after as u64, Ordering::Relaxed);
        });
    }

    /// How long it takes to write so many orders, in milliseconds; 0 where nothing is known yet.
    pub fn wait_ms(&self, orders: usize) -> u64 {
        let rate = self.rows_a_second.load(Ordering::Relaxed);
        if rate == 0 {
            return 0;
        }
        (orders as u64).saturating_mul(1_000) / rate
    }
}
