//! Room for records that are not written yet.
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use std::sync::Arc;

use crate::sync::{AtomicI64, Ordering};

/// Room for records that are not written yet, in sectors. What a record may need is taken before
/// its order's stock is held, so that an order that was let in can always be written.
#[derive(Debug)]
pub(super) struct Space {
    sectors: AtomicI64,
}

impl Space {
    pub(super) fn new(sectors: i64) -> Self {
        Space {
            sectors: AtomicI64::new(sectors),
        }
    }

    /// Takes room for one record.
    pub(super) fn take(self: &Arc<Self>, sectors: u32) -> Option<Permit> {
        // Relaxed: the number alone is agreed on, it publishes nothing.
        self.sectors
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                (left >= i64::from(sectors)).then(|| left - i64::from(sectors))
            })
            .ok()
            .map(|_| Permit {
                space: Arc::clone(self),
                sectors,
            })
    }

    /// Adds room, or takes some back.
    pub(super) fn give(&self, sectors: i64) {
        self.sectors.fetch_add(sectors, Ordering::Relaxed);
    }
}

/// Room for one record. Dropping it gives the room back.
#[derive(Debug)]
#[must_use = "dropping a permit gives its room back"]
pub struct Permit {
    space: Arc<Space>,
    sectors: u32,
}

impl Permit {
    /// Hands the room over to the group that the record is written in.
    pub(super) fn spend(mut self) -> u32 {
        std::mem::take(&mut self.sectors)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.space.give(i64::from(self.sectors));
    }
}
