//! A process: its membership, its log, its batches, and the orders of its lanes.

use std::collections::{BTreeMap, VecDeque};

use millrace::pipeline::cluster::watch::{Beat, Watch};
use millrace::store::cluster::takeover::Suspect;
use rand::Rng;

use super::lanes::LaneMemory;
use super::rules::Defect;
use super::stock::{Look, SoldOut};
use super::takeover::Replay;
use super::world::{
    ANSWER_MS, Append, Batch, Click, Group, LIMIT, Order, Place, SKU, World, lane_of, units_of,
};
use crate::arbiter::{Lease, Node, State, Want};

/// A moment of a local clock, and the time for which that clock had stood still by then.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    ms: u64,
    stopped_ms: u64,
}

#[derive(Clone, Debug)]
pub struct InFlight {
    pub group: Group,
    sent: Moment,
    sent_first: Moment,
    /// The broker's answer was lost.
    is_unknown: bool,
}

/// A renewal: sent, and carried out by the database, whose answer has the rows of the others.
#[derive(Clone, Debug)]
pub enum Renewal {
    None,
    Sent {
        sent: Moment,
    },
    Done {
        arrives_ms: u64,
        sent: Moment,
        leased: i64,
        others: Vec<Beat>,
    },
}

/// A process. Its memory is gone with it.
#[derive(Clone, Debug)]
pub struct Process {
    pub number: u64,
    pub lease: Lease,
    /// The server's timeline when it started.
    pub timeline: i64,
    pub lanes: BTreeMap<usize, LaneMemory>,
    /// Units in memory: lent, and of these taken.
    pub lent: i64,
    pub taken: i64,
    pub clock: i64,
    pub sequence: u32,
    /// First millisecond whose ids are not leased.
    pub leased: i64,
    pub group: Vec<Order>,
    pub in_flight: Option<InFlight>,
    /// The epoch of its groups, and the number of the next.
    pub next: Place,
    /// Orders that are to be rows, with the numbers of their groups; without one, their answers wait for that.
    pub queue: VecDeque<(Order, Option<u64>)>,
    pub batch: Option<Vec<(Order, Option<u64>)>>,
    pub watch: Watch,
    /// The same without the rule of one's own gap, for [`Defect::CountOwnGap`].
    pub standing: BTreeMap<Node, (Beat, u64)>,
    pub renewal: Renewal,
    /// Answers may leave until then. Time for which the clock had stood still at that contact.
    pub answers_until_ms: u64,
    pub contact_stopped_ms: u64,
    pub suspect: Option<Suspect>,
    pub replays: Vec<Replay>,
    /// Units borrowed, as the row has them.
    pub books: i64,
    /// The answer to a loan or a return was lost; so many units are out of memory.
    pub doubt: Option<i64>,
    /// Units out of memory, to be given back, and the want and loan that this answers.
    pub giving: Option<(i64, Option<(i64, i64)>)>,
    pub want: Option<Want>,
    /// When the want was left.
    pub want_ms: u64,
    /// How often the pool had enough for the want, and did not lend it.
    pub refused: u32,
    pub look: Option<Look>,
    pub sold_out: Option<SoldOut>,
    /// Orders that wait for units, and whether they wait for their rows.
    pub dry: Vec<(Click, bool)>,
    pub is_active: bool,
}

impl Process {
    /// Orders that are no rows yet, as far as it knows.
    pub fn coming(&self) -> impl Iterator<Item = &Order> {
        let in_flight = self.in_flight.iter().flat_map(|one| &one.group.orders);
        let queue = self.queue.iter().chain(self.batch.iter().flatten());
        let queue = queue.map(|(order, _)| order);
        self.group.iter().chain(in_flight).chain(queue)
    }
}

impl World {
    pub fn may_answer(&self, home: usize) -> bool {
        let process = self.homes[home].process.as_ref();
        self.has(Defect::AnswerWithoutContact)
            || process.is_some_and(|process| self.local_ms(home) < process.answers_until_ms)
    }

