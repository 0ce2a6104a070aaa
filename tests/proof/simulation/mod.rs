//! A node under virtual time: intake, queue and journal, workers, payments, expiry, waiting lists, leases and recovery,
//! with a simulated disk, network, database and clocks, and a fault every few simulated seconds. What decides is the
//! very code; see `docs/PROOF.md` for what is not in it.
//!
//! * `world`: clocks, chance, threads that take turns, and the trace;
//! * `postgres`: a server that speaks PostgreSQL's protocol and knows our statements;
//! * `disk`: a disk that fails, and loses at a crash what was not synced;
//! * `process`: Millrace without its servers;
//! * `shop`: buyers and a payment platform;
//! * `operators`: who mends what PostgreSQL refuses, and records refunds;
//! * `faults`: what happens, and when;
//! * `judge`: what was promised, beside the rows.

mod disk;
mod faults;
mod judge;
mod operators;
mod postgres;
mod process;
mod shop;
mod world;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep};

use self::disk::Files;
use self::faults::Figures;
use self::judge::Judge;
use self::postgres::Server;
use self::process::Process;
use self::world::{Around, Door, World};
use super::outcome::{Why, seed};
use millrace::queue::DurableQueue;
use millrace::simulated;

/// Rounds of a seed, each of trouble and calm.
const ROUNDS: u32 = 4;
const TROUBLE: Duration = Duration::from_secs(240);
/// In which everything has to come to rest.
const CALM: Duration = Duration::from_secs(120);

/// Defects that it has to find, each within [`SEEDS_TO_FIND`] seeds.
const DEFECTS: &[&str] = &[
    "ack_before_sync",
    "skip_a_replay",
    "hold_without_checking",
    "keep_expired_units",
    "pay_after_the_deadline",
    "guess_the_commit",
    "answer_before_commit",
    "no_sync",
    "sell_what_is_parked",
    "forget_a_retry",
    "refund_again",
];
const SEEDS_TO_FIND: u64 = 10;

thread_local! {
    static WORLD: RefCell<Option<Rc<World>>> = const { RefCell::new(None) };
}

/// Does something with the world of this thread, if it has one.
fn here<T>(work: impl FnOnce(&World) -> T) -> Option<T> {
    let world = WORLD.with(|world| world.borrow().clone())?;
    Some(work(&world))
}

/// One simulation.
pub struct Sim {
    world: Rc<World>,
    server: Rc<Server>,
    judge: RefCell<Judge>,
    process: RefCell<Option<Rc<Process>>>,
    /// The files of the machine while no process runs.
    files: RefCell<Files>,
    random: RefCell<StdRng>,
    /// Closed in a calm.
    gate: Door,
    failure: RefCell<Option<String>>,
    figures: RefCell<Figures>,
    with_failovers: bool,
}

impl Sim {
    fn chance<T>(&self, choose: impl FnOnce(&mut StdRng) -> T) -> T {
        choose(&mut self.random.borrow_mut())
    }

    fn judge<T>(&self, ask: impl FnOnce(&mut Judge) -> T) -> T {
        ask(&mut self.judge.borrow_mut())
    }

    fn process(&self) -> Option<Rc<Process>> {
        self.process.borrow().clone()
    }

    fn server(&self) -> &Server {
        &self.server
    }

    fn note(&self, line: impl std::fmt::Display) {
        self.world.note(line);
    }

    fn wall_ms(&self) -> i64 {
        use millrace::simulated::Surroundings;
        Around(Rc::clone(&self.world)).wall_ms()
    }

    /// A promise is broken.
    fn fail(&self, why: String) {
        self.note(format_args!("FAILED {why}"));
        self.failure.borrow_mut().get_or_insert(why);
    }

    fn has_failed(&self) -> bool {
        if let Some(why) = self.world.why_stopped() {
            self.failure.borrow_mut().get_or_insert(why);
        }
        self.failure.borrow().is_some()
    }

    /// Waits while nobody may do anything.
    async fn gate(&self) {
        self.gate.pass().await;
    }

