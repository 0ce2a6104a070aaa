//! The queue between coroutines and workers, and its durability.
//!
//! Every implementation behaves alike, and `tests/queue.rs` checks the ring and the journal,
//! `tests/program/order_log.rs` the brokers:
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

pub mod log;
mod logged;
mod mpmc;
mod ring;

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use crate::order::{Order, OrderId, UnixMillis};
use crate::state::pending::PendingOrder;
pub use log::Permit;
pub use logged::{LogContact, LoggedQueue, QueueParts};
pub use ring::RingQueue;

/// The events that an order in the queue survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Nothing: it lives as long as the process. `respond-async` falls back to waiting.
    Volatile,
    /// The end of the process and the loss of power.
    Machine,
    /// The loss of this machine too: a broker has it.
    Broker,
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

    /// Returns once the next batch should not wait for more orders: a sender waits for one of the queue's, the queue
    /// holds `enough`, or it is closed. May return earlier. At once unless it is a durable queue.
    fn until_pressing(&self, enough: usize) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let _ = enough;
        Box::pin(std::future::ready(()))
    }

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
    /// The log has failed, until a restart.
    Failed,
    /// This process may not acknowledge, because it could not renew its lease in the database for
    /// too long.
    NoLease,
    /// The log takes no groups at the moment: its broker is away, full or refuses.
    Away,
}

/// A queue whose orders survive the process.
pub trait DurableQueue: Send + Sync {
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

    /// Whether an order with this id may be waiting in the log. Reads nothing from there.
    fn may_hold(&self, id: OrderId) -> bool;

    /// The order with this id, if it waits in the log instead of in memory. Reads from the log.
    ///
    /// # Errors
    /// If the log cannot be read.
    fn find(&self, id: OrderId) -> io::Result<Option<Order>>;

    /// Writes a lease on order ids, for use while the database is unreachable. True: it is durable.
    fn lease_ids(&self, until: UnixMillis) -> Pin<Box<dyn Future<Output = bool> + Send + '_>>;

    /// Name of its log in messages.
    fn title(&self) -> String;

    /// The reason why it acknowledges nothing until a restart, if that is so.
    fn failure(&self) -> Option<String>;

    /// The reason why its log takes nothing at the moment, if that is so.
    fn away(&self) -> Option<String>;

    /// Bytes of its log.
    fn bytes(&self) -> u64;

    /// Orders that wait in the log instead of in memory.
    fn spilled(&self) -> usize;

    /// Orders that are not yet settled in the database.
    fn outstanding(&self) -> u64;

    /// Number of the newest span of which every order is settled, with all spans before it.
    fn settled_up_to(&self) -> u64;

    /// The place of the last group of `span`, if the log's place is kept in PostgreSQL.
    fn position_of(&self, span: u64) -> Option<log::broker::Position>;

    /// Notes that PostgreSQL has the place of `span`.
    fn note(&self, span: u64);

    /// The place of the last group, if the log's place is kept in PostgreSQL.
    fn last_position(&self) -> Option<log::broker::Position>;

    /// Permits forgetting of spans up to `span`, if the log retains them.
    fn confirm(&self, span: u64);

    /// Passes every order still in the log to `each`, oldest first, from this process and earlier ones. Excluded
    /// are orders that wait there: they are yet to be written.
    ///
    /// # Errors
    /// If the log cannot be read or is damaged.
    fn read_all(&self, each: &mut dyn FnMut(Order)) -> io::Result<()>;

    /// Has a broker's log look in the background whether it is still whole, and append again what it has lost. A
    /// journal has nothing to do.
    fn look(&self);

    /// Leaves orders that wait in the log to the next process: the queue ends once the orders in memory are
    /// taken.
    fn leave_backlog(&self);

    /// Gives the log up after [`DurableQueue::stop`], once every order is settled: another log may then take its
    /// place.
    ///
    /// # Errors
    /// If that fails. What remains is a sound log.
    fn erase(&self) -> io::Result<()>;

    /// Stops the threads. Returns orders that were never appended; none was acknowledged.
    fn stop(&self) -> Vec<Arc<PendingOrder>>;
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
    /// again. A durable queue keeps them in its log until [`DurableQueue::settled`].
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
