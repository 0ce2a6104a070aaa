//! What is promised, seen by somebody who sees everything.

use super::node::Process;
use super::world::{Click, Id, LANES, LIMIT, Order, SKU, World, lane_of, units_of};
use crate::arbiter::State;

impl World {
    /// An acknowledgement leaves.
    pub fn acknowledge(&mut self, order: Order) {
        self.saw("acknowledged");
        self.recent.push(order.click);
        match self.acked.insert(order.click, order.id) {
            Some(earlier) if earlier != order.id => {
                let click = order.click;
                self.violated(format!("{click:?} is {earlier:?} and {:?}", order.id));
            }
            _ => {}
        }
        let lane = lane_of(order.click);
        let own = self
            .ids
            .entry((lane, order.epoch))
            .or_insert((order.id, order.id));
        *own = (own.0.min(order.id), own.1.max(order.id));
        let of_lane = self
            .ids
            .range((lane, (0, 0))..(lane + 1, (0, 0)))
            .map(|(_, ids)| *ids);
        let of_lane: Vec<(Id, Id)> = of_lane.collect();
        if of_lane.windows(2).any(|pair| pair[0].1 >= pair[1].0) {
            self.violated(format!(
                "ids of lane {lane} went back when it changed hands: {of_lane:?}"
            ));
        }
        let total = self.db.arbiter.pools[&SKU].total;
        let sold: i64 = self.acked.keys().map(|click| units_of(*click)).sum();
        if sold > total {
            self.violated(format!("{sold} units sold of {total}"));
        }
        let of_buyer = self.acked.keys().filter(|click| click.0 == order.click.0);
        let of_buyer: i64 = of_buyer.map(|click| units_of(*click)).sum();
        if of_buyer > LIMIT {
            self.violated(format!("a buyer has {of_buyer} units of {LIMIT}"));
        }
        if let Some(request) = self.requests.get(&order.click) {
            let same = |click: &&Click| self.requests.get(*click) == Some(request);
            if self.acked.keys().filter(same).count() > 1 {
                self.violated(format!(
                    "{:?} is a second order of one request",
                    order.click
                ));
            }
        }
    }

    /// Notes since when units were held by nobody: neither by a row, nor by a process, nor by a log.
    pub fn note_free(&mut self) {
        let appended = self.appends.iter().flat_map(|append| &append.group.orders);
        let batches = self.batches.iter().flat_map(|batch| &batch.orders);
        let processes = self.homes.iter().filter_map(|home| home.process.as_ref());
        let coming = processes.flat_map(Process::coming);
        let coming = appended.chain(batches).chain(coming);
        let rows = self.db.rows.values();
        let mut taken: Vec<Click> = coming.chain(rows).map(|order| order.click).collect();
        taken.extend(&self.logged);
        let nodes = &self.db.arbiter.nodes;
        self.lost.retain(|(lease, _)| {
            nodes.get(&lease.node).is_some_and(|row| {
                row.epoch == lease.epoch || !matches!(row.state, State::Active | State::Left)
            })
        });
        taken.extend(self.lost.iter().flat_map(|(_, clicks)| clicks));
        taken.sort_unstable();
        taken.dedup();
        let taken: i64 = taken.into_iter().map(units_of).sum();
        let free = self.db.arbiter.pools[&SKU].total - taken;
        for (units, since) in self.free_since_ms.iter_mut().enumerate() {
            *since = (free >= units as i64).then(|| since.unwrap_or(self.now_ms));
        }
    }

    /// Sold out is said to an order, after a look for units that began at `looked_ms`.
    pub fn say_sold_out(&mut self, units: i64, looked_ms: u64) {
        self.saw("sold out");
        let since = self.free_since_ms[units as usize];
        if since.is_some_and(|since| since < looked_ms) {
            let stock: Vec<_> = self
                .homes
                .iter()
                .filter_map(|home| home.process.as_ref())
                .map(|p| (p.lease.node, p.lent, p.taken, p.giving))
                .collect();
            let (now, arbiter) = (self.now_ms, &self.db.arbiter);
            self.violated(format!(
                "sold out is said to {units}, which are free since {since:?}, before {looked_ms} (now {now}): {stock:?}, {:?}, {:?}",
                arbiter.shares, arbiter.wants
            ));
        }
    }

