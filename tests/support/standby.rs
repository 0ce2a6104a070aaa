//! A PostgreSQL that can be mistreated, alone or with a standby that follows it.
//!
//! Both are real servers on unix sockets in directories of their own, started by hand on a copy
//! of the template in [`super::postgres`]. A standby streams through a physical replication slot.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio_postgres::Client;

use super::postgres::{connect, copy_template, test_dir};

const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(5);

/// The physical replication slot that the standby reads from.
pub const SLOT: &str = "standby";
/// The database in it that is Millrace's.
pub const DATABASE: &str = "millrace";
/// The superuser of both servers.
pub const USER: &str = "millrace";

/// Who may come in: everyone who reaches the socket.
const OPEN: &str = "local all all trust\nlocal replication all trust\n";
/// The same without standbys.
const SHUT: &str = "local all all trust\nlocal replication all reject\n";

/// One server; ended at once when it is dropped.
pub struct Server {
    /// Where its cluster is.
    pub data: PathBuf,
    /// Where its socket, its rules and its log are.
    pub place: PathBuf,
    program: PathBuf,
    user: (u32, u32),
    settings: Vec<String>,
    process: Option<Child>,
}

impl Server {
    /// Starts one on a fresh cluster in `dir`, with these settings beside what every test wants.
    pub async fn start_in(dir: &Path, settings: &[(&str, &str)]) -> Self {
        copy_template(dir).await;
        let data = dir.join("postgres/data");
        let meta = std::fs::metadata(&data).expect("the cluster");
        let user = (meta.uid(), meta.gid());
        give(dir, user);
        // Who made the template wrote down with which program.
        let options = std::fs::read_to_string(data.join("postmaster.opts"))
            .expect("the template's server has run");
        let program = PathBuf::from(options.split_whitespace().next().expect("its program"));
        let settings = settings
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let mut server = Server {
            place: dir.join("primary"),
            program,
            user,
            settings: settings.collect(),
            process: None,
            data,
        };
        server.start().await;
        let client = connect(&server.config("postgres")).await;
        let there = client
            .query_opt("SELECT 1 FROM pg_database WHERE datname = $1", &[&DATABASE])
            .await
            .expect("look for the database");
        if there.is_none() {
            client
                .batch_execute(&format!("CREATE DATABASE {DATABASE}"))
                .await
                .expect("create the database");
        }
        server
    }

