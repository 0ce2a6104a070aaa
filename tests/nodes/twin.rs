//! The transactions on PostgreSQL and the naive arbiter, by the same random operations.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use millrace::order::{Lane, SkuId, SkuNumber, UnixMillis};
use millrace::pipeline::cluster::hints::Hints;
use millrace::pipeline::cluster::lane_keeper::Neighbours;
use millrace::state::lanes::NodeAddress;
use millrace::store::cluster::formats::Formats;
use millrace::store::cluster::lanes::{self, HandOver, HandedOver, LaneUnits};
use millrace::store::cluster::membership::{self, Candidate, Join, Joined};
use millrace::store::cluster::recall::{self, Lowered, Lowering};
use millrace::store::cluster::shares::{self, Supply, Want};
use millrace::store::cluster::takeover::{self, LogEnd, Suspect};
use millrace::store::postgres::parked::ParkedOf;
use millrace::store::postgres::{Connected, Database, NodeLease};
use millrace::store::schema;
use millrace::store::{Ledger, StoreError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::arbiter::{self, Arbiter, Lease, Refused, State};
use crate::support::postgres::TestDatabase;
use crate::support::sale::{SCHEMA, STEP, count};

/// A migrated database without a node.
pub struct Bed {
    pub database: Database,
    pub session: Connected,
    pub test: TestDatabase,
    /// Between the nodes of this database.
    pub links: Arc<Links>,
}

/// Links on which every third hint is lost.
#[derive(Default)]
pub struct Links {
    nodes: Mutex<Vec<Arc<Hints>>>,
    sent: AtomicUsize,
}

impl Links {
    /// A node more, and its hints.
    pub fn join(self: &Arc<Self>) -> Arc<Hints> {
        let hints = Arc::<Hints>::default();
        hints.reach(Arc::clone(self) as Arc<dyn Neighbours>);
        self.nodes.lock().unwrap().push(Arc::clone(&hints));
        hints
    }

    fn tell(&self, hint: impl Fn(&Hints)) {
        for node in &*self.nodes.lock().unwrap() {
            if self.sent.fetch_add(1, Ordering::Relaxed) % 3 < 2 {
                hint(node);
            }
        }
    }
}

impl Neighbours for Links {
    fn are(&self, _: &[NodeAddress]) {}

    fn lanes_moved(&self) {}

    fn want_left(&self, _: &SkuId) {
        self.tell(Hints::want_left);
    }

    fn terms_changed(&self) {
        self.tell(Hints::terms_changed);
    }
}

impl Bed {
    pub async fn open() -> Self {
        let test = TestDatabase::create().await;
        let database = Database::with_config(test.config(), SCHEMA, 8, STEP).unwrap();
        let mut session = database.connect("test").await.unwrap();
        schema::migrate(&mut session, SCHEMA).await.unwrap();
        Bed {
            database,
            session,
            test,
            links: Arc::default(),
        }
    }

    /// Makes SKU after SKU, numbered from 1.
    pub async fn skus(&self, totals: &[i64]) {
        for (at, total) in totals.iter().enumerate() {
            self.session
                .execute(
                    "INSERT INTO sku (sku_id, title, unit_price, currency, total) VALUES ($1, '', 1, 'EUR', $2)",
                    &[&format!("S{at}"), total],
                )
                .await
                .unwrap();
        }
    }

    /// The same, with their entries in the stock log.
    pub async fn logged_skus(&self, totals: &[i64]) {
        self.skus(totals).await;
        self.sql(
            "INSERT INTO stock_log (sku, cause, reference, total_delta, total_after, held_after, sold_after)
             SELECT id, 'admin', 'put', total, total, held, sold FROM sku",
        )
        .await;
    }

    /// Parks an order for one unit.
    pub async fn park(&self, lane: Lane, sku: SkuNumber) {
        let id = (1_i64 << 22) + (i64::from(lane.get()) << 16);
        self.sql(&format!(
            "INSERT INTO parked_orders (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at, expires_at,
                                        payload_hash)
             VALUES ({id}, 'u', {}, 1, 0, 100, 'EUR', now(), now(), 0)",
            sku.0
        ))
        .await;
    }

    pub async fn sql(&self, statements: &str) {
        self.session
            .batch_execute(statements)
            .await
            .unwrap_or_else(|error| panic!("{statements}: {error:?}"));
    }

    pub async fn number(&self, query: &str) -> i64 {
        self.session.query_one(query, &[]).await.unwrap().get(0)
    }

    /// Joins and becomes active.
    pub async fn join(&self, home: u64) -> NodeLease {
        let mut session = self.database.connect("test").await.unwrap();
        match membership::join(&mut session, &candidate(0, &uuid(home))).await {
            Ok(Join::Joined(Joined { lease, .. })) => {
                membership::activate(&self.database, lease, UnixMillis(0))
                    .await
                    .unwrap();
                lease
            }
            other => panic!("{other:?}"),
        }
    }

    /// What a batch or a payment does to the share of its node.
    pub async fn settle(
        &self,
        lease: NodeLease,
        sku: i32,
        held: i64,
        sold: i64,
    ) -> Result<(), tokio_postgres::Error> {
        let moved = self
            .session
            .execute(
                "UPDATE stock_share SET held = held + $3, sold = sold + $4 WHERE sku = $1 AND node = $2",
                &[&sku, &lease.node, &held, &sold],
            )
            .await?;
        assert_eq!(moved, 1, "{lease:?} has no share of {sku}");
        Ok(())
    }
}

