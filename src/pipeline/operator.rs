//! What an operator may do to a running sale, in the order that keeps every promise: what makes
//! more units available goes to the database first and then to memory, what takes some away goes
//! to memory first.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::ledger::Ledger;
use crate::order::SkuId;
use crate::state::stock::{BelowCommitted, SaleTerms, Sku};
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease};

/// Why an operator's request was not carried out. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// No such SKU.
    #[error("there is no SKU {0}")]
    UnknownSku(SkuId),
    /// The new total is less than what orders have taken.
    #[error("total: {committed} units are held or sold already; the total cannot be less")]
    TotalBelowCommitted {
        /// Units that orders hold or have bought.
        committed: u32,
    },
    /// The database did not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Carries out operators' requests, one at a time.
#[derive(Debug)]
pub struct Operator {
    ledger: Arc<Ledger>,
    database: Database,
    lease: NodeLease,
    one_at_a_time: Mutex<()>,
}

impl Operator {
    /// An operator's hands on this state and this database.
    pub fn new(ledger: Arc<Ledger>, database: Database, lease: NodeLease) -> Self {
        Operator {
            ledger,
            database,
            lease,
            one_at_a_time: Mutex::new(()),
        }
    }

    /// Creates a SKU or replaces its terms and total. Buyers notice no pause.
    ///
    /// # Errors
    /// [`OperatorError::TotalBelowCommitted`], or what the database says.
    pub async fn put_sku(
        &self,
        id: &SkuId,
        terms: SaleTerms,
        total: u32,
    ) -> Result<Arc<Sku>, OperatorError> {
        let _turn = self.one_at_a_time.lock().await;
        let Some(sku) = self.ledger.catalogue.get(id) else {
            let made = self.database.put_sku(self.lease, id, &terms, total).await?;
            self.ledger.catalogue.add([made]);
            return self.known(id);
        };
        let before = sku.counter().snapshot().total;
        if total < before {
            // From here on no buyer can take what is about to go away.
            set_total(&sku, total)?;
        }
        if let Err(error) = self.database.put_sku(self.lease, id, &terms, total).await {
            if total < before && sku.counter().set_total(before).is_err() {
                self.ledger
                    .poison
                    .set("a total could not be raised back to its old value");
            }
            return Err(error.into());
        }
        if total > before {
            set_total(&sku, total)?;
        }
        sku.set_terms(terms);
        Ok(sku)
    }

    /// Pauses or resumes one sale, over restarts.
    ///
    /// # Errors
    /// [`OperatorError::UnknownSku`], or what the database says.
    pub async fn set_paused(&self, id: &SkuId, paused: bool) -> Result<Arc<Sku>, OperatorError> {
        let _turn = self.one_at_a_time.lock().await;
        let sku = self.known(id)?;
        if paused {
            sku.set_paused(true);
        }
        self.database.set_sku_paused(id, paused).await?;
        sku.set_paused(paused);
        tracing::info!(sku_id = %id, paused, "an operator has paused or resumed a sale");
        Ok(sku)
    }

    /// Pauses or resumes every sale, over restarts.
    ///
    /// # Errors
    /// What the database says. A pause is in force in memory all the same.
    pub async fn set_all_paused(&self, paused: bool) -> Result<(), OperatorError> {
        let _turn = self.one_at_a_time.lock().await;
        if paused {
            self.ledger.catalogue.set_paused(true);
        }
        self.database.set_all_paused(self.lease, paused).await?;
        self.ledger.catalogue.set_paused(paused);
        tracing::info!(paused, "an operator has paused or resumed every sale");
        Ok(())
    }

    fn known(&self, id: &SkuId) -> Result<Arc<Sku>, OperatorError> {
        self.ledger
            .catalogue
            .get(id)
            .ok_or_else(|| OperatorError::UnknownSku(id.clone()))
    }
}

/// Sets the total in memory, where orders have not taken more.
fn set_total(sku: &Sku, total: u32) -> Result<(), OperatorError> {
    sku.counter()
        .set_total(total)
        .map_err(|BelowCommitted { committed }| OperatorError::TotalBelowCommitted { committed })
}
