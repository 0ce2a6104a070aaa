//! Every lock-free piece, run through every interleaving that the memory model allows: the slot, the
//! stock counter, the hand-off to workers that sleep, and of the journal the parker, the appender's
//! the ring of the appender, the space for records, and when a segment is done with.
//!
//! The very files of `src/` are compiled here against loom's primitives: they take them from
//! `crate::sync`, which in the crate is `src/sync.rs` and here is the module below.
//!
//! Every model is exhaustive unless it says `bounded`: then all interleavings with at most that
//! many preemptions are run, which is where the known bugs of such protocols lie.

#![allow(
    dead_code,
    reason = "the models use a part of these files; the crate's own build checks the rest"
)]

#[path = "../src/state/stock/counter.rs"]
mod counter;
#[path = "../src/state/lanes/door.rs"]
mod door;
#[path = "../src/queue/logged/linger.rs"]
mod linger;
#[path = "../src/queue/mpmc.rs"]
mod mpmc;
#[path = "../src/queue/logged/mpsc.rs"]
mod mpsc;
#[path = "../src/queue/log/outstanding.rs"]
mod outstanding;
#[path = "../src/queue/logged/parker.rs"]
mod parker;
#[path = "../src/state/pending/slot.rs"]
mod slot;
#[path = "../src/queue/log/space.rs"]
mod space;

// Where the files above look for it.
use millrace::faults;

/// The same names as `src/sync.rs`, of loom.
mod sync {
    use std::collections::{BTreeSet, VecDeque};
    use std::pin::Pin;
    use std::task::{Context, Poll};

    pub(super) use loom::sync::atomic::{Ordering, fence};

    pub(super) mod thread {
        pub(crate) use loom::thread::{Thread, current, park};
    }

    /// An atomic of loom that reorders every access with every other.
    ///
    /// loom 0.7 remembers only the last access to an atomic when it looks for orders that are
    /// worth a run. Where a thread loads and then writes, its own load hides another thread's, and
    /// the order in between is never run: mutants of two of the files survived. So each access first
    /// touches `trace`, in a way that conflicts with every other touch. Relaxed, it orders nothing.
    macro_rules! traced {
        ($name:ident, $value:ty) => {
            #[derive(Debug)]
            pub(super) struct $name {
                value: loom::sync::atomic::$name,
                trace: loom::sync::atomic::AtomicUsize,
            }

            impl $name {
                pub(super) fn new(value: $value) -> Self {
                    $name {
                        value: loom::sync::atomic::$name::new(value),
                        trace: loom::sync::atomic::AtomicUsize::new(0),
                    }
                }

                fn traced(&self) -> &loom::sync::atomic::$name {
                    self.trace.fetch_add(1, Ordering::Relaxed);
                    &self.value
                }

                pub(super) fn load(&self, ordering: Ordering) -> $value {
                    self.traced().load(ordering)
                }

                pub(super) fn store(&self, value: $value, ordering: Ordering) {
                    self.traced().store(value, ordering);
                }

                pub(super) fn swap(&self, value: $value, ordering: Ordering) -> $value {
                    self.traced().swap(value, ordering)
                }

                pub(super) fn fetch_add(&self, value: $value, ordering: Ordering) -> $value {
                    self.traced().fetch_add(value, ordering)
                }

                pub(super) fn fetch_sub(&self, value: $value, ordering: Ordering) -> $value {
                    self.traced().fetch_sub(value, ordering)
                }

                pub(super) fn compare_exchange(
                    &self,
                    from: $value,
                    to: $value,
                    set: Ordering,
                    fetch: Ordering,
                ) -> Result<$value, $value> {
                    self.traced().compare_exchange(from, to, set, fetch)
                }

                pub(super) fn fetch_or(&self, value: $value, ordering: Ordering) -> $value {
                    self.traced().fetch_or(value, ordering)
                }

                pub(super) fn fetch_and(&self, value: $value, ordering: Ordering) -> $value {
                    self.traced().fetch_and(value, ordering)
                }

                pub(super) fn fetch_update(
                    &self,
                    set: Ordering,
                    fetch: Ordering,
                    mut next: impl FnMut($value) -> Option<$value>,
                ) -> Result<$value, $value> {
                    let mut seen = self.load(fetch);
                    while let Some(value) = next(seen) {
                        match self.traced().compare_exchange(seen, value, set, fetch) {
                            Ok(before) => return Ok(before),
                            Err(other) => seen = other,
                        }
                    }
                    Err(seen)
                }
            }
        };
    }

    traced!(AtomicU8, u8);
    traced!(AtomicU32, u32);
    traced!(AtomicU64, u64);
    traced!(AtomicI64, i64);
    traced!(AtomicUsize, usize);

    /// Stores with a swap: loom 0.7 orders a plain store neither before nor after a swap of another
    /// thread that happens not to be synchronized with it, and would let a later load see the
    /// older of the two, which no machine does.
    #[derive(Debug)]
    pub(super) struct AtomicBool(AtomicU8);

    impl AtomicBool {
        pub(super) fn new(value: bool) -> Self {
            AtomicBool(AtomicU8::new(value.into()))
        }

        pub(super) fn load(&self, ordering: Ordering) -> bool {
            self.0.load(ordering) != 0
        }

        pub(super) fn store(&self, value: bool, ordering: Ordering) {
            self.swap(value, ordering);
        }

        pub(super) fn swap(&self, value: bool, ordering: Ordering) -> bool {
            self.0.swap(value.into(), ordering) != 0
        }
    }

    /// loom's scheduler has to be told that this thread can only wait.
    pub(super) fn spin() {
        loom::thread::yield_now();
    }

    /// loom has none. Of std's it promises as little: who sees the value sees what was done before
    /// it was set, and nobody waits.
    pub(super) struct OnceLock<T> {
        is_set: AtomicBool,
        value: loom::cell::UnsafeCell<Option<T>>,
    }

    impl<T> OnceLock<T> {
        pub(super) fn new() -> Self {
            OnceLock {
                is_set: AtomicBool::new(false),
                value: loom::cell::UnsafeCell::new(None),
            }
        }

