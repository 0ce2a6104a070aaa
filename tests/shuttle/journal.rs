//! The journal with its threads: intake that appends, workers that take, somebody who looks.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::{self, yield_now};

use crate::disk::MemoryDisk;
use crate::metrics::Metrics;
use crate::order::{
    Currency, Order, OrderId, PayloadHash, Quantity, SkuId, SkuNumber, UnixMillis, UserId,
};
use crate::pending::{Pending, PendingOrder, Settled, SlotState};
use crate::queue::log::file::Opened;
use crate::queue::{DurableQueue, LoggedQueue, NotDurable, OrderQueue, QueueParts};
use crate::sync::{AtomicBool, Ordering, Waker};

/// A segment has its header, room for four orders, and an end that may stay empty. With two of them
/// at most, somebody always waits for one to be deleted.
const SEGMENT_BYTES: u64 = 8 * 512;
const SEGMENTS_MAX: u64 = 2;

/// So long that no two orders share a sector.
const ATTRIBUTES: &str = match std::str::from_utf8(&[b' '; 250]) {
    Ok(text) => text,
    Err(_) => panic!("they are spaces"),
};

/// An order with this id.
pub fn order(id: u64) -> Order {
    Order {
        id: OrderId::new(id).unwrap(),
        user_id: UserId::new("u").unwrap(),
        sku_id: SkuId::new("A").unwrap().into(),
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

/// A deadline that does not pass in a model.
fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3_600)
}

/// Waits until a slot is in a state that `is_enough`, as a request does.
pub fn wait_until(order: &PendingOrder, is_enough: impl Fn(SlotState) -> bool) -> SlotState {
    block_on(poll_fn(|context| {
        order.slot.subscribe(context.waker().clone());
        let state = order.slot.state();
        if is_enough(state) {
            Poll::Ready(state)
        } else {
            Poll::Pending
        }
    }))
}

/// A journal, and the database behind its workers.
struct World {
    disk: MemoryDisk,
    pending: Arc<Pending>,
    queue: LoggedQueue,
    /// The rows.
    committed: Mutex<BTreeSet<OrderId>>,
    is_over: AtomicBool,
}

/// What became of an order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Accepted,
    /// Its record may or may not be there, and it will be written.
    Undecided,
    Refused,
}

impl World {
    /// With room for `capacity` orders in memory.
    fn new(capacity: usize, retain: bool) -> Arc<Self> {
        let disk = MemoryDisk::new();
        let pending = Arc::new(Pending::with_capacity(16));
        let mut opened = Opened::on(Arc::new(disk.clone()), 1 << 20, [9; 16], |_, _| {}).unwrap();
        opened.identity.segment_bytes = SEGMENT_BYTES;
        let log = opened.start(SEGMENTS_MAX * SEGMENT_BYTES, retain).unwrap();
        let parts = QueueParts {
            capacity,
            epoch: 1,
            pending: Arc::clone(&pending),
            wake_all: Arc::new(|wakers| wakers.into_iter().for_each(Waker::wake)),
            may_acknowledge: Arc::new(|| true),
            on_end: Arc::new(|reason| panic!("{reason}")),
            contact: None,
            metrics: Metrics::new().unwrap(),
        };
        Arc::new(World {
            disk,
            pending,
            queue: LoggedQueue::start(log, parts).unwrap(),
            committed: Mutex::default(),
            is_over: AtomicBool::new(false),
        })
    }

    fn is_committed(&self, id: OrderId) -> bool {
        self.committed.lock().unwrap().contains(&id)
    }

    /// Places one order; comes back once it is answered.
    fn place(&self, id: u64) -> Told {
        let durable = self.queue.durable().expect("it is");
        loop {
            let order = Order {
                attributes: Some(ATTRIBUTES.into()),
                ..order(id)
            };
            let permit = match durable.reserve(order.attributes.as_deref()) {
                Ok(permit) => permit,
                Err(NotDurable::Busy | NotDurable::Full) => {
                    if self.is_over.load(Ordering::SeqCst) {
                        return Told::Refused;
                    }
                    yield_now();
                    continue;
                }
                Err(NotDurable::Failed) => return Told::Refused,
                Err(NotDurable::NoLease | NotDurable::Away) => panic!("it has one"),
            };
            let order = Arc::new(PendingOrder::appending(order, far_away(), None));
            self.pending.insert(&order);
            if let Err(rejected) = durable.append(Arc::clone(&order), permit) {
                self.pending.remove(order.order.id);
                if rejected.closed {
                    return Told::Refused;
                }
                continue;
            }
            return match wait_until(&order, |state| state != SlotState::Appending) {
                SlotState::Appending => unreachable!("it was waited for"),
                SlotState::Abandoned => Told::Refused,
                SlotState::Waiting
                | SlotState::Claimed
                | SlotState::Persisted
                | SlotState::OnDisk => {
                    if order.slot.is_durable() {
                        Told::Accepted
                    } else {
                        Told::Undecided
                    }
                }
                SlotState::Failed | SlotState::Unwritten => panic!("nobody does that"),
            };
        }
    }

