//! The answer to each request.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::arrival::Arrival;
use super::request_template::RequestTemplate;
use super::sender::Fault;

/// The answers of the contract, as a buyer sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerKind {
    /// `201`: placed and persisted.
    Created,
    /// `202`: placed and durable in the queue.
    Accepted,
    /// `202` with status `waitlisted`: it waits for units.
    Waitlisted,
    /// `200`: the order that an earlier request under the same key placed.
    Replayed,
    /// `202` with status `undecided`: settled later, see the follow-up.
    Undecided,
    /// `409 sold_out`.
    SoldOut,
    /// `409` for another reason, such as `purchase_limit` or `sale_not_open`.
    Refused,
    /// `429`.
    RateLimited,
    /// `503`: overloaded, draining and the like.
    Unavailable,
    /// `504`: not placed, the wait ran out.
    TimedOut,
    /// Any other `4xx`.
    ClientError,
    /// Any other `5xx`.
    ServerError,
    /// No answer: see the codes `connect`, `not_sent`, `timeout`, `closed` and `bad_answer`.
    Transport,
}

impl AnswerKind {
    /// How many kinds there are.
    pub(super) const COUNT: usize = Self::ALL.len();

    /// Every kind, in the order of a table: good news first.
    pub const ALL: [Self; 13] = [
        Self::Created,
        Self::Accepted,
        Self::Waitlisted,
        Self::Replayed,
        Self::Undecided,
        Self::SoldOut,
        Self::Refused,
        Self::RateLimited,
        Self::Unavailable,
        Self::TimedOut,
        Self::ClientError,
        Self::ServerError,
        Self::Transport,
    ];

    /// The name that `--json` uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Accepted => "accepted",
            Self::Waitlisted => "waitlisted",
            Self::Replayed => "replayed",
            Self::Undecided => "undecided",
            Self::SoldOut => "sold_out",
            Self::Refused => "refused",
            Self::RateLimited => "rate_limited",
            Self::Unavailable => "unavailable",
            Self::TimedOut => "timed_out",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::Transport => "transport",
        }
    }

    /// The name that people read.
    pub fn label(self) -> &'static str {
        match self {
            Self::Created => "201 placed",
            Self::Accepted => "202 accepted",
            Self::Waitlisted => "202 waitlisted",
            Self::Replayed => "200 replayed",
            Self::Undecided => "202 undecided",
            Self::SoldOut => "409 sold out",
            Self::Refused => "409 refused",
            Self::RateLimited => "429 rate limited",
            Self::Unavailable => "503 unavailable",
            Self::TimedOut => "504 timed out",
            Self::ClientError => "4xx other",
            Self::ServerError => "5xx other",
            Self::Transport => "no answer",
        }
    }

    /// Whether the request placed an order of its own that has its units.
    pub fn is_placed(self) -> bool {
        matches!(self, Self::Created | Self::Accepted)
    }

    /// Whether the buyer was refused.
    pub fn is_refused(self) -> bool {
        matches!(self, Self::SoldOut | Self::Refused)
    }

    /// Whether it is a failure, not an outcome of a sale.
    pub fn is_error(self) -> bool {
        matches!(
            self,
            Self::TimedOut | Self::ClientError | Self::ServerError | Self::Transport
        )
    }

    /// The kind's place in [`AnswerKind::ALL`].
    pub(super) fn place(self) -> usize {
        self as usize
    }
}

/// An answer to `POST /v1/orders`, or the fault in place of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub http_status: u16,
    pub kind: AnswerKind,
    /// The order's `status`, the problem's `code`, or the fault's name.
    pub code: SmolStr,
    pub order_id: Option<u64>,
    pub replayed: bool,
}

#[derive(Deserialize)]
struct OrderBody<'a> {
    #[serde(borrow)]
    order_id: Cow<'a, str>,
    #[serde(borrow)]
    status: Cow<'a, str>,
}

#[derive(Deserialize)]
struct ProblemBody<'a> {
    #[serde(borrow, default)]
    code: Cow<'a, str>,
}

impl Answer {
    /// Stands for an answer that never came.
    pub(super) fn fault(fault: Fault) -> Self {
        Self {
            http_status: 0,
            kind: AnswerKind::Transport,
            code: SmolStr::new_static(fault.name()),
            order_id: None,
            replayed: false,
        }
    }

