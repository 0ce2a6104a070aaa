//! A SKU whose counters the database refuses: its sale is paused, and its acknowledged orders are
//! parked in the database until the counters are accepted.
//!
//! ```text
//!            counters refused               no order parked or being parked,
//!   sound ────────────────────► faulted ──── and the counters are accepted again ────► sound
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sync::Guarded;

/// Description of a fault: its reason, and the orders and units affected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The database's message at the last attempt.
    pub reason: Arc<str>,
    /// Number of acknowledged orders that are parked.
    pub parked: u64,
    /// Units of the transaction that was refused last.
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
    /// At a node: units that parked orders hold in memory and that are not in its share.
    lacking: u32,
    /// Transactions that are about to park orders.
    parking: u32,
    /// Number of those that have ended.
    ended: u64,
}

/// State before a search for parked orders; see [`Fault::look`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen(u64);

impl Fault {
    /// Whether the database refuses the counters.
    pub fn is_set(&self) -> bool {
        // Relaxed: a late reader places one more order, which a worker parks or refuses.
        self.is_set.load(Ordering::Relaxed)
    }

    /// Description of the fault; `None` if the SKU is sound.
    pub fn refused(&self) -> Option<Refused> {
        self.inner.with(|inner| {
            Some(Refused {
                reason: Arc::clone(inner.reason.as_ref()?),
                parked: inner.parked,
                units: inner.units,
            })
        })
    }

    /// Notes that the counters were refused for `units`. True: the SKU was sound before.
    pub fn set(&self, reason: &str, units: u32) -> bool {
        self.inner.with(|inner| {
            let fresh = inner.reason.replace(Arc::from(reason)).is_none();
            inner.units = units;
            self.is_set.store(true, Ordering::Relaxed);
            fresh
        })
    }

    /// Announces that orders are about to be parked: the fault stays until the guard is dropped.
    /// `None`: the SKU is sound, and they are to be written.
    pub fn begin_parking(self: &Arc<Self>) -> Option<Parking> {
        self.inner.with(|inner| {
            inner.reason.as_ref()?;
            inner.parking += 1;
            Some(Parking(Arc::clone(self)))
        })
    }

    /// Subtracts orders that are no longer parked here. Returns the change.
    pub fn unparked(&self, orders: u64) -> i64 {
        self.inner.with(|inner| {
            let before = inner.parked;
            inner.parked = before.saturating_sub(orders);
            inner.parked as i64 - before as i64
        })
    }

    /// Sets the number of parked orders to the database's. Returns the change.
    pub fn set_parked(&self, orders: u64) -> i64 {
        self.inner.with(|inner| {
            let before = std::mem::replace(&mut inner.parked, orders);
            orders as i64 - before as i64
        })
    }

    /// Notes that parked orders hold units in memory that are not in the share of this node.
    pub fn lack(&self, units: u32) {
        self.inner.with(|inner| inner.lacking += units);
    }

    /// Units that parked orders hold in memory and that are not in the share of this node.
    pub fn lacking(&self) -> u32 {
        self.inner.with(|inner| inner.lacking)
    }

    /// Notes that so many of them are.
    pub fn covered(&self, units: u32) {
        self.inner.with(|inner| inner.lacking -= units);
    }

    /// Call before a search for parked orders, and pass the result to [`Fault::clear`] if there
    /// were none. `None`: some orders are being parked.
    pub fn look(&self) -> Option<Seen> {
        self.inner
            .with(|inner| (inner.parking == 0).then_some(Seen(inner.ended)))
    }

    /// Ends the fault: the counters are accepted again, and no order is parked, as of `seen`.
    /// False: some were parked since.
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
    /// Adds the orders that are parked now.
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
        // The search ran before they were parked.
        assert!(!fault.clear(before) && fault.is_set());
        let refused = fault.refused().unwrap();
        assert_eq!(
            (&*refused.reason, refused.parked, refused.units),
            ("still", 5, 2)
        );
        assert_eq!(fault.unparked(7), -5);
        assert!(fault.clear(fault.look().unwrap()));
        assert!(!fault.is_set() && fault.refused().is_none());
    }
}
