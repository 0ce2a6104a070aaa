//! The HTTP engines, seen from the wire: raw bytes in, raw bytes out.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use millrace::http::message::{Request, Response};
use millrace::http::problem::Problem;
use millrace::http::server::Service;
use millrace::http::server::hardened::{self, CloseReason, Server};
use millrace::http::server::limits::{BodyLimits, BodyRule, Limits, Targets};
use millrace::http::server::{minihttp, wake};
use parking_lot::Mutex;
use support::rules::{AFTER, Then, rules};

mod support {
    #![allow(dead_code, reason = "shared by several tests, each uses a part")]
    pub mod rules;
}

const PATIENCE: Duration = Duration::from_secs(20);

/// Answers with what it saw; `/wait` parks until the gate opens.
#[derive(Default)]
struct Echo {
    gate: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
    calls: AtomicUsize,
}

impl Echo {
    fn open_gate(&self) {
        self.gate.store(true, Ordering::Release);
        for waker in self.waiting.lock().drain(..) {
            waker.wake();
        }
    }

    fn parked(&self) -> usize {
        self.waiting.lock().len()
    }
}

impl Service for Echo {
    fn authorize(&self, head: &Request<'_>) -> Result<(), Problem> {
        assert!(head.body.is_empty());
        match head.header("x-token") {
            Some(b"wrong") => Err(Problem::unauthorized()),
            Some(b"panic") => panic!("asked for"),
            _ => Ok(()),
        }
    }

    fn call(&self, request: &Request<'_>, response: &mut Response) {
        self.calls.fetch_add(1, Ordering::AcqRel);
        response.header("Content-Type", "text/plain");
        match request.path() {
            "/wait" => {
                let mut registered = false;
                wake::wait(request, || {
                    if !registered {
                        self.waiting.lock().push(Waker::clone(request.waker));
                        registered = true;
                    }
                    self.gate.load(Ordering::Acquire)
                });
                response.body_mut().extend_from_slice(b"waited");
            }
            "/panic" => panic!("asked for"),
            "/odd-status" => response.set_status(101),
            "/big" => {
                let bytes = request.query().parse().unwrap_or(0);
                response.body_mut().resize(bytes, b'x');
            }
            _ => {
                let _ = write!(
                    response.body_mut(),
                    "{} {} {} {}",
                    request.method,
                    request.target,
                    request.headers.len(),
                    String::from_utf8_lossy(request.body),
                );
            }
        }
    }
}

const BATCH: &str = "/v1/orders:batch";
const CALLBACK: &str = "/v1/payments/standard/notify";

/// As those of the data plane, but with smaller batches.
const BODY_RULES: &[BodyRule] = &[
    BodyRule {
        targets: Targets::Exactly(BATCH),
        bytes_max_least: 100_000,
        is_anonymous: false,
    },
    BodyRule {
        targets: Targets::Below("/v1/payments/"),
        bytes_max_least: 65_536,
        is_anonymous: true,
    },
];

fn quick() -> Limits {
    Limits {
        head_bytes_max: 2048,
        bodies: BodyLimits {
            bytes_max: 1000,
            rules: BODY_RULES,
        },
        ..Limits::default()
    }
}

fn start(limits: Limits) -> (Server, Arc<Echo>) {
    let service = Arc::new(Echo::default());
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let server = hardened::serve(listener, service.clone(), limits).expect("a server");
    (server, service)
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// Everything until the server closes, or resets, which loses no byte that came before.
fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&bytes)),
    }
    String::from_utf8(bytes).expect("ASCII")
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn field(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (field, value) = line.split_once(": ")?;
            field.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    fn code(&self) -> String {
        let problem: serde_json::Value = serde_json::from_str(&self.body).expect("a problem");
        assert_eq!(self.field("Content-Type"), Some("application/problem+json"));
        assert_eq!(problem["type"], "about:blank");
        assert_eq!(problem["status"], self.status);
        assert!(problem["title"].is_string() && problem["detail"].is_string());
        problem["code"].as_str().expect("a code").to_owned()
    }
}

