//! An operator's changes to a running sale, in the order that keeps every promise: a change that makes units
//! available goes to the database first and then to memory; a change that takes units away goes to memory
//! first.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::changes::{Retried, check_number};
use super::lost_answers::{LostAnswer, LostAnswers};
use super::pauses::Pauses;
use super::{draws, limits};
use crate::faults::bug;
use crate::order::draw::{Beacon, Header};
use crate::order::{Lane, OrderId, Quantity, Refusal, SkuId, UserId};
use crate::pipeline::cluster::hints::Hints;
use crate::pipeline::cluster::{lending, terms};
use crate::pipeline::orders::parking::ParkingHandle;
use crate::pipeline::payments::processor::PaymentsHandle;
use crate::state::State;
use crate::state::buyers::LiveOrder;
use crate::state::stock::{BelowCommitted, SaleTerms, Sku};
use crate::store::StoreError;
use crate::store::cluster::recall::{self, Lowered, Lowering};
use crate::store::postgres::dead_letters::{self, DeadLetter};
use crate::store::postgres::{Database, NodeLease, skus};
use crate::store::settlement::refunds::{Recorded, RefundNote};

/// Time that free units have to come back when a total is lowered.
const RECALL: Duration = Duration::from_secs(2);
/// Interval at which it is asked whether they have.
const ASK: Duration = Duration::from_millis(50);

