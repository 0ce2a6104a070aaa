//! Orders whose rows were committed a moment ago: a buyer who asks again, or clicks again, is
//! answered without the database. Bounded; whatever changes an order afterwards forgets it first.

use std::sync::Arc;

use quick_cache::sync::Cache;

use super::pending::PendingOrder;
use crate::order::{OrderId, UnixMillis};

/// Recently written orders by id.
pub struct Recent {
    orders:
        Cache<OrderId, Arc<PendingOrder>, quick_cache::UnitWeighter, foldhash::fast::RandomState>,
}

impl Recent {
    /// Room for `capacity` orders.
    pub fn with_capacity(capacity: usize) -> Self {
        Recent {
            orders: Cache::with(
                capacity,
                capacity as u64,
                quick_cache::UnitWeighter,
                foldhash::fast::RandomState::default(),
                quick_cache::sync::DefaultLifecycle::default(),
            ),
        }
    }

    /// Notes an order whose row has just been committed.
    pub fn note(&self, order: &Arc<PendingOrder>) {
        self.orders.insert(order.order.id, Arc::clone(order));
    }

    /// An order that is still to be paid at `now`; from the moment it expires, only the database
    /// knows.
    pub fn get(&self, id: OrderId, now: UnixMillis) -> Option<Arc<PendingOrder>> {
        let order = self.orders.get(&id)?;
        (now < order.order.expires_at).then_some(order)
    }

    /// Every order in it.
    pub fn all(&self) -> Vec<Arc<PendingOrder>> {
        self.orders.iter().map(|(_, order)| order).collect()
    }

    /// To be called before an order's row is changed: from here on the database is asked.
    pub fn forget(&self, id: OrderId) {
        self.orders.remove(&id);
    }
}

impl std::fmt::Debug for Recent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recent")
            .field("orders", &self.orders.len())
            .finish()
    }
}