    async fn live(self: &Rc<Self>) {
        spawn_local(Rc::clone(self).keep_running());
        spawn_local(Rc::clone(self).crowd());
        spawn_local(Rc::clone(self).decide_on_letters());
        spawn_local(Rc::clone(self).refund());
        for round in 0..ROUNDS {
            self.note(format_args!("round {round}"));
            self.gate.set(true);
            let until = Instant::now() + TROUBLE;
            self.server.set_loses_answers(true);
            let kept = self.refuse_at_the_end();
            while Instant::now() < until && !self.has_failed() {
                self.trouble_until(until).await;
            }
            if kept.is_some() {
                self.mend(kept);
                self.calm(kept).await;
            }
            self.mend(None);
            self.calm(None).await;
            if self.has_failed() {
                return;
            }
        }
    }

    /// Waits until nothing is on its way, and compares everything. `kept`: a SKU whose counters are refused still.
    async fn calm(self: &Rc<Self>, kept: Option<i32>) {
        self.note(format_args!("calm, without {kept:?}"));
        self.gate.set(false);
        let until = Instant::now() + CALM;
        let mut last = String::from("nothing came to rest");
        while Instant::now() < until && !self.has_failed() {
            sleep(Duration::from_millis(500)).await;
            let Some((process, at)) = self.at_rest() else {
                continue;
            };
            sleep(Duration::from_millis(300)).await;
            if self.at_rest().map(|(_, at)| at) != Some(at) {
                continue;
            }
            let now_ms = process.state.ids.real_now().0;
            let verdict = self.server.look(|rows| {
                let has_refused = |id| self.server.has_refused(id);
                self.judge(|judge| judge.calm(rows, &process.state, now_ms, kept, has_refused))
            });
            match verdict {
                Ok(()) => {
                    self.note(format_args!("at rest, {} commits", self.server.commits()));
                    return;
                }
                Err(why) if why == last => {}
                Err(why) => {
                    self.note(format_args!("not yet: {why}"));
                    last = why;
                }
            }
        }
        let process = self.process();
        let parts = process.map(|process| {
            (
                process.state.pending.len(),
                process.queue.outstanding(),
                process.state.row_changes.at_rest(),
                process.queue.failure(),
            )
        });
        self.fail(format!(
            "{last}; in flight, in the journal, at rest, failure: {parts:?}"
        ));
    }

    /// The process, and all that tells whether anything has moved since.
    fn at_rest(&self) -> Option<(Rc<Process>, (u64, u64))> {
        let process = self.process()?;
        let changes = process.state.row_changes.at_rest()?;
        let is_idle = process.state.pending.is_empty()
            && process.queue.outstanding() == 0
            && process.canceller.in_doubt().is_empty();
        is_idle.then(|| (process, (changes, self.server.commits())))
    }
}

/// What one seed came to.
struct Lived {
    digest: (u64, u64),
    virtual_ms: u64,
    figures: Figures,
    commits: u64,
    promised: u64,
}

/// Lives one seed. The error has the trace's end.
fn live(seed: u64, bug: Option<&'static str>) -> Result<Lived, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let lived = LocalSet::new().block_on(&runtime, async move {
        let (world, mut connections) = World::new(seed, bug);
        let server = Server::new(StdRng::seed_from_u64(seed ^ 0xdb));
        WORLD.set(Some(Rc::clone(&world)));
        let around = simulated::enter(Rc::new(Around(Rc::clone(&world))));
        server.sell(shop::skus());
        let accepting = Rc::clone(&server);
        let accepting = spawn_local(async move {
            while let Some(stream) = connections.recv().await {
                accepting.accept(stream);
            }
        });
        let sim = Rc::new(Sim {
            world: Rc::clone(&world),
            server,
            judge: RefCell::default(),
            process: RefCell::default(),
            files: RefCell::default(),
            random: RefCell::new(StdRng::seed_from_u64(seed ^ 0x5107)),
            gate: Door::default(),
            failure: RefCell::default(),
            figures: RefCell::default(),
            with_failovers: seed % 2 == 1,
        });
        sim.live().await;
        sim.end();
        accepting.abort();
        let lived = Lived {
            digest: world.digest(),
            virtual_ms: world.ms(),
            figures: sim.figures.borrow().clone(),
            commits: sim.server.commits(),
            promised: sim.judge(|judge| judge.promised),
        };
        let failure = sim.failure.borrow().clone();
        let tail = world.tail();
        drop((around, sim, world));
        WORLD.set(None);
        match failure {
            None => Ok(lived),
            Some(why) => Err(format!("{why}\n{tail}")),
        }
    });
    drop(runtime);
    lived
}

