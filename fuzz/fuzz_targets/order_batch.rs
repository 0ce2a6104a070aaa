//! The lines of a batch on any bytes: a line is taken exactly if it is a single order's body, with a key of its own or
//! without one, and it then says the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::http::wire::{BatchLine, OrderBody, parse_key};
use millrace::order::IdempotencyKey;
use serde_json::Value;

fuzz_target!(|body: &[u8]| {
    for line in body.split(|byte| *byte == b'\n') {
        let alone = OrderBody::parse(line);
        let read = match BatchLine::parse(line) {
            Ok(read) => read,
            Err(problem) => {
                assert_eq!(problem.status, 400);
                let codes = [
                    "malformed_json",
                    "unknown_field",
                    "invalid_field",
                    "invalid_idempotency_key",
                ];
                assert!(codes.contains(&problem.code), "{}", problem.code);
                assert!(alone.is_err(), "{alone:?}");
                continue;
            }
        };
        match (alone, read.key) {
            (Ok(alone), None) => assert_eq!(alone, read.body),
            (Err(problem), Some(key)) => {
                assert_eq!(problem.code, "unknown_field");
                let members: Value = serde_json::from_slice(line).expect("JSON");
                // A number means its decimal string, which `Value` does not keep.
                if let Value::String(text) = &members["idempotency_key"] {
                    let parsed = parse_key(text).ok();
                    assert_eq!(parsed.map(IdempotencyKey::as_str), Some(&*key), "{text}");
                }
            }
            (Ok(_), Some(_)) => panic!("a single order has no key in its body"),
            (Err(problem), None) => {
                panic!("a line without a key is more than an order: {problem:?}")
            }
        }
    }
});
