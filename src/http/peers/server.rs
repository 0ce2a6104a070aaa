//! The end of a link that runs calls.
//!
//! ```text
//!   socket ─► reader (tokio) ─► jobs ─► feeder (a coroutine a connection) ─► a coroutine a call ─► service
//!                writer (tokio) ◄─ outbox ◄───────────────────────────────────────┘ its answer
//! ```
//!
//! The feeder gives each call that one read has brought a coroutine: a wake-up from a foreign thread costs about a
//! microsecond, one from a coroutine a fraction of that.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use crossbeam::queue::SegQueue;
use may::coroutine::Coroutine;
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;

use super::frame::{self, Call, Frame, FrameError, FrameReader, Goodbye, Hello, NotRun};
use super::greet::{self, Opened};
use super::key::ClusterKey;
use super::link::Silence;
use super::outbox::{Outbox, Refused};
use super::runners::Runners;
use super::{CALLS_MAX, Hint, Identity, SERVED_BYTES_MAX, SILENCE_MAX, TICK};
use crate::backoff::Backoff;
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::server::runtime;
use crate::http::server::wake::park_until;
use crate::supervise::Supervisor;

/// Connections at a time whose callers are not known yet. Each ends within the time for a handshake.
const STRANGERS_MAX: usize = 64;

/// The calling side pings; twice its patience without a byte means that it is gone.
const CALLER_SILENCE_MAX: Duration = SILENCE_MAX.saturating_mul(2);

/// Time to write that a node is gone.
const GOODBYE_WITHIN: Duration = Duration::from_millis(200);

/// A buffer for answers that is larger is given back after its call.
const KEPT_BYTES: usize = 16 * 1024;

/// Pauses while no connection can be accepted.
const ACCEPT_AGAIN: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(500));

/// The terms of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The node that passes the request on.
    pub from: u8,
    /// How long it may take from now.
    pub wait: Duration,
    /// Whether idempotency keys in it are the sender's own, made for a buyer who gave none.
    pub has_own_keys: bool,
}

/// Runs the requests that other nodes pass on.
pub trait PeerService: Send + Sync + 'static {
    /// Answers a request that was authorized where it came in. Runs on a coroutine, with the rules of
    /// [`Service::call`](crate::http::server::Service::call).
    fn call(&self, request: &Request<'_>, terms: Terms, response: &mut Response);

    /// Takes news from a node. Must not block.
    fn hint(&self, from: u8, hint: Hint);
}

struct Shared<S> {
    key: ClusterKey,
    own: Identity,
    service: S,
    /// The connection of each node, and the epoch of the process at its other end.
    callers: Mutex<HashMap<u8, (u64, Arc<Connection>)>>,
    stopping: AtomicBool,
}

/// A server of calls. Dropping it ends every connection.
pub struct PeerServer<S: PeerService> {
    address: SocketAddr,
    shared: Arc<Shared<S>>,
    task: JoinHandle<Option<()>>,
}