    fn moment(&self, home: usize) -> Moment {
        Moment {
            ms: self.local_ms(home),
            stopped_ms: self.homes[home].stopped_ms,
        }
    }

    /// One thing that the process in `home` does.
    pub fn act(&mut self, home: usize) {
        let replays = &self.process(home).replays;
        if replays.iter().any(|replay| !replay.is_finished) && self.chance(0.5) {
            return self.replay(home);
        }
        match self.random.random_range(0..19) {
            0..=2 => self.append(home),
            3..=5 => self.start_batch(home),
            6..=7 => self.take_over(home),
            8..=10 => self.lanes(home),
            11..=12 => self.hand_over(home),
            13..=15 => self.lend(home),
            16..=17 => self.answer_wants(home),
            _ => self.note_place(home),
        }
    }

    pub fn renew(&mut self, home: usize) {
        let now = self.moment(home);
        match self.process(home).renewal.clone() {
            Renewal::None => self.process(home).renewal = Renewal::Sent { sent: now },
            Renewal::Sent { sent } => {
                if !self.asks_database(home) {
                    return;
                }
                let (wall, length) = (self.wall_ms(home), self.db.arbiter.id_lease);
                let process = self.process(home);
                let (lease, leased) = (process.lease, process.clock.max(wall) + length);
                if self.db.arbiter.renew(lease, leased).is_err() {
                    return self.end(home);
                }
                self.homes[home].renewed_ms = self.served_ms;
                let is_watched = |row: &crate::arbiter::NodeRow| {
                    matches!(row.state, State::Joining | State::Active | State::Lost)
                };
                let others = self.db.arbiter.nodes.iter();
                let others = others.filter(|(node, row)| **node != lease.node && is_watched(row));
                let others = others.map(|(node, row)| Beat {
                    node: *node,
                    epoch: row.epoch,
                    renewals: row.renewals,
                });
                let others = others.collect();
                let arrives_ms = self.arrival(0.03);
                self.process(home).renewal = Renewal::Done {
                    arrives_ms,
                    sent,
                    leased,
                    others,
                };
            }
            Renewal::Done { arrives_ms, .. } if self.now_ms < arrives_ms => {}
            Renewal::Done {
                sent,
                leased,
                others,
                ..
            } => {
                let from = match self.has(Defect::ContactFromAnswer) {
                    true => now,
                    false => sent,
                };
                let process = self.process(home);
                process.renewal = Renewal::None;
                process.leased = process.leased.max(leased);
                process.watch.renewed(sent.ms, now.ms, &others);
                let before = std::mem::take(&mut process.standing);
                for beat in others {
                    let still = before.get(&beat.node).filter(|(seen, _)| *seen == beat);
                    let since = still.copied().unwrap_or((beat, now.ms));
                    process.standing.insert(beat.node, since);
                }
                process.contact(from);
            }
        }
    }

    // The log.

    fn append(&mut self, home: usize) {
        if !self.reaches_broker(home) || !self.process(home).is_active {
            return;
        }
        let now = self.moment(home);
        let skips = self.has(Defect::SkipUnknown);
        self.has_moved |= skips;
        let gives_up = self.chance(0.05);
        let process = self.process(home);
        match &mut process.in_flight {
            Some(in_flight) if in_flight.is_unknown && skips => {
                // Its orders are taken for refused, and their units are back.
                process.next.1 = in_flight.group.number + 1;
                for order in &in_flight.group.orders {
                    process.taken -= units_of(order.click);
                    if let Some(lane) = process.lanes.get_mut(&lane_of(order.click)) {
                        lane.known.remove(&order.click);
                    }
                }
                process.in_flight = None;
                return;
            }
            Some(in_flight) if in_flight.is_unknown => {
                in_flight.is_unknown = false;
                in_flight.sent = now;
            }
            Some(in_flight) => {
                // Waited for too long, on its way as it may be.
                in_flight.is_unknown = gives_up;
                return;
            }
            None => {
                let group = Group {
                    epoch: process.next.0,
                    number: process.next.1,
                    orders: std::mem::take(&mut process.group),
                };
                process.in_flight = Some(InFlight {
                    group,
                    sent: now,
                    sent_first: now,
                    is_unknown: false,
                });
            }
        }
        let in_flight = process.in_flight.as_ref().expect("it was set");
        let (node, number, group) = (process.lease.node, process.number, in_flight.group.clone());
        let append = Append {
            arrives_ms: self.arrival(0.15),
            node,
            process: number,
            group,
        };
        self.appends.push(append);
    }