/// Splits answers by their lengths; `bodiless` says which ones answer `HEAD`.
fn answers(mut raw: &str) -> Vec<Answer> {
    let mut found = Vec::new();
    while !raw.is_empty() {
        let (head, rest) = raw.split_once("\r\n\r\n").expect("a whole head");
        let status = head[9..12].parse().expect("a status");
        let mut answer = Answer {
            status,
            head: head.to_owned(),
            body: String::new(),
        };
        let length = answer
            .field("Content-Length")
            .map_or(0, |length| length.parse().expect("a length"));
        let (body, rest) = rest.split_at(length);
        answer.body = body.to_owned();
        found.push(answer);
        raw = rest;
    }
    found
}

/// Sends everything, ends our side, and returns the answers.
fn exchange(address: SocketAddr, input: impl AsRef<[u8]>) -> Vec<Answer> {
    let mut stream = connect(address);
    stream.write_all(input.as_ref()).expect("sent");
    stream.shutdown(Shutdown::Write).expect("half-closed");
    answers(&read_to_end(&mut stream))
}

/// Sends everything, leaves our side open, and returns the answers once the server closes.
fn until_closed(address: SocketAddr, input: impl AsRef<[u8]>) -> Vec<Answer> {
    let mut stream = connect(address);
    stream.write_all(input.as_ref()).expect("sent");
    answers(&read_to_end(&mut stream))
}

/// Reads exactly one answer.
fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut raw = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).expect("more of the answer");
        raw.push(byte[0]);
        if raw.ends_with(b"\r\n\r\n") {
            let head = String::from_utf8(raw.clone()).expect("ASCII");
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("Content-Length: "))
                .map_or(0, |length| length.parse().expect("a length"));
            let mut body = vec![0; length];
            stream.read_exact(&mut body).expect("the body");
            raw.extend(body);
            return answers(&String::from_utf8(raw).expect("ASCII"))
                .pop()
                .expect("an answer");
        }
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let ends = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < ends, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

const GET: &str = "GET /a HTTP/1.1\r\nHost: h\r\n\r\n";

#[test]
fn a_request_is_answered_with_the_fields_that_http_asks_for() {
    let (server, _) = start(quick());
    let answer = exchange(server.local_addr(), GET).pop().expect("an answer");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, "GET /a 1 ");
    assert!(answer.head.starts_with("HTTP/1.1 200 OK\r\n"));
    assert_eq!(answer.field("Connection"), None);
    let date = answer.field("Date").expect("a date");
    assert!(date.len() == 29 && date.ends_with(" GMT"), "{date}");
}

#[test]
fn what_is_not_a_request_is_refused_and_the_connection_ends() {
    let (server, service) = start(quick());
    let mut refused = 0;
    for rule in rules().iter().filter(|rule| rule.then == Then::Another) {
        let Some(status) = rule
            .hardened
            .strip_suffix(", closes")
            .and_then(|status| status.parse().ok())
            .filter(|status| *status != 500)
        else {
            continue;
        };
        let code = match status {
            413 => "body_too_large",
            431 => "head_too_large",
            _ => "bad_request",
        };
        refused += 1;
        // A request behind it must not be served: nobody knows where it begins.
        let input = format!("{}{AFTER}", rule.input);
        let got = until_closed(server.local_addr(), &input);
        assert_eq!(got.len(), 1, "{input:?}: {got:?}");
        assert_eq!(got[0].status, status, "{input:?}");
        assert_eq!(got[0].code(), code, "{input:?}");
        assert_eq!(got[0].field("Connection"), Some("close"), "{input:?}");
    }
    assert!(refused > 20, "only {refused} rules");
    assert_eq!(service.calls.load(Ordering::Acquire), 0);
    eventually("the closes are counted", || {
        server.counters().closed(CloseReason::Refused) == refused
    });
}

#[test]
fn a_refusal_comes_after_the_answers_that_are_due() {
    let (server, _) = start(quick());
    let big = "POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 5000\r\n\r\n";
    let got = until_closed(server.local_addr(), format!("{GET}{GET}{big}"));
    let statuses: Vec<u16> = got.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 200, 413]);
}

