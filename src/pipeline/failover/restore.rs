//! A database that comes back without commits it had acknowledged, as after a failover to a
//! standby that lagged: it is noticed by the batch numbers and by the server's timeline, and what this process still knows is
//! written again.
//!
//! What it knows: the orders of the journal's segments that are still there, and the orders of a
//! moment ago that are kept to answer those who ask again, and how orders of the idempotency
//! window have ended. An order that waited for its row and is in none of them is gone; only
//! synchronous replication excludes that. Its units and its key are released.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use super::replay::Replayer;
use crate::metrics::Metrics;
use crate::order::{Ended, Order, OrderId, OrderStatus, OrderUnits};
use crate::pipeline::admin::pruning::PrunedBelow;
use crate::pipeline::orders::lookup::{self, LookupError};
use crate::pipeline::orders::parking;
use crate::queue::OrderQueue;
use crate::queue::journal::JournalQueue;
use crate::state::State;
use crate::state::effects::Row;
use crate::store::StoreError;
use crate::store::batch::BatchWriter;
use crate::store::postgres::{Database, NodeLease};

/// How often the batch numbers are compared where no worker has done it.
const CHECK: Duration = Duration::from_secs(2);
/// Pause between two looks for orders that are nowhere: one that is being placed is in memory or a row
/// by then.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Orders that are read and written again at once.
const PART: usize = 20_000;

/// The number of each worker's last batch that is known to be committed, and a bell for those who
/// find that the database has a lower one.
#[derive(Debug)]
pub struct Watermarks {
    committed: Box<[AtomicI64]>,
    lost: Notify,
    /// How often what was lost has been brought back.
    restores: AtomicU64,
}

impl Watermarks {
    /// Watermarks of so many workers.
    pub fn new(workers: usize) -> Self {
        Watermarks {
            committed: (0..workers).map(|_| AtomicI64::new(0)).collect(),
            lost: Notify::new(),
            restores: AtomicU64::new(0),
        }
    }

    /// How often what a failover had lost has been brought back.
    pub fn restores(&self) -> u64 {
        self.restores.load(Ordering::Acquire)
    }

    /// Workers.
    pub fn workers(&self) -> usize {
        self.committed.len()
    }

    /// Notes a worker's last batch.
    pub fn note(&self, worker: usize, batch: i64) {
        if let Some(committed) = self.committed.get(worker) {
            committed.store(batch, Ordering::Release);
        }
    }

    /// A worker has found its batches gone.
    pub fn report_lost(&self) {
        self.lost.notify_one();
    }

    fn all(&self) -> Vec<i64> {
        self.committed
            .iter()
            .map(|committed| committed.load(Ordering::Acquire))
            .collect()
    }

