//! The waiting list of one SKU: orders without units, in the order in which they joined.
//!
//! ```text
//!   join ──► joining ──row written──► waiting ──select──► assigning ──committed──► off the list
//!               │                       │  ▲                  │
//!               └── never written ──────┤  └── not committed ─┘
//!                                       └── cancelled, or the list ended ────────► off the list
//! ```
//!
//! Ids are given out under the list's lock, so that the order of joining is that of their turns
//! ([`OrderId::turn`]), in memory, in the rows and after a restart. While the list has
//! an order, whatever its state, the SKU's counter is in its waiting form. An order that is not a row yet is not
//! assigned, and neither is any behind it: it may still be abandoned.
//!
//! At one of several nodes the list has the orders of its own lanes, and their sequence is that of all nodes together
//! ([`Turns`]), which the database has. While orders wait at other nodes, the counter is in its waiting form too. Where
//! nobody waits, an order joins only while the list is *open*: every node has answered a want of this one, and keeps
//! whatever comes free until it knows whether somebody has joined ([`Waitlist::suspend`]).
//!
//! Locks: the list, then a shard of the buyers' map or the counter's kept units.

mod queue;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use self::queue::{Entry, Queue, Stage};
use super::{Sku, StockCounter, Turn, Turns};
use crate::clock;
use crate::order::OrderId;
use crate::sync::Guarded;

#[derive(Debug, Default)]
struct Inner {
    queue: Queue,
    /// Requests that wait until an order has left the list.
    watchers: HashMap<OrderId, Vec<(u64, Waker)>>,
    next_watcher: u64,
    /// No order on the list asks for more units.
    most: u32,
    /// Since when units are kept that the next order could have.
    servable_since: Option<Instant>,
    /// The sequence of all nodes together; `None`: a single node has the list.
    turns: Option<Turns>,
    /// Since when units are kept because somebody may join at another node.
    suspended_at: Option<Instant>,
}

/// Where an order that accepts to wait was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Units were free and nobody waits: it holds them.
    Held,
    /// On the list.
    Joined,
    /// Nowhere: the list has as many orders as it may.
    Full,
    /// Nowhere: it asks for more units than the SKU has in total.
    TooMany,
    /// Nowhere: nobody waits, and other nodes may have units for it, or sell what comes free before they know of it.
    Elsewhere,
}

/// An order that accepts to wait.
#[derive(Clone, Copy, Debug)]
pub struct Joiner {
    /// Its units.
    pub units: u32,
    /// Orders that may wait.
    pub max: u32,
    /// Units of the sale in total.
    pub total: u32,
    /// Whether other nodes may have units for it.
    pub is_shared: bool,
}

/// The waiting list of one SKU.
#[derive(Debug, Default)]
pub struct Waitlist {
    inner: Guarded<Inner>,
    /// Orders on the list, written under its lock.
    len: AtomicUsize,
    /// Orders that wait at other nodes, as they were read last, or more. Written under the lock.
    elsewhere: AtomicUsize,
    /// Whether an order has got its row, and with it its turn among those of all nodes, since these were read.
    has_news: AtomicBool,
    /// Whether orders were restored since.
    was_restored: AtomicBool,
    /// Whether an order may be the first to wait. Written under the lock.
    is_open: AtomicBool,
}

impl Waitlist {
    /// Orders on the list.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Orders that wait, at other nodes too.
    pub fn waiting(&self) -> usize {
        self.len() + self.elsewhere.load(Ordering::Relaxed)
    }

    /// Whether nobody waits here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Places an order: it holds its units if they are free and nobody waits, and else joins the list. `claim` gives the order its
    /// id and enters it into its buyer's record. It runs under the list's lock and must not block.
    ///
    /// # Errors
    /// That of `claim`; nothing is placed.
    pub fn hold_or_join<C, E>(
        &self,
        counter: &StockCounter,
        joiner: Joiner,
        claim: impl FnOnce() -> Result<(OrderId, C), E>,
    ) -> Result<(Placed, OrderId, C), E> {
        let hold = || counter.hold(joiner.units).is_ok();
        self.place(counter, joiner, hold, claim)
    }

