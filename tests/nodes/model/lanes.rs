//! Lanes come and go.

use std::collections::BTreeMap;

use rand::Rng;

use super::rules::Defect;
use super::world::{Click, HOMES, Id, LANES, Order, SKU, World, lane_of, units_of};
use crate::arbiter::{Node, Refused, State};

#[derive(Clone, Debug, Default)]
pub struct LaneMemory {
    pub epoch: i64,
    pub is_open: bool,
    pub known: BTreeMap<Click, Id>,
    /// To be handed to this node, once it is drained.
    pub goes_to: Option<Node>,
    /// The answer to its hand-over was lost; so many units went with it, if it went.
    pub in_doubt: Option<i64>,
    /// Not to be opened before this moment of the local clock.
    pub opens_ms: u64,
}

impl World {
    pub fn units_of_lane(&self, lane: usize) -> i64 {
        let rows = self.db.rows.values();
        let rows = rows.filter(|row| lane_of(row.click) == lane);
        rows.map(|row| units_of(row.click)).sum()
    }

    fn rows_of(&self, lane: usize) -> BTreeMap<Click, Id> {
        let rows = self.db.rows.values();
        let rows = rows.filter(|row| lane_of(row.click) == lane);
        rows.map(|row| (row.click, row.id)).collect()
    }

    /// Looks which lanes are its own, and opens or forgets them.
    pub fn lanes(&mut self, home: usize) {
        if !self.asks_database(home) || !self.process(home).is_active {
            return;
        }
        if self.chance(0.3) && !self.claim(home) {
            return;
        }
        for at in 0..LANES {
            self.lane(home, at);
        }
    }

    fn lane(&mut self, home: usize, at: usize) {
        let local = self.local_ms(home);
        let lease = self.process(home).lease;
        let row = self.db.arbiter.lanes[at];
        let is_late = self.loses(0.9);
        let is_known_epoch = |epoch: i64| (row.node, row.epoch) == (Some(lease.node), epoch);
        let process = self.process(home);
        if let Some(lane) = process.lanes.get_mut(&at)
            && let Some(units) = lane.in_doubt
        {
            if is_late {
                return;
            }
            // The epoch tells whether it went; it may have come back since.
            if is_known_epoch(lane.epoch) {
                (lane.in_doubt, lane.is_open, lane.goes_to) = (None, true, None);
                return;
            }
            process.lanes.remove(&at);
            process.lent -= units;
            process.taken -= units;
        }
        if row.node != Some(lease.node) {
            self.process(home).lanes.remove(&at);
            if self.has(Defect::StaleLoad) {
                // For a lane that may come: read while it is open elsewhere.
                let rows = self.rows_of(at);
                self.homes[home].preloaded.insert(at, rows);
            }
            return;
        }
        match self.process(home).lanes.get(&at) {
            // Handed over to us: the units of its orders came along.
            None => {
                let units = match self.has(Defect::LeaveUnits) {
                    true => 0,
                    false => self.units_of_lane(at),
                };
                let process = self.process(home);
                process.lent += units;
                process.taken += units;
                process.lanes.insert(at, LaneMemory::default());
            }
            Some(lane) if lane.is_open || lane.goes_to.is_some() || row.blocked_by.is_some() => {}
            Some(_) => self.open(home, at, local),
        }
    }

    /// Takes the lanes that are nobody's. False: the process has ended.
    fn claim(&mut self, home: usize) -> bool {
        let lease = self.process(home).lease;
        if self.db.arbiter.lanes.iter().all(|lane| lane.node.is_some()) {
            return true;
        }
        // A log that is ahead of a free row is that of a node whose join was lost.
        for node in 0..HOMES as Node + 2 {
            let row = self.db.arbiter.nodes.get(&node);
            let is_free = row.is_none_or(|row| row.state == State::Left);
            let (epoch, newest) = (row.map_or(0, |row| row.epoch), self.log_epoch(node));
            if is_free && newest > epoch && !self.has(Defect::LogOfAFreeRow) {
                self.saw("log of a free row found");
                let adopted = self.db.arbiter.adopt(lease, node, newest);
                if adopted.is_err() {
                    self.end(home);
                }
                return adopted.is_ok();
            }
        }
        let held = self.db.arbiter.pools[&SKU].held;
        let before = self.db.arbiter.nodes.clone();
        if self.has(Defect::ClaimBeforeReplay) {
            let others = self.db.arbiter.nodes.iter_mut();
            for (_, row) in others.filter(|(node, _)| **node != lease.node) {
                row.state = State::Active;
            }
        }
        let claimed = self.db.arbiter.claim_free(lease);
        if self.has(Defect::ClaimBeforeReplay) {
            self.db.arbiter.nodes = before;
        }
        match claimed {
            Err(_) => {
                self.end(home);
                return false;
            }
            Ok(taken) if !taken.is_empty() => {
                self.saw("free lanes taken");
                let process = self.process(home);
                process.lent += held;
                process.taken += held;
                for at in taken {
                    process.lanes.insert(at, LaneMemory::default());
                }
            }
            Ok(_) => {}
        }
        true
    }

