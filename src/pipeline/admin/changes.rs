//! Applies an operator's stored change to memory.

use std::sync::Arc;

use crate::order::{UnixMillis, UserId};
use crate::state::State;
use crate::state::buyers::LiveOrder;
use crate::state::lanes::OwnedPass;
use crate::state::row_changes::RowChange;
use crate::state::stock::{Hold, Sku};
use crate::store::StoreError;

/// A retried dead letter whose outcome is not known yet.
#[derive(Debug)]
pub(super) struct Retried {
    pub(super) hold: Hold,
    pub(super) user_id: String,
    pub(super) order: LiveOrder,
    pub(super) expires_at: UnixMillis,
    /// Dropped after the hold.
    pub(super) _change: RowChange,
    /// At a node: its lane is not handed over while the outcome is unknown.
    pub(super) _lane: Option<OwnedPass>,
}

impl Retried {
    /// Applies a committed retry: the order is a payable row, its units stay held, and it counts toward limits
    /// again.
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

/// Stops the process if the database has a SKU under another number than memory: a failover has lost SKUs since
/// the start, and any further write by number would concern another SKU.
pub(in crate::pipeline) fn check_number(state: &State, made: &Sku) -> Result<(), StoreError> {
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
        "the database has {} under number {}, which is not its number in memory: it has lost SKUs; restart Millrace",
        made.id, made.number.0
    );
    state.poison.set(reason.clone());
    Err(StoreError::Data(reason))
}
