//! Orders in flight, by id: waiting requests and the workers that write meet here.

mod slot;

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::order::{Lane, LaneSet, Order, OrderId};
use crate::sync::{AtomicU64, AtomicUsize, DashMap, Entry, Ordering, Waker};
pub use slot::{Settled, Slot, SlotState};

/// An order in flight with the slot that decides its outcome. One allocation, shared by the queue,
/// the map and the waiting requests.
#[derive(Debug)]
pub struct PendingOrder {
    /// The row to be written.
    pub order: Order,
    /// State machine of the order.
    pub slot: Slot,
    /// When the order is abandoned if no worker has claimed it, as [`millis_after`]; `u64::MAX` for
    /// never.
    deadline_ms: u64,
    /// Earliest deadline of any request waiting for the order, as [`millis_after`]; `u64::MAX` before the
    /// order is in the map.
    look_at_ms: AtomicU64,
}

impl PendingOrder {
    /// An order that may be claimed until `deadline`. `waker` belongs to the request that sent it.
    pub fn new(order: Order, deadline: Instant, waker: Option<Arc<Waker>>) -> Self {
        Self::with_slot(order, Slot::new(waker), millis_after(deadline))
    }

    /// An order that goes to a log first, and may be sent there until `deadline`. Once it is recorded
    /// it has no deadline: only its request stops waiting.
    pub fn appending(order: Order, deadline: Instant, waker: Option<Arc<Waker>>) -> Self {
        Self::with_slot(order, Slot::appending(waker), millis_after(deadline))
    }

    /// An order that was read back from a log's `span`.
    pub fn recovered(order: Order, span: u64) -> Self {
        Self::with_slot(order, Slot::recovered(span), NEVER)
    }

    fn with_slot(order: Order, slot: Slot, deadline_ms: u64) -> Self {
        PendingOrder {
            order,
            slot,
            deadline_ms,
            look_at_ms: AtomicU64::new(NEVER),
        }
    }

    /// Whether the order's own deadline has passed; up to a millisecond late.
    pub fn is_overdue(&self, now: Instant) -> bool {
        millis(now) >= self.deadline_ms
    }
}

/// A map entry that is its own key: 8 bytes, because the id is not stored again.
#[derive(Clone, Debug)]
struct ById(Arc<PendingOrder>);

impl Borrow<OrderId> for ById {
    fn borrow(&self) -> &OrderId {
        &self.0.order.id
    }
}

impl Hash for ById {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.order.id.hash(state);
    }
}

impl PartialEq for ById {
    fn eq(&self, other: &Self) -> bool {
        self.0.order.id == other.0.order.id
    }
}

impl Eq for ById {}

/// The map of orders in flight, bounded by the capacity of the queue and the workers.
#[derive(Debug)]
pub struct Pending {
    /// Used as a set; [`Pending::insert`] needs the entry API of a map.
    orders: DashMap<ById, (), foldhash::quality::RandomState>,
    /// No deadline is earlier than this moment, as [`millis_after`]; `u64::MAX` if none is known. It
    /// spares the deadline task the walk through the map while nothing is due.
    next_due_ms: AtomicU64,
    /// Running totals of the orders that left the map for the log, and of those read back. Both only grow, so that [`Pending::in_flight`] notices a move.
    spilled: AtomicUsize,
    read_back: AtomicUsize,
}

impl Pending {
    /// A map sized for `capacity` orders, so that it never resizes under load.
    pub fn with_capacity(capacity: usize) -> Self {
        Pending {
            orders: DashMap::with_capacity_and_hasher(
                capacity,
                foldhash::quality::RandomState::default(),
            ),
            next_due_ms: AtomicU64::new(NEVER),
            spilled: AtomicUsize::new(0),
            read_back: AtomicUsize::new(0),
        }
    }

    /// Enters an order before a worker can see it. It replaces an entry of the same id: the
    /// journal's reader may bring an order back before the appender has removed the spilled one.
    pub fn insert(&self, pending: &Arc<PendingOrder>) {
        // One step, because the id must not be missing in between. `DashMap::insert` would keep the
        // existing key, which is the other order.
        match self.orders.entry(ById(Arc::clone(pending))) {
            Entry::Occupied(known) => {
                known.replace_entry(());
            }
            Entry::Vacant(place) => {
                place.insert(());
            }
        }
        self.wake_by_ms(pending, pending.deadline_ms);
    }