#[test]
fn the_answer_to_a_body_too_large_survives_a_client_that_goes_on_sending() {
    let (server, _) = start(quick());
    let mut stream = connect(server.local_addr());
    let head = "POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 200000\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("sent");
    stream.write_all(&[b'x'; 200_000]).expect("sent as well");
    let got = answers(&read_to_end(&mut stream));
    assert_eq!(got[0].status, 413);
}

#[test]
fn bodies_are_read_by_their_length_however_they_arrive() {
    let (server, service) = start(quick());
    let body = "x".repeat(900);
    let post = format!("POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 900\r\n\r\n{body}");
    let mut stream = connect(server.local_addr());
    stream.set_nodelay(true).expect("no delay");
    for piece in post.as_bytes().chunks(7) {
        stream.write_all(piece).expect("sent");
    }
    assert_eq!(read_answer(&mut stream).body, format!("POST /p 2 {body}"));
    // Without a length there is no body (RFC 9112 6.3).
    let got = exchange(server.local_addr(), "POST /p HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(got[0].body, "POST /p 1 ");
    // A cut off request never runs.
    let calls = service.calls.load(Ordering::Acquire);
    assert!(exchange(server.local_addr(), &post[..post.len() - 1]).is_empty());
    assert_eq!(service.calls.load(Ordering::Acquire), calls);
}

#[test]
fn a_batch_may_be_larger_than_other_bodies() {
    let (server, _) = start(quick());
    let body = "y".repeat(100_000);
    let post = format!(
        "POST /v1/orders:batch HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n{body}{GET}"
    );
    let got = exchange(server.local_addr(), post);
    assert_eq!(got[0].body, format!("POST /v1/orders:batch 2 {body}"));
    assert_eq!(got[1].status, 200);
}

#[test]
fn pipelined_requests_are_answered_in_order_also_to_a_half_closed_client() {
    let (server, _) = start(quick());
    let input: String = (0..2000)
        .map(|at| format!("GET /{at} HTTP/1.1\r\nHost: h\r\n\r\n"))
        .collect();
    let mut stream = connect(server.local_addr());
    let mut reader = stream.try_clone().expect("a second handle");
    let reading = std::thread::spawn(move || answers(&read_to_end(&mut reader)));
    stream.write_all(input.as_bytes()).expect("sent");
    stream.shutdown(Shutdown::Write).expect("half-closed");
    let got = reading.join().expect("answers");
    assert_eq!(got.len(), 2000);
    for (at, answer) in got.iter().enumerate() {
        assert_eq!(answer.body, format!("GET /{at} 1 "));
    }
}

#[test]
fn an_answer_does_not_wait_behind_a_parked_request() {
    let (server, service) = start(quick());
    let mut stream = connect(server.local_addr());
    let wait = "GET /wait HTTP/1.1\r\nHost: h\r\n\r\n";
    stream
        .write_all(format!("{GET}{wait}{GET}").as_bytes())
        .expect("sent");
    assert_eq!(read_answer(&mut stream).body, "GET /a 1 ");
    eventually("the second request parks", || service.parked() == 1);
    service.open_gate();
    assert_eq!(read_answer(&mut stream).body, "waited");
    assert_eq!(read_answer(&mut stream).body, "GET /a 1 ");
}

#[test]
fn a_parked_request_is_answered_to_a_half_closed_client() {
    let (server, service) = start(quick());
    let mut stream = connect(server.local_addr());
    stream
        .write_all(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
        .expect("sent");
    stream.shutdown(Shutdown::Write).expect("half-closed");
    eventually("the request parks", || service.parked() == 1);
    service.open_gate();
    assert_eq!(answers(&read_to_end(&mut stream))[0].body, "waited");
}

#[test]
fn connections_persist_as_version_and_connection_field_say() {
    let (server, _) = start(quick());
    for (version, field, expected) in [
        ("1.1", "Connection: close\r\n", Some("close")),
        ("1.0", "", Some("close")),
        ("1.0", "Connection: close\r\n", Some("close")),
    ] {
        let request = format!("GET /a HTTP/{version}\r\nHost: h\r\n{field}\r\n");
        let got = until_closed(server.local_addr(), format!("{request}{request}"));
        assert_eq!(got.len(), 1, "nothing is served after the last answer");
        assert_eq!(got[0].field("Connection"), expected);
    }
    let old = "GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
    let got = exchange(server.local_addr(), format!("{old}{old}"));
    assert_eq!(got.len(), 2);
    assert_eq!(got[0].field("Connection"), Some("keep-alive"));
}

#[test]
fn targets_and_empty_lines_before_a_request_are_read_as_the_standard_says() {
    let (server, _) = start(quick());
    let got = exchange(
        server.local_addr(),
        "\r\nGET http://h:80/x?y HTTP/1.1\r\nHost: other\r\n\r\nOPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
    );
    assert_eq!(got[0].body, "GET /x?y 1 ");
    assert_eq!(got[1].body, "OPTIONS * 1 ");
}

#[test]
fn head_gets_the_fields_of_get_and_no_body() {
    let (server, _) = start(quick());
    let request = "HEAD /abc HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    let mut stream = connect(server.local_addr());
    stream.write_all(request.as_bytes()).expect("sent");
    let raw = read_to_end(&mut stream);
    assert!(raw.contains("\r\nContent-Length: 11\r\n"), "{raw}");
    assert!(raw.ends_with("\r\n\r\n"));
}

#[test]
fn a_client_that_expects_to_continue_is_told_so_only_when_that_helps() {
    let (server, _) = start(quick());
    let head = "POST /p HTTP/1.1\r\nHost: h\r\nExpect: 100-Continue\r\nContent-Length: 3\r\n\r\n";
    let mut stream = connect(server.local_addr());
    stream.write_all(head.as_bytes()).expect("sent");
    assert_eq!(read_answer(&mut stream).status, 100);
    stream.write_all(b"abc").expect("sent");
    assert_eq!(read_answer(&mut stream).body, "POST /p 3 abc");
    // The body is here, there is none, or it will not be taken.
    let got = exchange(server.local_addr(), format!("{head}abc"));
    assert_eq!((got.len(), got[0].status), (1, 200));
    let none = head.replace("Content-Length: 3", "Content-Length: 0");
    let got = exchange(server.local_addr(), none);
    assert_eq!((got.len(), got[0].status), (1, 200));
    let large = head.replace("Content-Length: 3", "Content-Length: 3000");
    let got = until_closed(server.local_addr(), large);
    assert_eq!((got.len(), got[0].status), (1, 413));
}

#[test]
fn a_request_that_its_head_condemns_has_its_body_left_unread() {
    let (server, service) = start(quick());
    let head = "POST /p HTTP/1.1\r\nHost: h\r\nX-Token: wrong\r\nContent-Length: 900\r\n\r\n";
    let calls = service.calls.load(Ordering::Acquire);
    // Nothing of the body is ever sent, and the answer does not wait for it.
    for head in [
        head.to_owned(),
        head.replace("X-Token", "Expect: 100-continue\r\nX-Token"),
        head.replace("/p", "/v1/payments/none/notify"),
    ] {
        let got = until_closed(server.local_addr(), head);
        assert_eq!((got.len(), got[0].status), (1, 401));
        assert_eq!(got[0].field("Connection"), Some("close"));
        assert_eq!(got[0].field("WWW-Authenticate"), Some("Bearer"));
    }
    assert_eq!(service.calls.load(Ordering::Acquire), calls);
    // After the answers that are due; and what follows is not read as a request.
    let got = until_closed(server.local_addr(), format!("{GET}{head}{GET}{GET}"));
    let statuses: Vec<u16> = got.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 401]);
    // Without a body the connection may go on.
    let got = exchange(
        server.local_addr(),
        format!("GET /p HTTP/1.1\r\nHost: h\r\nX-Token: wrong\r\n\r\n{GET}"),
    );
    let statuses: Vec<u16> = got.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [401, 200]);
    let got = until_closed(server.local_addr(), head.replace("wrong", "panic"));
    assert_eq!((got.len(), got[0].status), (1, 500));
}

