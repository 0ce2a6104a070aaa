//! Errors of the database, and which of them are worth a retry.

use std::time::Duration;

use tokio_postgres::error::SqlState;

/// An error of the database or of the way to it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The server cannot be reached or refuses to talk.
    #[error("cannot connect to the database: {}{}", chain(.0), remedy(.0))]
    Connect(#[source] tokio_postgres::Error),
    /// `database.url` is invalid, or names an unusable file.
    #[error("database.url: {0}")]
    Url(String),
    /// A pooler lends our sessions to other clients between transactions.
    #[error(
        "database.url leads through a pooler that shares sessions between transactions, and Millrace keeps state in its sessions; let it pool sessions (PgBouncer: pool_mode = session) or connect to PostgreSQL directly"
    )]
    SharedSessions,
    /// The server takes no writes in our sessions.
    #[error("database.url leads to {0}")]
    ReadOnly(&'static str),
    /// A statement failed.
    #[error("{doing}: {}", chain(.source))]
    Statement {
        /// The step that failed.
        doing: &'static str,
        /// The driver's error.
        source: tokio_postgres::Error,
    },
    /// A step took longer than `database.step_timeout_ms`.
    #[error("{doing}: no answer from the database within {} ms", .after.as_millis())]
    Timeout {
        /// The step that failed.
        doing: &'static str,
        /// The time limit that passed.
        after: Duration,
    },
    /// No pooled connection became free.
    #[error("no connection to the database became free: {0}")]
    Pool(String),
    /// The schema does not fit this release.
    #[error("{0}")]
    Schema(String),
    /// Another process has taken this node over.
    #[error(
        "another Millrace has taken over the work of this process (epoch {found}, ours is {ours}); it must stop"
    )]
    Fenced {
        /// The epoch in the database.
        found: i64,
        /// The epoch of this process.
        ours: i64,
    },
    /// Another process is active on this database.
    #[error(
        "another Millrace is active on this database{0}; stop it first, give this one a database.schema of its own, or let several serve the sale by cluster.enabled = true in each of them"
    )]
    AlreadyActive(String),
    /// Nodes of a cluster have not left this database.
    #[error(
        "this database belongs to several nodes, and these have not left it: {nodes}; a process on its own would neither know their orders nor their stock"
    )]
    NodesRemain {
        /// Their numbers, separated by commas.
        nodes: String,
    },
    /// Nodes of a release beside which this one cannot be a node.
    #[error("the nodes of this database are of another release: {0}")]
    OtherRelease(String),
    /// The database has other orders under these ids: a defect, or a journal of another history.
    #[error(
        "{count} orders have ids under which the database has orders of other buyers or with other contents ({ids}): either this journal and this database do not belong together, or one of them was edited; nothing of them is written"
    )]
    OtherOrders {
        /// Number of such orders.
        count: usize,
        /// The first ids, separated by commas.
        ids: String,
    },
    /// Another audit of this database has not ended.
    #[error("another audit of this database is running; ask again when it has ended")]
    AuditRunning,
    /// An audit took longer than `control_plane.audit_timeout_ms`.
    #[error(
        "the audit did not end within {} ms (control_plane.audit_timeout_ms)", .after.as_millis()
    )]
    AuditTimeout {
        /// The time limit.
        after: Duration,
    },
    /// Another preflight of this database has not ended.
    #[error("another preflight of this database is running; ask again when it has ended")]
    PreflightRunning,
    /// The scratch table of a preflight could not be dropped. The next preflight drops it.
    #[error("the scratch table of the preflight could not be dropped: {0}")]
    ScratchLeft(String),
    /// The server's disk has too little room to measure on.
    #[error("the server's disk has {} MB free, too few to measure on", .free >> 20)]
    DiskFull {
        /// Free bytes.
        free: u64,
    },
    /// Events cannot be read from this database.
    #[error("{0}")]
    Events(String),
    /// Stored data contradicts itself or this release.
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

/// The error of `rustls` that caused `error`, if any.
pub(super) fn rustls_error<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        // An I/O error wraps its cause without naming it as its source.
        let found = match error.downcast_ref::<std::io::Error>() {
            Some(io) => io.get_ref().and_then(|inner| inner.downcast_ref()),
            None => error.downcast_ref(),
        };
        if found.is_some() {
            return found;
        }
        cause = error.source();
    }
    None
}

