//! `POST /v1/orders:batch`: one order a line, one answer a line, in the same sequence. All lines are admitted before any
//! is waited for.
//!
//! Lines of buyers whose lanes are elsewhere are sent to their owners, a batch for each lane, before the lines of this
//! node are waited for. Their answers come back line by line, as the owner wrote them.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use smallvec::{SmallVec, smallvec};

use super::create::{Admitted, Answer, Creation, check_open, count, require_media_type, view};
use super::elsewhere::{may_be_own_key, own_key, settles_order};
use crate::http::data_plane::context::Context;
use crate::http::data_plane::nodes::{
    self, Begun, Held, Nodes, Origin, Passed, Passing, Place, begin, finish,
};
use crate::http::message::{Request, Response};
use crate::http::peers::frame::{CallParts, HEADERS_MAX};
use crate::http::problem::Problem;
use crate::http::wire::{BatchLine, OrderBody, UndecidedView, no_batch_key, write};
use crate::order::Lane;

/// Most orders in one batch.
const BATCH_ORDERS_MAX: usize = 1_000;
/// Bytes of an answer with its order and its receipt. A refusal is shorter.
const LINE_BYTES_TYPICAL: usize = 416;

const NDJSON: &str = "application/x-ndjson";

/// A line whose order is, or is not, admitted.
enum Line<'a> {
    /// By this node.
    Here(Admitted, Held<'a>),
    /// Answered already.
    Refused(Problem),
    /// A line of the part with this number.
    Elsewhere(usize),
}

/// The answer to a line.
enum LineAnswer {
    Here(Answer),
    /// The next answer of the part with this number.
    Elsewhere(usize),
}

/// The lines of one lane that another node owns.
struct Part<'a> {
    nodes: &'a Nodes,
    lane: Lane,
    orders: Vec<(OrderBody<'a>, Cow<'a, str>)>,
    has_own_keys: bool,
    body: Vec<u8>,
}

impl<'a> Part<'a> {
    fn push(&mut self, line: &[u8], order: BatchLine<'a>) {
        let key = match order.key {
            Some(key) => {
                self.body.extend_from_slice(line);
                key
            }
            None => {
                let key = own_key();
                // A line that was parsed is an object, and has other members.
                let start = line.iter().position(|byte| *byte == b'{');
                let (_, members) = line.split_at(start.map_or(0, |start| start + 1));
                self.body.extend_from_slice(b"{\"idempotency_key\":\"");
                self.body.extend_from_slice(key.as_bytes());
                self.body.extend_from_slice(b"\",");
                self.body.extend_from_slice(members);
                self.has_own_keys = true;
                Cow::Owned(key)
            }
        };
        self.body.push(b'\n');
        self.orders.push((order.body, key));
    }
}

