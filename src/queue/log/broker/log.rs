//! A broker's log as an order log: its spans are counted here, and the broker forgets what PostgreSQL says is
//! settled.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frame::{self, CLOSING, HEAD, Owner};
use super::reader::{Counted, ReadError, Reader, before};
use super::writer::BrokerWriter;
use super::{Broker, BrokerError, Place, Position};
use crate::queue::Durability;
use crate::queue::log::outstanding::Outstanding;
use crate::queue::log::record::{self, GROUP_HEAD, Record};
use crate::queue::log::{GroupAt, Log, OrderLog, Permit, Space};
use crate::sync::{AtomicU64, Condvar, Mutex, Ordering};

/// Bytes of a span, about.
const SPAN_BYTES: u64 = 1 << 20;
/// Age at which a span ends with the next group.
const SPAN_AGE: Duration = Duration::from_secs(1);
/// Interval at which spans are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Unit of the space, in bytes.
const UNIT: u64 = 512;

/// Limits of a log on a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokerLimits {
    /// Most bytes of groups that are not forgotten.
    pub bytes_max: u64,
    /// Time for which a group stays after its orders are settled.
    pub retain: Duration,
    /// Whether groups stay until [`OrderLog::confirm`], beyond that time.
    pub retain_for_slots: bool,
}

/// A log on a broker.
#[derive(Debug)]
pub struct BrokerLog {
    broker: Arc<dyn Broker>,
    owner: Owner,
    limits: BrokerLimits,
    space: Arc<Space>,
    state: Mutex<State>,
    changed: Condvar,
    /// Spans up to this number may be forgotten as far as the standbys are concerned.
    confirmed: AtomicU64,
    /// Spans up to this number are settled by PostgreSQL's note.
    noted: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// Oldest first; the last is being appended to.
    spans: VecDeque<Span>,
    /// The place from which the log is kept: everything before it may be forgotten.
    kept_from: Position,
    stopping: bool,
}

#[derive(Debug)]
struct Span {
    number: u64,
    began: Instant,
    outstanding: Outstanding,
    /// Its first group's number.
    first: u64,
    /// Its last group.
    last: Position,
    bytes: u64,
    units: i64,
    settled_at: Option<Instant>,
}

impl Span {
    fn after(last: Position, number: u64) -> Self {
        Span {
            number,
            began: Instant::now(),
            outstanding: Outstanding::new(),
            first: last.place.number + 1,
            last,
            bytes: 0,
            units: 0,
            settled_at: None,
        }
    }
}

impl BrokerLog {
    /// Makes a log of what was taken over with `marker`, and whose orders before it have all been replayed.
    /// `kept_from` is the oldest place that the database may ask for again.
    pub fn start(
        broker: Arc<dyn Broker>,
        owner: Owner,
        limits: BrokerLimits,
        marker: Position,
        kept_from: Position,
    ) -> Log {
        let earlier = Span::after(marker, 1);
        earlier.outstanding.seal();
        let log = Arc::new(BrokerLog {
            broker: Arc::clone(&broker),
            owner,
            limits,
            space: Arc::new(Space::new((limits.bytes_max / UNIT) as i64)),
            state: Mutex::new(State {
                spans: VecDeque::from([earlier, Span::after(marker, 2)]),
                kept_from,
                stopping: false,
            }),
            changed: Condvar::new(),
            confirmed: AtomicU64::new(if limits.retain_for_slots { 0 } else { u64::MAX }),
            noted: AtomicU64::new(0),
        });
        Log {
            writer: Box::new(BrokerWriter::new(Arc::clone(&log), broker, owner, marker)),
            shared: log,
            next_sequence: 1,
        }
    }

    fn with_current<R>(&self, change: impl FnOnce(&mut Span) -> R) -> Option<R> {
        self.state.lock().spans.back_mut().map(change)
    }

    /// The place before which the broker may have forgotten everything.
    pub(super) fn kept_from(&self) -> Place {
        self.state.lock().kept_from.place
    }

    pub(super) fn span(&self) -> u64 {
        self.with_current(|span| span.number).unwrap_or(0)
    }

    /// Ends the current span, if it is long or old enough. By the writing thread, between two groups.
    pub(super) fn begin_span_if_due(&self) {
        let mut state = self.state.lock();
        if let Some(span) = state.spans.back()
            && (span.bytes >= SPAN_BYTES || (span.bytes > 0 && span.began.elapsed() >= SPAN_AGE))
        {
            span.outstanding.seal();
            let next = Span::after(span.last, span.number + 1);
            state.spans.push_back(next);
            self.changed.notify_all();
        }
    }

