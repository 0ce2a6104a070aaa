//! One process of Millrace without its servers: it takes the database and its journal over, recovers, and serves, until
//! it is killed. Wired as `app` does it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use millrace::backoff::Backoff;
use millrace::metrics::Metrics;
use millrace::order::payment::Delivery;
use millrace::order::receipt::{ReceiptKeys, SignedParts};
use millrace::order::{ClockReading, IdClock, LaneSet, Order, OrderId, OrderStatus, Refusal};
use millrace::pipeline::admin::operator::{Operator, OperatorParts};
use millrace::pipeline::admin::pauses::Pauses;
use millrace::pipeline::failover::lease::{self, AcknowledgeLease, Leases};
use millrace::pipeline::failover::loading;
use millrace::pipeline::failover::log_replay::LogReplay;
use millrace::pipeline::failover::replay::Replayer;
use millrace::pipeline::failover::restore::{Restorer, Watermarks};
use millrace::pipeline::orders::cancel::{CancelError, Canceller, Which};
use millrace::pipeline::orders::deadlines;
use millrace::pipeline::orders::intake::{Admission, Intake, OrderRequest};
use millrace::pipeline::orders::lookup::{Found, OrderLookup};
use millrace::pipeline::orders::parking::Parking;
use millrace::pipeline::orders::worker::{Worker, WorkerSlot};
use millrace::pipeline::orders::worker_pool::WorkerPool;
use millrace::pipeline::payments::assigner::Assigner;
use millrace::pipeline::payments::callbacks::{Callbacks, CallbacksHandle};
use millrace::pipeline::payments::expiry::Expiry;
use millrace::pipeline::payments::processor::PaymentProcessor;
use millrace::pipeline::payments::reconciler::{OrphanChecks, Reconciler};
use millrace::pipeline::payments::settler::{Settler, SettlerParts, Signals};
use millrace::pipeline::wake_directly;
use millrace::queue::log::file::Opened;
use millrace::queue::log::record::Record;
use millrace::queue::{LoggedQueue, OrderQueue, QueueParts};
use millrace::state::State;
use millrace::state::buyers::Buyers;
use millrace::state::expiry_index::ExpiryIndex;
use millrace::state::orphans::Orphans;
use millrace::state::pending::{Pending, PendingOrder, SlotState};
use millrace::state::poison::Poison;
use millrace::state::recent_orders::RecentOrders;
use millrace::state::sticky_refusals::StickyRefusals;
use millrace::state::stock::Catalogue;
use millrace::store::batch::BatchWriter;
use millrace::store::postgres::lease::{self as store_lease, NodeGuard};
use millrace::store::postgres::{Database, replication, skus};
use millrace::store::settlement::SettlementWriter;
use rand::rngs::StdRng;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::disk::{Files, LivingDisk};
use super::world::{Door, World};
use crate::sim_disk::Crash;

/// Size of a journal: 16 segments of 64 KiB.
const BYTES_MAX: u64 = 1 << 20;
const WORKERS: usize = 2;
const CAPACITY: usize = 16;
const ROWS_MAX: usize = 16;
const REPLAYED_AT_ONCE: usize = 40;
pub const PAYMENT_TTL_MS: u64 = 60_000;
const WAITLIST_TTL_MS: u64 = 600_000;
const WINDOW_MS: u64 = 7_200_000;
/// Longest wait of an order's request.
pub const ORDER_TIMEOUT: Duration = Duration::from_secs(4);
const STEP: Duration = Duration::from_secs(1);
const FIRST_CHECK: Duration = Duration::from_millis(500);
const LEASE_MS: u64 = 20_000;
const LOOK_AGAIN: Backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(250));

/// The process has died before it answered.
#[derive(Clone, Copy, Debug)]
pub struct Dead;

/// What the buyer of an order is told.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The order, as a row or an acknowledged record.
    Order {
        order: Box<Order>,
        /// None for an order that waits for units.
        receipt: Option<String>,
        how: How,
        /// This very request has placed it.
        is_new: bool,
    },
    /// A repeated request: the order is a row at this status.
    Stored(OrderId, OrderStatus),
    /// Not placed, and nothing is held.
    TimedOut(OrderId),
    /// Not placed.
    Refused(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// `201`, or `202 waitlisted`.
    Written,
    /// `202 accepted`.
    Acknowledged,
    /// `202 undecided`.
    Undecided,
}