        /// No model sets one twice.
        pub(super) fn set(&self, value: T) -> Result<(), T> {
            // SAFETY: nobody looks before it is set; loom checks just that.
            self.value.with_mut(|place| unsafe { *place = Some(value) });
            self.is_set.store(true, Ordering::Release);
            Ok(())
        }

        pub(super) fn get(&self) -> Option<&T> {
            if !self.is_set.load(Ordering::Acquire) {
                return None;
            }
            // SAFETY: it is set, and never changes again; loom checks just that.
            self.value.with(|place| unsafe { (*place).as_ref() })
        }
    }

    impl<T> std::fmt::Debug for OnceLock<T> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("OnceLock")
        }
    }

    #[derive(Debug, Default)]
    pub(super) struct Guarded<T>(loom::sync::Mutex<T>);

    impl<T> Guarded<T> {
        pub(super) fn new(value: T) -> Self {
            Guarded(loom::sync::Mutex::new(value))
        }

        pub(super) fn with<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
            change(&mut self.0.lock().expect("no model panics under it"))
        }
    }

    #[derive(Debug)]
    pub(super) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(super) fn new(value: T) -> Self {
            Mutex(loom::sync::Mutex::new(value))
        }

        pub(super) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().expect("no model panics under it")
        }
    }

    /// Places of the ring below; no model pushes more.
    const PLACES: usize = 4;

    /// crossbeam's ring as far as it goes once round: a place is taken by moving `tail`, filled, and
    /// then marked. It promises less than crossbeam's, which looks again, behind a fence, before it
    /// calls itself empty. Never full.
    pub(super) struct ArrayQueue<T> {
        capacity: usize,
        // Not traced: each is moved by read-modify-writes alone.
        head: loom::sync::atomic::AtomicUsize,
        tail: loom::sync::atomic::AtomicUsize,
        places: [Place<T>; PLACES],
    }

    struct Place<T> {
        is_filled: AtomicBool,
        item: loom::cell::UnsafeCell<Option<T>>,
    }

    impl<T> ArrayQueue<T> {
        pub(super) fn new(capacity: usize) -> Self {
            ArrayQueue {
                capacity,
                head: loom::sync::atomic::AtomicUsize::new(0),
                tail: loom::sync::atomic::AtomicUsize::new(0),
                places: std::array::from_fn(|_| Place {
                    is_filled: AtomicBool::new(false),
                    item: loom::cell::UnsafeCell::new(None),
                }),
            }
        }

        pub(super) fn push(&self, item: T) -> Result<(), T> {
            let place = &self.places[self.tail.fetch_add(1, Ordering::AcqRel)];
            // SAFETY: the place is this thread's alone until it is marked; loom checks just that.
            place.item.with_mut(|at| unsafe { *at = Some(item) });
            place.is_filled.store(true, Ordering::Release);
            Ok(())
        }

        pub(super) fn pop(&self) -> Option<T> {
            loop {
                let at = self.head.load(Ordering::Relaxed);
                let place = self.places.get(at)?;
                if !place.is_filled.load(Ordering::Acquire) {
                    return None;
                }
                let (set, fetch) = (Ordering::AcqRel, Ordering::Relaxed);
                if self.head.compare_exchange(at, at + 1, set, fetch).is_ok() {
                    // SAFETY: whoever moved `head` has the place alone; loom checks just that.
                    return place.item.with_mut(|at| unsafe { (*at).take() });
                }
            }
        }

        /// The models ask only how much to reserve.
        pub(super) fn len(&self) -> usize {
            0
        }

        pub(super) fn is_empty(&self) -> bool {
            let at = self.head.load(Ordering::Relaxed);
            let place = self.places.get(at);
            place.is_none_or(|place| !place.is_filled.load(Ordering::Acquire))
        }

        pub(super) fn is_full(&self) -> bool {
            false
        }

        pub(super) fn capacity(&self) -> usize {
            self.capacity
        }
    }

    /// tokio's, as its documentation describes it: one wake-up is kept where nobody waits, those who
    /// wait are woken in turn, and whoever gives up hands its wake-up on.
    pub(super) struct Notify(loom::sync::Mutex<Waiting>);

    #[derive(Default)]
    struct Waiting {
        kept: bool,
        next: usize,
        asleep: VecDeque<(usize, Option<std::task::Waker>)>,
        woken: BTreeSet<usize>,
        woken_by_all: BTreeSet<usize>,
    }

    pub(super) struct Notified<'a> {
        notify: &'a Notify,
        place: Option<usize>,
        done: bool,
    }

    impl Notify {
        pub(super) fn new() -> Self {
            Notify(loom::sync::Mutex::default())
        }

        pub(super) fn notified(&self) -> Notified<'_> {
            Notified {
                notify: self,
                place: None,
                done: false,
            }
        }

        fn waiting(&self) -> loom::sync::MutexGuard<'_, Waiting> {
            self.0.lock().expect("no model panics under it")
        }

        pub(super) fn notify_one(&self) {
            let mut waiting = self.waiting();
            let Some((place, waker)) = waiting.asleep.pop_front() else {
                waiting.kept = true;
                return;
            };
            waiting.woken.insert(place);
            drop(waiting);
            waker.into_iter().for_each(std::task::Waker::wake);
        }

        pub(super) fn notify_waiters(&self) {
            let mut waiting = self.waiting();
            let asleep = std::mem::take(&mut waiting.asleep);
            waiting
                .woken_by_all
                .extend(asleep.iter().map(|(place, _)| *place));
            drop(waiting);
            asleep
                .into_iter()
                .filter_map(|(_, waker)| waker)
                .for_each(std::task::Waker::wake);
        }
    }

    impl Notified<'_> {
        pub(super) fn enable(mut self: Pin<&mut Self>) {
            let mut waiting = self.notify.waiting();
            if std::mem::take(&mut waiting.kept) {
                drop(waiting);
                self.done = true;
                return;
            }
            waiting.next += 1;
            let place = waiting.next;
            waiting.asleep.push_back((place, None));
            drop(waiting);
            self.place = Some(place);
        }
    }

    impl Future for Notified<'_> {
        type Output = ();

        /// Only after `enable`, as the source does it.
        fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
            let Some(place) = self.place else {
                assert!(self.done, "polled before it was enabled");
                return Poll::Ready(());
            };
            let mut waiting = self.notify.waiting();
            if waiting.woken.remove(&place) || waiting.woken_by_all.remove(&place) {
                drop(waiting);
                self.place = None;
                self.done = true;
                return Poll::Ready(());
            }
            let sleeper = waiting.asleep.iter_mut().find(|(at, _)| *at == place);
            sleeper.expect("it sleeps or is woken").1 = Some(context.waker().clone());
            Poll::Pending
        }
    }

    impl Drop for Notified<'_> {
        fn drop(&mut self) {
            // A model that fails is over; a second panic would hide the first.
            let Some(place) = self.place.filter(|_| !std::thread::panicking()) else {
                return;
            };
            let mut waiting = self.notify.waiting();
            waiting.asleep.retain(|(at, _)| *at != place);
            let was_woken = waiting.woken.remove(&place);
            drop(waiting);
            if was_woken {
                self.notify.notify_one();
            }
        }
    }

    /// A waker that counts. Counted with std's own atomics: the count is read only after every
    /// thread has been joined, and loom need not explore it.
    #[derive(Clone, Debug, Default)]
    pub(super) struct Waker(std::sync::Arc<std::sync::atomic::AtomicUsize>);

    impl Waker {
        pub(super) fn wake(self) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }

        pub(super) fn woken(&self) -> usize {
            self.0.load(std::sync::atomic::Ordering::SeqCst)
        }
    }
}

