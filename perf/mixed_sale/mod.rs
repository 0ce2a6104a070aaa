//! T8: the sale of `millrace demo`, judged by its own audit.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::fixture::compare::Spread;
use crate::fixture::{Finding, Lab, Scratch, Target};

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let (mut ratios, mut placed, mut refused, mut callbacks) = (vec![], vec![], vec![], vec![]);
    for _ in 0..lab.pick(5, 1) {
        let load = demo()?;
        let p99 = |latency: &Value| latency["p99_ms"].as_f64().context("a figure is missing");
        placed.push(p99(&load["latency"]["placed"])?);
        refused.push(p99(&load["latency"]["refused"])?);
        callbacks.push(p99(&load["payments"]["latency"])?);
        ratios.push(callbacks[callbacks.len() - 1] / placed[placed.len() - 1]);
    }
    Ok(vec![
        Finding::spread(
            "p99 of a callback in the demo's flood / p99 of a placed order there",
            Spread::of(&ratios),
        )
        .against("T8", Target::AtMost(5.0)),
        Finding::spread("p99 of a placed order, ms", Spread::of(&placed)),
        Finding::spread("p99 of a refusal, ms", Spread::of(&refused)),
        Finding::spread("p99 of a callback, ms", Spread::of(&callbacks)),
    ])
}

/// What the load of a demo reports.
fn demo() -> anyhow::Result<Value> {
    let scratch = Scratch::new()?;
    let program = std::env::current_exe()?.with_file_name("millrace");
    let done = Command::new(program)
        .args(["demo", "--json"])
        .current_dir(scratch.path())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()?;
    let mut demo: Value =
        serde_json::from_slice(&done.stdout).context("the demo gave no result")?;
    ensure!(done.status.success(), "the demo broke a promise: {demo:#}");
    Ok(demo["load"].take())
}
