//! The surroundings of a process in a simulation: clocks, chance, threads, and the way to the database. Compiled into
//! test builds only; elsewhere the real ones are called directly.
//!
//! A simulation runs everything on one thread, which has the surroundings. Threads that the process starts are run on it
//! in turn: one goes on until it parks. So the same seed gives the same run.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tokio::io::DuplexStream;
use tokio::task::JoinHandle as TaskHandle;

/// What a process finds around it.
pub trait Surroundings {
    /// The monotonic clock.
    fn now(&self) -> Instant;
    /// A fixed moment of the monotonic clock.
    fn start(&self) -> Instant;
    /// The wall clock, in Unix milliseconds.
    fn wall_ms(&self) -> i64;
    /// Milliseconds since the machine was started.
    fn since_boot_ms(&self) -> u64;
    /// Chance.
    fn random(&self) -> u64;
    /// Whether this defect of [`crate::faults::BUGS`] is enabled.
    fn has_bug(&self, name: &str) -> bool;
    /// Starts a thread, and returns its number.
    fn spawn(&self, name: &str, work: Box<dyn FnOnce() + Send>) -> u64;
    /// The number of the thread that runs.
    fn current(&self) -> u64;
    /// Lets the thread that runs sleep until it is unparked, or for so long.
    fn park(&self, limit: Option<Duration>);
    /// Wakes a thread.
    fn unpark(&self, thread: u64);
    /// Lets a thread run to its end, now.
    fn join(&self, thread: u64);
    /// A connection to the database.
    fn dial(&self) -> DuplexStream;
}

thread_local! {
    static SURROUNDINGS: RefCell<Option<Rc<dyn Surroundings>>> = const { RefCell::new(None) };
}

/// The surroundings of this thread, if it is a simulation's.
#[inline]
pub fn surroundings() -> Option<Rc<dyn Surroundings>> {
    SURROUNDINGS.with(|here| here.borrow().clone())
}

/// Gives this thread surroundings, until the guard is dropped.
#[must_use]
pub fn enter(surroundings: Rc<dyn Surroundings>) -> Entered {
    SURROUNDINGS.set(Some(surroundings));
    Entered(())
}

/// This thread has surroundings.
#[derive(Debug)]
pub struct Entered(());

impl Drop for Entered {
    fn drop(&mut self) {
        SURROUNDINGS.set(None);
    }
}

/// As [`tokio::task::spawn_blocking`]. In a simulation the work is done when this returns, on a thread without
/// surroundings.
pub(crate) fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> TaskHandle<T> {
    if surroundings().is_none() {
        return tokio::task::spawn_blocking(work);
    }
    let done = std::thread::spawn(work).join();
    tokio::spawn(async move { done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)) })
}

/// As [`std::thread`], whose threads they are outside of a simulation.
pub(crate) mod thread {
    use super::{Duration, io, surroundings};

    #[derive(Clone, Debug)]
    pub(crate) enum Thread {
        Real(std::thread::Thread),
        Simulated(u64),
    }

    impl Thread {
        pub(crate) fn unpark(&self) {
            match self {
                Thread::Real(thread) => thread.unpark(),
                Thread::Simulated(thread) => {
                    if let Some(surroundings) = surroundings() {
                        surroundings.unpark(*thread);
                    }
                }
            }
        }
    }

    #[derive(Debug)]
    pub(crate) enum JoinHandle {
        Real(std::thread::JoinHandle<()>),
        Simulated(u64),
    }

    impl JoinHandle {
        pub(crate) fn join(self) -> std::thread::Result<()> {
            match self {
                JoinHandle::Real(handle) => handle.join(),
                JoinHandle::Simulated(thread) => {
                    if let Some(surroundings) = surroundings() {
                        surroundings.join(thread);
                    }
                    Ok(())
                }
            }
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct Builder(String);

    impl Builder {
        pub(crate) fn new() -> Self {
            Builder::default()
        }

        pub(crate) fn name(self, name: String) -> Self {
            Builder(name)
        }

        pub(crate) fn spawn(self, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle> {
            if let Some(surroundings) = surroundings() {
                let thread = surroundings.spawn(&self.0, Box::new(work));
                return Ok(JoinHandle::Simulated(thread));
            }
            let real = std::thread::Builder::new().name(self.0);
            real.spawn(work).map(JoinHandle::Real)
        }
    }

    pub(crate) fn current() -> Thread {
        surroundings().map_or_else(
            || Thread::Real(std::thread::current()),
            |surroundings| Thread::Simulated(surroundings.current()),
        )
    }

    pub(crate) fn park() {
        match surroundings() {
            Some(surroundings) => surroundings.park(None),
            None => std::thread::park(),
        }
    }

    pub(crate) fn park_timeout(limit: Duration) {
        match surroundings() {
            Some(surroundings) => surroundings.park(Some(limit)),
            None => std::thread::park_timeout(limit),
        }
    }
}

/// As [`parking_lot::Condvar`].
#[derive(Debug, Default)]
pub(crate) struct Condvar {
    real: parking_lot::Condvar,
    /// Threads of a simulation that wait.
    waiting: Mutex<Vec<u64>>,
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Condvar::default()
    }

    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        if !self.parked(guard, None) {
            self.real.wait(guard);
        }
    }

    pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, limit: Duration) {
        if !self.parked(guard, Some(limit)) {
            self.real.wait_for(guard, limit);
        }
    }

    pub(crate) fn notify_all(&self) {
        self.real.notify_all();
        if let Some(surroundings) = surroundings() {
            let waiting = std::mem::take(&mut *self.waiting.lock());
            waiting
                .into_iter()
                .for_each(|thread| surroundings.unpark(thread));
        }
    }

    /// Waits as a thread of a simulation does. May end early, as those who wait expect.
    fn parked<T>(&self, guard: &mut MutexGuard<'_, T>, limit: Option<Duration>) -> bool {
        let Some(surroundings) = surroundings() else {
            return false;
        };
        self.waiting.lock().push(surroundings.current());
        MutexGuard::unlocked(guard, || surroundings.park(limit));
        true
    }
}