use counter::{BelowCommitted, NotEnough, StockCounter, StockSnapshot};
use door::Door;
use linger::Linger;
use loom::future::block_on;
use loom::sync::Arc;
use loom::thread;
use mpmc::MpmcQueue;
use mpsc::MpscQueue;
use outstanding::Outstanding;
use parker::Parker;
use slot::{Settled, Slot, SlotState};
use space::Space;
use sync::{AtomicBool, Ordering, Waker};

fn bounded(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Runs `work` on a thread of the model.
fn spawn<T, R: 'static>(
    shared: &Arc<T>,
    work: impl FnOnce(&T) -> R + 'static,
) -> thread::JoinHandle<R>
where
    T: 'static,
{
    let shared = Arc::clone(shared);
    thread::spawn(move || work(&shared))
}

// --- The door of a lane ---------------------------------------------------------------------

/// A request that passes works on the lane; whoever hands the lane over takes its records when it is drained.
#[test]
fn nobody_works_on_a_lane_that_is_shut_and_drained() {
    bounded(2, || {
        let door = Arc::new(Door::new());
        let records = Arc::new(loom::cell::UnsafeCell::new(0));
        door.open();
        let requests: Vec<_> = (0..2)
            .map(|_| {
                let records = Arc::clone(&records);
                spawn(&door, move |door| {
                    let Some(pass) = door.pass() else { return };
                    // SAFETY: reads, and the lane is not drained; loom checks just that.
                    records.with(|records| assert_eq!(unsafe { *records }, 0));
                    drop(pass);
                })
            })
            .collect();
        door.shut();
        if door.is_drained() {
            // SAFETY: every request is through; loom checks just that.
            records.with_mut(|records| unsafe { *records = 1 });
        }
        requests
            .into_iter()
            .for_each(|request| request.join().unwrap());
        assert!(door.is_drained());
    });
}

/// What the new owner has loaded is there for whoever passes.
#[test]
fn whoever_passes_sees_what_was_loaded_before_the_door_was_opened() {
    loom::model(|| {
        let door = Arc::new(Door::new());
        let records = Arc::new(loom::cell::UnsafeCell::new(0));
        let owner = {
            let records = Arc::clone(&records);
            spawn(&door, move |door| {
                // SAFETY: nobody passes before the door is open; loom checks just that.
                records.with_mut(|records| unsafe { *records = 1 });
                door.open();
            })
        };
        if door.pass().is_some() {
            // SAFETY: the owner is done with it; loom checks just that.
            records.with(|records| assert_eq!(unsafe { *records }, 1));
        }
        owner.join().unwrap();
    });
}

// --- The slot -------------------------------------------------------------------------------

#[test]
fn of_a_claim_and_an_abandonment_exactly_one_wins() {
    loom::model(|| {
        let slot = Arc::new(Slot::new(None));
        let worker = spawn(&slot, Slot::claim);
        let deadline = spawn(&slot, Slot::abandon);
        let (claimed, abandoned) = (worker.join().unwrap(), deadline.join().unwrap());
        assert!(claimed ^ abandoned);
        let expected = if claimed {
            SlotState::Claimed
        } else {
            SlotState::Abandoned
        };
        assert_eq!(slot.state(), expected);
    });
}

#[test]
fn of_two_workers_and_a_deadline_exactly_one_wins_while_somebody_subscribes() {
    bounded(2, || {
        let slot = Arc::new(Slot::new(None));
        let threads = [
            spawn(&slot, Slot::claim),
            spawn(&slot, Slot::claim),
            spawn(&slot, Slot::abandon),
        ];
        // The bit that announces a waker shares the word with the state.
        slot.subscribe(Waker::default());
        let won = threads.map(|thread| usize::from(thread.join().unwrap()));
        assert_eq!(won.iter().sum::<usize>(), 1);
    });
}

#[test]
fn what_was_done_before_settling_is_seen_by_whoever_sees_it_settled() {
    loom::model(|| {
        let slot = Arc::new(Slot::new(None));
        let row = Arc::new(loom::cell::UnsafeCell::new(0));
        let worker = {
            let (slot, row) = (Arc::clone(&slot), Arc::clone(&row));
            thread::spawn(move || {
                assert!(slot.claim());
                // SAFETY: nobody else looks before the slot is settled; loom checks just that.
                row.with_mut(|row| unsafe { *row = 1 });
                slot.settle(Settled::Persisted);
            })
        };
        if slot.state() == SlotState::Persisted {
            // SAFETY: the worker is done with it, as its settling says; loom checks just that.
            assert_eq!(row.with(|row| unsafe { *row }), 1);
        }
        worker.join().unwrap();
    });
}

