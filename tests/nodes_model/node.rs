//! A node: what it knows, and what it does as the owner of its lanes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::db::{LANES, Lane, NodeId, Order, Outcome, Place, Standing, lane_of};
use crate::lanes::HandOver;
use crate::log::{Appended, Kind};
use crate::rules::Defect;
use crate::stock::Loan;
use crate::takeover::Takeover;
use crate::world::{ANSWER_MS, LEASE_MS, LIMIT, Message, World};

/// Of an order that waits for its row, and is in no log.
pub const NO_PLACE: Place = (0, 0);
/// Orders of one batch.
const BATCH: usize = 4;

#[derive(Clone, Debug)]
pub struct OwnedLane {
    pub epoch: u64,
    pub open: bool,
    /// Whether the row reserves this node's ids.
    pub leased: bool,
    /// By the own clock.
    pub opens_at: u64,
    pub moving: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Buyer {
    /// False while its order is on the way into the log.
    pub keys: BTreeMap<u64, bool>,
    pub units: u64,
}

#[derive(Clone, Debug)]
pub struct InFlight {
    pub place: Place,
    pub orders: Vec<Order>,
    pub unknown: bool,
    /// When it was sent last, by the own clock.
    pub sent: u64,
    /// When it was sent first, by the own clock and in real time: a marker may stand between it and a repetition.
    pub sent_first: (u64, u64),
}

#[derive(Clone, Debug)]
pub struct Node {
    pub up: bool,
    pub starts_at: u64,
    pub paused_until: Option<u64>,
    pub paused_at: u64,
    pub clock_stops: bool,
    clock_lag: u64,
    /// How far its wall clock, and so its ids, are ahead.
    pub skew: u64,
    /// Rises with each process.
    pub life: u64,
    /// Whether the process has its row.
    pub serving: bool,
    pub epoch: u64,
    pub timeline: u64,
    pub lanes: BTreeMap<Lane, OwnedLane>,
    /// Lanes handed over, with owner, epoch and units, for the time after a failover.
    pub given: BTreeMap<Lane, (NodeId, u64, u64)>,
    /// Rows taken over, with the epoch that was raised.
    pub taken_rows: BTreeMap<NodeId, u64>,
    pub view: [NodeId; LANES],
    pub buyers: BTreeMap<usize, Buyer>,
    pub lent: u64,
    /// The lanes whose units `lent` has, with their epochs.
    pub counted: BTreeMap<Lane, u64>,
    pub taken: u64,
    pub loan: Option<Loan>,
    /// Whether memory has followed the row at all.
    pub followed: bool,
    pub last_id: u64,
    pub ids_until: u64,
    pub outgoing: Vec<Order>,
    pub in_flight: Option<InFlight>,
    pub queue: VecDeque<(Order, Place)>,
    pub last_place: Place,
    pub last_position: usize,
    /// The last proof that nobody has taken over, by the own clock and in real time.
    pub contact: u64,
    pub contact_real: u64,
    pub renewed: u64,
    pub gap_ended: u64,
    /// Of each node: its counter, and since when it has been that.
    pub watch: Vec<(u64, u64)>,
    pub takeover: Option<Takeover>,
    pub hand_over: Option<HandOver>,
    /// The timeline on which its own log was read.
    pub replayed: u64,
    pub awake_since: u64,
    /// It does not reach the database until then.
    pub cut_until: u64,
}

impl Node {
    pub fn new(skew: u64) -> Self {
        Node {
            up: false,
            starts_at: 0,
            paused_until: None,
            paused_at: 0,
            clock_stops: false,
            clock_lag: 0,
            skew,
            life: 0,
            serving: false,
            epoch: 0,
            timeline: 0,
            lanes: BTreeMap::new(),
            given: BTreeMap::new(),
            taken_rows: BTreeMap::new(),
            view: [0; LANES],
            buyers: BTreeMap::new(),
            lent: 0,
            counted: BTreeMap::new(),
            taken: 0,
            loan: None,
            followed: false,
            last_id: 0,
            ids_until: 0,
            outgoing: Vec::new(),
            in_flight: None,
            queue: VecDeque::new(),
            last_place: (0, 0),
            last_position: 0,
            contact: 0,
            contact_real: 0,
            renewed: 0,
            gap_ended: 0,
            watch: Vec::new(),
            takeover: None,
            hand_over: None,
            replayed: 0,
            awake_since: 0,
            cut_until: 0,
        }
    }

