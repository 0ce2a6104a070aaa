//! Room reserved for records that are not written yet.
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use std::sync::Arc;

use crate::sync::{AtomicI64, Ordering};

/// Free room for records, in sectors of 512 bytes. An order's room is reserved before its stock is held, so that
/// an admitted order can always be written.
#[derive(Debug)]
pub struct Space {
    sectors: AtomicI64,
}

impl Space {
    /// Room for so many sectors.
    pub fn new(sectors: i64) -> Self {
        Space {
            sectors: AtomicI64::new(sectors),
        }
    }

    /// Reserves room for one record, in sectors; `None` if there is not enough.
    pub fn take(self: &Arc<Self>, sectors: u32) -> Option<Permit> {
        // Relaxed: only the number itself is shared, it publishes nothing.
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

    /// Adds room; a negative number removes it.
    pub fn give(&self, sectors: i64) {
        self.sectors.fetch_add(sectors, Ordering::Relaxed);
    }
}

/// Room reserved for one record. Dropping it returns the room.
#[derive(Debug)]
#[must_use = "dropping a permit gives its room back"]
pub struct Permit {
    space: Arc<Space>,
    sectors: u32,
}

impl Permit {
    /// The room, in sectors.
    pub fn sectors(&self) -> u32 {
        self.sectors
    }

    /// Transfers the room to the group that contains the record.
    pub fn spend(mut self) -> u32 {
        std::mem::take(&mut self.sectors)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.space.give(i64::from(self.sectors));
    }
}
