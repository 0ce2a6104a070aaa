//! A thread that sleeps while it has no work, and is woken by other threads.
//!
//! ```text
//!   owner:  sleeping = true ─► fence ─► is there work? no ─► park
//!   others: publish work    ─► fence ─► sleeping? yes ─► unpark
//! ```
//!
//! Dekker's protocol: with a sequentially consistent fence on both sides, either the owner sees the
//! work or the other thread sees the owner asleep. While the owner is busy, waking costs a fence
//! and a read.
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use crate::sync::thread::{self, Thread};
use crate::sync::{AtomicBool, OnceLock, Ordering, fence};

/// One thread that parks while it has no work.
#[derive(Debug)]
pub struct Parker {
    sleeping: AtomicBool,
    owner: OnceLock<Thread>,
}

impl Parker {
    /// Creates a parker without an owner.
    pub fn new() -> Self {
        Parker {
            sleeping: AtomicBool::new(false),
            owner: OnceLock::new(),
        }
    }

    /// Makes the current thread the owner; call once, before its first [`Parker::park_unless`].
    pub fn listen(&self) {
        let _ = self.owner.set(thread::current());
    }

    /// Wakes the owner if it sleeps. Call after publishing the work.
    pub fn unpark(&self) {
        fence(Ordering::SeqCst);
        // Acquire: a thread that sees the owner asleep also sees `owner`. Of many callers only the
        // first pays for a system call: waking an awake thread is one exchange.
        if self.sleeping.load(Ordering::Acquire) {
            self.owner.get().map(Thread::unpark);
        }
    }

    /// Sleeps until [`Parker::unpark`], unless `has_work`. May wake spuriously.
    pub fn park_unless(&self, has_work: impl FnOnce() -> bool) {
        // The fence orders the store before the check for work. Release: publishes `owner`.
        self.sleeping.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        if !has_work() {
            thread::park();
        }
        self.sleeping.store(false, Ordering::Relaxed);
    }
}
