//! The real binary under mixed load, killed again and again: at random moments, and by itself at
//! each point of `faults::CRASH_POINTS` in turn. Nothing that a client was told may turn out false.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace::faults::CRASH_POINTS;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tempfile::TempDir;

use super::checker::{Checker, Verdict};
use super::load::{Load, Settings, check};
use super::outcome::{Why, block_on, in_series};
use crate::support::postgres::{copy_template, test_dir};
use crate::support::served::{OwnPostgres, PATIENCE, Served, end_postgres};

/// How long a load may go on without passing the point that it is to crash at.
const POINT_PATIENCE: Duration = Duration::from_secs(2);

/// Cycles on one `data_dir`; the next begin with an empty one, so that the last do not only recover
/// what the first have written.
const SERIES: u64 = 20;

/// Cycles of load, kill and recovery.
pub fn run(cycles: u64) -> Result<String, Why> {
    Ok(with_bug(cycles, None)?)
}

/// The same with a deliberate defect, to show that it is found.
pub fn with_bug(cycles: u64, bug: Option<&str>) -> Result<String, String> {
    let mut points = Points::default();
    let figures = in_series("kill9", cycles, SERIES, |seed, cycles, done| {
        let mut proof = Proof::new(seed, bug, std::mem::take(&mut points));
        let outcome = proof.run(cycles, done);
        points = std::mem::take(&mut proof.points);
        outcome
    })?;
    Ok(format!("{figures} {points}"))
}

/// Points to crash at.
#[derive(Default)]
struct Points {
    /// How many were asked for, one after the other.
    next: usize,
    asked: BTreeSet<&'static str>,
    /// Those that a process has crashed at.
    hit: BTreeSet<&'static str>,
}

impl Points {
    fn next(&mut self) -> &'static str {
        let point = CRASH_POINTS[self.next % CRASH_POINTS.len()];
        self.next += 1;
        self.asked.insert(point);
        point
    }
}

impl fmt::Display for Points {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hit, asked) = (self.hit.len(), self.asked.len());
        write!(f, "points_hit={hit}/{asked} of {}", CRASH_POINTS.len())?;
        let missed: Vec<&str> = self.asked.difference(&self.hit).copied().collect();
        if missed.is_empty() {
            return Ok(());
        }
        write!(f, " never_passed={}", missed.join(","))
    }
}

struct Proof {
    random: StdRng,
    checker: Checker,
    bug: Option<String>,
    points: Points,
    data_dir: TempDir,
}

impl Proof {
    fn new(seed: u64, bug: Option<&str>, mut points: Points) -> Self {
        let data_dir = test_dir();
        block_on(copy_template(data_dir.path()));
        let mut random = StdRng::seed_from_u64(seed);
        let first = random.random_range(0..CRASH_POINTS.len());
        if points.asked.is_empty() {
            points.next = first;
        }
        Proof {
            random,
            checker: Checker::new(),
            bug: bug.map(|name| format!("bug@{name}")),
            points,
            data_dir,
        }
    }

    fn dir(&self) -> &Path {
        self.data_dir.path()
    }

    fn start(&self, settings: &Settings) -> Result<Served, String> {
        let log = self.dir().join("serve.log");
        let mut all = settings.environment();
        all.extend(
            self.bug
                .iter()
                .map(|bug| ("MILLRACE_FAULT".to_owned(), bug.clone())),
        );
        Served::try_start(self.dir(), &all, &log)
            .map_err(|ended| format!("it does not start: {}: {}", ended.status, ended.log))
    }

    fn run(&mut self, cycles: u64, done: &dyn Fn(u64)) -> Result<Verdict, String> {
        for cycle in 0..cycles {
            done(cycle);
            let verdict = self.cycle(cycle);
            let verdict = verdict.map_err(|why| format!("cycle={cycle} {why}"))?;
            if !verdict.holds() {
                return Ok(verdict);
            }
        }
        self.finish()
    }

    /// Load, a kill, a start and a comparison.
    fn cycle(&mut self, cycle: u64) -> Result<Verdict, String> {
        // A defect is put in alone.
        let point = (cycle % 2 == 1 && self.bug.is_none()).then(|| self.points.next());
        let mut settings = Settings::choose(&mut self.random);
        match point.unwrap_or_default() {
            // Passed where segments come and go, where memory is full, where much is left over.
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
        let served = self.start(&settings)?;
        let verdict = self.check(&served);
        // Its own death is one more.
        served.kill();
        self.checker.server_is_gone();
        Ok(verdict)
    }

    fn load_and_kill(
        &mut self,
        cycle: u64,
        settings: &Settings,
        flood: bool,
    ) -> Result<(), String> {
        let served = self.start(settings)?;
        let until = Duration::from_millis(self.random.random_range(20..700));
        self.load(cycle, served, flood, |_| std::thread::sleep(until));
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
            "recovery.replayed_part" => 1,
            _ => self.random.random_range(1..=30),
        };
        let mut all = settings.environment();
        all.push(("MILLRACE_FAULT".to_owned(), format!("crash@{point}:{nth}")));
        let log = self.dir().join("serve.log");
        match Served::try_start(self.dir(), &all, &log) {
            Ok(served) => {
                let mut hit = false;
                let flood = point.starts_with("journal.");
                self.load(cycle, served, flood, |served| {
                    hit = served.ended_by(Instant::now() + POINT_PATIENCE).is_some();
                });
                self.points.hit.extend(hit.then_some(point));
                Ok(())
            }
            Err(ended) if is_killed(&ended.status) => {
                self.points.hit.insert(point);
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
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| load.run(&stop));
            moment(&mut served);
            served.kill();
            stop.store(true, Ordering::Relaxed);
        });
        self.checker.server_is_gone();
    }

    fn check(&mut self, served: &Served) -> Verdict {
        let postgres = OwnPostgres::of(self.dir());
        let config = postgres.config().expect("its PostgreSQL runs");
        check(served.data, &self.checker, &config, self.random.random())
    }

    /// Everything once more: after a load that ends by itself, and after an orderly end.
    fn finish(&mut self) -> Result<Verdict, String> {
        let settings = Settings::default();
        let served = self.start(&settings)?;
        let load = Load::prepare(&served, &self.checker, u64::MAX, &mut self.random)
            .map_err(|e| format!("no SKU can be put on sale: {e}"))?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| load.run(&stop));
            std::thread::sleep(Duration::from_millis(200));
            stop.store(true, Ordering::Relaxed);
        });
        let config = OwnPostgres::of(self.dir()).config();
        let config = config.ok_or("PostgreSQL does not run")?;
        let verdict = block_on(self.checker.compare_until(&config, PATIENCE));
        if !verdict.holds() {
            return Ok(verdict);
        }
        served.terminate();
        let code = served.wait();
        if code != Some(0) {
            return Err(format!("SIGTERM ended it with {code:?}"));
        }
        self.checker.server_is_gone();
        let served = self.start(&settings)?;
        let verdict = self.check(&served);
        served.terminate();
        served.wait();
        Ok(verdict)
    }
}

impl Drop for Proof {
    fn drop(&mut self) {
        // A killed Millrace leaves it running.
        if let Some(pid) = OwnPostgres::of(self.dir()).pid() {
            end_postgres(pid);
        }
    }
}

fn is_killed(status: &std::process::ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt as _;
    status.signal() == Some(rustix::process::Signal::KILL.as_raw())
}
