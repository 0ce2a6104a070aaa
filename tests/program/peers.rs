//! The link between nodes, over real sockets: calls arrive once and their answers with whom they are for; a stranger
//! gets nothing in; and whatever becomes of the connection, a call ends in time, and what its end says is true.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::support::relay::{Relay, Way};
use millrace::http::message::{Request, Response};
use millrace::http::peers::frame::{CallParts, Frame, Hello, decode};
use millrace::http::peers::key::ClusterKey;
use millrace::http::peers::link::PendingCall;
use millrace::http::peers::pool::Peers;
use millrace::http::peers::server::{PeerServer, PeerService, Terms};
use millrace::http::peers::{CALLS_MAX, Hint, Identity, NotRun, Outcome, PROTOCOL, Unsent};
use millrace::http::server::{dispatcher::Dispatcher, wake};
use millrace::order::OrderId;
use millrace::state::lanes::NodeAddress;
use millrace::supervise::Supervisor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SECRET: &str = "the secret of the nodes in this test";
const PATIENCE: Duration = Duration::from_secs(20);

/// What a node's service has seen.
#[derive(Default)]
struct Seen {
    /// How often each body came.
    bodies: Mutex<HashMap<Vec<u8>, usize>>,
    hints: Mutex<Vec<(u8, Hint)>>,
    terms: Mutex<Vec<Terms>>,
    /// Calls to `/wait` are answered.
    is_open: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
}

impl Seen {
    fn times(&self, body: &[u8]) -> usize {
        self.bodies.lock().unwrap().get(body).copied().unwrap_or(0)
    }

    fn calls(&self) -> usize {
        self.bodies.lock().unwrap().values().sum()
    }

    /// Lets `/wait` answer.
    fn open(&self) {
        self.is_open.store(true, Ordering::SeqCst);
        std::mem::take(&mut *self.waiting.lock().unwrap())
            .into_iter()
            .for_each(Waker::wake);
    }
}

struct Echo(Arc<Seen>);

impl PeerService for Echo {
    fn call(&self, request: &Request<'_>, terms: Terms, response: &mut Response) {
        self.0.terms.lock().unwrap().push(terms);
        let mut bodies = self.0.bodies.lock().unwrap();
        *bodies.entry(request.body.to_vec()).or_default() += 1;
        drop(bodies);
        match request.path() {
            "/panic" => panic!("asked for"),
            "/wait" => {
                let waker = Waker::clone(request.waker);
                self.0.waiting.lock().unwrap().push(waker);
                wake::wait(request, || self.0.is_open.load(Ordering::SeqCst));
            }
            _ => {}
        }
        let prefer = request.header("prefer").unwrap_or_default();
        response.set_status(201);
        response.header("Location", request.target);
        response.header("X-Prefer", String::from_utf8_lossy(prefer));
        response.body_mut().extend_from_slice(request.body);
    }

    fn hint(&self, from: u8, hint: Hint) {
        self.0.hints.lock().unwrap().push((from, hint));
    }
}

fn identity(node: u8) -> Identity {
    Identity {
        database: *b"one database of ",
        node,
        epoch: 1,
        data_plane: format!("10.0.0.{node}:8080"),
    }
}

/// One node.
struct Node {
    seen: Arc<Seen>,
    server: PeerServer<Echo>,
    peers: Peers,
}

impl Node {
    fn start(node: u8) -> Self {
        Self::start_as(identity(node), SECRET)
    }

    fn start_as(own: Identity, secret: &str) -> Self {
        let key = ClusterKey::new(secret).expect("a good secret");
        let seen = Arc::<Seen>::default();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let supervisor = Supervisor::default();
        let server = PeerServer::serve(
            listener,
            key.clone(),
            own.clone(),
            Echo(Arc::clone(&seen)),
            &supervisor,
        )
        .expect("it serves");
        let peers = pool(key, own);
        Node {
            seen,
            server,
            peers,
        }
    }
}

fn pool(key: ClusterKey, own: Identity) -> Peers {
    let dispatcher = Dispatcher::start();
    let wake_all: millrace::pipeline::WakeAll = Arc::new(move |batch| dispatcher.wake_all(batch));
    Peers::new(key, own, wake_all, Supervisor::default())
}

fn peer(node: u8, address: SocketAddr) -> NodeAddress {
    let address = address.to_string().into();
    NodeAddress { node, address }
}

