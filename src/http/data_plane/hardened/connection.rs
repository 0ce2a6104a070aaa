//! The loop of one connection, on its own coroutine.
//!
//! Read what is there; serve every request that is complete, in order; write all their answers at
//! once; wait. Without pipelining that is one read and one write a request, and no allocation once
//! the buffers have their size.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;

use super::answer::{self, Persistence};
use super::budget::Reservation;
use super::clock::DateText;
use super::counters::CloseReason;
use super::framing::{self, FramingError, Verdict};
use super::janitor::SHRINK_AFTER_MS;
use super::peer::{Peer, Phase, State};
use super::registry::Slot;
use super::wire::Wire;
use super::{Request, Response, Service, Shared};
use crate::http::data_plane::wake::CoroutineWaker;
use crate::http::problem::Problem;

/// The read buffer of a fresh or long idle connection; 10,000 of them take 20 MB.
const INPUT_BYTES_MIN: usize = 2048;

/// The size that a read buffer may grow to for the sake of throughput alone.
const INPUT_BYTES_BUSY: usize = 16 * 1024;

/// Answers waiting to be written beyond which no further request is served.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// Input that is thrown away after the last answer, so that the close does not become a reset
/// which could overtake that answer (RFC 9112 9.6).
const LINGER_BYTES_MAX: usize = 256 * 1024;

/// Requests in a row after which a connection that always has more lets the others go first.
const BURST_REQUESTS: u32 = 256;

/// Serves one connection to its end.
pub(super) fn run<S: Service>(mut end: End, service: &S) {
    let shared = end.shared.clone();
    let peer = end.peer.clone();
    let reason = Connection::new(&shared, &*peer, service, CoroutineWaker::current()).run();
    end.reason = reason;
}

/// Accounts for the end of a connection when dropped, by a panic as well.
pub(super) struct End {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    slot: Slot,
    reason: CloseReason,
}

impl End {
    pub(super) fn new(shared: Arc<Shared>, peer: Arc<Peer>, slot: Slot) -> Self {
        shared.counters.open.fetch_add(1, Ordering::Relaxed);
        Self {
            shared,
            peer,
            slot,
            reason: CloseReason::Panicked,
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // The descriptor outlives this by a tick (see the registry): the client must not wait.
        let _ = self.peer.socket().shutdown(Shutdown::Both);
        // Dooming itself settles the race with a thread that is about to doom it.
        let state = self.peer.state();
        let gone = State::new(Phase::Doomed, self.reason as u64);
        let was_doomed = state.phase() == Phase::Doomed || !self.peer.enter(state, gone);
        let reason = match self.peer.doomed_for() {
            Some(reason) if was_doomed && reason != CloseReason::Lingered => reason,
            _ => self.reason,
        };
        self.shared.counters.count_closed(reason);
        self.shared.registry.end(self.slot, was_doomed);
        // Last, and with release: who sees no connection open sees everything about it done.
        self.shared.counters.open.fetch_sub(1, Ordering::Release);
    }
}

/// What to do after the requests at hand were served.
enum Step {
    /// Read on; nothing more can be served from what is here.
    Read,
    /// Write, then serve on: the answers have reached their bound.
    WriteFirst,
    /// Write, then end the connection.
    Close(CloseReason),
}

/// Bytes on their way out.
#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Writes until everything is out (true) or the socket takes no more (false).
    fn write_to(&mut self, wire: &impl Wire) -> io::Result<bool> {
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match wire.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(true)
    }
}

/// One connection; [`run`](Connection::run) serves it to its end.
pub(super) struct Connection<'c, S, W> {
    shared: &'c Shared,
    wire: &'c W,
    service: &'c S,
    waker: Arc<Waker>,
    state: State,
    // All of it initialised; `start..end` holds what was received and not yet served.
    input: Vec<u8>,
    start: usize,
    end: usize,
    // The first request is not complete below this many bytes; 0 when unknown.
    needed: usize,
    // Bytes of an incomplete head that were searched for its end.
    searched: usize,
    // Whether this request was told to continue, or needs not be.
    continued: bool,
    // Whether the head of this request was let pass.
    authorized: bool,
    // What its body takes of the budget.
    reservation: Option<Reservation<'c>>,
    // Shared with the hook by which a service has it written before it parks.
    outbox: RefCell<Outbox>,
    response: Response,
    date: DateText,
    // The last read took all there was: the next event comes before the next byte.
    emptied: bool,
    // The client may have shut its side down: read on until the end shows.
    may_have_ended: bool,
    ended: bool,
    burst: u32,
}

