//! The in-memory state, shared by all modules above it.
//!
//! * [`stock`]: the catalogue of SKUs, with counters that cannot oversell.
//! * [`buyers`]: one record per buyer: keys, recent orders, units counted toward purchase limits.
//! * [`pending`]: the slots of orders in flight, by id; waiting requests and workers meet here.
//! * [`recent_orders`]: orders written a moment ago, for repeated requests.
//! * [`sticky_refusals`]: refusals under their keys; bounded, and lost at a restart.
//! * [`orphans`]: orders for which a verified payment waits.
//! * [`expiry_index`]: when unpaid orders expire.
//! * [`lanes`]: with several nodes, which lanes of buyers are open here.
//! * [`throughput`]: the recent rate of database writes.
//! * [`progress`]: whether orders are written while orders wait.
//! * [`row_changes`]: changes of rows that memory has yet to follow.
//! * [`poison`]: the fail-stop flag.
//!
//! [`State`] is all of it. [`effects`] has its methods: the effects in memory of every outcome of
//! an order.
//!
//! Nothing here knows tokio, `may`, HTTP or SQL. A full structure refuses an item and returns it.
//! Dropping a guard undoes its step.

pub mod buyers;
pub mod effects;
pub mod expiry_index;
pub mod lanes;
pub mod orphans;
pub mod pending;
pub mod poison;
pub mod progress;
pub mod recent_orders;
pub mod row_changes;
mod set_associative;
pub mod sticky_refusals;
pub mod stock;
pub mod throughput;

use std::sync::Arc;

use self::buyers::Buyers;
use self::expiry_index::ExpiryIndex;
use self::lanes::NodeLanes;
use self::orphans::Orphans;
use self::pending::Pending;
use self::poison::Poison;
use self::progress::Progress;
use self::recent_orders::RecentOrders;
use self::row_changes::RowChanges;
use self::sticky_refusals::StickyRefusals;
use self::stock::Catalogue;
use self::throughput::ThroughputEstimator;
use crate::order::IdClock;

/// The in-memory state of the pipeline.
#[derive(Debug)]
pub struct State {
    /// The SKUs, with terms and counters.
    pub catalogue: Catalogue,
    /// One record per buyer.
    pub buyers: Buyers,
    /// Refusals under their keys.
    pub sticky_refusals: StickyRefusals,
    /// Orders in flight.
    pub pending: Arc<Pending>,
    /// Orders written a moment ago.
    pub recent_orders: RecentOrders,
    /// When unpaid orders expire.
    pub expiry_index: ExpiryIndex,
    /// Orders for which a payment waits.
    pub orphans: Orphans,
    /// The lanes of buyers, if several nodes serve the sale; a process on its own has all of them.
    pub lanes: Option<NodeLanes>,
    /// Changes of rows that memory has yet to follow.
    pub row_changes: RowChanges,
    /// The fail-stop flag.
    pub poison: Arc<Poison>,
    /// Source of order ids.
    pub ids: IdClock,
    /// Recent rate of database writes.
    pub throughput: ThroughputEstimator,
    /// Whether orders are written while orders wait.
    pub progress: Progress,
}