impl<S: PeerService> PeerServer<S> {
    /// Serves calls on `listener`. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// If the listener cannot be used.
    pub fn serve(
        listener: TcpListener,
        key: ClusterKey,
        own: Identity,
        service: S,
        supervisor: &Supervisor,
    ) -> io::Result<Self> {
        runtime::configure(0);
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let shared = Arc::new(Shared {
            key,
            own,
            service,
            callers: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        let task = supervisor.task(
            "the server of other nodes",
            accept(listener, Arc::clone(&shared)),
        );
        Ok(PeerServer {
            address,
            shared,
            task,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Begins no more calls, and waits until those that run are answered, for `limit` at most. Callers learn of each
    /// other call that it was not begun, and of those that come too late by the last frame. True: all are answered.
    pub async fn drain(self, limit: Duration) -> bool {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + limit;
        loop {
            if self.is_idle() {
                break;
            }
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(TICK).await;
        }
        for (_, caller) in self.shared.callers.lock().values() {
            let goodbye = Frame::Goodbye(Goodbye::Stopping);
            caller.outbox.push_short(|out| goodbye.put(out));
        }
        let deadline = Instant::now() + GOODBYE_WITHIN;
        while !self.is_idle() && Instant::now() < deadline {
            tokio::time::sleep(TICK).await;
        }
        true
    }

    fn is_idle(&self) -> bool {
        let callers = self.shared.callers.lock();
        callers.values().all(|(_, one)| one.is_idle())
    }
}

impl<S: PeerService> Drop for PeerServer<S> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept<S: PeerService>(listener: tokio::net::TcpListener, shared: Arc<Shared<S>>) {
    let mut connections = JoinSet::new();
    let strangers = Arc::new(AtomicUsize::new(0));
    let mut backoff = ACCEPT_AGAIN;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    backoff.reset();
                    // Beyond the limit it is closed at once, and its caller comes again.
                    if let Some(stranger) = Counted::one(&strangers, STRANGERS_MAX) {
                        connections.spawn(serve(Arc::clone(&shared), socket, stranger));
                    }
                }
                Err(error) => {
                    tracing::warn!(reason = %error, "cannot accept a connection from a node, waiting");
                    tokio::time::sleep(backoff.pause()).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// One of a bounded number, until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn one(count: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        // Only this thread of control adds.
        if count.load(Ordering::Relaxed) >= most {
            return None;
        }
        count.fetch_add(1, Ordering::Relaxed);
        Some(Counted(Arc::clone(count)))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one connection to its end.
async fn serve<S: PeerService>(shared: Arc<Shared<S>>, socket: TcpStream, stranger: Counted) {
    let admit = |hello: &Hello| {
        if shared.stopping.load(Ordering::Acquire) {
            return Err(Goodbye::Stopping);
        }
        let callers = shared.callers.lock();
        match callers.get(&hello.from.node) {
            Some((epoch, _)) if *epoch > hello.from.epoch => Err(Goodbye::Superseded),
            _ => Ok(()),
        }
    };
    let opened = match greet::answer(&shared.key, &shared.own, socket, admit).await {
        Ok(opened) => opened,
        Err(error) => {
            // Also a port scan; the log bounds lines of one kind.
            tracing::warn!(reason = %error, "a connection to cluster.listen was refused");
            return;
        }
    };
    drop(stranger);
    let from = opened.hello.from.clone();
    let connection = Arc::new(Connection::new(from.node));
    let end = Ended {
        shared: &shared,
        connection: &connection,
    };
    // A node has one connection: a new one means that it has given the old one up.
    let entry = (from.epoch, Arc::clone(&connection));
    if let Some((_, old)) = shared.callers.lock().insert(from.node, entry) {
        old.end.notify_one();
    }
    connection.start_feeder(&shared);
    connection.outbox.start_gatherer();
    let error = connection.run(opened, &shared).await;
    tracing::info!(node = from.node, epoch = from.epoch, reason = %error, "the connection of a node has ended");
    drop(end);
}

/// Ends a connection when dropped.
struct Ended<'a, S> {
    shared: &'a Shared<S>,
    connection: &'a Arc<Connection>,
}

impl<S> Drop for Ended<'_, S> {
    fn drop(&mut self) {
        self.connection.outbox.close();
        self.connection.closed.store(true, Ordering::Release);
        if let Some(feeder) = &*self.connection.feeder.lock() {
            feeder.unpark();
        }
        let mut callers = self.shared.callers.lock();
        let node = self.connection.from;
        if callers
            .get(&node)
            .is_some_and(|(_, one)| Arc::ptr_eq(one, self.connection))
        {
            callers.remove(&node);
        }
    }
}

/// One connection.
struct Connection {
    from: u8,
    outbox: Arc<Outbox>,
    /// Calls that wait for the feeder. Bounded by `running`.
    jobs: SegQueue<Call>,
    feeder: Mutex<Option<Coroutine>>,
    runners: Runners<(Call, Running)>,
    closed: AtomicBool,
    /// Calls that have no answer yet.
    running: AtomicUsize,
    /// Their bytes.
    running_bytes: AtomicUsize,
    /// Reads so far.
    heard: AtomicU64,
    /// Asks it to end.
    end: Notify,
}

impl Connection {
    fn new(from: u8) -> Self {
        Connection {
            from,
            outbox: Arc::default(),
            jobs: SegQueue::new(),
            feeder: Mutex::new(None),
            runners: Runners::default(),
            closed: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            running_bytes: AtomicUsize::new(0),
            heard: AtomicU64::new(0),
            end: Notify::new(),
        }
    }

    fn is_idle(&self) -> bool {
        self.running.load(Ordering::SeqCst) == 0 && self.outbox.is_idle()
    }

    fn start_feeder<S: PeerService>(self: &Arc<Self>, shared: &Arc<Shared<S>>) {
        let (connection, shared) = (Arc::clone(self), Arc::clone(shared));
        let feeder = may::go!(move || {
            // However it ends: a connection without its feeder is of no use.
            let ended = EndOnDrop(Arc::clone(&connection));
            feed(&connection, &shared);
            drop(ended);
            // See the acceptor of the server: a coroutine must not end inside of a wake-up.
            may::coroutine::yield_now();
        });
        *self.feeder.lock() = Some(feeder.coroutine().clone());
    }

    async fn run<S: PeerService>(
        self: &Arc<Self>,
        opened: Opened<tokio_rustls::server::TlsStream<TcpStream>>,
        shared: &Shared<S>,
    ) -> io::Error {
        let Opened {
            stream,
            mut reader,
            mut input,
            ..
        } = opened;
        let (mut from, mut to) = tokio::io::split(stream);
        let reading = async {
            loop {
                if let Err(error) = self.take_frames(&mut reader, &mut input, shared) {
                    return error;
                }
                if let Err(error) = greet::read_some(&mut from, &mut input).await {
                    return error;
                }
                self.heard.fetch_add(1, Ordering::Relaxed);
            }
        };
        let watching = async {
            let mut ticks = tokio::time::interval(TICK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut silence = Silence::new();
            loop {
                ticks.tick().await;
                let heard = self.heard.load(Ordering::Relaxed);
                if silence.at(Instant::now(), heard) > CALLER_SILENCE_MAX {
                    return io::Error::new(io::ErrorKind::TimedOut, "it is silent");
                }
            }
        };
        tokio::select! {
            error = self.outbox.write_to(&mut to) => error,
            error = reading => error,
            error = watching => error,
            () = self.end.notified() => io::Error::other("it is of no more use"),
        }
    }

    fn take_frames<S: PeerService>(
        self: &Arc<Self>,
        reader: &mut FrameReader,
        input: &mut bytes::BytesMut,
        shared: &Shared<S>,
    ) -> io::Result<()> {
        let mut queued = false;
        while let Some(frame) = reader.next(input)? {
            match frame {
                Frame::Call(call) => queued |= self.admit(call, shared),
                Frame::Hint(hint) => shared.service.hint(self.from, hint),
                Frame::Ping(number) => {
                    self.outbox.push_short(|out| Frame::Pong(number).put(out));
                }
                Frame::Hello(_)
                | Frame::Goodbye(_)
                | Frame::Answer(..)
                | Frame::NotRun(..)
                | Frame::Pong(_) => return Err(FrameError::Malformed.into()),
            }
        }
        // Pushed before the wake-up, and the feeder looks after it is woken.
        if queued && let Some(feeder) = &*self.feeder.lock() {
            feeder.unpark();
        }
        Ok(())
    }

    /// Queues a call, or says that it is not begun.
    fn admit<S>(&self, call: Call, shared: &Shared<S>) -> bool {
        let bytes = call.body.len();
        // Counted, then asked, both sequentially consistent; `drain` notes that it stops, then counts. So either this sees
        // the stop or the drain sees the call, and none is begun that was told not to be.
        let running = self.running.fetch_add(1, Ordering::SeqCst);
        let refused = if shared.stopping.load(Ordering::SeqCst) {
            Some(NotRun::Stopping)
        } else if running >= CALLS_MAX
            || self.running_bytes.load(Ordering::Relaxed) + bytes > SERVED_BYTES_MAX
        {
            Some(NotRun::Busy)
        } else {
            None
        };
        if let Some(reason) = refused {
            self.refuse(call.number, reason);
            self.running.fetch_sub(1, Ordering::Release);
            return false;
        }
        self.running_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.jobs.push(call);
        true
    }

    fn refuse(&self, number: u64, reason: NotRun) {
        let frame = Frame::NotRun(number, reason);
        self.outbox.push_short(|out| frame.put(out));
    }
}

/// Asks a connection to end when dropped.
struct EndOnDrop(Arc<Connection>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end.notify_one();
    }
}

/// Gives each call a coroutine, until the connection is closed.
fn feed<S: PeerService>(connection: &Arc<Connection>, shared: &Arc<Shared<S>>) {
    loop {
        // Read before the queue is emptied: nothing stays in it.
        let closed = connection.closed.load(Ordering::Acquire);
        while let Some(call) = connection.jobs.pop() {
            start(connection, shared, call);
        }
        if closed {
            connection.runners.close();
            return;
        }
        park_until(|| !connection.jobs.is_empty() || connection.closed.load(Ordering::Acquire));
    }
}

fn start<S: PeerService>(connection: &Arc<Connection>, shared: &Arc<Shared<S>>, call: Call) {
    let number = call.number;
    let running = Running {
        connection: Arc::clone(connection),
        bytes: call.body.len(),
    };
    // Whoever called is gone, and repeats it on another connection if it matters: the fewer run twice the better.
    if connection.closed.load(Ordering::Acquire) {
        return;
    }
    let Err(job) = connection.runners.give((call, running)) else {
        return;
    };
    let (connection, theirs) = (Arc::clone(connection), Arc::clone(shared));
    let refusing = Arc::clone(&connection);
    // Without memory for a stack the runtime panics.
    let started = catch_unwind(AssertUnwindSafe(|| {
        may::go!(move || {
            let mut response = Response::default();
            connection.runners.run(job, |(call, running), waker| {
                run(
                    &running.connection,
                    &theirs.service,
                    &call,
                    waker,
                    &mut response,
                );
                if response.body_mut().capacity() > KEPT_BYTES {
                    response = Response::default();
                }
            });
            may::coroutine::yield_now();
        });
    }));
    if started.is_err() {
        tracing::warn!("cannot start the coroutine of a passed-on request");
        refusing.refuse(number, NotRun::Busy);
    }
}

/// A call that has no answer yet.
struct Running {
    connection: Arc<Connection>,
    bytes: usize,
}

impl Drop for Running {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection
            .running_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
        // Released: who sees none running sees their answers in the outbox.
        connection.running.fetch_sub(1, Ordering::Release);
    }
}

/// Runs one call and sends its answer.
fn run<S: PeerService>(
    connection: &Connection,
    service: &S,
    call: &Call,
    waker: &Arc<Waker>,
    response: &mut Response,
) {
    let headers: SmallVec<[httparse::Header<'_>; 8]> = call
        .headers
        .iter()
        .map(|(name, value)| httparse::Header {
            name: text(name),
            value,
        })
        .collect();
    let request = Request {
        method: call.method,
        target: text(&call.target),
        headers: &headers,
        body: &call.body,
        waker,
        before_wait: &|| {},
        trace: None,
    };
    let terms = Terms {
        from: connection.from,
        wait: call.wait,
        has_own_keys: call.has_own_keys,
    };
    response.clear();
    let served = catch_unwind(AssertUnwindSafe(|| {
        service.call(&request, terms, response);
    }));
    if served.is_err() || !(200..600).contains(&response.status()) {
        response.clear();
        Problem::internal().write_to(response);
    }
    let (fields, body) = (response.fields().as_bytes(), response.body());
    let bytes = frame::answer_bytes(fields, body);
    // Waits while a caller takes its answers slowly. A connection that is gone needs none.
    park_until(|| {
        let pushed = connection.outbox.push_or_wait(bytes, waker, |out| {
            frame::put_answer(call.number, response.status(), fields, body, out);
        });
        pushed != Err(Refused::Full)
    });
}

/// A part of a call that decoding has found to be ASCII.
fn text(bytes: &bytes::Bytes) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}