    pub fn deliver_append(&mut self) {
        let arrived = |append: &Append| append.arrives_ms <= self.now_ms;
        let Some(at) = self.appends.iter().position(arrived) else {
            return;
        };
        self.has_moved = true;
        let append = self.appends.swap_remove(at);
        let home = self.home_of(append.process);
        // A message that has left arrives, whatever became of its sender.
        let stored = self.store(append.node, append.group.clone());
        let Some(home) = home else { return };
        let is_this = |in_flight: &InFlight| {
            let group = &in_flight.group;
            (group.epoch, group.number) == (append.group.epoch, append.group.number)
        };
        if self.loses(0.15) || !self.reaches_broker(home) {
            if let Some(in_flight) = &mut self.process(home).in_flight
                && is_this(in_flight)
            {
                in_flight.is_unknown = true;
            }
            return;
        }
        if !self.process(home).in_flight.as_ref().is_some_and(is_this) {
            return;
        }
        let Some(is_repetition) = stored else {
            self.saw("fenced by a marker");
            return self.end(home);
        };
        // A paused process gets its answer when it goes on, so the answer waits with it: the acknowledgement may leave
        // late and is true.
        let from_repetition = self.has(Defect::ContactFromRepetition);
        let process = self.process(home);
        let in_flight = process.in_flight.take().expect("it is awaited");
        process.next.1 = in_flight.group.number + 1;
        process.contact(match is_repetition && !from_repetition {
            true => in_flight.sent_first,
            false => in_flight.sent,
        });
        let orders = in_flight.group.orders;
        let number = Some(in_flight.group.number);
        process
            .queue
            .extend(orders.iter().map(|order| (*order, number)));
        orders.into_iter().for_each(|order| self.acknowledge(order));
    }

    /// Notes up to which group every order is a row.
    fn note_place(&mut self, home: usize) {
        if !self.asks_database(home) || !self.process(home).is_active {
            return;
        }
        let process = self.process(home);
        let queue = process.queue.iter().chain(process.batch.iter().flatten());
        let open = queue.filter_map(|(_, number)| *number).min();
        let (lease, next) = (process.lease, process.next);
        if self.db.arbiter.may_write(lease) {
            let place = self.db.places.entry(lease.node).or_default();
            *place = (*place).max((next.0, open.unwrap_or(next.1) - 1));
        }
    }

    // Rows.

    /// Writes orders as `lease`, each once; false: the writer is fenced.
    pub fn write(&mut self, lease: Lease, orders: &[Order], on_sku: bool) -> bool {
        if !self.db.arbiter.may_write(lease) && !self.has(Defect::NoFence) {
            return false;
        }
        self.has_moved = true;
        for order in orders {
            if let Some(row) = self.db.rows.get(&order.id) {
                if row.token != order.token {
                    self.violated(format!("two orders have the id {:?}", order.id));
                }
                if !self.has(Defect::ReplayBlindly) {
                    continue;
                }
            }
            let is_other = |row: &&Order| row.click == order.click && row.id != order.id;
            if let Some(other) = self.db.rows.values().find(is_other) {
                let other = other.id;
                self.violated(format!(
                    "{:?} has the rows {other:?} and {:?}",
                    order.click, order.id
                ));
            }
            self.db.rows.insert(order.id, *order);
            let units = units_of(order.click);
            let settled = match on_sku {
                true => self.db.arbiter.settle_outside(lease, SKU, units),
                false => self.db.arbiter.settle(lease, SKU, units, 0),
            };
            if let Err(refused) = settled {
                self.violated(format!(
                    "the database refuses the counters of {lease:?}: {refused:?}"
                ));
            }
        }
        true
    }

