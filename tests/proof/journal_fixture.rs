//! A journal on a simulated disk, with somebody who appends, takes and decides, and notes when.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use millrace::metrics::Metrics;
use millrace::order::{
    Currency, KeyHash, Order, OrderId, PayloadHash, Quantity, SkuId, SkuNumber, UnixMillis, UserId,
};
use millrace::queue::log::file::{JournalError, Opened};
use millrace::queue::log::record::Record;
use millrace::queue::{DurableQueue, LoggedQueue, NotDurable, OrderQueue, QueueParts};
use millrace::state::pending::{Pending, PendingOrder, SlotState};
use rand::Rng;
use rand::rngs::StdRng;

use super::sim_disk::SimDisk;

pub const PATIENCE: Duration = Duration::from_secs(20);
/// Segments of 64 KiB, 16 at most.
const BYTES_MAX: u64 = 1 << 20;
const NEVER: usize = usize::MAX;
/// Why nothing was decided within [`PATIENCE`].
pub const NOTHING: &str = "nothing comes out of the queue";

/// The known facts about one order.
pub struct Known {
    pub order: Order,
    pending: Arc<PendingOrder>,
    /// How much had been done to the disk when its sender was woken and found it durable.
    durable_at: Arc<Noted>,
    /// The same when it was decided.
    decided_at: usize,
}

struct Noted {
    disk: SimDisk,
    pending: Mutex<Option<Arc<PendingOrder>>>,
    at: AtomicUsize,
}

impl Wake for Noted {
    fn wake(self: Arc<Self>) {
        let pending = self.pending.lock().unwrap().clone();
        if pending.is_some_and(|pending| pending.slot.is_durable()) {
            self.at.fetch_min(self.disk.now(), Ordering::SeqCst);
        }
    }
}

impl Known {
    /// Whether a crash at this point must find it.
    pub fn must_be_there(&self, at: usize) -> bool {
        self.durable_at.at.load(Ordering::SeqCst) <= at && at < self.decided_at
    }
}

/// The fixture.
pub struct Fixture {
    pub disk: SimDisk,
    pub queue: LoggedQueue,
    pub known: HashMap<OrderId, Known>,
    next_id: u64,
}

pub fn open(disk: &SimDisk) -> Result<Opened, JournalError> {
    Opened::on(Arc::new(disk.clone()), BYTES_MAX, [9; 16], |_, _| {})
}

impl Fixture {
    /// A journal that goes on from what is on `disk`; ids from `next_id`.
    pub fn start(disk: SimDisk, next_id: u64, capacity: usize) -> Result<Self, JournalError> {
        let parts = QueueParts {
            capacity,
            epoch: 1,
            pending: Arc::new(Pending::with_capacity(64)),
            wake_all: Arc::new(|wakers| wakers.into_iter().for_each(Waker::wake)),
            may_acknowledge: Arc::new(|| true),
            on_end: Arc::new(|reason| panic!("{reason}")),
            contact: None,
            metrics: Metrics::new().unwrap(),
        };
        Ok(Fixture {
            queue: LoggedQueue::start(open(&disk)?.start(BYTES_MAX, false)?, parts).map_err(
                |source| JournalError::Io {
                    doing: "starting the queue",
                    source,
                },
            )?,
            disk,
            known: HashMap::new(),
            next_id,
        })
    }

    /// Appends one order, if it is let in. While the next segment is only being made it asks again, as
    /// a client does.
    pub fn append(&mut self, rng: &mut StdRng) -> Result<OrderId, NotDurable> {
        let order = order(self.next_id, rng);
        let deadline = Instant::now() + PATIENCE;
        let permit = loop {
            match self.queue.reserve(order.attributes.as_deref()) {
                Err(NotDurable::Busy) if Instant::now() < deadline => std::thread::yield_now(),
                reserved => break reserved?,
            }
        };
        self.next_id += 1;
        let noted = Arc::new(Noted {
            disk: self.disk.clone(),
            pending: Mutex::new(None),
            at: AtomicUsize::new(NEVER),
        });
        let waker = Arc::new(Waker::from(Arc::clone(&noted)));
        let pending = Arc::new(PendingOrder::appending(
            order.clone(),
            deadline,
            Some(waker),
        ));
        *noted.pending.lock().unwrap() = Some(Arc::clone(&pending));
        let id = order.id;
        let known = Known {
            order,
            pending: Arc::clone(&pending),
            durable_at: noted,
            decided_at: NEVER,
        };
        self.known.insert(id, known);
        self.queue
            .append(pending, permit)
            .expect("there is room in memory");
        Ok(id)
    }

