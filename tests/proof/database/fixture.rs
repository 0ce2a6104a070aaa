//! The fixture of every case: Millrace as a process, a switch in front of its PostgreSQL, load, and the
//! comparison at the end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{STEP, Terms};
use crate::checker::{Checker, Findings, StoredRows, read_rows};
use crate::load::{Load, audit, compare_counters, has_journal, put_skus, retry_some};
use crate::outcome::Why;
use crate::platform::Platform;
use crate::support::postgres::test_dir;
use crate::support::proxy::Proxy;
use crate::support::served::{Ended, Served, tail};
use crate::support::standby::{DATABASE, Pair, Server, USER};
use crate::support::webhook::SECRET;

pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long Millrace may take to find the outcome of anything but an order.
const SETTLING: Duration = Duration::from_secs(6);
const LOOK: Duration = Duration::from_millis(5);

/// A kind of client, with its answers and the SKUs that it buys.
pub struct Crowd {
    pub checker: Checker,
    pub skus: Vec<String>,
    /// In hundredths, how many of its orders ask for `respond-async`.
    pub respond_async: u32,
    /// Whether some of its orders are cancelled again.
    pub cancels: bool,
    /// Its payment platform, if it pays.
    pub platform: Option<Platform>,
}

impl Crowd {
    /// One that buys a SKU which sells out and one which does not.
    pub fn new(name: &str, respond_async: u32, cancels: bool) -> Self {
        Crowd {
            checker: Checker::new(),
            skus: vec![format!("HOT-{name}"), format!("PLAIN-{name}")],
            respond_async,
            cancels,
            platform: None,
        }
    }

    /// The rows of its own SKUs.
    pub fn own(&self, found: &StoredRows) -> StoredRows {
        let mut own = found.clone();
        own.orders.retain(|row| self.skus.contains(&row.sku));
        own.skus.retain(|sku, _| self.skus.contains(sku));
        own
    }
}

/// A running Millrace whose database is at the mercy of a case.
pub struct Fixture {
    pub served: Served,
    pub proxy: Proxy,
    pub runtime: Runtime,
    pub crowds: Vec<Crowd>,
    pub random: StdRng,
    seed: u64,
    settings: Vec<(String, String)>,
    data_dir: TempDir,
}

/// A runtime for the proxy and for whatever asks the database.
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Where a server's socket is.
pub fn socket(server: &Server) -> PathBuf {
    server.place.join(".s.PGSQL.5432")
}

impl Fixture {
    /// One with buyers of both kinds in one crowd.
    pub fn start(runtime: Runtime, server: &Server, terms: Terms<'_>) -> Result<Self, Why> {
        Self::start_with(runtime, server, terms, &[])
    }

    /// The same with more settings.
    pub fn start_with(
        runtime: Runtime,
        server: &Server,
        terms: Terms<'_>,
        settings: &[(&str, &str)],
    ) -> Result<Self, Why> {
        Self::with(
            runtime,
            server,
            terms,
            vec![Crowd::new("ALL", 50, true)],
            settings,
        )
    }

    /// One whose buyers pay, and have little time for it.
    pub fn start_paying(runtime: Runtime, server: &Server, terms: Terms<'_>) -> Result<Self, Why> {
        let mut crowd = Crowd::new("PAY", 50, false);
        crowd.platform = Some(Platform::new(terms.seed));
        let settings = [
            ("ORDERS__PAYMENT_TTL_MS", "3000"),
            ("PAYMENTS__STANDARD__SECRET", SECRET),
            ("PAYMENTS__ORPHAN_CHECK_MS", "100"),
            ("PAYMENTS__ORPHAN_CHECKS", "2"),
        ];
        Self::with(runtime, server, terms, vec![crowd], &settings)
    }

    /// One with two crowds, first the clients that wait and then those that do not, so that each can be
    /// checked by itself.
    pub fn start_apart(
        runtime: Runtime,
        pair: &Pair,
        terms: Terms<'_>,
        cancels: bool,
        settings: &[(&str, &str)],
    ) -> Result<Self, Why> {
        let crowds = vec![
            Crowd::new("WAIT", 0, cancels),
            Crowd::new("ASYNC", 100, cancels),
        ];
        Self::with(runtime, &pair.primary, terms, crowds, settings)
    }