    /// Takes a lower number for granted, unless the worker has gone on meanwhile.
    fn lower(&self, worker: usize, from: i64, to: i64) {
        if let Some(committed) = self.committed.get(worker) {
            let _ = committed.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}

/// Notices lost commits and makes good what it can.
pub struct Restorer {
    /// The state in memory.
    pub state: Arc<State>,
    /// Where orders wait.
    pub queue: Arc<dyn OrderQueue>,
    /// The same, if it is a journal.
    pub journal: Option<Arc<JournalQueue>>,
    /// The database.
    pub database: Database,
    /// Who this process is.
    pub lease: NodeLease,
    /// What the workers have committed.
    pub watermarks: Arc<Watermarks>,
    /// Orders with smaller ids are missing because they were deleted.
    pub pruned_below: PrunedBelow,
    /// What is counted.
    pub metrics: Metrics,
    /// Most rows at once.
    pub rows_max: usize,
}

impl Restorer {
    /// Watches until the future is dropped.
    pub async fn watch(self) {
        let shard = i16::try_from(self.watermarks.workers()).unwrap_or(i16::MAX);
        let writer = BatchWriter::new(self.database.clone(), self.lease, shard);
        let mut replayer = Replayer::new(self.database.clone(), writer, self.rows_max);
        let mut timeline = None;
        loop {
            let told = tokio::select! {
                () = self.watermarks.lost.notified() => true,
                () = tokio::time::sleep(CHECK) => false,
            };
            // Not short-circuited: each look also notes what it has seen.
            let promoted = self.was_promoted(&mut timeline).await;
            if !(self.some_are_lost().await || promoted || told) {
                continue;
            }
            let before = replayer.applied();
            match self.restore(&mut replayer).await {
                Ok(()) => {
                    let after = replayer.applied();
                    let written = after.written - before.written;
                    self.metrics.orders_restored.inc_by(written);
                    tracing::warn!(
                        written,
                        present = after.present - before.present,
                        refused = after.refused - before.refused,
                        parked = after.parked - before.parked,
                        "wrote again what the database had lost and this process still knew"
                    );
                }
                Err(error) if error.is_final() => {
                    self.state.poison.set(error.to_string());
                    return;
                }
                Err(error) => {
                    tracing::error!(reason = %error, "could not write again what the database has lost; it is tried again");
                    self.watermarks.report_lost();
                    tokio::time::sleep(CHECK).await;
                }
            }
        }
    }

    /// Whether a standby has taken over. It may lack cancellations, which have no number, where it
    /// has every batch.
    async fn was_promoted(&self, timeline: &mut Option<String>) -> bool {
        let Ok(now) = self.database.timeline().await else {
            return false;
        };
        match timeline.replace(now.clone()) {
            Some(before) if before != now => {
                tracing::warn!(before, now, "the database was failed over to a standby");
                true
            }
            _ => false,
        }
    }

    /// Whether the database has a lower batch number than a worker was told. An idle worker would
    /// not find out by itself.
    async fn some_are_lost(&self) -> bool {
        // Read first: what is committed afterwards only makes the database's number higher.
        let known = self.watermarks.all();
        let Ok(batches) = self.database.batches(self.lease).await else {
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
                    "the database has lost batches that it had committed"
                );
                self.watermarks.lower(worker, known, batch);
                lost = true;
            }
        }
        lost
    }

    /// Ends again, as it ended, each order that the database believes to be payable: its units
    /// may be somebody else's by now, and both together would not fit.
    async fn end_again(&self) -> Result<(), StoreError> {
        let state = Arc::clone(&self.state);
        let ended = tokio::task::spawn_blocking(move || state.buyers.ended_orders()).await;
        let ended = ended.map_err(|panic| StoreError::Data(panic.to_string()))?;
        let mut again = 0;
        for part in ended.chunks(PART) {
            let ids: Vec<OrderId> = part.iter().map(|(id, _)| *id).collect();
            let payable: HashSet<_> = self
                .database
                .payable_among(&ids)
                .await?
                .into_iter()
                .collect();
            for (id, how) in part.iter().filter(|(id, _)| payable.contains(id)) {
                self.database.end_order(self.lease, *id, *how).await?;
                again += 1;
            }
        }
        if again > 0 {
            tracing::warn!(
                orders = again,
                "ended orders again whose end the database had forgotten"
            );
        }
        Ok(())
    }

