//! T7: the service's cost of an order, processor time and system calls, without PostgreSQL and the client; beside a
//! constant answer by the same HTTP engine.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::fixture::child::{Server, Service};
use crate::fixture::compare::{Rounds, alternate};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, flood};
use crate::fixture::{Finding, Lab, Scratch, Target, blocking};

const CONNECTIONS: usize = 512;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let server = Server::start(&scratch.dir("millrace")?, &[])?;
    server.put_sku(HOT, u32::MAX)?;
    server.put_sku("GONE", 0)?;
    let constant = Service::start("constant", None, None)?;
    let accepted = Template::order(HOT, "Prefer: respond-async\r\n");
    let mut sides = [
        (Template::order(HOT, ""), 200),
        (Template::order(HOT, ""), 201),
        (accepted.starting_at(1_000_000_000), 202),
        (Template::order("GONE", "").starting_at(2_000_000_000), 409),
    ];
    let of = |status| match status {
        200 => (constant.address, &constant.process),
        _ => (server.data, &server.process),
    };
    let window = lab.window();
    for (template, status) in &mut sides {
        blocking(|| flood(of(*status).0, CONNECTIONS, window / 4, template))?;
    }
    let names = [
        "constant answer, µs",
        "waiting order, µs",
        "accepted order, µs",
        "sold-out answer, µs",
    ];
    let rounds: Rounds<4> = alternate(lab.rounds(), names, async |side| {
        let (template, status) = &mut sides[side];
        let (address, process) = of(*status);
        let before = process.usage()?.cpu_seconds;
        let flooded = blocking(|| flood(address, CONNECTIONS, window, template)?.only(*status))?;
        if *status == 202 {
            // Its orders are written meanwhile or now.
            server.audit()?;
        }
        let spent = process.usage()?.cpu_seconds - before;
        Ok(spent * 1e6 / flooded.count(*status) as f64)
    })
    .await?;
    let mut findings = vec![
        Finding::spread("processor time of the service: a waiting order / a constant answer", rounds.ratio(1, 0))
            .against("T7", Target::AtMost(1.9)),
        Finding::spread("processor time of the service: an accepted order, until it is a row / a constant answer", rounds.ratio(2, 0))
            .against("T7a", Target::AtMost(2.5)),
        Finding::spread("processor time of the service: a sold-out answer / a constant answer", rounds.ratio(3, 0))
            .against("T7b", Target::AtMost(1.1)),
    ];
    for (side, name) in names.into_iter().enumerate() {
        findings.push(Finding::spread(
            format!("processor time of the service for one {name}"),
            rounds.side(side),
        ));
    }
    // Counting them slows it down, so that is a run of its own.
    for ((template, status), name) in sides.iter_mut().zip(names) {
        let (address, process) = of(*status);
        let counting = count_system_calls(process.id(), window);
        let flooded = blocking(|| flood(address, CONNECTIONS, window, template)?.only(*status))?;
        if let Some(calls) = counting.and_then(Counting::finish) {
            let calls = calls / flooded.count(*status) as f64;
            let what = name.trim_end_matches(", µs");
            findings.push(Finding::of(format!("system calls for one {what}"), calls));
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
