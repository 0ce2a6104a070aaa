//! The log on a broker, beside a simulated broker that answers late or not at all, is away, full, or fails over to
//! a replica that lags: what was acknowledged is what the next process reads, and no process acknowledges anything
//! behind a later one's marker.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use millrace::queue::log::broker::reader::ReadError;
use millrace::queue::log::broker::{
    BeforeStart, Broker, BrokerError, BrokerLimits, Checked, Known, Owner, Place, Position,
    SendError, Stored,
};
use millrace::queue::log::record::{GroupBytes, Record};
use millrace::queue::log::{AppendError, Log};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::journal_fixture::order;
use super::outcome::{Why, seed};

/// Steps of one life of a log.
const STEPS: usize = 120;
const OWNER: Owner = Owner {
    database: [3; 16],
    node: 0,
};

/// `count` is the number of lives.
pub fn run(count: u64) -> Result<String, Why> {
    let seed = seed();
    let mut figures = Figures::default();
    for life in 0..count {
        // Each kind of broker, with and without failovers.
        let (fences, fails_over) = (life % 2 == 0, life % 4 >= 2);
        World::new(seed.wrapping_add(life), fences, fails_over)
            .live(&mut figures)
            .map_err(|why| {
                Why::Failed(format!(
                    "life {life} (fences={fences} fails_over={fails_over}) seed={seed}: {why}"
                ))
            })?;
    }
    let Figures {
        acked,
        unknown,
        takeovers,
        fenced,
        failovers,
        lost_again,
        stops,
        looks,
    } = figures;
    Ok(format!(
        "lives={count} acked={acked} unknown={unknown} takeovers={takeovers} fenced={fenced} failovers={failovers} \
         appended_again={lost_again} stops={stops} looks={looks} lost=0 acked_behind_a_marker=0 seed={seed}"
    ))
}

#[derive(Default)]
struct Figures {
    acked: u64,
    unknown: u64,
    takeovers: u64,
    fenced: u64,
    failovers: u64,
    lost_again: u64,
    stops: u64,
    looks: u64,
}

/// One process's client of a broker with one log.
#[derive(Debug)]
struct SimBroker {
    fences: bool,
    inner: Arc<Mutex<Inner>>,
    /// The server that it is connected to; 0 for none.
    server: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    rng: StdRng,
    /// Offset, place and frame.
    entries: Vec<(u64, Place, Vec<u8>)>,
    next_offset: u64,
    /// Sent, and not stored yet.
    in_transit: Vec<(Place, Vec<u8>)>,
    /// The server that leads; a failover makes it the next one.
    server: u64,
    is_calm: bool,
}

impl Inner {
    fn store(&mut self, fences: bool, place: Place, frame: &[u8]) -> Result<u64, SendError> {
        let top = self.entries.iter().map(|(_, place, _)| *place).max();
        if fences && top.is_some_and(|top| place <= top) {
            let same = |entry: &&(u64, Place, Vec<u8>)| entry.1 == place && entry.2 == frame;
            return match self.entries.iter().find(same) {
                Some(_) => Ok(0),
                None => Err(SendError::Stale(format!("{place}"))),
            };
        }
        let offset = self.next_offset;
        self.next_offset += 1;
        self.entries.push((offset, place, frame.to_vec()));
        Ok(if fences { 0 } else { offset })
    }

    fn arrive(&mut self, fences: bool) {
        while !self.in_transit.is_empty() && self.rng.random_bool(0.3) {
            let (place, frame) = self.in_transit.remove(0);
            let _ = self.store(fences, place, &frame);
        }
    }
}

impl Broker for SimBroker {
    fn check(&self) -> Result<Checked, BrokerError> {
        let mut inner = self.inner.lock().unwrap();
        if !inner.is_calm && inner.rng.random_bool(0.1) {
            return Err(BrokerError::Away("simulated".to_owned()));
        }
        Ok(Checked {
            warnings: Vec::new(),
            is_anew: self.server.swap(inner.server, Ordering::Relaxed) != inner.server,
        })
    }

