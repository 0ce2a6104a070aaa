//! Cancelling: in the database first, then in memory.
//!
//! A cancellation whose answer is lost is entered into one bounded list before it is sent, and stays in
//! it until its outcome is known, however long that takes. One task goes through the list. A cancellation
//! for which there is no room in it is refused before anything is sent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::backoff::Backoff;
use crate::order::{Ended, OrderId, OrderStatus, OrderUnits, UserId};
use crate::state::State;
use crate::state::effects::Row;
use crate::state::pending::PendingOrder;
use crate::store::StoreError;
use crate::store::postgres::orders::StoredOrder;
use crate::store::postgres::transitions::Transition;
use crate::store::postgres::{Database, NodeLease};
use crate::sync::Guarded;

/// Cancellations under way and of unknown outcome together.
const UNSETTLED_MAX: usize = 10_000;
/// Pauses between two rounds through the list in which none of it is settled.
const SETTLE: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
/// Failures in a row after which a round ends: the database is away.
const FAILURES_MAX: u32 = 3;

/// Why an order was not cancelled.
#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    /// There is no such order.
    #[error("there is no order {0}")]
    Unknown(OrderId),
    /// It is past the point where it could be cancelled.
    #[error("order {0} is {1} and cannot be cancelled")]
    NotCancellable(OrderId, OrderStatus),
    /// Too many are of unknown outcome; nothing was sent.
    #[error("too many cancellations wait for the database's answer")]
    Busy,
    /// The database did not answer; asking again tells.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Cancellations that have been sent, or are about to be, and whose outcome is not known.
#[derive(Debug)]
pub struct Unsettled {
    orders: Guarded<BTreeMap<OrderId, Entry>>,
    max: usize,
    changed: Notify,
}

/// One order in it.
#[derive(Debug, Default)]
struct Entry {
    /// Calls under way.
    calls: u32,
    /// The answer to one was lost.
    is_lost: bool,
    /// The order, where it was written a moment ago.
    recent: Option<Arc<PendingOrder>>,
}

impl Default for Unsettled {
    fn default() -> Self {
        Self::with_room(UNSETTLED_MAX)
    }
}

impl Unsettled {
    /// A list with room for `max` orders.
    pub fn with_room(max: usize) -> Self {
        Unsettled {
            orders: Guarded::new(BTreeMap::new()),
            max,
            changed: Notify::new(),
        }
    }

    /// Orders whose cancellation's answer was lost.
    pub fn lost(&self) -> usize {
        self.orders
            .with(|orders| orders.values().filter(|entry| entry.is_lost).count())
    }

    /// Enters an order before its cancellation is sent. `None`: there is no room.
    fn enter(self: &Arc<Self>, id: OrderId, recent: Option<Arc<PendingOrder>>) -> Option<Ticket> {
        self.orders.with(|orders| {
            if orders.len() >= self.max && !orders.contains_key(&id) {
                return None;
            }
            let entry = orders.entry(id).or_default();
            entry.calls += 1;
            entry.recent = recent.or_else(|| entry.recent.take());
            Some(Ticket {
                unsettled: Arc::clone(self),
                id,
                is_known: false,
            })
        })
    }

    /// The lost one that comes after `after`, or the first of all.
    fn next(&self, after: Option<OrderId>) -> Option<(OrderId, Option<Arc<PendingOrder>>)> {
        self.orders.with(|orders| {
            let lost = |(id, entry): (&OrderId, &Entry)| {
                entry.is_lost.then(|| (*id, entry.recent.clone()))
            };
            let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
            orders
                .range((from, std::ops::Bound::Unbounded))
                .find_map(lost)
        })
    }

    fn settled(&self, id: OrderId) {
        self.orders.with(|orders| {
            if let Some(entry) = orders.get_mut(&id) {
                entry.is_lost = false;
                if entry.calls == 0 {
                    orders.remove(&id);
                }
            }
        });
    }
}

/// A call under way. Dropped without [`Ticket::known`], its outcome is to be found out.
#[derive(Debug)]
struct Ticket {
    unsettled: Arc<Unsettled>,
    id: OrderId,
    is_known: bool,
}

impl Ticket {
    /// The database has answered.
    fn known(mut self) {
        self.is_known = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.unsettled.orders.with(|orders| {
            if let Some(entry) = orders.get_mut(&self.id) {
                entry.calls -= 1;
                entry.is_lost |= !self.is_known;
                if entry.calls == 0 && !entry.is_lost {
                    orders.remove(&self.id);
                }
            }
        });
        if !self.is_known {
            self.unsettled.changed.notify_one();
        }
    }
}

/// Cancels orders whose rows are there.
#[derive(Clone, Debug)]
pub struct Canceller {
    state: Arc<State>,
    database: Database,
    lease: NodeLease,
    unsettled: Arc<Unsettled>,
}

impl Canceller {
    /// A canceller on this state and this database.
    pub fn new(state: Arc<State>, database: Database, lease: NodeLease) -> Self {
        Canceller {
            state,
            database,
            lease,
            unsettled: Arc::default(),
        }
    }

