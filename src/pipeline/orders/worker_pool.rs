//! Wakes workers as load requires: the primary worker always writes, the others while it cannot keep up.
//!
//! A batch costs PostgreSQL and Millrace the same fixed work whatever its size, and batches of one hot SKU wait
//! for one another's commit. While the primary worker keeps up, a second one would only split the same orders
//! into more batches. So the others sleep until their help is requested:
//!
//! * by a worker that has taken a batch and leaves enough for another one ([`has_enough_for_two`]), and
//! * by a worker that is busy with a batch for longer than [`HELP_AFTER`], repeatedly and whatever the cause:
//!   no order waits longer than that for a worker that hangs.
//!
//! Each request wakes one worker for one batch. A worker that finds another full batch waiting takes
//! it without a request.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::queue::OrderQueue;

/// Orders in the queue that justify another worker: at this number the rows of a batch cost several times its
/// fixed work.
const HELP_ROWS: usize = 500;
/// A worker that is busy for longer than this, several times the duration of a batch, requests help.
pub const HELP_AFTER: Duration = Duration::from_millis(10);

/// Whether `queue` holds enough orders for a second worker, each taking at most `rows_max` at once.
pub fn has_enough_for_two(queue: &dyn OrderQueue, rows_max: usize) -> bool {
    queue.ahead() >= HELP_ROWS.min(rows_max) || queue.is_full()
}

/// The state shared by the workers of one queue.
#[derive(Debug, Default)]
pub struct WorkerPool {
    requests: Notify,
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

    /// Runs `work` to its end, and requests help whenever it has gone on for another [`HELP_AFTER`].
    pub async fn request_help_while<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            match tokio::time::timeout(HELP_AFTER, &mut work).await {
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
