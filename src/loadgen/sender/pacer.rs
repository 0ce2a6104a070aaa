//! Wakes a poll within a millisecond. The poll's own timeout is in whole milliseconds, and a request sent a
//! millisecond late is a millisecond of made-up latency.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Waits from this on are left to the poll's own timeout.
const COARSE: Duration = Duration::from_millis(2);

/// A thread that wakes the poll every `tick` while it is asked to, and rests otherwise.
pub(super) struct Pacer {
    shared: Arc<Shared>,
    /// None if the thread cannot be had; the poll's coarser timeout then does.
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// The poll waits for the next tick. Only a hint, so relaxed: a tick that is missed is made up by the
    /// next, or by the poll's timeout.
    is_asked: AtomicBool,
    is_over: AtomicBool,
}

impl Pacer {
    pub(super) fn start(waker: mio::Waker, tick: Duration) -> Self {
        let shared = Arc::new(Shared {
            is_asked: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("loadgen-pacer".to_owned())
            .spawn(move || {
                while !of_thread.is_over.load(Ordering::Relaxed) {
                    std::thread::sleep(tick);
                    if !of_thread.is_asked.swap(false, Ordering::Relaxed) {
                        std::thread::park();
                    } else if waker.wake().is_err() {
                        return;
                    }
                }
            })
            .ok();
        Self { shared, thread }
    }

    /// The timeout of a poll that is to return at `until`.
    pub(super) fn wake_at(&mut self, until: Instant, now: Instant) -> Duration {
        let patience = until.saturating_duration_since(now);
        if patience >= COARSE {
            return patience - Duration::from_millis(1);
        }
        if let Some(thread) = &self.thread
            && !self.shared.is_asked.swap(true, Ordering::Relaxed)
        {
            thread.thread().unpark();
        }
        Duration::from_millis(1)
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}
