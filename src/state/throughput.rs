//! The recent rate of database writes, and thus the expected wait of a new order.
//!
//! A batch costs a fixed time plus a time per row. Both are learned from written batches: the fixed
//! time from small ones, the time per row from larger ones. Until a larger batch was written the
//! latter is unknown, so that an idle system is not taken for a slow one. A batch that takes much
//! longer than expected counts before it ends, because the database has then become slow or stands
//! still. The estimate follows at the next [`ThroughputEstimator::refresh`], which the deadline
//! task calls.

use std::time::{Duration, Instant};

use crate::clock;
use crate::sync::{AtomicU64, Guarded, Ordering};

/// Most workers.
const WORKERS_MAX: usize = 64;
/// Fewest rows of a batch that teaches the time per row; smaller ones teach the fixed time.
const LARGE_ROWS: usize = 16;
/// A shorter delay, in microseconds, does not count as late: the machine may have been busy.
const LATE_US: f64 = 100_000.0;
/// Target duration of one batch, in microseconds: the interval at which the estimate is corrected,
/// and the time a buyer waits behind one batch.
const BATCH_US: f64 = 250_000.0;
/// Fewest rows of a batch that is shortened for that target.
const BATCH_ROWS_MIN: usize = 64;

/// Cost of a batch for one worker, in microseconds; 0 if unknown.
#[derive(Clone, Copy, Debug, Default)]
struct Costs {
    fixed: f64,
    row: f64,
}

/// The batch that a worker is writing.
#[derive(Debug, Default)]
struct Running {
    /// Start of the write, in microseconds since the start of the process; 0 if there is none.
    since_us: AtomicU64,
    rows: AtomicU64,
}

/// Estimates the rate of database writes. Every access is relaxed.
#[derive(Debug)]
pub struct ThroughputEstimator {
    costs: Guarded<Costs>,
    started: Instant,
    running: [Running; WORKERS_MAX],
    workers: AtomicU64,
    /// As of the last refresh: nanoseconds per row for all workers together, rows being written,
    /// and the microseconds that a late batch has taken so far.
    row_ns: AtomicU64,
    running_rows: AtomicU64,
    late_us: AtomicU64,
}

impl Default for ThroughputEstimator {
    fn default() -> Self {
        ThroughputEstimator {
            costs: Guarded::default(),
            started: clock::now(),
            running: std::array::from_fn(|_| Running::default()),
            workers: AtomicU64::new(1),
            row_ns: AtomicU64::new(0),
            running_rows: AtomicU64::new(0),
            late_us: AtomicU64::new(0),
        }
    }
}

impl ThroughputEstimator {
    /// A worker, one of `workers`, begins to write a batch.
    pub fn begin(&self, worker: usize, workers: usize, rows: usize) {
        self.workers.store(workers as u64, Ordering::Relaxed);
        if let Some(running) = self.running.get(worker) {
            running.rows.store(rows as u64, Ordering::Relaxed);
            let now = self.now_us().max(1);
            running.since_us.store(now, Ordering::Relaxed);
        }
    }

    /// A worker has committed a batch in one attempt, which took `took`.
    pub fn written(&self, rows: usize, took: Duration) {
        let took = took.as_secs_f64() * 1e6;
        self.costs.with(|costs| {
            if rows < LARGE_ROWS {
                costs.fixed = mixed(costs.fixed, took, 0.2);
            } else {
                let row = (took - costs.fixed).max(1.0) / rows as f64;
                // A longer time gets a larger weight.
                costs.row = mixed(costs.row, row, (took / 1e6).clamp(0.1, 1.0));
            }
        });
    }

    /// The worker's batch is decided or given up.
    pub fn end(&self, worker: usize) {
        if let Some(running) = self.running.get(worker) {
            running.since_us.store(0, Ordering::Relaxed);
        }
    }

    /// Updates the estimate from the batches being written.
    pub fn refresh(&self) {
        let (costs, now) = (self.costs.with(|costs| *costs), self.now_us());
        let workers = self.workers.load(Ordering::Relaxed) as usize;
        let (mut rate, mut rows, mut late_us) = (0.0, 0, 0.0_f64);
        for running in self.running.iter().take(workers.clamp(1, WORKERS_MAX)) {
            let since = running.since_us.load(Ordering::Relaxed);
            let mut slower = 1.0;
            if since > 0 {
                let batch = running.rows.load(Ordering::Relaxed);
                rows += batch;
                let taken = now.saturating_sub(since) as f64;
                let expected = costs.fixed + costs.row * batch as f64;
                if taken > expected * 2.0 + LATE_US {
                    slower = taken / expected.max(1.0);
                    late_us = late_us.max(taken);
                }
            }
            rate += 1.0 / (costs.row * slower);
        }
        let row_ns = if costs.row > 0.0 { 1e3 / rate } else { 0.0 };
        self.row_ns.store(row_ns as u64, Ordering::Relaxed);
        self.running_rows.store(rows, Ordering::Relaxed);
        self.late_us.store(late_us as u64, Ordering::Relaxed);
    }

