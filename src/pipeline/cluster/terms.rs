//! Terms of SKUs, totals and pauses reach every node: each looks for changes that operators have made at any node, and
//! says which one it has taken over last.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::hints::Hints;
use super::moved_units;
use crate::metrics::Metrics;
use crate::order::LaneSet;
use crate::pipeline::admin::changes::check_number;
use crate::pipeline::admin::limits;
use crate::pipeline::admin::pauses::Pauses;
use crate::state::State;
use crate::state::stock::SaleTerms;
use crate::store::cluster::lanes::{self, LaneRow};
use crate::store::cluster::terms::{self, Changes};
use crate::store::postgres::{Database, NodeLease, parked, skus};
use crate::store::{Ledger, StoreError};

/// Interval between two looks, if no other node tells of a change. An operator waits for the other nodes for a second.
const LOOK: Duration = Duration::from_millis(500);
/// Pause after a failure.
const PAUSE: Duration = Duration::from_millis(200);
/// Time that an operator waits for the other nodes.
const REACH: Duration = Duration::from_secs(1);
/// Interval at which it is asked whether they have a change.
const ASK: Duration = Duration::from_millis(50);

/// Takes over what operators change at other nodes.
pub struct Terms {
    /// The state in memory.
    pub state: Arc<State>,
    /// The database.
    pub database: Database,
    /// The lease of this node.
    pub lease: NodeLease,
    /// Pauses that this node stores itself.
    pub pauses: Arc<Pauses>,
    /// Held while units that have moved in the rows are on their way into memory.
    pub moving: Arc<Mutex<()>>,
    /// Hints from other nodes.
    pub hints: Arc<Hints>,
    /// The metrics.
    pub metrics: Metrics,
}

impl Terms {
    /// Runs until the future is dropped or another process takes over.
    pub async fn run(self) {
        let mut seen = None;
        loop {
            match self.look(seen).await {
                Ok(changes) => {
                    seen = changes.or(seen);
                    // Whoever told of a change meanwhile has it seen at the next look.
                    let _ = tokio::time::timeout(LOOK, self.hints.terms()).await;
                }
                Err(error @ StoreError::Fenced { .. }) => {
                    self.state.poison.set(error.to_string());
                    return;
                }
                Err(error) => {
                    tracing::warn!(reason = %error, "changes of operators at other nodes are not taken over for now; retrying");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Takes over what has changed since `seen`, and returns what is in force now. `None`: a SKU is missing.
    async fn look(&self, seen: Option<Changes>) -> Result<Option<Changes>, StoreError> {
        let changes = terms::last(&self.database).await?;
        if seen == Some(changes) {
            return Ok(seen);
        }
        let mut has_new = false;
        self.pauses.adopt_all(changes.is_paused);
        for stored in skus::load_all(&self.database, self.lease).await? {
            check_number(&self.state, &stored)?;
            let Some(sku) = self.state.catalogue.get(&stored.id) else {
                has_new = true;
                continue;
            };
            let terms = SaleTerms::clone(&stored.terms());
            if !sku.terms().differing(&terms).is_empty() {
                // A limit is in force once the live orders of this node's buyers are known.
                let _counting = limits::count(&self.state, &self.database, &sku.id, &terms).await?;
                sku.adopt_terms(&stored);
            }
            self.pauses.adopt(&sku, stored.is_paused());
        }
        if has_new && !self.add_new().await? {
            return Ok(None);
        }
        terms::note_seen(&self.database, self.lease, changes.number).await?;
        Ok(Some(changes))
    }

    /// Adds SKUs with this node's shares of them. Returns false, with none added, if a lane of this node is not open: its units
    /// are in the shares, and come into memory once its orders are loaded.
    async fn add_new(&self) -> Result<bool, StoreError> {
        let _moving = self.moving.lock().await;
        let mut new = skus::load_all(&self.database, self.lease).await?;
        new.retain(|stored| self.state.catalogue.get(&stored.id).is_none());
        let mut parked = BTreeMap::new();
        if let Some(of) = &self.state.lanes {
            let open = of.lanes.open_here();
            // After the shares: a lane that has come in between is not open.
            let rows = lanes::all(&self.database).await?;
            let is_ours =
                |row: &&LaneRow| row.node == Some(self.lease.node) && row.blocked_by.is_none();
            let ours: LaneSet = rows.iter().filter(is_ours).map(|row| row.lane).collect();
            if ours.iter().any(|lane| !open.has(lane)) {
                return Ok(false);
            }
            parked = parked::by_sku(&self.database, ours).await?;
        }
        moved_units::add(&self.state, &self.metrics, new, &parked);
        Ok(true)
    }
}

/// Tells the other nodes, and waits until each has taken over what was committed before, for a second. Returns those that
/// have not.
///
/// # Errors
/// If the database does not answer.
pub async fn unreached(
    database: &Database,
    lease: NodeLease,
    hints: &Hints,
) -> Result<Vec<i16>, StoreError> {
    if lease.ledger == Ledger::Sku {
        return Ok(Vec::new());
    }
    hints.tell_terms();
    let (changes, asked) = (terms::last(database).await?, Instant::now());
    loop {
        let left = terms::unreached(database, lease, changes.number).await?;
        if left.is_empty() || asked.elapsed() >= REACH {
            return Ok(left);
        }
        tokio::time::sleep(ASK).await;
    }
}