/// A connection whose head, with a body of so many bytes to come, was let pass.
fn announce(address: SocketAddr, path: &str, bytes: usize) -> (TcpStream, Answer) {
    let mut stream = connect(address);
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: {bytes}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).expect("sent");
    let answer = read_answer(&mut stream);
    (stream, answer)
}

#[test]
fn the_bodies_of_all_connections_together_are_bounded() {
    let (server, _) = start(Limits {
        // 210,000 for orders, 70,000 for callbacks.
        body_bytes_total_max: 280_000,
        ..quick()
    });
    let address = server.local_addr();
    let (first, answer) = announce(address, BATCH, 100_000);
    assert_eq!(answer.status, 100);
    let (mut second, answer) = announce(address, BATCH, 100_000);
    assert_eq!(answer.status, 100);
    let (mut refused, answer) = announce(address, BATCH, 100_000);
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("\"overloaded\""));
    assert_eq!(answer.field("Retry-After"), Some("1"));
    assert_eq!(read_to_end(&mut refused), "");
    // Neither what is small nor a callback has to wait for that.
    assert_eq!(announce(address, "/p", 900).1.status, 100);
    let (_callback, answer) = announce(address, CALLBACK, 60_000);
    assert_eq!(answer.status, 100);
    assert_eq!(announce(address, CALLBACK, 60_000).1.status, 503);
    // What is answered and what goes away gives its bytes back.
    second.write_all(&[b'y'; 100_000]).expect("sent");
    assert_eq!(read_answer(&mut second).status, 200);
    let (third, answer) = announce(address, BATCH, 100_000);
    assert_eq!(answer.status, 100);
    drop((first, third));
    eventually("both have given their bytes back", || {
        let one = announce(address, BATCH, 100_000);
        let two = announce(address, BATCH, 100_000);
        one.1.status == 100 && two.1.status == 100
    });
}

