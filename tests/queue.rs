//! What every queue promises (the text of `src/queue/mod.rs`), checked on each implementation.
//!
//! A new backend joins by one more `conformance!` line: its name and how to make an empty queue
//! of a capacity.

use std::collections::HashSet;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use millrace::metrics::Metrics;
use millrace::order::{
    Currency, Order, OrderId, PayloadHash, Quantity, SkuId, SkuNumber, UnixMillis, UserId,
};
use millrace::queue::log::file::Opened;
use millrace::queue::{Batch, LoggedQueue, OrderQueue, QueueParts, RingQueue};
use millrace::state::pending::{Pending, PendingOrder, SlotState};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;

/// Makes an empty queue of this capacity.
type Make = fn(usize) -> Arc<dyn OrderQueue>;

macro_rules! conformance {
    ($backend:ident, $make:expr; $($behaviour:ident),* $(,)?) => {
        mod $backend {
            $(
                #[test]
                fn $behaviour() {
                    super::$behaviour($make);
                }
            )*
        }
    };
    ($backend:ident, $make:expr) => {
        conformance! { $backend, $make;
            a_full_queue_gives_the_order_back,
            orders_leave_in_the_order_in_which_they_came,
            a_consumer_takes_no_more_than_it_asked_for,
            each_order_leaves_once_whoever_produces_and_consumes,
            a_waiting_consumer_is_woken_every_time,
            every_waiting_consumer_is_woken_for_orders_of_its_own,
            orders_that_are_not_done_go_back_to_the_head_of_the_line,
            orders_put_back_wake_as_many_consumers_as_they_can_keep_busy,
            a_full_queue_takes_back_what_is_not_done,
            a_closed_queue_refuses_and_runs_empty,
            closing_wakes_every_waiting_consumer,
            what_is_accepted_while_the_queue_closes_can_still_be_taken,
            a_take_that_is_given_up_while_it_waits_loses_nothing,
        }
    };
}

conformance!(ring, |capacity| std::sync::Arc::new(super::RingQueue::new(
    capacity
)));

// Orders that wait for their row.
conformance!(journal, |capacity| super::journal(capacity));

// How it carries orders that are acknowledged first, the proofs `crash_states` and `nth_call` show.

/// A journal in a directory that goes with it.
fn journal(capacity: usize) -> Arc<dyn OrderQueue> {
    let dir = tempfile::tempdir().unwrap();
    Arc::new(start_journal(dir.path(), parts(capacity)))
}

fn start_journal(dir: &Path, parts: QueueParts) -> LoggedQueue {
    let opened = Opened::at(dir, 1 << 20, [7; 16], |_, _| {}).unwrap();
    LoggedQueue::start(opened.start(1 << 20, false).unwrap(), parts).unwrap()
}

fn parts(capacity: usize) -> QueueParts {
    QueueParts {
        capacity,
        epoch: 1,
        pending: Arc::new(Pending::with_capacity(capacity)),
        wake_all: Arc::new(|wakers| wakers.into_iter().for_each(Waker::wake)),
        may_acknowledge: Arc::new(|| true),
        on_end: Arc::new(|reason| panic!("{reason}")),
        contact: None,
        metrics: Metrics::new().unwrap(),
    }
}

// --- Acknowledged orders that are left on the disk ----------------------------------------------

