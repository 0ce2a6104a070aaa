//! A worker: takes orders from the queue, writes them as one batch and settles each order.
//!
//! Batches form by themselves: while one is being written, the next gathers in the queue. An idle system writes
//! each order at once; a busy one writes thousands together. [`super::worker_pool`] decides which workers
//! write.
//!
//! Failures of a batch:
//!
//! * Transient failure: the batch stays at the head of the line and is retried whole, with jittered backoff,
//!   until the database has accepted it.
//! * Connection lost around COMMIT: the batch's number in the worker's row of `writer` tells whether it is
//!   committed (`store::fenced`); it is settled or retried accordingly.
//! * Refused row: found by halving the batch; this order alone becomes a dead letter.
//! * Refused counter: the sale of the SKU is paused. Its orders that are, or may be, in a journal are parked in
//!   the database until the counters are repaired ([`super::parking`]); those past
//!   their payment deadline are written as expired. Waiting orders, which were not acknowledged, are given back.
//!   Other SKUs' orders continue.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::apply::{How, Isolated, Parts, Refusal};
use super::worker_pool::{PrimaryGuard, WorkerPool, has_enough_for_two, linger};
use crate::backoff::Backoff;
use crate::clock;
use crate::faults::crash_point;
use crate::metrics::Metrics;
use crate::order::{Order, OrderStatus, SkuNumber, UnixMillis};
use crate::pipeline::WakeAll;
use crate::pipeline::failover::restore::Watermarks;
use crate::queue::{Batch, OrderQueue};
use crate::spans::{ClaimedOrder, Spans};
use crate::state::State;
use crate::state::pending::PendingOrder;
use crate::state::stock::Parking;
use crate::store::StoreError;
use crate::store::WriteError;
use crate::store::batch::{BatchWriter, Refused};

type Orders = Vec<Arc<PendingOrder>>;

/// Pauses between attempts to write a batch.
const RETRY: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));

/// Reason why a worker ended before its queue did.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// This process may not write any more.
    #[error(transparent)]
    Fatal(#[from] StoreError),
    /// The drain's deadline passed; the remaining orders are settled as unwritten.
    #[error("stopped at the drain's deadline with {0} orders unwritten")]
    Cut(usize),
}

/// A worker's slot among the others of its queue.
pub struct WorkerSlot {
    /// Its number; 0 is the primary worker, which never waits for a request.
    pub shard: usize,
    /// The last committed batch of each worker.
    pub watermarks: Arc<Watermarks>,
    /// The pool through which workers request help.
    pub pool: Arc<WorkerPool>,
}

/// One worker.
pub struct Worker {
    writer: BatchWriter,
    queue: Arc<dyn OrderQueue>,
    state: Arc<State>,
    wake_all: WakeAll,
    metrics: Metrics,
    rows_max: usize,
    /// True once the worker has to stop even if the database does not answer.
    cut: watch::Receiver<bool>,
    commits_lost: u64,
    slot: WorkerSlot,
    /// If requests are traced.
    spans: Option<Spans>,
    /// Held by the primary worker; however it ends, the others then need no request.
    _primary: Option<PrimaryGuard>,
}

/// The database's decision on a part of a batch.
enum Decided {
    /// Written; true for each order that is written as expired.
    Written(Vec<bool>),
    /// Parked.
    Parked,
    /// A row or a counter in it is refused.
    Refused(Refusal),
}

