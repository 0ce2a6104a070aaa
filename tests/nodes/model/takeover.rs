//! A row changes hands: at a start, and when its node is dead.

use std::collections::{BTreeMap, VecDeque};

use millrace::pipeline::cluster::watch::{Beat, Watch};
use millrace::store::cluster::takeover::Suspect;
use rand::Rng;

use super::lanes::LaneMemory;
use super::node::{Process, Renewal};
use super::rules::Defect;
use super::world::{Group, LANES, LEASE_MS, Order, SKU, SUCCESSOR_MS, World};
use crate::arbiter::{Lease, Node, Refused, State};

/// The stage of a takeover, or of a start on one's own log.
#[derive(Clone, Debug)]
pub struct Replay {
    pub dead: Lease,
    pub is_own: bool,
    /// Its lanes are nobody's, and its units in no share.
    on_sku: bool,
    /// When the marker was durable, by the local clock.
    marked_ms: Option<u64>,
    /// Orders that are still to be applied.
    orders: Option<VecDeque<Order>>,
    /// Every id of them lies before this moment.
    ids_until: i64,
    pub is_finished: bool,
}

impl World {
    fn replay_of(&self, dead: Lease, is_own: bool) -> Replay {
        Replay {
            dead,
            is_own,
            on_sku: !self.db.arbiter.shares.contains_key(&(SKU, dead.node)),
            marked_ms: None,
            orders: None,
            ids_until: 0,
            is_finished: false,
        }
    }

    pub fn start(&mut self, home: usize) {
        if !self.reaches_database(home) || !self.reaches_broker(home) {
            return;
        }
        let wall = self.wall_ms(home);
        let Some((lease, lanes, inherited)) = self.db.arbiter.join(home as u64 + 1, wall) else {
            return;
        };
        self.processes += 1;
        let row = self
            .db
            .arbiter
            .nodes
            .get_mut(&lease.node)
            .expect("it joined");
        row.log_in_use = true;
        let leased = row.ids_until;
        let clock = leased - self.db.arbiter.id_lease;
        let mut replays = vec![self.replay_of(lease, true)];
        replays.extend(
            inherited
                .into_iter()
                .map(|dead| self.replay_of(dead, false)),
        );
        let lane = |at: usize| {
            let lane = LaneMemory {
                epoch: self.db.arbiter.lanes[at].epoch,
                ..LaneMemory::default()
            };
            (at, lane)
        };
        let lanes = lanes.into_iter().map(lane).collect();
        self.homes[home].renewed_ms = self.served_ms;
        self.homes[home].process = Some(Process {
            number: self.processes,
            lease,
            timeline: self.db.arbiter.timeline,
            lanes,
            lent: 0,
            taken: 0,
            clock,
            sequence: 0,
            leased,
            group: Vec::new(),
            in_flight: None,
            next: (lease.epoch, 1),
            queue: VecDeque::new(),
            batch: None,
            watch: Watch::new(LEASE_MS),
            standing: BTreeMap::new(),
            renewal: Renewal::None,
            answers_until_ms: 0,
            contact_stopped_ms: 0,
            suspect: None,
            replays,
            books: 0,
            doubt: None,
            giving: None,
            want: None,
            want_ms: 0,
            refused: 0,
            look: None,
            sold_out: None,
            dry: Vec::new(),
            is_active: false,
        });
    }

