//! The door of a lane: requests pass while it is open, and whoever shuts it learns when the last one is through.

use crate::sync::{AtomicU64, Ordering};

/// A door, shut at first.
#[derive(Debug)]
pub(super) struct Door {
    /// [`OPEN`], and the number of passes below it.
    ///
    /// Passing and shutting are read-modify-writes of this word, so they are totally ordered: a pass that was given
    /// before the door was shut is in the number that [`Door::is_drained`] reads afterwards. It reads with `Acquire`, and
    /// a pass is returned with `Release`, so it sees everything that was done under passes. A request that finds the door
    /// shut is in the number for a moment, which only delays.
    word: AtomicU64,
}

const OPEN: u64 = 1 << 63;

/// The permission to serve one request of a lane. The lane is not handed over while it lives.
#[derive(Debug)]
#[must_use = "the lane may be handed over as soon as the pass is dropped"]
pub struct LanePass<'a> {
    door: &'a Door,
}

impl Drop for LanePass<'_> {
    fn drop(&mut self) {
        self.door.leave();
    }
}

impl Door {
    pub(super) fn new() -> Self {
        Door {
            word: AtomicU64::new(0),
        }
    }

    /// Lets one request through, if the door is open.
    pub(super) fn pass(&self) -> Option<LanePass<'_>> {
        // Acquire: what was loaded before the door was opened is visible.
        if self.word.fetch_add(1, Ordering::Acquire) & OPEN != 0 {
            return Some(LanePass { door: self });
        }
        self.leave();
        None
    }

    /// Returns a pass.
    pub(super) fn leave(&self) {
        self.word.fetch_sub(1, Ordering::Release);
    }

    pub(super) fn open(&self) {
        self.word.fetch_or(OPEN, Ordering::Release);
    }

    pub(super) fn shut(&self) {
        self.word.fetch_and(!OPEN, Ordering::AcqRel);
    }

    /// Whether the door is shut and no request is through it.
    pub(super) fn is_drained(&self) -> bool {
        self.word.load(Ordering::Acquire) == 0
    }
}
