//! The queue between coroutines and workers, and its durability.
//!
//! Every implementation behaves alike, and `tests/queue.rs` checks each of them:
//!
//! * It is bounded: a push into a full queue returns the order.
//! * Orders leave in the order of arrival, each once, to any number of consumers.
//! * A consumer owns the orders that it took until [`Batch::ack`]. If it stops before that, for any
//!   reason, they return to the head of the line.
//! * [`OrderQueue::take`] waits while the queue is empty and returns `None` once it is closed and
//!   empty. A closed queue returns every further push.
//!
//! A durable backend, [`DurableQueue`], also keeps each acknowledged order until it is reported as settled,
//! and acknowledges only while this process holds the lease.
//!
//! Stock is held before an order is queued.

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

/// The events that an order in the queue survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Nothing: it lives as long as the process. `respond-async` falls back to waiting.
    Volatile,
    /// The end of the process and the loss of power.
    Machine,
}

/// The queue did not take the order, and returns it.
#[derive(Debug)]
pub struct Rejected {
    /// The rejected order.
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

/// A queue of orders. The module's text has the contract.
pub trait OrderQueue: Send + Sync + fmt::Debug {
    /// The events that an order in it survives.
    fn durability(&self) -> Durability;

    /// The same queue, if it can acknowledge orders early; `None` if it is volatile.
    fn durable(&self) -> Option<&dyn DurableQueue> {
        None
    }

    /// Appends an order whose request waits, without blocking. The order needs no durability,
    /// because nothing is promised before its commit.
    ///
    /// # Errors
    /// [`Rejected`] with the order if the queue is full or closed.
    fn push(&self, order: Arc<PendingOrder>) -> Result<(), Rejected>;

    /// Takes 1 to `max` orders, and waits for the first. `None` once the queue is closed and empty.
    fn take(&self, max: usize) -> Pin<Box<dyn Future<Output = Option<Batch>> + Send + '_>>;

    /// Whether a push would be rejected now.
    fn is_full(&self) -> bool;

    /// Orders in it now.
    fn depth(&self) -> usize;

    /// Orders ahead of one that is pushed now.
    fn ahead(&self) -> usize {
        self.depth()
    }

    /// Rejects further pushes and lets consumers drain the queue.
    fn close(&self);
}

/// Reasons why an order cannot be acknowledged early. Nothing is reserved then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotDurable {
    /// Too many orders are being written already.
    Busy,
    /// The limit in bytes is reached, or the disk is full.
    Full,
    /// The disk has failed.
    Failed,
    /// This process may not acknowledge, because it could not renew its lease in the database for
    /// too long.
    NoLease,
}

/// A queue whose orders survive the process.
pub trait DurableQueue {
    /// Reserves room for an order with these attributes, before its stock is held.
    ///
    /// # Errors
    /// [`NotDurable`].
    fn reserve(&self, attributes: Option<&str>) -> Result<Permit, NotDurable>;

    /// Passes on an order in `Appending`, without blocking. Its slot moves on once the order is
    /// durable, or is known never to be. The order is written to the database in either case.
    ///
    /// # Errors
    /// [`Rejected`] with the order if the queue is full or closed.
    fn append(&self, order: Arc<PendingOrder>, permit: Permit) -> Result<(), Rejected>;

    /// Whether this process may acknowledge an order because it is durable here. The answer does
    /// not hold for later: ask immediately before each acknowledgement.
    fn may_acknowledge(&self) -> bool;

    /// Reports orders that the database has: rows, dead letters or parked orders. The queue may forget them.
    fn settled(&self, orders: &[Arc<PendingOrder>]);

    /// Whether an order with this id may be waiting on the disk. Reads nothing from there.
    fn may_hold(&self, id: OrderId) -> bool;

    /// The order with this id, if it waits on the disk instead of in memory. Reads from the disk.
    ///
    /// # Errors
    /// If the disk fails.
    fn find(&self, id: OrderId) -> io::Result<Option<Order>>;
}

/// Orders that one consumer took from a queue and still owns. Dropping it before [`Batch::ack`]
/// puts them back at the head of the line.
#[must_use = "dropping it puts the orders back"]
pub struct Batch {
    orders: Vec<Arc<PendingOrder>>,
    put_back: Arc<dyn Fn(Vec<Arc<PendingOrder>>) + Send + Sync>,
}

impl Batch {
    /// `put_back` takes the orders of a batch that is dropped unacknowledged.
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

    /// Acknowledges every order: the consumer is responsible for all of them, and none is delivered
    /// again. A durable queue keeps them on the disk until [`DurableQueue::settled`].
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