    /// Looks for a suspect, and fences it a while later.
    pub fn take_over(&mut self, home: usize) {
        if !self.asks_database(home) || !self.process(home).is_active {
            return;
        }
        let local = self.local_ms(home);
        let count_own_gap = self.has(Defect::CountOwnGap);
        let process = self.process(home);
        let Some(mut suspect) = process.suspect.take() else {
            let suspects = if count_own_gap {
                let stands = process.standing.values();
                let stands = stands.filter(|(_, since)| local - since >= LEASE_MS);
                let suspect = |(beat, _): &(Beat, u64)| Suspect {
                    node: beat.node,
                    epoch: beat.epoch,
                    renewals: beat.renewals,
                };
                stands.map(suspect).collect()
            } else {
                process.watch.suspects(local)
            };
            process.suspect = suspects.first().copied();
            return;
        };
        let by = process.lease;
        let before = self.db.arbiter.clone();
        if self.has(Defect::CounterNotLookedAtAgain)
            && let Some(row) = before.nodes.get(&suspect.node)
        {
            (suspect.epoch, suspect.renewals) = (row.epoch, row.renewals);
        }
        let dead = Lease {
            node: suspect.node,
            epoch: suspect.epoch,
        };
        let fenced = self
            .db
            .arbiter
            .fence(by, suspect.node, suspect.epoch, suspect.renewals);
        let (mut fenced, lanes) = match fenced {
            Ok(Some(fenced)) => fenced,
            Ok(None) => return,
            Err(_) => return self.end(home),
        };
        self.saw("takeover");
        if fenced.len() > 1 {
            self.saw("took a takeover over");
        }
        let mut processes = self.homes.iter().filter(|home| {
            let process = home.process.as_ref();
            process.is_some_and(|process| process.lease == dead)
        });
        if let Some(victim) = processes.next()
            && self.served_ms - victim.renewed_ms < LEASE_MS * 9 / 10
        {
            self.violated(format!("{dead:?} was taken over although it renews"));
        }
        let was_lost = before.nodes[&dead.node].state == State::Lost;
        if self.has(Defect::NoEpoch) && !was_lost {
            let row = before.nodes[&dead.node];
            self.db.arbiter.nodes.insert(dead.node, row);
            fenced[0] = dead;
        }
        if self.has(Defect::InheritNothing) {
            // The lanes move, and the dead nodes of the dead node are nobody's.
            for dead in fenced.drain(1..) {
                for lane in &mut self.db.arbiter.lanes {
                    if lane.blocked_by == Some(dead.node) {
                        lane.blocked_by = Some(suspect.node);
                    }
                }
            }
        }
        let replays: Vec<Replay> = fenced
            .into_iter()
            .map(|dead| self.replay_of(dead, false))
            .collect();
        if self.has(Defect::MergeBeforeReplay) {
            self.db.arbiter.merge(dead.node, by.node);
            let share = before.shares.get(&(SKU, dead.node)).copied();
            let share = share.unwrap_or_default();
            let process = self.process(home);
            process.lent += share.lent;
            process.taken += share.held + share.sold;
        }
        let forgets = self.has(Defect::ForgetDoubt);
        let epoch = |at: usize| self.db.arbiter.lanes[at].epoch;
        let lanes: Vec<(usize, i64)> = lanes.into_iter().map(|at| (at, epoch(at))).collect();
        let process = self.process(home);
        for (at, epoch) in lanes {
            let lane = LaneMemory {
                epoch,
                ..LaneMemory::default()
            };
            let before = process.lanes.insert(at, lane);
            if let Some(units) = before.and_then(|lane| lane.in_doubt)
                && !forgets
            {
                process.lent -= units;
                process.taken -= units;
            }
        }
        process.replays.extend(replays);
    }

    /// The next step of a takeover, or of the start. The own log comes first: until then there are no own rights.
    pub fn replay(&mut self, home: usize) {
        let replays = self.process(home).replays.iter();
        let mut open = replays
            .enumerate()
            .filter(|(_, replay)| !replay.is_finished);
        let Some((at, replay)) = open.next().map(|(at, replay)| (at, replay.clone())) else {
            return;
        };
        let reads_first = self.has(Defect::MarkerAfterReading) && !replay.is_own;
        match (replay.marked_ms, &replay.orders) {
            (None, None) if reads_first => self.read(home, at, &replay),
            (None, _) => self.mark(home, at, &replay),
            (Some(_), None) => self.read(home, at, &replay),
            (Some(marked_ms), Some(_)) if self.asks_database(home) => {
                self.apply(home, at, replay, marked_ms);
            }
            _ => {}
        }
    }

    fn mark(&mut self, home: usize, at: usize, replay: &Replay) {
        let local = self.local_ms(home);
        let node = replay.dead.node;
        if self.has(Defect::NoMarker) && !replay.is_own {
            self.process(home).replays[at].marked_ms = Some(local);
            return;
        }
        // Reading first takes its time.
        if !self.reaches_broker(home) || replay.orders.is_some() && self.chance(0.8) {
            return;
        }
        let epoch = replay.dead.epoch.max(self.log_epoch(node) + 1);
        let marker = Group {
            epoch,
            number: 0,
            orders: Vec::new(),
        };
        if !replay.is_own {
            self.cut_from_its_log(replay.dead);
        }
        self.store(node, marker);
        let process = self.process(home);
        process.replays[at].marked_ms = Some(local);
        if replay.is_own {
            process.next = (epoch, 1);
        }
    }

