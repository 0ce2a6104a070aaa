//! An operator's changes that the database may or may not have committed, because its answer was lost:
//! found out in the background, so that memory and rows agree again without a restart or another
//! request.
//!
//! Each change that memory mirrors is a transaction that takes its lock before it writes. So where a
//! COMMIT was sent and not answered, whoever has got the same lock afterwards reads what came of it.
//! Nothing is decided twice: what was stored is taken over, what was not is given back. Pauses see to
//! themselves ([`super::pauses`]).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use super::changes::{Retried, check_number};
use super::limits;
use crate::order::SkuId;
use crate::state::State;
use crate::state::stock::SaleTerms;
use crate::store::StoreError;
use crate::store::postgres::Database;

/// How long after a lost answer, and after a look in vain, the database is asked.
const PAUSE: Duration = Duration::from_millis(500);

/// The change whose answer was lost.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LostAnswer {
    /// Terms and total of a SKU, or the SKU as a whole.
    Sku(SkuId),
    /// A dead letter that was retried.
    DeadLetter(i64),
}

/// Finds out what came of them.
#[derive(Clone, Debug)]
pub(super) struct LostAnswers {
    state: Arc<State>,
    database: Database,
    /// Held by whoever changes terms, before the turn.
    changing_terms: Arc<Mutex<()>>,
    /// Held by whoever carries out an operator's request, and while an outcome is found out.
    turn: Arc<Mutex<HashMap<i64, Retried>>>,
    open: Arc<parking_lot::Mutex<Open>>,
}

/// At most one for each SKU and dead letter.
#[derive(Debug, Default)]
struct Open {
    lost: BTreeSet<LostAnswer>,
    /// A task is looking.
    running: bool,
}

impl LostAnswers {
    pub(super) fn new(
        state: Arc<State>,
        database: Database,
        changing_terms: Arc<Mutex<()>>,
        turn: Arc<Mutex<HashMap<i64, Retried>>>,
    ) -> Self {
        LostAnswers {
            state,
            database,
            changing_terms,
            turn,
            open: Arc::default(),
        }
    }

    /// Sees to it that the outcome becomes known, where `result` leaves it open. Called by the holder of
    /// the turn.
    pub(super) fn note<T>(&self, result: &Result<T, StoreError>, lost: LostAnswer) {
        let Err(error) = result else { return };
        if !error.is_transient() {
            return;
        }
        tracing::warn!(
            change = ?lost, reason = %error,
            "whether an operator's change was stored is not known; it is found out in the background"
        );
        let mut open = self.open.lock();
        open.lost.insert(lost);
        if !open.running {
            open.running = true;
            tokio::spawn(self.clone().look());
        }
    }

    /// Looks until nothing is open any more.
    async fn look(self) {
        loop {
            tokio::time::sleep(PAUSE).await;
            let all: Vec<LostAnswer> = self.open.lock().lost.iter().cloned().collect();
            for lost in all {
                match self.settle(&lost).await {
                    Ok(()) => tracing::info!(
                        change = ?lost,
                        "what came of an operator's change is known; memory and database agree"
                    ),
                    Err(error) if error.is_transient() => {
                        tracing::debug!(change = ?lost, reason = %error, "looking again");
                    }
                    Err(error) => {
                        self.open.lock().lost.remove(&lost);
                        tracing::error!(
                            change = ?lost, reason = %error,
                            "what came of an operator's change cannot be found out"
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

    async fn settle(&self, lost: &LostAnswer) -> Result<(), StoreError> {
        let (mut _changing, mut _counting) = (None, None);
        if let LostAnswer::Sku(id) = lost {
            _changing = Some(self.changing_terms.lock().await);
            if let Some(row) = self.database.settled_sku(id).await? {
                // A limit that was stored comes in force as one that was answered does.
                let terms = SaleTerms::clone(&row.terms());
                _counting = limits::count(&self.state, &self.database, id, &terms).await?;
            }
        }
        let mut turn = self.turn.lock().await;
        self.find_out(lost, &mut turn).await?;
        // With the turn: whatever is noted anew was lost after this look.
        self.open.lock().lost.remove(lost);
        Ok(())
    }

    async fn find_out(
        &self,
        lost: &LostAnswer,
        retries: &mut HashMap<i64, Retried>,
    ) -> Result<(), StoreError> {
        let catalogue = &self.state.catalogue;
        match lost {
            LostAnswer::Sku(id) => {
                match (catalogue.get(id), self.database.settled_sku(id).await?) {
                    (None, Some(row)) => {
                        check_number(&self.state, &row)?;
                        catalogue.add([row]);
                    }
                    (Some(sku), Some(row)) => {
                        sku.set_terms(SaleTerms::clone(&row.terms()));
                        let total = row.counter().snapshot().total;
                        if let Err(error) = sku.counter().set_total(total) {
                            tracing::error!(sku_id = %id, reason = %error, "the total in the database is not that in force");
                        }
                    }
                    // It was not stored.
                    (_, None) => {}
                }
            }
            LostAnswer::DeadLetter(id) => {
                let is_open = self.database.settled_dead_letter_is_open(*id).await?;
                match retries.remove(id) {
                    Some(retried) if !is_open => retried.revived(&self.state),
                    // Its units come back: the order is as dead as it was.
                    Some(_) | None => {}
                }
            }
        }
        Ok(())
    }
}
