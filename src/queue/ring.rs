//! The volatile queue: a bounded lock-free ring.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::handoff::Handoff;
use super::{Durability, OrderQueue, Rejected, Taken};
use crate::state::pending::PendingOrder;

type PutBack = Arc<dyn Fn(Vec<Arc<PendingOrder>>) + Send + Sync>;

/// `queue.backend = "memory"`: orders wait in a `crossbeam` ring and die with the process.
pub struct RingQueue {
    handoff: Arc<Handoff<Arc<PendingOrder>>>,
    put_back: PutBack,
}

impl RingQueue {
    /// A ring of `capacity` orders, 1 or more.
    pub fn new(capacity: usize) -> Self {
        let handoff = Arc::new(Handoff::new(capacity));
        let put_back: PutBack = {
            let handoff = Arc::clone(&handoff);
            Arc::new(move |orders| handoff.put_back(orders))
        };
        RingQueue { handoff, put_back }
    }
}

impl OrderQueue for RingQueue {
    fn durability(&self) -> Durability {
        Durability::Volatile
    }

    fn push(&self, order: Arc<PendingOrder>) -> Result<(), Rejected> {
        if self.handoff.is_closed() {
            return Err(Rejected {
                order,
                closed: true,
            });
        }
        self.handoff.push(order).map_err(|order| Rejected {
            order,
            closed: false,
        })
    }

    fn take(&self, max: usize) -> Pin<Box<dyn Future<Output = Option<Taken>> + Send + '_>> {
        Box::pin(async move {
            let orders = self.handoff.take(max).await?;
            Some(Taken::new(orders, Arc::clone(&self.put_back)))
        })
    }

    fn is_full(&self) -> bool {
        self.handoff.is_full()
    }

    fn depth(&self) -> usize {
        self.handoff.depth()
    }

    fn close(&self) {
        self.handoff.close();
    }
}

impl std::fmt::Debug for RingQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingQueue")
            .field("depth", &self.depth())
            .field("capacity", &self.handoff.capacity())
            .finish()
    }
}