/// What a buyer does that waits for another's order: announce, look, and park if it is open.
/// Returns the waker that it parked with.
fn wait_for(slot: &Slot) -> Option<Waker> {
    let waker = Waker::default();
    slot.subscribe(waker.clone());
    (!slot.state().is_final()).then_some(waker)
}

fn no_wake_up_is_lost(slot: &Slot, parked: impl IntoIterator<Item = Option<Waker>>) {
    assert!(slot.state().is_final());
    for waker in parked.into_iter().flatten() {
        assert!(
            waker.woken() > 0,
            "somebody sleeps through {:?}",
            slot.state()
        );
    }
}

#[test]
fn a_subscriber_sees_the_order_settled_or_is_woken() {
    loom::model(|| {
        let slot = Arc::new(Slot::new(None));
        let worker = spawn(&slot, |slot| {
            assert!(slot.claim());
            slot.settle(Settled::Persisted);
            slot.take_wakers(Waker::wake);
        });
        let parked = wait_for(&slot);
        worker.join().unwrap();
        no_wake_up_is_lost(&slot, [parked]);
    });
}

#[test]
fn a_subscriber_sees_the_order_abandoned_or_is_woken() {
    loom::model(|| {
        let slot = Arc::new(Slot::new(None));
        let deadline = spawn(&slot, |slot| {
            assert!(slot.abandon());
            slot.take_wakers(Waker::wake);
        });
        let parked = wait_for(&slot);
        deadline.join().unwrap();
        no_wake_up_is_lost(&slot, [parked]);
    });
}

#[test]
fn two_subscribers_are_both_told() {
    bounded(3, || {
        let slot = Arc::new(Slot::new(None));
        let worker = spawn(&slot, |slot| {
            assert!(slot.claim());
            slot.settle(Settled::Failed);
            slot.take_wakers(Waker::wake);
        });
        let other = spawn(&slot, wait_for);
        let parked = [wait_for(&slot), other.join().unwrap()];
        worker.join().unwrap();
        no_wake_up_is_lost(&slot, parked);
    });
}

#[test]
fn a_deadline_task_that_wakes_meanwhile_takes_no_wake_up_away() {
    // The deadline task wakes those who wait at a deadline that passed, while the worker settles. Whoever
    // it wakes looks, and subscribes again if the order is still open.
    bounded(3, || {
        let slot = Arc::new(Slot::new(None));
        assert!(slot.claim());
        let worker = spawn(&slot, |slot| {
            slot.settle(Settled::Persisted);
            slot.take_wakers(Waker::wake);
        });
        let deadlines = spawn(&slot, |slot| slot.take_wakers(Waker::wake));
        let parked = wait_for(&slot);
        deadlines.join().unwrap();
        worker.join().unwrap();
        no_wake_up_is_lost(&slot, [parked]);
    });
}

#[test]
fn two_takers_hand_each_waker_out_once_and_leave_none() {
    loom::model(|| {
        let slot = Arc::new(Slot::new(None));
        let waker = Waker::default();
        slot.subscribe(waker.clone());
        let other = spawn(&slot, |slot| slot.take_wakers(Waker::wake));
        slot.take_wakers(Waker::wake);
        other.join().unwrap();
        assert_eq!(waker.woken(), 1);
    });
}

#[test]
fn a_waker_that_comes_while_others_are_taken_stays_for_the_next_taker() {
    loom::model(|| {
        let slot = Arc::new(Slot::new(None));
        let (early, late) = (Waker::default(), Waker::default());
        slot.subscribe(early.clone());
        let taker = spawn(&slot, |slot| slot.take_wakers(Waker::wake));
        slot.subscribe(late.clone());
        taker.join().unwrap();
        slot.take_wakers(Waker::wake);
        assert_eq!((early.woken(), late.woken()), (1, 1));
    });
}

// --- The slot of an order that goes through a journal ----------------------------------------

/// The segment of the journal, as far as a slot knows it.
const SEGMENT: u64 = (1 << 56) - 1;

/// A slot that its appender is done with.
fn in_the_journal() -> Arc<Slot> {
    let slot = Arc::new(Slot::appending(None));
    assert!(slot.send());
    slot.appended(SEGMENT, true);
    slot
}

#[test]
fn a_subscriber_sees_the_order_durable_or_is_woken() {
    loom::model(|| {
        let slot = Arc::new(Slot::appending(None));
        let appender = spawn(&slot, |slot| {
            slot.appended(SEGMENT, true);
            slot.take_wakers(Waker::wake);
        });
        let waker = Waker::default();
        slot.subscribe(waker.clone());
        let parked = slot.state() == SlotState::Appending;
        // Nobody sees it in the queue and not durable.
        assert!(parked || slot.is_durable());
        appender.join().unwrap();
        assert!(!parked || waker.woken() > 0, "somebody sleeps through it");
        assert!(slot.is_durable() && slot.is_recorded());
        assert_eq!(slot.state(), SlotState::Waiting);
    });
}

#[test]
fn what_was_synced_is_seen_by_whoever_sees_the_order_durable() {
    loom::model(|| {
        let slot = Arc::new(Slot::appending(None));
        let disk = Arc::new(loom::cell::UnsafeCell::new(0));
        let appender = {
            let (slot, disk) = (Arc::clone(&slot), Arc::clone(&disk));
            thread::spawn(move || {
                // SAFETY: nobody else looks before the order is durable; loom checks just that.
                disk.with_mut(|disk| unsafe { *disk = 1 });
                slot.appended(SEGMENT, true);
            })
        };
        if slot.is_durable() {
            // SAFETY: the appender is done with it, as the bit says; loom checks just that.
            assert_eq!(disk.with(|disk| unsafe { *disk }), 1);
        }
        appender.join().unwrap();
    });
}

#[test]
fn of_a_claim_and_a_spill_exactly_one_wins() {
    for slot in [in_the_journal, || Arc::new(Slot::recovered(SEGMENT))] {
        loom::model(move || {
            let slot = slot();
            let worker = spawn(&slot, Slot::claim);
            let spilled = slot.spill();
            let claimed = worker.join().unwrap();
            assert!(claimed ^ spilled);
            let expected = if claimed {
                SlotState::Claimed
            } else {
                SlotState::OnDisk
            };
            assert_eq!(slot.state(), expected);
        });
    }
}

