//! The sale of `millrace demo`, judged by its own audit.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::fixture::{Finding, Lab, Scratch};

/// Runs the case.
pub async fn run(_: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let program = std::env::current_exe()?.with_file_name("millrace");
    let done = Command::new(program)
        .args(["demo", "--json"])
        .current_dir(scratch.path())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()?;
    let demo: Value = serde_json::from_slice(&done.stdout).context("the demo gave no result")?;
    ensure!(done.status.success(), "the demo broke a promise: {demo:#}");
    let load = &demo["load"];
    let number = |value: &Value| value.as_f64().context("a figure is missing");
    Ok(vec![
        Finding::of(
            "orders answered a second, on average",
            number(&load["answered_per_second"])?,
        ),
        Finding::of(
            "p99 of a placed order, ms",
            number(&load["latency"]["placed"]["p99_ms"])?,
        ),
        Finding::of(
            "p99 of a refusal, ms",
            number(&load["latency"]["refused"]["p99_ms"])?,
        ),
    ])
}
