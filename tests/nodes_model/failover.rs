//! A failover of PostgreSQL that loses commits loses rights, not only rows.

use crate::db::{Lane, NodeId, Outcome, Standing};
use crate::rules::Defect;
use crate::shares::{drop_unasserted, insert, move_lane};
use crate::takeover::LATER;
use crate::world::World;

impl World {
    /// The node says on the new timeline what it knows: epochs, lanes, loans.
    pub fn assert_again(&mut self, node: NodeId) {
        let one = self.nodes[node].clone();
        let lower_wins = self.has(Defect::LowerEpochWins);
        let ahead: Vec<bool> = (0..self.nodes.len())
            .map(|at| self.log_is_ahead(at))
            .collect();
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch > one.epoch {
                return Err("fenced");
            }
            for (lane, (to, epoch, units)) in &one.given {
                if db.lanes[*lane].epoch < *epoch && !lower_wins {
                    // If that node is gone, the lane goes where its others went.
                    match db.nodes[*to].standing {
                        Standing::TakenBy(by) if by != *to => {
                            move_lane(db, *lane, *to, *epoch + 1, *units);
                            (db.lanes[*lane].owner, db.lanes[*lane].blocked_by) = (by, Some(*to));
                        }
                        Standing::Free if !ahead[*to] => {
                            move_lane(db, *lane, node, *epoch + 1, *units)
                        }
                        _ => move_lane(db, *lane, *to, *epoch, *units),
                    }
                }
            }
            for (lane, epoch) in &one.counted {
                let row = &db.lanes[*lane];
                let lost = row.epoch < *epoch || (row.epoch == *epoch && row.home() != node);
                if lost && !lower_wins {
                    move_lane(db, *lane, node, *epoch, 0);
                }
                let row = &mut db.lanes[*lane];
                if row.owner == node {
                    row.blocked_by = None;
                    row.ids_until = row.ids_until.max(one.ids_until);
                }
            }
            for (taken, epoch) in &one.taken_rows {
                let row = &mut db.nodes[*taken];
                if row.epoch < *epoch || (row.epoch == *epoch && row.standing != Standing::Free) {
                    (row.epoch, row.standing) = (*epoch, Standing::TakenBy(node));
                    db.shares[*taken].lent = db.shares[*taken].held;
                }
            }
            drop_unasserted(db);
            // Lanes that came, and that memory has not seen.
            let unseen =
                |lane: &Lane| db.lanes[*lane].home() == node && !one.counted.contains_key(lane);
            let units = |lane: Lane| db.lanes[lane].units.max(db.units_of(lane));
            let unseen: u64 = (0..db.lanes.len()).filter(unseen).map(units).sum();
            db.shares[node].lent = if one.followed {
                one.lent + unseen
            } else {
                db.shares[node].held.max(unseen)
            };
            if db.lent() > db.total {
                return Err(LATER);
            }
            let timeline = db.timeline;
            let row = &mut db.nodes[node];
            (row.epoch, row.standing, row.asserted) = (one.epoch, Standing::Active, timeline);
            row.counter += 1;
            Ok(())
        });
        match outcome {
            Outcome::Refused(LATER) => {}
            Outcome::Done(()) => {
                let (shares, lent, taken) = (
                    self.db.shares.clone(),
                    self.nodes[node].lent,
                    self.nodes[node].taken,
                );
                self.say(|| {
                    format!("node {node} has asserted its rights: {lent} {taken} {shares:?}")
                });
                self.nodes[node].loan = None;
                if lower_wins {
                    let db = self.db.clone();
                    let mut lost = self.nodes[node].lanes.clone();
                    lost.retain(|lane, _| db.lanes[*lane].owner != node);
                    for lane in lost.keys() {
                        let row = &db.lanes[*lane];
                        self.lose_lane(node, *lane, (row.owner, row.epoch, row.units));
                    }
                }
            }
            Outcome::Refused(_) => self.fenced(node),
            _ => {}
        }
    }

    /// Once everybody has asserted: what the failover lost is read from the own log.
    pub fn replay_own_log(&mut self, node: NodeId) {
        if !self.all_asserted() || self.db.nodes[node].asserted != self.db.timeline {
            return;
        }
        let Some(groups) = self.groups_after(node) else {
            return;
        };
        let epoch = self.nodes[node].epoch;
        let queued: Vec<u64> = self.nodes[node]
            .queue
            .iter()
            .map(|(order, _)| order.id)
            .collect();
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch != epoch {
                return Err("fenced");
            }
            let mut place = db.nodes[node].place;
            let mut settled = true;
            for (at, orders) in &groups {
                for order in orders {
                    if queued.contains(&order.id) {
                        settled = false;
                    } else {
                        insert(db, order, false);
                    }
                }
                if settled {
                    place = *at;
                }
            }
            db.nodes[node].place = place;
            db.nodes[node].replayed = db.timeline;
            for lane in 0..db.lanes.len() {
                let row = db.lanes[lane].clone();
                if row.blocked_by == Some(node) {
                    move_lane(db, lane, row.owner, row.epoch, 0);
                }
            }
            if db.lent() > db.total {
                Err(LATER)
            } else {
                Ok(())
            }
        });
        match outcome {
            Outcome::Done(()) => {
                self.nodes[node].replayed = self.nodes[node].timeline;
                self.follow_share(node);
            }
            Outcome::Refused(LATER) => {}
            Outcome::Refused(_) => self.fenced(node),
            _ => {}
        }
    }
}
