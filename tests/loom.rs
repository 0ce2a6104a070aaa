//! The slot and the stock counter, run through every interleaving that the memory model allows.
//!
//! The very files of `src/` are compiled here against loom's primitives: they take them from
//! `super::sync`, which in the crate is `src/state/sync.rs` and here is the module below.
//!
//! Every model is exhaustive unless it says `bounded`: then all interleavings with at most that
//! many preemptions are run, which is where the known bugs of such protocols lie.

#![allow(
    dead_code,
    reason = "the models use a part of the two files; the crate's own build checks the rest"
)]

#[path = "../src/state/stock/counter.rs"]
mod counter;
#[path = "../src/state/pending/slot.rs"]
mod slot;

/// The same names as `src/state/sync.rs`, of loom.
mod sync {
    pub(super) use loom::sync::atomic::{Ordering, fence};

    /// An atomic of loom that reorders every access with every other.
    ///
    /// loom 0.7 remembers only the last access to an atomic when it looks for orders that are
    /// worth a run. Where a thread loads and then writes, its own load hides another thread's, and
    /// the order in between is never run: mutants of the two files survived. So each access first
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

    /// loom's scheduler has to be told that this thread can only wait.
    pub(super) fn spin() {
        loom::thread::yield_now();
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
use loom::sync::Arc;
use loom::thread;
use slot::{Settled, Slot, SlotState};
use sync::Waker;

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
fn a_deadline_keeper_that_wakes_meanwhile_takes_no_wake_up_away() {
    // The keeper wakes those who wait at a deadline that passed, while the worker settles. Whoever
    // it wakes looks, and subscribes again if the order is still open.
    bounded(3, || {
        let slot = Arc::new(Slot::new(None));
        assert!(slot.claim());
        let worker = spawn(&slot, |slot| {
            slot.settle(Settled::Persisted);
            slot.take_wakers(Waker::wake);
        });
        let keeper = spawn(&slot, |slot| slot.take_wakers(Waker::wake));
        let parked = wait_for(&slot);
        keeper.join().unwrap();
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
        let keeper = spawn(&stock, |stock| stock.release(1));
        let snapshot = stock.snapshot();
        check(snapshot);
        assert!(snapshot.held <= 2 && snapshot.sold == 0);
        buyer.join().unwrap();
        keeper.join().unwrap();
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
fn a_total_that_is_raised_and_lowered_beside_a_release_adds_up() {
    bounded(3, || {
        let stock = Arc::new(StockCounter::new(1, 1, 0));
        let keeper = spawn(&stock, |stock| stock.release(1));
        let operator = spawn(&stock, |stock| {
            stock.set_total(2).unwrap();
            stock.set_total(0).is_ok()
        });
        check(stock.snapshot());
        keeper.join().unwrap();
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
