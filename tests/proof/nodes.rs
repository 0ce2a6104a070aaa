//! Three nodes on one PostgreSQL and one Redis, under mixed load with payments, while one fault after the other happens to
//! them, to their database, to their broker and to the network between them. No answer to a client may turn out false.
//!
//! `MILLRACE_NODE_FAULT` chooses one fault by its name, `MILLRACE_DETAILS` prints a line for each. What the nodes have
//! logged is kept if the proof fails.

mod cluster;
mod faults;
mod network;
mod probes;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::{Signal, kill_process};

use self::cluster::{Cluster, LEASE, PATIENCE};
use self::faults::{Deck, Fault};
use self::network::Network;
use self::probes::Probes;
use super::checker::{Checker, Findings, OrderRow, read_rows};
use super::load::{Load, audit, compare_counters, put_skus, retry_some};
use super::outcome::{Why, block_on, in_series};
use super::platform::Platform;
use crate::support::http::try_call;
use crate::support::standby::DATABASE;
use crate::support::waiting::until;

/// Machines.
const NODES: u8 = 3;
/// Faults on one database; the next begin with an empty one.
const SERIES: u64 = 20;
/// How long the last expiries, and everything else that is done in the background, may take.
const SETTLING: Duration = Duration::from_secs(45);
const LOOK: Duration = Duration::from_millis(5);
/// The SKU of the probes.
const PROBED: &str = "PROBED";

/// Faults, one after the other.
pub fn run(faults: u64) -> Result<String, Why> {
    let chosen = std::env::var("MILLRACE_NODE_FAULT").ok();
    with_bug(faults, chosen.as_deref(), None)
}

/// The same with one fault alone, and with a deliberate defect, to show that it is found.
pub fn with_bug(faults: u64, only: Option<&str>, bug: Option<&str>) -> Result<String, Why> {
    let unknown = |name: &str| Why::Failed(format!("no fault is called {name}"));
    let only = only.map(|name| Fault::named(name).ok_or(unknown(name)));
    let only = only.transpose()?;
    drop(Network::new(NODES).map_err(Why::NotRun)?);
    let mut seen = Seen::default();
    let mut not_run = None;
    let figures = in_series("nodes", faults, SERIES, |seed, faults, done| {
        let network = Network::new(NODES)?;
        let series = || {
            let cluster = Cluster::start(&network, bug)?;
            series(cluster, seed, only, faults, done, &mut seen)
        };
        match network.outside.within(series) {
            Err(Why::NotRun(why)) => {
                not_run = Some(why.clone());
                Err(why)
            }
            Err(Why::Failed(why)) => Err(why),
            Ok(findings) => Ok(findings),
        }
    });
    match (figures, not_run) {
        (_, Some(why)) => Err(Why::NotRun(why)),
        (figures, None) => Ok(format!("{} {seen}", figures?)),
    }
}

/// What was seen of lanes.
#[derive(Default)]
struct Seen {
    two_owners: u64,
    /// By fault: how often it happened, processes that ended by themselves, and for how long lanes were closed.
    faults: BTreeMap<String, Effect>,
}

#[derive(Default)]
struct Effect {
    times: u64,
    ended: u64,
    closed: Vec<Duration>,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x", self.times)?;
        let mut closed = self.closed.clone();
        closed.sort_unstable();
        if let (Some(least), Some(greatest)) = (closed.first(), closed.last()) {
            let seconds = |time: &Duration| time.as_secs_f64();
            let median = seconds(&closed[closed.len() / 2]);
            let (count, least, greatest) = (closed.len(), seconds(least), seconds(greatest));
            write!(f, " closed={count} {least:.1}/{median:.1}/{greatest:.1}s")?;
        }
        if self.ended > 0 {
            write!(f, " ended={}", self.ended)?;
        }
        Ok(())
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = Effect::default();
        for effect in self.faults.values() {
            all.times += effect.times;
            all.ended += effect.ended;
            all.closed.extend(&effect.closed);
        }
        write!(f, "two_owners={} faults: {all}", self.two_owners)?;
        for (fault, effect) in &self.faults {
            write!(f, "; {fault}: {effect}")?;
        }
        Ok(())
    }
}