    /// The process ends; its memory with it.
    pub fn die(&mut self, now: u64) {
        let (skew, life, clock_lag) = (self.skew, self.life, self.clock_lag);
        *self = Node {
            starts_at: now + 500 + (life * 7_919 + 3_000) % 30_000,
            life: life + 1,
            clock_lag,
            ..Node::new(skew)
        };
    }

    /// Orders that are neither acknowledged nor refused yet, or acknowledged and no row yet.
    pub fn not_rows(&self) -> impl Iterator<Item = &Order> {
        let flying = self.in_flight.iter().flat_map(|group| &group.orders);
        self.outgoing
            .iter()
            .chain(flying)
            .chain(self.queue.iter().map(|(order, _)| order))
    }

    pub fn on_their_way(&self) -> u64 {
        self.not_rows().map(|order| order.units).sum()
    }

    pub fn free(&self) -> u64 {
        self.lent.saturating_sub(self.taken)
    }
}

impl World {
    pub fn runs(&self, node: NodeId) -> bool {
        self.nodes[node].up && self.nodes[node].paused_until.is_none()
    }

    /// The node's monotonic clock.
    pub fn clock(&self, node: NodeId) -> u64 {
        self.now - self.nodes[node].clock_lag
    }

    pub fn node_step(&mut self, node: NodeId) {
        let now = self.now;
        let one = &mut self.nodes[node];
        if let Some(until) = one.paused_until {
            if now >= until {
                one.paused_until = None;
                one.awake_since = now;
                if one.clock_stops {
                    one.clock_lag += now - one.paused_at;
                }
            }
            return;
        }
        if !one.up {
            if now >= one.starts_at {
                one.up = true;
                one.awake_since = now;
                one.timeline = self.db.timeline;
            }
            return;
        }
        if !one.serving || one.takeover.is_some() && rand::Rng::random_bool(&mut self.rng, 0.4) {
            return self.go_on_taking_over(node);
        }
        match rand::Rng::random_range(&mut self.rng, 0..8) {
            0 => self.renew(node),
            1 | 2 => self.append(node),
            3 if self.nodes[node].replayed == self.db.timeline
                || self.has(Defect::PlaceKeptAfterFailover) =>
            {
                self.write(node)
            }
            3 => self.replay_own_log(node),
            4 => self.lend(node),
            5 => self.suspect(node),
            6 => self.go_on_handing_over(node),
            _ => self.open_lanes(node),
        }
    }

    /// The node has learned that another has its row.
    pub fn fenced(&mut self, node: NodeId) {
        self.say(|| format!("node {node} is fenced and ends"));
        let now = self.now;
        self.nodes[node].die(now);
    }

    pub fn may_answer(&self, node: NodeId) -> bool {
        self.clock(node) - self.nodes[node].contact <= ANSWER_MS
    }

    fn opened(&self, node: NodeId, user: usize) -> bool {
        let lane = self.nodes[node].lanes.get(&lane_of(user));
        lane.is_some_and(|lane| lane.open && !lane.moving)
    }

    /// An order at the owner of its lane.
    pub fn admit(&mut self, node: NodeId, request: usize, key: u64) {
        let (user, units) = (self.requests[request].user, self.requests[request].units);
        if !self.opened(node, user) || !self.may_answer(node) {
            return;
        }
        let (clock, issued) = (self.clock(node), self.now);
        let one = &mut self.nodes[node];
        let buyer = one.buyers.entry(user).or_default();
        match buyer.keys.get(&key) {
            Some(true) => return self.answer_reaches(request),
            Some(false) => return,
            None => {}
        }
        if buyer.units + units > LIMIT {
            return self.answer_reaches(request);
        }
        if one.lent.saturating_sub(one.taken) < units {
            return self.dry(node, units, request);
        }
        let id = (one.last_id + 1).max((clock + one.skew) * 1_000);
        if id >= one.ids_until {
            return;
        }
        buyer.keys.insert(key, false);
        buyer.units += units;
        one.last_id = id;
        one.taken += units;
        let waits = self.requests[request].waits;
        let order = Order {
            id: id * LANES as u64 + lane_of(user) as u64,
            user,
            key,
            units,
            request,
            issued,
        };
        if waits {
            one.queue.push_back((order, NO_PLACE));
        } else {
            one.outgoing.push(order);
        }
    }

