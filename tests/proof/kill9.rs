//! The real binary under mixed load, killed again and again: at random moments, and by itself at
//! each point of `faults::CRASH_POINTS` in turn. Nothing that a client was told may turn out false.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace::faults::CRASH_POINTS;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tempfile::TempDir;

use super::checker::{Checker, Verdict};
use super::load::{Load, check, put_skus};
use super::outcome::{Why, block_on, progress, seed};
use crate::support::postgres::{copy_template, test_dir};
use crate::support::served::{OwnPostgres, Served};

/// How long a load may go on without passing the point that it is to crash at.
const POINT_PATIENCE: Duration = Duration::from_secs(3);

/// Cycles of load, kill and recovery.
pub fn run(cycles: u64) -> Result<String, Why> {
    Ok(with_bug(cycles, None)?)
}

/// The same with a deliberate defect, to show that it is found.
pub fn with_bug(cycles: u64, bug: Option<&str>) -> Result<String, String> {
    let mut proof = Proof::new(seed(), bug);
    let started = Instant::now();
    let seed = proof.seed;
    for cycle in 0..cycles {
        progress("kill9", cycle, cycles, started.elapsed());
        proof
            .cycle(cycle)
            .map_err(|why| format!("cycle={cycle} seed={seed} {why}"))?;
    }
    let figures = proof
        .finish()
        .map_err(|why| format!("cycles={cycles} seed={seed} {why}"))?;
    Ok(format!(
        "cycles={cycles} {figures} {} seed={seed} seconds={}",
        proof.points(),
        started.elapsed().as_secs()
    ))
}

struct Proof {
    seed: u64,
    random: StdRng,
    checker: Checker,
    bug: Option<String>,
    /// The points that were asked for, and those that a process has crashed at.
    asked: Vec<&'static str>,
    hit: Vec<&'static str>,
    /// Ends the server before the directory under it goes.
    postgres: OwnPostgres,
    data_dir: TempDir,
}

impl Proof {
    fn new(seed: u64, bug: Option<&str>) -> Self {
        let data_dir = test_dir();
        block_on(copy_template(data_dir.path()));
        Proof {
            seed,
            random: StdRng::seed_from_u64(seed),
            checker: Checker::new(),
            bug: bug.map(|name| format!("bug@{name}")),
            asked: Vec::new(),
            hit: Vec::new(),
            postgres: OwnPostgres::of(data_dir.path()),
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

    /// Load, a kill, a start and a comparison.
    fn cycle(&mut self, cycle: u64) -> Result<(), String> {
        let settings = Settings::choose(&mut self.random);
        let point = (cycle % 2 == 1)
            .then(|| CRASH_POINTS[(cycle / 2 + self.seed) as usize % CRASH_POINTS.len()]);
        self.asked.extend(point);
        match point {
            // A defect is put in alone.
            Some(point) if self.bug.is_none() && point.starts_with("recovery.") => {
                // Something has to be left over to recover.
                self.load_and_kill(cycle, &settings)?;
                self.crash_at(cycle, point, &settings)?;
            }
            Some(point) if self.bug.is_none() => self.crash_at(cycle, point, &settings)?,
            Some(_) | None => self.load_and_kill(cycle, &settings)?,
        }
        let served = self.start(&settings)?;
        let verdict = self.check(&served);
        // Its own death is one more.
        served.kill();
        self.checker.server_is_gone();
        verdict.into_result().map(|_| ())
    }

    fn load_and_kill(&mut self, cycle: u64, settings: &Settings) -> Result<(), String> {
        let served = self.start(settings)?;
        let until = Duration::from_millis(self.random.random_range(20..700));
        self.load(cycle, served, |_| std::thread::sleep(until));
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
                self.load(cycle, served, |served| {
                    hit = served.ended_by(Instant::now() + POINT_PATIENCE).is_some();
                });
                self.hit.extend(hit.then_some(point));
                Ok(())
            }
            Err(ended) if is_killed(&ended.status) => {
                self.hit.push(point);
                Ok(())
            }
            Err(ended) => Err(format!(
                "it does not start: {}: {}",
                ended.status, ended.log
            )),
        }
    }

