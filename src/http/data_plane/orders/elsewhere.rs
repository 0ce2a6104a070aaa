//! Requests for orders whose lane another node owns.
//!
//! An order without an idempotency key gets a random one before it is passed on, so that it can be repeated after a
//! connection is lost. Its answer shows nothing of that, unless the wait ends before anybody knows what became of it:
//! then `202 undecided` carries the key, and a retry under it tells.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use rand::Rng;
use smallvec::{SmallVec, smallvec};

use super::create::count;
use crate::http::data_plane::context::{Context, unknown_order};
use crate::http::data_plane::nodes::{
    self, Nodes, Origin, Passed, Passing, Place, pass_on, write_answer,
};
use crate::http::message::{Request, Response};
use crate::http::peers::frame::{CallParts, HEADERS_MAX};
use crate::http::problem::Problem;
use crate::http::wire::{OrderBody, UndecidedView, write};
use crate::order::{IdempotencyKey, Lane, OrderId, UserId};

/// What keys begin with that a node has made. A buyer's own may begin so too, which does no harm.
const OWN_KEY_PREFIX: &str = "~node-";

/// A request whose lane is elsewhere.
#[derive(Clone, Copy)]
pub(super) struct Away<'a> {
    pub(super) nodes: &'a Nodes,
    pub(super) lane: Lane,
    pub(super) request: &'a Request<'a>,
}

impl<'a> Away<'a> {
    fn passing(
        self,
        method: &'a str,
        headers: &'a [(&'a str, &'a [u8])],
        until: Instant,
    ) -> Passing<'a> {
        Passing {
            lane: self.lane,
            request: self.request,
            parts: CallParts {
                wait: Duration::ZERO,
                has_own_keys: false,
                method,
                target: self.request.target,
                headers,
                body: self.request.body,
            },
            until,
            settles: |_| true,
        }
    }
}

/// A key for a buyer who gave none.
pub(super) fn own_key() -> String {
    let random: [u8; 16] = rand::rng().random();
    format!("{OWN_KEY_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(random))
}

/// Whether a key may be one of [`own_key`].
pub(super) fn may_be_own_key(key: &str) -> bool {
    key.starts_with(OWN_KEY_PREFIX)
}

/// Whether the answer to a repeated order tells what became of the first attempt: an order is there under its key, or
/// another one.
pub(super) fn settles_order(status: u16) -> bool {
    (200..300).contains(&status) || status == 422
}

/// `POST /v1/orders`.
pub(super) fn one(
    context: &Context,
    away: Away<'_>,
    response: &mut Response,
    body: &OrderBody<'_>,
    key: Option<IdempotencyKey<'_>>,
    until: Instant,
) -> Result<(), Problem> {
    let text = match key {
        Some(key) => Cow::Borrowed(key.as_str()),
        None => Cow::Owned(own_key()),
    };
    let mut headers: SmallVec<[(&str, &[u8]); 4]> = smallvec![
        ("content-type", &b"application/json"[..]),
        ("idempotency-key", text.as_bytes()),
    ];
    let preferences = away.request.header_values("prefer");
    // The first of each counts; nobody has so many.
    headers.extend(
        preferences
            .take(HEADERS_MAX - 2)
            .map(|value| ("prefer", value)),
    );
    let mut passing = away.passing("POST", &headers, until);
    passing.parts.has_own_keys = key.is_none();
    passing.settles = settles_order;
    match pass_on(context, away.nodes, &passing) {
        Passed::Answered { answer, .. } => {
            write_answer(&answer, response);
            Ok(())
        }
        Passed::NotRun(problem) => Err(problem),
        Passed::Uncertain => {
            count(context, "undecided");
            response.header("Idempotency-Key", &text);
            write::json(response, 202, &UndecidedView::new(body, &text));
            Ok(())
        }
    }
}

/// Where a request for an order is answered. An order whose id names no lane is found by its row.
pub(super) fn place<'a>(
    context: &'a Context,
    request: &Request<'_>,
    origin: Origin,
    deadline: Instant,
    id: OrderId,
) -> Result<Place<'a>, Problem> {
    let nodes = context.nodes.as_ref();
    if let Some(place) = nodes::place_of_order(nodes, origin, id)? {
        return Ok(place);
    }
    let stored = context.find_stored(request, deadline, id)?;
    let stored = stored.ok_or_else(|| unknown_order(id))?;
    let user_id = UserId::new(&stored.user_id).map_err(|_| Problem::internal())?;
    nodes::place(nodes, origin, &user_id)
}

/// `GET /v1/orders/{order_id}`. If the owner does not answer, the order's row does, as it stands: whether a payment is
/// on its way to an order that is past its deadline, its owner alone knows.
pub(super) fn read(
    context: &Context,
    away: Away<'_>,
    response: &mut Response,
    id: OrderId,
    until: Instant,
) -> Result<(), Problem> {
    match pass_on(context, away.nodes, &away.passing("GET", &[], until)) {
        Passed::Answered { answer, .. } if answer.status != 503 => {
            write_answer(&answer, response);
            Ok(())
        }
        Passed::NotRun(problem) => from_row(context, away.request, response, id, problem),
        Passed::Answered { .. } | Passed::Uncertain => {
            from_row(context, away.request, response, id, no_answer())
        }
    }
}

/// Answers with the order's row, or with `problem` if there is none.
pub(super) fn from_row(
    context: &Context,
    request: &Request<'_>,
    response: &mut Response,
    id: OrderId,
    problem: Problem,
) -> Result<(), Problem> {
    let deadline = Instant::now() + context.order_timeout;
    let stored = context.find_stored(request, deadline, id)?;
    let stored = stored.ok_or(problem)?;
    write::json(response, 200, &context.stored_view(&stored));
    Ok(())
}

/// `GET /v1/users/{user_id}/orders` and `POST /v1/orders/{order_id}/cancel`, which do the same however often they come.
pub(super) fn repeatable(
    context: &Context,
    away: Away<'_>,
    method: &'static str,
    response: &mut Response,
    until: Instant,
) -> Result<(), Problem> {
    match pass_on(context, away.nodes, &away.passing(method, &[], until)) {
        Passed::Answered { answer, .. } => {
            write_answer(&answer, response);
            Ok(())
        }
        Passed::NotRun(problem) => Err(problem),
        Passed::Uncertain => Err(no_answer()),
    }
}

fn no_answer() -> Problem {
    let detail = "the node of this buyer did not answer in time, and may have done what was asked; ask again";
    Problem::new(503, "not_ready", detail).retry_after(1)
}