pub fn uuid(home: u64) -> String {
    format!("00000000-0000-0000-0000-{home:012x}")
}

pub fn candidate(ids_from: i64, id: &str) -> Candidate<'_> {
    Candidate {
        home: id,
        log: None,
        address: "127.0.0.1:8082",
        formats: Formats {
            reads: 1,
            writes_from: 1,
        },
        answer_lease_ms: 300,
        shards: 2,
        ids_from: UnixMillis(ids_from),
    }
}

fn real(lease: Lease) -> NodeLease {
    NodeLease {
        node: lease.node,
        epoch: lease.epoch,
        ledger: Ledger::Share,
    }
}

fn naive(lease: NodeLease) -> Lease {
    Lease {
        node: lease.node,
        epoch: lease.epoch,
    }
}

/// An error as the arbiter names it.
fn refused<T>(result: Result<T, StoreError>) -> Result<T, Refused> {
    result.map_err(|error| match error {
        StoreError::Fenced { .. } => Refused::Fenced,
        error if error.is_about_rows() => Refused::Check,
        error => panic!("{error}"),
    })
}

fn lane_numbers(rows: &[lanes::LaneRow]) -> Vec<usize> {
    let mut lanes: Vec<usize> = rows.iter().map(|row| row.lane.get().into()).collect();
    lanes.sort_unstable();
    lanes
}

/// The database as an arbiter. Wants have their numbers by order, because numbers are also used up by what is rolled
/// back.
async fn read(bed: &Bed) -> String {
    let mut text = String::new();
    for query in [
        "SELECT node, state, epoch, renewals, ids_leased_until_ms, journal_in_use, taken_by, taken_epoch FROM node ORDER BY node",
        "SELECT lane, node, epoch, ids_until_ms, blocked_by FROM lane ORDER BY lane",
        "SELECT id, total, held, sold, lent, recall FROM sku ORDER BY id",
        "SELECT sku, node, lent, held, sold, borrowed FROM stock_share WHERE (lent, held, sold) <> (0, 0, 0) ORDER BY sku, node",
        "SELECT sku, node, units FROM stock_want ORDER BY number",
    ] {
        let rows = bed
            .session
            .query(
                &format!("SELECT row_to_json(r)::text FROM ({query}) r"),
                &[],
            )
            .await
            .unwrap();
        for row in &rows {
            text.push_str(row.get(0));
            text.push('\n');
        }
    }
    text
}