    /// Starts a standby that follows it, in directories of `dir` that begin with `name`; reached by its socket alone.
    pub async fn follow(&self, dir: &Path, name: &str) -> Self {
        let data = dir.join(format!("{name}-data"));
        let output = as_user(&self.program.with_file_name("pg_basebackup"), self.user)
            .arg("-h")
            .arg(&self.place)
            .args(["-p", "5432", "-U", USER, "-X", "stream", "-c", "fast"])
            .args(["--no-sync", "-C", "-S", SLOT, "-D"])
            .arg(&data)
            .current_dir(&self.place)
            .output()
            .expect("run pg_basebackup");
        assert!(
            output.status.success(),
            "pg_basebackup: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        write(&data, "standby.signal", "", self.user);
        let upstream = format!(
            "primary_conninfo=host={} port=5432 user={USER} application_name={SLOT}",
            self.place.display()
        );
        let own = [
            upstream,
            format!("primary_slot_name={SLOT}"),
            "listen_addresses=".to_owned(),
        ];
        let mut standby = Server {
            place: dir.join(name),
            program: self.program.clone(),
            user: self.user,
            settings: self.settings.iter().cloned().chain(own).collect(),
            process: None,
            data,
        };
        standby.start().await;
        self.until_followed().await;
        standby
    }

    /// Waits until a standby streams from it.
    async fn until_followed(&self) {
        self.until("SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")
            .await;
    }

    /// Whether its commits wait until its standby has them on disk.
    pub async fn wait_for_standby(&self, on: bool) {
        let names = if on { format!("'{SLOT}'") } else { "''".into() };
        self.set("synchronous_standby_names", &names).await;
        if on {
            self.until("SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")
                .await;
        }
    }

    /// Makes a standby a primary of its own.
    pub async fn promote(&self) {
        self.sql("SELECT pg_promote(true, 30)").await;
        self.until("SELECT NOT pg_is_in_recovery()").await;
    }

    /// Puts a promoted standby in the place of a primary that is gone: at the same address, with the same settings.
    pub async fn replace(&mut self, gone: Server) {
        self.stop_immediately();
        self.settings.clone_from(&gone.settings);
        let _ = std::fs::remove_dir_all(&gone.data);
        self.start().await;
    }

    /// Starts it, also again, and waits until it answers.
    pub async fn start(&mut self) {
        assert!(self.try_start().await, "{}", self.log());
    }

    /// The same; false where it ends instead.
    pub async fn try_start(&mut self) -> bool {
        assert!(self.process.is_none(), "it runs");
        std::fs::create_dir_all(&self.place).expect("make its directory");
        give(&self.place, self.user);
        if !self.place.join("hba.conf").exists() {
            write(&self.place, "hba.conf", OPEN, self.user);
        }
        write(&self.place, "postgresql.conf", "", self.user);
        let file = |name: &str| self.place.join(name).display().to_string();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.place.join("server.log"))
            .expect("its log");
        let mut command = as_user(&self.program, self.user);
        command.arg("-D").arg(&self.data);
        let own = [
            format!("config_file={}", file("postgresql.conf")),
            format!("hba_file={}", file("hba.conf")),
            format!("unix_socket_directories={}", self.place.display()),
            "listen_addresses=".to_owned(),
            "port=5432".to_owned(),
            // Only a power loss could hurt it.
            "fsync=off".to_owned(),
            "shared_buffers=64MB".to_owned(),
            "max_connections=100".to_owned(),
            "wal_level=replica".to_owned(),
            "wal_retrieve_retry_interval=100ms".to_owned(),
            "log_line_prefix=%m [%p] %a ".to_owned(),
            "timezone=UTC".to_owned(),
        ];
        for setting in own.iter().chain(&self.settings) {
            command.arg("-c").arg(setting);
        }
        let process = command
            .current_dir(&self.place)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start PostgreSQL");
        self.process = Some(process);
        let deadline = Instant::now() + PATIENCE;
        while self
            .config("postgres")
            .connect(tokio_postgres::NoTls)
            .await
            .is_err()
        {
            if !self.is_running() {
                return false;
            }
            assert!(Instant::now() < deadline, "not up: {}", self.log());
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    /// Whether its postmaster lives; one that has ended is collected.
    pub fn is_running(&mut self) -> bool {
        let ended = self
            .process
            .as_mut()
            .is_none_or(|process| !matches!(process.try_wait(), Ok(None)));
        if ended {
            self.process = None;
        }
        !ended
    }

    /// Ends it as `pg_ctl stop -m immediate` does: nothing is flushed, nobody is told.
    pub fn stop_immediately(&mut self) {
        let Some(mut process) = self.process.take() else {
            return;
        };
        let _ = kill_process(Pid::from_child(&process), Signal::QUIT);
        let _ = process.wait();
    }

    /// Its postmaster and every process of it.
    pub fn processes(&self) -> Vec<Pid> {
        let Some(postmaster) = self.process.as_ref().map(Pid::from_child) else {
            return Vec::new();
        };
        let parent = format!("PPid:\t{}", postmaster.as_raw_nonzero());
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let children = entries.filter_map(|entry| {
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
            status.lines().any(|line| line == parent).then_some(pid)
        });
        std::iter::once(postmaster).chain(children).collect()
    }

    /// The backends of the workers, as of now.
    pub async fn worker_backends(&self) -> Vec<Pid> {
        let workers =
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'millrace worker%'";
        let rows = self.session().await.query(workers, &[]).await;
        let rows = rows.expect("the workers' backends");
        rows.iter()
            .filter_map(|row| Pid::from_raw(row.get(0)))
            .collect()
    }

    /// How to connect to it, not through anything.
    pub fn config(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(&self.place)
            .port(5432)
            .user(USER)
            .dbname(database)
            .application_name("the tester")
            .connect_timeout(PATIENCE);
        config
    }

    /// A superuser's session in Millrace's database.
    pub async fn session(&self) -> Client {
        connect(&self.config(DATABASE)).await
    }

    /// Does something as its superuser.
    pub async fn sql(&self, statements: &str) {
        self.session()
            .await
            .batch_execute(statements)
            .await
            .unwrap_or_else(|error| panic!("{statements}: {error:?}"));
    }

    /// The number that a query returns.
    pub async fn number(&self, query: &str) -> i64 {
        self.session()
            .await
            .query_one(query, &[])
            .await
            .unwrap_or_else(|error| panic!("{query}: {error:?}"))
            .get(0)
    }

    /// Waits until `query` returns true.
    pub async fn until(&self, query: &str) {
        let client = self.session().await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let row = client.query_one(query, &[]).await;
            if row
                .unwrap_or_else(|error| panic!("{query}: {error:?}"))
                .get(0)
            {
                return;
            }
            assert!(Instant::now() < deadline, "not in time: {query}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The last lines of its log.
    pub fn log(&self) -> String {
        super::served::tail(&self.place.join("server.log"))
    }

    /// Whether it has ever logged `words`.
    pub fn has_logged(&self, words: &str) -> bool {
        let log = std::fs::read(self.place.join("server.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).contains(words)
    }

    /// Gives a path to the server's user.
    pub fn give(&self, path: &Path) {
        give(path, self.user);
    }

    /// Replaces its rules about who comes in, and waits until they are in force.
    async fn admit(&self, rules: &str) {
        let before = self.configured_at().await;
        write(&self.place, "hba.conf", rules, self.user);
        self.reload(before).await;
    }

    /// Sets something for good, or back to its default, and waits until it is in force.
    async fn set(&self, name: &str, value: &str) {
        let before = self.configured_at().await;
        self.sql(&format!("ALTER SYSTEM SET {name} = {value}"))
            .await;
        self.reload(before).await;
    }

    async fn reload(&self, before: String) {
        self.sql("SELECT pg_reload_conf()").await;
        let deadline = Instant::now() + PATIENCE;
        while self.configured_at().await == before {
            assert!(Instant::now() < deadline, "not reloaded in time");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// When the postmaster last read its files: a new session inherits it.
    async fn configured_at(&self) -> String {
        self.session()
            .await
            .query_one("SELECT pg_conf_load_time()::text", &[])
            .await
            .expect("ask when it was configured")
            .get(0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that was stopped with SIGSTOP would not hear of its end.
        for pid in self.processes() {
            let _ = kill_process(pid, Signal::CONT);
        }
        self.stop_immediately();
    }
}

/// A primary and its standby.
pub struct Pair {
    /// Takes writes until it is stopped.
    pub primary: Server,
    /// Follows it until it is promoted.
    pub standby: Server,
    _dir: TempDir,
}

impl Pair {
    /// Starts both. Replication is asynchronous until [`Pair::synchronous`].
    pub async fn start() -> Self {
        let dir = test_dir();
        let primary = Server::start_in(dir.path(), &[]).await;
        let standby = primary.follow(dir.path(), "standby").await;
        Pair {
            primary,
            standby,
            _dir: dir,
        }
    }

    /// Whether a commit on the primary waits until the standby has it on disk.
    pub async fn synchronous(&self, on: bool) {
        self.primary.wait_for_standby(on).await;
    }

    /// Parts the two. What the primary writes from here on is certainly not on the standby, also
    /// not in a buffer on its way there.
    pub async fn part(&self) {
        self.primary.admit(SHUT).await;
        self.primary
            .sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
            .await;
        self.primary
            .until("SELECT count(*) = 0 FROM pg_stat_replication")
            .await;
        // The receiver takes what was on its way before it sees the end.
        self.standby
            .until("SELECT count(*) = 0 FROM pg_stat_wal_receiver")
            .await;
    }

    /// Lets the standby follow again.
    pub async fn join(&self) {
        self.primary.admit(OPEN).await;
        self.primary.until_followed().await;
    }

    /// Makes the standby a primary of its own.
    pub async fn promote(&self) {
        self.standby.promote().await;
    }
}

fn as_user(program: &Path, (uid, gid): (u32, u32)) -> Command {
    let mut command = Command::new(program);
    if rustix::process::geteuid().is_root() {
        command.uid(uid).gid(gid);
    }
    command
}

fn give(path: &Path, (uid, gid): (u32, u32)) {
    std::os::unix::fs::chown(path, Some(uid), Some(gid)).expect("give it to the server");
}

fn write(dir: &Path, name: &str, text: &str, user: (u32, u32)) {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("write a file for the server");
    give(&path, user);
}