/// Hands two orders to a journal whose ring has room for one, so that the second is left on the disk.
/// Between the sync and that, somebody else begins to wait for the second. Returns it, how often its
/// sender was woken, and how often the other.
fn leave_on_the_disk(may_acknowledge_it: bool) -> (Arc<PendingOrder>, usize, usize) {
    let dir = tempfile::tempdir().unwrap();
    let [sender, other] = [(); 2].map(|()| Arc::new(Woken::default()));
    let appending = |id| {
        let waker = Arc::new(Waker::from(Arc::clone(&sender)));
        Arc::new(PendingOrder::appending(
            order(id).order.clone(),
            Instant::now() + Duration::from_secs(60),
            Some(waker),
        ))
    };
    let (first, second) = (appending(1), appending(2));
    let pending = Arc::new(Pending::with_capacity(2));
    let lease = Arc::new(AtomicBool::new(true));
    let joined = (Arc::clone(&second), Waker::from(Arc::clone(&other)));
    let parts = QueueParts {
        pending: Arc::clone(&pending),
        wake_all: Arc::new(move |wakers| {
            let (second, other) = &joined;
            if second.slot.state() == SlotState::Waiting {
                second.slot.subscribe(other.clone());
            }
            wakers.into_iter().for_each(Waker::wake);
        }),
        may_acknowledge: {
            let lease = Arc::clone(&lease);
            Arc::new(move || lease.load(Ordering::SeqCst))
        },
        ..parts(1)
    };
    let queue = start_journal(dir.path(), parts);
    let until = |done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < deadline, "it never comes");
            std::thread::yield_now();
        }
    };
    let durable = queue.durable().unwrap();
    for order in [&first, &second] {
        lease.store(true, Ordering::SeqCst);
        pending.insert(order);
        let permit = durable.reserve(None).unwrap();
        lease.store(may_acknowledge_it, Ordering::SeqCst);
        durable.append(Arc::clone(order), permit).unwrap();
        until(&|| order.slot.state() != SlotState::Appending);
        until(&|| queue.depth() > 0);
    }
    until(&|| other.0.load(Ordering::SeqCst) > 0);
    assert_eq!(second.slot.state(), SlotState::OnDisk);
    assert!(pending.get(second.order.id).is_none());
    drop(queue.stop());
    // Once for the first order, which is not what is asked for.
    let woken = sender.0.load(Ordering::SeqCst) - 1;
    (second, woken, other.0.load(Ordering::SeqCst))
}

#[test]
fn an_acknowledged_order_that_is_left_on_the_disk_wakes_its_sender_once() {
    let (order, sender, other) = leave_on_the_disk(true);
    assert!(order.slot.is_durable());
    assert_eq!((sender, other), (1, 1));
}

#[test]
fn a_sender_that_may_not_be_told_is_woken_when_its_order_is_left_on_the_disk() {
    let (order, sender, other) = leave_on_the_disk(false);
    assert!(!order.slot.is_durable());
    assert_eq!((sender, other), (2, 1));
}

/// Acknowledges an order and waits until it is in memory.
async fn accept(queue: &LoggedQueue, id: u64) {
    let before = queue.ahead();
    let deadline = Instant::now() + Duration::from_secs(60);
    let accepted = PendingOrder::appending(order(id).order.clone(), deadline, None);
    let durable = queue.durable().unwrap();
    let permit = durable.reserve(None).unwrap();
    durable.append(Arc::new(accepted), permit).unwrap();
    while queue.ahead() == before {
        tokio::task::yield_now().await;
    }
}

#[test]
fn a_rest_ends_once_a_backlog_has_filled_its_half_of_the_ring_or_somebody_waits() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let queue = start_journal(dir.path(), parts(4));
        accept(&queue, 1).await;
        let mut rest = ByHand::new(queue.until_pressing(500));
        assert!(rest.look().is_pending(), "nobody waits");
        accept(&queue, 2).await;
        rest.future.await;
        queue.take(4).await.unwrap().ack();
        accept(&queue, 3).await;
        let mut rest = ByHand::new(queue.until_pressing(500));
        assert!(rest.look().is_pending(), "nobody waits");
        queue.push(order(4)).unwrap();
        rest.future.await;
        queue.take(4).await.unwrap().ack();
        // Full of it already when the rest begins.
        for id in 5..7 {
            accept(&queue, id).await;
        }
        queue.until_pressing(500).await;
    });
}

// --- Tools ----------------------------------------------------------------------------------

fn order(id: u64) -> Arc<PendingOrder> {
    let order = Order {
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
    };
    let deadline = Instant::now() + Duration::from_secs(3_600);
    Arc::new(PendingOrder::new(order, deadline, None))
}

fn fill(queue: &dyn OrderQueue, ids: impl IntoIterator<Item = u64>) {
    for id in ids {
        queue.push(order(id)).unwrap();
    }
}

fn ids(taken: &Batch) -> Vec<u64> {
    taken
        .orders()
        .iter()
        .map(|order| order.order.id.get())
        .collect()
}