    /// Waits until the journal has reported the outcome of each order.
    pub fn settle(&self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        for known in self.known.values() {
            while known.pending.slot.state() == SlotState::Appending {
                if Instant::now() > deadline {
                    return Err(format!("order {} is never answered", known.order.id));
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Takes what is there, at most `max`, and says that it is decided.
    pub fn decide(&mut self, max: usize) -> Result<usize, String> {
        let taken = super::outcome::block_on(async {
            tokio::time::timeout(PATIENCE, self.queue.take(max)).await
        });
        let taken = taken.map_err(|_| NOTHING.to_owned())?;
        let Some(taken) = taken else { return Ok(0) };
        let orders = taken.orders().to_vec();
        taken.ack();
        let now = self.disk.now();
        for order in &orders {
            if let Some(known) = self.known.get_mut(&order.order.id) {
                if known.decided_at != NEVER {
                    return Err(format!("order {} came out twice", order.order.id));
                }
                if known.order != order.order {
                    return Err(format!("order {} came out changed", order.order.id));
                }
                known.decided_at = now;
            }
        }
        self.queue.settled(&orders);
        Ok(orders.len())
    }

    /// Orders that were not decided.
    pub fn undecided(&self) -> usize {
        let known = self.known.values();
        known.filter(|known| known.decided_at == NEVER).count()
    }

    /// Compares what a crash at `at` left with what must be there, and with all there ever was.
    pub fn compare(&self, opened: &Opened, at: usize) -> Result<(), String> {
        let mut found = HashMap::new();
        opened
            .records(|record| {
                if let Record::Order(order) = record {
                    found.insert(order.id, *order);
                }
            })
            .map_err(|error| error.to_string())?;
        for order in found.values() {
            match self.known.get(&order.id) {
                None => return Err(format!("order {} was never written", order.id)),
                Some(known) if known.order != *order => {
                    return Err(format!("order {} was changed", order.id));
                }
                Some(_) => {}
            }
        }
        let lost = self
            .known
            .values()
            .find(|known| known.must_be_there(at) && !found.contains_key(&known.order.id));
        match lost {
            Some(known) => Err(format!(
                "order {} was acknowledged and is not there",
                known.order.id
            )),
            None => Ok(()),
        }
    }

    /// The next id that nobody has.
    pub fn next_id(&self) -> u64 {
        self.next_id
    }
}

/// The names of a journal's segments among these files.
pub fn segments(files: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let names = files.keys().filter(|name| name.ends_with(".segment"));
    names.cloned().collect()
}

pub fn order(number: u64, rng: &mut StdRng) -> Order {
    let attributes = rng.random_bool(0.7).then(|| {
        let length = rng.random_range(0..1_000);
        format!("{{\"a\":\"{}\"}}", "x".repeat(length)).into_boxed_str()
    });
    Order {
        id: OrderId::new(number).unwrap(),
        user_id: UserId::new(&format!("u-{number}")).unwrap(),
        sku_id: SkuId::new("A").unwrap().into(),
        sku: SkuNumber(1),
        quantity: Quantity::new(rng.random_range(1..=10_000)).unwrap(),
        adjustment: rng.random(),
        amount: rng.random_range(0..i64::MAX),
        currency: Currency::new("EUR").unwrap(),
        created_at: UnixMillis(rng.random_range(0..4_000_000_000_000)),
        expires_at: UnixMillis(rng.random_range(0..4_000_000_000_000)),
        key: rng.random_bool(0.5).then(|| KeyHash(rng.random())),
        payload: PayloadHash(rng.random()),
        attributes,
    }
}
