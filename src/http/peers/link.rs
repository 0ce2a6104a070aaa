//! The link to one node: keeps a connection to it, and carries calls.
//!
//! ```text
//!   begin ──► numbered, in `calls` ──► outbox ──► answered │ not run │ late          (the connection is well)
//!                                       │ lost
//!                                       └──► unsent, if the writer had not taken it; else uncertain
//! ```
//!
//! A connection that is lost is opened again after a pause. Calls do not move from one to the next: whether a call may be
//! repeated is decided where it is known what it does.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::frame::{CallParts, Frame, FrameError, Goodbye, NotRun};
use super::greet::{self, OpenError, Opened};
use super::key::ClusterKey;
use super::outbox::{Outbox, Refused};
use super::{CALLS_MAX, Hint, Identity, Outcome, PING_EVERY, SILENCE_MAX, TICK, Unsent};
use crate::backoff::Backoff;
use crate::pipeline::WakeAll;
use crate::state::lanes::NodeAddress;
use crate::supervise::Supervisor;

/// Pauses between attempts to connect.
const CONNECT_AGAIN: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));

/// A connection that lived this long was a good one: the next attempt comes soon.
const LIVED: Duration = Duration::from_secs(5);

/// A check that comes so late says that this process stood still, not the other side.
const STALL: Duration = Duration::from_millis(500);

/// The state of a link, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkReport {
    /// The node.
    pub peer: NodeAddress,
    /// The process at its end; `None` while there is no connection.
    pub identity: Option<Identity>,
    /// Calls that have no answer yet.
    pub calls: usize,
    /// The last round trip, in microseconds.
    pub round_trip_us: Option<u64>,
    /// Why the last connection ended, or the last attempt failed.
    pub last_error: Option<String>,
}

/// A call on its way. Dropping it gives up its answer.
pub struct PendingCall {
    number: u64,
    connection: Arc<Connection>,
    waiter: Arc<Waiter>,
}

impl PendingCall {
    /// The end of the call, if it has ended. Its waker is woken then.
    pub fn outcome(&self) -> Option<Outcome> {
        self.waiter.outcome.lock().clone()
    }

    /// Whether the call has ended.
    pub fn is_over(&self) -> bool {
        self.waiter.outcome.lock().is_some()
    }
}

impl Drop for PendingCall {
    fn drop(&mut self) {
        self.connection.calls.lock().remove(&self.number);
    }
}

/// Where a call waits for its end.
struct Waiter {
    outcome: Mutex<Option<Outcome>>,
    /// The number of its first byte in the outbox. Written under the outbox's lock and read after its `close`, which
    /// takes the same lock: relaxed accesses suffice.
    start: AtomicU64,
    deadline: Instant,
    waker: Waker,
}

impl Waiter {
    fn end(&self, outcome: Outcome, woken: &mut Vec<Waker>) {
        let mut place = self.outcome.lock();
        if place.is_none() {
            *place = Some(outcome);
            woken.push(self.waker.clone());
        }
    }
}

/// One connection.
struct Connection {
    identity: Identity,
    opened: Instant,
    outbox: Arc<Outbox>,
    calls: Mutex<HashMap<u64, Arc<Waiter>, foldhash::fast::RandomState>>,
    next: AtomicU64,
    /// Reads so far.
    heard: AtomicU64,
    round_trip_us: AtomicU64,
}

impl Connection {
    fn new(identity: Identity) -> Self {
        Connection {
            identity,
            opened: Instant::now(),
            outbox: Arc::default(),
            calls: Mutex::default(),
            next: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            round_trip_us: AtomicU64::new(u64::MAX),
        }
    }