    /// Expected wait for the commit of an order behind `ahead` others in the queue, in
    /// milliseconds; 0 if nothing is known yet.
    pub fn wait_ms(&self, ahead: usize) -> u64 {
        let before = (ahead as u64).saturating_add(self.running_rows.load(Ordering::Relaxed));
        let rows_ns = before.saturating_mul(self.row_ns.load(Ordering::Relaxed));
        // A late batch is expected to take as long again as it has taken.
        rows_ns / 1_000_000 + self.late_us.load(Ordering::Relaxed) / 1_000
    }

    /// Rows that a worker should take at once, at most `rows_max`. Fewer if the database is so slow
    /// that they would take longer than a quarter of a second.
    pub fn batch_rows(&self, rows_max: usize) -> usize {
        let row = self.costs.with(|costs| costs.row);
        if row <= 0.0 {
            return rows_max;
        }
        ((BATCH_US / row) as usize).clamp(BATCH_ROWS_MIN.min(rows_max), rows_max)
    }

    fn now_us(&self) -> u64 {
        u64::try_from(clock::since(self.started).as_micros()).unwrap_or(u64::MAX)
    }
}

/// Exponential moving average; the first value counts alone.
fn mixed(before: f64, now: f64, weight: f64) -> f64 {
    if before > 0.0 {
        before + (now - before) * weight
    } else {
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn an_idle_system_is_not_taken_for_a_slow_one() {
        let pace = ThroughputEstimator::default();
        for _ in 0..100 {
            pace.begin(0, 2, 1);
            pace.written(1, ms(3));
            pace.end(0);
        }
        pace.refresh();
        assert_eq!(
            pace.wait_ms(100_000),
            0,
            "one row in 3 ms says nothing of many"
        );
        assert_eq!(pace.batch_rows(5_000), 5_000);
    }

    #[test]
    fn the_wait_follows_from_the_rows_ahead_and_the_workers() {
        let pace = ThroughputEstimator::default();
        pace.begin(0, 2, 1_000);
        pace.written(1_000, ms(1_000));
        pace.end(0);
        pace.refresh();
        // 1 ms per row and worker: two of them write 2,000 a second.
        assert_eq!(pace.wait_ms(2_000), 1_000);
        assert_eq!(pace.batch_rows(5_000), 250);
        assert_eq!(pace.batch_rows(10), 10);
        // The database becomes fast again, and the estimate follows soon.
        for _ in 0..50 {
            pace.written(250, ms(5));
        }
        pace.refresh();
        assert!(pace.wait_ms(2_000) < 50, "{}", pace.wait_ms(2_000));
    }

    #[test]
    fn small_batches_tell_the_fixed_time_and_larger_ones_the_time_of_a_row() {
        let pace = ThroughputEstimator::default();
        let batches = [
            (LARGE_ROWS - 1, 10, 0),
            // 10 ms are fixed, so 22 are for 16 rows.
            (LARGE_ROWS, 32, 1_375),
            // 1 ms a row, and a second or more counts alone.
            (1_000, 1_010, 1_000),
            // 0.5 ms a row, with a weight of 0.51.
            (1_000, 510, 745),
        ];
        for (rows, took, wait_ms) in batches {
            pace.written(rows, ms(took));
            pace.refresh();
            let waits = pace.wait_ms(1_000);
            assert!(waits.abs_diff(wait_ms) <= 1, "{rows} rows: {waits}");
        }
    }

    #[test]
    fn rows_that_are_being_written_are_ahead_too() {
        let pace = ThroughputEstimator::default();
        pace.written(1_000, ms(1_000));
        pace.begin(0, 2, 300);
        pace.begin(1, 2, 500);
        pace.refresh();
        assert_eq!(pace.wait_ms(0), 400, "800 rows of 1 ms by two workers");
        assert_eq!(pace.wait_ms(1_000), 900);
        pace.end(0);
        pace.refresh();
        assert_eq!(pace.wait_ms(0), 250);
    }

    #[test]
    fn a_large_batch_is_not_late_before_it_can_be_done() {
        let pace = ThroughputEstimator::default();
        pace.written(1_000, ms(1_000_000));
        pace.begin(0, 1, 1_000);
        std::thread::sleep(ms(150));
        pace.refresh();
        assert_eq!(
            pace.wait_ms(0),
            1_000_000,
            "its own thousand rows of a second"
        );
    }

    #[test]
    fn a_batch_that_does_not_come_back_tells_before_it_does() {
        let pace = ThroughputEstimator::default();
        pace.written(1, ms(1));
        pace.written(1_000, ms(10));
        pace.begin(0, 1, 10);
        pace.refresh();
        assert!(pace.wait_ms(1_000) < 20);
        std::thread::sleep(ms(150));
        pace.refresh();
        assert!(pace.wait_ms(0) >= 150);
        assert!(pace.wait_ms(1_000) > 1_000, "{}", pace.wait_ms(1_000));
        pace.end(0);
        pace.refresh();
        assert!(pace.wait_ms(1_000) < 20);
    }
}