/// Runs a test on several threads; one that hangs fails after a minute rather than never.
fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_time()
        .build()
        .unwrap()
        .block_on(async {
            tokio::time::timeout(Duration::from_secs(60), test)
                .await
                .expect("somebody waits for ever");
        });
}

/// A future that is looked at by hand, and how often it asked to be looked at again.
struct ByHand<'a, T> {
    future: std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>,
    woken: Arc<Woken>,
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl<'a, T> ByHand<'a, T> {
    fn new(future: impl Future<Output = T> + Send + 'a) -> Self {
        ByHand {
            future: Box::pin(future),
            woken: Arc::default(),
        }
    }

    fn look(&mut self) -> Poll<T> {
        let waker = Waker::from(Arc::clone(&self.woken));
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }

    fn woken(&self) -> bool {
        self.woken.0.load(Ordering::SeqCst) > 0
    }
}

/// Looks at those that were woken, until nobody is woken any more; returns what they took.
fn look_at_the_woken(takes: &mut Vec<ByHand<'_, Option<Batch>>>) -> Vec<Option<Batch>> {
    let mut all = Vec::new();
    loop {
        let before = all.len();
        let mut sleeping = Vec::new();
        for mut take in takes.drain(..) {
            if !take.woken() {
                sleeping.push(take);
            } else if let Poll::Ready(taken) = take.look() {
                all.push(taken);
            } else {
                take.woken.0.store(0, Ordering::SeqCst);
                sleeping.push(take);
            }
        }
        *takes = sleeping;
        if all.len() == before {
            return all;
        }
    }
}

/// Consumers that sleep on an empty queue, taking at most `max` each.
fn sleeping(queue: &dyn OrderQueue, count: usize, max: usize) -> Vec<ByHand<'_, Option<Batch>>> {
    (0..count)
        .map(|_| {
            let mut take = ByHand::new(queue.take(max));
            assert!(take.look().is_pending(), "there is nothing to take");
            take
        })
        .collect()
}

// --- Behaviours -----------------------------------------------------------------------------

fn a_full_queue_gives_the_order_back(make: Make) {
    run(async move {
        let queue = make(3);
        fill(&*queue, 1..=3);
        let rejected = queue.push(order(4)).unwrap_err();
        assert_eq!((rejected.order.order.id.get(), rejected.closed), (4, false));
        assert_eq!(queue.depth(), 3);
        let taken = queue.take(1).await.unwrap();
        assert_eq!(ids(&taken), [1]);
        taken.ack();
        queue.push(rejected.order).unwrap();
        assert_eq!(ids(&queue.take(9).await.unwrap()), [2, 3, 4]);
    });
}

fn orders_leave_in_the_order_in_which_they_came(make: Make) {
    run(async move {
        let mut random = StdRng::seed_from_u64(1);
        let queue = make(16);
        let (mut pushed, mut seen) = (0, 0);
        // Enough to go round any ring many times.
        while seen < 2_000 {
            for _ in 0..random.random_range(0..8) {
                if queue.push(order(pushed + 1)).is_ok() {
                    pushed += 1;
                }
            }
            if queue.depth() > 0 {
                let taken = queue.take(random.random_range(1..6)).await.unwrap();
                for id in ids(&taken) {
                    seen += 1;
                    assert_eq!(id, seen);
                }
                taken.ack();
            }
            assert_eq!(queue.depth() as u64, pushed - seen);
        }
    });
}

fn a_consumer_takes_no_more_than_it_asked_for(make: Make) {
    run(async move {
        let queue = make(8);
        fill(&*queue, 1..=8);
        for expected in [vec![1, 2, 3], vec![4, 5, 6], vec![7, 8]] {
            let taken = queue.take(3).await.unwrap();
            assert_eq!(ids(&taken), expected);
            taken.ack();
        }
    });
}

