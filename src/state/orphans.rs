//! Orders that a verified payment is waiting for. A row that is written late is payable all the
//! same where its payment came in time, and an order that somebody has paid is not expired.

use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;

use crate::order::{OrderId, UnixMillis};

/// The orders of orphan payments, each with the moment at which the first of its payments was
/// received. Bounded by money that really came in.
#[derive(Debug, Default)]
pub struct Orphans {
    orders: DashMap<OrderId, UnixMillis, foldhash::quality::RandomState>,
    /// Read on its own where nothing waits, as is usual.
    count: AtomicUsize,
}

impl Orphans {
    /// A payment for this order waits. True: it is the first.
    pub fn insert(&self, id: OrderId, received_at: UnixMillis) -> bool {
        let mut fresh = false;
        self.orders.entry(id).or_insert_with(|| {
            fresh = true;
            received_at
        });
        if fresh {
            self.count.fetch_add(1, Ordering::Release);
        }
        fresh
    }

    /// No payment waits for this order any more.
    pub fn remove(&self, id: OrderId) {
        if self.orders.remove(&id).is_some() {
            self.count.fetch_sub(1, Ordering::Release);
        }
    }

    /// Whether a payment waits for this order that was received before `expires_at`.
    pub fn paid_in_time(&self, id: OrderId, expires_at: UnixMillis) -> bool {
        !self.is_empty() && self.orders.get(&id).is_some_and(|at| *at < expires_at)
    }

    /// Orders that are waited for.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_paid_in_time_by_the_first_payment_that_waits_for_it() {
        let (orphans, id) = (Orphans::default(), OrderId::new(5).unwrap());
        assert!(!orphans.paid_in_time(id, UnixMillis(i64::MAX)));
        assert!(orphans.insert(id, UnixMillis(10)));
        assert!(!orphans.insert(id, UnixMillis(30)));
        assert_eq!(orphans.len(), 1);
        assert!(orphans.paid_in_time(id, UnixMillis(11)));
        assert!(!orphans.paid_in_time(id, UnixMillis(10)));
        orphans.remove(id);
        orphans.remove(id);
        assert!(orphans.is_empty());
    }
}
