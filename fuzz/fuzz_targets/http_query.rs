//! Query strings on any text: what is let through says nothing that is then left out, so a second, naive reader finds each
//! field once and with the same value; a number is the one that its digits write.

#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use millrace::http::wire::query;

const NAMES: &[&str] = &["wait", "limit", "only"];

/// Each name with its values, in order.
fn fields(query: &str) -> BTreeMap<String, Vec<String>> {
    let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let mut name = pair.to_owned();
        let value = match pair.find('=') {
            Some(at) => name.split_off(at).split_off(1),
            None => String::new(),
        };
        fields.entry(name).or_default().push(value);
    }
    fields
}

fuzz_target!(|query: &str| {
    let fields = fields(query);
    for name in NAMES {
        let first = fields.get(*name).and_then(|values| values.first());
        assert_eq!(query::value(query, name), first.map(String::as_str));
        let digits = |text: &str| {
            let is_plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let significant = text.trim_start_matches('0');
            // No number of 40 digits fits.
            let number = format!("0{significant}").parse::<u128>().ok();
            number
                .filter(|_| is_plain)
                .and_then(|n| u64::try_from(n).ok())
        };
        match query::number(query, name) {
            Ok(None) => assert!(first.is_none()),
            Ok(Some(number)) => assert_eq!(digits(first.expect("it came")), Some(number)),
            Err(problem) => {
                assert_eq!((problem.status, problem.code), (400, "invalid_field"));
                assert_eq!(digits(first.expect("it came")), None);
            }
        }
    }
    let is_known = fields.keys().all(|name| NAMES.contains(&name.as_str()));
    let is_once = fields.values().all(|values| values.len() == 1);
    match query::only(query, NAMES) {
        Ok(()) => assert!(is_known && is_once),
        Err(problem) => {
            assert_eq!(problem.status, 400);
            match problem.code {
                "unknown_field" => assert!(!is_known),
                "invalid_field" => assert!(!is_once),
                code => panic!("{code}"),
            }
        }
    }
    assert_eq!(query::only(query, &[]).is_ok(), fields.is_empty());
});
