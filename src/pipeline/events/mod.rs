//! Events: what the shop's other systems hear of orders and payments, at least once and in order per order.
//!
//! ```text
//!   PostgreSQL's WAL ─► slot of the sink ─► feeder: form, deliver ─► sink (webhook, Kafka, Redis)
//!                              ▲               │            │
//!                              └─ moved on ────┘            └─ not taken while others are ─► event_deliveries
//! ```
//!
//! Each sink has a feeder, a task with a slot, a place and dead letters of its own. A feeder reads committed changes
//! alone, so an event cannot tell of what was rolled back, and an order never waits for a sink.
//!
//! * [`form`]: an event out of a change;
//! * [`feeder`]: the task, which reads; `deliverer`: what is read and not delivered;
//! * [`status`]: what the feeders say about themselves;
//! * `kafka`, `redis`: sinks. The webhook is in `http`.

mod deliverer;
pub mod feeder;
pub mod form;
#[cfg(feature = "kafka")]
pub mod kafka;
#[cfg(feature = "redis")]
pub mod redis;
pub mod status;

use std::fmt;
use std::pin::Pin;

use crate::order::UnixMillis;

/// An event, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The same whenever this transition is told: `734…:2`.
    pub id: String,
    /// What it is about, an order in general: events of one subject are delivered one after the other.
    pub subject: String,
    /// Its type: `order.paid`.
    pub kind: String,
    /// The whole as JSON.
    pub body: String,
    /// When the change was committed.
    pub at: UnixMillis,
    /// `traceparent` of the request that placed the order, if that is traced.
    pub traceparent: Option<String>,
}

/// What became of the delivery of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The sink has it.
    Delivered,
    /// The sink has not taken it, and may take it later.
    Failed(String),
    /// The sink will never take this one.
    Refused(String),
    /// It was not tried: an earlier event of its subject failed, or all that were tried did.
    Untried,
    /// The sink wants no more events at all.
    Gone(String),
}

/// The outcomes of a delivery, one for each event.
pub type Delivering<'a> = Pin<Box<dyn Future<Output = Vec<Delivery>> + Send + 'a>>;

/// Takes events.
pub trait Sink: Send + Sync + fmt::Debug {
    /// Its kind and address for people, without secrets.
    fn title(&self) -> String;

    /// Delivers events, those of one subject in their order. An event behind one of its subject that failed is
    /// [`Delivery::Untried`].
    fn deliver<'a>(&'a self, events: &'a [Event]) -> Delivering<'a>;
}
