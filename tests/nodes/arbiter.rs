//! The arbiter, done naively: what PostgreSQL does in `store::cluster`, as one struct that is obviously right. The test
//! `twin` holds the two against each other; the model runs nodes on this one.

use std::collections::BTreeMap;

pub type Node = i16;
pub type Sku = i32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Joining,
    Active,
    /// Fenced; this node replays its log, at this epoch.
    Dead(Lease),
    /// Fenced by a change of the timeline; nobody replays its log yet.
    Lost,
    Left,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    pub node: Node,
    pub epoch: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeRow {
    pub state: State,
    pub epoch: i64,
    pub renewals: i64,
    pub home: u64,
    pub ids_until: i64,
    pub log_in_use: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneRow {
    pub node: Option<Node>,
    pub epoch: i64,
    pub ids_until: i64,
    pub blocked_by: Option<Node>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    pub total: i64,
    pub held: i64,
    pub sold: i64,
    pub recall: Option<i64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub lent: i64,
    pub held: i64,
    pub sold: i64,
    pub answered: i64,
    /// Units that it has borrowed, less those that it has given back.
    pub borrowed: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    pub number: i64,
    pub sku: Sku,
    pub node: Node,
    pub units: i64,
}

/// The asking node was taken over, or a CHECK refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Fenced,
    Check,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supply {
    Pool,
    Unanswered,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lowered {
    Done,
    Waiting,
    Refused { committed: i64 },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arbiter {
    pub nodes: BTreeMap<Node, NodeRow>,
    pub lanes: Vec<LaneRow>,
    pub pools: BTreeMap<Sku, Pool>,
    pub shares: BTreeMap<(Sku, Node), Share>,
    pub wants: Vec<Want>,
    next_want: i64,
    /// The server's timeline, and that of the last join.
    pub timeline: i64,
    noted: i64,
    /// Whether a change of it ends every right; the model has a defect for that.
    pub disbands: bool,
    /// Length of a lease of ids, as `lease::ID_LEASE_MS`.
    pub id_lease: i64,
}

impl Arbiter {
    pub fn new(lanes: usize) -> Self {
        Arbiter {
            lanes: vec![LaneRow::default(); lanes],
            next_want: 1,
            disbands: true,
            id_lease: 60_000,
            ..Arbiter::default()
        }
    }

    /// Whether a lease is in force: the node was not taken over and has not left.
    pub fn check(&self, lease: Lease) -> Result<(), Refused> {
        let in_force = |row: &NodeRow| {
            row.epoch == lease.epoch && matches!(row.state, State::Joining | State::Active)
        };
        match self.nodes.get(&lease.node).is_some_and(in_force) {
            true => Ok(()),
            false => Err(Refused::Fenced),
        }
    }

    /// Whether a writer of this epoch may still commit, be it the successor of a dead node.
    pub fn may_write(&self, lease: Lease) -> bool {
        let row = self.nodes.get(&lease.node);
        row.is_some_and(|row| row.epoch == lease.epoch)
    }

    pub fn lent(&self, sku: Sku) -> i64 {
        let of_sku = self.shares.iter().filter(|((of, _), _)| *of == sku);
        of_sku.map(|(_, share)| share.lent).sum()
    }

    pub fn free(&self, sku: Sku) -> i64 {
        let pool = self.pools[&sku];
        pool.total - pool.held - pool.sold - self.lent(sku)
    }

    /// Every CHECK.
    pub fn check_sound(&self) -> Result<(), String> {
        let pool =
            |(sku, pool): (&Sku, &Pool)| pool.held >= 0 && pool.sold >= 0 && self.free(*sku) >= 0;
        let share = |share: &Share| {
            share.held >= 0 && share.sold >= 0 && share.held + share.sold <= share.lent
        };
        let lane = |lane: &LaneRow| lane.blocked_by.is_none() || lane.node.is_some();
        let is_sound = self.pools.iter().all(pool)
            && self.shares.values().all(share)
            && self.lanes.iter().all(lane);
        is_sound
            .then_some(())
            .ok_or_else(|| format!("a CHECK is violated: {self:?}"))
    }

    // Membership.

    /// The row, its lanes, and the dead nodes that it has to replay; `None`: its row is being replayed.
    pub fn join(&mut self, home: u64, now: i64) -> Option<(Lease, Vec<usize>, Vec<Lease>)> {
        if self.noted != self.timeline {
            self.noted = self.timeline;
            if self.disbands {
                self.disband();
            }
        }
        let own = self.nodes.iter().find(|(_, row)| row.home == home);
        let node = match own {
            Some((_, row)) if matches!(row.state, State::Dead(_)) => return None,
            Some((node, _)) => *node,
            None => {
                let unused = self.nodes.iter();
                let mut unused =
                    unused.filter(|(_, row)| row.state == State::Left && !row.log_in_use);
                let new = || (0..64).find(|node| !self.nodes.contains_key(node)).unwrap();
                unused.next().map_or_else(new, |(node, _)| *node)
            }
        };
        let (old, ids, renewals, log_in_use) =
            self.nodes.get(&node).map_or((0, 0, 0, false), |row| {
                (row.epoch, row.ids_until, row.renewals, row.log_in_use)
            });
        let row = NodeRow {
            state: State::Joining,
            epoch: old + 1,
            renewals: renewals.abs() + 1,
            home,
            ids_until: ids.max(now) + self.id_lease,
            log_in_use,
        };
        self.nodes.insert(node, row);
        let lease = Lease {
            node,
            epoch: old + 1,
        };
        self.forget_wants(node);
        let inherited = self.inherit(node, lease);
        let mut lanes = Vec::new();
        for (at, lane) in self.lanes.iter_mut().enumerate() {
            if lane.node == Some(node) {
                lane.epoch += 1;
                lane.blocked_by = lane.blocked_by.or(Some(node));
                lanes.push(at);
            }
        }
        Some((lease, lanes, inherited))
    }

    /// On another timeline nobody has a right: every row waits for its process or for a survivor, lanes are nobody's, and
    /// so are units.
    pub fn disband(&mut self) {
        let ids_until = self.nodes.values().map(|row| row.ids_until).max();
        for lane in &mut self.lanes {
            if lane.node.is_some() {
                *lane = LaneRow {
                    node: None,
                    epoch: lane.epoch + 1,
                    ids_until: lane.ids_until.max(ids_until.unwrap_or(0)),
                    blocked_by: None,
                };
            }
        }
        let nodes: Vec<Node> = self.nodes.keys().copied().collect();
        for node in nodes {
            let row = self.nodes.get_mut(&node).unwrap();
            if row.state != State::Left {
                (row.state, row.epoch) = (State::Lost, row.epoch + 1);
            }
            self.dissolve(node);
        }
        self.wants.clear();
        for pool in self.pools.values_mut() {
            pool.recall = None;
        }
    }

    /// Every id in the node's log lies before `ids_until`.
    pub fn activate(&mut self, lease: Lease, ids_until: i64) -> Result<(), Refused> {
        self.check(lease)?;
        self.nodes.get_mut(&lease.node).unwrap().state = State::Active;
        for lane in &mut self.lanes {
            if lane.node == Some(lease.node) && lane.blocked_by == Some(lease.node) {
                lane.blocked_by = None;
            }
            if lane.node.is_none() {
                lane.ids_until = lane.ids_until.max(ids_until);
            }
        }
        Ok(())
    }

    pub fn renew(&mut self, lease: Lease, ids_until: i64) -> Result<i64, Refused> {
        self.check(lease)?;
        let row = self.nodes.get_mut(&lease.node).unwrap();
        row.renewals += 1;
        row.ids_until = row.ids_until.max(ids_until);
        Ok(row.renewals)
    }

    /// Whether nothing is left behind.
    pub fn leave(&mut self, lease: Lease, used: i64) -> Result<bool, Refused> {
        self.check(lease)?;
        let row = self.nodes[&lease.node];
        let mut others = self.nodes.iter().filter(|(node, _)| **node != lease.node);
        let has_others = others.any(|(_, row)| row.state != State::Left);
        let mine = |lane: &&LaneRow| lane.node == Some(lease.node);
        let is_blocked = self
            .lanes
            .iter()
            .filter(mine)
            .any(|lane| lane.blocked_by.is_some());
        let has_lanes = self.lanes.iter().filter(mine).count() > 0;
        let row_mut = self.nodes.get_mut(&lease.node).unwrap();
        if row.log_in_use || is_blocked || (has_others && has_lanes) {
            row_mut.renewals = -row.renewals.abs() - 1;
            return Ok(false);
        }
        self.wants.retain(|want| want.node != lease.node);
        row_mut.state = State::Left;
        row_mut.epoch += 1;
        row_mut.ids_until = used;
        for lane in &mut self.lanes {
            if lane.node == Some(lease.node) {
                lane.node = None;
                lane.ids_until = lane.ids_until.max(used);
            }
        }
        self.forget_wants(lease.node);
        self.dissolve(lease.node);
        Ok(true)
    }

    // Lanes.

    /// The log of a row that is nobody's has groups of this epoch: the failover has lost the join of its node.
    pub fn adopt(&mut self, lease: Lease, node: Node, log_epoch: i64) -> Result<(), Refused> {
        self.check(lease)?;
        let new = NodeRow {
            state: State::Left,
            epoch: 0,
            renewals: 0,
            home: 0,
            ids_until: 0,
            log_in_use: true,
        };
        let row = self.nodes.entry(node).or_insert(new);
        if row.state == State::Left && row.epoch < log_epoch {
            (row.state, row.epoch, row.log_in_use) = (State::Lost, log_epoch + 1, true);
        }
        Ok(())
    }

    pub fn claim_free(&mut self, lease: Lease) -> Result<Vec<usize>, Refused> {
        self.check(lease)?;
        let waits = |(node, row): (&Node, &NodeRow)| match row.state {
            State::Dead(_) => self.lanes.iter().all(|lane| lane.blocked_by != Some(*node)),
            State::Lost => true,
            State::Joining => {
                let has_lane = self.lanes.iter().any(|lane| lane.node == Some(*node));
                row.log_in_use && *node != lease.node && !has_lane
            }
            State::Active | State::Left => false,
        };
        if self.nodes.iter().any(waits) {
            return Ok(Vec::new());
        }
        let left = self.nodes.values().filter(|row| row.state == State::Left);
        let ids_until = left.map(|row| row.ids_until).max().unwrap_or(0);
        let mut taken = Vec::new();
        for (at, lane) in self.lanes.iter_mut().enumerate() {
            if lane.node.is_none() {
                lane.node = Some(lease.node);
                lane.epoch += 1;
                lane.ids_until = lane.ids_until.max(ids_until);
                taken.push(at);
            }
        }
        if !taken.is_empty() {
            for (sku, pool) in &mut self.pools {
                let held = std::mem::take(&mut pool.held);
                if held > 0 {
                    let share = self.shares.entry((*sku, lease.node)).or_default();
                    share.lent += held;
                    share.held += held;
                }
            }
        }
        Ok(taken)
    }

    /// With so many units of each SKU, of which so many are held. The new epoch; `None`: nothing has changed.
    pub fn hand_over(
        &mut self,
        lease: Lease,
        lane: usize,
        epoch: i64,
        to: Node,
        ids_until: i64,
        units: &[(Sku, i64, i64)],
    ) -> Result<Option<i64>, Refused> {
        self.check(lease)?;
        let row = self.lanes[lane];
        let may_take = to != lease.node
            && self
                .nodes
                .get(&to)
                .is_some_and(|row| row.state == State::Active);
        let is_ours =
            row.node == Some(lease.node) && row.epoch == epoch && row.blocked_by.is_none();
        let has = |(sku, ..): &(Sku, i64, i64)| self.shares.contains_key(&(*sku, lease.node));
        if !may_take || !is_ours {
            return Ok(None);
        }
        let enough = |(sku, lent, held): &(Sku, i64, i64)| {
            let share = self.shares.get(&(*sku, lease.node));
            share.is_none_or(|share| {
                share.held >= *held && share.lent - lent >= share.held - held + share.sold
            })
        };
        if !units.iter().all(enough) {
            return Err(Refused::Check);
        }
        if !units.iter().all(has) {
            return Ok(None);
        }
        self.lanes[lane] = LaneRow {
            node: Some(to),
            epoch: epoch + 1,
            ids_until: row.ids_until.max(ids_until),
            blocked_by: None,
        };
        for (sku, lent, held) in units {
            let giver = self.shares.get_mut(&(*sku, lease.node)).unwrap();
            (giver.lent, giver.held) = (giver.lent - lent, giver.held - held);
            let taker = self.shares.entry((*sku, to)).or_default();
            (taker.lent, taker.held) = (taker.lent + lent, taker.held + held);
        }
        Ok(Some(epoch + 1))
    }

    // Shares.

    /// While lanes are nobody's and a log may be replayed, the pool is kept for its orders.
    pub fn is_kept(&self) -> bool {
        let may_replay =
            |row: &NodeRow| matches!(row.state, State::Joining | State::Dead(_) | State::Lost);
        self.lanes.iter().any(|lane| lane.node.is_none()) && self.nodes.values().any(may_replay)
    }

    /// Units, swept units, and the want that was left.
    pub fn lend(
        &mut self,
        lease: Lease,
        sku: Sku,
        wanted: i64,
        least: i64,
    ) -> Result<(i64, i64, Option<i64>), Refused> {
        self.check(lease)?;
        let of_sku = self.wants.iter().filter(|want| want.sku == sku);
        let oldest = of_sku.min_by_key(|want| want.number);
        let is_next = oldest.is_none_or(|want| want.node == lease.node);
        let free = self.free(sku);
        let is_kept = self.is_kept();
        let pool = self.pools.get_mut(&sku).unwrap();
        let units = if pool.recall.is_some() || is_kept || !is_next || free < least {
            0
        } else {
            free.min(wanted.max(least))
        };
        let mut swept = 0;
        if let Some(share) = self.shares.get_mut(&(sku, lease.node)) {
            swept = std::mem::take(&mut share.sold);
            share.lent -= swept;
            pool.sold += swept;
        }
        if units > 0 {
            let share = self.shares.entry((sku, lease.node)).or_default();
            share.lent += units;
            share.borrowed += units;
            share.answered = 0;
            self.withdraw(lease, sku)?;
            return Ok((units, swept, None));
        }
        let own = |want: &&mut Want| (want.sku, want.node) == (sku, lease.node);
        let number = match self.wants.iter_mut().find(own) {
            Some(want) => {
                want.units = want.units.min(least);
                want.number
            }
            None => {
                let number = self.next_want;
                self.next_want += 1;
                self.wants.push(Want {
                    number,
                    sku,
                    node: lease.node,
                    units: least,
                });
                number
            }
        };
        Ok((0, swept, Some(number)))
    }

    pub fn give_back(
        &mut self,
        lease: Lease,
        sku: Sku,
        units: i64,
        answer: Option<(i64, i64)>,
    ) -> Result<(), Refused> {
        self.check(lease)?;
        let Some(share) = self.shares.get_mut(&(sku, lease.node)) else {
            return Ok(());
        };
        if share.held + share.sold > share.lent - units {
            return Err(Refused::Check);
        }
        if let Some((number, lent)) = answer
            && share.lent == lent
        {
            share.answered = share.answered.max(number);
        }
        share.lent -= units;
        share.borrowed -= units;
        Ok(())
    }

    pub fn supply(&self, want: &Want) -> Supply {
        let pool = self.pools[&want.sku];
        let is_recalled = pool.recall.is_some() || self.is_kept();
        let unanswered = |((sku, node), share): (&(Sku, Node), &Share)| {
            *sku == want.sku
                && *node != want.node
                && share.answered < want.number
                && share.lent > share.held + share.sold
        };
        if self.free(want.sku) >= want.units && !is_recalled {
            Supply::Pool
        } else if is_recalled || self.shares.iter().any(unanswered) {
            Supply::Unanswered
        } else {
            Supply::None
        }
    }

    pub fn withdraw(&mut self, lease: Lease, sku: Sku) -> Result<(), Refused> {
        self.check(lease)?;
        self.wants
            .retain(|want| (want.sku, want.node) != (sku, lease.node));
        Ok(())
    }

    pub fn lower_total(&mut self, lease: Lease, sku: Sku, total: i64) -> Result<Lowered, Refused> {
        self.check(lease)?;
        let of_sku = self.shares.iter().filter(|((of, _), _)| *of == sku);
        let taken: i64 = of_sku.map(|(_, share)| share.held + share.sold).sum();
        let lent = self.lent(sku);
        let is_kept = self.is_kept();
        let pool = self.pools.get_mut(&sku).unwrap();
        let outside = pool.held + pool.sold;
        if total >= outside + lent && !is_kept {
            (pool.total, pool.recall) = (total, None);
            return Ok(Lowered::Done);
        }
        if total < outside + taken {
            pool.recall = None;
            return Ok(Lowered::Refused {
                committed: outside + taken,
            });
        }
        pool.recall = Some(total);
        Ok(Lowered::Waiting)
    }

    /// What a batch or a payment does to the share of its node.
    pub fn settle(&mut self, lease: Lease, sku: Sku, held: i64, sold: i64) -> Result<(), Refused> {
        if !self.may_write(lease) {
            return Err(Refused::Fenced);
        }
        let share = self.shares.get(&(sku, lease.node)).ok_or(Refused::Check)?;
        let after = Share {
            held: share.held + held,
            sold: share.sold + sold,
            ..*share
        };
        if after.held < 0 || after.sold < 0 || after.held + after.sold > after.lent {
            return Err(Refused::Check);
        }
        self.shares.insert((sku, lease.node), after);
        Ok(())
    }

    /// The same for units that are in no share: those of a log that is replayed while lanes are nobody's.
    pub fn settle_outside(&mut self, lease: Lease, sku: Sku, held: i64) -> Result<(), Refused> {
        if !self.may_write(lease) {
            return Err(Refused::Fenced);
        }
        if held > self.free(sku) {
            return Err(Refused::Check);
        }
        self.pools.get_mut(&sku).unwrap().held += held;
        Ok(())
    }

    // Takeover.

    /// The fenced nodes, the suspect first, and the survivor's new lanes; `None`: it is not suspect any more.
    pub fn fence(
        &mut self,
        by: Lease,
        node: Node,
        epoch: i64,
        renewals: i64,
    ) -> Result<Option<Fenced>, Refused> {
        self.check(by)?;
        let is_suspect = |row: &NodeRow| {
            (row.epoch, row.renewals) == (epoch, renewals)
                && matches!(row.state, State::Joining | State::Active | State::Lost)
        };
        if node == by.node || !self.nodes.get(&node).is_some_and(is_suspect) {
            return Ok(None);
        }
        let mut fenced = vec![self.raise(node, by)];
        fenced.extend(self.inherit(node, by));
        self.forget_wants(node);
        let ids_until = self.nodes[&node].ids_until;
        let mut lanes = Vec::new();
        for (at, lane) in self.lanes.iter_mut().enumerate() {
            if lane.node == Some(node) {
                lane.node = Some(by.node);
                lane.epoch += 1;
                lane.blocked_by = lane.blocked_by.or(Some(node));
                lane.ids_until = lane.ids_until.max(ids_until);
                lanes.push(at);
            }
        }
        Ok(Some((fenced, lanes)))
    }

    fn raise(&mut self, node: Node, by: Lease) -> Lease {
        let row = self.nodes.get_mut(&node).unwrap();
        row.epoch += 1;
        row.state = State::Dead(by);
        Lease {
            node,
            epoch: row.epoch,
        }
    }

    fn inherit(&mut self, from: Node, by: Lease) -> Vec<Lease> {
        let dead = self.nodes.iter().filter(|(node, row)| {
            **node != from && matches!(row.state, State::Dead(taker) if taker.node == from)
        });
        let dead: Vec<Node> = dead.map(|(node, _)| *node).collect();
        dead.into_iter().map(|node| self.raise(node, by)).collect()
    }

    /// Every id in the dead node's log lies before `ids_until`.
    pub fn finish(&mut self, by: Lease, dead: Lease, ids_until: i64) -> Result<(), Refused> {
        self.check(by)?;
        if !self.may_write(dead) || self.nodes[&dead.node].state != State::Dead(by) {
            return Err(Refused::Fenced);
        }
        let mut unblocked = 0;
        for lane in &mut self.lanes {
            if lane.blocked_by == Some(dead.node) {
                lane.blocked_by = None;
                unblocked += 1;
                lane.ids_until = lane.ids_until.max(ids_until);
            }
            if lane.node.is_none() {
                lane.ids_until = lane.ids_until.max(ids_until);
            }
        }
        if unblocked == 0 {
            self.dissolve(dead.node);
        } else {
            self.merge(dead.node, by.node);
        }
        let row = self.nodes.get_mut(&dead.node).unwrap();
        (row.state, row.log_in_use) = (State::Left, false);
        Ok(())
    }

    fn forget_wants(&mut self, node: Node) {
        self.wants.retain(|want| want.node != node);
        for ((_, of), share) in &mut self.shares {
            if *of == node {
                share.answered = 0;
            }
        }
    }

    pub fn merge(&mut self, from: Node, to: Node) {
        for (sku, share) in self.take_shares(from) {
            let own = self.shares.entry((sku, to)).or_default();
            own.lent += share.lent;
            own.held += share.held;
            own.sold += share.sold;
            own.answered = 0;
        }
    }

    fn dissolve(&mut self, node: Node) {
        for (sku, share) in self.take_shares(node) {
            let pool = self.pools.get_mut(&sku).unwrap();
            pool.held += share.held;
            pool.sold += share.sold;
        }
    }

    fn take_shares(&mut self, node: Node) -> Vec<(Sku, Share)> {
        let mine: Vec<_> = self
            .shares
            .keys()
            .filter(|(_, of)| *of == node)
            .copied()
            .collect();
        let shares = mine
            .into_iter()
            .map(|key| (key.0, self.shares.remove(&key).unwrap()));
        shares.collect()
    }
}

/// The fenced nodes, and the survivor's new lanes.
pub type Fenced = (Vec<Lease>, Vec<usize>);
