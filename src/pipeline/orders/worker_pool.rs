//! Wakes workers as load requires: the primary worker always writes, the others while it cannot keep up.
//!
//! A batch costs PostgreSQL and Millrace the same fixed work whatever its size, and batches of one hot SKU wait
//! for one another's commit. While the primary worker keeps up, a second one would only split the same orders
//! into more batches. So the others sleep until their help is requested:
//!
//! * by a worker that has taken a batch and leaves enough for another one ([`has_enough_for_two`]), and
//! * by a worker that is busy with a batch for several times as long as batches took lately, repeatedly and whatever
//!   the cause: no order waits longer than [`HELP_AFTER_MAX`] for a worker that hangs.
//!
//! After a batch of which every sender had its answer already the primary worker rests ([`linger`]), so that such
//! orders share a batch too.
//!
//! Each request wakes one worker for one batch. A worker that finds another full batch waiting takes
//! it without a request.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::queue::OrderQueue;

/// Orders in the queue that justify another worker: at this number the rows of a batch cost several times its
/// fixed work.
const HELP_ROWS: usize = 500;
/// A worker that is busy for so many times the recent duration of a batch requests help.
const HELP_AFTER_BATCHES: u32 = 4;
/// Least time after which help is requested: the scheduler of a busy machine delays a batch this long.
const HELP_AFTER_MIN: Duration = Duration::from_millis(4);
/// Longest time after which help is requested.
pub const HELP_AFTER_MAX: Duration = Duration::from_millis(100);

/// Longest rest after a batch of acknowledged orders. Their rows are this much later, which nobody waits for.
const LINGER: Duration = Duration::from_millis(20);

/// Whether `queue` holds enough orders for a second worker, each taking at most `rows_max` at once.
pub fn has_enough_for_two(queue: &dyn OrderQueue, rows_max: usize) -> bool {
    queue.ahead() >= enough(rows_max) || queue.is_full()
}

/// Rests until `queue` presses or has enough for a batch of at most `rows_max`, 20 ms at most.
pub async fn linger(queue: &dyn OrderQueue, rows_max: usize) {
    let _ = tokio::time::timeout(LINGER, queue.until_pressing(enough(rows_max))).await;
}

fn enough(rows_max: usize) -> usize {
    HELP_ROWS.min(rows_max)
}

/// The state shared by the workers of one queue.
#[derive(Debug, Default)]
pub struct WorkerPool {
    requests: Notify,
    /// Recent duration of a batch in microseconds, at most [`HELP_AFTER_MAX`]: an average in which the newest counts an
    /// eighth. Relaxed throughout, because it is an estimate.
    batch_micros: AtomicU64,
    /// The primary worker has ended, so the others take orders without a request.
    primary_is_gone: AtomicBool,
}

impl WorkerPool {
    /// Waits for a request for help; each request wakes one worker. Returns at once after the primary worker
    /// has ended.
    pub async fn help_requested(&self) {
        let mut request = pin!(self.requests.notified());
        // Before the look at the flag: the primary's end is either seen there or wakes us.
        request.as_mut().enable();
        if !self.primary_is_gone.load(Ordering::Acquire) {
            request.await;
        }
    }

    /// Wakes one worker, now or as soon as one waits.
    pub fn request_help(&self) {
        self.requests.notify_one();
    }

    /// How long a worker is busy with one batch before it requests help: it follows the batches, so that neither a
    /// PostgreSQL 5 ms away brings help for every batch nor a stall of one that is near goes unnoticed for long.
    fn help_after(&self) -> Duration {
        let batch = Duration::from_micros(self.batch_micros.load(Ordering::Relaxed));
        (batch * HELP_AFTER_BATCHES).clamp(HELP_AFTER_MIN, HELP_AFTER_MAX)
    }

    /// Notes how long a batch took.
    pub fn note_batch(&self, took: Duration) {
        let took = took.min(HELP_AFTER_MAX).as_micros() as u64;
        let before = self.batch_micros.load(Ordering::Relaxed);
        let average = before - before / 8 + took / 8;
        self.batch_micros.store(average, Ordering::Relaxed);
    }

    /// Runs `work` to its end, and requests help whenever it has gone on for too long.
    pub async fn request_help_while<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            match tokio::time::timeout(self.help_after(), &mut work).await {
                Ok(done) => return done,
                Err(_) => self.request_help(),
            }
        }
    }
}

/// Held by the primary worker for as long as it lives. After it is dropped every worker takes orders
/// without being woken.
#[derive(Debug)]
#[must_use = "dropping it wakes all workers for good"]
pub struct PrimaryGuard(Arc<WorkerPool>);

impl PrimaryGuard {
    /// The guard of `pool`'s primary worker.
    pub fn of(pool: &Arc<WorkerPool>) -> Self {
        PrimaryGuard(Arc::clone(pool))
    }
}

impl Drop for PrimaryGuard {
    fn drop(&mut self) {
        self.0.primary_is_gone.store(true, Ordering::Release);
        self.0.requests.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_call_is_for_one_and_waits_for_it() {
        let pool = WorkerPool::default();
        pool.request_help();
        tokio::time::timeout(PATIENCE, pool.help_requested())
            .await
            .expect("the call was kept");
        let again = tokio::time::timeout(Duration::from_millis(20), pool.help_requested()).await;
        assert!(again.is_err(), "one call brought two");
    }

    #[tokio::test]
    async fn a_batch_that_takes_long_calls_one_after_the_other() {
        let pool = Arc::new(WorkerPool::default());
        let helpers: Vec<_> = (0..3)
            .map(|_| {
                let pool = Arc::clone(&pool);
                tokio::spawn(async move { pool.help_requested().await })
            })
            .collect();
        let all_came = async {
            for helper in helpers {
                helper.await.expect("a helper");
            }
        };
        tokio::time::timeout(PATIENCE, pool.request_help_while(all_came))
            .await
            .expect("all were woken");
    }

    #[tokio::test]
    async fn a_short_batch_calls_nobody() {
        let pool = WorkerPool::default();
        assert_eq!(pool.request_help_while(async { 7 }).await, 7);
        let woken = tokio::time::timeout(Duration::from_millis(20), pool.help_requested()).await;
        assert!(woken.is_err(), "somebody was woken");
    }

    #[test]
    fn help_is_requested_after_several_times_a_recent_batch_within_bounds() {
        let pool = WorkerPool::default();
        assert_eq!(pool.help_after(), HELP_AFTER_MIN);
        let batches = |took| (0..100).for_each(|_| pool.note_batch(took));
        batches(Duration::from_millis(10));
        let after = pool.help_after();
        let expected = Duration::from_millis(38)..=Duration::from_millis(40);
        assert!(expected.contains(&after), "{after:?}");
        // An outage is no batch to wait for.
        batches(Duration::from_secs(60));
        assert_eq!(pool.help_after(), HELP_AFTER_MAX);
        batches(Duration::from_micros(100));
        assert_eq!(pool.help_after(), HELP_AFTER_MIN);
    }

    #[tokio::test]
    async fn the_end_of_the_primary_wakes_all_and_nobody_sleeps_afterwards() {
        let pool = Arc::new(WorkerPool::default());
        let sleeper = {
            let pool = Arc::clone(&pool);
            tokio::spawn(async move { pool.help_requested().await })
        };
        tokio::task::yield_now().await;
        drop(PrimaryGuard::of(&pool));
        tokio::time::timeout(PATIENCE, sleeper)
            .await
            .expect("it was freed")
            .expect("it did not panic");
        tokio::time::timeout(PATIENCE, pool.help_requested())
            .await
            .expect("nobody sleeps any more");
    }
}