/// A process.
pub struct Process {
    pub state: Arc<State>,
    pub queue: Arc<LoggedQueue>,
    pub canceller: Canceller,
    pub operator: Operator,
    intake: Arc<Intake>,
    lookup: OrderLookup,
    callbacks: CallbacksHandle,
    receipts: Arc<ReceiptKeys>,
    pub disk: LivingDisk,
    tasks: RefCell<JoinSet<()>>,
    grave: Door,
    threads: Range<u64>,
}

impl Process {
    /// Starts one on these files. On an error it has ended.
    pub async fn start(world: &Rc<World>, disk: LivingDisk) -> Result<Rc<Self>, String> {
        let first_thread = world.next_thread();
        let text = |error: &dyn std::error::Error| error.to_string();
        let opened = Opened::on(Arc::new(disk.clone()), BYTES_MAX, [9; 16], |_, _| {});
        let opened = opened.map_err(|error| text(&error))?;
        let database = Database::new(
            "host=/simulated user=millrace dbname=m",
            "millrace",
            4,
            STEP,
        );
        let database = database.map_err(|error| text(&error))?;
        let started = Self::take_over(world, database, opened).await;
        let (parts, tasks) = started.map_err(|error| text(&*error))?;
        let Parts {
            state,
            queue,
            canceller,
            operator,
            intake,
            lookup,
            callbacks,
            receipts,
        } = parts;
        intake.open();
        Ok(Rc::new(Process {
            state,
            queue,
            canceller,
            operator,
            intake,
            lookup,
            callbacks,
            receipts,
            disk,
            tasks: RefCell::new(tasks),
            grave: Door::default(),
            threads: first_thread..world.next_thread(),
        }))
    }

