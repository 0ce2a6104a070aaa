//! The catalogue: the SKUs on sale, with their terms and counters.

mod counter;
mod draw;
mod fault;
mod shared;
mod terms;
mod turns;
mod waitlist;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use crossbeam::utils::CachePadded;

use crate::faults::bug;
use crate::order::receipt::ReceiptSku;
use crate::order::{OrderId, Quantity, Refusal, SkuId, SkuNumber, SkuTag, UnixMillis};
use crate::sync::Guarded;
pub use counter::{BelowCommitted, NotEnough, StockCounter, StockSnapshot};
pub use draw::{Draw, DrawChange, DrawPhase};
pub use fault::{Fault, Parking, Refused, Seen};
pub use shared::{Ask, SaleStock, Shared, TooManyAsk, Wanted};
pub use terms::{DayTime, DayWindow, DrawTerms, SaleTerms, WAITLIST_MAX_DEFAULT, WaitlistTerms};
pub use turns::Turn;
use turns::Turns;
pub use waitlist::{HasLeft, Joiner, Placed, WaitPlace, Waitlist};

/// Whether a SKU is on sale now; the `state` of API.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaleState {
    /// Orders are taken.
    Open,
    /// Before `opens_at`.
    NotOpen,
    /// From `closes_at` on.
    Closed,
    /// Paused by an operator, or because the database refused its counters.
    Paused,
    /// Open, and no unit is free.
    SoldOut,
    /// Open until the draw, which each order enters.
    EntriesOpen,
    /// Entries have ended, and the draw is not made yet.
    EntriesFixed,
    /// Open, and its draw is made.
    Drawn,
}

impl SaleState {
    /// Its name in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            SaleState::Open => "open",
            SaleState::NotOpen => "not_open",
            SaleState::Closed => "closed",
            SaleState::Paused => "paused",
            SaleState::SoldOut => "sold_out",
            SaleState::EntriesOpen => "entries_open",
            SaleState::EntriesFixed => "entries_fixed",
            SaleState::Drawn => "drawn",
        }
    }
}

/// One SKU: identity, terms and counters.
#[derive(Debug)]
pub struct Sku {
    /// The shop's id, shared by every order of the SKU.
    pub id: Arc<SkuId>,
    /// The database's number.
    pub number: SkuNumber,
    terms: ArcSwap<SaleTerms>,
    /// Padded: the word that every core updates must not share its cache line.
    counter: CachePadded<StockCounter>,
    paused: AtomicBool,
    fault: Arc<Fault>,
    waitlist: Waitlist,
    draw: ArcSwapOption<Draw>,
    /// `None`: a single node sells it.
    shared: Option<Box<Shared>>,
}

impl Sku {
    /// A SKU with the values of the database.
    pub fn new(
        id: SkuId,
        number: SkuNumber,
        terms: SaleTerms,
        counter: StockCounter,
        paused: bool,
    ) -> Self {
        Sku {
            id: Arc::new(id),
            number,
            terms: ArcSwap::from_pointee(terms),
            counter: CachePadded::new(counter),
            paused: AtomicBool::new(paused),
            fault: Arc::default(),
            waitlist: Waitlist::default(),
            draw: ArcSwapOption::empty(),
            shared: None,
        }
    }

    /// The same as `node` sees it, which sells its share of it.
    pub fn at_node(self, node: i16) -> Self {
        Sku {
            shared: Some(Box::new(Shared::new(node))),
            ..self
        }
    }

    /// What a node knows of it beside its own share; `None`: a single node sells it.
    pub fn shared(&self) -> Option<&Shared> {
        self.shared.as_deref()
    }

    /// The counters of the whole sale, for people. A node that has not read them yet knows its own share alone.
    pub fn stock(&self) -> StockSnapshot {
        let Some(sale) = self.shared().and_then(Shared::sale) else {
            return self.counter.snapshot();
        };
        let mut stock = sale.stock;
        if self.is_waited() {
            // Wherever they are, they are kept for those who wait.
            stock.held += std::mem::take(&mut stock.free);
        }
        stock
    }

    /// The refusal of an order for which too few units are free here.
    pub fn refuse(&self, quantity: Quantity, available: u32) -> Refusal {
        match self.shared() {
            None => Refusal::SoldOut { available },
            // Whatever comes free is kept for those who wait.
            Some(_) if self.is_waited() => Refusal::SoldOut { available },
            Some(shared) if shared.is_sold_out(quantity.get()) => Refusal::SoldOut {
                available: self.stock().free.min(quantity.get() - 1),
            },
            Some(_) => Refusal::StockElsewhere,
        }
    }

