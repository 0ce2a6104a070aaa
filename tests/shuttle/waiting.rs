//! Orders that wait for their row, with a worker, the deadline task, and duplicates.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shuttle::future::block_on;
use shuttle::thread::{self, yield_now};

use crate::journal::{order, wait_until};
use crate::order::OrderId;
use crate::pending::{Pending, PendingOrder, Settled, SlotState};
use crate::queue::{OrderQueue, RingQueue};
use crate::sync::{AtomicBool, AtomicUsize, Ordering, Waker};

struct World {
    started: Instant,
    pending: Pending,
    queue: RingQueue,
    /// Units that nobody holds.
    free: AtomicUsize,
    rows: Mutex<Vec<OrderId>>,
    is_over: AtomicBool,
}

impl World {
    fn new(capacity: usize) -> Arc<Self> {
        Arc::new(World {
            started: Instant::now(),
            pending: Pending::with_capacity(16),
            queue: RingQueue::new(capacity),
            free: AtomicUsize::new(0),
            rows: Mutex::default(),
            is_over: AtomicBool::new(false),
        })
    }

    fn at(&self, seconds: u64) -> Instant {
        self.started + Duration::from_secs(seconds)
    }

    /// One look of the deadline task at a clock that shows `seconds`, as `pipeline::orders::deadlines`
    /// does it. Returns how many orders somebody's deadline has passed for.
    fn expire(&self, seconds: u64) -> usize {
        // Deadlines count in whole milliseconds, rounded up.
        let now = self.at(seconds) + Duration::from_millis(1);
        let due = self.pending.due(now);
        for order in &due {
            if order.is_overdue(now) && order.slot.abandon() {
                self.free.fetch_add(1, Ordering::SeqCst);
                self.pending.remove(order.order.id);
            }
            order.slot.take_wakers(Waker::wake);
        }
        due.len()
    }

    /// Enters an order, whose deadline comes after `seconds`, and queues it.
    fn place(&self, id: u64, seconds: u64) -> Option<Arc<PendingOrder>> {
        let order = Arc::new(PendingOrder::new(order(id), self.at(seconds), None));
        self.pending.insert(&order);
        if self.queue.push(Arc::clone(&order)).is_err() {
            // As a guard undoes it; the deadline task may have been faster.
            if order.slot.abandon() {
                self.pending.remove(order.order.id);
            } else {
                self.free.fetch_sub(1, Ordering::SeqCst);
            }
            return None;
        }
        Some(order)
    }

    /// Writes what it takes, at most `batches` times.
    fn work(&self, batches: usize) {
        for _ in 0..batches {
            let Some(taken) = block_on(self.queue.take(2)) else {
                return;
            };
            let claimed: Vec<_> = {
                let orders = taken.orders().iter();
                orders.filter(|order| order.slot.claim()).cloned().collect()
            };
            let ids = claimed.iter().map(|order| order.order.id);
            self.rows.lock().unwrap().extend(ids);
            for order in claimed {
                order.slot.settle(Settled::Persisted);
                order.slot.take_wakers(Waker::wake);
                self.pending.remove(order.order.id);
            }
            taken.ack();
        }
    }
}

fn spawn<T: Send + 'static>(
    world: &Arc<World>,
    work: impl FnOnce(&World) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let world = Arc::clone(world);
    thread::spawn(move || work(&world))
}

/// Orders are placed and waited for, a duplicate waits for one of them for less time, the worker
/// dies early, and the deadline task gives up what is left.
pub fn orders_are_written_or_given_up() {
    let world = World::new(2);
    let worker = spawn(&world, |world| world.work(2));
    let placers: Vec<_> = (1..=2)
        .map(|number| {
            spawn(&world, move |world| {
                let mut ends = Vec::new();
                for id in number * 100..number * 100 + 3 {
                    if let Some(order) = world.place(id, 2) {
                        ends.push((id, wait_until(&order, SlotState::is_final)));
                    }
                }
                ends
            })
        })
        .collect();
    let duplicate = spawn(&world, |world| {
        let order = loop {
            if world.is_over.load(Ordering::SeqCst) {
                return;
            }
            match world.pending.get(OrderId::new(100).unwrap()) {
                Some(order) => break order,
                None => yield_now(),
            }
        };
        world.pending.wake_by(&order, world.at(1));
        wait_until(&order, SlotState::is_final);
    });
    let deadlines = spawn(&world, |world| {
        // Time passes second by second, and stands still once everything is due.
        for seconds in (0..4).chain(std::iter::repeat(4)) {
            if world.is_over.load(Ordering::SeqCst) {
                return;
            }
            world.expire(seconds);
            yield_now();
        }
    });
    let ends: Vec<_> = placers
        .into_iter()
        .flat_map(|placer| placer.join().unwrap())
        .collect();
    world.is_over.store(true, Ordering::SeqCst);
    duplicate.join().unwrap();
    deadlines.join().unwrap();
    world.queue.close();
    worker.join().unwrap();
    let rows = world.rows.lock().unwrap().clone();
    let mut given_up = 0;
    for (id, end) in ends {
        let is_row = rows.contains(&OrderId::new(id).unwrap());
        match end {
            SlotState::Persisted => assert!(is_row, "{id}"),
            SlotState::Abandoned => {
                assert!(!is_row, "{id} is written and its units are back");
                given_up += 1;
            }
            other => panic!("{id} ends as {other:?}"),
        }
    }
    assert_eq!(world.free.load(Ordering::SeqCst), given_up);
    assert!(world.pending.is_empty());
}

/// Whatever is entered, and whoever asks to be woken earlier, beside a deadline task that walks: its next
/// look finds it.
pub fn no_deadline_is_missed() {
    let world = World::new(8);
    // Claimed, so that the deadline task wakes and does not give up.
    let claimed = |world: &World, id, seconds| {
        let order = world.place(id, seconds).expect("there is room");
        assert!(order.slot.claim());
        order
    };
    let early = claimed(&world, 1, 100);
    let entering = spawn(&world, move |world| {
        for id in 2..5 {
            claimed(world, id, 2);
        }
    });
    let asking = spawn(&world, move |world| {
        world.pending.wake_by(&early, world.at(1))
    });
    let deadlines = spawn(&world, |world| {
        for seconds in [0, 1, 1] {
            world.expire(seconds);
        }
    });
    entering.join().unwrap();
    asking.join().unwrap();
    deadlines.join().unwrap();
    // The first is due again after having been woken at its early moment, the others for once.
    assert!(
        world.expire(3) >= 3,
        "a deadline of an order that was entered is missed"
    );
    assert_eq!(world.expire(200), 4);
}

/// Wakes nobody and counts how often it was to.
#[derive(Default)]
struct Count(std::sync::atomic::AtomicUsize);

impl std::task::Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Somebody asks to be woken at a moment at which others are due as well, while the deadline task looks.
pub fn whoever_asks_late_is_woken() {
    let world = World::new(8);
    let claimed = |id, seconds| {
        let order = world.place(id, seconds).expect("there is room");
        assert!(order.slot.claim());
        order
    };
    claimed(1, 1);
    let order = claimed(2, 100);
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    let asking = spawn(&world, move |world| {
        // In this order, as a request does.
        order.slot.subscribe(waker);
        world.pending.wake_by(&order, world.at(1));
    });
    let deadlines = spawn(&world, |world| world.expire(1));
    asking.join().unwrap();
    deadlines.join().unwrap();
    world.expire(1);
    assert!(count.0.load(Ordering::SeqCst) > 0, "nobody wakes it");
}