    async fn take_over(
        world: &Rc<World>,
        database: Database,
        opened: Opened,
    ) -> Result<(Parts, JoinSet<()>), Box<dyn std::error::Error>> {
        let guard = store_lease::claim(&database).await?;
        let clock = ClockReading::take();
        let ids_from = opened.scanned.id_high_water.max(clock.now());
        let shards = WORKERS as i16;
        let taken = store_lease::take_over(guard, shards + 7, ids_from).await?;
        let lease = taken.lease;
        let guard = NodeGuard::keep(database.clone(), taken.guard).await?;
        let secrets = ["the secret of simulated receipts"];
        let receipts = Arc::new(ReceiptKeys::new(&secrets, &taken.receipts));
        let orphans = Orphans::default();
        loading::load_orphans(&database, &orphans).await?;
        let mut recorded = Vec::new();
        opened.records(|record| {
            if let Record::Order(order) = record {
                recorded.push(*order);
            }
        })?;
        world.note(format_args!(
            "epoch {} replays {}",
            lease.epoch,
            recorded.len()
        ));
        if !recorded.is_empty() {
            let writer = BatchWriter::new(database.clone(), lease, shards);
            let mut replayer = Replayer::new(database.clone(), writer, ROWS_MAX);
            let replay = LogReplay::new(&database, &orphans, clock.now()).await?;
            let parts = in_parts(recorded);
            replay.run(&mut replayer, parts, |_| {}).await?;
        }
        let ids = IdClock::going_on(clock, taken.id_high_water, taken.ids_leased_until);
        let catalogue = Catalogue::default();
        catalogue.add(skus::load_all(&database, lease).await?);
        let floor = ids.window_floor(WINDOW_MS);
        loading::hold_parked(&catalogue, &database, lease, floor, LaneSet::ALL).await?;
        let poison = Arc::<Poison>::default();
        let state = State {
            catalogue,
            buyers: Buyers::new(20_000, 1_000),
            sticky_refusals: StickyRefusals::with_capacity(1 << 10),
            recent_orders: RecentOrders::with_capacity(256),
            pending: Arc::new(Pending::with_capacity(4 * CAPACITY)),
            expiry_index: ExpiryIndex::default(),
            orphans,
            lanes: None,
            row_changes: Default::default(),
            poison: Arc::clone(&poison),
            ids,
            throughput: Default::default(),
            progress: Default::default(),
        };
        loading::load(&state, &database, lease, floor, LaneSet::ALL, |_, _| {}).await?;
        let state = Arc::new(state);
        let metrics = Metrics::new()?;
        let acknowledge = Arc::new(AcknowledgeLease::new(LEASE_MS));
        let may_acknowledge = Arc::clone(&acknowledge);
        let ending = Arc::clone(&poison);
        let parts = QueueParts {
            capacity: CAPACITY,
            epoch: lease.epoch,
            pending: Arc::clone(&state.pending),
            wake_all: wake_directly(),
            may_acknowledge: Arc::new(move || may_acknowledge.holds()),
            on_end: Arc::new(move |reason| ending.set(reason)),
            contact: None,
            metrics: metrics.clone(),
        };
        let log = opened.start(BYTES_MAX, false)?;
        let queue = Arc::new(LoggedQueue::start(log, parts)?);
        let as_queue: Arc<dyn OrderQueue> = Arc::clone(&queue) as _;
        let intake = Intake::new(Arc::clone(&state), Arc::clone(&as_queue), PAYMENT_TTL_MS);
        let intake = Arc::new(intake);
        let watermarks = Arc::new(Watermarks::new(WORKERS));
        watermarks.set_whole(Some(replication::timeline(&database).await?));
        let mut tasks = JoinSet::new();
        let pool = Arc::<WorkerPool>::default();
        let (cut, cut_seen) = watch::channel(false);
        for shard in 0..WORKERS {
            let worker = Worker::new(
                BatchWriter::new(database.clone(), lease, shard as i16),
                WorkerSlot {
                    shard,
                    watermarks: Arc::clone(&watermarks),
                    pool: Arc::clone(&pool),
                },
                Arc::clone(&as_queue),
                Arc::clone(&state),
                wake_directly(),
                metrics.clone(),
                ROWS_MAX,
                cut_seen.clone(),
            );
            let poison = Arc::clone(&poison);
            tasks.spawn(async move {
                if let Err(error) = worker.run().await {
                    poison.set(error.to_string());
                }
            });
        }
        tasks.spawn(async move {
            let _cut = cut;
            std::future::pending().await
        });
        tasks.spawn(deadlines::keep(
            Arc::clone(&state),
            wake_directly(),
            metrics.clone(),
        ));
        let leases = Leases {
            guard: Arc::new(Mutex::new(guard)),
            lease,
            state: Arc::clone(&state),
            acknowledge,
            queue: Arc::clone(&as_queue),
        };
        leases.renew().await?;
        tasks.spawn(lease::keep(leases));
        let restorer = Restorer {
            state: Arc::clone(&state),
            queue: Arc::clone(&as_queue),
            database: database.with_own_pool(2)?,
            lease,
            watermarks,
            metrics: metrics.clone(),
            rows_max: ROWS_MAX,
        };
        tasks.spawn(restorer.watch());
        let signals = Arc::new(Signals::default());
        let settler = |number: i16| -> Result<Settler, Box<dyn std::error::Error>> {
            Ok(Settler::new(SettlerParts {
                state: Arc::clone(&state),
                database: database.with_own_pool(2)?,
                lease,
                writer: SettlementWriter::new(database.clone(), lease, shards + number),
                signals: Arc::clone(&signals),
                metrics: metrics.clone(),
            }))
        };
        tasks.spawn(Expiry::new(settler(2)?, WINDOW_MS).run());
        let first_check_ms = FIRST_CHECK.as_millis() as u64;
        let (callbacks, serving) = Callbacks::new(settler(4)?, first_check_ms);
        tasks.spawn(serving.run());
        let checks = OrphanChecks {
            count: 3,
            first: FIRST_CHECK,
        };
        let reconciler = Reconciler::new(
            settler(3)?,
            Arc::clone(&as_queue),
            Arc::clone(&receipts),
            checks,
        );
        let (payments, processor) = PaymentProcessor::new(reconciler);
        tasks.spawn(processor.run());
        let operators = database.with_own_pool(2)?;
        let (parking_handle, parking) = Parking::new(
            Arc::clone(&state),
            operators.clone(),
            lease,
            BatchWriter::new(database.clone(), lease, shards + 1),
            metrics.clone(),
        );
        tasks.spawn(parking.run());
        let pauses = Pauses::new(Arc::clone(&state), database.with_own_pool(1)?, lease);
        let pauses = Arc::new(pauses);
        tasks.spawn(Arc::clone(&pauses).keep_storing());
        let operator = Operator::new(OperatorParts {
            state: Arc::clone(&state),
            database: operators,
            lease,
            payments,
            pauses,
            parking: parking_handle,
            hints: Default::default(),
            payment_ttl_ms: PAYMENT_TTL_MS,
        });
        let assigner = Assigner::new(settler(5)?, PAYMENT_TTL_MS, WAITLIST_TTL_MS);
        tasks.spawn(assigner.run());
        let canceller = Canceller::new(Arc::clone(&state), database.clone(), lease);
        tasks.spawn(canceller.clone().resolve_lost());
        let lookup = OrderLookup::new(Arc::clone(&state), as_queue, database);
        let parts = Parts {
            state,
            queue,
            canceller,
            operator,
            intake,
            lookup,
            callbacks,
            receipts,
        };
        Ok((parts, tasks))
    }