    /// `GET` of an order by its key.
    pub fn look_up(&mut self, node: NodeId, user: usize, key: u64) {
        if !self.runs(node) || !self.opened(node, user) || !self.may_answer(node) {
            return;
        }
        self.answers_from_memory(node, lane_of(user));
        let buyer = self.nodes[node].buyers.get(&user);
        if !buyer.is_some_and(|buyer| buyer.keys.contains_key(&key)) {
            self.said_unknown(node, user, key);
        }
    }

    // --- The log ------------------------------------------------------------------------------

    fn append(&mut self, node: NodeId) {
        let (clock, real) = (self.clock(node), self.now);
        let heartbeat = clock > self.nodes[node].contact + 1_000;
        let one = &mut self.nodes[node];
        if let Some(group) = &mut one.in_flight {
            if clock < group.sent + 400 {
                return;
            }
            group.unknown = true;
            if self.defect == Some(Defect::NewNumberAfterUnknown) {
                let one = &mut self.nodes[node];
                let group = one.in_flight.take();
                one.outgoing
                    .splice(0..0, group.into_iter().flat_map(|group| group.orders));
                one.last_place.1 += 1;
                return;
            }
            // Reading first: it may be there.
            let place = group.place;
            let there = self.logs[node]
                .groups
                .iter()
                .position(|group| group.place == place);
            if let Some(position) = there {
                return self.appended(node, place, Appended::At(position));
            }
        } else if !one.outgoing.is_empty() || heartbeat {
            let place = (one.last_place.0, one.last_place.1 + 1);
            let orders = std::mem::take(&mut one.outgoing);
            one.in_flight = Some(InFlight {
                place,
                orders,
                unknown: false,
                sent: clock,
                sent_first: (clock, real),
            });
        } else {
            return;
        }
        let life = self.nodes[node].life;
        let own = |one: &&Message| matches!(one, Message::Append { from, life: of, .. } if *from == node && *of == life);
        if self.network.iter().filter(own).count() > 3 {
            return;
        }
        let one = &mut self.nodes[node];
        if let Some(group) = &mut one.in_flight {
            group.sent = clock;
            let (place, orders) = (group.place, group.orders.clone());
            let message = Message::Append {
                from: node,
                life,
                place,
                orders,
            };
            self.network.push(message);
        }
    }

    /// The log's answer.
    pub fn appended(&mut self, node: NodeId, place: Place, result: Appended) {
        let Some(group) = &self.nodes[node].in_flight else {
            return;
        };
        if group.place != place {
            return;
        }
        let sent_first = group.sent_first;
        let Appended::At(position) = result else {
            return self.fenced(node);
        };
        let after = self.nodes[node].last_position;
        let between = &self.logs[node].groups[(after + 1).min(position)..position];
        // What a predecessor's last message brings late is ignored by every reader.
        let fenced = between.iter().any(|group| group.place.0 > place.0);
        if self.logs[node].kind == Kind::Positions
            && fenced
            && !self.has(Defect::PositionNotChecked)
        {
            return self.fenced(node);
        }
        let late = self.has(Defect::ContactDatedAtReply);
        let (clock, real) = if late {
            (self.clock(node), self.now)
        } else {
            sent_first
        };
        let one = &mut self.nodes[node];
        one.last_position = after.max(position);
        one.last_place = place;
        if clock > one.contact {
            (one.contact, one.contact_real) = (clock, real);
        }
        let group = one
            .in_flight
            .take()
            .map(|group| group.orders)
            .unwrap_or_default();
        for order in group {
            let one = &mut self.nodes[node];
            if let Some(buyer) = one.buyers.get_mut(&order.user) {
                buyer.keys.insert(order.key, true);
            }
            one.queue.push_back((order.clone(), place));
            self.acknowledge(node, &order);
        }
    }

    // --- The database -------------------------------------------------------------------------

