//! Cancellations, in the database first, then in memory.
//!
//! Each cancellation is entered into a bounded list before it is sent. If its answer is lost, it stays in the
//! list until its outcome is known, however long that takes; one task resolves the list. A cancellation that
//! finds the list full is refused before anything is sent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::backoff::Backoff;
use crate::order::{Ended, OrderId, OrderStatus, OrderUnits, UnixMillis, UserId};
use crate::state::State;
use crate::state::effects::Row;
use crate::state::pending::PendingOrder;
use crate::state::row_changes::RowChange;
use crate::store::StoreError;
use crate::store::postgres::orders::{self, StoredOrder};
pub use crate::store::postgres::transitions::Which;
use crate::store::postgres::transitions::{self, Transition};
use crate::store::postgres::{Database, NodeLease};
use crate::sync::Guarded;

/// Maximum of cancellations under way and in doubt together.
const UNRESOLVED_MAX: usize = 10_000;
/// Pauses between two rounds through the list that resolve nothing.
const ROUND_PAUSE: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
/// Consecutive failures after which a round ends, because the database is away.
const FAILURES_MAX: u32 = 3;

/// Reason why an order was not cancelled.
#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    /// There is no such order.
    #[error("there is no order {0}")]
    Unknown(OrderId),
    /// Its status no longer permits it.
    #[error("order {0} is {1} and cannot be cancelled")]
    NotCancellable(OrderId, OrderStatus),
    /// Only a waiting order was to be cancelled, and this one has its units.
    #[error("order {0} is {1}: it does not wait any more, and was not cancelled")]
    AlreadyAssigned(OrderId, OrderStatus),
    /// Too many cancellations are in doubt; nothing was sent.
    #[error("too many cancellations wait for the database's answer")]
    Busy,
    /// The database did not answer; repeating the request tells the outcome.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Cancellations that are sent, or about to be, and whose outcome is unknown.
#[derive(Debug)]
pub struct Unresolved {
    orders: Guarded<BTreeMap<OrderId, Entry>>,
    max: usize,
    changed: Notify,
}

/// An order in the list.
#[derive(Debug)]
struct Entry {
    /// While it is in the list, memory may lack what the row has.
    _change: RowChange,
    /// Calls under way.
    calls: u32,
    /// The answer to one was lost: what it was about. A cancellation of any unpaid order covers one of a waiting
    /// order.
    lost: Option<Which>,
    /// The order, if it was written a moment ago.
    recent: Option<Arc<PendingOrder>>,
}

impl Default for Unresolved {
    fn default() -> Self {
        Self::with_room(UNRESOLVED_MAX)
    }
}

impl Unresolved {
    /// A list with room for `max` orders.
    pub fn with_room(max: usize) -> Self {
        Unresolved {
            orders: Guarded::new(BTreeMap::new()),
            max,
            changed: Notify::new(),
        }
    }

    /// Number of orders whose cancellation is in doubt.
    pub fn lost(&self) -> usize {
        self.orders
            .with(|orders| orders.values().filter(|entry| entry.lost.is_some()).count())
    }

    /// Enters an order before its cancellation is sent. Returns `None` if the list is full.
    fn enter(
        self: &Arc<Self>,
        id: OrderId,
        which: Which,
        recent: Option<Arc<PendingOrder>>,
        change: RowChange,
    ) -> Option<Ticket> {
        self.orders.with(|orders| {
            if orders.len() >= self.max && !orders.contains_key(&id) {
                return None;
            }
            let entry = orders.entry(id).or_insert(Entry {
                _change: change,
                calls: 0,
                lost: None,
                recent: None,
            });
            entry.calls += 1;
            entry.recent = recent.or_else(|| entry.recent.take());
            Some(Ticket {
                unresolved: Arc::clone(self),
                id,
                which,
                is_known: false,
            })
        })
    }

