//! The surroundings of every process of a simulation: one clock, chance from a seed, threads that take turns, a
//! network with one database at its end, and the trace of all that happens.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use generator::{Generator, Gn};
use millrace::simulated::Surroundings;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use tokio::io::DuplexStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::spawn_local;
use tokio::time::Instant;

/// Wall clock at the start: 2027-01-15.
const WALL_MS: i64 = 1_800_000_000_000;
/// Stack of a thread, in words.
const STACK: usize = 0x1_0000;
/// Bytes on their way between a process and the database.
const IN_FLIGHT: usize = 1 << 18;
/// Lines of the trace that a failure shows.
const TAIL: usize = 40;

/// A door that is open or not. Those who wait are woken in the order in which they came; of tokio's `watch` it is a
/// random one.
#[derive(Default)]
pub struct Door {
    is_open: Cell<bool>,
    opened: Notify,
}

impl Door {
    pub fn set(&self, open: bool) {
        self.is_open.set(open);
        if open {
            self.opened.notify_waiters();
        }
    }

    /// Waits until it is open.
    pub async fn pass(&self) {
        while !self.is_open.get() {
            self.opened.notified().await;
        }
    }
}

/// Why a thread gives the turn away.
enum Pause {
    /// Until it is unparked, or for so long.
    Parked(Option<Duration>),
    /// For so long, whoever unparks it.
    Sleeps(Duration),
}

struct Thread {
    /// `None` while it runs, and after its end.
    body: RefCell<Option<Generator<'static, (), Pause>>>,
    unparked: Notify,
}

/// The world of one simulation.
pub struct World {
    start: Instant,
    wall_off_ms: Cell<i64>,
    random: RefCell<StdRng>,
    bug: Option<&'static str>,
    threads: RefCell<BTreeMap<u64, Rc<Thread>>>,
    next_thread: Cell<u64>,
    /// The thread that runs; 0 is the main one.
    current: Cell<u64>,
    dialed: mpsc::UnboundedSender<DuplexStream>,
    trace: RefCell<(Sha256, VecDeque<String>, u64)>,
    /// Why the simulation cannot go on.
    stopped: RefCell<Option<String>>,
    /// Whether the trace is printed.
    is_told: bool,
}

impl World {
    /// A world, and the connections that are made to its database.
    pub fn new(
        seed: u64,
        bug: Option<&'static str>,
    ) -> (Rc<Self>, mpsc::UnboundedReceiver<DuplexStream>) {
        let (dialed, connections) = mpsc::unbounded_channel();
        let world = World {
            start: Instant::now(),
            wall_off_ms: Cell::new(0),
            random: RefCell::new(StdRng::seed_from_u64(seed)),
            bug,
            threads: RefCell::default(),
            next_thread: Cell::new(1),
            current: Cell::new(0),
            dialed,
            trace: RefCell::new((Sha256::new(), VecDeque::new(), 0)),
            stopped: RefCell::default(),
            is_told: std::env::var_os("MILLRACE_TRACE").is_some(),
        };
        (Rc::new(world), connections)
    }

    /// Milliseconds since the start.
    pub fn ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// Sets the wall clock off.
    pub fn shift_wall(&self, ms: i64) {
        self.wall_off_ms.set(self.wall_off_ms.get() + ms);
    }

    /// Adds a line to the trace.
    pub fn note(&self, line: impl std::fmt::Display) {
        let line = format!("{:>9} {line}", self.ms());
        let mut trace = self.trace.borrow_mut();
        trace.0.update(line.as_bytes());
        trace.2 += 1;
        if self.is_told {
            eprintln!("{line}");
        }
        trace.1.push_back(line);
        if trace.1.len() > TAIL {
            trace.1.pop_front();
        }
    }

    /// The simulation cannot go on.
    pub fn stop(&self, why: String) {
        self.note(format_args!("stopped: {why}"));
        self.stopped.borrow_mut().get_or_insert(why);
    }

    pub fn why_stopped(&self) -> Option<String> {
        self.stopped.borrow().clone()
    }

    /// The trace in 64 bits, and its number of lines.
    pub fn digest(&self) -> (u64, u64) {
        let trace = self.trace.borrow();
        let digest = trace.0.clone().finalize();
        let first: [u8; 8] = digest[..8].try_into().expect("eight bytes");
        (u64::from_be_bytes(first), trace.2)
    }

