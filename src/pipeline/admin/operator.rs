//! What an operator may do to a running sale, in the order that keeps every promise: what makes
//! more units available goes to the database first and then to memory, what takes some away goes
//! to memory first.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::Mutex;

use super::changes::{Retried, check_number};
use super::limits;
use super::lost_answers::{LostAnswer, LostAnswers};
use super::pauses::Pauses;
use crate::order::{OrderId, Quantity, Refusal, SkuId};
use crate::pipeline::orders::parking::ParkingHandle;
use crate::pipeline::payments::processor::PaymentsHandle;
use crate::state::State;
use crate::state::buyers::LiveOrder;
use crate::state::stock::{BelowCommitted, SaleTerms, Sku};
use crate::store::StoreError;
use crate::store::postgres::dead_letters::DeadLetter;
use crate::store::postgres::{Database, NodeLease};
use crate::store::settlement::refunds::{Recorded, RefundNote};

/// Why an operator's request was not carried out. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// No such SKU.
    #[error("there is no SKU {0}")]
    UnknownSku(SkuId),
    /// No such open dead letter.
    #[error("there is no open dead letter {0}")]
    UnknownDeadLetter(i64),
    /// The new total is less than what orders have taken.
    #[error(transparent)]
    TotalBelowCommitted(#[from] BelowCommitted),
    /// The new total does not fit.
    #[error("total: must be 0 to 4294967295")]
    TotalOutOfRange,
    /// The same key came before with another quantity.
    #[error("Idempotency-Key: this key came before with a quantity of {earlier}")]
    KeyReused {
        /// The earlier quantity.
        earlier: i64,
    },
    /// A dead letter's order cannot be placed for want of units.
    #[error("not enough units are free: {available} available")]
    SoldOut {
        /// Units that are free.
        available: u32,
    },
    /// The database refuses a dead letter's row again.
    #[error("the database refuses the row again: {0}")]
    RefusedAgain(String),
    /// A pause is in force and not stored.
    #[error(
        "it IS paused, from now on, but a restart would not know of it: the database has not stored it yet ({source}); that is tried again until it has"
    )]
    PauseNotStored {
        /// Why.
        source: StoreError,
    },
    /// A resume was not stored.
    #[error("it stays as it was: the database has not stored it ({source}); send it again")]
    ResumeNotStored {
        /// Why.
        source: StoreError,
    },
    /// A sale cannot go on while the database refuses its counters.
    #[error(
        "the database refuses the counters of {sku_id}: {reason}. Tried again just now; {parked} acknowledged orders are parked until its row in `sku` agrees with its orders (see the audit), and then its sale goes on by itself"
    )]
    CountersRefused {
        /// Which SKU.
        sku_id: SkuId,
        /// Acknowledged orders that wait.
        parked: u64,
        /// The database's words.
        reason: String,
    },
    /// The database did not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Carries out operators' requests, one at a time; pauses at once.
#[derive(Debug)]
pub struct Operator {
    state: Arc<State>,
    database: Database,
    lease: NodeLease,
    payments: PaymentsHandle,
    pauses: Arc<Pauses>,
    parking: ParkingHandle,
    payment_ttl_ms: u64,
    /// One change of terms at a time: one that sets a limit may take long, and nothing else waits.
    changing_terms: Arc<Mutex<()>>,
    /// One request at a time; and retries of unknown outcome, by dead letter.
    one_at_a_time: Arc<Mutex<HashMap<i64, Retried>>>,
    lost: LostAnswers,
}

/// What a `PUT` of a SKU did.
#[derive(Debug)]
pub struct Put {
    /// The SKU as it now stands.
    pub sku: Arc<Sku>,
    /// Whether it was created.
    pub is_new: bool,
    /// The terms that differ from before, by their names in JSON; none where it was created.
    pub changed: Vec<&'static str>,
}