    /// Ends it like `kill -9`, or with the power of its machine. Returns what is left on the disk.
    pub fn kill(&self, world: &World, crash: Crash, random: &mut StdRng) -> Files {
        let files = self.disk.crash(crash, random);
        self.grave.set(true);
        self.tasks.borrow_mut().abort_all();
        world.kill_threads(self.threads.clone());
        files
    }

    /// What is wrong with a task that has ended, though it should not.
    pub fn ended_task(&self) -> Option<String> {
        let ended = self.tasks.borrow_mut().try_join_next()?;
        match ended {
            Err(error) if error.is_panic() => Some(error.to_string()),
            _ if self.state.poison.is_set() => None,
            _ => Some("a task ended by itself".to_owned()),
        }
    }

    /// Returns once it is killed.
    async fn death(&self) {
        self.grave.pass().await;
    }

    /// What a request comes to, unless the process dies meanwhile.
    pub async fn unless_dead<T>(&self, work: impl Future<Output = T>) -> Result<T, Dead> {
        tokio::select! {
            biased;
            () = self.death() => Err(Dead),
            done = work => Ok(done),
        }
    }

    /// Places an order, as the data plane does.
    pub async fn place(&self, request: &OrderRequest<'_>) -> Result<Answer, Dead> {
        self.unless_dead(self.placing(request)).await
    }

    async fn placing(&self, request: &OrderRequest<'_>) -> Answer {
        let started = Instant::now();
        let deadline = started + request.wait;
        let mut backoff = LOOK_AGAIN;
        loop {
            let found = match self.intake.admit(request, None) {
                Err(refusal) => return Answer::Refused(refusal.code()),
                Ok(Admission::Placed(pending)) => {
                    let state = wait_for(&pending, |pending| match pending.slot.state() {
                        _ if pending.slot.is_durable() => true,
                        SlotState::Waiting if !pending.slot.is_recorded() => false,
                        state if state.is_final() => true,
                        _ => Instant::now() >= deadline,
                    });
                    let state = state.await;
                    return self.by_slot(&pending, state, false);
                }
                Ok(Admission::Duplicate {
                    pending: Some(pending),
                    ..
                }) => Some(Found::InFlight(pending)),
                Ok(Admission::Duplicate { id, pending: None }) => {
                    match self.lookup.find(id).await {
                        Ok(found) => found,
                        Err(_) => return Answer::Refused("no answer"),
                    }
                }
            };
            match found {
                Some(Found::InFlight(pending)) => {
                    self.state.pending.wake_by(&pending, deadline.into_std());
                    let state = wait_for(&pending, |pending| {
                        pending.slot.state().is_final()
                            || (request.respond_async && pending.slot.is_durable())
                            || Instant::now() >= deadline
                    });
                    let state = state.await;
                    return self.by_slot(&pending, state, true);
                }
                Some(Found::Recent(pending)) => {
                    return self.by_slot(&pending, SlotState::Persisted, true);
                }
                Some(Found::OnDisk(_)) if !self.may_acknowledge() => {
                    return Answer::Refused("not_ready");
                }
                Some(Found::OnDisk(order)) => {
                    return self.order(&order, How::Acknowledged, false);
                }
                Some(Found::Stored(stored)) => return Answer::Stored(stored.id, stored.status),
                None if started.elapsed() > ORDER_TIMEOUT => {
                    return Answer::Refused(Refusal::Overloaded.code());
                }
                None => tokio::time::sleep(backoff.pause()).await,
            }
        }
    }

