//! The JSON of sinks of events and of their dead letters.

use serde::Serialize;
use serde_json::value::RawValue;

use super::json;
use super::time::Time;
use crate::http::problem::Problem;
use crate::order::OrderId;
use crate::pipeline::events::status::{Shared, Sinks};
use crate::store::events::deliveries::Delivery;

/// A sink as operators see it.
#[derive(Debug, Serialize)]
pub struct SinkView {
    name: String,
    to: String,
    state: &'static str,
    /// Why it gets no events.
    reason: Option<String>,
    /// When the newest change that it has got was committed.
    place_at: Option<Time>,
    kept_bytes: u64,
    behind_ms: u64,
    waiting: u64,
    dead_letters: u64,
}

impl SinkView {
    /// The sinks of this process.
    pub fn all(sinks: &Sinks) -> Vec<Self> {
        sinks.0.iter().map(Self::of).collect()
    }

    fn of(sink: &Shared) -> Self {
        let status = sink.get();
        let (state, reason) = if status.disabled.is_some() {
            ("disabled", status.disabled)
        } else if status.is_elsewhere {
            ("elsewhere", None)
        } else if let Some((reason, _)) = status.failure {
            ("failing", Some(reason))
        } else if status.is_refilling {
            ("refilling", None)
        } else if !status.is_listening {
            let reason = "its replication slot is not there yet, and events begin with it; PostgreSQL makes it once \
                          every transaction that is open has ended";
            ("starting", Some(reason.to_owned()))
        } else if status.has_delivered {
            ("delivering", None)
        } else {
            ("idle", None)
        };
        SinkView {
            name: sink.name.clone(),
            to: sink.title.clone(),
            state,
            reason,
            place_at: status.place_at.map(Time),
            kept_bytes: status.kept_bytes,
            behind_ms: status.behind_ms,
            waiting: status.waiting,
            dead_letters: status.dead_letters,
        }
    }
}

/// A dead letter of a sink.
#[derive(Debug, Serialize)]
pub struct EventDeadLetterView<'a> {
    id: i64,
    sink: &'a str,
    event_id: &'a str,
    r#type: &'a str,
    attempts: i32,
    first_failed_at: Time,
    /// When it became a dead letter; `null` once it is to be delivered again.
    dead_at: Option<Time>,
    reason: &'a str,
    event: Option<&'a RawValue>,
}

impl<'a> EventDeadLetterView<'a> {
    /// A stored dead letter.
    pub fn of(letter: &'a Delivery) -> Self {
        EventDeadLetterView {
            id: letter.id,
            sink: &letter.sink,
            event_id: &letter.event_id,
            r#type: &letter.kind,
            attempts: letter.attempts,
            first_failed_at: Time(letter.first_failed_at),
            dead_at: letter.dead_at.map(Time),
            reason: &letter.last_error,
            event: json::raw(&letter.body),
        }
    }
}

/// Reads the query field `after` of a resync: an order's id, or 0 for all; without it the sink's place counts.
///
/// # Errors
/// A `400` problem.
pub fn resync_after(text: Option<&str>) -> Result<Option<Option<OrderId>>, Problem> {
    match text {
        None => Ok(None),
        Some("0") => Ok(Some(None)),
        Some(text) => match OrderId::parse(text) {
            Some(id) => Ok(Some(Some(id))),
            None => Err(Problem::new(
                400,
                "invalid_field",
                "after: must be an order's id, or 0 for all orders",
            )),
        },
    }
}
