//! Lending: units move between the pool and the nodes' shares, as `pipeline::cluster::lending` moves them.

use super::rules::Defect;
use super::world::{SKU, World, units_of};
use crate::arbiter::{Refused, State, Supply, Want};

/// The least that a node borrows, in a sale that ends soon and in one that goes on.
const PARTS: (i64, i64) = (1, 30);
/// Time for which a SKU that was found sold out may be said to be.
const SOLD_OUT_MS: u64 = 300;

/// What the database said about a want, and when.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    supply: Supply,
    want: Want,
    local_ms: u64,
}

/// For orders of at least so many units a SKU is sold out.
#[derive(Clone, Copy, Debug)]
pub struct SoldOut {
    pub from: i64,
    /// By the local clock.
    pub until_ms: u64,
    /// Since when units were looked for.
    pub looked_ms: u64,
}

impl World {
    /// Looks for units that orders wait for.
    pub fn lend(&mut self, home: usize) {
        if !self.asks_database(home) {
            return;
        }
        let blind = self.has(Defect::SoldOutWithoutOwn);
        let (gives_up, ahead) = (self.loses(0.003), self.chance(0.3));
        let process = self.process(home);
        if process.doubt.is_some() {
            return self.settle_doubt(home);
        }
        // One task lends and gives back, one thing after the other.
        if process.giving.is_some() && !blind {
            return;
        }
        if gives_up {
            process.dry.clear();
        }
        let lease = process.lease;
        if process.dry.is_empty() {
            process.look = None;
            if process.want.take().is_some() && self.db.arbiter.withdraw(lease, SKU).is_err() {
                self.end(home);
            } else if ahead {
                self.lend_ahead(home);
            }
            return;
        }
        if let Some(look) = process.look.take() {
            return self.act_on(home, look);
        }
        let (missing, want) = (process.missing(), process.want);
        match want {
            _ if missing == 0 && !(blind && want.is_some()) => {
                self.process(home).sold_out = None;
                self.answer_all(home);
            }
            None => self.lend_wanted(home),
            Some(want) => {
                let look = Look {
                    supply: self.supply(&want),
                    want,
                    local_ms: self.local_ms(home),
                };
                self.process(home).look = Some(look);
            }
        }
    }

    /// Takes units before any order lacks them. Leaves no want.
    fn lend_ahead(&mut self, home: usize) {
        let part = self.part().max(3);
        let process = self.process(home);
        if !process.is_active || process.lent - process.taken > part / 4 {
            return;
        }
        let lease = process.lease;
        let lanes = self.db.arbiter.lanes.clone();
        if self.has(Defect::LentWhileNobodys) {
            self.db.arbiter.lanes.clear();
        }
        let lent = self.db.arbiter.lend(lease, SKU, part, 1);
        self.db.arbiter.lanes = lanes;
        match lent {
            Err(_) => self.end(home),
            Ok((units, _, None)) => {
                let process = self.process(home);
                process.lent += units;
                process.books += units;
            }
            Ok((_, _, Some(_))) => {
                let _ = self.db.arbiter.withdraw(lease, SKU);
            }
        }
    }

    fn part(&self) -> i64 {
        if self.is_scarce { PARTS.0 } else { PARTS.1 }
    }

    fn supply(&self, want: &Want) -> Supply {
        let supply = self.db.arbiter.supply(want);
        let shares = self.db.arbiter.shares.iter();
        let mut unanswered = shares.filter(|((_, node), share)| {
            *node != want.node && share.answered < want.number && share.lent > share.held
        });
        let is_dead = |node| matches!(self.db.arbiter.nodes[node].state, State::Dead(_));
        let only_dead = unanswered.all(|((_, node), _)| is_dead(node));
        let is_said =
            self.has(Defect::SoldOutAlone) || self.has(Defect::SoldOutWithoutTheDead) && only_dead;
        match supply {
            Supply::Unanswered if is_said => Supply::None,
            supply => supply,
        }
    }