#[test]
fn a_panic_is_a_500_and_the_server_lives() {
    let (server, _) = start(quick());
    let got = until_closed(
        server.local_addr(),
        format!("{GET}GET /panic HTTP/1.1\r\nHost: h\r\n\r\n{GET}"),
    );
    assert_eq!(got.len(), 2);
    assert_eq!((got[1].status, got[1].code().as_str()), (500, "internal"));
    assert_eq!(exchange(server.local_addr(), GET)[0].status, 200);
    assert_eq!(server.counters().panics.load(Ordering::Relaxed), 1);
}

#[test]
fn a_status_that_would_break_the_framing_is_a_500() {
    let (server, _) = start(quick());
    let got = exchange(
        server.local_addr(),
        "GET /odd-status HTTP/1.1\r\nHost: h\r\n\r\n",
    );
    assert_eq!(got[0].status, 500);
}

fn impatient() -> Limits {
    Limits {
        request_timeout: Duration::from_millis(300),
        idle_timeout: Duration::from_millis(600),
        ..quick()
    }
}

#[test]
fn deadlines_close_what_is_slow_and_spare_what_is_being_served() {
    let (server, service) = start(impatient());
    let counters = server.counters();
    let mut waiting = connect(server.local_addr());
    waiting
        .write_all(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
        .expect("sent");
    let started = Instant::now();
    for partial in [
        "GET / HT",
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab",
    ] {
        let got = until_closed(server.local_addr(), partial);
        assert_eq!(
            (got.len(), got[0].status, got[0].code().as_str()),
            (1, 408, "request_timeout")
        );
        assert_eq!(got[0].field("Connection"), Some("close"));
    }
    assert!(started.elapsed() >= Duration::from_millis(600));
    let mut idle = connect(server.local_addr());
    idle.write_all(GET.as_bytes()).expect("sent");
    let started = Instant::now();
    assert_eq!(answers(&read_to_end(&mut idle)).len(), 1);
    assert!(started.elapsed() >= Duration::from_millis(550));
    eventually("both kinds are counted", || {
        counters.closed(CloseReason::RequestTimeout) == 2
            && counters.closed(CloseReason::IdleTimeout) == 1
    });
    // An idle connection owes no request, so it is closed without a word.
    let mut silent = connect(server.local_addr());
    assert_eq!(read_to_end(&mut silent), "");
    // Longer in the service than any deadline, and answered all the same.
    service.open_gate();
    assert_eq!(read_answer(&mut waiting).body, "waited");
}

#[test]
fn a_request_that_trickles_in_gains_no_time_by_it() {
    let (server, service) = start(impatient());
    let mut stream = connect(server.local_addr());
    let started = Instant::now();
    let ended = loop {
        let sent = stream.write_all(b"G");
        if sent.is_err() || started.elapsed() > PATIENCE {
            break started.elapsed();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(ended < Duration::from_secs(5), "{ended:?}");
    assert_eq!(service.calls.load(Ordering::Acquire), 0);
}

#[test]
fn a_client_that_does_not_read_is_not_read_from_and_is_cut_at_its_deadline() {
    let (server, service) = start(impatient());
    let mut stream = connect(server.local_addr());
    let big = "GET /big?1000000 HTTP/1.1\r\nHost: h\r\n\r\n".repeat(50);
    stream.write_all(big.as_bytes()).expect("sent");
    eventually("the unread reply is cut", || {
        server.counters().closed(CloseReason::UnreadReply) == 1
    });
    // It stopped serving when the socket was full: the rest would only pile up.
    assert!(service.calls.load(Ordering::Acquire) < 50);
}

#[test]
fn a_slow_reader_gets_everything_that_it_takes_in_time() {
    let (server, _) = start(quick());
    let mut stream = connect(server.local_addr());
    let big = "GET /big?3000000 HTTP/1.1\r\nHost: h\r\n\r\n".repeat(3);
    stream.write_all(big.as_bytes()).expect("sent");
    for _ in 0..3 {
        assert_eq!(read_answer(&mut stream).body.len(), 3_000_000);
    }
}

#[test]
fn a_full_server_makes_room_where_nothing_is_being_served() {
    let (server, service) = start(Limits {
        connections_max: 2,
        ..quick()
    });
    let counters = server.counters();
    let mut idle = connect(server.local_addr());
    idle.write_all(GET.as_bytes()).expect("sent");
    read_answer(&mut idle);
    let mut partial = connect(server.local_addr());
    partial.write_all(b"GET /").expect("sent");
    eventually("both are in", || counters.open.load(Ordering::Relaxed) == 2);
    // The partial request may still be on its way to the server's eyes: either may go, both will.
    let wait = b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n";
    let mut first = connect(server.local_addr());
    first.write_all(wait).expect("sent");
    eventually("one is parked", || service.parked() == 1);
    let mut second = connect(server.local_addr());
    second.write_all(wait).expect("sent");
    eventually("two are parked", || service.parked() == 2);
    assert_eq!(read_to_end(&mut partial), "");
    assert_eq!(read_to_end(&mut idle), "");
    eventually("both are counted", || {
        counters.closed(CloseReason::Evicted) == 2
    });
    // Everyone is being served now.
    let refused = answers(&read_to_end(&mut connect(server.local_addr())));
    assert_eq!(
        (refused[0].status, refused[0].code().as_str()),
        (503, "overloaded")
    );
    assert_eq!(refused[0].field("Retry-After"), Some("1"));
    assert_eq!(counters.refused.load(Ordering::Relaxed), 1);
    service.open_gate();
    assert_eq!(read_answer(&mut first).body, "waited");
    assert_eq!(read_answer(&mut second).body, "waited");
}

#[test]
fn a_drain_answers_what_is_in_flight_and_closes_the_rest() {
    let (server, service) = start(quick());
    let address = server.local_addr();
    let mut idle = connect(address);
    idle.write_all(GET.as_bytes()).expect("sent");
    read_answer(&mut idle);
    let mut waiting = connect(address);
    let wait = "GET /wait HTTP/1.1\r\nHost: h\r\n\r\n";
    waiting.write_all(wait.as_bytes()).expect("sent");
    let mut partial = connect(address);
    partial.write_all(b"GET /a HTTP/1.1\r\n").expect("sent");
    eventually("the request parks", || service.parked() == 1);
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| server.drain(PATIENCE));
        assert_eq!(read_to_end(&mut idle), "");
        assert!(
            TcpStream::connect(address).is_err(),
            "nobody listens any more"
        );
        partial.write_all(b"Host: h\r\n\r\n").expect("sent");
        let got = answers(&read_to_end(&mut partial));
        assert_eq!(got[0].field("Connection"), Some("close"));
        service.open_gate();
        let got = answers(&read_to_end(&mut waiting));
        assert_eq!(got[0].body, "waited");
        assert_eq!(got[0].field("Connection"), Some("close"));
        drop((idle, waiting, partial));
        assert_eq!(drain.join().expect("drained"), 0);
    });
    assert_eq!(server.counters().open.load(Ordering::Acquire), 0);
}

