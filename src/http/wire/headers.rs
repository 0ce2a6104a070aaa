//! Header fields of requests to both planes.

use std::fmt;

use crate::http::problem::Problem;
use crate::order::IdempotencyKey;

/// The `Idempotency-Key` of a request, from all fields of that name.
///
/// # Errors
/// `400 invalid_idempotency_key`.
pub fn idempotency_key<'a>(
    mut fields: impl Iterator<Item = &'a [u8]>,
) -> Result<Option<IdempotencyKey<'a>>, Problem> {
    let Some(field) = fields.next() else {
        return Ok(None);
    };
    if fields.next().is_some() {
        return Err(invalid_key("came more than once"));
    }
    let text = std::str::from_utf8(field).map_err(|_| invalid_key("must be visible ASCII"))?;
    parse_key(text).map(Some)
}

/// Parses an idempotency key.
///
/// # Errors
/// `400 invalid_idempotency_key`.
pub fn parse_key(text: &str) -> Result<IdempotencyKey<'_>, Problem> {
    IdempotencyKey::new(text).map_err(invalid_key)
}

/// Refuses an encoded body. `fields`: every `Content-Encoding`.
///
/// # Errors
/// `415 unsupported_media_type`.
pub fn require_identity<'a>(fields: impl Iterator<Item = &'a [u8]>) -> Result<(), Problem> {
    for coding in fields.flat_map(|field| field.split(|byte| *byte == b',')) {
        let coding = coding.trim_ascii();
        if !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity") {
            let detail = "Content-Encoding: send the body as it is; no coding is decoded here";
            return Err(Problem::new(415, "unsupported_media_type", detail));
        }
    }
    Ok(())
}

/// Refuses an `Idempotency-Key` of a whole batch: each line has its own.
///
/// # Errors
/// `400 invalid_idempotency_key`.
pub fn no_batch_key(has_key: bool) -> Result<(), Problem> {
    if has_key {
        return Err(invalid_key(
            "a batch takes none; give each line its own \"idempotency_key\"",
        ));
    }
    Ok(())
}

fn invalid_key(what: impl fmt::Display) -> Problem {
    Problem::new(
        400,
        "invalid_idempotency_key",
        format!("Idempotency-Key: {what}"),
    )
}
