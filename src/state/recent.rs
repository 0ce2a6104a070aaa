//! Orders whose rows were committed a moment ago: a buyer who asks again, or clicks again, is
//! answered without the database. Bounded; whatever changes an order afterwards forgets it first.

use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::pending::PendingOrder;
use super::sets::Sets;
use crate::order::{OrderId, UnixMillis};

/// Recently written orders by id.
pub struct Recent {
    /// The id beside its order, so that looking for one touches no other.
    orders: Sets<(OrderId, Arc<PendingOrder>), 4>,
    seed: RandomState,
}

impl Recent {
    /// Room for `capacity` orders, 4 or more.
    pub fn with_capacity(capacity: usize) -> Self {
        Recent {
            orders: Sets::with_capacity(capacity),
            seed: RandomState::default(),
        }
    }

    /// Notes an order whose row has just been committed.
    pub fn note(&self, order: &Arc<PendingOrder>) {
        let id = order.order.id;
        let hash = self.seed.hash_one(id);
        self.orders
            .put(hash, (id, Arc::clone(order)), |known| known.0 == id);
    }

    /// An order that is still to be paid at `now`; from the moment it expires, only the database
    /// knows.
    pub fn get(&self, id: OrderId, now: UnixMillis) -> Option<Arc<PendingOrder>> {
        let (_, order) = self
            .orders
            .get(self.seed.hash_one(id), |known| known.0 == id)?;
        (now < order.order.expires_at).then_some(order)
    }

    /// Every order in it.
    pub fn all(&self) -> Vec<Arc<PendingOrder>> {
        self.orders
            .all()
            .into_iter()
            .map(|(_, order)| order)
            .collect()
    }

    /// To be called before an order's row is changed: from here on the database is asked.
    pub fn forget(&self, id: OrderId) {
        self.orders
            .remove(self.seed.hash_one(id), |known| known.0 == id);
    }
}

impl std::fmt::Debug for Recent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recent")
            .field("orders", &self.orders.len())
            .finish()
    }
}
