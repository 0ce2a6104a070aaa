//! A model of several nodes: lanes, shares of stock, lending, hand-over, takeover and failovers of PostgreSQL, under a seeded
//! scheduler with virtual time. It is of the protocol (docs/NODES.md), not of the code: three nodes with clocks of
//! their own, one database, one log a node, and a network that delays, repeats and loses. Nodes are killed, paused
//! (their clocks with them, or not) and cut off from the database, which goes away, fails over, and leaves COMMITs
//! without an answer.
//!
//! ```sh
//! cargo test --test nodes_model
//! MILLRACE_RUNS=4000 cargo test --release --test nodes_model -- rules    # more runs
//! MILLRACE_SEED=7 cargo test --test nodes_model -- rules --nocapture     # one run, with what happened
//! ```
//!
//! Not in it: payments, expiry, cancels, several SKUs, clocks of different rates, a broker that loses what it has
//! acknowledged, a membership that changes, and more than one failover in a minute. Failovers that lose commits are left out
//! of the runs unless `MILLRACE_ASYNCHRONOUS` is set: docs/NODES.md has what they showed.

mod checker;
mod db;
mod failover;
mod lanes;
mod log;
mod node;
mod rules;
mod shares;
mod stock;
mod takeover;
mod world;

use rules::{Defect, PLANTED};
use world::World;

const STEPS: usize = 8_000;
const RUNS: u64 = 150;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn run(seed: u64, defect: Option<Defect>, asynchronous: bool, traced: bool) -> World {
    let mut world = World::new(seed, defect, asynchronous);
    world.trace = traced.then(Vec::new);
    for _ in 0..STEPS {
        world.step();
        if world.violation.is_some() {
            return world;
        }
    }
    world.end();
    world
}

#[test]
fn the_rules_keep_the_promises() {
    let asynchronous = std::env::var_os("MILLRACE_ASYNCHRONOUS").is_some();
    let one = number("MILLRACE_SEED");
    let seeds = one.map_or(0..number("MILLRACE_RUNS").unwrap_or(RUNS), |seed| {
        seed..seed + 1
    });
    let (mut broken, mut takeovers, mut acknowledged) = (Vec::new(), 0, 0);
    for seed in seeds {
        let world = run(seed, None, asynchronous, one.is_some());
        for line in world.trace.iter().flatten() {
            println!("{line}");
        }
        takeovers += world.takeovers;
        acknowledged += world.acknowledged.len();
        broken.extend(world.violation.map(|what| format!("seed {seed}: {what}")));
    }
    println!("{takeovers} takeovers, {acknowledged} acknowledged orders");
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(
        one.is_some() || takeovers > 20,
        "the runs have {takeovers} takeovers"
    );
}

#[test]
fn each_rule_that_is_left_out_is_missed() {
    let missed = |(defect, rule, asynchronous, seed): &(Defect, &str, bool, u64)| {
        let sound = run(*seed, None, *asynchronous, false).violation;
        let found = run(*seed, Some(*defect), *asynchronous, false).violation;
        (sound.is_some() || found.is_none())
            .then(|| format!("{defect:?} ({rule}): {sound:?}, {found:?}"))
    };
    let missed: Vec<String> = PLANTED.iter().filter_map(missed).collect();
    assert!(
        missed.is_empty(),
        "other seeds have to be looked for:\n{}",
        missed.join("\n")
    );
}
