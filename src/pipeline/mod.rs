//! The flow of an order: [`intake`] holds stock and queues, [`worker`] writes and settles ([`crew`] says which),
//! [`deadlines`] gives up what nobody claimed in time. [`crate::state::State`] is what they share: every way in
//! which an order in flight can end, and what memory owes for each. [`operator`] ([`pauses`] in an emergency) and [`audit`] are
//! an operator's hands and eyes; `limits` reads what a new purchase limit has to count. What happens to an order after its row is there is the work of three [`settler`]s:
//! [`callbacks`] of payment providers, [`cashier`] (orphan payments, which is `reconciler`, and refunds), [`expiry`].
//! [`lease`] keeps the right to go on, [`health`] looks how the database does, [`replay`] writes what may be
//! written already, [`restore`] notices what a failover has lost, [`retention`] keeps segments until standbys
//! have them, [`pruning`] deletes rows that are older than they are kept.

pub mod audit;
mod backoff;
pub mod callbacks;
pub mod cancel;
pub mod cashier;
pub mod crew;
pub mod deadlines;
pub mod expiry;
pub mod health;
pub mod intake;
pub mod lease;
mod limits;
mod lost_answers;
pub mod operator;
pub mod parking;
pub mod pauses;
pub mod pruning;
pub mod rate_limit;
mod reconciler;
pub mod replay;
pub mod restore;
pub mod retention;
pub mod settler;
pub mod worker;

use std::sync::Arc;
use std::task::Waker;

/// Wakes everyone in a batch, cheaply: the data plane hands the batch to one coroutine.
pub type WakeAll = Arc<dyn Fn(Vec<Waker>) + Send + Sync>;

/// Wakes everyone directly, for callers without a data plane.
pub fn wake_directly() -> WakeAll {
    Arc::new(|wakers| wakers.into_iter().for_each(Waker::wake))
}
