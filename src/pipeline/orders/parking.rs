//! Parked orders: acknowledged orders of SKUs whose counters the database refuses. They wait in the database,
//! so that neither the journal nor memory has to keep them and no other order waits behind them.
//!
//! ```text
//!   worker, replay ── counters refused ──► parked_orders ─┬─ counters are taken ──► orders
//!                                                         ├─ too late to be paid ─► orders, expired
//!                                                         ├─ cancelled ───────────► orders, cancelled
//!                                                         └─ the row is refused ──► dead_letters
//! ```
//!
//! While a SKU has parked orders it is not sold, and their units are held in memory: at a node, while orders of its own lanes
//! are parked. One task retries them, SKU
//! by SKU and in parts. Once a SKU has none left and its counters are accepted, its sale resumes by itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::backoff::Backoff;
use crate::clock;
use crate::metrics::Metrics;
use crate::order::{Ended, LaneSet, Order, OrderStatus, Quantity, SkuNumber, UnixMillis};
use crate::pipeline::cluster::{held, lending};
use crate::state::stock::{Refused, Sku};
use crate::state::{State, lanes};
use crate::store::StoreError;
use crate::store::WriteError;
use crate::store::batch::BatchWriter;
use crate::store::postgres::{Database, NodeLease, parked, skus};

/// Interval between two looks for SKUs that are due.
const LOOK: Duration = Duration::from_millis(250);
/// Pauses between two attempts for one SKU.
const RETRY: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(16));
/// Interval between two looks for parked orders that are too late to be paid.
const EXPIRE: Duration = Duration::from_secs(1);
/// Maximum of orders in one transaction, and of transactions for one SKU before the others have their turn.
const PART: usize = 1_000;
const PARTS: usize = 20;
/// Pause after a failure of the database.
const PAUSE: Duration = Duration::from_millis(500);
/// Requests of operators that may be queued.
const REQUESTS_MAX: usize = 64;

type Answer = oneshot::Sender<Result<Option<Refused>, StoreError>>;

/// Handle to the parking task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ParkingHandle {
    requests: mpsc::Sender<(SkuNumber, Answer)>,
}

impl ParkingHandle {
    /// Retries a SKU's parked orders and its counters at once. `None`: the counters are accepted and its sale
    /// resumes.
    ///
    /// # Errors
    /// If the database does not answer; the task retries by itself.
    pub async fn retry_now(&self, sku: SkuNumber) -> Result<Option<Refused>, StoreError> {
        let stopped = || StoreError::Pool("the service is stopping".to_owned());
        let (answer, answered) = oneshot::channel();
        let sent = self.requests.send((sku, answer)).await;
        sent.map_err(|_| stopped())?;
        answered.await.unwrap_or_else(|_| Err(stopped()))
    }
}

/// The task.
pub struct Parking {
    state: Arc<State>,
    database: Database,
    lease: NodeLease,
    writer: BatchWriter,
    metrics: Metrics,
    requests: mpsc::Receiver<(SkuNumber, Answer)>,
    /// Time of the next attempt for each faulted SKU, and the pauses after it.
    due: BTreeMap<SkuNumber, (Instant, Backoff)>,
    next_expiry: Instant,
    /// The last parked order that was checked for being too late.
    expiry_at: (UnixMillis, i64),
}

/// Outcome of an attempt for one SKU.
enum Tried {
    /// Nothing is parked any more, and the counters are accepted.
    Sound,
    /// There are more parts.
    More,
    /// The counters are refused, or orders are about to be parked.
    Refused,
}

/// Outcome of writing one part of parked orders.
enum Part {
    Written,
    /// Some of them are not parked any more.
    Changed,
    Row {
        sqlstate: String,
        reason: String,
    },
    Counter {
        reason: String,
    },
}

impl Parking {
    /// The task and its handle.
    pub fn new(
        state: Arc<State>,
        database: Database,
        lease: NodeLease,
        writer: BatchWriter,
        metrics: Metrics,
    ) -> (ParkingHandle, Parking) {
        let (sender, requests) = mpsc::channel(REQUESTS_MAX);
        let parking = Parking {
            state,
            database,
            lease,
            writer,
            metrics,
            requests,
            due: BTreeMap::new(),
            next_expiry: clock::now(),
            expiry_at: START,
        };
        (ParkingHandle { requests: sender }, parking)
    }