    pub(super) fn add_outstanding(&self, orders: u64) {
        let _ = self.with_current(|span| span.outstanding.add(orders));
    }

    pub(super) fn remove_outstanding(&self, orders: u64) {
        let _ = self.with_current(|span| span.outstanding.settled(orders));
    }

    pub(super) fn appended(&self, last: Position, bytes: usize, reserved: u32) {
        let units = (bytes as u64).div_ceil(UNIT) as i64;
        let _ = self.with_current(|span| {
            span.last = last;
            span.bytes += bytes as u64;
            span.units += units;
        });
        self.space.give(i64::from(reserved) - units);
    }

    /// Forgets spans that are settled, noted, confirmed and old enough, or needed for room.
    fn forget(&self) -> Result<(), BrokerError> {
        let bound = self
            .confirmed
            .load(Ordering::Acquire)
            .min(self.noted.load(Ordering::Acquire));
        let (through, until) = {
            let mut state = self.state.lock();
            let now = Instant::now();
            for span in state
                .spans
                .iter_mut()
                .filter(|span| span.outstanding.is_done())
            {
                span.settled_at.get_or_insert(now);
            }
            let mut left: u64 = state.spans.iter().map(|span| span.bytes).sum();
            let (mut through, mut until) = (0, None);
            for span in &state.spans {
                let is_old = span
                    .settled_at
                    .is_some_and(|settled_at| now.duration_since(settled_at) >= self.limits.retain);
                let is_settled = span.outstanding.is_done() && span.number <= bound;
                if !(is_settled && (is_old || left > self.limits.bytes_max / 2)) {
                    break;
                }
                left -= span.bytes;
                (through, until) = (span.number, Some(span.last));
            }
            (through, until)
        };
        let Some(until) = until else { return Ok(()) };
        self.broker.forget(until)?;
        let mut state = self.state.lock();
        state.kept_from = until;
        while let Some(span) = state.spans.front().filter(|span| span.number <= through) {
            self.space.give(span.units);
            state.spans.pop_front();
        }
        Ok(())
    }

    /// The group at a place, found by its hint or, if that is wrong, by reading from the start.
    fn find(&self, at: Position) -> io::Result<Vec<u8>> {
        let by_place = self.broker.fences();
        let hinted = match self.broker.read(before(at, by_place), 1) {
            // The hint is wrong.
            Err(BrokerError::Lost(_)) => Vec::new(),
            hinted => hinted.map_err(io::Error::other)?,
        };
        let kept_from = self.state.lock().kept_from;
        let payload = |frame: &[u8]| {
            let frame = frame::decode(frame).ok()?;
            (frame.place == at.place && frame.owner == self.owner).then(|| frame.payload.to_vec())
        };
        if let Some(found) = hinted.first().and_then(|stored| payload(&stored.frame)) {
            return Ok(found);
        }
        let mut reader = Reader::after(&*self.broker, self.owner, Some(kept_from));
        loop {
            let counted = reader.read().map_err(io::Error::other)?;
            if counted.is_empty() {
                let what = format!("group {} is not in {}", at.place, self.broker.title());
                return Err(io::Error::new(io::ErrorKind::NotFound, what));
            }
            let found = counted
                .into_iter()
                .find(|one| one.position.place == at.place);
            if let Some(Counted { payload, .. }) = found {
                return Ok(payload);
            }
        }
    }

    fn epoch(&self) -> u64 {
        self.with_current(|span| span.last.place.epoch).unwrap_or(0)
    }
}

/// Decodes a group's payload; a marker and a closing group have no records.
///
/// # Errors
/// [`ReadError::Damaged`].
pub(crate) fn records_of(place: Place, payload: &[u8]) -> Result<Vec<Record>, ReadError> {
    if payload.is_empty() || payload == CLOSING {
        return Ok(Vec::new());
    }
    let group = record::decode(payload);
    let group = group.map_err(|error| ReadError::Damaged(format!("group {place}: {error}")))?;
    Ok(group.records)
}

impl OrderLog for BrokerLog {
    fn durability(&self) -> Durability {
        Durability::Broker
    }

    fn title(&self) -> String {
        self.broker.title()
    }