    fn act_on(&mut self, home: usize, look: Look) {
        let (blind, whole) = (
            self.has(Defect::SoldOutWithoutOwn),
            self.has(Defect::WantForTheWhole),
        );
        let process = self.process(home);
        let (lease, missing, least) = (process.lease, process.missing(), process.least());
        let (lent, free) = (process.lent, process.lent - process.taken);
        match look.supply {
            Supply::Unanswered if look.want.units <= missing => {}
            Supply::Unanswered | Supply::Pool => self.lend_wanted(home),
            Supply::None => {
                // A takeover may have brought units since the want was left.
                let share = self.db.arbiter.shares.get(&(SKU, lease.node));
                if share.copied().unwrap_or_default().lent != lent && !blind {
                    return;
                }
                // Nobody else has what is missing, so nobody can have an order of this many units.
                let own = if blind || whole { 0 } else { free };
                let from = own + look.want.units;
                if from > least {
                    return self.lend_wanted(home);
                }
                if self.db.arbiter.withdraw(lease, SKU).is_err() {
                    return self.end(home);
                }
                let process = self.process(home);
                process.want = None;
                process.sold_out = Some(SoldOut {
                    from,
                    until_ms: look.local_ms + SOLD_OUT_MS,
                    looked_ms: process.want_ms,
                });
                self.answer_all(home);
            }
        }
    }

    /// Takes units from the pool, or leaves a want for what is missing.
    fn lend_wanted(&mut self, home: usize) {
        let (whole, grows) = (
            self.has(Defect::WantForTheWhole),
            self.has(Defect::WantThatGrows),
        );
        let part = self.part();
        let process = self.process(home);
        let lease = process.lease;
        let missing = if whole {
            process.least()
        } else {
            process.missing()
        };
        let missing = missing.max(1);
        let least = match process.want {
            Some(want) if !grows => missing.min(want.units),
            _ => missing,
        };
        let guess = least.max(part);
        let (is_lost, is_done) = (self.loses(0.1), self.chance(0.5));
        if is_lost && !is_done {
            let early = self.has(Defect::LentBeforeCommit) || self.has(Defect::LoanGuessed);
            let process = self.process(home);
            match early {
                true => process.lent += guess,
                false => process.doubt = Some(0),
            }
            return;
        }
        let number = |want: &Want| want.number;
        let oldest = self.db.arbiter.wants.iter().min_by_key(|want| want.number);
        let is_overtaking = oldest.is_some_and(|want| want.node != lease.node);
        let arbiter = &self.db.arbiter;
        let is_kept = oldest
            .is_some_and(|want| want.node == lease.node && arbiter.supply(want) == Supply::Pool);
        let wants = self.db.arbiter.wants.clone();
        if self.has(Defect::LendPastWants) {
            let own = |want: &Want| want.node == lease.node;
            self.db.arbiter.wants.retain(own);
        }
        let lent = self.db.arbiter.lend(lease, SKU, guess, least);
        if self.has(Defect::LendPastWants) {
            let others = wants.into_iter().filter(|want| want.node != lease.node);
            self.db.arbiter.wants.extend(others);
        }
        let (units, want) = match lent {
            Err(_) => return self.end(home),
            Ok((units, _, want)) => (units, want),
        };
        let process = self.process(home);
        process.refused = match units == 0 && is_kept {
            true => process.refused + 1,
            false => 0,
        };
        if process.refused > 5 {
            self.violated(format!(
                "the pool keeps for {lease:?} what it does not lend"
            ));
        }
        if units > 0 && is_overtaking {
            self.violated(format!("the pool lends to {lease:?} past an older want"));
        }
        if is_lost {
            let guessed = self.has(Defect::LoanGuessed);
            let process = self.process(home);
            match guessed {
                true => process.lent += guess,
                false => process.doubt = Some(0),
            }
            return;
        }
        let left = self.db.arbiter.wants.iter();
        let left = left.copied().find(|one| Some(one.number) == want);
        let now = self.now_ms;
        let process = self.process(home);
        if left.as_ref().map(number) != process.want.as_ref().map(number) {
            process.want_ms = now;
        }
        process.want = left;
        process.lent += units;
        process.books += units;
        if units > 0 {
            process.sold_out = None;
            self.answer_all(home);
            self.saw("lent");
        }
    }