    /// Runs until the future is dropped or this process may not write any more.
    pub async fn run(mut self) {
        loop {
            tokio::select! {
                biased;
                Some((sku, answer)) = self.requests.recv() => {
                    let tried = self.retry(sku).await;
                    if let Err(error) = &tried {
                        self.note_failure(error);
                    }
                    let _ = answer.send(tried);
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            if self.state.catalogue.has_faults()
                && let Err(error) = self.look().await
            {
                self.note_failure(&error);
                tokio::time::sleep(PAUSE).await;
            }
            if self.state.poison.is_set() {
                return;
            }
        }
    }

    fn note_failure(&self, error: &StoreError) {
        if error.is_final() {
            self.state.poison.set(error.to_string());
        } else {
            tracing::warn!(reason = %error, "parked orders could not be written yet; retrying");
        }
    }

    /// Retries a SKU now, at an operator's request.
    async fn retry(&mut self, number: SkuNumber) -> Result<Option<Refused>, StoreError> {
        let Some(sku) = self.state.catalogue.by_number(number) else {
            return Ok(None);
        };
        while sku.is_faulted() {
            match self.attempt(&sku).await? {
                Tried::More => {}
                Tried::Sound | Tried::Refused => break,
            }
        }
        Ok(sku.fault().refused())
    }

    /// Retries the SKUs that are due.
    async fn look(&mut self) -> Result<(), StoreError> {
        if clock::now() >= self.next_expiry {
            self.next_expiry = clock::now() + EXPIRE;
            self.expire().await?;
        }
        let skus = self.state.catalogue.all();
        for sku in skus.iter().filter(|sku| sku.is_faulted()) {
            let now = clock::now();
            let (at, mut backoff) = *self.due.entry(sku.number).or_insert((now, RETRY));
            if now < at {
                continue;
            }
            match self.attempt(sku).await? {
                Tried::Sound => {}
                // The other SKUs have their turn first.
                Tried::More => drop(self.due.insert(sku.number, (now, RETRY))),
                Tried::Refused => {
                    let next = clock::now() + backoff.pause();
                    self.due.insert(sku.number, (next, backoff));
                }
            }
        }
        Ok(())
    }

    /// Writes parked orders of one SKU, as many as the counters accept.
    async fn attempt(&mut self, sku: &Arc<Sku>) -> Result<Tried, StoreError> {
        let mut size = PART;
        let mut moved = 0;
        for _ in 0..PARTS {
            let Some(seen) = sku.fault().look() else {
                return Ok(Tried::Refused);
            };
            if !cover(sku).await {
                return Ok(Tried::Refused);
            }
            let lanes = lanes::here(self.state.lanes.as_ref());
            let part = parked::of_sku(&self.database, sku.number, lanes, size as i64).await?;
            if part.is_empty() {
                let node = self.lease.node;
                if self.state.lanes.is_some()
                    && parked::count_of_node(&self.database, node, sku.number).await? > 0
                {
                    // Their lanes are ours and about to open.
                    return Ok(Tried::Refused);
                }
                let units = sku.fault().refused().map_or(0, |refused| refused.units);
                if moved == 0
                    && let Some(reason) =
                        skus::try_counters(&self.database, self.lease, sku.number, units).await?
                {
                    sku.fault().set(&reason, units);
                    self.count(sku, 0);
                    return Ok(Tried::Refused);
                }
                return self.resume(sku, seen).await;
            }
            let now = self.state.ids.real_now();
            let rows: Vec<(&Order, OrderStatus)> = part
                .iter()
                .map(|order| (order, self.status_at(order, now)))
                .collect();
            match self.unpark(&rows).await? {
                Part::Written => {
                    moved += rows.len();
                    size = (size * 2).min(PART);
                }
                Part::Changed => {}
                Part::Row { .. } | Part::Counter { .. } if part.len() > 1 => size = part.len() / 2,
                Part::Row { sqlstate, reason } => {
                    self.dead_letter(&part, &sqlstate, &reason).await?
                }
                Part::Counter { reason } => {
                    let units = part.first().map_or(1, |order| order.quantity.get());
                    sku.fault().set(&reason, units);
                    let parked = parked::by_sku(&self.database, lanes).await?;
                    self.count(
                        sku,
                        parked.get(&sku.number).map_or(0, |parked| parked.orders),
                    );
                    return Ok(Tried::Refused);
                }
            }
        }
        Ok(Tried::More)
    }

    /// Resumes the sale of a SKU without parked orders, with the total of the database: repairing the row may
    /// have changed it.
    async fn resume(
        &mut self,
        sku: &Arc<Sku>,
        seen: crate::state::stock::Seen,
    ) -> Result<Tried, StoreError> {
        let before = sku.counter().snapshot().total;
        // The units of a node are what is lent to it.
        if sku.shared().is_none()
            && let Some(total) = skus::total_of(&self.database, &sku.id).await?
            && total != before
            && !sku.counter().replace_total(before, total)
        {
            tracing::error!(
                sku_id = %sku.id, total, believed = before,
                "the total in the row of this SKU is below the units that its orders have taken; set the total again"
            );
        }
        self.count(sku, 0);
        if !self.state.catalogue.clear_fault(sku, seen) {
            return Ok(Tried::More);
        }
        self.due.remove(&sku.number);
        tracing::info!(sku_id = %sku.id, "the database accepts this SKU's counters again; its sale resumes");
        Ok(Tried::Sound)
    }

    fn count(&self, sku: &Sku, parked: u64) {
        let change = sku.fault().set_parked(parked);
        self.metrics.orders_parked.add(change);
    }

    fn status_at(&self, order: &Order, now: UnixMillis) -> OrderStatus {
        if self.state.is_late(order, now) {
            OrderStatus::Expired
        } else {
            order.status_in_time()
        }
    }

    /// Writes parked orders that are too late to be paid as expired. That moves no counter, so it succeeds even
    /// while the counters are refused.
    async fn expire(&mut self) -> Result<(), StoreError> {
        for _ in 0..PARTS {
            let now = self.state.ids.real_now();
            let lanes = lanes::here(self.state.lanes.as_ref());
            let part = parked::due(&self.database, now, self.expiry_at, lanes, PART as i64);
            let part = part.await?;
            let Some(last) = part.last() else {
                self.expiry_at = START;
                return Ok(());
            };
            self.expiry_at = (last.expires_at, last.id.as_i64());
            let late: Vec<(&Order, OrderStatus)> = part
                .iter()
                .map(|order| (order, self.status_at(order, now)))
                .filter(|(_, status)| *status == OrderStatus::Expired)
                .collect();
            if late.is_empty() {
                continue;
            }
            match self.unpark(&late).await? {
                Part::Written => {}
                // Done at the next look, or SKU by SKU.
                Part::Changed | Part::Row { .. } | Part::Counter { .. } => self.expiry_at = START,
            }
        }
        Ok(())
    }

    /// Turns parked orders into rows, in the database and in memory. Their lanes stay here meanwhile.
    async fn unpark(&mut self, rows: &[(&Order, OrderStatus)]) -> Result<Part, StoreError> {
        let state = Arc::clone(&self.state);
        let ids = rows.iter().map(|(order, _)| order.id).collect();
        let (_held, here, _) = held::hold(state.lanes.as_ref(), &self.database, ids).await?;
        if here.len() < rows.len() {
            return Ok(Part::Changed);
        }
        loop {
            match self.writer.unpark(rows).await {
                Ok(()) => break,
                Err(WriteError::Row { sqlstate, reason }) => {
                    return Ok(Part::Row { sqlstate, reason });
                }
                Err(WriteError::Counter { reason, .. }) => return Ok(Part::Counter { reason }),
                Err(WriteError::Fatal(error)) => return Err(error),
                Err(WriteError::Retry(error)) if self.writer.outcome_unknown() => {
                    tracing::warn!(reason = %error, "the answer to writing parked orders was lost; asking the database whether they are written");
                    tokio::time::sleep(PAUSE).await;
                }
                Err(WriteError::Retry(StoreError::Data(_))) => return Ok(Part::Changed),
                Err(WriteError::Retry(error)) => return Err(error),
            }
        }
        self.metrics.rows_written.inc_by(rows.len() as u64);
        let payable = rows
            .iter()
            .filter(|(_, status)| *status == OrderStatus::PendingPayment);
        let until = payable.map(|(order, _)| (order.id, order.expires_at));
        self.state.expiry_index.note(until);
        for (order, status) in rows {
            if *status == OrderStatus::Expired {
                self.state.ended(order, Ended::Expired);
            }
            self.left(order);
        }
        Ok(Part::Written)
    }

    /// Dead-letters an order whose row the database refuses.
    async fn dead_letter(
        &mut self,
        part: &[Order],
        sqlstate: &str,
        reason: &str,
    ) -> Result<(), StoreError> {
        let state = Arc::clone(&self.state);
        for order in part {
            let ids = vec![order.id];
            let (_held, here, _) = held::hold(state.lanes.as_ref(), &self.database, ids).await?;
            if here.is_empty() {
                continue;
            }
            let is_dead_letter = loop {
                let (database, lease) = (&self.database, self.lease);
                match parked::make_dead_letter(database, lease, order.id, sqlstate, reason).await {
                    Err(error) if error.is_transient() => {
                        tracing::warn!(order_id = %order.id, reason = %error, "a parked order may or may not be a dead letter by now; asking the database again");
                        tokio::time::sleep(PAUSE).await;
                    }
                    done => break done?,
                }
            };
            if is_dead_letter {
                tracing::error!(order_id = %order.id, sqlstate, reason, "the database refused a parked order; it is a dead letter now: retry or discard it at /admin/v1/dead-letters");
                self.metrics.dead_letters.inc();
                self.state.ended(order, Ended::Failed);
                self.left(order);
            }
        }
        Ok(())
    }

    fn left(&self, order: &Order) {
        if let Some(sku) = self.state.catalogue.by_number(order.sku) {
            self.metrics.orders_parked.add(sku.fault().unparked(1));
        }
    }
}

/// Has the units that parked orders hold in memory lent to this node, as far as its share has them not: the row in `sku` was wrong when
/// it got their lanes. False: the SKU has not enough.
async fn cover(sku: &Arc<Sku>) -> bool {
    let Some(lacking) = Quantity::new(sku.fault().lacking()) else {
        return true;
    };
    let Ok(lent) = lending::hold(sku, lacking).await else {
        sku.fault().set(LACKING, lacking.get());
        return false;
    };
    // Memory has counted them since.
    lent.commit();
    sku.counter().give_held(lacking.get());
    sku.fault().covered(lacking.get());
    true
}

/// A position before every parked order.
const START: (UnixMillis, i64) = (UnixMillis(0), 0);

/// Sets in memory which SKUs have parked orders, after the database may have lost some, or has others than this
/// process knows of.
///
/// # Errors
/// If the database does not answer.
pub async fn recount(
    state: &State,
    database: &Database,
    metrics: &Metrics,
) -> Result<(), StoreError> {
    let parked = parked::by_sku(database, LaneSet::ALL).await?;
    for (number, parked) in parked {
        let Some(sku) = state.catalogue.by_number(number) else {
            continue;
        };
        if !sku.is_faulted() {
            state.catalogue.set_fault(&sku, FOUND, 1);
        }
        let change = sku.fault().set_parked(parked.orders);
        metrics.orders_parked.add(change);
    }
    Ok(())
}

/// Reason of the fault of a SKU of which this node has not all units that its parked orders hold.
const LACKING: &str =
    "the sale has not the units that its parked orders hold: its total is too low";

/// Reason of the fault of a SKU whose parked orders were found at a start, after a failover, or after a takeover.
pub const FOUND: &str = "orders of it were parked before; they have not been tried again yet";
