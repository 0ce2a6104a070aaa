//! Assignment of units to waiting orders, and the end of their wait. A task and a connection of its own.
//!
//! ```text
//!   unit comes back ──► kept (state::stock, in the same step)
//!                         │ every tick: the next in line, whose rows are written
//!                         ▼
//!                       selected ──► UPDATE 7 → 1, counters, COMMIT ──► payable, off the list
//!                         ▲                   │ nothing changed, or not these
//!                         └── kept again ◄────┘
//! ```
//!
//! At one of several nodes the units come from the pool, in one transaction with the assignment, to the node's own orders
//! whose turn it is (`store::cluster::lists`).
//!
//! A unit is assigned once: the list gives it to one transaction, whose UPDATE moves only rows that still wait,
//! and an unknown COMMIT is looked up before anything else happens (`store::fenced`). A crash between any two steps
//! leaves rows that wait or rows that are payable, and a start rebuilds the list and the kept units from those.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::settler::Settler;
use crate::backoff::Backoff;
use crate::clock;
use crate::faults::crash_point;
use crate::order::{Ended, OrderId, SkuNumber, UnixMillis};
use crate::pipeline::cluster::held::hold;
use crate::state::stock::{Shared, Sku};
use crate::store::StoreError;
use crate::store::cluster::lists;
use crate::store::settlement::waitlist::{self, Ending};

/// Interval between two looks for units and for ends.
const LOOK: Duration = Duration::from_millis(50);
/// Interval between two updates of the metrics: to find the oldest entry of a draw is to look at all of them.
const METRICS: Duration = Duration::from_millis(500);
/// Orders assigned, or ended, in one transaction at most.
const ORDERS_MAX: usize = 2_000;
/// Delay until a SKU is tried again whose rows are locked or whose counters are refused: first and longest.
const DEFER: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));

/// A SKU that failed by itself.
#[derive(Debug)]
struct Deferred {
    retry_at: Instant,
    backoff: Backoff,
}

/// Orders of one SKU, with the units that are taken for them.
struct Selected {
    sku: Arc<Sku>,
    orders: Vec<(OrderId, u32)>,
}

/// The task.
pub struct Assigner {
    settler: Settler,
    /// `orders.payment_ttl_ms`.
    payment_ttl_ms: u64,
    /// `orders.waitlist_ttl_ms`.
    waitlist_ttl_ms: u64,
    deferred: BTreeMap<SkuNumber, Deferred>,
    /// The SKUs that the database has as those with a list, and the number of commits that it had lost by then.
    noted: Option<(Vec<SkuNumber>, u64)>,
    metrics_at: Option<Instant>,
    /// Whether each SKU has a transaction of its own, because one of several has failed.
    one_by_one: bool,
}

