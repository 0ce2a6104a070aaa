//! The parts of a running Millrace between HTTP and the database.

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use millrace::metrics::Metrics;
use millrace::order::{
    IdClock, IdempotencyKey, KeyHash, Quantity, Refusal, SkuId, UnixMillis, UserId,
};
use millrace::pipeline::failover::restore::Watermarks;
use millrace::pipeline::orders::intake::{Admission, Intake, OrderRequest};
use millrace::pipeline::orders::worker::{Worker, WorkerError, WorkerSlot};
use millrace::pipeline::orders::worker_pool::WorkerPool;
use millrace::pipeline::{orders::deadlines, wake_directly};
use millrace::queue::{OrderQueue, RingQueue};
use millrace::state::State;
use millrace::state::buyers::Buyers;
use millrace::state::pending::{Pending, PendingOrder, SlotState};
use millrace::state::sticky_refusals::StickyRefusals;
use millrace::state::stock::{Catalogue, Sku};
use millrace::store::batch::BatchWriter;
use millrace::store::postgres::{Database, skus};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::support::sale::Sale;

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// A wait that no order of a test that is not about waiting reaches.
pub const LONG: Duration = Duration::from_secs(120);

pub struct Line {
    pub sale: Sale,
    pub state: Arc<State>,
    pub queue: Arc<dyn OrderQueue>,
    pub intake: Arc<Intake>,
    pub metrics: Metrics,
    pub cut: watch::Sender<bool>,
    watermarks: Arc<Watermarks>,
    pool: Arc<WorkerPool>,
    workers: Vec<JoinHandle<Result<(), WorkerError>>>,
    deadlines: JoinHandle<()>,
}

impl Line {
    /// Recovers from `sale` and opens the intake; no worker runs yet.
    pub async fn open(sale: Sale, capacity: usize) -> Self {
        let catalogue = Catalogue::default();
        catalogue.add(skus::load_all(&sale.database, sale.lease()).await.unwrap());
        let hour = UnixMillis::now().plus_ms(3_600_000);
        let state = Arc::new(State {
            lanes: None,
            recent_orders: millrace::state::recent_orders::RecentOrders::with_capacity(1_000),
            expiry_index: millrace::state::expiry_index::ExpiryIndex::default(),
            orphans: millrace::state::orphans::Orphans::default(),
            catalogue,
            buyers: Buyers::new(1_000_000, 10_000),
            sticky_refusals: StickyRefusals::with_capacity(1_000),
            pending: Arc::new(Pending::with_capacity(capacity)),
            row_changes: Default::default(),
            poison: Default::default(),
            throughput: Default::default(),
            progress: Default::default(),
            ids: IdClock::new(sale.taken.id_high_water, hour),
        });
        let queue: Arc<dyn OrderQueue> = Arc::new(RingQueue::new(capacity));
        let intake = Arc::new(Intake::new(Arc::clone(&state), Arc::clone(&queue), 900_000));
        intake.open();
        let metrics = Metrics::new().unwrap();
        let deadlines = tokio::spawn(deadlines::keep(
            Arc::clone(&state),
            wake_directly(),
            metrics.clone(),
        ));
        Line {
            sale,
            state,
            queue,
            intake,
            metrics,
            cut: watch::Sender::new(false),
            workers: Vec::new(),
            watermarks: Arc::new(Watermarks::new(8)),
            pool: Arc::default(),
            deadlines,
        }
    }

    /// Starts one more worker, which writes to `database`.
    pub fn start_worker(&mut self, database: Database, rows_max: usize) {
        let shard = self.workers.len();
        let worker = Worker::new(
            BatchWriter::new(database, self.sale.lease(), shard as i16),
            WorkerSlot {
                shard,
                watermarks: Arc::clone(&self.watermarks),
                pool: Arc::clone(&self.pool),
            },
            Arc::clone(&self.queue),
            Arc::clone(&self.state),
            wake_directly(),
            self.metrics.clone(),
            rows_max,
            self.cut.subscribe(),
        );
        self.workers.push(tokio::spawn(worker.run()));
    }

    /// Ends a worker that has nothing to do, without a word.
    pub async fn end_worker(&mut self, shard: usize) {
        let worker = &mut self.workers[shard];
        worker.abort();
        assert!(worker.await.unwrap_err().is_cancelled());
        self.workers[shard] = tokio::spawn(async { Ok(()) });
    }

    pub fn sku(&self, name: &str) -> Arc<Sku> {
        let id = SkuId::new(name).unwrap();
        self.state.catalogue.get(&id).unwrap()
    }

    pub fn place(
        &self,
        user: &str,
        sku: &str,
        units: u32,
        wait: Duration,
    ) -> Result<Arc<PendingOrder>, Refusal> {
        match self.intake.admit(&request(user, sku, units, wait), None)? {
            Admission::Placed(pending) => Ok(pending),
            Admission::Duplicate { id, .. } => panic!("{user} has order {id} already"),
        }
    }