    fn begin(
        self: &Arc<Self>,
        call: &CallParts<'_>,
        waker: &Waker,
        deadline: Instant,
    ) -> Result<PendingCall, Unsent> {
        if !call.fits() {
            return Err(Unsent::TooLong);
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let waiter = Arc::new(Waiter {
            outcome: Mutex::new(None),
            start: AtomicU64::new(u64::MAX),
            deadline,
            waker: waker.clone(),
        });
        {
            let mut calls = self.calls.lock();
            if calls.len() >= CALLS_MAX {
                return Err(Unsent::Busy);
            }
            // Before the frame can leave: an answer finds it.
            calls.insert(number, Arc::clone(&waiter));
        }
        let pending = PendingCall {
            number,
            connection: Arc::clone(self),
            waiter,
        };
        let pushed = self.outbox.push(call.frame_bytes(), |start, out| {
            pending.waiter.start.store(start, Ordering::Relaxed);
            call.put(number, out);
        });
        match pushed {
            Ok(()) => Ok(pending),
            Err(Refused::Full) => Err(Unsent::Busy),
            Err(Refused::Closed) => Err(Unsent::Away),
        }
    }

    /// Ends a call, if anybody still waits for it.
    fn end(&self, number: u64, outcome: Outcome, woken: &mut Vec<Waker>) {
        let waiter = self.calls.lock().remove(&number);
        if let Some(waiter) = waiter {
            waiter.end(outcome, woken);
        }
    }

    /// Ends the calls whose deadline has come.
    fn expire(&self, now: Instant, woken: &mut Vec<Waker>) {
        self.calls.lock().retain(|_, waiter| {
            let is_late = waiter.deadline <= now;
            if is_late {
                waiter.end(Outcome::Late, woken);
            }
            !is_late
        });
    }

    /// The node has answered all that it has begun, and begins nothing more.
    fn dismiss(&self, woken: &mut Vec<Waker>) {
        for (_, waiter) in self.calls.lock().drain() {
            waiter.end(Outcome::NotRun(NotRun::Stopping), woken);
        }
    }

    /// The connection is lost: ends every call.
    fn fail(&self, woken: &mut Vec<Waker>) {
        let taken = self.outbox.close();
        for (_, waiter) in self.calls.lock().drain() {
            // A call that is being begun just now has no number yet, and will not be taken any more.
            let may_have_left = waiter.start.load(Ordering::Relaxed) < taken;
            let outcome = if may_have_left {
                Outcome::Uncertain
            } else {
                Outcome::Unsent
            };
            waiter.end(outcome, woken);
        }
    }

    /// Carries frames until the connection fails.
    async fn run<S: AsyncRead + AsyncWrite>(
        &self,
        opened: Opened<S>,
        wake_all: &WakeAll,
    ) -> io::Error {
        let Opened {
            stream,
            mut reader,
            mut input,
            ..
        } = opened;
        let (mut from, mut to) = tokio::io::split(stream);
        let reading = async {
            let mut woken = Vec::new();
            loop {
                let read = self.take_frames(&mut reader, &mut input, &mut woken);
                wake(wake_all, &mut woken);
                if let Err(error) = read {
                    return error;
                }
                if let Err(error) = greet::read_some(&mut from, &mut input).await {
                    return error;
                }
                self.heard.fetch_add(1, Ordering::Relaxed);
            }
        };
        tokio::select! {
            error = self.outbox.write_to(&mut to) => error,
            error = reading => error,
            error = self.watch(wake_all) => error,
        }
    }

    fn take_frames(
        &self,
        reader: &mut super::frame::FrameReader,
        input: &mut bytes::BytesMut,
        woken: &mut Vec<Waker>,
    ) -> io::Result<()> {
        while let Some(frame) = reader.next(input)? {
            match frame {
                Frame::Answer(number, answer) => {
                    self.end(number, Outcome::Answered(answer), woken);
                }
                Frame::NotRun(number, reason) => self.end(number, Outcome::NotRun(reason), woken),
                Frame::Pong(sent_us) => {
                    let now_us = elapsed_us(self.opened);
                    let round_trip = now_us.saturating_sub(sent_us);
                    self.round_trip_us.store(round_trip, Ordering::Relaxed);
                }
                Frame::Goodbye(reason) => {
                    if reason == Goodbye::Stopping {
                        self.dismiss(woken);
                    }
                    return Err(io::Error::other(reason));
                }
                Frame::Hello(_) | Frame::Call(_) | Frame::Hint(_) | Frame::Ping(_) => {
                    return Err(FrameError::Malformed.into());
                }
            }
        }
        Ok(())
    }

    /// Ends late calls, asks whether the other side is there, and returns once it is not.
    async fn watch(&self, wake_all: &WakeAll) -> io::Error {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silence = Silence::new();
        let mut pinged: Option<Instant> = None;
        let mut woken = Vec::new();
        loop {
            ticks.tick().await;
            let now = Instant::now();
            self.expire(now, &mut woken);
            wake(wake_all, &mut woken);
            if silence.at(now, self.heard.load(Ordering::Relaxed)) > SILENCE_MAX {
                return io::Error::new(io::ErrorKind::TimedOut, "it does not answer any more");
            }
            if pinged.is_none_or(|at| now - at >= PING_EVERY) {
                pinged = Some(now);
                let ping = Frame::Ping(elapsed_us(self.opened));
                self.outbox.push_short(|out| ping.put(out));
            }
        }
    }
}

/// Ends every call when dropped, also when its link is.
struct FailOnDrop<'a> {
    connection: &'a Connection,
    shared: &'a Shared,
}

impl Drop for FailOnDrop<'_> {
    fn drop(&mut self) {
        self.shared.connection.store(None);
        let mut woken = Vec::new();
        self.connection.fail(&mut woken);
        wake(&self.shared.wake_all, &mut woken);
    }
}

/// How long the other side has been silent, as far as this process was there to hear it.
pub(super) struct Silence {
    checked: Instant,
    heard_at: Instant,
    heard: u64,
}

