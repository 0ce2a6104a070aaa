//! Cancelling: in the database first, then in memory.

use std::sync::Arc;

use super::ledger::Ledger;
use crate::order::{OrderId, OrderStatus, UserId};
use crate::store::StoreError;
use crate::store::postgres::orders::StoredOrder;
use crate::store::postgres::transitions::Moved;
use crate::store::postgres::{Database, NodeLease};

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
    /// # Errors
    /// [`CancelError`]; the order stands as it did, unless the database's answer was lost.
    pub async fn cancel(&self, id: OrderId) -> Result<StoredOrder, CancelError> {
        let moved = self.database.cancel_order(self.lease, id).await?;
        match moved {
            Moved::Unknown => return Err(CancelError::Unknown(id)),
            Moved::StandsAt(OrderStatus::Cancelled) | Moved::Now(_) => {}
            Moved::StandsAt(status) => return Err(CancelError::NotCancellable(id, status)),
        }
        let order = self
            .database
            .find_order(id)
            .await?
            .ok_or(CancelError::Unknown(id))?;
        let by_this_call = matches!(moved, Moved::Now(_));
        self.give_back(&order, by_this_call);
        Ok(order)
    }

    /// Frees a cancelled order's units in memory, once. Whoever turns the buyer's record over
    /// does it: so a first call whose answer was lost is made good by the next one. An order that
    /// has left the window has no record; then it is the call that moved the row.
    fn give_back(&self, order: &StoredOrder, by_this_call: bool) {
        let Ok(user_id) = UserId::new(&order.user_id) else {
            return;
        };
        let turned = self.ledger.buyers.no_longer_live(&user_id, order.id);
        if turned.unwrap_or(by_this_call) {
            self.ledger.release_units(&order.sku_id, order.quantity);
        }
    }
}