/// `POST /v1/orders:batch`.
pub(in crate::http::data_plane) fn batch(
    context: &Context,
    request: &Request<'_>,
    origin: Origin,
    response: &mut Response,
) -> Result<(), Problem> {
    check_open(context, origin)?;
    require_media_type(request, &[NDJSON, "application/jsonl", "application/json"])?;
    no_batch_key(request.header("idempotency-key").is_some())?;
    let body = request.body.strip_suffix(b"\n").unwrap_or(request.body);
    if body.is_empty() {
        return Err(Problem::new(
            400,
            "malformed_json",
            "a batch has one order on each line, and this has none",
        ));
    }
    let lines = || body.split(|byte| *byte == b'\n');
    if lines().nth(BATCH_ORDERS_MAX).is_some() {
        let detail = format!("a batch has at most {BATCH_ORDERS_MAX} orders");
        return Err(Problem::new(413, "body_too_large", detail));
    }
    let creation = Creation::begin(context, request, origin);
    let mut parts = Vec::new();
    let admitted: Vec<Line<'_>> = lines()
        .map(|line| admit(&creation, origin, line, &mut parts).unwrap_or_else(Line::Refused))
        .collect();
    // A batch from another node is of one lane, whose owner has changed.
    if let Some(problem) = misdirected(origin, &admitted) {
        return Err(problem);
    }
    let headers = headers(request);
    let passing: Vec<Passing<'_>> = parts
        .iter()
        .map(|part| part.passing(&creation, &headers))
        .collect();
    let begun: Vec<Begun> = parts
        .iter()
        .zip(&passing)
        .map(|(part, passing)| begin(part.nodes, passing))
        .collect();
    let answers: Vec<LineAnswer> = admitted
        .into_iter()
        .map(|line| match line {
            Line::Refused(problem) => LineAnswer::Here(Answer::Problem(problem)),
            Line::Elsewhere(part) => LineAnswer::Elsewhere(part),
            Line::Here(admitted, held) => {
                let answer = creation.wait(admitted);
                let vouched = held.vouch(answer.status());
                LineAnswer::Here(vouched.err().map_or(answer, Answer::Problem))
            }
        })
        .collect();
    let elsewhere: Vec<PartAnswer> = parts
        .iter()
        .zip(passing.iter().zip(begun))
        .map(|(part, (passing, begun))| part.finish(context, passing, begun))
        .collect();
    response.set_status(200);
    response.header("Content-Type", NDJSON);
    let accepted = answers.iter().any(|answer| match answer {
        LineAnswer::Here(answer) => answer.is_acknowledgement(),
        LineAnswer::Elsewhere(part) => elsewhere.get(*part).is_some_and(|part| part.accepted),
    });
    creation.wanted.say_applied(response, accepted);
    let out = response.body_mut();
    // Reserved at once: growing in steps copies all earlier lines each time.
    out.reserve(answers.len() * LINE_BYTES_TYPICAL);
    let mut rest: Vec<&[u8]> = elsewhere.iter().map(|part| &part.lines[..]).collect();
    for answer in &answers {
        match answer {
            LineAnswer::Here(Answer::Problem(problem)) => {
                write::ndjson_line(out, problem.status, problem);
            }
            LineAnswer::Here(Answer::Order {
                found,
                status,
                http_status,
                ..
            }) => write::ndjson_line(out, *http_status, &view(context, found, *status)),
            LineAnswer::Elsewhere(part) => {
                if let Some(rest) = rest.get_mut(*part) {
                    out.extend_from_slice(take_line(rest));
                }
            }
        }
    }
    Ok(())
}

/// The answer to a batch from another node none of whose lines is of this one.
fn misdirected(origin: Origin, lines: &[Line<'_>]) -> Option<Problem> {
    let misdirected = |line: &Line<'_>| match line {
        Line::Refused(problem) if problem.status == 421 => Some(problem.clone()),
        _ => None,
    };
    let problem = lines.first().and_then(misdirected);
    let of_node = matches!(origin, Origin::Node(_));
    problem.filter(|_| of_node && lines.iter().all(|line| misdirected(line).is_some()))
}

/// Admits the order of a line, or puts the line to those of its lane.
fn admit<'a>(
    creation: &Creation<'a>,
    origin: Origin,
    line: &'a [u8],
    parts: &mut Vec<Part<'a>>,
) -> Result<Line<'a>, Problem> {
    let order = BatchLine::parse(line)?;
    match nodes::place(creation.context.nodes.as_ref(), origin, &order.body.user_id)? {
        Place::Here(held) => {
            let own_key = origin.has_own_keys() && order.key.as_deref().is_some_and(may_be_own_key);
            let key = order.key_hash();
            let admitted = creation.admit(order.body, key, own_key)?;
            Ok(Line::Here(admitted, held))
        }
        Place::Elsewhere(nodes, lane) => {
            let at = parts.iter().position(|part| part.lane == lane);
            let at = at.unwrap_or_else(|| {
                parts.push(Part {
                    nodes,
                    lane,
                    orders: Vec::new(),
                    has_own_keys: false,
                    body: Vec::new(),
                });
                parts.len() - 1
            });
            if let Some(part) = parts.get_mut(at) {
                part.push(line, order);
            }
            Ok(Line::Elsewhere(at))
        }
    }
}

/// The answers to a part, a line an order.
struct PartAnswer {
    lines: Bytes,
    /// An order was acknowledged as durable.
    accepted: bool,
}

/// The fields that a part is sent with.
fn headers<'a>(request: &Request<'a>) -> SmallVec<[(&'a str, &'a [u8]); 2]> {
    let mut headers = smallvec![("content-type", NDJSON.as_bytes())];
    let preferences = request.header_values("prefer");
    headers.extend(
        preferences
            .take(HEADERS_MAX - 1)
            .map(|value| ("prefer", value)),
    );
    headers
}