    /// Makes sure that requests waiting for `pending` are woken at `deadline`: a duplicate or a
    /// long poll may wait for less time than the order itself.
    pub fn wake_by(&self, pending: &PendingOrder, deadline: Instant) {
        self.wake_by_ms(pending, millis_after(deadline));
    }

    fn wake_by_ms(&self, pending: &PendingOrder, due: u64) {
        // Dekker's protocol with `due`: this thread writes `look_at_ms` and then reads
        // `next_due_ms`; the deadline task writes `next_due_ms` and then reads `look_at_ms`. All
        // four accesses are sequentially consistent, so at least one side sees the other: the
        // deadline task finds the new moment, or this thread finds the mark that `due` reset.
        pending.look_at_ms.fetch_min(due, Ordering::SeqCst);
        // Almost always later than the known moment: one read, no write.
        if due < self.next_due_ms.load(Ordering::SeqCst) {
            self.next_due_ms.fetch_min(due, Ordering::AcqRel);
        }
    }

    /// The order in flight with this id.
    pub fn get(&self, id: OrderId) -> Option<Arc<PendingOrder>> {
        self.orders.get(&id).map(|entry| Arc::clone(&entry.key().0))
    }

    /// Removes an order whose slot is final.
    pub fn remove(&self, id: OrderId) {
        self.orders.remove(&id);
    }

    /// Removes this very order, and not another of the same id that was read back meanwhile.
    pub fn remove_this(&self, pending: &Arc<PendingOrder>) {
        self.orders.remove_if(&pending.order.id, |known, ()| {
            Arc::ptr_eq(&known.0, pending)
        });
    }

    /// Orders in flight now, in memory and on the disk. An order moving between the two may be
    /// counted twice, but is never missed.
    pub fn in_flight(&self) -> usize {
        loop {
            let spilled = self.spilled.load(Ordering::Acquire);
            let read_back = self.read_back.load(Ordering::Acquire);
            let in_memory = self.len();
            // Orders read back are entered before they are counted: reading in this sequence counts
            // them twice rather than missing them. An order that spills meanwhile could be missed,
            // so retry.
            if self.spilled.load(Ordering::Acquire) == spilled {
                return spilled - read_back + in_memory;
            }
        }
    }

    /// Counts orders that are about to leave memory for the disk.
    pub fn spilled(&self, orders: usize) {
        self.spilled.fetch_add(orders, Ordering::AcqRel);
    }

    /// Counts orders that are back in memory.
    pub fn read_back(&self, orders: usize) {
        self.read_back.fetch_add(orders, Ordering::AcqRel);
    }

    /// Orders in flight in memory now.
    pub fn len(&self) -> usize {
        self.orders.len()
    }

    /// Whether no order is in flight in memory.
    pub fn is_empty(&self) -> bool {
        self.orders.is_empty()
    }