    /// The same for an entry of a draw, which holds nothing although units are free.
    ///
    /// # Errors
    /// That of `claim`; nothing is placed.
    pub fn enter<C, E>(
        &self,
        counter: &StockCounter,
        joiner: Joiner,
        claim: impl FnOnce() -> Result<(OrderId, C), E>,
    ) -> Result<(Placed, OrderId, C), E> {
        self.place(counter, joiner, || false, claim)
    }

    fn place<C, E>(
        &self,
        counter: &StockCounter,
        joiner: Joiner,
        hold: impl FnOnce() -> bool,
        claim: impl FnOnce() -> Result<(OrderId, C), E>,
    ) -> Result<(Placed, OrderId, C), E> {
        self.inner.with(|inner| {
            let (id, claimed) = claim()?;
            let placed = if hold() {
                Placed::Held
            } else if joiner.units > joiner.total {
                Placed::TooMany
            } else if joiner.is_shared && !self.takes_first() && self.waiting() == 0 {
                Placed::Elsewhere
            } else if self.waiting() >= joiner.max as usize {
                Placed::Full
            } else {
                self.insert(inner, counter, id, joiner.units, Stage::Joining);
                Placed::Joined
            };
            Ok((placed, id, claimed))
        })
    }

    fn insert(
        &self,
        inner: &mut Inner,
        counter: &StockCounter,
        id: OrderId,
        units: u32,
        stage: Stage,
    ) {
        inner.most = inner.most.max(units);
        if inner.queue.insert(id, units, stage) && self.len.fetch_add(1, Ordering::Relaxed) == 0 {
            counter.begin_waiting();
        }
    }

    /// Enters an order whose row waits, at its place by id, unless it is there. True: it was not.
    pub fn restore(&self, counter: &StockCounter, id: OrderId, units: u32) -> bool {
        self.inner.with(|inner| {
            if inner.queue.find(id).is_some() {
                return false;
            }
            self.insert(inner, counter, id, units, Stage::Waiting);
            self.was_restored.store(true, Ordering::Relaxed);
            true
        })
    }

    /// Runs `change` while nobody joins or enters.
    pub fn locked<R>(&self, change: impl FnOnce() -> R) -> R {
        self.inner.with(|_| change())
    }

    /// Number of orders whose rows are not written yet.
    pub fn joining(&self) -> usize {
        self.inner.with(|inner| {
            let joining = |entry: &&Entry| entry.stage == Stage::Joining;
            inner.queue.iter().filter(joining).count()
        })
    }

    /// Puts the entries of a draw in the order of their places, before all other orders, whichever come back later.
    pub fn take_places(&self, places: impl IntoIterator<Item = (OrderId, u32)>) {
        self.inner.with(|inner| inner.queue.take_places(places));
    }

    /// The row of a joining order is committed: it may be assigned units.
    pub fn row_written(&self, id: OrderId) {
        self.inner.with(|inner| {
            if let Some(entry) = inner.queue.get_mut(id)
                && entry.stage == Stage::Joining
            {
                entry.stage = Stage::Waiting;
            }
            self.has_news.store(true, Ordering::Relaxed);
        });
    }

    /// Removes orders. Requests that wait for them are woken, and after the last one the kept units are free.
    pub fn remove(&self, counter: &StockCounter, ids: impl IntoIterator<Item = OrderId>) {
        let woken = self.inner.with(|inner| {
            let mut woken = Vec::new();
            for id in ids {
                if inner.queue.remove(id).is_none() {
                    continue;
                }
                woken.extend(inner.watchers.remove(&id));
                if self.len.fetch_sub(1, Ordering::Relaxed) == 1 {
                    self.end(inner, counter, true);
                }
            }
            woken
        });
        for (_, waker) in woken.into_iter().flatten() {
            waker.wake();
        }
    }