impl Operator {
    /// An operator's hands on this state and this database.
    pub fn new(
        state: Arc<State>,
        database: Database,
        lease: NodeLease,
        payments: PaymentsHandle,
        pauses: Arc<Pauses>,
        parking: ParkingHandle,
        payment_ttl_ms: u64,
    ) -> Self {
        let one_at_a_time = Arc::new(Mutex::new(HashMap::new()));
        let changing_terms = Arc::default();
        let lost = LostAnswers::new(
            Arc::clone(&state),
            database.clone(),
            Arc::clone(&changing_terms),
            Arc::clone(&one_at_a_time),
        );
        Operator {
            state,
            database,
            lease,
            payments,
            pauses,
            parking,
            payment_ttl_ms,
            changing_terms,
            one_at_a_time,
            lost,
        }
    }

    /// Creates a SKU or replaces its terms and total. Buyers notice no pause.
    ///
    /// A limit comes in force once the buyers' live orders of the SKU are known. Where memory lacks
    /// some they are read from the database first, about a million rows a second of everything that
    /// was ordered since the SKU was made.
    ///
    /// # Errors
    /// [`OperatorError::TotalBelowCommitted`], or what the database says.
    pub async fn put_sku(
        &self,
        id: &SkuId,
        terms: SaleTerms,
        total: u32,
    ) -> Result<Put, OperatorError> {
        let _changing = self.changing_terms.lock().await;
        // Until the terms are in force.
        let _counting = limits::count(&self.state, &self.database, id, &terms).await?;
        let _turn = self.one_at_a_time.lock().await;
        let Some(sku) = self.state.catalogue.get(id) else {
            let made = self.database.put_sku(self.lease, id, &terms, total).await;
            self.lost.note(&made, LostAnswer::Sku(id.clone()));
            let made = made?;
            check_number(&self.state, &made)?;
            self.state.catalogue.add([made]);
            return Ok(Put {
                sku: self.known(id)?,
                is_new: true,
                changed: Vec::new(),
            });
        };
        let storing = async {
            self.database
                .put_sku(self.lease, id, &terms, total)
                .await
                .and_then(|made| check_number(&self.state, &made))
        };
        let mut changed = sku.terms().differing(&terms);
        if sku.counter().snapshot().total != total {
            changed.push("total");
        }
        self.change_total(&sku, total, storing).await?;
        sku.set_terms(terms);
        Ok(Put {
            sku,
            is_new: false,
            changed,
        })
    }

    /// Changes a SKU's total by `units`, at most once for each `key`. True: an earlier request
    /// under this key did it.
    ///
    /// # Errors
    /// [`OperatorError::TotalBelowCommitted`], [`OperatorError::TotalOutOfRange`],
    /// [`OperatorError::KeyReused`], or what the database says.
    pub async fn restock(
        &self,
        id: &SkuId,
        units: i64,
        key: Option<&str>,
    ) -> Result<(Arc<Sku>, bool), OperatorError> {
        let _turn = self.one_at_a_time.lock().await;
        let sku = self.known(id)?;
        if let Some(key) = key
            && let Some(earlier) = self.database.restocked(id, key).await?
        {
            if earlier != units {
                return Err(OperatorError::KeyReused { earlier });
            }
            // Its answer may have been lost before memory knew of it.
            self.adopt_total(&sku).await?;
            return Ok((sku, true));
        }
        let total = i64::from(sku.counter().snapshot().total).checked_add(units);
        let total = total
            .and_then(|total| u32::try_from(total).ok())
            .ok_or(OperatorError::TotalOutOfRange)?;
        let storing = self.database.restock(self.lease, id, units, key);
        self.change_total(&sku, total, storing).await?;
        tracing::info!(sku_id = %id, units, total, "an operator has restocked");
        Ok((sku, false))
    }