    fn reserve(&self, record_bytes: usize) -> Option<Permit> {
        let bytes = (HEAD + GROUP_HEAD + record_bytes) as u64;
        self.space.take(bytes.div_ceil(UNIT) as u32)
    }

    fn is_full(&self) -> bool {
        // Otherwise the room is reserved by orders under way.
        OrderLog::bytes(self) + SPAN_BYTES >= self.limits.bytes_max
    }

    fn settled(&self, by_span: &[(u64, u64)]) {
        let state = self.state.lock();
        let oldest = state.spans.front().map_or(0, |oldest| oldest.number);
        let mut is_done = false;
        for (number, orders) in by_span {
            let index = number.checked_sub(oldest).map(|index| index as usize);
            if let Some(span) = index.and_then(|index| state.spans.get(index)) {
                let before = span.outstanding.settled(*orders);
                assert!(
                    before >= *orders,
                    "span {number}: {orders} orders settled, {before} outstanding"
                );
                is_done |= span.outstanding.is_done();
            }
        }
        if is_done {
            self.changed.notify_all();
        }
    }

    fn read(&self, at: &GroupAt) -> io::Result<Vec<Record>> {
        let place = Place {
            epoch: self.epoch(),
            number: at.place,
        };
        let payload = self.find(Position {
            place,
            offset: at.group,
        })?;
        records_of(place, &payload).map_err(io::Error::other)
    }

    fn read_all(&self, each: &mut dyn FnMut(u64, u64, Vec<Record>)) -> io::Result<()> {
        // One after the other: each takes the lock.
        let kept_from = self.state.lock().kept_from;
        let epoch = self.epoch();
        let mut reader = Reader::after(&*self.broker, self.owner, Some(kept_from));
        loop {
            let counted = reader.read().map_err(io::Error::other)?;
            if counted.is_empty() {
                return Ok(());
            }
            for Counted { position, payload } in counted {
                let place = position.place;
                let records = records_of(place, &payload).map_err(io::Error::other)?;
                let span = if place.epoch == epoch {
                    let state = self.state.lock();
                    let index = state
                        .spans
                        .partition_point(|span| span.first <= place.number);
                    index
                        .checked_sub(1)
                        .map_or(0, |index| state.spans[index].number)
                } else {
                    0
                };
                each(span, place.number, records);
            }
        }
    }

    fn outstanding(&self) -> u64 {
        let state = self.state.lock();
        let spans = state.spans.iter();
        spans.map(|span| span.outstanding.orders()).sum()
    }

    fn settled_up_to(&self) -> u64 {
        let state = self.state.lock();
        let settled = state
            .spans
            .iter()
            .take_while(|span| span.outstanding.is_done());
        settled.last().map_or(0, |span| span.number)
    }

    fn position_of(&self, span: u64) -> Option<Position> {
        let state = self.state.lock();
        let span = state.spans.iter().find(|one| one.number == span);
        span.map(|span| span.last)
    }

    fn note(&self, span: u64) {
        self.noted.fetch_max(span, Ordering::AcqRel);
        self.look();
    }

    fn confirm(&self, span: u64) {
        self.confirmed.fetch_max(span, Ordering::AcqRel);
        self.look();
    }

    fn bytes(&self) -> u64 {
        let state = self.state.lock();
        state.spans.iter().map(|span| span.bytes).sum()
    }

    fn look(&self) {
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    fn maintain(&self) {
        let mut told = false;
        loop {
            {
                let mut state = self.state.lock();
                if !state.stopping {
                    self.changed.wait_for(&mut state, LOOK);
                }
                if state.stopping {
                    return;
                }
            }
            match self.forget() {
                Ok(()) => told = false,
                Err(error) if !told => {
                    tracing::warn!(reason = %error, "{} could not be trimmed; retrying", self.title());
                    told = true;
                }
                Err(_) => {}
            }
        }
    }

    fn stop(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }

    fn last_position(&self) -> Option<Position> {
        self.with_current(|span| span.last)
    }

    /// Appends a closing group, which says that no order before it is needed. What is there stays for as long as
    /// it would without a stop.
    fn erase(&self) -> io::Result<()> {
        let Some(last) = self.last_position() else {
            return Ok(());
        };
        let place = Place {
            number: last.place.number + 1,
            ..last.place
        };
        self.broker.check().map_err(io::Error::other)?;
        let closing = frame::encode(self.owner, place, CLOSING);
        let sent = self.broker.send(place, &closing);
        sent.map(drop).map_err(io::Error::other)
    }
}