    /// Removes orders that wait at another node from now on.
    pub fn give_away(&self, counter: &StockCounter, ids: Vec<OrderId>) {
        self.inner
            .with(|_| self.elsewhere.fetch_add(ids.len(), Ordering::Relaxed));
        self.remove(counter, ids);
    }

    /// A node: this many orders wait at others, and this is the sequence of all, ascending.
    pub fn note_elsewhere(&self, counter: &StockCounter, orders: usize, entries: &[Turn]) {
        let mut turns = Turns::default();
        turns.extend(entries);
        self.inner.with(|inner| {
            inner.turns = Some(turns);
            let waited = self.waiting() > 0;
            self.elsewhere.store(orders, Ordering::Relaxed);
            self.end(inner, counter, waited);
        });
    }

    /// A node whose list ends suspends it: another may not have heard of the end yet, and take whoever joins.
    fn end(&self, inner: &mut Inner, counter: &StockCounter, waited: bool) {
        if waited && self.waiting() == 0 {
            inner.servable_since = None;
            if inner.turns.is_some() {
                inner.suspended_at = Some(clock::now());
            }
        }
        self.settle(inner, counter);
    }

    /// Units are kept while somebody waits or may.
    fn settle(&self, inner: &Inner, counter: &StockCounter) {
        if self.waiting() > 0 || inner.suspended_at.is_some() {
            counter.begin_waiting();
        } else {
            counter.end_waiting();
        }
    }

    /// A node that answers a want of another: somebody may join there. From now on whatever comes free is kept.
    pub fn suspend(&self, counter: &StockCounter) {
        self.inner.with(|inner| {
            inner.suspended_at = Some(clock::now());
            self.settle(inner, counter);
        });
    }

    /// Nobody had joined, and no want stood, at `looked_at` or later. Whatever was answered since is kept to.
    pub fn resume(&self, counter: &StockCounter, looked_at: Instant) {
        self.inner.with(|inner| {
            inner.suspended_at = inner.suspended_at.filter(|at| *at >= looked_at);
            self.settle(inner, counter);
        });
    }