impl Silence {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Silence {
            checked: now,
            heard_at: now,
            heard: 0,
        }
    }

    /// The silence at `now`, when `heard` reads had brought bytes.
    pub(super) fn at(&mut self, now: Instant, heard: u64) -> Duration {
        // A stall of our own: what came meanwhile is not read yet.
        let stalled = now - self.checked > STALL;
        if heard != self.heard || stalled {
            self.heard = heard;
            self.heard_at = now;
        }
        self.checked = now;
        now - self.heard_at
    }
}

fn elapsed_us(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Wakes those whose calls have ended; a crowd by the dispatcher.
fn wake(wake_all: &WakeAll, woken: &mut Vec<Waker>) {
    match woken.len() {
        0 => {}
        1 => woken.drain(..).for_each(Waker::wake),
        _ => wake_all(std::mem::take(woken)),
    }
}

struct Shared {
    peer: NodeAddress,
    key: ClusterKey,
    own: Identity,
    wake_all: WakeAll,
    connection: ArcSwapOption<Connection>,
    last_error: Mutex<Option<String>>,
}

/// The link to one node. Dropping it ends its calls as a lost connection does.
pub struct Link {
    shared: Arc<Shared>,
    task: JoinHandle<Option<()>>,
}

impl Link {
    /// Keeps a connection to `peer` from now on. Must be called on a tokio runtime.
    pub fn keep(
        peer: NodeAddress,
        key: ClusterKey,
        own: Identity,
        wake_all: WakeAll,
        supervisor: &Supervisor,
    ) -> Self {
        let shared = Arc::new(Shared {
            peer,
            key,
            own,
            wake_all,
            connection: ArcSwapOption::empty(),
            last_error: Mutex::new(None),
        });
        let task = supervisor.task("the link to a node", keep(Arc::clone(&shared)));
        Link { shared, task }
    }

    /// The node at its end.
    pub fn peer(&self) -> &NodeAddress {
        &self.shared.peer
    }

    /// Begins a call that ends by `deadline`. `waker` is woken at its end.
    ///
    /// # Errors
    /// [`Unsent`].
    pub fn begin(
        &self,
        call: &CallParts<'_>,
        waker: &Waker,
        deadline: Instant,
    ) -> Result<PendingCall, Unsent> {
        let connection = self.shared.connection.load();
        match &*connection {
            Some(connection) => connection.begin(call, waker, deadline),
            None => Err(Unsent::Away),
        }
    }

    /// Sends a hint, if there is a connection. Whether it arrives is not known.
    pub fn hint(&self, hint: &Hint) -> bool {
        let connection = self.shared.connection.load();
        connection.as_ref().is_some_and(|connection| {
            let frame = Frame::Hint(hint.clone());
            connection.outbox.push(64, |_, out| frame.put(out)).is_ok()
        })
    }

    /// The state of the link.
    pub fn report(&self) -> LinkReport {
        let connection = self.shared.connection.load();
        let connection = connection.as_ref();
        LinkReport {
            peer: self.shared.peer.clone(),
            identity: connection.map(|connection| connection.identity.clone()),
            calls: connection.map_or(0, |connection| connection.calls.lock().len()),
            round_trip_us: connection
                .map(|connection| connection.round_trip_us.load(Ordering::Relaxed))
                .filter(|us| *us != u64::MAX),
            last_error: self.shared.last_error.lock().clone(),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Keeps the connection of a link, until the task is aborted.
async fn keep(shared: Arc<Shared>) {
    let mut backoff = CONNECT_AGAIN;
    loop {
        let NodeAddress { node, address } = &shared.peer;
        let error = match greet::call(&shared.key, &shared.own, *node, address).await {
            Err(error) => error,
            Ok(opened) => {
                let connection = Arc::new(Connection::new(opened.hello.from.clone()));
                let epoch = connection.identity.epoch;
                tracing::info!(node, %address, epoch, "connected to a node");
                connection.outbox.start_gatherer();
                shared.connection.store(Some(Arc::clone(&connection)));
                let guard = FailOnDrop {
                    connection: &connection,
                    shared: &shared,
                };
                let error = connection.run(opened, &shared.wake_all).await;
                drop(guard);
                if connection.opened.elapsed() >= LIVED {
                    backoff.reset();
                }
                OpenError::Io(error)
            }
        };
        note(&shared, &error);
        tokio::time::sleep(backoff.jittered_pause()).await;
    }
}

/// Notes why there is no connection. Each reason is logged once in a row.
fn note(shared: &Shared, error: &OpenError) {
    let text = error.to_string();
    let mut last = shared.last_error.lock();
    if last.as_ref() == Some(&text) {
        return;
    }
    let NodeAddress { node, address } = &shared.peer;
    tracing::warn!(node, %address, reason = %text, "no connection to a node; trying again");
    *last = Some(text);
}
