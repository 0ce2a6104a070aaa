//! The open-loop sender: one thread, one epoll, kept-alive HTTP/1.1 connections with at most one request
//! under way on each.
//!
//! ```text
//!            take_due          write                read, parse
//!  Traffic ──────────► idle ──────────► server ──────────────────► Traffic::answered
//!     │                 ▲                                               │
//!     │ next_due        └───────────────────────────────────────────────┘
//!     ▼
//!   pacer, a thread that wakes the poll
//! ```
//!
//! It shares the machine with the server that it measures, so it costs little: about 10 µs a request, most
//! of it two system calls. A request that falls due while all connections are busy waits in its
//! [`Traffic`], and the next connection to come free takes the oldest one.

mod connection;
mod pacer;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};

pub use self::connection::Reply;
use self::connection::{Connection, Step};
use self::pacer::Pacer;

/// Due requests are looked for no more often than this while nothing else happens: they go out together,
/// at most this late, and a busy sender is not woken for each of them.
const TICK: Duration = Duration::from_micros(200);
/// [`Traffic::go_on`] is called at least this often.
const LOOK_UP: Duration = Duration::from_millis(50);
/// Pause of a connection whose server could not be reached.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);
/// Events that are taken at once.
const EVENTS: usize = 1024;
/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// Decides what is sent, and takes the answers.
pub trait Traffic {
    /// Stands for a request under way.
    type Request;

    /// Takes a request that is due at `now` and writes it to `out`, which is empty; none if none is due.
    fn take_due(&mut self, now: Instant, out: &mut Vec<u8>) -> Option<Self::Request>;

    /// When the next request falls due; none if none is planned.
    fn next_due(&self) -> Option<Instant>;

    /// Takes the answer to a request, or the reason why there is none.
    fn answered(&mut self, request: Self::Request, now: Instant, answer: Result<Reply<'_>, Fault>);

    /// Called after each round of events and at least every 50 ms. `busy`: requests under way. The run
    /// ends with the first `false`.
    fn go_on(&mut self, now: Instant, busy: usize) -> bool;
}

/// Why there was no answer. The names are stable, as `--json` shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No connection could be made.
    Connect,
    /// No connection was free for as long as the request's timeout.
    NotSent,
    /// Sent, and no answer within the timeout.
    Timeout,
    /// The connection broke before the answer was complete.
    Closed,
    /// An answer that the contract does not know.
    BadAnswer,
}

impl Fault {
    /// The name that `--json` uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::NotSent => "not_sent",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::BadAnswer => "bad_answer",
        }
    }
}

/// Connections to one server, or to several that answer alike, and the loop over them.
pub struct Sender {
    poll: Poll,
    pacer: Pacer,
    addresses: Vec<SocketAddr>,
    /// How long an answer may take from the moment its request is sent.
    timeout: Duration,
    connections: Vec<Connection>,
}

impl Sender {
    /// Connections that are made on their first use, or by [`Sender::connect`].
    ///
    /// # Errors
    /// If the system has no descriptors left.
    pub fn new(address: SocketAddr, connections: usize, timeout: Duration) -> io::Result<Self> {
        Self::over(vec![address], connections, timeout)
    }

    /// The same to several servers in turn. A connection whose server cannot be reached goes to the next one, and
    /// stays there.
    ///
    /// # Errors
    /// If the system has no descriptors left.
    pub fn over(
        addresses: Vec<SocketAddr>,
        connections: usize,
        timeout: Duration,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        // Tokens below are those of connections.
        let pacer = Pacer::start(mio::Waker::new(poll.registry(), Token(connections))?, TICK);
        Ok(Self {
            poll,
            pacer,
            addresses,
            timeout,
            connections: (0..connections).map(Connection::new).collect(),
        })
    }

    /// Makes all connections, for at most `patience`, and returns how many there are. The others are tried
    /// again on their first use.
    ///
    /// # Errors
    /// If events cannot be waited for.
    pub fn connect(&mut self, patience: Duration) -> io::Result<usize> {
        let deadline = Instant::now() + patience;
        let mut events = Events::with_capacity(EVENTS);
        let mut scratch = vec![0; READ_BYTES];
        for connection in &mut self.connections {
            connection.open(&self.addresses, self.poll.registry());
        }
        while self.connections.iter().any(Connection::is_connecting) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            wait(&mut self.poll, &mut events, left.min(LOOK_UP))?;
            for event in &events {
                if let Some(connection) = self.connections.get_mut(event.token().0) {
                    connection.advance(event, &mut scratch, |_| ());
                }
            }
        }
        Ok(self.connections.iter().filter(|one| one.is_open()).count())
    }

    /// Sends and takes answers until the traffic ends.
    ///
    /// # Errors
    /// If events cannot be waited for.
    pub fn run<T: Traffic>(&mut self, traffic: &mut T) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        let mut scratch = vec![0; READ_BYTES];
        let mut run = Run {
            addresses: &self.addresses,
            timeout: self.timeout,
            registry: self.poll.registry().try_clone()?,
            requests: self.connections.iter().map(|_| None).collect(),
            idle: (0..self.connections.len())
                .filter(|number| !self.connections[*number].is_closed())
                .collect(),
            unopened: (0..self.connections.len())
                .rev()
                .filter(|number| self.connections[*number].is_closed())
                .collect(),
            resting: VecDeque::new(),
            deadlines: VecDeque::new(),
            busy: 0,
            connections: &mut self.connections,
            traffic,
        };
        loop {
            let now = Instant::now();
            run.time_out(now);
            run.dispatch(now);
            if !run.traffic.go_on(now, run.busy) {
                return Ok(());
            }
            let until = run.wait_until(now);
            let patience = self.pacer.wake_at(until, now);
            wait(&mut self.poll, &mut events, patience)?;
            for event in &events {
                let number = event.token().0;
                // The pacer only wakes.
                if number < run.connections.len() {
                    let step = run.advance(number, event, &mut scratch);
                    run.finish(number, step);
                    if step == Step::Answered {
                        run.dispatch(Instant::now());
                    }
                }
            }
        }
    }
}