#[test]
fn of_a_claim_and_a_spill_exactly_one_wins_beside_a_deadline_and_a_subscriber() {
    bounded(2, || {
        let slot = in_the_journal();
        let worker = spawn(&slot, Slot::claim);
        let appender = spawn(&slot, Slot::spill);
        let deadline = spawn(&slot, Slot::abandon);
        slot.subscribe(Waker::default());
        assert!(worker.join().unwrap() ^ appender.join().unwrap());
        assert!(!deadline.join().unwrap());
        assert_eq!(slot.span(), SEGMENT);
    });
}

#[test]
fn a_deadline_never_abandons_an_order_that_a_journal_has_or_may_have() {
    for durable in [true, false] {
        loom::model(move || {
            let slot = Arc::new(Slot::appending(None));
            assert!(slot.send());
            let appender = spawn(&slot, move |slot| {
                slot.appended(SEGMENT, durable);
                slot.spill()
            });
            // Twice: before, while or after it is appended, and spilled.
            assert!(!slot.abandon() && !slot.abandon());
            assert!(appender.join().unwrap());
            assert!(!slot.abandon());
            assert_eq!(slot.state(), SlotState::OnDisk);
            assert_eq!((slot.is_recorded(), slot.is_durable()), (true, durable));
            assert_eq!(slot.span(), SEGMENT);
        });
    }
}

#[test]
fn of_a_deadline_and_a_send_exactly_one_wins() {
    loom::model(|| {
        let slot = Arc::new(Slot::appending(None));
        let appender = spawn(&slot, |slot| {
            let sent = slot.send();
            if sent {
                slot.appended(SEGMENT, true);
            }
            sent
        });
        let abandoned = slot.abandon();
        let sent = appender.join().unwrap();
        assert!(sent ^ abandoned);
        let expected = if sent {
            SlotState::Waiting
        } else {
            SlotState::Abandoned
        };
        assert_eq!(slot.state(), expected);
    });
}

#[test]
fn an_order_that_the_log_did_not_take_is_sent_again_or_abandoned() {
    loom::model(|| {
        let slot = Arc::new(Slot::appending(None));
        let appender = spawn(&slot, |slot| {
            if !slot.send() {
                return false;
            }
            slot.not_sent();
            let sent = slot.send();
            if sent {
                slot.appended(SEGMENT, true);
            }
            sent
        });
        let abandoned = slot.abandon();
        assert!(appender.join().unwrap() ^ abandoned);
        assert_eq!(slot.is_recorded(), !abandoned);
    });
}

#[test]
fn a_deadline_leaves_an_order_that_was_read_back_to_its_worker() {
    loom::model(|| {
        let slot = Arc::new(Slot::recovered(SEGMENT));
        let deadline = spawn(&slot, Slot::abandon);
        assert!(slot.claim());
        slot.settle(Settled::Persisted);
        assert!(!deadline.join().unwrap());
        assert_eq!(slot.state(), SlotState::Persisted);
    });
}

#[test]
fn a_subscriber_sees_the_order_left_to_the_disk_or_is_woken() {
    let spill: fn(&Slot) = |slot| assert!(slot.spill());
    let at_shutdown: fn(&Slot) = |slot| {
        assert!(slot.claim());
        slot.settle(Settled::OnDisk);
    };
    for leave in [spill, at_shutdown] {
        loom::model(move || {
            let slot = in_the_journal();
            let other = spawn(&slot, move |slot| {
                leave(slot);
                slot.take_wakers(Waker::wake);
            });
            let parked = wait_for(&slot);
            other.join().unwrap();
            assert_eq!(slot.state(), SlotState::OnDisk);
            no_wake_up_is_lost(&slot, [parked]);
        });
    }
}

#[test]
fn a_subscriber_sees_the_order_on_the_disk_or_is_woken_while_it_is_appended_and_spilled() {
    bounded(3, || {
        let slot = Arc::new(Slot::appending(None));
        let appender = spawn(&slot, |slot| {
            slot.appended(SEGMENT, true);
            slot.take_wakers(Waker::wake);
            assert!(slot.spill());
            slot.take_wakers(Waker::wake);
        });
        // It waits for the next change, and then for the last one, as a duplicate does.
        let parked = [wait_for(&slot), wait_for(&slot)];
        appender.join().unwrap();
        no_wake_up_is_lost(&slot, parked);
    });
}

#[test]
fn a_spill_wakes_everybody_once_beside_a_deadline_task() {
    bounded(3, || {
        let slot = in_the_journal();
        let deadlines = spawn(&slot, |slot| slot.take_wakers(Waker::wake));
        let appender = spawn(&slot, |slot| {
            assert!(slot.spill());
            slot.take_wakers(Waker::wake);
        });
        let parked = wait_for(&slot);
        deadlines.join().unwrap();
        appender.join().unwrap();
        assert!(parked.as_ref().is_none_or(|waker| waker.woken() == 1));
        no_wake_up_is_lost(&slot, [parked]);
    });
}

// --- The parker of the journal -------------------------------------------------------------

/// A thread with a bell, and what others have for it: one piece of work each.
struct Served<const PRODUCERS: usize> {
    parker: Parker,
    work: [AtomicBool; PRODUCERS],
}

impl<const PRODUCERS: usize> Served<PRODUCERS> {
    fn new() -> Arc<Self> {
        Arc::new(Served {
            parker: Parker::new(),
            work: std::array::from_fn(|_| AtomicBool::new(false)),
        })
    }

    /// Relaxed: that the owner comes to see it is the bell's concern alone.
    fn produce(&self, number: usize) {
        self.work[number].store(true, Ordering::Relaxed);
        self.parker.unpark();
    }

    /// Sees every piece of work and sleeps in between. loom fails a model in which it sleeps and
    /// nobody is left to wake it.
    fn own(&self) {
        self.parker.listen();
        let seen = || {
            let is_there = |work: &&AtomicBool| work.load(Ordering::Relaxed);
            self.work.iter().filter(is_there).count()
        };
        let mut done = 0;
        while done < PRODUCERS {
            self.parker.park_unless(|| seen() > done);
            done = seen();
        }
    }
}

