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

use super::click::{Click, Script};
use super::client::{Link, request, send};
use super::error::LoadError;
use super::merchant::Till;
use super::outcome::{Answer, Fault};
use super::payment::Bill;
use super::recorder::{Live, Recorder};
use super::schedule::Cursor;
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

/// What all threads of a run have in common.
pub(super) struct Common {
    pub target: Target,
    pub script: Arc<Script>,
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
    common: Arc<Common>,
    cursor: Cursor,
    connections: usize,
    live: Arc<Live>,
    till: Option<Till>,
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
        .spawn(move || runtime.block_on(drive(common, cursor, connections, live, till)))
        .map_err(failed)
}

/// What the tasks of one thread share.
struct Lane {
    common: Arc<Common>,
    live: Arc<Live>,
    /// Where orders are told to be paid; none where nobody pays.
    till: Option<Till>,
    cursor: RefCell<Cursor>,
    recorder: RefCell<Recorder>,
    /// Connections with nothing to do, the most recently used last.
    idle: RefCell<Vec<Rc<Seat>>>,
    /// Wakes the dispatcher when a connection goes idle while it waits for one.
    went_idle: Notify,
    start: Cell<Instant>,
    running: Cell<bool>,
    finished: Cell<bool>,
    unconnected: Cell<usize>,
    changed: Notify,
}

/// Where a connection is handed its next click.
#[derive(Default)]
struct Seat {
    click: Cell<Option<Click>>,
    waker: RefCell<Option<Waker>>,
}

async fn drive(
    common: Arc<Common>,
    cursor: Cursor,
    connections: usize,
    live: Arc<Live>,
    till: Option<Till>,
) -> Recorder {
    let lane = Rc::new(Lane {
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
        till,
    });
    let tasks = LocalSet::new();
    let work = async {
        let connections: Vec<_> = (0..connections)
            .map(|_| tokio::task::spawn_local(connection(Rc::clone(&lane))))
            .collect();
        while lane.unconnected.get() > 0 {
            lane.changed.notified().await;
        }
        // Blocking is right here: nothing in this thread has anything to do before all are ready.
        lane.common.ready.wait();
        let start = *lane.common.start.get_or_init(Instant::now);
        lane.start.set(start);
        lane.running.set(true);
        lane.changed.notify_waiters();
        dispatch(&lane).await;
        for connection in connections {
            // A task that panicked has printed so; the others still finish.
            let _ = connection.await;
        }
    };
    tasks.run_until(work).await;
    drop(tasks);
    lane.recorder
        .replace(Recorder::new(lane.common.interval_ms, false))
}

