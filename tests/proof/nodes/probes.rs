//! One buyer in each lane who looks at an order all the time: how long a lane is closed, and whether what was acknowledged
//! in it is ever forgotten or followed by an earlier id.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace::order::{Lane, UserId};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

use crate::checker::{Checker, OrderRequest};
use crate::doors::{Caller, Doors};
use crate::load::place;

const THREADS: usize = 4;
/// Time between two looks at a lane.
const EVERY: Duration = Duration::from_millis(150);
/// How long an answer is waited for, at each door.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// How many looks, on average, until a lane's buyer is another one.
const LOOKS: u32 = 8;

/// The buyers.
pub struct Probes<'a> {
    pub checker: &'a Checker,
    pub doors: &'a Doors,
    pub sku: String,
    pub seed: u64,
    lanes: Vec<Mutex<Probe>>,
}

/// What is known of a lane.
#[derive(Default)]
struct Probe {
    /// The latest buyer and the order's id.
    latest: Option<(String, i64)>,
    /// Buyers so far.
    buyers: u64,
    /// When the last look that was answered was sent.
    open_at: Option<Instant>,
    /// Whether a look was not answered since.
    was_closed: bool,
    closed: Vec<Duration>,
    faults: Vec<String>,
}

impl Probe {
    /// Whether the last look was answered.
    fn is_open(&self) -> bool {
        self.open_at.is_some() && !self.was_closed
    }
}

impl<'a> Probes<'a> {
    pub fn new(checker: &'a Checker, doors: &'a Doors, sku: &str, seed: u64) -> Self {
        Probes {
            checker,
            doors,
            sku: sku.to_owned(),
            seed,
            lanes: Lane::all().map(|_| Mutex::default()).collect(),
        }
    }

    /// Looks until told to stop.
    pub fn run(&self, stop: &AtomicBool) {
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    let mut caller = Caller::with_patience(self.doors, PATIENCE);
                    let mut random = StdRng::seed_from_u64(self.seed ^ thread as u64);
                    while !stop.load(Ordering::Relaxed) {
                        let round = Instant::now();
                        for lane in Lane::all().skip(thread).step_by(THREADS) {
                            let probe = &self.lanes[usize::from(lane.get())];
                            let probe = &mut probe.lock().expect("a lane");
                            self.look(probe, lane, &mut caller, &mut random);
                        }
                        std::thread::sleep(EVERY.saturating_sub(round.elapsed()));
                    }
                });
            }
        });
    }

    /// Waits until every lane answers.
    pub fn until_open(&self) -> Result<(), String> {
        let deadline = Instant::now() + super::PATIENCE;
        for (lane, probe) in self.lanes.iter().enumerate() {
            while !probe.lock().expect("a lane").is_open() {
                if Instant::now() >= deadline {
                    return Err(format!("lane {lane} does not answer"));
                }
                std::thread::sleep(EVERY / 10);
            }
        }
        Ok(())
    }

    /// How long lanes were closed since the last call, and what was wrong.
    pub fn take(&self) -> (Vec<Duration>, Vec<String>) {
        let (mut closed, mut faults) = (Vec::new(), Vec::new());
        for probe in &self.lanes {
            let mut probe = probe.lock().expect("a lane");
            closed.append(&mut probe.closed);
            faults.append(&mut probe.faults);
            // Nobody looks until the next load.
            (probe.open_at, probe.was_closed) = (None, false);
        }
        (closed, faults)
    }

    fn look(&self, probe: &mut Probe, lane: Lane, caller: &mut Caller<'_>, random: &mut StdRng) {
        if probe.latest.is_none() || random.random_ratio(1, LOOKS) {
            self.buy(probe, lane, caller, random);
        }
        let Some((user, id)) = &probe.latest else {
            return;
        };
        let (target, sent) = (format!("/v1/users/{user}/orders"), Instant::now());
        let doors = self.doors.open().len();
        let first = random.random_range(0..usize::MAX - doors);
        let answer = (0..doors).find_map(|door| {
            let ask = |connection: &mut _| {
                crate::support::http::Connection::send(connection, "GET", &target, &[], "")
            };
            let answer = caller.call(first + door, ask).ok()?;
            (answer.status == 200).then_some(answer)
        });
        let Some(answer) = answer else {
            probe.was_closed = true;
            return;
        };
        let list = answer.json();
        let orders = list["orders"].as_array().map_or(&[][..], Vec::as_slice);
        let wanted = id.to_string();
        let is_it = |order: &Value| order["order_id"] == wanted;
        if !orders.iter().any(is_it) {
            probe
                .faults
                .push(format!("{id} of {user} is forgotten: {list}"));
        }
        if std::mem::take(&mut probe.was_closed)
            && let Some(open_at) = probe.open_at
        {
            probe.closed.push(open_at.elapsed());
        }
        probe.open_at = Some(sent);
    }

    /// Another buyer comes.
    fn buy(&self, probe: &mut Probe, lane: Lane, caller: &mut Caller<'_>, random: &mut StdRng) {
        let user = loop {
            probe.buyers += 1;
            let user = format!("probe-{:x}-{}-{}", self.seed, lane.get(), probe.buyers);
            if UserId::new(&user).is_ok_and(|id| Lane::of(&id) == lane) {
                break user;
            }
        };
        let request = OrderRequest {
            key: Some(format!("key-{user}")),
            user: user.clone(),
            sku: self.sku.clone(),
            quantity: 1,
            adjustment: 0,
            amount: self.checker.unit_price(&self.sku).expect("on sale"),
            attributes: None,
            waitlist: false,
        };
        let (door, is_async) = (random.random_range(0..usize::MAX), random.random_bool(0.5));
        let ask = |connection: &mut _| place(connection, self.checker, &request, is_async);
        let _ = caller.call(door, ask);
        let Some(id) = self.checker.order_id(&user) else {
            return;
        };
        if let Some((_, before)) = probe.latest
            && before >= id
        {
            probe.faults.push(format!(
                "{before} was acknowledged before {id}, which is less"
            ));
        }
        probe.latest = Some((user, id));
    }
}
