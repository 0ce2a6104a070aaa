//! The database, the logs, the network, the clocks, what breaks, and the clients.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::node::Process;
use super::rules::Defect;
use crate::arbiter::{Arbiter, Lease, Node, Pool};

pub const LANES: usize = 4;
pub const HOMES: usize = 3;
const BUYERS: u8 = 96;
const KEYS: u16 = 3;
/// Units that a buyer may have.
pub const LIMIT: i64 = 4;
pub const SKU: i32 = 1;
pub const LEASE_MS: u64 = 2_400;
pub const ANSWER_MS: u64 = 2_400;
/// Margin of a successor over the answer lease: clocks run at rates within a twentieth of each other.
pub const SUCCESSOR_MS: u64 = ANSWER_MS + ANSWER_MS / 4;

/// Milliseconds, lane, sequence.
pub type Id = (i64, usize, u32);
/// Buyer and idempotency key.
pub type Click = (u8, u16);
/// Epoch and number of a group.
pub type Place = (i64, u64);

pub fn lane_of(click: Click) -> usize {
    usize::from(click.0) % LANES
}

pub fn units_of(click: Click) -> i64 {
    1 + i64::from((u16::from(click.0) + 7 * click.1) % 3)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    pub id: Id,
    pub click: Click,
    /// Timeline and epoch of the lane under which its id was given out.
    pub epoch: (i64, i64),
    /// Another order under the same id has another one.
    pub token: u64,
}

/// A group in a log; number 0 is the epoch's marker.
#[derive(Clone, Debug)]
pub struct Group {
    pub epoch: i64,
    pub number: u64,
    pub orders: Vec<Order>,
}

/// How a log treats what comes late or twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The server refuses a group that is not above all stored ones, and knows a repetition (Redis).
    Refuses,
    /// The server stores everything and says where (Kafka, RocketMQ).
    Positions,
}

/// A message on its way to the log of a node.
#[derive(Clone, Debug)]
pub struct Append {
    pub arrives_ms: u64,
    pub node: Node,
    /// The process that sent it.
    pub process: u64,
    pub group: Group,
}

/// A batch on its way to the database.
#[derive(Clone, Debug)]
pub struct Batch {
    pub arrives_ms: u64,
    pub lease: Lease,
    pub timeline: i64,
    pub process: u64,
    pub orders: Vec<Order>,
}

/// What a failover may take back.
#[derive(Clone, Debug)]
pub struct Database {
    pub arbiter: Arbiter,
    pub rows: BTreeMap<Id, Order>,
    /// Up to here every order of a log is a row.
    pub places: BTreeMap<Node, Place>,
}

#[derive(Clone, Copy, Debug)]
pub struct Pause {
    until_ms: u64,
    since_ms: u64,
    /// Its clock stands still, too.
    stops_clock: bool,
}

#[derive(Clone, Debug)]
pub struct Home {
    pub process: Option<Process>,
    pub starts_ms: u64,
    pub pause: Option<Pause>,
    pub cut_from_database_ms: u64,
    pub cut_from_broker_ms: u64,
    /// How fast its clock runs, in percent, how long it stood still, and how far it is set apart in wall time.
    rate: u64,
    pub stopped_ms: u64,
    apart_ms: i64,
    /// Time for which the database had been there, at its last committed renewal.
    pub renewed_ms: u64,
    /// What it had read of lanes that it does not own yet, for [`Defect::StaleLoad`].
    pub preloaded: BTreeMap<usize, BTreeMap<Click, Id>>,
}

#[derive(Clone, Copy)]
enum Fault {
    Kill,
    KillTaker,
    Pause,
    CutFromDatabase,
    CutFromBroker,
    CutFromBoth,
    DatabaseAway,
    BrokerAway,
    Failover,
    Operator,
    /// Time passes with nobody doing anything.
    Stall,
}

const FAULTS: [Fault; 11] = [
    Fault::Kill,
    Fault::KillTaker,
    Fault::Pause,
    Fault::CutFromDatabase,
    Fault::CutFromBroker,
    Fault::CutFromBoth,
    Fault::DatabaseAway,
    Fault::BrokerAway,
    Fault::Failover,
    Fault::Operator,
    Fault::Stall,
];

/// The mixture of faults of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    /// Every run has its own.
    Any,
    /// Nodes are killed, paused and cut off, in a sale that goes on.
    Deaths,
    /// The same, and failovers that lose commits.
    Failovers,
    /// Few units, and nodes that are killed.
    Scarcity,
}