    /// One with these crowds.
    pub fn with(
        runtime: Runtime,
        server: &Server,
        terms: Terms<'_>,
        crowds: Vec<Crowd>,
        more: &[(&str, &str)],
    ) -> Result<Self, Why> {
        let proxy = runtime.block_on(Proxy::start_at(&socket(server)));
        let data_dir = test_dir();
        let mut settings: Vec<(String, String)> = [
            ("DATABASE__URL", proxy.url(USER, DATABASE)),
            ("DATABASE__STEP_TIMEOUT_MS", STEP.as_millis().to_string()),
            ("ORDERS__TIMEOUT_MS", "1000".to_owned()),
            ("WORKERS__COUNT", "3".to_owned()),
            ("WORKERS__BATCH_ROWS_MAX", "50".to_owned()),
        ]
        .map(|(name, value)| (format!("MILLRACE_{name}"), value))
        .to_vec();
        if has_journal() {
            // Small segments, so that they come and go.
            let bytes = (4 << 20).to_string();
            settings.push(("MILLRACE_QUEUE__JOURNAL__BYTES_MAX".to_owned(), bytes));
        }
        for (name, value) in more {
            // The last one counts.
            settings.push((format!("MILLRACE_{name}"), (*value).to_owned()));
        }
        if let Some(bug) = terms.bug {
            settings.push(("MILLRACE_FAULT".to_owned(), format!("bug@{bug}")));
        }
        let log = data_dir.path().join("serve.log");
        let served = start(data_dir.path(), &settings, &log)
            .map_err(|ended| format!("it does not start: {}: {}", ended.status, ended.log))?;
        let fixture = Fixture {
            served,
            proxy,
            runtime,
            crowds,
            random: StdRng::seed_from_u64(terms.seed),
            seed: terms.seed,
            settings,
            data_dir,
        };
        for crowd in &fixture.crowds {
            let offers: Vec<(String, u32)> = crowd
                .skus
                .iter()
                .cloned()
                .zip([300, 1_000_000, 1_000_000])
                .collect();
            put_skus(fixture.served.control, &crowd.checker, &offers)
                .map_err(|error| format!("cannot put SKUs on sale: {error}"))?;
        }
        Ok(fixture)
    }

    /// Has the crowds buy while `mistreat` is at work, and until they have bought again
    /// afterwards.
    pub fn under_load(
        &mut self,
        mistreat: impl FnOnce(&Fixture, &mut StdRng) -> Result<(), Why>,
    ) -> Result<(), Why> {
        self.load_while(|fixture, random| {
            mistreat(fixture, random)?;
            fixture.until_written(200)
        })
    }

    /// Has the crowds buy while `mistreat` is at work.
    pub fn load_while(
        &mut self,
        mistreat: impl FnOnce(&Fixture, &mut StdRng) -> Result<(), Why>,
    ) -> Result<(), Why> {
        let mut random = StdRng::seed_from_u64(self.random.random());
        let seeds: Vec<u64> = self.crowds.iter().map(|_| self.random.random()).collect();
        let (fixture, stop) = (&*self, AtomicBool::new(false));
        std::thread::scope(|scope| {
            for (crowd, seed) in fixture.crowds.iter().zip(seeds) {
                let load = Load {
                    doors: Arc::new(fixture.served.data.into()),
                    checker: &crowd.checker,
                    skus: crowd.skus.clone(),
                    seed,
                    threads: 10,
                    respond_async: crowd.respond_async,
                    batch_max: 20,
                    cancels: crowd.cancels,
                    waits: false,
                    platform: crowd.platform.as_ref(),
                };
                let stop = &stop;
                scope.spawn(move || load.run(stop));
                if let Some(platform) = &crowd.platform {
                    scope.spawn(move || platform.run(&fixture.served.data.into(), stop));
                }
            }
            // The threads end also where this panics.
            let _stop = StopAtEnd(&stop);
            fixture.until_written(100)?;
            mistreat(fixture, &mut random)
        })
    }

    /// Waits until this many more rows were committed.
    pub fn until_written(&self, rows: u64) -> Result<(), Why> {
        let target = self.metric("millrace_rows_written_total")? + rows as f64;
        self.until(&format!("{rows} more rows"), || {
            Ok(self.metric("millrace_rows_written_total")? >= target)
        })
    }

