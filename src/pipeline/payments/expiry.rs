//! Orders that were not paid in time: their units come back in the database and in memory, within
//! two seconds of falling due and what is due before them. A task and a connection of their own.
//!
//! Which ids to look at and when is kept by `state::expiry_index`; due is what Millrace's own monotonic
//! clock says (I10). A payment and an expiry lock the order's row: one wins, the other sees it.
//!
//! ```text
//!   unpaid ──ranges──► look: so many rows ──overdue──► expire: so many orders
//!      ▲                     │ the rest of the range        │ rows that somebody holds
//!      └─────────────────────┴── noted again ◄──────────────┤
//!                                                           ▼ SKUs that cannot be had
//!                                 deferred: by SKU, each with a time of its own
//! ```
//!
//! Progress is by rows that were read, whether or not any of them matched, so no range is too
//! long; a step that takes too long is made shorter. A SKU whose row somebody holds, or whose
//! counters are refused, is put off by itself and takes turns with the others.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::processor::PAUSE;
use super::settler::Settler;
use crate::backoff::Backoff;
use crate::faults::bug;
use crate::order::{IdRange, OrderId, SkuNumber, UnixMillis};
use crate::state::expiry_index::{Due, Nearness, Ranges};
use crate::store::StoreError;
use crate::store::settlement::expiry::Overdue;

/// Orders expired in one transaction, at most.
const ORDERS_MAX: usize = 2_000;
/// Rows read in one step, at most.
const ROWS_MAX: usize = 20_000;
/// Rows read in one step, where the database is slow.
const ROWS_MIN: usize = 50;
/// Ranges read in one step.
const RANGES_MAX: usize = 24;
/// A step that takes longer is halved the next time, and one that takes less than a fifth is
/// doubled.
const STEP: Duration = Duration::from_millis(100);
/// How often due orders are looked for.
const LOOK: Duration = Duration::from_millis(100);
/// Orders expire so many milliseconds after their time: what came to the door before it is known
/// by then.
const GRACE_MS: u64 = 250;
/// How often the least unpaid order is noted, for the next start.
const NOTE: Duration = Duration::from_secs(10);
/// When an order is looked at again that somebody holds, or that was paid in time, in milliseconds.
const AGAIN_MS: u64 = 1_000;
/// When a SKU is tried again that could not be had: first, and at most.
const DEFER: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// Orders that are put off with their SKU are looked for one by one, until they are many.
const DEFERRED: Nearness = Nearness {
    apart: 0,
    ranges_max: 1_024,
};

/// Ids that are worked on.
#[derive(Debug, Default)]
struct Work {
    /// Not looked at yet.
    ranges: Ranges,
    /// Found, and to expire.
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

/// The orders of a SKU that could not be had.
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
    /// The ids that fell due.
    work: Work,
    /// Since when the first of them have been due.
    since: Option<UnixMillis>,
    deferred: BTreeMap<SkuNumber, Deferred>,
    /// Whether the last step was one of a SKU that was put off.
    deferred_had_its_turn: bool,
    /// Whether SKUs are tried one by one, because what is wrong is not that somebody holds them.
    one_by_one: bool,
    /// Rows read in a step, as fast as the database is.
    rows: usize,
    /// Orders expired in a step, likewise.
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

