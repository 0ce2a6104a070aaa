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
pub struct Crew {
    calls: Notify,
    /// The first worker has ended, so each takes for itself.
    dismissed: AtomicBool,
}

impl Crew {
    /// Waits for a call, of which each is for one worker; not at all once the crew is dismissed.
    pub async fn called(&self) {
        let mut called = pin!(self.calls.notified());
        // Before the look at the flag: a dismissal is either seen there or wakes us.
        called.as_mut().enable();
        if !self.dismissed.load(Ordering::Acquire) {
            called.await;
        }
    }

    /// Calls one worker, now or as soon as there is one.
    pub fn call(&self) {
        self.calls.notify_one();
    }

    /// Runs `work` to its end, and calls for help whenever it has gone on for another [`HELP_AFTER`].
    pub async fn call_while<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            match tokio::time::timeout(HELP_AFTER, &mut work).await {
                Ok(done) => return done,
                Err(_) => self.call(),
            }
        }
    }
}

/// The first worker has this for as long as it lives. Dropping it dismisses the crew: from then on
/// everybody takes orders without being called.
#[derive(Debug)]
#[must_use = "dropping it dismisses the crew"]
pub struct Dismissal(Arc<Crew>);

impl Dismissal {
    /// That of `crew`.
    pub fn of(crew: &Arc<Crew>) -> Self {
        Dismissal(Arc::clone(crew))
    }
}

impl Drop for Dismissal {
    fn drop(&mut self) {
        self.0.dismissed.store(true, Ordering::Release);
        self.0.calls.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_call_is_for_one_and_waits_for_it() {
        let crew = Crew::default();
        crew.call();
        tokio::time::timeout(PATIENCE, crew.called())
            .await
            .expect("the call was kept");
        let again = tokio::time::timeout(Duration::from_millis(20), crew.called()).await;
        assert!(again.is_err(), "one call brought two");
    }

    #[tokio::test]
    async fn a_batch_that_takes_long_calls_one_after_the_other() {
        let crew = Arc::new(Crew::default());
        let helpers: Vec<_> = (0..3)
            .map(|_| {
                let crew = Arc::clone(&crew);
                tokio::spawn(async move { crew.called().await })
            })
            .collect();
        let all_came = async {
            for helper in helpers {
                helper.await.expect("a helper");
            }
        };
        tokio::time::timeout(PATIENCE, crew.call_while(all_came))
            .await
            .expect("all were called");
    }

    #[tokio::test]
    async fn a_short_batch_calls_nobody() {
        let crew = Crew::default();
        assert_eq!(crew.call_while(async { 7 }).await, 7);
        let called = tokio::time::timeout(Duration::from_millis(20), crew.called()).await;
        assert!(called.is_err(), "somebody was called");
    }

    #[tokio::test]
    async fn a_dismissal_frees_who_sleeps_and_who_comes_later() {
        let crew = Arc::new(Crew::default());
        let sleeper = {
            let crew = Arc::clone(&crew);
            tokio::spawn(async move { crew.called().await })
        };
        tokio::task::yield_now().await;
        drop(Dismissal::of(&crew));
        tokio::time::timeout(PATIENCE, sleeper)
            .await
            .expect("it was freed")
            .expect("it did not panic");
        tokio::time::timeout(PATIENCE, crew.called())
            .await
            .expect("nobody sleeps any more");
    }
}
