//! A thread of the generator: its share of the schedule, its connections, its records.
//!
//! Within the thread everything is single-threaded tokio, so the cursor is the queue: what is due
//! while all connections are busy simply stays in it, and the next connection to come free takes
//! the oldest. A *pacer* thread beside it only sleeps, because tokio's timer rounds to
//! milliseconds and a request sent a millisecond late is a millisecond of made-up latency.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Barrier, OnceLock};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hyper::Method;
use hyper::header::{HeaderName, HeaderValue};
use tokio::sync::Notify;
use tokio::task::LocalSet;

use super::connection::{Connection, request, send};
use super::error::LoadError;
use super::outcome::{Answer, Fault};
use super::platform::{PaymentsTx, PlacedOrder};
use super::recorder::{Live, Recorder};
use super::request_template::RequestTemplate;
use super::schedule::{Arrival, Cursor};
use super::target::Target;

/// The dispatcher looks at the schedule no more often than this: what falls due in between goes
/// out together, at most this much late, and a busy generator is not woken for each request.
const TICK: Duration = Duration::from_micros(200);
/// The dispatcher looks up at least this often, to hear of a stop and to show its figures.
const LOOK_UP: Duration = Duration::from_millis(50);
/// A connection whose server could not be reached rests before it tries again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);
/// How long a connection may take to be made before the load begins.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Second digits of the p99 on the progress line are worth no more than this.
const SHOW_P99_EVERY: Duration = Duration::from_millis(500);

/// What all threads of a run share.
pub(super) struct RunShared {
    pub target: Target,
    pub template: Arc<RequestTemplate>,
    pub request_timeout: Duration,
    pub interval_ms: u64,
    pub keep_outcomes: bool,
    /// Raised to end the load early; what is in flight is still awaited.
    pub stop: AtomicBool,
    /// All threads are connected.
    pub ready: Barrier,
    /// Moment zero of the schedule, set by whoever passes `ready` as its leader.
    pub start: OnceLock<Instant>,
}