    /// Puts load on it until `moment` is over, and kills it, if it has not ended by then.
    fn load(&mut self, cycle: u64, mut served: Served, moment: impl FnOnce(&mut Served)) {
        let (hot, plain) = (format!("HOT-{cycle}"), format!("A-{cycle}"));
        let units = self.random.random_range(20..200);
        let offers = [
            (hot.clone(), units),
            (plain.clone(), 2_000),
            ("B".to_owned(), 1_000_000),
            ("C".to_owned(), 50_000_000),
        ];
        // It may crash before they are all on sale.
        if put_skus(served.control, &self.checker, &offers).is_err() {
            served.kill();
            self.checker.server_is_gone();
            return;
        }
        let skus = [hot, plain, "B".to_owned(), "C".to_owned(), "C".to_owned()];
        let stop = AtomicBool::new(false);
        let load = Load {
            data: served.data,
            checker: &self.checker,
            skus: &skus,
            seed: self.random.random(),
            threads: self.random.random_range(2..=8),
            respond_async: self.random.random_range(10..=90),
            batch_max: self.random.random_range(3..=60),
        };
        std::thread::scope(|scope| {
            scope.spawn(|| load.run(&stop));
            moment(&mut served);
            served.kill();
            stop.store(true, Ordering::Relaxed);
        });
        self.checker.server_is_gone();
    }

    fn check(&self, served: &Served) -> Verdict {
        let config = self.postgres.config().expect("its PostgreSQL runs");
        check(served.data, &self.checker, &config, self.seed)
    }

    /// Everything once more, after an orderly end.
    fn finish(&mut self) -> Result<String, String> {
        let settings = Settings::default();
        let served = self.start(&settings)?;
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
        verdict.into_result()
    }

    fn points(&self) -> String {
        let count = |points: &[&'static str]| {
            let mut points = points.to_vec();
            points.sort_unstable();
            points.dedup();
            points
        };
        let (asked, hit) = (count(&self.asked), count(&self.hit));
        let missed: Vec<&str> = asked
            .iter()
            .filter(|point| !hit.contains(point))
            .copied()
            .collect();
        let mut text = format!(
            "points_hit={}/{} of {}",
            hit.len(),
            asked.len(),
            CRASH_POINTS.len()
        );
        if !missed.is_empty() {
            text.push_str(&format!(" never_passed={}", missed.join(",")));
        }
        text
    }
}

/// How a server is set up for one cycle.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `queue.capacity`: small, so that accepted orders have to wait on disk.
    capacity: Option<u32>,
    /// `queue.journal.bytes_max`: small, so that segments come and go.
    journal_bytes: Option<u64>,
    /// `workers.batch_rows_max`: small, so that there are many commits.
    batch_rows: Option<u32>,
}

impl Settings {
    /// Any of the combinations.
    pub fn choose(random: &mut StdRng) -> Self {
        Settings {
            capacity: random
                .random_bool(0.5)
                .then(|| random.random_range(8..=256)),
            journal_bytes: (has_journal() && random.random_bool(0.5)).then_some(1 << 20),
            batch_rows: random.random_bool(0.5).then(|| random.random_range(1..=32)),
        }
    }

    /// The same as environment variables.
    pub fn environment(&self) -> Vec<(String, String)> {
        let capacity = self.capacity.map(u64::from);
        let batch_rows = self.batch_rows.map(u64::from);
        [
            ("MILLRACE_QUEUE__CAPACITY", capacity),
            ("MILLRACE_QUEUE__JOURNAL__BYTES_MAX", self.journal_bytes),
            ("MILLRACE_WORKERS__BATCH_ROWS_MAX", batch_rows),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?.to_string())))
        .collect()
    }
}

fn is_killed(status: &std::process::ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt as _;
    status.signal() == Some(rustix::process::Signal::KILL.as_raw())
}

/// Whether this Millrace has a journal to set up.
pub fn has_journal() -> bool {
    serde_json::to_value(millrace::config::Config::default())
        .is_ok_and(|config| config["queue"]["journal"].is_object())
}
