//! Expiry of orders that were not paid in time: their units return in the database and in memory within two
//! seconds of falling due, plus the time that an earlier backlog takes. A task and a connection of its own.
//!
//! `state::expiry_index` keeps the ids to look at and their times; "due" is by Millrace's own monotonic clock
//! (I10). A payment and an expiry lock the order's row: one wins, the other sees the result.
//!
//! ```text
//!   unpaid ──ranges──► look: so many rows ──overdue──► expire: so many orders
//!      ▲                     │ the rest of the range        │ rows that are locked
//!      └─────────────────────┴── noted again ◄──────────────┤
//!                                                           ▼ SKUs locked or refused
//!                                 deferred: by SKU, each with a time of its own
//! ```
//!
//! Progress is counted in rows read, whether or not any of them is overdue, so no range is too long; a step
//! that takes too long is made shorter. A SKU whose row is locked, or whose counters are refused, is deferred
//! by itself and takes turns with the others.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::settler::Settler;
use crate::backoff::Backoff;
use crate::clock;
use crate::faults::bug;
use crate::order::{IdRange, LaneSet, OrderId, SkuNumber, UnixMillis};
use crate::pipeline::cluster::held::hold;
use crate::state::expiry_index::{Due, Nearness, Ranges};
use crate::store::StoreError;
use crate::store::settlement::expiry::{self, Overdue};

/// Maximum of orders expired in one transaction.
const ORDERS_MAX: usize = 2_000;
/// Maximum of rows read in one step.
const ROWS_MAX: usize = 20_000;
/// Rows read in one step if the database is slow.
const ROWS_MIN: usize = 50;
/// Ranges read in one step.
const RANGES_MAX: usize = 24;
/// Target time of a step. A longer step halves the next one; one below a fifth doubles it.
const STEP: Duration = Duration::from_millis(100);
/// Interval between two looks for due orders.
const LOOK: Duration = Duration::from_millis(100);
/// Orders expire this many milliseconds after their deadline: payments that arrived before the deadline are
/// registered by then.
const GRACE_MS: u64 = 250;
/// Interval at which the lowest unpaid order id is stored for the next start.
const NOTE: Duration = Duration::from_secs(10);
/// Delay in milliseconds until an order is looked at again whose row was locked or that was paid in time.
const AGAIN_MS: u64 = 1_000;
/// Delay until a deferred SKU is retried: first and longest.
const DEFER: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// Orders of a deferred SKU are looked up one by one until there are too many ranges.
const DEFERRED: Nearness = Nearness {
    apart: 0,
    ranges_max: 1_024,
};

/// Ids in work.
#[derive(Debug, Default)]
struct Work {
    /// Not looked at yet.
    ranges: Ranges,
    /// Found overdue, to be expired.
    overdue: VecDeque<Overdue>,
}

impl Work {
    fn is_empty(&self) -> bool {
        self.ranges.is_empty() && self.overdue.is_empty()
    }

    fn least(&self) -> Option<OrderId> {
        let overdue = self.overdue.iter().map(|one| one.order_id);
        overdue.chain(self.ranges.least()).min()
    }
}

/// Work of a SKU whose row was locked or whose counters were refused.
#[derive(Debug)]
struct Deferred {
    work: Work,
    retry_at: Instant,
    backoff: Backoff,
}

/// The task.
pub struct Expiry {
    settler: Settler,
    /// `orders.idempotency_window_ms`.
    window_ms: u64,
    /// The ids that have fallen due, except those of deferred SKUs.
    work: Work,
    /// When the first of them fell due.
    since: Option<UnixMillis>,
    deferred: BTreeMap<SkuNumber, Deferred>,
    /// Whether the last step belonged to a deferred SKU.
    deferred_had_its_turn: bool,
    /// Whether SKUs are tried one by one, because the failure was not a lock on one of them.
    one_by_one: bool,
    /// Rows read in a step, adapted to the database's speed.
    rows: usize,
    /// Orders expired in a step, adapted likewise.
    orders: usize,
    noted: Option<(OrderId, Instant)>,
}

impl Expiry {
    /// The task, not yet running.
    pub fn new(settler: Settler, window_ms: u64) -> Self {
        Expiry {
            settler,
            window_ms,
            work: Work::default(),
            since: None,
            deferred: BTreeMap::new(),
            deferred_had_its_turn: false,
            one_by_one: false,
            rows: ROWS_MAX,
            orders: ORDERS_MAX,
            noted: None,
        }
    }