/// Hands due clicks to idle connections until the schedule is at its end.
async fn dispatch(lane: &Lane) {
    let alarm = Arc::new(Notify::new());
    let pacer = pacer(Arc::clone(&alarm));
    let mut shown_at = Instant::now();
    loop {
        if lane.common.stop.load(Ordering::Relaxed) {
            lane.cursor.borrow_mut().end();
        }
        while let Some(seat) = lane.next_idle() {
            match lane.cursor.borrow_mut().take_due(lane.now_ns()) {
                Some(click) => seat.hand(click),
                None => {
                    lane.idle.borrow_mut().push(seat);
                    break;
                }
            }
        }
        let Some(due_ns) = lane.cursor.borrow().due_ns() else {
            break;
        };
        if shown_at.elapsed() >= SHOW_P99_EVERY {
            shown_at = Instant::now();
            if let Some(p99_ms) = lane.recorder.borrow().p99_ms() {
                lane.live.show_p99(p99_ms);
            }
        }
        let now = Instant::now();
        let due = lane.start.get() + Duration::from_nanos(due_ns);
        if lane.idle.borrow().is_empty() {
            // Connections help themselves as they come free; the timeout is for `stop`.
            let _ = tokio::time::timeout(LOOK_UP, lane.went_idle.notified()).await;
        } else {
            let until = due.clamp(now + TICK, now + LOOK_UP);
            match &pacer {
                Some(pacer) if pacer.send(until).is_ok() => alarm.notified().await,
                _ => tokio::time::sleep_until(until.into()).await,
            }
        }
    }
    lane.finished.set(true);
    for seat in lane.idle.borrow_mut().drain(..) {
        seat.wake();
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

/// The life of one connection: take a click, send it, write down the answer.
async fn connection(lane: Rc<Lane>) {
    let address = &lane.common.target.address;
    let mut link = tokio::time::timeout(CONNECT_TIMEOUT, Link::connect(address))
        .await
        .ok()
        .and_then(Result::ok);
    lane.unconnected.set(lane.unconnected.get() - 1);
    lane.changed.notify_waiters();
    while !lane.running.get() {
        lane.changed.notified().await;
    }
    let seat = Rc::new(Seat::default());
    while let Some(click) = lane.next_click(&seat).await {
        let sent_ns = lane.now_ns();
        lane.recorder.borrow_mut().sent(&click, sent_ns);
        lane.live.count_sent();
        let late = Duration::from_nanos(sent_ns.saturating_sub(click.scheduled_ns));
        let answer = if late > lane.common.request_timeout {
            Answer::fault(Fault::NotSent)
        } else {
            lane.ask(&mut link, &click).await
        };
        lane.recorder
            .borrow_mut()
            .told(&click, lane.now_ns(), &answer);
        lane.live.count_answer(answer.kind);
        if answer.code == Fault::Connect.name() {
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }
}

impl Lane {
    fn now_ns(&self) -> u64 {
        self.start.get().elapsed().as_nanos() as u64
    }

    fn next_idle(&self) -> Option<Rc<Seat>> {
        self.idle.borrow_mut().pop()
    }

    /// The click that this connection is to send next; none at the end of the schedule.
    async fn next_click(&self, seat: &Rc<Seat>) -> Option<Click> {
        if let Some(click) = self.cursor.borrow_mut().take_due(self.now_ns()) {
            return Some(click);
        }
        if self.finished.get() {
            return None;
        }
        self.idle.borrow_mut().push(Rc::clone(seat));
        self.went_idle.notify_one();
        std::future::poll_fn(|cx| {
            if let Some(click) = seat.click.take() {
                return Poll::Ready(Some(click));
            }
            if self.finished.get() {
                return Poll::Ready(None);
            }
            *seat.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Sends a click and reads the answer, on a new connection if the old one is gone.
    async fn ask(&self, link: &mut Option<Link>, click: &Click) -> Answer {
        let exchange = self.exchange(link, click);
        match tokio::time::timeout(self.common.request_timeout, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(fault)) => {
                *link = None;
                Answer::fault(fault)
            }
            Err(_) => {
                // The answer may still come, and must not be read as the next one's.
                *link = None;
                Answer::fault(Fault::Timeout)
            }
        }
    }

    async fn exchange(&self, link: &mut Option<Link>, click: &Click) -> Result<Answer, Fault> {
        let common = &self.common;
        let mut headers = common.target.order_headers(click.buyer);
        if let Some(key) = common.script.key(click.buyer, click.sku)
            && let Ok(value) = HeaderValue::from_str(&key)
        {
            headers.insert(HeaderName::from_static("idempotency-key"), value);
        }
        let order = request(
            Method::POST,
            common.target.orders.clone(),
            headers,
            common.script.body(click),
        );
        let reply = send(link, &common.target.address, order).await?;
        let replayed = reply.headers.contains_key("idempotency-replayed");
        let answer = Answer::read(reply.status, replayed, &reply.body);
        if let Some(till) = &self.till
            && answer.kind.is_placed()
            && let Some(bill) = Bill::read(click, &reply.body)
        {
            // A merchant that has given up takes no more bills.
            let _ = till.send(bill);
        }
        Ok(answer)
    }
}

impl Seat {
    fn hand(&self, click: Click) {
        self.click.set(Some(click));
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}
