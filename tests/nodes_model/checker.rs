//! What is promised, seen by somebody who sees everything.

use std::collections::BTreeMap;

use rand::Rng;

use crate::db::{Lane, LaneRow, NodeId, Order, OrderId};
use crate::node::Node;
use crate::rules::Defect;
use crate::world::{ANSWER_MS, LIMIT, Request, World};

impl World {
    /// Every order that stands: acknowledged, or a row.
    pub fn standing(&self) -> BTreeMap<OrderId, &Order> {
        let both = self.db.orders.iter().chain(&self.acknowledged);
        both.map(|(id, order)| (*id, order)).collect()
    }

    pub fn check_rows(&mut self) {
        let standing = self.standing();
        let units: u64 = standing.values().map(|order| order.units).sum();
        let mut keys = BTreeMap::new();
        let mut by_request = BTreeMap::new();
        let mut of_user = BTreeMap::<usize, u64>::new();
        let mut broken = None;
        if units > self.db.total {
            broken = Some(format!("oversold: {units} of {}", self.db.total));
        }
        for order in standing.values() {
            if let Some(other) = keys.insert((order.user, order.key), order.id) {
                broken = Some(format!("orders {other} and {} of one key", order.id));
            }
            if let Some(other) = by_request.insert(order.request, order.id) {
                broken = Some(format!("orders {other} and {} of one request", order.id));
            }
            let of_user = of_user.entry(order.user).or_default();
            *of_user += order.units;
            if *of_user > LIMIT {
                broken = Some(format!("buyer {} has {of_user} units", order.user));
            }
        }
        if let Some(broken) = broken {
            self.violated(broken);
        }
    }

    /// An acknowledgement leaves.
    pub fn acknowledge(&mut self, node: NodeId, order: &Order) {
        self.say(|| format!("node {node} acknowledges {order:?}"));
        let other = [
            self.acknowledged.get(&order.id),
            self.db.orders.get(&order.id),
        ];
        if other.into_iter().flatten().any(|other| other != order) {
            self.violated(format!("two orders have the id {}", order.id));
        }
        let later = |other: &&Order| {
            other.lane() == order.lane() && other.issued < order.issued && other.id > order.id
        };
        if let Some(other) = self.acknowledged.values().find(later) {
            let other = other.id;
            self.violated(format!("ids of a lane go back: {} after {other}", order.id));
        }
        self.acknowledged.insert(order.id, order.clone());
        self.recent.push((order.user, order.key));
        self.check_rows();
        self.answer_reaches(order.request);
    }

    /// The shop hears it, mostly.
    pub fn answer_reaches(&mut self, request: usize) {
        if self.calm || self.chance(0.8) {
            self.requests[request].open = false;
        }
    }

    /// Units that nobody holds: in the pool, or lent to whoever it may be.
    pub fn units_free(&self) -> u64 {
        let taken: u64 = self.standing().values().map(|order| order.units).sum();
        let on_their_way: u64 = self.nodes.iter().map(|node| node.on_their_way()).sum();
        self.db.total.saturating_sub(taken + on_their_way)
    }

    pub fn said_sold_out(&mut self, node: NodeId, units: u64) {
        let least = self.free.iter().map(|(_, free)| *free).min();
        if least.is_some_and(|least| least >= units) {
            self.violated(format!(
                "node {node} said sold out to {units}, and {least:?} were free all the last second"
            ));
        }
    }

    /// Two nodes answer for one lane, although the older one's contact is fresh in real time too (a clock that stood
    /// still excuses it: the documents say so).
    pub fn answers_from_memory(&mut self, node: NodeId, lane: Lane) {
        let epoch = |node: &Node| {
            node.lanes
                .get(&lane)
                .filter(|lane| lane.open)
                .map(|lane| lane.epoch)
        };
        let own = epoch(&self.nodes[node]);
        let newer = self.nodes.iter().any(|other| epoch(other) > own);
        if newer && self.now - self.nodes[node].contact_real <= ANSWER_MS {
            self.violated(format!(
                "node {node} answers for lane {lane}, which another has opened"
            ));
        }
    }

