//! Millrace's own PostgreSQL, for when no `database.url` is given.
//!
//! [`Embedded::start`] finds the newest installed server (15 or newer), makes a private cluster
//! under `data_dir` where there is none, and runs it on a unix socket that nobody else can reach.
//! Durability settings stay on. What it promises:
//!
//! - It stops what it started, and nothing else.
//! - After a `kill -9` of Millrace, of PostgreSQL or of both, the next start recovers the same
//!   cluster with the binaries of its major version. A server left running is stopped first.
//! - It never touches a cluster that it did not make: a marker with the cluster's identifier lies
//!   beside it.
//! - One Millrace a cluster: a lock, released by the kernel however the process ends.
//! - As root the server runs as another user, in a place that this user may enter, and no
//!   directory that Millrace did not make is opened further for it.

mod binaries;
mod cluster;
mod error;
mod place;
mod server;
mod user;
mod wal;

use std::{
    fs::File,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use rustix::process::Pid;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_postgres::{Client, NoTls, error::SqlState};

use super::quoted;

use self::{
    binaries::Installation,
    cluster::{Found, SUPERUSER},
    place::{Home, SocketDir},
    server::Shutdown,
};

pub use self::error::EmbeddedError;

/// The database that Millrace uses unless told otherwise; it is there after every start.
pub const DATABASE: &str = "millrace";

/// How long a dropped [`Embedded`] waits for a checkpoint; dropping blocks.
const PATIENCE_IN_DROP: Duration = Duration::from_secs(5);

/// When, and from then on how often, a start that lasts is reported.
const START_REPORT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));

/// How to run the embedded server.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// `data_dir`: the cluster lives in `postgres` below it. Made if missing.
    pub data_dir: PathBuf,
    /// `database.embedded_bin_dir`: where `postgres`, `initdb` and `pg_ctl` are. `None` searches.
    pub bin_dir: Option<PathBuf>,
    /// More settings, which win over Millrace's own, as `(name, value)`.
    pub settings: Vec<(String, String)>,
    /// Where the cluster goes when, as root, the server's user may not enter `data_dir`.
    pub fallback_root: PathBuf,
    /// How long a shutdown may take before it becomes an immediate one.
    pub stop_timeout: Duration,
    /// `database.embedded_wal_bytes`: bytes of WAL segments that each start makes ready.
    pub wal_bytes: u64,
    /// Whether a cluster is made if there is none.
    pub may_make: bool,
    /// Whether the write-ahead log can be decoded, for events.
    pub logical: bool,
}

impl EmbeddedOptions {
    /// Defaults: search for the binaries, 30 s to stop, no WAL made ready, a cluster is made if there is none, no logical
    /// decoding.
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            bin_dir: None,
            settings: Vec::new(),
            fallback_root: PathBuf::from("/var/lib/millrace"),
            stop_timeout: Duration::from_secs(30),
            wal_bytes: 0,
            may_make: true,
            logical: false,
        }
    }
}

/// A running PostgreSQL of Millrace's own. Dropping it stops the server, which blocks for up to
/// about 15 s; [`Embedded::stop`] is the better way.
#[derive(Debug)]
pub struct Embedded {
    options: EmbeddedOptions,
    home: Home,
    installation: Installation,
    socket_dir: SocketDir,
    /// A `pg_ctl` that is starting the server.
    starting: Option<Child>,
    /// The postmaster, which `pg_ctl` has left to run by itself.
    server: Option<Pid>,
    log_bounding: Option<JoinHandle<()>>,
    /// Last, so that it is released when everything else is done.
    _lock: File,
}

impl Embedded {
    /// Finds or makes the cluster, starts it, waits until it answers and makes sure that the
    /// database [`DATABASE`] exists.
    ///
    /// # Errors
    /// Every [`EmbeddedError`]; each is one sentence with its remedy. Nothing is left running.
    pub async fn start(options: EmbeddedOptions) -> Result<Self, EmbeddedError> {
        let mut embedded = spawn_blocking(move || Self::prepare(options)).await??;
        embedded.start_again().await?;
        embedded.ensure_database(DATABASE).await?;
        if let Err(error) = wal::make_ready(&embedded).await {
            tracing::warn!(reason = %error, "WAL segments could not be made ready; the sale makes them, in the middle of commits");
        }
        Ok(embedded)
    }

    /// Looks for the binaries of the server of `data_dir`, in `bin_dir` or where packagers put them;
    /// makes and starts nothing.
    ///
    /// # Errors
    /// Where there is none that Millrace runs on.
    pub async fn look_for_binaries(
        data_dir: PathBuf,
        bin_dir: Option<PathBuf>,
    ) -> Result<(), EmbeddedError> {
        spawn_blocking(move || {
            let user = user::ServerUser::of_cluster(&data_dir.join("postgres").join("data"))?;
            binaries::find(bin_dir.as_deref(), &user, None).map(|_| ())
        })
        .await?
    }

