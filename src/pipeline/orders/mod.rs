//! Orders, from the request to the row.
//!
//! * [`intake`]: checks an order, holds its stock and queues it; [`rate_limit`]: limits requests, for each
//!   buyer and overall;
//! * [`lookup`]: finds an order in flight, on the disk, among recent orders or in the database;
//! * [`worker`]: writes batches and settles their orders; [`worker_pool`]: wakes workers as load requires;
//!   [`apply`]: narrows down what the database refuses of a batch;
//! * [`deadlines`]: abandons orders that no worker claimed in time; [`cancel`]: a buyer's cancellation;
//! * [`drawer`]: makes draws once they are due;
//! * [`parking`]: orders of a SKU whose counters the database refuses.

pub mod apply;
pub mod cancel;
pub mod deadlines;
pub mod drawer;
pub mod intake;
pub mod lookup;
pub mod parking;
pub mod rate_limit;
pub mod worker;
pub mod worker_pool;
