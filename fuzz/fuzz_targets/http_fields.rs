//! The fields of a head that decide about an order or admit an operator, on any bytes; the first byte chooses which, and a line
//! break ends a field. A second, naive reader of each field's RFC, byte by byte, comes to the same.

#![no_main]

use std::net::IpAddr;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use millrace::http::control_plane::cookies;
use millrace::http::origin::SiteFields;
use millrace::http::tokens::Tokens;
use millrace::http::wire::{Preference, idempotency_key, require_identity};

/// RFC 7240 2 with the lists of RFC 9110 5.6.1: elements end at a comma, what counts of each at a semicolon, and a quoted
/// string has neither.
fn preference(fields: &[&[u8]]) -> Preference {
    let mut found = Preference::default();
    for field in fields {
        if std::str::from_utf8(field).is_err() {
            continue;
        }
        let (mut items, mut item) = (Vec::new(), Vec::new());
        let (mut in_string, mut in_parameters) = (false, false);
        let mut bytes = field.iter().copied();
        while let Some(byte) = bytes.next() {
            match byte {
                b',' if !in_string => {
                    items.push(std::mem::take(&mut item));
                    in_parameters = false;
                    continue;
                }
                b';' if !in_string => in_parameters = true,
                b'"' => in_string = !in_string,
                b'\\' if in_string => {
                    if !in_parameters {
                        item.push(byte);
                        item.extend(bytes.next());
                    } else {
                        bytes.next();
                    }
                    continue;
                }
                _ => {}
            }
            if !in_parameters {
                item.push(byte);
            }
        }
        items.push(item);
        for item in items {
            let equals = item.iter().position(|byte| *byte == b'=');
            let (name, value) = item.split_at(equals.unwrap_or(item.len()));
            let value = value.get(1..).unwrap_or_default().trim_ascii();
            match name.trim_ascii().to_ascii_lowercase().as_slice() {
                b"respond-async" => found.respond_async = true,
                b"wait" if found.wait.is_none() => {
                    let digits = match value {
                        [b'"', text @ .., b'"'] => text,
                        text => text,
                    };
                    found.wait = number(digits).map(Duration::from_secs);
                }
                _ => {}
            }
        }
    }
    found
}

/// The number that digits alone write, if it fits.
fn number(digits: &[u8]) -> Option<u64> {
    let mut number: u128 = 0;
    for digit in digits {
        number = number * 10 + u128::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
        u64::try_from(number).ok()?;
    }
    (!digits.is_empty()).then_some(number as u64)
}

fn key(fields: &[&[u8]]) {
    let visible = |field: &[u8]| {
        (1..=64).contains(&field.len()) && field.iter().all(|byte| (0x21..0x7f).contains(byte))
    };
    match idempotency_key(fields.iter().copied()) {
        Ok(None) => assert!(fields.is_empty()),
        Ok(Some(key)) => {
            assert_eq!(fields, [key.as_str().as_bytes()]);
            assert!(visible(fields[0]));
        }
        Err(problem) => {
            assert_eq!(
                (problem.status, problem.code),
                (400, "invalid_idempotency_key")
            );
            assert!(fields.len() > 1 || !visible(fields[0]));
        }
    }
}

fn coding(fields: &[&[u8]]) {
    let joined = fields.join(&b',').to_ascii_lowercase();
    let plain = joined.split(|byte| *byte == b',').all(|one| {
        let one = one.trim_ascii();
        one.is_empty() || one == b"identity"
    });
    match require_identity(fields.iter().copied()) {
        Ok(()) => assert!(plain),
        Err(problem) => {
            assert_eq!(problem.status, 415);
            assert!(!plain);
        }
    }
}

