//! Supervision of everything that runs as long as the process. A task, thread or coroutine that
//! ends unasked, by a panic or by returning, is reported, and the report poisons the process. No
//! part that a promise relies on may disappear silently.
//!
//! `tests/architecture.rs` lists the few places that start something unsupervised, with their
//! reasons.

use std::any::Any;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tokio::task::{JoinHandle, JoinSet};

use crate::faults::{self, Fate};

/// Called with the reason, once for each unasked end.
pub type Report = Arc<dyn Fn(String) + Send + Sync>;

/// Starts tasks and threads that must run until the process stops, and reports each that does not.
/// Cheap to clone.
#[derive(Clone)]
pub struct Supervisor {
    report: Report,
    stopping: Arc<AtomicBool>,
}

impl Default for Supervisor {
    /// A supervisor that reports to nobody, for tests of a single part.
    fn default() -> Self {
        Supervisor::new(Arc::new(|_| {}))
    }
}

impl Supervisor {
    /// Creates a supervisor that calls `report`, which must not block.
    pub fn new(report: Report) -> Self {
        Supervisor {
            report,
            stopping: Arc::default(),
        }
    }

    /// Marks that the process is stopping: an end is no longer reported.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Runs `work` as a task of the current runtime. An aborted task counts as asked to end.
    pub fn task<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<Option<T>> {
        tokio::spawn(self.clone().watch(name, work))
    }

    /// Same as [`Supervisor::task`], as a member of `tasks`.
    pub fn task_of<T: Send + 'static>(
        &self,
        tasks: &mut JoinSet<Option<T>>,
        name: &'static str,
        work: impl Future<Output = T> + Send + 'static,
    ) {
        tasks.spawn(self.clone().watch(name, work));
    }

    /// The result of `work`; `None` if it panicked.
    async fn watch<T>(self, name: &'static str, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let ended = poll_fn(|context| {
            // State that a panic left half done is not read afterwards: the process stops.
            let polled = catch_unwind(AssertUnwindSafe(|| match faults::fate(name) {
                None => work.as_mut().poll(context).map(Some),
                Some(Fate::End) => std::task::Poll::Ready(None),
                Some(Fate::Panic) => panic!("a deliberate fault"),
            }));
            match polled {
                Ok(polled) => polled.map(Ok),
                Err(panic) => std::task::Poll::Ready(Err(panic)),
            }
        })
        .await;
        self.check_end(name, ended.as_ref().map(drop), || false);
        ended.ok().flatten()
    }

    /// Runs `work` on a thread of its own. `asked` tells, at its end, whether it was asked to end.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn thread(
        &self,
        name: &'static str,
        asked: impl Fn() -> bool + Send + 'static,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<thread::JoinHandle<()>> {
        let supervisor = self.clone();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || supervisor.run(name, asked, work))
    }

    /// Runs `work` here, on a thread or coroutine that the caller has started for it.
    pub fn run(&self, name: &'static str, asked: impl Fn() -> bool, work: impl FnOnce()) {
        let ended = catch_unwind(AssertUnwindSafe(|| match faults::fate(name) {
            None => work(),
            Some(Fate::End) => {}
            Some(Fate::Panic) => panic!("a deliberate fault"),
        }));
        self.check_end(name, ended.as_ref().map(drop), asked);
    }

    fn check_end(
        &self,
        name: &str,
        ended: Result<(), &Box<dyn Any + Send>>,
        asked: impl Fn() -> bool,
    ) {
        match ended {
            Err(panic) => (self.report)(format!("{name} panicked: {}", message(panic))),
            Ok(()) if self.stopping.load(Ordering::Acquire) || asked() => {}
            Ok(()) => (self.report)(format!("{name} ended without being asked to")),
        }
    }
}

fn message(panic: &Box<dyn Any + Send>) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn supervisor() -> (Supervisor, Arc<Mutex<Vec<String>>>) {
        let heard = Arc::<Mutex<Vec<String>>>::default();
        let hearing = Arc::clone(&heard);
        let report: Report = Arc::new(move |reason| hearing.lock().unwrap().push(reason));
        (Supervisor::new(report), heard)
    }

    #[tokio::test]
    async fn a_task_that_returns_or_panics_is_reported_and_one_that_is_aborted_is_not() {
        let (supervisor, heard) = supervisor();
        assert_eq!(supervisor.task("one", async { 7 }).await.unwrap(), Some(7));
        let panicking = async { panic!("at {}", 3) };
        assert_eq!(supervisor.task("two", panicking).await.unwrap(), None::<()>);
        let aborted = supervisor.task("three", std::future::pending::<()>());
        aborted.abort();
        assert!(aborted.await.unwrap_err().is_cancelled());
        let expected = ["one ended without being asked to", "two panicked: at 3"];
        assert_eq!(*heard.lock().unwrap(), expected);
    }

    #[tokio::test]
    async fn while_the_process_stops_only_a_panic_is_reported() {
        let (supervisor, heard) = supervisor();
        supervisor.stop();
        supervisor.task("one", async {}).await.unwrap();
        let panicking = async { panic!("no") };
        assert_eq!(supervisor.task("two", panicking).await.unwrap(), None::<()>);
        assert_eq!(*heard.lock().unwrap(), ["two panicked: no"]);
    }

    #[test]
    fn a_thread_is_asked_to_end_by_its_own_sign_too() {
        let (supervisor, heard) = supervisor();
        for asked in [true, false] {
            let thread = supervisor.thread("a thread", move || asked, || {});
            thread.unwrap().join().unwrap();
        }
        let panicking = supervisor.thread("another", || true, || panic!("no"));
        panicking.unwrap().join().unwrap();
        let expected = [
            "a thread ended without being asked to",
            "another panicked: no",
        ];
        assert_eq!(*heard.lock().unwrap(), expected);
    }
}
