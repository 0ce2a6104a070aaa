//! Whole connections on any bytes, through the engine's own loop: however the bytes are split on
//! their way and however little of the output the client takes at a time, the same requests get
//! the same answers in the same order, each is answered once, nothing follows a refusal, and the
//! loop never panics, spins, or waits for an event that would not come.

#![no_main]

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::hardened::CloseReason;
use millrace::http::server::hardened::framing::{Parsed, Sizes, header_slots, parse};
use millrace::http::server::hardened::scripted::{self, Ending};
use millrace::http::server::limits::{BodyLimits, BodyRule, Limits, Targets};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Small, so that the fuzzer finds the limits.
const SIZES: Sizes = Sizes {
    head_bytes_max: 512,
    bodies: BodyLimits {
        bytes_max: 100,
        rules: &[BodyRule {
            targets: Targets::Exactly("/v1/orders:batch"),
            bytes_max_least: 3_000,
            is_anonymous: false,
        }],
    },
};

fn limits() -> Limits {
    Limits {
        connections_max: 1,
        head_bytes_max: SIZES.head_bytes_max,
        bodies: SIZES.bodies,
        body_bytes_total_max: 1 << 20,
        request_timeout: Duration::from_secs(1),
        idle_timeout: Duration::from_secs(1),
    }
}

/// Answers with everything that it saw, values of fields in fields of its own.
#[derive(Default)]
struct Echo(AtomicUsize);

impl Service for Echo {
    fn call(&self, request: &Request<'_>, response: &mut Response) {
        self.0.fetch_add(1, Ordering::Relaxed);
        for header in request.headers {
            response.header("Echo", String::from_utf8_lossy(header.value));
        }
        echo(
            request.method,
            request.target,
            request.headers.len(),
            request.body,
            response.body_mut(),
        );
    }
}

fn echo(method: &str, target: &str, fields: usize, body: &[u8], out: &mut Vec<u8>) {
    let _ = write!(out, "{method} {target} {fields} ");
    out.extend_from_slice(body);
    if target == "/big" {
        out.resize(out.len() + 40_000, b'x');
    }
}

/// One answer, or what is expected of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    closes: bool,
    to_head: bool,
    /// None where only the status matters.
    body: Option<Vec<u8>>,
}

/// What the input deserves, read in one piece, and whether a part of a request is left over.
fn expected(mut rest: &[u8]) -> (Vec<Answer>, bool) {
    let mut answers = Vec::new();
    while !rest.is_empty() {
        let mut slots = header_slots();
        match parse(rest, &mut slots, &SIZES) {
            Parsed::Incomplete => return (answers, true),
            Parsed::Refused(error) => {
                answers.push(refusal(error.status()));
                return (answers, false);
            }
            Parsed::Complete(head) => {
                let total = head.head_bytes + head.body_bytes;
                let Some(body) = rest.get(head.head_bytes..total) else {
                    return (answers, true);
                };
                let to_head = head.method == "HEAD";
                let method = if to_head { "GET" } else { head.method };
                let mut echoed = Vec::new();
                echo(method, &head.target, head.headers.len(), body, &mut echoed);
                answers.push(Answer {
                    status: 200,
                    closes: !head.keep_alive,
                    to_head,
                    body: Some(echoed),
                });
                if !head.keep_alive {
                    return (answers, false);
                }
                rest = &rest[total..];
            }
        }
    }
    (answers, false)
}

fn refusal(status: u16) -> Answer {
    Answer {
        status,
        closes: true,
        to_head: false,
        body: None,
    }
}