    /// Every order in flight with a deadline of some request that has passed, the oldest first. Walks the map only if
    /// something can be due; otherwise costs one read.
    pub fn due(&self, now: Instant) -> Vec<Arc<PendingOrder>> {
        let now_ms = millis(now);
        if self.next_due_ms.load(Ordering::Acquire) > now_ms {
            return Vec::new();
        }
        // Reset before the walk: an order entered during the walk sets it again, see `wake_by_ms`.
        self.next_due_ms.store(NEVER, Ordering::SeqCst);
        let mut due = Vec::new();
        let mut next = NEVER;
        for entry in &self.orders {
            let ById(pending) = entry.key();
            let mut look_at = pending.look_at_ms.load(Ordering::SeqCst);
            if look_at <= now_ms {
                due.push(Arc::clone(pending));
                // Next is the order's own deadline. If that has passed, the order is being written.
                let later = match pending.deadline_ms {
                    deadline if deadline > now_ms => deadline,
                    // A log has it: it is not abandoned any more.
                    _ if pending.slot.is_recorded()
                        && pending.slot.state() != SlotState::Appending =>
                    {
                        NEVER
                    }
                    _ => now_ms + OVERDUE_RECHECK.as_millis() as u64,
                };
                // An earlier moment that was requested meanwhile is kept.
                let _ = pending.look_at_ms.compare_exchange(
                    look_at,
                    later,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                look_at = later;
            }
            next = next.min(look_at);
        }
        self.next_due_ms.fetch_min(next, Ordering::AcqRel);
        due.sort_unstable_by_key(|pending| pending.order.id);
        due
    }

    /// Those of `lanes` that have an order in flight. Walks all.
    pub fn among(&self, lanes: LaneSet) -> LaneSet {
        let orders = self.orders.iter();
        let of = orders.map(|entry| Lane::of(&entry.key().0.order.user_id));
        of.filter(|lane| lanes.has(*lane)).collect()
    }

    /// Every order in flight, for the final settlement at shutdown.
    pub fn all(&self) -> Vec<Arc<PendingOrder>> {
        self.orders
            .iter()
            .map(|entry| Arc::clone(&entry.key().0))
            .collect()
    }
}

/// A deadline that never comes.
const NEVER: u64 = u64::MAX;

/// Whole milliseconds since the start that have passed at `now`: half the size of an [`Instant`], and small enough
/// for an atomic.
fn millis(now: Instant) -> u64 {
    let since = now.saturating_duration_since(clock::start()).as_millis();
    u64::try_from(since).unwrap_or(NEVER)
}

/// The first whole millisecond at or after `deadline`. Rounded down, a request would be woken before its deadline, wait on,
/// and, if a log has its order, never be woken again.
fn millis_after(deadline: Instant) -> u64 {
    millis(deadline + Duration::from_nanos(999_999))
}

/// Interval at which requests waiting for an overdue order that is being written are woken to check
/// their own deadlines.
const OVERDUE_RECHECK: Duration = Duration::from_millis(100);

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::order::*;
    use std::task::Wake;

    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// An order of which only the id matters.
    pub(in super::super) fn order(id: u64) -> Order {
        Order {
            id: OrderId::new(id).unwrap(),
            user_id: UserId::new("u").unwrap(),
            sku_id: SkuId::new("s").unwrap().into(),
            sku: SkuNumber(1),
            quantity: Quantity::ONE,
            adjustment: 0,
            amount: 1,
            currency: Currency::new("EUR").unwrap(),
            created_at: UnixMillis(0),
            expires_at: UnixMillis(0),
            key: None,
            payload: PayloadHash(0),
            attributes: None,
        }
    }

    #[test]
    fn an_order_in_flight_fits_its_size_class() {
        // With the two counts of its `Arc` it is 192 bytes, a size class of mimalloc. One byte more
        // and each order in the queue takes the next class, 224.
        const COUNTS: usize = 2 * size_of::<usize>();
        assert!(size_of::<PendingOrder>() + COUNTS <= 192);
        assert_eq!(size_of::<ById>(), size_of::<usize>());
    }

    #[test]
    fn a_claimed_order_cannot_be_abandoned_nor_the_other_way_round() {
        let slot = Slot::new(None);
        assert!(slot.claim());
        assert!(!slot.abandon());
        slot.settle(Settled::Persisted);
        assert_eq!(slot.state(), SlotState::Persisted);
        let slot = Slot::new(None);
        assert!(slot.abandon());
        assert!(!slot.claim());
    }

    /// What a slot says of the log: its state, whether the log has it for certain, or may have it, and in which span.
    fn log_of(slot: &Slot) -> (SlotState, bool, bool, u64) {
        (
            slot.state(),
            slot.is_durable(),
            slot.is_recorded(),
            slot.span(),
        )
    }

    #[test]
    fn what_the_log_has_of_an_order_stays_known_whatever_becomes_of_it() {
        const SPAN: u64 = (1 << 54) - 1;
        let appended = |durable| {
            let slot = Slot::appending(None);
            assert!(slot.send());
            assert_eq!(log_of(&slot), (SlotState::Appending, false, true, 0));
            assert!(!slot.abandon() && !slot.spill() && !slot.claim());
            slot.appended(SPAN, durable);
            slot
        };
        let slots = [
            (true, Slot::recovered(SPAN)),
            (true, appended(true)),
            (false, appended(false)),
        ];
        for (durable, slot) in slots {
            assert_eq!(log_of(&slot), (SlotState::Waiting, durable, true, SPAN));
            assert!(!slot.abandon(), "a restart would write it");
            slot.subscribe(Waker::noop().clone());
            assert!(slot.claim());
            slot.take_wakers(|_| {});
            assert_eq!(log_of(&slot), (SlotState::Claimed, durable, true, SPAN));
            slot.settle(Settled::Unwritten);
            assert_eq!(log_of(&slot), (SlotState::Unwritten, durable, true, SPAN));
        }
        let spilled = appended(true);
        assert!(spilled.spill() && !spilled.spill());
        assert_eq!(log_of(&spilled), (SlotState::OnDisk, true, true, SPAN));
    }

