//! Nodes, database, logs, network and clocks under one seeded scheduler, and who watches them.

use std::collections::{BTreeMap, VecDeque};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::db::{Db, NodeId, Order, OrderId, Outcome, Place, lane_of};
use crate::log::{Appended, Kind, Log};
use crate::node::Node;
use crate::rules::Defect;

/// A lease of the database, and how long an answer may rest on a contact, in milliseconds.
pub const LEASE_MS: u64 = 10_000;
pub const ANSWER_MS: u64 = 3_000;
/// Between two failovers of PostgreSQL.
const FAILOVERS_APART_MS: u64 = 60_000;
/// Units of one buyer.
pub const LIMIT: u64 = 4;
const USERS: usize = 24;

/// A buyer's order at the shop, which repeats it until it knows.
#[derive(Clone, Debug)]
pub struct Request {
    pub user: usize,
    pub key: u64,
    pub units: u64,
    /// The shop gave no key; whoever passes it on has to.
    pub keyless: bool,
    /// It is answered once its row is committed.
    pub waits: bool,
    pub open: bool,
}

#[derive(Clone, Debug)]
pub enum Message {
    /// A request on its way to the owner of its lane.
    Passed {
        to: NodeId,
        request: usize,
        key: u64,
    },
    Append {
        from: NodeId,
        life: u64,
        place: Place,
        orders: Vec<Order>,
    },
    Answered {
        to: NodeId,
        life: u64,
        place: Place,
        result: Appended,
    },
}

#[derive(Clone, Copy)]
enum Fault {
    Kill,
    Pause,
    /// The database goes away, or is back.
    Outage,
    /// The replica has caught up.
    Lag,
    /// The replica is the database.
    Failover,
    /// The total is lowered.
    Operator,
    /// A node alone does not reach the database.
    CutOff,
    /// Whoever takes over dies.
    KillTaker,
}

impl Fault {
    const ALL: [Fault; 8] = [
        Fault::Kill,
        Fault::Pause,
        Fault::Outage,
        Fault::Lag,
        Fault::Failover,
        Fault::Operator,
        Fault::CutOff,
        Fault::KillTaker,
    ];
}

pub struct World {
    pub rng: StdRng,
    pub now: u64,
    pub defect: Option<Defect>,
    /// No fault happens any more.
    pub calm: bool,
    /// A failover loses no commit.
    pub synchronous: bool,
    /// A failover loses no row that was answered with.
    may_wait: bool,
    /// How often each kind of fault happens: every run has its own mixture.
    faults: [u32; Fault::ALL.len()],
    /// Faults and deliveries among 100 steps.
    fault_rate: u32,
    delivery_rate: u32,
    pub db: Db,
    pub replica: Db,
    pub logs: Vec<Log>,
    pub nodes: Vec<Node>,
    pub network: Vec<Message>,
    pub requests: Vec<Request>,
    pub acknowledged: BTreeMap<OrderId, Order>,
    /// Buyers and keys, in the order of their acknowledgements.
    pub recent: Vec<(usize, u64)>,
    /// (time, units nobody holds), newest last, of the last second.
    pub free: VecDeque<(u64, u64)>,
    pub violation: Option<String>,
    pub takeovers: u64,
    failed_over: u64,
    /// When the last outage of the database began and ended.
    pub db_away_since: u64,
    pub db_up_since: u64,
    pub trace: Option<Vec<String>>,
}

impl World {
    /// `asynchronous`: a failover may lose commits.
    pub fn new(seed: u64, defect: Option<Defect>, asynchronous: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let kind = if rng.random_bool(0.5) {
            Kind::Refuses
        } else {
            Kind::Positions
        };
        let total = rng.random_range(20..60);
        let db = Db::new(3, total);
        let synchronous = !asynchronous || rng.random_bool(0.3);
        let faults: [u32; Fault::ALL.len()] = std::array::from_fn(|_| {
            if rng.random_bool(0.4) {
                0
            } else {
                rng.random_range(1..20)
            }
        });
        let may_wait = synchronous || faults[4] == 0;
        let (fault_rate, delivery_rate) = (rng.random_range(1..5), rng.random_range(6..40));
        let mut world = World {
            now: 1_000,
            defect,
            calm: false,
            synchronous,
            faults,
            may_wait,
            fault_rate,
            delivery_rate,
            replica: db.clone(),
            db,
            logs: vec![
                Log {
                    kind,
                    groups: Vec::new()
                };
                3
            ],
            nodes: Vec::new(),
            network: Vec::new(),
            requests: Vec::new(),
            acknowledged: BTreeMap::new(),
            recent: Vec::new(),
            free: VecDeque::new(),
            violation: None,
            takeovers: 0,
            failed_over: 0,
            db_away_since: 0,
            db_up_since: 0,
            trace: None,
            rng,
        };
        world.nodes = (0..3)
            .map(|_| {
                let skew = world.rng.random_range(0..7_200_000);
                Node::new(skew)
            })
            .collect();
        world
    }