    fn read(&mut self, home: usize, at: usize, replay: &Replay) {
        if !self.reaches_broker(home) || !self.asks_database(home) {
            return;
        }
        let mut orders = match self.read_log(replay.dead.node) {
            Ok(orders) => orders,
            Err(damage) => return self.violated(damage),
        };
        if self.has(Defect::NoOwnReplay) && replay.is_own {
            orders.clear();
        }
        self.process(home).replays[at].orders = Some(orders.into());
    }

    fn apply(&mut self, home: usize, at: usize, replay: Replay, marked_ms: u64) {
        let local = self.local_ms(home);
        let orders = replay.orders.unwrap_or_default();
        let dead = replay.dead;
        if self.has(Defect::OpenBeforeReplay) && !replay.is_own && orders.len() > 1 {
            // It opens with what is there, and writes the rest afterwards.
            self.open_lanes_of(home, dead.node, local);
        }
        if !orders.is_empty() {
            let rows = self.random.random_range(1..8);
            let part: Vec<Order> = orders.iter().take(rows).copied().collect();
            if !self.write(dead, &part, replay.on_sku) {
                return self.process(home).replays[at].is_finished = true;
            }
            let newest = part.iter().map(|order| order.id.0 + 1).max().unwrap_or(0);
            let process = self.process(home);
            process.clock = process.clock.max(newest);
            let replaying = &mut process.replays[at];
            replaying.ids_until = replaying.ids_until.max(newest);
            replaying.orders = Some(orders.into_iter().skip(part.len()).collect());
            self.saw("replayed");
            return;
        }
        let opens_ms = marked_ms + SUCCESSOR_MS;
        let waits = replay.on_sku && !replay.is_own && local < opens_ms;
        if waits && !self.has(Defect::FinishBeforeAnswersRanOut) {
            return;
        }
        let by = self.process(home).lease;
        let arbiter = &mut self.db.arbiter;
        let share = arbiter.shares.get(&(SKU, dead.node)).copied();
        let share = share.unwrap_or_default();
        let mut lanes = arbiter.lanes.iter();
        let has_lanes = lanes.any(|lane| lane.blocked_by == Some(dead.node));
        if !replay.is_own
            && arbiter.may_write(dead)
            && let Some(row) = arbiter.nodes.get_mut(&dead.node)
        {
            // It is this already, but for the defect of a missing epoch.
            row.state = State::Dead(by);
        }
        let raises = self.has(Defect::IdsOfAFailover);
        let ids_until = if raises { 0 } else { replay.ids_until };
        let finished = match replay.is_own {
            true => self.db.arbiter.activate(by, ids_until),
            false => self.db.arbiter.finish(by, dead, ids_until),
        };
        match finished {
            Err(Refused::Fenced) if self.db.arbiter.check(by).is_err() => return self.end(home),
            // Inherited by another node, which does it again.
            Err(_) => return self.process(home).replays[at].is_finished = true,
            Ok(()) => {}
        }
        let early = self.has(Defect::OpenBeforeAnswerLease);
        let opens_ms = if early { 0 } else { opens_ms };
        let free: Vec<usize> = (0..LANES)
            .filter(|at| self.db.arbiter.lanes[*at].blocked_by.is_none())
            .collect();
        let process = self.process(home);
        process.replays[at].is_finished = true;
        if replay.is_own {
            process.is_active = true;
            process.lent = share.lent;
            process.taken = share.held + share.sold;
            process.books = share.borrowed;
        } else if has_lanes {
            process.lent += share.lent;
            process.taken += share.held + share.sold;
            process.sold_out = None;
        }
        for at in free {
            if let Some(lane) = process.lanes.get_mut(&at).filter(|lane| !lane.is_open) {
                lane.opens_ms = lane.opens_ms.max(opens_ms);
            }
        }
    }

    fn open_lanes_of(&mut self, home: usize, dead: Node, local: u64) {
        for at in 0..LANES {
            let row = self.db.arbiter.lanes[at];
            let lane = self.process(home).lanes.get(&at);
            let is_open = lane.is_none_or(|lane| lane.is_open);
            if row.blocked_by == Some(dead) && !is_open {
                self.open(home, at, local);
            }
        }
    }
}