    /// Whether the units in the memory of each active process are those of its row, but for what is on its way.
    pub fn check_memory(&self) -> Result<(), String> {
        let arbiter = &self.db.arbiter;
        for process in self.homes.iter().filter_map(|home| home.process.as_ref()) {
            let lease = process.lease;
            let knows = process.is_active && process.doubt.is_none();
            if !knows || process.timeline != arbiter.timeline || arbiter.check(lease).is_err() {
                continue;
            }
            let share = arbiter.shares.get(&(SKU, lease.node)).copied();
            let is_news = |at: &usize| {
                let known = process.lanes.get(at);
                arbiter.lanes[*at].node == Some(lease.node)
                    && known.is_none_or(|lane| lane.in_doubt.is_some())
            };
            let news = (0..LANES)
                .filter(is_news)
                .map(|at| self.units_of_lane(at))
                .sum::<i64>();
            let in_doubt = process.lanes.values().filter_map(|lane| lane.in_doubt);
            let given = process.giving.map_or(0, |(units, _)| units);
            let expected = share.unwrap_or_default().lent - news + in_doubt.sum::<i64>() - given;
            if process.lent != expected {
                return Err(format!(
                    "{lease:?} has {} units in memory, its row says {expected}: {process:?} {arbiter:?}",
                    process.lent
                ));
            }
        }
        Ok(())
    }

    pub fn is_quiet(&self) -> bool {
        let is_idle = |process: &Process| {
            process.is_active
                && process.coming().next().is_none()
                && process.dry.is_empty()
                && process.replays.iter().all(|replay| replay.is_finished)
        };
        let arbiter = &self.db.arbiter;
        self.homes
            .iter()
            .all(|home| home.process.as_ref().is_some_and(is_idle))
            && arbiter
                .lanes
                .iter()
                .all(|lane| lane.node.is_some() && lane.blocked_by.is_none())
            && arbiter
                .nodes
                .values()
                .all(|row| matches!(row.state, State::Active | State::Left))
            && self.batches.is_empty()
            && self
                .appends
                .iter()
                .all(|append| append.group.orders.is_empty())
    }

    pub fn check_at_rest(&self) -> Result<(), String> {
        let rows = &self.db.rows;
        for (click, id) in &self.acked {
            match rows.get(id) {
                Some(row) if row.click == *click => {}
                other => {
                    return Err(format!(
                        "{click:?} was acknowledged as {id:?}, its row is {other:?}"
                    ));
                }
            }
        }
        let arbiter = &self.db.arbiter;
        let units: i64 = (0..LANES).map(|at| self.units_of_lane(at)).sum();
        let total = arbiter.pools[&SKU].total;
        if units > total {
            return Err(format!("rows have {units} units of {total}"));
        }
        for buyer in rows.values().map(|row| row.click.0) {
            let own = rows.values().filter(|row| row.click.0 == buyer);
            let own: i64 = own.map(|row| units_of(row.click)).sum();
            if own > LIMIT {
                return Err(format!("buyer {buyer} has {own} units of {LIMIT}"));
            }
        }
        let held: i64 = arbiter.shares.values().map(|share| share.held).sum();
        let outside = arbiter.pools[&SKU].held;
        if held + outside != units {
            return Err(format!(
                "rows have {units} units, {held} are held and {outside} outside"
            ));
        }
        for node in arbiter.nodes.keys() {
            let own = |lane: &usize| arbiter.lanes[*lane].node == Some(*node);
            let units: i64 = (0..LANES)
                .filter(own)
                .map(|lane| self.units_of_lane(lane))
                .sum();
            let share = arbiter.shares.get(&(SKU, *node)).copied();
            let held = share.unwrap_or_default().held;
            if held != units {
                return Err(format!(
                    "the lanes of node {node} hold {units} units, its share {held}"
                ));
            }
        }
        Ok(())
    }
}
