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
//! [`State`] is all of it. [`effects`] has its methods: what memory owes for each way in which an order
//! can end.
//!
//! Nothing here knows tokio, `may`, HTTP or SQL. What is full refuses and gives back; what was
//! taken is given back by dropping its guard.

pub mod buyers;
pub mod effects;
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

use self::buyers::Buyers;
use self::expiry_index::ExpiryIndex;
use self::orphans::Orphans;
use self::pending::Pending;
use self::poison::Poison;
use self::progress::Progress;
use self::recent_orders::RecentOrders;
use self::sticky_refusals::StickyRefusals;
use self::stock::Catalogue;
use self::throughput::ThroughputEstimator;
use crate::order::IdClock;

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