impl<'c, S: Service, W: Wire> Connection<'c, S, W> {
    /// `waker` is that of the coroutine that will call [`run`](Connection::run).
    pub(super) fn new(shared: &'c Shared, wire: &'c W, service: &'c S, waker: Waker) -> Self {
        Self {
            shared,
            wire,
            service,
            waker: Arc::new(waker),
            state: wire.state(),
            input: vec![0; INPUT_BYTES_MIN],
            start: 0,
            end: 0,
            needed: 0,
            searched: 0,
            continued: false,
            authorized: false,
            reservation: None,
            outbox: RefCell::default(),
            response: Response::default(),
            date: DateText::default(),
            emptied: false,
            may_have_ended: false,
            ended: false,
            burst: 0,
        }
    }

    pub(super) fn run(&mut self) -> CloseReason {
        loop {
            let step = self.serve();
            if let Err(reason) = self.write() {
                return reason;
            }
            match step {
                Step::Close(reason) => {
                    self.linger();
                    return reason;
                }
                Step::WriteFirst => {}
                // What is left over will never be a request.
                Step::Read if self.ended => return CloseReason::PeerClosed,
                Step::Read => {
                    if let Err(reason) = self.read() {
                        return reason;
                    }
                }
            }
        }
    }

    /// Serves every complete request in the buffer and leaves the answers in the outbox.
    fn serve(&mut self) -> Step {
        let sizes = self.shared.limits.sizes();
        if self.state.phase() == Phase::Late {
            return self.time_out();
        }
        loop {
            let input = self.input.get(self.start..self.end).unwrap_or_default();
            if input.is_empty() || input.len() < self.needed {
                return Step::Read;
            }
            let head_may_grow =
                !self.ended && self.searched > 0 && input.len() < sizes.head_bytes_max;
            if self.needed == 0 && head_may_grow && !framing::may_be_complete(input, self.searched)
            {
                self.searched = input.len();
                return Step::Read;
            }
            let mut slots = framing::header_slots();
            let head = match framing::parse(input, &mut slots, &sizes) {
                Verdict::Complete(head) => head,
                Verdict::Incomplete => {
                    self.searched = input.len();
                    return Step::Read;
                }
                Verdict::Refused(error) => return self.refuse(error),
            };
            let to_head = head.method == "HEAD";
            let method = if to_head { "GET" } else { head.method };
            let flush = || {
                // Only as much as the socket takes: this is no place to wait, and an error
                // shows again at the next write.
                let _ = self.outbox.borrow_mut().write_to(self.wire);
            };
            let mut request = Request {
                method,
                target: &head.target,
                headers: head.headers,
                body: &[],
                waker: &self.waker,
                before_wait: &flush,
            };
            let total = head.head_bytes.saturating_add(head.body_bytes);
            // Judged once, however many reads the body takes.
            let judged = if self.authorized {
                Ok(())
            } else {
                catch_unwind(AssertUnwindSafe(|| self.service.authorize(&request))).unwrap_or_else(
                    |_| {
                        self.shared.counters.panics.fetch_add(1, Ordering::Relaxed);
                        Err(Problem::internal())
                    },
                )
            };
            if let (Err(problem), true) = (&judged, head.body_bytes > 0) {
                self.response.clear();
                problem.write_to(&mut self.response);
                return self.turn_away();
            }
            self.authorized = true;
            if total > INPUT_BYTES_MIN && self.reservation.is_none() {
                let callback = framing::is_callback(&head.target);
                self.reservation = self.shared.bodies.reserve(callback, head.body_bytes);
                if self.reservation.is_none() {
                    answer::no_room(&mut self.response);
                    return self.turn_away();
                }
            }
            let Some(body) = input.get(head.head_bytes..total) else {
                // RFC 9110 10.1.1: no need to say so to a client whose body is coming already.
                if head.expects_continue && !self.continued && input.len() == head.head_bytes {
                    self.outbox
                        .borrow_mut()
                        .bytes
                        .extend_from_slice(answer::CONTINUE);
                }
                self.continued = true;
                self.needed = total;
                return Step::Read;
            };

            // From here on no deadline may cut the connection, unless one already has.
            let serving = State::new(Phase::Serving, self.shared.clock.now_ms());
            if self.state.phase() != Phase::Serving {
                if !self.wire.enter(self.state, serving) {
                    return match self.is_late() {
                        true => self.time_out(),
                        false => Step::Close(CloseReason::Drained),
                    };
                }
                self.state = serving;
            }
            request.body = body;
            self.response.clear();
            let response = &mut self.response;
            let served = catch_unwind(AssertUnwindSafe(|| match &judged {
                Ok(()) => self.service.call(&request, response),
                Err(problem) => problem.write_to(response),
            }));
            self.shared
                .counters
                .requests
                .fetch_add(1, Ordering::Relaxed);
            let failed = served.is_err();
            if failed {
                self.shared.counters.panics.fetch_add(1, Ordering::Relaxed);
            }
            // A final answer is 2xx to 5xx; anything else would break the framing of answers.
            if failed || !(200..600).contains(&self.response.status()) {
                answer::panicked(&mut self.response);
            }
            let goes_on =
                head.keep_alive && !failed && !self.shared.draining.load(Ordering::Relaxed);
            let persistence = match (goes_on, head.http_1_0) {
                (false, _) => Persistence::Close,
                (true, true) => Persistence::KeepAlive,
                (true, false) => Persistence::Implied,
            };
            let date = self.date.at(&self.shared.clock);
            let mut outbox = self.outbox.borrow_mut();
            answer::encode(
                &self.response,
                date,
                persistence,
                to_head,
                &mut outbox.bytes,
            );

            let owed = outbox.len();
            drop(outbox);
            self.start += total;
            self.needed = 0;
            self.searched = 0;
            self.continued = false;
            self.authorized = false;
            self.release_body();
            self.burst += 1;
            if failed {
                return Step::Close(CloseReason::Panicked);
            }
            if !goes_on {
                return Step::Close(CloseReason::Finished);
            }
            if owed >= OUTPUT_BYTES_MAX {
                return Step::WriteFirst;
            }
        }
    }

