//! The order log before the database: a journal is read and checked first, so that damage stops a start before
//! anything is changed; a broker is asked for its settings. A broker's log is read after the database was taken
//! over, because only then the marker in it keeps other processes out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::{StartError, brokers};
use crate::config::{Backend, Config};
use crate::http::control_plane::ControlPlane;
use crate::order::UnixMillis;
use crate::queue::log::broker::{
    BeforeStart, Broker, BrokerError, Known, Owner, PATIENCE, Position, TakenOver, while_away,
};
use crate::queue::log::file::Opened;
use crate::queue::log::record::Record;
use crate::store::postgres::NodeLease;
use crate::store::postgres::order_log::NotedLog;

/// Interval of progress reports.
const PROGRESS: Duration = Duration::from_secs(1);
/// Least length of a broker's longest message, in bytes: the longest order has some 1,300.
const FRAME_MIN: usize = 64 << 10;

/// An order log that is not taken over yet.
#[derive(Debug)]
pub(super) enum FoundLog {
    /// A journal, read and checked.
    Journal(Opened),
    /// A broker, checked.
    Broker {
        broker: Arc<dyn Broker>,
        /// Derived from backend and stream or topic: another place is another log.
        name: String,
    },
}

/// An order log whose records can be replayed.
#[derive(Debug)]
pub(super) enum OwnedLog {
    Journal(Opened),
    Broker(BeforeStart),
    /// Replayed.
    TakenOver(TakenOver),
}

impl FoundLog {
    /// The log's name in the database, 32 hexadecimal digits.
    pub(super) fn name(&self) -> String {
        match self {
            FoundLog::Journal(opened) => opened.identity.name(),
            FoundLog::Broker { name, .. } => name.clone(),
        }
    }

    /// The log's name for people.
    pub(super) fn title(&self) -> String {
        match self {
            FoundLog::Journal(_) => "the journal".to_owned(),
            FoundLog::Broker { broker, .. } => broker.title(),
        }
    }

    /// All order ids of the log lie before this moment, as far as is known before it is taken over.
    pub(super) fn id_high_water(&self) -> UnixMillis {
        match self {
            FoundLog::Journal(opened) => opened.scanned.id_high_water,
            FoundLog::Broker { .. } => UnixMillis(0),
        }
    }

    /// The log in the hands of this process, which owns `database` with `lease`.
    pub(super) fn owned(
        self,
        database: [u8; 16],
        lease: NodeLease,
        noted: Option<&NotedLog>,
    ) -> OwnedLog {
        match self {
            FoundLog::Journal(opened) => OwnedLog::Journal(opened),
            FoundLog::Broker { broker, name } => {
                let noted = noted.filter(|noted| noted.name == name);
                OwnedLog::Broker(BeforeStart {
                    broker,
                    owner: Owner {
                        database,
                        node: lease.node as u16,
                    },
                    epoch: lease.epoch as u64,
                    known: Known {
                        in_use: noted.is_some_and(|noted| noted.in_use),
                        place: noted.and_then(|noted| noted.place),
                    },
                    patience: PATIENCE,
                })
            }
        }
    }
}

impl OwnedLog {
    /// Number of records to replay, if it is known.
    pub(super) fn total(&self) -> Option<u64> {
        match self {
            OwnedLog::Journal(opened) => Some(opened.scanned.records),
            OwnedLog::Broker(_) => None,
            OwnedLog::TakenOver(taken) => Some(taken.records),
        }
    }

    /// Takes it over and passes every record that the database may lack to `each`, in the order of writing.
    pub(super) fn records(self, each: impl FnMut(Record)) -> Result<Self, StartError> {
        match self {
            OwnedLog::Journal(opened) => {
                opened.records(each)?;
                Ok(OwnedLog::Journal(opened))
            }
            OwnedLog::Broker(before) => Ok(OwnedLog::TakenOver(before.take_over(each)?)),
            taken @ OwnedLog::TakenOver(_) => Ok(taken),
        }
    }

    /// The marker of a broker's log, once it is taken over: everything before it is settled.
    pub(super) fn marker(&self) -> Option<Position> {
        match self {
            OwnedLog::TakenOver(taken) => Some(taken.marker),
            OwnedLog::Journal(_) | OwnedLog::Broker(_) => None,
        }
    }

    /// All order ids of the log lie before this moment.
    pub(super) fn id_high_water(&self) -> UnixMillis {
        match self {
            OwnedLog::Journal(opened) => opened.scanned.id_high_water,
            OwnedLog::Broker(_) => UnixMillis(0),
            OwnedLog::TakenOver(taken) => taken.id_high_water,
        }
    }
}