/// Lives one seed; a panic is a failure.
fn judged(seed: u64, bug: Option<&'static str>) -> Result<Lived, String> {
    catch_unwind(AssertUnwindSafe(|| live(seed, bug))).unwrap_or_else(|panic| {
        WORLD.set(None);
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(text.unwrap_or_else(|| "panicked".to_owned()))
    })
}

/// `count` is the number of seeds.
pub fn run(count: u64) -> Result<String, Why> {
    let first = seed();
    let started = std::time::Instant::now();
    let next = AtomicU64::new(0);
    let sum = Mutex::new(Ok::<_, String>(Sum::default()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(count.max(1) as usize) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count || sum.lock().expect("no panic").is_err() {
                        return;
                    }
                    let seed = first.wrapping_add(number);
                    let lived = judged(seed, None).and_then(|lived| {
                        if number == 0 {
                            same_again(seed, &lived)?;
                        }
                        Ok(lived)
                    });
                    let mut sum = sum.lock().expect("no panic");
                    match (lived, &mut *sum) {
                        (Ok(lived), Ok(sum)) => sum.add(&lived),
                        (Err(why), sum @ Ok(_)) => *sum = Err(format!("seed={seed} {why}")),
                        (_, Err(_)) => {}
                    }
                }
            });
        }
    });
    let sum = sum.into_inner().expect("no panic")?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(sum.words(count, first, seconds))
}

/// `count` is the number of planted defects that have to be found; `MILLRACE_BUG` names a single one. Says in which seed
/// each was.
pub fn run_defects(count: u64) -> Result<String, Why> {
    let started = std::time::Instant::now();
    let _quiet = Quiet::begin();
    let only = std::env::var("MILLRACE_BUG").ok();
    let is_wanted = |bug: &&&str| only.as_deref().is_none_or(|only| only == **bug);
    let wanted = DEFECTS.iter().filter(is_wanted).take(count as usize);
    let wanted: Vec<&'static str> = wanted.copied().collect();
    let next = AtomicU64::new(0);
    let found = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(bug) = wanted.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let mut seeds = 1..=SEEDS_TO_FIND;
                    let seed = seeds.find(|seed| judged(*seed, Some(bug)).is_err());
                    eprintln!("{bug}: {seed:?}");
                    found.lock().expect("no panic").push((*bug, seed));
                }
            });
        }
    });
    let mut found = found.into_inner().expect("no panic");
    found.sort();
    let words = |(bug, seed): &(&str, Option<u64>)| match seed {
        Some(seed) => Ok(format!("{bug}={seed}")),
        None => Err(format!("{bug} is not found within {SEEDS_TO_FIND} seeds")),
    };
    let words: Result<Vec<String>, String> = found.iter().map(words).collect();
    let (words, seconds) = (words?.join(" "), started.elapsed().as_secs());
    Ok(format!("found={} {words} seconds={seconds}", found.len()))
}

/// While it lives, panics on threads without a name, which are a simulation's, are not printed: they are findings.
struct Quiet;

impl Quiet {
    fn begin() -> Self {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().name().is_some() {
                before(panic);
            }
        }));
        Quiet
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        drop(std::panic::take_hook());
    }
}

/// The same seed gives the same trace.
fn same_again(seed: u64, lived: &Lived) -> Result<(), String> {
    let again = judged(seed, None)?;
    match again.digest == lived.digest {
        true => Ok(()),
        false => Err(format!(
            "two runs of one seed differ: {:x?} and {:x?}",
            lived.digest, again.digest
        )),
    }
}

#[derive(Default)]
struct Sum {
    virtual_ms: u64,
    figures: Figures,
    commits: u64,
    promised: u64,
    lines: u64,
}

impl Sum {
    fn add(&mut self, lived: &Lived) {
        self.virtual_ms += lived.virtual_ms;
        self.figures.add(&lived.figures);
        self.commits += lived.commits;
        self.promised += lived.promised;
        self.lines += lived.digest.1;
    }

    fn words(&self, count: u64, first: u64, seconds: f64) -> String {
        let minutes = self.virtual_ms as f64 / 60_000.0;
        format!(
            "seeds={count} simulated_minutes={minutes:.0} per_real_minute={:.0} faults={} per_simulated_minute={:.1} \
             {} commits={} promised={} broken=0 seed={first} seconds={seconds:.0}",
            minutes / (seconds / 60.0).max(0.001),
            self.figures.all(),
            self.figures.all() as f64 / minutes.max(0.001),
            self.figures,
            self.commits,
            self.promised,
        )
    }
}
