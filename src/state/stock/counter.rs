//! The counters of one SKU.
//!
//! `total` and `taken` (held + sold) share one 64-bit word. A hold is therefore one
//! compare-and-swap that cannot oversell (I1), and a read of both is consistent. `sold` is a
//! separate word, checked by a sequence number. `free` and `held` are derived, so `total = free +
//! held + sold` in every snapshot by construction (I2).
//!
//! While orders wait for units of the SKU, no unit is free: a unit that comes back is *kept* for them, in the
//! step in which it comes back, and counts as held. The word is then in its *waiting form*, in which a hold finds
//! nothing free, at no cost to holds while nobody waits. The list of waiting orders chooses the form
//! (`state::stock::waitlist`).
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use std::cell::Cell;

use crate::sync::{AtomicU32, AtomicU64, Guarded, Ordering, fence};

/// A consistent reading of one SKU's counters, in units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StockSnapshot {
    /// Units that the sale offers.
    pub total: u32,
    /// Units neither held nor sold.
    pub free: u32,
    /// Units held by unpaid orders, or kept for waiting ones.
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
    /// `total << 32 | taken` with `taken ≤ total`, or the waiting form ([`waiting`]), which no such pair has. A
    /// hold needs no ordering with other memory: no other thread's writes depend on it. The compare-and-swaps
    /// are therefore relaxed on failure, and `AcqRel` on success for the snapshot's sequence check.
    word: AtomicU64,
    /// In the waiting form: units that no order holds, kept for the waiting list; part of what is taken. Else 0.
    /// The word changes into, out of and within its waiting form under this lock only.
    kept: Guarded<u32>,
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

