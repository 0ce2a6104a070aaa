//! The real binary under mixed load, killed again and again: at random moments, and by itself at
//! each point of `faults::CRASH_POINTS` in turn. No answer to a client may turn out false.
//!
//! In three forms: `kill9` is about orders and their way into the database; `payments` is about what
//! happens to them afterwards, with a payment platform that delivers callbacks all the while, and
//! with the points of the settlement; `broker` is both, with the accepted orders on Redis, Kafka and
//! RocketMQ: it also kills the broker, cuts the network to it, and loses the machine of the process,
//! which is everything in its directory but PostgreSQL.

mod ordeal;
mod points;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace::faults::CRASH_POINTS;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

use self::ordeal::{Backend, Ordeal, Ordeals};
use self::points::Points;
use super::checker::{Checker, Findings, compare_until, read_rows};
use super::load::{Load, Settings, audit, check, compare_counters, retry_some};
use super::outcome::{Why, block_on, in_series};
use super::platform::Platform;
use crate::support::brokers::Kind;
use crate::support::postgres::connect;
use crate::support::served::{DataDir, OwnPostgres, PATIENCE, Served, tail};
use crate::support::webhook::SECRET;
use crate::support::wire::Wire;

/// How long a load may go on without passing the point that it is to crash at.
const POINT_PATIENCE: Duration = Duration::from_secs(2);

/// Cycles on one `data_dir`; the next begin with an empty one, so that the last do not only recover
/// what the first have written.
const SERIES: u64 = 20;

/// How long buyers have to pay; some are late.
const PAYMENT_TTL_MS: u64 = 2_000;
/// How long the last expiries may take after that.
const SETTLING: Duration = Duration::from_secs(20);
/// Orders that a database loses at once.
const LOST_MAX: usize = 5;
const RECEIPT_KEY: &str = "a-key-that-outlives-machines";

/// Which of the three it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Orders alone.
    Orders,
    /// Orders, payments, expiry, recovery from receipts.
    Payments,
    /// The same, with the orders accepted by a broker.
    Broker(Kind),
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Form::Orders => "kill9",
            Form::Payments => "payments",
            Form::Broker(Kind::Redis) => "broker redis",
            Form::Broker(Kind::Kafka) => "broker kafka",
            Form::Broker(Kind::RocketMq) => "broker rocketmq",
        }
    }

    /// The points that it crashes at.
    fn points(self) -> Vec<&'static str> {
        let is_ours = |point: &&str| match self {
            Form::Orders => !["log.", "settlement.", "waitlist."]
                .iter()
                .any(|others| point.starts_with(others)),
            Form::Payments => point.starts_with("settlement.") || point.starts_with("waitlist."),
            // Most of the journal's are about its files.
            Form::Broker(_) => {
                !point.starts_with("journal.") && !point.starts_with("waitlist.")
                    || ["journal.acknowledged", "journal.read_back"].contains(point)
            }
        };
        // A draw has a test of its own, tests/service/draws.rs.
        let points = CRASH_POINTS
            .into_iter()
            .filter(|point| !point.starts_with("draw."));
        points.filter(is_ours).collect()
    }
}

/// Cycles of load, kill and recovery.
pub fn run(cycles: u64) -> Result<String, Why> {
    Ok(with_bug(Form::Orders, cycles, None)?)
}

/// The same with payments.
pub fn run_with_payments(cycles: u64) -> Result<String, Why> {
    Ok(with_bug(Form::Payments, cycles, None)?)
}

/// The same on each broker, so many cycles each. `MILLRACE_BROKER` chooses one.
pub fn run_with_brokers(cycles: u64) -> Result<String, Why> {
    let chosen = std::env::var("MILLRACE_BROKER").ok();
    let kinds = [
        (Kind::Redis, "redis"),
        (Kind::Kafka, "kafka"),
        (Kind::RocketMq, "rocketmq"),
    ];
    let mut said = Vec::new();
    for (kind, name) in kinds {
        if chosen.as_ref().is_some_and(|chosen| chosen != name) {
            continue;
        }
        let figures = match Wire::finds_broker(kind) {
            true => with_bug(Form::Broker(kind), cycles, None)?,
            false => "not run".to_owned(),
        };
        said.push(format!("{name}: {figures}"));
    }
    if said.iter().all(|figures| figures.ends_with("not run")) {
        return Err(Why::NotRun("no broker could be had".to_owned()));
    }
    Ok(said.join("; "))
}

/// The same with a deliberate defect, to show that it is found.
pub fn with_bug(form: Form, cycles: u64, bug: Option<&str>) -> Result<String, String> {
    let mut tried = Tried {
        points: Points::new(form.points()),
        ordeals: Ordeals::default(),
    };
    let figures = in_series(form.name(), cycles, SERIES, |seed, cycles, done| {
        Proof::new(form, seed, bug, &mut tried).run(cycles, done)
    })?;
    let Tried { points, ordeals } = tried;
    Ok(match form {
        Form::Orders | Form::Payments => format!("{figures} {points}"),
        Form::Broker(_) => format!("{figures} {points} {ordeals}"),
    })
}

