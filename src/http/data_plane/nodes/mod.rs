//! Several nodes serve one sale: which node answers a request, and what this one may say.
//!
//! ```text
//!   handler ─► place(buyer or order) ─┬─ here ─► the handler goes on, holding the lane until it has answered ─► vouch
//!                                     ├─ elsewhere ─► pass_on ─► the owner's answer
//!                                     └─ closed ─► 503, Retry-After: 1
//! ```
//!
//! A request is passed on once: the owner does not pass it on further, whatever it believes by then. A single node has
//! no [`Nodes`], asks nothing and pays for nothing.

pub(super) mod lanes;
mod pass_on;

use std::sync::Arc;
use std::time::Duration;

pub(super) use self::pass_on::{Begun, Passed, Passing, begin, finish, pass_on};
use crate::http::message::Response;
use crate::http::peers::pool::Peers;
use crate::http::peers::server::Terms;
use crate::http::peers::{Answer, Hint};
use crate::http::problem::Problem;
use crate::order::{Cutover, Lane, OrderId, UserId};
use crate::pipeline::failover::lease;
use crate::state::lanes::{LanePass, Lanes, NodeAddress, Standing};

/// The cluster, as the data plane sees it.
pub struct Nodes {
    /// Which node has which lane.
    pub lanes: Arc<Lanes>,
    /// Which order ids name their lane.
    pub cutover: Cutover,
    /// The links to the other nodes.
    pub peers: Arc<Peers>,
    /// Takes news from other nodes. Must not block.
    pub on_hint: Box<dyn Fn(u8, Hint) + Send + Sync>,
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// From a client.
    Client,
    /// From another node, which took it for the owner of its lane.
    Node(Terms),
}

impl Origin {
    /// A time that a request may take, as far as the node that passed it on leaves it.
    pub(super) fn limit(self, wait: Duration) -> Duration {
        match self {
            Origin::Client => wait,
            Origin::Node(terms) => wait.min(terms.wait),
        }
    }

    /// Whether keys of the request may be those of the node that passed it on, made for a buyer who gave none.
    pub(super) fn has_own_keys(self) -> bool {
        matches!(self, Origin::Node(terms) if terms.has_own_keys)
    }
}

/// Where a request is answered.
pub(super) enum Place<'a> {
    /// Here.
    Here(Held<'a>),
    /// At the owner of the lane.
    Elsewhere(&'a Nodes, Lane),
}

/// The lane of a request that is answered here. It is not handed over until this is dropped.
#[derive(Default)]
pub(super) struct Held<'a>(Option<(&'a Nodes, LanePass<'a>)>);

impl Held<'_> {
    /// Whether an answer with this status may leave. A row or a record in the log is true whoever owns the lane by now;
    /// every other answer rests on this process still being the owner.
    ///
    /// # Errors
    /// The answer instead.
    pub(super) fn vouch(&self, status: u16) -> Result<(), Problem> {
        match &self.0 {
            None => Ok(()),
            Some(_) if matches!(status, 201 | 202) => Ok(()),
            Some((nodes, _)) if nodes.lanes.may_answer(lease::now_ms()) => Ok(()),
            Some(_) => {
                let detail =
                    "this node has had no contact to the database and the order log for too long";
                Err(Problem::new(503, "not_ready", detail).retry_after(1))
            }
        }
    }

    /// Lets the answer of a handler leave, if [`Held::vouch`] does.
    pub(super) fn vouched(
        &self,
        answered: Result<(), Problem>,
        response: &mut Response,
    ) -> Result<(), Problem> {
        let status = match &answered {
            Ok(()) => response.status(),
            Err(problem) => problem.status,
        };
        self.vouch(status).inspect_err(|_| response.clear())?;
        answered
    }
}

/// Where a request of this buyer is answered.
///
/// # Errors
/// The lane is open nowhere, or, for a request from another node, not here.
pub(super) fn place<'a>(
    nodes: Option<&'a Nodes>,
    origin: Origin,
    user_id: &UserId,
) -> Result<Place<'a>, Problem> {
    match nodes {
        None => Ok(Place::Here(Held(None))),
        Some(nodes) => place_of_lane(nodes, origin, Lane::of(user_id)),
    }
}

/// Where a request for an order with this id is answered; `None`: by the `user_id` of its row.
///
/// # Errors
/// As [`place`].
pub(super) fn place_of_order(
    nodes: Option<&Nodes>,
    origin: Origin,
    id: OrderId,
) -> Result<Option<Place<'_>>, Problem> {
    let Some(nodes) = nodes else {
        return Ok(Some(Place::Here(Held(None))));
    };
    let lane = nodes.cutover.lane_of(id);
    lane.map(|lane| place_of_lane(nodes, origin, lane))
        .transpose()
}

/// Holds the lane of an order, if it is open here.
pub(super) fn hold(nodes: Option<&Nodes>, id: OrderId) -> Held<'_> {
    Held(nodes.and_then(|nodes| {
        let lane = nodes.cutover.lane_of(id)?;
        Some((nodes, nodes.lanes.enter(lane).ok()?))
    }))
}

/// Tells the owner of an order's lane of a payment for it, if it is another node. If that does not arrive, a payment is found
/// in a while once it is stored.
pub(super) fn tell_owner(nodes: Option<&Nodes>, id: OrderId, hint: &Hint) {
    let Some(nodes) = nodes else {
        return;
    };
    let standing = nodes
        .cutover
        .lane_of(id)
        .map(|lane| nodes.lanes.standing(lane));
    if let Some(Standing::Elsewhere { owner, .. }) = standing {
        nodes.peers.hint(owner.node, hint);
    }
}

fn place_of_lane(nodes: &Nodes, origin: Origin, lane: Lane) -> Result<Place<'_>, Problem> {
    match (nodes.lanes.enter(lane), origin) {
        (Ok(pass), _) => Ok(Place::Here(Held(Some((nodes, pass))))),
        (Err(Standing::Elsewhere { .. }), Origin::Client) => Ok(Place::Elsewhere(nodes, lane)),
        (Err(Standing::Elsewhere { owner, .. }), Origin::Node(_)) => Err(misdirected(&owner)),
        (Err(Standing::Closed | Standing::Here { .. }), _) => Err(closed()),
    }
}

/// The answer to a request whose lane is open nowhere.
pub(super) fn closed() -> Problem {
    let detail = "the buyer's lane is moving from one node to another; nothing was held";
    Problem::new(503, "not_ready", detail).retry_after(1)
}

/// The answer to a request that another node has passed on and a third one owns.
fn misdirected(owner: &NodeAddress) -> Problem {
    let detail = format!("node {} owns this buyer's lane", owner.node);
    Problem::new(421, "misdirected", detail)
}

/// The answer to a request that another node would have to answer and does not get.
fn unreachable(owner: &NodeAddress) -> Problem {
    let detail = format!(
        "node {} at {} owns this buyer's lane and cannot be reached from here; nothing was sent to it",
        owner.node, owner.address
    );
    Problem::new(421, "misdirected", detail).retry_after(1)
}

/// Makes `response` the answer of another node.
pub(super) fn write_answer(answer: &Answer, response: &mut Response) {
    response.clear();
    response.set_status(answer.status);
    response.header_lines(&answer.fields);
    response.body_mut().extend_from_slice(&answer.body);
}
