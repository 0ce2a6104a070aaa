//! The primitives under the doorbell, in one place so that `tests/loom.rs` can compile the very
//! same source file against loom's.

pub(super) use std::sync::OnceLock;
pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
pub(super) use std::thread::{Thread, current, park};