    pub fn has(&self, defect: Defect) -> bool {
        self.defect == Some(defect)
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        self.rng.random_bool(probability)
    }

    pub fn say(&mut self, line: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:>8} {}", line()));
        }
    }

    pub fn violated(&mut self, what: String) {
        self.say(|| format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    /// Runs a transaction of a node.
    #[track_caller]
    pub fn transact<T>(
        &mut self,
        node: NodeId,
        body: impl FnOnce(&mut Db) -> Result<T, &'static str>,
    ) -> Outcome<T> {
        if !self.db.up || self.nodes[node].cut_until > self.now {
            return Outcome::Away;
        }
        if self.nodes[node].timeline != self.db.timeline {
            self.nodes[node].timeline = self.db.timeline;
            return Outcome::Failover;
        }
        let mut after = self.db.clone();
        let done = match body(&mut after) {
            Ok(done) => done,
            Err(why) => {
                if why.starts_with("CHECK") {
                    self.violated(format!("node {node}: {why}"));
                }
                return Outcome::Refused(why);
            }
        };
        if let Some(broken) = after.broken_check() {
            let at = std::panic::Location::caller();
            self.say(|| format!("{at}: {:?}", after.shares));
            self.violated(format!("node {node}: {broken}"));
        }
        let unknown = !self.calm && self.chance(0.05);
        if !unknown || self.chance(0.5) {
            self.db = after;
            if self.synchronous {
                self.replica = self.db.clone();
            }
            self.check_rows();
        }
        if unknown {
            Outcome::Unknown
        } else {
            Outcome::Done(done)
        }
    }

    pub fn step(&mut self) {
        self.now += self.rng.random_range(0..40);
        if !self.db.up {
            self.db_up_since = self.now;
        }
        if self.calm && self.db.recall && self.chance(0.01) {
            self.operator();
        }
        let now = self.now;
        self.free.push_back((now, self.units_free()));
        while self.free.front().is_some_and(|(at, _)| at + 1_000 < now) {
            self.free.pop_front();
        }
        let delivery = if self.calm {
            50
        } else {
            self.delivery_rate + 20
        };
        let fault = self.fault_rate;
        match self.rng.random_range(0..100) {
            kind if kind < 20 => self.buyer(),
            kind if kind < delivery => self.deliver(),
            kind if kind < 100 - fault => {
                let node = self.rng.random_range(0..self.nodes.len());
                self.node_step(node);
            }
            _ if self.calm => {}
            _ => self.fault(),
        }
    }

    fn buyer(&mut self) {
        let node = self.rng.random_range(0..self.nodes.len());
        if self.chance(0.4) && !self.requests.is_empty() {
            let request = self.requests[self.rng.random_range(0..self.requests.len())].clone();
            // Mostly of what was just acknowledged.
            let recent = self.recent.len().checked_sub(self.rng.random_range(1..6));
            let asked = recent
                .filter(|_| self.rng.random_bool(0.8))
                .map(|at| self.recent[at]);
            let (user, key) = asked.unwrap_or((request.user, request.key));
            return self.look_up(node, user, key);
        }
        let open = self.requests.iter().position(|request| request.open);
        let request = match open {
            Some(open) if self.requests.len() > 120 || self.chance(0.7) => {
                let open: Vec<usize> = (open..self.requests.len())
                    .filter(|at| self.requests[*at].open)
                    .collect();
                open[self.rng.random_range(0..open.len())]
            }
            _ if self.calm => return,
            _ => {
                self.requests.push(Request {
                    user: self.rng.random_range(0..USERS),
                    key: self.rng.random(),
                    units: self.rng.random_range(1..3),
                    keyless: self.rng.random_bool(0.3),
                    waits: self.rng.random_bool(if self.may_wait { 0.4 } else { 0.0 }),
                    open: true,
                });
                self.requests.len() - 1
            }
        };
        self.order_at(node, request);
    }

    /// A request reaches a node, which answers it or passes it on once.
    pub fn order_at(&mut self, node: NodeId, request: usize) {
        if !self.runs(node) {
            return;
        }
        let Request {
            user,
            mut key,
            keyless,
            ..
        } = self.requests[request].clone();
        let lane = lane_of(user);
        if self.nodes[node].lanes.contains_key(&lane) {
            return self.admit(node, request, key);
        }
        if keyless && self.has(Defect::KeylessRepeatedWithoutKey) {
            key = self.rng.random();
        }
        let to = self.nodes[node].view[lane];
        if to != node {
            self.network.push(Message::Passed { to, request, key });
        }
    }

    fn deliver(&mut self) {
        if self.network.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.network.len());
        // Some wait long.
        if !self.calm && matches!(self.network[at], Message::Append { .. }) && self.chance(0.5) {
            return;
        }
        let message = self.network.swap_remove(at);
        if !self.calm && self.chance(0.03) {
            return;
        }
        match message {
            Message::Passed { to, request, key } => {
                let user = self.requests[request].user;
                if self.runs(to) && self.nodes[to].lanes.contains_key(&lane_of(user)) {
                    self.admit(to, request, key);
                }
            }
            Message::Append {
                from,
                life,
                place,
                orders,
            } => {
                let result = self.logs[from].append(crate::log::Group { place, orders });
                self.say(|| format!("the log of {from} takes {place:?}: {result:?}"));
                self.network.push(Message::Answered {
                    to: from,
                    life,
                    place,
                    result,
                });
            }
            Message::Answered {
                to,
                life,
                place,
                result,
            } if self.nodes[to].life == life => {
                if self.runs(to) {
                    self.appended(to, place, result);
                } else if self.nodes[to].up {
                    self.network.push(Message::Answered {
                        to,
                        life,
                        place,
                        result,
                    });
                }
            }
            Message::Answered { .. } => {}
        }
    }

    fn fault(&mut self) {
        let node = self.rng.random_range(0..self.nodes.len());
        let now = self.now;
        let kinds = self.faults.iter().sum::<u32>().max(1);
        let mut kind = self.rng.random_range(0..kinds);
        let fault = self
            .faults
            .iter()
            .position(|weight| match kind.checked_sub(*weight) {
                Some(rest) => {
                    kind = rest;
                    false
                }
                None => true,
            });
        let Some(fault) = fault else { return };
        let one = &self.nodes[node];
        match Fault::ALL[fault] {
            Fault::Kill if one.up => {
                self.say(|| format!("node {node} is killed"));
                self.nodes[node].die(now);
            }
            Fault::Pause if one.up && one.paused_until.is_none() => {
                let length = self.rng.random_range(100..30_000);
                let stops = self.chance(0.5);
                self.say(|| format!("node {node} is paused for {length}, clock stops: {stops}"));
                let one = &mut self.nodes[node];
                (one.paused_until, one.paused_at, one.clock_stops) =
                    (Some(now + length), now, stops);
            }
            Fault::Outage => {
                self.db.up = !self.db.up;
                if !self.db.up {
                    self.db_away_since = now;
                }
                let up = self.db.up;
                self.say(|| format!("the database is up: {up}"));
            }
            Fault::Lag => {
                self.replica = Db {
                    up: true,
                    ..self.db.clone()
                }
            }
            Fault::Failover if now > self.failed_over + FAILOVERS_APART_MS => {
                self.failed_over = now;
                let timeline = self.db.timeline + 1;
                self.db = Db {
                    timeline,
                    ..self.replica.clone()
                };
                self.replica = self.db.clone();
                self.say(|| format!("failover to timeline {timeline}"));
            }
            Fault::Operator => self.operator(),
            Fault::CutOff if one.up => {
                let until = now + self.rng.random_range(1_000..25_000);
                self.say(|| format!("node {node} does not reach the database until {until}"));
                self.nodes[node].cut_until = until;
            }
            Fault::KillTaker => {
                let taker = self
                    .nodes
                    .iter()
                    .position(|one| one.serving && one.takeover.is_some());
                if let Some(taker) = taker {
                    self.say(|| format!("node {taker} is killed while it takes over"));
                    self.nodes[taker].die(now);
                }
            }
            _ => {}
        }
    }
}
