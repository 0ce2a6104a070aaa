//! The life of an order: [`orders`] takes it in and makes it a row, [`payments`] settles it, [`failover`]
//! carries it over restarts and failovers, [`admin`] is for operators.

pub mod admin;
pub mod failover;
pub mod orders;
pub mod payments;

use std::sync::Arc;
use std::task::Waker;

/// Wakes everyone in a batch, cheaply: the data plane hands the batch to one coroutine.
pub type WakeAll = Arc<dyn Fn(Vec<Waker>) + Send + Sync>;

/// Wakes everyone directly, for callers without a data plane.
pub fn wake_directly() -> WakeAll {
    Arc::new(|wakers| wakers.into_iter().for_each(Waker::wake))
}
