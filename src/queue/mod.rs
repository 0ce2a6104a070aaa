//! The hand-off from coroutines to workers, and its durability.
//!
//! Whatever stands behind it, a queue behaves the same way, and `tests/queue.rs` checks every
//! implementation against it:
//!
//! * It is bounded: a push into a full queue gives the order back.
//! * Orders leave in the order in which they came, each once, to any number of consumers.
//! * A consumer owns what it took until it says [`Batch::ack`]. One that stops before that,
//!   for whatever reason, leaves the rest at the head of the line.
//! * [`OrderQueue::take`] waits while the queue is empty and returns `None` once it is closed and
//!   empty; a closed queue gives every further push back.
//!
//! Stock is held before anything is queued.

pub mod journal;
mod mpmc;
mod ring;

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use crate::order::{Order, OrderId};
use crate::state::pending::PendingOrder;
pub use journal::Permit;
pub use ring::RingQueue;

/// What an order survives once it is in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Nothing: it lives as long as the process. `respond-async` falls back to waiting.
    Volatile,
    /// The end of the process and the loss of power.
    Machine,
}

/// The queue did not take the order; here it is again.
#[derive(Debug)]
pub struct Rejected {
    /// The order.
    pub order: Arc<PendingOrder>,
    /// Whether the queue was closed rather than full.
    pub closed: bool,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.closed {
            "the queue is closed"
        } else {
            "the queue is full"
        })
    }
}

/// A queue of orders. See the module's text for what every implementation promises.
pub trait OrderQueue: Send + Sync + fmt::Debug {
    /// What an order in it survives.
    fn durability(&self) -> Durability;

    /// The same queue as one that can acknowledge at once; `None` where it is volatile.
    fn durable(&self) -> Option<&dyn DurableQueue> {
        None
    }

    /// Appends an order that somebody waits for, without blocking. It is promised nothing before
    /// its commit, so it needs no durability.
    ///
    /// # Errors
    /// [`Rejected`] with the order where the queue is full or closed.
    fn push(&self, order: Arc<PendingOrder>) -> Result<(), Rejected>;

    /// Takes what is there, 1 to `max` orders, waiting for the first; `None` once the queue is
    /// closed and empty.
    fn take(&self, max: usize) -> Pin<Box<dyn Future<Output = Option<Batch>> + Send + '_>>;

    /// Whether a push would be given back now.
    fn is_full(&self) -> bool;

    /// Orders in it now.
    fn depth(&self) -> usize;

    /// Orders that one which is pushed now waits behind.
    fn ahead(&self) -> usize {
        self.depth()
    }

    /// Refuses further pushes and lets consumers run it empty.
    fn close(&self);
}

/// Why an order cannot be acknowledged at once. Nothing is held then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotDurable {
    /// Too many are on their way already.
    Busy,
    /// The limit in bytes, or the disk, is reached.
    Full,
    /// The disk has failed.
    Failed,
    /// This process may not acknowledge, because it could not tell the database for too long that
    /// it is still there.
    NoLease,
}

/// A queue whose orders survive the process.
pub trait DurableQueue {
    /// Takes room for an order with these attributes, before its stock is held.
    ///
    /// # Errors
    /// [`NotDurable`].
    fn reserve(&self, attributes: Option<&str>) -> Result<Permit, NotDurable>;

    /// Hands over an order in `Appending`, without blocking. Its slot moves on once it is durable,
    /// or once it is known that it will not be; it is written in either case.
    ///
    /// # Errors
    /// [`Rejected`] with the order where the queue is full or closed.
    fn append(&self, order: Arc<PendingOrder>, permit: Permit) -> Result<(), Rejected>;

    /// Whether this process may tell anybody that an order is accepted because it is durable here. True
    /// now says nothing of later: ask right before.
    fn may_acknowledge(&self) -> bool;

    /// These orders are committed rows or dead letters: the queue may forget them.
    fn settled(&self, orders: &[Arc<PendingOrder>]);

    /// Whether an order with this id may be waiting on the disk. Reads nothing.
    fn may_hold(&self, id: OrderId) -> bool;

    /// The order with this id, where it waits on the disk and not in memory. Reads from there.
    ///
    /// # Errors
    /// Where the disk fails.
    fn find(&self, id: OrderId) -> io::Result<Option<Order>>;
}

/// Orders taken from a queue by one consumer, and still its own responsibility. Dropping it
/// before [`Batch::ack`] puts them back at the head of the line.
#[must_use = "dropping it puts the orders back"]
pub struct Batch {
    orders: Vec<Arc<PendingOrder>>,
    put_back: Arc<dyn Fn(Vec<Arc<PendingOrder>>) + Send + Sync>,
}

impl Batch {
    /// `put_back` takes what was not done.
    pub fn new(
        orders: Vec<Arc<PendingOrder>>,
        put_back: Arc<dyn Fn(Vec<Arc<PendingOrder>>) + Send + Sync>,
    ) -> Self {
        Batch { orders, put_back }
    }

    /// The orders, oldest first.
    pub fn orders(&self) -> &[Arc<PendingOrder>] {
        &self.orders
    }

    /// Every order in it is settled; the queue may forget them.
    pub fn ack(mut self) {
        self.orders.clear();
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch")
            .field("orders", &self.orders.len())
            .finish()
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if !self.orders.is_empty() {
            (self.put_back)(std::mem::take(&mut self.orders));
        }
    }
}