    /// Whether an order may be the first to wait.
    pub fn takes_first(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// Every other node keeps what comes free: an order may be the first to wait.
    pub fn open(&self) {
        self.inner
            .with(|_| self.is_open.store(true, Ordering::Relaxed));
    }

    /// Ends that. False: an order has joined that other nodes cannot see yet, because it is no row, and `is_late` is false too.
    pub fn close(&self, is_late: bool) -> bool {
        self.inner.with(|inner| {
            let is_row = |entry: &Entry| entry.stage != Stage::Joining;
            let is_seen = self.is_empty() || inner.queue.iter().any(is_row);
            if is_seen || is_late {
                self.is_open.store(false, Ordering::Relaxed);
            }
            is_seen || is_late
        })
    }

    /// A node: these have joined behind [`Waitlist::last_turn`], `orders` of them at other nodes.
    pub fn note_joined(&self, orders: usize, entries: &[Turn]) {
        self.inner.with(|inner| {
            inner.turns.get_or_insert_default().extend(entries);
            self.elsewhere.fetch_add(orders, Ordering::Relaxed);
        });
    }

    /// The last turn that is known.
    pub fn last_turn(&self) -> u64 {
        self.inner
            .with(|inner| inner.turns.as_ref().map_or(0, Turns::last))
    }

    /// A node: somebody waits, maybe at another one.
    pub fn note_somebody(&self, counter: &StockCounter) {
        self.inner.with(|_| {
            self.elsewhere.fetch_max(1, Ordering::Relaxed);
            counter.begin_waiting();
        });
    }

    /// Whether an order has got a turn since turns were read.
    pub fn has_news(&self) -> bool {
        self.has_news.swap(false, Ordering::Relaxed)
    }

    /// Whether orders came with their lane, which have had turns before, since all turns were read.
    pub fn was_restored(&self) -> bool {
        self.was_restored.swap(false, Ordering::Relaxed)
    }

    /// A node: whether an order of its own waits whose place in the sequence of all is not known yet.
    pub fn lacks_turn(&self, id: OrderId) -> bool {
        self.inner.with(|inner| {
            let turns = inner.turns.as_ref();
            let turn = turns.and_then(|turns| turns.ahead(id));
            turn.is_none() && inner.queue.find(id).is_some()
        })
    }

    /// Number of orders before this one, plus one; `None` if it is not on the list.
    pub fn position(&self, id: OrderId) -> Option<usize> {
        self.inner.with(|inner| {
            let rank = inner.queue.rank(id)?;
            let turns = inner.turns.as_ref();
            // One without a turn so far stands behind all that have one.
            Some(turns.map_or(rank, |turns| turns.ahead(id).unwrap_or(turns.len())) + 1)
        })
    }

    /// Whether an order is on the list.
    pub fn has(&self, id: OrderId) -> bool {
        self.inner.with(|inner| inner.queue.find(id).is_some())
    }

    /// The lowest id on the list; after a draw one that none is below.
    pub fn first(&self) -> Option<OrderId> {
        self.inner.with(|inner| {
            let first = inner.queue.iter().next().map(|entry| entry.id);
            first.map(|first| inner.queue.least.map_or(first, |least| first.min(least)))
        })
    }

    /// The order that has waited for longest.
    pub fn oldest(&self) -> Option<OrderId> {
        self.inner.with(|inner| {
            let mut all = inner.queue.iter().map(|entry| entry.id);
            match inner.queue.places.is_empty() {
                true => all.next(),
                false => all.min_by_key(|id| id.turn()),
            }
        })
    }

    /// Takes kept units for the next orders, at most `max` of them, which are being assigned from now on. Strict:
    /// none is passed over; with `skips` an order for which the kept units do not suffice is.
    pub fn select(&self, counter: &StockCounter, skips: bool, max: usize) -> Vec<(OrderId, u32)> {
        self.inner.with(|inner| {
            let mut kept = counter.kept();
            let mut selected = Vec::new();
            for entry in inner.queue.iter_mut() {
                if kept == 0 || selected.len() == max {
                    break;
                }
                match entry.stage {
                    Stage::Assigning => continue,
                    Stage::Joining => break,
                    Stage::Waiting => {}
                }
                if entry.units <= kept {
                    kept -= entry.units;
                    entry.stage = Stage::Assigning;
                    selected.push((entry.id, entry.units));
                } else if !skips {
                    break;
                }
            }
            let units = selected.iter().map(|(_, units)| *units).sum();
            // Only this method takes kept units. A lower total may have taken some away meanwhile.
            if !counter.take_kept(units) {
                for (id, _) in selected.drain(..) {
                    inner.wait_again(id);
                }
            }
            match selected.is_empty() {
                true => inner.servable_since = None,
                false => _ = inner.servable_since.get_or_insert_with(Instant::now),
            }
            selected
        })
    }

    /// Gives back units that were taken for orders that were not assigned them. Those that are still on the list
    /// wait again.
    pub fn give_back(&self, counter: &StockCounter, orders: &[(OrderId, u32)]) {
        self.inner
            .with(|inner| orders.iter().for_each(|(id, _)| inner.wait_again(*id)));
        counter.release(orders.iter().map(|(_, units)| *units).sum());
    }

    /// Orders that were in line, from the first on, whose rows are written and which joined before `id`; at most
    /// `max`.
    pub fn joined_before(&self, id: OrderId, max: usize) -> Vec<OrderId> {
        self.inner.with(|inner| {
            let waiting = |entry: &&Entry| entry.stage == Stage::Waiting;
            let is_by_id = inner.queue.places.is_empty();
            let all = inner.queue.iter();
            let before = all.take_while(|entry| !is_by_id || entry.id.turn() < id.turn());
            let before = before.filter(|entry| entry.id.turn() < id.turn());
            before
                .filter(waiting)
                .take(max)
                .map(|entry| entry.id)
                .collect()
        })
    }

    /// Orders whose rows wait for more units than the SKU has in total; at most `max`.
    pub fn unservable(&self, total: u32, max: usize) -> Vec<OrderId> {
        self.inner.with(|inner| {
            if inner.most <= total {
                return Vec::new();
            }
            // Whoever asked for so many may have left.
            let all = inner.queue.iter();
            inner.most = all.map(|entry| entry.units).max().unwrap_or(0);
            let unservable = |entry: &&Entry| entry.units > total && entry.stage == Stage::Waiting;
            let found = inner.queue.iter().filter(unservable).take(max);
            found.map(|entry| entry.id).collect()
        })
    }

    /// Whether units are there for an order that waits here.
    pub fn note_servable(&self, is_servable: bool) {
        self.inner.with(|inner| match is_servable {
            true => _ = inner.servable_since.get_or_insert_with(Instant::now),
            false => inner.servable_since = None,
        });
    }

    /// Forgets since when the next order could have been served: it may not be served now.
    pub fn rest(&self) {
        self.note_servable(false);
    }

    /// How long units have been kept that the next order could have.
    pub fn overdue(&self) -> Duration {
        let since = self.inner.with(|inner| inner.servable_since);
        since.map_or(Duration::ZERO, clock::since)
    }
}

impl Inner {
    fn wait_again(&mut self, id: OrderId) {
        if let Some(entry) = self.queue.get_mut(id) {
            entry.stage = Stage::Waiting;
        }
    }
}

/// An order's place on its list. Dropping it leaves the list; [`WaitPlace::commit`] leaves the order there, for
/// whoever settles it.
#[derive(Debug)]
#[must_use = "dropping a place leaves the list"]
pub struct WaitPlace {
    sku: Arc<Sku>,
    id: Option<OrderId>,
}

impl WaitPlace {
    /// The place of an order that has joined.
    pub fn of(sku: &Arc<Sku>, id: OrderId) -> Self {
        WaitPlace {
            sku: Arc::clone(sku),
            id: Some(id),
        }
    }