    /// Whether orders wait for its units, at other nodes too.
    pub fn is_waited(&self) -> bool {
        self.waitlist.waiting() > 0
    }

    /// Whether it is known what becomes of an order that accepts to wait and finds too few units here: at a node somebody
    /// waits already, or nobody else gets what comes free, or there is no list and nobody has units.
    pub fn knows_for_waiting(&self, quantity: Quantity) -> bool {
        let Some(shared) = self.shared() else {
            return true;
        };
        let has_list = self.terms.load().waitlist.max > 0;
        self.is_waited()
            || self.waitlist.takes_first()
            || !has_list && shared.is_sold_out(quantity.get())
    }

    /// The terms in force.
    pub fn terms(&self) -> arc_swap::Guard<Arc<SaleTerms>> {
        self.terms.load()
    }

    /// Replaces the terms, and leaves the draw as it is.
    pub fn set_terms(&self, terms: SaleTerms) {
        self.terms.store(Arc::new(terms));
    }

    /// Takes over the terms of `stored`, and its draw.
    pub fn adopt_terms(&self, stored: &Sku) {
        let (terms, draw) = (stored.terms.load_full(), stored.draw());
        // Whoever sees terms that name a draw finds it.
        if draw.is_some() {
            self.set_draw(draw);
            self.terms.store(terms);
        } else {
            self.terms.store(terms);
            self.set_draw(None);
        }
    }

    /// The counters.
    pub fn counter(&self) -> &StockCounter {
        &self.counter
    }

    /// The orders that wait for its units.
    pub fn waitlist(&self) -> &Waitlist {
        &self.waitlist
    }

    /// Its draw, if its terms name one.
    pub fn draw(&self) -> Option<Arc<Draw>> {
        self.draw.load_full()
    }

    /// Sets its draw. The draw that it has already stays: its secrets do not change.
    pub fn set_draw(&self, draw: Option<Arc<Draw>>) {
        match draw {
            None => self.draw.store(None),
            Some(draw) if self.draw.load().is_none() => self.draw.store(Some(draw)),
            Some(_) => {}
        }
    }

    /// Whether units may go out as far as its draw goes: it has none, or it is made.
    pub fn is_drawn(&self) -> bool {
        let draw = self.draw.load();
        draw.as_ref().is_none_or(|draw| draw.is_drawn())
    }

    /// Removes an order from the waiting list.
    pub fn leave_waitlist(&self, id: OrderId) {
        self.waitlist.remove(&self.counter, [id]);
    }

    /// Whether waiting orders may be assigned units at `now`.
    pub fn may_assign(&self, now: UnixMillis) -> bool {
        let between = self.terms.load().waitlist.assign_between;
        self.window(now).is_ok()
            && between.is_none_or(|between| between.has(now))
            && (self.is_drawn() || bug("assign_before_the_draw"))
    }

    /// Whether an order is passed over that asks for more units than are left. An entry of a draw is, and keeps its rank.
    pub fn skips(&self) -> bool {
        let is_by_rank = self.draw.load().is_some() && !bug("stop_at_who_does_not_fit");
        self.terms.load().waitlist.skips || is_by_rank
    }

    /// Takes kept units for the orders that are next in line, at most `max` of them.
    pub fn select_waiting(&self, max: usize) -> Vec<(OrderId, u32)> {
        self.waitlist.select(&self.counter, self.skips(), max)
    }

    /// Holds `quantity` of the free units; dropping the guard releases them.
    ///
    /// # Errors
    /// [`Refusal::SoldOut`] if fewer are free; at a node also [`Refusal::StockElsewhere`].
    pub fn hold(self: &Arc<Self>, quantity: Quantity) -> Result<Hold, Refusal> {
        match self.counter.hold(quantity.get()) {
            Ok(()) => Ok(Hold {
                sku: Arc::clone(self),
                units: quantity.get(),
            }),
            // Units that do not exist: the deliberate defect that every other guard has to catch.
            Err(_) if bug("hold_without_checking") => Ok(Hold {
                sku: Arc::clone(self),
                units: 0,
            }),
            Err(NotEnough { available }) => Err(self.refuse(quantity, available)),
        }
    }

    /// Whether an operator has paused sales of this SKU.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Pauses or resumes sales of this SKU for an operator.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// The fault of this SKU's counters, if any, with its parked orders. During a fault no orders
    /// are taken.
    pub fn fault(&self) -> &Arc<Fault> {
        &self.fault
    }

