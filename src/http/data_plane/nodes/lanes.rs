//! `GET /v1/lanes`: which lane of buyers is at which address, for clients that send each order to the right node.

use super::Nodes;
use crate::http::message::Response;
use crate::http::problem::Problem;
use crate::http::wire::{LaneView, LanesView, write};
use crate::state::lanes::Standing;

/// Answers with the lanes as this node knows them.
pub(in crate::http::data_plane) fn get(
    nodes: Option<&Nodes>,
    response: &mut Response,
) -> Result<(), Problem> {
    let nodes = nodes.ok_or_else(Problem::internal)?;
    let own = nodes.peers.own();
    let links = nodes.peers.report();
    let address = |node: u8| {
        if node == own.node {
            return Some(own.data_plane.clone());
        }
        let mut of_node = links.iter().filter(|link| link.peer.node == node);
        of_node.find_map(|link| Some(link.identity.as_ref()?.data_plane.clone()))
    };
    let lanes = nodes.lanes.snapshot().into_iter().map(|(lane, standing)| {
        let node = match standing {
            Standing::Here { .. } => Some(own.node),
            Standing::Elsewhere { owner, .. } => Some(owner.node),
            Standing::Closed => None,
        };
        LaneView {
            lane: lane.get(),
            node,
            data_plane: node.and_then(address),
        }
    });
    let lanes = lanes.collect();
    write::json(response, 200, &LanesView { lanes });
    Ok(())
}
