//! The durable queue over any order log.
//!
//! An order with `respond-async` is acknowledged once the log has its group. The log is also the queue of such
//! orders: those that do not fit in memory wait there and are read back in order.
//!
//! * `queue`: the [`crate::queue::OrderQueue`] over all of it; `shared`: state of queue and threads;
//! * `appender`: the thread that gathers groups and appends them; `mpsc`: its input; `parker`: its wake-up;
//! * `linger`: acknowledged orders gather, because nobody waits for their rows;
//! * `spill`: orders that wait in the log; `reader`: the thread that reads them back.

mod appender;
mod linger;
mod mpsc;
mod parker;
mod queue;
mod reader;
mod shared;
mod spill;

pub use queue::LoggedQueue;
pub use shared::{LogContact, QueueParts};
