//! Whose turn it is to take from the queue.
//!
//! Two workers that take as they please from a queue that never grows long write twice as many
//! transactions of half the size, and what a transaction costs the database besides its rows is most
//! of what a small one costs. So one at a time takes, writes and settles, while what comes in gathers
//! for the next, and a further one joins in
//!
//! * where a worker took as many as it may, and so leaves some behind: a long queue is written by all;
//! * where the one whose turn it is stands still, because its connection does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, SemaphorePermit};

/// A batch that takes longer no longer keeps the others waiting.
const STALLED: Duration = Duration::from_millis(100);

/// The turns of all workers.
#[derive(Debug)]
pub struct Turns {
    turn: Semaphore,
    /// A worker leaves orders behind.
    more: Notify,
    started: Instant,
    /// Since when the one whose turn it is has been writing, in milliseconds since `started`;
    /// `u64::MAX` while it waits for orders. Only a hint, so its accesses are relaxed.
    writing_since_ms: AtomicU64,
}

impl Default for Turns {
    fn default() -> Self {
        Turns {
            turn: Semaphore::new(1),
            more: Notify::new(),
            started: Instant::now(),
            writing_since_ms: AtomicU64::new(u64::MAX),
        }
    }
}

/// Leave to take a batch, write it and settle it. Dropping it ends the turn.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    /// None where it joined in.
    permit: Option<SemaphorePermit<'a>>,
}

impl Turns {
    /// Waits for a turn, in the order of asking, or for a reason to join in.
    pub async fn next(&self) -> Turn<'_> {
        let permit = tokio::select! {
            biased;
            permit = self.turn.acquire() => permit.ok(),
            () = self.more.notified() => None,
            () = self.stalled() => None,
        };
        Turn {
            turns: self,
            permit,
        }
    }

    async fn stalled(&self) {
        loop {
            tokio::time::sleep(STALLED).await;
            let since = self.writing_since_ms.load(Ordering::Relaxed);
            if self.now_ms().saturating_sub(since) >= STALLED.as_millis() as u64 {
                return;
            }
        }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}

impl Turn<'_> {
    /// Its worker has taken orders; `all`: it left none behind.
    pub fn took(&self, all: bool) {
        if self.permit.is_some() {
            let now = self.turns.now_ms();
            self.turns.writing_since_ms.store(now, Ordering::Relaxed);
        }
        if !all {
            self.turns.more.notify_one();
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.permit.is_some() {
            let waits = u64::MAX;
            self.turns.writing_since_ms.store(waits, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;

    /// Whether a future is over at once.
    async fn is_ready<T>(future: impl Future<Output = T>) -> bool {
        let mut future = pin!(future);
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(future.as_mut().poll(context).is_ready())
        })
        .await
    }

    #[tokio::test]
    async fn one_at_a_time_has_a_turn() {
        let turns = Turns::default();
        let first = turns.next().await;
        first.took(true);
        assert!(!is_ready(turns.next()).await, "two at a time");
        drop(first);
        assert!(is_ready(turns.next()).await, "nobody after the first");
    }

    #[tokio::test]
    async fn what_is_left_behind_lets_another_join_in() {
        let turns = Turns::default();
        let first = turns.next().await;
        first.took(false);
        let second = turns.next().await;
        assert!(!is_ready(turns.next()).await);
        second.took(false);
        assert!(is_ready(turns.next()).await, "a third is needed too");
    }

    #[tokio::test]
    async fn one_that_stands_still_does_not_keep_the_others() {
        let turns = Turns::default();
        let first = turns.next().await;
        first.took(true);
        let begun = Instant::now();
        let _second = turns.next().await;
        assert!(begun.elapsed() >= STALLED);
    }

    #[tokio::test]
    async fn one_that_waits_for_orders_does_not_stand_still() {
        let turns = Turns::default();
        let _first = turns.next().await;
        let second = tokio::time::timeout(STALLED * 3, turns.next()).await;
        assert!(second.is_err());
    }
}
