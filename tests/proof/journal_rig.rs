//! A process that runs a journal on the simulated disk, and notes of what it was seen to promise.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use millrace::metrics::Metrics;
use millrace::order::{
    Currency, KeyHash, Order, OrderId, PayloadHash, Quantity, SkuId, SkuNumber, UnixMillis, UserId,
};
use millrace::queue::journal::record::Record;
use millrace::queue::journal::{JournalError, JournalParts, JournalQueue, Opened};
use millrace::queue::{DurableQueue, NotDurable, OrderQueue};
use millrace::state::pending::{Pending, PendingOrder, Settled, SlotState};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::StdRng;

use super::sim_disk::{Handle, SimDisk};

/// The least there may be: segments of 64 KiB, 16 of them.
pub const BYTES_MAX: u64 = 1 << 20;

/// Nothing that a process is waited for takes nearly as long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What is known of an order. Moments are lengths of the disk's recording.
#[derive(Clone, Debug)]
pub struct Noted {
    pub order: Order,
    /// From here on it must survive.
    pub durable_at: Option<usize>,
    /// Up to here it must.
    pub decided_at: Option<usize>,
    taken: bool,
}

impl Noted {
    /// Whether the journal has to have it after a crash at this moment.
    pub fn is_owed(&self, at: usize) -> bool {
        self.durable_at.is_some_and(|durable| durable <= at)
            && self.decided_at.is_none_or(|decided| at <= decided)
    }
}

/// What was ever handed to a journal.
#[derive(Debug, Default)]
pub struct Notes {
    pub orders: BTreeMap<OrderId, Noted>,
    in_flight: Vec<Arc<PendingOrder>>,
    next: u64,
    /// What was seen that may not be.
    pub faults: Vec<String>,
}

pub type SharedNotes = Arc<Mutex<Notes>>;

impl Notes {
    /// Notes what has become durable. Runs where an appender has just acknowledged, in its thread.
    fn look(&mut self, disk: &SimDisk) {
        let (durable, open): (Vec<_>, _) = std::mem::take(&mut self.in_flight)
            .into_iter()
            .partition(|order| order.slot.is_durable());
        self.in_flight = open;
        // Read afterwards: what was promised was promised at this length or before.
        let (at, failed) = (disk.ops(), disk.segment_failed());
        for order in durable {
            let id = order.order.id;
            if failed {
                self.faults
                    .push(format!("{id} was acknowledged after its file had failed"));
            }
            if let Some(noted) = self.orders.get_mut(&id) {
                noted.durable_at.get_or_insert(at);
            }
        }
    }

    /// What is wrong with the orders that were found after a crash at `at`, if anything is.
    pub fn check(&self, found: &[Order], at: usize) -> Result<(), String> {
        for order in found {
            match self.orders.get(&order.id) {
                None => return Err(format!("{} was never written", order.id)),
                Some(noted) if noted.order != *order => {
                    return Err(format!("{} is not what was written", order.id));
                }
                Some(_) => {}
            }
        }
        if !found.is_sorted_by(|a, b| a.id < b.id) {
            return Err("the orders are not found in the order of writing".to_owned());
        }
        let owed = self.orders.values().filter(|noted| noted.is_owed(at));
        for noted in owed {
            let id = noted.order.id;
            if found.binary_search_by_key(&id, |order| order.id).is_err() {
                return Err(format!(
                    "{id} is gone, which was durable at {:?}",
                    noted.durable_at
                ));
            }
        }
        Ok(())
    }

    /// Takes orders as known and decided long ago.
    pub fn know(&mut self, orders: Vec<Order>) {
        for order in orders {
            self.next = self.next.max(order.id.get() >> 22);
            let noted = Noted {
                order,
                durable_at: None,
                decided_at: None,
                taken: false,
            };
            self.orders.insert(noted.order.id, noted);
        }
    }

    /// The first thing that was seen and may not be.
    pub fn fault(&self) -> Result<(), String> {
        self.faults
            .first()
            .map_or(Ok(()), |fault| Err(fault.clone()))
    }

