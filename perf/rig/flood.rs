//! A client that costs as little as one can: it shares two cores with what it measures.
//!
//! One thread, one epoll, requests that are written once and only have a number patched in, answers
//! of which nothing is read but the status and where they end. A connection has never more than one
//! request on its way. In a closed loop ([`flood`]) it sends the next one as soon as it has the answer
//! to the last; in an open loop ([`offer`]) requests fall due at a constant rate, whatever becomes of
//! them. `oha` or `wrk` check the closed loop, see `perf/cross_check`.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token, Waker};

use super::blocking;

/// Longest head of an answer that is looked at.
const HEAD_MAX: usize = 4 << 10;
const NUMBER: &[u8] = b"0000000000";
/// In an open loop what is due is sent this often, and whenever an answer comes: waking up for each
/// request would cost more. That lateness counts.
const TICK: Duration = Duration::from_micros(200);
/// Events that are taken at once.
const EVENTS: usize = 1024;
/// How long the last answers are waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Requests that differ in ten digits only.
pub struct Template {
    bytes: Vec<u8>,
    /// Where the digits are.
    places: Vec<usize>,
    /// One number in each, or one after the other.
    numbering: Numbering,
    next: u64,
    /// From here on the numbers begin again.
    end: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Numbering {
    Same,
    Counting,
}

impl Template {
    /// A request whose every `0000000000` becomes the same fresh number.
    pub fn new(method: &str, path: &str, fields: &str, body: &str) -> Self {
        Self::numbered(method, path, fields, body, Numbering::Same)
    }

    /// A request whose every `0000000000` becomes a fresh number of its own.
    pub fn counting(method: &str, path: &str, fields: &str, body: &str) -> Self {
        Self::numbered(method, path, fields, body, Numbering::Counting)
    }

    fn numbered(method: &str, path: &str, fields: &str, body: &str, numbering: Numbering) -> Self {
        let bytes = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes();
        let places = (0..bytes.len().saturating_sub(NUMBER.len() - 1))
            .filter(|at| bytes[*at..].starts_with(NUMBER))
            .collect();
        Template {
            bytes,
            places,
            numbering,
            next: 1,
            end: u64::MAX,
        }
    }

    /// One order of one unit, by a new buyer under a new key each time.
    pub fn order(sku: &str, more_fields: &str) -> Self {
        Self::new(
            "POST",
            "/v1/orders",
            &format!(
                "Content-Type: application/json\r\nIdempotency-Key: key-0000000000\r\n{more_fields}"
            ),
            &format!(r#"{{"user_id":"u-0000000000","sku_id":"{sku}"}}"#),
        )
    }

    /// Numbers from here on, so that another run has other buyers.
    pub fn starting_at(mut self, next: u64) -> Self {
        self.next = next;
        self
    }

    /// The same `count` numbers again and again.
    pub fn wrapping_at(mut self, count: u64) -> Self {
        self.end = self.next + count;
        self
    }

    /// The next number that is not used yet.
    pub fn next_number(&self) -> u64 {
        self.next
    }

    fn render(&mut self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.bytes);
        for place in &self.places {
            let mut rest = self.next;
            for digit in out[start + place..start + place + NUMBER.len()]
                .iter_mut()
                .rev()
            {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
            if self.numbering == Numbering::Counting {
                self.next += 1;
            }
        }
        if self.numbering == Numbering::Same {
            self.next += 1;
        }
        if self.next == self.end {
            self.next = 1;
        }
    }
}

/// What came back.
pub struct Flooded {
    /// Answers by status.
    pub answers: BTreeMap<u16, u64>,
    /// How long it took.
    pub took: Duration,
    /// From the moment a request was sent, in an open loop from the one at which it was due, in
    /// microseconds.
    pub latency: Histogram<u64>,
}

impl Flooded {
    fn new() -> anyhow::Result<Self> {
        Ok(Flooded {
            answers: BTreeMap::new(),
            took: Duration::ZERO,
            latency: Histogram::new_with_bounds(1, 120_000_000, 3)?,
        })
    }

    fn note(&mut self, status: u16, latency: Duration) {
        *self.answers.entry(status).or_insert(0) += 1;
        self.latency.saturating_record(latency.as_micros() as u64);
    }