/// Wakes a thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn waker() -> Waker {
    Arc::new(Unpark(std::thread::current())).into()
}

fn call<'a>(target: &'a str, body: &'a [u8]) -> CallParts<'a> {
    CallParts {
        wait: Duration::from_secs(5),
        has_own_keys: false,
        method: "POST",
        target,
        headers: &[("prefer", b"wait=5")],
        body,
    }
}

fn begin(peers: &Peers, to: u8, parts: &CallParts<'_>) -> Result<PendingCall, Unsent> {
    peers.begin(to, parts, &waker(), Instant::now() + PATIENCE)
}

/// Waits for the end of a call that this thread began.
fn outcome(call: &PendingCall) -> Outcome {
    let deadline = Instant::now() + PATIENCE + Duration::from_secs(5);
    loop {
        if let Some(outcome) = call.outcome() {
            return outcome;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "a call without an end");
        std::thread::park_timeout(left);
    }
}

/// Waits until there is a connection to a node.
fn connected(peers: &Peers, node: u8) {
    until("a connection", || {
        let reports = peers.report();
        let mut of_node = reports.iter().filter(|report| report.peer.node == node);
        of_node.any(|report| report.identity.is_some())
    });
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn last_error(peers: &Peers) -> String {
    let reports = peers.report();
    let error = reports.first().and_then(|report| report.last_error.clone());
    error.unwrap_or_default()
}

/// Runs a test on a thread that may block, with a runtime at hand.
fn on_runtime(test: impl FnOnce()) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let entered = runtime.enter();
    test();
    drop(entered);
    runtime.shutdown_background();
}

fn wait_for<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Handle::current().block_on(future)
}

#[test]
fn calls_among_three_nodes_arrive_once_and_their_answers_with_whom_they_are_for() {
    const CALLS: usize = 400;
    on_runtime(|| {
        let nodes: Vec<Node> = (0..3).map(Node::start).collect();
        let all: Vec<NodeAddress> = (0..)
            .zip(&nodes)
            .map(|(node, one)| peer(node, one.server.address()))
            .collect();
        nodes.iter().for_each(|node| node.peers.keep(&all));
        std::thread::scope(|scope| {
            for (from, node) in nodes.iter().enumerate() {
                for to in (0..3).filter(|to| *to != from) {
                    scope.spawn(move || {
                        connected(&node.peers, to as u8);
                        let bodies: Vec<String> = (0..CALLS)
                            .map(|at| format!("{from} to {to}: {at}"))
                            .collect();
                        // Many are on their way at once.
                        for chunk in bodies.chunks(50) {
                            let pending: Vec<_> = chunk
                                .iter()
                                .map(|body| {
                                    let parts = call("/echo?x=1", body.as_bytes());
                                    begin(&node.peers, to as u8, &parts).expect("it is sent")
                                })
                                .collect();
                            for (body, call) in chunk.iter().zip(&pending) {
                                let Outcome::Answered(answer) = outcome(call) else {
                                    panic!("{:?}", call.outcome());
                                };
                                assert_eq!(
                                    (answer.status, &answer.body[..]),
                                    (201, body.as_bytes())
                                );
                                assert_eq!(
                                    &answer.fields[..],
                                    b"Location: /echo?x=1\r\nX-Prefer: wait=5\r\n"
                                );
                            }
                        }
                    });
                }
            }
        });
        for (at, node) in nodes.iter().enumerate() {
            assert_eq!(node.seen.calls(), 2 * CALLS);
            assert!(
                node.seen
                    .bodies
                    .lock()
                    .unwrap()
                    .values()
                    .all(|times| *times == 1)
            );
            let terms = node.seen.terms.lock().unwrap();
            assert!(terms.iter().all(|terms| {
                usize::from(terms.from) != at && terms.wait == Duration::from_secs(5)
            }));
            for report in node.peers.report() {
                assert_eq!(report.calls, 0);
                let there = report.identity.expect("a connection");
                assert_eq!(there, identity(report.peer.node));
            }
        }
        assert_eq!(
            nodes[0]
                .peers
                .begin(0, &call("/", b""), &waker(), Instant::now())
                .err(),
            Some(Unsent::Away)
        );
    });
}

