//! The draw of a SKU, as far as memory knows it: whether it takes entries, and the tokens that it gives out. The seed
//! stays in the database until the draw is made.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::order::UserId;
use crate::order::draw::{Commitment, EntryToken, EntryTokens, Salt};

/// How far a draw has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrawPhase {
    /// Entries come in.
    Open,
    /// Entries have ended; the last of them are being written.
    Closed,
    /// Number and hash of the entries are stored and published.
    Fixed,
    /// The entries are ranked, the seed is published, units go out by rank.
    Drawn,
}

/// The draw of a SKU.
#[derive(Debug)]
pub struct Draw {
    commitment: Commitment,
    tokens: EntryTokens,
    /// A [`DrawPhase`]. It leaves `Open` under the lock of the waiting list, so that no entry joins afterwards.
    phase: AtomicU8,
    /// Whether anybody has entered: from then on the terms stay.
    entered: AtomicBool,
    /// Whether the terms are being changed: nobody enters meanwhile. Set under the lock of the waiting list.
    changing: AtomicBool,
    /// Whether the beacon is stored, if there is to be one.
    has_beacon: AtomicBool,
}

impl Draw {
    /// A draw in this phase.
    pub fn new(commitment: Commitment, salt: &Salt, phase: DrawPhase, has_beacon: bool) -> Self {
        Draw {
            commitment,
            tokens: EntryTokens::new(salt),
            phase: AtomicU8::new(phase as u8),
            entered: AtomicBool::new(false),
            changing: AtomicBool::new(false),
            has_beacon: AtomicBool::new(has_beacon),
        }
    }

    /// SHA-256 of the seed.
    pub fn commitment(&self) -> Commitment {
        self.commitment
    }

    /// The token of a user's entry.
    pub fn token(&self, user: &UserId) -> EntryToken {
        self.tokens.of(user)
    }

    /// How far it has come.
    pub fn phase(&self) -> DrawPhase {
        // Acquire: whoever sees the draw made also sees the list in the order of rank.
        match self.phase.load(Ordering::Acquire) {
            0 => DrawPhase::Open,
            1 => DrawPhase::Closed,
            2 => DrawPhase::Fixed,
            _ => DrawPhase::Drawn,
        }
    }

    /// Whether units go out.
    pub fn is_drawn(&self) -> bool {
        self.phase() == DrawPhase::Drawn
    }

    /// Goes on to a phase; never back.
    pub fn reach(&self, phase: DrawPhase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
    }

    /// Somebody enters.
    pub fn note_entry(&self) {
        // A load first: of a million entries one writes.
        if !self.entered.load(Ordering::Relaxed) {
            self.entered.store(true, Ordering::Relaxed);
        }
    }

    /// Whether anybody has entered since this process knows the draw, or it no longer takes entries.
    pub fn has_entries(&self) -> bool {
        self.entered.load(Ordering::Relaxed) || self.phase() > DrawPhase::Open
    }

    /// Takes no entries until the guard is dropped; `None` if somebody has entered, or could have. Call it under the lock of the waiting
    /// list.
    pub fn begin_change(self: &Arc<Self>) -> Option<DrawChange> {
        if self.has_entries() {
            return None;
        }
        self.changing.store(true, Ordering::Relaxed);
        Some(DrawChange(Arc::clone(self)))
    }

    /// Whether the terms are being changed.
    pub fn is_changing(&self) -> bool {
        self.changing.load(Ordering::Relaxed)
    }

    /// The beacon is stored.
    pub fn note_beacon(&self) {
        self.has_beacon.store(true, Ordering::Release);
    }

    /// Whether the beacon is stored.
    pub fn has_beacon(&self) -> bool {
        self.has_beacon.load(Ordering::Acquire)
    }
}

/// A change of the terms of a draw that nobody has entered. Dropping it lets entries in again.
#[derive(Debug)]
#[must_use = "dropping it lets entries in again"]
pub struct DrawChange(Arc<Draw>);

impl Drop for DrawChange {
    fn drop(&mut self) {
        self.0.changing.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_change_only_before_the_first_entry() {
        let draw = Draw::new(Commitment([0; 32]), &Salt([1; 32]), DrawPhase::Open, false);
        let draw = Arc::new(draw);
        let change = draw.begin_change();
        assert!(change.is_some() && draw.is_changing());
        drop(change);
        assert!(!draw.is_changing());
        draw.note_entry();
        assert!(draw.begin_change().is_none());
        let unentered = Draw::new(Commitment([0; 32]), &Salt([1; 32]), DrawPhase::Open, true);
        unentered.reach(DrawPhase::Fixed);
        assert!(Arc::new(unentered).begin_change().is_none());
    }

    #[test]
    fn a_draw_goes_on_and_never_back() {
        let draw = Draw::new(Commitment([0; 32]), &Salt([1; 32]), DrawPhase::Open, false);
        draw.reach(DrawPhase::Fixed);
        draw.reach(DrawPhase::Closed);
        assert_eq!(draw.phase(), DrawPhase::Fixed);
        draw.reach(DrawPhase::Drawn);
        assert!(draw.is_drawn());
    }
}
