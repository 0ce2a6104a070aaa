//! Synchronisation primitives: atomics, locks, parking, a ring, a map.
//!
//! Modules whose interleavings are checked import these only from here, so that `tests/loom.rs` and
//! `tests/shuttle` can compile the same source files against loom's and shuttle's.

pub(crate) use std::hint::spin_loop as spin;
pub(crate) use std::sync::OnceLock;
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
pub(crate) use std::task::Waker;

pub(crate) use crossbeam::queue::ArrayQueue;
pub(crate) use dashmap::{DashMap, Entry};
#[cfg(not(feature = "faults"))]
pub(crate) use parking_lot::Condvar;
pub(crate) use parking_lot::Mutex;
pub(crate) use tokio::sync::Notify;
#[cfg(not(feature = "faults"))]
pub(crate) use tokio::task::spawn_blocking;

#[cfg(feature = "faults")]
pub(crate) use crate::simulated::{Condvar, spawn_blocking, thread};

/// Threads, and how they sleep.
#[cfg(not(feature = "faults"))]
pub(crate) mod thread {
    pub(crate) use std::thread::{Builder, Thread, current, park, park_timeout};
    pub(crate) type JoinHandle = std::thread::JoinHandle<()>;
}

/// A value behind a lock that is never held across a call-out.
#[derive(Debug, Default)]
pub(crate) struct Guarded<T>(Mutex<T>);

impl<T> Guarded<T> {
    pub(crate) fn new(value: T) -> Self {
        Guarded(Mutex::new(value))
    }

    pub(crate) fn with<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut self.0.lock())
    }
}