#[test]
fn a_hint_arrives_with_its_sender_and_is_dropped_where_there_is_no_connection() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        let hint = Hint::Payment(OrderId::MAX);
        assert!(!here.peers.hint(2, &hint));
        here.peers.keep(&[peer(2, there.server.address())]);
        connected(&here.peers, 2);
        assert!(here.peers.hint(2, &hint));
        until("the hint", || !there.seen.hints.lock().unwrap().is_empty());
        assert_eq!(*there.seen.hints.lock().unwrap(), [(1, hint)]);
    });
}

#[test]
fn a_stranger_gets_no_byte_in() {
    on_runtime(|| {
        let there = Node::start(2);
        let address = there.server.address();
        let other_database = Identity {
            database: *b"another database",
            ..identity(1)
        };
        let old_version = ClusterKey::speaking(SECRET, &[b"millrace-nodes/0"]);
        let cases = [
            (
                pool(
                    ClusterKey::new("a secret that is not that of the nodes").unwrap(),
                    identity(1),
                ),
                peer(2, address),
                "",
            ),
            (
                pool(old_version.unwrap(), identity(1)),
                peer(2, address),
                "",
            ),
            (
                pool(ClusterKey::new(SECRET).unwrap(), other_database),
                peer(2, address),
                "it works on another database",
            ),
            // The address is another node's.
            (
                pool(ClusterKey::new(SECRET).unwrap(), identity(1)),
                peer(3, address),
                "it is another node than expected",
            ),
            // Its own.
            (
                pool(ClusterKey::new(SECRET).unwrap(), identity(2)),
                peer(3, address),
                "it is another node than expected",
            ),
        ];
        for (peers, to, expected) in &cases {
            peers.keep(std::slice::from_ref(to));
            until("a refusal", || !last_error(peers).is_empty());
            let error = last_error(peers);
            assert!(error.contains(expected), "{error}");
            assert_eq!(
                begin(peers, to.node, &call("/", b"")).err(),
                Some(Unsent::Away)
            );
        }
        assert_eq!(there.seen.calls(), 0);
    });
}

#[test]
fn bytes_that_are_no_handshake_end_the_connection_and_disturb_nobody() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        let address = there.server.address();
        here.peers.keep(&[peer(2, address)]);
        connected(&here.peers, 2);
        // One that says nothing, and one that stops in the middle of its first record.
        let silent = TcpStream::connect(address).unwrap();
        let mut halting = TcpStream::connect(address).unwrap();
        std::io::Write::write_all(&mut halting, &[0x16, 3, 1, 2, 0, 1]).unwrap();
        for bytes in [
            &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
            &[0; 4096],
            &[0xff; 4096],
            &[0x16, 3, 1, 0xff, 0xff, 1, 1, 1],
        ] {
            let mut stream = TcpStream::connect(address).unwrap();
            let _ = std::io::Write::write_all(&mut stream, bytes);
            ended(stream);
            let answered = begin(&here.peers, 2, &call("/echo", b"x")).expect("it is sent");
            assert!(matches!(outcome(&answered), Outcome::Answered(_)));
        }
        ended(silent);
        ended(halting);
    });
}

/// Asserts that the other side ends a connection.
fn ended(mut stream: TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 1024];
    loop {
        match std::io::Read::read(&mut stream, &mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("it stays open: {error}"),
        }
    }
}

#[test]
fn a_recorded_connection_that_is_played_again_runs_nothing() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        let relay = wait_for(Relay::start(there.server.address()));
        here.peers.keep(&[peer(2, relay.address)]);
        connected(&here.peers, 2);
        let pending = begin(&here.peers, 2, &call("/echo", b"pay once")).expect("it is sent");
        assert!(matches!(outcome(&pending), Outcome::Answered(_)));
        let recorded = relay.forth();
        for bytes in [recorded.clone(), [&recorded[..], &recorded].concat()] {
            let mut stream = TcpStream::connect(there.server.address()).unwrap();
            let _ = std::io::Write::write_all(&mut stream, &bytes);
            ended(stream);
        }
        assert_eq!(there.seen.times(b"pay once"), 1);
        // And within the connection: its own bytes once more end it.
        let mut records = TcpStream::connect(there.server.address()).unwrap();
        let _ = std::io::Write::write_all(&mut records, &recorded[recorded.len() / 2..]);
        ended(records);
        assert_eq!(there.seen.calls(), 1);
    });
}

