//! The primitives under the lock-free pieces, in one place so that `tests/loom.rs` can compile
//! the very same source files against loom's.

pub(super) use std::hint::spin_loop as spin;
pub(super) use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
pub(super) use std::task::Waker;

/// A short list behind a lock that nothing holds across a call-out.
#[derive(Debug, Default)]
pub(super) struct Guarded<T>(parking_lot::Mutex<T>);

impl<T> Guarded<T> {
    pub(super) fn new(value: T) -> Self {
        Guarded(parking_lot::Mutex::new(value))
    }

    pub(super) fn with<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut self.0.lock())
    }
}
