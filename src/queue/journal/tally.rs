//! When a segment is not needed any more: every order in it is decided, and none will be added.
//!
//! ```text
//!   appender: add ─► write … add ─► write ─► seal         (the next segment is written to)
//!   workers:                  decided … decided
//!   anybody:                              sealed? ─► outstanding = 0? ─► done, for good
//! ```
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use crate::faults::bug;
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// The orders of one segment, counted.
#[derive(Debug)]
pub(super) struct Tally {
    /// Orders in it that the database has not decided yet.
    outstanding: AtomicU64,
    /// No more are added.
    sealed: AtomicBool,
}

impl Tally {
    pub(super) fn new() -> Self {
        Tally {
            outstanding: AtomicU64::new(0),
            sealed: AtomicBool::new(false),
        }
    }

    /// Counts orders that are about to be written to it. Before it is sealed.
    pub(super) fn add(&self, orders: u64) {
        self.outstanding.fetch_add(orders, Ordering::AcqRel);
    }

    /// Counts orders that the database has decided, and returns how many were outstanding before.
    pub(super) fn settled(&self, orders: u64) -> u64 {
        self.outstanding.fetch_sub(orders, Ordering::AcqRel)
    }

    pub(super) fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::Acquire)
    }

    /// No more are added.
    pub(super) fn seal(&self) {
        // Release: whoever sees it sees every order that was added.
        self.sealed.store(true, Ordering::Release);
    }

    /// Whether nothing in it is needed any more. Once true it stays true.
    pub(super) fn is_done(&self) -> bool {
        // The seal first: a count that is zero before it says nothing of what is added until then.
        self.sealed.load(Ordering::Acquire)
            && (self.outstanding() == 0 || bug("retire_before_commit"))
    }
}