    pub fn said_unknown(&mut self, node: NodeId, user: usize, key: u64) {
        let known = |order: &&Order| order.user == user && order.key == key;
        let real_age = self.now - self.nodes[node].contact_real;
        if real_age <= ANSWER_MS
            && let Some(order) = self.acknowledged.values().find(known)
        {
            let id = order.id;
            self.violated(format!(
                "node {node} answered 404 for the acknowledged order {id}"
            ));
        }
    }

    /// Lets everything come to rest, and checks what must hold then.
    pub fn end(&mut self) {
        self.calm = true;
        self.db.up = true;
        for node in &mut self.nodes {
            node.paused_until = node.paused_until.map(|_| self.now);
            node.cut_until = node.cut_until.min(self.now);
        }
        for round in 0.. {
            self.step();
            if self.violation.is_some() {
                return;
            }
            if round % 50 == 49 && self.at_rest() {
                break;
            }
            if round == 20_000 {
                let memory = |node: &Node| {
                    let (takeover, coming) = (node.takeover.is_some(), node.on_their_way());
                    format!(
                        "{} {takeover} {coming} {} {} {:?}",
                        node.serving,
                        node.replayed,
                        node.free(),
                        node.lanes
                    )
                };
                let nodes: Vec<String> = self.nodes.iter().map(memory).collect();
                let open = self.requests.iter().filter(|request| request.open).count();
                if std::env::var("NM_FULL").is_ok() {
                    eprintln!("{:#?}", self.nodes);
                }
                let state = format!(
                    "{open} {:?} {:?} {nodes:?} {:?} {:?}",
                    self.db.wants, self.db.shares, self.db.nodes, self.db.lanes
                );
                return self.violated(format!("it never comes to rest: {state}"));
            }
        }
        for (id, order) in self.acknowledged.clone() {
            if self.db.orders.get(&id) != Some(&order) {
                return self.violated(format!("the acknowledged order {id} is lost"));
            }
        }
        let units: u64 = self.db.orders.values().map(|order| order.units).sum();
        let held: u64 = self.db.shares.iter().map(|share| share.held).sum();
        if units != held {
            return self.violated(format!("{held} units are held, and orders have {units}"));
        }
        self.sell_the_rest();
    }

    /// All clicks on one node: everything that is left is sold.
    pub fn sell_the_rest(&mut self) {
        for request in &mut self.requests {
            request.open = false;
        }
        let node = self.rng.random_range(0..self.nodes.len());
        for round in 0..20_000 {
            if self.db.total
                == self
                    .db
                    .orders
                    .values()
                    .map(|order| order.units)
                    .sum::<u64>()
            {
                return;
            }
            if round % 10 == 0 {
                // A buyer of its own, in each lane in turn.
                let user = 1_000 + round;
                let key = round as u64;
                self.requests.push(Request {
                    user,
                    key,
                    units: 1,
                    keyless: false,
                    waits: false,
                    open: false,
                });
                self.order_at(node, self.requests.len() - 1);
            }
            self.step();
            if self.violation.is_some() {
                return;
            }
        }
        let sold: u64 = self.db.orders.values().map(|order| order.units).sum();
        self.violated(format!(
            "{sold} units of {} find a buyer: {:?}",
            self.db.total, self.db.shares
        ));
    }

    pub fn at_rest(&self) -> bool {
        let idle = |node: &Node| {
            node.up && node.serving && node.takeover.is_none() && node.on_their_way() == 0
        };
        let opened = |(lane, row): (usize, &LaneRow)| {
            row.blocked_by.is_none()
                && self.nodes[row.owner]
                    .lanes
                    .get(&lane)
                    .is_some_and(|held| held.epoch == row.epoch && held.open)
        };
        self.nodes.iter().all(idle)
            && self.rights()
            && (self.has(Defect::PlaceKeptAfterFailover)
                || self
                    .nodes
                    .iter()
                    .all(|node| node.replayed == self.db.timeline))
            && self.db.lanes.iter().enumerate().all(opened)
            && !self.db.recall
            && self.requests.iter().all(|request| !request.open)
    }
}