#[test]
fn the_owner_of_a_bell_does_not_sleep_through_a_ring() {
    loom::model(|| {
        let served = Served::<1>::new();
        let owner = spawn(&served, Served::own);
        served.produce(0);
        owner.join().unwrap();
    });
}

#[test]
fn the_owner_of_a_bell_does_not_sleep_through_the_second_of_two_rings() {
    // Two orders of one sender: the owner goes back to sleep in between, or is about to.
    bounded(4, || {
        let served = Served::<2>::new();
        let owner = spawn(&served, Served::own);
        served.produce(0);
        served.produce(1);
        owner.join().unwrap();
    });
}

#[test]
fn the_owner_of_a_bell_does_not_sleep_through_either_of_two_who_ring() {
    bounded(2, || {
        let served = Served::<2>::new();
        let owner = spawn(&served, Served::own);
        let other = spawn(&served, |served| served.produce(0));
        served.produce(1);
        other.join().unwrap();
        owner.join().unwrap();
    });
}

// --- The hand-off to workers that sleep -------------------------------------------------------

/// Takes `items`, `max` at once, and sleeps in between. loom fails a model in which it sleeps and
/// nobody is left to wake it.
fn take_each(mpmc: &MpmcQueue<u8>, items: usize, max: usize) -> Vec<u8> {
    let mut taken = Vec::new();
    while taken.len() < items {
        taken.extend(block_on(mpmc.take(max)).expect("it is open"));
    }
    taken
}

#[test]
fn an_idle_worker_does_not_sleep_through_an_order() {
    loom::model(|| {
        let mpmc = Arc::new(MpmcQueue::new(4));
        let worker = spawn(&mpmc, |mpmc| take_each(mpmc, 1, 1));
        mpmc.push(1).unwrap();
        assert_eq!(worker.join().unwrap(), [1]);
    });
}

#[test]
fn an_idle_worker_does_not_sleep_through_the_second_of_two_orders() {
    bounded(3, || {
        let mpmc = Arc::new(MpmcQueue::new(4));
        let worker = spawn(&mpmc, |mpmc| take_each(mpmc, 2, 1));
        mpmc.push(1).unwrap();
        mpmc.push(2).unwrap();
        assert_eq!(worker.join().unwrap(), [1, 2]);
    });
}

#[test]
fn an_idle_worker_does_not_sleep_through_either_of_two_who_send() {
    bounded(2, || {
        let mpmc = Arc::new(MpmcQueue::new(4));
        let worker = spawn(&mpmc, |mpmc| take_each(mpmc, 2, 2));
        let other = spawn(&mpmc, |mpmc| mpmc.push(1).unwrap());
        mpmc.push(2).unwrap();
        other.join().unwrap();
        let mut taken = worker.join().unwrap();
        taken.sort_unstable();
        assert_eq!(taken, [1, 2]);
    });
}

#[test]
fn of_two_idle_workers_neither_sleeps_beside_an_order() {
    bounded(2, || {
        let mpmc = Arc::new(MpmcQueue::new(4));
        let workers = [(); 2].map(|()| spawn(&mpmc, |mpmc| take_each(mpmc, 1, 1)));
        mpmc.push(1).unwrap();
        mpmc.push(2).unwrap();
        let mut taken = workers.map(|worker| worker.join().unwrap()).concat();
        taken.sort_unstable();
        assert_eq!(taken, [1, 2]);
    });
}

#[test]
fn an_idle_worker_does_not_sleep_through_what_another_gives_up() {
    bounded(3, || {
        let mpmc = Arc::new(MpmcQueue::new(4));
        let worker = spawn(&mpmc, |mpmc| take_each(mpmc, 2, 1));
        mpmc.put_back(vec![1, 2]);
        assert_eq!(worker.join().unwrap(), [1, 2]);
    });
}

#[test]
fn a_worker_that_gives_up_waiting_takes_no_wake_up_with_it() {
    bounded(2, || {
        let mpmc = Arc::new(MpmcQueue::new(4));
        let worker = spawn(&mpmc, |mpmc| take_each(mpmc, 1, 1));
        let other = spawn(&mpmc, |mpmc| {
            let mut take = Box::pin(mpmc.take(1));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            // Where it finds the order it hands it back, as a batch that comes to nothing.
            match take.as_mut().poll(&mut context) {
                std::task::Poll::Ready(items) => mpmc.put_back(items.expect("it is open")),
                std::task::Poll::Pending => drop(take),
            }
        });
        mpmc.push(1).unwrap();
        other.join().unwrap();
        assert_eq!(worker.join().unwrap(), [1]);
    });
}

/// A worker that rests between two batches for as long as nobody waits.
#[test]
fn a_resting_worker_does_not_sleep_through_an_order_that_somebody_waits_for() {
    bounded(3, || {
        let queue = Arc::new((MpmcQueue::new(4), Linger::new()));
        let worker = spawn(&queue, |(mpmc, linger)| {
            let mut taken = Vec::new();
            while taken.len() < 3 {
                if !taken.is_empty() {
                    block_on(linger.until_pressing(usize::MAX));
                }
                linger.clear();
                taken.extend(block_on(mpmc.take(3)).expect("it is open"));
            }
            taken
        });
        for number in [1, 2, 3] {
            queue.0.push(number).unwrap();
            queue.1.press();
        }
        assert_eq!(worker.join().unwrap(), [1, 2, 3]);
    });
}

#[test]
fn a_closed_hand_off_is_run_empty_and_ends_its_worker() {
    bounded(3, || {
        let mpmc = Arc::new(MpmcQueue::new(4));
        let worker = spawn(&mpmc, |mpmc| {
            let mut taken = Vec::new();
            while let Some(items) = block_on(mpmc.take(1)) {
                taken.extend(items);
            }
            taken
        });
        mpmc.push(1).unwrap();
        mpmc.close();
        assert_eq!(worker.join().unwrap(), [1]);
    });
}

// --- The journal: what is handed to the appender, and back to those who wait -------------------

