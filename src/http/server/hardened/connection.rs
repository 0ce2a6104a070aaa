//! The loop of one connection, on its own coroutine.
//!
//! Read what is there; serve every request that is complete, in order; write all their answers at
//! once; wait. Without pipelining that is one read and one write a request, and no allocation once
//! the buffers have their size.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;

use super::budget::Reservation;
use super::clock::DateText;
use super::conn_state::{ConnState, Phase, PhaseStamp};
use super::counters::{CloseReason, Counters};
use super::encode::{self, Persistence};
use super::framing::{self, FramingError, Parsed, Sizes};
use super::outbox::Outbox;
use super::reaper::SHRINK_AFTER_MS;
use super::registry::Slot;
use super::shared::Shared;
use super::transport::Transport;
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::server::Service;
use crate::http::server::wake::CoroutineWaker;

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
pub(super) fn run<S: Service>(mut end: EndGuard, service: &S) {
    let shared = end.shared.clone();
    let conn = end.conn.clone();
    let reason = Connection::new(&shared, &*conn, service, CoroutineWaker::current()).run();
    end.reason = reason;
}

/// Accounts for the end of a connection when dropped, by a panic as well.
pub(super) struct EndGuard {
    shared: Arc<Shared>,
    conn: Arc<ConnState>,
    slot: Slot,
    reason: CloseReason,
}

impl EndGuard {
    pub(super) fn new(shared: Arc<Shared>, conn: Arc<ConnState>, slot: Slot) -> Self {
        shared.counters.open.fetch_add(1, Ordering::Relaxed);
        Self {
            shared,
            conn,
            slot,
            reason: CloseReason::Panicked,
        }
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        // The descriptor outlives this by a tick (see the registry), and the client must not wait for
        // it.
        let _ = self.conn.socket().shutdown(Shutdown::Both);
        // Closing itself decides the race with a thread that is about to close it.
        let state = self.conn.state();
        let gone = PhaseStamp::new(Phase::Closed, self.reason as u64);
        let was_closed = state.phase() == Phase::Closed || !self.conn.enter(state, gone);
        let reason = match self.conn.close_reason() {
            Some(reason) if was_closed && reason != CloseReason::Lingered => reason,
            _ => self.reason,
        };
        self.shared.counters.count_closed(reason);
        self.shared.registry.end(self.slot, was_closed);
        // Last, and with release: a thread that sees no open connection sees all of this done.
        self.shared.counters.open.fetch_sub(1, Ordering::Release);
    }
}

/// The next step after the requests at hand were served.
enum Step {
    /// Read on; nothing more can be served from the bytes at hand.
    Read,
    /// Write, then serve on: the answers have reached their bound.
    WriteFirst,
    /// Write, then end the connection.
    Close(CloseReason),
}

/// One connection; [`run`](Connection::run) serves it to its end.
pub(super) struct Connection<'c, S, T> {
    shared: &'c Shared,
    transport: &'c T,
    service: &'c S,
    waker: Arc<Waker>,
    state: PhaseStamp,
    // All of it initialised; `start..end` holds the bytes that are received and not yet served.
    input: Vec<u8>,
    start: usize,
    end: usize,
    // The first request is not complete below this many bytes; 0 when unknown.
    needed: usize,
    // Bytes of an incomplete head that were searched for its end.
    searched: usize,
    // Whether this request was told to continue, or need not be.
    continued: bool,
    // Whether the head of this request was authorized.
    authorized: bool,
    // The share of its body in the budget.
    reservation: Option<Reservation<'c>>,
    // Shared with the hook that writes it before a service parks.
    outbox: RefCell<Outbox>,
    response: Response,
    date: DateText,
    // The last read emptied the socket: the next event comes before the next byte.
    emptied: bool,
    // The client may have shut its side down: read until the end shows.
    may_have_ended: bool,
    ended: bool,
    burst: u32,
}