/// What the processes of all series were put to.
struct Tried {
    points: Points,
    ordeals: Ordeals,
}

struct Proof<'a> {
    random: StdRng,
    checker: Checker,
    platform: Option<Platform>,
    bug: Option<String>,
    tried: &'a mut Tried,
    /// How often an order is looked for before it is recovered.
    checks: u32,
    /// Whether a broker forgets at once what is settled, not after ten minutes.
    forgets_at_once: bool,
    data_dir: DataDir,
    backend: Option<Backend>,
}

impl<'a> Proof<'a> {
    fn new(form: Form, seed: u64, bug: Option<&str>, tried: &'a mut Tried) -> Self {
        let data_dir = block_on(DataDir::fresh());
        let mut random = StdRng::seed_from_u64(seed);
        let first = random.random_range(0..tried.points.all.len());
        tried.points.begin(first);
        Proof {
            random,
            checker: Checker::new(),
            platform: (form != Form::Orders).then(|| Platform::new(seed)),
            bug: bug.map(|name| format!("bug@{name}")),
            tried,
            checks: 1,
            forgets_at_once: false,
            data_dir,
            backend: match form {
                Form::Broker(kind) => Some(Backend::start(kind)),
                Form::Orders | Form::Payments => None,
            },
        }
    }

    fn dir(&self) -> &Path {
        self.data_dir.path()
    }

    fn start(&self, settings: &Settings) -> Result<Served, String> {
        let mut all = self.environment(settings);
        all.extend(
            self.bug
                .iter()
                .map(|bug| ("MILLRACE_FAULT".to_owned(), bug.clone())),
        );
        Served::try_start(self.dir(), &all, &self.log())
            .map_err(|ended| format!("it does not start: {}: {}", ended.status, ended.log))
    }

    fn log(&self) -> PathBuf {
        self.dir().join("serve.log")
    }

    fn environment(&self, settings: &Settings) -> Vec<(String, String)> {
        let mut all = settings.environment();
        if let Some(backend) = &self.backend {
            all.extend_from_slice(backend.env());
            // A key that Millrace makes by itself would be lost with its machine.
            all.push(("MILLRACE_RECEIPT__KEY".to_owned(), RECEIPT_KEY.to_owned()));
            if self.forgets_at_once {
                all.push(("MILLRACE_QUEUE__RETAIN_MS".to_owned(), "0".to_owned()));
            }
        }
        if self.platform.is_some() {
            let more = [
                ("ORDERS__PAYMENT_TTL_MS", PAYMENT_TTL_MS.to_string()),
                ("PAYMENTS__STANDARD__SECRET", SECRET.to_owned()),
                ("PAYMENTS__ORPHAN_CHECK_MS", "100".to_owned()),
                ("PAYMENTS__ORPHAN_CHECKS", self.checks.to_string()),
            ];
            all.extend(more.map(|(name, value)| (format!("MILLRACE_{name}"), value)));
        }
        all
    }

    fn run(&mut self, cycles: u64, done: &dyn Fn(u64)) -> Result<Findings, String> {
        for cycle in 0..cycles {
            done(cycle);
            let findings = self.cycle(cycle);
            let findings = findings.map_err(|why| format!("cycle={cycle} {why}"))?;
            if !findings.holds() {
                return Ok(findings);
            }
        }
        self.finish()
    }

    /// Load, a kill, a start and a comparison.
    fn cycle(&mut self, cycle: u64) -> Result<Findings, String> {
        // A defect is put in alone.
        let point = (cycle % 2 == 1 && self.bug.is_none()).then(|| self.tried.points.next());
        let mut settings = Settings::choose(&mut self.random);
        self.checks = self.random.random_range(1..=3);
        self.forgets_at_once = self.random.random_bool(0.5);
        match point.unwrap_or_default() {
            // Points that are passed only if segments come and go, memory is full, or much is left over.
            "journal.segment_created"
            | "journal.segment_renamed"
            | "journal.before_retire"
            | "journal.after_retire" => settings.journal_bytes = Some(1 << 20),
            "journal.read_back" => settings.capacity = Some(8),
            "recovery.replayed_part" | "recovery.replayed" => settings.batch_rows = Some(1),
            _ => {}
        }
        settings.for_this_build();
        match point {
            Some(point) if point.starts_with("recovery.") => {
                // Something has to be left over to recover.
                self.load_and_kill(cycle, &settings, true)?;
                self.crash_at(cycle, point, &settings)?;
            }
            Some(point) => self.crash_at(cycle, point, &settings)?,
            None => {
                let flood = self.random.random_bool(0.4);
                if flood {
                    // Segments that fill up while workers cannot follow.
                    settings.journal_bytes = Some(1 << 20);
                    settings.batch_rows = Some(self.random.random_range(1..=8));
                    settings.for_this_build();
                }
                self.load_and_kill(cycle, &settings, flood)?;
            }
        }
        self.lose_some()?;
        let served = self.start(&settings)?;
        let all = self.random.random_bool(0.3);
        let findings = self.check(&served, all)?;
        // Its own death is one more.
        served.kill();
        self.checker.server_is_gone();
        self.lose_some()?;
        Ok(findings)
    }