    /// The same with another list of what is not settled.
    pub fn with_unsettled(mut self, unsettled: Arc<Unsettled>) -> Self {
        self.unsettled = unsettled;
        self
    }

    /// Cancels an unpaid order and returns it; its units are free again when this returns. An
    /// order that is cancelled already is returned as it is.
    ///
    /// Not to be dropped half-way: run it as a task of its own.
    ///
    /// # Errors
    /// [`CancelError`]; the order stands as it did, unless the database's answer was lost. Then
    /// what came of it is found out in the background, and asking again tells.
    pub async fn cancel(&self, id: OrderId) -> Result<StoredOrder, CancelError> {
        let recent = self.state.recent_orders.get(id, self.state.ids.real_now());
        let ticket = self
            .unsettled
            .enter(id, recent.clone())
            .ok_or(CancelError::Busy)?;
        self.state.recent_orders.forget(id);
        let moved = self.cancel_row(id).await;
        if !moved.as_ref().is_err_and(StoreError::is_transient) {
            ticket.known();
        }
        match moved {
            Ok(Transition::Unknown) => {
                self.give_back_lost(recent.as_deref());
                return Err(CancelError::Unknown(id));
            }
            Ok(Transition::StandsAt(OrderStatus::Cancelled)) => {}
            Ok(Transition::StandsAt(status)) => {
                return Err(CancelError::NotCancellable(id, status));
            }
            Ok(Transition::Now(units)) => self.cancelled(&units, Row::Moved),
            Err(error) => return Err(error.into()),
        }
        let order = self.database.find_order(id).await?;
        let order = order.ok_or(CancelError::Unknown(id))?;
        self.give_back_stored(&order);
        Ok(order)
    }

    /// An order that is past its time is not cancelled any more: it expires.
    async fn cancel_row(&self, id: OrderId) -> Result<Transition, StoreError> {
        let now = self.state.ids.real_now();
        self.database.cancel_order(self.lease, id, Some(now)).await
    }

    /// Sees cancellations through whose answers were lost, until the future is dropped.
    pub async fn settle_lost(self) {
        let mut backoff = SETTLE;
        let mut pause = backoff.pause();
        loop {
            let has_any = self.unsettled.next(None).is_some();
            tokio::select! {
                () = tokio::time::sleep(pause), if has_any => {}
                () = self.unsettled.changed.notified(), if !has_any => continue,
            }
            if self.settle_round().await > 0 {
                backoff.reset();
            }
            pause = backoff.pause();
        }
    }

    /// Tries each once, unless the database is away. How many are settled.
    async fn settle_round(&self) -> usize {
        let (mut at, mut settled, mut failures) = (None, 0, 0);
        while let Some((id, recent)) = self.unsettled.next(at) {
            at = Some(id);
            if self.settle(id, recent).await {
                self.unsettled.settled(id);
                settled += 1;
                failures = 0;
            } else {
                failures += 1;
                if failures >= FAILURES_MAX && settled == 0 && self.database.ping().await.is_err() {
                    break;
                }
            }
        }
        settled
    }

    /// Makes a cancellation again whose answer was lost, rather than asking for it: the first may still
    /// be waiting in the server, and be carried out after any look. True: its outcome is known.
    async fn settle(&self, id: OrderId, recent: Option<Arc<PendingOrder>>) -> bool {
        // Past its time too: the first attempt was not.
        match self.database.cancel_order(self.lease, id, None).await {
            Ok(Transition::Now(units)) => self.cancelled(&units, Row::Moved),
            Ok(Transition::StandsAt(OrderStatus::Cancelled)) => {
                match self.database.find_order(id).await {
                    Ok(Some(order)) => self.give_back_stored(&order),
                    Ok(None) | Err(_) => return false,
                }
            }
            Ok(Transition::Unknown) => self.give_back_lost(recent.as_deref()),
            Ok(Transition::StandsAt(_)) => {}
            // Another process goes on from what the database says.
            Err(error) => return error.is_final(),
        }
        true
    }

    /// Frees the units of an order whose row was written a moment ago and is not there any more: a
    /// failover has lost it, and nobody wants it back. If it is restored yet, that is as cancelled.
    fn give_back_lost(&self, recent: Option<&PendingOrder>) {
        if let Some(PendingOrder { order, .. }) = recent {
            self.cancelled(&OrderUnits::of(order), Row::Found);
        }
    }

    fn give_back_stored(&self, order: &StoredOrder) {
        if order.status == OrderStatus::Cancelled {
            let units = OrderUnits {
                order_id: order.id,
                user_id: UserId::from_row(&order.user_id),
                sku: order.sku,
                quantity: order.quantity,
            };
            self.cancelled(&units, Row::Found);
        }
    }

    fn cancelled(&self, units: &OrderUnits, row: Row) {
        self.state.end_unpaid(units, Ended::Cancelled, row);
    }
}