    fn prepare(options: EmbeddedOptions) -> Result<Self, EmbeddedError> {
        let nothing = EmbeddedError::NoCluster {
            data_dir: options.data_dir.clone(),
        };
        // Before a home is made.
        if !options.may_make && !Home::is_there(&options.data_dir) {
            return Err(nothing);
        }
        let home = Home::find_or_make(&options.data_dir, &options.fallback_root)?;
        let lock = cluster::lock(&home)?;
        let data = home.data();
        let found = cluster::inspect(&home)?;
        let needed = match found {
            Found::Ours { major } => Some((major, data.as_path())),
            Found::Nothing if !options.may_make => return Err(nothing),
            Found::Nothing => None,
        };
        let installation = binaries::find(options.bin_dir.as_deref(), &home.user, needed)?;
        if let Found::Nothing = found {
            tracing::info!(
                directory = %home.dir.display(), version = %installation.version,
                "making a PostgreSQL cluster"
            );
            cluster::make(&home, &installation)?;
        }
        Ok(Self {
            socket_dir: home.socket_dir()?,
            options,
            home,
            installation,
            starting: None,
            server: None,
            log_bounding: None,
            _lock: lock,
        })
    }

    /// How to connect to a database of this server.
    #[must_use]
    pub fn config(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(&self.socket_dir.path)
            .port(5432)
            .user(SUPERUSER)
            .dbname(database);
        config
    }