    /// The database loses a few unpaid rows, as a failover to a standby that lagged
    /// would; their buyers pay all the same.
    fn lose_some(&mut self) -> Result<(), String> {
        let Some(platform) = &self.platform else {
            return Ok(());
        };
        let config = OwnPostgres::of(self.dir()).config();
        let config = config.ok_or("PostgreSQL does not run")?;
        let mut unpaid = block_on(async { platform.unpaid_among(&read_rows(&config).await) });
        unpaid.shuffle(&mut self.random);
        unpaid.truncate(LOST_MAX);
        let lost = block_on(lose(&config, &unpaid)).map_err(|error| format!("to lose: {error}"))?;
        platform.loses(&lost);
        Ok(())
    }

    fn load_and_kill(
        &mut self,
        cycle: u64,
        settings: &Settings,
        flood: bool,
    ) -> Result<(), String> {
        let served = self.start(settings)?;
        let until = Duration::from_millis(self.random.random_range(20..700));
        let mut backend = self.backend.take();
        let ordeal = Ordeal::choose(&mut self.random, backend.is_some());
        let mut random = StdRng::seed_from_u64(self.random.random());
        let mut came_about = false;
        self.load(cycle, served, flood, |_| {
            std::thread::sleep(until);
            let backend = backend.as_mut();
            came_about = backend.is_none_or(|it| it.suffer(ordeal, until, &mut random));
        });
        if came_about {
            self.tried.ordeals.count(ordeal);
        }
        if let Some(backend) = &mut backend {
            backend.recover();
        }
        self.backend = backend;
        if ordeal == Ordeal::Machine {
            self.lose_machine()?;
        }
        Ok(())
    }

    /// The machine of the process is lost, with everything that it kept on its disk. PostgreSQL is elsewhere.
    fn lose_machine(&self) -> Result<(), String> {
        let lost = |error: std::io::Error| format!("to lose the machine: {error}");
        for entry in std::fs::read_dir(self.dir()).map_err(lost)? {
            let path = entry.map_err(lost)?.path();
            if path.ends_with("postgres") {
                continue;
            }
            match path.is_dir() {
                true => std::fs::remove_dir_all(&path).map_err(lost)?,
                false => std::fs::remove_file(&path).map_err(lost)?,
            }
        }
        Ok(())
    }

    fn crash_at(
        &mut self,
        cycle: u64,
        point: &'static str,
        settings: &Settings,
    ) -> Result<(), String> {
        let nth = match point {
            // Passed once in a while, or once in a life.
            "journal.segment_created" | "journal.segment_renamed" | "recovery.replayed" => 1,
            "journal.before_retire" | "journal.after_retire" => self.random.random_range(1..=2),
            "recovery.replayed_part" | "log.marked" => 1,
            "waitlist.selected" | "waitlist.assigned" => self.random.random_range(1..=3),
            _ => self.random.random_range(1..=30),
        };
        let mut all = self.environment(settings);
        all.push(("MILLRACE_FAULT".to_owned(), format!("crash@{point}:{nth}")));
        match Served::try_start(self.dir(), &all, &self.log()) {
            Ok(served) => {
                let mut hit = false;
                let flood = point.starts_with("journal.");
                self.load(cycle, served, flood, |served| {
                    hit = served.ended_by(Instant::now() + POINT_PATIENCE).is_some();
                });
                if hit {
                    self.tried.points.hit(point);
                }
                Ok(())
            }
            Err(ended) if ended.is_killed() => {
                self.tried.points.hit(point);
                Ok(())
            }
            Err(ended) => Err(format!(
                "it does not start: {}: {}",
                ended.status, ended.log
            )),
        }
    }