    /// Answers with this status a second.
    pub fn rate(&self, status: u16) -> f64 {
        self.count(status) as f64 / self.took.as_secs_f64()
    }

    /// Answers with this status.
    pub fn count(&self, status: u16) -> u64 {
        self.answers.get(&status).copied().unwrap_or(0)
    }

    /// Nothing but this status came.
    pub fn only(self, status: u16) -> anyhow::Result<Self> {
        let others = self.answers.keys().any(|other| *other != status);
        ensure!(!others, "answers other than {status}: {:?}", self.answers);
        Ok(self)
    }
}

/// Answers with this status a second; what [`flood`] counts, where nothing else came.
///
/// # Errors
/// As [`flood`], and where another status came.
pub fn rate(
    address: SocketAddr,
    connections: usize,
    length: Duration,
    template: &mut Template,
    status: u16,
) -> anyhow::Result<f64> {
    let flooded = blocking(|| flood(address, connections, length, template))?;
    Ok(flooded.only(status)?.rate(status))
}

struct Connection {
    stream: TcpStream,
    out: Vec<u8>,
    written: usize,
    head: Vec<u8>,
    /// Bytes of the body that are still to come, once the head is there.
    body_left: Option<usize>,
    status: u16,
    /// From when on its request counts.
    since: Instant,
    waiting: bool,
}

/// Sends requests over `connections` for so long, then takes what is still due.
///
/// # Errors
/// Where a connection breaks: nothing that is measured may do that.
pub fn flood(
    address: SocketAddr,
    connections: usize,
    length: Duration,
    template: &mut Template,
) -> anyhow::Result<Flooded> {
    let (mut poll, mut all) = connect(address, connections)?;
    let mut events = Events::with_capacity(EVENTS);
    let mut flooded = Flooded::new()?;
    let started = Instant::now();
    let mut waiting = 0_usize;
    for connection in &mut all {
        connection.send(template, started)?;
        waiting += 1;
    }
    let mut buffer = vec![0; 64 << 10];
    // The last answer that came within the time.
    let mut counted = Duration::ZERO;
    while waiting > 0 {
        wait(&mut poll, &mut events)?;
        ensure!(
            started.elapsed() < length + PATIENCE,
            "{waiting} requests were not answered"
        );
        for event in &events {
            let connection = &mut all[event.token().0];
            if let Some(status) = connection.go_on(event, &mut buffer)? {
                let now = Instant::now();
                let elapsed = now - started;
                // Those after the end are awaited, not counted: they had no successors beside them.
                if elapsed <= length {
                    counted = elapsed;
                    flooded.note(status, now - connection.since);
                    connection.send(template, now)?;
                } else {
                    waiting -= 1;
                }
            }
        }
    }
    flooded.took = counted.max(Duration::from_millis(1));
    Ok(flooded)
}

/// Sends `rate` requests a second over `connections` for so long, each when it is due or as soon after
/// as a connection is free, and takes every answer.
///
/// # Errors
/// As [`flood`].
pub fn offer(
    address: SocketAddr,
    connections: usize,
    rate: f64,
    length: Duration,
    template: &mut Template,
) -> anyhow::Result<Flooded> {
    let (mut poll, mut all) = connect(address, connections)?;
    let mut events = Events::with_capacity(EVENTS);
    let clock = Waker::new(poll.registry(), Token(connections))?;
    // The timeout of a poll is in whole milliseconds. The clock ends with `offering`, however that goes.
    let (offering, over) = mpsc::channel::<()>();
    let ticking = std::thread::spawn(move || {
        while over.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            clock.wake()?;
        }
        io::Result::Ok(())
    });
    let mut flooded = Flooded::new()?;
    let mut buffer = vec![0; 64 << 10];
    // The one that has been free for longest goes first: a crowd does not share a few connections.
    let mut free: VecDeque<usize> = (0..connections).collect();
    let (mut sent, mut answered) = (0_u64, 0_u64);
    let requests = (rate * length.as_secs_f64()) as u64;
    let started = Instant::now();
    while answered < requests {
        wait(&mut poll, &mut events)?;
        ensure!(
            started.elapsed() < length + PATIENCE,
            "{} requests were not answered",
            requests - answered
        );
        for event in &events {
            let number = event.token().0;
            let Some(connection) = all.get_mut(number) else {
                // The clock.
                continue;
            };
            if let Some(status) = connection.go_on(event, &mut buffer)? {
                flooded.note(status, connection.since.elapsed());
                answered += 1;
                free.push_back(number);
            }
        }
        let elapsed = started.elapsed();
        while sent < requests {
            let due = Duration::from_secs_f64(sent as f64 / rate);
            if due > elapsed {
                break;
            }
            let Some(number) = free.pop_front() else {
                break;
            };
            all[number].send(template, started + due)?;
            sent += 1;
        }
    }
    flooded.took = started.elapsed();
    drop(offering);
    ticking.join().expect("a clock does not panic")?;
    Ok(flooded)
}

fn connect(address: SocketAddr, connections: usize) -> anyhow::Result<(Poll, Vec<Connection>)> {
    let poll = Poll::new()?;
    let mut all = Vec::with_capacity(connections);
    for number in 0..connections {
        // Blocking, so that a connection is one before it is counted.
        let stream = std::net::TcpStream::connect(address)
            .with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        poll.registry().register(
            &mut stream,
            Token(number),
            Interest::READABLE | Interest::WRITABLE,
        )?;
        all.push(Connection {
            stream,
            out: Vec::new(),
            written: 0,
            head: Vec::new(),
            body_left: None,
            status: 0,
            since: Instant::now(),
            waiting: false,
        });
    }
    Ok((poll, all))
}

/// Waits for events, a second at most.
fn wait(poll: &mut Poll, events: &mut Events) -> io::Result<()> {
    match poll.poll(events, Some(Duration::from_secs(1))) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        polled => polled,
    }
}