/// The arbiter in the same words.
fn told(arbiter: &Arbiter) -> String {
    let null = |value: Option<i64>| value.map_or("null".to_owned(), |value| value.to_string());
    let mut text = String::new();
    for (node, row) in &arbiter.nodes {
        let (state, by) = match row.state {
            State::Joining => ("joining", None),
            State::Active => ("active", None),
            State::Dead(by) => ("dead", Some(by)),
            State::Lost => ("dead", None),
            State::Left => ("left", None),
        };
        text.push_str(&format!(
            "{{\"node\":{node},\"state\":\"{state}\",\"epoch\":{},\"renewals\":{},\"ids_leased_until_ms\":{},\"journal_in_use\":{},\"taken_by\":{},\"taken_epoch\":{}}}\n",
            row.epoch,
            row.renewals,
            row.ids_until,
            row.log_in_use,
            null(by.map(|by| by.node.into())),
            null(by.map(|by| by.epoch)),
        ));
    }
    for (at, lane) in arbiter.lanes.iter().enumerate() {
        text.push_str(&format!(
            "{{\"lane\":{at},\"node\":{},\"epoch\":{},\"ids_until_ms\":{},\"blocked_by\":{}}}\n",
            null(lane.node.map(i64::from)),
            lane.epoch,
            lane.ids_until,
            null(lane.blocked_by.map(i64::from)),
        ));
    }
    for (sku, pool) in &arbiter.pools {
        text.push_str(&format!(
            "{{\"id\":{sku},\"total\":{},\"held\":{},\"sold\":{},\"lent\":{},\"recall\":{}}}\n",
            pool.total,
            pool.held,
            pool.sold,
            arbiter.lent(*sku),
            null(pool.recall),
        ));
    }
    for ((sku, node), share) in &arbiter.shares {
        if (share.lent, share.held, share.sold) != (0, 0, 0) {
            text.push_str(&format!(
                "{{\"sku\":{sku},\"node\":{node},\"lent\":{},\"held\":{},\"sold\":{},\"borrowed\":{}}}\n",
                share.lent, share.held, share.sold, share.borrowed
            ));
        }
    }
    let mut wants = arbiter.wants.clone();
    wants.sort_unstable_by_key(|want| want.number);
    for want in &wants {
        text.push_str(&format!(
            "{{\"sku\":{},\"node\":{},\"units\":{}}}\n",
            want.sku, want.node, want.units
        ));
    }
    text
}

const HOMES: u64 = 4;
const SKUS: i32 = 2;

#[tokio::test]
async fn postgresql_arbitrates_as_the_naive_arbiter_does() {
    let seed = count("MILLRACE_SEED", rand::random::<u32>().into());
    println!("MILLRACE_SEED={seed}");
    for round in 0..2 * count("MILLRACE_ROUNDS", 1) {
        run(seed.wrapping_add(round), 250).await;
    }
}

/// Every lease that was ever given: old ones are tried again.
struct Run {
    bed: Bed,
    arbiter: Arbiter,
    leases: Vec<Lease>,
    /// Takeovers begun: survivor and dead node.
    begun: Vec<(Lease, Lease)>,
    random: StdRng,
    done: std::collections::BTreeMap<&'static str, u32>,
}

async fn run(seed: u64, steps: u32) {
    let bed = Bed::open().await;
    let mut random = StdRng::seed_from_u64(seed);
    let mut arbiter = Arbiter::new(Lane::COUNT);
    let totals: Vec<i64> = (0..SKUS).map(|_| random.random_range(20..60)).collect();
    bed.skus(&totals).await;
    for (at, total) in totals.iter().enumerate() {
        let pool = arbiter::Pool {
            total: *total,
            ..arbiter::Pool::default()
        };
        arbiter.pools.insert(at as i32 + 1, pool);
    }
    let mut run = Run {
        bed,
        arbiter,
        leases: Vec::new(),
        begun: Vec::new(),
        random,
        done: Default::default(),
    };
    for step in 0..steps {
        let what = run.step().await;
        run.arbiter.check_sound().unwrap();
        let (found, expected) = (read(&run.bed).await, told(&run.arbiter));
        assert_eq!(found, expected, "seed={seed} step={step} {what}");
    }
    println!("seed={seed} {:?}", run.done);
}

impl Run {
    fn lease(&mut self) -> Lease {
        // Mostly one that is in force.
        let in_force = |lease: &&Lease| self.arbiter.may_write(**lease);
        let current: Vec<Lease> = self.leases.iter().filter(in_force).copied().collect();
        match self.random.random_range(0..10) {
            0 if !self.leases.is_empty() => {
                self.leases[self.random.random_range(0..self.leases.len())]
            }
            _ if current.is_empty() => Lease { node: 0, epoch: 0 },
            _ => current[self.random.random_range(0..current.len())],
        }
    }

