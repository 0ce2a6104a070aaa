//! The counters of one SKU.
//!
//! `total` and `taken` (held + sold) share one 64-bit word. A hold is therefore one
//! compare-and-swap that cannot oversell (I1), and a read of both is consistent. `sold` is a
//! separate word, checked by a sequence number. `free` and `held` are derived, so `total = free +
//! held + sold` in every snapshot by construction (I2).
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use crate::sync::{AtomicU32, AtomicU64, Guarded, Ordering, fence};

/// A consistent reading of one SKU's counters, in units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StockSnapshot {
    /// Units that the sale offers.
    pub total: u32,
    /// Units neither held nor sold.
    pub free: u32,
    /// Units held by unpaid orders.
    pub held: u32,
    /// Units sold to paid orders.
    pub sold: u32,
}

/// Not enough units are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotEnough {
    /// Units that are free.
    pub available: u32,
}

/// `total` would fall below the units that orders have taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("total: {committed} units are held or sold already; the total cannot be less")]
pub struct BelowCommitted {
    /// Units that are held or sold.
    pub committed: u32,
}

/// The counters of one SKU. See the module's text for the protocol.
#[derive(Debug)]
pub struct StockCounter {
    /// `total << 32 | taken`; `taken ≤ total` always. A hold needs no ordering with other memory:
    /// no other thread's writes depend on it. The compare-and-swaps are therefore relaxed on
    /// failure, and `AcqRel` on success for the snapshot's sequence check.
    word: AtomicU64,
    /// Units sold; part of `taken`. Written under `moving`, between two increments of `sequence`.
    sold: AtomicU32,
    /// Odd while a writer moves units between `held` and `sold` (a seqlock after Boehm, "Can
    /// seqlocks get along with programming language memory models?", 2012).
    sequence: AtomicU32,
    /// One writer of `sold` at a time.
    moving: Guarded<()>,
}

const fn pack(total: u32, taken: u32) -> u64 {
    (total as u64) << 32 | taken as u64
}

