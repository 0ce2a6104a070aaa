//! What happens to a process, its disk, its database and its clocks.

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use rand::Rng;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};

use super::Sim;
use super::disk::{LivingDisk, any_failure};
use super::judge;
use super::operators::SKUS;
use super::postgres::CommitFault;
use super::postgres::tables::View;
use super::process::Process;
use super::shop::pause_ms;
use crate::sim_disk::Crash;

/// Mean time between two faults, in milliseconds.
const FAULT_MS: f64 = 8_500.0;
/// How often the rows are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// After so long memory has followed a commit.
const MEMORY: Duration = Duration::from_millis(300);

/// How often each kind of fault happened.
#[derive(Clone, Debug, Default)]
pub struct Figures(BTreeMap<&'static str, u64>);

impl Figures {
    pub fn note(&mut self, kind: &'static str) {
        *self.0.entry(kind).or_default() += 1;
    }

    pub fn all(&self) -> u64 {
        self.0.values().sum()
    }

    pub fn add(&mut self, other: &Figures) {
        for (kind, count) in &other.0 {
            *self.0.entry(kind).or_default() += count;
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (kind, count)) in self.0.iter().enumerate() {
            let space = if at == 0 { "" } else { " " };
            write!(f, "{space}{kind}={count}")?;
        }
        Ok(())
    }
}

impl Sim {
    /// Waits for the next fault, and lets it happen.
    pub async fn trouble_until(self: &Rc<Self>, until: Instant) {
        let pause = Duration::from_millis(self.chance(|random| pause_ms(random, FAULT_MS)));
        let next = (Instant::now() + pause).min(until);
        while Instant::now() < next && !self.has_failed() {
            let look = (Instant::now() + LOOK).min(next);
            tokio::time::sleep_until(look).await;
            let verdict = self
                .server
                .look(|rows| self.judge(|judge| judge.look(rows)));
            if let Err(why) = verdict {
                return self.fail(why);
            }
            self.compare_memory().await;
        }
        if next < until {
            self.happens();
        }
    }

    /// Whenever nothing is on its way, the counters in memory are those of the rows.
    async fn compare_memory(&self) {
        let commits = self.server.commits();
        if self.memory_differs().is_none() {
            return;
        }
        // Memory follows a commit.
        sleep(MEMORY).await;
        if self.server.commits() == commits
            && let Some(why) = self.memory_differs()
        {
            self.fail(why);
        }
    }

    fn memory_differs(&self) -> Option<String> {
        let (process, _) = self.at_rest()?;
        if self.judge(|judge| judge.has_lost()) {
            return None;
        }
        let memory = |rows: &View<'_>| judge::memory(rows, &process.state, |_| true);
        self.server.look(memory).err()
    }

    fn happens(self: &Rc<Self>) {
        let kinds = if self.with_failovers { 17 } else { 16 };
        let (kind, ms) = self.chance(|random| {
            (
                random.random_range(0..kinds),
                random.random_range(50..5_000),
            )
        });
        let kind = match kind {
            0 | 1 => self.kill(Crash::Everything, "killed"),
            2 => self.kill(Crash::Some, "power_lost"),
            3 => self.kill(Crash::Nothing, "power_lost"),
            4 => self.break_disk(),
            5 => self.slow_disk(ms),
            6 => {
                self.server.cut_one();
                "connection_cut"
            }
            7 | 8 => {
                let fault = CommitFault::ALL[(ms % 4) as usize];
                self.server.set_commit_fault(fault);
                "commit_answer_lost"
            }
            9 => {
                self.server
                    .stall_until(Instant::now() + Duration::from_millis(ms));
                "database_stalled"
            }
            10 => {
                self.server.cut_all(true);
                let sim = Rc::clone(self);
                // Now and then for longer than the leases last.
                let away_ms = if ms % 5 == 0 { 8 * ms } else { 2 * ms };
                spawn_local(async move {
                    sleep(Duration::from_millis(away_ms)).await;
                    sim.server.back();
                });
                "database_away"
            }
            11 => {
                self.server.cut_all(false);
                "database_restarted"
            }
            12 => {
                let off = self.chance(|random| random.random_range(-15_000..15_000));
                self.world.shift_wall(off);
                "clock_set"
            }
            13 | 14 => {
                let sku = self.chance(|random| random.random_range(1..=SKUS));
                let kind = self.refuse_counters(sku);
                let sim = Rc::clone(self);
                spawn_local(async move {
                    sleep(Duration::from_millis(18 * ms)).await;
                    sim.accept_counters(sku).await;
                });
                kind
            }
            15 => self.refuse_rows(10 * ms),
            _ => {
                let lag = (ms % 5) as usize;
                let changed = self.server.fail_over(lag);
                self.judge(|judge| judge.failed_over(&changed));
                "failed_over"
            }
        };
        self.note(format_args!("fault {kind} {ms}"));
        self.figures.borrow_mut().note(kind);
    }

    /// Ends the process, if there is one.
    fn kill(&self, crash: Crash, kind: &'static str) -> &'static str {
        let process = self.process.borrow_mut().take();
        if let Some(process) = process {
            let files = self.chance(|random| process.kill(&self.world, crash, random));
            *self.files.borrow_mut() = files;
        }
        kind
    }

    fn break_disk(self: &Rc<Self>) -> &'static str {
        let (call, errno) = self.chance(any_failure);
        if let Some(process) = self.process() {
            process.disk.fail(call, errno);
        }
        "disk_failed"
    }

    fn slow_disk(self: &Rc<Self>, ms: u64) -> &'static str {
        if let Some(process) = self.process() {
            process.disk.set_sync_ms(ms / 10);
            let disk = process.disk.clone();
            spawn_local(async move {
                sleep(Duration::from_millis(2 * ms)).await;
                disk.mend();
            });
        }
        "disk_slow"
    }

    /// Nothing happens any more, but that the counters of `kept` are refused.
    pub fn mend(self: &Rc<Self>, kept: Option<i32>) {
        self.server.back();
        self.server.set_loses_answers(false);
        self.server.set_trigger(None);
        for sku in (1..=SKUS).filter(|sku| Some(*sku) != kept) {
            spawn_local(Rc::clone(self).accept_counters(sku));
        }
        if let Some(process) = self.process() {
            process.disk.mend();
        }
    }

    /// The end of the simulation.
    pub fn end(&self) {
        self.kill(Crash::Everything, "");
    }

    /// Starts a process whenever there is none, and ends one that has to be.
    pub async fn keep_running(self: Rc<Self>) {
        loop {
            sleep(Duration::from_millis(200)).await;
            if let Some(process) = self.process() {
                self.watch(&process);
                continue;
            }
            let pause = self.chance(|random| pause_ms(random, 1_000.0));
            sleep(Duration::from_millis(pause)).await;
            let disk = LivingDisk::with(self.files.borrow().clone());
            match Process::start(&self.world, disk.clone()).await {
                Ok(process) => {
                    self.judge(|judge| judge.process_begins());
                    *self.process.borrow_mut() = Some(process);
                }
                Err(why) => {
                    self.note(format_args!("no start: {why}"));
                    let files = self.chance(|random| disk.crash(Crash::Everything, random));
                    *self.files.borrow_mut() = files;
                    if ["damaged", "other orders", "missing", "error serializing"]
                        .iter()
                        .any(|word| why.contains(word))
                    {
                        return self.fail(why);
                    }
                }
            }
        }
    }

    /// Ends a process that is poisoned, or whose journal has failed for a while.
    fn watch(&self, process: &Rc<Process>) {
        if let Some(why) = process.ended_task() {
            return self.fail(why);
        }
        use millrace::queue::DurableQueue;
        let poison = process.state.poison.reason().map(ToOwned::to_owned);
        let failed = process.queue.failure();
        let is_patient = self.chance(|random| random.random_ratio(24, 25));
        let Some(why) = poison.or(failed.filter(|_| !is_patient)) else {
            return;
        };
        self.note(format_args!("restart: {why}"));
        self.kill(Crash::Everything, "");
    }
}
