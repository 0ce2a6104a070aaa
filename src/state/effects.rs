//! The effects in memory of every outcome of an order: on its units, its buyer's record and its
//! slot.
//!
//! An order in flight, before its row can be paid:
//!
//! | outcome | units | buyer's record | slot |
//! |---|---|---|---|
//! | persisted | stay held | stays | leaves the map |
//! | failed (dead letter) | free | stays, no longer live | leaves the map |
//! | abandoned, refused or unwritten | free | removed: the key may be used afresh | leaves the map |
//! | expired (written too late to be paid) | free | stays, no longer live | leaves the map |
//! | left to the next process, in the journal | stay held | stays | stays in the map |
//! | parked in the database until its SKU's counters are accepted | stay held | stays | leaves the map |
//!
//! An order that waits holds no units: wherever its units would become free, it leaves its list instead.
//!
//! An order with a committed row:
//!
//! | outcome | units | buyer's record |
//! |---|---|---|
//! | paid, or recovered as paid | held become sold | stays |
//! | expired, cancelled, or found failed or cancelled after a failover | become free, once | stays, no longer live |
//! | refunded and restocked | sold become free | stays, no longer live |
//! | refunded and withdrawn | sold leave the total | stays, no longer live |
//! | refunded, at a node | swept sold units leave the share | stays, no longer live |
//! | lost in a failover, and found nowhere else | become free, once | removed |
//! | waiting, and assigned units | kept become held | stays |
//! | waiting, and cancelled or expired | none | stays, no longer live |
//!
//! Units that become free while orders wait are kept for these (`state::stock`).
//!
//! *Once*: two tasks may learn of the same end. The task that ends the entry in the buyer's record
//! frees the units. If that entry is gone, the task that moved the row does.

use std::sync::Arc;

use super::State;
use super::pending::{PendingOrder, Settled};
use super::stock::{Sku, StockCounter};
use crate::clock;
use crate::faults::bug;
use crate::order::{Ended, LaneSet, Order, OrderId, OrderUnits, SkuNumber, UnixMillis};

/// The caller's evidence that an order has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// The caller's own transaction moved the order's row.
    Moved,
    /// The row was found in this state, or is gone: another task may have updated memory before.
    Found,
}

impl State {
    /// Whether an order that is written at `now` is too late to be paid. An order with a payment
    /// made in time is not late.
    pub fn is_late(&self, order: &Order, now: UnixMillis) -> bool {
        self.orphans.is_late(order.id, order.expires_at, now)
    }

    /// Whether the units of a SKU's live orders are kept beyond the idempotency window, because it
    /// has a purchase limit.
    pub fn is_limited(&self, sku: SkuNumber) -> bool {
        let now = self.ids.real_now();
        let sku = self.catalogue.by_number(sku);
        sku.is_some_and(|sku| sku.terms().need_units(now))
    }

    /// A claimed order whose row is committed.
    pub fn persisted(&self, pending: &Arc<PendingOrder>) {
        if bug("double_release") && pending.is_overdue(clock::now()) {
            self.release(&pending.order);
        }
        // Before it leaves the map, so that it is found in one of the two at any moment.
        self.recent_orders.note(pending);
        if pending.order.waits() {
            // From here on it may be assigned units.
            self.with_sku(pending.order.sku, |sku| {
                sku.waitlist().row_written(pending.order.id);
            });
        }
        pending.slot.settle(Settled::Persisted);
        self.pending.remove(pending.order.id);
    }

    /// A claimed order whose row is committed as expired: it waited in the journal for longer than
    /// its time to pay.
    pub fn expired(&self, pending: &Arc<PendingOrder>) {
        self.ended(&pending.order, Ended::Expired);
        pending.slot.settle(Settled::Persisted);
        self.pending.remove(pending.order.id);
    }

    /// A claimed order whose row was refused, with a committed dead letter.
    pub fn failed(&self, pending: &Arc<PendingOrder>) {
        self.ended(&pending.order, Ended::Failed);
        pending.slot.settle(Settled::Failed);
        self.pending.remove(pending.order.id);
    }

    /// A claimed order that is parked in the database, and found there from now on.
    pub fn parked(&self, pending: &Arc<PendingOrder>) {
        pending.slot.settle(Settled::OnDisk);
        self.pending.remove(pending.order.id);
    }

    /// Ends an order that had no payable row: its units are free.
    pub fn ended(&self, order: &Order, ended: Ended) {
        self.release(order);
        self.buyers.deactivate(&order.user_id, order.id, ended);
    }

    /// A claimed order that is given up, at shutdown or because its SKU's counters are refused: it
    /// has no row. If a journal has, or may have, the order, the next process will write it;
    /// otherwise it will never be written.
    pub fn unwritten(&self, pending: &Arc<PendingOrder>) {
        if pending.slot.is_recorded() {
            // It stays in the map, so that requests until the end get a true answer.
            pending.slot.settle(Settled::OnDisk);
            return;
        }
        self.release(&pending.order);
        self.buyers.forget(&pending.order.user_id, pending.order.id);
        pending.slot.settle(Settled::Unwritten);
        self.pending.remove(pending.order.id);
    }

    /// Abandons an order, unless a worker has claimed it or a log may have it. True: it was abandoned.
    pub fn abandon(&self, pending: &Arc<PendingOrder>) -> bool {
        if !pending.slot.abandon() {
            return false;
        }
        self.release(&pending.order);
        self.buyers.forget(&pending.order.user_id, pending.order.id);
        self.pending.remove(pending.order.id);
        true
    }