    /// What must hold of an order that was accepted, at every moment.
    fn check_accepted(&self, id: u64) {
        let id = OrderId::new(id).unwrap();
        // A row first, so that what is no row now was none when the disk was looked at.
        let is_on_disk = self.disk.durable_orders().iter().any(|(_, on)| *on == id);
        assert!(
            is_on_disk || self.is_committed(id),
            "a loss of power would lose {id}"
        );
        let in_flight = self.pending.in_flight();
        assert!(
            in_flight > 0 || self.is_committed(id),
            "{id} is not counted"
        );
        assert!(
            self.is_followed(id) || self.is_committed(id),
            "{id} is not found"
        );
    }

    /// As a look-up does: in memory, on the disk, and in memory again.
    fn is_followed(&self, id: OrderId) -> bool {
        let durable = self.queue.durable().expect("it is");
        let is_open = |order: &Arc<PendingOrder>| !order.slot.state().is_final();
        loop {
            if self.pending.get(id).as_ref().is_some_and(is_open) {
                return true;
            }
            if durable.may_hold(id) && durable.find(id).unwrap().is_some() {
                return true;
            }
            if !self.pending.get(id).as_ref().is_some_and(is_open) {
                return false;
            }
        }
    }

    /// Takes and writes orders until the queue ends. `in_order`: it is the only one.
    fn work(&self, max: usize, in_order: bool) {
        let mut last = BTreeMap::new();
        while let Some(taken) = block_on(self.queue.take(max)) {
            // A batch in eight comes to nothing and goes back.
            if thread_rng().gen_ratio(1, 8) {
                continue;
            }
            let orders = taken.orders().to_vec();
            for order in &orders {
                let id = order.order.id;
                assert!(
                    order.slot.claim(),
                    "nobody else claims it, nobody gives it up"
                );
                let is_new = self.committed.lock().unwrap().insert(id);
                assert!(is_new, "{id} is written twice");
                let before = last.insert(id.get() / 100, id);
                assert!(
                    !in_order || before < Some(id),
                    "{id} comes before {before:?}"
                );
                let entered = self.pending.get(id);
                let is_entered = entered.is_some_and(|entered| Arc::ptr_eq(&entered, order));
                assert!(is_entered, "{id} is written and nobody who asks finds it");
            }
            self.queue.settled(&orders);
            for order in &orders {
                order.slot.settle(Settled::Persisted);
                order.slot.take_wakers(Waker::wake);
                self.pending.remove(order.order.id);
            }
            taken.ack();
        }
    }

    /// What must hold of segments that are said to be decided.
    fn check_decided(&self) -> u64 {
        let number = self.queue.settled_up_to();
        let rows = self.committed.lock().unwrap().clone();
        for (segment, id) in self.disk.written_orders() {
            let is_fine = segment > number || rows.contains(&id);
            assert!(
                is_fine,
                "segment {segment} is called decided, {id} is no row"
            );
        }
        number
    }

    /// Ends it once everybody has placed what there was.
    fn end(&self, workers: Vec<thread::JoinHandle<()>>) {
        self.queue.close();
        for worker in workers {
            worker.join().unwrap();
        }
        assert!(self.queue.stop().is_empty(), "an order was never written");
        assert_eq!((self.pending.in_flight(), self.pending.len()), (0, 0));
        assert_eq!((self.queue.outstanding(), self.queue.spilled()), (0, 0));
        self.queue.erase().unwrap();
        assert_eq!(self.disk.segments(), 0);
    }
}

fn spawn<T: Send + 'static>(
    world: &Arc<World>,
    work: impl FnOnce(&World) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let world = Arc::clone(world);
    thread::spawn(move || work(&world))
}