    /// The last lines of the trace.
    pub fn tail(&self) -> String {
        let trace = self.trace.borrow();
        let lines: Vec<&str> = trace.1.iter().map(String::as_str).collect();
        lines.join("\n")
    }

    /// The number that the next thread will have.
    pub fn next_thread(&self) -> u64 {
        self.next_thread.get()
    }

    /// Ends threads in the midst of what they do.
    pub fn kill_threads(&self, numbers: std::ops::Range<u64>) {
        for number in numbers {
            let thread = self.threads.borrow_mut().remove(&number);
            if let Some(thread) = thread {
                let body = thread.body.borrow_mut().take();
                drop(body);
                thread.unparked.notify_one();
            }
        }
    }

    /// Lets the thread that runs sleep. The main one never does.
    pub fn sleep_here(&self, time: Duration) {
        if self.current.get() != 0 {
            give_way(Pause::Sleeps(time));
        }
    }

    /// Lets a thread go on to its next pause; `None` at its end.
    fn go_on(&self, number: u64) -> Option<Pause> {
        let thread = self.threads.borrow().get(&number).cloned()?;
        let mut body = thread.body.borrow_mut().take()?;
        let before = self.current.replace(number);
        let pause = body.resume();
        self.current.set(before);
        if pause.is_some() && !body.is_done() {
            *thread.body.borrow_mut() = Some(body);
            return pause;
        }
        self.threads.borrow_mut().remove(&number);
        None
    }

    /// Gives a thread its turns.
    async fn drive(self: Rc<Self>, number: u64, thread: Rc<Thread>) {
        while let Some(pause) = self.go_on(number) {
            match pause {
                Pause::Parked(None) => thread.unparked.notified().await,
                Pause::Parked(Some(limit)) => {
                    let _ = tokio::time::timeout(limit, thread.unparked.notified()).await;
                }
                Pause::Sleeps(time) => tokio::time::sleep(time).await,
            }
        }
    }
}

/// Gives the turn away, from wherever the thread is.
#[allow(
    deprecated,
    reason = "its successor needs the scope of the thread's first function, which a pause deep inside does not have"
)]
fn give_way(pause: Pause) {
    generator::yield_with(pause);
}

/// [`World`] as a process sees it.
pub struct Around(pub Rc<World>);

impl Surroundings for Around {
    fn now(&self) -> std::time::Instant {
        Instant::now().into_std()
    }

    fn start(&self) -> std::time::Instant {
        self.0.start.into_std()
    }

    fn wall_ms(&self) -> i64 {
        WALL_MS + self.0.ms() as i64 + self.0.wall_off_ms.get()
    }

    fn since_boot_ms(&self) -> u64 {
        1_000_000 + self.0.ms()
    }

    fn random(&self) -> u64 {
        self.0.random.borrow_mut().random()
    }

    fn has_bug(&self, name: &str) -> bool {
        self.0.bug == Some(name)
    }

    fn spawn(&self, _name: &str, work: Box<dyn FnOnce() + Send>) -> u64 {
        let world = &self.0;
        let number = world.next_thread.replace(world.next_thread.get() + 1);
        let body = Gn::<()>::new_opt(STACK, move || {
            work();
            generator::done()
        });
        let thread = Rc::new(Thread {
            body: RefCell::new(Some(body)),
            unparked: Notify::new(),
        });
        let known = Rc::clone(&thread);
        world.threads.borrow_mut().insert(number, known);
        spawn_local(Rc::clone(world).drive(number, thread));
        number
    }

    fn current(&self) -> u64 {
        self.0.current.get()
    }

    fn park(&self, limit: Option<Duration>) {
        assert_ne!(self.0.current.get(), 0, "the main thread parks");
        give_way(Pause::Parked(limit));
    }

    fn unpark(&self, thread: u64) {
        let thread = self.0.threads.borrow().get(&thread).cloned();
        if let Some(thread) = thread {
            thread.unparked.notify_one();
        }
    }

    fn join(&self, thread: u64) {
        for _ in 0..100_000 {
            if self.0.go_on(thread).is_none() {
                return;
            }
        }
        panic!("thread {thread} does not end");
    }

    fn dial(&self) -> DuplexStream {
        let (here, there) = tokio::io::duplex(IN_FLIGHT);
        // A world that ends lets nobody in.
        let _ = self.0.dialed.send(there);
        here
    }
}
