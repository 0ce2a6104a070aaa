//! Coroutines that run jobs, and wait for the next one afterwards.
//!
//! The runtime's own pool gives out the coroutine that has been idle for longest, so that each job would begin on a stack
//! that is in no cache. Here the coroutine that became idle last is the next one.

use std::sync::Arc;
use std::task::Waker;

use may::coroutine::{self, Coroutine};
use parking_lot::Mutex;

use crate::http::server::wake::{CoroutineWaker, park_until};

/// Idle coroutines that are kept.
const IDLE_MAX: usize = 512;

/// A coroutine that waits for a job.
struct Runner<J> {
    coroutine: Coroutine,
    given: Mutex<Option<J>>,
}

struct Idle<J> {
    runners: Vec<Arc<Runner<J>>>,
    closed: bool,
}

/// The idle coroutines.
pub(super) struct Runners<J>(Mutex<Idle<J>>);

impl<J> Default for Runners<J> {
    fn default() -> Self {
        Runners(Mutex::new(Idle {
            runners: Vec::new(),
            closed: false,
        }))
    }
}

impl<J> Runners<J> {
    /// Gives a job to an idle coroutine.
    ///
    /// # Errors
    /// The job, if there is none: [`Runners::run`] it on a new one.
    pub(super) fn give(&self, job: J) -> Result<(), J> {
        let Some(runner) = self.0.lock().runners.pop() else {
            return Err(job);
        };
        *runner.given.lock() = Some(job);
        runner.coroutine.unpark();
        Ok(())
    }

    /// Runs `first` on this coroutine, and each job that it is given then; returns once it is not needed any more. `work`
    /// gets a waker of the coroutine.
    pub(super) fn run(&self, first: J, mut work: impl FnMut(J, &Arc<Waker>)) {
        let waker = Arc::new(CoroutineWaker::current());
        let runner = Arc::new(Runner {
            coroutine: coroutine::current(),
            given: Mutex::new(None),
        });
        let mut next = Some(first);
        while let Some(job) = next.take() {
            work(job, &waker);
            if self.wait(&runner) {
                park_until(|| {
                    next = runner.given.lock().take();
                    next.is_some() || self.0.lock().closed
                });
            }
        }
    }

    /// Makes a coroutine idle; false: it is not needed.
    fn wait(&self, runner: &Arc<Runner<J>>) -> bool {
        let mut idle = self.0.lock();
        let is_needed = !idle.closed && idle.runners.len() < IDLE_MAX;
        if is_needed {
            idle.runners.push(Arc::clone(runner));
        }
        is_needed
    }

    /// Ends the idle coroutines, and each other one once its job is done.
    pub(super) fn close(&self) {
        let runners = {
            let mut idle = self.0.lock();
            idle.closed = true;
            std::mem::take(&mut idle.runners)
        };
        for runner in runners {
            runner.coroutine.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::http::server::runtime;

    const SOON: Duration = Duration::from_secs(10);

    /// Starts a coroutine that begins with `job` and tells of each that it has done, and of its end.
    fn start(runners: &Arc<Runners<u32>>, job: u32, told: mpsc::Sender<Option<u32>>) {
        runtime::configure(2);
        let runners = Arc::clone(runners);
        may::go!(move || {
            runners.run(job, |job, _| told.send(Some(job)).unwrap());
            told.send(None).unwrap();
            coroutine::yield_now();
        });
    }

    /// Gives a job as soon as a coroutine is idle.
    fn give(runners: &Runners<u32>, job: u32) {
        let deadline = std::time::Instant::now() + SOON;
        while runners.give(job).is_err() {
            assert!(std::time::Instant::now() < deadline, "nobody is idle");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_coroutine_runs_one_job_after_the_other_and_ends_when_all_is_closed() {
        let runners = Arc::<Runners<u32>>::default();
        assert_eq!(runners.give(1), Err(1));
        let (told, hear) = mpsc::channel();
        start(&runners, 1, told.clone());
        for job in 2..1_000 {
            give(&runners, job);
        }
        for job in 1..1_000 {
            assert_eq!(hear.recv_timeout(SOON), Ok(Some(job)));
        }
        start(&runners, 7, told);
        assert_eq!(hear.recv_timeout(SOON), Ok(Some(7)));
        runners.close();
        for _ in 0..2 {
            assert_eq!(hear.recv_timeout(SOON), Ok(None));
        }
        // All senders are gone.
        assert_eq!(
            hear.recv_timeout(SOON),
            Err(mpsc::RecvTimeoutError::Disconnected)
        );
        assert_eq!(runners.give(1), Err(1));
    }

    #[test]
    fn no_more_coroutines_are_kept_than_may_be() {
        let runners = Arc::<Runners<u32>>::default();
        let (told, hear) = mpsc::channel();
        let jobs = u32::try_from(IDLE_MAX + 20).unwrap();
        for job in 0..jobs {
            start(&runners, job, told.clone());
        }
        drop(told);
        let mut heard: Vec<_> = (0..jobs + 20)
            .map(|_| hear.recv_timeout(SOON).unwrap())
            .collect();
        heard.sort_unstable();
        assert_eq!(heard[..20], [None; 20]);
        runners.close();
        let ended = std::iter::from_fn(|| hear.recv_timeout(SOON).ok()).count();
        assert_eq!(ended, IDLE_MAX);
    }
}
