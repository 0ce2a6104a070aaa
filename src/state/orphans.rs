//! Orders that a verified payment is waiting for. A row that is written late is payable all the
//! same where its payment came in time, and an order that somebody has paid is not expired.
//!
//! A payment is known here from the moment at which its callback is verified: while it is on its
//! way to the database, while it is stored and looks for its order, and for a while after it could
//! not be stored, because its provider delivers it again.

use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;

use crate::order::{OrderId, UnixMillis};

/// Why an order is waited for.
#[derive(Debug)]
struct Waiting {
    /// When the first of its payments counts as made.
    paid_at: UnixMillis,
    /// Payments on their way to the database.
    arriving: u32,
    /// Whether one is stored as an orphan.
    stored: bool,
    /// Until when one is remembered that could not be stored.
    expected_until: Option<UnixMillis>,
}

impl Waiting {
    fn is_over(&self) -> bool {
        self.arriving == 0 && !self.stored && self.expected_until.is_none()
    }
}

/// The orders of payments that have not met them. Bounded by money that really came in.
#[derive(Debug, Default)]
pub struct Orphans {
    orders: DashMap<OrderId, Waiting, foldhash::quality::RandomState>,
    /// Read on its own where nothing waits, as is usual.
    count: AtomicUsize,
}

impl Orphans {
    /// A payment for this order, which counts as made at `paid_at`, is on its way to the database.
    /// Whoever says so says later that it [has arrived](Orphans::arrived).
    pub fn arrives(&self, id: OrderId, paid_at: UnixMillis) {
        self.note(id, paid_at, |waiting| waiting.arriving += 1);
    }

    /// A payment is no longer on its way, whatever has become of it.
    pub fn arrived(&self, id: OrderId) {
        self.change(id, |waiting| {
            waiting.arriving = waiting.arriving.saturating_sub(1);
        });
    }

    /// A payment for this order is stored and waits for it.
    pub fn insert(&self, id: OrderId, paid_at: UnixMillis) {
        self.note(id, paid_at, |waiting| waiting.stored = true);
    }

    /// A payment for this order that counts as made at `paid_at` could not be stored. Its provider
    /// delivers it again; it is remembered until then.
    pub fn expect(&self, id: OrderId, paid_at: UnixMillis, until: UnixMillis) {
        self.note(id, paid_at, |waiting| {
            waiting.expected_until = waiting.expected_until.max(Some(until));
        });
    }

    /// No stored payment waits for this order any more, and none is expected again.
    pub fn remove(&self, id: OrderId) {
        self.change(id, |waiting| {
            waiting.stored = false;
            waiting.expected_until = None;
        });
    }

    /// Forgets what was expected until `now`.
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

    /// Whether a payment waits for this order, or is on its way, that counts as made before
    /// `expires_at`.
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

    /// Orders that are waited for.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether none is.
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
        // The database was away; the provider comes again.
        orphans.arrives(id, paid_at);
        orphans.expect(id, paid_at, UnixMillis(100));
        orphans.arrived(id);
        orphans.forget_expected(UnixMillis(99));
        assert!(orphans.paid_in_time(id, until));
        orphans.forget_expected(UnixMillis(100));
        assert!(orphans.is_empty());
    }
}