/// The state of [`Sender::run`].
struct Run<'a, T: Traffic> {
    addresses: &'a [SocketAddr],
    timeout: Duration,
    registry: mio::Registry,
    connections: &'a mut Vec<Connection>,
    traffic: &'a mut T,
    /// The request under way on each connection.
    requests: Vec<Option<T::Request>>,
    /// Connections without a request. The one that has been idle for longest goes first: a crowd does not
    /// share a few connections.
    idle: VecDeque<usize>,
    /// Connections that were never made; one is when no other is idle.
    unopened: Vec<usize>,
    /// Connections that pause after a failed connect, and until when.
    resting: VecDeque<(Instant, usize)>,
    /// When the requests under way time out, each with the turn of its connection. All have the same timeout,
    /// so the first is due first.
    deadlines: VecDeque<(Instant, usize, u64)>,
    busy: usize,
}

impl<T: Traffic> Run<'_, T> {
    /// Gives due requests to idle connections.
    fn dispatch(&mut self, now: Instant) {
        while let Some(number) = self.next_idle() {
            let connection = &mut self.connections[number];
            let Some(request) = self.traffic.take_due(now, connection.next_request()) else {
                return;
            };
            match self.idle.front() {
                Some(_) => self.idle.pop_front(),
                None => self.unopened.pop(),
            };
            self.busy += 1;
            self.requests[number] = Some(request);
            let turn = connection.begin();
            self.deadlines.push_back((now + self.timeout, number, turn));
            let step = connection.send(self.addresses, &self.registry);
            self.finish(number, step);
        }
    }

    fn next_idle(&self) -> Option<usize> {
        self.idle.front().or(self.unopened.last()).copied()
    }

    /// Goes on with a connection after an event.
    fn advance(&mut self, number: usize, event: &mio::event::Event, scratch: &mut [u8]) -> Step {
        let (traffic, request) = (&mut *self.traffic, &mut self.requests[number]);
        let step = self.connections[number].advance(event, scratch, |reply| {
            if let Some(request) = request.take() {
                traffic.answered(request, Instant::now(), Ok(reply));
            }
        });
        match step {
            Step::Unsent => self.connections[number].send(self.addresses, &self.registry),
            step => step,
        }
    }

    /// Frees a connection whose request is over.
    fn finish(&mut self, number: usize, step: Step) {
        let now = Instant::now();
        match step {
            // Unsent on a new connection: the server hangs up on everybody.
            Step::Unsent => return self.finish(number, Step::Failed(Fault::Closed)),
            Step::Wait => return,
            Step::Answered => {}
            Step::Failed(Fault::Connect)
                if self.connections[number].go_elsewhere(self.addresses.len()) =>
            {
                let step = self.connections[number].send(self.addresses, &self.registry);
                return self.finish(number, step);
            }
            Step::Failed(fault) => {
                self.connections[number].close();
                if let Some(request) = self.requests[number].take() {
                    self.traffic.answered(request, now, Err(fault));
                }
                if fault == Fault::Connect {
                    self.busy -= 1;
                    self.resting.push_back((now + RECONNECT_PAUSE, number));
                    return;
                }
            }
        }
        self.busy -= 1;
        self.idle.push_back(number);
    }

    /// Gives up requests that have been under way for too long, and ends pauses.
    fn time_out(&mut self, now: Instant) {
        while let Some(&(until, number)) = self.resting.front()
            && until <= now
        {
            self.resting.pop_front();
            self.idle.push_back(number);
        }
        while let Some(&(deadline, number, turn)) = self.deadlines.front() {
            let is_over =
                self.requests[number].is_none() || self.connections[number].turn() != turn;
            if !is_over && deadline > now {
                return;
            }
            self.deadlines.pop_front();
            if !is_over {
                // The answer may still come, and must not be read as the next one's.
                self.finish(number, Step::Failed(Fault::Timeout));
            }
        }
    }

    /// How long nothing has to be done unless an event comes.
    fn wait_until(&self, now: Instant) -> Instant {
        let latest = now + LOOK_UP;
        // Without an idle connection the next answer decides.
        let due = self
            .traffic
            .next_due()
            .filter(|_| self.next_idle().is_some());
        let due = due.map_or(latest, |due| due.max(now + TICK));
        let deadline = self.deadlines.front().map_or(latest, |(at, ..)| *at);
        let rested = self.resting.front().map_or(latest, |(at, _)| *at);
        due.min(deadline).min(rested).min(latest)
    }
}