    /// Reads an answer to `POST /v1/orders` by the contract.
    pub(super) fn read(http_status: u16, replayed: bool, body: &[u8]) -> Self {
        if matches!(http_status, 200..=202) {
            let order = serde_json::from_slice::<OrderBody>(body)
                .ok()
                .and_then(|order| Some((order.order_id.parse::<u64>().ok()?, order.status)));
            let Some((order_id, state)) = order else {
                return Self {
                    http_status,
                    ..Self::fault(Fault::BadAnswer)
                };
            };
            let kind = match http_status {
                _ if state == "undecided" => AnswerKind::Undecided,
                202 if state == "waitlisted" => AnswerKind::Waitlisted,
                201 => AnswerKind::Created,
                202 => AnswerKind::Accepted,
                _ => AnswerKind::Replayed,
            };
            return Self {
                http_status,
                kind,
                code: SmolStr::from(state),
                order_id: Some(order_id),
                replayed: replayed || http_status == 200,
            };
        }
        let code = serde_json::from_slice::<ProblemBody>(body)
            .map_or_else(|_| SmolStr::default(), |p| SmolStr::from(p.code));
        let kind = match http_status {
            409 if code == "sold_out" => AnswerKind::SoldOut,
            409 => AnswerKind::Refused,
            429 => AnswerKind::RateLimited,
            503 => AnswerKind::Unavailable,
            504 => AnswerKind::TimedOut,
            400..=499 => AnswerKind::ClientError,
            500..=599 => AnswerKind::ServerError,
            _ => {
                return Self {
                    http_status,
                    ..Self::fault(Fault::BadAnswer)
                };
            }
        };
        Self {
            http_status,
            kind,
            code,
            order_id: None,
            replayed,
        }
    }
}

/// One request with its answer, for a comparison with the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome<'a> {
    /// The `user_id` of the request.
    pub user: SmolStr,
    /// The `Idempotency-Key` of the request.
    pub key: Option<SmolStr>,
    /// The `sku_id` of the request.
    pub sku: &'a str,
    /// Whether this was the second request of a double click.
    pub double_click: bool,
    /// When the request was due, in nanoseconds after the start.
    pub scheduled_ns: u64,
    /// From that moment to the whole answer, in nanoseconds.
    pub latency_ns: u64,
    /// The status line's code; 0 if no answer came.
    pub http_status: u16,
    /// The answer's kind.
    pub kind: AnswerKind,
    /// The order's `status`, the problem's `code`, or why there was no answer.
    pub code: &'a str,
    /// The order that the answer names.
    pub order_id: Option<u64>,
    /// Whether the answer repeats an earlier request's order.
    pub replayed: bool,
    /// The final status of an `undecided` order, `unknown_order` if it has no row; none if the server could
    /// not say.
    pub final_status: Option<&'a str>,
}

/// Every request with its answer, in a compact form.
#[derive(Debug, Clone)]
pub struct Outcomes {
    template: Arc<RequestTemplate>,
    rows: Vec<Row>,
    codes: Codes,
}

impl Outcomes {
    /// Joins the records of the threads, in the order in which requests were due.
    pub(super) fn join(template: Arc<RequestTemplate>, parts: Vec<(Vec<Row>, Codes)>) -> Self {
        let mut codes = Codes::default();
        let mut rows = Vec::with_capacity(parts.iter().map(|(rows, _)| rows.len()).sum());
        for (part, names) in parts {
            let places: Vec<u16> = names.names.iter().map(|name| codes.place(name)).collect();
            rows.extend(part.into_iter().map(|mut row| {
                row.code = places.get(usize::from(row.code)).copied().unwrap_or(0);
                row
            }));
        }
        rows.sort_by_key(|row| (row.scheduled_ns, row.buyer));
        Self {
            template,
            rows,
            codes,
        }
    }

    /// Notes the final statuses of undecided orders.
    pub(super) fn set_final_statuses(&mut self, finals: &HashMap<u64, String>) {
        for row in &mut self.rows {
            if row.kind == AnswerKind::Undecided
                && let Some(status) = finals.get(&row.order_id)
            {
                row.final_code = self.codes.place(status);
            }
        }
    }

    /// The number of requests.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Every request with its answer, in the order in which they were due.
    pub fn iter(&self) -> impl Iterator<Item = Outcome<'_>> {
        self.rows.iter().map(|row| Outcome {
            user: self.template.user(row.buyer),
            key: self.template.key(row.buyer, row.sku),
            sku: self.template.sku(row.sku),
            double_click: row.double,
            scheduled_ns: row.scheduled_ns,
            latency_ns: row.latency_ns,
            http_status: row.http_status,
            kind: row.kind,
            code: self.codes.name(row.code),
            order_id: (row.order_id != 0).then_some(row.order_id),
            replayed: row.replayed,
            final_status: (row.final_code != Codes::NONE).then(|| self.codes.name(row.final_code)),
        })
    }
}

