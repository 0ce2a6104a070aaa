//! `OrderBody::parse` on any bytes: it never panics, what it accepts is within API.md's limits,
//! what it refuses is a `400` with a code of API.md, and what it accepted, written out again,
//! parses to the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::http::wire::{ATTRIBUTES_BYTES_MAX, OrderBody};
use serde_json::Value;

fuzz_target!(|bytes: &[u8]| {
    let body = match OrderBody::parse(bytes) {
        Ok(body) => body,
        Err(problem) => {
            assert_eq!(problem.status, 400);
            assert!(
                ["malformed_json", "unknown_field", "invalid_field"].contains(&problem.code),
                "{}",
                problem.code
            );
            return;
        }
    };
    let visible = |text: &str, max| {
        (1..=max).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
    };
    assert!(visible(body.user_id.as_str(), 48));
    assert!(visible(body.sku_id.as_str(), 32));
    assert!((1..=10_000).contains(&body.quantity.get()));
    if let Some(attributes) = body.attributes {
        assert!(attributes.len() <= ATTRIBUTES_BYTES_MAX);
        assert!(attributes.starts_with('{') && attributes.ends_with('}'));
        // What came is kept to the byte.
        assert!(
            bytes
                .windows(attributes.len())
                .any(|part| part == attributes.as_bytes())
        );
    }
    let text = |text: &str| Value::from(text).to_string();
    let mut again = format!(
        r#"{{"user_id":{},"sku_id":{},"quantity":{},"adjustment":{}"#,
        text(body.user_id.as_str()),
        text(body.sku_id.as_str()),
        body.quantity.get(),
        body.adjustment,
    );
    if let Some(attributes) = body.attributes {
        again.push_str(",\"attributes\":");
        again.push_str(attributes);
    }
    again.push('}');
    let reread = OrderBody::parse(again.as_bytes());
    assert_eq!(reread.ok().as_ref(), Some(&body), "{again}");
});