fn series(
    mut cluster: Cluster<'_>,
    seed: u64,
    only: Option<Fault>,
    faults: u64,
    done: &(dyn Fn(u64) + Sync),
    seen: &mut Seen,
) -> Result<Findings, Why> {
    let mut proof = Proof {
        random: StdRng::seed_from_u64(seed),
        deck: Deck::default(),
        only,
        seen,
    };
    let run = AssertUnwindSafe(|| proof.run(&mut cluster, faults, seed, done));
    let end = std::panic::catch_unwind(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(text.unwrap_or_else(|| "panicked".to_owned()))
    });
    let failed = match &end {
        Ok(findings) => !findings.holds(),
        Err(_) => true,
    };
    let kept = failed.then(|| cluster.keep_evidence(&format!("nodes-{seed}")));
    match (end, kept) {
        (Ok(findings), None) => Ok(findings),
        (Ok(findings), Some(kept)) => Err(Why::Failed(format!(
            "{}; evidence: {kept}",
            findings.into_words()
        ))),
        (Err(why), kept) => Err(Why::Failed(format!(
            "{why}; evidence: {}",
            kept.unwrap_or_default()
        ))),
    }
}

/// Clients, and what they were told.
struct Sale<'a> {
    checker: &'a Checker,
    platform: &'a Platform,
    probes: Probes<'a>,
}

struct Proof<'a> {
    random: StdRng,
    deck: Deck,
    only: Option<Fault>,
    seen: &'a mut Seen,
}

impl Proof<'_> {
    fn run(
        &mut self,
        cluster: &mut Cluster<'_>,
        faults: u64,
        seed: u64,
        done: &dyn Fn(u64),
    ) -> Result<Findings, String> {
        let (checker, platform) = (Checker::new(), Platform::new(seed));
        let doors = Arc::clone(&cluster.doors);
        offer(cluster, &checker, &[(PROBED.to_owned(), 10_000_000)])?;
        let sale = Sale {
            checker: &checker,
            platform: &platform,
            probes: Probes::new(&checker, &doors, PROBED, seed),
        };
        let mut findings = Findings::default();
        for number in 0..faults {
            done(number);
            let fault = self
                .only
                .unwrap_or_else(|| self.deck.next(&mut self.random));
            let all = self.random.random_bool(0.3) || number + 1 == faults;
            findings = self
                .turn(cluster, &sale, number, fault, all)
                .map_err(|why| format!("fault={number} {fault}: {why}"))?;
            if !findings.holds() {
                findings.faults.insert(0, format!("fault={number} {fault}"));
                return Ok(findings);
            }
        }
        for machine in &mut cluster.machines {
            machine.stop()?;
        }
        let rows = block_on(read_rows(&cluster.database.config(DATABASE)));
        let last = checker.check(&rows);
        match last.holds() {
            true => Ok(findings),
            false => Ok(last),
        }
    }

    /// A fault under load, and a comparison once everything runs again.
    fn turn(
        &mut self,
        cluster: &mut Cluster<'_>,
        sale: &Sale<'_>,
        number: u64,
        fault: Fault,
        all: bool,
    ) -> Result<Findings, String> {
        let load = self.load(cluster, sale, number)?;
        let (stop, began) = (AtomicBool::new(false), Instant::now());
        let mut random = StdRng::seed_from_u64(self.random.random());
        let ended_before = ended(cluster);
        let doors = Arc::clone(&cluster.doors);
        std::thread::scope(|scope| {
            scope.spawn(|| load.run(&stop));
            scope.spawn(|| sale.platform.run(&doors, &stop));
            scope.spawn(|| sale.probes.run(&stop));
            let _stop = StopAtEnd(&stop);
            sale.probes.until_open()?;
            sleep(Duration::from_millis(random.random_range(0..1_000)));
            suffer(cluster, fault, sale.checker, &mut random)?;
            cluster.until_whole()?;
            // With all nodes again.
            sale.probes.until_open()?;
            sleep(Duration::from_millis(random.random_range(300..800)));
            Ok::<_, String>(())
        })?;
        let suffered = began.elapsed();
        let (closed, faults) = sale.probes.take();
        let mut findings = self.check(cluster, sale, all)?;
        findings.faults.extend(faults);
        let strangers = cluster.strangers();
        self.seen.two_owners += strangers.len() as u64;
        let words = strangers.iter().take(5);
        findings
            .faults
            .extend(words.map(|one| format!("written by another node than the lane's: {one}")));
        findings.faults.extend(cluster.panics());
        let effect = Effect {
            times: 1,
            ended: ended(cluster) - ended_before,
            closed,
        };
        if std::env::var_os("MILLRACE_DETAILS").is_some() {
            let (orders, after) = (findings.acked, (began.elapsed() - suffered).as_secs());
            let (suffered, answers) = (suffered.as_secs(), cluster.doors.take_answers());
            eprintln!(
                "{number} {fault}: {effect}; {suffered} s, compared {after} s, {orders} orders so far; {answers:?}"
            );
        }
        let sum = self.seen.faults.entry(fault.to_string()).or_default();
        sum.times += 1;
        sum.ended += effect.ended;
        sum.closed.extend(&effect.closed);
        Ok(findings)
    }

    /// A load of its own, which begins at once.
    fn load<'c>(
        &mut self,
        cluster: &Cluster<'_>,
        sale: &'c Sale<'_>,
        number: u64,
    ) -> Result<Load<'c>, String> {
        let random = &mut self.random;
        let (hot, plain) = (format!("HOT-{number}"), format!("A-{number}"));
        let offers = [
            (hot.clone(), random.random_range(20..300)),
            (plain.clone(), 2_000),
            ("B".to_owned(), 10_000_000),
        ];
        offer(cluster, sale.checker, &offers)?;
        Ok(Load {
            doors: Arc::clone(&cluster.doors),
            checker: sale.checker,
            skus: vec![hot, plain, "B".to_owned(), "B".to_owned()],
            seed: random.random(),
            threads: 6,
            respond_async: random.random_range(20..=80),
            batch_max: random.random_range(3..=20),
            cancels: true,
            waits: random.random_bool(0.5),
            platform: Some(sale.platform),
        })
    }

    /// Compares what clients were told, what is in the database, and what each node has in memory. `all`: every order is
    /// to be paid or over first.
    fn check(
        &mut self,
        cluster: &Cluster<'_>,
        sale: &Sale<'_>,
        all: bool,
    ) -> Result<Findings, String> {
        let Sale {
            checker, platform, ..
        } = sale;
        let config = cluster.database.config(DATABASE);
        let seed = self.random.random();
        let doors = Arc::clone(&cluster.doors);
        platform.deliver_all(&doors, all)?;
        let asked = &cluster.machines[self.random.random_range(0..cluster.machines.len())];
        let mut said = Findings::default();
        retry_some(asked.data(), checker, 30, seed, &mut said);
        let mut deadline = Instant::now() + SETTLING;
        let mut waiting = usize::MAX;
        loop {
            let found = block_on(read_rows(&config));
            // Whoever is assigned units does not pay any more, and the next one waits until they come back.
            let waits = |row: &&OrderRow| row.status == "waitlisted";
            let still = found.orders.iter().filter(waits).count();
            if still < std::mem::replace(&mut waiting, still) {
                deadline = Instant::now() + SETTLING;
            }
            let mut findings = checker.check(&found);
            let is_cancel_asked = |user: &str| checker.is_cancel_asked(user);
            platform.check(&found, is_cancel_asked, all, &mut findings);
            for machine in &cluster.machines {
                compare_counters(machine.data(), &found, &mut findings);
                let mut audited = Findings::default();
                machine.control(|control| audit(control, &mut audited));
                findings.faults.extend(audited.faults);
            }
            findings.faults.extend(said.faults.clone());
            if findings.holds() || Instant::now() >= deadline {
                return Ok(findings);
            }
            sleep(Duration::from_millis(100));
        }
    }
}