fn wait(poll: &mut Poll, events: &mut Events, patience: Duration) -> io::Result<()> {
    match poll.poll(events, Some(patience)) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        polled => polled,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    /// Sends requests one by one, each `pause` after the last was answered.
    struct OneByOne {
        left: u32,
        due: Instant,
        pause: Duration,
        statuses: Vec<Result<u16, Fault>>,
    }

    impl OneByOne {
        fn new(requests: u32, pause: Duration) -> Self {
            Self {
                left: requests,
                due: Instant::now(),
                pause,
                statuses: Vec::new(),
            }
        }
    }

    impl Traffic for OneByOne {
        type Request = ();

        fn take_due(&mut self, now: Instant, out: &mut Vec<u8>) -> Option<()> {
            let due = self.next_due().filter(|due| *due <= now)?;
            self.left -= 1;
            self.due = due + Duration::from_secs(3600);
            out.extend_from_slice(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n");
            Some(())
        }

        fn next_due(&self) -> Option<Instant> {
            (self.left > 0).then_some(self.due)
        }

        fn answered(&mut self, (): (), now: Instant, answer: Result<Reply<'_>, Fault>) {
            self.statuses.push(answer.map(|reply| reply.status));
            self.due = now + self.pause;
        }

        fn go_on(&mut self, _: Instant, busy: usize) -> bool {
            busy > 0 || self.left > 0
        }
    }

    /// Answers so many requests on each connection and closes it without a word; gives the number of
    /// connections.
    fn server(answers: u32) -> (SocketAddr, std::sync::mpsc::Receiver<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (accepted, connections) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                if accepted.send(()).is_err() {
                    return;
                }
                let mut buffer = [0; 1024];
                for _ in 0..answers {
                    if stream.read(&mut buffer).unwrap_or(0) == 0 {
                        break;
                    }
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                    stream.write_all(answer).unwrap();
                }
            }
        });
        (address, connections)
    }

    #[test]
    fn a_connection_that_the_server_closed_while_it_was_idle_is_made_anew() {
        let (address, connections) = server(2);
        let mut sender = Sender::new(address, 1, Duration::from_secs(10)).unwrap();
        assert_eq!(sender.connect(Duration::from_secs(10)).unwrap(), 1);
        let mut traffic = OneByOne::new(6, Duration::from_millis(30));
        sender.run(&mut traffic).unwrap();
        assert_eq!(traffic.statuses, [Ok(200); 6]);
        assert_eq!(connections.try_iter().count(), 3);
    }

    #[test]
    fn a_server_that_is_away_is_a_fault_of_each_request_and_of_nothing_else() {
        let away = {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap()
        };
        let mut sender = Sender::new(away, 2, Duration::from_secs(10)).unwrap();
        assert_eq!(sender.connect(Duration::from_secs(10)).unwrap(), 0);
        let mut traffic = OneByOne::new(3, Duration::ZERO);
        sender.run(&mut traffic).unwrap();
        assert_eq!(traffic.statuses, [Err(Fault::Connect); 3]);
    }

    #[test]
    fn a_connection_whose_server_is_away_goes_to_the_next_one_and_stays() {
        let away = {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap()
        };
        let (address, connections) = server(1_000);
        let mut sender = Sender::over(vec![away, address], 1, Duration::from_secs(10)).unwrap();
        let mut traffic = OneByOne::new(5, Duration::ZERO);
        sender.run(&mut traffic).unwrap();
        assert_eq!(traffic.statuses, [Ok(200); 5]);
        assert_eq!(connections.try_iter().count(), 1);
    }

    #[test]
    fn a_request_without_an_answer_times_out_and_its_connection_is_not_used_again() {
        let (address, connections) = server(0);
        let mut sender = Sender::new(address, 1, Duration::from_millis(50)).unwrap();
        // The server closes each connection at once, before it has read anything.
        let mut traffic = OneByOne::new(2, Duration::ZERO);
        sender.run(&mut traffic).unwrap();
        assert!(traffic.statuses.iter().all(Result::is_err));
        drop(connections);
        // One that accepts and never answers.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut sender = Sender::new(address, 1, Duration::from_millis(50)).unwrap();
        let mut traffic = OneByOne::new(2, Duration::ZERO);
        sender.run(&mut traffic).unwrap();
        assert_eq!(traffic.statuses, [Err(Fault::Timeout); 2]);
    }
}