/// A caller by hand, with the secret.
async fn by_hand(address: SocketAddr, hello: &Hello) -> impl AsyncReadExt + AsyncWriteExt + Unpin {
    let key = ClusterKey::new(SECRET).unwrap();
    let socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("millrace").unwrap();
    let mut stream = key
        .connector
        .connect(name, socket)
        .await
        .expect("the handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(PROTOCOL));
    let mut bytes = bytes::BytesMut::new();
    Frame::Hello(hello.clone()).put(&mut bytes);
    stream.write_all(&bytes).await.unwrap();
    stream
}

#[test]
fn a_caller_that_knows_the_secret_and_not_the_protocol_is_cut_off() {
    on_runtime(|| {
        let there = Node::start(2);
        let hello = Hello {
            from: identity(1),
            to: 2,
        };
        let mut answer = bytes::BytesMut::new();
        let (number, body) = (1, bytes::Bytes::new());
        let bogus = millrace::http::peers::Answer {
            status: 200,
            fields: bytes::Bytes::new(),
            body,
        };
        Frame::Answer(number, bogus).put(&mut answer);
        let mut second_hello = bytes::BytesMut::new();
        Frame::Hello(hello.clone()).put(&mut second_hello);
        for bytes in [
            // Longer than any frame, unknown, empty, an answer to a question that was not asked, a second hello.
            &[0xff, 0xff, 0xff, 0xff][..],
            &[0, 0x40, 0, 1],
            &[0, 0, 0, 1, 99],
            &[0, 0, 0, 0],
            &answer,
            &second_hello,
        ] {
            wait_for(async {
                let mut stream = by_hand(there.server.address(), &hello).await;
                stream.write_all(bytes).await.unwrap();
                let mut rest = Vec::new();
                let reading = stream.read_to_end(&mut rest);
                let read = tokio::time::timeout(PATIENCE, reading).await;
                assert!(read.is_ok(), "{bytes:?}: it stays open");
            });
        }
        // A call before the hello.
        wait_for(async {
            let key = ClusterKey::new(SECRET).unwrap();
            let socket = tokio::net::TcpStream::connect(there.server.address())
                .await
                .unwrap();
            let name = rustls::pki_types::ServerName::try_from("millrace").unwrap();
            let mut stream = key.connector.connect(name, socket).await.unwrap();
            let mut bytes = bytes::BytesMut::new();
            call("/echo", b"too early").put(0, &mut bytes);
            stream.write_all(&bytes).await.unwrap();
            let mut rest = Vec::new();
            let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
            assert!(read.is_ok(), "it stays open");
        });
        assert_eq!(there.seen.calls(), 0);
    });
}

/// The seeds of the fuzz target, altered at random; the property is that of `fuzz_targets/node_frame.rs`.
#[test]
fn an_altered_frame_is_refused_or_is_written_to_the_same_bytes_again() {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/node_frame");
    let seeds: Vec<Vec<u8>> = std::fs::read_dir(seeds)
        .expect("the seeds")
        .map(|file| std::fs::read(file.expect("a file").path()).expect("its bytes"))
        .collect();
    let seed = rand::rng().random();
    println!("seed={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut taken = 0;
    for turn in 0..30_000 {
        let mut bytes = seeds[turn % seeds.len()].clone();
        for _ in 0..random.random_range(0..4) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..4) {
                0 => bytes[at] ^= 1 << random.random_range(0..8),
                1 => bytes[at] = random.random(),
                2 => bytes.truncate(at + 1),
                _ => bytes.insert(at, random.random()),
            }
        }
        if let Ok(frame) = decode(bytes::Bytes::from(bytes.clone())) {
            taken += 1;
            let mut again = bytes::BytesMut::new();
            frame.put(&mut again);
            assert_eq!(again[4..], bytes[..], "{frame:?}");
        }
    }
    assert!(taken > 0);
}

