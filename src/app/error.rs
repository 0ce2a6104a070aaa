//! Reasons why Millrace did not start.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::clock::ClockError;
use crate::config::{Config, ConfigError};
use crate::http::peers::key::KeyError;
use crate::pipeline::cluster::takeover::TakeoverError;
use crate::queue::log::broker::BrokerError;
use crate::queue::log::broker::reader::ReadError;
use crate::queue::log::file::JournalError;
use crate::store::StoreError;
use crate::store::embedded::EmbeddedError;

/// Reasons why Millrace did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened at.
    #[error(
        "cannot listen at {address} ({field}): {source}; stop what is there, or set another address"
    )]
    Listen {
        /// The setting.
        field: &'static str,
        /// Its value.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// `data_dir` cannot be used.
    #[error("cannot use data_dir {path}: {source}")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A directory cannot be used.
    #[error("cannot use {path} ({field}): {source}")]
    Directory {
        /// The setting.
        field: &'static str,
        /// Its value.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The key that signs receipts cannot be read or created.
    #[error("cannot use the key of receipts in {path}: {source}")]
    ReceiptKey {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A setting turned out to be invalid when it was used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A thread or socket could not be created.
    #[error("cannot start the data plane: {0}")]
    Engine(std::io::Error),
    /// The thread that delivers events could not be started.
    #[error("cannot start the delivery of events: {0}")]
    Events(std::io::Error),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(JournalError),
    /// The order log that may hold acknowledged orders is missing.
    #[error(
        "{title} ({noted}) may hold acknowledged orders that the database does not have yet, and it is not here: {found}. Start with the queue.backend and the settings that it was made with (a journal: queue.journal.dir where it is), so that it is emptied; or, if it is lost, give its orders up with `millrace queue abandon`"
    )]
    JournalAbsent {
        /// The name of the missing log.
        noted: String,
        /// Its name for people.
        title: String,
        /// The log found instead, if any.
        found: String,
    },
    /// Nodes that are gone have logs to which the settings do not lead.
    #[error(
        "nodes of a cluster have not left this database, and their order logs may hold acknowledged orders that it does not have yet: {logs}. The settings of this process do not lead there: {found}. Start it with the [queue] of the nodes; or start the nodes and let them leave; or, if a log is lost, give its orders up with `millrace queue abandon --node N --yes --process-is-gone`"
    )]
    LogsOfNodes {
        /// The nodes and their logs.
        logs: String,
        /// What the settings say instead.
        found: String,
    },
    /// The journal here was written for another database.
    #[error(
        "the journal in {directory} holds {records} orders, and this database does not know it: it belongs to another one. Correct database.url or queue.journal.dir, or move the directory away"
    )]
    JournalForeign {
        /// Its directory.
        directory: PathBuf,
        /// Number of records in it.
        records: u64,
    },
    /// The broker of the order log cannot be used.
    #[error("{title} cannot be used: {reason}")]
    Broker {
        /// Its name for people.
        title: String,
        /// The broker's answer.
        reason: BrokerError,
    },
    /// The broker's log cannot be taken over or read.
    #[error(transparent)]
    Log(#[from] ReadError),
    /// Every number of a node is taken.
    #[error(
        "all 64 numbers of nodes are taken by nodes that have not left; stop one of them, or let the logs of those that are gone be replayed"
    )]
    ClusterFull,
    /// The secret of the cluster cannot be used.
    #[error(transparent)]
    ClusterKey(#[from] KeyError),
    /// A node that was gone could not be taken over.
    #[error(transparent)]
    Takeover(#[from] TakeoverError),
    /// The clocks differ.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// Our own PostgreSQL did not start.
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A metric is invalid; a defect.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl StartError {
    pub(super) fn data_dir(config: &Config, source: std::io::Error) -> Self {
        StartError::DataDir {
            path: config.data_dir.clone(),
            source,
        }
    }
}

impl From<JournalError> for StartError {
    fn from(error: JournalError) -> Self {
        StartError::Journal(error)
    }
}
