//! Restoring commits that a failover lost: a promoted standby that lagged lacks commits that the old primary
//! had acknowledged. The loss shows in the batch numbers and the server's timeline. This process then writes
//! the orders that it still knows again.
//!
//! The known orders are those that are still in the order log and the recent orders kept to answer
//! repeated requests; the ends of the orders in the idempotency window are known too. An order that waited for
//! its row and is in none of these is lost; only synchronous replication excludes that. Its units and its key
//! are released.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use super::replay::Replayer;
use crate::metrics::Metrics;
use crate::order::{Ended, LaneSet, Order, OrderId, OrderStatus, OrderUnits, SkuNumber};
use crate::pipeline::orders::lookup::{self, LookupError};
use crate::pipeline::orders::parking;
use crate::queue::OrderQueue;
use crate::state::State;
use crate::state::effects::Row;
use crate::state::stock::Sku;
use crate::store::StoreError;
use crate::store::batch::BatchWriter;
use crate::store::postgres::{
    Database, NodeLease, draws, order_log, orders, replication, transitions,
};
use crate::sync::spawn_blocking;

/// Interval between two comparisons of batch numbers, besides those of the workers.
const CHECK: Duration = Duration::from_secs(2);
/// Pause between two looks for missing orders: an order being placed at the first is in memory or a row at the
/// second.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Orders read and restored at once.
const PART: usize = 20_000;

/// The number of each worker's last committed batch, and a signal for a worker that finds a lower number in the
/// database.
#[derive(Debug)]
pub struct Watermarks {
    committed: Box<[AtomicI64]>,
    lost: Notify,
    /// Number of completed restores.
    restores: AtomicU64,
    /// The server's timeline, while no commit of it is known to be missing.
    whole: Mutex<Option<String>>,
}

impl Watermarks {
    /// Watermarks of `workers` workers.
    pub fn new(workers: usize) -> Self {
        Watermarks {
            committed: (0..workers).map(|_| AtomicI64::new(0)).collect(),
            lost: Notify::new(),
            restores: AtomicU64::new(0),
            whole: Mutex::new(None),
        }
    }

    /// The timeline of a server on which no commit is missing; `None` while a restore is due.
    pub fn whole_timeline(&self) -> Option<String> {
        self.whole.lock().clone()
    }

    /// Notes the server's timeline, on which no commit is missing; `None`: a restore is due.
    pub fn set_whole(&self, timeline: Option<String>) {
        *self.whole.lock() = timeline;
    }

    /// Number of completed restores since the start.
    pub fn restores(&self) -> u64 {
        self.restores.load(Ordering::Acquire)
    }

    /// Notes that what was lost is restored, on the server of this timeline.
    fn restored(&self, timeline: Option<String>) {
        self.set_whole(timeline);
        self.restores.fetch_add(1, Ordering::AcqRel);
    }

    /// Number of workers.
    pub fn workers(&self) -> usize {
        self.committed.len()
    }

    /// Records a worker's last committed batch.
    pub fn note(&self, worker: usize, batch: i64) {
        if let Some(committed) = self.committed.get(worker) {
            committed.store(batch, Ordering::Release);
        }
    }

    /// Reports that a worker found its batches lost.
    pub fn report_lost(&self) {
        self.lost.notify_one();
    }

    fn all(&self) -> Vec<i64> {
        self.committed
            .iter()
            .map(|committed| committed.load(Ordering::Acquire))
            .collect()
    }