    /// Waits until `condition` holds.
    pub fn until(&self, what: &str, condition: impl Fn() -> Result<bool, Why>) -> Result<(), Why> {
        let deadline = Instant::now() + PATIENCE;
        while !condition()? {
            if Instant::now() >= deadline {
                let log = self.log();
                return Err(Why::Failed(format!("not in time: {what}: {log}")));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The sum of a metric over its labels.
    pub fn metric(&self, name: &str) -> Result<f64, Why> {
        let value = self.served.metric(name);
        Ok(value.map_err(|error| format!("no metrics: {error}: {}", self.log()))?)
    }

    /// The last lines of Millrace's log.
    pub fn log(&self) -> String {
        tail(&self.data_dir.path().join("serve.log"))
    }

    /// Waits until nothing is on its way any more.
    pub fn until_quiet(&self) -> Result<(), Why> {
        self.until("an empty queue", || {
            Ok(self.metric("millrace_orders_in_flight")? == 0.0
                && self.metric("millrace_queue_depth")? == 0.0)
        })
    }

    /// Fails if the case has hit no batch, for then it shows nothing.
    pub fn has_bitten(&self) -> Result<(), Why> {
        match self.metric("millrace_batch_retries_total")? {
            0.0 => Err(Why::Failed("no batch had to be tried again".into())),
            _ => Ok(()),
        }
    }

    /// Compares, stops Millrace in good order, and compares once more. `server` is who takes
    /// writes now.
    pub fn finish(self, server: &Server) -> Result<Findings, Why> {
        self.until_quiet()?;
        self.has_bitten()?;
        for platform in self.platforms() {
            platform.deliver_all(&self.served.data.into(), true)?;
        }
        let mut said = Findings::default();
        for crowd in &self.crowds {
            retry_some(self.served.data, &crowd.checker, 30, self.seed, &mut said);
        }
        self.compare(server, said, Fixture::check)?;
        self.finish_orderly(server, Fixture::check)
    }

    /// Compares what clients were told, what is in the database, and what Millrace has in memory,
    /// as often as it takes: what came of a cancellation whose answer was lost is found out in the
    /// background.
    pub fn compare(
        &self,
        server: &Server,
        said: Findings,
        judge: impl Fn(&Fixture, &StoredRows) -> Findings,
    ) -> Result<(), Why> {
        // Unpaid orders have to expire first.
        let pays = self.platforms().next().is_some();
        let deadline = Instant::now() + if pays { PATIENCE } else { SETTLING };
        loop {
            self.until_quiet()?;
            let found = self.read(server);
            let mut findings = judge(self, &found);
            compare_counters(self.served.data, &found, &mut findings);
            findings.faults.extend(said.faults.clone());
            audit(self.served.control, &mut findings);
            if findings.holds() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let dead = self.dead_letters(server);
                return Err(Why::Failed(format!("{}{dead}", findings.into_words())));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Stops Millrace in good order and checks the rows after that.
    pub fn finish_orderly(
        mut self,
        server: &Server,
        judge: impl FnOnce(&Fixture, &StoredRows) -> Findings,
    ) -> Result<Findings, Why> {
        self.served.terminate();
        let ended = self.served.ended_by(Instant::now() + PATIENCE);
        if ended.and_then(|status| status.code()) != Some(0) {
            let log = self.log();
            return Err(Why::Failed(format!(
                "SIGTERM ended it with {ended:?}: {log}"
            )));
        }
        let findings = judge(&self, &self.read(server));
        match findings.holds() {
            true => Ok(findings),
            false => Err(Why::Failed(format!(
                "{} (after an orderly end)",
                findings.into_words()
            ))),
        }
    }

    /// Why orders were refused by the database, in words for a failure.
    fn dead_letters(&self, server: &Server) -> String {
        let reasons =
            "SELECT count(*), sqlstate, min(reason) FROM millrace.dead_letters GROUP BY 2";
        self.runtime.block_on(async {
            let rows = server.session().await.query(reasons, &[]).await;
            let words = |row: &tokio_postgres::Row| {
                let (count, sqlstate, reason): (i64, &str, &str) =
                    (row.get(0), row.get(1), row.get(2));
                format!("; {count} dead letters: {sqlstate} {reason}")
            };
            rows.iter().flatten().map(words).collect()
        })
    }

    /// The rows of the database now.
    pub fn read(&self, server: &Server) -> StoredRows {
        self.runtime.block_on(read_rows(&server.config(DATABASE)))
    }

    /// Checks every crowd's part, and adds the findings up.
    pub fn check(&self, found: &StoredRows) -> Findings {
        let mut all = Findings::default();
        // No case makes a row that a database could object to.
        let mut failed = found.orders.iter().filter(|row| row.status == "failed");
        if let Some(row) = failed.next() {
            all.fault(format!("a dead letter: {row:?}"));
        }
        for crowd in &self.crowds {
            let own = crowd.own(found);
            all.add(&crowd.checker.check(&own));
            if let Some(platform) = &crowd.platform {
                let is_cancel_asked = |user: &str| crowd.checker.is_cancel_asked(user);
                platform.check(&own, is_cancel_asked, true, &mut all);
            }
        }
        all
    }

    fn platforms(&self) -> impl Iterator<Item = &Platform> {
        self.crowds
            .iter()
            .filter_map(|crowd| crowd.platform.as_ref())
    }

    /// Ends Millrace with SIGKILL and starts it again.
    pub fn start_again(&mut self) -> Result<(), Why> {
        let _ = self.served.child.kill();
        let _ = self.served.child.wait();
        for crowd in &self.crowds {
            crowd.checker.server_is_gone();
        }
        let log = self.data_dir.path().join("serve.log");
        self.served = start(self.data_dir.path(), &self.settings, &log)
            .map_err(|ended| format!("it does not start again: {}: {}", ended.status, ended.log))?;
        Ok(())
    }
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn is_too_slow(ended: &Ended) -> bool {
    let sentences = [
        "no answer from the database",
        "no connection to the database became free",
    ];
    sentences
        .iter()
        .any(|sentence| ended.log.contains(sentence))
}

/// Starts it as whoever keeps a service running does: again, where the database was too slow to
/// answer, which the short steps of these cases bring about on a busy machine.
fn start(data_dir: &Path, settings: &[(String, String)], log: &Path) -> Result<Served, Ended> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Served::try_start(data_dir, settings, log) {
            Err(ended) if is_too_slow(&ended) && Instant::now() < deadline => {}
            started => return started,
        }
    }
}