    /// Whether the database refuses this SKU's counters.
    pub fn is_faulted(&self) -> bool {
        self.fault.is_set()
    }

    /// Whether the sale takes orders at `now`.
    ///
    /// # Errors
    /// The refusal for the buyer.
    pub fn window(&self, now: UnixMillis) -> Result<(), Refusal> {
        self.window_at(|| now)
    }

    /// Whether the sale takes orders now, by the wall clock, because opening times are public. The
    /// clock is read only if the terms name a time.
    ///
    /// # Errors
    /// The refusal for the buyer.
    pub fn window_now(&self) -> Result<(), Refusal> {
        self.window_at(UnixMillis::now)
    }

    fn window_at(&self, now: impl FnOnce() -> UnixMillis) -> Result<(), Refusal> {
        if self.paused.load(Ordering::Relaxed) || self.is_faulted() {
            return Err(Refusal::SalePaused);
        }
        let terms = self.terms.load();
        if terms.opens_at.is_none() && terms.closes_at.is_none() {
            return Ok(());
        }
        let now = now();
        match (terms.opens_at, terms.closes_at) {
            (Some(opens_at), _) if now < opens_at => Err(Refusal::SaleNotOpen { opens_at }),
            (_, Some(closes_at)) if now >= closes_at => Err(Refusal::SaleClosed),
            _ => Ok(()),
        }
    }

    fn free(&self) -> u32 {
        match self.shared() {
            None => self.counter.free(),
            Some(_) => self.stock().free,
        }
    }

    /// The `state` of API.md at `now`.
    pub fn state(&self, now: UnixMillis) -> SaleState {
        match self.window(now) {
            Err(Refusal::SaleNotOpen { .. }) => SaleState::NotOpen,
            Err(Refusal::SaleClosed) => SaleState::Closed,
            Err(_) => SaleState::Paused,
            Ok(()) => match self.draw.load().as_ref().map(|draw| draw.phase()) {
                Some(DrawPhase::Open | DrawPhase::Closed) => SaleState::EntriesOpen,
                Some(DrawPhase::Fixed) => SaleState::EntriesFixed,
                Some(DrawPhase::Drawn) => SaleState::Drawn,
                None if self.free() == 0 => SaleState::SoldOut,
                None => SaleState::Open,
            },
        }
    }
}

/// Held units. Dropping the guard releases them; [`Hold::commit`] leaves them to the order that now
/// accounts for them.
#[derive(Debug)]
#[must_use = "dropping a hold gives its units back"]
pub struct Hold {
    sku: Arc<Sku>,
    units: u32,
}

impl Hold {
    /// Of units that were taken from the counter of `sku`.
    pub fn of(sku: &Arc<Sku>, quantity: Quantity) -> Self {
        Hold {
            sku: Arc::clone(sku),
            units: quantity.get(),
        }
    }

    /// Keeps the units held: the settlement of the order releases them, or its row keeps them.
    pub fn commit(mut self) {
        self.units = 0;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.units > 0 {
            self.sku.counter.release(self.units);
        }
    }
}

/// Every SKU, by the shop's id and by the database's number.
///
/// Read on every request and changed by operators: readers load an immutable map without a lock,
/// writers replace a copy.
#[derive(Debug, Default)]
pub struct Catalogue {
    maps: ArcSwap<CatalogueMaps>,
    changing: Guarded<()>,
    paused: AtomicBool,
    /// SKUs whose counters the database refuses.
    faults: AtomicUsize,
}

#[derive(Debug, Default, Clone)]
struct CatalogueMaps {
    by_id: HashMap<SkuId, Arc<Sku>, foldhash::fast::RandomState>,
    by_number: HashMap<SkuNumber, Arc<Sku>, foldhash::fast::RandomState>,
}

impl Catalogue {
    /// The SKU with this id.
    pub fn get(&self, id: &SkuId) -> Option<Arc<Sku>> {
        self.maps.load().by_id.get(id).map(Arc::clone)
    }

    /// The SKU with this number.
    pub fn by_number(&self, number: SkuNumber) -> Option<Arc<Sku>> {
        self.maps.load().by_number.get(&number).map(Arc::clone)
    }

    /// The SKU of a receipt. `None` also if two SKUs have the same tag, because it is then unknown
    /// which was bought.
    pub fn in_receipt(&self, sku: ReceiptSku) -> Option<Arc<Sku>> {
        let tag = match sku {
            ReceiptSku::Number(number) => return self.by_number(number),
            ReceiptSku::Tag(tag) => tag,
        };
        let maps = self.maps.load();
        let mut found = maps
            .by_id
            .iter()
            .filter(|(id, _)| SkuTag::of(id.as_str()) == tag);
        let (_, sku) = found.next()?;
        found.next().is_none().then(|| Arc::clone(sku))
    }