#[test]
fn a_drain_cuts_what_is_left_at_its_deadline() {
    let (server, service) = start(quick());
    let mut waiting = connect(server.local_addr());
    let wait = "GET /wait HTTP/1.1\r\nHost: h\r\n\r\n";
    waiting.write_all(wait.as_bytes()).expect("sent");
    eventually("the request parks", || service.parked() == 1);
    assert_eq!(server.drain(Duration::from_millis(50)), 1);
    assert_eq!(read_to_end(&mut waiting), "");
    service.open_gate();
    eventually("its coroutine ends", || {
        server.counters().open.load(Ordering::Acquire) == 0
    });
}

#[test]
fn connections_that_come_and_go_leave_nothing_behind() {
    let (server, _) = start(quick());
    let descriptors = || std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let before = descriptors();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for turn in 0..250 {
                    if turn % 2 == 0 {
                        assert_eq!(exchange(server.local_addr(), GET).len(), 1);
                    } else {
                        drop(connect(server.local_addr()));
                    }
                }
            });
        }
    });
    // The last ones may still be in the kernel's queue.
    eventually("every connection has come and ended", || {
        let ended: u64 = CloseReason::ALL
            .into_iter()
            .map(|reason| server.counters().closed(reason))
            .sum();
        ended == 1000 && server.counters().open.load(Ordering::Acquire) == 0
    });
    assert_eq!(server.counters().accepted.load(Ordering::Relaxed), 1000);
    // Other tests of this process come and go meanwhile, a few descriptors each.
    eventually("descriptors are given back", || {
        descriptors() < before + 200
    });
}