/// Starts a thread; joining it gives its records.
pub(super) fn spawn(
    common: Arc<RunShared>,
    cursor: Cursor,
    connections: usize,
    live: Arc<Live>,
    payments_tx: Option<PaymentsTx>,
) -> Result<JoinHandle<Recorder>, LoadError> {
    let failed = |e: std::io::Error| LoadError::Thread {
        what: "sending thread",
        reason: e.to_string(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    std::thread::Builder::new()
        .name("loadgen".to_owned())
        .spawn(move || runtime.block_on(drive(common, cursor, connections, live, payments_tx)))
        .map_err(failed)
}

/// What the tasks of one thread share.
struct SenderShared {
    common: Arc<RunShared>,
    live: Arc<Live>,
    /// Takes placed orders to the payment platform; none without payments.
    payments_tx: Option<PaymentsTx>,
    cursor: RefCell<Cursor>,
    recorder: RefCell<Recorder>,
    /// Connections with nothing to do, the most recently used last.
    idle: RefCell<Vec<Rc<Idle>>>,
    /// Wakes the dispatcher when a connection goes idle while it waits for one.
    went_idle: Notify,
    start: Cell<Instant>,
    running: Cell<bool>,
    finished: Cell<bool>,
    unconnected: Cell<usize>,
    changed: Notify,
}

/// Hands an idle connection its next arrival.
#[derive(Default)]
struct Idle {
    arrival: Cell<Option<Arrival>>,
    waker: RefCell<Option<Waker>>,
}

async fn drive(
    common: Arc<RunShared>,
    cursor: Cursor,
    connections: usize,
    live: Arc<Live>,
    payments_tx: Option<PaymentsTx>,
) -> Recorder {
    let shared = Rc::new(SenderShared {
        cursor: RefCell::new(cursor),
        recorder: RefCell::new(Recorder::new(common.interval_ms, common.keep_outcomes)),
        idle: RefCell::new(Vec::with_capacity(connections)),
        went_idle: Notify::new(),
        start: Cell::new(Instant::now()),
        running: Cell::new(false),
        finished: Cell::new(false),
        unconnected: Cell::new(connections),
        changed: Notify::new(),
        common,
        live,
        payments_tx,
    });
    let tasks = LocalSet::new();
    let work = async {
        let connections: Vec<_> = (0..connections)
            .map(|_| tokio::task::spawn_local(connection(Rc::clone(&shared))))
            .collect();
        while shared.unconnected.get() > 0 {
            shared.changed.notified().await;
        }
        // Blocking is right here: nothing in this thread has anything to do before all are ready.
        shared.common.ready.wait();
        let start = *shared.common.start.get_or_init(Instant::now);
        shared.start.set(start);
        shared.running.set(true);
        shared.changed.notify_waiters();
        dispatch(&shared).await;
        for connection in connections {
            // A task that panicked has printed so; the others still finish.
            let _ = connection.await;
        }
    };
    tasks.run_until(work).await;
    drop(tasks);
    shared
        .recorder
        .replace(Recorder::new(shared.common.interval_ms, false))
}

/// Hands due arrivals to idle connections until the end of the schedule.
async fn dispatch(shared: &SenderShared) {
    let alarm = Arc::new(Notify::new());
    let pacer = pacer(Arc::clone(&alarm));
    let mut shown_at = Instant::now();
    loop {
        if shared.common.stop.load(Ordering::Relaxed) {
            shared.cursor.borrow_mut().end();
        }
        while let Some(idle) = shared.next_idle() {
            match shared.cursor.borrow_mut().take_due(shared.now_ns()) {
                Some(arrival) => idle.hand(arrival),
                None => {
                    shared.idle.borrow_mut().push(idle);
                    break;
                }
            }
        }
        let Some(due_ns) = shared.cursor.borrow().due_ns() else {
            break;
        };
        if shown_at.elapsed() >= SHOW_P99_EVERY {
            shown_at = Instant::now();
            if let Some(p99_ms) = shared.recorder.borrow().p99_ms() {
                shared.live.show_p99(p99_ms);
            }
        }
        let now = Instant::now();
        let due = shared.start.get() + Duration::from_nanos(due_ns);
        if shared.idle.borrow().is_empty() {
            // Connections help themselves as they come free; the timeout is for `stop`.
            let _ = tokio::time::timeout(LOOK_UP, shared.went_idle.notified()).await;
        } else {
            let until = due.clamp(now + TICK, now + LOOK_UP);
            match &pacer {
                Some(pacer) if pacer.send(until).is_ok() => alarm.notified().await,
                _ => tokio::time::sleep_until(until.into()).await,
            }
        }
    }
    shared.finished.set(true);
    for idle in shared.idle.borrow_mut().drain(..) {
        idle.wake();
    }
}

/// A thread that sleeps until each moment it is sent and then rings. None if it cannot be had;
/// tokio's coarser timer then does. It ends with its sender.
pub(super) fn pacer(alarm: Arc<Notify>) -> Option<mpsc::Sender<Instant>> {
    let (sender, moments) = mpsc::channel::<Instant>();
    std::thread::Builder::new()
        .name("loadgen-pacer".to_owned())
        .spawn(move || {
            while let Ok(moment) = moments.recv() {
                std::thread::sleep(moment.saturating_duration_since(Instant::now()));
                alarm.notify_one();
            }
        })
        .ok()
        .map(|_| sender)
}

/// The life of one connection: take an arrival, send it, record the answer.
async fn connection(shared: Rc<SenderShared>) {
    let address = &shared.common.target.address;
    let mut connection = tokio::time::timeout(CONNECT_TIMEOUT, Connection::connect(address))
        .await
        .ok()
        .and_then(Result::ok);
    shared.unconnected.set(shared.unconnected.get() - 1);
    shared.changed.notify_waiters();
    while !shared.running.get() {
        shared.changed.notified().await;
    }
    let idle = Rc::new(Idle::default());
    while let Some(arrival) = shared.next_click(&idle).await {
        let sent_ns = shared.now_ns();
        shared.recorder.borrow_mut().sent(&arrival, sent_ns);
        shared.live.count_sent();
        let late = Duration::from_nanos(sent_ns.saturating_sub(arrival.scheduled_ns));
        let answer = if late > shared.common.request_timeout {
            Answer::fault(Fault::NotSent)
        } else {
            shared.ask(&mut connection, &arrival).await
        };
        shared
            .recorder
            .borrow_mut()
            .answered(&arrival, shared.now_ns(), &answer);
        shared.live.count_answer(answer.kind);
        if answer.code == Fault::Connect.name() {
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }
}

impl SenderShared {
    fn now_ns(&self) -> u64 {
        self.start.get().elapsed().as_nanos() as u64
    }

    fn next_idle(&self) -> Option<Rc<Idle>> {
        self.idle.borrow_mut().pop()
    }

    /// The next arrival of this connection; none at the end of the schedule.
    async fn next_click(&self, idle: &Rc<Idle>) -> Option<Arrival> {
        if let Some(arrival) = self.cursor.borrow_mut().take_due(self.now_ns()) {
            return Some(arrival);
        }
        if self.finished.get() {
            return None;
        }
        self.idle.borrow_mut().push(Rc::clone(idle));
        self.went_idle.notify_one();
        std::future::poll_fn(|cx| {
            if let Some(arrival) = idle.arrival.take() {
                return Poll::Ready(Some(arrival));
            }
            if self.finished.get() {
                return Poll::Ready(None);
            }
            *idle.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Sends an arrival's request and reads the answer, on a new connection if the old one is gone.
    async fn ask(&self, connection: &mut Option<Connection>, arrival: &Arrival) -> Answer {
        let exchange = self.exchange(connection, arrival);
        match tokio::time::timeout(self.common.request_timeout, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(fault)) => {
                *connection = None;
                Answer::fault(fault)
            }
            Err(_) => {
                // The answer may still come, and must not be read as the next one's.
                *connection = None;
                Answer::fault(Fault::Timeout)
            }
        }
    }

    async fn exchange(
        &self,
        connection: &mut Option<Connection>,
        arrival: &Arrival,
    ) -> Result<Answer, Fault> {
        let common = &self.common;
        let mut headers = common.target.order_headers(arrival.buyer);
        if let Some(key) = common.template.key(arrival.buyer, arrival.sku)
            && let Ok(value) = HeaderValue::from_str(&key)
        {
            headers.insert(HeaderName::from_static("idempotency-key"), value);
        }
        let order = request(
            Method::POST,
            common.target.orders.clone(),
            headers,
            common.template.body(arrival),
        );
        let reply = send(connection, &common.target.address, order).await?;
        let replayed = reply.headers.contains_key("idempotency-replayed");
        let answer = Answer::read(reply.status, replayed, &reply.body);
        if let Some(payments_tx) = &self.payments_tx
            && answer.kind.is_placed()
            && let Some(order) = PlacedOrder::read(arrival, &reply.body)
        {
            // A platform that has given up takes no more orders.
            let _ = payments_tx.send(order);
        }
        Ok(answer)
    }
}

impl Idle {
    fn hand(&self, arrival: Arrival) {
        self.arrival.set(Some(arrival));
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}