    fn send(&self, place: Place, frame: &[u8]) -> Result<u64, SendError> {
        let mut inner = self.inner.lock().unwrap();
        inner.arrive(self.fences);
        if self.server.load(Ordering::Relaxed) != inner.server {
            return Err(SendError::Away("not connected".to_owned()));
        }
        let fate = if inner.is_calm {
            0
        } else {
            inner.rng.random_range(0..100)
        };
        match fate {
            0..80 => inner.store(self.fences, place, frame),
            80..84 => {
                self.server.store(0, Ordering::Relaxed);
                Err(SendError::Away("simulated".to_owned()))
            }
            84..87 => Err(SendError::Full("simulated".to_owned())),
            fate => {
                self.server.store(0, Ordering::Relaxed);
                if fate < 92 {
                    let _ = inner.store(self.fences, place, frame);
                } else if fate < 96 {
                    inner.in_transit.push((place, frame.to_vec()));
                }
                Err(SendError::Unknown("simulated".to_owned()))
            }
        }
    }

    fn read(&self, after: Option<Position>, _bytes_max: usize) -> Result<Vec<Stored>, BrokerError> {
        let mut inner = self.inner.lock().unwrap();
        inner.arrive(self.fences);
        if !inner.is_calm && inner.rng.random_bool(0.05) {
            return Err(BrokerError::Away("simulated".to_owned()));
        }
        let most = inner.rng.random_range(1..5);
        let behind = inner
            .entries
            .iter()
            .filter(|(offset, place, _)| match after {
                None => true,
                Some(after) if self.fences => *place > after.place,
                Some(after) => *offset > after.offset,
            });
        let stored = behind.take(most).map(|(offset, place, frame)| Stored {
            offset: if self.fences { 0 } else { *offset },
            place: self.fences.then_some(*place),
            frame: frame.clone(),
        });
        Ok(stored.collect())
    }

    fn forget(&self, _before: Position) -> Result<(), BrokerError> {
        Ok(())
    }

    fn frame_max(&self) -> usize {
        1 << 20
    }

    fn title(&self) -> String {
        "the simulated broker".to_owned()
    }

    fn fences(&self) -> bool {
        self.fences
    }
}

/// A process with the log.
struct Process {
    log: Log,
    broker: Arc<SimBroker>,
    epoch: u64,
    /// Number of the last group that was acknowledged; 0: the marker alone.
    appended: u64,
    /// The order of the group in doubt.
    doubt: Option<u64>,
    /// Why it appends nothing any more.
    ended: Option<String>,
}

struct World {
    rng: StdRng,
    fences: bool,
    inner: Arc<Mutex<Inner>>,
    fails_over: bool,
    /// The newest is the last.
    processes: Vec<Process>,
    epoch: u64,
    known: Known,
    acked: HashSet<u64>,
    rows: HashSet<u64>,
    /// Acknowledged, and lost in a failover after which no process has appended yet.
    excused: HashSet<u64>,
    /// First sent by a process behind the marker of a later one.
    stale: HashSet<u64>,
    failed_over: bool,
    next_id: u64,
}

impl World {
    fn new(seed: u64, fences: bool, fails_over: bool) -> Self {
        World {
            rng: StdRng::seed_from_u64(seed),
            fences,
            inner: Arc::new(Mutex::new(Inner {
                rng: StdRng::seed_from_u64(!seed),
                entries: Vec::new(),
                next_offset: 0,
                in_transit: Vec::new(),
                server: 1,
                is_calm: false,
            })),
            fails_over,
            processes: Vec::new(),
            epoch: 0,
            known: Known {
                in_use: false,
                place: None,
            },
            acked: HashSet::new(),
            rows: HashSet::new(),
            excused: HashSet::new(),
            stale: HashSet::new(),
            failed_over: false,
            next_id: 1,
        }
    }