impl Worker {
    /// The worker in `slot` of `queue` that writes through `writer`, at most `rows_max` orders at
    /// once.
    #[allow(
        clippy::too_many_arguments,
        reason = "each is a part of the wiring, named once in `app`"
    )]
    pub fn new(
        writer: BatchWriter,
        slot: WorkerSlot,
        queue: Arc<dyn OrderQueue>,
        state: Arc<State>,
        wake_all: WakeAll,
        metrics: Metrics,
        rows_max: usize,
        cut: watch::Receiver<bool>,
    ) -> Self {
        Worker {
            writer,
            queue,
            state,
            wake_all,
            metrics,
            rows_max,
            cut,
            commits_lost: 0,
            _primary: (slot.shard == 0).then(|| PrimaryGuard::of(&slot.pool)),
            slot,
            spans: None,
        }
    }

    /// The same with requests traced.
    pub fn with_spans(self, spans: Option<Spans>) -> Self {
        Worker { spans, ..self }
    }

    /// Runs until the queue is closed and empty, or `cut` turns true.
    ///
    /// # Errors
    /// [`WorkerError`]; every claimed order is settled all the same, except those of a batch that may or may
    /// not have been committed.
    pub async fn run(mut self) -> Result<(), WorkerError> {
        self.work().await
    }

    async fn work(&mut self) -> Result<(), WorkerError> {
        let queue = Arc::clone(&self.queue);
        let pool = Arc::clone(&self.slot.pool);
        let mut cut = self.cut.clone();
        tokio::select! {
            biased;
            () = async { drop(cut.wait_for(|cut| *cut).await) } => {}
            connected = pool.request_help_while(self.writer.connect_ahead()) => {
                // Any other failure is reported and retried with the first batch.
                if let Err(WriteError::Fatal(error)) = connected {
                    return Err(error.into());
                }
            }
        }
        loop {
            let rows_max = self.state.throughput.batch_rows(self.rows_max);
            let taken = tokio::select! {
                biased;
                // Waiting clients learn that nothing was written; orders in the journal are left to the next
                // process.
                () = async { drop(cut.wait_for(|cut| *cut).await) } => break,
                taken = self.take(&*queue, rows_max) => taken,
            };
            let Some(taken) = taken else { break };
            self.note_taken(taken.orders(), rows_max);
            let is_all = taken.orders().len() < rows_max;
            let claimed: Orders = taken
                .orders()
                .iter()
                .filter(|order| order.slot.claim())
                .map(Arc::clone)
                .collect();
            // From here on this worker settles each of them, whatever happens.
            taken.ack();
            if claimed.is_empty() {
                // All of it was abandoned: as far as can be seen, the queue is served again.
                self.state.progress.decided();
            }
            crash_point("worker.claimed");
            if has_enough_for_two(&*queue, rows_max) {
                pool.request_help();
            }
            let nobody_waits = is_all && claimed.iter().all(|order| order.slot.is_durable());
            let started = clock::now();
            let (rows, traced) = (claimed.len(), self.begin_traces(&claimed));
            pool.request_help_while(self.write(claimed)).await?;
            pool.note_batch(clock::since(started));
            traced.iter().for_each(|order| order.decided(started, rows));
            if nobody_waits && self.slot.shard == 0 {
                linger(&*queue, rows_max).await;
            }
        }
        Ok(())
    }

    /// The sampled orders of a batch. Their rows get their `traceparent`.
    fn begin_traces(&mut self, claimed: &Orders) -> Vec<ClaimedOrder> {
        let Some(spans) = &self.spans else {
            return Vec::new();
        };
        let traced = spans.claimed(claimed.iter().map(|pending| pending.order.id));
        let rows = traced.iter().map(|order| (order.id, order.traceparent()));
        self.writer.set_traceparents(rows.collect());
        traced
    }

    /// Waits for a request (unless primary) and for the first order, then takes a batch.
    async fn take(&self, queue: &dyn OrderQueue, rows_max: usize) -> Option<Batch> {
        if self.slot.shard > 0 && !has_enough_for_two(queue, rows_max) {
            self.slot.pool.help_requested().await;
        }
        queue.take(rows_max).await
    }

    /// Writes or parks every order of `batch`, and settles it.
    async fn write(&mut self, batch: Orders) -> Result<(), WorkerError> {
        let mut parts = Parts::default();
        if self.state.catalogue.has_faults() {
            self.set_faulted_aside(batch, &mut parts);
        } else {
            parts.push(How::Write, batch);
        }
        while let Some((how, part)) = parts.pop() {
            let parking = match how {
                How::Write => None,
                How::Park => match self.begin_parking(&part) {
                    Some(parking) => Some(parking),
                    // The counters are accepted again.
                    None => {
                        parts.push(How::Write, part);
                        continue;
                    }
                },
            };
            let decided = match how {
                How::Write => self.write_until_decided(&part).await,
                How::Park => self.park_until_decided(&part).await,
            };
            let decided = match decided {
                Ok(decided) => decided,
                Err(error) => {
                    // Orders that may have been committed stay claimed: their clients get `undecided`, which is
                    // the truth.
                    if !self.writer.outcome_unknown() {
                        parts.push(how, part);
                    }
                    parts.into_rest().for_each(|part| self.give_up(part));
                    return Err(error);
                }
            };
            if let Err((rest, error)) = self
                .apply_decision(how, part, decided, parking, &mut parts)
                .await
            {
                self.give_up(rest);
                parts.into_rest().for_each(|part| self.give_up(part));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Settles a decided part, or puts a refused one back in smaller parts.
    async fn apply_decision(
        &mut self,
        how: How,
        part: Orders,
        decided: Decided,
        parking: Option<Parking>,
        parts: &mut Parts<Arc<PendingOrder>>,
    ) -> Result<(), (Orders, WorkerError)> {
        match decided {
            Decided::Written(expired) => {
                crash_point("worker.committed");
                self.settle_written(part, &expired);
            }
            Decided::Parked => {
                if let Some(parking) = parking {
                    parking.done(part.len() as u64);
                }
                self.settle_parked(&part);
            }
            Decided::Refused(refusal) => match parts.isolate(how, part, refusal) {
                None => {}
                Some(Isolated::Order {
                    order,
                    how,
                    sqlstate,
                    reason,
                }) => self.dead_letter(how, order, &sqlstate, &reason).await?,
                Some(Isolated::Sku {
                    sku,
                    orders,
                    reason,
                }) => {
                    self.note_fault(sku, &orders, &reason);
                    self.set_aside(orders, parts);
                }
            },
        }
        Ok(())
    }

    /// Takes the orders of faulted SKUs out of a batch, so that they do not delay the others.
    fn set_faulted_aside(&self, batch: Orders, parts: &mut Parts<Arc<PendingOrder>>) {
        let mut faulted: BTreeMap<SkuNumber, Orders> = BTreeMap::new();
        let mut sound = Orders::with_capacity(batch.len());
        for pending in batch {
            let sku = self.state.catalogue.by_number(pending.order.sku);
            if sku.is_some_and(|sku| sku.is_faulted()) {
                faulted.entry(pending.order.sku).or_default().push(pending);
            } else {
                sound.push(pending);
            }
        }
        for part in faulted.into_values() {
            self.set_aside(part, parts);
        }
        parts.push(How::Write, sound);
    }

    /// Sets aside orders of one SKU whose counters are refused: gives back unacknowledged orders, and leaves
    /// the others to be parked or, if they move no counter, to be written: as expired if too late, or as waiting.
    fn set_aside(&self, part: Orders, parts: &mut Parts<Arc<PendingOrder>>) {
        let now = self.state.ids.real_now();
        let (recorded, waiting): (Orders, Orders) = part
            .into_iter()
            .partition(|pending| pending.slot.is_recorded());
        if !waiting.is_empty() {
            self.settle(&waiting, State::unwritten);
        }
        let (uncounted, payable) = recorded
            .into_iter()
            .partition(|pending| pending.order.waits() || self.state.is_late(&pending.order, now));
        parts.push(How::Park, payable);
        parts.push(How::Write, uncounted);
    }

    fn note_fault(&self, sku: SkuNumber, part: &Orders, reason: &str) {
        let Some(sku) = self.state.catalogue.by_number(sku) else {
            return;
        };
        let units = part.iter().map(|pending| pending.order.quantity.get());
        let units = units.fold(0, u32::saturating_add);
        if self.state.catalogue.set_fault(&sku, reason, units) {
            tracing::error!(
                sku_id = %sku.id, reason, orders = part.len(),
                "the database refuses this SKU's counters: its sale is paused and its acknowledged orders are parked \
                 until the row in `sku` agrees with its orders again (see the audit)"
            );
        }
    }

    /// Begins parking orders of one SKU. `None`: the SKU has no fault.
    fn begin_parking(&self, part: &Orders) -> Option<Parking> {
        let sku = self.state.catalogue.by_number(part.first()?.order.sku)?;
        sku.fault().begin_parking()
    }

    async fn park_until_decided(&mut self, part: &Orders) -> Result<Decided, WorkerError> {
        let orders: Vec<&Order> = part.iter().map(|pending| &pending.order).collect();
        let mut backoff = RETRY;
        loop {
            let parked = self.writer.park(&orders).await;
            self.note_lost_commits();
            match parked {
                Ok(()) => {
                    self.note_committed();
                    return Ok(Decided::Parked);
                }
                Err(
                    WriteError::Row { sqlstate, reason } | WriteError::Counter { sqlstate, reason },
                ) => return Ok(Decided::Refused(Refusal::Row { sqlstate, reason })),
                Err(WriteError::Fatal(error)) => return Err(error.into()),
                Err(WriteError::Retry(error)) => {
                    self.pause(&mut backoff, orders.len(), &error).await?;
                }
            }
        }
    }

    /// Retries the same orders until the database has decided on them.
    async fn write_until_decided(&mut self, part: &Orders) -> Result<Decided, WorkerError> {
        let (worker, workers) = (self.slot.shard, self.slot.watermarks.workers());
        self.state.throughput.begin(worker, workers, part.len());
        let decided = self.try_until_decided(part).await;
        self.state.throughput.end(worker);
        decided
    }

    async fn try_until_decided(&mut self, part: &Orders) -> Result<Decided, WorkerError> {
        // Determined once: an attempt whose commit is in doubt is never repeated with other rows.
        let now = self.state.ids.real_now();
        let expired: Vec<bool> = part
            .iter()
            .map(|pending| pending.slot.is_recorded() && self.state.is_late(&pending.order, now))
            .collect();
        let orders: Vec<(&Order, OrderStatus)> = part
            .iter()
            .zip(&expired)
            .map(|(pending, expired)| {
                let status = if *expired {
                    OrderStatus::Expired
                } else {
                    pending.order.status_in_time()
                };
                (&pending.order, status)
            })
            .collect();
        let started = clock::now();
        let mut backoff = RETRY;
        loop {
            let attempted = clock::now();
            let result = self.writer.write_as(&orders).await;
            self.note_lost_commits();
            match result {
                Ok(()) => {
                    self.metrics.batches.inc();
                    self.metrics.rows_written.inc_by(orders.len() as u64);
                    self.metrics.batch_rows.observe(orders.len() as f64);
                    self.metrics
                        .batch_seconds
                        .observe(clock::since(started).as_secs_f64());
                    if backoff.attempts() > 0 {
                        tracing::info!(
                            rows = orders.len(),
                            attempts = backoff.attempts() + 1,
                            "a delayed batch is written"
                        );
                    }
                    self.note_committed();
                    self.state.progress.decided();
                    self.state
                        .throughput
                        .written(orders.len(), clock::since(attempted));
                    return Ok(Decided::Written(expired));
                }
                Err(WriteError::Row { sqlstate, reason }) => {
                    return Ok(Decided::Refused(Refusal::Row { sqlstate, reason }));
                }
                Err(WriteError::Counter { reason, .. }) => {
                    return Ok(Decided::Refused(Refusal::Counter { reason }));
                }
                Err(WriteError::Fatal(error)) => return Err(error.into()),
                Err(WriteError::Retry(error)) => {
                    let reason = if matches!(error, StoreError::Timeout { .. }) {
                        "timeout"
                    } else {
                        "transient"
                    };
                    self.metrics.batch_retries.count(reason);
                    self.pause(&mut backoff, orders.len(), &error).await?;
                }
            }
        }
    }

    /// Turns an order into a dead letter, unless it is a row after all.
    async fn dead_letter(
        &mut self,
        how: How,
        order: Arc<PendingOrder>,
        sqlstate: &str,
        reason: &str,
    ) -> Result<(), (Orders, WorkerError)> {
        let mut backoff = RETRY;
        let part = vec![Arc::clone(&order)];
        let refused = loop {
            match self.writer.refuse(&order.order, sqlstate, reason).await {
                Ok(refused) => break refused,
                Err(error) if error.is_final() => return Err((part, error.into())),
                Err(error) => {
                    if let Err(cut) = self.pause(&mut backoff, 1, &error).await {
                        return Err((part, cut));
                    }
                }
            }
        };
        match refused {
            Refused::AlreadyPresent if how == How::Park => self.settle_parked(&part),
            Refused::AlreadyPresent => self.settle_written(part, &[false]),
            Refused::DeadLettered => {
                tracing::error!(order_id = %order.order.id, sqlstate, reason, "the database refused an order; it is a dead letter now: retry or discard it at /admin/v1/dead-letters");
                self.metrics.dead_letters.inc();
                self.state.progress.decided();
                self.settle(&part, State::failed);
                if let Some(queue) = self.queue.durable() {
                    queue.settled(&part);
                }
            }
        }
        Ok(())
    }

    fn settle_parked(&self, part: &Orders) {
        self.metrics.orders_parked.add(part.len() as i64);
        self.state.progress.decided();
        self.settle(part, State::parked);
        if let Some(queue) = self.queue.durable() {
            queue.settled(part);
        }
    }

    fn settle_written(&self, part: Orders, expired: &[bool]) {
        let (mut payable, mut late) = (Orders::new(), Orders::new());
        if expired.contains(&true) {
            for (pending, expired) in part.into_iter().zip(expired) {
                if *expired { &mut late } else { &mut payable }.push(pending);
            }
        } else {
            payable = part;
        }
        let payable_until =
            |pending: &Arc<PendingOrder>| (pending.order.id, pending.order.expires_at);
        let has_time = |pending: &&Arc<PendingOrder>| !pending.order.waits();
        self.state
            .expiry_index
            .note(payable.iter().filter(has_time).map(payable_until));
        self.settle(&payable, State::persisted);
        self.settle(&late, State::expired);
        if let Some(queue) = self.queue.durable() {
            queue.settled(&payable);
            queue.settled(&late);
        }
    }

    fn settle(&self, part: &Orders, settle: impl Fn(&State, &Arc<PendingOrder>)) {
        let mut wakers = Vec::with_capacity(part.len());
        for pending in part {
            settle(&self.state, pending);
            pending.slot.take_wakers(|waker| wakers.push(waker));
        }
        (self.wake_all)(wakers);
    }

    fn give_up(&self, part: Orders) {
        if !part.is_empty() {
            tracing::warn!(
                orders = part.len(),
                "orders could not be written and are given up; the next start writes those that the order log has, the units of the others are free again"
            );
            self.settle(&part, State::unwritten);
        }
    }

    fn note_taken(&self, orders: &[Arc<PendingOrder>], rows_max: usize) {
        let full = orders.len() >= rows_max;
        let reason = if full { "full" } else { "idle" };
        self.metrics.batch_flushes.count(reason);
        if let Some(oldest) = orders.first() {
            let waited_ms = (UnixMillis::now().0 - oldest.order.created_at.0).max(0);
            self.metrics
                .queue_wait_seconds
                .observe(waited_ms as f64 / 1_000.0);
        }
    }

    fn note_committed(&self) {
        if let Some(batch) = self.writer.committed() {
            self.slot.watermarks.note(self.slot.shard, batch);
        }
    }

    fn note_lost_commits(&mut self) {
        let lost = self.writer.commits_lost();
        if lost > self.commits_lost {
            self.metrics.commits_lost.inc_by(lost - self.commits_lost);
            self.commits_lost = lost;
            self.note_committed();
            self.slot.watermarks.report_lost();
        }
    }

    /// Waits before the next attempt.
    async fn pause(
        &mut self,
        backoff: &mut Backoff,
        rows: usize,
        error: &StoreError,
    ) -> Result<(), WorkerError> {
        let wait = backoff.jittered_pause();
        self.state.progress.failed(&error.to_string());
        // Logs the first attempt and then every tenth, so an outage is not a line for each retry.
        if backoff.attempts() % 10 == 1 {
            tracing::warn!(rows, attempts = backoff.attempts(), reason = %error, "a batch could not be written yet; retrying");
        }
        tokio::select! {
            biased;
            () = tokio::time::sleep(wait) => Ok(()),
            _ = self.cut.wait_for(|cut| *cut) => Err(WorkerError::Cut(rows)),
        }
    }
}
