//! Runs a future on tokio and parks the coroutine of a request until it is done.

use std::future::Future;
use std::sync::Arc;
use std::task::Waker;

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::wake::wait;
use crate::http::message::Request;

/// The future ended without a result: it panicked, or the runtime is shutting down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskLost;

enum Outcome<T> {
    Pending,
    Done(T),
    Lost,
}

/// Sets the outcome and wakes the coroutine, however the task ends.
struct Finish<T> {
    outcome: Arc<Mutex<Outcome<T>>>,
    waker: Waker,
}

impl<T> Drop for Finish<T> {
    fn drop(&mut self) {
        let mut outcome = self.outcome.lock();
        if matches!(*outcome, Outcome::Pending) {
            *outcome = Outcome::Lost;
        }
        drop(outcome);
        self.waker.wake_by_ref();
    }
}

/// Runs `future` on `runtime` while the coroutine of `request` is parked.
///
/// # Errors
/// [`TaskLost`] if the future ended without a result.
pub fn run<T: Send + 'static>(
    request: &Request<'_>,
    runtime: &Handle,
    future: impl Future<Output = T> + Send + 'static,
) -> Result<T, TaskLost> {
    let outcome = Arc::new(Mutex::new(Outcome::Pending));
    let finish = Finish {
        outcome: Arc::clone(&outcome),
        waker: Waker::clone(request.waker),
    };
    runtime.spawn(async move {
        let done = future.await;
        *finish.outcome.lock() = Outcome::Done(done);
    });
    wait(request, || !matches!(*outcome.lock(), Outcome::Pending));
    match std::mem::replace(&mut *outcome.lock(), Outcome::Lost) {
        Outcome::Done(done) => Ok(done),
        Outcome::Pending | Outcome::Lost => Err(TaskLost),
    }
}