    /// Runs until the future is dropped or another process takes over.
    pub async fn run(mut self) {
        loop {
            let step = self.step().await;
            if !self.settler.rest(step, LOOK).await {
                return;
            }
        }
    }

    /// Does one look or one transaction. Returns true if there is more to do.
    async fn step(&mut self) -> Result<bool, StoreError> {
        let state = &self.settler.parts.state;
        let now = UnixMillis(state.ids.real_now().0 - GRACE_MS as i64);
        self.settler.forget_landed();
        self.take_due(now);
        self.note_backlog(now);
        if !self.deferred_had_its_turn
            && let Some(sku) = self.next_deferred()
        {
            self.deferred_had_its_turn = true;
            self.retry(sku, now).await?;
            return Ok(true);
        }
        self.deferred_had_its_turn = false;
        if !self.work.overdue.is_empty() {
            self.expire_part(now).await?;
        } else if !self.work.ranges.is_empty() {
            self.look(None, now).await?;
        } else {
            self.one_by_one = false;
            self.note_least().await;
            return Ok(self.next_deferred().is_some());
        }
        Ok(true)
    }

    /// Takes the ranges that have fallen due, up to the maximum of a step. They share a step, so a long range
    /// delays no other.
    fn take_due(&mut self, now: UnixMillis) {
        if self.work.is_empty() {
            self.since = None;
        }
        while self.work.ranges.len() < RANGES_MAX
            && let Some(Due { ids, since }) = self.settler.parts.state.expiry_index.take_due(now)
        {
            self.since = self.since.or(Some(since));
            // Ranges are not merged: no row between two of them is read.
            self.work.ranges.insert_range(ids, DEFERRED);
        }
    }

    fn note_backlog(&self, now: UnixMillis) {
        let next = self.settler.parts.state.expiry_index.next_due();
        let since = self.since.or(next).unwrap_or(now);
        let payments = &self.settler.parts.metrics.payments;
        let backlog_ms = (now.0 - since.0).max(0);
        payments
            .expiry_backlog_seconds
            .set(backlog_ms as f64 / 1_000.0);
        payments
            .expiry_deferred_skus
            .set(self.deferred.len() as i64);
    }

    fn work_of(&mut self, sku: Option<SkuNumber>) -> Option<&mut Work> {
        match sku {
            None => Some(&mut self.work),
            Some(sku) => self
                .deferred
                .get_mut(&sku)
                .map(|deferred| &mut deferred.work),
        }
    }

    /// Reads rows of the first ranges. Rows that were read are done with, found overdue or not.
    async fn look(&mut self, sku: Option<SkuNumber>, now: UnixMillis) -> Result<(), StoreError> {
        let rows = self.rows;
        let mut taken = Vec::new();
        let Some(work) = self.work_of(sku) else {
            return Ok(());
        };
        while taken.len() < RANGES_MAX
            && let Some(range) = work.ranges.pop_first()
        {
            taken.push(range);
        }
        let started = clock::now();
        let writer = match self.settler.plain_writer().await {
            Ok(writer) => writer,
            Err(error) => {
                self.put_back(sku, taken);
                return Err(error);
            }
        };
        match expiry::look_for_overdue(writer, &taken, rows, now, sku).await {
            Ok(looked) => {
                let payments = &self.settler.parts.metrics.payments;
                payments.expiry_rows.inc_by(looked.rows.unsigned_abs());
                self.rows = paced(self.rows, clock::since(started)).clamp(ROWS_MIN, ROWS_MAX);
                self.put_back(sku, looked.rest);
                if let Some(work) = self.work_of(sku) {
                    work.overdue.extend(looked.overdue);
                }
                Ok(())
            }
            Err(error) => {
                if error.is_overlong() {
                    self.rows = (self.rows / 4).max(ROWS_MIN);
                }
                self.put_back(sku, taken);
                Err(error)
            }
        }
    }

    fn put_back(&mut self, sku: Option<SkuNumber>, ranges: Vec<IdRange>) {
        if let Some(work) = self.work_of(sku) {
            for range in ranges {
                work.ranges.insert_range(range, DEFERRED);
            }
        }
    }

