//! The head parser on any bytes: it never panics; a head that it accepts is framed beyond doubt,
//! as a second, naive reader confirms; and however the bytes arrive, the outcome is the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::http::server::hardened::framing::{
    FramingError, HEADERS_MAX, Parsed, Sizes, header_slots, may_be_complete, parse,
};
use millrace::http::server::limits::{BodyLimits, BodyRule, Targets};

/// Small, so that the fuzzer finds the limits.
const SIZES: Sizes = Sizes {
    head_bytes_max: 512,
    bodies: BodyLimits {
        bytes_max: 100,
        rules: &[BodyRule {
            targets: Targets::Exactly("/v1/orders:batch"),
            bytes_max_least: 1_000,
            is_anonymous: false,
        }],
    },
};

/// The outcome of a parse without its borrows.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Incomplete,
    Complete {
        head_bytes: usize,
        body_bytes: usize,
        target: String,
        keep_alive: bool,
        expects_continue: bool,
    },
    Refused(FramingError),
}

fn outcome(input: &[u8]) -> Told {
    let mut slots = header_slots();
    match parse(input, &mut slots, &SIZES) {
        Parsed::Incomplete => Told::Incomplete,
        Parsed::Refused(error) => {
            assert!((400..600).contains(&error.status()));
            assert!(!error.code().is_empty());
            Told::Refused(error)
        }
        Parsed::Complete(head) => {
            assert!(head.headers.len() <= HEADERS_MAX);
            assert!(head.body_bytes <= SIZES.bodies.bytes_max(&head.target));
            assert!(head.target.starts_with('/') || head.target == "*");
            assert!(!head.expects_continue || head.body_bytes > 0);
            check_naively(
                input
                    .get(..head.head_bytes)
                    .expect("the head lies within the input"),
                head.method,
                head.body_bytes,
                head.http_1_0,
            );
            Told::Complete {
                head_bytes: head.head_bytes,
                body_bytes: head.body_bytes,
                target: head.target.into_owned(),
                keep_alive: head.keep_alive,
                expects_continue: head.expects_continue,
            }
        }
    }
}

/// What any other reader of RFC 9112 would make of an accepted head.
fn check_naively(head: &[u8], method: &str, body_bytes: usize, http_1_0: bool) {
    assert!(head.len() <= SIZES.head_bytes_max);
    assert!(head.ends_with(b"\r\n\r\n"));
    assert!(!head.contains(&0));
    let text = String::from_utf8_lossy(head);
    for (at, byte) in head.iter().enumerate() {
        match byte {
            b'\n' => assert_eq!(
                at.checked_sub(1).map(|before| head[before]),
                Some(b'\r'),
                "{text:?}"
            ),
            b'\r' => assert_eq!(head.get(at + 1), Some(&b'\n'), "{text:?}"),
            _ => {}
        }
    }
    let mut lines = text.split("\r\n").skip_while(|line| line.is_empty());
    let request_line: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    assert_eq!(request_line.len(), 3, "{text:?}");
    assert_eq!(request_line[0], method);
    assert_eq!(
        request_line[2],
        if http_1_0 { "HTTP/1.0" } else { "HTTP/1.1" }
    );

    let (mut hosts, mut lengths) = (0, Vec::new());
    let mut ended = false;
    for line in lines {
        if line.is_empty() {
            ended = true;
            continue;
        }
        assert!(!ended, "a line follows the empty one: {text:?}");
        assert!(!line.starts_with([' ', '\t']), "a folded line: {text:?}");
        let (name, value) = line.split_once(':').expect("a field has a colon");
        assert!(
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()),
            "{text:?}"
        );
        match name.to_ascii_lowercase().as_str() {
            "host" => hosts += 1,
            "content-length" => lengths.push(value.trim().to_owned()),
            "transfer-encoding" => panic!("Transfer-Encoding was let through: {text:?}"),
            _ => {}
        }
    }
    assert!(hosts == 1 || (hosts == 0 && http_1_0), "{text:?}");
    match lengths.as_slice() {
        [] => assert_eq!(body_bytes, 0, "{text:?}"),
        [digits] => {
            assert!(!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()));
            assert_eq!(digits.parse(), Ok(body_bytes), "{text:?}");
        }
        _ => panic!("Content-Length was let through twice: {text:?}"),
    }
}

fuzz_target!(|input: &[u8]| {
    let whole = outcome(input);
    // Every prefix is as good a place to split as any; beyond the limit nothing new happens.
    let mut refused_at = None;
    for length in 0..=input.len().min(SIZES.head_bytes_max + 64) {
        let told = outcome(&input[..length]);
        match (&told, &whole) {
            (Told::Complete { head_bytes, .. }, _) => {
                assert!(*head_bytes <= length);
                assert_eq!(told, whole, "what came later changed a complete head");
            }
            (Told::Incomplete, Told::Complete { head_bytes, .. }) => assert!(length < *head_bytes),
            (Told::Incomplete, _) => assert!(length < SIZES.head_bytes_max),
            (Told::Refused(_), Told::Refused(_)) => {
                refused_at.get_or_insert(length);
            }
            (Told::Refused(_), _) => {
                panic!("refused at {length} of {}, then {whole:?}", input.len())
            }
        }
        assert!(
            refused_at.is_none() || matches!(told, Told::Refused(_)),
            "a refused head was taken back at {length}"
        );
    }
    // A reader that looks for the empty line first, as the connection does, misses no head: at
    // its last byte it is found, wherever the search had come to.
    if let Told::Complete { head_bytes, .. } = whole {
        for from in 0..head_bytes {
            assert!(may_be_complete(&input[..head_bytes], from), "{from}");
            assert!(may_be_complete(input, from), "{from}");
        }
    }
});