impl<'c, S: Service, T: Transport> Connection<'c, S, T> {
    /// `waker` is that of the coroutine that will call [`run`](Connection::run).
    pub(super) fn new(shared: &'c Shared, transport: &'c T, service: &'c S, waker: Waker) -> Self {
        Self {
            shared,
            transport,
            service,
            waker: Arc::new(waker),
            state: transport.state(),
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
                // The rest will never be a request.
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
    ///
    /// One long function, because the head borrows the input buffer from the parse to the answer.
    fn serve(&mut self) -> Step {
        if self.state.phase() == Phase::Late {
            return self.time_out();
        }
        let sizes = Sizes {
            head_bytes_max: self.shared.limits.head_bytes_max,
            bodies: self.shared.limits.bodies,
        };
        while !self.needs_more(sizes.head_bytes_max) {
            let input = self.input.get(self.start..self.end).unwrap_or_default();
            let mut slots = framing::header_slots();
            let head = match framing::parse(input, &mut slots, &sizes) {
                Parsed::Complete(head) => head,
                Parsed::Incomplete => {
                    self.searched = input.len();
                    return Step::Read;
                }
                Parsed::Refused(error) => return self.refuse(error),
            };
            let to_head = head.method == "HEAD";
            let flush = || {
                // Only as much as the socket takes: this is no place to wait, and an error
                // shows again at the next write.
                let _ = self.outbox.borrow_mut().write_to(self.transport);
            };
            let mut request = Request {
                method: if to_head { "GET" } else { head.method },
                target: &head.target,
                headers: head.headers,
                body: &[],
                waker: &self.waker,
                before_wait: &flush,
                trace: None,
            };
            let total = head.head_bytes.saturating_add(head.body_bytes);
            // Asked once, however many reads the body takes.
            let admitted = match self.authorized {
                true => Ok(()),
                false => authorize(self.service, &request, &self.shared.counters),
            };
            if let (Err(problem), true) = (&admitted, head.body_bytes > 0) {
                self.response.clear();
                problem.write_to(&mut self.response);
                return self.turn_away();
            }
            self.authorized = true;
            if total > INPUT_BYTES_MIN && self.reservation.is_none() {
                let anonymous = sizes.bodies.is_anonymous(&head.target);
                self.reservation = self.shared.bodies.reserve(anonymous, head.body_bytes);
                if self.reservation.is_none() {
                    encode::no_room(&mut self.response);
                    return self.turn_away();
                }
            }
            let Some(body) = input.get(head.head_bytes..total) else {
                // RFC 9110 10.1.1: a client whose body is coming already need not be told.
                if head.expects_continue && !self.continued && input.len() == head.head_bytes {
                    let out = &mut self.outbox.borrow_mut().bytes;
                    out.extend_from_slice(encode::CONTINUE);
                }
                self.continued = true;
                self.needed = total;
                return Step::Read;
            };

            // From here on no deadline cuts the connection, unless one already has.
            let serving = PhaseStamp::new(Phase::Serving, self.shared.clock.now_ms());
            if self.state.phase() != Phase::Serving {
                if !self.transport.enter(self.state, serving) {
                    return match self.is_late() {
                        true => self.time_out(),
                        false => Step::Close(CloseReason::Drained),
                    };
                }
                self.state = serving;
            }
            request.body = body;
            let counters = &self.shared.counters;
            let failed = !call(
                self.service,
                &request,
                admitted,
                &mut self.response,
                counters,
            );
            let goes_on =
                head.keep_alive && !failed && !self.shared.draining.load(Ordering::Relaxed);
            let persistence = Persistence::of(goes_on, head.http_1_0);
            let date = self.date.at(&self.shared.clock);
            encode::response(
                &self.response,
                date,
                persistence,
                to_head,
                &mut self.outbox.borrow_mut().bytes,
            );
            self.go_past(total);
            if failed {
                return Step::Close(CloseReason::Panicked);
            }
            if !goes_on {
                return Step::Close(CloseReason::Finished);
            }
            if self.outbox.get_mut().len() >= OUTPUT_BYTES_MAX {
                return Step::WriteFirst;
            }
        }
        Step::Read
    }

    /// Whether the bytes at hand cannot complete a request. Cheaper than a parse.
    fn needs_more(&mut self, head_bytes_max: usize) -> bool {
        let input = self.input.get(self.start..self.end).unwrap_or_default();
        if input.is_empty() || input.len() < self.needed {
            return true;
        }
        let head_may_grow = !self.ended && self.searched > 0 && input.len() < head_bytes_max;
        let needs_more =
            self.needed == 0 && head_may_grow && !framing::may_be_complete(input, self.searched);
        if needs_more {
            self.searched = input.len();
        }
        needs_more
    }

    /// Goes on to the bytes behind the answered request, which took `total` bytes.
    fn go_past(&mut self, total: usize) {
        self.start += total;
        self.needed = 0;
        self.searched = 0;
        self.continued = false;
        self.authorized = false;
        self.release_body();
        self.burst += 1;
    }

    fn refuse(&mut self, error: FramingError) -> Step {
        encode::refused(error, &mut self.response);
        self.turn_away()
    }

    /// Ends the connection with the answer at hand: the beginning of the next request is unknown, or
    /// lies behind a body that is not read.
    fn turn_away(&mut self) -> Step {
        let date = self.date.at(&self.shared.clock);
        let out = &mut self.outbox.get_mut().bytes;
        encode::response(&self.response, date, Persistence::Close, false, out);
        Step::Close(CloseReason::Refused)
    }

    /// Answers a request that began and did not complete in time (RFC 9110 15.5.9).
    fn time_out(&mut self) -> Step {
        encode::timed_out(&mut self.response);
        let date = self.date.at(&self.shared.clock);
        let out = &mut self.outbox.get_mut().bytes;
        encode::response(&self.response, date, Persistence::Close, false, out);
        Step::Close(CloseReason::RequestTimeout)
    }

    /// Writes every answer. Nothing is read from a client that does not take them.
    fn write(&mut self) -> Result<(), CloseReason> {
        while !self.outbox.get_mut().is_empty() {
            match self.outbox.get_mut().write_to(self.transport) {
                Ok(true) => break,
                Ok(false) => {
                    // The deadline runs from the first refusal. Progress does not renew it, or a
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
            self.transport.let_others_go_first();
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
                    self.transport
                        .set_bloated(phase == Phase::Idle && self.is_bloated());
                }
                self.wait();
                if phase == Phase::Reading && self.is_late() {
                    return Ok(());
                }
            }
            let space = self.input.get_mut(self.end..).unwrap_or_default();
            let room = space.len();
            match self.transport.read(space) {
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

    /// Makes room behind the bytes at hand. The buffer grows with the bytes that arrive, never with
    /// the length that a head announces.
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

    /// The size beyond which the buffer need not grow: by then a head is refused or a body is
    /// complete.
    fn largest_input(&self) -> usize {
        let head = self.shared.limits.head_bytes_max.saturating_add(1);
        self.needed.max(head).max(INPUT_BYTES_MIN)
    }

    /// Releases the reservation of the body at hand, and its room in the buffer as well: bytes that
    /// are not reserved must not be held.
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

    /// Whether the connection has ever carried anything: a fresh one has no reason to grow.
    fn received_any(&self) -> bool {
        self.state.phase() != Phase::Idle || self.end > 0
    }

    /// Releases the buffers of a large request, once the connection has been idle for long.
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

    /// Ends our side and throws the client's further bytes away, for a bounded time.
    fn linger(&mut self) {
        if self.ended || self.transport.end_writing().is_err() {
            return;
        }
        if self.enter(Phase::Lingering).is_err() {
            return;
        }
        let mut thrown_away = 0;
        while thrown_away < LINGER_BYTES_MAX {
            match self.transport.read(&mut self.input) {
                Ok(0) => return,
                Ok(received) => thrown_away += received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn wait(&mut self) {
        let events = self.transport.wait();
        self.emptied = false;
        self.may_have_ended |= may_show_end(events);
    }

    fn enter(&mut self, phase: Phase) -> Result<(), CloseReason> {
        let to = PhaseStamp::new(phase, self.shared.clock.now_ms());
        // A late request that has moved on by itself is not late any more.
        let entered = self.transport.enter(self.state, to)
            || (self.is_late() && self.transport.enter(self.state, to));
        if !entered {
            // The thread that closed it gave the reason that counts.
            return Err(CloseReason::Drained);
        }
        self.state = to;
        Ok(())
    }

    /// Whether the reaper has found the request at hand late. From then on only this coroutine moves
    /// the connection on, unless it exceeds that deadline as well.
    fn is_late(&mut self) -> bool {
        let seen = self.transport.state();
        let late = seen.phase() == Phase::Late;
        if late {
            self.state = seen;
        }
        late
    }
}

/// Asks the service whether the request with this head may pass. A panic refuses it.
fn authorize<S: Service>(
    service: &S,
    head: &Request<'_>,
    counters: &Counters,
) -> Result<(), Problem> {
    catch_unwind(AssertUnwindSafe(|| service.authorize(head))).unwrap_or_else(|_| {
        counters.panics.fetch_add(1, Ordering::Relaxed);
        Err(Problem::internal())
    })
}

/// Has the service answer a request that it `admitted`; the refusal is the answer otherwise. False:
/// the service panicked, and the answer says so.
fn call<S: Service>(
    service: &S,
    request: &Request<'_>,
    admitted: Result<(), Problem>,
    response: &mut Response,
    counters: &Counters,
) -> bool {
    response.clear();
    let served = catch_unwind(AssertUnwindSafe(|| match admitted {
        Ok(()) => service.call(request, response),
        Err(problem) => problem.write_to(response),
    }));
    counters.requests.fetch_add(1, Ordering::Relaxed);
    if served.is_err() {
        counters.panics.fetch_add(1, Ordering::Relaxed);
    }
    // A final answer is 2xx to 5xx; anything else would break the framing of answers.
    if served.is_err() || !(200..600).contains(&response.status()) {
        encode::panicked(response);
    }
    served.is_ok()
}

/// Whether these events may include the end of the client's side.
fn may_show_end(events: usize) -> bool {
    // EPOLLRDHUP, EPOLLHUP and EPOLLERR. Other systems number their events otherwise: there, read
    // until the socket says that nothing is left.
    const LINUX_END: usize = 0x2000 | 0x10 | 0x8;
    !cfg!(target_os = "linux") || events & LINUX_END != 0
}
