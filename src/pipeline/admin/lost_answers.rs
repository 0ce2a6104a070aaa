//! Resolves an operator's changes that are in doubt because the database's answer was lost. This runs in the
//! background, so that memory and rows agree again without a restart or another request.
//!
//! Each change that memory mirrors is a transaction that takes its lock before it writes. After a COMMIT
//! without an answer, a reader that gets the same lock sees the outcome. A stored change is applied to memory,
//! a change that was not stored is undone there. Pauses resolve themselves ([`super::pauses`]).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use super::changes::{Retried, check_number};
use super::limits;
use crate::order::SkuId;
use crate::state::State;
use crate::state::row_changes::RowChange;
use crate::state::stock::SaleTerms;
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease, dead_letters, skus};

/// Pause after a lost answer, and after a failed attempt to resolve it.
const PAUSE: Duration = Duration::from_millis(500);

/// A change whose answer was lost.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LostAnswer {
    /// Terms and total of a SKU, or the SKU as a whole.
    Sku(SkuId),
    /// The retry of a dead letter.
    DeadLetter(i64),
}

/// Resolves changes in doubt.
#[derive(Clone, Debug)]
pub(super) struct LostAnswers {
    state: Arc<State>,
    database: Database,
    lease: NodeLease,
    /// Held while terms are changed; taken before `turn`.
    changing_terms: Arc<Mutex<()>>,
    /// Held while an operator's request is carried out, and while an outcome is resolved.
    turn: Arc<Mutex<HashMap<i64, Retried>>>,
    open: Arc<parking_lot::Mutex<Open>>,
}

/// Changes in doubt, at most one for each SKU and dead letter.
#[derive(Debug, Default)]
struct Open {
    lost: BTreeMap<LostAnswer, RowChange>,
    /// Whether the task is running.
    running: bool,
}

impl LostAnswers {
    pub(super) fn new(
        state: Arc<State>,
        database: Database,
        lease: NodeLease,
        changing_terms: Arc<Mutex<()>>,
        turn: Arc<Mutex<HashMap<i64, Retried>>>,
    ) -> Self {
        LostAnswers {
            state,
            database,
            lease,
            changing_terms,
            turn,
            open: Arc::default(),
        }
    }

    /// Has the outcome resolved if `result` leaves it in doubt. The caller must hold the turn.
    pub(super) fn note<T>(&self, result: &Result<T, StoreError>, lost: LostAnswer) {
        let Err(error) = result else { return };
        if !error.is_transient() {
            return;
        }
        tracing::warn!(
            change = ?lost, reason = %error,
            "the database's answer to an operator's change was lost; asking in the background whether it was stored"
        );
        let mut open = self.open.lock();
        let changes = &self.state.row_changes;
        open.lost.entry(lost).or_insert_with(|| changes.begin());
        if !open.running {
            open.running = true;
            tokio::spawn(self.clone().look());
        }
    }

    /// Runs until nothing is in doubt any more.
    async fn look(self) {
        loop {
            tokio::time::sleep(PAUSE).await;
            let all: Vec<LostAnswer> = self.open.lock().lost.keys().cloned().collect();
            for lost in all {
                match self.resolve(&lost).await {
                    Ok(()) => tracing::info!(
                        change = ?lost,
                        "the outcome of an operator's change is known; memory and database agree"
                    ),
                    Err(error) if error.is_transient() => {
                        tracing::debug!(change = ?lost, reason = %error, "the outcome of an operator's change is not known yet; retrying");
                    }
                    Err(error) => {
                        self.open.lock().lost.remove(&lost);
                        tracing::error!(
                            change = ?lost, reason = %error,
                            "the outcome of an operator's change cannot be determined; run the audit"
                        );
                    }
                }
            }
            let mut open = self.open.lock();
            if open.lost.is_empty() {
                open.running = false;
                return;
            }
        }
    }

    async fn resolve(&self, lost: &LostAnswer) -> Result<(), StoreError> {
        let (mut _changing, mut _counting) = (None, None);
        if let LostAnswer::Sku(id) = lost {
            _changing = Some(self.changing_terms.lock().await);
            if let Some(row) = skus::find_committed(&self.database, self.lease, id).await? {
                // A stored limit takes effect as one whose answer arrived.
                let terms = SaleTerms::clone(&row.terms());
                _counting = limits::count(&self.state, &self.database, id, &terms).await?;
            }
        }
        let mut turn = self.turn.lock().await;
        self.apply_outcome(lost, &mut turn).await?;
        // Removed while the turn is held: a new entry belongs to an answer lost after this look.
        self.open.lock().lost.remove(lost);
        Ok(())
    }

    async fn apply_outcome(
        &self,
        lost: &LostAnswer,
        retries: &mut HashMap<i64, Retried>,
    ) -> Result<(), StoreError> {
        let catalogue = &self.state.catalogue;
        match lost {
            LostAnswer::Sku(id) => {
                match (
                    catalogue.get(id),
                    skus::find_committed(&self.database, self.lease, id).await?,
                ) {
                    (None, Some(row)) => {
                        check_number(&self.state, &row)?;
                        catalogue.add([row]);
                    }
                    (Some(sku), Some(row)) => {
                        sku.adopt_terms(&row);
                        let total = row.counter().snapshot().total;
                        if sku.shared().is_none()
                            && let Err(error) = sku.counter().set_total(total)
                        {
                            tracing::error!(sku_id = %id, reason = %error, "the total in the database could not be put in force; set it again");
                        }
                    }
                    // It was not stored.
                    (_, None) => {}
                }
            }
            LostAnswer::DeadLetter(id) => {
                let is_open = dead_letters::is_committed(&self.database, *id).await?;
                match retries.remove(id) {
                    Some(retried) if !is_open => retried.revived(&self.state),
                    // Dropping the hold releases its units: the order stays a dead letter.
                    Some(_) | None => {}
                }
            }
        }
        Ok(())
    }
}