    fn refuse(&mut self, error: FramingError) -> Step {
        answer::refused(error, &mut self.response);
        self.turn_away()
    }

    /// Ends the connection with the answer at hand; where the next request would begin is unknown,
    /// or lies behind a body that is not read.
    fn turn_away(&mut self) -> Step {
        let date = self.date.at(&self.shared.clock);
        let out = &mut self.outbox.get_mut().bytes;
        answer::encode(&self.response, date, Persistence::Close, false, out);
        Step::Close(CloseReason::Refused)
    }

    /// The answer to a request that began and did not complete in time (RFC 9110 15.5.9).
    fn time_out(&mut self) -> Step {
        answer::timed_out(&mut self.response);
        let date = self.date.at(&self.shared.clock);
        let out = &mut self.outbox.get_mut().bytes;
        answer::encode(&self.response, date, Persistence::Close, false, out);
        Step::Close(CloseReason::RequestTimeout)
    }

    /// Writes every answer. While the client does not take them, nothing is read from it.
    fn write(&mut self) -> Result<(), CloseReason> {
        while !self.outbox.get_mut().is_empty() {
            match self.outbox.get_mut().write_to(self.wire) {
                Ok(true) => break,
                Ok(false) => {
                    // The deadline runs from the first refusal: progress does not renew it, or a
                    // byte now and then would hold a connection forever.
                    if self.state.phase() != Phase::Writing {
                        self.enter(Phase::Writing)?;
                    }
                    self.wait();
                }
                Err(_) => return Err(CloseReason::IoError),
            }
        }
        Ok(())
    }