const fn halves(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

/// The word while orders wait: its low half is the higher one. All `total` units are taken.
const fn waiting(total: u32) -> u64 {
    if total == 0 {
        pack(1, 2)
    } else {
        pack(0, total)
    }
}

const fn is_waiting(word: u64) -> bool {
    let (high, low) = halves(word);
    low > high
}

/// Total and taken units.
const fn unpack(word: u64) -> (u32, u32) {
    match halves(word) {
        (0, total) if total > 0 => (total, total),
        (1, 2) => (0, 0),
        open => open,
    }
}

/// Free units. In the waiting form none, by the same subtraction.
const fn free(word: u64) -> u32 {
    let (high, low) = halves(word);
    high.saturating_sub(low)
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
            kept: Guarded::new(0),
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
                let (total, taken) = halves(word);
                (units <= free(word)).then(|| pack(total, taken + units))
            })
            .map(|_| ())
            .map_err(|word| NotEnough {
                available: free(word),
            })
    }

    /// Releases `units` that were held and not sold: they are free, or kept if orders wait.
    ///
    /// # Panics
    /// If fewer are taken: units would be created from nothing.
    pub fn release(&self, units: u32) {
        self.change(
            |total, taken| Some((total, taken.checked_sub(units)?)),
            |total, kept| {
                let kept = kept.checked_add(units).filter(|kept| *kept <= total)?;
                Some((total, kept))
            },
        )
        .unwrap_or_else(|taken| panic!("released {units} units where only {taken} were taken"));
    }

    /// Changes total and taken units, or total and kept units in the waiting form. `None` changes nothing; the
    /// error is then the number of units that orders have taken.
    fn change(
        &self,
        mut open: impl FnMut(u32, u32) -> Option<(u32, u32)>,
        mut while_waiting: impl FnMut(u32, u32) -> Option<(u32, u32)>,
    ) -> Result<(), u32> {
        loop {
            let changed = self
                .word
                .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                    if is_waiting(word) {
                        return None;
                    }
                    let (total, taken) = halves(word);
                    open(total, taken).map(|(total, taken)| pack(total, taken))
                });
            match changed {
                Ok(_) => return Ok(()),
                Err(word) if !is_waiting(word) => return Err(halves(word).1),
                Err(_) => {}
            }
            let changed = self.kept.with(|kept| {
                // Under the lock the form stays. Acquire: after the change of whoever held it before.
                let word = self.word.load(Ordering::Acquire);
                if !is_waiting(word) {
                    return None;
                }
                let (before, _) = unpack(word);
                let Some((total, now_kept)) = while_waiting(before, *kept) else {
                    return Some(Err(before - *kept));
                };
                *kept = now_kept;
                if total != before {
                    // No compare: in this form the word changes only under the lock.
                    self.word.swap(waiting(total), Ordering::AcqRel);
                }
                Some(Ok(()))
            });
            // Else the list has ended in between.
            if let Some(changed) = changed {
                return changed;
            }
        }
    }

    /// From now on orders wait: every free unit is kept for them, and so is every unit that comes back.
    pub fn begin_waiting(&self) {
        self.kept.with(|kept| {
            let begun = self
                .word
                .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                    (!is_waiting(word)).then(|| waiting(halves(word).0))
                });
            if let Ok(word) = begun {
                *kept = free(word);
            }
        });
    }

    /// Nobody waits any more: the kept units are free.
    pub fn end_waiting(&self) {
        self.kept.with(|kept| {
            let word = self.word.load(Ordering::Acquire);
            if is_waiting(word) {
                let (total, _) = unpack(word);
                self.word.swap(pack(total, total - *kept), Ordering::AcqRel);
                *kept = 0;
            }
        });
    }

    /// Whether orders wait.
    pub fn is_waiting(&self) -> bool {
        is_waiting(self.word.load(Ordering::Relaxed))
    }

    /// Units that are kept for waiting orders.
    pub fn kept(&self) -> u32 {
        self.kept.with(|kept| *kept)
    }

    /// Takes kept units for orders that have waited. False: fewer are kept, and nothing is taken.
    pub fn take_kept(&self, units: u32) -> bool {
        self.kept.with(|kept| match kept.checked_sub(units) {
            Some(left) => {
                *kept = left;
                true
            }
            None => false,
        })
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
                counter
                    .change(
                        |total, taken| Some((total.checked_sub(units)?, taken.checked_sub(units)?)),
                        |total, kept| {
                            let total = total.checked_sub(units)?;
                            (kept <= total).then_some((total, kept))
                        },
                    )
                    .unwrap_or_else(|taken| panic!("withdrew {units} units of {taken}"));
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
        self.change(
            |_, taken| (taken <= total).then_some((total, taken)),
            |before, kept| Some((total, total.checked_sub(before - kept)?)),
        )
        .map_err(|committed| BelowCommitted { committed })
    }

    /// A node: units were lent to it, and are free.
    ///
    /// # Panics
    /// If the sum does not fit.
    pub fn lend(&self, units: u32) {
        self.change(
            |total, taken| Some((total.checked_add(units)?, taken)),
            |total, kept| Some((total.checked_add(units)?, kept.checked_add(units)?)),
        )
        .unwrap_or_else(|taken| panic!("{units} units more than {taken} do not fit"));
    }

    /// A node: takes all free or kept units out of its share, and returns their number and what was lent before.
    pub fn take_free(&self) -> (u32, u32) {
        let before = Cell::new((0, 0));
        let _ = self.change(
            |total, taken| {
                before.set((total - taken, total));
                Some((taken, taken))
            },
            |total, kept| {
                before.set((kept, total));
                Some((total - kept, 0))
            },
        );
        before.get()
    }

    /// A node: units of unpaid orders came with their lane.
    ///
    /// # Panics
    /// If the sum does not fit.
    pub fn receive_held(&self, units: u32) {
        self.change(
            |total, taken| Some((total.checked_add(units)?, taken.checked_add(units)?)),
            |total, kept| Some((total.checked_add(units)?, kept)),
        )
        .unwrap_or_else(|taken| panic!("{units} units more than {taken} do not fit"));
    }

    /// A node: units of unpaid orders left with their lane.
    ///
    /// # Panics
    /// If fewer are taken.
    pub fn give_held(&self, units: u32) {
        self.change(
            |total, taken| Some((total.checked_sub(units)?, taken.checked_sub(units)?)),
            |total, kept| {
                let total = total.checked_sub(units)?;
                (kept <= total).then_some((total, kept))
            },
        )
        .unwrap_or_else(|taken| panic!("gave {units} units of {taken}"));
    }

    /// Sets the total to `to` if it is still `from` and orders have not taken more. False: it is
    /// unchanged.
    pub fn replace_total(&self, from: u32, to: u32) -> bool {
        self.change(
            |total, taken| (total == from && taken <= to).then_some((to, taken)),
            |total, kept| {
                let kept = to.checked_sub(total - kept)?;
                (total == from).then_some((to, kept))
            },
        )
        .is_ok()
    }

    /// Only before anybody can hold units: takes those of parked orders whose SKU's row is wrong, whatever its total. Its sale
    /// is paused, so nothing is sold from a total that grows here.
    ///
    /// # Panics
    /// If the sum does not fit.
    pub fn hold_regardless(&self, units: u32) {
        let held = self
            .word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                // No list has been restored yet.
                let (total, taken) = halves(word);
                let taken = taken.checked_add(units)?;
                Some(pack(total.max(taken), taken))
            });
        if let Err(word) = held {
            panic!("cannot hold {units} units more than {:?}", unpack(word));
        }
    }

    /// Units that are free at this instant.
    pub fn free(&self) -> u32 {
        free(self.word.load(Ordering::Relaxed))
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
