//! Wakes parked coroutines on behalf of foreign threads, many at a time.
//!
//! Waking a coroutine from a foreign thread goes through a descriptor of the runtime's event loop
//! and costs about a microsecond; from another coroutine it is a push onto a local queue, about
//! 30 ns. A worker that settles 5,000 orders at once would spend 5 ms on the former. So it hands
//! the whole batch over: one push, one wake-up of a dispatcher coroutine, which wakes the rest.
//!
//! A coroutine that it wakes runs on the dispatcher's own thread of the runtime, which steals no
//! work from its neighbours. So each thread has a lane, a coroutine with a queue, and a large batch
//! is split among them: the runtime distributes foreign wake-ups over its threads in turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Waker;

use crossbeam::queue::SegQueue;
use may::coroutine::{Coroutine, JoinHandle};

use super::wake::park_until;
use crate::supervise::Supervisor;

/// Wake-ups that are not worth another lane: twice the cost of its own wake-up.
const SPLIT_MIN: usize = 64;

/// A handle to the dispatcher coroutines, which end when this is dropped.
pub struct Dispatcher {
    lanes: Vec<Lane>,
    // Which lane is next; any value will do, so its accesses are relaxed.
    turn: AtomicUsize,
}

struct Lane {
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
    /// As [`Dispatcher::start_supervised`], without supervision: an unexpected end is not reported.
    pub fn start() -> Self {
        Self::start_supervised(&Supervisor::default())
    }

    /// Starts the dispatcher coroutines.
    pub fn start_supervised(supervisor: &Supervisor) -> Self {
        super::runtime::configure(0);
        let lanes = may::config().get_workers().max(1);
        Self {
            lanes: (0..lanes).map(|_| Lane::start(supervisor)).collect(),
            turn: AtomicUsize::new(0),
        }
    }

    /// Wakes every waker of `batch`, soon, on coroutines. Callable from any thread.
    pub fn wake_all(&self, mut batch: Vec<Waker>) {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.lanes.len();
        let share = batch.len().div_ceil(self.lanes.len()).max(SPLIT_MIN);
        for lane in self.lanes.iter().cycle().skip(turn) {
            if batch.len() <= share {
                lane.wake_all(batch);
                return;
            }
            lane.wake_all(batch.split_off(batch.len() - share));
        }
    }

    /// Ends the dispatcher after the batches that it has, and waits until it has ended.
    pub fn stop(mut self) {
        self.lanes.iter().for_each(Lane::close);
        for lane in &mut self.lanes {
            if let Some(handle) = lane.handle.take() {
                // Only a panic of a waker makes it panic; nothing is left to do about that here.
                let _ = handle.join();
            }
        }
    }
}

impl Lane {
    fn start(supervisor: &Supervisor) -> Self {
        let shared = Arc::new(Shared {
            batches: SegQueue::new(),
            closed: AtomicBool::new(false),
        });
        let (theirs, supervisor) = (shared.clone(), supervisor.clone());
        let handle = may::go!(move || {
            let asked = || theirs.closed.load(Ordering::Acquire);
            supervisor.run("a dispatcher", asked, || run(&theirs));
        });
        Self {
            shared,
            coroutine: handle.coroutine().clone(),
            handle: Some(handle),
        }
    }

    fn wake_all(&self, batch: Vec<Waker>) {
        if batch.is_empty() {
            return;
        }
        // The push happens before the wake-up, and the lane looks at the queue after it is woken:
        // no batch stays behind.
        self.shared.batches.push(batch);
        self.coroutine.unpark();
    }

    fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.coroutine.unpark();
    }
}

impl Drop for Lane {
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
    use crate::http::server::runtime;
    use crate::http::server::wake::CoroutineWaker;

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
            // One that is split among the lanes, and small ones that are not.
            let (large, small) = wakers.split_at(150);
            dispatcher.wake_all(large.to_vec());
            for part in small.chunks(7) {
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
        let (ended_out, ended_in) = mpsc::channel();
        let lanes = dispatcher.lanes.len();
        for lane in &mut dispatcher.lanes {
            let handle = lane.handle.take().expect("just started");
            let ended = ended_out.clone();
            std::thread::spawn(move || {
                let _ = ended.send(handle.join().is_ok());
            });
        }
        assert!(
            ended_in.try_recv().is_err(),
            "it ended before it was dropped"
        );
        drop(dispatcher);
        for _ in 0..lanes {
            assert_eq!(ended_in.recv_timeout(PATIENCE), Ok(true));
        }
    }
}