    /// Reads once, waiting as long as nothing is there.
    fn read(&mut self) -> Result<(), CloseReason> {
        if self.burst >= BURST_REQUESTS && !self.emptied {
            self.burst = 0;
            self.wire.let_others_go_first();
        }
        self.make_space();
        loop {
            if self.emptied {
                self.burst = 0;
                // A request keeps the time of its first byte while the rest of it comes in.
                let phase = if self.start == self.end {
                    Phase::Idle
                } else {
                    Phase::Reading
                };
                if self.state.phase() != phase {
                    self.enter(phase)?;
                    self.wire
                        .set_bloated(phase == Phase::Idle && self.is_bloated());
                }
                self.wait();
                if phase == Phase::Reading && self.is_late() {
                    return Ok(());
                }
            }
            let space = self.input.get_mut(self.end..).unwrap_or_default();
            let room = space.len();
            match self.wire.read(space) {
                Ok(0) => {
                    self.ended = true;
                    return Ok(());
                }
                Ok(received) => {
                    self.end += received;
                    // A short read emptied the socket (epoll(7), on edge triggering), except that
                    // an end which came along with the data is not announced again.
                    self.emptied = received < room && !self.may_have_ended;
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.emptied = true;
                    self.shrink_if_idle();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(CloseReason::IoError),
            }
        }
    }

    /// Makes room behind the bytes at hand. The buffer grows with what arrives, never with what a
    /// head merely announces.
    fn make_space(&mut self) {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        let size = self.input.len();
        if self.end < size && !(self.end == 0 && !self.emptied && size < INPUT_BYTES_BUSY) {
            return;
        }
        if self.start > 0 {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        } else if size < self.largest_input() && self.received_any() {
            self.input.resize(self.largest_input().min(size * 2), 0);
        }
    }

    /// The size beyond which the buffer need not grow: by then a head is refused or a body is in.
    fn largest_input(&self) -> usize {
        let head = self.shared.limits.head_bytes_max.saturating_add(1);
        self.needed.max(head).max(INPUT_BYTES_MIN)
    }

    /// Gives back what the body at hand took, its room in the buffer as well: what is not reserved
    /// must not be held.
    fn release_body(&mut self) {
        if self.reservation.take().is_none() || self.input.len() <= INPUT_BYTES_BUSY {
            return;
        }
        let rest = self.input.get(self.start..self.end).unwrap_or_default();
        if rest.len() <= INPUT_BYTES_BUSY {
            let mut input = vec![0; INPUT_BYTES_BUSY];
            if let Some(place) = input.get_mut(..rest.len()) {
                place.copy_from_slice(rest);
            }
            (self.start, self.end) = (0, rest.len());
            self.input = input;
        }
    }

    /// Whether the connection ever carried anything: a fresh one has no reason to grow.
    fn received_any(&self) -> bool {
        self.state.phase() != Phase::Idle || self.end > 0
    }

    /// Gives back what a large request left behind, once the connection has been idle for long.
    fn shrink_if_idle(&mut self) {
        let idle_ms = self
            .shared
            .clock
            .now_ms()
            .saturating_sub(self.state.since_ms());
        if self.start != self.end
            || self.state.phase() != Phase::Idle
            || idle_ms < SHRINK_AFTER_MS
            || !self.is_bloated()
        {
            return;
        }
        (self.start, self.end) = (0, 0);
        self.input = vec![0; INPUT_BYTES_MIN];
        self.outbox = RefCell::default();
        self.response = Response::default();
    }

    fn is_bloated(&self) -> bool {
        self.input.len() > INPUT_BYTES_MIN
            || self.outbox.borrow().bytes.capacity() > 2 * INPUT_BYTES_MIN
    }

    /// Ends our side and throws away what the client still sends, for a bounded time.
    fn linger(&mut self) {
        if self.ended || self.wire.end_writing().is_err() {
            return;
        }
        if self.enter(Phase::Lingering).is_err() {
            return;
        }
        let mut thrown_away = 0;
        while thrown_away < LINGER_BYTES_MAX {
            match self.wire.read(&mut self.input) {
                Ok(0) => return,
                Ok(received) => thrown_away += received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn wait(&mut self) {
        let events = self.wire.wait();
        self.emptied = false;
        self.may_have_ended |= may_show_end(events);
    }

    fn enter(&mut self, phase: Phase) -> Result<(), CloseReason> {
        let to = State::new(phase, self.shared.clock.now_ms());
        // Late as it may be, it has moved on by itself.
        let entered =
            self.wire.enter(self.state, to) || (self.is_late() && self.wire.enter(self.state, to));
        if !entered {
            // Whoever doomed it gave the reason that counts.
            return Err(CloseReason::Drained);
        }
        self.state = to;
        Ok(())
    }

    /// Whether the janitor has found the request at hand late; from then on only this coroutine
    /// moves the connection on, unless it is too slow at that as well.
    fn is_late(&mut self) -> bool {
        let seen = self.wire.state();
        let late = seen.phase() == Phase::Late;
        if late {
            self.state = seen;
        }
        late
    }
}

/// Whether these events may include the end of the client's side.
fn may_show_end(events: usize) -> bool {
    // EPOLLRDHUP, EPOLLHUP and EPOLLERR. Other systems number their events otherwise: there, read
    // until the socket says that nothing is left.
    const LINUX_END: usize = 0x2000 | 0x10 | 0x8;
    !cfg!(target_os = "linux") || events & LINUX_END != 0
}
