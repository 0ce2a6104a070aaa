//! Profiles of a running service: who may take one, what it shows, and that orders go on.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::http::{Answer, Connection, call};
use crate::support::postgres::test_dir;
use crate::support::served::{PATIENCE, Served};
use serde_json::json;

const OPS: (&str, &str) = ("Authorization", "Bearer ops");
const ROUTE: &str = "/admin/v1/profile";

fn serve(dir: &std::path::Path, token: Option<&str>) -> Served {
    let token = token.map(|token| ("MILLRACE_CONTROL_PLANE__TOKEN".to_owned(), token.to_owned()));
    let settings: Vec<_> = token.into_iter().collect();
    Served::try_start(dir, &settings, &dir.join("serve.log"))
        .unwrap_or_else(|ended| panic!("millrace ended: {}\n{}", ended.status, ended.log))
}

fn profile(control: SocketAddr, query: &str) -> Answer {
    call(control, "GET", &format!("{ROUTE}{query}"), &[OPS], "")
}

fn text(answer: &Answer) -> String {
    String::from_utf8(answer.body.clone()).expect("UTF-8")
}

/// Asks for a profile without waiting for it.
fn ask(control: SocketAddr, query: &str) -> TcpStream {
    let mut stream = TcpStream::connect(control).expect("connect");
    let request = format!(
        "GET {ROUTE}{query} HTTP/1.1\r\nHost: {control}\r\n{}: {}\r\nConnection: close\r\n\r\n",
        OPS.0, OPS.1
    );
    stream.write_all(request.as_bytes()).expect("send");
    stream
}

/// Asks until one is taken.
fn until_taken(control: SocketAddr) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = profile(control, "?seconds=1");
        if answer.status == 200 {
            return;
        }
        assert_eq!(answer.code(), "profile_running", "{answer:?}");
        assert!(Instant::now() < deadline, "the place is never free");
    }
}

#[test]
fn it_needs_the_token_and_sensible_bounds_and_is_taken_by_one_at_a_time() {
    let dir = test_dir();
    let served = serve(dir.path(), Some("ops"));
    let control = served.control;
    let without = call(control, "GET", ROUTE, &[], "");
    assert_eq!(
        (without.status, without.code().as_str()),
        (401, "unauthorized")
    );
    for (query, names) in [
        ("?seconds=0", "seconds"),
        ("?seconds=61", "seconds"),
        ("?seconds=-1", "seconds"),
        ("?seconds=1&hz=0", "hz"),
        ("?seconds=1&hz=1000", "hz"),
        ("?seconds=1&hz=many", "hz"),
        ("?seconds=1&format=png", "format"),
        ("?seconds=1&herz=99", "herz"),
        ("?seconds=1&seconds=2", "seconds"),
    ] {
        let answer = profile(control, query);
        let detail = answer.json()["detail"].to_string();
        let code = match names {
            "herz" => "unknown_field",
            _ => "invalid_field",
        };
        assert_eq!(answer.code(), code, "{query}: {answer:?}");
        assert!(
            answer.status == 400 && detail.contains(names),
            "{query}: {detail}"
        );
    }

    // Which of two requests comes first is not known until one is refused.
    let deadline = Instant::now() + PATIENCE;
    let (first, second) = loop {
        let first = ask(control, "?seconds=60");
        let second = profile(control, "?seconds=1");
        if second.status == 409 {
            break (first, second);
        }
        assert!(Instant::now() < deadline, "never refused: {second:?}");
    };
    assert_eq!(second.code(), "profile_running");
    // A minute has not passed: it was the hang-up that ended the first.
    let hung_up = Instant::now();
    drop(first);
    until_taken(control);
    assert!(hung_up.elapsed() < Duration::from_secs(50));

    // And another one right after it.
    let answer = profile(control, "?seconds=1&hz=999");
    assert_eq!(answer.field("content-type"), Some("image/svg+xml"));
    assert!(text(&answer).contains("</svg>"));
    assert_eq!(answer.field("x-content-type-options"), Some("nosniff"));
    let policy = answer.field("content-security-policy").expect("a policy");
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
}

/// Tells the placing threads to stop, also when the test has failed.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Places waiting and acknowledged orders until told to stop; each must be answered as if nobody
/// were looking.
fn place_orders(data: SocketAddr, who: usize, stop: &AtomicBool, placed: &AtomicUsize) {
    let mut connection = Connection::open(data).expect("connect");
    while !stop.load(Ordering::Relaxed) {
        let number = placed.fetch_add(1, Ordering::Relaxed);
        let body = json!({ "user_id": format!("u{who}-{number}"), "sku_id": "A" }).to_string();
        let (prefer, status) = if number.is_multiple_of(2) {
            ("wait=5", 201)
        } else {
            ("respond-async", 202)
        };
        let fields = [("Content-Type", "application/json"), ("Prefer", prefer)];
        let answer = connection.send("POST", "/v1/orders", &fields, &body);
        let answer = answer.unwrap_or_else(|e| panic!("order {number}: {e}"));
        assert_eq!(answer.status, status, "order {number}: {answer:?}");
    }
}

#[test]
fn under_load_it_shows_coroutines_and_async_workers_and_every_order_is_answered() {
    let dir = test_dir();
    let served = serve(dir.path(), None);
    served.put_sku("A", 4_000_000_000);
    let (stop, placed) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (stop, placed) = (&stop, &placed);
        let _stop = StopOnDrop(stop);
        for who in 0..8 {
            scope.spawn(move || place_orders(served.data, who, stop, placed));
        }
        // From connection to order, from batch to rows.
        let wanted = [
            "millrace::http::data_plane::",
            "millrace::pipeline::orders::intake::",
            "millrace::pipeline::orders::worker::",
            "millrace::store::batch::",
        ];
        let deadline = Instant::now() + PATIENCE;
        let mut seen = String::new();
        while let Some(missing) = wanted.iter().find(|name| !seen.contains(**name)) {
            assert!(
                Instant::now() < deadline,
                "{missing} was not seen in:\n{seen}"
            );
            let answer = profile(served.control, "?seconds=1&hz=999&format=folded");
            assert_eq!(answer.status, 200, "{answer:?}");
            for line in text(&answer).lines() {
                let (stack, count) = line.rsplit_once(' ').expect("a stack and its count");
                assert!(
                    stack.contains(';') && count.parse::<u64>().is_ok(),
                    "{line}"
                );
            }
            seen.push_str(&text(&answer));
        }
        // A way through a coroutine is one stack, from its first function on.
        assert!(
            seen.lines().any(|line| {
                line.contains("millrace::http::data_plane::") && line.contains(";generator::")
            }),
            "{seen}"
        );
    });
    assert!(placed.load(Ordering::Relaxed) > 8);
    let audit = call(served.control, "GET", "/admin/v1/audit", &[], "").json();
    assert_eq!(audit["ok"], true, "{audit:#}");
    served.terminate();
    assert_eq!(served.wait(), Some(0), "nothing was left over");
}