    async fn step(&mut self) -> String {
        let (lease, sku) = (self.lease(), self.random.random_range(1..=SKUS));
        let units = self.random.random_range(1..12_i64);
        let database = self.bed.database.clone();
        let number = SkuNumber(sku);
        let kind = self.random.random_range(0..100);
        let (name, what) = match kind {
            0..=7 => ("join", self.join().await),
            8 => ("fail over", self.fail_over().await),
            9..=13 => {
                let ids = self.random.random_range(0..1_000_000);
                let found = membership::activate(&database, real(lease), UnixMillis(ids)).await;
                let expected = self.arbiter.activate(lease, ids);
                assert_eq!(refused(found), expected, "activate {lease:?}");
                ("activate", format!("{lease:?} {ids}"))
            }
            14..=19 => {
                let until = self.random.random_range(0..1_000_000);
                let found =
                    membership::renew(&database, &self.bed.session, real(lease), UnixMillis(until));
                let found = refused(found.await);
                assert_eq!(found, self.arbiter.renew(lease, until), "renew {lease:?}");
                ("renew", format!("{lease:?} {until}"))
            }
            20..=23 => {
                let used = self.random.random_range(0..1_000_000);
                let found =
                    refused(membership::leave(&database, real(lease), UnixMillis(used)).await);
                let expected = self.arbiter.leave(lease, used);
                assert_eq!(found, expected, "leave {lease:?}");
                ("leave", format!("{lease:?} {used} {expected:?}"))
            }
            24..=31 => {
                let found = refused(lanes::claim_free(&database, real(lease)).await);
                let found = found.map(|rows| lane_numbers(&rows));
                let expected = self.arbiter.claim_free(lease);
                assert_eq!(found, expected, "claim {lease:?}");
                ("claim", format!("{lease:?}"))
            }
            32..=43 => ("hand over", self.hand_over(lease).await),
            44..=59 => {
                let wanted = units + self.random.random_range(0..5);
                let found =
                    refused(shares::lend(&database, real(lease), number, wanted, units).await);
                let expected = self.arbiter.lend(lease, sku, wanted, units);
                let found = found.map(|lent| (lent.units, lent.swept, lent.want.is_some()));
                let said = expected.map(|(units, swept, want)| (units, swept, want.is_some()));
                assert_eq!(found, said, "lend {lease:?} {sku} {wanted} {units}");
                ("lend", format!("{lease:?} {sku} {wanted} {units} {said:?}"))
            }
            60..=65 => {
                let found = refused(shares::give_back(&database, real(lease), number, units).await);
                let expected = self.arbiter.give_back(lease, sku, units, None);
                assert_eq!(found, expected, "give back {lease:?} {sku} {units}");
                ("give back", format!("{lease:?} {sku} {units}"))
            }
            66..=71 => ("answer", self.answer(lease).await),
            72..=81 => {
                let sold = self.random.random_range(0..=units);
                let (held, sold) =
                    [(units, 0), (-units, 0), (-sold, sold)][self.random.random_range(0..3)];
                let has_share = self.arbiter.shares.contains_key(&(sku, lease.node));
                if has_share && self.arbiter.may_write(lease) {
                    let found = self.bed.settle(real(lease), sku, held, sold).await;
                    let expected = self.arbiter.settle(lease, sku, held, sold);
                    assert_eq!(
                        found.is_ok(),
                        expected.is_ok(),
                        "settle {lease:?} {sku} {held} {sold}"
                    );
                }
                ("settle", format!("{lease:?} {sku} {held} {sold}"))
            }
            82..=84 => {
                let total = self.random.random_range(10..60);
                let found = refused(
                    recall::lower_total(
                        &database,
                        real(lease),
                        number,
                        Lowering::To(total),
                        "put",
                        None,
                    )
                    .await,
                );
                let expected = self.arbiter.lower_total(lease, sku, total);
                let found = found.map(|lowered| match lowered {
                    Lowered::Done => arbiter::Lowered::Done,
                    Lowered::Waiting => arbiter::Lowered::Waiting,
                    Lowered::Refused { committed } => arbiter::Lowered::Refused { committed },
                });
                assert_eq!(found, expected, "lower {lease:?} {sku} {total}");
                ("lower", format!("{lease:?} {sku} {total} {expected:?}"))
            }
            85 => {
                let found = refused(recall::end_recall(&database, real(lease), number).await);
                let expected = self.arbiter.check(lease).map(|()| {
                    self.arbiter.pools.get_mut(&sku).unwrap().recall = None;
                });
                assert_eq!(found, expected, "end recall {lease:?}");
                ("end recall", format!("{lease:?} {sku}"))
            }
            86..=93 => ("fence", self.fence(lease).await),
            _ => ("finish", self.finish().await),
        };
        *self.done.entry(name).or_default() += 1;
        format!("{name} {what}")
    }

