//! The same bytes to both engines: what the hardened one answers, and what stock minihttp lacks,
//! which docs/ENGINES.md shows as a table. Each engine runs in a process of its own, because
//! minihttp may hang or spin on some of them.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use support::engine::{Child, child};
use support::rules::{AFTER, Rule, Then, rules};

mod support {
    #![allow(dead_code, reason = "shared by several tests, each uses a part")]
    pub mod engine;
    pub mod rules;
}

/// The deadline of both engines. Only one of them keeps it.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(700);

/// Without an answer for this long, a client that is owed one waits in vain.
const SILENCE: Duration = Duration::from_millis(2_500);

/// An end to what is waited for in any case.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn engine_process() {
    child();
}

/// What one engine does with one rule.
fn outcome(address: SocketAddr, rule: &Rule) -> String {
    let mut stream = TcpStream::connect(address).expect("a connection");
    let mut input = rule.input.clone();
    if rule.then == Then::Another {
        input.push_str(AFTER);
    }
    stream.write_all(input.as_bytes()).expect("sent");
    if rule.then == Then::HalfClose {
        stream.shutdown(Shutdown::Write).expect("half-closed");
    }
    let mut raw = Vec::new();
    let mut chunk = [0; 65536];
    let started = Instant::now();
    loop {
        let told = told(&String::from_utf8_lossy(&raw));
        if told.last().is_some_and(|last| last == "200 /after") {
            return format!("{}, goes on", told.join(", "));
        }
        stream.set_read_timeout(Some(SILENCE)).expect("a timeout");
        let ends = match stream.read(&mut chunk) {
            Ok(0) => "closes",
            Ok(count) => {
                assert!(started.elapsed() < PATIENCE, "it never ends: {told:?}");
                raw.extend_from_slice(&chunk[..count]);
                continue;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => "waits",
            Err(error) if error.kind() == ErrorKind::ConnectionReset => "closes",
            Err(error) => panic!("{}: {error}", rule.name),
        };
        return told
            .into_iter()
            .chain([ends.to_owned()])
            .collect::<Vec<_>>()
            .join(", ");
    }
}

/// The statuses of the answers so far, those of the service with the target that it saw.
fn told(mut raw: &str) -> Vec<String> {
    let mut found = Vec::new();
    while let Some((head, rest)) = raw.split_once("\r\n\r\n") {
        let status = head.get(9..12).unwrap_or("no status");
        let length = head
            .lines()
            .filter_map(|line| line.split_once(": "))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .and_then(|(_, length)| length.parse().ok())
            .unwrap_or(0);
        let Some(body) = rest.get(..length) else {
            break;
        };
        let target = body.split(' ').next().unwrap_or_default();
        found.push(match status {
            "200" if target.len() > 20 => "200 (long target)".to_owned(),
            "200" => format!("200 {target}"),
            _ => status.to_owned(),
        });
        raw = &rest[length..];
    }
    found
}

fn outcomes(engine: &str, rules: &[Rule]) -> Vec<String> {
    let server = Child::start("engine_process", engine, REQUEST_TIMEOUT, None);
    // At the same time, because some of them wait for their silence to be long enough.
    std::thread::scope(|scope| {
        let running: Vec<_> = rules
            .iter()
            .map(|rule| scope.spawn(|| outcome(server.address, rule)))
            .collect();
        running
            .into_iter()
            .map(|one| one.join().expect("an outcome"))
            .collect()
    })
}

#[test]
fn each_engine_does_with_each_input_what_is_written() {
    let rules = rules();
    let mut wrong = String::new();
    for engine in ["hardened", "minihttp"] {
        for (rule, got) in rules.iter().zip(outcomes(engine, &rules)) {
            let written = match engine {
                "hardened" => rule.hardened,
                _ => rule.minihttp,
            };
            if written.split(" or ").all(|one| one != got) {
                let _ = writeln!(wrong, "{engine}: {}: {got:?}, not {written:?}", rule.name);
            }
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    for rule in &rules {
        assert_eq!(
            rule.lacks.is_empty(),
            rule.hardened == rule.minihttp,
            "{}",
            rule.name
        );
    }
}

#[test]
fn the_table_in_the_documentation_is_this_list() {
    let mut table =
        String::from("| input | `hardened` | `minihttp` | what it lacks |\n|---|---|---|---|\n");
    for rule in rules() {
        let _ = writeln!(
            table,
            "| {} | {} | {} | {} |",
            rule.name, rule.hardened, rule.minihttp, rule.lacks
        );
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/ENGINES.md");
    let page = std::fs::read_to_string(path).expect("docs/ENGINES.md");
    let (start, end) = (
        "<!-- table: tests/http_minihttp.rs -->\n",
        "<!-- end of table -->",
    );
    let (before, rest) = page.split_once(start).expect("where the table starts");
    let (written, after) = rest.split_once(end).expect("where the table ends");
    if written != table && std::env::var_os("MILLRACE_WRITE_DOCS").is_some() {
        std::fs::write(path, format!("{before}{start}{table}{end}{after}")).expect("written");
        return;
    }
    assert!(
        written == table,
        "docs/ENGINES.md is out of date: run this test with MILLRACE_WRITE_DOCS=1"
    );
}

#[test]
fn out_of_descriptors_the_hardened_engine_waits_and_minihttp_spins() {
    let busy = |engine: &str| {
        let server = Child::start("engine_process", engine, REQUEST_TIMEOUT, Some(64));
        let clients: Vec<_> = (0..80)
            .map(|_| TcpStream::connect(server.address).expect("the kernel queues it"))
            .collect();
        // As long as it takes to see; a spinning thread uses all of the processor that it gets.
        let (ticks, since) = (server.cpu_ticks(), Instant::now());
        while since.elapsed() < Duration::from_millis(1_500) {
            std::thread::sleep(Duration::from_millis(50));
        }
        drop(clients);
        server.cpu_ticks() - ticks
    };
    let (hardened, minihttp) = (busy("hardened"), busy("minihttp"));
    assert!(
        hardened * 4 < minihttp,
        "{hardened} ticks, and {minihttp} of minihttp"
    );
}