/// Somebody who places so many orders, one after the other, and is told that each is accepted.
fn producer(world: &Arc<World>, number: u64, orders: u64) -> thread::JoinHandle<()> {
    spawn(world, move |world| {
        for id in number * 100..number * 100 + orders {
            assert!(world.place(id) == Told::Accepted, "{id}");
            world.check_accepted(id);
        }
    })
}

pub fn orders_go_through_memory_and_disk() {
    let world = World::new(2, false);
    let producers: Vec<_> = (1..=3).map(|number| producer(&world, number, 5)).collect();
    let worker = spawn(&world, |world| world.work(2, true));
    for producer in producers {
        producer.join().unwrap();
    }
    world.end(vec![worker]);
    assert_eq!(world.committed.lock().unwrap().len(), 15);
}

pub fn two_workers_share_what_comes() {
    let world = World::new(2, false);
    let workers = (0..2)
        .map(|_| spawn(&world, |world| world.work(1, false)))
        .collect();
    let producers = [producer(&world, 1, 4), producer(&world, 2, 4)];
    for producer in producers {
        producer.join().unwrap();
    }
    world.end(workers);
    assert_eq!(world.committed.lock().unwrap().len(), 8);
}

pub fn segments_are_kept_until_a_standby_confirms() {
    let world = World::new(4, true);
    let worker = spawn(&world, |world| world.work(4, true));
    let standby = spawn(&world, |world| {
        while !world.is_over.load(Ordering::SeqCst) {
            let number = world.check_decided();
            world.queue.confirm(number);
            yield_now();
        }
    });
    let producers = [producer(&world, 1, 6), producer(&world, 2, 6)];
    for producer in producers {
        producer.join().unwrap();
    }
    world.is_over.store(true, Ordering::SeqCst);
    standby.join().unwrap();
    world.end(vec![worker]);
    assert_eq!(world.committed.lock().unwrap().len(), 12);
}

pub fn a_stop_in_the_midst_leaves_nobody_without_an_answer() {
    let world = World::new(2, false);
    let worker = spawn(&world, |world| world.work(2, true));
    let producers: Vec<_> = (1..=2)
        .map(|number| {
            spawn(&world, move |world| {
                let told = (number * 100..number * 100 + 3).map(|id| (id, world.place(id)));
                told.collect::<Vec<_>>()
            })
        })
        .collect();
    for _ in 0..thread_rng().gen_range(0..200) {
        yield_now();
    }
    world.queue.close();
    world.queue.leave_backlog();
    world.is_over.store(true, Ordering::SeqCst);
    worker.join().unwrap();
    let never_written = world.queue.stop();
    // As at the end of a drain: whatever is left gets an answer.
    for order in world.pending.all() {
        if order.slot.abandon() {
            order.slot.take_wakers(Waker::wake);
        }
    }
    for order in never_written {
        assert_eq!(order.slot.state(), SlotState::Abandoned);
    }
    let left = world.disk.durable_orders();
    for producer in producers {
        for (id, told) in producer.join().unwrap() {
            let id = OrderId::new(id).unwrap();
            let is_on_disk = left.iter().any(|(_, on)| *on == id);
            match told {
                Told::Accepted => assert!(is_on_disk || world.is_committed(id), "{id} is lost"),
                Told::Refused => {
                    assert!(!is_on_disk && !world.is_committed(id), "{id} was refused")
                }
                Told::Undecided => panic!("the disk works"),
            }
        }
    }
}

pub fn after_a_failed_sync_orders_still_reach_a_worker() {
    let world = World::new(2, false);
    world.disk.fail_sync_after(thread_rng().gen_range(0..6));
    let worker = spawn(&world, |world| world.work(2, false));
    let producers: Vec<_> = (1..=2)
        .map(|number| {
            spawn(&world, move |world| {
                let mut told = Vec::new();
                for id in number * 100..number * 100 + 3 {
                    told.push((id, world.place(id)));
                    if told.last().is_some_and(|(_, told)| *told == Told::Accepted) {
                        world.check_accepted(id);
                    }
                }
                told
            })
        })
        .collect();
    let told: Vec<_> = producers
        .into_iter()
        .flat_map(|producer| producer.join().unwrap())
        .collect();
    world.queue.close();
    worker.join().unwrap();
    assert!(world.queue.stop().is_empty());
    for (id, told) in told {
        let is_committed = world.is_committed(OrderId::new(id).unwrap());
        assert_eq!(is_committed, told != Told::Refused, "{id}");
    }
}