/// An appender without a disk: it acknowledges what has gathered, sleeps, and ends once it is told
/// to. Returns how many groups it made.
fn append_all(mpsc: &MpscQueue<Arc<Slot>>) -> usize {
    mpsc.listen();
    let mut groups = 0;
    loop {
        let group: Vec<_> = std::iter::from_fn(|| mpsc.pop()).collect();
        for slot in &group {
            slot.appended(SEGMENT, true);
            slot.take_wakers(Waker::wake);
        }
        groups += usize::from(!group.is_empty());
        if group.is_empty() && !mpsc.wait() {
            return groups;
        }
    }
}

/// Sends an order. Returns its slot, and the waker where it had to park.
fn send(mpsc: &MpscQueue<Arc<Slot>>) -> (Arc<Slot>, Option<Waker>) {
    let slot = Arc::new(Slot::appending(None));
    assert!(mpsc.push(Arc::clone(&slot)).is_ok());
    let waker = Waker::default();
    slot.subscribe(waker.clone());
    let parks = slot.state() == SlotState::Appending;
    (slot, parks.then_some(waker))
}

fn is_acknowledged((slot, parked): (Arc<Slot>, Option<Waker>)) {
    assert!(slot.is_durable());
    assert!(parked.is_none_or(|waker| waker.woken() > 0));
}

#[test]
fn an_order_that_is_sent_to_the_appender_is_acknowledged() {
    bounded(3, || {
        let mpsc = Arc::new(MpscQueue::new(4));
        let appender = spawn(&mpsc, append_all);
        let sent = send(&mpsc);
        mpsc.close();
        assert_eq!(appender.join().unwrap(), 1);
        is_acknowledged(sent);
    });
}

#[test]
fn orders_of_two_who_send_are_acknowledged_in_one_group_or_two() {
    bounded(2, || {
        let mpsc = Arc::new(MpscQueue::new(4));
        let appender = spawn(&mpsc, append_all);
        let other = spawn(&mpsc, send);
        let mine = send(&mpsc);
        let theirs = other.join().unwrap();
        mpsc.close();
        let groups = appender.join().unwrap();
        assert!((1..=2).contains(&groups));
        is_acknowledged(mine);
        is_acknowledged(theirs);
    });
}

// --- The journal: space, and segments that are done with ---------------------------------------

#[test]
fn of_two_who_want_the_last_room_one_gets_it() {
    loom::model(|| {
        let space = Arc::new(std::sync::Arc::new(Space::new(3)));
        let other = spawn(&space, |space| space.take(2));
        let mine = space.take(2);
        let theirs = other.join().unwrap();
        assert!(mine.is_some() ^ theirs.is_some());
        // Spent room is gone, all other room is there again.
        assert_eq!(mine.or(theirs).map(space::Permit::spend), Some(2));
        assert!(space.take(2).is_none());
        assert!(space.take(1).is_some());
        space.give(1);
        assert!(space.take(2).is_some());
    });
}

#[test]
fn room_that_nobody_spent_comes_back_beside_somebody_who_takes() {
    loom::model(|| {
        let space = Arc::new(std::sync::Arc::new(Space::new(3)));
        let other = spawn(&space, |space| drop(space.take(2)));
        let mine = space.take(1);
        assert!(mine.is_some());
        other.join().unwrap();
        drop(mine);
        assert!(space.take(3).is_some());
    });
}

/// A segment that an order is being added to, and whether that order is decided.
struct Filling {
    outstanding: Outstanding,
    is_written: AtomicBool,
    is_decided: AtomicBool,
}

#[test]
fn a_segment_is_not_done_with_before_its_last_order_is_decided() {
    loom::model(|| {
        let filling = Arc::new(Filling {
            outstanding: Outstanding::new(),
            is_written: AtomicBool::new(false),
            is_decided: AtomicBool::new(false),
        });
        let appender = spawn(&filling, |filling| {
            filling.outstanding.add(1);
            filling.is_written.store(true, Ordering::Release);
            filling.outstanding.seal();
        });
        let worker = spawn(&filling, |filling| {
            if filling.is_written.load(Ordering::Acquire) {
                filling.is_decided.store(true, Ordering::Relaxed);
                assert_eq!(filling.outstanding.settled(1), 1);
            }
        });
        if filling.outstanding.is_done() {
            assert!(filling.is_decided.load(Ordering::Relaxed));
            assert!(filling.outstanding.is_done(), "and stays so");
        }
        appender.join().unwrap();
        worker.join().unwrap();
        let decided = filling.is_decided.load(Ordering::Relaxed);
        assert_eq!(filling.outstanding.is_done(), decided);
    });
}

// --- The stock counter ----------------------------------------------------------------------

fn check(snapshot: StockSnapshot) {
    let StockSnapshot {
        total,
        free,
        held,
        sold,
    } = snapshot;
    // In 64 bits: a counter that went below zero would be near 2^32 here.
    assert_eq!(
        u64::from(total),
        u64::from(free) + u64::from(held) + u64::from(sold),
        "{snapshot:?}"
    );
}

#[test]
fn of_two_holds_on_the_last_unit_exactly_one_gets_it() {
    loom::model(|| {
        let stock = Arc::new(StockCounter::new(1, 0, 0));
        let other = spawn(&stock, |stock| stock.hold(1));
        let mine = stock.hold(1);
        let theirs = other.join().unwrap();
        assert!(mine.is_ok() ^ theirs.is_ok());
        assert_eq!(mine.and(theirs), Err(NotEnough { available: 0 }));
        assert_eq!(stock.free(), 0);
    });
}

#[test]
fn three_holds_never_take_more_than_there_is() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(3, 0, 0));
        let threads =
            [1, 2].map(|units| spawn(&stock, move |stock| (units, stock.hold(units).is_ok())));
        let mine = (2, stock.hold(2).is_ok());
        let all = threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .chain([mine]);
        let taken: u32 = all.filter(|(_, held)| *held).map(|(units, _)| units).sum();
        assert!(taken <= 3);
        assert_eq!(stock.free(), 3 - taken);
    });
}

