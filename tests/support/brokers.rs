//! Real brokers for tests: Redis, Kafka and RocketMQ, each on ports and in a directory of its own.
//!
//! `tests/brokers/brokers` starts and ends them, for people and for tests alike. A broker also ends with the process
//! of its test, however that ends.

use std::{
    fmt,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Output},
    sync::OnceLock,
};

use tempfile::TempDir;

/// The brokers that Millrace can keep its log in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `redis-server`, which fsyncs every write.
    Redis,
    /// One Kafka broker, its own controller.
    Kafka,
    /// One name server and one broker, which fsyncs every message.
    RocketMq,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Redis => "redis",
            Kind::Kafka => "kafka",
            Kind::RocketMq => "rocketmq",
        }
    }

    /// Whether it can be had, found out once a process; otherwise the reason.
    pub fn prepared(self) -> &'static Result<(), String> {
        static PREPARED: [OnceLock<Result<(), String>>; 3] = [const { OnceLock::new() }; 3];
        PREPARED[self as usize].get_or_init(|| {
            if std::env::var_os("MILLRACE_WITHOUT_BROKERS").is_some_and(|value| !value.is_empty()) {
                return Err(format!(
                    "not run: {}: MILLRACE_WITHOUT_BROKERS is set",
                    self.name()
                ));
            }
            let output = script(&["prepare", self.name()]);
            match output.status.success() {
                true => Ok(()),
                false => Err(said(&output)),
            }
        })
    }
}

/// Settings of the server for its first port and its folder, in its own language, a line each.
pub type Lines = Box<dyn Fn(u16, &Path) -> String + Send + Sync>;

/// Differences from the broker that is started otherwise.
#[derive(Default)]
pub struct Setup {
    /// The host that the broker sends its clients to, with its own ports, where a proxy may wait for them: all of
    /// 127.0.0.0/8 is this machine, at least on Linux. Redis sends nobody anywhere; [`Broker::env`] names the host.
    pub advertise: Option<&'static str>,
    /// More of the server's settings.
    pub lines: Option<Lines>,
    /// MiB of the file system for its data alone, if this machine lets us mount one.
    pub room_mib: Option<u32>,
    /// `user:password` for Kafka's SCRAM.
    pub scram: Option<&'static str>,
}

impl Setup {
    /// A Redis whose replicas follow at once, itself a replica of `master` if there is one.
    pub fn redis(master: Option<SocketAddr>) -> Self {
        let replica = master.map(|at| format!("replicaof {} {}\n", at.ip(), at.port()));
        let lines = format!(
            "repl-diskless-sync-delay 0\n{}",
            replica.unwrap_or_default()
        );
        Setup {
            lines: Some(Box::new(move |_, _| lines.clone())),
            ..Setup::default()
        }
    }
}

/// A running broker. On drop it is killed, and its data is deleted.
pub struct Broker {
    kind: Kind,
    port: u16,
    setup: Setup,
    dir: TempDir,
    env: Vec<(String, String)>,
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker")
            .field("kind", &self.kind)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// Number of ports that a broker takes, from [`Broker::address`] on: RocketMQ's are those of the name server, the
/// broker's fast one, none, the broker's own, and its replication's.
const PORTS: u16 = 5;

/// Tries, in case that another process takes a port that was free a moment ago.
const TRIES: usize = 3;

impl Broker {
    /// Starts one and waits until it takes requests. `None`, said loudly, if it cannot be had here.
    pub fn start(kind: Kind) -> Option<Self> {
        Self::start_with(kind, Setup::default())
    }

    /// The same with other settings.
    pub fn start_with(kind: Kind, setup: Setup) -> Option<Self> {
        if let Err(reason) = kind.prepared() {
            not_run(reason);
            return None;
        }
        let mut broker = Broker {
            kind,
            port: free_ports(),
            setup,
            dir: tempfile::Builder::new()
                .prefix(&format!("millrace-{}-", kind.name()))
                .tempdir()
                .expect("make a temporary directory"),
            env: Vec::new(),
        };
        for _ in 1..TRIES {
            match broker.launch() {
                Ok(()) => return Some(broker),
                Err(why) if why.contains("ddress already in use") => broker.port = free_ports(),
                Err(why) => panic!("{why}"),
            }
        }
        broker.start_again();
        Some(broker)
    }