/// One outcome in 40 bytes; the template writes its texts again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    scheduled_ns: u64,
    latency_ns: u64,
    /// 0 is no order: Millrace's ids carry a time.
    order_id: u64,
    buyer: u32,
    sku: u16,
    http_status: u16,
    code: u16,
    final_code: u16,
    kind: AnswerKind,
    double: bool,
    replayed: bool,
}

impl Row {
    pub(super) fn new(
        arrival: &Arrival,
        latency_ns: u64,
        answer: &Answer,
        codes: &mut Codes,
    ) -> Self {
        Self {
            scheduled_ns: arrival.scheduled_ns,
            latency_ns,
            order_id: answer.order_id.unwrap_or(0),
            buyer: arrival.buyer,
            sku: arrival.sku,
            http_status: answer.http_status,
            code: codes.place(&answer.code),
            final_code: Codes::NONE,
            kind: answer.kind,
            double: arrival.double,
            replayed: answer.replayed,
        }
    }
}

/// The few names that answers use, each stored once.
#[derive(Debug, Clone, Default)]
pub(super) struct Codes {
    names: Vec<SmolStr>,
}

impl Codes {
    /// Stands for no name.
    const NONE: u16 = u16::MAX;
    /// A server that invents codes without end must not make every look-up slow.
    const COUNT_MAX: usize = 256;

    pub(super) fn place(&mut self, name: &str) -> u16 {
        let found = self.names.iter().position(|known| known == name);
        let place = found.unwrap_or_else(|| {
            if self.names.len() >= Self::COUNT_MAX {
                return self.names.len() - 1;
            }
            let name = if self.names.len() == Self::COUNT_MAX - 1 {
                "(others)"
            } else {
                name
            };
            self.names.push(SmolStr::from(name));
            self.names.len() - 1
        });
        place as u16
    }

    pub(super) fn name(&self, place: u16) -> &str {
        self.names.get(usize::from(place)).map_or("", |name| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(status: u16, body: &str) -> Answer {
        Answer::read(status, false, body.as_bytes())
    }

    #[test]
    fn answers_are_read_by_the_contract() {
        use AnswerKind::*;
        let order = |state: &str| format!(r#"{{"order_id":"7","status":"{state}","new":[1]}}"#);
        let problem = |code: &str| format!(r#"{{"status":409,"code":"{code}"}}"#);
        for (status, body, kind, code) in [
            (201, order("pending_payment"), Created, "pending_payment"),
            (202, order("accepted"), Accepted, "accepted"),
            (202, order("undecided"), Undecided, "undecided"),
            (200, order("paid"), Replayed, "paid"),
            (409, problem("sold_out"), SoldOut, "sold_out"),
            (409, problem("purchase_limit"), Refused, "purchase_limit"),
            (429, problem("rate_limited"), RateLimited, "rate_limited"),
            (503, problem("overloaded"), Unavailable, "overloaded"),
            (504, problem("timed_out"), TimedOut, "timed_out"),
            (
                422,
                problem("idempotency_key_reused"),
                ClientError,
                "idempotency_key_reused",
            ),
            (500, "not json".to_owned(), ServerError, ""),
            (201, "{}".to_owned(), Transport, "bad_answer"),
            (302, String::new(), Transport, "bad_answer"),
        ] {
            let answer = read(status, &body);
            assert_eq!(
                (answer.kind, answer.code.as_str()),
                (kind, code),
                "{status} {body}"
            );
            assert_eq!(
                answer.order_id.is_some(),
                status <= 202 && kind != Transport
            );
        }
    }

    #[test]
    fn kinds_stand_at_their_own_place() {
        for (place, kind) in AnswerKind::ALL.into_iter().enumerate() {
            assert_eq!(kind.place(), place);
        }
    }

    #[test]
    fn codes_without_end_stay_bounded() {
        let mut codes = Codes::default();
        for n in 0..1000 {
            codes.place(&format!("code_{n}"));
        }
        assert_eq!(codes.names.len(), Codes::COUNT_MAX);
        let last = codes.place("one_more");
        assert_eq!(codes.name(last), "(others)");
        let first = codes.place("code_0");
        assert_eq!(codes.name(first), "code_0");
    }
}
