//! The real binary under mixed load, its journal and its database on one disk, whose power is cut.
//! No answer to a client may turn out false after that.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::WaitOptions;
use tempfile::TempDir;

use super::checker::{Checker, Findings};
use super::disk::Disk;
use super::load::{Load, Settings, check};
use super::outcome::{Why, block_on, in_series};
use crate::support::postgres::{copy_template, test_dir};
use crate::support::served::{OwnPostgres, Served, end_postgres, spawn};

/// Cycles on one disk; the next begin with an empty one, so that the last do not only recover
/// what the first have written.
const SERIES: u64 = 25;

/// Room for PostgreSQL's WAL and the journal; a file with holes, so it takes what is written.
const DISK_BYTES: u64 = 4 << 30;

/// Cycles of load, power loss and recovery.
pub fn run(cycles: u64) -> Result<String, Why> {
    with_bug(cycles, None)
}

/// The same with a deliberate defect, to show that it is found.
pub fn with_bug(cycles: u64, bug: Option<&str>) -> Result<String, Why> {
    drop(Disk::make(DISK_BYTES).map_err(Why::NotRun)?);
    // A PostgreSQL whose Millrace was killed comes to us and is collected at once. Not every
    // machine's first process is quick at it, and a process that was not collected looks alive to
    // the next PostgreSQL, which a power loss would not have left.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|e| format!("cannot become a subreaper: {e}"))?;
    let figures = cycles_of(cycles, bug);
    let _ = rustix::process::set_child_subreaper(None);
    figures
}

fn cycles_of(cycles: u64, bug: Option<&str>) -> Result<String, Why> {
    let (mut after_the_cut, mut while_starting) = (0, 0);
    let figures = in_series("power", cycles, SERIES, |seed, cycles, done| {
        let mut proof = Proof::new(seed, bug)?;
        let outcome = proof.run(cycles, done);
        after_the_cut += proof.after_the_cut;
        while_starting += proof.cuts_while_starting;
        outcome
    })?;
    Ok(format!(
        "{figures} cuts_while_starting={while_starting} answers_after_the_cut={after_the_cut}"
    ))
}

struct Proof {
    random: StdRng,
    checker: Checker,
    bug: Option<String>,
    /// Answers that came when the power was gone, for the figures: an acknowledgement among them
    /// is found to be false by the comparison.
    after_the_cut: u64,
    cuts_while_starting: u64,
    disk: Disk,
    /// For what is not on the disk: the log.
    dir: TempDir,
}

impl Proof {
    fn new(seed: u64, bug: Option<&str>) -> Result<Self, String> {
        let disk = Disk::make(DISK_BYTES)?;
        let data_dir = disk.path().join("data");
        std::fs::create_dir(&data_dir).map_err(|e| format!("no data_dir on the disk: {e}"))?;
        block_on(copy_template(&data_dir));
        disk.sync()?;
        Ok(Proof {
            random: StdRng::seed_from_u64(seed),
            checker: Checker::new(),
            bug: bug.map(|name| format!("bug@{name}")),
            after_the_cut: 0,
            cuts_while_starting: 0,
            disk,
            dir: test_dir(),
        })
    }

    fn run(&mut self, cycles: u64, done: &dyn Fn(u64)) -> Result<Findings, String> {
        let mut served = self.start()?;
        let mut findings = Findings::default();
        for cycle in 0..cycles {
            done(cycle);
            let cut = self.load_and_cut(cycle, served);
            cut.map_err(|why| format!("cycle={cycle} {why}"))?;
            if self.random.random_bool(0.3) {
                let cut = self.cut_while_starting();
                cut.map_err(|why| format!("cycle={cycle} {why}"))?;
            }
            served = self.start()?;
            findings = self.check(&served);
            if !findings.holds() {
                break;
            }
        }
        // An orderly end takes PostgreSQL with it.
        served.terminate();
        served.wait();
        Ok(findings)
    }

    fn start(&mut self) -> Result<Served, String> {
        let settings = self.settings();
        Served::try_start(&self.data_dir(), &settings, &self.log())
            .map_err(|ended| format!("it does not start: {}: {}", ended.status, ended.log))
    }

    fn settings(&mut self) -> Vec<(String, String)> {
        let mut settings = Settings::choose(&mut self.random);
        // The disk has no room for the usual limit.
        settings.journal_bytes.get_or_insert(64 << 20);
        settings.for_this_build();
        let mut all = settings.environment();
        let bug = self.bug.iter();
        all.extend(bug.map(|bug| ("MILLRACE_FAULT".to_owned(), bug.clone())));
        all
    }

    fn data_dir(&self) -> PathBuf {
        self.disk.path().join("data")
    }

    /// Where a log does not depend on the disk.
    fn log(&self) -> PathBuf {
        self.dir.path().join("serve.log")
    }

    fn postgres(&self) -> OwnPostgres {
        OwnPostgres::of(&self.data_dir())
    }

    fn load_and_cut(&mut self, cycle: u64, served: Served) -> Result<(), String> {
        let load = Load::prepare(&served, &self.checker, cycle, &mut self.random)
            .map_err(|e| format!("no SKU can be put on sale: {e}"))?;
        let moment = Duration::from_millis(self.random.random_range(10..400));
        // Time to tell a lie in.
        let rest = Duration::from_millis(self.random.random_range(0..40));
        // Its file cannot be read later.
        let postmaster = self.postgres().pid().ok_or("PostgreSQL does not run")?;
        let stop = AtomicBool::new(false);
        let cut = std::thread::scope(|scope| {
            scope.spawn(|| load.run(&stop));
            std::thread::sleep(moment);
            let cut = self.disk.cut_power();
            let before = self.checker.answers();
            std::thread::sleep(rest);
            self.after_the_cut += self.checker.answers() - before;
            served.kill();
            stop.store(true, Ordering::Relaxed);
            cut
        });
        self.checker.server_is_gone();
        end_postgres(postmaster);
        collect_orphans();
        cut?;
        self.disk.unmount()?;
        self.disk.mount()
    }

    /// The power goes again before the recovery is over, or just after.
    fn cut_while_starting(&mut self) -> Result<(), String> {
        let settings = self.settings();
        let mut child = spawn(&self.data_dir(), &settings, &self.log());
        std::thread::sleep(Duration::from_millis(self.random.random_range(20..600)));
        let cut = self.disk.cut_power();
        let _ = child.kill();
        let _ = child.wait();
        self.disk.processes().into_iter().for_each(end_postgres);
        collect_orphans();
        cut?;
        self.cuts_while_starting += 1;
        self.disk.unmount()?;
        self.disk.mount()
    }

    fn check(&mut self, served: &Served) -> Findings {
        let config = self.postgres().config().expect("its PostgreSQL runs");
        check(served.data, &self.checker, &config, self.random.random())
    }
}

/// Collects every process that has come to us and waits for those that are about to end. Called
/// when we have no child of our own that anyone else waits for.
fn collect_orphans() {
    let deadline = Instant::now() + Duration::from_secs(15);
    // An error: there are no children any more.
    while let Ok(collected) = rustix::process::wait(WaitOptions::NOHANG) {
        if collected.is_none() {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