/// The remedy for a failed connection, in the form `; do this`.
fn remedy(error: &tokio_postgres::Error) -> &'static str {
    use rustls::{CertificateError as Bad, Error as Tls};
    if let Some(error) = rustls_error(error) {
        return match error {
            Tls::InvalidCertificate(bad) => match bad {
                Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
                    "; connect by a name in the certificate's subjectAltName, or use sslmode=verify-ca"
                }
                Bad::Expired | Bad::ExpiredContext { .. } => "; renew the server's certificate",
                Bad::NotValidYet | Bad::NotValidYetContext { .. } => "; check this machine's clock",
                Bad::Other(other) if other.to_string().contains(OLD_CERTIFICATE) => {
                    "; give the server a certificate of X.509 version 3"
                }
                _ => "; name the certificate authority of this server in sslrootcert",
            },
            Tls::AlertReceived(_) => {
                "; the server's log has the reason: often it wants a client's certificate (sslcert, sslkey)"
            }
            _ => "",
        };
    }
    match error.code() {
        Some(&SqlState::INVALID_PASSWORD) => "; check user and password in database.url",
        Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) => {
            "; change user or sslmode in database.url, or the server's pg_hba.conf"
        }
        Some(&SqlState::INVALID_CATALOG_NAME) => "; create it, or correct database.url",
        Some(&SqlState::TOO_MANY_CONNECTIONS) => {
            "; raise max_connections there, or lower workers.count and database.pool_size"
        }
        Some(_) => "",
        None if chain(error).ends_with(NO_TLS) => "; turn ssl on there, or lower sslmode",
        None if chain(error).ends_with(NO_PASSWORD) => "; put it into database.url",
        None if cause_is_io(error) => "; check that it runs at the host and port of database.url",
        None => "",
    }
}

fn cause_is_io(error: &tokio_postgres::Error) -> bool {
    std::error::Error::source(error).is_some_and(|cause| cause.is::<std::io::Error>())
}

/// Messages of the driver and of `webpki` for errors without a type that we can name.
const NO_TLS: &str = "server does not support TLS";
const NO_PASSWORD: &str = "password missing";
const OLD_CERTIFICATE: &str = "UnsupportedCertVersion";

/// Reason why a batch was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Nothing was written, or the commit is in doubt: retry the same batch.
    #[error("{0}")]
    Retry(#[source] StoreError),
    /// A row in it was refused; nothing was written.
    #[error("the database refused a row ({sqlstate}): {reason}")]
    Row {
        /// SQLSTATE, five characters.
        sqlstate: String,
        /// The server's message.
        reason: String,
    },
    /// The counters of a SKU in it were refused; nothing was written.
    #[error("the database refused a stock counter ({sqlstate}): {reason}")]
    Counter {
        /// SQLSTATE, five characters.
        sqlstate: String,
        /// The server's message.
        reason: String,
    },
    /// This process may not write any more.
    #[error("{0}")]
    Fatal(#[source] StoreError),
}

impl StoreError {
    /// Wraps a statement's error with the step that failed.
    pub fn statement(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> StoreError {
        move |source| StoreError::Statement { doing, source }
    }

    /// Whether the failure concerns rows that are locked or that the database refuses; work on other rows may
    /// go on.
    pub fn is_about_rows(&self) -> bool {
        match self {
            StoreError::Statement { source, .. } => {
                refuses_row(source) || source.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
            }
            _ => false,
        }
    }

    /// Whether this process may not write any more: another process has replaced it, or its data contradicts
    /// the database's.
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            StoreError::Fenced { .. } | StoreError::OtherOrders { .. }
        )
    }

    /// Whether the step took too long; a smaller one may succeed.
    pub fn is_overlong(&self) -> bool {
        match self {
            StoreError::Timeout { .. } => true,
            StoreError::Statement { source, .. } => {
                source.code() == Some(&SqlState::QUERY_CANCELED)
            }
            _ => false,
        }
    }

    /// Whether a later retry may succeed without intervention.
    pub fn is_transient(&self) -> bool {
        match self {
            StoreError::Connect(_)
            | StoreError::Timeout { .. }
            | StoreError::Pool(_)
            | StoreError::AuditRunning
            | StoreError::AuditTimeout { .. }
            | StoreError::PreflightRunning
            | StoreError::ScratchLeft(_)
            | StoreError::DiskFull { .. } => true,
            StoreError::Statement { source, .. } => !refuses_row(source),
            StoreError::Url(_)
            | StoreError::SharedSessions
            | StoreError::ReadOnly(_)
            | StoreError::Schema(_)
            | StoreError::Fenced { .. }
            | StoreError::AlreadyActive(_)
            | StoreError::NodesRemain { .. }
            | StoreError::OtherRelease(_)
            | StoreError::OtherOrders { .. }
            | StoreError::Events(_)
            | StoreError::Data(_) => false,
        }
    }
}

/// Whether the server refused the data itself, so that the same data will fail again: classes 22 (data
/// exception), 23 (integrity), 44 (check option), 54 (program limit) and P0 (raised by a trigger). Any other
/// error, missing rights and tables included, concerns the server's state, which an operator can repair while
/// the batch waits.
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

/// The SQLSTATE of an error, or an empty string.
pub(super) fn sqlstate(error: &tokio_postgres::Error) -> &str {
    error.code().map_or("", SqlState::code)
}