    /// Puts load on it until `moment` is over, and kills it, if it has not ended by then. A flood
    /// is meant for the journal.
    fn load(
        &mut self,
        cycle: u64,
        mut served: Served,
        flood: bool,
        moment: impl FnOnce(&mut Served),
    ) {
        // It may crash before everything is on sale.
        let Ok(mut load) = Load::prepare(&served, &self.checker, cycle, &mut self.random) else {
            served.kill();
            self.checker.server_is_gone();
            return;
        };
        if flood {
            (load.threads, load.respond_async, load.batch_max) = (8, 90, 60);
        }
        load.platform = self.platform.as_ref();
        load.waits = true;
        let (stop, doors) = (AtomicBool::new(false), served.data.into());
        std::thread::scope(|scope| {
            scope.spawn(|| load.run(&stop));
            if let Some(platform) = load.platform {
                scope.spawn(|| platform.run(&doors, &stop));
            }
            moment(&mut served);
            served.kill();
            stop.store(true, Ordering::Relaxed);
        });
        self.checker.server_is_gone();
    }

    /// Compares what a process that has just recovered knows. `all`: every order is to be paid or
    /// over first, where there are payments.
    fn check(&mut self, served: &Served, all: bool) -> Result<Findings, String> {
        let postgres = OwnPostgres::of(self.dir());
        let config = postgres.config().ok_or("PostgreSQL does not run")?;
        let seed = self.random.random();
        let Some(platform) = &self.platform else {
            return Ok(check(served.data, &self.checker, &config, seed));
        };
        platform.deliver_all(&served.data.into(), all)?;
        let mut said = Findings::default();
        self.until_settled(|| {
            let found = block_on(read_rows(&config));
            found.payments.iter().all(|one| one.state != "orphan")
        });
        retry_some(served.data, &self.checker, 30, seed, &mut said);
        let mut findings = Findings::default();
        self.until_settled(|| {
            let found = block_on(read_rows(&config));
            findings = self.checker.check(&found);
            compare_counters(served.data, &found, &mut findings);
            let is_cancel_asked = |user: &str| self.checker.is_cancel_asked(user);
            platform.check(&found, is_cancel_asked, all, &mut findings);
            findings.faults.extend(said.faults.clone());
            audit(served.control, &mut findings);
            findings.holds()
        });
        Ok(findings)
    }

    /// Looks until `condition` holds, or for as long as it may take: what is due expires, and
    /// what waits is decided, in the background.
    fn until_settled(&self, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + SETTLING;
        while !condition() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Everything once more: after a load that ends by itself, and after an orderly end.
    fn finish(&mut self) -> Result<Findings, String> {
        let settings = Settings::default();
        let served = self.start(&settings)?;
        let mut load = Load::prepare(&served, &self.checker, u64::MAX, &mut self.random)
            .map_err(|e| format!("no SKU can be put on sale: {e}"))?;
        load.platform = self.platform.as_ref();
        load.waits = true;
        let (stop, doors) = (AtomicBool::new(false), served.data.into());
        std::thread::scope(|scope| {
            scope.spawn(|| load.run(&stop));
            if let Some(platform) = load.platform {
                scope.spawn(|| platform.run(&doors, &stop));
            }
            std::thread::sleep(Duration::from_millis(200));
            stop.store(true, Ordering::Relaxed);
        });
        let config = OwnPostgres::of(self.dir()).config();
        let config = config.ok_or("PostgreSQL does not run")?;
        let findings = match &self.platform {
            Some(_) => self.check(&served, true)?,
            None => block_on(compare_until(&self.checker, &config, PATIENCE)),
        };
        if !findings.holds() {
            return Ok(findings);
        }
        if let Some(platform) = &self.platform {
            platform.refunds_some(served.control, &block_on(read_rows(&config)))?;
        }
        served.terminate();
        let code = served.wait();
        if code != Some(0) {
            let log = tail(&self.log());
            return Err(format!("SIGTERM ended it with {code:?}: {log}"));
        }
        self.checker.server_is_gone();
        let served = self.start(&settings)?;
        let findings = self.check(&served, true)?;
        served.terminate();
        served.wait();
        Ok(findings)
    }
}

/// Takes the rows away that are still to be paid; returns which they were.
async fn lose(
    config: &tokio_postgres::Config,
    orders: &[i64],
) -> Result<Vec<i64>, tokio_postgres::Error> {
    let mut client = connect(config).await;
    let transaction = client.transaction().await?;
    transaction
        .batch_execute("SET search_path = millrace")
        .await?;
    let rows = transaction
        .query(
            "DELETE FROM orders WHERE order_id = ANY ($1) AND status = 1
             RETURNING order_id, sku, quantity::int8",
            &[&orders],
        )
        .await?;
    for row in &rows {
        let (id, sku, units): (i64, i32, i64) = (row.get(0), row.get(1), row.get(2));
        transaction
            .execute(
                "WITH moved AS (UPDATE sku SET held = held - $2 WHERE id = $1 RETURNING *)
                 INSERT INTO stock_log (sku, cause, reference, held_delta, total_after, held_after, sold_after)
                 SELECT id, 'lost', $3, -$2, total, held, sold FROM moved",
                &[&sku, &units, &id.to_string()],
            )
            .await?;
    }
    transaction.commit().await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