    /// Works until the future is dropped, or another process has taken over.
    pub async fn run(mut self) {
        loop {
            let pause = match self.step().await {
                Ok(true) => None,
                Ok(false) => Some(LOOK),
                Err(error) => {
                    self.settler.note_failure(&error);
                    Some(if error.is_overlong() { LOOK } else { PAUSE })
                }
            };
            if self.settler.parts.state.poison.is_set() {
                return;
            }
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => tokio::task::yield_now().await,
            }
        }
    }

    /// One look or one transaction. True: there is more to do.
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

    /// Takes what has fallen due, so many ranges at once. They share a step, so a long one keeps no
    /// other waiting.
    fn take_due(&mut self, now: UnixMillis) {
        if self.work.is_empty() {
            self.since = None;
        }
        while self.work.ranges.len() < RANGES_MAX
            && let Some(Due { ids, since }) = self.settler.parts.state.expiry_index.take_due(now)
        {
            self.since = self.since.or(Some(since));
            // As they are: not one row between two of them is read.
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

    /// Reads rows of the first ranges. What was read is done with, also where nothing was found.
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
        let started = Instant::now();
        let (moving, writer) = match self.settler.writer().await {
            Ok(writer) => writer,
            Err(error) => {
                self.put_back(sku, taken);
                return Err(error);
            }
        };
        drop(moving);
        match writer.look_for_overdue(&taken, rows, now, sku).await {
            Ok(looked) => {
                let payments = &self.settler.parts.metrics.payments;
                payments.expiry_rows.inc_by(looked.rows.unsigned_abs());
                self.rows = paced(self.rows, started.elapsed()).clamp(ROWS_MIN, ROWS_MAX);
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

    /// Expires one part of what was found.
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
                let (moving, writer) = self.settler.writer().await?;
                drop(moving);
                let held = writer.held_skus(&skus).await?;
                self.one_by_one = held.is_empty();
                for sku in held {
                    self.defer(sku, &error);
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Expires orders, in the database and in memory. Those that could not be had now, and those
    /// that were paid in time, are noted for later.
    async fn expire(&mut self, part: &[Overdue], now: UnixMillis) -> Result<(), StoreError> {
        let state = &self.settler.parts.state;
        let with_orphans = !state.orphans.is_empty();
        let paid = |one: &Overdue| {
            with_orphans
                && state.orphans.paid_in_time(one.order_id, one.expires_at)
                && !bug("expire_what_is_paid")
        };
        let ids: Vec<OrderId> = part
            .iter()
            .filter(|one| !paid(one))
            .map(|one| one.order_id)
            .collect();
        let started = Instant::now();
        let (moving, writer) = self.settler.writer().await?;
        let expired = match ids.is_empty() {
            true => Ok(Vec::new()),
            false => writer.expire(&ids, now, with_orphans).await,
        };
        if expired.as_ref().is_err_and(StoreError::is_overlong) {
            self.orders = (self.orders / 4).max(1);
        }
        let expired = expired?;
        self.orders = paced(self.orders, started.elapsed()).clamp(1, ORDERS_MAX);
        if !expired.is_empty() {
            let payments = &self.settler.parts.metrics.payments;
            payments.orders_expired.inc_by(expired.len() as u64);
            tracing::debug!(orders = expired.len(), "orders have expired");
            if !bug("keep_expired_units") {
                self.settler.settle_memory(&expired).await;
            }
        }
        drop(moving);
        let mut done = expired.iter().map(|one| one.units.order_id).peekable();
        let mut left: Vec<OrderId> = part.iter().map(|one| one.order_id).collect();
        left.sort_unstable();
        left.retain(|id| done.next_if_eq(id).is_none());
        let later = now.plus_ms(AGAIN_MS);
        let left = left.into_iter().map(|id| (id, later));
        self.settler.parts.state.expiry_index.note(left);
        Ok(())
    }

    /// What was found of SKUs that are put off joins what is put off.
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

    /// Puts a SKU off: its orders expire at a time of their own.
    fn defer(&mut self, sku: SkuNumber, error: &StoreError) {
        let deferred = self.deferred.entry(sku).or_insert_with(|| Deferred {
            work: Work::default(),
            retry_at: Instant::now(),
            backoff: DEFER,
        });
        deferred.retry_at = Instant::now() + deferred.backoff.pause();
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
                "the units of orders that have expired do not come back yet: somebody holds rows of this SKU, or its \
                 row in `sku` disagrees with its orders (see the audit)"
            );
        }
    }

    /// The SKU that was put off and has been due for a try for the longest time.
    fn next_deferred(&self) -> Option<SkuNumber> {
        let now = Instant::now();
        let due = self.deferred.iter().filter(|(_, one)| one.retry_at <= now);
        due.min_by_key(|(_, one)| one.retry_at).map(|(sku, _)| *sku)
    }

    /// One step of a SKU that was put off.
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
        // The least recent comes first, so each of them has its turn.
        if let Some(deferred) = self.deferred.get_mut(&sku) {
            deferred.retry_at = deferred.retry_at.max(Instant::now());
            if deferred.work.is_empty() {
                self.deferred.remove(&sku);
            }
        }
        Ok(())
    }

    /// Notes below which no unpaid order lies that a start would not find in the idempotency
    /// window anyway. A failure only makes the next start look at more.
    async fn note_least(&mut self) {
        if self.noted.is_some_and(|(_, at)| at.elapsed() < NOTE) {
            return;
        }
        let noted = self.try_note_least().await;
        let least = match noted {
            Ok(Some(least)) => least,
            // An older order has just become unpaid again; the next time.
            Ok(None) | Err(_) => self.noted.map_or(OrderId::MAX, |(least, _)| least),
        };
        self.noted = Some((least, Instant::now()));
    }

    async fn try_note_least(&mut self) -> Result<Option<OrderId>, StoreError> {
        let (moving, writer) = self.settler.writer().await?;
        drop(moving);
        let changes = writer.unpaid_changes().await?;
        let state = &self.settler.parts.state;
        let deferred = self.deferred.values().filter_map(|one| one.work.least());
        let least = deferred
            .chain(self.work.least())
            .chain(state.expiry_index.least())
            .chain([state.ids.window_floor(self.window_ms)])
            .min();
        let Some(least) = least else {
            return Ok(None);
        };
        if self.noted.is_some_and(|(noted, _)| noted == least) {
            return Ok(Some(least));
        }
        let (moving, writer) = self.settler.writer().await?;
        let noted = writer.note_unpaid_from(changes, least).await?;
        drop(moving);
        Ok(noted.then_some(least))
    }
}

/// How many at once next, where so many have taken so long.
fn paced(count: usize, took: Duration) -> usize {
    if took > STEP {
        count / 2
    } else if took < STEP / 5 {
        count.saturating_mul(2)
    } else {
        count
    }
}