const fn unpack(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

impl StockCounter {
    /// Counters with the values of the database.
    ///
    /// # Panics
    /// If `held + sold > total`, which the database's CHECK excludes.
    pub fn new(total: u32, held: u32, sold: u32) -> Self {
        let taken = held.checked_add(sold).filter(|taken| *taken <= total);
        assert!(
            taken.is_some(),
            "held {held} + sold {sold} exceed total {total}"
        );
        StockCounter {
            word: AtomicU64::new(pack(total, held + sold)),
            sold: AtomicU32::new(sold),
            sequence: AtomicU32::new(0),
            moving: Guarded::new(()),
        }
    }

    /// Takes `units` of the free ones.
    ///
    /// # Errors
    /// [`NotEnough`] if fewer are free; nothing is taken then.
    pub fn hold(&self, units: u32) -> Result<(), NotEnough> {
        self.word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                let (total, taken) = unpack(word);
                (units <= total - taken).then(|| pack(total, taken + units))
            })
            .map(|_| ())
            .map_err(|word| {
                let (total, taken) = unpack(word);
                NotEnough {
                    available: total - taken,
                }
            })
    }

    /// Releases `units` that were held and not sold.
    ///
    /// # Panics
    /// If fewer are taken: units would be created from nothing.
    pub fn release(&self, units: u32) {
        let released = self
            .word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                let (total, taken) = unpack(word);
                taken.checked_sub(units).map(|taken| pack(total, taken))
            });
        if let Err(word) = released {
            let (_, taken) = unpack(word);
            panic!("released {units} units where only {taken} were taken");
        }
    }

    /// Moves `units` from held to sold.
    ///
    /// # Panics
    /// If the sum does not fit.
    pub fn sell(&self, units: u32) {
        self.move_sold(|sold| sold.checked_add(units), |_| {});
    }

    /// Moves `units` from sold back to held.
    ///
    /// # Panics
    /// If fewer are sold.
    pub fn hold_again(&self, units: u32) {
        self.move_sold(|sold| sold.checked_sub(units), |_| {});
    }

    /// Makes `units` that were sold free.
    ///
    /// # Panics
    /// If fewer are sold: units would be created from nothing.
    pub fn unsell(&self, units: u32) {
        self.move_sold(
            |sold| sold.checked_sub(units),
            |counter| counter.release(units),
        );
    }

    /// Removes `units` that were sold from the sale: they are neither sold nor for sale.
    ///
    /// # Panics
    /// If fewer are sold: units would be created from nothing.
    pub fn withdraw(&self, units: u32) {
        self.move_sold(
            |sold| sold.checked_sub(units),
            |counter| {
                let withdrawn =
                    counter
                        .word
                        .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                            let (total, taken) = unpack(word);
                            Some(pack(total.checked_sub(units)?, taken.checked_sub(units)?))
                        });
                if let Err(word) = withdrawn {
                    panic!("withdrew {units} units from {:?}", unpack(word));
                }
            },
        );
    }

    fn move_sold(&self, change: impl FnOnce(u32) -> Option<u32>, and: impl FnOnce(&Self)) {
        self.moving.with(|()| {
            let before = self.sold.load(Ordering::Relaxed);
            let Some(after) = change(before) else {
                panic!("{before} sold units cannot change like this");
            };
            let sequence = self.sequence.load(Ordering::Relaxed);
            self.sequence
                .store(sequence.wrapping_add(1), Ordering::Relaxed);
            // The odd number becomes visible before any of the writes below.
            fence(Ordering::Release);
            self.sold.store(after, Ordering::Relaxed);
            and(self);
            // Release: the writes above are visible before the even number.
            self.sequence
                .store(sequence.wrapping_add(2), Ordering::Release);
        });
    }

    /// Sets the total.
    ///
    /// # Errors
    /// [`BelowCommitted`] if orders have taken more.
    pub fn set_total(&self, total: u32) -> Result<(), BelowCommitted> {
        self.word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                let (_, taken) = unpack(word);
                (taken <= total).then(|| pack(total, taken))
            })
            .map(|_| ())
            .map_err(|word| BelowCommitted {
                committed: unpack(word).1,
            })
    }

    /// Sets the total to `to` if it is still `from` and orders have not taken more. False: it is
    /// unchanged.
    pub fn replace_total(&self, from: u32, to: u32) -> bool {
        self.word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                let (total, taken) = unpack(word);
                (total == from && taken <= to).then(|| pack(to, taken))
            })
            .is_ok()
    }

    /// Only at a start: takes the units of parked orders whose SKU's row is wrong, whatever its total. Its sale
    /// is paused, so nothing is sold from a total that grows here.
    ///
    /// # Panics
    /// If the sum does not fit.
    pub fn hold_regardless(&self, units: u32) {
        let held = self
            .word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                let (total, taken) = unpack(word);
                let taken = taken.checked_add(units)?;
                Some(pack(total.max(taken), taken))
            });
        if let Err(word) = held {
            panic!("cannot hold {units} units more than {:?}", unpack(word));
        }
    }

    /// Units that are free at this instant.
    pub fn free(&self) -> u32 {
        let (total, taken) = unpack(self.word.load(Ordering::Relaxed));
        total - taken
    }

    /// A consistent reading.
    pub fn snapshot(&self) -> StockSnapshot {
        loop {
            // Acquire: the reads below do not move before it.
            let before = self.sequence.load(Ordering::Acquire);
            let sold = self.sold.load(Ordering::Relaxed);
            let (total, taken) = unpack(self.word.load(Ordering::Acquire));
            // The reads above do not move behind the second read of the sequence.
            fence(Ordering::Acquire);
            let after = self.sequence.load(Ordering::Relaxed);
            if before == after && before.is_multiple_of(2) {
                return StockSnapshot {
                    total,
                    free: total - taken,
                    held: taken - sold,
                    sold,
                };
            }
            crate::sync::spin();
        }
    }
}
