//! Wakes parked coroutines on behalf of foreign threads, many at a time.
//!
//! Waking a coroutine from a foreign thread goes through a descriptor of the runtime's event loop
//! and costs about a microsecond; from another coroutine it is a push onto a local queue, about
//! 30 ns. A worker that settles 5,000 orders at once would spend 5 ms on the former. So it hands
//! the whole batch over: one push, one wake-up of the dispatcher coroutine, which wakes the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use crossbeam::queue::SegQueue;
use may::coroutine::{Coroutine, JoinHandle};

use super::wake::park_until;

/// A handle to the dispatcher coroutine, which ends when this is dropped.
pub struct Dispatcher {
    shared: Arc<Shared>,
    coroutine: Coroutine,
    handle: Option<JoinHandle<()>>,
}

struct Shared {
    // Unbounded, yet bounded by what it carries: a waker is here only while its connection waits,
    // and connections are limited.
    batches: SegQueue<Vec<Waker>>,
    closed: AtomicBool,
}

impl Dispatcher {
    /// Starts the dispatcher coroutine.
    pub fn start() -> Self {
        let shared = Arc::new(Shared {
            batches: SegQueue::new(),
            closed: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let handle = may::go!(move || run(&theirs));
        Self {
            shared,
            coroutine: handle.coroutine().clone(),
            handle: Some(handle),
        }
    }

    /// Wakes every waker of `batch`, soon, on the dispatcher coroutine. Callable from any thread.
    pub fn wake_all(&self, batch: Vec<Waker>) {
        if batch.is_empty() {
            return;
        }
        // The push happens before the wake-up, and the dispatcher looks at the queue after it is
        // woken: no batch stays behind.
        self.shared.batches.push(batch);
        self.coroutine.unpark();
    }

    /// Ends the dispatcher after what it was already handed, and waits until it has ended.
    pub fn stop(mut self) {
        self.close();
        if let Some(handle) = self.handle.take() {
            // It cannot panic but by a waker that does; nothing is left to do about that here.
            let _ = handle.join();
        }
    }

    fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.coroutine.unpark();
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        self.close();
    }
}

fn run(shared: &Shared) {
    loop {
        // Read before the queue is emptied: whatever was pushed before closing is still woken.
        let closed = shared.closed.load(Ordering::Acquire);
        while let Some(batch) = shared.batches.pop() {
            batch.into_iter().for_each(Waker::wake);
        }
        if closed {
            return;
        }
        park_until(|| !shared.batches.is_empty() || shared.closed.load(Ordering::Acquire));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::http::data_plane::runtime;
    use crate::http::data_plane::wake::CoroutineWaker;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn every_parked_coroutine_of_every_batch_wakes() {
        const COROUTINES: usize = 200;
        const ROUNDS: usize = 200;
        runtime::configure(2);
        let dispatcher = Dispatcher::start();
        let round = Arc::new(AtomicUsize::new(0));
        let (wakers_out, wakers_in) = mpsc::channel();
        let (done_out, done_in) = mpsc::channel();
        for _ in 0..COROUTINES {
            let (round, wakers, done) = (round.clone(), wakers_out.clone(), done_out.clone());
            may::go!(move || {
                let _ = wakers.send(CoroutineWaker::current());
                for turn in 1..=ROUNDS {
                    park_until(|| round.load(Ordering::Acquire) >= turn);
                    let _ = done.send(turn);
                }
            });
        }
        let wakers: Vec<Waker> = (0..COROUTINES)
            .map(|_| wakers_in.recv_timeout(PATIENCE).expect("a waker"))
            .collect();
        for turn in 1..=ROUNDS {
            round.store(turn, Ordering::Release);
            for part in wakers.chunks(64) {
                dispatcher.wake_all(part.to_vec());
            }
            for _ in 0..COROUTINES {
                assert_eq!(done_in.recv_timeout(PATIENCE), Ok(turn));
            }
        }
    }

    #[test]
    fn stopping_wakes_what_was_handed_over_and_ends_the_coroutine() {
        runtime::configure(2);
        let dispatcher = Dispatcher::start();
        let (waker_out, waker_in) = mpsc::channel();
        let (done_out, done_in) = mpsc::channel();
        let ready = Arc::new(AtomicBool::new(false));
        let theirs = ready.clone();
        may::go!(move || {
            let _ = waker_out.send(CoroutineWaker::current());
            park_until(|| theirs.load(Ordering::Acquire));
            let _ = done_out.send(());
        });
        let waker = waker_in.recv_timeout(PATIENCE).expect("a waker");
        ready.store(true, Ordering::Release);
        dispatcher.wake_all(vec![waker]);
        dispatcher.stop();
        assert_eq!(done_in.recv_timeout(PATIENCE), Ok(()));
    }

    #[test]
    fn dropping_the_dispatcher_ends_its_coroutine() {
        runtime::configure(2);
        let mut dispatcher = Dispatcher::start();
        let handle = dispatcher.handle.take().expect("just started");
        let shared = Arc::downgrade(&dispatcher.shared);
        drop(dispatcher);
        let (ended_out, ended_in) = mpsc::channel();
        std::thread::spawn(move || {
            let _ = ended_out.send(handle.join().is_ok());
        });
        assert_eq!(ended_in.recv_timeout(PATIENCE), Ok(true));
        assert!(shared.upgrade().is_none());
    }
}