impl Connection {
    fn send(&mut self, template: &mut Template, since: Instant) -> anyhow::Result<()> {
        self.out.clear();
        self.written = 0;
        template.render(&mut self.out);
        self.since = since;
        self.waiting = true;
        self.write()
    }

    /// Writes and reads what it can after `event`; the status of the answer, once that is complete. One
    /// at most: there is no other request on its way. What comes later is another event.
    fn go_on(&mut self, event: &Event, buffer: &mut [u8]) -> anyhow::Result<Option<u16>> {
        if event.is_writable() {
            self.write()?;
        }
        let status = self.read(buffer)?;
        self.waiting &= status.is_none();
        Ok(status)
    }

    fn write(&mut self) -> anyhow::Result<()> {
        while self.written < self.out.len() {
            match self.stream.write(&self.out[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("a request could not be sent"),
            }
        }
        Ok(())
    }

    /// The status of the next answer, where one is complete.
    fn read(&mut self, buffer: &mut [u8]) -> anyhow::Result<Option<u16>> {
        if !self.waiting {
            return Ok(None);
        }
        loop {
            let read = match self.stream.read(buffer) {
                Ok(0) => anyhow::bail!("the server closed a connection with a request on it"),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error).context("an answer could not be read"),
            };
            let taken = self.take(&buffer[..read])?;
            // Less than fits: there is no more, and another event will tell when there is.
            if taken.is_some() || read < buffer.len() {
                return Ok(taken);
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) -> anyhow::Result<Option<u16>> {
        let left = match self.body_left {
            Some(left) => left
                .checked_sub(bytes.len())
                .context("an answer is longer than it says")?,
            None => {
                self.head.extend_from_slice(bytes);
                let Some(end) = memmem(&self.head, b"\r\n\r\n") else {
                    ensure!(
                        self.head.len() < HEAD_MAX,
                        "the head of an answer is too long"
                    );
                    return Ok(None);
                };
                let (status, length) = parse(&self.head[..end])?;
                self.status = status;
                let body = self.head.len() - end - 4;
                self.head.clear();
                length
                    .checked_sub(body)
                    .context("an answer is longer than it says")?
            }
        };
        self.body_left = (left > 0).then_some(left);
        Ok((left == 0).then_some(self.status))
    }
}

fn memmem(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// The status of an answer and the length of its body.
fn parse(head: &[u8]) -> anyhow::Result<(u16, usize)> {
    let text = std::str::from_utf8(head).context("the head of an answer is no text")?;
    let status = text
        .get(9..12)
        .and_then(|status| status.parse().ok())
        .context("an answer has no status")?;
    for line in text.split("\r\n").skip(1) {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            return Ok((status, value.trim().parse()?));
        }
    }
    anyhow::bail!("an answer does not say how long it is: {text}")
}