fn each_order_leaves_once_whoever_produces_and_consumes(make: Make) {
    const PRODUCERS: u64 = 4;
    const EACH: u64 = 5_000;
    for seed in 0..4 {
        run(async move {
            let mut random = StdRng::seed_from_u64(seed);
            let queue = make(random.random_range(1..300));
            let producers: Vec<_> = (0..PRODUCERS)
                .map(|producer| {
                    let queue = Arc::clone(&queue);
                    std::thread::spawn(move || {
                        for n in 1..=EACH {
                            let mut order = order(producer * EACH + n);
                            while let Err(rejected) = queue.push(order) {
                                assert!(!rejected.closed);
                                order = rejected.order;
                                std::thread::yield_now();
                            }
                        }
                    })
                })
                .collect();
            let mut consumers = JoinSet::new();
            for consumer in 0..random.random_range(1..5) {
                let queue = Arc::clone(&queue);
                let mut random = StdRng::seed_from_u64(seed * 100 + consumer);
                consumers.spawn(async move {
                    let mut seen = Vec::new();
                    while let Some(taken) = queue.take(random.random_range(1..200)).await {
                        assert!(!taken.orders().is_empty());
                        // A batch in ten comes to nothing and goes back.
                        if random.random_ratio(9, 10) {
                            seen.extend(ids(&taken));
                            taken.ack();
                        }
                        tokio::task::yield_now().await;
                    }
                    seen
                });
            }
            for producer in producers {
                tokio::task::spawn_blocking(|| producer.join().unwrap())
                    .await
                    .unwrap();
            }
            queue.close();
            let mut seen = consumers.join_all().await.concat();
            // What a consumer put back after the last other one had left.
            while let Some(taken) = queue.take(100).await {
                seen.extend(ids(&taken));
                taken.ack();
            }
            let distinct: HashSet<_> = seen.iter().collect();
            assert_eq!(seen.len() as u64, PRODUCERS * EACH, "seed {seed}");
            assert_eq!(distinct.len(), seen.len(), "seed {seed}");
        });
    }
}

fn a_waiting_consumer_is_woken_every_time(make: Make) {
    run(async move {
        // The producer goes on only when the consumer has answered, so that each round has the
        // consumer on its way to sleep while the order comes.
        let (there, back) = (make(4), make(4));
        let producer = {
            let (there, back) = (Arc::clone(&there), Arc::clone(&back));
            tokio::spawn(async move {
                for id in 1..=20_000 {
                    there.push(order(id)).unwrap();
                    let answer = back.take(1).await.unwrap();
                    assert_eq!(ids(&answer), [id]);
                    answer.ack();
                }
                there.close();
            })
        };
        while let Some(taken) = there.take(1).await {
            fill(&*back, ids(&taken));
            taken.ack();
        }
        producer.await.unwrap();
    });
}

fn every_waiting_consumer_is_woken_for_orders_of_its_own(make: Make) {
    let queue = make(8);
    let mut takes = sleeping(&*queue, 3, 1);
    fill(&*queue, 1..=3);
    let taken = look_at_the_woken(&mut takes);
    assert_eq!(taken.len(), 3, "somebody sleeps beside an order");
    taken.into_iter().flatten().for_each(Batch::ack);
}

fn orders_that_are_not_done_go_back_to_the_head_of_the_line(make: Make) {
    run(async move {
        let queue = make(8);
        fill(&*queue, 1..=5);
        let dropped = queue.take(3).await.unwrap();
        assert_eq!(ids(&dropped), [1, 2, 3]);
        assert_eq!(queue.depth(), 2);
        drop(dropped);
        assert_eq!(queue.depth(), 5);
        fill(&*queue, [6]);
        // In the middle of what was put back, too.
        let taken = queue.take(2).await.unwrap();
        assert_eq!(ids(&taken), [1, 2]);
        taken.ack();
        drop(queue.take(2).await.unwrap());
        assert_eq!(ids(&queue.take(9).await.unwrap()), [3, 4, 5, 6]);
    });
}

fn orders_put_back_wake_as_many_consumers_as_they_can_keep_busy(make: Make) {
    let queue = make(8);
    fill(&*queue, 1..=3);
    let Poll::Ready(Some(taken)) = ByHand::new(queue.take(3)).look() else {
        panic!("there are orders to take");
    };
    let mut takes = sleeping(&*queue, 3, 1);
    drop(taken);
    let taken = look_at_the_woken(&mut takes);
    assert_eq!(taken.len(), 3, "somebody sleeps beside an order");
    taken.into_iter().flatten().for_each(Batch::ack);
}

