//! An operator's changes and checks.
//!
//! * [`operator`]: SKUs, stock, dead letters; `limits`: the live orders that a new purchase limit has
//!   to count; `lost_answers`: changes whose COMMIT was not answered; `changes`: what
//!   memory does with one that is stored;
//! * [`pauses`]: pausing a SKU or the sale in an emergency;
//! * [`audit`]: memory and database held against each other; [`pruning`]: deletes rows past their
//!   retention.

pub mod audit;
mod changes;
pub(in crate::pipeline) mod limits;
pub(in crate::pipeline) mod lost_answers;
pub mod operator;
pub mod pauses;
pub mod pruning;
