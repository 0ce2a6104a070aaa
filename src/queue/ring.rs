//! The volatile queue: a bounded lock-free ring.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use crossbeam::queue::ArrayQueue;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Durability, OrderQueue, Rejected, Taken};
use crate::state::pending::PendingOrder;

type PutBack = Arc<dyn Fn(Vec<Arc<PendingOrder>>) + Send + Sync>;

/// `queue.backend = "memory"`: orders wait in a `crossbeam` ring and die with the process.
pub struct RingQueue {
    shared: Arc<Shared>,
    put_back: PutBack,
}

struct Shared {
    ring: ArrayQueue<Arc<PendingOrder>>,
    /// What consumers gave up, ahead of the ring. Empty but after a consumer's death, so its
    /// count is looked at before its lock.
    head: Mutex<VecDeque<Arc<PendingOrder>>>,
    head_len: AtomicUsize,
    /// Consumers that sleep or are about to.
    idle: AtomicUsize,
    wake: Notify,
    closed: AtomicBool,
}

impl RingQueue {
    /// A ring of `capacity` orders, 1 or more.
    pub fn new(capacity: usize) -> Self {
        let shared = Arc::new(Shared {
            ring: ArrayQueue::new(capacity.max(1)),
            head: Mutex::new(VecDeque::new()),
            head_len: AtomicUsize::new(0),
            idle: AtomicUsize::new(0),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
        });
        let put_back: PutBack = {
            let shared = Arc::clone(&shared);
            Arc::new(move |orders| shared.put_back(orders))
        };
        RingQueue { shared, put_back }
    }
}

impl Shared {
    fn put_back(&self, orders: Vec<Arc<PendingOrder>>) {
        let count = orders.len();
        let mut head = self.head.lock();
        for order in orders.into_iter().rev() {
            head.push_front(order);
        }
        self.head_len.store(head.len(), Ordering::Release);
        drop(head);
        // As a producer wakes once an order: the consumer that is woken may take but one of them
        // and not come back.
        (0..count).for_each(|_| self.wake_one());
    }

    /// Takes what is there without waiting.
    fn drain(&self, max: usize) -> Vec<Arc<PendingOrder>> {
        let mut orders = Vec::new();
        if self.head_len.load(Ordering::Acquire) > 0 {
            let mut head = self.head.lock();
            let count = head.len().min(max);
            orders.extend(head.drain(..count));
            self.head_len.store(head.len(), Ordering::Release);
        }
        let available = self.ring.len().min(max - orders.len());
        orders.reserve(available);
        while orders.len() < max {
            match self.ring.pop() {
                Some(order) => orders.push(order),
                None => break,
            }
        }
        orders
    }

    /// Wakes a sleeping consumer, where there is one. Costs a producer one fence and one read
    /// while every consumer is busy.
    fn wake_one(&self) {
        // Dekker with `take`: we wrote the ring and now read `idle`; a consumer writes `idle` and
        // then reads the ring. With a fence on both sides at least one sees the other.
        fence(Ordering::SeqCst);
        if self.idle.load(Ordering::Relaxed) > 0 {
            self.wake.notify_one();
        }
    }

    async fn take(&self, max: usize) -> Option<Vec<Arc<PendingOrder>>> {
        loop {
            let orders = self.drain(max);
            if !orders.is_empty() {
                return Some(orders);
            }
            let mut woken = pin!(self.wake.notified());
            let idle = Idle::enter(&self.idle);
            woken.as_mut().enable();
            // The other half of Dekker, see `wake_one`.
            fence(Ordering::SeqCst);
            let closed = self.closed.load(Ordering::Acquire);
            let orders = self.drain(max);
            if !orders.is_empty() {
                return Some(orders);
            }
            if closed {
                return None;
            }
            woken.await;
            drop(idle);
        }
    }
}

/// Counts a consumer as idle for as long as it lives, also when its future is dropped.
struct Idle<'a>(&'a AtomicUsize);

impl<'a> Idle<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Idle(count)
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl OrderQueue for RingQueue {
    fn durability(&self) -> Durability {
        Durability::Volatile
    }

    fn push(&self, order: Arc<PendingOrder>) -> Result<(), Rejected> {
        if self.shared.closed.load(Ordering::Acquire) {
            return Err(Rejected {
                order,
                closed: true,
            });
        }
        self.shared.ring.push(order).map_err(|order| Rejected {
            order,
            closed: false,
        })?;
        self.shared.wake_one();
        Ok(())
    }

    fn take(&self, max: usize) -> Pin<Box<dyn Future<Output = Option<Taken>> + Send + '_>> {
        Box::pin(async move {
            let orders = self.shared.take(max).await?;
            Some(Taken::new(orders, Arc::clone(&self.put_back)))
        })
    }

    fn is_full(&self) -> bool {
        self.shared.ring.is_full()
    }

    fn depth(&self) -> usize {
        self.shared.ring.len() + self.shared.head_len.load(Ordering::Relaxed)
    }

    fn close(&self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.wake.notify_waiters();
    }
}

impl std::fmt::Debug for RingQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingQueue")
            .field("depth", &self.depth())
            .field("capacity", &self.shared.ring.capacity())
            .finish()
    }
}