    pub fn open(&mut self, home: usize, at: usize, local: u64) {
        let row = self.db.arbiter.lanes[at];
        let mut known = self.rows_of(at);
        if self.has(Defect::StaleLoad)
            && let Some(before) = self.homes[home].preloaded.remove(&at)
        {
            known = before;
        }
        if self.has(Defect::NothingLoaded) {
            known.clear();
        }
        let own_clock_only = self.has(Defect::OwnClockOnly);
        let process = self.process(home);
        let lane = process.lanes.get_mut(&at).expect("it is ours");
        if local < lane.opens_ms {
            return;
        }
        if !own_clock_only {
            process.clock = process.clock.max(row.ids_until);
        }
        *lane = LaneMemory {
            epoch: row.epoch,
            is_open: true,
            known,
            ..LaneMemory::default()
        };
        self.saw("lane opened");
    }

    /// Closes a lane for another node, or hands it over once it is drained.
    pub fn hand_over(&mut self, home: usize) {
        let at = self.random.random_range(0..LANES);
        let to = self.random.random_range(0..HOMES as Node);
        let starts = !self.is_calm && self.chance(0.2);
        let reopens = self.chance(0.1);
        let no_drain = self.has(Defect::NoDrain);
        let process = self.process(home);
        let lease = process.lease;
        let Some(lane) = process.lanes.get_mut(&at) else {
            return;
        };
        if lane.is_open && starts && to != lease.node {
            (lane.is_open, lane.goes_to) = (false, Some(to));
            return;
        }
        let Some(to) = lane.goes_to.filter(|_| lane.in_doubt.is_none()) else {
            return;
        };
        let epoch = lane.epoch;
        let of_lane = |order: &Order| lane_of(order.click) == at;
        let is_drained = !process.coming().any(of_lane)
            && !process.dry.iter().any(|(click, _)| lane_of(*click) == at);
        if !is_drained && !no_drain {
            if reopens {
                // Not in time.
                let lane = self.process(home).lanes.get_mut(&at).expect("it is ours");
                (lane.is_open, lane.goes_to) = (true, None);
            }
            return;
        }
        if !self.asks_database(home) {
            return;
        }
        let used = self.process(home).clock + 1;
        let held = match self.units_of_lane(at) {
            0 => vec![],
            _ if self.has(Defect::LeaveUnits) => vec![],
            units => vec![(SKU, units, units)],
        };
        let moved = held.first().map_or(0, |(.., units)| *units);
        let (is_lost, is_done) = (self.loses(0.3), self.chance(0.5));
        if is_lost {
            self.saw("answer of a hand-over lost");
            if is_done {
                let _ = self.db.arbiter.hand_over(lease, at, epoch, to, used, &held);
            }
            let is_guessed = self.has(Defect::HandOverGuessed);
            let lane = self.process(home).lanes.get_mut(&at).expect("it is ours");
            match is_guessed {
                true => (lane.is_open, lane.goes_to) = (true, None),
                false => lane.in_doubt = Some(moved),
            }
            return;
        }
        match self.db.arbiter.hand_over(lease, at, epoch, to, used, &held) {
            Err(Refused::Fenced) => self.end(home),
            Err(Refused::Check) => {
                self.violated(format!("{lease:?} holds no {moved} units of lane {at}"))
            }
            Ok(None) => {
                // Not active, or moved already: looked at again.
                let row = self.db.arbiter.lanes[at];
                let is_ours = row.node == Some(lease.node) && row.epoch == epoch;
                let lane = self.process(home).lanes.get_mut(&at).expect("it is ours");
                if is_ours {
                    (lane.is_open, lane.goes_to) = (true, None);
                }
            }
            Ok(Some(_)) => {
                self.saw("handed over");
                let process = self.process(home);
                process.lanes.remove(&at);
                process.lent -= moved;
                process.taken -= moved;
            }
        }
    }
}
