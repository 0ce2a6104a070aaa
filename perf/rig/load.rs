//! Millrace's own open-loop generator, `millrace load`, in a process of its own.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

/// What to send.
#[derive(Clone, Debug)]
pub struct Load {
    /// Requests a second.
    pub rate: f64,
    /// For so many seconds.
    pub seconds: f64,
    /// `wait`, `async` or `mixed`.
    pub mode: &'static str,
    /// Connections.
    pub connections: usize,
    /// Whose orders: other buyers for another seed.
    pub seed: u64,
    /// Anything else that `millrace load` takes.
    pub more: Vec<String>,
}

/// Sends it and gives the report.
///
/// # Errors
/// Where the generator says nothing.
pub fn load(target: SocketAddr, sku: &str, load: &Load) -> anyhow::Result<Report> {
    let program = std::env::current_exe()?.with_file_name("millrace");
    let mut command = Command::new(program);
    command
        .args([
            "load",
            "--json",
            "--target",
            &format!("http://{target}"),
            "--sku",
            sku,
        ])
        .args(["--rate", &load.rate.round().to_string()])
        .args(["--duration", &load.seconds.to_string()])
        .args(["--mode", load.mode])
        .args(["--connections", &load.connections.to_string()])
        .args(["--seed", &load.seed.to_string()])
        .args(&load.more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let done = command.output().context("cannot start millrace load")?;
    let report: Value =
        serde_json::from_slice(&done.stdout).context("millrace load gave no report")?;
    ensure!(
        report["answers"].is_array(),
        "a report without answers: {report}"
    );
    Ok(Report(report))
}

/// What the generator reports.
pub struct Report(pub Value);

impl Report {
    fn answer(&self, kind: &str) -> Option<&Value> {
        self.0["answers"]
            .as_array()?
            .iter()
            .find(|row| row["kind"] == kind)
    }

    /// Answers of a kind, such as `created` or `timed_out`.
    pub fn count(&self, kind: &str) -> u64 {
        self.answer(kind)
            .and_then(|row| row["count"].as_u64())
            .unwrap_or(0)
    }

    /// A figure of the whole.
    ///
    /// # Errors
    /// Where there is none.
    pub fn number(&self, name: &str) -> anyhow::Result<f64> {
        self.0[name]
            .as_f64()
            .with_context(|| format!("the report has no {name}"))
    }

    /// A percentile of a kind's latency, such as `p99_ms`, from the moment that each request was due.
    ///
    /// # Errors
    /// Where there was no such answer.
    pub fn latency_ms(&self, kind: &str, percentile: &str) -> anyhow::Result<f64> {
        self.answer(kind)
            .and_then(|row| row["latency"][percentile].as_f64())
            .with_context(|| format!("no {kind} was answered: {}", self.0["codes"]))
    }
}
