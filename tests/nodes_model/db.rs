//! The rows of PostgreSQL. A transaction is one closure; its outcome may be unknown to the node.

use std::collections::BTreeMap;

pub const LANES: usize = 4;

pub type NodeId = usize;
pub type Lane = usize;
pub type OrderId = u64;
/// Epoch and number of a group.
pub type Place = (u64, u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Active,
    /// Fenced; its log is being read by this node.
    TakenBy(NodeId),
    Free,
}

#[derive(Clone, Debug)]
pub struct NodeRow {
    pub epoch: u64,
    pub counter: u64,
    pub standing: Standing,
    /// Every group up to here is in `orders`.
    pub place: Place,
    /// The timeline on which the node has re-asserted its rights.
    pub asserted: u64,
    /// The timeline on which its log was read for what a failover lost.
    pub replayed: u64,
}

#[derive(Clone, Debug)]
pub struct LaneRow {
    pub owner: NodeId,
    pub epoch: u64,
    pub ids_until: u64,
    pub blocked_by: Option<NodeId>,
    /// Units that came with it when it moved last.
    pub units: u64,
}

impl LaneRow {
    /// Whose share has its units.
    pub fn home(&self) -> NodeId {
        self.blocked_by.unwrap_or(self.owner)
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Share {
    pub lent: u64,
    pub held: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub id: OrderId,
    pub user: usize,
    pub key: u64,
    pub units: u64,
    pub request: usize,
    /// In real time.
    pub issued: u64,
}

impl Order {
    pub fn lane(&self) -> Lane {
        lane_of(self.user)
    }
}

pub fn lane_of(user: usize) -> Lane {
    user % LANES
}

#[derive(Clone, Debug)]
pub struct Want {
    pub node: NodeId,
    pub units: u64,
}

#[derive(Clone, Debug)]
pub struct Db {
    pub up: bool,
    pub timeline: u64,
    pub nodes: Vec<NodeRow>,
    pub lanes: Vec<LaneRow>,
    pub total: u64,
    pub shares: Vec<Share>,
    pub orders: BTreeMap<OrderId, Order>,
    /// Oldest first.
    pub wants: Vec<Want>,
    pub recall: bool,
}

/// What a node learns of its transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<T> {
    Done(T),
    /// Rolled back by the node's own condition.
    Refused(&'static str),
    /// The database is away; nothing happened.
    Away,
    /// The COMMIT got no answer.
    Unknown,
    /// The connection is new and the server is on another timeline; nothing happened.
    Failover,
}

impl Db {
    pub fn new(nodes: usize, total: u64) -> Self {
        let row = NodeRow {
            epoch: 0,
            counter: 0,
            standing: Standing::Free,
            place: (0, 0),
            asserted: 1,
            replayed: 1,
        };
        Db {
            up: true,
            timeline: 1,
            nodes: vec![row; nodes],
            lanes: (0..LANES)
                .map(|lane| LaneRow {
                    owner: lane % nodes,
                    epoch: 1,
                    ids_until: 0,
                    blocked_by: None,
                    units: 0,
                })
                .collect(),
            total,
            shares: vec![Share::default(); nodes],
            orders: BTreeMap::new(),
            wants: Vec::new(),
            recall: false,
        }
    }

    pub fn lent(&self) -> u64 {
        self.shares.iter().map(|share| share.lent).sum()
    }

    /// Units that nobody has been lent.
    pub fn pool(&self) -> u64 {
        self.total.saturating_sub(self.lent())
    }

    /// Whether every node that could have rights has asserted them on this timeline.
    pub fn all_asserted(&self) -> bool {
        let done = |row: &NodeRow| row.asserted == self.timeline || row.standing == Standing::Free;
        self.nodes.iter().all(done)
    }

    /// Whether besides every log was read for what the failover lost. Until then the pool may seem to have units
    /// that a lost row had.
    pub fn all_replayed(&self) -> bool {
        let done = |row: &NodeRow| row.replayed == self.timeline || row.standing == Standing::Free;
        self.all_asserted() && self.nodes.iter().all(done)
    }

    /// Units of a lane's rows.
    pub fn units_of(&self, lane: Lane) -> u64 {
        let of = self.orders.values().filter(|order| order.lane() == lane);
        of.map(|order| order.units).sum()
    }

    /// What the database itself refuses.
    pub fn broken_check(&self) -> Option<String> {
        if let Some(node) = self.shares.iter().position(|share| share.held > share.lent) {
            return Some(format!(
                "CHECK: share of node {node}: {:?}",
                self.shares[node]
            ));
        }
        (self.lent() > self.total).then(|| format!("CHECK: {} lent of {}", self.lent(), self.total))
    }
}
