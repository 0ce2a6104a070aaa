//! Passing a request on to the owner of its lane.
//!
//! ```text
//!   begin ─┬─ no connection ─────────────► 421: nothing was sent                   (unless an earlier attempt was)
//!          ├─ not begun, lane closed ────► 503: nothing was held                   (the same)
//!          ├─ not the owner any more ────► look again, and once more, until the wait ends
//!          ├─ answered ──────────────────► the answer
//!          └─ connection lost, uncertain ► the same again under the same key, until the wait ends: then undecided
//! ```
//!
//! Once an attempt is uncertain, only an answer that *settles* it counts. A refusal of the repeated order does not: the
//! first attempt may still be on its way to its lane when the second is refused.

use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::{Nodes, closed, unreachable};
use crate::backoff::Backoff;
use crate::http::data_plane::context::Context;
use crate::http::message::Request;
use crate::http::peers::frame::{CallParts, HEADERS_MAX};
use crate::http::peers::link::PendingCall;
use crate::http::peers::{Answer, NotRun, Outcome, Unsent};
use crate::http::problem::Problem;
use crate::http::server::wake::wait;
use crate::order::Lane;
use crate::spans::Trace;
use crate::state::lanes::{NodeAddress, Standing};

/// The part of the client's wait that the owner does not get: the way there and back, and a deadline that is a little late.
const MARGIN: Duration = Duration::from_millis(150);

/// Time beyond the client's wait for an answer that is on its way.
const PATIENCE: Duration = Duration::from_millis(100);

/// Pauses before a lane's owner is looked up again.
const LOOK_AGAIN: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(100));

/// A request to be passed on.
pub(in crate::http::data_plane) struct Passing<'a> {
    /// Its lane.
    pub lane: Lane,
    /// The request that waits for it.
    pub request: &'a Request<'a>,
    /// What is sent; each attempt gets the wait that is left.
    pub parts: CallParts<'a>,
    /// The end of the client's wait.
    pub until: Instant,
    /// Whether an answer with this status settles an uncertain earlier attempt.
    pub settles: fn(u16) -> bool,
}

/// The end of a request that was passed on.
pub(in crate::http::data_plane) enum Passed {
    /// The owner has answered.
    Answered {
        /// Its answer.
        answer: Answer,
        /// Whether an earlier attempt was uncertain: of a batch, each line has to settle that by itself.
        is_repeated: bool,
    },
    /// No node has begun it.
    NotRun(Problem),
    /// A node may have served it.
    Uncertain,
}

/// An attempt on its way, or its end.
pub(in crate::http::data_plane) enum Begun {
    /// On its way to this node.
    Sent(PendingCall, NodeAddress),
    /// No node has begun it.
    NotRun(Problem),
    /// This process owns the lane by now.
    Here,
}

/// The end of one attempt.
enum Attempt {
    Answered(Answer),
    NotRun(Problem),
    /// The node that was asked is not the owner.
    Moved,
    /// This process is the owner by now.
    Here,
    Uncertain,
    Late,
}

/// Passes a request on until it is answered, nobody can take it, or its wait is over.
pub(in crate::http::data_plane) fn pass_on(
    context: &Context,
    nodes: &Nodes,
    passing: &Passing<'_>,
) -> Passed {
    finish(context, nodes, passing, begin(nodes, passing))
}

