//! The JSON of the nodes of a cluster.

use serde::Serialize;

use crate::store::cluster::membership::Holdings;

/// Every node.
#[derive(Debug, Serialize)]
pub struct NodesView {
    /// The node that answers; null for a process on its own.
    pub node: Option<i16>,
    /// Lanes that are open at the node that answers.
    pub lanes_open_here: usize,
    /// By number; none for a process on its own.
    pub nodes: Vec<NodeView>,
}

/// A node, by its row.
#[derive(Debug, Serialize)]
pub struct NodeView {
    node: i16,
    epoch: i64,
    state: String,
    drain: bool,
    address: Option<String>,
    taken_over_by: Option<i16>,
    lanes: i64,
    lanes_blocked: i64,
    units_lent: i64,
    units_held: i64,
    log: Option<String>,
    log_in_use: bool,
}

impl NodeView {
    /// The view of a node.
    pub fn of(of: &Holdings) -> Self {
        let row = &of.node;
        NodeView {
            node: row.node,
            epoch: row.epoch,
            state: row.state.clone(),
            drain: row.drain,
            address: row.address.clone(),
            taken_over_by: row.taken_by,
            lanes: of.lanes,
            lanes_blocked: of.lanes_blocked,
            units_lent: of.units_lent,
            units_held: of.units_held,
            log: row.log.clone(),
            log_in_use: row.log_in_use,
        }
    }
}
