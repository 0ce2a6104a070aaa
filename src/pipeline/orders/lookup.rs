//! Look-up of an order's present place: in flight, on the disk, recent or stored.
//!
//! ```text
//!                    spill
//!   in flight ◄──────────────────► on the disk
//!   (state::pending)  read back    (the journal)
//!       │ written
//!       ├──────────► recent (state::recent_orders), for a moment
//!       └──────────► stored: a row, a parked order or a dead letter
//! ```
//!
//! An order moves from memory to the disk at most once, and back at most once. So an order found in neither
//! when memory, the disk and memory again are asked, in this sequence, is not in flight. An order is stored
//! before it is noted as recent, and noted as recent before it leaves memory.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crate::order::{Order, OrderId, UserId};
use crate::queue::OrderQueue;
use crate::state::State;
use crate::state::pending::{PendingOrder, SlotState};
use crate::store::StoreError;
use crate::store::postgres::orders::{self, StoredOrder};
use crate::store::postgres::{Database, parked};
use crate::sync::spawn_blocking;

/// An order, where it was found.
#[derive(Debug)]
pub enum Found {
    /// In flight, in memory; its slot tells the progress.
    InFlight(Arc<PendingOrder>),
    /// In flight, on the disk, and durable.
    OnDisk(Box<Order>),
    /// Written a moment ago, and unpaid.
    Recent(Arc<PendingOrder>),
    /// In the database.
    Stored(Box<StoredOrder>),
}

/// Reason why a look-up failed.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// The database did not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The order log could not be read.
    #[error("the order log cannot be read: {0}")]
    Log(#[from] io::Error),
}

impl From<LookupError> for StoreError {
    fn from(error: LookupError) -> Self {
        match error {
            LookupError::Store(error) => error,
            LookupError::Log(_) => StoreError::Data(error.to_string()),
        }
    }
}

/// Looks orders up. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OrderLookup {
    state: Arc<State>,
    queue: Arc<dyn OrderQueue>,
    database: Database,
}

impl OrderLookup {
    /// A look-up in all three.
    pub fn new(state: Arc<State>, queue: Arc<dyn OrderQueue>, database: Database) -> Self {
        OrderLookup {
            state,
            queue,
            database,
        }
    }

    /// An order in memory, in flight or recent. Does no I/O.
    pub fn in_memory(&self, id: OrderId) -> Option<Found> {
        if let Some(pending) = self.state.pending.get(id) {
            return Some(Found::InFlight(pending));
        }
        self.recent(id).map(Found::Recent)
    }

    /// An order that was written a moment ago and is unpaid. Does no I/O.
    pub fn recent(&self, id: OrderId) -> Option<Arc<PendingOrder>> {
        self.state.recent_orders.get(id, self.state.ids.real_now())
    }

    /// Whether an order may be on the disk. Does no I/O.
    pub fn may_be_on_disk(&self, id: OrderId) -> bool {
        let durable = self.queue.durable();
        durable.is_some_and(|queue| queue.may_hold(id))
    }

    /// An order on the disk. Costs nothing if none is there.
    ///
    /// # Errors
    /// [`LookupError::Log`].
    pub async fn on_disk(&self, id: OrderId) -> Result<Option<Order>, LookupError> {
        if !self.may_be_on_disk(id) {
            return Ok(None);
        }
        let queue = Arc::clone(&self.queue);
        let found = spawn_blocking(move || find_on_disk(&*queue, id)).await;
        Ok(found.map_err(io::Error::other)??)
    }

    /// An order in the database.
    ///
    /// # Errors
    /// [`LookupError::Store`].
    pub async fn stored(&self, id: OrderId) -> Result<Option<StoredOrder>, LookupError> {
        Ok(orders::find(&self.database, id).await?)
    }

    /// An order, wherever it is. `None`: it does not exist, or is being admitted or abandoned at this moment.
    ///
    /// # Errors
    /// [`LookupError`].
    pub async fn find(&self, id: OrderId) -> Result<Option<Found>, LookupError> {
        if let Some(found) = self.in_memory(id) {
            return Ok(Some(found));
        }
        if let Some(order) = self.on_disk(id).await? {
            return Ok(Some(Found::OnDisk(Box::new(order))));
        }
        if let Some(found) = self.in_memory(id) {
            return Ok(Some(found));
        }
        let stored = self.stored(id).await?;
        Ok(stored.map(|stored| Found::Stored(Box::new(stored))))
    }

    /// A buyer's newest orders below `before`, the newest first, at most `limit`: those of the idempotency window, or
    /// all of them with `whole_history`, which needs `database.user_index`. Without any of the window, and without
    /// `whole_history`, the database is not asked.
    ///
    /// # Errors
    /// [`LookupError`].
    pub async fn of_user(
        &self,
        user_id: &UserId,
        before: OrderId,
        limit: usize,
        whole_history: bool,
    ) -> Result<Vec<Found>, LookupError> {
        let mut found = BTreeMap::new();
        let mut elsewhere = Vec::new();
        for known in self.state.buyers.page(user_id, before, limit) {
            let id = known.order_id;
            match self.under_way(id).await? {
                Some(order) => drop(found.insert(id, order)),
                None => elsewhere.push(id),
            }
        }
        let stored = if whole_history {
            orders::of_user(&self.database, user_id, before, limit as i64).await?
        } else if elsewhere.is_empty() {
            Vec::new()
        } else {
            orders::find_among(&self.database, &elsewhere).await?
        };
        // A row that is there says more than the order in flight that it was.
        let stored = stored.into_iter();
        found.extend(stored.map(|order| (order.id, Found::Stored(Box::new(order)))));
        Ok(found.into_values().rev().take(limit).collect())
    }

    /// An order that is in memory and not decided, or on the disk.
    async fn under_way(&self, id: OrderId) -> Result<Option<Found>, LookupError> {
        let undecided = || {
            let pending = self.state.pending.get(id)?;
            let state = pending.slot.state();
            let is_undecided = !state.is_final() || state == SlotState::OnDisk;
            is_undecided.then_some(Found::InFlight(pending))
        };
        if let Some(found) = undecided() {
            return Ok(Some(found));
        }
        if let Some(order) = self.on_disk(id).await? {
            return Ok(Some(Found::OnDisk(Box::new(order))));
        }
        Ok(undecided())
    }

    /// Whether an order will become a row: it is in memory, on the disk or parked.
    ///
    /// # Errors
    /// [`LookupError`].
    pub async fn is_under_way(&self, id: OrderId) -> Result<bool, LookupError> {
        let in_memory = || self.state.pending.get(id).is_some();
        Ok(in_memory()
            || self.on_disk(id).await?.is_some()
            || in_memory()
            || parked::contains(&self.database, id).await?)
    }
}

/// Those of `ids` that are neither in memory nor on the disk. Blocks on the disk: not for an async task.
///
/// # Errors
/// If the disk fails.
pub fn not_in_flight(
    state: &State,
    queue: &dyn OrderQueue,
    ids: Vec<OrderId>,
) -> io::Result<Vec<OrderId>> {
    let in_memory = |id| state.pending.get(id).is_some();
    let mut absent = Vec::new();
    for id in ids {
        if !in_memory(id) && find_on_disk(queue, id)?.is_none() && !in_memory(id) {
            absent.push(id);
        }
    }
    Ok(absent)
}

fn find_on_disk(queue: &dyn OrderQueue, id: OrderId) -> io::Result<Option<Order>> {
    queue.durable().map_or(Ok(None), |queue| queue.find(id))
}