    /// Waits for every worker to end.
    pub async fn workers_end(&mut self) -> Vec<Result<(), WorkerError>> {
        let mut ended = Vec::new();
        for worker in self.workers.drain(..) {
            let result = tokio::time::timeout(PATIENCE, worker).await;
            ended.push(result.expect("a worker ends in time").expect("no panic"));
        }
        ended
    }

    /// Compares what every buyer was told with the rows, and every counter with every other.
    pub async fn check(&self, placed: &[Arc<PendingOrder>]) {
        let rows = self.sale.ids("orders").await;
        let letters: HashSet<i64> = self.sale.ids("dead_letters").await.into_iter().collect();
        let written: HashSet<i64> = rows.iter().copied().collect();
        assert_eq!(written.len(), rows.len());
        let mut expected = 0;
        for pending in placed {
            let id = pending.order.id.as_i64();
            let state = pending.slot.state();
            let (row, letter) = match state {
                SlotState::Persisted => (true, false),
                SlotState::Failed => (false, true),
                SlotState::Abandoned | SlotState::Unwritten => (false, false),
                SlotState::Appending
                | SlotState::Waiting
                | SlotState::Claimed
                | SlotState::OnDisk => panic!("order {id} is {state:?}"),
            };
            assert_eq!(written.contains(&id), row, "order {id} is {state:?}");
            assert_eq!(letters.contains(&id), letter, "order {id} is {state:?}");
            expected += i64::from(row);
            // The buyer's record: kept with the key, or forgotten.
            let buyers = &self.state.buyers;
            let kept = buyers.find(&pending.order.user_id, pending.order.id);
            assert_eq!(
                kept.map(|known| known.is_live()),
                (row || letter).then_some(row)
            );
        }
        assert_eq!(
            rows.len() as i64,
            expected,
            "there are rows that nobody placed"
        );
        assert_eq!(self.state.pending.len(), 0, "orders are still in flight");
        assert_eq!(self.queue.depth(), 0);
        for sku in self.state.catalogue.all() {
            let units: i64 = placed
                .iter()
                .filter(|p| p.order.sku == sku.number && p.slot.state() == SlotState::Persisted)
                .map(|p| i64::from(p.order.quantity.get()))
                .sum();
            let stock = sku.counter().snapshot();
            assert_eq!(
                i64::from(stock.free) + units,
                i64::from(stock.total),
                "{}",
                sku.id
            );
        }
        self.sale.assert_audit(Some(&self.state)).await;
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.deadlines.abort();
        self.workers.iter().for_each(JoinHandle::abort);
    }
}

/// Under the key `key-of-` and the buyer's name.
pub fn request(user: &str, sku: &str, units: u32, wait: Duration) -> OrderRequest<'static> {
    OrderRequest {
        user_id: UserId::new(user).unwrap(),
        sku_id: SkuId::new(sku).unwrap(),
        quantity: Quantity::new(units).unwrap(),
        adjustment: 0,
        attributes: None,
        key: Some(key_hash(&format!("key-of-{user}"))),
        wait,
        respond_async: false,
        waitlist: false,
        trace: None,
    }
}

/// The hash of a key with this text.
pub fn key_hash(text: &str) -> KeyHash {
    KeyHash::of(IdempotencyKey::new(text).unwrap())
}

/// Waits for the slot to be final, as a handler does.
pub async fn outcome(pending: &PendingOrder) -> SlotState {
    let settled = poll_fn(|context| {
        pending.slot.subscribe(context.waker().clone());
        match pending.slot.state() {
            state if state.is_final() => Poll::Ready(state),
            _ => Poll::Pending,
        }
    });
    match tokio::time::timeout(PATIENCE, settled).await {
        Ok(state) => state,
        Err(_) => panic!(
            "order {} stays {:?}",
            pending.order.id,
            pending.slot.state()
        ),
    }
}

/// Waits until a worker has the order.
pub async fn claimed(pending: &PendingOrder) {
    until("it is claimed", || {
        pending.slot.state() == SlotState::Claimed
    })
    .await;
}

/// Waits until every one of them is a row.
pub async fn all_persisted(placed: &[Arc<PendingOrder>]) {
    let states = outcomes(placed).await;
    assert_eq!(tally(&states, SlotState::Persisted), placed.len());
}

pub async fn outcomes(placed: &[Arc<PendingOrder>]) -> Vec<SlotState> {
    let mut states = Vec::with_capacity(placed.len());
    for pending in placed {
        states.push(outcome(pending).await);
    }
    states
}

pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub fn tally(states: &[SlotState], of: SlotState) -> usize {
    states.iter().filter(|state| **state == of).count()
}