    /// The server has another timeline. Now and then: every right ends with it.
    async fn fail_over(&mut self) -> String {
        if self.random.random_bool(0.5) {
            self.bed
                .sql("UPDATE database_identity SET timeline = timeline || '0'")
                .await;
            self.arbiter.timeline += 1;
        }
        String::new()
    }

    async fn join(&mut self) -> String {
        let home = self.random.random_range(1..=HOMES);
        let now = self.random.random_range(0..1_000_000);
        let id = uuid(home);
        let candidate = candidate(now, &id);
        let found = membership::join(&mut self.bed.session, &candidate)
            .await
            .unwrap();
        let expected = self.arbiter.join(home, now);
        match (&found, &expected) {
            (Join::BeingReplayed { .. }, None) => {}
            (Join::Joined(joined), Some((lease, lanes, inherited))) => {
                assert_eq!(naive(joined.lease), *lease);
                assert_eq!(lane_numbers(&joined.lanes), *lanes);
                let found: Vec<Lease> = joined
                    .inherited
                    .iter()
                    .map(|dead| naive(dead.lease))
                    .collect();
                assert_eq!(found, *inherited);
                self.begun
                    .extend(inherited.iter().map(|dead| (*lease, *dead)));
                self.leases.push(*lease);
            }
            _ => panic!("join {home}: {found:?}, {expected:?}"),
        }
        format!("{home} {expected:?}")
    }

    async fn hand_over(&mut self, lease: Lease) -> String {
        let at = self.random.random_range(0..Lane::COUNT);
        let lane = self.arbiter.lanes[at];
        let epoch = lane.epoch - i64::from(self.random.random_bool(0.1));
        // Mostly from its owner to another node that is there.
        let from = match lane.node {
            Some(node) if self.random.random_bool(0.8) => {
                let epoch = self.arbiter.nodes[&node].epoch;
                Lease { node, epoch }
            }
            _ => lease,
        };
        let to = self.random.random_range(0..HOMES as i16);
        let ids_until = self.random.random_range(0..1_000_000);
        let mut units = Vec::new();
        for sku in 1..=SKUS {
            let share = self.arbiter.shares.get(&(sku, from.node)).copied();
            let most = share.map_or(1, |share| {
                share.held + i64::from(self.random.random_bool(0.05))
            });
            let free = share.map_or(0, |share| {
                share.lent - share.held - share.sold + i64::from(self.random.random_bool(0.05))
            });
            if most + free > 0 && self.random.random_bool(0.6) {
                let held = self.random.random_range(0..=most);
                let parked = self.random.random_range(0..=free);
                units.push((sku, held + parked, held));
            }
        }
        let of_lane = |(sku, lent, held): &(i32, i64, i64)| LaneUnits {
            sku: SkuNumber(*sku),
            held: *held,
            parked: ParkedOf {
                orders: 1,
                units: (lent - held).cast_unsigned(),
            },
        };
        let of_lane: Vec<_> = units.iter().map(of_lane).collect();
        let over = HandOver {
            lane: Lane::new(at as u8).unwrap(),
            epoch,
            to,
            ids_until: UnixMillis(ids_until),
            units: &of_lane,
        };
        let found = refused(lanes::hand_over(&self.bed.database, real(from), &over).await);
        let expected = self
            .arbiter
            .hand_over(from, at, epoch, to, ids_until, &units);
        let found = found.map(|over| match over {
            HandedOver::Yes { epoch } => Some(epoch),
            HandedOver::No => None,
        });
        assert_eq!(found, expected, "{from:?} {over:?}");
        format!("{from:?} {over:?} {expected:?}")
    }

