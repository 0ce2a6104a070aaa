//! The in-memory state, shared by everything above it.
//!
//! * [`stock`]: the catalogue of SKUs and, for each, the word that cannot oversell.
//! * [`buyers`]: one record a buyer: keys, recent orders, units toward purchase limits.
//! * [`pending`]: the slots of orders in flight, by id; the meeting place of a buyer that waits
//!   and the worker that writes.
//! * [`recent_orders`]: orders written a moment ago, to answer those who ask again.
//! * [`sticky_refusals`]: what buyers were told no to, under their keys; bounded, until a restart.
//! * [`orphans`]: orders that a verified payment waits for.
//! * [`expiry_index`]: when unpaid orders fall due.
//! * [`throughput`]: how fast the database takes orders of late.
//! * [`progress`]: whether orders are written while orders wait.
//! * [`poison`]: the fail-stop flag.
//!
//! [`State`] is all of it, and every way in which an order in flight can end, with what memory owes for each:
//!
//! | ends as | units | the buyer's record | the slot |
//! |---|---|---|---|
//! | persisted | stay held | stays | leaves the map |
//! | failed (dead letter) | back | stays, no longer live | leaves the map |
//! | abandoned, unwritten | back | forgotten: the key may be used afresh | leaves the map |
//! | expired (written too late to be paid) | back | stays, no longer live | leaves the map |
//! | left (to the next process, in the journal) | stay held | stays | stays in the map |
//! | parked (in the database, until its SKU's counters are taken) | stay held | stays | leaves the map |
//!
//! Nothing here knows tokio, `may`, HTTP or SQL. What is full refuses and gives back; what was
//! taken is given back by dropping its guard.

pub mod buyers;
pub mod expiry_index;
pub mod orphans;
pub mod pending;
pub mod poison;
pub mod progress;
pub mod recent_orders;
mod set_associative;
pub mod sticky_refusals;
pub mod stock;
pub mod throughput;

use std::sync::Arc;
use std::time::Instant;

use self::buyers::Buyers;
use self::expiry_index::ExpiryIndex;
use self::orphans::Orphans;
use self::pending::{Pending, PendingOrder, Settled};
use self::poison::Poison;
use self::progress::Progress;
use self::recent_orders::RecentOrders;
use self::sticky_refusals::StickyRefusals;
use self::stock::Catalogue;
use self::throughput::ThroughputEstimator;
use crate::faults::bug;
use crate::order::{Ended, IdClock, Order, SkuNumber, UnixMillis};

/// The in-memory state of the pipeline.
#[derive(Debug)]
pub struct State {
    /// What is on sale.
    pub catalogue: Catalogue,
    /// What is remembered of each buyer.
    pub buyers: Buyers,
    /// What buyers were told no to, under their keys.
    pub sticky_refusals: StickyRefusals,
    /// Orders in flight.
    pub pending: Arc<Pending>,
    /// Orders written a moment ago.
    pub recent_orders: RecentOrders,
    /// When unpaid orders fall due.
    pub expiry_index: ExpiryIndex,
    /// Orders that a payment waits for.
    pub orphans: Orphans,
    /// The fail-stop flag.
    pub poison: Arc<Poison>,
    /// Where order ids come from.
    pub ids: IdClock,
    /// How fast the database takes orders.
    pub throughput: ThroughputEstimator,
    /// Whether it takes any.
    pub progress: Progress,
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
