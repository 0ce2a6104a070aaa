//! Lending: units move between the pool and the nodes' shares.

use crate::db::{NodeId, Outcome, Want};
use crate::rules::Defect;
use crate::world::World;

/// What a node borrows at a time, and when it does.
const PART: u64 = 3;
const LOW: u64 = 1;

/// A loan whose COMMIT got no answer.
#[derive(Clone, Copy, Debug)]
pub struct Loan;

impl World {
    /// Memory follows the row: what is lent, and what of it is a row or on its way to be one.
    pub fn follow_share(&mut self, node: NodeId) {
        // Until every log was read again, rows that a failover has lost are missing in `held`.
        self.nodes[node].loan = Some(Loan);
        let replayed = self.rights() || self.has(Defect::PlaceKeptAfterFailover);
        if !self.db.up || self.nodes[node].timeline != self.db.timeline || !replayed {
            return;
        }
        let share = self.db.shares[node];
        let rows = &self.db.orders;
        let one = &self.nodes[node];
        let coming: u64 = one
            .not_rows()
            .filter(|order| !rows.contains_key(&order.id))
            .map(|order| order.units)
            .sum();
        let mine = |(lane, row): (usize, &crate::db::LaneRow)| {
            (row.home() == node).then_some((lane, row.epoch))
        };
        let counted = self.db.lanes.iter().enumerate().filter_map(mine).collect();
        let one = &mut self.nodes[node];
        one.counted = counted;
        one.lent = share.lent;
        one.taken = share.held + coming;
        one.loan = None;
        one.followed = true;
    }

    fn may_lend(&self, node: NodeId) -> bool {
        self.db.nodes[node].asserted == self.db.timeline
    }

    pub fn lend(&mut self, node: NodeId) {
        if self.nodes[node].loan.is_some() {
            return self.follow_share(node);
        }
        if self.db.up && !self.may_lend(node) {
            return;
        }
        let wanted = self.db.wants.iter().position(|want| want.node == node);
        let others_first = self
            .db
            .wants
            .iter()
            .take(wanted.unwrap_or(usize::MAX))
            .count()
            > 0;
        let patient = !self.has(Defect::PoolLendsPastWants) || self.nodes[node].free() > LOW;
        if self.db.recall || (others_first && patient) {
            self.give_back(node);
        } else if self.nodes[node].free() <= LOW || wanted.is_some() {
            self.borrow_units(node);
        }
    }

    fn borrow_units(&mut self, node: NodeId) {
        let epoch = self.nodes[node].epoch;
        let (past_wants, rights) = (self.has(Defect::PoolLendsPastWants), self.rights());
        let early = self.has(Defect::LentBeforeCommit);
        let (mut guess, mut overtaken) = (0, false);
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch != epoch {
                return Err("fenced");
            }
            if db.recall || !rights {
                return Ok(0);
            }
            let first = db.wants.first().cloned();
            let part = match &first {
                Some(want) if want.node == node => {
                    let others = db
                        .shares
                        .iter()
                        .enumerate()
                        .filter(|(other, _)| *other != node);
                    let others: u64 = others.map(|(_, share)| share.lent - share.held).sum();
                    if db.pool() + others < want.units {
                        // Nobody has them any more.
                        db.wants.remove(0);
                        return Ok(0);
                    }
                    if db.pool() < want.units {
                        return Ok(0);
                    }
                    db.wants.remove(0);
                    want.units
                }
                Some(_) if !past_wants => return Ok(0),
                _ => PART,
            };
            let part = part.min(db.pool());
            overtaken = part > 0 && first.is_some_and(|want| want.node != node);
            db.shares[node].lent += part;
            guess = part;
            Ok(part)
        });
        if overtaken {
            self.violated(format!("the pool lent to node {node} past an older want"));
        }
        match outcome {
            Outcome::Done(part) => self.nodes[node].lent += part,
            Outcome::Refused(_) => self.fenced(node),
            Outcome::Unknown if early || self.has(Defect::UnknownLoanAssumed) => {
                self.nodes[node].lent += guess
            }
            Outcome::Unknown => self.nodes[node].loan = Some(Loan),
            Outcome::Away if early => self.nodes[node].lent += PART.min(self.db.pool()),
            Outcome::Away | Outcome::Failover => {}
        }
    }

    /// Free units go back to the pool, for whoever wants them.
    fn give_back(&mut self, node: NodeId) {
        let wanted: u64 = self
            .db
            .wants
            .iter()
            .filter(|want| want.node != node)
            .map(|want| want.units)
            .sum();
        let missing = if self.db.recall {
            u64::MAX
        } else {
            wanted.saturating_sub(self.db.pool())
        };
        let part = self.nodes[node].free().min(missing);
        if part == 0 {
            return;
        }
        let epoch = self.nodes[node].epoch;
        let late = self.has(Defect::ReturnedAfterCommit);
        if !late {
            self.nodes[node].lent -= part;
        }
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch != epoch {
                return Err("fenced");
            }
            let share = &mut db.shares[node];
            share.lent = share
                .lent
                .checked_sub(part)
                .ok_or("CHECK: less than nothing is lent")?;
            Ok(())
        });
        match outcome {
            // With the defect they are taken from memory a while later.
            Outcome::Done(()) if late => self.nodes[node].loan = Some(Loan),
            Outcome::Done(()) => {}
            Outcome::Refused(_) => self.fenced(node),
            Outcome::Away if !late => self.nodes[node].lent += part,
            Outcome::Failover if !late => self.nodes[node].lent += part,
            Outcome::Unknown | Outcome::Away | Outcome::Failover => {
                self.nodes[node].loan = Some(Loan)
            }
        }
    }

    /// A node without units for an order: it says sold out if nobody had any, and wants some otherwise.
    pub fn dry(&mut self, node: NodeId, units: u64, request: usize) {
        let pool_alone = self.has(Defect::SoldOutByPoolAlone);
        let free = self.nodes[node].free();
        let epoch = self.nodes[node].epoch;
        if self.nodes[node].loan.is_some() || self.db.up && !self.rights() {
            return;
        }
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch != epoch {
                return Err("fenced");
            }
            let others = db
                .shares
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != node);
            let others: u64 = others.map(|(_, share)| share.lent - share.held).sum();
            let others = if pool_alone { 0 } else { others };
            if db.pool() + others + free < units {
                return Ok(true);
            }
            if !db.wants.iter().any(|want| want.node == node) {
                db.wants.push(Want {
                    node,
                    units: units - free.min(units),
                });
            }
            Ok(false)
        });
        match outcome {
            Outcome::Done(true) => {
                self.said_sold_out(node, units);
                self.answer_reaches(request);
            }
            Outcome::Refused(_) => self.fenced(node),
            _ => {}
        }
    }

    /// An operator lowers the total: recall, then the fall.
    pub fn operator(&mut self) {
        if !self.db.up || !self.rights() {
            return;
        }
        let without = self.has(Defect::FallWithoutRecall);
        let held: u64 = self.db.shares.iter().map(|share| share.held).sum();
        if !self.db.recall && !without {
            self.db.recall = true;
            self.say(|| "recall".to_owned());
            return;
        }
        self.db.recall = false;
        let to = if without {
            held.max(1)
        } else {
            self.db.lent().max(1)
        };
        self.db.total = self.db.total.min(to).max(1);
        if self.synchronous {
            self.replica = self.db.clone();
        }
        let total = self.db.total;
        self.say(|| format!("the total falls to {total}"));
        if let Some(broken) = self.db.broken_check() {
            self.violated(format!("operator: {broken}"));
        }
    }
}
