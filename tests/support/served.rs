//! The real binary as a server process with its own PostgreSQL.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, test_kill_process, waitpid};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::http::{call, try_call};
use super::postgres::{BIN_DIR, copy_template, test_dir};

/// How long any step of a process may take.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// How soon a condition is looked at again.
const LOOK: Duration = Duration::from_millis(2);

/// The binary with these arguments, and without whatever the caller's environment would configure
/// but the PostgreSQL that was chosen for the tests.
pub fn millrace(args: &[&str]) -> Command {
    program(env!("CARGO_BIN_EXE_millrace"), args)
}

/// The same for the binary of another release.
pub fn program(binary: &str, args: &[&str]) -> Command {
    let mut command = if ignores_hangups() {
        let mut command = Command::new("env");
        command.args(["--default-signal=HUP", binary]);
        command
    } else {
        Command::new(binary)
    };
    command.args(args);
    let ours = |name: &str| name.starts_with("MILLRACE_") && name != BIN_DIR;
    for (name, _) in std::env::vars().filter(|(name, _)| ours(name)) {
        command.env_remove(name);
    }
    // A gigabyte a cluster, for sales.
    command.env("MILLRACE_DATABASE__EMBEDDED_WAL_BYTES", "0");
    command
}

/// Whether the tests themselves run below nohup, which a child would inherit: `SigIgn` of proc(5).
fn ignores_hangups() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 == 1)
}

/// A server that ended before it was ready.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// The last lines of its log.
    pub log: String,
}

impl Ended {
    /// Whether SIGKILL has ended it.
    pub fn is_killed(&self) -> bool {
        self.status.signal() == Some(Signal::KILL.as_raw())
    }
}

/// A server process with its own PostgreSQL; killed at the end if it still runs.
pub struct Served {
    /// The process.
    pub child: Child,
    /// Where the shop's backend calls.
    pub data: SocketAddr,
    /// Where operators call.
    pub control: SocketAddr,
}

impl Served {
    /// Starts one with the default settings, and waits until it is ready.
    pub fn start(data_dir: &Path) -> Self {
        Self::try_start(data_dir, &[], &data_dir.join("serve.log"))
            .unwrap_or_else(|ended| panic!("millrace ended: {}\n{}", ended.status, ended.log))
    }

    /// Starts one with more settings in its environment, and waits until it is ready. Its log
    /// goes to the file `log`.
    pub fn try_start(
        data_dir: &Path,
        settings: &[(String, String)],
        log: &Path,
    ) -> Result<Self, Ended> {
        let stderr = File::create(log).map_or_else(|_| Stdio::null(), Stdio::from);
        Self::try_start_as(command(data_dir, settings).stderr(stderr), data_dir, log)
    }