impl Part<'_> {
    fn passing<'a>(
        &'a self,
        creation: &'a Creation<'a>,
        headers: &'a [(&'a str, &'a [u8])],
    ) -> Passing<'a> {
        Passing {
            lane: self.lane,
            request: creation.request,
            parts: CallParts {
                wait: Duration::ZERO,
                has_own_keys: self.has_own_keys,
                method: "POST",
                target: creation.request.target,
                headers,
                body: &self.body,
            },
            until: creation.started + creation.wanted.wait,
            settles: |status| status == 200,
        }
    }

    /// Waits for the answers of the owner.
    fn finish(&self, context: &Context, passing: &Passing<'_>, begun: Begun) -> PartAnswer {
        let mut accepted = false;
        let lines = match finish(context, self.nodes, passing, begun) {
            Passed::Answered {
                answer,
                is_repeated,
            } if answer.status == 200 && self.is_answered_by(&answer.body) => {
                let fields = String::from_utf8_lossy(&answer.fields);
                accepted = fields
                    .lines()
                    .any(|field| field == "Preference-Applied: respond-async");
                self.settled(context, answer.body, is_repeated)
            }
            // The whole part was refused.
            Passed::Answered { answer, .. } if answer.status != 200 => {
                self.each(|out, _| match answer.body.strip_prefix(b"{") {
                    Some(members) => {
                        let status = answer.status;
                        out.extend_from_slice(format!("{{\"http_status\":{status},").as_bytes());
                        out.extend_from_slice(members);
                        out.push(b'\n');
                    }
                    None => put_problem(out, &Problem::internal()),
                })
            }
            Passed::Answered { .. } => self.each(|out, _| put_problem(out, &Problem::internal())),
            Passed::NotRun(problem) => self.each(|out, _| put_problem(out, &problem)),
            Passed::Uncertain => self.each(|out, at| self.put_undecided(context, out, at)),
        };
        PartAnswer { lines, accepted }
    }

    fn is_answered_by(&self, lines: &[u8]) -> bool {
        lines.iter().filter(|byte| **byte == b'\n').count() == self.orders.len()
            && lines.last() == Some(&b'\n')
    }

    /// A line for each order.
    fn each(&self, mut put: impl FnMut(&mut Vec<u8>, usize)) -> Bytes {
        let mut out = Vec::new();
        (0..self.orders.len()).for_each(|at| put(&mut out, at));
        out.into()
    }

    /// The answers to a part as the client gets them. If it was sent more than once, a refusal does not settle what
    /// became of the first attempt. A lane that went to another owner in the middle of the part was closed for the rest.
    fn settled(&self, context: &Context, lines: Bytes, is_repeated: bool) -> Bytes {
        let mut rest = &lines[..];
        let statuses = std::iter::from_fn(|| (!rest.is_empty()).then(|| take_line(&mut rest)));
        let as_it_is = |line: &[u8]| match status_of(line) {
            Some(status) if is_repeated => settles_order(status),
            status => status != Some(421),
        };
        if statuses.into_iter().all(as_it_is) {
            return lines;
        }
        let mut rest = &lines[..];
        self.each(|out, at| match take_line(&mut rest) {
            line if as_it_is(line) => out.extend_from_slice(line),
            _ if is_repeated => self.put_undecided(context, out, at),
            _ => put_problem(out, &nodes::closed()),
        })
    }

    fn put_undecided(&self, context: &Context, out: &mut Vec<u8>, at: usize) {
        if let Some((body, key)) = self.orders.get(at) {
            count(context, "undecided");
            write::ndjson_line(out, 202, &UndecidedView::new(body, key));
        }
    }
}

fn put_problem(out: &mut Vec<u8>, problem: &Problem) {
    write::ndjson_line(out, problem.status, problem);
}

/// Takes the first line, with its end.
fn take_line<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let end = rest.iter().position(|byte| *byte == b'\n');
    let (line, left) = rest.split_at(end.map_or(rest.len(), |end| end + 1));
    *rest = left;
    line
}

/// The `http_status` that [`write::ndjson_line`] has written.
fn status_of(line: &[u8]) -> Option<u16> {
    let digits = line.strip_prefix(b"{\"http_status\":")?.get(..3)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_one_by_one_and_tell_their_status() {
        let mut out = Vec::new();
        put_problem(&mut out, &Problem::internal());
        put_problem(&mut out, &Problem::new(409, "sold_out", "none"));
        let mut rest = &out[..];
        let statuses = [take_line(&mut rest), take_line(&mut rest)].map(status_of);
        assert_eq!(statuses, [Some(500), Some(409)]);
        assert!(rest.is_empty() && take_line(&mut rest).is_empty());
        assert_eq!(status_of(b"{}"), None);
    }
}
