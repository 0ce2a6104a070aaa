//! A thread for what no order waits for. It gets a processor when orders leave one.

use std::io;

use tokio::runtime::{Builder, EnterGuard, Runtime};

/// Niceness of the thread: a tenth of an order's thread's weight where both want the same processor (`sched(7)`).
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// A runtime with one thread. Dropping it does not wait for what it runs.
#[derive(Debug)]
pub(super) struct Aside(Option<Runtime>);

impl Aside {
    /// Starts the thread under this name.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(name)
            .on_thread_start(be_nice)
            .enable_all()
            .build()?;
        Ok(Aside(Some(runtime)))
    }

    /// Tasks that are started while the guard is held run there.
    pub(super) fn enter(&self) -> Option<EnterGuard<'_>> {
        self.0.as_ref().map(Runtime::enter)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// On Linux the niceness is that of the calling thread; elsewhere it would be the whole process's.
fn be_nice() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{getpriority_process, setpriority_process};
        // Never more weight than the process was started with.
        let nicer = |niceness| setpriority_process(None, NICE.max(niceness));
        if let Err(error) = getpriority_process(None).and_then(nicer) {
            tracing::debug!(reason = %error, "a thread keeps its priority");
        }
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    fn here() -> (Option<String>, i32) {
        let niceness = rustix::process::getpriority_process(None).unwrap();
        (std::thread::current().name().map(str::to_owned), niceness)
    }

    #[tokio::test]
    async fn what_is_started_there_has_less_weight_and_nothing_else() {
        let (name, niceness) = here();
        let aside = Aside::start("aside").unwrap();
        let entered = aside.enter();
        let task = tokio::spawn(async { here() });
        drop(entered);
        // An ordinary user's process may have been started nice already.
        let expected = (Some("aside".to_owned()), NICE.max(niceness));
        assert_eq!(task.await.unwrap(), expected);
        assert_eq!(
            tokio::spawn(async { here() }).await.unwrap(),
            (name, niceness)
        );
    }
}