    /// Starts one as the command says, on this `data_dir`, and waits until it is ready. Where its
    /// log can be read, it is in the file `log`.
    pub fn try_start_as(command: &mut Command, data_dir: &Path, log: &Path) -> Result<Self, Ended> {
        let _ = std::fs::remove_file(data_dir.join("addresses.json"));
        let child = command.spawn().expect("start millrace");
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut served = Served {
            child,
            data: nowhere,
            control: nowhere,
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = served.child.try_wait().expect("its status") {
                let log = tail(log);
                return Err(Ended { status, log });
            }
            assert!(Instant::now() < deadline, "not ready: {}", tail(log));
            let text = std::fs::read_to_string(data_dir.join("addresses.json")).unwrap_or_default();
            let addresses: Value = serde_json::from_str(&text).unwrap_or_default();
            let address = |name: &str| addresses[name].as_str().and_then(|text| text.parse().ok());
            if let (Some(data), Some(control)) = (address("data_plane"), address("control_plane"))
                && try_call(control, "GET", "/readyz", &[], "")
                    .is_ok_and(|answer| answer.status == 200)
            {
                (served.data, served.control) = (data, control);
                return Ok(served);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Puts a SKU on sale, one unit for 100.
    pub fn put_sku(&self, sku_id: &str, total: u32) {
        let body = json!({ "unit_price": 100, "currency": "EUR", "total": total });
        let answer = call(
            self.control,
            "PUT",
            &format!("/admin/v1/skus/{sku_id}"),
            &[],
            &body.to_string(),
        );
        assert!((200..300).contains(&answer.status), "{answer:?}");
    }

    /// The checks of `readyz` that fail, each with its detail.
    pub fn failing_checks(&self) -> Vec<(String, String)> {
        let answer = call(self.control, "GET", "/readyz", &[], "");
        let ready = answer.json();
        assert_eq!(answer.status == 200, ready["ready"] == true, "{ready}");
        let checks = ready["checks"].as_array().cloned().unwrap_or_default();
        let failing = checks.iter().filter(|check| check["ok"] != true);
        let word = |check: &Value, name: &str| check[name].as_str().unwrap_or_default().to_owned();
        let failing = failing.map(|check| (word(check, "name"), word(check, "detail")));
        failing.collect()
    }

    /// The sum of a metric over its labels.
    pub fn metric(&self, name: &str) -> std::io::Result<f64> {
        let answer = try_call(self.control, "GET", "/metrics", &[], "")?;
        let text = String::from_utf8_lossy(&answer.body);
        let values = text.lines().filter_map(|line| {
            let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
            (labels.is_empty() || labels.starts_with('{')).then(|| value.parse::<f64>().ok())?
        });
        Ok(values.sum())
    }

    /// Bytes of memory that the process has; 0 where the system does not say.
    pub fn resident_bytes(&self) -> u64 {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.unwrap_or_default() * 1024
    }

    /// Asks it to drain and end.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("send a signal");
    }

    /// Ends it with SIGKILL; its PostgreSQL goes on.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it has ended by itself; `None` where it has not by `deadline`.
    pub fn ended_by(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait().expect("its status") {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until it has ended and returns its exit code; a signal has none.
    pub fn wait(mut self) -> Option<i32> {
        self.ended_by(Instant::now() + PATIENCE)
            .expect("it did not end in time")
            .code()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a server process without waiting for anything.
pub fn spawn(data_dir: &Path, settings: &[(String, String)], log: &Path) -> Child {
    command(data_dir, settings)
        .stderr(File::create(log).map_or_else(|_| Stdio::null(), Stdio::from))
        .spawn()
        .expect("start millrace")
}

/// What starts a server process.
pub fn command(data_dir: &Path, settings: &[(String, String)]) -> Command {
    let mut command = millrace(&["serve"]);
    command
        .env("MILLRACE_DATA_DIR", data_dir)
        .env("MILLRACE_DATA_PLANE__LISTEN", "127.0.0.1:0")
        .env("MILLRACE_CONTROL_PLANE__LISTEN", "127.0.0.1:0")
        .envs(settings.iter().map(|(name, value)| (name, value)));
    command
}

/// Runs a command of the binary on this `data_dir`. Its exit code, and what it said on both outputs.
pub fn run(data_dir: &Path, settings: &[(String, String)], args: &[&str]) -> (Option<i32>, String) {
    let output = millrace(args)
        .env("MILLRACE_DATA_DIR", data_dir)
        .envs(settings.iter().map(|(name, value)| (name, value)))
        .output()
        .expect("run millrace");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into())
}

/// A `data_dir` whose PostgreSQL ends with it: a killed Millrace leaves it running.
pub struct DataDir(TempDir);

impl DataDir {
    /// One with a fresh cluster.
    pub async fn fresh() -> Self {
        let dir = test_dir();
        copy_template(dir.path()).await;
        DataDir(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        if let Some(pid) = OwnPostgres::of(self.path()).pid() {
            end_postgres(pid);
        }
    }
}

/// The PostgreSQL that Millrace keeps under a `data_dir`, seen from outside: by the file that its
/// postmaster writes.
pub struct OwnPostgres {
    data: PathBuf,
}

impl OwnPostgres {
    /// The one of this `data_dir`, running or not.
    pub fn of(data_dir: &Path) -> Self {
        OwnPostgres {
            data: data_dir.join("postgres/data"),
        }
    }

    /// How to connect to Millrace's database in it.
    pub fn config(&self) -> Option<tokio_postgres::Config> {
        let lines = std::fs::read_to_string(self.data.join("postmaster.pid")).ok()?;
        let mut lines = lines.lines().skip(3);
        let (port, socket_dir) = (lines.next()?.trim(), lines.next()?.trim());
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(socket_dir)
            .port(port.parse().ok()?)
            .user("millrace")
            .dbname("millrace")
            .connect_timeout(Duration::from_secs(10));
        Some(config)
    }

    /// Its postmaster's process, while there is one.
    pub fn pid(&self) -> Option<Pid> {
        let lines = std::fs::read_to_string(self.data.join("postmaster.pid")).ok()?;
        let pid = Pid::from_raw(lines.lines().next()?.trim().parse().ok()?)?;
        // The number in a stale file may belong to another process by now; a postmaster's is at
        // home in its cluster.
        let home = std::fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).ok()?;
        (home == self.data).then_some(pid)
    }
}

/// Ends a process of PostgreSQL as a crash would, a postmaster with all its children, and waits
/// until it is gone.
pub fn end_postgres(pid: Pid) {
    let _ = kill_process(pid, Signal::QUIT);
    // It kills children that do not listen after 5 s by itself.
    let deadline = Instant::now() + Duration::from_secs(15);
    while !is_gone(pid) {
        if Instant::now() >= deadline {
            let _ = kill_process(pid, Signal::KILL);
            return;
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether it has ended and was collected; until then its number counts as taken. Its parent was
/// killed, so this process collects it if it is a subreaper, else the machine's first, in time.
fn is_gone(pid: Pid) -> bool {
    let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    test_kill_process(pid) == Err(rustix::io::Errno::SRCH)
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
