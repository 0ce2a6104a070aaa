//! How a thread that has nothing to do is woken by whoever has something for it.
//!
//! ```text
//!   owner:  sleeping = true ─► fence ─► is there work? no ─► park
//!   others: publish work    ─► fence ─► sleeping? yes ─► unpark
//! ```
//!
//! Dekker's pattern: with a sequentially consistent fence on both sides, either the owner sees the
//! work or the other sees it asleep. While the owner is busy a ring costs a fence and a read.
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
    /// A bell that nobody listens to yet.
    pub fn new() -> Self {
        Parker {
            sleeping: AtomicBool::new(false),
            owner: OnceLock::new(),
        }
    }

    /// Makes the present thread the one that listens; once, before its first
    /// [`Parker::park_unless`].
    pub fn listen(&self) {
        let _ = self.owner.set(thread::current());
    }

    /// Wakes the owner if it sleeps. Comes after the work was published.
    pub fn unpark(&self) {
        fence(Ordering::SeqCst);
        // Acquire: whoever sees the owner asleep sees whom to wake. Of many who ring only the first
        // pays for a system call: to wake a thread that is awake already is one exchange.
        if self.sleeping.load(Ordering::Acquire) {
            self.owner.get().map(Thread::unpark);
        }
    }

    /// Sleeps until somebody rings, unless `has_work`. May wake for no reason.
    pub fn park_unless(&self, has_work: impl FnOnce() -> bool) {
        // The fence orders it before the look at the work. Release: whoever sees it sees `owner`.
        self.sleeping.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        if !has_work() {
            thread::park();
        }
        self.sleeping.store(false, Ordering::Relaxed);
    }
}