    fn may_acknowledge(&self) -> bool {
        let durable = self.queue.durable();
        durable.is_some_and(|queue| queue.may_acknowledge())
    }

    fn by_slot(&self, pending: &PendingOrder, state: SlotState, replayed: bool) -> Answer {
        let written = matches!(state, SlotState::Persisted | SlotState::Failed);
        let order = &pending.order;
        if pending.slot.is_durable() && !(replayed && written) && self.may_acknowledge() {
            return self.order(order, How::Acknowledged, !replayed);
        }
        match state {
            SlotState::Persisted => self.order(order, How::Written, !replayed),
            SlotState::Appending | SlotState::Waiting | SlotState::Claimed | SlotState::OnDisk => {
                self.order(order, How::Undecided, !replayed)
            }
            SlotState::Abandoned => Answer::TimedOut(order.id),
            SlotState::Unwritten => Answer::Refused("unwritten"),
            SlotState::Failed => Answer::Stored(order.id, OrderStatus::Failed),
        }
    }

    fn order(&self, order: &Order, how: How, is_new: bool) -> Answer {
        let sign = || self.receipts.sign(&SignedParts::from(order));
        Answer::Order {
            order: Box::new(order.clone()),
            receipt: (!order.waits()).then(|| sign().as_str().to_owned()),
            how,
            is_new,
        }
    }

    /// Takes a message of a payment platform. True: it is stored.
    pub async fn notify(&self, delivery: Delivery) -> Result<bool, Dead> {
        let stored = self.unless_dead(self.callbacks.ingest(delivery)).await?;
        Ok(stored.is_ok())
    }

    /// Cancels an order. `None`: the outcome is unknown. True: it is cancelled.
    pub async fn cancel(&self, id: OrderId) -> Result<Option<bool>, Dead> {
        let cancelled = self.canceller.cancel(id, Which::Unpaid);
        Ok(match self.unless_dead(cancelled).await? {
            Ok(order) => Some(order.status == OrderStatus::Cancelled),
            Err(CancelError::Store(_)) => None,
            Err(_) => Some(false),
        })
    }
}

/// What a process is asked through.
struct Parts {
    state: Arc<State>,
    queue: Arc<LoggedQueue>,
    canceller: Canceller,
    operator: Operator,
    intake: Arc<Intake>,
    lookup: OrderLookup,
    callbacks: CallbacksHandle,
    receipts: Arc<ReceiptKeys>,
}

/// The orders of a journal as its reader passes them on.
fn in_parts(mut orders: Vec<Order>) -> mpsc::Receiver<Vec<Order>> {
    let (parts, receiver) = mpsc::channel(orders.len().div_ceil(REPLAYED_AT_ONCE).max(1));
    while !orders.is_empty() {
        let rest = orders.split_off(orders.len().min(REPLAYED_AT_ONCE));
        let sent = parts.try_send(std::mem::replace(&mut orders, rest));
        sent.expect("room for every part");
    }
    receiver
}

/// Waits as a connection does: it looks again whenever the order's slot wakes it.
async fn wait_for(pending: &PendingOrder, is_over: impl Fn(&PendingOrder) -> bool) -> SlotState {
    poll_fn(|context| {
        pending.slot.subscribe(context.waker().clone());
        if is_over(pending) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    pending.slot.state()
}
