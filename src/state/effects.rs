//! Memory's part of everything that can happen to an order: its units, its buyer's record, its slot.
//!
//! An order in flight, before its row is there to be paid:
//!
//! | it is | units | buyer's record | slot |
//! |---|---|---|---|
//! | persisted | stay held | stays | leaves the map |
//! | failed (dead letter) | back | stays, no longer live | leaves the map |
//! | abandoned, refused or unwritten | back | forgotten: the key may be used afresh | leaves the map |
//! | expired (written too late to be paid) | back | stays, no longer live | leaves the map |
//! | left to the next process, in the journal | stay held | stays | stays in the map |
//! | parked in the database until its SKU's counters are taken | stay held | stays | leaves the map |
//!
//! An order whose row is there:
//!
//! | it is | units | buyer's record |
//! |---|---|---|
//! | paid, or recovered as paid | held become sold | stays |
//! | expired, cancelled, or found failed or cancelled after a failover | back, once | stays, no longer live |
//! | refunded and restocked | sold become free | stays, no longer live |
//! | refunded and withdrawn | sold leave the total | stays, no longer live |
//! | lost in a failover, and known to nothing else | back, once | forgotten |
//!
//! *Once*: two tasks may learn of the same end. The one that turns the buyer's record over gives the
//! units back. If the record has been forgotten, the one that moved the row does.

use std::sync::Arc;
use std::time::Instant;

use super::State;
use super::pending::{PendingOrder, Settled};
use super::stock::StockCounter;
use crate::faults::bug;
use crate::order::{Ended, Order, OrderUnits, SkuNumber, UnixMillis};

/// How the caller knows that an order has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// The caller's own transaction moved the order's row.
    Moved,
    /// The row was found as it is, or is gone: somebody else may have told memory before.
    Found,
}

impl State {
    /// Whether an order that is written at `now` is too late to be paid. One that somebody has
    /// paid in time is not.
    pub fn is_late(&self, order: &Order, now: UnixMillis) -> bool {
        order.expires_at <= now && !self.orphans.paid_in_time(order.id, order.expires_at)
    }

    /// Whether units of a SKU's live orders are remembered beyond the idempotency window, because
    /// it has a purchase limit.
    pub fn is_limited(&self, sku: SkuNumber) -> bool {
        let now = self.ids.real_now();
        let sku = self.catalogue.by_number(sku);
        sku.is_some_and(|sku| sku.terms().need_units(now))
    }

    /// The row of a claimed order is committed.
    pub fn persisted(&self, pending: &Arc<PendingOrder>) {
        if bug("double_release") && pending.is_overdue(Instant::now()) {
            self.release(&pending.order);
        }
        // Before it leaves the map, so that it is found in one of the two at any moment.
        self.recent_orders.note(pending);
        pending.slot.settle(Settled::Persisted);
        self.pending.remove(pending.order.id);
    }

    /// The row of a claimed order is committed, as expired: it had waited too long in the journal
    /// to be paid.
    pub fn expired(&self, pending: &Arc<PendingOrder>) {
        self.ended(&pending.order, Ended::Expired);
        pending.slot.settle(Settled::Persisted);
        self.pending.remove(pending.order.id);
    }

    /// The database refused a claimed order's row and its dead letter is committed.
    pub fn failed(&self, pending: &Arc<PendingOrder>) {
        self.ended(&pending.order, Ended::Failed);
        pending.slot.settle(Settled::Failed);
        self.pending.remove(pending.order.id);
    }

    /// A claimed order is parked in the database, and found there from now on.
    pub fn parked(&self, pending: &Arc<PendingOrder>) {
        pending.slot.settle(Settled::OnDisk);
        self.pending.remove(pending.order.id);
    }

    /// An order has ended before it was a row to be paid: its units are free.
    pub fn ended(&self, order: &Order, ended: Ended) {
        self.release(order);
        self.buyers.deactivate(&order.user_id, order.id, ended);
    }

