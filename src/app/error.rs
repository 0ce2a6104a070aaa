//! Why Millrace did not start.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::clock::ClockError;
use crate::config::{Config, ConfigError};
use crate::queue::journal::JournalError;
use crate::store::StoreError;
use crate::store::embedded::EmbeddedError;

/// Why Millrace did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port cannot be had.
    #[error(
        "cannot listen at {address} ({field}): {source}; stop what is there, or set another address"
    )]
    Listen {
        /// Which setting.
        field: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// `data_dir` cannot be used.
    #[error("cannot use data_dir {path}: {source}")]
    DataDir {
        /// Which directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A directory cannot be used.
    #[error("cannot use {path} ({field}): {source}")]
    Directory {
        /// Which setting.
        field: &'static str,
        /// Its value.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The key that signs receipts cannot be read or made.
    #[error("cannot use the key of receipts in {path}: {source}")]
    ReceiptKey {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A setting that only shows at its use.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A thread or socket could not be made.
    #[error("cannot start the data plane: {0}")]
    Engine(std::io::Error),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(JournalError),
    /// The journal that may hold acknowledged orders is not here.
    #[error(
        "journal {noted} may hold acknowledged orders that the database does not have yet, and it is not here: {found}. Start with queue.backend = \"journal\" and queue.journal.dir where it is; or, if it is lost, give its orders up with `millrace journal abandon`"
    )]
    JournalAbsent {
        /// Its name.
        noted: String,
        /// What is here instead.
        found: String,
    },
    /// The journal here was written for another database.
    #[error(
        "the journal in {directory} holds {records} orders, and this database does not know it: it belongs to another one. Correct database.url or queue.journal.dir, or move the directory away"
    )]
    JournalForeign {
        /// Where it is.
        directory: PathBuf,
        /// How many records it has.
        records: u64,
    },
    /// The clocks do not agree.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// Our own PostgreSQL did not start.
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A metric's name; a defect.
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
