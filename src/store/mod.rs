//! Access to PostgreSQL. SQL lives in this module and nowhere else.
//!
//! * [`schema`]: the tables and views, and their migrations.
//! * [`postgres`]: connections, and all work that is not a worker's batch: start-up, look-ups, administration,
//!   audit.
//! * [`batch`]: the writer of a worker: a batch and its counters in one transaction, exactly once.
//! * `fenced`: the row that numbers a writer's transactions, so that an in-doubt commit is resolved and never
//!   guessed.
//! * [`cluster`]: several nodes: membership, lanes, shares of stock, takeover.
//! * [`copy`]: the rows of a batch in the binary form of COPY.
//! * [`settlement`]: payments, expiry and refunds of orders that are rows.
//! * [`events`]: changes of orders and payments, decoded from the write-ahead log, for other systems; [`pgoutput`]: the
//!   messages in which PostgreSQL tells them.
//! * [`embedded`]: Millrace's own PostgreSQL, used if no other is configured.

pub mod batch;
pub mod cluster;
pub mod copy;
pub mod embedded;
mod error;
pub mod events;
mod fenced;
mod ledger;
pub mod pgoutput;
pub mod postgres;
pub mod schema;
pub mod settlement;

pub use error::{StoreError, WriteError};
pub use ledger::Ledger;

/// A name as an SQL identifier.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
