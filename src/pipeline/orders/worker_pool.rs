//! Which of the workers write: the first always, the others where there is more than it can do.
//!
//! A batch costs PostgreSQL and us the same fixed work whatever is in it, and batches of one hot SKU
//! wait for one another's commit. While the first worker keeps up, a second one would only cut the
//! same orders into more batches. So the others sleep until they are called:
//!
//! * by whoever has taken a batch and leaves enough for another one behind it
//!   ([`has_enough_for_two`]), and
//! * by whoever is busy with one for longer than [`HELP_AFTER`], again and again, whatever holds it up:
//!   an order never waits longer than that for a worker that hangs.
//!
//! A call is for one batch; who has written it and finds enough for another one goes on uncalled.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::queue::OrderQueue;

/// Orders in the queue that are worth another worker: by then the rows of a batch cost several times
/// its fixed work.
const HELP_ROWS: usize = 500;
/// Who is busy for longer than this, several times what a batch takes by itself, has others help.
pub const HELP_AFTER: Duration = Duration::from_millis(10);

/// Whether there is more in `queue` than the worker that takes at most `rows_max` at once should be left
/// alone with.
pub fn has_enough_for_two(queue: &dyn OrderQueue, rows_max: usize) -> bool {
    queue.ahead() >= HELP_ROWS.min(rows_max) || queue.is_full()
}

/// What the workers of one queue have in common.
#[derive(Debug, Default)]
pub struct WorkerPool {
    requests: Notify,
    /// The first worker has ended, so each takes for itself.
    primary_is_gone: AtomicBool,
}

impl WorkerPool {
    /// Waits for a call, of which each is for one worker; not at all once the pool is primary_is_gone.
    pub async fn help_requested(&self) {
        let mut called = pin!(self.requests.notified());
        // Before the look at the flag: a dismissal is either seen there or wakes us.
        called.as_mut().enable();
        if !self.primary_is_gone.load(Ordering::Acquire) {
            called.await;
        }
    }

    /// Calls one worker, now or as soon as there is one.
    pub fn request_help(&self) {
        self.requests.notify_one();
    }

    /// Runs `work` to its end, and calls for help whenever it has gone on for another [`HELP_AFTER`].
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

/// The first worker has this for as long as it lives. Dropping it dismisses the pool: from then on
/// everybody takes orders without being called.
#[derive(Debug)]
#[must_use = "dropping it dismisses the pool"]
pub struct PrimaryGuard(Arc<WorkerPool>);

impl PrimaryGuard {
    /// That of `pool`.
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
            .expect("all were called");
    }

    #[tokio::test]
    async fn a_short_batch_calls_nobody() {
        let pool = WorkerPool::default();
        assert_eq!(pool.request_help_while(async { 7 }).await, 7);
        let called = tokio::time::timeout(Duration::from_millis(20), pool.help_requested()).await;
        assert!(called.is_err(), "somebody was called");
    }

    #[tokio::test]
    async fn a_dismissal_frees_who_sleeps_and_who_comes_later() {
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