    /// Keeps the place.
    pub fn commit(mut self) {
        self.id = None;
    }
}

impl Drop for WaitPlace {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.sku.waitlist().remove(self.sku.counter(), [id]);
        }
    }
}

/// Completes once an order is not on its list.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct HasLeft {
    sku: Arc<Sku>,
    id: OrderId,
    watcher: Option<u64>,
}

impl HasLeft {
    /// Of an order on the list of `sku`.
    pub fn new(sku: Arc<Sku>, id: OrderId) -> Self {
        let watcher = None;
        HasLeft { sku, id, watcher }
    }
}

impl Future for HasLeft {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let (sku, id) = (Arc::clone(&self.sku), self.id);
        let this = &mut *self;
        sku.waitlist().inner.with(|inner| {
            if inner.queue.find(id).is_none() {
                return Poll::Ready(());
            }
            let watcher = *this.watcher.get_or_insert_with(|| {
                inner.next_watcher += 1;
                inner.next_watcher
            });
            let all = inner.watchers.entry(id).or_default();
            all.retain(|(known, _)| *known != watcher);
            all.push((watcher, context.waker().clone()));
            Poll::Pending
        })
    }
}

impl Drop for HasLeft {
    fn drop(&mut self) {
        let (id, Some(watcher)) = (self.id, self.watcher) else {
            return;
        };
        self.sku.waitlist().inner.with(|inner| {
            if let Some(all) = inner.watchers.get_mut(&id) {
                all.retain(|(known, _)| *known != watcher);
                if all.is_empty() {
                    inner.watchers.remove(&id);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::UnixMillis;

    fn id(value: u64) -> OrderId {
        OrderId::new(value).unwrap()
    }

    fn joiner(counter: &StockCounter, units: u32, max: u32) -> Joiner {
        Joiner {
            units,
            max,
            total: counter.snapshot().total,
            is_shared: false,
        }
    }

    fn join(list: &Waitlist, counter: &StockCounter, value: u64, units: u32) -> Placed {
        let joiner = joiner(counter, units, 10_000);
        let placed = list.hold_or_join(counter, joiner, || Ok::<_, ()>((id(value), ())));
        placed.unwrap().0
    }

    fn joined(list: &Waitlist, counter: &StockCounter, orders: &[(u64, u32)]) {
        for (value, units) in orders {
            assert_eq!(join(list, counter, *value, *units), Placed::Joined);
            list.row_written(id(*value));
        }
    }

    #[test]
    fn a_unit_that_comes_back_is_kept_for_whoever_waits_and_is_free_after_the_last() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(1, 0, 0));
        assert_eq!(join(&list, &counter, 1, 1), Placed::Held);
        joined(&list, &counter, &[(2, 1)]);
        counter.release(1);
        let kept = counter.snapshot();
        assert_eq!((kept.free, kept.held, counter.kept()), (0, 1, 1));
        assert!(counter.hold(1).is_err(), "a newcomer overtakes");
        assert_eq!(join(&list, &counter, 3, 1), Placed::Joined);
        assert_eq!(list.select(&counter, false, 10), [(id(2), 1)]);
        assert_eq!(list.select(&counter, false, 10), []);
        list.remove(&counter, [id(2), id(3)]);
        // Order 2 holds the unit.
        assert_eq!((counter.free(), counter.snapshot().held), (0, 1));
        counter.release(1);
        assert_eq!(counter.free(), 1);
    }

    #[test]
    fn a_strict_list_waits_for_its_first_order_and_a_skipping_one_passes_it_over() {
        for (skips, expected) in [(false, vec![]), (true, vec![(id(2), 1), (id(3), 1)])] {
            let (list, counter) = (Waitlist::default(), StockCounter::new(4, 0, 0));
            counter.hold(4).unwrap();
            joined(&list, &counter, &[(1, 3), (2, 1), (3, 1)]);
            counter.release(2);
            assert_eq!(list.select(&counter, skips, 10), expected, "skips: {skips}");
        }
    }

    #[test]
    fn nobody_is_assigned_before_an_earlier_order_is_a_row() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(2, 2, 0));
        assert_eq!(join(&list, &counter, 1, 1), Placed::Joined);
        joined(&list, &counter, &[(2, 1)]);
        counter.release(2);
        assert_eq!(list.select(&counter, false, 10), []);
        list.row_written(id(1));
        assert_eq!(list.select(&counter, false, 10), [(id(1), 1), (id(2), 1)]);
    }

    #[test]
    fn what_was_not_assigned_goes_to_the_next() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(2, 2, 0));
        joined(&list, &counter, &[(1, 1), (2, 1)]);
        counter.release(1);
        let selected = list.select(&counter, false, 10);
        // Cancelled meanwhile.
        list.remove(&counter, [id(1)]);
        list.give_back(&counter, &selected);
        assert_eq!(list.select(&counter, false, 10), [(id(2), 1)]);
        // Not committed.
        list.give_back(&counter, &[(id(2), 1)]);
        assert!(list.overdue() > Duration::ZERO);
        assert_eq!(list.select(&counter, false, 10), [(id(2), 1)]);
    }

    #[test]
    fn the_list_is_bounded_and_refuses_what_it_could_never_serve() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(1, 1, 0));
        let place = |value, units| {
            let joiner = joiner(&counter, units, 1);
            let placed = list.hold_or_join(&counter, joiner, || Ok::<_, ()>((id(value), ())));
            placed.unwrap().0
        };
        assert_eq!(place(1, 2), Placed::TooMany);
        assert_eq!(place(2, 1), Placed::Joined);
        assert_eq!(place(3, 1), Placed::Full);
        assert_eq!(list.len(), 1);
    }

    #[test]
    fn an_order_for_more_units_than_a_lower_total_has_is_told() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(5, 2, 0));
        joined(&list, &counter, &[(1, 4), (2, 3), (3, 4)]);
        assert_eq!(join(&list, &counter, 4, 5), Placed::Joined);
        assert_eq!(list.unservable(counter.snapshot().total, 10), []);
        counter.set_total(3).unwrap();
        // That of the fourth is not a row yet.
        assert_eq!(list.unservable(counter.snapshot().total, 1), [id(1)]);
        assert_eq!(
            list.unservable(counter.snapshot().total, 10),
            [id(1), id(3)]
        );
        list.remove(&counter, [id(1), id(3), id(4)]);
        assert_eq!(list.unservable(counter.snapshot().total, 10), []);
        assert_eq!(list.select(&counter, false, 10), []);
        counter.release(2);
        assert_eq!(list.select(&counter, false, 10), [(id(2), 3)]);
    }

    #[test]
    fn a_draw_puts_its_entries_in_the_order_of_their_places_before_whoever_joins_later() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(9, 0, 0));
        for value in 1..=5 {
            let joiner = joiner(&counter, 1, 10);
            let entered = list.enter(&counter, joiner, || Ok::<_, ()>((id(1 << 40 | value), ())));
            assert_eq!(entered.unwrap().0, Placed::Joined, "units are free");
        }
        assert_eq!(list.joining(), 5);
        let at = |value: u64| id(1 << 40 | value);
        (1..=5).for_each(|value| list.row_written(at(value)));
        assert_eq!(list.joining(), 0);
        // Cancelled before the draw, and back after it, as by a failover.
        list.remove(&counter, [at(2)]);
        list.take_places([(at(4), 1), (at(2), 2), (at(1), 3), (at(5), 4), (at(3), 5)]);
        list.restore(&counter, at(2), 1);
        assert_eq!(join(&list, &counter, 1 << 40 | 6, 1), Placed::Joined);
        list.row_written(at(6));
        let order: Vec<_> = list
            .select(&counter, false, 10)
            .into_iter()
            .map(|(id, _)| id)
            .collect();
        assert_eq!(order, [4, 2, 1, 5, 3, 6].map(at));
        assert_eq!(list.position(at(1)), Some(3));
        assert_eq!(list.first(), Some(at(1)));
        list.remove(&counter, [at(2), at(4)]);
        assert_eq!(list.position(at(1)), Some(1));
        list.remove(&counter, [at(1)]);
        assert_eq!(list.oldest(), Some(at(3)));
        assert_eq!(list.first(), Some(at(1)), "it may come back");
    }

    #[test]
    fn a_node_keeps_units_while_orders_wait_elsewhere_and_tells_positions_among_all() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(2, 0, 0));
        let mut joiner = joiner(&counter, 3, 10);
        joiner.total = 9;
        joiner.is_shared = true;
        let mut next = 1;
        let mut place = |joiner| {
            next += 1;
            let placed = list.hold_or_join(&counter, joiner, || Ok::<_, ()>((id(next), ())));
            placed.unwrap().0
        };
        assert_eq!(place(joiner), Placed::Elsewhere, "others may have units");
        list.note_somebody(&counter);
        assert_eq!((counter.free(), counter.kept(), list.waiting()), (0, 2, 1));
        assert_eq!(place(joiner), Placed::Joined, "somebody waits");
        assert_eq!(list.position(id(3)), Some(1), "nothing is known of others");
        // Two at other nodes, before and behind it.
        list.note_elsewhere(&counter, 1, &[(4, None), (6, Some(id(3)))]);
        list.note_joined(1, &[(9, None)]);
        assert_eq!((list.waiting(), list.position(id(3))), (3, Some(2)));
        assert_eq!(place(joiner), Placed::Joined);
        assert!(!list.lacks_turn(id(3)) && list.lacks_turn(id(4)));
        assert_eq!(list.position(id(4)), Some(4), "behind all that have a turn");
        list.give_away(&counter, vec![id(3), id(4)]);
        assert!(
            list.is_empty() && counter.is_waiting(),
            "they wait elsewhere now"
        );
        list.note_elsewhere(&counter, 0, &[]);
        assert_eq!((counter.kept(), list.waiting()), (2, 0), "others may wait");
        list.resume(&counter, clock::now() + Duration::from_millis(1));
        assert_eq!((counter.free(), counter.kept()), (2, 0));
    }

    #[test]
    fn whoever_is_the_first_to_wait_joins_while_all_nodes_keep_what_comes_free() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(0, 0, 0));
        let joiner = Joiner {
            total: 9,
            is_shared: true,
            ..joiner(&counter, 1, 10)
        };
        let place = |value| {
            let placed = list.hold_or_join(&counter, joiner, || Ok::<_, ()>((id(value), ())));
            placed.unwrap().0
        };
        assert_eq!(place(1), Placed::Elsewhere);
        list.open();
        assert_eq!(place(2), Placed::Joined);
        assert!(!list.close(false), "the others cannot see it yet");
        list.row_written(id(2));
        assert!(list.close(false) && !list.takes_first());
        assert_eq!(place(3), Placed::Joined, "somebody waits");
        list.remove(&counter, [id(2), id(3)]);
        assert_eq!(place(4), Placed::Elsewhere);

        // At another node.
        let (list, counter) = (Waitlist::default(), StockCounter::new(1, 1, 0));
        let looked_at = clock::now();
        list.suspend(&counter);
        counter.release(1);
        assert_eq!((counter.free(), counter.kept(), list.waiting()), (0, 1, 0));
        list.note_elsewhere(&counter, 0, &[]);
        list.resume(&counter, looked_at);
        assert_eq!(counter.kept(), 1, "what was read is older");
        list.resume(&counter, clock::now() + Duration::from_millis(1));
        assert_eq!((counter.free(), counter.kept()), (1, 0));
    }

    /// After a takeover a list has the ids of two clocks.
    #[test]
    fn orders_of_one_moment_at_two_nodes_are_both_on_the_list() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(0, 0, 0));
        let moment = OrderId::floor_of(UnixMillis(1_800_000_000_000)).get();
        let in_lane = |lane: u64| id(moment | lane << 16 | 7);
        assert!(list.restore(&counter, in_lane(3), 1));
        assert!(list.restore(&counter, in_lane(4), 1));
        assert!(!list.restore(&counter, in_lane(4), 1), "it is there");
        assert_eq!(list.len(), 2);
        list.remove(&counter, [in_lane(3)]);
        assert!(list.has(in_lane(4)) && !list.has(in_lane(3)));
    }

    #[test]
    fn positions_are_those_of_a_sorted_vector_whatever_joins_and_leaves() {
        let (list, counter) = (Waitlist::default(), StockCounter::new(1, 1, 0));
        let mut twin: Vec<u64> = Vec::new();
        let mut random = 7_u64;
        for step in 0..20_000_u64 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            match random >> 62 {
                0 if !twin.is_empty() => {
                    let gone = twin.remove((random >> 20) as usize % twin.len());
                    list.remove(&counter, [id(gone)]);
                }
                1 => {
                    let value = 1 + (random >> 24) % 30_000;
                    let is_new = list.restore(&counter, id(value), 1);
                    assert_eq!(is_new, twin.binary_search(&value).is_err());
                    if let Err(at) = twin.binary_search(&value) {
                        twin.insert(at, value);
                    }
                }
                _ => {
                    list.restore(&counter, id(30_001 + step), 1);
                    twin.push(30_001 + step);
                }
            }
        }
        assert_eq!(list.len(), twin.len());
        for (rank, value) in twin.iter().enumerate() {
            assert_eq!(list.position(id(*value)), Some(rank + 1));
        }
        assert_eq!(list.first().map(OrderId::get), twin.first().copied());
        assert!(counter.is_waiting());
        list.remove(&counter, twin.into_iter().map(id));
        assert!(!counter.is_waiting() && list.is_empty());
    }
}