/// The place of [`Fault::Failover`] in [`FAULTS`].
const FAILOVER: usize = 8;

pub struct World {
    pub now_ms: u64,
    /// Time for which the database was there.
    pub served_ms: u64,
    pub random: StdRng,
    defect: Option<Defect>,
    pub db: Database,
    replica: Database,
    /// A failover loses no commit.
    is_synchronous: bool,
    /// A failover loses no row whose order is in no log.
    may_wait: bool,
    kind: Kind,
    pub logs: BTreeMap<Node, Vec<Group>>,
    /// What is in any log, whether it counts or not.
    pub logged: BTreeSet<Click>,
    pub homes: Vec<Home>,
    pub appends: Vec<Append>,
    pub batches: Vec<Batch>,
    database_away_ms: u64,
    broker_away_ms: u64,
    faults: [u32; FAULTS.len()],
    /// Faults in a thousand steps, and deliveries in a hundred.
    fault_rate: u32,
    delivery_rate: u32,
    /// Nothing breaks any more.
    pub is_calm: bool,
    /// An operator lowers the total to this.
    lowering: Option<i64>,
    pub acked: BTreeMap<Click, Id>,
    /// In the sequence of their acknowledgements.
    pub recent: Vec<Click>,
    /// The lowest and highest id acknowledged in a lane, by the lane's epoch.
    pub ids: BTreeMap<(usize, (i64, i64)), (Id, Id)>,
    /// The keyless orders that nodes repeat, and the order that each of them is.
    passed: Vec<(Click, u32)>,
    pub requests: BTreeMap<Click, u32>,
    /// Since when at least so many units were neither held nor on their way.
    pub free_since_ms: [Option<u64>; 4],
    pub is_scarce: bool,
    /// Orders that ended with their process. Nobody can know that their units are free before its row is settled.
    pub lost: Vec<(Lease, Vec<Click>)>,
    /// Whether an order was made, lost or moved since units were counted.
    pub has_moved: bool,
    pub processes: u64,
    pub tokens: u64,
    pub violation: Option<String>,
    pub seen: BTreeMap<&'static str, u32>,
}

