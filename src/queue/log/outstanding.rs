//! When a segment may be deleted: every order in it is settled, and none will be added.
//!
//! ```text
//!   appender: add ─► write … add ─► write ─► seal         (the next segment is written to)
//!   workers:                  settled … settled
//!   any thread:                           sealed? ─► outstanding = 0? ─► done, for good
//! ```
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use crate::faults::bug;
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// Counts the outstanding orders of one segment.
#[derive(Debug)]
pub(super) struct Outstanding {
    /// Orders in it that are not yet settled in the database.
    orders: AtomicU64,
    /// No more orders are added.
    sealed: AtomicBool,
}

impl Outstanding {
    pub(super) fn new() -> Self {
        Outstanding {
            orders: AtomicU64::new(0),
            sealed: AtomicBool::new(false),
        }
    }

    /// Counts orders that are about to be written. Call before the segment is sealed.
    pub(super) fn add(&self, orders: u64) {
        self.orders.fetch_add(orders, Ordering::AcqRel);
    }

    /// Counts settled orders, and returns how many were outstanding before.
    pub(super) fn settled(&self, orders: u64) -> u64 {
        self.orders.fetch_sub(orders, Ordering::AcqRel)
    }

    pub(super) fn orders(&self) -> u64 {
        self.orders.load(Ordering::Acquire)
    }

    /// Marks that no more orders are added.
    pub(super) fn seal(&self) {
        // Release: a thread that sees it sees every order that was added.
        self.sealed.store(true, Ordering::Release);
    }

    /// Whether the segment is sealed and all its orders are settled. Never turns false again.
    pub(super) fn is_done(&self) -> bool {
        // Sealed first: a zero count before the seal does not cover orders added until then.
        self.sealed.load(Ordering::Acquire) && (self.orders() == 0 || bug("retire_before_commit"))
    }
}
