//! What happens to nodes, their database, their broker and their network.

use std::fmt;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use super::network::Link;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A node is killed and its machine lost; another machine comes in its place.
    Lost,
    /// A node is killed and started again on its directory.
    Killed,
    /// A node is paused for longer than its lease, and continued.
    Paused,
    /// A node is cut off from the first, the second and the third of these: the database, the broker, its peers.
    CutOff(bool, bool, bool),
    /// PostgreSQL is stopped without warning and started again.
    DatabaseRestarted,
    /// All processes of PostgreSQL are stopped for a while, with SIGSTOP.
    DatabaseStalled,
    /// The database's machine is lost, and its synchronous standby takes its place.
    FailedOver,
    /// The broker is killed and started again.
    BrokerKilled,
    /// A node is lost, and the node that takes it over is killed in the middle of that.
    SurvivorKilled,
    /// A node hands its lanes over, and one is killed meanwhile.
    KilledHandingOver,
    /// All nodes are replaced in an orderly way, one after the other.
    RollingRestart,
    /// Two machines of three are lost.
    TwoLost,
    /// All machines are lost.
    AllLost,
}

impl Fault {
    const ALL: [Self; 18] = [
        Fault::Lost,
        Fault::Killed,
        Fault::Paused,
        Fault::CutOff(true, false, false),
        Fault::CutOff(false, true, false),
        Fault::CutOff(false, false, true),
        Fault::CutOff(true, true, false),
        Fault::CutOff(true, false, true),
        Fault::CutOff(false, true, true),
        Fault::DatabaseRestarted,
        Fault::DatabaseStalled,
        Fault::FailedOver,
        Fault::BrokerKilled,
        Fault::SurvivorKilled,
        Fault::KilledHandingOver,
        Fault::RollingRestart,
        Fault::TwoLost,
        Fault::AllLost,
    ];

    /// The links that it cuts.
    pub fn links(self) -> Vec<Link> {
        let Fault::CutOff(database, broker, peers) = self else {
            return Vec::new();
        };
        let links = [
            (database, Link::Database),
            (broker, Link::Broker),
            (peers, Link::Peers),
        ];
        let cut = links.into_iter().filter(|(is_cut, _)| *is_cut);
        cut.map(|(_, link)| link).collect()
    }

    /// The fault of this name, as [`fmt::Display`] writes it.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|fault| fault.to_string() == name)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Lost => f.write_str("lost"),
            Fault::Killed => f.write_str("killed"),
            Fault::Paused => f.write_str("paused"),
            Fault::CutOff(..) => {
                let links: Vec<String> = self.links().iter().map(Link::to_string).collect();
                write!(f, "cut_off_{}", links.join("+"))
            }
            Fault::DatabaseRestarted => f.write_str("database_restarted"),
            Fault::DatabaseStalled => f.write_str("database_stalled"),
            Fault::FailedOver => f.write_str("failed_over"),
            Fault::BrokerKilled => f.write_str("broker_killed"),
            Fault::SurvivorKilled => f.write_str("survivor_killed"),
            Fault::KilledHandingOver => f.write_str("killed_handing_over"),
            Fault::RollingRestart => f.write_str("rolling_restart"),
            Fault::TwoLost => f.write_str("two_lost"),
            Fault::AllLost => f.write_str("all_lost"),
        }
    }
}

/// First those of the short form, then all faults, in one random order after the other.
pub struct Deck(Vec<Fault>);

impl Default for Deck {
    fn default() -> Self {
        Deck(vec![Fault::RollingRestart, Fault::Paused, Fault::Lost])
    }
}

impl Deck {
    /// The next fault.
    pub fn next(&mut self, random: &mut StdRng) -> Fault {
        if self.0.is_empty() {
            self.0.extend(Fault::ALL);
            self.0.shuffle(random);
        }
        self.0.pop().expect("there are faults")
    }
}
