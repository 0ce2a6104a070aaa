//! Orders, from the click to the row.
//!
//! * [`intake`]: checks an order, holds its stock and queues it; [`rate_limit`]: how many a buyer may send;
//! * [`lookup`]: where an order is now;
//! * [`worker`]: writes batches and settles their orders; [`worker_pool`]: which workers write; [`apply`]: a
//!   batch of which something is refused;
//! * [`deadlines`]: gives up orders that no worker claimed in time; [`cancel`]: a buyer's cancellation;
//! * [`parking`]: orders of a SKU whose counters the database refuses.

pub mod apply;
pub mod cancel;
pub mod deadlines;
pub mod intake;
pub mod lookup;
pub mod parking;
pub mod rate_limit;
pub mod worker;
pub mod worker_pool;