    fn launch(&mut self) -> Result<(), String> {
        let (port, owner) = (self.port.to_string(), std::process::id().to_string());
        let Setup {
            advertise,
            lines,
            room_mib,
            scram,
        } = &self.setup;
        let mut options = vec!["--port", &port, "--with", &owner];
        options.extend(advertise.iter().flat_map(|host| ["--advertise", *host]));
        options.extend(scram.iter().flat_map(|user| ["--scram", *user]));
        let room = room_mib.map(|mib| mib.to_string());
        options.extend(room.iter().flat_map(|mib| ["--room", mib]));
        let file = self.dir.path().join("settings");
        if let Some(lines) = lines {
            std::fs::write(&file, lines(self.port, self.dir.path())).expect("write settings");
            options.extend(["--settings", file.to_str().expect("a path in UTF-8")]);
        }
        let output = self.script("start", &options);
        if !output.status.success() {
            return Err(said(&output));
        }
        self.env = String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        Ok(())
    }

    /// Kills it with SIGKILL, and returns once it is gone.
    pub fn kill9(&self) {
        self.must("kill", &[]);
    }

    /// Stops it in an orderly way, and returns once it is gone.
    pub fn stop(&self) {
        self.must("stop", &[]);
    }

    /// Starts it again if it does not run, on the same ports and on its data, and waits until it takes requests.
    pub fn start_again(&mut self) {
        self.launch().unwrap_or_else(|why| panic!("{why}"));
    }

    /// Stops it in the middle of whatever it does, with SIGSTOP. Its connections stay open and silent.
    pub fn pause(&self) {
        self.must("pause", &[]);
    }

    /// Lets it go on after [`Broker::pause`].
    pub fn resume(&self) {
        self.must("resume", &[]);
    }

    /// Kills it and deletes its data, as if its machine were lost.
    pub fn erase(&self) {
        self.kill9();
        self.must("stop", &["--erase"]);
    }

    /// The address that its clients begin with; of RocketMQ, the name server's.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Every address that its clients may connect to.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let offsets: &[u16] = match self.kind {
            Kind::Redis | Kind::Kafka => &[0],
            Kind::RocketMq => &[0, 1, 3],
        };
        offsets
            .iter()
            .map(|offset| (Ipv4Addr::LOCALHOST, self.port + offset).into())
            .collect()
    }

    /// The settings with which Millrace keeps its log in it, as environment variables.
    pub fn env(&self) -> &[(String, String)] {
        &self.env
    }

    /// The folder with its logs and its `data`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Whether its data are on a file system of their own.
    pub fn has_own_room(&self) -> bool {
        let device = |path: &Path| path.metadata().map(|data| data.dev()).ok();
        device(self.dir()) != device(&self.dir().join("data"))
    }

    fn script(&self, command: &str, more: &[&str]) -> Output {
        let dir = self.dir.path().to_str().expect("a path in UTF-8");
        script(&[&[command, self.kind.name(), "--dir", dir], more].concat())
    }

    fn must(&self, command: &str, more: &[&str]) {
        let output = self.script(command, more);
        assert!(output.status.success(), "{}", said(&output));
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.script("kill", &[]);
        if self.setup.room_mib.is_some() {
            let _ = self.script("stop", &["--erase"]);
        }
    }
}

/// Says that something is not tested here. Not by `eprintln!`, which the test harness keeps to itself if a test passes.
pub fn not_run(reason: &str) {
    let _ = std::io::stderr().write_all(format!("\n*** {reason} ***\n\n").as_bytes());
}

fn script(arguments: &[&str]) -> Output {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/brokers/brokers");
    Command::new(program)
        .args(arguments)
        .output()
        .expect("run tests/brokers/brokers")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

/// The first one of [`PORTS`] free ports. They are below those that the kernel gives to outgoing connections: there a
/// client that tries to reach a killed broker is given the broker's own port sooner or later, and meets itself.
fn free_ports() -> u16 {
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    (0..1000)
        .map(|_| rand::random_range(15_000..30_000_u16))
        .find(|first| (*first..first + PORTS).all(|port| is_free(&port)))
        .expect("free ports")
}