    /// The next cancellation in doubt after `after`, or the first.
    fn next(&self, after: Option<OrderId>) -> Option<(OrderId, Lost)> {
        self.orders.with(|orders| {
            let lost = |(id, entry): (&OrderId, &Entry)| {
                let recent = entry.recent.clone();
                entry.lost.map(|which| (*id, Lost { which, recent }))
            };
            let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
            orders
                .range((from, std::ops::Bound::Unbounded))
                .find_map(lost)
        })
    }

    fn mark_resolved(&self, id: OrderId) {
        self.orders.with(|orders| {
            if let Some(entry) = orders.get_mut(&id) {
                entry.lost = None;
                if entry.calls == 0 {
                    orders.remove(&id);
                }
            }
        });
    }
}

/// A cancellation whose answer was lost.
#[derive(Debug)]
struct Lost {
    which: Which,
    recent: Option<Arc<PendingOrder>>,
}

/// A call under way. If it is dropped without [`Ticket::known`], its outcome is in doubt.
#[derive(Debug)]
struct Ticket {
    unresolved: Arc<Unresolved>,
    id: OrderId,
    which: Which,
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
        self.unresolved.orders.with(|orders| {
            if let Some(entry) = orders.get_mut(&self.id) {
                entry.calls -= 1;
                if !self.is_known {
                    entry.lost = match entry.lost {
                        Some(Which::Unpaid) => Some(Which::Unpaid),
                        Some(Which::Waiting) | None => Some(self.which),
                    };
                }
                if entry.calls == 0 && entry.lost.is_none() {
                    orders.remove(&self.id);
                }
            }
        });
        if !self.is_known {
            self.unresolved.changed.notify_one();
        }
    }
}

/// Cancels orders that are rows.
#[derive(Clone, Debug)]
pub struct Canceller {
    state: Arc<State>,
    database: Database,
    lease: NodeLease,
    unresolved: Arc<Unresolved>,
}

impl Canceller {
    /// A canceller on this state and this database.
    pub fn new(state: Arc<State>, database: Database, lease: NodeLease) -> Self {
        Canceller {
            state,
            database,
            lease,
            unresolved: Arc::default(),
        }
    }

    /// Replaces the list of unresolved cancellations.
    pub fn with_unresolved(mut self, unresolved: Arc<Unresolved>) -> Self {
        self.unresolved = unresolved;
        self
    }

    /// Orders whose cancellation is under way or in doubt.
    pub fn in_doubt(&self) -> Vec<OrderId> {
        let orders = &self.unresolved.orders;
        orders.with(|orders| orders.keys().copied().collect())
    }

    /// Cancels an unpaid order, or one that waits for units, and returns it; its units are free when this
    /// returns. An order already cancelled is returned unchanged.
    ///
    /// Must not be dropped half-way: run it as a task of its own.
    ///
    /// # Errors
    /// [`CancelError`]; the order is unchanged, unless the database's answer was lost. Then the outcome is
    /// resolved in the background, and repeating the request tells it.
    pub async fn cancel(&self, id: OrderId, which: Which) -> Result<StoredOrder, CancelError> {
        let recent = self.state.recent_orders.get(id, self.state.ids.real_now());
        let changes = &self.state.row_changes;
        // Until memory is updated, which is after the ticket has gone.
        let _change = changes.begin();
        let ticket = self
            .unresolved
            .enter(id, which, recent.clone(), changes.begin())
            .ok_or(CancelError::Busy)?;
        self.state.recent_orders.forget(id);
        let moved = self.cancel_row(id, which).await;
        if !moved.as_ref().is_err_and(StoreError::is_transient) {
            ticket.known();
        }
        match moved {
            Ok(Transition::Unknown) => {
                self.give_back_lost(recent.as_deref());
                return Err(CancelError::Unknown(id));
            }
            Ok(Transition::StandsAt(OrderStatus::Cancelled)) => {}
            Ok(Transition::StandsAt(
                status @ (OrderStatus::Accepted | OrderStatus::PendingPayment | OrderStatus::Paid),
            )) if which == Which::Waiting => {
                return Err(CancelError::AlreadyAssigned(id, status));
            }
            Ok(Transition::StandsAt(status)) => {
                return Err(CancelError::NotCancellable(id, status));
            }
            Ok(Transition::Now(units)) => self.cancelled(&units, Row::Moved),
            Ok(Transition::Left(units)) => self.left(&units),
            Err(error) => return Err(error.into()),
        }
        let order = orders::find(&self.database, id).await?;
        let order = order.ok_or(CancelError::Unknown(id))?;
        self.give_back_stored(&order);
        Ok(order)
    }