    /// Ends an order whose row was payable, or is gone: its units are free, once.
    pub fn end_unpaid(&self, units: &OrderUnits, how: Ended, row: Row) {
        let turned = self.deactivate(units, how);
        if turned.unwrap_or(row == Row::Moved) {
            self.with_counter(units.sku, |counter| counter.release(units.quantity));
        }
    }

    /// Ends orders that held no units, because they waited for them.
    pub fn end_waiting<'a>(&self, orders: impl IntoIterator<Item = &'a OrderUnits>, how: Ended) {
        for units in orders {
            self.recent_orders.forget(units.order_id);
            self.deactivate(units, how);
            self.with_sku(units.sku, |sku| sku.leave_waitlist(units.order_id));
        }
    }

    /// Records that waiting orders of one SKU were assigned the units that were taken for them, payable until
    /// `expires_at`.
    pub fn assigned(&self, sku: &Sku, orders: &[OrderId], expires_at: UnixMillis) {
        self.expiry_index
            .note(orders.iter().map(|id| (*id, expires_at)));
        sku.waitlist().remove(sku.counter(), orders.iter().copied());
    }

    /// After a failover: the row of an order waits, whose assignment is lost. It has its place again, and the units
    /// that it held are kept for the list.
    pub fn waits_again(&self, units: &OrderUnits) {
        self.recent_orders.forget(units.order_id);
        self.with_sku(units.sku, |sku| {
            let is_new = sku
                .waitlist()
                .restore(sku.counter(), units.order_id, units.quantity);
            if is_new {
                sku.counter().release(units.quantity);
            }
        });
    }

    /// A lower bound of the ids of orders that wait.
    pub fn first_waiting(&self) -> Option<OrderId> {
        let waiting = self.catalogue.waiting();
        waiting
            .iter()
            .filter_map(|sku| sku.waitlist().first())
            .map(|first| OrderId::floor_of(first.millis()))
            .min()
    }

    /// Records a matched payment: held units become sold.
    pub fn paid(&self, units: &OrderUnits) {
        self.with_counter(units.sku, |counter| counter.sell(units.quantity));
    }

    /// Records a refund whose units are on sale again.
    pub fn restocked(&self, units: &OrderUnits) {
        self.deactivate(units, Ended::Cancelled);
        self.with_counter(units.sku, |counter| counter.unsell(units.quantity));
    }

    /// Records a refund whose units do not return to the sale.
    pub fn withdrawn(&self, units: &OrderUnits) {
        self.deactivate(units, Ended::Cancelled);
        self.with_counter(units.sku, |counter| counter.withdraw(units.quantity));
    }

    /// Records a refund of a node's order, before which `swept` sold units have left the node's share.
    pub fn refunded_to_pool(&self, units: &OrderUnits, swept: u32) {
        self.deactivate(units, Ended::Cancelled);
        self.with_counter(units.sku, |counter| counter.withdraw(swept));
    }

    /// Records an order recovered for a refund. `held`: its units were held in memory until now.
    pub fn recovered_for_refund(&self, units: &OrderUnits, held: bool) {
        if held {
            self.end_unpaid(units, Ended::Cancelled, Row::Found);
        } else {
            self.deactivate(units, Ended::Cancelled);
        }
    }

    /// Removes an order that exists nowhere any more: its units and its key are free.
    pub fn lost(&self, units: &OrderUnits) {
        let sku = self.catalogue.by_number(units.sku);
        if sku.is_some_and(|sku| sku.waitlist().has(units.order_id)) {
            self.end_waiting([units], Ended::Cancelled);
        } else {
            self.end_unpaid(units, Ended::Cancelled, Row::Found);
        }
        self.buyers.forget(&units.user_id, units.order_id);
    }

    /// Forgets everything of lanes that another node owns now. Walks all buyers. Ranges of the expiry index stay: whoever
    /// looks at the rows of a range passes over those of other nodes.
    pub fn forget_lanes(&self, lanes: LaneSet) {
        self.buyers.forget_lanes(lanes);
        self.recent_orders.forget_lanes(lanes);
        // Every order that waits has an id that names its lane: lists are younger than lanes.
        let leaves = |id: &OrderId| lanes.has(id.lane_bits());
        for sku in self.catalogue.waiting() {
            let mut waiting = sku.waitlist().joined_before(OrderId::MAX, usize::MAX);
            waiting.retain(leaves);
            sku.waitlist().give_away(sku.counter(), waiting);
        }
    }

    /// `None`: the buyer's record does not have the order.
    fn deactivate(&self, units: &OrderUnits, how: Ended) -> Option<bool> {
        self.buyers.deactivate(&units.user_id, units.order_id, how)
    }

    /// A SKU that memory does not know has no units here.
    fn with_counter(&self, sku: SkuNumber, moved: impl FnOnce(&StockCounter)) {
        self.with_sku(sku, |sku| moved(sku.counter()));
    }

    fn with_sku(&self, sku: SkuNumber, change: impl FnOnce(&Sku)) {
        if let Some(sku) = self.catalogue.by_number(sku) {
            change(&sku);
        }
    }

    /// Releases the units of an order in flight, or its place on the waiting list. Its SKU must be in the catalogue.
    fn release(&self, order: &Order) {
        let sku = self.catalogue.by_number(order.sku);
        assert!(
            sku.is_some(),
            "order {} is of a SKU that has left the catalogue",
            order.id
        );
        match sku {
            Some(sku) if order.waits() => sku.leave_waitlist(order.id),
            Some(sku) => sku.counter().release(order.quantity.get()),
            None => {}
        }
    }
}