    fn new_order(&mut self, rng: &mut StdRng, attributes: usize) -> Order {
        self.next += 1;
        let text: String = (0..attributes)
            .map(|_| char::from(rng.random_range(b' '..=b'~')))
            .collect();
        let order = Order {
            id: OrderId::new(self.next << 22).expect("not 0"),
            user_id: UserId::new(&format!("u-{}", self.next)).expect("valid"),
            sku_id: SkuId::new("A").expect("valid"),
            sku: SkuNumber(rng.random()),
            quantity: Quantity::new(rng.random_range(1..=Quantity::MAX)).expect("in range"),
            adjustment: rng.random(),
            amount: rng.random(),
            currency: Currency::new("EUR").expect("valid"),
            created_at: UnixMillis(rng.random()),
            expires_at: UnixMillis(rng.random()),
            key: rng.random::<bool>().then(|| KeyHash(rng.random())),
            payload: PayloadHash(rng.random()),
            attributes: (attributes > 0).then(|| text.into()),
        };
        let noted = Noted {
            order: order.clone(),
            durable_at: None,
            decided_at: None,
            taken: false,
        };
        self.orders.insert(order.id, noted);
        order
    }
}

/// Every order of a journal.
pub fn orders_in(opened: &Opened) -> Result<Vec<Order>, JournalError> {
    let mut orders = Vec::new();
    opened.records(|record| {
        if let Record::Order(order) = record {
            orders.push(*order);
        }
    })?;
    Ok(orders)
}

/// Opens the journal that is on a disk.
pub fn open(handle: &Handle, id: u8) -> Result<Opened, JournalError> {
    Opened::on(Arc::new(handle.clone()), BYTES_MAX, [id; 16], |_, _| {})
}

/// A process with a journal.
pub struct Rig {
    pub disk: SimDisk,
    pub handle: Handle,
    pub queue: JournalQueue,
    pub notes: SharedNotes,
    pending: Arc<Pending>,
    /// Taken from the queue and claimed, and not decided yet; oldest first.
    pub taken: Vec<Arc<PendingOrder>>,
}

/// How an order was received.
pub enum Handed {
    Over(Arc<PendingOrder>),
    Refused(NotDurable),
}

