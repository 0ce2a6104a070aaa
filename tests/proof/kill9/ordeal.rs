//! A process and its broker while orders come in: one of them dies, or both, or the network between them, or the
//! machine of the process.

use std::fmt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;

use crate::support::brokers::{Broker, Kind, Setup};
use crate::support::wire::{Fault, Way, Wire};

/// Most bytes that still pass to the broker before the network breaks: those of a few groups.
const UP_MAX: u64 = 50_000;
/// The same from the broker, which answers briefly.
const DOWN_MAX: u64 = 1_000;
/// How long that may take.
const STRIKE_PATIENCE: Duration = Duration::from_secs(2);

/// The worst that happens before the process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordeal {
    /// Nothing.
    Process,
    /// The broker is killed, and comes back while the process runs.
    Broker,
    /// The broker is killed, and comes back after the process has died.
    Both,
    /// The connections to the broker are cut at a byte, or go silent there.
    Network,
    /// The machine of the process will be lost with it.
    Machine,
}

impl Ordeal {
    const ALL: [Self; 5] = [
        Ordeal::Process,
        Ordeal::Broker,
        Ordeal::Both,
        Ordeal::Network,
        Ordeal::Machine,
    ];

    pub fn choose(random: &mut StdRng, has_broker: bool) -> Self {
        match has_broker {
            true => Self::ALL[random.random_range(0..Self::ALL.len())],
            false => Ordeal::Process,
        }
    }
}

/// How often each came about.
#[derive(Default)]
pub struct Ordeals([u64; Ordeal::ALL.len()]);

impl fmt::Display for Ordeals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [process, broker, both, network, machine] = self.0;
        write!(
            f,
            "killed: process={process} broker={broker} both={both} network={network} machine={machine}"
        )
    }
}

impl Ordeals {
    pub fn count(&mut self, ordeal: Ordeal) {
        self.0[ordeal as usize] += 1;
    }
}

/// A broker behind a proxy.
pub struct Backend {
    broker: Broker,
    wire: Wire,
}

impl Backend {
    pub fn start(kind: Kind) -> Self {
        let started = Wire::before_broker(kind, Setup::default());
        let (wire, broker) = started.expect("it was found out that it can be had");
        Backend { broker, wire }
    }

    /// The settings with which Millrace keeps its log in it.
    pub fn env(&self) -> &[(String, String)] {
        self.broker.env()
    }

    /// Does what the process has to live with until it is killed. Says whether it came about; `load` is how long there
    /// is load before and after it.
    pub fn suffer(&mut self, ordeal: Ordeal, load: Duration, random: &mut StdRng) -> bool {
        let pause = Duration::from_millis(random.random_range(0..400));
        match ordeal {
            Ordeal::Process | Ordeal::Machine => {}
            Ordeal::Broker => {
                self.broker.kill9();
                sleep(pause);
                self.broker.start_again();
                sleep(load);
            }
            Ordeal::Both => {
                self.broker.kill9();
                sleep(pause);
            }
            Ordeal::Network => {
                let (way, most) =
                    [(Way::Up, UP_MAX), (Way::Down, DOWN_MAX)][random.random_range(0..2)];
                let fault = [Fault::Cut, Fault::Silence][random.random_range(0..2)];
                self.wire.arm(way, random.random_range(0..most), fault);
                let deadline = Instant::now() + STRIKE_PATIENCE;
                while !self.wire.has_struck() && Instant::now() < deadline {
                    sleep(Duration::from_millis(1));
                }
                sleep(pause);
                let struck = self.wire.heal();
                sleep(load);
                return struck;
            }
        }
        true
    }

    /// Runs again, whatever it has suffered.
    pub fn recover(&mut self) {
        self.broker.start_again();
    }
}