    /// A worker's batch.
    fn write(&mut self, node: NodeId) {
        let batch: Vec<(Order, Place)> =
            self.nodes[node].queue.iter().take(BATCH).cloned().collect();
        if batch.is_empty() {
            return;
        }
        let epoch = self.nodes[node].epoch;
        let logged = batch.iter().rev().find(|(_, place)| *place != NO_PLACE);
        let last = logged.map_or(NO_PLACE, |(_, place)| *place);
        let rest = self.nodes[node]
            .queue
            .iter()
            .skip(batch.len())
            .any(|(_, place)| *place == last);
        let settled = if rest {
            (last.0, last.1.saturating_sub(1))
        } else {
            last
        };
        let fence = !self.has(Defect::RowWithoutFence);
        let written: BTreeSet<u64> = batch.iter().map(|(order, _)| order.id).collect();
        let outcome = self.transact(node, |db| {
            if fence && db.nodes[node].epoch != epoch {
                return Err("fenced");
            }
            for (order, _) in &batch {
                if db.orders.insert(order.id, order.clone()).is_none() {
                    db.shares[node].held += order.units;
                }
            }
            let row = &mut db.nodes[node];
            row.place = row.place.max(settled);
            Ok(())
        });
        match outcome {
            Outcome::Done(()) => {
                let queue = &mut self.nodes[node].queue;
                queue.retain(|(order, _)| !written.contains(&order.id));
                for (order, _) in batch.iter().filter(|(_, place)| *place == NO_PLACE) {
                    if let Some(buyer) = self.nodes[node].buyers.get_mut(&order.user) {
                        buyer.keys.insert(order.key, true);
                    }
                    self.acknowledge(node, order);
                }
            }
            Outcome::Refused(_) => self.fenced(node),
            // The batch is written again; ids that are there stay as they are.
            Outcome::Unknown | Outcome::Away | Outcome::Failover => {}
        }
    }

    fn renew(&mut self, node: NodeId) {
        let (clock, real) = (self.clock(node), self.now);
        if clock < self.nodes[node].renewed + 500 {
            return;
        }
        let row_timeline = self.db.nodes[node].asserted;
        if self.nodes[node].timeline == self.db.timeline && row_timeline != self.db.timeline {
            return self.assert_again(node);
        }
        let epoch = self.nodes[node].epoch;
        let ids_until = (self.nodes[node].last_id + 1).max((clock + self.nodes[node].skew) * 1_000)
            + 60_000_000;
        let lanes: Vec<Lane> = self.nodes[node].lanes.keys().copied().collect();
        let leased = lanes.clone();
        let outcome = self.transact(node, |db| {
            let row = &mut db.nodes[node];
            if row.epoch != epoch {
                return Err("fenced");
            }
            row.counter += 1;
            for lane in lanes {
                if db.lanes[lane].owner == node {
                    db.lanes[lane].ids_until = db.lanes[lane].ids_until.max(ids_until);
                }
            }
            Ok(db.clone())
        });
        let db = match outcome {
            Outcome::Done(db) => db,
            Outcome::Refused(_) => return self.fenced(node),
            _ => return,
        };
        let no_gap = !self.has(Defect::OwnGapNotCounted);
        let one = &mut self.nodes[node];
        if no_gap && clock > one.renewed + LEASE_MS / 4 {
            one.gap_ended = clock;
        }
        one.renewed = clock;
        one.ids_until = ids_until;
        for lane in leased {
            if let Some(lane) = one.lanes.get_mut(&lane) {
                lane.leased = true;
            }
        }
        if clock > one.contact {
            (one.contact, one.contact_real) = (clock, real);
        }
        if one.watch.len() != db.nodes.len() {
            one.watch = vec![(u64::MAX, clock); db.nodes.len()];
        }
        for (other, row) in db.nodes.iter().enumerate() {
            if one.watch[other].0 != row.counter {
                one.watch[other] = (row.counter, clock);
            }
        }
        for (lane, row) in db.lanes.iter().enumerate() {
            one.view[lane] = row.owner;
        }
        self.see_lanes(node, &db);
        if self.nodes[node].up && self.db.nodes[node].standing != Standing::Active {
            self.violated(format!(
                "node {node} renewed a row that is {:?}",
                self.db.nodes[node].standing
            ));
        }
    }

    fn open_lanes(&mut self, node: NodeId) {
        let clock = self.clock(node);
        for lane in self.nodes[node].lanes.values_mut() {
            if clock >= lane.opens_at && lane.leased {
                lane.open = true;
            }
        }
    }
}