fn a_full_queue_takes_back_what_is_not_done(make: Make) {
    run(async move {
        let queue = make(4);
        fill(&*queue, 1..=4);
        let taken = queue.take(2).await.unwrap();
        fill(&*queue, 5..=6);
        drop(taken);
        assert!(queue.push(order(7)).is_err());
        assert_eq!(ids(&queue.take(9).await.unwrap()), [1, 2, 3, 4, 5, 6]);
    });
}

fn a_closed_queue_refuses_and_runs_empty(make: Make) {
    run(async move {
        let queue = make(4);
        fill(&*queue, 1..=3);
        queue.close();
        let rejected = queue.push(order(4)).unwrap_err();
        assert_eq!((rejected.order.order.id.get(), rejected.closed), (4, true));
        let taken = queue.take(2).await.unwrap();
        assert_eq!(ids(&taken), [1, 2]);
        // Closed or not, what is not done goes back.
        drop(taken);
        let taken = queue.take(9).await.unwrap();
        assert_eq!(ids(&taken), [1, 2, 3]);
        taken.ack();
        assert!(queue.take(1).await.is_none());
        assert!(queue.take(1).await.is_none(), "and stays closed");
    });
}

fn closing_wakes_every_waiting_consumer(make: Make) {
    let queue = make(4);
    let mut takes = sleeping(&*queue, 5, 1);
    queue.close();
    // A journal first lets its own threads end.
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut ended = Vec::new();
    while ended.len() < 5 {
        ended.extend(look_at_the_woken(&mut takes));
        assert!(Instant::now() < deadline, "only {} are woken", ended.len());
    }
    assert!(ended.iter().all(Option::is_none));

    // And whoever is on its way to sleep just then.
    for _ in 0..300 {
        run(async move {
            let queue = make(4);
            let mut consumers = JoinSet::new();
            for _ in 0..3 {
                let queue = Arc::clone(&queue);
                consumers.spawn(async move { queue.take(1).await.is_none() });
            }
            queue.close();
            assert!(consumers.join_all().await.into_iter().all(|ended| ended));
        });
    }
}

fn what_is_accepted_while_the_queue_closes_can_still_be_taken(make: Make) {
    // Each round has a minute: a journal writes files, on a disk that others may keep busy.
    for _ in 0..300 {
        run(async move {
            let queue = make(1_000);
            let producer = {
                let queue = Arc::clone(&queue);
                std::thread::spawn(move || {
                    (1..=1_000)
                        .take_while(|id| queue.push(order(*id)).is_ok())
                        .count()
                })
            };
            std::thread::yield_now();
            queue.close();
            let accepted = producer.join().unwrap();
            let mut seen = 0;
            while let Some(taken) = queue.take(64).await {
                seen += taken.orders().len();
                taken.ack();
            }
            assert_eq!(seen, accepted);
        });
    }
}

fn a_take_that_is_given_up_while_it_waits_loses_nothing(make: Make) {
    let queue = make(8);
    let mut takes = sleeping(&*queue, 3, 1);
    fill(&*queue, 1..=2);
    // Give up whoever was woken first: its wake-up goes on to the one that still sleeps.
    let given_up = takes
        .iter()
        .position(ByHand::woken)
        .expect("somebody is woken");
    drop(takes.remove(given_up));
    let taken = look_at_the_woken(&mut takes);
    assert_eq!(taken.len(), 2, "a wake-up went down with its consumer");
    let mut seen: Vec<_> = taken.iter().flatten().flat_map(ids).collect();
    seen.sort_unstable();
    assert_eq!(seen, [1, 2]);
    taken.into_iter().flatten().for_each(Batch::ack);

    // The same with time deciding when it is given up.
    run(async move {
        let queue = make(8);
        let consumer = {
            let queue = Arc::clone(&queue);
            tokio::spawn(async move {
                let mut seen = 0;
                while seen < 5_000 {
                    tokio::select! {
                        biased;
                        taken = queue.take(3) => {
                            let taken = taken.unwrap();
                            for id in ids(&taken) {
                                seen += 1;
                                assert_eq!(id, seen);
                            }
                            taken.ack();
                        }
                        () = tokio::task::yield_now() => {}
                    }
                }
            })
        };
        for id in 1..=5_000 {
            while queue.push(order(id)).is_err() {
                tokio::task::yield_now().await;
            }
        }
        consumer.await.unwrap();
    });
}