    fn live(mut self, figures: &mut Figures) -> Result<(), String> {
        for _ in 0..STEPS {
            match self.rng.random_range(0..100) {
                0..6 => self.take_over(figures)?,
                6..10 if self.fails_over => self.fail_over(figures),
                10..13 => self.stop(figures),
                28..40 if !self.processes.is_empty() => self.look(figures)?,
                // A process that was replaced, and does not know it.
                13..28 if self.processes.len() > 1 && !self.fails_over => {
                    let older = self.rng.random_range(0..self.processes.len() - 1);
                    self.append(older, figures)?;
                }
                _ => match self.processes.len() {
                    0 => self.take_over(figures)?,
                    count => self.append(count - 1, figures)?,
                },
            }
        }
        // The last process finds everything, once nothing fails any more.
        self.inner.lock().unwrap().is_calm = true;
        self.take_over(figures)
    }

    fn take_over(&mut self, figures: &mut Figures) -> Result<(), String> {
        self.epoch += 1;
        let broker = Arc::new(SimBroker {
            fences: self.fences,
            inner: Arc::clone(&self.inner),
            server: AtomicU64::new(0),
        });
        let _ = broker.check();
        let before = BeforeStart {
            broker: Arc::clone(&broker) as Arc<dyn Broker>,
            owner: OWNER,
            epoch: self.epoch,
            known: self.known,
            patience: Duration::ZERO,
        };
        let mut found = HashSet::new();
        let taken = before.take_over(|record| {
            if let Record::Order(order) = record {
                found.insert(order.id.get());
            }
        });
        let taken = match taken {
            Ok(taken) => taken,
            // As a process that does not come up.
            Err(ReadError::Broker(_)) if !self.inner.lock().unwrap().is_calm => return Ok(()),
            Err(error) if self.failed_over => {
                // Loud, and an operator's matter: nothing more can be told of this life.
                self.start_anew();
                let _ = error;
                return Ok(());
            }
            Err(error) => return Err(format!("cannot be taken over: {error}")),
        };
        figures.takeovers += 1;
        if let Some(id) = found.iter().find(|id| self.stale.contains(id)) {
            return Err(format!(
                "{id} was sent behind a later process's marker and is read back"
            ));
        }
        self.rows.extend(found);
        let lost: Vec<_> = self
            .acked
            .iter()
            .filter(|id| !self.rows.contains(id) && !self.excused.contains(id))
            .collect();
        if !lost.is_empty() {
            return Err(format!("acknowledged and not read back: {lost:?}"));
        }
        self.acked.clear();
        self.excused.clear();
        self.failed_over = false;
        self.known = Known {
            in_use: true,
            place: Some(taken.marker),
        };
        self.processes.push(Process {
            broker,
            epoch: taken.marker.place.epoch,
            appended: 0,
            log: taken.start(BrokerLimits {
                bytes_max: 1 << 30,
                retain: Duration::ZERO,
                retain_for_slots: false,
            }),
            doubt: None,
            ended: None,
        });
        Ok(())
    }

    /// The newest process ends in an orderly way: every order is settled. Sometimes another backend is used for a
    /// while, after which the database does not know the place any more.
    fn stop(&mut self, figures: &mut Figures) {
        let is_alone = self.processes.len() == 1;
        let Some(process) = self.processes.last_mut() else {
            return;
        };
        if process.doubt.is_some() || process.ended.is_some() || !self.excused.is_empty() {
            return;
        }
        figures.stops += 1;
        let place = process.log.shared.last_position();
        let is_closed = process.log.shared.erase().is_ok();
        process.ended = Some("stopped".to_owned());
        self.rows.extend(self.acked.drain());
        let is_forgotten = is_closed && is_alone && self.rng.random_bool(0.3);
        self.known = Known {
            in_use: false,
            place: place.filter(|_| !is_forgotten),
        };
    }