impl Assigner {
    /// The task, not yet running.
    pub fn new(settler: Settler, payment_ttl_ms: u64, waitlist_ttl_ms: u64) -> Self {
        Assigner {
            settler,
            payment_ttl_ms,
            waitlist_ttl_ms,
            deferred: BTreeMap::new(),
            noted: None,
            metrics_at: None,
            one_by_one: false,
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

    /// One look at every list, and at most one transaction for each group of SKUs. Returns true if there is more to
    /// do.
    async fn step(&mut self) -> Result<bool, StoreError> {
        let skus = self.settler.parts.state.catalogue.waiting();
        let mut more = false;
        // Ends first: what has ended is not assigned.
        for sku in &skus {
            more |= self.end_due(sku).await?;
        }
        let now = UnixMillis::now();
        let mut groups: BTreeMap<u64, Vec<Arc<Sku>>> = BTreeMap::new();
        for sku in skus {
            if self.settler.parts.state.catalogue.is_paused()
                || !sku.may_assign(now)
                || self.is_deferred(sku.number)
            {
                sku.waitlist().rest();
                continue;
            }
            let ttl_ms = sku.terms().waitlist.payment_ttl_ms;
            let ttl_ms = ttl_ms.unwrap_or(self.payment_ttl_ms);
            if sku.shared().is_some() {
                more |= self.assign_covered(&sku, ttl_ms).await?;
                continue;
            }
            groups.entry(ttl_ms).or_default().push(sku);
        }
        for (ttl_ms, skus) in groups {
            if self.one_by_one {
                for sku in skus {
                    more |= self.assign_next(&[sku], ttl_ms).await?;
                }
            } else {
                more |= self.assign_next(&skus, ttl_ms).await?;
            }
        }
        self.one_by_one &= more;
        self.note_metrics();
        self.note_lists().await?;
        Ok(more)
    }

    fn is_deferred(&self, sku: SkuNumber) -> bool {
        let deferred = self.deferred.get(&sku);
        deferred.is_some_and(|deferred| deferred.retry_at > clock::now())
    }

    /// Assigns kept units to the next orders of these SKUs. Returns whether there were any.
    async fn assign_next(&mut self, skus: &[Arc<Sku>], ttl_ms: u64) -> Result<bool, StoreError> {
        // Units that are taken for an order are held by no row until the commit.
        let change = self.settler.parts.state.row_changes.begin();
        let mut selected = Vec::new();
        let mut left = ORDERS_MAX;
        for sku in skus {
            let orders = sku.select_waiting(left);
            left -= orders.len();
            if !orders.is_empty() {
                let sku = Arc::clone(sku);
                selected.push(Selected { sku, orders });
            }
            if left == 0 {
                break;
            }
        }
        if selected.is_empty() {
            change.undo();
            return Ok(false);
        }
        let state = Arc::clone(&self.settler.parts.state);
        let database = self.settler.parts.database.clone();
        let orders = selected.iter().flat_map(|selected| &selected.orders);
        let ids: Vec<OrderId> = orders.map(|(id, _)| *id).collect();
        let count = ids.len();
        let held = hold(state.lanes.as_ref(), &database, ids).await;
        if held
            .as_ref()
            .map_or(true, |(_, here, _)| here.len() < count)
        {
            // The lane of one is about to move, or opens again; the others wait for that.
            for Selected { sku, orders } in &selected {
                sku.waitlist().give_back(sku.counter(), orders);
            }
            return held.map(|_| false);
        }
        crash_point("waitlist.selected");
        match self.assign(&selected, ttl_ms).await {
            Ok(()) => {
                for Selected { sku, .. } in &selected {
                    self.deferred.remove(&sku.number);
                }
                Ok(true)
            }
            Err(error) => {
                for Selected { sku, orders } in &selected {
                    sku.waitlist().give_back(sku.counter(), orders);
                }
                if !error.is_about_rows() {
                    return Err(error);
                }
                match &*selected {
                    [Selected { sku, .. }] => self.defer(sku, &error),
                    _ => self.one_by_one = true,
                }
                Ok(true)
            }
        }
    }

    /// One transaction. On an error nothing has changed.
    async fn assign(&mut self, selected: &[Selected], ttl_ms: u64) -> Result<(), StoreError> {
        let state = Arc::clone(&self.settler.parts.state);
        let ids: Vec<OrderId> = selected
            .iter()
            .flat_map(|selected| selected.orders.iter().map(|(id, _)| *id))
            .collect();
        for id in &ids {
            state.recent_orders.forget(*id);
        }
        let started = clock::now();
        let now = state.ids.real_now();
        let expires_at = now.plus_ms(ttl_ms);
        let (moving, writer) = self.settler.writer().await?;
        let assigned = waitlist::assign(writer, &ids, now, expires_at).await?;
        crash_point("waitlist.assigned");
        let mut by_sku: BTreeMap<SkuNumber, Vec<OrderId>> = BTreeMap::new();
        for units in &assigned {
            by_sku.entry(units.sku).or_default().push(units.order_id);
        }
        for Selected { sku, orders } in selected {
            let assigned = by_sku.remove(&sku.number).unwrap_or_default();
            // Sorted by id, both of them.
            let (_, gone): (Vec<_>, Vec<_>) = orders
                .iter()
                .partition(|(id, _)| assigned.binary_search(id).is_ok());
            state.assigned(sku, &assigned, expires_at);
            if !gone.is_empty() {
                // Cancelled meanwhile. Whoever did it removes them too.
                let ids = gone.iter().map(|(id, _)| *id);
                sku.waitlist().remove(sku.counter(), ids);
                sku.waitlist().give_back(sku.counter(), &gone);
            }
        }
        drop(moving);
        self.note_assigned(assigned.len(), started);
        Ok(())
    }

    /// At a node: assigns units of the pool to those of its orders whose turn it is. Returns whether there were any.
    async fn assign_covered(&mut self, sku: &Arc<Sku>, ttl_ms: u64) -> Result<bool, StoreError> {
        let (list, counter) = (sku.waitlist(), sku.counter());
        let sale = sku.shared().and_then(Shared::sale);
        if list.is_empty() || sale.is_none_or(|sale| sale.pool == 0) {
            list.rest();
            return Ok(false);
        }
        let state = Arc::clone(&self.settler.parts.state);
        let database = self.settler.parts.database.clone();
        let skips = sku.skips();
        let covered = lists::covered(&database, sku.number, skips).await?;
        let own = covered.iter().filter(|entry| list.has(entry.order_id));
        let own: Vec<_> = own.take(ORDERS_MAX).collect();
        list.note_servable(!own.is_empty());
        let ids = own.iter().map(|entry| entry.order_id).collect();
        let (_held, ids, _) = hold(state.lanes.as_ref(), &database, ids).await?;
        let own = own.iter().filter(|entry| ids.contains(&entry.order_id));
        let units: u32 = own.map(|entry| entry.units).sum();
        if ids.is_empty() {
            return Ok(false);
        }
        crash_point("waitlist.selected");
        for id in &ids {
            state.recent_orders.forget(*id);
        }
        let started = clock::now();
        let now = state.ids.real_now();
        let expires_at = now.plus_ms(ttl_ms);
        let (moving, writer) = self.settler.writer().await?;
        // In memory before they are rows: whoever pays finds them held.
        counter.receive_held(units);
        let assigned =
            waitlist::assign_covered(writer, sku.number, skips, &ids, now, expires_at).await;
        let taken = assigned.as_deref().unwrap_or_default().iter();
        counter.give_held(units - taken.map(|order| order.quantity).sum::<u32>());
        let assigned = match assigned {
            Ok(assigned) => assigned,
            Err(error) if error.is_about_rows() => {
                drop(moving);
                self.defer(sku, &error);
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        crash_point("waitlist.assigned");
        let ids: Vec<OrderId> = assigned.iter().map(|order| order.order_id).collect();
        state.assigned(sku, &ids, expires_at);
        drop(moving);
        self.deferred.remove(&sku.number);
        self.note_assigned(ids.len(), started);
        Ok(!ids.is_empty())
    }

    fn note_assigned(&self, orders: usize, started: Instant) {
        let metrics = &self.settler.parts.metrics.waitlist;
        metrics.assigned.inc_by(orders as u64);
        metrics
            .assign_seconds
            .observe(clock::since(started).as_secs_f64());
        tracing::debug!(orders, "units were assigned to waiting orders");
    }

    /// Ends the wait of orders whose list has ended: all after `closes_at`, and without one those that have waited
    /// for `orders.waitlist_ttl_ms`; and of those for more units than the SKU has in total, which would hold up all
    /// behind them for ever. Returns whether there may be more.
    async fn end_due(&mut self, sku: &Arc<Sku>) -> Result<bool, StoreError> {
        let state = Arc::clone(&self.settler.parts.state);
        let list = sku.waitlist();
        let before = match sku.terms().closes_at {
            Some(closes_at) if UnixMillis::now() >= closes_at => Some(OrderId::MAX),
            Some(_) => None,
            None => Some(state.ids.window_floor(self.waitlist_ttl_ms)),
        };
        let over = before.map(|before| list.joined_before(before, ORDERS_MAX));
        let (mut due, mut why) = (over.unwrap_or_default(), Ending::Over);
        // An entry of a draw is passed over, and keeps its rank. A node that has not read the total yet knows its share alone.
        let knows_total = sku.shared().is_none_or(|shared| shared.sale().is_some());
        if due.is_empty() && sku.draw().is_none() && knows_total {
            due = list.unservable(sku.stock().total, ORDERS_MAX);
            why = Ending::Unservable;
        }
        let database = self.settler.parts.database.clone();
        let (_held, due, _) = hold(state.lanes.as_ref(), &database, due).await?;
        if due.is_empty() {
            return Ok(false);
        }
        for id in &due {
            state.recent_orders.forget(*id);
        }
        let (moving, writer) = self.settler.writer().await?;
        let ended = waitlist::end(writer, &due, why).await?;
        state.end_waiting(&ended, Ended::Expired);
        drop(moving);
        let metrics = &self.settler.parts.metrics.waitlist;
        metrics.expired.inc_by(ended.len() as u64);
        if !ended.is_empty() {
            let reason = match why {
                Ending::Over => "their list, or their time, is over",
                Ending::Unservable => "they are for more units than the total of the SKU",
            };
            tracing::info!(sku_id = %sku.id, orders = ended.len(), reason, "orders that waited without units are expired");
        }
        // Rows that were locked, or have just been cancelled, are looked at again at the next tick.
        Ok(ended.len() == ORDERS_MAX)
    }

    /// Stores which SKUs have a list, if that has changed.
    async fn note_lists(&mut self) -> Result<(), StoreError> {
        let waiting = self.settler.parts.state.catalogue.waiting();
        let waited = waiting.iter().filter(|sku| sku.is_waited());
        let mut skus: Vec<SkuNumber> = waited.map(|sku| sku.number).collect();
        skus.sort_unstable();
        let lists = (skus, self.settler.parts.writer.commits_lost());
        if self.noted.as_ref() != Some(&lists) {
            let writer = self.settler.plain_writer().await?;
            waitlist::note_lists(writer, &lists.0).await?;
            self.noted = Some(lists);
        }
        Ok(())
    }

    /// Defers a SKU: it is tried again by itself.
    fn defer(&mut self, sku: &Arc<Sku>, error: &StoreError) {
        let deferred = self.deferred.entry(sku.number).or_insert_with(|| Deferred {
            retry_at: clock::now(),
            backoff: DEFER,
        });
        deferred.retry_at = clock::now() + deferred.backoff.pause();
        if deferred.backoff.is_at_longest() {
            tracing::error!(
                sku_id = %sku.id, reason = %error,
                "waiting orders of this SKU are not assigned its units for now: a session holds locks on rows of this SKU \
                 (see pg_locks), or its row in `sku` disagrees with its orders (run the audit); retrying"
            );
        }
    }

    fn note_metrics(&mut self) {
        if self.metrics_at.is_some_and(|at| clock::since(at) < METRICS) {
            return;
        }
        self.metrics_at = Some(clock::now());
        let parts = &self.settler.parts;
        let now = parts.state.ids.now();
        let (mut oldest_ms, mut overdue) = (0, Duration::ZERO);
        for sku in parts.state.catalogue.waiting() {
            let since = sku.waitlist().oldest().map(OrderId::millis);
            oldest_ms = oldest_ms.max(since.map_or(0, |since| now.0 - since.0));
            overdue = overdue.max(sku.waitlist().overdue());
        }
        let metrics = &parts.metrics.waitlist;
        metrics.oldest_seconds.set(oldest_ms as f64 / 1_000.0);
        metrics.overdue_seconds.set(overdue.as_secs_f64());
    }
}