fn ended(cluster: &Cluster<'_>) -> u64 {
    cluster.machines.iter().map(|machine| machine.ended).sum()
}

/// Puts SKUs on sale, and waits until every node has them.
fn offer(cluster: &Cluster<'_>, checker: &Checker, offers: &[(String, u32)]) -> Result<(), String> {
    let put = |control| put_skus(control, checker, offers);
    let put = cluster.machines[0].control(put).ok_or("no node runs")?;
    put.map_err(|error| format!("no SKU can be put on sale: {error}"))?;
    for machine in &cluster.machines {
        for (sku, _) in offers {
            until("every node has the SKU", PATIENCE, || {
                let target = format!("/v1/skus/{sku}");
                let answer = try_call(machine.data(), "GET", &target, &[], "");
                answer.is_ok_and(|answer| answer.status == 200)
            });
        }
    }
    Ok(())
}

/// Lets a fault happen, and mends what a person or a machine would mend.
fn suffer(
    cluster: &mut Cluster<'_>,
    fault: Fault,
    checker: &Checker,
    random: &mut StdRng,
) -> Result<(), String> {
    let one = random.random_range(0..cluster.machines.len());
    let others = [(one + 1) % 3, (one + 2) % 3];
    let lease_ms = LEASE.as_millis() as u64;
    let moment = Duration::from_millis(random.random_range(0..700));
    match fault {
        Fault::Lost => {
            close(cluster, one);
            cluster.machines[one].lose();
            await_takeover(cluster, &others, &[32, 32], random)?;
        }
        Fault::Killed => {
            close(cluster, one);
            cluster.machines[one].kill();
            match random.random_bool(0.6) {
                true => sleep(moment),
                false => await_takeover(cluster, &others, &[32, 32], random)?,
            }
        }
        Fault::Paused => {
            cluster.machines[one].signal(Signal::STOP);
            // The load balancer notices in a while.
            sleep(moment);
            close(cluster, one);
            sleep(Duration::from_millis(
                random.random_range(lease_ms * 3 / 2..lease_ms * 3),
            ));
            cluster.machines[one].signal(Signal::CONT);
            let door = cluster.machines[one].data();
            cluster.doors.open().push(door);
        }
        Fault::CutOff(..) => {
            let (machine, links) = (cluster.machines[one].number, fault.links());
            let time = match random.random_bool(0.3) {
                true => random.random_range(lease_ms / 4..lease_ms),
                false => random.random_range(lease_ms * 3 / 2..lease_ms * 4),
            };
            cluster.network.cut(machine, &links, true)?;
            sleep(Duration::from_millis(time));
            cluster.network.cut(machine, &links, false)?;
        }
        Fault::DatabaseRestarted => {
            cluster.database.stop_immediately();
            sleep(moment * random.random_range(1..6));
            block_on(cluster.database.start());
        }
        Fault::DatabaseStalled => {
            let processes = cluster.database.processes();
            for process in &processes {
                let _ = kill_process(*process, Signal::STOP);
            }
            sleep(Duration::from_millis(
                random.random_range(500..lease_ms * 4),
            ));
            for process in processes.iter().rev() {
                let _ = kill_process(*process, Signal::CONT);
            }
        }
        Fault::FailedOver => cluster.fail_over(moment * 2),
        Fault::BrokerKilled => {
            cluster.broker.kill9();
            sleep(moment * random.random_range(1..6));
            cluster.broker.start_again();
        }
        Fault::SurvivorKilled => {
            close(cluster, one);
            cluster.machines[one].lose();
            let survivor = survivor(cluster)?;
            sleep(moment / 4);
            close(cluster, survivor);
            match random.random_bool(0.5) {
                true => cluster.machines[survivor].lose(),
                false => cluster.machines[survivor].kill(),
            }
            let third = 3 - one - survivor;
            await_takeover(cluster, &[third], &[64], random)?;
        }
        Fault::KilledHandingOver => {
            let node = cluster.machines[one].node().ok_or("no number")?;
            let told = cluster.machines[others[0]].drain(node);
            if told.as_ref().is_none_or(|answer| answer.status != 200) {
                return Err(format!("node {node} is asked to drain: {told:?}"));
            }
            sleep(moment);
            let killed = [one, others[0], others[1]][random.random_range(0..3)];
            close(cluster, killed);
            cluster.machines[killed].kill();
            if killed != one {
                // It has to come back, or it would not be given lanes again.
                close(cluster, one);
                cluster.machines[one].stop()?;
            }
        }
        Fault::RollingRestart => {
            for at in [one, others[0], others[1]] {
                close(cluster, at);
                sleep(moment / 4);
                cluster.machines[at].stop()?;
                cluster.start_at(at)?;
                if random.random_bool(0.5) {
                    cluster.until_whole()?;
                }
            }
        }
        Fault::TwoLost => {
            for at in others {
                close(cluster, at);
                cluster.machines[at].lose();
            }
            await_takeover(cluster, &[one], &[64], random)?;
        }
        Fault::AllLost => {
            for at in 0..cluster.machines.len() {
                close(cluster, at);
                cluster.machines[at].lose();
            }
            checker.server_is_gone();
            sleep(moment);
        }
    }
    cluster.start_all()
}