    /// A claimed order is given up, at shutdown or because its SKU's counters are refused: there is no row. One that the journal has, or may
    /// have, is left to the next process, which will write it; another will never be written.
    pub fn unwritten(&self, pending: &Arc<PendingOrder>) {
        if pending.slot.is_recorded() {
            // It stays in the map, so that those who ask until the end are told the truth.
            pending.slot.settle(Settled::OnDisk);
            return;
        }
        self.release(&pending.order);
        self.buyers.forget(&pending.order.user_id, pending.order.id);
        pending.slot.settle(Settled::Unwritten);
        self.pending.remove(pending.order.id);
    }

    /// Gives an order up, unless a worker has claimed it. True: it was given up.
    pub fn abandon(&self, pending: &Arc<PendingOrder>) -> bool {
        if !pending.slot.abandon() {
            return false;
        }
        self.forget(pending);
        true
    }

    /// Gives up an order that never got as far as the journal. True: it was given up.
    pub fn refuse(&self, pending: &Arc<PendingOrder>) -> bool {
        if !pending.slot.refuse() {
            return false;
        }
        self.forget(pending);
        true
    }

    fn forget(&self, pending: &Arc<PendingOrder>) {
        self.release(&pending.order);
        self.buyers.forget(&pending.order.user_id, pending.order.id);
        self.pending.remove(pending.order.id);
    }

    /// An order whose row was payable, or is gone, has ended: its units are free, once.
    pub fn end_unpaid(&self, units: &OrderUnits, how: Ended, row: Row) {
        let turned = self.deactivate(units, how);
        if turned.unwrap_or(row == Row::Moved) {
            self.with_counter(units.sku, |counter| counter.release(units.quantity));
        }
    }

    /// A payment is matched: held units are sold.
    pub fn paid(&self, units: &OrderUnits) {
        self.with_counter(units.sku, |counter| counter.sell(units.quantity));
    }

    /// A paid order's money went back, and its units are on sale again.
    pub fn restocked(&self, units: &OrderUnits) {
        self.deactivate(units, Ended::Cancelled);
        self.with_counter(units.sku, |counter| counter.unsell(units.quantity));
    }

    /// A paid order's money went back, and its units do not come back on sale.
    pub fn withdrawn(&self, units: &OrderUnits) {
        self.deactivate(units, Ended::Cancelled);
        self.with_counter(units.sku, |counter| counter.withdraw(units.quantity));
    }

    /// An order was recovered as one whose money has to go back. `held`: memory has held its units
    /// until now.
    pub fn recovered_for_refund(&self, units: &OrderUnits, held: bool) {
        if held {
            self.end_unpaid(units, Ended::Cancelled, Row::Found);
        } else {
            self.deactivate(units, Ended::Cancelled);
        }
    }

    /// An order is in no place any more: its units and its key are free.
    pub fn lost(&self, units: &OrderUnits) {
        self.end_unpaid(units, Ended::Cancelled, Row::Found);
        self.buyers.forget(&units.user_id, units.order_id);
    }

    /// `None`: the buyer's record does not have the order.
    fn deactivate(&self, units: &OrderUnits, how: Ended) -> Option<bool> {
        self.buyers.deactivate(&units.user_id, units.order_id, how)
    }

    /// A SKU that memory does not know has no units in it.
    fn with_counter(&self, sku: SkuNumber, moved: impl FnOnce(&StockCounter)) {
        if let Some(sku) = self.catalogue.by_number(sku) {
            moved(sku.counter());
        }
    }

    /// Units that were held for an order in flight: its SKU is known.
    fn release(&self, order: &Order) {
        let sku = self.catalogue.by_number(order.sku);
        assert!(
            sku.is_some(),
            "order {} is of a SKU that has left the catalogue",
            order.id
        );
        if let Some(sku) = sku {
            sku.counter().release(order.quantity.get());
        }
    }
}
