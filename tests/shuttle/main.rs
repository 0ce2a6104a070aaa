//! The larger pieces under random schedules: the whole journal as a queue, and orders in flight with
//! their deadlines. `tests/loom.rs` runs the small lock-free pieces through every interleaving.
//!
//! `src/queue` and `src/state/pending` are compiled here once more, with `crate::sync` being
//! shuttle's primitives. shuttle knows sequential consistency alone; weaker orders are loom's part.
//!
//! ```sh
//! cargo test --test shuttle                                       # every model
//! MILLRACE_SCHEDULES=100000 cargo test --test shuttle -- journal   # those with this word in their names
//! MILLRACE_SEED=7 cargo test --test shuttle                       # what a line with seed=7 has shown
//! ```

#![allow(
    dead_code,
    unused_imports,
    reason = "the models use a part of these files; the crate's own build checks the rest"
)]

// Where the files below look for them.
use millrace::{backoff, clock, faults, metrics, order};

#[path = "../../src/state/pending/mod.rs"]
mod pending;
#[path = "../../src/queue/mod.rs"]
mod queue;
mod state {
    pub(crate) use crate::pending;
}
mod sync;

mod disk;
mod journal;
mod waiting;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::time::{Instant, SystemTime};

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// Something that threads do together, and what must hold whoever goes first.
struct Model {
    name: &'static str,
    run: fn(),
    /// Defects of `faults::BUGS` that it has to find.
    finds: &'static [&'static str],
}

const MODELS: &[Model] = &[
    Model {
        name: "journal_orders_go_through_memory_and_disk",
        run: journal::orders_go_through_memory_and_disk,
        finds: &["lost_wake_up", "ack_before_sync"],
    },
    Model {
        name: "journal_segments_are_kept_until_a_standby_confirms",
        run: journal::segments_are_kept_until_a_standby_confirms,
        finds: &["retire_before_commit"],
    },
    Model {
        name: "journal_two_workers_share_what_comes",
        run: journal::two_workers_share_what_comes,
        finds: &[],
    },
    Model {
        name: "journal_a_stop_in_the_midst_leaves_nobody_without_an_answer",
        run: journal::a_stop_in_the_midst_leaves_nobody_without_an_answer,
        finds: &["no_sync"],
    },
    Model {
        name: "journal_after_a_failed_sync_orders_still_reach_a_worker",
        run: journal::after_a_failed_sync_orders_still_reach_a_worker,
        finds: &["reuse_failed_file"],
    },
    Model {
        name: "waiting_orders_are_written_or_given_up",
        run: waiting::orders_are_written_or_given_up,
        finds: &[],
    },
    Model {
        name: "waiting_no_deadline_is_missed",
        run: waiting::no_deadline_is_missed,
        finds: &[],
    },
    Model {
        name: "waiting_whoever_asks_late_is_woken",
        run: waiting::whoever_asks_late_is_woken,
        finds: &[],
    },
];

/// Schedules of each model.
const SCHEDULES: usize = 1_000;
/// In which a planted defect has to show.
const SCHEDULES_TO_FIND: usize = 2_000;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let chosen = |model: &&Model| {
        words.is_empty() || words.iter().any(|word| model.name.contains(word.as_str()))
    };
    if std::env::args().any(|word| word == "--list") {
        MODELS
            .iter()
            .for_each(|model| println!("{}: test", model.name));
        return ExitCode::SUCCESS;
    }
    let schedules = number("MILLRACE_SCHEDULES").map_or(SCHEDULES, |count| count as usize);
    // Shuttle's own words on a failure are long; the line has what repeats it.
    let seed = number("MILLRACE_SEED").unwrap_or_else(of_the_moment);
    let has_defect = std::env::var_os("MILLRACE_FAULT").is_some();
    let mut held = true;
    for model in MODELS.iter().filter(chosen) {
        held &= report(model, schedules, seed);
        if !has_defect {
            held &= model.finds.iter().all(|defect| finds(model, defect));
        }
    }
    if held {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}: a number")),
    )
}

fn of_the_moment() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as u64)
}

/// Runs a model and prints its line.
fn report(model: &Model, schedules: usize, seed: u64) -> bool {
    let started = Instant::now();
    let outcome = catch_unwind(|| {
        // Half of them switch anywhere, half a few times at the worst of places ("A Randomized
        // Scheduler with Probabilistic Guarantees of Finding Bugs", Burckhardt et al., 2010).
        let anywhere = RandomScheduler::new_from_seed(seed, schedules.div_ceil(2));
        explore(anywhere, model.run);
        explore(
            PctScheduler::new_from_seed(seed, 3, schedules / 2),
            model.run,
        );
    });
    let (name, seconds) = (model.name, started.elapsed().as_secs_f32());
    match &outcome {
        Ok(()) => println!("PASS {name} schedules={schedules} seed={seed} seconds={seconds:.1}"),
        Err(panic) => println!(
            "FAIL {name} seed={seed} {}",
            words(&**panic).replace('\n', " | ")
        ),
    }
    outcome.is_ok()
}

fn explore(scheduler: impl Scheduler + 'static, model: fn()) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.failure_persistence = FailurePersistence::None;
    // A thread that waits for what never comes goes round until then.
    config.max_steps = MaxSteps::FailAfter(200_000);
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(model);
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("panicked").to_owned()
}

/// Whether a model finds a defect, in a process of its own.
fn finds(model: &Model, defect: &str) -> bool {
    let output = Command::new(std::env::current_exe().expect("this program"))
        .arg(model.name)
        .env("MILLRACE_FAULT", format!("bug@{defect}"))
        .env("MILLRACE_SCHEDULES", SCHEDULES_TO_FIND.to_string())
        .output()
        .expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.lines().any(|line| line.starts_with("FAIL"));
    let name = model.name;
    if found {
        println!("PASS {name} finds {defect}");
    } else {
        println!("FAIL {name} does not find {defect}: {text}");
    }
    found
}