/// The load balancer sends nobody there any more.
fn close(cluster: &Cluster<'_>, at: usize) {
    let door = cluster.machines[at].data();
    cluster.doors.open().retain(|open| *open != door);
}

/// Waits until the lanes are where nodes are left, or does not, as chance will have it.
fn await_takeover(
    cluster: &mut Cluster<'_>,
    among: &[usize],
    expected: &[usize],
    random: &mut StdRng,
) -> Result<(), String> {
    match random.random_bool(0.5) {
        true => cluster.until_dealt(among, expected),
        false => {
            sleep(Duration::from_millis(random.random_range(0..3_000)));
            Ok(())
        }
    }
}

/// The machine whose node is taking another one over, as soon as there is one.
fn survivor(cluster: &mut Cluster<'_>) -> Result<usize, String> {
    let numbers: Vec<Option<i64>> = (cluster.machines.iter())
        .map(|machine| machine.node())
        .collect();
    let deadline = Instant::now() + PATIENCE;
    let taker: i64 = block_on(async {
        let session = cluster.database.session().await;
        loop {
            let sql = "SELECT taken_by::int8 FROM millrace.node WHERE state = 'dead'";
            let row = session.query_opt(sql, &[]).await.expect("the nodes");
            match row {
                Some(row) => return Ok(row.get(0)),
                None if Instant::now() >= deadline => return Err("nobody takes it over".to_owned()),
                None => tokio::time::sleep(LOOK).await,
            }
        }
    })?;
    let at = numbers.iter().position(|number| *number == Some(taker));
    at.ok_or(format!("no machine has node {taker}: {numbers:?}"))
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
