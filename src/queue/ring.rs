//! The volatile queue: a bounded lock-free ring.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::mpmc::MpmcQueue;
use super::{Batch, Durability, OrderQueue, Rejected};
use crate::state::pending::PendingOrder;

type PutBack = Arc<dyn Fn(Vec<Arc<PendingOrder>>) + Send + Sync>;

/// `queue.backend = "memory"`: orders wait in a `crossbeam` ring and die with the process.
pub struct RingQueue {
    mpmc: Arc<MpmcQueue<Arc<PendingOrder>>>,
    put_back: PutBack,
}

impl RingQueue {
    /// Creates a ring for `capacity` orders, at least 1.
    pub fn new(capacity: usize) -> Self {
        let mpmc = Arc::new(MpmcQueue::new(capacity));
        let put_back: PutBack = {
            let mpmc = Arc::clone(&mpmc);
            Arc::new(move |orders| mpmc.put_back(orders))
        };
        RingQueue { mpmc, put_back }
    }
}

impl OrderQueue for RingQueue {
    fn durability(&self) -> Durability {
        Durability::Volatile
    }

    fn push(&self, order: Arc<PendingOrder>) -> Result<(), Rejected> {
        if self.mpmc.is_closed() {
            return Err(Rejected {
                order,
                closed: true,
            });
        }
        self.mpmc.push(order).map_err(|order| Rejected {
            order,
            closed: false,
        })
    }

    fn take(&self, max: usize) -> Pin<Box<dyn Future<Output = Option<Batch>> + Send + '_>> {
        Box::pin(async move {
            let orders = self.mpmc.take(max).await?;
            Some(Batch::new(orders, Arc::clone(&self.put_back)))
        })
    }

    fn is_full(&self) -> bool {
        self.mpmc.is_full()
    }

    fn depth(&self) -> usize {
        self.mpmc.depth()
    }

    fn close(&self) {
        self.mpmc.close();
    }
}

impl std::fmt::Debug for RingQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingQueue")
            .field("depth", &self.depth())
            .field("capacity", &self.mpmc.capacity())
            .finish()
    }
}