    /// Expires one part of the overdue orders.
    async fn expire_part(&mut self, now: UnixMillis) -> Result<(), StoreError> {
        self.defer_known();
        let Some(first) = self.work.overdue.front().copied() else {
            return Ok(());
        };
        let is_of_it = |one: &&Overdue| !self.one_by_one || one.sku == first.sku;
        let overdue = self.work.overdue.iter();
        let part: Vec<Overdue> = overdue
            .filter(is_of_it)
            .take(self.orders)
            .copied()
            .collect();
        match self.expire(&part, now).await {
            Ok(()) => {
                let mut done = part.iter().map(|one| one.order_id).peekable();
                self.work.overdue.retain(|one| {
                    let is_done = done.next_if_eq(&one.order_id).is_some();
                    !is_done
                });
                Ok(())
            }
            Err(error) if error.is_about_rows() && self.one_by_one => {
                self.defer(first.sku, &error);
                Ok(())
            }
            Err(error) if error.is_about_rows() => {
                let mut skus: Vec<SkuNumber> = part.iter().map(|one| one.sku).collect();
                skus.sort_unstable();
                skus.dedup();
                let writer = self.settler.plain_writer().await?;
                let held = expiry::held_skus(writer, &skus).await?;
                self.one_by_one = held.is_empty();
                for sku in held {
                    self.defer(sku, &error);
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Expires orders, in the database and in memory. Orders whose rows were locked, and orders that were paid
    /// in time, are noted for later.
    async fn expire(&mut self, part: &[Overdue], now: UnixMillis) -> Result<(), StoreError> {
        let state = Arc::clone(&self.settler.parts.state);
        // Payments for orders of this node may be stored at others.
        let with_orphans = !state.orphans.is_empty() || state.lanes.is_some();
        let (database, all) = (
            &self.settler.parts.database,
            part.iter().map(|one| one.order_id),
        );
        // A range has orders of other nodes too, which they expire.
        let (_held, here, closed) = hold(state.lanes.as_ref(), database, all.collect()).await?;
        let of_node = state.lanes.as_ref();
        let of_node: Option<HashSet<OrderId>> = of_node.map(|_| here.iter().copied().collect());
        let is_here = |id| of_node.as_ref().is_none_or(|here| here.contains(id));
        let paid = |one: &Overdue| {
            with_orphans
                && state.orphans.paid_in_time(one.order_id, one.expires_at)
                && !bug("expire_what_is_paid")
        };
        let ids: Vec<OrderId> = part
            .iter()
            .filter(|one| is_here(&one.order_id) && !paid(one))
            .map(|one| one.order_id)
            .collect();
        let started = clock::now();
        let (moving, writer) = self.settler.writer().await?;
        let expired = match ids.is_empty() {
            true => Ok(Vec::new()),
            false => expiry::end_overdue(writer, &ids, now, with_orphans).await,
        };
        if expired.as_ref().is_err_and(StoreError::is_overlong) {
            self.orders = (self.orders / 4).max(1);
        }
        let expired = expired?;
        self.orders = paced(self.orders, clock::since(started)).clamp(1, ORDERS_MAX);
        if !expired.is_empty() {
            let payments = &self.settler.parts.metrics.payments;
            payments.orders_expired.inc_by(expired.len() as u64);
            tracing::debug!(orders = expired.len(), "orders have expired");
            if !bug("keep_expired_units") {
                self.settler.apply_moves(&expired).await;
            }
        }
        drop(moving);
        let mut done = expired.iter().map(|one| one.units.order_id).peekable();
        let mut left: Vec<OrderId> = here.into_iter().chain(closed).collect();
        left.sort_unstable();
        left.retain(|id| done.next_if_eq(id).is_none());
        let later = now.plus_ms(AGAIN_MS);
        let left = left.into_iter().map(|id| (id, later));
        self.settler.parts.state.expiry_index.note(left);
        Ok(())
    }

    /// Moves the overdue orders of deferred SKUs to the work of those SKUs.
    fn defer_known(&mut self) {
        if self.deferred.is_empty() {
            return;
        }
        let deferred = &mut self.deferred;
        self.work
            .overdue
            .retain(|one| match deferred.get_mut(&one.sku) {
                Some(deferred) => {
                    deferred.work.ranges.insert(one.order_id, DEFERRED);
                    false
                }
                None => true,
            });
    }

    /// Defers a SKU: its orders expire at a time of their own.
    fn defer(&mut self, sku: SkuNumber, error: &StoreError) {
        let deferred = self.deferred.entry(sku).or_insert_with(|| Deferred {
            work: Work::default(),
            retry_at: clock::now(),
            backoff: DEFER,
        });
        deferred.retry_at = clock::now() + deferred.backoff.pause();
        let is_long = deferred.backoff.is_at_longest();
        for one in std::mem::take(&mut deferred.work.overdue) {
            deferred.work.ranges.insert(one.order_id, DEFERRED);
        }
        self.defer_known();
        if is_long {
            let known = self.settler.parts.state.catalogue.by_number(sku);
            let sku_id = known.map(|sku| sku.id.to_string()).unwrap_or_default();
            tracing::error!(
                sku_id, reason = %error,
                "expired orders of this SKU keep their units for now: a session holds locks on rows of this SKU (see \
                 pg_locks), or its row in `sku` disagrees with its orders (run the audit); retrying"
            );
        }
    }

    /// The deferred SKU that has been due for a retry for the longest time.
    fn next_deferred(&self) -> Option<SkuNumber> {
        let now = clock::now();
        let due = self.deferred.iter().filter(|(_, one)| one.retry_at <= now);
        due.min_by_key(|(_, one)| one.retry_at).map(|(sku, _)| *sku)
    }

    /// Does one step of a deferred SKU.
    async fn retry(&mut self, sku: SkuNumber, now: UnixMillis) -> Result<(), StoreError> {
        let orders = self.orders;
        let Some(deferred) = self.deferred.get_mut(&sku) else {
            return Ok(());
        };
        if deferred.work.overdue.is_empty() {
            self.look(Some(sku), now).await?;
        } else {
            let overdue = &mut deferred.work.overdue;
            let part: Vec<Overdue> = overdue.iter().take(orders).copied().collect();
            match self.expire(&part, now).await {
                Ok(()) => {
                    if let Some(deferred) = self.deferred.get_mut(&sku) {
                        deferred.work.overdue.drain(..part.len());
                        deferred.backoff.reset();
                    }
                }
                Err(error) if error.is_about_rows() => self.defer(sku, &error),
                Err(error) => return Err(error),
            }
        }
        // The least recently tried SKU comes first, so each has its turn.
        if let Some(deferred) = self.deferred.get_mut(&sku) {
            deferred.retry_at = deferred.retry_at.max(clock::now());
            if deferred.work.is_empty() {
                self.deferred.remove(&sku);
            }
        }
        Ok(())
    }

    /// Stores an id below which no unpaid order lies, except those that a start finds in the idempotency window
    /// anyway. A failure only makes the next start read more.
    async fn note_least(&mut self) {
        if self.noted.is_some_and(|(_, at)| clock::since(at) < NOTE) {
            return;
        }
        let noted = self.try_note_least().await;
        let least = match noted {
            Ok(Some(least)) => least,
            // An older order has just become unpaid again, or a lane is not open; noted the next time.
            Ok(None) | Err(_) => self.noted.map_or(OrderId::MAX, |(least, _)| least),
        };
        self.noted = Some((least, clock::now()));
    }

    async fn try_note_least(&mut self) -> Result<Option<OrderId>, StoreError> {
        let writer = self.settler.plain_writer().await?;
        let changes = expiry::unpaid_changes(writer).await?;
        let state = &self.settler.parts.state;
        // Before memory is asked: the orders of a lane are in it when the lane opens.
        let lanes = state.lanes.as_ref();
        let loaded = lanes.map_or_else(LaneSet::default, |of| of.lanes.open_here());
        let deferred = self.deferred.values().filter_map(|one| one.work.least());
        let least = deferred
            .chain(self.work.least())
            .chain(state.expiry_index.least())
            .chain(state.first_waiting())
            .chain([state.ids.window_floor(self.window_ms)])
            .min();
        let Some(least) = least else {
            return Ok(None);
        };
        if self.noted.is_some_and(|(noted, _)| noted == least) {
            return Ok(Some(least));
        }
        let writer = self.settler.plain_writer().await?;
        let noted = expiry::note_unpaid_from(writer, changes, least, loaded).await?;
        Ok(noted.then_some(least))
    }
}

/// Adapts the size of a step to the time the last one took.
fn paced(count: usize, took: Duration) -> usize {
    if took > STEP {
        count / 2
    } else if took < STEP / 5 {
        count.saturating_mul(2)
    } else {
        count
    }
}