/// The answers in `output`, cut by their own lengths; `to_head` tells which have no body.
fn answers(mut output: &[u8], to_head: &[bool]) -> Vec<Answer> {
    let mut found: Vec<Answer> = Vec::new();
    let mut continued = false;
    while !output.is_empty() {
        let end = output
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .expect("a whole head");
        let head = std::str::from_utf8(&output[..end]).expect("ASCII");
        output = &output[end + 4..];
        let mut lines = head.split("\r\n");
        let status = lines.next().expect("a status line");
        let status: u16 = status
            .strip_prefix("HTTP/1.1 ")
            .and_then(|text| text.get(..3)?.parse().ok())
            .expect("a status");
        if status == 100 {
            assert_eq!(lines.next(), None);
            assert!(!continued, "told to continue twice");
            continued = true;
            continue;
        }
        continued = false;
        let (mut length, mut closes, mut dates) = (None, false, 0);
        for line in lines {
            let (name, value) = line.split_once(": ").expect("a field");
            match name {
                "Content-Length" => {
                    assert_eq!(
                        length.replace(value.parse::<usize>().expect("a length")),
                        None
                    );
                }
                "Connection" => closes = value == "close",
                "Date" => dates += 1,
                "Content-Type" | "Echo" => {}
                _ => panic!("a field out of nowhere: {line:?}"),
            }
        }
        assert_eq!(dates, 1);
        let to_head = to_head.get(found.len()).copied().unwrap_or(false);
        let length = length.expect("every answer here has a length");
        let body = if to_head {
            Vec::new()
        } else {
            assert!(output.len() >= length, "an answer is cut short");
            let (body, rest) = output.split_at(length);
            output = rest;
            body.to_vec()
        };
        found.push(Answer {
            status,
            closes,
            to_head,
            body: Some(body),
        });
    }
    found
}

fn check(pieces: &[&[u8]], takes: &[usize], ending: Ending, due: &[Answer], partial: bool) {
    let service = Echo::default();
    let scripted = scripted::run(&service, limits(), pieces, takes, ending);
    let to_head: Vec<bool> = due.iter().map(|answer| answer.to_head).collect();
    let got = answers(&scripted.output, &to_head);
    let served = got.iter().filter(|answer| answer.status == 200).count();
    assert_eq!(
        service.0.load(Ordering::Relaxed),
        served,
        "one answer a request"
    );

    let late = partial && ending == Ending::Silence;
    let mut due = due.to_vec();
    if late {
        due.push(refusal(408));
    }
    assert_eq!(got.len(), due.len(), "{pieces:?}: {got:?} for {due:?}");
    for (got, due) in got.iter().zip(&due) {
        // A head that is wrong and has no end may be found late before it is found wrong.
        let either = ending == Ending::Silence && got.status == 408 && due.status >= 400;
        assert!(got.status == due.status || either, "{got:?} for {due:?}");
        assert_eq!(got.closes, due.closes, "{got:?}");
        if let Some(body) = due.body.as_ref().filter(|_| !due.to_head) {
            assert_eq!(got.body.as_ref(), Some(body));
        }
    }
    let closing = got.iter().position(|answer| answer.closes);
    assert!(
        closing.is_none_or(|at| at + 1 == got.len()),
        "said more after the end"
    );
    match scripted.reason {
        CloseReason::Refused => assert!(got.last().is_some_and(|last| last.status >= 400)),
        CloseReason::RequestTimeout => assert!(got.last().is_some_and(|last| last.status == 408)),
        CloseReason::Finished => assert!(got.last().is_some_and(|last| last.closes)),
        CloseReason::PeerClosed => assert!(closing.is_none()),
        other => panic!("ended by {other:?}"),
    }
}

fuzz_target!(|input: &[u8]| {
    let (due, partial) = expected(input);
    for ending in [Ending::Apart, Ending::Together, Ending::Silence] {
        check(&[input], &[], ending, &due, partial);
    }
    if input.len() <= 1_000 {
        let bytes: Vec<&[u8]> = input.chunks(1).collect();
        check(&bytes, &[], Ending::Apart, &due, partial);
    }
    // The same input is split at the same places again, so that a finding can be repeated.
    let seed = input.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut random = SmallRng::seed_from_u64(seed);
    for ending in [Ending::Apart, Ending::Together, Ending::Silence] {
        let mut pieces = Vec::new();
        let mut rest = input;
        let longest = random.random_range(1..=input.len().max(1));
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(random.random_range(1..=longest).min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        let takes: Vec<usize> = (0..random.random_range(0..4))
            .map(|_| random.random_range(1..2_000))
            .collect();
        check(&pieces, &takes, ending, &due, partial);
    }
});