    /// Stores a new total and puts it in force.
    async fn change_total(
        &self,
        sku: &Sku,
        total: u32,
        storing: impl Future<Output = Result<(), StoreError>>,
    ) -> Result<(), OperatorError> {
        if total < sku.counter().snapshot().total {
            // From here on no buyer can take what is about to go away.
            sku.counter().set_total(total)?;
        }
        let stored = storing.await;
        // Whether it was stored may be unknown. The lesser total is safe with either until then.
        let id = SkuId::clone(&sku.id);
        self.lost.note(&stored, LostAnswer::Sku(id));
        if let Err(error) = stored {
            if !error.is_transient() {
                self.adopt_total(sku).await?;
            }
            return Err(error.into());
        }
        Ok(sku.counter().set_total(total)?)
    }

    /// Takes the database's total over into memory.
    async fn adopt_total(&self, sku: &Sku) -> Result<(), OperatorError> {
        match self.database.total_of(&sku.id).await? {
            Some(total) => Ok(sku.counter().set_total(total)?),
            None => Err(OperatorError::UnknownSku(SkuId::clone(&sku.id))),
        }
    }

    /// Pauses one sale, at once, and over restarts.
    ///
    /// # Errors
    /// [`OperatorError::UnknownSku`]; [`OperatorError::PauseNotStored`], and it is in force all the
    /// same.
    pub async fn pause(&self, id: &SkuId) -> Result<Arc<Sku>, OperatorError> {
        let sku = self.known(id)?;
        tracing::info!(sku_id = %id, "an operator pauses a sale");
        let stored = self.pauses.set(&sku, true).await;
        stored.map_err(|source| OperatorError::PauseNotStored { source })?;
        Ok(sku)
    }

    /// Resumes one sale, over restarts. One that is paused because the database refuses its counters
    /// has its parked orders tried at once, and goes on by itself once they are taken.
    ///
    /// # Errors
    /// [`OperatorError::UnknownSku`]; [`OperatorError::CountersRefused`] and
    /// [`OperatorError::ResumeNotStored`], and it stays as it was.
    pub async fn resume(&self, id: &SkuId) -> Result<Arc<Sku>, OperatorError> {
        let sku = self.known(id)?;
        if sku.is_faulted()
            && let Some(refused) = self.parking.retry_now(sku.number).await?
        {
            return Err(OperatorError::CountersRefused {
                sku_id: id.clone(),
                parked: refused.parked,
                reason: refused.reason.to_string(),
            });
        }
        let stored = self.pauses.set(&sku, false).await;
        stored.map_err(|source| OperatorError::ResumeNotStored { source })?;
        tracing::info!(sku_id = %id, "an operator has resumed a sale");
        Ok(sku)
    }

    /// Pauses every sale, at once, and over restarts.
    ///
    /// # Errors
    /// [`OperatorError::PauseNotStored`], and it is in force all the same.
    pub async fn pause_all(&self) -> Result<(), OperatorError> {
        tracing::info!("an operator pauses every sale");
        let stored = self.pauses.set_all(true).await;
        stored.map_err(|source| OperatorError::PauseNotStored { source })
    }

    /// Resumes every sale, over restarts.
    ///
    /// # Errors
    /// [`OperatorError::ResumeNotStored`], and it stays as it was.
    pub async fn resume_all(&self) -> Result<(), OperatorError> {
        let stored = self.pauses.set_all(false).await;
        stored.map_err(|source| OperatorError::ResumeNotStored { source })?;
        tracing::info!("an operator has resumed every sale");
        Ok(())
    }