    /// The same as a URL, which `psql` understands too.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgresql://{SUPERUSER}@{}:5432/{}",
            percent_encoded(self.socket_dir.path.as_os_str().as_bytes()),
            percent_encoded(database.as_bytes())
        )
    }

    /// The directory that holds the cluster, its marker and its log.
    #[must_use]
    pub fn home(&self) -> &Path {
        &self.home.dir
    }

    /// The server's version, such as `17.2`.
    #[must_use]
    pub fn version(&self) -> String {
        self.installation.version.to_string()
    }

    /// The server's process, while it has been started and not stopped. It may have died.
    #[must_use]
    pub fn postmaster_pid(&self) -> Option<u32> {
        self.server
            .map(|pid| pid.as_raw_nonzero().get().cast_unsigned())
    }

    /// Whether the server's process is alive. Its backends may be restarting after a crash; the
    /// postmaster does that itself. Where this turns false unasked, [`Embedded::start_again`]
    /// recovers.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.server
            .is_some_and(|pid| server::runs_on(pid, &self.home.data()))
    }

    /// Makes a database if it is missing.
    ///
    /// # Errors
    /// [`EmbeddedError::Database`].
    pub async fn ensure_database(&self, name: &str) -> Result<(), EmbeddedError> {
        match self.create_database(name).await {
            Err(EmbeddedError::Database { source, .. })
                if source.code() == Some(&SqlState::DUPLICATE_DATABASE) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Makes a new, empty database.
    ///
    /// # Errors
    /// [`EmbeddedError::Database`], also where there is one of this name.
    pub async fn create_database(&self, name: &str) -> Result<(), EmbeddedError> {
        // Nobody can be connected to `template0`, so several can be made at once.
        let statement = format!("CREATE DATABASE {} TEMPLATE template0", quoted(name));
        self.administer("create", name, &statement).await
    }

    /// Drops a database and everyone connected to it; one that is missing is no error.
    ///
    /// # Errors
    /// [`EmbeddedError::Database`].
    pub async fn drop_database(&self, name: &str) -> Result<(), EmbeddedError> {
        let statement = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quoted(name));
        self.administer("drop", name, &statement).await
    }

    async fn administer(
        &self,
        action: &'static str,
        database: &str,
        statement: &str,
    ) -> Result<(), EmbeddedError> {
        let failed = |source| EmbeddedError::Database {
            action,
            database: database.to_owned(),
            source,
        };
        let (client, connection) = self.connect().await.map_err(failed)?;
        let outcome = client.batch_execute(statement).await.map_err(failed);
        drop(client);
        // Ends by itself once the client is gone; waited for so that no session outlives this call.
        let _ = connection.await;
        outcome
    }

    async fn connect(&self) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        let (client, connection) = self.config("postgres").connect(NoTls).await?;
        let connection = tokio::spawn(async move {
            // What goes wrong is reported to the client's calls.
            let _ = connection.await;
        });
        Ok((client, connection))
    }

    /// Starts the server after [`Embedded::stop_immediate`], or after it was killed, and waits
    /// until it answers. A server that still runs is ended first, immediately.
    ///
    /// # Errors
    /// As [`Embedded::start`].
    pub async fn start_again(&mut self) -> Result<(), EmbeddedError> {
        self.stop_immediate().await?;
        let (home, installation) = (self.home.clone(), self.installation.clone());
        let socket_lock = self.socket_dir.lock_file();
        let patience = self.options.stop_timeout;
        spawn_blocking(move || server::take_over(&home, &installation, &socket_lock, patience))
            .await??;
        let log = self.home.log();
        // A server with slots does not start without.
        let is_logical = self.options.logical || has_slots(&self.home.data());
        let wal_level = if is_logical { "logical" } else { "replica" };
        let (starting, from) = server::start(
            &self.home,
            &self.installation,
            &self.socket_dir.path,
            &[
                &[
                    wal::setting(self.options.wal_bytes),
                    ("wal_level".to_owned(), wal_level.to_owned()),
                ],
                &*self.options.settings,
            ]
            .concat(),
        )?;
        self.starting = Some(starting);
        self.wait_until_ready(&log, from).await?;
        self.log_bounding = Some(tokio::spawn(keep_log_bounded(log)));
        Ok(())
    }

    async fn wait_until_ready(&mut self, log: &Path, from: u64) -> Result<(), EmbeddedError> {
        let started = Instant::now();
        let (mut report_at, report_every) = START_REPORT;
        let mut ready = false;
        while let Some(starting) = &mut self.starting {
            match starting.try_wait() {
                Ok(None) => tokio::time::sleep(Duration::from_millis(10)).await,
                Ok(Some(status)) => (ready, self.starting) = (status.success(), None),
                Err(_) => self.starting = None,
            }
            if started.elapsed() > report_at {
                report_at += report_every;
                tracing::info!(
                    last = server::tail(log, from),
                    "PostgreSQL is still starting, usually because it recovers from a crash"
                );
            }
        }
        self.server = server::running(&self.home.data());
        if ready && self.server.is_some() {
            return Ok(());
        }
        let (seconds, tail) = (started.elapsed().as_secs(), server::tail(log, from));
        let log = log.to_owned();
        if self.server.is_none() {
            return Err(EmbeddedError::Exited { log, tail });
        }
        self.stop_immediate().await?;
        Err(EmbeddedError::NotReady { seconds, log, tail })
    }

    /// Stops the server: fast shutdown, and after `stop_timeout` an immediate one.
    ///
    /// # Errors
    /// [`EmbeddedError::WouldNotStop`].
    pub async fn stop(mut self) -> Result<(), EmbeddedError> {
        let how = Shutdown::Fast(self.options.stop_timeout);
        self.end(how).await
    }

    /// Stops the server and removes the cluster with everything in it: for a cluster that served
    /// one demonstration or one test.
    ///
    /// # Errors
    /// [`EmbeddedError::Io`] if something could not be removed, and [`EmbeddedError::WouldNotStop`].
    pub async fn stop_and_erase(mut self) -> Result<(), EmbeddedError> {
        self.end(Shutdown::Immediate).await?;
        self.socket_dir.tidy();
        let home = self.home.clone();
        spawn_blocking(move || cluster::erase(&home)).await?
    }

    /// Ends the server as a crash would, but orderly enough that no process is left. For tests of
    /// faults; [`Embedded::start_again`] is its counterpart.
    ///
    /// # Errors
    /// [`EmbeddedError::WouldNotStop`].
    pub async fn stop_immediate(&mut self) -> Result<(), EmbeddedError> {
        self.end(Shutdown::Immediate).await
    }

    /// Lets go of the running server as a `kill -9` of this process would: the server goes on,
    /// the lock is free. For tests of faults.
    pub fn abandon(mut self) {
        self.server = None;
        self.socket_dir.keep();
    }

    async fn end(&mut self, how: Shutdown) -> Result<(), EmbeddedError> {
        if let Some(bounding) = self.log_bounding.take() {
            bounding.abort();
        }
        if self.server.take().is_some() {
            let (home, installation) = (self.home.clone(), self.installation.clone());
            spawn_blocking(move || server::stop(&home, &installation, how)).await??;
        }
        Ok(())
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if let Some(bounding) = self.log_bounding.take() {
            bounding.abort();
        }
        let mut starting = self.starting.take();
        if let Some(starting) = &mut starting {
            server::wait_for_process(starting, &self.home.data());
        }
        if self.server.take().is_some() || starting.is_some() {
            let how = Shutdown::Fast(PATIENCE_IN_DROP);
            if let Err(error) = server::stop(&self.home, &self.installation, how) {
                tracing::error!(%error, "PostgreSQL is left running");
            }
        }
        if let Some(mut starting) = starting {
            // It ends with the server that it waits for.
            let _ = starting.wait();
        }
        self.socket_dir.tidy();
    }
}

async fn keep_log_bounded(log: PathBuf) {
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        let log = log.clone();
        if let Ok(Err(error)) = spawn_blocking(move || server::bound_log(&log)).await {
            tracing::warn!(%error, "the log of PostgreSQL could not be shortened");
        }
    }
}

/// Whether a cluster has replication slots: a folder each.
fn has_slots(data: &Path) -> bool {
    let slots = std::fs::read_dir(data.join("pg_replslot"));
    slots.is_ok_and(|mut slots| slots.next().is_some())
}

fn percent_encoded(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|&byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}