    async fn restore(&self, replayer: &mut Replayer) -> Result<(), StoreError> {
        self.end_again().await?;
        replayer.forget_faults();
        let (parts, mut read) = mpsc::channel::<Vec<Order>>(1);
        let (journal, mut recent) = (self.journal.clone(), self.state.recent_orders.all());
        // So that each part is a short range of ids.
        recent.sort_by_key(|pending| pending.order.id);
        let pruned_below = self.pruned_below.load(Ordering::Acquire);
        let reading = tokio::task::spawn_blocking(move || {
            let mut part = Vec::new();
            let mut each = |order: Order| {
                if order.id.as_i64() < pruned_below {
                    return;
                }
                part.push(order);
                if part.len() >= PART {
                    // Where nobody listens any more the process ends.
                    let _ = parts.blocking_send(std::mem::take(&mut part));
                }
            };
            for pending in recent {
                each(pending.order.clone());
            }
            let result = journal.map_or(Ok(()), |journal| journal.read_all(&mut each));
            let _ = parts.blocking_send(part);
            result
        });
        while let Some(part) = read.recv().await {
            let part: Vec<(Order, OrderStatus)> = part
                .into_iter()
                .filter_map(|order| Some((self.settled_status(&order)?, order)))
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
                // A dead letter now, which holds nothing.
                let units = OrderUnits::of(&order);
                self.state.end_unpaid(&units, Ended::Failed, Row::Found);
            }
        }
        // Orders that ended while their rows were being brought back.
        self.end_again().await?;
        // What was parked again, or is parked again because the database has forgotten that it was not.
        parking::recount(&self.state, &self.database, &self.metrics).await?;
        match reading.await {
            Ok(Ok(())) => {
                self.release_lost().await?;
                self.watermarks.restores.fetch_add(1, Ordering::AcqRel);
                Ok(())
            }
            Ok(Err(error)) => Err(StoreError::Data(error.to_string())),
            Err(panic) => Err(StoreError::Data(panic.to_string())),
        }
    }

    /// Releases the units and keys of live orders that are nowhere any more: neither in the database, nor
    /// in flight, nor in the journal. One that a payment waits for is recovered from its receipt.
    async fn release_lost(&self) -> Result<(), StoreError> {
        let panicked = |panic: tokio::task::JoinError| StoreError::Data(panic.to_string());
        let state = Arc::clone(&self.state);
        let live = tokio::task::spawn_blocking(move || state.buyers.live_orders()).await;
        let absent = self.database.absent_among(&live.map_err(panicked)?).await?;
        if absent.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(SECOND_LOOK).await;
        let (state, queue) = (Arc::clone(&self.state), Arc::clone(&self.queue));
        let settled =
            tokio::task::spawn_blocking(move || lookup::not_in_flight(&state, &*queue, absent));
        let settled = settled
            .await
            .map_err(panicked)?
            .map_err(LookupError::from)?;
        // Whatever has left memory since the first look is a row by now, or was given up.
        let nowhere: HashSet<OrderId> = self
            .database
            .absent_among(&settled)
            .await?
            .into_iter()
            .collect();
        let state = Arc::clone(&self.state);
        let known = tokio::task::spawn_blocking(move || state.buyers.live_among(&nowhere));
        let mut released = 0;
        for (user_id, order) in known.await.map_err(panicked)? {
            if self.state.orphans.waits_for(order.order_id) {
                continue;
            }
            self.state.lost(&OrderUnits {
                order_id: order.order_id,
                user_id,
                sku: order.sku,
                quantity: order.quantity.get(),
            });
            released += 1;
        }
        if released > 0 {
            tracing::error!(
                orders = released,
                "the database has lost orders that nothing else knows of: their units and keys are free again"
            );
        }
        Ok(())
    }

    /// With which status an order has to be there; `None`: it is on its way, and its worker
    /// writes it.
    fn settled_status(&self, order: &Order) -> Option<OrderStatus> {
        if self.state.pending.get(order.id).is_some() {
            return None;
        }
        let known = self.state.buyers.find(&order.user_id, order.id);
        Some(match known.map(|known| known.ended) {
            // Its units are taken in memory, and so they have to be in the database.
            Some(None) => OrderStatus::PendingPayment,
            Some(Some(ended)) => ended.status(),
            // It has left the idempotency window, long after it could be paid.
            None => OrderStatus::Expired,
        })
    }
}

fn deduplicated(mut orders: Vec<(Order, OrderStatus)>) -> Vec<(Order, OrderStatus)> {
    let id = |entry: &(Order, OrderStatus)| -> OrderId { entry.0.id };
    orders.sort_by_key(id);
    orders.dedup_by_key(|entry| id(entry));
    orders
}