impl Rig {
    /// What a process does that starts: it reads the journal, writes all of it to the database,
    /// which is what makes it decided, and runs it.
    ///
    /// The outer error is a promise that was broken, the inner one the journal's own.
    pub fn start(
        disk: &SimDisk,
        notes: &SharedNotes,
        id: u8,
        capacity: usize,
        retain: bool,
    ) -> Result<Result<Self, JournalError>, String> {
        let handle = disk.process();
        let opened = match open(&handle, id) {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(error)),
        };
        let found = match orders_in(&opened) {
            Ok(found) => found,
            Err(error) => return Ok(Err(error)),
        };
        {
            let mut notes = notes.lock();
            notes.in_flight.clear();
            let now = disk.ops();
            notes.check(&found, now)?;
            for order in &found {
                if let Some(noted) = notes.orders.get_mut(&order.id) {
                    noted.decided_at.get_or_insert(now);
                }
            }
        }
        let pending = Arc::new(Pending::with_capacity(capacity));
        let (noting, on) = (Arc::clone(notes), disk.clone());
        let parts = JournalParts {
            capacity,
            bytes_max: BYTES_MAX,
            epoch: 1,
            retain,
            pending: Arc::clone(&pending),
            wake_all: Arc::new(move |wakers| {
                noting.lock().look(&on);
                wakers.into_iter().for_each(Waker::wake);
            }),
            may_acknowledge: Arc::new(|| true),
            metrics: Metrics::new().expect("metrics"),
        };
        Ok(JournalQueue::start(opened, parts).map(|queue| Rig {
            disk: disk.clone(),
            handle,
            queue,
            notes: Arc::clone(notes),
            pending,
            taken: Vec::new(),
        }))
    }

    /// Hands over a new order with so many bytes of attributes.
    pub fn hand_over(&self, rng: &mut StdRng, attributes: usize) -> Result<Handed, String> {
        let mut notes = self.notes.lock();
        let order = notes.new_order(rng, attributes);
        let permit = match self.queue.reserve(order.attributes.as_deref()) {
            Ok(permit) => permit,
            Err(why) => {
                notes.orders.remove(&order.id);
                return Ok(Handed::Refused(why));
            }
        };
        let order = Arc::new(PendingOrder::appending(order, None));
        self.pending.insert(&order);
        notes.in_flight.push(Arc::clone(&order));
        drop(notes);
        match self.queue.append(Arc::clone(&order), permit) {
            Ok(()) => Ok(Handed::Over(order)),
            // There is one producer, and `reserve` has looked.
            Err(rejected) => Err(format!("an order with a permit: {rejected}")),
        }
    }

    /// Hands over an order that somebody waits for.
    pub fn push(&self, rng: &mut StdRng) -> Result<Arc<PendingOrder>, String> {
        let order = self.notes.lock().new_order(rng, 0);
        let order = Arc::new(PendingOrder::new(
            order,
            Instant::now() + 2 * PATIENCE,
            None,
        ));
        let pushed = self.queue.push(Arc::clone(&order));
        pushed.map_err(|rejected| format!("a waiting order: {rejected}"))?;
        Ok(order)
    }

    /// Takes and claims what is in the queue now. False: the queue has ended.
    pub fn take(&mut self) -> bool {
        loop {
            let mut take = self.queue.take(64);
            let mut context = Context::from_waker(Waker::noop());
            let taken = match take.as_mut().poll(&mut context) {
                Poll::Pending => return true,
                Poll::Ready(None) => return false,
                Poll::Ready(Some(taken)) => taken,
            };
            let mut notes = self.notes.lock();
            for order in taken.orders() {
                let id = order.order.id;
                match notes.orders.get_mut(&id) {
                    Some(noted) if !noted.taken => noted.taken = true,
                    _ => notes.faults.push(format!("{id} came to the workers twice")),
                }
                if !order.slot.claim() {
                    let state = order.slot.state();
                    notes
                        .faults
                        .push(format!("{id} came to the workers as {state:?}"));
                }
                self.taken.push(Arc::clone(order));
            }
            drop(notes);
            drop(take);
            taken.done();
        }
    }

    /// Decides orders that were taken: their rows are committed.
    pub fn decide(&mut self, which: impl FnMut(usize) -> bool) {
        let mut number = 0;
        let mut which = which;
        let (decided, open): (Vec<_>, Vec<_>) = self.taken.drain(..).partition(|_| {
            number += 1;
            which(number - 1)
        });
        self.taken = open;
        let now = self.disk.ops();
        let mut notes = self.notes.lock();
        for order in &decided {
            if let Some(noted) = notes.orders.get_mut(&order.order.id) {
                noted.decided_at.get_or_insert(now);
            }
            order.slot.settle(Settled::Persisted);
            self.pending.remove(order.order.id);
        }
        drop(notes);
        self.queue.decided(&decided);
    }

    /// Whether the process has been killed.
    pub fn is_killed(&self) -> bool {
        self.disk.is_killed()
    }

    /// Waits until every one of these orders has been acknowledged or not.
    pub fn until_told(&self, orders: &[Arc<PendingOrder>]) -> Result<(), String> {
        let told = |order: &Arc<PendingOrder>| order.slot.state() != SlotState::Appending;
        until("an order is told whether it is durable", || {
            orders.iter().all(told)
        })
    }

    /// The process is no more. Its threads end without reaching the disk.
    pub fn kill(self) {
        self.handle.die();
        self.queue.stop();
    }

    /// Ends as one that is asked to: what it has been handed is decided.
    pub fn finish(mut self) -> Result<(), String> {
        self.queue.close();
        until("the queue ends", || {
            let ended = !self.take();
            self.decide(|_| true);
            ended
        })?;
        self.queue.stop();
        self.handle.die();
        Ok(())
    }
}

/// Waits for a condition, but not for ever.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            return Err(format!("waited in vain until {what}"));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}
