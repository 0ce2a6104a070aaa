//! Orders whose rows were committed a moment ago: a repeated request or click is answered without
//! the database. Bounded. Every later change of an order removes it here first.

use std::sync::Arc;

use super::pending::PendingOrder;
use super::set_associative::Sets;
use crate::order::{Lane, LaneSet, OrderId, UnixMillis};

/// Recently written orders by id.
pub struct RecentOrders {
    orders: Sets<OrderId, Arc<PendingOrder>, 8>,
}

impl RecentOrders {
    /// Keeps the last `capacity` orders, at least 4, except for about one in a hundred. After a
    /// failover that lost commits, orders are restored from here.
    pub fn with_capacity(capacity: usize) -> Self {
        RecentOrders {
            // Twice the room, because orders do not fall evenly into the sets.
            orders: Sets::with_capacity(capacity.saturating_mul(2)),
        }
    }

    /// Adds an order whose row has just been committed.
    pub fn note(&self, order: &Arc<PendingOrder>) {
        self.orders.put(order.order.id, Arc::clone(order));
    }

    /// An order that can still be paid at `now`. After its expiry only the database knows its
    /// state.
    pub fn get(&self, id: OrderId, now: UnixMillis) -> Option<Arc<PendingOrder>> {
        let order = self.orders.get(&id)?;
        (now < order.order.expires_at).then_some(order)
    }

    /// Every order in it.
    pub fn all(&self) -> Vec<Arc<PendingOrder>> {
        self.orders.all()
    }

    /// Removes the orders of lanes that another node owns now.
    pub fn forget_lanes(&self, lanes: LaneSet) {
        for pending in self.orders.all() {
            if lanes.has(Lane::of(&pending.order.user_id)) {
                self.forget(pending.order.id);
            }
        }
    }

    /// Removes an order. Call it before its row is changed: from then on the database is asked.
    pub fn forget(&self, id: OrderId) {
        self.orders.remove(&id);
    }
}

impl std::fmt::Debug for RecentOrders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecentOrders")
            .field("orders", &self.orders.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::pending::tests::order;
    use super::*;
    use crate::order::Order;

    fn written(id: u64, expires_at: i64) -> Arc<PendingOrder> {
        let order = Order {
            expires_at: UnixMillis(expires_at),
            ..order(id)
        };
        Arc::new(PendingOrder::new(order, Instant::now(), None))
    }

    #[test]
    fn an_order_is_known_until_it_expires_or_is_forgotten() {
        let recent = RecentOrders::with_capacity(100);
        let id = OrderId::new(1).unwrap();
        recent.note(&written(1, 50));
        assert!(recent.get(id, UnixMillis(49)).is_some());
        assert!(recent.get(id, UnixMillis(50)).is_none());
        recent.forget(id);
        assert!(recent.get(id, UnixMillis(0)).is_none());
        assert!(recent.all().is_empty());
    }

    #[test]
    fn nearly_all_of_the_last_are_kept() {
        const CAPACITY: u64 = 4_096;
        let recent = RecentOrders::with_capacity(CAPACITY as usize);
        (1..=5 * CAPACITY).for_each(|id| recent.note(&written(id, 1)));
        let kept = |last: u64| {
            let ids = 5 * CAPACITY - last + 1..=5 * CAPACITY;
            let known = |id: &u64| {
                recent
                    .get(OrderId::new(*id).unwrap(), UnixMillis(0))
                    .is_some()
            };
            ids.filter(known).count() as f64 / last as f64
        };
        assert!(kept(CAPACITY) > 0.97, "{}", kept(CAPACITY));
        assert!(kept(CAPACITY / 2) > 0.99, "{}", kept(CAPACITY / 2));
        assert_eq!(kept(CAPACITY / 16), 1.0);
        let all = recent.all().len() as u64;
        assert!((CAPACITY * 97 / 100..=2 * CAPACITY).contains(&all), "{all}");
    }
}
