//! Nodes, a database, brokers and clients in virtual time.
//!
//! The world takes one random step after another: time passes, a message arrives or its answer is lost, a node does one
//! thing, something breaks or heals. Whatever a node does in one step is one transaction, one message or one change of its
//! memory; between any two, everything else may happen. A seed replays a run; every run has its own mixture of faults.
//!
//! The model has the database's transactions from `arbiter` (which `twin` holds against PostgreSQL) and the decision who is
//! suspect from the crate itself. A [`Defect`] breaks one rule of docs/NODES.md; a test hunts for each.
//!
//! Not in the model: payments, expiry, cancels, several SKUs, a broker that loses what it has acknowledged.

mod checker;
mod lanes;
mod node;
mod rules;
mod stock;
mod takeover;
mod world;

use std::collections::BTreeMap;

use crate::support::sale::count;
use rules::{Defect, RULES};
use world::{Scene, World};

/// Steps with faults.
const STEPS: u32 = 2_500;
/// Runs without a defect.
const RUNS: u64 = 60;
/// Runs within which a defect has to show. Those of [`RULES`] show in the first, as long as the model stays as it is.
const HUNT: u64 = 400;

#[test]
fn no_run_of_the_protocol_breaks_a_promise() {
    let first = count("MILLRACE_SEED", rand::random::<u32>().into());
    println!("MILLRACE_SEED={first}");
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for seed in first..first + RUNS * count("MILLRACE_ROUNDS", 1) {
        let mut world = World::new(seed, Scene::Any, None);
        if let Err(broken) = world.run(STEPS) {
            panic!("MILLRACE_SEED={seed}: {broken}");
        }
        for (what, times) in world.seen {
            *seen.entry(what).or_default() += times;
        }
    }
    println!("{seen:#?}");
    for what in [
        "answer of a hand-over lost",
        "failover that loses commits",
        "gave back",
        "handed over",
        "replayed",
        "sold out",
        "takeover",
        "took a takeover over",
    ] {
        assert!(seen.contains_key(what), "no run has seen: {what}");
    }
}

#[test]
fn every_rule_that_is_left_out_is_missed() {
    let found = |defect: Defect, scene: Scene, first: u64| {
        (first..first + HUNT).find_map(|seed| {
            let broken = World::new(seed, scene, Some(defect)).run(STEPS).err()?;
            let sound = World::new(seed, scene, None).run(STEPS);
            assert_eq!(sound, Ok(()), "seed {seed} of {scene:?}, without a defect");
            Some((seed, broken))
        })
    };
    let mut unseen = Vec::new();
    for (defect, rule, scene, first) in RULES {
        match found(*defect, *scene, *first) {
            Some((seed, broken)) => {
                let broken = broken.lines().next().unwrap_or_default();
                println!("{defect:?}, seed {seed}: {broken:.150}");
            }
            None => unseen.push(format!("{defect:?} ({rule})")),
        }
    }
    assert!(unseen.is_empty(), "{}", unseen.join("\n"));
}