/// Sends the first attempt.
pub(in crate::http::data_plane) fn begin(nodes: &Nodes, passing: &Passing<'_>) -> Begun {
    let owner = match nodes.lanes.standing(passing.lane) {
        Standing::Elsewhere { owner, .. } => owner,
        Standing::Closed => return Begun::NotRun(closed()),
        Standing::Here { .. } => return Begun::Here,
    };
    let now = Instant::now();
    let left = passing.until.saturating_duration_since(now);
    let traceparent = passing.request.trace.map(Trace::traceparent);
    let traced = traceparent
        .as_ref()
        .map(|parent| traced(passing, parent.as_bytes()));
    let parts = CallParts {
        wait: left.saturating_sub(MARGIN),
        headers: traced.as_deref().unwrap_or(passing.parts.headers),
        ..passing.parts
    };
    let deadline = passing.until.max(now + MARGIN) + PATIENCE;
    let waker = passing.request.waker;
    match nodes.peers.begin(owner.node, &parts, waker, deadline) {
        Ok(call) => Begun::Sent(call, owner),
        Err(Unsent::Away) => Begun::NotRun(unreachable(&owner)),
        Err(Unsent::Busy) => Begun::NotRun(busy()),
        // Limits of bodies are far below that of a frame.
        Err(Unsent::TooLong) => Begun::NotRun(Problem::internal()),
    }
}

/// Waits for an attempt, and makes further ones while they may help.
pub(in crate::http::data_plane) fn finish(
    context: &Context,
    nodes: &Nodes,
    passing: &Passing<'_>,
    mut begun: Begun,
) -> Passed {
    let mut is_repeated = false;
    let mut backoff = LOOK_AGAIN;
    loop {
        match end_of(passing, begun) {
            Attempt::Answered(answer) if !is_repeated || (passing.settles)(answer.status) => {
                return Passed::Answered {
                    answer,
                    is_repeated,
                };
            }
            Attempt::NotRun(problem) if !is_repeated => return Passed::NotRun(problem),
            Attempt::Late => return Passed::Uncertain,
            // The client comes again, and is answered here.
            Attempt::Here if is_repeated => return Passed::Uncertain,
            Attempt::Here => return Passed::NotRun(closed()),
            Attempt::Uncertain => is_repeated = true,
            Attempt::Answered(_) | Attempt::NotRun(_) | Attempt::Moved => {}
        }
        let pause = backoff.pause();
        let goes_on = !context.is_stopping() && Instant::now() + pause < passing.until;
        let slept = goes_on
            && context
                .on_tokio(passing.request, passing.until, async move {
                    tokio::time::sleep(pause).await;
                })
                .is_ok();
        match (slept, is_repeated) {
            (true, _) => begun = begin(nodes, passing),
            (false, true) => return Passed::Uncertain,
            (false, false) => return Passed::NotRun(closed()),
        }
    }
}

/// The fields of a sampled request, with the span of this node as the parent of the owner's.
fn traced<'a>(passing: &Passing<'a>, traceparent: &'a [u8]) -> SmallVec<[(&'a str, &'a [u8]); 6]> {
    let state = passing.request.header("tracestate");
    let context = std::iter::once(("traceparent", traceparent))
        .chain(state.map(|state| ("tracestate", state)));
    let fields = passing.parts.headers.iter().copied();
    fields.chain(context).take(HEADERS_MAX).collect()
}

fn end_of(passing: &Passing<'_>, begun: Begun) -> Attempt {
    let (call, owner) = match begun {
        Begun::Sent(call, owner) => (call, owner),
        Begun::NotRun(problem) => return Attempt::NotRun(problem),
        Begun::Here => return Attempt::Here,
    };
    wait(passing.request, || call.is_over());
    match call.outcome() {
        Some(Outcome::Answered(answer)) if answer.status == 421 => Attempt::Moved,
        Some(Outcome::Answered(answer)) => Attempt::Answered(answer),
        Some(Outcome::NotRun(NotRun::Busy)) => Attempt::NotRun(busy()),
        // It hands its lanes over now.
        Some(Outcome::NotRun(NotRun::Stopping)) => Attempt::NotRun(closed()),
        Some(Outcome::Unsent) => Attempt::NotRun(unreachable(&owner)),
        Some(Outcome::Uncertain) => Attempt::Uncertain,
        Some(Outcome::Late) | None => Attempt::Late,
    }
}

fn busy() -> Problem {
    let detail = "too many requests are on their way to the node of this buyer; nothing was held";
    Problem::new(503, "overloaded", detail).retry_after(1)
}