    #[test]
    fn what_the_log_has_not_may_be_abandoned_and_does_not_spill() {
        let slot = Slot::appending(None);
        assert!(slot.send());
        slot.not_sent();
        assert_eq!(log_of(&slot), (SlotState::Appending, false, false, 0));
        assert!(slot.abandon() && !slot.send());
        assert_eq!(log_of(&slot), (SlotState::Abandoned, false, false, 0));
        let slot = Slot::new(None);
        assert_eq!(log_of(&slot), (SlotState::Waiting, false, false, 0));
        assert!(!slot.spill());
    }

    #[test]
    fn only_a_state_that_nothing_follows_is_final() {
        let settled = |settled| {
            let slot = Slot::new(None);
            assert!(slot.claim() && !slot.state().is_final());
            slot.settle(settled);
            slot.state()
        };
        let ends = [
            (Settled::Persisted, SlotState::Persisted),
            (Settled::Failed, SlotState::Failed),
            (Settled::Unwritten, SlotState::Unwritten),
            (Settled::OnDisk, SlotState::OnDisk),
        ];
        for (how, state) in ends {
            assert_eq!(settled(how), state);
            assert!(state.is_final());
        }
        assert!(SlotState::Abandoned.is_final());
        assert!(!SlotState::Waiting.is_final() && !SlotState::Appending.is_final());
    }

    #[test]
    #[should_panic(expected = "no log has so many spans")]
    fn a_span_that_does_not_fit_is_a_broken_invariant() {
        Slot::recovered(1 << 56);
    }

    #[test]
    #[should_panic(expected = "not claimed")]
    fn settling_what_is_not_claimed_is_a_broken_invariant() {
        Slot::new(None).settle(Settled::Persisted);
    }

