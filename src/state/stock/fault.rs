//! The state of a SKU whose counters the database refuses: its sale is paused, and its acknowledged
//! orders are parked in the database until they are taken.
//!
//! ```text
//!            counters refused                no order parked, none on its way there,
//!   sound ────────────────────► faulted ──── and the counters are taken again ─────► sound
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sync::Guarded;

/// Why, and what waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The database's own words at the last attempt.
    pub reason: Arc<str>,
    /// Acknowledged orders that wait.
    pub parked: u64,
    /// The units that were refused last.
    pub units: u32,
}

/// Whether the database refuses a SKU's counters.
#[derive(Debug, Default)]
pub struct Fault {
    /// Read for each order; changed under `inner`.
    is_set: AtomicBool,
    inner: Guarded<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    reason: Option<Arc<str>>,
    units: u32,
    parked: u64,
    /// Transactions that are about to park orders.
    parking: u32,
    /// How many of those have ended.
    ended: u64,
}

/// What was seen before the parked orders were looked through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen(u64);

impl Fault {
    /// Whether the database refuses the counters.
    pub fn is_set(&self) -> bool {
        // Relaxed: who reads late places one more order, which is parked or refused by a worker.
        self.is_set.load(Ordering::Relaxed)
    }

    /// The state in words and numbers; `None` where the SKU is sound.
    pub fn refused(&self) -> Option<Refused> {
        self.inner.with(|inner| {
            Some(Refused {
                reason: Arc::clone(inner.reason.as_ref()?),
                parked: inner.parked,
                units: inner.units,
            })
        })
    }

    /// Notes that counters were refused for `units`. True: they were not before.
    pub fn set(&self, reason: &str, units: u32) -> bool {
        self.inner.with(|inner| {
            let fresh = inner.reason.replace(Arc::from(reason)).is_none();
            inner.units = units;
            self.is_set.store(true, Ordering::Relaxed);
            fresh
        })
    }

    /// Orders are about to be parked: until the guard is dropped the fault stays. `None`: the SKU is
    /// sound, and they are to be written.
    pub fn begin_parking(self: &Arc<Self>) -> Option<Parking> {
        self.inner.with(|inner| {
            inner.reason.as_ref()?;
            inner.parking += 1;
            Some(Parking(Arc::clone(self)))
        })
    }

    /// Counts parked orders that are no longer so.
    pub fn unparked(&self, orders: u64) {
        self.inner
            .with(|inner| inner.parked = inner.parked.saturating_sub(orders));
    }

    /// Sets the number of parked orders to what the database has.
    pub fn set_parked(&self, orders: u64) -> i64 {
        self.inner.with(|inner| {
            let before = std::mem::replace(&mut inner.parked, orders);
            orders as i64 - before as i64
        })
    }

    /// To be asked before the parked orders are looked through, and handed to [`Fault::clear`] where
    /// there were none. `None`: some are on their way there.
    pub fn look(&self) -> Option<Seen> {
        self.inner
            .with(|inner| (inner.parking == 0).then_some(Seen(inner.ended)))
    }

    /// The counters are taken again and no order is parked, as far as `seen` goes. False: some were
    /// parked since.
    pub fn clear(&self, seen: Seen) -> bool {
        self.inner.with(|inner| {
            let is_over = inner.reason.is_some() && inner.parking == 0 && seen == Seen(inner.ended);
            if is_over {
                inner.reason = None;
                inner.parked = 0;
                self.is_set.store(false, Ordering::Relaxed);
            }
            is_over
        })
    }
}

/// A transaction that parks orders.
#[derive(Debug)]
#[must_use = "dropping it says that nothing was parked"]
pub struct Parking(Arc<Fault>);

impl Parking {
    /// Counts the orders that are parked now.
    pub fn done(self, orders: u64) {
        self.0.inner.with(|inner| inner.parked += orders);
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        self.0.inner.with(|inner| {
            inner.parking -= 1;
            inner.ended += 1;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_stays_while_orders_are_on_their_way_to_be_parked() {
        let fault = Arc::new(Fault::default());
        assert!(fault.begin_parking().is_none(), "it is sound");
        assert!(fault.set("total is too low", 3));
        assert!(!fault.set("still", 2));
        let before = fault.look().unwrap();
        let parking = fault.begin_parking().unwrap();
        assert!(fault.look().is_none() && !fault.clear(before));
        parking.done(5);
        // Looked through before they were there.
        assert!(!fault.clear(before) && fault.is_set());
        let refused = fault.refused().unwrap();
        assert_eq!(
            (&*refused.reason, refused.parked, refused.units),
            ("still", 5, 2)
        );
        fault.unparked(5);
        assert!(fault.clear(fault.look().unwrap()));
        assert!(!fault.is_set() && fault.refused().is_none());
    }
}
