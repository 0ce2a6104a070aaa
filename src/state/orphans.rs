//! Orders for which a verified payment waits. A row that is written late is still payable if its
//! payment came in time, and a paid order is not expired.
//!
//! A payment is known here from the verification of its callback on: while it travels to the
//! database, while it is stored and looks for its order, and, after a failure to store it, until
//! its provider delivers it again.

use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;

use crate::order::{OrderId, UnixMillis};

/// The payments that wait for one order.
#[derive(Debug)]
struct Waiting {
    /// Earliest time at which one of its payments counts as made.
    paid_at: UnixMillis,
    /// Payments on the way to the database.
    arriving: u32,
    /// Whether a payment is stored as an orphan.
    stored: bool,
    /// End of the wait for a second delivery of a payment that could not be stored.
    expected_until: Option<UnixMillis>,
}

impl Waiting {
    fn is_over(&self) -> bool {
        self.arriving == 0 && !self.stored && self.expected_until.is_none()
    }
}

/// The orders of unmatched payments. Bounded by the number of verified payments.
#[derive(Debug, Default)]
pub struct Orphans {
    orders: DashMap<OrderId, Waiting, foldhash::quality::RandomState>,
    /// Number of `orders`, for a quick check while there are none, as usual.
    count: AtomicUsize,
}

impl Orphans {
    /// Notes that a payment for this order, made at `paid_at`, is on its way to the database. The
    /// caller later calls [`arrived`](Orphans::arrived).
    pub fn arrives(&self, id: OrderId, paid_at: UnixMillis) {
        self.note(id, paid_at, |waiting| waiting.arriving += 1);
    }

    /// Notes that a payment is no longer on its way, with whatever result.
    pub fn arrived(&self, id: OrderId) {
        self.change(id, |waiting| {
            waiting.arriving = waiting.arriving.saturating_sub(1);
        });
    }

    /// Notes that a payment for this order is stored and waits for it.
    pub fn insert(&self, id: OrderId, paid_at: UnixMillis) {
        self.note(id, paid_at, |waiting| waiting.stored = true);
    }

    /// Notes that a payment for this order, made at `paid_at`, could not be stored. It is kept
    /// until `until`, because its provider delivers it again.
    pub fn expect(&self, id: OrderId, paid_at: UnixMillis, until: UnixMillis) {
        self.note(id, paid_at, |waiting| {
            waiting.expected_until = waiting.expected_until.max(Some(until));
        });
    }

    /// Notes that no stored payment waits for this order, and none is expected.
    pub fn remove(&self, id: OrderId) {
        self.change(id, |waiting| {
            waiting.stored = false;
            waiting.expected_until = None;
        });
    }

    /// Removes payments that were expected until `now` at the latest.
    pub fn forget_expected(&self, now: UnixMillis) {
        if self.is_empty() {
            return;
        }
        self.orders.retain(|_, waiting| {
            waiting.expected_until = waiting.expected_until.filter(|until| *until > now);
            let stays = !waiting.is_over();
            if !stays {
                self.count.fetch_sub(1, Ordering::Release);
            }
            stays
        });
    }

    /// Whether an order that expires at `expires_at` can no longer be paid at `now`: its time has passed, and no
    /// payment for it was made in time.
    pub fn is_late(&self, id: OrderId, expires_at: UnixMillis, now: UnixMillis) -> bool {
        expires_at <= now && !self.paid_in_time(id, expires_at)
    }

    /// Whether a payment made before `expires_at` waits for this order or is on its way.
    pub fn paid_in_time(&self, id: OrderId, expires_at: UnixMillis) -> bool {
        let waiting = (!self.is_empty()).then(|| self.orders.get(&id)).flatten();
        waiting.is_some_and(|waiting| waiting.paid_at < expires_at)
    }

    /// Whether a stored payment waits for this order.
    pub fn is_stored(&self, id: OrderId) -> bool {
        let waiting = (!self.is_empty()).then(|| self.orders.get(&id)).flatten();
        waiting.is_some_and(|waiting| waiting.stored)
    }

    /// Whether a payment waits for this order.
    pub fn waits_for(&self, id: OrderId) -> bool {
        !self.is_empty() && self.orders.contains_key(&id)
    }

    /// Number of orders for which a payment waits.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn note(&self, id: OrderId, paid_at: UnixMillis, change: impl FnOnce(&mut Waiting)) {
        let mut entry = self.orders.entry(id).or_insert_with(|| {
            self.count.fetch_add(1, Ordering::Release);
            Waiting {
                paid_at,
                arriving: 0,
                stored: false,
                expected_until: None,
            }
        });
        entry.paid_at = entry.paid_at.min(paid_at);
        change(&mut entry);
    }

    fn change(&self, id: OrderId, change: impl FnOnce(&mut Waiting)) {
        if let Entry::Occupied(mut entry) = self.orders.entry(id) {
            change(entry.get_mut());
            if entry.get().is_over() {
                entry.remove();
                self.count.fetch_sub(1, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_paid_in_time_by_the_first_payment_that_waits_for_it() {
        let (orphans, id) = (Orphans::default(), OrderId::new(5).unwrap());
        assert!(!orphans.paid_in_time(id, UnixMillis(i64::MAX)));
        orphans.insert(id, UnixMillis(30));
        orphans.insert(id, UnixMillis(10));
        assert_eq!(orphans.len(), 1);
        assert!(orphans.paid_in_time(id, UnixMillis(11)));
        assert!(!orphans.paid_in_time(id, UnixMillis(10)));
        orphans.remove(id);
        orphans.remove(id);
        assert!(orphans.is_empty());
    }

    #[test]
    fn a_payment_is_known_until_every_delivery_has_arrived_and_none_is_stored_or_expected() {
        let (orphans, id) = (Orphans::default(), OrderId::new(5).unwrap());
        let (paid_at, until) = (UnixMillis(10), UnixMillis(20));
        orphans.arrives(id, paid_at);
        orphans.arrives(id, paid_at);
        orphans.arrived(id);
        assert!(orphans.paid_in_time(id, until) && !orphans.is_stored(id));
        orphans.insert(id, paid_at);
        orphans.arrived(id);
        assert!(orphans.is_stored(id));
        orphans.remove(id);
        assert!(orphans.is_empty());
        // The database was unavailable; the provider delivers again.
        orphans.arrives(id, paid_at);
        orphans.expect(id, paid_at, UnixMillis(100));
        orphans.arrived(id);
        orphans.forget_expected(UnixMillis(99));
        assert!(orphans.paid_in_time(id, until));
        orphans.forget_expected(UnixMillis(100));
        assert!(orphans.is_empty());
    }
}