    async fn answer(&mut self, lease: Lease) -> String {
        let wants = shares::wants(&self.bed.database).await.unwrap();
        let mut known = self.arbiter.wants.clone();
        known.sort_unstable_by_key(|want| want.number);
        let words = |want: &Want| (want.sku.0, want.node, want.units);
        let found: Vec<_> = wants.iter().map(words).collect();
        let expected: Vec<_> = known
            .iter()
            .map(|want| (want.sku, want.node, want.units))
            .collect();
        assert_eq!(found, expected);
        if wants.is_empty() {
            return "nothing".to_owned();
        }
        let at = self.random.random_range(0..wants.len());
        let (want, naive) = (wants[at], known[at]);
        let supply = match shares::supply(&self.bed.database, &want, false)
            .await
            .unwrap()
            .unwrap()
        {
            Supply::Pool => arbiter::Supply::Pool,
            Supply::Unanswered => arbiter::Supply::Unanswered,
            Supply::None => arbiter::Supply::None,
        };
        assert_eq!(supply, self.arbiter.supply(&naive), "{want:?}");
        if self.random.random_bool(0.2) {
            let found = refused(shares::withdraw(&self.bed.database, real(lease), want.sku).await);
            assert_eq!(found, self.arbiter.withdraw(lease, naive.sku));
            return format!("withdraw {lease:?} {want:?}");
        }
        let share = self
            .arbiter
            .shares
            .get(&(naive.sku, lease.node))
            .copied()
            .unwrap_or_default();
        let lent = share.lent - i64::from(self.random.random_bool(0.2));
        let free = share.lent - share.held - share.sold + i64::from(self.random.random_bool(0.05));
        let found =
            refused(shares::answer(&self.bed.database, real(lease), &want, free, lent).await);
        let expected = self
            .arbiter
            .give_back(lease, naive.sku, free, Some((naive.number, lent)));
        assert_eq!(found, expected, "answer {lease:?} {want:?} {free}");
        format!("{lease:?} {want:?} {free}")
    }

    async fn fence(&mut self, by: Lease) -> String {
        let node = self.random.random_range(0..HOMES as i16);
        let row = self.arbiter.nodes.get(&node).copied();
        let (epoch, renewals) = row.map_or((0, 0), |row| (row.epoch, row.renewals));
        let suspect = Suspect {
            node,
            epoch: epoch - i64::from(self.random.random_bool(0.05)),
            renewals: renewals - i64::from(self.random.random_bool(0.2)),
        };
        let found = takeover::fence(&self.bed.database, &mut self.bed.session, real(by), suspect);
        let found = refused(found.await).map(|taken| {
            taken.map(|taken| {
                let fenced = taken.dead.iter().map(|dead| naive(dead.lease));
                (fenced.collect::<Vec<_>>(), lane_numbers(&taken.lanes))
            })
        });
        let expected = self
            .arbiter
            .fence(by, node, suspect.epoch, suspect.renewals);
        assert_eq!(found, expected, "{by:?} {suspect:?}");
        if let Ok(Some((fenced, _))) = &expected {
            self.begun.extend(fenced.iter().map(|dead| (by, *dead)));
            self.leases.extend(fenced);
        }
        format!("{by:?} {suspect:?} {expected:?}")
    }

    async fn finish(&mut self) -> String {
        if self.begun.is_empty() {
            return "nothing".to_owned();
        }
        let at = self.random.random_range(0..self.begun.len());
        let (by, dead) = self.begun[at];
        let ids = self.random.random_range(0..1_000_000);
        let end = LogEnd {
            ids_until: UnixMillis(ids),
            place: None,
        };
        let found = takeover::finish(&self.bed.database, real(by), real(dead), end);
        let found = refused(found.await).map(drop);
        let expected = self.arbiter.finish(by, dead, ids);
        assert_eq!(found, expected, "{by:?} {dead:?}");
        if expected.is_ok() {
            self.begun.remove(at);
        }
        format!("{by:?} {dead:?} {expected:?}")
    }
}
