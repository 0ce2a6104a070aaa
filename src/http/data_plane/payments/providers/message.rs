//! Common parts of all providers' messages: header fields that come once, a date, and members that
//! may be missing, odd or too long without costing a payment.

use std::borrow::Cow;

use serde::de::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::{CallbackError, FRESHNESS_S};
use crate::http::message::Request;
use crate::http::wire;
use crate::http::wire::json::from_callback;
use crate::order::payment::{Payment, REFERENCE_BYTES_MAX};
use crate::order::{Currency, UnixMillis};

/// The value of a field that has to come exactly once, in visible ASCII and spaces.
pub fn field<'a>(request: &Request<'a>, name: &'static str) -> Result<&'a str, CallbackError> {
    let mut values = request.header_values(name);
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(CallbackError::BadSignature(
            "a header field is missing or comes twice",
        ));
    };
    std::str::from_utf8(value)
        .ok()
        .filter(|text| text.bytes().all(|byte| (b' '..=b'~').contains(&byte)))
        .ok_or(CallbackError::BadSignature("a header field is not ASCII"))
}

/// The time of a message dated `timestamp` (Unix seconds, digits), if it is fresh at `now`.
pub fn check_fresh(timestamp: &str, now: UnixMillis) -> Result<UnixMillis, CallbackError> {
    let digits = !timestamp.is_empty() && timestamp.bytes().all(|byte| byte.is_ascii_digit());
    let seconds: Option<i64> = timestamp.parse().ok().filter(|_| digits);
    let millis = seconds.and_then(|seconds| seconds.checked_mul(1_000));
    let Some(millis) = millis else {
        return Err(CallbackError::Malformed(
            "the timestamp is no number".into(),
        ));
    };
    let off_ms = now.0.saturating_sub(millis);
    if off_ms.unsigned_abs() > FRESHNESS_S.unsigned_abs() * 1_000 {
        return Err(CallbackError::Stale {
            off_s: off_ms / 1_000,
        });
    }
    Ok(UnixMillis(millis))
}

/// A signed time in RFC 3339; `None` if it is invalid, because it decides only whether a payment
/// came in time.
pub fn rfc3339(text: &str) -> Option<UnixMillis> {
    let time: jiff::Timestamp = text.parse().ok()?;
    signed_time(time.as_millisecond())
}

/// A signed time in Unix milliseconds; `None` if it cannot be one.
pub fn signed_time(millis: i64) -> Option<UnixMillis> {
    (millis > 0).then_some(UnixMillis(millis))
}

/// Reads JSON. An error names only its place: the parser's own words may quote values.
pub fn json<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, CallbackError> {
    from_callback(text).map_err(|error| {
        CallbackError::Malformed(format!(
            "{:?} error in its JSON at line {} column {}",
            error.classify(),
            error.line(),
            error.column()
        ))
    })
}

/// The same for the part of a message without which its payment cannot be booked.
pub fn payment_json<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, CallbackError> {
    json(text).map_err(|error| match error {
        CallbackError::Malformed(why) => CallbackError::Unbookable(why),
        error => error,
    })
}

/// A name that is required and kept whole: 1 to [`REFERENCE_BYTES_MAX`] bytes without NUL.
pub fn name(text: &str, what: &'static str) -> Result<String, CallbackError> {
    if text.is_empty() || text.len() > REFERENCE_BYTES_MAX || text.contains('\0') {
        return Err(CallbackError::Unbookable(format!(
            "{what} is missing, longer than {REFERENCE_BYTES_MAX} bytes, or has a NUL"
        )));
    }
    Ok(text.to_owned())
}

/// The provider's name for a message, with or without a payment.
pub fn event_id(
    text: &str,
    what: &'static str,
    payment: Option<&Payment>,
) -> Result<String, CallbackError> {
    name(text, what).map_err(|error| match (error, payment) {
        (CallbackError::Unbookable(why), None) => CallbackError::Malformed(why),
        (error, _) => error,
    })
}

/// A text for people, or an order reference that cannot be ours: cut to
/// [`REFERENCE_BYTES_MAX`] bytes. A NUL, which the database would refuse, is shown as U+FFFD.
pub fn cut(text: &str) -> String {
    let mut text = text.replace('\0', "\u{fffd}");
    text.truncate(text.floor_char_boundary(REFERENCE_BYTES_MAX));
    text
}

/// The content of a pass-back field, if it can be a receipt.
pub fn receipt(text: Option<&str>) -> Option<String> {
    text.filter(|text| {
        !text.is_empty() && text.len() <= REFERENCE_BYTES_MAX && !text.contains('\0')
    })
    .map(str::to_owned)
}

/// An amount in minor units, 0 or more.
pub fn amount(minor: Option<i64>) -> Result<i64, CallbackError> {
    minor
        .filter(|minor| *minor >= 0)
        .ok_or_else(|| CallbackError::Unbookable("its amount is missing or no whole number".into()))
}

/// A currency, in capitals or not.
pub fn currency(code: &str) -> Result<Currency, CallbackError> {
    Currency::new(&code.to_ascii_uppercase())
        .map_err(|_| CallbackError::Unbookable("its currency is missing or none".into()))
}

/// A string, or an integer that means its decimal string; anything else counts as missing.
#[derive(Debug, Default)]
pub struct Loose<'a>(Option<Cow<'a, str>>);

impl Loose<'_> {
    /// The text.
    pub fn get(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// The text; empty if there is none.
    pub fn text(&self) -> &str {
        self.get().unwrap_or_default()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Loose<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&'a RawValue>::deserialize(deserializer)?;
        Ok(Loose(wire::json::text(raw)))
    }
}

/// An integer; anything else counts as missing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Whole(pub Option<i64>);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?;
        let digits = wire::json::integer(raw.get());
        Ok(Whole(digits.and_then(|digits| digits.parse().ok())))
    }
}