/// Opens, reads and checks the log of a node as far as that changes nothing; `None` if the queue is volatile. A process
/// that is no node of a cluster is node 0.
pub(super) async fn find(
    config: &Config,
    control: &ControlPlane,
    node: u8,
) -> Result<Option<FoundLog>, StartError> {
    match config.queue.backend {
        Backend::Memory => return Ok(None),
        Backend::Journal => return journal(config, control).await.map(Some),
        Backend::Redis | Backend::Kafka | Backend::RocketMq => {}
    }
    control.progress("asking the broker of the order log".to_owned());
    let config = config.clone();
    let found = tokio::task::spawn_blocking(move || broker(&config, node)).await;
    let (broker, name) =
        found.map_err(|panic| StartError::Engine(std::io::Error::other(panic)))??;
    Ok(Some(FoundLog::Broker { broker, name }))
}

/// The broker of a node's log, checked, and the log's name. Blocks.
pub(super) fn broker(config: &Config, node: u8) -> Result<(Arc<dyn Broker>, String), StartError> {
    let broker = brokers::client(config, node)?;
    for warning in checked(&*broker)? {
        tracing::warn!("{}: {warning}", broker.title());
    }
    Ok((broker, name_of(config, node)))
}

/// The name of a node's log on a broker, derived from backend and place.
pub(super) fn name_of(config: &Config, node: u8) -> String {
    let backend = config.queue.backend;
    // Node 0 has the names of releases that knew no other.
    let numbered = |topic: String| match node {
        0 => topic,
        node => format!("{topic}\0{node}"),
    };
    let place = match backend {
        Backend::Memory | Backend::Journal => String::new(),
        Backend::Redis => config.redis_stream(node),
        Backend::Kafka => numbered(config.kafka_topic()),
        Backend::RocketMq => numbered(config.rocketmq_topic()),
    };
    let digest = Sha256::digest(format!("{backend:?}\0{place}"));
    let name = digest[..16].iter().map(|byte| format!("{byte:02x}"));
    name.collect()
}

/// Checks the broker's settings. A broker that is away is waited for.
fn checked(broker: &dyn Broker) -> Result<Vec<String>, StartError> {
    let checked = while_away(PATIENCE, || broker.check()).and_then(|checked| {
        if broker.frame_max() < FRAME_MIN {
            return Err(BrokerError::Refused(format!(
                "it takes messages of {} bytes, and {FRAME_MIN} are needed",
                broker.frame_max()
            )));
        }
        Ok(checked.warnings)
    });
    checked.map_err(|reason| StartError::Broker {
        title: broker.title(),
        reason,
    })
}

async fn journal(config: &Config, control: &ControlPlane) -> Result<FoundLog, StartError> {
    let (directory, bytes_max) = (config.journal_dir(), config.queue.journal.bytes_max);
    let started = Instant::now();
    let telling = control.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let mut told = Instant::now();
        Opened::at(&directory, bytes_max, rand::random(), |done, of| {
            telling.progress(format!("reading the journal: {done} of {of} segments"));
            if told.elapsed() > PROGRESS {
                told = Instant::now();
                tracing::info!(segments = done, of, "reading the journal");
            }
        })
    })
    .await
    .map_err(|panic| StartError::Engine(std::io::Error::other(panic)))??;
    let scanned = &opened.scanned;
    tracing::info!(
        journal = opened.identity.name(),
        records = scanned.records,
        segments = scanned.segments.len(),
        torn_sectors = scanned.torn_sectors,
        ms = started.elapsed().as_millis() as u64,
        "read the journal"
    );
    Ok(FoundLog::Journal(opened))
}

/// Compares the log found with the log recorded in the database.
pub(super) fn check(
    config: &Config,
    found: Option<&FoundLog>,
    noted: Option<&NotedLog>,
) -> Result<(), StartError> {
    let ours = found.map(FoundLog::name);
    let directory = config.journal_dir();
    if let Some(noted) = noted.filter(|noted| noted.in_use && ours.as_ref() != Some(&noted.name)) {
        return Err(StartError::JournalAbsent {
            noted: noted.name.clone(),
            title: noted.title.clone(),
            found: match found {
                None => "queue.backend is memory".to_owned(),
                Some(FoundLog::Journal(opened)) => {
                    format!(
                        "{} has journal {}",
                        directory.display(),
                        opened.identity.name()
                    )
                }
                Some(broker) => format!("the settings name {}", broker.title()),
            },
        });
    }
    if let Some(FoundLog::Journal(opened)) = found
        && opened.scanned.records > 0
        && noted.map(|noted| &noted.name) != ours.as_ref()
    {
        return Err(StartError::JournalForeign {
            directory,
            records: opened.scanned.records,
        });
    }
    Ok(())
}
