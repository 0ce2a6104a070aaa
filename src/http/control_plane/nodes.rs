//! The nodes of a cluster, as the database knows them, and asking one to leave.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::extract::Segment;
use super::failure::Failure;
use super::{ControlPlane, Parts};
use crate::http::problem::Problem;
use crate::http::wire::{NodeView, NodesView};
use crate::order::Lane;
use crate::state::lanes::{LanePass, Standing};
use crate::store::cluster::membership;

pub(super) async fn list(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let (nodes, open_here) = match &parts.member {
        None => (Vec::new(), 0),
        Some(member) => {
            let open_here = member.lanes.open_here().len();
            (membership::holdings(&parts.database).await?, open_here)
        }
    };
    let view = NodesView {
        node: parts.member.as_ref().map(|member| member.lease.node),
        lanes_open_here: open_here,
        nodes: nodes.iter().map(NodeView::of).collect(),
    };
    Ok(axum::Json(view).into_response())
}

/// Holds the lane of a buyer while an operator changes one of its orders: only the node that has the lane knows the order's
/// buyer. `None`: this process is on its own.
pub(super) fn hold(parts: &Parts, lane: Lane) -> Result<Option<LanePass<'_>>, Failure> {
    let Some(of) = &parts.state.lanes else {
        return Ok(None);
    };
    let problem = |standing| match standing {
        Standing::Elsewhere { owner, .. } => {
            let detail = format!(
                "node {} has the lane of this order's buyer; send the request to its control plane",
                owner.node
            );
            Problem::new(421, "misdirected", detail)
        }
        Standing::Closed | Standing::Here { .. } => {
            let detail = "the buyer's lane is moving from one node to another; nothing was changed";
            Problem::new(503, "not_ready", detail).retry_after(1)
        }
    };
    Ok(of.lanes.enter(lane).map(Some).map_err(problem)?)
}

pub(super) async fn drain(
    State(plane): State<ControlPlane>,
    Segment(node): Segment,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let unknown = || {
        let detail = format!("there is no node {node} that is active");
        Failure::from(Problem::new(404, "unknown_node", detail))
    };
    let is_digits = node.bytes().all(|byte| byte.is_ascii_digit());
    let number: i16 = match node.parse() {
        Ok(number) if is_digits && parts.member.is_some() => number,
        _ => return Err(unknown()),
    };
    if !membership::ask_to_leave(&parts.database, number).await? {
        return Err(unknown());
    }
    Ok(axum::Json(json!({ "node": number, "drain": true })).into_response())
}