#[test]
fn a_snapshot_beside_holds_and_releases_always_adds_up() {
    loom::model(|| {
        let stock = Arc::new(StockCounter::new(2, 1, 0));
        let buyer = spawn(&stock, |stock| stock.hold(1).unwrap());
        let expiry = spawn(&stock, |stock| stock.release(1));
        let snapshot = stock.snapshot();
        check(snapshot);
        assert!(snapshot.held <= 2 && snapshot.sold == 0);
        buyer.join().unwrap();
        expiry.join().unwrap();
        assert_eq!(stock.free(), 1);
    });
}

#[test]
fn a_snapshot_beside_a_payment_and_its_return_always_adds_up() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(2, 1, 0));
        let payments = spawn(&stock, |stock| {
            stock.sell(1);
            stock.unsell(1);
        });
        let snapshot = stock.snapshot();
        check(snapshot);
        let taken = snapshot.held + snapshot.sold;
        assert!(taken <= 1, "{snapshot:?}");
        payments.join().unwrap();
        let expected = StockSnapshot {
            total: 2,
            free: 2,
            held: 0,
            sold: 0,
        };
        assert_eq!(stock.snapshot(), expected);
    });
}

#[test]
fn a_snapshot_beside_a_returned_payment_and_a_hold_always_adds_up() {
    bounded(1, || {
        let stock = Arc::new(StockCounter::new(1, 0, 1));
        let payment = spawn(&stock, |stock| stock.unsell(1));
        let buyer = spawn(&stock, |stock| stock.hold(1).is_ok());
        let snapshot = stock.snapshot();
        check(snapshot);
        assert!(snapshot.held + snapshot.sold <= 1, "{snapshot:?}");
        payment.join().unwrap();
        let held = u32::from(buyer.join().unwrap());
        let expected = StockSnapshot {
            total: 1,
            free: 1 - held,
            held,
            sold: 0,
        };
        assert_eq!(stock.snapshot(), expected);
    });
}

#[test]
fn a_returned_payment_is_seen_whole_or_not_at_all() {
    // Here the fences of the sequence lock matter: either half alone would add up, too.
    bounded(2, || {
        let stock = Arc::new(StockCounter::new(1, 0, 1));
        let payment = spawn(&stock, |stock| stock.unsell(1));
        let snapshot = stock.snapshot();
        check(snapshot);
        assert_eq!(snapshot.held, 0, "{snapshot:?}");
        payment.join().unwrap();
    });
}

#[test]
fn two_payments_at_once_are_both_counted() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(3, 3, 0));
        let other = spawn(&stock, |stock| stock.sell(2));
        stock.sell(1);
        other.join().unwrap();
        let expected = StockSnapshot {
            total: 3,
            free: 0,
            held: 0,
            sold: 3,
        };
        assert_eq!(stock.snapshot(), expected);
    });
}

#[test]
fn a_reader_that_has_seen_a_payment_does_not_unsee_it() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(1, 1, 0));
        let payment = spawn(&stock, |stock| stock.sell(1));
        let (first, second) = (stock.snapshot(), stock.snapshot());
        check(first);
        check(second);
        assert!(first.sold <= second.sold);
        payment.join().unwrap();
    });
}

#[test]
fn a_total_that_is_lowered_while_units_are_held_stays_above_them() {
    loom::model(|| {
        let stock = Arc::new(StockCounter::new(2, 1, 0));
        let buyer = spawn(&stock, |stock| stock.hold(1));
        let operator = spawn(&stock, |stock| stock.set_total(1));
        check(stock.snapshot());
        match (buyer.join().unwrap(), operator.join().unwrap()) {
            (Ok(()), Err(BelowCommitted { committed: 2 })) => assert_eq!(stock.snapshot().total, 2),
            (Err(NotEnough { available: 0 }), Ok(())) => assert_eq!(stock.snapshot().total, 1),
            other => panic!("both or none: {other:?}"),
        }
        assert_eq!(stock.free(), 0);
    });
}

#[test]
fn a_unit_that_comes_back_while_somebody_joins_is_kept_or_was_taken_before() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(1, 1, 0));
        let joins = spawn(&stock, |stock| stock.begin_waiting());
        let expiry = spawn(&stock, |stock| stock.release(1));
        // Whoever holds the unit got it before anybody waited.
        let newcomer = stock.hold(1).is_ok();
        check(stock.snapshot());
        joins.join().unwrap();
        expiry.join().unwrap();
        assert!(newcomer ^ (stock.kept() == 1));
        assert_eq!(stock.hold(1), Err(NotEnough { available: 0 }));
        stock.end_waiting();
        assert_eq!(stock.free(), u32::from(!newcomer));
    });
}

#[test]
fn a_unit_that_comes_back_while_the_last_one_leaves_is_free() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(2, 2, 0));
        stock.begin_waiting();
        let leaves = spawn(&stock, |stock| stock.end_waiting());
        let expiry = spawn(&stock, |stock| stock.release(1));
        check(stock.snapshot());
        leaves.join().unwrap();
        expiry.join().unwrap();
        assert!(!stock.is_waiting());
        assert_eq!((stock.free(), stock.kept()), (1, 0));
    });
}

#[test]
fn kept_units_are_taken_once_beside_a_total_that_is_lowered() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(2, 1, 0));
        stock.begin_waiting();
        let operator = spawn(&stock, |stock| stock.set_total(1).is_ok());
        let assigner = spawn(&stock, |stock| stock.take_kept(1));
        check(stock.snapshot());
        let (lowered, taken) = (operator.join().unwrap(), assigner.join().unwrap());
        assert!(lowered ^ taken, "one unit, and two that want it");
        assert_eq!(stock.kept(), 0);
        assert_eq!(stock.snapshot().total, if lowered { 1 } else { 2 });
    });
}

#[test]
fn a_total_that_is_raised_and_lowered_beside_a_release_adds_up() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(1, 1, 0));
        let expiry = spawn(&stock, |stock| stock.release(1));
        let operator = spawn(&stock, |stock| {
            stock.set_total(2).unwrap();
            stock.set_total(0).is_ok()
        });
        check(stock.snapshot());
        expiry.join().unwrap();
        let emptied = operator.join().unwrap();
        let total = if emptied { 0 } else { 2 };
        assert_eq!(
            stock.snapshot(),
            StockSnapshot {
                total,
                free: total,
                held: 0,
                sold: 0
            }
        );
    });
}
