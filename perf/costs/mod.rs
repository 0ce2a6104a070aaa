//! The service's cost of an order: processor time, system calls, context switches, without PostgreSQL and
//! the client.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::fixture::child::{Server, Service};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Flooded, Template, flood};
use crate::fixture::{Finding, Lab, Scratch, blocking};

const CONNECTIONS: usize = 512;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let server = Server::start(&scratch.dir("millrace")?, &[])?;
    server.put_sku(HOT, u32::MAX)?;
    server.put_sku("GONE", 0)?;
    let constant = Service::start("constant", None, None)?;
    let mut findings = Vec::new();
    let acknowledged = Template::order(HOT, "Prefer: respond-async\r\n");
    let cases = [
        ("constant answer", Template::order(HOT, ""), 200),
        ("waiting order", Template::order(HOT, ""), 201),
        (
            "acknowledged order",
            acknowledged.starting_at(1_000_000_000),
            202,
        ),
        (
            "sold-out answer",
            Template::order("GONE", "").starting_at(2_000_000_000),
            409,
        ),
    ];
    for (name, mut template, status) in cases {
        let (address, process) = match status {
            200 => (constant.address, &constant.process),
            _ => (server.data, &server.process),
        };
        let length = lab.window();
        blocking(|| flood(address, CONNECTIONS, length / 4, &mut template))?;
        let before = process.usage()?;
        let flooded: Flooded =
            blocking(|| flood(address, CONNECTIONS, length, &mut template)?.only(status))?;
        let after = process.usage()?;
        let answers = flooded.count(status) as f64;
        let micros = (after.cpu_seconds - before.cpu_seconds) * 1e6 / answers;
        findings.push(Finding::of(
            format!("processor time of the service for one {name}, µs"),
            micros,
        ));
        let switches = (after.switches - before.switches) as f64 / answers;
        findings.push(Finding::of(
            format!("context switches for one {name}"),
            switches,
        ));
        // Counting them slows it down, so that is a run of its own.
        let counting = count_system_calls(process.id(), length);
        let flooded =
            blocking(|| flood(address, CONNECTIONS, length, &mut template)?.only(status))?;
        if let Some(calls) = counting.and_then(Counting::finish) {
            let calls = calls / flooded.count(status) as f64;
            findings.push(Finding::of(format!("system calls for one {name}"), calls));
        } else {
            eprintln!("    system calls are not counted: perf may not do it here");
        }
    }
    server.audit()?;
    Ok(findings)
}

struct Counting(std::process::Child);

/// Counts them with Linux perf, if that is permitted.
fn count_system_calls(pid: u32, length: Duration) -> Option<Counting> {
    let seconds = (length.as_secs_f64() + 0.5).to_string();
    let child = Command::new("perf")
        .args([
            "stat",
            "-x",
            ",",
            "-e",
            "raw_syscalls:sys_enter",
            "-p",
            &pid.to_string(),
            "--",
            "sleep",
            &seconds,
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    // It has to be attached before the load begins.
    std::thread::sleep(Duration::from_millis(200));
    Some(Counting(child))
}

impl Counting {
    fn finish(self) -> Option<f64> {
        let done = self.0.wait_with_output().ok()?;
        let text = String::from_utf8_lossy(&done.stderr);
        text.lines()
            .find(|line| line.contains("sys_enter"))?
            .split(',')
            .next()?
            .parse()
            .ok()
    }
}
