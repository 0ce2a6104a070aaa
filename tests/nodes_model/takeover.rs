//! A row changes hands: at a start, and when its node is dead.

use crate::db::{NodeId, NodeRow, Order, Outcome, Place, Standing};
use crate::log::{Appended, Group};
use crate::rules::Defect;
use crate::shares::{drop_unasserted, insert, move_lane, needed};
use crate::world::{ANSWER_MS, LEASE_MS, World};

/// Another node's row still has units that it gave back before a failover.
pub const LATER: &str = "later";

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Epochs up, lanes taken: the dead node can commit nothing.
    Claim,
    /// A marker in its log: it can acknowledge nothing.
    Marker,
    /// What its log has is written.
    Replay,
    /// Shares merged, lanes free.
    Finish,
}

/// A row that is taken over, or taken at a start.
#[derive(Clone, Debug)]
pub struct Takeover {
    of: NodeId,
    counter: u64,
    epoch: u64,
    step: Step,
    /// By the own clock.
    marker_at: u64,
    read_early: Option<Vec<(Place, Vec<Order>)>>,
    last: Place,
}

impl World {
    pub fn asserted_by_the_living(&self) -> bool {
        let done =
            |row: &NodeRow| row.asserted == self.db.timeline || row.standing != Standing::Active;
        self.db.nodes.iter().all(done)
    }

    /// Whether rows that a failover has made free again were free: a node that joined since has marked its log.
    pub fn free_rows_are_free(&self) -> bool {
        let free =
            |at: usize| self.db.nodes[at].standing == Standing::Free && self.log_is_ahead(at);
        !(0..self.nodes.len()).any(free)
    }

    pub fn log_is_ahead(&self, of: NodeId) -> bool {
        self.logs[of]
            .groups
            .iter()
            .any(|group| group.place.0 > self.db.nodes[of].epoch)
    }

    /// Every node has asserted its rights.
    pub fn all_asserted(&self) -> bool {
        self.db.all_asserted() && self.free_rows_are_free()
    }

    pub fn rights(&self) -> bool {
        (self.db.all_replayed() && self.free_rows_are_free())
            || self.has(Defect::RightsKeptAfterFailover)
    }

    // --- Start and death ----------------------------------------------------------------------

    /// Looks for a node whose counter stands still.
    pub fn suspect(&mut self, node: NodeId) {
        if self.db.nodes[node].asserted != self.db.timeline || self.nodes[node].takeover.is_some() {
            return;
        }
        let clock = self.clock(node);
        let one = &self.nodes[node];
        let in_a_gap = clock > one.renewed + LEASE_MS / 4 && !self.has(Defect::OwnGapNotCounted);
        let inherited = |row: &NodeRow| row.standing == Standing::TakenBy(node);
        let stands_still = |of: &NodeId| {
            let (counter, since) = one.watch[*of];
            counter == self.db.nodes[*of].counter && clock > since.max(one.gap_ended) + LEASE_MS
                || self.has(Defect::CounterNotLookedAtAgain)
                    && clock > since.max(one.gap_ended) + LEASE_MS
        };
        let mut of = self.db.nodes.iter().position(inherited);
        if of.is_none() && !in_a_gap && one.watch.len() == self.nodes.len() {
            let mut others = (0..self.nodes.len()).filter(|of| *of != node);
            let owned = |of: &NodeId| {
                let standing = self.db.nodes[*of].standing;
                let joined = standing == Standing::Free && self.log_is_ahead(*of);
                joined || standing == Standing::Active || standing == Standing::TakenBy(*of)
            };
            of = others.find(|of| owned(of) && stands_still(of));
        }
        let Some(of) = of else { return };
        let counter = one.watch.get(of).map_or(0, |watch| watch.0);
        self.nodes[node].takeover = Some(Takeover {
            of,
            counter,
            epoch: 0,
            step: Step::Claim,
            marker_at: 0,
            read_early: None,
            last: (0, 0),
        });
        // Time passes between the look and the transaction.
    }