#[test]
fn a_cut_at_any_byte_ends_a_call_and_its_end_is_true() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        let relay = wait_for(Relay::start(there.server.address()));
        // How far a connection comes with one call.
        here.peers.keep(&[peer(2, relay.address)]);
        connected(&here.peers, 2);
        let pending = begin(&here.peers, 2, &call("/echo", b"first")).expect("it is sent");
        assert!(matches!(outcome(&pending), Outcome::Answered(_)));
        let length = relay.forth().len();
        let (mut uncertain, mut unsent, mut answered) = (0, 0, 0);
        let mut ends = Vec::new();
        let around = |at: usize| (at.saturating_sub(150)..at + 40).step_by(11);
        let cuts = around(length)
            .map(|at| (Way::Forth, at))
            .chain((0..500).step_by(23).map(|at| (Way::Back, at + 1)))
            .chain((0..length).step_by(97).map(|at| (Way::Forth, at)));
        for (turn, cut) in cuts.enumerate() {
            relay.cut(Some(cut));
            relay.sever();
            here.peers.keep(&[]);
            here.peers.keep(&[peer(2, relay.address)]);
            let body = format!("turn {turn}");
            // Until there is a connection, nothing leaves; some cuts never let one be.
            let deadline = Instant::now() + Duration::from_millis(150);
            let pending = loop {
                match begin(&here.peers, 2, &call("/echo", body.as_bytes())) {
                    Ok(pending) => break Some(pending),
                    Err(Unsent::Away) if Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => {
                        assert_eq!(error, Unsent::Away);
                        break None;
                    }
                }
            };
            let end = pending.map(|pending| outcome(&pending));
            ends.push((cut, body, end));
        }
        relay.cut(None);
        // What was still on its way has arrived, or never will.
        here.peers.keep(&[]);
        here.peers.keep(&[peer(2, relay.address)]);
        connected(&here.peers, 2);
        let pending = begin(&here.peers, 2, &call("/echo", b"last")).expect("it is sent");
        assert!(matches!(outcome(&pending), Outcome::Answered(_)));
        for (cut, body, end) in ends {
            let times = there.seen.times(body.as_bytes());
            match end {
                Some(Outcome::Answered(answer)) => {
                    answered += 1;
                    assert_eq!((times, &answer.body[..]), (1, body.as_bytes()), "{cut:?}");
                }
                Some(Outcome::Uncertain) => {
                    uncertain += 1;
                    assert!(times <= 1, "{cut:?}");
                }
                None | Some(Outcome::Unsent) => {
                    unsent += 1;
                    assert_eq!(times, 0, "{cut:?}: said to be unsent, and it came");
                }
                other => panic!("{cut:?}: {other:?}"),
            }
        }
        println!("answered {answered}, uncertain {uncertain}, unsent {unsent}");
        assert!(uncertain > 0 && unsent > 0, "the cuts hit nothing");
    });
}

#[test]
fn a_connection_that_is_silent_ends_and_calls_end_at_their_deadline() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        let relay = wait_for(Relay::start(there.server.address()));
        here.peers.keep(&[peer(2, relay.address)]);
        connected(&here.peers, 2);
        relay.freeze(true);
        let begun = Instant::now();
        let wait = Duration::from_millis(200);
        let short = here
            .peers
            .begin(2, &call("/echo", b"short"), &waker(), begun + wait);
        let long = begin(&here.peers, 2, &call("/echo", b"long")).expect("it is sent");
        assert_eq!(outcome(&short.expect("it is sent")), Outcome::Late);
        let late = begun.elapsed();
        assert!(
            late >= wait && late < wait + Duration::from_secs(2),
            "{late:?}"
        );
        assert_eq!(outcome(&long), Outcome::Uncertain);
        assert!(
            begun.elapsed() > Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
        // Noted an instant after the calls have ended.
        until("the reason", || {
            last_error(&here.peers).contains("does not answer")
        });
        relay.freeze(false);
        connected(&here.peers, 2);
        let again = begin(&here.peers, 2, &call("/echo", b"again")).expect("it is sent");
        assert!(matches!(outcome(&again), Outcome::Answered(_)));
        assert!(there.seen.times(b"short") <= 1 && there.seen.times(b"long") <= 1);
    });
}

#[test]
fn more_bytes_than_a_node_serves_at_a_time_are_refused_before_they_are_begun() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        here.peers.keep(&[peer(2, there.server.address())]);
        connected(&here.peers, 2);
        let body = vec![b'x'; 3 * 1024 * 1024];
        let too_long = vec![b'x'; 5 * 1024 * 1024];
        assert_eq!(
            begin(&here.peers, 2, &call("/wait", &too_long)).err(),
            Some(Unsent::TooLong)
        );
        let mut waiting = Vec::new();
        let refused = loop {
            let pending = match begin(&here.peers, 2, &call("/wait", &body)) {
                Ok(pending) => pending,
                // The writer is behind.
                Err(error) => {
                    assert_eq!(error, Unsent::Busy);
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
            };
            until("the call is waiting or refused", || {
                there.seen.calls() > waiting.len() || pending.is_over()
            });
            match pending.outcome() {
                None => waiting.push(pending),
                Some(end) => break end,
            }
            assert!(waiting.len() < 100, "nothing bounds it");
        };
        assert_eq!(refused, Outcome::NotRun(NotRun::Busy));
        assert_eq!(there.seen.calls(), waiting.len());
        there.seen.open();
        for call in &waiting {
            assert!(matches!(outcome(call), Outcome::Answered(_)));
        }
        let again = begin(&here.peers, 2, &call("/wait", &body)).expect("it is sent");
        assert!(matches!(outcome(&again), Outcome::Answered(_)));
    });
}

