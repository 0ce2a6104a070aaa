//! PostgreSQL mistreated in every way that DESIGN.md's table of faults names, each under load, each
//! ended by the checker: whatever the database does, no answer to a client is false.
//!
//! `MILLRACE_CASES=name,name` runs only those; `MILLRACE_BUG=name` puts in one of `faults::BUGS`.

mod cases;
mod disk;
mod failover;
pub mod fixture;

use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::checker::Findings;
use super::outcome::{Why, seed};

/// One way of mistreating PostgreSQL.
struct Case {
    name: &'static str,
    run: fn(Terms<'_>) -> Result<Figures, Why>,
}

/// The terms of a case.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    /// The seed of all random choices.
    pub seed: u64,
    /// A deliberate defect of Millrace.
    pub bug: Option<&'a str>,
}

const CASES: &[Case] = &[
    Case {
        name: "restarted",
        run: cases::restarted,
    },
    Case {
        name: "stopped_worker_backends",
        run: cases::stopped_worker_backends,
    },
    Case {
        name: "stopped_server",
        run: cases::stopped_server,
    },
    Case {
        name: "terminated_backends",
        run: cases::terminated_backends,
    },
    Case {
        name: "cut_before_commit",
        run: cases::cut_before_commit,
    },
    Case {
        name: "cut_after_commit",
        run: cases::cut_after_commit,
    },
    Case {
        name: "cut_in_silence",
        run: cases::cut_in_silence,
    },
    Case {
        name: "late_commits",
        run: cases::late_commits,
    },
    Case {
        name: "late_cancellations",
        run: cases::late_cancellations,
    },
    Case {
        name: "paid_terminated_backends",
        run: cases::paid_terminated_backends,
    },
    Case {
        name: "paid_cut_before_commit",
        run: cases::paid_cut_before_commit,
    },
    Case {
        name: "paid_cut_after_commit",
        run: cases::paid_cut_after_commit,
    },
    Case {
        name: "paid_cut_in_silence",
        run: cases::paid_cut_in_silence,
    },
    Case {
        name: "paid_late_commits",
        run: cases::paid_late_commits,
    },
    Case {
        name: "silent_network",
        run: cases::silent_network,
    },
    Case {
        name: "locked_sku",
        run: cases::locked_sku,
    },
    Case {
        name: "locked_orders",
        run: cases::locked_orders,
    },
    Case {
        name: "disk_full_for_data",
        run: disk::full_for_data,
    },
    Case {
        name: "disk_full_for_wal",
        run: disk::full_for_wal,
    },
    Case {
        name: "failover_synchronous",
        run: failover::synchronous,
    },
    Case {
        name: "paid_failover_synchronous",
        run: failover::paid_synchronous,
    },
    Case {
        name: "failover_while_commits_wait",
        run: failover::while_commits_wait,
    },
    Case {
        name: "failover_lagging",
        run: failover::lagging,
    },
    Case {
        name: "failover_lagging_and_killed",
        run: failover::lagging_and_killed,
    },
    Case {
        name: "failover_lagging_with_cancellations",
        run: failover::lagging_with_cancellations,
    },
];

/// Figures of cases; they add up.
#[derive(Default)]
struct Figures {
    findings: Findings,
    /// Orders told `201` that a lagging standby did not have: the one loss that is allowed.
    lost_waiting: u64,
    /// Orders told `202 accepted` whose rows the standby did not have.
    applied_again: u64,
}

impl Figures {
    fn add(&mut self, other: Figures) {
        self.findings.add(&other.findings);
        self.lost_waiting += other.lost_waiting;
        self.applied_again += other.applied_again;
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures {
            findings,
            lost_waiting,
            applied_again,
        } = self;
        write!(
            f,
            "{findings} lost_waiting={lost_waiting} applied_again={applied_again}"
        )
    }
}

/// The outcome of all cases together.
#[derive(Default)]
struct Outcome {
    figures: Figures,
    ran: u64,
    failed: Vec<String>,
    not_run: BTreeSet<&'static str>,
}

/// Rounds through every case.
pub fn run(rounds: u64) -> Result<String, Why> {
    let chosen = std::env::var("MILLRACE_CASES").unwrap_or_default();
    with_bug(
        rounds,
        &chosen,
        std::env::var("MILLRACE_BUG").ok().as_deref(),
    )
}

/// The same with some of the cases, all if none is named, and with a deliberate defect, to show
/// that it is found.
pub fn with_bug(rounds: u64, chosen: &str, bug: Option<&str>) -> Result<String, Why> {
    let (seed, started) = (seed(), Instant::now());
    let cases = choose(chosen)?;
    let count = rounds * cases.len() as u64;
    let (next, outcome) = (AtomicU64::new(0), Mutex::new(Outcome::default()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let case = cases[number as usize % cases.len()];
                    let seed = seed.wrapping_add(number);
                    let terms = Terms { seed, bug };
                    let begun = Instant::now();
                    let result = catch_unwind(AssertUnwindSafe(|| (case.run)(terms)))
                        .unwrap_or_else(|_| Err(Why::Failed("it panicked, see above".into())));
                    let mut outcome = outcome.lock().expect("the outcome");
                    outcome.note(case.name, seed, begun.elapsed(), result);
                }
            });
        }
    });
    let outcome = outcome.into_inner().expect("the outcome");
    let mut line = format!("cases={} {} rounds={rounds}", outcome.ran, outcome.figures);
    if !chosen.is_empty() {
        line.push_str(&format!(" only={chosen}"));
    }
    if !outcome.not_run.is_empty() {
        let names: Vec<&str> = outcome.not_run.into_iter().collect();
        line.push_str(&format!(" not_run={}", names.join(",")));
    }
    let seconds = started.elapsed().as_secs();
    line.push_str(&format!(" seed={seed} seconds={seconds}"));
    match outcome.failed.as_slice() {
        [] if outcome.ran == 0 => Err(Why::NotRun(line)),
        [] => Ok(line),
        failed => Err(Why::Failed(format!(
            "failed={} {line}: {}",
            failed.len(),
            failed.join(" || ")
        ))),
    }
}

impl Outcome {
    fn note(
        &mut self,
        name: &'static str,
        seed: u64,
        took: Duration,
        result: Result<Figures, Why>,
    ) {
        match result {
            Ok(figures) => {
                eprintln!(
                    "database/{name}: {figures} seconds={:.1}",
                    took.as_secs_f64()
                );
                self.figures.add(figures);
                self.ran += 1;
            }
            // The others are worth a look all the same.
            Err(Why::Failed(why)) => self.failed.push(format!("case={name} seed={seed} {why}")),
            Err(Why::NotRun(why)) => {
                if self.not_run.insert(name) {
                    println!("NOT RUN database/{name}: {why}");
                }
            }
        }
    }
}

/// The cases of this list of names; all if it is empty.
fn choose(names: &str) -> Result<Vec<&'static Case>, Why> {
    if names.is_empty() {
        return Ok(CASES.iter().collect());
    }
    let find = |name: &str| {
        let case = CASES.iter().find(|case| case.name == name);
        case.ok_or_else(|| Why::Failed(format!("MILLRACE_CASES: no case {name}")))
    };
    names.split(',').map(find).collect()
}

/// How long Millrace gives a step of its conversation with the database here.
const STEP: Duration = Duration::from_millis(400);
/// Longer than several steps: what is stuck for as long has been given up meanwhile.
const LONG: Duration = Duration::from_millis(1_500);
/// Cases that run at the same time: most of each is waiting.
const AT_ONCE: u64 = 2;
