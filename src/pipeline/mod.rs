//! The life of an order: [`orders`] admits it and writes its row, [`payments`] settles it, [`failover`]
//! recovers it after restarts and failovers, [`admin`] serves operators, [`cluster`] shares a sale with other nodes,
//! [`events`] tells other systems.

pub mod admin;
pub mod cluster;
pub mod events;
pub mod failover;
pub mod orders;
pub mod payments;

use std::sync::Arc;
use std::task::Waker;

/// Wakes a batch of waiters cheaply: the data plane hands the batch to one coroutine.
pub type WakeAll = Arc<dyn Fn(Vec<Waker>) + Send + Sync>;

/// Wakes each waiter directly, for callers without a data plane.
pub fn wake_directly() -> WakeAll {
    Arc::new(|wakers| wakers.into_iter().for_each(Waker::wake))
}