    /// Every SKU, ordered by id.
    pub fn all(&self) -> Vec<Arc<Sku>> {
        let mut all: Vec<_> = self.maps.load().by_id.values().map(Arc::clone).collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// The SKUs with orders that wait for units.
    pub fn waiting(&self) -> Vec<Arc<Sku>> {
        let maps = self.maps.load();
        let waiting = |sku: &&Arc<Sku>| sku.counter.is_waiting();
        maps.by_number
            .values()
            .filter(waiting)
            .map(Arc::clone)
            .collect()
    }

    /// Number of SKUs.
    pub fn count(&self) -> usize {
        self.maps.load().by_number.len()
    }

    /// The SKUs of which requests want units that this node's share has not.
    pub fn wanted(&self) -> Vec<Arc<Sku>> {
        let maps = self.maps.load();
        let wanted = |sku: &&Arc<Sku>| sku.shared().and_then(Shared::wanted).is_some();
        maps.by_number
            .values()
            .filter(wanted)
            .map(Arc::clone)
            .collect()
    }

    /// Adds SKUs. An existing SKU is kept, because its counters are in use.
    pub fn add(&self, skus: impl IntoIterator<Item = Sku>) {
        self.changing.with(|()| {
            let mut maps = CatalogueMaps::clone(&self.maps.load());
            for sku in skus {
                let sku = Arc::new(sku);
                let kept = maps.by_id.entry(SkuId::clone(&sku.id)).or_insert(sku);
                maps.by_number.insert(kept.number, Arc::clone(kept));
            }
            self.maps.store(Arc::new(maps));
        });
    }

    /// Notes that the database refuses a SKU's counters for `units`, with the reason. True: the SKU
    /// was sound before.
    pub fn set_fault(&self, sku: &Sku, reason: &str, units: u32) -> bool {
        // Counted before it is set: a fault that is set is always counted.
        self.faults.fetch_add(1, Ordering::Relaxed);
        let fresh = sku.fault.set(reason, units);
        if !fresh {
            self.faults.fetch_sub(1, Ordering::Relaxed);
        }
        fresh
    }

    /// Ends a SKU's fault: the database accepts its counters again, and no order is parked, as of
    /// `seen`. False: some were parked since.
    pub fn clear_fault(&self, sku: &Sku, seen: Seen) -> bool {
        let cleared = sku.fault.clear(seen);
        if cleared {
            self.faults.fetch_sub(1, Ordering::Relaxed);
        }
        cleared
    }

    /// Whether the database refuses any SKU's counters.
    pub fn has_faults(&self) -> bool {
        self.faults.load(Ordering::Relaxed) > 0
    }

    /// Pauses or resumes every sale.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// Whether every sale is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::Currency;

    fn sku(total: u32) -> Arc<Sku> {
        let terms = SaleTerms {
            title: "A".into(),
            unit_price: 100,
            currency: Currency::new("EUR").unwrap(),
            per_user_limit: None,
            opens_at: None,
            closes_at: None,
            waitlist: WaitlistTerms::default(),
            draw: None,
        };
        Arc::new(Sku::new(
            SkuId::new("A").unwrap(),
            SkuNumber(1),
            terms,
            StockCounter::new(total, 0, 0),
            false,
        ))
    }

    #[test]
    fn a_dropped_hold_gives_back_and_a_kept_one_does_not() {
        let sku = sku(3);
        let two = Quantity::new(2).unwrap();
        let hold = sku.hold(two).unwrap();
        assert_eq!(
            sku.hold(two).unwrap_err(),
            Refusal::SoldOut { available: 1 }
        );
        drop(hold);
        assert_eq!(sku.counter().free(), 3);
        sku.hold(two).unwrap().commit();
        assert_eq!(sku.counter().free(), 1);
    }

    #[test]
    fn units_that_come_back_go_to_those_who_wait_in_turn() {
        let sku = sku(0);
        let id = |n| OrderId::new(n).unwrap();
        let waits = |n, units| sku.waitlist().restore(sku.counter(), id(n), units);
        assert!(waits(1, 3) && waits(2, 3) && waits(3, 2) && !waits(3, 2));
        sku.counter().set_total(5).unwrap();
        let select = |skips, max| sku.waitlist().select(sku.counter(), skips, max);
        assert_eq!(
            select(false, 9),
            [(id(1), 3)],
            "3 do not suffice for the next"
        );
        assert_eq!(sku.counter().kept(), 2);
        assert_eq!(select(false, 9), [], "nobody is passed over");
        assert_eq!(select(true, 0), []);
        assert_eq!(select(true, 9), [(id(3), 2)]);
        assert_eq!((sku.counter().kept(), sku.counter().free()), (0, 0));
        sku.counter().set_total(8).unwrap();
        assert_eq!(select(true, 9), [(id(2), 3)]);
        assert_eq!(sku.counter().snapshot().held, 8);
    }

    #[test]
    fn units_that_are_withdrawn_leave_the_total_and_nobody_can_take_them() {
        let counter = StockCounter::new(10, 4, 3);
        counter.withdraw(2);
        let left = StockSnapshot {
            total: 8,
            free: 3,
            held: 4,
            sold: 1,
        };
        assert_eq!(counter.snapshot(), left);
        assert_eq!(counter.hold(4), Err(NotEnough { available: 3 }));
        // After a failover that lost a payment, its order holds its unit again.
        counter.hold_again(1);
        assert_eq!((counter.snapshot().held, counter.snapshot().sold), (5, 0));
    }

    #[test]
    fn total_never_falls_below_what_is_taken() {
        let counter = StockCounter::new(10, 4, 2);
        assert_eq!(counter.set_total(5), Err(BelowCommitted { committed: 6 }));
        assert_eq!(counter.set_total(6), Ok(()));
        assert_eq!(
            counter.snapshot(),
            StockSnapshot {
                total: 6,
                free: 0,
                held: 4,
                sold: 2
            }
        );
        counter.sell(4);
        counter.unsell(1);
        assert_eq!(
            counter.snapshot(),
            StockSnapshot {
                total: 6,
                free: 1,
                held: 0,
                sold: 5
            }
        );
    }

    #[test]
    fn the_extremes_of_the_word_hold() {
        let counter = StockCounter::new(u32::MAX, 0, 0);
        counter.hold(u32::MAX).unwrap();
        assert_eq!(counter.hold(1), Err(NotEnough { available: 0 }));
        counter.release(u32::MAX);
        assert_eq!(counter.free(), u32::MAX);
    }

    #[test]
    #[should_panic(expected = "released 1 units where only 0 were taken")]
    fn releasing_what_was_not_taken_is_a_broken_invariant() {
        StockCounter::new(5, 0, 0).release(1);
    }

    #[test]
    fn many_threads_on_one_unit_take_it_once() {
        for _ in 0..1_000 {
            let sku = sku(1);
            let won: usize = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|_| scope.spawn(|| sku.hold(Quantity::ONE).map(Hold::commit).is_ok()))
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| usize::from(thread.join().unwrap()))
                    .sum()
            });
            assert_eq!(won, 1);
        }
    }

    #[test]
    fn the_window_decides_by_pause_then_opening_then_closing() {
        let sku = sku(1);
        let mut terms = SaleTerms::clone(&sku.terms());
        terms.opens_at = Some(UnixMillis(100));
        terms.closes_at = Some(UnixMillis(200));
        sku.set_terms(terms);
        assert_eq!(
            sku.window(UnixMillis(99)),
            Err(Refusal::SaleNotOpen {
                opens_at: UnixMillis(100)
            })
        );
        assert_eq!(sku.window(UnixMillis(100)), Ok(()));
        assert_eq!(sku.window(UnixMillis(200)), Err(Refusal::SaleClosed));
        sku.set_paused(true);
        assert_eq!(sku.window(UnixMillis(150)), Err(Refusal::SalePaused));
    }

    #[test]
    fn a_sale_without_a_beginning_may_close_and_one_without_an_end_may_open() {
        let window = |opens_at: Option<i64>, closes_at: Option<i64>| {
            let sku = sku(1);
            let mut terms = SaleTerms::clone(&sku.terms());
            terms.opens_at = opens_at.map(UnixMillis);
            terms.closes_at = closes_at.map(UnixMillis);
            sku.set_terms(terms);
            sku.window(UnixMillis(150))
        };
        assert_eq!(window(None, None), Ok(()));
        assert_eq!(window(None, Some(150)), Err(Refusal::SaleClosed));
        let opens_at = UnixMillis(151);
        assert_eq!(
            window(Some(151), None),
            Err(Refusal::SaleNotOpen { opens_at })
        );
    }
}