/// `Host`, `Origin`, `Sec-Fetch-Site`, each empty if it did not come.
fn site(fields: &[&[u8]]) {
    let field = |at: usize| fields.get(at).copied().filter(|field| !field.is_empty());
    let (host, origin, sec_fetch_site) = (field(0), field(1), field(2));
    let site = SiteFields {
        host,
        origin,
        sec_fetch_site,
    };
    let allowed = match site.check_host() {
        Ok(()) => true,
        Err(problem) => {
            assert_eq!((problem.status, problem.code), (421, "misdirected"));
            false
        }
    };
    if let Some(host) = host {
        // A name or an address, then perhaps a colon and digits.
        let without_port = || {
            let end = host.iter().rposition(|byte| *byte == b':')?;
            host[end + 1..]
                .iter()
                .all(u8::is_ascii_digit)
                .then_some(&host[..end])
        };
        let is_ours = |name: &[u8]| {
            let bare = match name {
                [b'[', address @ .., b']'] => address,
                name => name,
            };
            let address = std::str::from_utf8(bare)
                .ok()
                .and_then(|text| text.parse::<IpAddr>().ok());
            name.eq_ignore_ascii_case(b"localhost")
                || address.is_some_and(|address| match address {
                    IpAddr::V4(address) => address.octets()[0] == 127,
                    IpAddr::V6(address) => u128::from(address) == 1,
                })
        };
        assert_eq!(allowed, is_ours(without_port().unwrap_or(host)));
    } else {
        assert!(allowed);
    }
    let same = match (sec_fetch_site, origin) {
        (Some(site), _) => site == b"same-origin" || site == b"none",
        (None, None) => true,
        (None, Some(origin)) => ["http", "https"].iter().any(|scheme| {
            let ours = [scheme.as_bytes(), b"://", host.unwrap_or_default()].concat();
            host.is_some() && origin == ours
        }),
    };
    match site.check_site() {
        Ok(()) => assert!(same),
        Err(problem) => {
            assert_eq!((problem.status, problem.code), (403, "cross_origin"));
            assert!(!same);
        }
    }
}

fn token(fields: &[&[u8]]) {
    let tokens = Tokens::new(&["secret".to_owned(), "other".to_owned()]);
    let field = fields.first().copied();
    let right = field.is_some_and(|field| {
        let (scheme, token) = field.split_at_checked(7).unwrap_or_default();
        let token = token.trim_ascii();
        scheme.eq_ignore_ascii_case(b"bearer ") && (token == b"secret" || token == b"other")
    });
    assert_eq!(tokens.allow(field), right);
    assert!(Tokens::default().allow(field));
}

/// RFC 6265 4.2.1: pairs end at a semicolon, blanks around them count for nothing, a name ends at the first `=`, and quotes
/// belong to the value.
fn session(fields: &[&[u8]]) {
    let mut due: Vec<Vec<u8>> = Vec::new();
    for field in fields {
        let (mut name, mut value): (Vec<u8>, Option<Vec<u8>>) = (Vec::new(), None);
        for byte in field.iter().copied().chain([b';']) {
            match (byte, &mut value) {
                (b';', _) => {
                    if let Some(mut value) = value.take()
                        && name == b"millrace_session"
                    {
                        while value.last().is_some_and(u8::is_ascii_whitespace) {
                            value.pop();
                        }
                        due.push(value);
                    }
                    name.clear();
                }
                (b'=', None) => value = Some(Vec::new()),
                (byte, None) if byte.is_ascii_whitespace() && name.is_empty() => {}
                (byte, None) => name.push(byte),
                (byte, Some(value)) => value.push(byte),
            }
        }
    }
    let found: Vec<&[u8]> = cookies(fields.iter().copied()).collect();
    assert_eq!(found, due);
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    let fields: Vec<&[u8]> = match rest {
        [] => Vec::new(),
        rest => rest.split(|byte| *byte == b'\n').collect(),
    };
    match kind.wrapping_sub(b'A') % 6 {
        0 => assert_eq!(
            Preference::parse(fields.iter().copied()),
            preference(&fields),
        ),
        1 => key(&fields),
        2 => coding(&fields),
        3 => site(&fields),
        4 => token(&fields),
        _ => session(&fields),
    }
});
