//! A proof, and its last line.

use std::any::Any;
use std::io::IsTerminal as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime};

use super::checker::Findings;

/// A program that shows a promise to hold, as often as its count says.
pub struct Proof {
    /// Its name on the command line and in its line.
    pub name: &'static str,
    /// The unit of its count.
    pub counts: &'static str,
    /// The count for `cargo test`.
    pub short: u64,
    /// Runs it and returns its figures.
    pub run: fn(u64) -> Result<String, Why>,
}

/// Why a proof has no figures to pass with.
#[derive(Debug)]
pub enum Why {
    /// A promise was seen broken, or the proof itself could not go on.
    Failed(String),
    /// This machine lacks what the proof needs.
    NotRun(String),
}

impl From<String> for Why {
    fn from(why: String) -> Self {
        Why::Failed(why)
    }
}

/// Runs one, prints its line, and says whether nothing failed.
pub fn report(proof: &Proof, count: u64) -> bool {
    let name = proof.name;
    let outcome = catch_unwind(AssertUnwindSafe(|| (proof.run)(count)))
        .unwrap_or_else(|panic| Err(Why::Failed(words(&*panic))));
    let (line, held) = match outcome {
        Ok(figures) => (format!("PASS {name} {figures}"), true),
        Err(Why::Failed(why)) => (format!("FAIL {name} {why}"), false),
        Err(Why::NotRun(why)) => (format!("NOT RUN {name}: {why}"), true),
    };
    println!("{}", line.replace('\n', " | "));
    held
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("panicked").to_owned()
}

/// The seed of a proof's random choices: `MILLRACE_SEED`, or the time.
pub fn seed() -> u64 {
    if let Ok(text) = std::env::var("MILLRACE_SEED") {
        return text.parse().expect("MILLRACE_SEED: a number");
    }
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as u64)
}

/// Runs many cycles as series of at most `length`, each from an empty start and with a seed of its
/// own, and adds up their findings. `series` gets its seed, its cycles and a callback for its
/// progress; if it fails, the line says how to repeat it alone.
pub fn in_series(
    name: &str,
    cycles: u64,
    length: u64,
    mut series: impl FnMut(u64, u64, &(dyn Fn(u64) + Sync)) -> Result<Findings, String>,
) -> Result<String, String> {
    let (started, seed) = (Instant::now(), seed());
    let mut sum = Findings::default();
    for (number, first) in (0..cycles).step_by(length.max(1) as usize).enumerate() {
        let seed = seed.wrapping_add(number as u64);
        let length = length.min(cycles - first);
        let done = |cycle| progress(name, first + cycle, cycles, started.elapsed());
        let repeat = |why| format!("cycles={first}+{length} seed={seed} {why}");
        let findings = series(seed, length, &done).map_err(repeat)?;
        if !findings.holds() {
            return Err(repeat(findings.into_words()));
        }
        sum.add(&findings);
        if first + length < cycles {
            // What a long run has shown, if it is cut off.
            println!("{name} {}/{cycles}: {sum}", first + length);
        }
    }
    let seconds = started.elapsed().as_secs();
    Ok(format!(
        "cycles={cycles} {sum} seed={seed} seconds={seconds}"
    ))
}

/// Shows on a terminal how far a long one is.
fn progress(name: &str, done: u64, count: u64, since: Duration) {
    if std::io::stderr().is_terminal() {
        let left = since.as_secs_f64() / done.max(1) as f64 * (count - done) as f64;
        eprint!("\r{name} {done}/{count}, {left:.0} s left  \r");
    }
}

/// Runs queries to the database on a runtime of its own.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(future)
}