#[test]
fn minihttp_serves_the_same_service() {
    let service = Arc::new(Echo::default());
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let (_, address) = minihttp::serve(any, service, &quick()).expect("a server");
    let mut stream = connect(address);
    stream
        .write_all(b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc")
        .expect("sent");
    let answer = read_answer(&mut stream);
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, "POST /p 2 abc")
    );
    assert_eq!(answer.field("Content-Type"), Some("text/plain"));
    for (request, status) in [
        ("POST /p HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (
            "POST /p HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
        ),
        (
            "POST /p HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            501,
        ),
        ("GET /panic HTTP/1.1\r\n\r\n", 500),
    ] {
        let mut stream = connect(address);
        stream.write_all(request.as_bytes()).expect("sent");
        assert_eq!(read_answer(&mut stream).status, status, "{request:?}");
    }
    let mut stream = connect(address);
    let refused = "POST /p HTTP/1.1\r\nX-Token: wrong\r\nContent-Length: 3\r\n\r\nabc";
    stream
        .write_all(format!("{refused}{GET}").as_bytes())
        .expect("sent");
    assert_eq!(read_answer(&mut stream).status, 401);
    assert_eq!(read_answer(&mut stream).status, 200);
    let mut stream = connect(address);
    let large = format!(
        "POST /p HTTP/1.1\r\nContent-Length: 1001\r\n\r\n{}",
        "x".repeat(1001)
    );
    stream
        .write_all(format!("{large}{GET}").as_bytes())
        .expect("sent");
    assert_eq!(read_answer(&mut stream).status, 413);
    assert_eq!(read_answer(&mut stream).status, 200);
    assert!(minihttp::serve(address, Arc::new(Echo::default()), &quick()).is_err());
}
