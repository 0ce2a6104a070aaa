//! A [`std::task::Waker`] over a coroutine, so that async code can wake one.

use std::sync::Arc;
use std::task::{Wake, Waker};

use may::coroutine::{self, Coroutine};

use crate::http::message::Request;

/// Wakes one coroutine. A connection makes it once and lends it to each of its requests.
pub struct CoroutineWaker {
    coroutine: Coroutine,
}

impl CoroutineWaker {
    /// A waker of the coroutine that calls this.
    ///
    /// # Panics
    ///
    /// When called on a plain thread.
    pub fn current() -> Waker {
        Waker::from(Arc::new(Self {
            coroutine: coroutine::current(),
        }))
    }
}

impl Wake for CoroutineWaker {
    fn wake(self: Arc<Self>) {
        self.coroutine.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.coroutine.unpark();
    }
}

/// Parks the current coroutine until `ready` holds.
///
/// Whoever makes `ready` true must do so before waking. Wake-ups leave a token that the next park
/// consumes, so one that arrives between the check and the park is not lost, and a stale one only
/// costs another check. There is no timeout on purpose: a coroutine that times out goes on running
/// on the runtime's single timer thread.
pub fn park_until(mut ready: impl FnMut() -> bool) {
    while !ready() {
        coroutine::park();
    }
}

/// Parks the coroutine of `request` until `ready` holds; the way for a service to wait.
///
/// Before it parks, the engine writes the answers that earlier pipelined requests of this
/// connection are owed, so that none of them waits for this one.
pub fn wait(request: &Request<'_>, mut ready: impl FnMut() -> bool) {
    if ready() {
        return;
    }
    (request.before_wait)();
    park_until(ready);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::http::server::runtime;

    #[test]
    fn no_wake_up_from_a_foreign_thread_is_lost() {
        const ROUNDS: usize = 20_000;
        runtime::configure(2);
        let asked = Arc::new(AtomicUsize::new(0));
        let (waker_out, waker_in) = mpsc::channel();
        let (done_out, done_in) = mpsc::channel();
        let turns = asked.clone();
        may::go!(move || {
            let _ = waker_out.send(CoroutineWaker::current());
            for round in 1..=ROUNDS {
                park_until(|| turns.load(Ordering::Acquire) >= round);
                let _ = done_out.send(round);
            }
        });
        let waker = waker_in
            .recv_timeout(Duration::from_secs(10))
            .expect("the coroutine started");
        for round in 1..=ROUNDS {
            asked.store(round, Ordering::Release);
            waker.wake_by_ref();
            let seen = done_in
                .recv_timeout(Duration::from_secs(10))
                .expect("the coroutine woke");
            assert_eq!(seen, round);
        }
    }

    #[test]
    fn a_wake_up_before_the_park_counts() {
        runtime::configure(2);
        let (done_out, done_in) = mpsc::channel();
        may::go!(move || {
            let ready = AtomicBool::new(false);
            let waker = CoroutineWaker::current();
            let mut checks = 0;
            park_until(|| {
                checks += 1;
                // The first check fails and the wake-up falls between it and the park.
                waker.wake_by_ref();
                ready.swap(true, Ordering::AcqRel)
            });
            let _ = done_out.send(checks);
        });
        let checks = done_in.recv_timeout(Duration::from_secs(10));
        assert_eq!(checks, Ok(2));
    }
}
