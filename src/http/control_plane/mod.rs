//! The control plane, for operators and machines: health, metrics, administration, audit.
//!
//! The control plane answers from the first moment on. Before recovery is done it serves health, metrics and
//! profiles (to look into a start that takes long); everything else is `503 not_ready`.
//!
//! The [`router`] has the table of routes. Each handler takes the [`ControlPlane`] as its state.

mod access;
mod audit;
mod dashboard;
mod dead_letters;
mod document;
mod events;
mod extract;
mod failure;
mod health;
mod live;
mod nodes;
mod orders;
mod payments;
mod preflight;
mod profile;
pub mod router;
mod sessions;
mod skus;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::http::problem::Problem;
use crate::http::tokens::Tokens;
use crate::metrics::Metrics;
use crate::order::receipt::ReceiptKeys;
use crate::pipeline::admin::audit::Auditor;
use crate::pipeline::admin::operator::Operator;
use crate::pipeline::admin::preflight::Preflighter;
use crate::pipeline::cluster::member::Member;
use crate::pipeline::events::status::Sinks;
use crate::pipeline::failover::health::Health;
use crate::pipeline::failover::lease::AcknowledgeLease;
use crate::pipeline::orders::intake::Intake;
use crate::pipeline::orders::lookup::OrderLookup;
use crate::pipeline::payments::processor::PaymentsHandle;
use crate::pipeline::payments::reconciler::OrphanChecks;
use crate::queue::OrderQueue;
use crate::store::postgres::Database;
use failure::Failure;
use sessions::Sessions;
#[cfg(feature = "fuzz")]
pub use sessions::cookies;

/// Refreshes the gauges that other modules count, before metrics are rendered.
pub type Refresh = Arc<dyn Fn(&Metrics) + Send + Sync>;

/// The control plane. Cheap to clone.
#[derive(Clone)]
pub struct ControlPlane {
    shared: Arc<Shared>,
}

struct Shared {
    metrics: Metrics,
    tokens: Tokens,
    sessions: Sessions,
    progress: ArcSwap<String>,
    parts: OnceLock<Parts>,
}

/// The parts that it administers, set once recovery is done.
pub struct Parts {
    /// The in-memory state.
    pub state: Arc<crate::state::State>,
    /// Admits orders; for its gate.
    pub intake: Arc<Intake>,
    /// The queue, for its depth.
    pub queue: Arc<dyn OrderQueue>,
    /// Finds orders wherever they are.
    pub lookup: OrderLookup,
    /// Whether the database has the index by user, so that a whole history can be listed.
    pub user_index: bool,
    /// The membership of a node of a cluster.
    pub member: Option<Arc<Member>>,
    /// The right to acknowledge orders before they are rows.
    pub acknowledge: Arc<AcknowledgeLease>,
    /// The last check of the database.
    pub health: Arc<Health>,
    /// The sinks of events.
    pub sinks: Sinks,
    /// The warning about settings in force, if there is one, for `readyz`.
    pub settings: Option<(&'static str, String)>,
    /// Longest wait of an order, and so the longest time without a write while an order waits.
    pub order_timeout: Duration,
    /// The database.
    pub database: Database,
    /// Handle to the payment processor.
    pub payments: PaymentsHandle,
    /// Schedule of the checks for an orphan's order.
    pub orphan_checks: OrphanChecks,
    /// Signs and reads receipts.
    pub receipts: Arc<ReceiptKeys>,
    /// Recomputes the counters from the rows.
    pub auditor: Auditor,
    /// Tells whether database and order log will hold a sale.
    pub preflighter: Preflighter,
    /// Carries out an operator's changes.
    pub operator: Operator,
    /// Brings gauges up to date.
    pub refresh: Refresh,
}

impl ControlPlane {
    /// A control plane that answers health and metrics.
    pub fn new(metrics: Metrics, tokens: Tokens) -> Self {
        let shared = Shared {
            metrics,
            tokens,
            sessions: Sessions::default(),
            progress: ArcSwap::from_pointee("starting".to_owned()),
            parts: OnceLock::new(),
        };
        ControlPlane {
            shared: Arc::new(shared),
        }
    }

    /// Sets the progress of recovery, for `readyz`.
    pub fn progress(&self, text: String) {
        self.shared.progress.store(Arc::new(text));
    }

    /// Sets the parts that it administers, once.
    pub fn recovered(&self, parts: Parts) {
        let _ = self.shared.parts.set(parts);
    }

    /// The metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    fn parts(&self) -> Result<&Parts, Failure> {
        self.shared.parts.get().ok_or_else(|| {
            Failure(Problem::new(503, "not_ready", "still recovering; see /readyz").retry_after(1))
        })
    }
}