    fn start_batch(&mut self, home: usize) {
        if !self.asks_database(home) {
            return;
        }
        let process = self.process(home);
        if process.batch.is_some() || process.queue.is_empty() || !process.is_active {
            return;
        }
        let rows = process.queue.len().min(3);
        let orders: Vec<(Order, Option<u64>)> = process.queue.drain(..rows).collect();
        process.batch = Some(orders.clone());
        let (lease, timeline, number) = (process.lease, process.timeline, process.number);
        let batch = Batch {
            arrives_ms: self.arrival(0.15),
            lease,
            timeline,
            process: number,
            orders: orders.into_iter().map(|(order, _)| order).collect(),
        };
        self.batches.push(batch);
    }

    pub fn deliver_batch(&mut self) {
        let arrived = |batch: &Batch| batch.arrives_ms <= self.now_ms;
        let Some(at) = self.batches.iter().position(arrived) else {
            return;
        };
        if !self.is_database_there() {
            return;
        }
        self.has_moved = true;
        let batch = self.batches.swap_remove(at);
        if batch.timeline != self.db.arbiter.timeline && !self.has(Defect::RightsKept) {
            // Its connection is gone with the server; the next one is to another timeline.
            return;
        }
        let written = self.write(batch.lease, &batch.orders, false);
        let Some(home) = self.home_of(batch.process) else {
            return;
        };
        if self.loses(0.1) {
            // Sent again, and resolved by its number.
            self.batches.push(batch);
            return;
        }
        if !written {
            return self.end(home);
        }
        let batch = self.process(home).batch.take();
        for (order, number) in batch.into_iter().flatten() {
            if number.is_none() {
                self.acknowledge(order);
            }
        }
    }

    // Orders.

    pub fn place_at(&mut self, home: usize, click: Click, waits: bool) {
        let (wall, token) = (self.wall_ms(home), self.tokens);
        let (at, units) = (lane_of(click), units_of(click));
        let local = self.local_ms(home);
        let may_answer = self.may_answer(home);
        let process = self.process(home);
        let Some(lane) = process.lanes.get_mut(&at).filter(|lane| lane.is_open) else {
            return;
        };
        let of_buyer = lane.known.keys().filter(|known| known.0 == click.0);
        let of_buyer: i64 = of_buyer.map(|known| units_of(*known)).sum();
        if lane.known.contains_key(&click) || of_buyer + units > LIMIT {
            return;
        }
        if process.lent - process.taken < units {
            match process.sold_out {
                Some(said) if local < said.until_ms && units >= said.from => {
                    if may_answer {
                        self.say_sold_out(units, said.looked_ms);
                    }
                }
                _ if process.dry.len() >= 6 => {}
                _ if process.dry.iter().any(|(dry, _)| *dry == click) => {}
                _ => process.dry.push((click, waits)),
            }
            return;
        }
        let next = (process.clock, process.sequence + 1);
        let (ms, sequence) = next.max((wall, 0));
        if ms >= process.leased {
            return;
        }
        process.taken += units;
        (process.clock, process.sequence) = (ms, sequence);
        let order = Order {
            id: (ms, at, sequence),
            click,
            epoch: (process.timeline, lane.epoch),
            token,
        };
        lane.known.insert(click, order.id);
        match waits {
            true => process.queue.push_back((order, None)),
            false => process.group.push(order),
        }
        self.tokens += 1;
        self.has_moved = true;
    }
}

impl Process {
    /// A contact that was begun at `from`: answers may leave for the answer lease from then on.
    fn contact(&mut self, from: Moment) {
        if from.ms + ANSWER_MS > self.answers_until_ms {
            self.answers_until_ms = from.ms + ANSWER_MS;
            self.contact_stopped_ms = from.stopped_ms;
        }
    }
}