    /// Every order that waits for units is tried again.
    fn answer_all(&mut self, home: usize) {
        for (click, waits) in std::mem::take(&mut self.process(home).dry) {
            self.place_at(home, click, waits);
        }
    }

    /// Learns from the row what became of a transaction whose answer was lost.
    fn settle_doubt(&mut self, home: usize) {
        let lease = self.process(home).lease;
        if self.db.arbiter.withdraw(lease, SKU).is_err() {
            return self.end(home);
        }
        let share = self.db.arbiter.shares.get(&(SKU, lease.node)).copied();
        let borrowed = share.unwrap_or_default().borrowed;
        let process = self.process(home);
        process.want = None;
        let returning = process.doubt.take().unwrap_or(0);
        process.lent += borrowed - process.books + returning;
        process.books = borrowed;
        process.sold_out = None;
        self.saw("doubt settled");
    }

    /// Gives back what is free, for the want of another node or because the total is lowered: out of memory first.
    pub fn answer_wants(&mut self, home: usize) {
        if !self.asks_database(home) {
            return;
        }
        let database_first = self.has(Defect::GiveBackDatabaseFirst);
        let blind = self.has(Defect::SoldOutWithoutOwn);
        let process = self.process(home);
        let lease = process.lease;
        if process.doubt.is_some() || !process.is_active {
            return;
        }
        if let Some((units, answer)) = process.giving.take() {
            if database_first {
                process.lent -= units;
                return;
            }
            return self.give_back(home, units, answer);
        }
        let free = process.lent - process.taken;
        let own = process.want.map(|want| want.number);
        let lent = process.lent;
        let others = self.db.arbiter.wants.iter();
        let others = others.filter(|want| want.node != lease.node);
        let want = others.map(|want| want.number).min();
        // One's own older want comes first.
        let want = want.filter(|want| own.is_none_or(|own| own > *want));
        let is_recalled = self.db.arbiter.pools[&SKU].recall.is_some();
        let answer = match want {
            Some(number) => Some((number, lent)),
            None if is_recalled && free > 0 => None,
            None => return,
        };
        let process = self.process(home);
        process.giving = Some((free, answer));
        process.sold_out = None;
        if !blind {
            process.look = None;
        }
        if database_first {
            return self.give_back(home, free, answer);
        }
        process.lent -= free;
    }

    fn give_back(&mut self, home: usize, units: i64, answer: Option<(i64, i64)>) {
        let (is_lost, is_done) = (self.loses(0.1), self.chance(0.5));
        let lease = self.process(home).lease;
        if is_lost {
            self.process(home).doubt = Some(units);
            if !is_done {
                return;
            }
        }
        match self.db.arbiter.give_back(lease, SKU, units, answer) {
            Ok(()) if is_lost => {}
            Ok(()) => {
                self.process(home).books -= units;
                self.saw("gave back");
            }
            Err(Refused::Fenced) => self.end(home),
            Err(Refused::Check) => {
                self.violated(format!("{lease:?} cannot give {units} units back"))
            }
        }
    }
}

impl super::node::Process {
    /// Units of the smallest order that waits.
    fn least(&self) -> i64 {
        let units = self.dry.iter().map(|(click, _)| units_of(*click));
        units.min().unwrap_or(0)
    }

    /// What it lacks.
    fn missing(&self) -> i64 {
        (self.least() - (self.lent - self.taken)).max(0)
    }
}
