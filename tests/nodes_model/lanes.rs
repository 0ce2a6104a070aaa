//! Lanes come and go: after a start or a takeover, and by hand-over.

use crate::db::{Db, Lane, NodeId, Outcome, Standing};
use crate::node::{Buyer, OwnedLane};
use crate::rules::Defect;
use crate::shares::move_lane;
use crate::world::{ANSWER_MS, World};

/// How long a lane that moves may be closed before it reopens.
const DRAIN_MS: u64 = 2_000;

#[derive(Clone, Debug)]
pub struct HandOver {
    lane: Lane,
    to: NodeId,
    since: u64,
    unknown: bool,
}

impl World {
    /// Lanes that came, and lanes that went.
    pub fn see_lanes(&mut self, node: NodeId, db: &Db) {
        for (taken, epoch) in self.nodes[node].taken_rows.clone() {
            if db.nodes[taken].epoch > epoch {
                self.nodes[node].taken_rows.remove(&taken);
            }
        }
        if !self.rights() || db.nodes[node].asserted != db.timeline {
            return;
        }
        for (lane, row) in db.lanes.iter().enumerate() {
            let older = self.nodes[node]
                .lanes
                .get(&lane)
                .is_some_and(|held| held.epoch < row.epoch);
            if older && row.owner != node {
                self.lose_lane(node, lane, (row.owner, row.epoch, row.units));
            }
        }
        let clock = self.clock(node);
        // After a failover whoever had it before may still answer.
        let opens_at = if db.timeline > 1 {
            clock + ANSWER_MS
        } else {
            clock
        };
        self.load_lanes(node, db, opens_at);
    }

    pub fn load_lanes(&mut self, node: NodeId, db: &Db, opens_at: u64) {
        for (lane, row) in db.lanes.iter().enumerate() {
            let known = self.nodes[node]
                .lanes
                .get(&lane)
                .is_some_and(|held| held.epoch >= row.epoch);
            if row.owner == node && row.blocked_by.is_none() && !known && self.rights() {
                self.load_lane(node, db, lane, opens_at);
            }
        }
    }

    pub fn load_lane(&mut self, node: NodeId, db: &Db, lane: Lane, opens_at: u64) {
        let row = &db.lanes[lane];
        let (keys, raise) = (
            !self.has(Defect::OpenBeforeKeys),
            !self.has(Defect::IdsFromOwnClock),
        );
        let one = &mut self.nodes[node];
        one.given.remove(&lane);
        one.lanes.insert(
            lane,
            OwnedLane {
                epoch: row.epoch,
                open: false,
                leased: false,
                opens_at,
                moving: false,
            },
        );
        if raise {
            one.last_id = one.last_id.max(row.ids_until);
        }
        one.buyers
            .retain(|user, _| crate::db::lane_of(*user) != lane);
        for order in db
            .orders
            .values()
            .filter(|order| keys && order.lane() == lane)
        {
            let buyer: &mut Buyer = one.buyers.entry(order.user).or_default();
            buyer.keys.insert(order.key, true);
            buyer.units += order.units;
        }
        self.follow_share(node);
        self.say(|| format!("node {node} has lane {lane}"));
    }

    pub fn lose_lane(&mut self, node: NodeId, lane: Lane, to: (NodeId, u64, u64)) {
        let one = &mut self.nodes[node];
        one.lanes.remove(&lane);
        one.given.insert(lane, to);
        one.counted.remove(&lane);
        one.buyers
            .retain(|user, _| crate::db::lane_of(*user) != lane);
        one.hand_over = None;
        self.follow_share(node);
        self.say(|| format!("node {node} has given lane {lane} to {to:?}"));
    }

    pub fn go_on_handing_over(&mut self, node: NodeId) {
        let clock = self.clock(node);
        if self.db.nodes[node].asserted != self.db.timeline || !self.rights() || !self.db.up {
            return;
        }
        let Some(hand_over) = self.nodes[node].hand_over.clone() else {
            let open = |(lane, held): (&Lane, &OwnedLane)| held.open.then_some(*lane);
            let Some(lane) = self.nodes[node].lanes.iter().find_map(open) else {
                return;
            };
            let to = (node + 1 + self.now as usize % 2) % self.nodes.len();
            if self.calm
                || to == node
                || self.db.nodes[to].standing != Standing::Active
                || !self.chance(0.1)
            {
                return;
            }
            self.nodes[node].hand_over = Some(HandOver {
                lane,
                to,
                since: clock,
                unknown: false,
            });
            if let Some(held) = self.nodes[node].lanes.get_mut(&lane) {
                held.moving = true;
            }
            return;
        };
        let HandOver {
            lane,
            to,
            since,
            unknown,
        } = hand_over;
        let (epoch, last_id) = (self.nodes[node].epoch, self.nodes[node].last_id);
        let Some(held) = self.nodes[node].lanes.get_mut(&lane) else {
            self.nodes[node].hand_over = None;
            return;
        };
        if unknown {
            let row = &self.db.lanes[lane];
            if row.epoch > held.epoch && row.owner != node {
                let to = (row.owner, row.epoch, row.units);
                return self.lose_lane(node, lane, to);
            }
            held.moving = false;
            self.nodes[node].hand_over = None;
            return;
        }
        let lane_epoch = held.epoch;
        let busy = self.nodes[node]
            .not_rows()
            .any(|order| order.lane() == lane);
        if busy && !self.has(Defect::HandOverWithoutDraining) {
            if clock > since + DRAIN_MS {
                if let Some(held) = self.nodes[node].lanes.get_mut(&lane) {
                    held.moving = false;
                }
                self.nodes[node].hand_over = None;
            }
            return;
        }
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch != epoch {
                return Err("fenced");
            }
            if db.nodes[to].standing != Standing::Active || db.lanes[lane].epoch != lane_epoch {
                return Ok(None);
            }
            move_lane(db, lane, to, lane_epoch + 1, 0);
            db.lanes[lane].ids_until = last_id;
            Ok(Some((lane_epoch + 1, db.lanes[lane].units)))
        });
        match outcome {
            Outcome::Done(Some((epoch, units))) => self.lose_lane(node, lane, (to, epoch, units)),
            Outcome::Refused(_) => self.fenced(node),
            Outcome::Unknown if !self.has(Defect::HandOverGuessed) => {
                self.nodes[node].hand_over = Some(HandOver {
                    lane,
                    to,
                    since,
                    unknown: true,
                });
            }
            Outcome::Failover => {
                self.nodes[node].hand_over = Some(HandOver {
                    lane,
                    to,
                    since,
                    unknown: true,
                });
            }
            Outcome::Away => {}
            Outcome::Done(None) | Outcome::Unknown => {
                if let Some(held) = self.nodes[node].lanes.get_mut(&lane) {
                    held.moving = false;
                }
                self.nodes[node].hand_over = None;
            }
        }
    }
}
