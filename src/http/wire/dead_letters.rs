//! The JSON of dead letters.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::json::{self, from_object};
use super::time::Time;
use crate::http::problem::Problem;
use crate::order::OrderId;
use crate::store::postgres::dead_letters::DeadLetter;

/// The optional body of requests that discard a dead letter.
#[derive(Debug, Default, Deserialize)]
pub struct NoteBody {
    /// The person's remark, at most 1,000 bytes.
    #[serde(default)]
    pub note: Option<String>,
}

impl NoteBody {
    /// Parses and checks a body; an empty one has no note.
    ///
    /// # Errors
    /// As [`super::orders::OrderBody::parse`].
    pub fn parse(body: &[u8]) -> Result<Self, Problem> {
        if body.is_empty() {
            return Ok(Self::default());
        }
        let body: Self = from_object(body)?;
        if body
            .note
            .as_ref()
            .is_some_and(|note| note.len() > 1_000 || note.contains('\0'))
        {
            return Err(Problem::new(
                400,
                "invalid_field",
                "note: must be at most 1000 bytes, without NUL",
            ));
        }
        Ok(body)
    }
}

/// A dead letter as operators see it.
#[derive(Debug, Serialize)]
pub struct DeadLetterView<'a> {
    id: i64,
    at: Time,
    order_id: OrderId,
    user_id: &'a str,
    sku_id: &'a str,
    quantity: u32,
    amount: i64,
    currency: &'a str,
    sqlstate: &'a str,
    reason: &'a str,
    attributes: Option<&'a RawValue>,
    discarded_at: Option<Time>,
    note: Option<&'a str>,
}

impl<'a> DeadLetterView<'a> {
    /// A stored dead letter.
    pub fn of(letter: &'a DeadLetter) -> Self {
        DeadLetterView {
            id: letter.id,
            at: Time(letter.at),
            order_id: letter.order_id,
            user_id: &letter.user_id,
            sku_id: &letter.sku_id,
            quantity: letter.quantity,
            amount: letter.amount,
            currency: &letter.currency,
            sqlstate: &letter.sqlstate,
            reason: &letter.reason,
            attributes: letter.attributes.as_deref().and_then(json::raw),
            discarded_at: letter.discarded_at.map(Time),
            note: letter.note.as_deref(),
        }
    }
}