    pub fn go_on_taking_over(&mut self, node: NodeId) {
        if self.nodes[node].takeover.is_none() {
            let counter = self.db.nodes[node].counter;
            let step = Step::Claim;
            self.nodes[node].takeover = Some(Takeover {
                of: node,
                counter,
                epoch: 0,
                step,
                marker_at: 0,
                read_early: None,
                last: (0, 0),
            });
        }
        let Some(takeover) = self.nodes[node].takeover.clone() else {
            return;
        };
        if takeover.of == node && takeover.epoch > 0 && self.chance(0.3) {
            // A start that has to wait is no dead node.
            let outcome = self.transact(node, |db| {
                let row = &mut db.nodes[node];
                row.counter += u64::from(row.epoch == takeover.epoch);
                Ok(())
            });
            if outcome == Outcome::Failover {
                self.forget_takeover(node);
            }
            return;
        }
        match takeover.step {
            Step::Claim if takeover.of == node => self.take_own_row(node, takeover),
            Step::Claim => self.claim(node, takeover),
            Step::Marker => self.mark(node, takeover),
            Step::Replay => self.replay(node, takeover),
            Step::Finish => self.finish(node, takeover),
        }
    }

    /// A start takes the row of its directory, unless its log is being read by another.
    pub fn take_own_row(&mut self, node: NodeId, mut takeover: Takeover) {
        let known = self.logs[node]
            .groups
            .iter()
            .map(|group| group.place.0)
            .max()
            .unwrap_or(0);
        let outcome = self.transact(node, |db| {
            let row = &mut db.nodes[node];
            if matches!(row.standing, Standing::TakenBy(by) if by != node) {
                return Err("its log is being read");
            }
            row.epoch = row.epoch.max(known) + 1;
            row.counter += 1;
            // Until its log is read.
            row.standing = Standing::TakenBy(node);
            let epoch = row.epoch;
            db.wants.retain(|want| want.node != node);
            for lane in &mut db.lanes {
                if lane.owner == node && lane.blocked_by.is_none() {
                    lane.blocked_by = Some(node);
                    lane.epoch += 1;
                }
            }
            Ok(epoch)
        });
        if let Outcome::Done(epoch) = outcome {
            (takeover.epoch, takeover.step) = (epoch, Step::Marker);
            self.nodes[node].epoch = epoch;
            self.nodes[node].takeover = Some(takeover);
        }
    }