    /// Lowers a worker's number from `from` to `to`, unless the worker has committed meanwhile.
    fn lower(&self, worker: usize, from: i64, to: i64) {
        if let Some(committed) = self.committed.get(worker) {
            let _ = committed.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}

/// Detects lost commits and restores the orders that are known.
pub struct Restorer {
    /// The state in memory.
    pub state: Arc<State>,
    /// The order queue.
    pub queue: Arc<dyn OrderQueue>,
    /// The database.
    pub database: Database,
    /// The lease of this process.
    pub lease: NodeLease,
    /// The last committed batch of each worker.
    pub watermarks: Arc<Watermarks>,
    /// The metrics.
    pub metrics: Metrics,
    /// Maximum of rows in one write.
    pub rows_max: usize,
}

impl Restorer {
    /// Runs until the future is dropped.
    pub async fn watch(self) {
        let shard = i16::try_from(self.watermarks.workers()).unwrap_or(i16::MAX);
        let writer = BatchWriter::new(self.database.clone(), self.lease, shard);
        let mut replayer = Replayer::new(self.database.clone(), writer, self.rows_max);
        let mut timeline = self.watermarks.whole_timeline();
        let mut kept = Vec::new();
        loop {
            let told = tokio::select! {
                biased;
                () = self.watermarks.lost.notified() => true,
                () = tokio::time::sleep(CHECK) => false,
            };
            // Not short-circuited: each check also records what it has seen.
            let promoted = self.was_promoted(&mut timeline).await;
            if !(self.some_are_lost().await || promoted || told) {
                if let Err(error) = self.release_kept(&mut kept).await {
                    tracing::warn!(reason = %error, "lost orders could not be released yet; retrying");
                }
                continue;
            }
            self.watermarks.set_whole(None);
            let before = replayer.applied();
            match self.restore(&mut replayer).await {
                Ok(waited_for) => {
                    kept = waited_for;
                    self.watermarks.restored(timeline.clone());
                    let after = replayer.applied();
                    let written = after.written - before.written;
                    self.metrics.orders_restored.inc_by(written);
                    tracing::warn!(
                        written,
                        present = after.present - before.present,
                        refused = after.refused - before.refused,
                        parked = after.parked - before.parked,
                        "restored the orders that the database had lost and this process still knew"
                    );
                }
                Err(error) if error.is_final() => {
                    self.state.poison.set(error.to_string());
                    return;
                }
                Err(error) => {
                    tracing::error!(reason = %error, "the database has lost commits, and restoring their orders failed; retrying");
                    self.watermarks.report_lost();
                    tokio::time::sleep(CHECK).await;
                }
            }
        }
    }

    /// Whether a standby was promoted. Even with every batch it may lack cancellations, which have no number.
    async fn was_promoted(&self, timeline: &mut Option<String>) -> bool {
        let Ok(now) = replication::timeline(&self.database).await else {
            return false;
        };
        match timeline.replace(now.clone()) {
            Some(before) if before != now => {
                self.watermarks.set_whole(None);
                tracing::warn!(before, now, "the database was failed over to a standby");
                true
            }
            _ => false,
        }
    }

    /// Whether the database has a lower batch number than it acknowledged to a worker. An idle worker would not
    /// find out by itself.
    async fn some_are_lost(&self) -> bool {
        // Read first: a later commit only raises the database's number.
        let known = self.watermarks.all();
        let Ok(batches) = order_log::worker_batches(&self.database, self.lease).await else {
            return false;
        };
        let found: HashMap<usize, i64> = batches
            .into_iter()
            .filter_map(|(shard, batch)| Some((usize::try_from(shard).ok()?, batch)))
            .collect();
        let mut lost = false;
        for (worker, known) in known.into_iter().enumerate() {
            let batch = found.get(&worker).copied().unwrap_or(0);
            if batch < known {
                tracing::error!(
                    worker,
                    lost = known - batch,
                    "the database has lost committed batches of this worker; restoring their orders"
                );
                self.watermarks.lower(worker, known, batch);
                lost = true;
            }
        }
        lost
    }

    /// Ends again, in the same way, each ended order that the database has as payable or waiting: its units may belong to
    /// another order by now, and the stock does not suffice for both.
    async fn end_again(&self) -> Result<(), StoreError> {
        let state = Arc::clone(&self.state);
        let ended = spawn_blocking(move || state.buyers.ended_orders()).await;
        let mut ended = ended.map_err(panicked)?;
        ended.sort_unstable_by_key(|(id, _)| *id);
        let mut again = 0;
        for part in ended.chunks(PART) {
            let ids: Vec<OrderId> = part.iter().map(|(id, _)| *id).collect();
            let open: HashSet<_> = orders::open_among(&self.database, &ids)
                .await?
                .into_iter()
                .collect();
            for (id, how) in part.iter().filter(|(id, _)| open.contains(id)) {
                transitions::end(&self.database, self.lease, *id, *how).await?;
                again += 1;
            }
        }
        if again > 0 {
            tracing::warn!(
                orders = again,
                "the database had lost the end of orders; they are cancelled, expired or failed again"
            );
        }
        Ok(())
    }

    /// Returns the lost orders that a payment waits for.
    async fn restore(&self, replayer: &mut Replayer) -> Result<Vec<OrderUnits>, StoreError> {
        self.end_again().await?;
        replayer.forget_faults();
        let (parts, mut read) = mpsc::channel::<Vec<Order>>(1);
        let (queue, mut recent) = (Arc::clone(&self.queue), self.state.recent_orders.all());
        // Sorted, so that each part is a short range of ids.
        recent.sort_by_key(|pending| pending.order.id);
        let reading = spawn_blocking(move || {
            let mut part = Vec::new();
            let mut each = |order: Order| {
                part.push(order);
                if part.len() >= PART {
                    // If the receiver is gone, the process is ending.
                    let _ = parts.blocking_send(std::mem::take(&mut part));
                }
            };
            for pending in recent {
                each(pending.order.clone());
            }
            let durable = queue.durable();
            let result = durable.map_or(Ok(()), |durable| durable.read_all(&mut each));
            let _ = parts.blocking_send(part);
            result
        });
        while let Some(part) = read.recv().await {
            let part: Vec<(Order, OrderStatus)> = part
                .into_iter()
                .filter_map(|order| Some((self.expected_status(&order)?, order)))
                .map(|(status, order)| (order, status))
                .collect();
            let part = deduplicated(part);
            replayer.apply(&part).await?;
            let payable = part
                .iter()
                .filter(|(_, status)| *status == OrderStatus::PendingPayment);
            let until = payable.map(|(order, _)| (order.id, order.expires_at));
            self.state.expiry_index.note(until);
            for order in replayer.take_refused() {
                // A dead letter holds no units.
                let units = OrderUnits::of(&order);
                self.state.end_unpaid(&units, Ended::Failed, Row::Found);
            }
        }
        // Orders that ended while their rows were being restored.
        self.end_again().await?;
        self.wait_again().await?;
        // The database may have parked orders again, or have lost the fact that they were unparked.
        parking::recount(&self.state, &self.database, &self.metrics).await?;
        match reading.await {
            Ok(Ok(())) => self.release_lost().await,
            Ok(Err(error)) => Err(StoreError::Data(error.to_string())),
            Err(panic) => Err(panicked(panic)),
        }
    }

    /// Puts orders back on their lists whose assignment the database has lost: their rows wait, and memory has
    /// them as live and not on the list. Their units are kept for the list, so that whoever is first has them.
    async fn wait_again(&self) -> Result<(), StoreError> {
        let open =
            orders::open_below(&self.database, self.lease, OrderId::MAX, LaneSet::ALL).await?;
        let is_lost = |units: &&OrderUnits| {
            let known = self.state.buyers.find(&units.user_id, units.order_id);
            let is_in_flight = self.state.pending.get(units.order_id).is_some();
            let sku = self.state.catalogue.by_number(units.sku);
            let is_listed = sku.is_some_and(|sku| sku.waitlist().has(units.order_id));
            known.is_some_and(|known| known.is_live()) && !is_in_flight && !is_listed
        };
        let waiting = open.iter().filter(|open| open.waits());
        let again: Vec<&OrderUnits> = waiting.map(|open| &open.units).filter(is_lost).collect();
        let skus: BTreeSet<SkuNumber> = again.iter().map(|units| units.sku).collect();
        for sku in skus {
            let sku = self.state.catalogue.by_number(sku);
            let is_drawn = |sku: &Arc<Sku>| sku.draw().is_some_and(|draw| draw.is_drawn());
            if let Some(sku) = sku.filter(is_drawn) {
                // An entry that had its units when this process started has no place in memory.
                let places = draws::waiting_places(&self.database, sku.number).await?;
                sku.waitlist().take_places(places);
            }
        }
        for units in &again {
            self.state.waits_again(units);
        }
        if !again.is_empty() {
            tracing::error!(
                orders = again.len(),
                "the database has lost the assignment of units to orders; they wait again, in their places, and are \
                 assigned units anew"
            );
        }
        Ok(())
    }

    /// Releases the units and keys of live orders that are neither in the database nor in flight nor in the
    /// journal. Returns those that a payment waits for: its receipt may recover them.
    async fn release_lost(&self) -> Result<Vec<OrderUnits>, StoreError> {
        let state = Arc::clone(&self.state);
        let live = spawn_blocking(move || state.buyers.live_orders()).await;
        let absent = orders::absent_among(&self.database, &live.map_err(panicked)?).await?;
        if absent.is_empty() {
            return Ok(Vec::new());
        }
        tokio::time::sleep(SECOND_LOOK).await;
        let nowhere = self.nowhere(absent).await?;
        let state = Arc::clone(&self.state);
        let known = spawn_blocking(move || state.buyers.live_among(&nowhere));
        let lost = known.await.map_err(panicked)?;
        let lost = lost.into_iter().map(|(user_id, order)| OrderUnits {
            order_id: order.order_id,
            user_id,
            sku: order.sku,
            quantity: order.quantity.get(),
        });
        Ok(self.release(lost.collect()))
    }

    /// Releases those of the lost orders whose payment was decided and did not recover them.
    async fn release_kept(&self, kept: &mut Vec<OrderUnits>) -> Result<(), StoreError> {
        let is_decided = |units: &&OrderUnits| !self.state.orphans.waits_for(units.order_id);
        let decided: Vec<OrderId> = kept
            .iter()
            .filter(is_decided)
            .map(|units| units.order_id)
            .collect();
        if decided.is_empty() {
            return Ok(());
        }
        let absent = orders::absent_among(&self.database, &decided).await?;
        let nowhere = self.nowhere(absent).await?;
        let (mut lost, waited_for): (Vec<_>, Vec<_>) = kept
            .drain(..)
            .partition(|units| decided.contains(&units.order_id));
        lost.retain(|units| {
            let known = self.state.buyers.find(&units.user_id, units.order_id);
            nowhere.contains(&units.order_id) && known.is_some_and(|known| known.is_live())
        });
        *kept = self.release(lost);
        kept.extend(waited_for);
        Ok(())
    }

    /// Those of the orders without a row that are not in flight or in the journal either. An order that has left memory
    /// meanwhile is a row by now, or was abandoned.
    async fn nowhere(&self, absent: Vec<OrderId>) -> Result<HashSet<OrderId>, StoreError> {
        let (state, queue) = (Arc::clone(&self.state), Arc::clone(&self.queue));
        let settled = spawn_blocking(move || lookup::not_in_flight(&state, &*queue, absent));
        let settled = settled
            .await
            .map_err(panicked)?
            .map_err(LookupError::from)?;
        let nowhere = orders::absent_among(&self.database, &settled).await?;
        Ok(nowhere.into_iter().collect())
    }

    /// Releases orders of which no copy is left. Returns those that a payment waits for.
    fn release(&self, mut lost: Vec<OrderUnits>) -> Vec<OrderUnits> {
        let kept = lost.extract_if(.., |units| self.state.orphans.waits_for(units.order_id));
        let kept = kept.collect();
        lost.iter().for_each(|units| self.state.lost(units));
        if !lost.is_empty() {
            tracing::error!(
                orders = lost.len(),
                "the database has lost orders of which no copy is left: their units and keys are free again; only synchronous \
                 replication keeps every commit (synchronous_standby_names)"
            );
        }
        kept
    }

    /// The status that an order's row must have. `None`: the order is in flight, and its worker writes it.
    fn expected_status(&self, order: &Order) -> Option<OrderStatus> {
        if self.state.pending.get(order.id).is_some() {
            return None;
        }
        let sku = self.state.catalogue.by_number(order.sku);
        if sku.is_some_and(|sku| sku.waitlist().has(order.id)) {
            return Some(OrderStatus::Waitlisted);
        }
        let known = self.state.buyers.find(&order.user_id, order.id);
        Some(match known.map(|known| known.ended) {
            // Its units are held in memory, so they must be held in the database. An order that waited when it was
            // recorded waits again, see `wait_again`.
            Some(None) => order.status_in_time(),
            Some(Some(ended)) => ended.status(),
            // The order has left the idempotency window, long after its payment deadline.
            None => OrderStatus::Expired,
        })
    }
}

/// The error of a task that panicked.
pub(super) fn panicked(panic: tokio::task::JoinError) -> StoreError {
    StoreError::Data(panic.to_string())
}

fn deduplicated(mut orders: Vec<(Order, OrderStatus)>) -> Vec<(Order, OrderStatus)> {
    let id = |entry: &(Order, OrderStatus)| -> OrderId { entry.0.id };
    orders.sort_by_key(id);
    orders.dedup_by_key(|entry| id(entry));
    orders
}
