//! The real binary under mixed load while its log breaks: on a full disk, in a pipe that nobody reads
//! or whose reader dies. Strangers send unsigned callbacks all the while and PostgreSQL dies once.
//! Everything that clients were told has to be true, and the end has to be an orderly one.

use std::fs::File;
use std::io::PipeReader;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::checker::{Checker, Findings};
use super::load::{Load, check};
use super::outcome::{Why, block_on, in_series};
use crate::support::http::Connection;
use crate::support::pipe;
use crate::support::served::{DataDir, OwnPostgres, PATIENCE, Served, command, end_postgres};
use crate::support::webhook::SECRET;

/// Ways in which a log breaks.
const BREAKS: [&str; 3] = ["full_disk", "nobody_reads", "reader_dies"];

/// Rounds of load with a log that breaks, each on an empty database.
pub fn run(rounds: u64) -> Result<String, Why> {
    if !cfg!(target_os = "linux") {
        return Err(Why::NotRun("only Linux has /dev/full".to_owned()));
    }
    let refused = AtomicU64::new(0);
    let mut number = 0;
    let figures = in_series("log", rounds, 1, |seed, _, done| {
        done(0);
        let way = BREAKS[number % BREAKS.len()];
        number += 1;
        round(seed, way, &refused).map_err(|why| format!("{way}: {why}"))
    })?;
    Ok(format!(
        "{figures} callbacks_refused={}",
        refused.into_inner()
    ))
}

/// A log in one of these ways, and who could still read it.
fn broken(way: &str) -> Result<(Stdio, Option<PipeReader>), String> {
    match way {
        "full_disk" => {
            let full = File::options().write(true).open("/dev/full");
            Ok((full.map_err(|e| format!("/dev/full: {e}"))?.into(), None))
        }
        "nobody_reads" => {
            let (reader, writer) = pipe::full();
            Ok((writer.into(), Some(reader)))
        }
        _ => {
            let (reader, writer) = std::io::pipe().map_err(|e| format!("a pipe: {e}"))?;
            Ok((writer.into(), Some(reader)))
        }
    }
}

fn round(seed: u64, way: &str, refused: &AtomicU64) -> Result<Findings, String> {
    let mut random = StdRng::seed_from_u64(seed);
    let data_dir = block_on(DataDir::fresh());
    let checker = Checker::new();
    let secret = "MILLRACE_PAYMENTS__STANDARD__SECRET";
    let settings = [(secret.to_owned(), SECRET.to_owned())];
    let (stderr, mut reader) = broken(way)?;
    let mut served = command(data_dir.path(), &settings);
    let served = Served::try_start_as(
        served.stderr(stderr),
        data_dir.path(),
        &data_dir.path().join("none.log"),
    );
    let served = served.map_err(|ended| format!("it does not start: {}", ended.status))?;
    let load = Load::prepare(&served, &checker, 0, &mut random)
        .map_err(|e| format!("no SKU can be put on sale: {e}"))?;
    let moments = [0; 2].map(|_| Duration::from_millis(random.random_range(50..400)));
    let stop = AtomicBool::new(false);
    let postgres = OwnPostgres::of(data_dir.path());
    std::thread::scope(|scope| {
        scope.spawn(|| load.run(&stop));
        let stranger = scope.spawn(|| knock(&served, &stop, refused));
        std::thread::sleep(moments[0]);
        if way == "reader_dies" {
            reader = None;
        }
        let died = postgres.pid().map(end_postgres);
        let mut outcome = died.ok_or("PostgreSQL does not run".to_owned());
        // The task that watches it starts it again, and then what waits becomes rows.
        let rows_written = || {
            let rows = served.metric("millrace_rows_written_total");
            rows.expect("a counter of rows")
        };
        let before = rows_written();
        let deadline = Instant::now() + PATIENCE;
        while outcome.is_ok() && rows_written() == before {
            if Instant::now() >= deadline {
                outcome = Err("nothing is written after PostgreSQL's death".to_owned());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(moments[1]);
        stop.store(true, Ordering::Relaxed);
        let strangers = stranger.join().unwrap_or(Err("panicked".to_owned()));
        outcome.and(strangers)
    })?;
    served.terminate();
    let code = served.wait();
    drop(reader);
    if code != Some(0) {
        return Err(format!("SIGTERM ended it with {code:?}"));
    }
    checker.server_is_gone();
    let served = Served::start(data_dir.path());
    let config = postgres.config().ok_or("PostgreSQL does not run")?;
    let findings = check(served.data, &checker, &config, seed);
    served.terminate();
    served.wait();
    Ok(findings)
}

/// Unsigned callbacks, one after the other, each of which has to be refused.
fn knock(served: &Served, stop: &AtomicBool, refused: &AtomicU64) -> Result<(), String> {
    let target = "/v1/payments/standard/notify";
    let mut connection = Connection::open(served.data).map_err(|e| e.to_string())?;
    while !stop.load(Ordering::Relaxed) {
        let answer = connection.send("POST", target, &[], "{}");
        match answer.map(|answer| answer.status) {
            Ok(401) => refused.fetch_add(1, Ordering::Relaxed),
            other => return Err(format!("an unsigned callback got {other:?}")),
        };
    }
    Ok(())
}