    /// The newest process compares a part of what it has appended. What it calls whole has to be there, unless the broker has
    /// failed over since: the next append finds the connection gone.
    fn look(&mut self, figures: &mut Figures) -> Result<(), String> {
        let Some(process) = self.processes.last_mut() else {
            return Ok(());
        };
        if process.doubt.is_some() || process.ended.is_some() {
            return Ok(());
        }
        match process.log.writer.look() {
            Ok(false) | Err(AppendError::NotNow(_) | AppendError::Unknown(_)) => {}
            Ok(true) => {
                figures.looks += 1;
                let inner = self.inner.lock().unwrap();
                if process.broker.server.load(Ordering::Relaxed) != inner.server {
                    return Ok(());
                }
                let epoch = process.epoch;
                let places = inner.entries.iter().map(|(_, place, _)| place);
                let present: HashSet<u64> = places
                    .filter(|place| place.epoch == epoch)
                    .map(|place| place.number)
                    .collect();
                if let Some(number) = (1..=process.appended).find(|one| !present.contains(one)) {
                    return Err(format!(
                        "group {epoch}-{number} is gone, and a look found the log whole"
                    ));
                }
                self.excused.clear();
            }
            Err(AppendError::Final(why)) => self.give_up(self.processes.len() - 1, why, figures)?,
        }
        Ok(())
    }

    /// A process appends nothing any more. The newest one has to have a reason.
    fn give_up(&mut self, which: usize, why: String, figures: &mut Figures) -> Result<(), String> {
        let is_newest = which + 1 == self.processes.len();
        if is_newest && !self.failed_over && self.epoch_is_ours(&why) {
            return Err(format!("the newest process gives up: {why}"));
        }
        figures.fenced += u64::from(!self.failed_over);
        self.processes[which].ended = Some(why);
        Ok(())
    }

    fn append(&mut self, which: usize, figures: &mut Figures) -> Result<(), String> {
        let is_newest = which + 1 == self.processes.len();
        let process = &mut self.processes[which];
        if process.ended.is_some() {
            return if is_newest && self.rng.random_bool(0.3) {
                self.take_over(figures)
            } else {
                Ok(())
            };
        }
        let id = process.doubt.unwrap_or(self.next_id);
        if id == self.next_id {
            self.next_id += 1;
            if !is_newest {
                self.stale.insert(id);
            }
        }
        let order = order(id, &mut self.rng);
        let mut group = GroupBytes::default();
        group.begin(1, 1);
        group.push_order(&order);
        let permit = process.log.shared.reserve(2_000).ok_or("no room")?;
        if process.doubt.is_none() {
            let _ = process.log.writer.room(2_000);
        }
        match process.log.writer.append(&group.group(), permit.sectors()) {
            Ok(at) => {
                let _ = permit.spend();
                process.appended = at.place;
                if !is_newest {
                    return Err(format!(
                        "{id} was acknowledged behind a later process's marker"
                    ));
                }
                process.doubt = None;
                figures.acked += 1;
                self.acked.insert(id);
                if !self.excused.is_empty() {
                    figures.lost_again += self.excused.len() as u64;
                    self.excused.clear();
                }
            }
            Err(AppendError::NotNow(_)) => {}
            Err(AppendError::Unknown(_)) => {
                figures.unknown += 1;
                process.doubt = Some(id);
            }
            Err(AppendError::Final(why)) => self.give_up(which, why, figures)?,
        }
        Ok(())
    }

    /// Whether no later process has tried to take the log over: one that did not come up may have left its marker.
    fn epoch_is_ours(&self, why: &str) -> bool {
        !why.contains("another process has taken")
    }

    fn fail_over(&mut self, figures: &mut Figures) {
        let mut inner = self.inner.lock().unwrap();
        if inner.entries.is_empty() {
            return;
        }
        figures.failovers += 1;
        self.failed_over = true;
        let left = inner.entries.len() - self.rng.random_range(1..=inner.entries.len().min(3));
        inner.entries.truncate(left);
        inner.next_offset = inner.entries.last().map_or(0, |(offset, ..)| offset + 1);
        inner.in_transit.clear();
        inner.server += 1;
        drop(inner);
        self.excused.extend(&self.acked);
    }

    /// As after `millrace queue abandon`, with another log.
    fn start_anew(&mut self) {
        let mut inner = self.inner.lock().unwrap();
        inner.entries.clear();
        inner.in_transit.clear();
        inner.next_offset = 0;
        drop(inner);
        self.processes.clear();
        self.known = Known {
            in_use: false,
            place: None,
        };
        self.acked.clear();
        self.excused.clear();
        self.failed_over = false;
    }
}
