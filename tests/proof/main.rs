//! Programs that prove the promises, each with a count of its own and one line at its end.
//!
//! `cargo test` runs each in its short form; `cargo test --test proof -- kill9 200` runs one for as
//! long as its number says. `MILLRACE_SEED` repeats what a line with `seed=` has shown.

#[path = "../support/mod.rs"]
mod support;

mod checker;
mod checker_self_test;
mod crash_states;
mod database;
#[cfg(target_os = "linux")]
mod disk;
mod doors;
mod every_byte;
mod journal_fixture;
mod kill9;
mod load;
mod log;
#[cfg(target_os = "linux")]
mod nodes;
#[cfg(not(target_os = "linux"))]
mod nodes {
    use super::outcome::Why;

    pub fn run(_faults: u64) -> Result<String, Why> {
        Err(Why::NotRun("only Linux has network namespaces".to_owned()))
    }

    pub fn with_bug(faults: u64, _only: Option<&str>, _bug: Option<&str>) -> Result<String, Why> {
        run(faults)
    }
}
mod nth_call;
mod order_log;
mod outcome;
mod platform;
#[cfg(target_os = "linux")]
mod power;
#[cfg(not(target_os = "linux"))]
mod power {
    use super::outcome::Why;

    pub fn run(_cycles: u64) -> Result<String, Why> {
        Err(Why::NotRun("only Linux can shut ext4 down".to_owned()))
    }
}

mod mutants;
mod progress;
mod recovery;
mod settlement;
mod sim_disk;
mod simulation;

use std::process::ExitCode;

use outcome::{Proof, report};

/// Proofs that only compute.
const COMPUTING: &[Proof] = &[
    Proof {
        name: "checker",
        counts: "rounds of the checker against planted falsehoods",
        short: 1,
        run: checker_self_test::run,
    },
    Proof {
        name: "crash_states",
        counts: "states that a crash leaves; as many bytes are flipped",
        short: 3_000,
        run: crash_states::run,
    },
    Proof {
        name: "every_byte",
        counts: "bytes of a small journal flipped, and lengths that it is cut to; it has some 200,000",
        short: 1_000,
        run: every_byte::run,
    },
    Proof {
        name: "nth_call",
        counts: "N up to which every N-th call to the disk fails",
        short: 6,
        run: nth_call::run,
    },
    Proof {
        name: "order_log",
        counts: "lives of a log on a simulated broker that fails in every way",
        short: 400,
        run: order_log::run,
    },
    Proof {
        name: "simulation",
        counts: "seeds of a simulated node, each of sixteen simulated minutes with a fault every ten seconds",
        short: 2,
        run: simulation::run,
    },
    Proof {
        name: "simulation_defects",
        counts: "planted defects that the simulation has to find",
        short: 11,
        run: simulation::run_defects,
    },
];

/// Collects every process without a parent, also those of other proofs: none of them runs beside it.
const POWER: &[Proof] = &[Proof {
    name: "power",
    counts: "cycles of load, power loss and recovery",
    short: 4,
    run: power::run,
}];

/// Proofs that run processes, for which they mostly wait.
const WAITING: &[Proof] = &[
    Proof {
        name: "kill9",
        counts: "cycles of load, kill -9 and recovery",
        short: 8,
        run: kill9::run,
    },
    Proof {
        name: "settlement",
        counts: "random lives of orders and payments beside a model",
        short: 100,
        run: settlement::run,
    },
    Proof {
        name: "payments",
        counts: "cycles of load with payments, kill -9 and recovery",
        short: 6,
        run: kill9::run_with_payments,
    },
    Proof {
        name: "broker",
        counts: "cycles on each broker of load with payments, kill -9 of the process, the broker, network or machine, and recovery",
        short: 1,
        run: kill9::run_with_brokers,
    },
    Proof {
        name: "nodes",
        counts: "faults that happen to three nodes, their database, their broker and their network under load with payments",
        short: 3,
        run: nodes::run,
    },
    Proof {
        name: "log",
        counts: "rounds of load with a log that breaks while PostgreSQL dies",
        short: 3,
        run: log::run,
    },
    Proof {
        name: "progress",
        counts: "rounds of load, each with a database that stalls",
        // Each way once.
        short: 4,
        run: progress::run,
    },
    Proof {
        name: "recovery",
        counts: "rounds of orders that lie far apart or are parked, kill -9 and recovery",
        short: 2,
        run: recovery::run,
    },
    Proof {
        name: "mutants",
        counts: "deliberate defects that have to be caught",
        // Those that are caught in a process of their own, every time.
        short: 14,
        run: mutants::run,
    },
];

/// The same, and takes about as long as all of those.
const DATABASE: &[Proof] = &[Proof {
    name: "database",
    counts: "rounds through every way of mistreating PostgreSQL",
    short: 1,
    run: database::run,
}];

fn proofs() -> impl Iterator<Item = &'static Proof> {
    [COMPUTING, POWER, WAITING, DATABASE].into_iter().flatten()
}

fn main() -> ExitCode {
    let mut words: Vec<String> = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "--list" => {
                proofs().for_each(|proof| println!("{}: test", proof.name));
                return ExitCode::SUCCESS;
            }
            // What begins with a dash is meant for the usual test harness, some with a value.
            "--skip" | "--test-threads" | "--format" | "--color" | "--logfile" => {
                arguments.next();
            }
            flag if flag.starts_with('-') => {}
            _ => words.push(word),
        }
    }
    let all_held = match words.as_slice() {
        [] => run_all(),
        [name, rest @ ..] => {
            let proof = proofs().find(|proof| proof.name == name);
            let count = match rest {
                [] => proof.map(|proof| proof.short),
                [count] => count.parse().ok(),
                _ => None,
            };
            match (proof, count) {
                (Some(proof), Some(count)) => report(proof, count),
                // `cargo test WORD` runs every test target with that word.
                (None, _) if rest.is_empty() => {
                    eprintln!("no proof is called {name}: none was run");
                    return ExitCode::SUCCESS;
                }
                _ => return usage(),
            }
        }
    };
    if all_held {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs every proof in its short form, those that compute beside those that wait, and these beside each other. Returns whether none
/// failed.
fn run_all() -> bool {
    let in_turn = |proofs: &[Proof]| {
        let failed = proofs.iter().filter(|proof| !report(proof, proof.short));
        failed.count() == 0
    };
    std::thread::scope(|scope| {
        let computing = scope.spawn(|| in_turn(COMPUTING));
        let power = in_turn(POWER);
        let waiting = [WAITING, DATABASE].map(|proofs| scope.spawn(move || in_turn(proofs)));
        let all = waiting.into_iter().chain([computing]);
        // Each is seen to its end.
        all.fold(power, |held, proofs| proofs.join().unwrap_or(false) && held)
    })
}

fn usage() -> ExitCode {
    eprintln!("usage: proof [NAME [COUNT]]");
    for proof in proofs() {
        let Proof {
            name,
            counts,
            short,
            ..
        } = proof;
        eprintln!("  {name:<14} counts {counts}; {short} in the short form");
    }
    ExitCode::from(2)
}
