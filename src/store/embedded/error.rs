//! What can go wrong with the embedded server, each as one sentence with its remedy.

use std::path::{Path, PathBuf};

/// Why the embedded PostgreSQL could not be found, made, started or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbeddedError {
    /// No usable server binaries on this machine.
    #[error(
        "PostgreSQL 15 or newer was not found on this machine{}; install it with \
         `apt-get install postgresql` (Debian, Ubuntu) or `brew install postgresql@17` (macOS), \
         set database.embedded_bin_dir, or set database.url",
        listed(.found)
    )]
    NotFound {
        /// Versions that were found but are older than 15.
        found: Vec<String>,
    },
    /// A command that only looks found nothing to look at.
    #[error(
        "there is no database to look at: database.url is not set, and Millrace has not made a PostgreSQL \
         in {}; run this with the settings and in the directory of the service (data_dir), or start it once",
        .data_dir.display()
    )]
    NoCluster {
        /// `data_dir`.
        data_dir: PathBuf,
    },
    /// `database.embedded_bin_dir` names a directory without a usable server.
    #[error(
        "database.embedded_bin_dir is {}, but `postgres`, `initdb` and `pg_ctl` of \
         PostgreSQL 15 or newer do not all work in it; correct it, or remove it to let Millrace search",
        .dir.display()
    )]
    BinDir {
        /// The configured directory.
        dir: PathBuf,
    },
    /// An existing cluster needs a major version that is not installed.
    #[error(
        "the cluster in {} was made by PostgreSQL {needed}, which is not installed{}; install \
         PostgreSQL {needed} (`apt-get install postgresql-{needed}` or `brew install \
         postgresql@{needed}`), or set database.embedded_bin_dir to its binaries",
        .data.display(), listed(.found)
    )]
    VersionMissing {
        /// The cluster's directory.
        data: PathBuf,
        /// The major version it needs.
        needed: u32,
        /// The versions that are installed.
        found: Vec<String>,
    },
    /// There is a cluster where Millrace would make its own, and Millrace did not make it.
    #[error(
        "{} holds files of a PostgreSQL cluster that Millrace did not make ({reason}); Millrace \
         leaves it alone: set data_dir to another directory, or set database.url to use that cluster",
        .path.display()
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// How it was told.
        reason: &'static str,
    },
    /// The marker is there, the cluster is not.
    #[error(
        "{} says that Millrace made a cluster here, but its data directory is gone; restore it \
         from a backup, or remove that file to begin with an empty database",
        .marker.display()
    )]
    DataGone {
        /// The marker file.
        marker: PathBuf,
    },
    /// The pointer in `data_dir` cannot be followed.
    #[error(
        "{} says that the database lives in {}, which is not there; restore that directory, or \
         remove the file to begin with an empty database",
        .pointer.display(), .target.display()
    )]
    PointerBroken {
        /// The pointer file.
        pointer: PathBuf,
        /// What it names.
        target: PathBuf,
    },
    /// Another Millrace manages this cluster now.
    #[error(
        "another Millrace{} is already using the database in {}; stop it first, or give this one \
         its own data_dir",
        .pid.map(|pid| format!(" (process {pid})")).unwrap_or_default(), .home.display()
    )]
    InUse {
        /// The cluster's home.
        home: PathBuf,
        /// The other process, where it left its id.
        pid: Option<u32>,
    },
    /// Running as root, and there is no other user to run the server as.
    #[error(
        "PostgreSQL refuses to run as root and this machine has neither a user `postgres` nor a \
         user `nobody`; create one (`useradd --system postgres`), or run Millrace as another user"
    )]
    NoServerUser,
    /// A place the server's user cannot enter, and no better one.
    #[error(
        "the user `{user}`, as whom PostgreSQL must run here, may not enter {}; set data_dir to a \
         directory that it may enter, such as one below /var/lib", .dir.display()
    )]
    NotEnterable {
        /// The directory.
        dir: PathBuf,
        /// The server's user.
        user: String,
    },
    /// The cluster belongs to someone else.
    #[error(
        "the cluster in {} belongs to user id {owner}, and Millrace runs as user id {own}; run it \
         as that user (or as root), or set data_dir to another directory", .data.display()
    )]
    Owner {
        /// The cluster's directory.
        data: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who we are.
        own: u32,
    },
    /// A directory in which Millrace would trust files can be changed by others.
    #[error(
        "{} is not a directory that only its owner can change; remove it, or set data_dir to a \
         directory that the user `{user}` may enter", .dir.display()
    )]
    Unsafe {
        /// The directory.
        dir: PathBuf,
        /// The server's user.
        user: String,
    },
    /// No socket directory with a path short enough.
    #[error(
        "no directory for PostgreSQL's socket has a path shorter than {limit} bytes (tried {}); \
         set TMPDIR to a short path, or set data_dir to one", .tried.display()
    )]
    SocketPath {
        /// The last directory tried.
        tried: PathBuf,
        /// The longest usable path.
        limit: usize,
    },
    /// `initdb` failed.
    #[error("`initdb` could not make a cluster in {}: {output}", .data.display())]
    Initdb {
        /// Where.
        data: PathBuf,
        /// The end of what it printed.
        output: String,
    },
    /// The server ended while starting.
    #[error("PostgreSQL ended while starting; the end of {}: {tail}", .log.display())]
    Exited {
        /// The log file.
        log: PathBuf,
        /// The log's end.
        tail: String,
    },
    /// The server did not take connections in time.
    #[error(
        "PostgreSQL took no connection within {seconds} s; the end of {}: {tail}", .log.display()
    )]
    NotReady {
        /// The deadline.
        seconds: u64,
        /// The log file.
        log: PathBuf,
        /// The log's end.
        tail: String,
    },
    /// A server that should have stopped is still there.
    #[error(
        "PostgreSQL (process {pid}) on {} does not stop; look at what it waits for, or end it \
         with `kill -QUIT {pid}`", .data.display()
    )]
    WouldNotStop {
        /// The process.
        pid: i32,
        /// Its cluster.
        data: PathBuf,
    },
    /// The operating system refused something.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The server refused something.
    #[error("the embedded PostgreSQL refused to {action} `{database}`: {source}")]
    Database {
        /// What was tried.
        action: &'static str,
        /// The database concerned.
        database: String,
        /// Its answer.
        source: tokio_postgres::Error,
    },
    /// The asynchronous runtime ended in the middle of a step.
    #[error("the runtime is shutting down: {0}")]
    Runtime(#[from] tokio::task::JoinError),
}

impl EmbeddedError {
    /// Whether the same call may succeed later without anyone changing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::InUse { .. }
            | Self::NotReady { .. }
            | Self::WouldNotStop { .. }
            | Self::Database { .. } => true,
            Self::NotFound { .. }
            | Self::NoCluster { .. }
            | Self::BinDir { .. }
            | Self::VersionMissing { .. }
            | Self::Foreign { .. }
            | Self::DataGone { .. }
            | Self::PointerBroken { .. }
            | Self::NoServerUser
            | Self::NotEnterable { .. }
            | Self::Owner { .. }
            | Self::Unsafe { .. }
            | Self::SocketPath { .. }
            | Self::Initdb { .. }
            | Self::Exited { .. }
            | Self::Io { .. }
            | Self::Runtime(_) => false,
        }
    }
}

fn listed(versions: &[String]) -> String {
    if versions.is_empty() {
        String::new()
    } else {
        format!(" (found: {})", versions.join(", "))
    }
}

/// Shorthand for attaching the path and the verb to an `io::Error`.
pub(super) fn io<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> EmbeddedError + 'a {
    move |source| EmbeddedError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}