    pub fn claim(&mut self, node: NodeId, mut takeover: Takeover) {
        let (of, counter, own) = (takeover.of, takeover.counter, self.nodes[node].epoch);
        let (again, raise) = (
            !self.has(Defect::CounterNotLookedAtAgain),
            !self.has(Defect::EpochNotRaised),
        );
        let at_once = self.has(Defect::SharesTakenAtOnce);
        let known = self.logs[of]
            .groups
            .iter()
            .map(|group| group.place.0)
            .max()
            .unwrap_or(0);
        let renewed = self.db.nodes[of].counter != counter;
        let joined = self.db.nodes[of].standing == Standing::Free && self.log_is_ahead(of);
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch != own {
                return Err("fenced");
            }
            let row = &mut db.nodes[of];
            let inherited = row.standing == Standing::TakenBy(node);
            let owned =
                joined || row.standing == Standing::Active || row.standing == Standing::TakenBy(of);
            if !inherited && (!owned || (again && row.counter != counter)) {
                return Ok(None);
            }
            let epoch = row.epoch.max(known) + 1;
            row.epoch = if raise { epoch } else { row.epoch };
            row.standing = Standing::TakenBy(node);
            for other in &mut db.nodes {
                if other.standing == Standing::TakenBy(of) {
                    other.standing = Standing::TakenBy(node);
                }
            }
            db.wants.retain(|want| want.node != of);
            for lane in &mut db.lanes {
                if lane.owner == of {
                    (lane.owner, lane.epoch) = (node, lane.epoch + 1);
                    lane.blocked_by = lane.blocked_by.or(Some(of));
                }
            }
            if at_once {
                let free = db.shares[of].lent - db.shares[of].held;
                db.shares[of].lent -= free;
                db.shares[node].lent += free;
            }
            Ok(Some((epoch, inherited)))
        });
        match outcome {
            Outcome::Done(Some((epoch, inherited))) => {
                self.say(|| format!("node {node} takes over {of}, epoch {epoch}"));
                if !inherited {
                    self.takeovers += 1;
                    self.was_it_dead(node, of, renewed);
                }
                (takeover.epoch, takeover.step) = (epoch, Step::Marker);
                self.nodes[node].takeover = Some(takeover);
                if at_once {
                    self.follow_share(node);
                }
            }
            Outcome::Done(None) => self.nodes[node].takeover = None,
            Outcome::Refused(_) => self.fenced(node),
            // It is looked up: if the claim was committed, the row is inherited.
            Outcome::Unknown | Outcome::Away | Outcome::Failover => {
                self.nodes[node].takeover = None
            }
        }
    }

    pub fn mark(&mut self, node: NodeId, mut takeover: Takeover) {
        if self.has(Defect::MarkerAfterReading) && takeover.read_early.is_none() {
            takeover.read_early = self.groups_after(takeover.of);
            self.nodes[node].takeover = Some(takeover);
            return;
        }
        // Reading takes its time.
        if self.has(Defect::MarkerAfterReading) && !self.chance(0.1) {
            return;
        }
        let place = (takeover.epoch, 0);
        let there = self.logs[takeover.of]
            .groups
            .iter()
            .any(|group| group.place == place);
        if !there
            && self.logs[takeover.of].append(Group {
                place,
                orders: Vec::new(),
            }) == Appended::Fenced
        {
            self.nodes[node].takeover = None;
            return;
        }
        // Its answer may be lost; then it is read.
        if !self.calm && self.chance(0.1) {
            return;
        }
        self.say(|| {
            format!(
                "node {node} has marked the log of {}: {place:?}",
                takeover.of
            )
        });
        takeover.marker_at = self.clock(node);
        takeover.step = Step::Replay;
        if takeover.of == node {
            let position = self.logs[node].groups.len() - 1;
            let one = &mut self.nodes[node];
            (one.last_place, one.last_position) = (place, position);
        }
        self.nodes[node].takeover = Some(takeover);
    }

    /// The groups of a node's log above the database's place.
    pub fn groups_after(&mut self, of: NodeId) -> Option<Vec<(Place, Vec<Order>)>> {
        let place = self.db.nodes[of].place;
        match self.logs[of].valid() {
            Ok(groups) => {
                let above = groups.into_iter().filter(|group| group.place > place);
                Some(
                    above
                        .map(|group| (group.place, group.orders.clone()))
                        .collect(),
                )
            }
            Err(hole) => {
                self.violated(hole);
                None
            }
        }
    }

    pub fn replay(&mut self, node: NodeId, mut takeover: Takeover) {
        if self.db.up && self.nodes[node].timeline != self.db.timeline {
            return self.forget_takeover(node);
        }
        if !self.asserted_by_the_living_but(node, takeover.of) {
            return;
        }
        let groups = match takeover.read_early.clone() {
            Some(groups) => groups,
            None => match self.groups_after(takeover.of) {
                Some(groups) => groups,
                None => return,
            },
        };
        let (of, epoch, own) = (takeover.of, takeover.epoch, self.nodes[node].epoch);
        let (raise, blindly) = (
            !self.has(Defect::EpochNotRaised),
            self.has(Defect::ReplayWithoutLooking),
        );
        takeover.last = groups.last().map_or((0, 0), |group| group.0);
        let newest = groups
            .iter()
            .flat_map(|group| &group.1)
            .map(|order| order.id)
            .max();
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch != own || (raise && db.nodes[of].epoch != epoch) {
                return Err("fenced");
            }
            for order in groups.iter().flat_map(|(_, orders)| orders) {
                insert(db, order, blindly);
            }
            drop_unasserted(db);
            if db.lent() > db.total {
                Err(LATER)
            } else {
                Ok(())
            }
        });
        match outcome {
            Outcome::Refused(LATER) => {}
            Outcome::Done(()) => {
                let raise = !self.has(Defect::IdsFromOwnClock);
                if let (Some(newest), true) = (newest, raise) {
                    let one = &mut self.nodes[node];
                    one.last_id = one.last_id.max(newest / crate::db::LANES as u64 + 1);
                }
                takeover.step = Step::Finish;
                self.nodes[node].takeover = Some(takeover);
            }
            Outcome::Refused(_) if of == node => self.fenced(node),
            Outcome::Refused(_) => self.nodes[node].takeover = None,
            Outcome::Failover => self.forget_takeover(node),
            Outcome::Unknown | Outcome::Away => {}
        }
    }

    pub fn forget_takeover(&mut self, node: NodeId) {
        self.nodes[node].timeline = self.db.timeline;
        if self.nodes[node].serving {
            self.nodes[node].takeover = None;
        } else {
            let now = self.now;
            self.nodes[node].die(now);
        }
    }

    pub fn finish(&mut self, node: NodeId, takeover: Takeover) {
        let (of, epoch, own, last) = (
            takeover.of,
            takeover.epoch,
            self.nodes[node].epoch,
            takeover.last,
        );
        let raise = !self.has(Defect::EpochNotRaised);
        let outcome = self.transact(node, |db| {
            if db.nodes[node].epoch != own || (raise && db.nodes[of].epoch != epoch) {
                return Err("fenced");
            }
            let timeline = db.timeline;
            for lane in 0..db.lanes.len() {
                let row = db.lanes[lane].clone();
                if row.blocked_by == Some(of) && row.owner != node {
                    move_lane(db, lane, row.owner, row.epoch, 0);
                }
            }
            let needed = needed(db, of);
            let row = &mut db.nodes[of];
            let asserted = row.asserted == timeline;
            row.place = row.place.max(last);
            (row.asserted, row.replayed) = (timeline, timeline);
            if of != node {
                row.standing = Standing::Free;
                let share = std::mem::take(&mut db.shares[of]);
                // After a failover its row may have been lent what it had given back.
                db.shares[node].lent += if asserted { share.lent } else { needed };
                db.shares[node].held += share.held;
            } else {
                row.standing = Standing::Active;
                if !asserted {
                    db.shares[node].lent = needed;
                }
            }
            let mut lanes = Vec::new();
            for (lane, row) in db.lanes.iter_mut().enumerate() {
                if row.blocked_by == Some(of) {
                    row.blocked_by = None;
                    lanes.push(lane);
                }
            }
            Ok(lanes)
        });
        match outcome {
            Outcome::Done(_) => {}
            // Looked up.
            Outcome::Unknown => {
                let blocked =
                    |row: &crate::db::LaneRow| row.owner == node && row.blocked_by == Some(of);
                let row = &self.db.nodes[of];
                let done = row.standing
                    == if of == node {
                        Standing::Active
                    } else {
                        Standing::Free
                    };
                if self.db.lanes.iter().any(blocked) || !done || row.asserted != self.db.timeline {
                    return;
                }
            }
            Outcome::Refused(_) if of == node => return self.fenced(node),
            Outcome::Refused(_) => {
                self.nodes[node].takeover = None;
                return;
            }
            Outcome::Failover => return self.forget_takeover(node),
            Outcome::Away => return,
        }
        let (shares, lent, taken) = (
            self.db.shares.clone(),
            self.nodes[node].lent,
            self.nodes[node].taken,
        );
        self.say(|| {
            format!("node {node} has finished with the row of {of}: {lent} {taken} {shares:?}")
        });
        let (clock, real) = (self.clock(node), self.now);
        let one = &mut self.nodes[node];
        one.takeover = None;
        if of != node {
            one.taken_rows.insert(of, epoch);
        } else {
            one.serving = true;
            one.replayed = one.timeline;
            (one.renewed, one.gap_ended) = (clock, clock);
            (one.contact, one.contact_real) = (clock, real);
        }
        self.follow_share(node);
        let early = self.has(Defect::OpenBeforeAnswersRanOut);
        let opens_at = if early {
            clock
        } else {
            takeover.marker_at + ANSWER_MS
        };
        let db = self.db.clone();
        self.load_lanes(node, &db, opens_at);
        if self.has(Defect::BlockedLaneOpened) {
            for lane in 0..db.lanes.len() {
                if db.lanes[lane].owner == node && db.lanes[lane].blocked_by.is_some() {
                    self.load_lane(node, &db, lane, opens_at.min(clock));
                }
            }
        }
    }

    /// An outage of the database, or the observer's own stall, kills nobody.
    pub fn was_it_dead(&mut self, node: NodeId, of: NodeId, renewed: bool) {
        let one = &self.nodes[of];
        let awake = self.runs(of)
            && one.serving
            && one.awake_since.max(one.cut_until) + LEASE_MS < self.now;
        if renewed {
            self.violated(format!("node {node} took over {of}, which had renewed"));
        } else if awake
            && self.db_up_since + LEASE_MS / 2 > self.now
            && self.db_up_since > self.db_away_since + LEASE_MS
        {
            self.violated(format!("node {node} took over {of} after an outage"));
        }
    }

    pub fn asserted_by_the_living_but(&self, node: NodeId, of: NodeId) -> bool {
        let timeline = self.db.timeline;
        if of == node {
            let others = |(at, row): (usize, &NodeRow)| {
                at == node || row.asserted == timeline || row.standing != Standing::Active
            };
            return self.db.nodes.iter().enumerate().all(others);
        }
        self.asserted_by_the_living()
    }
}