impl World {
    pub fn new(seed: u64, scene: Scene, defect: Option<Defect>) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut arbiter = Arbiter::new(LANES);
        arbiter.id_lease = 1_000;
        // The sale ends soon, or goes on all the time.
        let is_scarce = match scene {
            Scene::Any => random.random_bool(0.5),
            Scene::Deaths => false,
            Scene::Failovers => random.random_bool(0.3),
            Scene::Scarcity => true,
        };
        let pool = Pool {
            total: match is_scarce {
                true => random.random_range(12..50),
                false => 500,
            },
            ..Pool::default()
        };
        arbiter.pools.insert(SKU, pool);
        let home = |_| Home {
            process: None,
            starts_ms: 0,
            pause: None,
            cut_from_database_ms: 0,
            cut_from_broker_ms: 0,
            rate: random.random_range(98..=102),
            stopped_ms: 0,
            apart_ms: random.random_range(0..3_600_000),
            renewed_ms: 0,
            preloaded: BTreeMap::new(),
        };
        let homes = (0..HOMES).map(home).collect();
        let mut faults = match scene {
            Scene::Any => std::array::from_fn(|_| match random.random_bool(0.4) {
                true => 0,
                false => random.random_range(1..20),
            }),
            Scene::Deaths => [3, 2, 3, 6, 3, 8, 0, 0, 0, 0, 0],
            Scene::Failovers => [3, 0, 1, 4, 2, 2, 0, 0, 3, 0, 0],
            Scene::Scarcity => [6, 0, 2, 3, 0, 0, 0, 0, 0, 1, 0],
        };
        if scene == Scene::Any {
            // A failover ends everything that goes on.
            faults[FAILOVER] = if random.random_bool(0.5) {
                0
            } else {
                faults[FAILOVER] / 4
            };
        }
        let has_failovers = faults[FAILOVER] > 0;
        let is_synchronous = scene == Scene::Any && random.random_bool(0.3);
        let kind = match random.random_bool(0.5) {
            true => Kind::Refuses,
            false => Kind::Positions,
        };
        let db = Database {
            arbiter,
            rows: BTreeMap::new(),
            places: BTreeMap::new(),
        };
        World {
            now_ms: 1_000,
            served_ms: 0,
            defect,
            replica: db.clone(),
            db,
            is_synchronous,
            may_wait: is_synchronous || !has_failovers,
            kind,
            logs: BTreeMap::new(),
            logged: BTreeSet::new(),
            homes,
            appends: Vec::new(),
            batches: Vec::new(),
            database_away_ms: 0,
            broker_away_ms: 0,
            faults,
            fault_rate: match scene {
                Scene::Any => random.random_range(5..50),
                _ => random.random_range(5..15),
            },
            delivery_rate: random.random_range(0..30),
            is_calm: false,
            lowering: None,
            acked: BTreeMap::new(),
            recent: Vec::new(),
            ids: BTreeMap::new(),
            passed: Vec::new(),
            requests: BTreeMap::new(),
            free_since_ms: [Some(0); 4],
            is_scarce,
            lost: Vec::new(),
            has_moved: true,
            processes: 0,
            tokens: 0,
            violation: None,
            seen: BTreeMap::new(),
            random,
        }
    }

    pub fn has(&self, defect: Defect) -> bool {
        self.defect == Some(defect)
    }

    pub fn violated(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        self.random.random_bool(probability)
    }

    /// When a message arrives: soon, or late.
    pub fn arrival(&mut self, late: f64) -> u64 {
        let late = match self.loses(late) {
            true => LEASE_MS * 4,
            false => 60,
        };
        self.now_ms + self.random.random_range(0..late)
    }

    /// Whether the answer to something is lost: now and then, while things break.
    pub fn loses(&mut self, probability: f64) -> bool {
        !self.is_calm && self.random.random_bool(probability)
    }

    /// The monotonic clock of a home.
    pub fn local_ms(&self, home: usize) -> u64 {
        (self.now_ms - self.homes[home].stopped_ms) * self.homes[home].rate / 100
    }

    pub fn wall_ms(&self, home: usize) -> i64 {
        self.now_ms as i64 + self.homes[home].apart_ms
    }

    pub fn reaches_broker(&self, home: usize) -> bool {
        self.now_ms >= self.broker_away_ms && self.now_ms >= self.homes[home].cut_from_broker_ms
    }

    pub fn is_database_there(&self) -> bool {
        self.now_ms >= self.database_away_ms
    }

    pub fn reaches_database(&self, home: usize) -> bool {
        self.is_database_there() && self.now_ms >= self.homes[home].cut_from_database_ms
    }

    /// Whether the process in `home` may ask the database now. It ends if the server has another timeline.
    pub fn asks_database(&mut self, home: usize) -> bool {
        if !self.reaches_database(home) {
            return false;
        }
        let timeline = self.db.arbiter.timeline;
        if self.process(home).timeline != timeline && !self.has(Defect::RightsKept) {
            self.end(home);
            // It is started again at once.
            let again = self.random.random_range(50..LEASE_MS / 4);
            self.homes[home].starts_ms = self.now_ms + again;
            return false;
        }
        true
    }

    pub fn process(&mut self, home: usize) -> &mut Process {
        self.homes[home].process.as_mut().expect("it runs")
    }

    /// The home in which a process runs still.
    pub fn home_of(&self, process: u64) -> Option<usize> {
        let runs = |home: &Home| home.process.as_ref().is_some_and(|p| p.number == process);
        self.homes.iter().position(runs)
    }

    pub fn end(&mut self, home: usize) {
        self.saw("process ended");
        self.has_moved = true;
        // Sooner than it is missed, or later.
        let again = match self.is_calm || self.chance(0.3) {
            true => self.random.random_range(50..LEASE_MS / 2),
            false => self.random.random_range(LEASE_MS..LEASE_MS * 4),
        };
        let one = &mut self.homes[home];
        one.starts_ms = self.now_ms + again;
        one.preloaded.clear();
        let Some(process) = one.process.take() else {
            return;
        };
        let coming = process.coming().map(|order| order.click).collect();
        self.lost.push((process.lease, coming));
        // A COMMIT that the server has not got is lost with its connection, one that it has got is carried out.
        for at in (0..self.batches.len()).rev() {
            if self.batches[at].process == process.number && self.random.random_bool(0.5) {
                self.batches.remove(at);
            }
        }
    }

    /// The process whose node is taken over loses the log at the worst moment, and gets it back some time later.
    pub fn cut_from_its_log(&mut self, dead: Lease) {
        let is_it = |home: &Home| {
            let process = home.process.as_ref();
            process.is_some_and(|process| process.lease.node == dead.node)
        };
        if let Some(home) = self.homes.iter().position(is_it)
            && self.loses(0.5)
        {
            let until = self.now_ms + self.random.random_range(0..LEASE_MS * 2);
            self.homes[home].cut_from_broker_ms = until;
        }
    }

    // The logs.

    /// The highest epoch in a log.
    pub fn log_epoch(&self, node: Node) -> i64 {
        let groups = self.logs.get(&node).into_iter().flatten();
        groups.map(|group| group.epoch).max().unwrap_or(0)
    }

    /// The orders of a log that count, behind the place that the database has.
    pub fn read_log(&self, node: Node) -> Result<Vec<Order>, String> {
        let place = self.db.places.get(&node).copied().unwrap_or_default();
        let (mut epoch, mut number) = (0, 0);
        let mut orders = Vec::new();
        let mut take = |group: &Group| {
            if (group.epoch, group.number) > place {
                orders.extend(&group.orders);
            }
        };
        for group in self.logs.get(&node).into_iter().flatten() {
            if group.epoch < epoch {
                if self.has(Defect::ReadBehindMarker) {
                    take(group);
                }
                continue;
            }
            if group.epoch > epoch {
                let needs_marker = !self.has(Defect::NoMarker) && !self.has(Defect::NoOwnReplay);
                if group.number != 0 && needs_marker {
                    let (epoch, number) = (group.epoch, group.number);
                    return Err(format!("log {node}: epoch {epoch} begins with {number}"));
                }
                (epoch, number) = (group.epoch, group.number);
                take(group);
            } else if group.number > number {
                if group.number != number + 1 {
                    return Err(format!(
                        "log {node}: a hole before {epoch}-{}",
                        group.number
                    ));
                }
                number = group.number;
                take(group);
            }
        }
        Ok(orders)
    }

    /// Stores a group. `None`: a marker of a later epoch precedes it; otherwise whether it was there already.
    pub fn store(&mut self, node: Node, group: Group) -> Option<bool> {
        let log = self.logs.entry(node).or_default();
        let place = |group: &Group| (group.epoch, group.number);
        let newest = log.iter().map(place).max();
        let is_fenced = newest.is_some_and(|(epoch, _)| epoch > group.epoch);
        let is_known = log.iter().any(|one| place(one) == place(&group));
        if self.kind == Kind::Refuses && newest.is_some_and(|newest| newest >= place(&group)) {
            let is_accepted = is_known || self.has(Defect::AcknowledgeBehindMarker);
            return is_accepted.then_some(true);
        }
        self.logged
            .extend(group.orders.iter().map(|order| order.click));
        log.push(group);
        (!is_fenced || self.has(Defect::AcknowledgeBehindMarker)).then_some(false)
    }

    // Clients.

    fn click(&mut self) {
        let click = match self.chance(0.15) {
            true => self.keyless(),
            false => (
                self.random.random_range(0..BUYERS),
                self.random.random_range(0..KEYS),
            ),
        };
        let home = self.random.random_range(0..HOMES);
        if self.has_open(home, click) && !self.looks_up(home, click) {
            let waits = self.may_wait && self.chance(0.3);
            self.place_at(home, click, waits);
        }
    }

    /// Whether the process in `home` serves the lane of a click.
    fn has_open(&self, home: usize, click: Click) -> bool {
        let home = &self.homes[home];
        let lane = home
            .process
            .as_ref()
            .and_then(|p| p.lanes.get(&lane_of(click)));
        home.pause.is_none() && lane.is_some_and(|lane| lane.is_open)
    }

    /// Somebody asks for an order that was acknowledged a moment ago, at any node that serves its lane.
    fn look_up(&mut self) {
        let back = self.random.random_range(1..4);
        let Some(click) = self
            .recent
            .len()
            .checked_sub(back)
            .map(|at| self.recent[at])
        else {
            return;
        };
        let owners = (0..HOMES).filter(|home| self.has_open(*home, click));
        if owners.filter(|home| self.is_heard(*home)).count() > 1 {
            let lane = lane_of(click);
            self.violated(format!("two nodes answer for lane {lane}"));
        }
        let first = self.random.random_range(0..HOMES);
        let mut homes = (0..HOMES).map(|at| (first + at) % HOMES);
        if let Some(home) = homes.find(|home| self.has_open(*home, click)) {
            self.looks_up(home, click);
        }
    }

    /// Whether an answer from memory leaves. A clock that stood still excuses a stale one: the documents say so.
    fn is_heard(&self, home: usize) -> bool {
        let Home {
            process,
            stopped_ms,
            ..
        } = &self.homes[home];
        let is_awake = |process: &Process| process.contact_stopped_ms == *stopped_ms;
        self.may_answer(home) && process.as_ref().is_some_and(is_awake)
    }

    /// Answers from memory whether there is an order.
    fn looks_up(&mut self, home: usize, click: Click) -> bool {
        let is_heard = self.is_heard(home);
        let process = self.process(home);
        let known = process.lanes.get(&lane_of(click));
        let known = known.and_then(|lane| lane.known.get(&click)).copied();
        let acked = self.acked.get(&click).copied();
        if is_heard && acked.is_some() && acked != known {
            self.violated(format!(
                "{click:?} is answered with {known:?}, {acked:?} was acknowledged"
            ));
        }
        known.is_some()
    }

    /// The key of a keyless order that is passed on, at first or once more.
    fn keyless(&mut self) -> Click {
        let buyer = self.random.random_range(0..BUYERS);
        let key = 100 + self.requests.len() as u16;
        if self.passed.is_empty() || self.chance(0.2) {
            let request = self.requests.len() as u32;
            self.passed.push(((buyer, key), request));
            self.requests.insert((buyer, key), request);
            return (buyer, key);
        }
        let at = self.random.random_range(0..self.passed.len());
        let (mut click, request) = self.passed[at];
        if self.has(Defect::KeylessWithoutKey) {
            click.1 = key;
            self.requests.insert(click, request);
        }
        if self.acked.contains_key(&click) || self.chance(0.05) {
            self.passed.swap_remove(at);
        }
        click
    }

    // The world.

    fn pass(&mut self, ms: u64) {
        if self.is_database_there() {
            self.served_ms += ms;
        }
        self.now_ms += ms;
    }

    fn fault(&mut self) {
        let all: u32 = self.faults.iter().sum();
        if all == 0 {
            return;
        }
        let mut at = self.random.random_range(0..all);
        let weights = self.faults.iter();
        let chosen = weights.zip(FAULTS).find(|(weight, _)| {
            let is_it = at < **weight;
            at = at.saturating_sub(**weight);
            is_it
        });
        let Some((_, fault)) = chosen else { return };
        let home = self.random.random_range(0..HOMES);
        let short = self.now_ms + self.random.random_range(50..LEASE_MS / 2);
        let long = self.now_ms + self.random.random_range(50..LEASE_MS * 6);
        match fault {
            Fault::Kill if self.homes[home].process.is_some() => self.end(home),
            Fault::KillTaker => {
                let takes = |home: &Home| {
                    let process = home.process.as_ref();
                    process.is_some_and(|p| {
                        p.replays.iter().any(|one| !one.is_own && !one.is_finished)
                    })
                };
                if let Some(home) = self.homes.iter().position(takes) {
                    self.end(home);
                }
            }
            Fault::Pause if self.homes[home].pause.is_none() => {
                self.homes[home].pause = Some(Pause {
                    until_ms: long,
                    since_ms: self.now_ms,
                    stops_clock: self.random.random_bool(0.3),
                });
            }
            Fault::CutFromDatabase => self.homes[home].cut_from_database_ms = long,
            Fault::CutFromBroker => self.homes[home].cut_from_broker_ms = long,
            Fault::CutFromBoth => {
                let other = self.now_ms + self.random.random_range(50..LEASE_MS * 6);
                let one = &mut self.homes[home];
                (one.cut_from_database_ms, one.cut_from_broker_ms) = (long.max(other), other);
            }
            Fault::DatabaseAway => self.database_away_ms = short,
            Fault::BrokerAway => self.broker_away_ms = short,
            Fault::Failover => self.fail_over(),
            Fault::Operator => self.operator(),
            Fault::Stall => {
                let passed = self.random.random_range(0..LEASE_MS / 4);
                self.pass(passed);
            }
            Fault::Kill | Fault::Pause => {}
        }
    }

    fn fail_over(&mut self) {
        self.has_moved = true;
        let before = self.db.clone();
        if !self.is_synchronous {
            self.saw("failover that loses commits");
            self.db = self.replica.clone();
        }
        if self.has(Defect::PlaceKept) {
            self.db.places = before.places;
        }
        if self.chance(0.5) {
            // One node does not learn of it for a while.
            let home = self.random.random_range(0..HOMES);
            self.homes[home].cut_from_database_ms = self.now_ms + LEASE_MS * 6;
        }
        self.db.arbiter.timeline = before.arbiter.timeline + 1;
        if self.has(Defect::RightsKept) {
            self.db.arbiter.disbands = false;
        }
        self.replica = self.db.clone();
    }

    /// An operator lowers the total, step by step.
    fn operator(&mut self) {
        let home = self.random.random_range(0..HOMES);
        if self.homes[home].process.is_none() || !self.asks_database(home) {
            return;
        }
        self.has_moved = true;
        let lease = self.process(home).lease;
        let pool = self.db.arbiter.pools[&SKU];
        let total = pool.total - self.random.random_range(0..3);
        let total = self.lowering.unwrap_or(total);
        if self.has(Defect::FallWithoutRecall) {
            self.db
                .arbiter
                .pools
                .get_mut(&SKU)
                .expect("it is there")
                .total = total;
            return;
        }
        let lowered = self.db.arbiter.lower_total(lease, SKU, total);
        self.lowering = match lowered {
            Ok(crate::arbiter::Lowered::Waiting) => Some(total),
            _ => None,
        };
    }

    fn wake(&mut self, home: usize) {
        let one = &mut self.homes[home];
        if let Some(pause) = one.pause
            && (self.now_ms >= pause.until_ms || self.is_calm)
        {
            one.pause = None;
            if pause.stops_clock {
                one.stopped_ms += self.now_ms - pause.since_ms;
            }
        }
    }

    fn step(&mut self, with_clicks: bool) {
        let passed = self.random.random_range(0..40);
        self.pass(passed);
        if !self.is_synchronous && self.faults[FAILOVER] > 0 && self.chance(0.008) {
            self.replica = self.db.clone();
        }
        let renews = self.random.random_range(0..HOMES);
        if self.homes[renews].pause.is_none() && self.homes[renews].process.is_some() {
            self.renew(renews);
        }
        let home = self.random.random_range(0..HOMES);
        match &self.homes[home] {
            one if one.pause.is_some() => self.wake(home),
            one if one.process.is_some() => self.act(home),
            one if self.now_ms >= one.starts_ms => self.start(home),
            _ => {}
        }
        self.look_up();
        let (faults, deliveries) = (self.fault_rate, self.delivery_rate);
        if !self.is_calm && self.random.random_range(0..1_000) < faults {
            return self.fault();
        }
        match self.random.random_range(0..100) {
            at if at < 10 + deliveries => self.deliver_append(),
            at if at < 25 + deliveries => self.deliver_batch(),
            _ if with_clicks => self.click(),
            _ => {}
        }
        if self.is_scarce && std::mem::take(&mut self.has_moved) {
            self.note_free();
        }
    }

    /// Runs to its end: a sale with faults, then everything heals and comes to rest.
    pub fn run(&mut self, steps: u32) -> Result<(), String> {
        for step in 0..steps {
            self.step(true);
            self.check()
                .map_err(|what| format!("step {step}: {what}"))?;
        }
        self.is_calm = true;
        (self.database_away_ms, self.broker_away_ms) = (0, 0);
        for home in &mut self.homes {
            (home.cut_from_database_ms, home.cut_from_broker_ms) = (0, 0);
        }
        for rest in 0..20_000 {
            self.step(rest < 1_000);
            self.check().map_err(|what| format!("at rest: {what}"))?;
            if let Some(pool) = self.db.arbiter.pools.get_mut(&SKU) {
                pool.recall = None;
            }
            if rest > 1_000 && rest % 20 == 0 && self.is_quiet() {
                return self.check_at_rest();
            }
        }
        let dry: Vec<_> = self.homes.iter().map(|home| &home.process).collect();
        Err(format!(
            "it does not come to rest: {:?} {dry:#?}",
            self.db.arbiter
        ))
    }

    fn check(&mut self) -> Result<(), String> {
        if let Some(violation) = self.violation.take() {
            return Err(violation);
        }
        self.db.arbiter.check_sound()?;
        self.check_memory()
    }
}