/// Reason why an operator's request was not carried out. Unless the variant says otherwise, nothing has
/// changed.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// No such SKU.
    #[error("there is no SKU {0}")]
    UnknownSku(SkuId),
    /// No such open dead letter.
    #[error("there is no open dead letter {0}")]
    UnknownDeadLetter(i64),
    /// The new total is less than the units that orders have taken.
    #[error(transparent)]
    TotalBelowCommitted(#[from] BelowCommitted),
    /// Terms of a draw that somebody has entered.
    #[error(
        "the draw has entries, so its terms stay as they are: {}",
        changed.join(", ")
    )]
    DrawFixed {
        /// The terms that would have changed.
        changed: Vec<&'static str>,
    },
    /// The allocation of a SKU with a waiting list.
    #[error("allocation: orders wait for units of this SKU; it can change once nobody waits")]
    AllocationFixed,
    /// A SKU without a draw.
    #[error("{0} is sold first come, first served")]
    NoDraw(SkuId),
    /// A beacon for a draw that has none.
    #[error("beacon: the terms of the draw name none, so the seed alone ranks")]
    NoBeaconWanted,
    /// A beacon before the entries are fixed.
    #[error(
        "beacon: the entries are not fixed yet, and whoever knows the beacon could still enter; send it after draw_at"
    )]
    EntriesNotFixed,
    /// Another beacon than the one that is stored.
    #[error("beacon: the draw has the beacon {0:?} already")]
    BeaconFixed(String),
    /// Units that have to leave the sale are at a node that does not give them back.
    #[error(
        "total: a node has free units of this SKU and has not given them back within two seconds; nothing has changed: send the request again"
    )]
    UnitsOut,
    /// The new total is out of range.
    #[error("total: must be 0 to 4294967295")]
    TotalOutOfRange,
    /// The same key was used before with another quantity.
    #[error("Idempotency-Key: this key was used before with a quantity of {earlier}")]
    KeyReused {
        /// The earlier quantity.
        earlier: i64,
    },
    /// Not enough units are free for a dead letter's order.
    #[error("not enough units are free: {available} available")]
    SoldOut {
        /// Free units.
        available: u32,
    },
    /// Whether a node has units for a dead letter's order is not known.
    #[error(
        "this node has too few units, and which others have is not known yet; nothing has changed: send the request again"
    )]
    StockElsewhere,
    /// The lane of a dead letter's buyer is not open here any more.
    #[error("the buyer's lane is moving from one node to another; send the request again")]
    LaneMoves,
    /// The database refuses a dead letter's row again.
    #[error("the database refuses the row again: {0}")]
    RefusedAgain(String),
    /// A pause is in force, but not stored.
    #[error(
        "the sale IS paused from now on, but the database has not stored the pause yet ({source}), so a restart now would lift it; storing it is retried until it succeeds"
    )]
    PauseNotStored {
        /// The database's error.
        source: StoreError,
    },
    /// A resume was not stored.
    #[error(
        "nothing was resumed: the database has not stored the change ({source}); send the request again"
    )]
    ResumeNotStored {
        /// The database's error.
        source: StoreError,
    },
    /// A sale cannot resume while the database refuses its counters.
    #[error(
        "the database refuses the counters of {sku_id}, as a retry has just shown: {reason}. {parked} acknowledged orders are parked until its row in `sku` agrees with its orders (see the audit); then its sale resumes by itself"
    )]
    CountersRefused {
        /// The SKU.
        sku_id: SkuId,
        /// Acknowledged orders that are parked.
        parked: u64,
        /// The database's message.
        reason: String,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What an operator is made of.
#[derive(Debug)]
pub struct OperatorParts {
    /// The state.
    pub state: Arc<State>,
    /// Connections of its own.
    pub database: Database,
    /// The node whose orders are decided about.
    pub lease: NodeLease,
    /// The way to the callbacks' task.
    pub payments: PaymentsHandle,
    /// Pauses, in memory and in the database.
    pub pauses: Arc<Pauses>,
    /// The way to the parked orders.
    pub parking: ParkingHandle,
    /// Hints to other nodes.
    pub hints: Arc<Hints>,
    /// `orders.payment_ttl_ms`.
    pub payment_ttl_ms: u64,
}

/// Carries out operators' requests, one at a time; pauses take effect at once.
#[derive(Debug)]
pub struct Operator {
    state: Arc<State>,
    database: Database,
    lease: NodeLease,
    payments: PaymentsHandle,
    pauses: Arc<Pauses>,
    parking: ParkingHandle,
    hints: Arc<Hints>,
    payment_ttl_ms: u64,
    /// Serializes changes of terms: a change that sets a limit may take long, and no other request waits for
    /// it.
    changing_terms: Arc<Mutex<()>>,
    /// Serializes requests; holds the retries in doubt, by dead letter.
    one_at_a_time: Arc<Mutex<HashMap<i64, Retried>>>,
    lost: LostAnswers,
}

/// The result of a `PUT` of a SKU.
#[derive(Debug)]
pub struct Put {
    /// The SKU after the change.
    pub sku: Arc<Sku>,
    /// Whether it was created.
    pub is_new: bool,
    /// The changed terms, by their names in JSON; empty if the SKU was created.
    pub changed: Vec<&'static str>,
}

impl Operator {
    /// An operator on this state and this database.
    pub fn new(parts: OperatorParts) -> Self {
        let OperatorParts {
            state,
            database,
            lease,
            payments,
            pauses,
            parking,
            hints,
            payment_ttl_ms,
        } = parts;
        let one_at_a_time = Arc::new(Mutex::new(HashMap::new()));
        let changing_terms = Arc::default();
        let lost = LostAnswers::new(
            Arc::clone(&state),
            database.clone(),
            lease,
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
            hints,
            payment_ttl_ms,
            changing_terms,
            one_at_a_time,
            lost,
        }
    }

    /// Creates a SKU or replaces its terms and total, without a pause of the sale.
    ///
    /// A purchase limit takes effect once the buyers' live orders of the SKU are known. Orders that memory
    /// lacks are read from the database first: of all orders placed since the SKU was created, about a million
    /// rows a second.
    ///
    /// # Errors
    /// [`OperatorError::TotalBelowCommitted`], or the database's error.
    pub async fn put_sku(
        &self,
        id: &SkuId,
        terms: SaleTerms,
        total: u32,
    ) -> Result<Put, OperatorError> {
        let _changing = self.changing_terms.lock().await;
        // Held until the terms are in force.
        let _counting = limits::count(&self.state, &self.database, id, &terms).await?;
        let _turn = self.one_at_a_time.lock().await;
        let Some(sku) = self.state.catalogue.get(id) else {
            let made = skus::put(&self.database, self.lease, id, &terms, total).await;
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
        let mut changed = sku.terms().differing(&terms);
        // Held until the terms are in force: nobody enters meanwhile.
        let _unentered = draws::begin_change(&self.database, &sku, &changed).await?;
        let mut stored = None;
        let storing = async {
            let made = skus::put(&self.database, self.lease, id, &terms, total).await?;
            check_number(&self.state, &made)?;
            stored = Some(made);
            Ok::<(), StoreError>(())
        };
        let before = sku.stock().total;
        if before != total {
            changed.push("total");
        }
        if sku.shared().is_some() && total < before {
            let lowering = Lowering::To(total.into());
            self.recall(&sku, lowering, "put", None).await?;
        }
        self.change_total(&sku, total, storing).await?;
        if let Some(stored) = stored {
            sku.adopt_terms(&stored);
        }
        Ok(Put {
            sku,
            is_new: false,
            changed,
        })
    }

    /// Changes a SKU's total by `units`, at most once for each `key`. Returns true if an earlier request under
    /// this key did it.
    ///
    /// # Errors
    /// [`OperatorError::TotalBelowCommitted`], [`OperatorError::TotalOutOfRange`],
    /// [`OperatorError::KeyReused`], or the database's error.
    pub async fn restock(
        &self,
        id: &SkuId,
        units: i64,
        key: Option<&str>,
    ) -> Result<(Arc<Sku>, bool), OperatorError> {
        let _turn = self.one_at_a_time.lock().await;
        let sku = self.known(id)?;
        if let Some(key) = key
            && let Some(earlier) = skus::restocked(&self.database, id, key).await?
        {
            if earlier != units {
                return Err(OperatorError::KeyReused { earlier });
            }
            // The earlier answer may have been lost before memory was updated.
            self.adopt_total(&sku).await?;
            return Ok((sku, true));
        }
        let before = match sku.shared() {
            None => sku.counter().snapshot().total,
            Some(_) => skus::total_of(&self.database, id).await?.unwrap_or(0),
        };
        let total = i64::from(before).checked_add(units);
        let total = total
            .and_then(|total| u32::try_from(total).ok())
            .ok_or(OperatorError::TotalOutOfRange)?;
        if sku.shared().is_some() && units < 0 {
            let lowering = Lowering::By(-units);
            self.recall(&sku, lowering, "restock", key).await?;
        } else {
            let storing = skus::restock(&self.database, self.lease, id, units, key);
            self.change_total(&sku, total, storing).await?;
        }
        tracing::info!(sku_id = %id, units, total, "an operator has restocked");
        Ok((sku, false))
    }

    /// Lowers the total of a SKU that several nodes sell: their free units come back first, within a second.
    async fn recall(
        &self,
        sku: &Sku,
        lowering: Lowering,
        reference: &str,
        key: Option<&str>,
    ) -> Result<(), OperatorError> {
        let (database, lease) = (&self.database, self.lease);
        let asked = Instant::now();
        loop {
            let lowered =
                recall::lower_total(database, lease, sku.number, lowering, reference, key);
            match lowered.await? {
                Lowered::Done => return Ok(()),
                Lowered::Refused { committed } => {
                    let committed = u32::try_from(committed).unwrap_or(u32::MAX);
                    return Err(BelowCommitted { committed }.into());
                }
                Lowered::Waiting if asked.elapsed() < RECALL => tokio::time::sleep(ASK).await,
                Lowered::Waiting => {
                    recall::end_recall(database, lease, sku.number).await?;
                    return Err(OperatorError::UnitsOut);
                }
            }
        }
    }

    /// The nodes that have not taken over within a second what operators have changed. None if there is one node.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn unreached(&self) -> Result<Vec<i16>, StoreError> {
        terms::unreached(&self.database, self.lease, &self.hints).await
    }

    /// Stores a new total and puts it in force.
    async fn change_total(
        &self,
        sku: &Sku,
        total: u32,
        storing: impl Future<Output = Result<(), StoreError>>,
    ) -> Result<(), OperatorError> {
        let _change = self.state.row_changes.begin();
        let is_alone = sku.shared().is_none();
        if is_alone && total < sku.counter().snapshot().total {
            // From here on no buyer can take the units that are about to be removed.
            sku.counter().set_total(total)?;
        }
        let stored = storing.await;
        // The commit may be in doubt. Until it is resolved the lower total is safe in either case.
        let id = SkuId::clone(&sku.id);
        self.lost.note(&stored, LostAnswer::Sku(id));
        if let Err(error) = stored {
            if !error.is_transient() && is_alone {
                self.adopt_total(sku).await?;
            }
            return Err(error.into());
        }
        // What a node has of it comes by lending.
        if is_alone {
            sku.counter().set_total(total)?;
        }
        Ok(())
    }

    /// Sets the total in memory to the database's.
    async fn adopt_total(&self, sku: &Sku) -> Result<(), OperatorError> {
        if sku.shared().is_some() {
            return Ok(());
        }
        match skus::total_of(&self.database, &sku.id).await? {
            Some(total) => Ok(sku.counter().set_total(total)?),
            None => Err(OperatorError::UnknownSku(SkuId::clone(&sku.id))),
        }
    }

    /// Pauses one sale at once; the pause survives restarts.
    ///
    /// # Errors
    /// [`OperatorError::UnknownSku`]; [`OperatorError::PauseNotStored`], although the pause is in force.
    pub async fn pause(&self, id: &SkuId) -> Result<Arc<Sku>, OperatorError> {
        let sku = self.known(id)?;
        tracing::info!(sku_id = %id, "an operator pauses a sale");
        let stored = self.pauses.set(&sku, true).await;
        stored.map_err(|source| OperatorError::PauseNotStored { source })?;
        Ok(sku)
    }

    /// Resumes one sale, with the total of its row; this survives restarts. If the sale is paused because the database refuses its
    /// counters, its parked orders are retried at once, and it resumes by itself once they are accepted.
    ///
    /// # Errors
    /// [`OperatorError::UnknownSku`]; [`OperatorError::CountersRefused`] and
    /// [`OperatorError::ResumeNotStored`], with the sale unchanged.
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
        self.take_over_total(&sku).await?;
        let stored = self.pauses.set(&sku, false).await;
        stored.map_err(|source| OperatorError::ResumeNotStored { source })?;
        tracing::info!(sku_id = %id, "an operator has resumed a sale");
        Ok(sku)
    }

    /// Sets the total in memory to the database's: a row that was edited by hand and mended again may have been read in between.
    async fn take_over_total(&self, sku: &Sku) -> Result<(), OperatorError> {
        let _turn = self.one_at_a_time.lock().await;
        match self.adopt_total(sku).await {
            // Orders that are no rows yet have taken more: their counters will be refused.
            Err(OperatorError::TotalBelowCommitted(_)) => Ok(()),
            Err(OperatorError::Store(source)) => Err(OperatorError::ResumeNotStored { source }),
            taken_over => taken_over,
        }
    }

    /// Pauses every sale at once; the pause survives restarts.
    ///
    /// # Errors
    /// [`OperatorError::PauseNotStored`], although the pause is in force.
    pub async fn pause_all(&self) -> Result<(), OperatorError> {
        tracing::info!("an operator pauses every sale");
        let stored = self.pauses.set_all(true).await;
        stored.map_err(|source| OperatorError::PauseNotStored { source })
    }

    /// Resumes every sale; this survives restarts.
    ///
    /// # Errors
    /// [`OperatorError::ResumeNotStored`], with the pause unchanged.
    pub async fn resume_all(&self) -> Result<(), OperatorError> {
        let stored = self.pauses.set_all(false).await;
        stored.map_err(|source| OperatorError::ResumeNotStored { source })?;
        tracing::info!("an operator has resumed every sale");
        Ok(())
    }

    /// Retries a dead letter: holds its units again and writes its row, payable from now.
    ///
    /// # Errors
    /// [`OperatorError::SoldOut`] and [`OperatorError::RefusedAgain`] leave the dead letter as it
    /// is.
    pub async fn retry_dead_letter(&self, id: i64) -> Result<DeadLetter, OperatorError> {
        let mut turn = self.one_at_a_time.lock().await;
        let Some(letter) = dead_letters::find(&self.database, id).await? else {
            // It is gone: the earlier retry was committed, and its row holds the units.
            if let Some(retried) = turn.remove(&id) {
                retried.revived(&self.state);
            }
            return Err(OperatorError::UnknownDeadLetter(id));
        };
        if letter.discarded_at.is_some() {
            // So no earlier retry was committed, nor can be; its units are free.
            turn.remove(&id);
            return Err(OperatorError::UnknownDeadLetter(id));
        }
        let sku = self
            .state
            .catalogue
            .by_number(letter.sku)
            .ok_or(OperatorError::UnknownDeadLetter(id))?;
        let quantity = Quantity::new(letter.quantity).unwrap_or(Quantity::ONE);
        let expires_at = self.state.ids.real_now().plus_ms(self.payment_ttl_ms);
        let lane = match &self.state.lanes {
            None => None,
            Some(of) => {
                let lane = Lane::of(&UserId::from_row(&letter.user_id));
                let entered = of.lanes.enter_owned(lane);
                Some(entered.map_err(|_| OperatorError::LaneMoves)?)
            }
        };
        let earlier = turn.remove(&id);
        let is_again = earlier.is_some();
        // Before the hold: the row has none yet.
        let change = self.state.row_changes.begin();
        let hold = match earlier {
            // An earlier retry whose answer was lost still holds them.
            Some(retried) => retried.hold,
            None => lending::hold(&sku, quantity)
                .await
                .map_err(|refusal| match refusal {
                    Refusal::SoldOut { available } => OperatorError::SoldOut { available },
                    Refusal::StockElsewhere => OperatorError::StockElsewhere,
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
            _change: change,
            _lane: lane,
        };
        // Noted before the row exists, so that no start is told to look for unpaid orders only above it.
        self.state
            .expiry_index
            .note([(letter.order_id, expires_at)]);
        let written = dead_letters::revive(&self.database, self.lease, id, expires_at).await;
        self.lost.note(&written, LostAnswer::DeadLetter(id));
        match written {
            Ok(true) => {}
            Ok(false) => match dead_letters::is_committed(&self.database, id).await {
                // The earlier retry was committed at this very moment.
                Ok(false) if is_again => {}
                // It was discarded, or a payment has reached it: the units are free.
                Ok(_) => return Err(OperatorError::UnknownDeadLetter(id)),
                Err(error) => {
                    if is_again {
                        turn.insert(id, retried);
                    }
                    return Err(error.into());
                }
            },
            Err(error) if error.is_transient() && !bug("forget_a_retry") => {
                // The commit is in doubt. A committed row holds the units, so they stay held until the outcome
                // is known, which is safe in either case.
                turn.insert(id, retried);
                return Err(error.into());
            }
            Err(error) => return Err(OperatorError::RefusedAgain(error.to_string())),
        }
        retried.revived(&self.state);
        tracing::info!(order_id = %letter.order_id, "an operator has retried a dead letter; its row is written");
        Ok(letter)
    }

    /// Discards a dead letter, with a note. Its order stays `failed` and holds nothing.
    ///
    /// # Errors
    /// [`OperatorError::UnknownDeadLetter`], or what the database says.
    pub async fn discard_dead_letter(
        &self,
        id: i64,
        note: Option<&str>,
    ) -> Result<DeadLetter, OperatorError> {
        let _turn = self.one_at_a_time.lock().await;
        if !dead_letters::discard(&self.database, self.lease, id, note).await? {
            return Err(OperatorError::UnknownDeadLetter(id));
        }
        tracing::info!(dead_letter = id, "an operator has discarded a dead letter");
        let letter = dead_letters::find(&self.database, id).await?;
        letter.ok_or(OperatorError::UnknownDeadLetter(id))
    }

    /// Records that the money of an order was refunded. Its units may leave the sale, so no other request
    /// changes a total meanwhile.
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

    /// Supplies the beacon of a draw whose entries are fixed. The draw is then made in the background. The first line of
    /// the published draw is returned.
    ///
    /// # Errors
    /// [`OperatorError::NoDraw`], [`OperatorError::NoBeaconWanted`], [`OperatorError::EntriesNotFixed`],
    /// [`OperatorError::BeaconFixed`], or the database's error.
    pub async fn supply_beacon(
        &self,
        id: &SkuId,
        beacon: &Beacon,
    ) -> Result<Header, OperatorError> {
        let sku = self.known(id)?;
        draws::supply_beacon(&self.database, self.lease, &sku, beacon).await
    }

    fn known(&self, id: &SkuId) -> Result<Arc<Sku>, OperatorError> {
        let sku = self.state.catalogue.get(id);
        sku.ok_or_else(|| OperatorError::UnknownSku(id.clone()))
    }
}
