//! Rows in PostgreSQL. SQL lives here and nowhere else.
//!
//! * [`schema`]: the tables and views, and how they come to be.
//! * [`postgres`]: connections, and everything that is not a worker's batch: start-up,
//!   look-ups, administration, audit.
//! * [`batch`]: one worker's writer: a batch and its counters in one transaction, exactly once.
//! * `fenced`: the row that numbers transactions, so that none of unknown outcome is guessed.
//! * [`copy`]: the rows of a batch in the binary form of COPY.
//! * [`settlement`]: what happens to an order after its row is there: payments, expiry, refunds.
//! * [`embedded`]: Millrace's own PostgreSQL, where no other is given.

pub mod batch;
pub mod copy;
pub mod embedded;
mod error;
mod fenced;
pub mod postgres;
pub mod schema;
pub mod settlement;

pub use error::{StoreError, WriteError};