    /// Writes a dead letter's order after all: holds its units again and stores its row, payable
    /// from now.
    ///
    /// # Errors
    /// [`OperatorError::SoldOut`] and [`OperatorError::RefusedAgain`] leave the dead letter as it
    /// is.
    pub async fn retry_dead_letter(&self, id: i64) -> Result<DeadLetter, OperatorError> {
        let mut turn = self.one_at_a_time.lock().await;
        let letter = match self.open_dead_letter(id).await {
            Ok(letter) => letter,
            Err(error) => {
                // Gone: the earlier retry was carried out, and its row holds the units.
                if matches!(error, OperatorError::UnknownDeadLetter(_)) {
                    turn.remove(&id)
                        .into_iter()
                        .for_each(|retried| retried.revived(&self.state));
                }
                return Err(error);
            }
        };
        let sku = self
            .state
            .catalogue
            .by_number(letter.sku)
            .ok_or(OperatorError::UnknownDeadLetter(id))?;
        let quantity = Quantity::new(letter.quantity).unwrap_or(Quantity::ONE);
        let expires_at = self.state.ids.real_now().plus_ms(self.payment_ttl_ms);
        let earlier = turn.remove(&id);
        let is_again = earlier.is_some();
        let hold = match earlier {
            // An earlier retry, whose answer was lost, holds them still.
            Some(retried) => retried.hold,
            None => sku.hold(quantity).map_err(|refusal| match refusal {
                Refusal::SoldOut { available } => OperatorError::SoldOut { available },
                _ => OperatorError::UnknownDeadLetter(id),
            })?,
        };
        let retried = Retried {
            hold,
            user_id: letter.user_id.clone(),
            order: LiveOrder {
                order_id: letter.order_id,
                sku: sku.number,
                quantity,
            },
            expires_at,
        };
        // Known before it is a row: no start is told to begin above it.
        self.state
            .expiry_index
            .note([(letter.order_id, expires_at)]);
        let written = self
            .database
            .revive_dead_letter(self.lease, id, expires_at)
            .await;
        self.lost.note(&written, LostAnswer::DeadLetter(id));
        match written {
            Ok(true) => {}
            // The earlier retry was carried out in this very moment.
            Ok(false) if is_again => {}
            Ok(false) => return Err(OperatorError::UnknownDeadLetter(id)),
            Err(error) if error.is_transient() => {
                // The row may be there, or may come yet, and then it holds the units. So they stay
                // held, which is safe, until it is known.
                turn.insert(id, retried);
                return Err(error.into());
            }
            Err(error) => return Err(OperatorError::RefusedAgain(error.to_string())),
        }
        retried.revived(&self.state);
        tracing::info!(order_id = %letter.order_id, "an operator has retried a dead letter; its row is written");
        Ok(letter)
    }

    /// Leaves a dead letter at that, with a note. Its order stays `failed` and holds nothing.
    ///
    /// # Errors
    /// [`OperatorError::UnknownDeadLetter`], or what the database says.
    pub async fn discard_dead_letter(
        &self,
        id: i64,
        note: Option<&str>,
    ) -> Result<DeadLetter, OperatorError> {
        let _turn = self.one_at_a_time.lock().await;
        if !self.database.discard_dead_letter(id, note).await? {
            return Err(OperatorError::UnknownDeadLetter(id));
        }
        tracing::info!(dead_letter = id, "an operator has discarded a dead letter");
        let letter = self.database.dead_letter(id).await?;
        letter.ok_or(OperatorError::UnknownDeadLetter(id))
    }

    /// Records that the money of an order went back. Its units may leave the sale with it, so
    /// nobody else changes a total meanwhile.
    ///
    /// # Errors
    /// If the database does not answer; nothing has changed.
    pub async fn record_refund(
        &self,
        order_id: OrderId,
        note: RefundNote,
    ) -> Result<Recorded, StoreError> {
        let _turn = self.one_at_a_time.lock().await;
        self.payments.record_refund(order_id, note).await
    }

    async fn open_dead_letter(&self, id: i64) -> Result<DeadLetter, OperatorError> {
        let letter = self.database.dead_letter(id).await?;
        letter
            .filter(|letter| letter.discarded_at.is_none())
            .ok_or(OperatorError::UnknownDeadLetter(id))
    }

    fn known(&self, id: &SkuId) -> Result<Arc<Sku>, OperatorError> {
        let sku = self.state.catalogue.get(id);
        sku.ok_or_else(|| OperatorError::UnknownSku(id.clone()))
    }
}