    /// An order past its deadline is not cancelled any more: it expires.
    async fn cancel_row(&self, id: OrderId, which: Which) -> Result<Transition, StoreError> {
        let now = self.state.ids.real_now();
        transitions::cancel(&self.database, self.lease, id, Some(now), which).await
    }

    /// Resolves cancellations in doubt until the future is dropped.
    pub async fn resolve_lost(self) {
        let mut backoff = ROUND_PAUSE;
        let mut pause = backoff.pause();
        loop {
            let has_any = self.unresolved.next(None).is_some();
            tokio::select! {
                biased;
                () = tokio::time::sleep(pause), if has_any => {}
                () = self.unresolved.changed.notified(), if !has_any => continue,
            }
            if self.resolve_round().await > 0 {
                backoff.reset();
            }
            pause = backoff.pause();
        }
    }

    /// Tries each once, unless the database is away. Returns the number resolved.
    async fn resolve_round(&self) -> usize {
        let (mut at, mut resolved, mut failures) = (None, 0, 0);
        while let Some((id, lost)) = self.unresolved.next(at) {
            at = Some(id);
            if self.resolve(id, lost).await {
                self.unresolved.mark_resolved(id);
                resolved += 1;
                failures = 0;
            } else {
                failures += 1;
                if failures >= FAILURES_MAX && resolved == 0 && self.database.ping().await.is_err()
                {
                    break;
                }
            }
        }
        resolved
    }

    /// Repeats a cancellation in doubt instead of querying it: the first statement may still be waiting in the
    /// server and take effect after any query. Returns true if the outcome is known.
    async fn resolve(&self, id: OrderId, Lost { which, recent }: Lost) -> bool {
        // Without a deadline: the first attempt was in time.
        match transitions::cancel(&self.database, self.lease, id, None, which).await {
            Ok(Transition::Now(units)) => self.cancelled(&units, Row::Moved),
            Ok(Transition::Left(units)) => self.left(&units),
            Ok(Transition::StandsAt(OrderStatus::Cancelled)) => {
                match orders::find(&self.database, id).await {
                    Ok(Some(order)) => self.give_back_stored(&order),
                    Ok(None) | Err(_) => return false,
                }
            }
            Ok(Transition::Unknown) => self.give_back_lost(recent.as_deref()),
            Ok(Transition::StandsAt(_)) => {}
            // If final, another process continues from the database's state.
            Err(error) => return error.is_final(),
        }
        true
    }

    /// Frees the units of an order that was written a moment ago and has no row any more: a failover lost it,
    /// and the buyer has cancelled it. If it is restored later, it is restored as cancelled.
    fn give_back_lost(&self, recent: Option<&PendingOrder>) {
        match recent.map(|recent| &recent.order) {
            Some(order) if order.waits() => self.left(&OrderUnits::of(order)),
            Some(order) => self.cancelled(&OrderUnits::of(order), Row::Found),
            None => {}
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
            if order.expires_at == UnixMillis::NEVER {
                self.left(&units);
            } else {
                self.cancelled(&units, Row::Found);
            }
        }
    }

    fn left(&self, units: &OrderUnits) {
        self.state.end_waiting([units], Ended::Cancelled);
    }

    fn cancelled(&self, units: &OrderUnits, row: Row) {
        self.state.end_unpaid(units, Ended::Cancelled, row);
    }
}