    #[test]
    fn everyone_who_waits_is_woken() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let slot = Slot::new(Some(Arc::new(waker.clone())));
        slot.subscribe(waker.clone());
        slot.subscribe(waker.clone());
        slot.take_wakers(Waker::wake);
        assert_eq!(count.0.load(Ordering::SeqCst), 3);
        slot.take_wakers(Waker::wake);
        assert_eq!(
            count.0.load(Ordering::SeqCst),
            4,
            "others are taken once, the first each time"
        );
    }

    #[test]
    fn an_order_that_is_entered_again_replaces_the_one_that_is_there() {
        let pending = Pending::with_capacity(16);
        let enter = || {
            let entry = Arc::new(PendingOrder::recovered(order(1), 1));
            pending.insert(&entry);
            entry
        };
        let known = |id| pending.get(OrderId::new(id).unwrap());
        let (spilled, read_back) = (enter(), enter());
        assert!(known(1).is_some_and(|it| Arc::ptr_eq(&it, &read_back)));
        assert_eq!(pending.len(), 1);
        pending.remove_this(&spilled);
        assert!(known(1).is_some_and(|it| Arc::ptr_eq(&it, &read_back)));
        assert!(known(2).is_none());
        pending.remove_this(&read_back);
        assert!(known(1).is_none() && pending.is_empty());
    }

    #[test]
    fn nobody_is_woken_before_the_deadline_for_nothing() {
        let pending = Pending::with_capacity(16);
        let start = Instant::now() + Duration::from_secs(1);
        for micros in (0..3_000).step_by(70) {
            let deadline = start + Duration::from_micros(micros);
            let recorded = Arc::new(PendingOrder::appending(order(1), deadline, None));
            assert!(recorded.slot.send());
            recorded.slot.appended(1, false);
            pending.insert(&recorded);
            let before = deadline - Duration::from_nanos(1);
            assert!(pending.due(before).is_empty(), "{micros}");
            let after = deadline + Duration::from_millis(1);
            assert_eq!(pending.due(after).len(), 1, "{micros}");
            pending.remove(recorded.order.id);
        }
    }

    #[test]
    fn only_what_is_past_its_deadline_is_due() {
        let pending = Pending::with_capacity(16);
        let now = Instant::now();
        let enter = |id, after| {
            let entry = Arc::new(PendingOrder::new(
                order(id),
                now + Duration::from_millis(after),
                None,
            ));
            pending.insert(&entry);
            entry
        };
        enter(1, 50);
        enter(2, 500);
        assert!(pending.due(now).is_empty());
        let due = pending.due(now + Duration::from_millis(60));
        assert_eq!(
            due.iter().map(|p| p.order.id.get()).collect::<Vec<_>>(),
            [1]
        );
        pending.remove(OrderId::new(1).unwrap());
        assert!(pending.due(now + Duration::from_millis(100)).is_empty());
        enter(3, 200);
        assert_eq!(pending.due(now + Duration::from_millis(700)).len(), 2);
    }

    #[test]
    fn an_overdue_order_is_looked_at_again_unless_a_log_has_it() {
        let now = Instant::now();
        let after = |millis| now + Duration::from_millis(millis);
        let looks = |entry: PendingOrder| {
            let pending = Pending::with_capacity(16);
            pending.insert(&Arc::new(entry));
            // The first look finds it, the second is too early, the third is due if any is.
            [60, 100, 170].map(|millis| pending.due(after(millis)).len())
        };
        let waiting = PendingOrder::new(order(1), after(50), None);
        assert!(!waiting.is_overdue(now) && waiting.is_overdue(after(51)));
        assert_eq!(looks(waiting), [1, 0, 1]);
        let appending = || PendingOrder::appending(order(1), after(50), None);
        assert_eq!(looks(appending()), [1, 0, 1]);
        let sent = appending();
        assert!(sent.slot.send());
        assert_eq!(looks(sent), [1, 0, 1], "its record may be refused yet");
        let appended = appending();
        assert!(appended.slot.send());
        appended.slot.appended(1, false);
        assert_eq!(looks(appended), [1, 0, 0]);
    }

    #[test]
    fn a_request_that_waits_for_less_time_is_woken_first_and_the_order_at_its_own_deadline() {
        let now = Instant::now();
        let after = |millis| now + Duration::from_millis(millis);
        let pending = Pending::with_capacity(16);
        let entry = Arc::new(PendingOrder::new(order(1), after(500), None));
        pending.insert(&entry);
        pending.wake_by(&entry, after(50));
        pending.wake_by(&entry, after(900));
        let looks = [40, 60, 490, 510].map(|millis| pending.due(after(millis)).len());
        assert_eq!(looks, [0, 1, 0, 1]);
    }

    #[test]
    fn an_order_is_due_in_the_very_millisecond_of_its_deadline() {
        let pending = Pending::with_capacity(16);
        let deadline = clock::start() + Duration::from_secs(3_600);
        pending.insert(&Arc::new(PendingOrder::new(order(1), deadline, None)));
        assert!(pending.due(deadline - Duration::from_millis(1)).is_empty());
        assert_eq!(pending.due(deadline).len(), 1);
    }

    #[test]
    fn each_of_many_orders_is_itself() {
        let pending = Pending::with_capacity(16);
        for id in 1..=10_000 {
            pending.insert(&Arc::new(PendingOrder::recovered(order(id), id)));
        }
        assert_eq!(pending.len(), 10_000);
        for id in 1..=10_000 {
            let known = pending.get(OrderId::new(id).unwrap());
            assert_eq!(known.map(|known| known.slot.span()), Some(id));
        }
    }

    #[test]
    fn orders_on_the_disk_are_in_flight_too() {
        let pending = Pending::with_capacity(16);
        for id in 1..=3 {
            pending.insert(&Arc::new(PendingOrder::recovered(order(id), 1)));
        }
        assert_eq!((pending.len(), pending.in_flight()), (3, 3));
        pending.spilled(2);
        pending.remove(OrderId::new(1).unwrap());
        pending.remove(OrderId::new(2).unwrap());
        assert_eq!((pending.len(), pending.in_flight()), (1, 3));
        pending.insert(&Arc::new(PendingOrder::recovered(order(2), 1)));
        pending.read_back(1);
        assert_eq!((pending.len(), pending.in_flight()), (2, 3));
        assert!(!pending.is_empty());
    }
}
