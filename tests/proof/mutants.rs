//! Mutants: deliberate defects, each of which a proof has to catch.

use std::process::Command;

use millrace::faults::BUGS;

use super::database;
use super::kill9::{self, Form};
use super::outcome::Why;
use super::{nodes, progress, recovery};

/// How a defect has to come out.
enum Catch {
    /// By a proof in a process of its own, with this count.
    Alone(&'static str, u64),
    /// By kill9, within so many cycles.
    Kill9(u64),
    /// By the same with payments.
    Payments(u64),
    /// By the proof of progress, within so many rounds.
    Progress(u64),
    /// By the proof of recovery, within so many rounds.
    Recovery(u64),
    /// By the proof of nodes, within so many of the faults of this name. Where that cannot run, neither can this.
    Nodes(&'static str, u64),
    /// By this case of the database proof.
    Database(&'static str),
    /// By the naive twin, which tries each by itself: `cargo test --test model`.
    Twin,
    /// By `simulation_defects`, which tries each by itself.
    Simulation,
}

use Catch::{Alone, Database, Kill9, Nodes, Payments, Progress, Recovery, Simulation, Twin};

/// Every defect of [`BUGS`], its description, and the proof that catches it.
const CAUGHT_BY: &[(&str, &str, Catch)] = &[
    (
        "ack_before_sync",
        "acknowledged before the sync",
        Alone("crash_states", 3_000),
    ),
    ("no_sync", "never synced", Alone("crash_states", 3_000)),
    (
        "reuse_failed_file",
        "a second sync of a file whose first failed",
        Alone("nth_call", 6),
    ),
    (
        "lost_wake_up",
        "the sleeping appender is not woken",
        Alone("nth_call", 2),
    ),
    (
        "no_directory_sync",
        "a segment's name is not durable",
        Alone("crash_states", 3_000),
    ),
    (
        "retire_before_commit",
        "segments deleted before their orders are rows",
        Alone("crash_states", 3_000),
    ),
    (
        "trust_any_sector",
        "checksums not compared",
        Alone("crash_states", 3_000),
    ),
    (
        "cut_at_damage",
        "damage taken for the end",
        Alone("crash_states", 3_000),
    ),
    (
        "acknowledge_before_broker",
        "acknowledged before the broker confirmed",
        Alone("order_log", 400),
    ),
    (
        "unknown_is_success",
        "an unknown outcome of an append taken for success",
        Alone("order_log", 400),
    ),
    (
        "no_fence",
        "a group behind a later process's marker acknowledged",
        Alone("order_log", 400),
    ),
    (
        "read_stale_epoch",
        "a group behind a later process's marker read back",
        Alone("order_log", 400),
    ),
    (
        "pay_after_the_deadline",
        "a payment judged without its deadline",
        Alone("settlement", 100),
    ),
    (
        "expire_what_is_paid",
        "an order expired over the payment that waits for it",
        Alone("settlement", 100),
    ),
    (
        "skip_a_replay",
        "the last order of a part is not replayed",
        Kill9(20),
    ),
    (
        "replay_without_looking",
        "orders replayed that are rows",
        Kill9(20),
    ),
    (
        "hold_without_checking",
        "units held that nobody has",
        Kill9(20),
    ),
    (
        "double_release",
        "a late commit gives its units back",
        Database("late_commits"),
    ),
    (
        "guess_the_commit",
        "a commit of unknown outcome taken for done",
        Database("cut_before_commit"),
    ),
    (
        "answer_before_commit",
        "a callback answered before its commit",
        Payments(20),
    ),
    (
        "keep_expired_units",
        "memory not told of an expiry",
        Payments(20),
    ),
    (
        "recover_without_holding",
        "a recovered order that holds no units in memory",
        Payments(20),
    ),
    (
        "ready_without_progress",
        "`readyz` that looks at parts alone",
        Progress(1),
    ),
    (
        "pause_when_stored",
        "a pause in force only once the database has it",
        // A stall of the workers alone does not hold it up.
        Progress(2),
    ),
    (
        "sell_what_is_parked",
        "a start that does not look which SKUs have parked orders",
        Recovery(1),
    ),
    (
        "forget_what_falls_due_while_loading",
        "an order never expires whose time ends while its lane is loaded at another node",
        Nodes("rolling_restart", 3),
    ),
    (
        "two_entries_of_a_user",
        "a user who enters a draw twice",
        Twin,
    ),
    (
        "assign_before_the_draw",
        "units that go out before the draw",
        Twin,
    ),
    (
        "rank_by_arrival",
        "a draw that leaves its entries in the order in which they came",
        Twin,
    ),
    (
        "stop_at_who_does_not_fit",
        "an entry that is for more units than are left, and holds up the next",
        Twin,
    ),
    (
        "forget_the_place",
        "an entry that leaves the list, and comes back without its rank",
        Twin,
    ),
    (
        "forget_a_retry",
        "the retry of a dead letter whose answer was lost, and whose units are free",
        Simulation,
    ),
    (
        "refund_again",
        "a refund that is sent twice and goes to a second payment",
        Simulation,
    ),
];

/// Tries the first `count` of them, or the one that `MILLRACE_BUG` names.
pub fn run(count: u64) -> Result<String, Why> {
    for bug in BUGS {
        if !CAUGHT_BY.iter().any(|(name, ..)| *name == bug) {
            return Err(Why::Failed(format!("nothing is said to catch {bug}")));
        }
    }
    let mut caught = Vec::new();
    let only = std::env::var("MILLRACE_BUG").ok();
    let chosen = CAUGHT_BY
        .iter()
        .filter(|(bug, ..)| only.as_deref().is_none_or(|only| only == *bug));
    for (bug, what, by) in chosen.take(count as usize) {
        let why = match by {
            Alone(proof, count) => alone(bug, proof, *count)?,
            Kill9(cycles) => killed(Form::Orders, *cycles, bug),
            Payments(cycles) => killed(Form::Payments, *cycles, bug),
            Progress(rounds) => said(progress::with_bug(*rounds, Some(bug)).map_err(Why::Failed)),
            Recovery(rounds) => said(recovery::with_bug(*rounds, Some(bug)).map_err(Why::Failed)),
            Nodes(fault, count) => match nodes::with_bug(*count, Some(fault), Some(bug)) {
                Err(Why::NotRun(why)) => {
                    caught.push("(not run)");
                    eprintln!("not run: {bug}: {why}");
                    continue;
                }
                outcome => said(outcome),
            },
            Database(case) => said(database::with_bug(3, case, Some(bug))),
            Twin | Simulation => continue,
        };
        if why.is_none() {
            return Err(Why::Failed(format!("{bug} ({what}) was not caught")));
        }
        caught.push(*bug);
    }
    Ok(format!(
        "caught={} of {}: {}",
        caught.len(),
        BUGS.len(),
        caught.join(" ")
    ))
}

fn killed(form: Form, cycles: u64, bug: &str) -> Option<String> {
    said(kill9::with_bug(form, cycles, Some(bug)).map_err(Why::Failed))
}

fn said(outcome: Result<String, Why>) -> Option<String> {
    match outcome {
        Err(Why::Failed(why)) => Some(why),
        Ok(_) | Err(Why::NotRun(_)) => None,
    }
}

/// The line of a proof that runs with a defect; none if it passed.
fn alone(bug: &str, proof: &str, count: u64) -> Result<Option<String>, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let output = Command::new(program)
        .args([proof, &count.to_string()])
        .env("MILLRACE_FAULT", format!("bug@{bug}"))
        .output()
        .map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with("FAIL"));
    Ok(line.map(str::to_owned))
}