#[test]
fn more_calls_than_may_be_on_their_way_are_refused_before_they_are_sent() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        here.peers.keep(&[peer(2, there.server.address())]);
        connected(&here.peers, 2);
        let mut waiting = Vec::new();
        let refused = loop {
            match begin(&here.peers, 2, &call("/wait", b"x")) {
                Ok(pending) => waiting.push(pending),
                Err(error) => break error,
            }
        };
        assert_eq!((refused, waiting.len()), (Unsent::Busy, CALLS_MAX));
        // Who gives up its answer makes room.
        waiting.pop();
        waiting.push(begin(&here.peers, 2, &call("/wait", b"y")).expect("it is sent"));
        there.seen.open();
        let ends = waiting.iter().map(outcome);
        let refused: Vec<Outcome> = ends
            .filter(|end| !matches!(end, Outcome::Answered(_)))
            .collect();
        // The node still runs the one whose answer nobody awaits.
        assert!(
            matches!(&refused[..], [] | [Outcome::NotRun(NotRun::Busy)]),
            "{refused:?}"
        );
    });
}

#[test]
fn a_panic_is_the_answer_to_its_call_and_to_no_other() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        here.peers.keep(&[peer(2, there.server.address())]);
        connected(&here.peers, 2);
        let bad = begin(&here.peers, 2, &call("/panic", b"bad")).expect("it is sent");
        let good = begin(&here.peers, 2, &call("/echo", b"good")).expect("it is sent");
        let status = |call: &PendingCall| match outcome(call) {
            Outcome::Answered(answer) => answer.status,
            other => panic!("{other:?}"),
        };
        assert_eq!((status(&bad), status(&good)), (500, 201));
    });
}

#[test]
fn a_node_that_drains_answers_what_runs_and_says_of_the_rest_that_it_was_not_begun() {
    on_runtime(|| {
        let (here, there) = (Node::start(1), Node::start(2));
        here.peers.keep(&[peer(2, there.server.address())]);
        connected(&here.peers, 2);
        let running = begin(&here.peers, 2, &call("/wait", b"running")).expect("it is sent");
        until("it runs", || there.seen.calls() == 1);
        let Node {
            seen,
            server,
            peers: _peers,
        } = there;
        let draining = tokio::spawn(server.drain(PATIENCE));
        let mut refused = Vec::new();
        until("a refusal", || {
            let call = begin(&here.peers, 2, &call("/echo", b"too late")).expect("it is sent");
            refused.push(outcome(&call));
            refused.last() == Some(&Outcome::NotRun(NotRun::Stopping))
        });
        seen.open();
        assert!(matches!(outcome(&running), Outcome::Answered(_)));
        assert!(wait_for(draining).expect("it drained"));
        until("the connection has ended", || {
            here.peers
                .report()
                .iter()
                .all(|report| report.identity.is_none())
        });
    });
}

#[test]
fn a_newer_process_takes_the_place_of_an_older_one_and_not_the_other_way_round() {
    on_runtime(|| {
        let there = Node::start(2);
        let address = there.server.address();
        let of_epoch = |epoch| {
            let own = Identity {
                epoch,
                ..identity(1)
            };
            let peers = pool(ClusterKey::new(SECRET).unwrap(), own);
            peers.keep(&[peer(2, address)]);
            peers
        };
        let old = of_epoch(5);
        connected(&old, 2);
        let new = of_epoch(6);
        connected(&new, 2);
        until("the old one is cut off", || {
            last_error(&old).contains("a newer process has this node's number")
        });
        let pending = begin(&new, 2, &call("/echo", b"x")).expect("it is sent");
        assert!(matches!(outcome(&pending), Outcome::Answered(_)));
    });
}
