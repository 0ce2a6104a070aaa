//! Cancelling: in the database first, then in memory.

use std::sync::Arc;
use std::time::Duration;

use super::ledger::Ledger;
use crate::order::{OrderId, OrderStatus, SkuId, UserId};
use crate::state::pending::PendingOrder;
use crate::store::StoreError;
use crate::store::postgres::orders::StoredOrder;
use crate::store::postgres::transitions::{Moved, Units};
use crate::store::postgres::{Database, NodeLease};

/// How often, and after which pauses, the outcome of a lost answer is asked for: ten minutes.
const SETTLE_ATTEMPTS: u32 = 600;
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// Why an order was not cancelled.
#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    /// There is no such order.
    #[error("there is no order {0}")]
    Unknown(OrderId),
    /// It is past the point where it could be cancelled.
    #[error("order {0} is {1} and cannot be cancelled")]
    NotCancellable(OrderId, OrderStatus),
    /// The database did not answer; asking again tells.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Cancels orders whose rows are there.
#[derive(Clone, Debug)]
pub struct Canceller {
    ledger: Arc<Ledger>,
    database: Database,
    lease: NodeLease,
}

impl Canceller {
    /// A canceller on this state and this database.
    pub fn new(ledger: Arc<Ledger>, database: Database, lease: NodeLease) -> Self {
        Canceller {
            ledger,
            database,
            lease,
        }
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
        let recent = self.ledger.recent.get(id, self.ledger.ids.real_now());
        self.ledger.recent.forget(id);
        match self.cancel_row(id).await {
            Ok(Moved::Unknown) => {
                self.give_back_lost(id, recent.as_deref());
                return Err(CancelError::Unknown(id));
            }
            Ok(Moved::StandsAt(OrderStatus::Cancelled)) => {}
            Ok(Moved::StandsAt(status)) => return Err(CancelError::NotCancellable(id, status)),
            Ok(Moved::Now(units)) => self.give_back(id, &units, true),
            Err(error) => {
                if error.is_transient() {
                    tokio::spawn(self.clone().settle(id, recent));
                }
                return Err(error.into());
            }
        }
        let order = self.database.find_order(id).await?;
        let order = order.ok_or(CancelError::Unknown(id))?;
        self.give_back_stored(&order);
        Ok(order)
    }

    /// An order that is past its time is not cancelled any more: it expires.
    async fn cancel_row(&self, id: OrderId) -> Result<Moved, StoreError> {
        let now = self.ledger.ids.real_now();
        self.database.cancel_order(self.lease, id, Some(now)).await
    }

    /// Sees a cancellation through whose answer was lost. It is made again rather than asked for:
    /// the first may still be waiting in the server, and be carried out after any look.
    async fn settle(self, id: OrderId, recent: Option<Arc<PendingOrder>>) {
        for _ in 0..SETTLE_ATTEMPTS {
            tokio::time::sleep(SETTLE_PAUSE).await;
            // Past its time too: the first attempt was not.
            match self.database.cancel_order(self.lease, id, None).await {
                Ok(Moved::Now(units)) => return self.give_back(id, &units, true),
                Ok(Moved::StandsAt(OrderStatus::Cancelled)) => {
                    if let Ok(Some(order)) = self.database.find_order(id).await {
                        return self.give_back_stored(&order);
                    }
                }
                Ok(Moved::Unknown) => {
                    return self.give_back_lost(id, recent.as_deref());
                }
                Ok(Moved::StandsAt(_)) => return,
                Err(error) if error.is_transient() => {}
                Err(_) => return,
            }
        }
        tracing::error!(order_id = %id, "whether an order was cancelled is still not known; cancel it again to tell");
    }

    /// Frees the units of an order whose row was written a moment ago and is not there any more: a
    /// failover has lost it, and nobody wants it back. Where it is restored yet, that is as
    /// cancelled.
    fn give_back_lost(&self, id: OrderId, recent: Option<&PendingOrder>) {
        if let Some(PendingOrder { order, .. }) = recent {
            let units = Units {
                user_id: order.user_id.to_string(),
                sku: order.sku,
                quantity: order.quantity.get(),
            };
            self.give_back(id, &units, false);
        }
    }

    fn give_back_stored(&self, order: &StoredOrder) {
        if order.status == OrderStatus::Cancelled {
            let sku = SkuId::new(&order.sku_id)
                .ok()
                .and_then(|id| self.ledger.catalogue.get(&id));
            if let Some(sku) = sku {
                let units = Units {
                    user_id: order.user_id.clone(),
                    sku: sku.number,
                    quantity: order.quantity,
                };
                self.give_back(order.id, &units, false);
            }
        }
    }

    /// Frees a cancelled order's units in memory, once: whoever turns the buyer's record over
    /// does it. An order that has left the window has no record; then it is the call that moved
    /// the row.
    fn give_back(&self, id: OrderId, units: &Units, moved_the_row: bool) {
        let Ok(user_id) = UserId::new(&units.user_id) else {
            return;
        };
        let turned = self.ledger.buyers.no_longer_live(&user_id, id);
        if turned.unwrap_or(moved_the_row)
            && let Some(sku) = self.ledger.catalogue.by_number(units.sku)
        {
            sku.counter().release(units.quantity);
        }
    }
}
