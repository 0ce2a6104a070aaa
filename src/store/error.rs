//! What can go wrong with the database, and what may be tried again.

use std::time::Duration;

use tokio_postgres::error::SqlState;

/// What can go wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The server cannot be reached or refuses to talk.
    #[error("cannot connect to the database: {}", chain(.0))]
    Connect(#[source] tokio_postgres::Error),
    /// A statement failed.
    #[error("{doing}: {}", chain(.source))]
    Statement {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: tokio_postgres::Error,
    },
    /// A step took longer than `database.step_timeout_ms`.
    #[error("{doing}: no answer from the database within {} ms", .after.as_millis())]
    Timeout {
        /// What was tried.
        doing: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// No pooled connection came free.
    #[error("no connection to the database came free: {0}")]
    Pool(String),
    /// The schema is not what this release expects.
    #[error("{0}")]
    Schema(String),
    /// Another process has taken this node over.
    #[error(
        "another Millrace has taken over this database (epoch {found}, ours is {ours}); this one must stop"
    )]
    Fenced {
        /// The epoch in the database.
        found: i64,
        /// This process's.
        ours: i64,
    },
    /// Another process is active on this database.
    #[error(
        "another Millrace is active on this database{0}; stop it first, or give this one a database.schema of its own"
    )]
    AlreadyActive(String),
    /// What is stored contradicts itself or this release.
    #[error("unexpected data in the database: {0}")]
    Data(String),
}

/// An error with its causes in one line: the driver's own text is only "db error".
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl StoreError {
    /// Wraps a statement's error with what was tried.
    pub fn statement(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> StoreError {
        move |source| StoreError::Statement { doing, source }
    }

    /// Whether trying again later may help without anybody's doing.
    pub fn is_transient(&self) -> bool {
        match self {
            StoreError::Connect(_) | StoreError::Timeout { .. } | StoreError::Pool(_) => true,
            StoreError::Statement { source, .. } => !refuses_row(source),
            StoreError::Schema(_)
            | StoreError::Fenced { .. }
            | StoreError::AlreadyActive(_)
            | StoreError::Data(_) => false,
        }
    }
}

/// Whether the server has judged the data itself, so that the same data will fail again: classes
/// 22 (data exception), 23 (integrity), 44 (check option), 54 (program limit) and P0 (raised by a
/// trigger). Everything else, missing rights and tables included, is the server's state, which a
/// person can mend while the batch waits.
///
/// Source: PostgreSQL documentation, appendix A, "PostgreSQL Error Codes".
pub(super) fn refuses_row(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|state| {
        matches!(
            state.code().get(..2),
            Some("22" | "23" | "44" | "54" | "P0")
        )
    })
}

/// The five characters of an error's SQLSTATE.
pub(super) fn sqlstate(error: &tokio_postgres::Error) -> &str {
    error.code().map_or("", SqlState::code)
}
