//! Memory's part of an operator's change, once it is known to be stored.

use std::sync::Arc;

use crate::order::{UnixMillis, UserId};
use crate::state::State;
use crate::state::buyers::LiveOrder;
use crate::state::stock::{Hold, Sku};
use crate::store::StoreError;

/// A dead letter that was retried, until it is known what came of it.
#[derive(Debug)]
pub(super) struct Retried {
    pub(super) hold: Hold,
    pub(super) user_id: String,
    pub(super) order: LiveOrder,
    pub(super) expires_at: UnixMillis,
}

impl Retried {
    /// A dead letter's order is a row, to be paid: its units stay held, and it counts again.
    pub(super) fn revived(self, state: &State) {
        self.hold.commit();
        let until = (self.order.order_id, self.expires_at);
        state.expiry_index.note([until]);
        if let Ok(user_id) = UserId::new(&self.user_id) {
            let is_limited = |sku| state.is_limited(sku);
            state.buyers.reactivate(&user_id, self.order, is_limited);
        }
    }
}

/// Stops the process where the database knows a SKU by another number than memory: it has
/// forgotten SKUs since the start, in a failover, and whatever is written by number from now on
/// would be of another SKU.
pub(super) fn check_number(state: &State, made: &Sku) -> Result<(), StoreError> {
    let catalogue = &state.catalogue;
    let known = catalogue.get(&made.id);
    let is_another = |known: &Arc<Sku>| known.id != made.id;
    if known.is_none_or(|known| known.number == made.number)
        && !catalogue
            .by_number(made.number)
            .is_some_and(|known| is_another(&known))
    {
        return Ok(());
    }
    let reason = format!(
        "the database knows {} by number {}, which is not its number in memory: it has lost SKUs; start again",
        made.id, made.number.0
    );
    state.poison.set(reason.clone());
    Err(StoreError::Data(reason))
}
