//! Three machines with a node each, on one PostgreSQL and one Redis.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::network::{Link, Network, Space};
use crate::doors::Doors;
use crate::outcome::{Why, block_on};
use crate::support::brokers::{Broker, Kind, Setup};
use crate::support::http::{Answer, call, try_call};
use crate::support::postgres::test_dir;
use crate::support::served::{Served, tail};
use crate::support::standby::{DATABASE, Server, USER};
use crate::support::webhook::SECRET;

/// How long a step of the nodes may take.
pub const PATIENCE: Duration = Duration::from_secs(90);
pub const LEASE: Duration = Duration::from_millis(3_000);
const ANSWER_LEASE_MS: u64 = 900;
/// How long buyers have to pay; some are late.
const PAYMENT_TTL_MS: u64 = 5_000;
/// How far the clock of the first machine is ahead, and that of the second behind.
const CLOCKS_APART: Duration = Duration::from_secs(3_600);
const LOOK: Duration = Duration::from_millis(20);
const PORT: u16 = 8080;
/// A third of 64 lanes each.
const DEALT: [usize; 3] = [21, 21, 22];

/// A trigger that notes each order which a node writes that is not the owner of its lane. Whoever replays the log of a
/// dead node writes as the dead one, by which the lane is blocked.
const WITNESS: &str = "
    CREATE SCHEMA witness;
    CREATE TABLE witness.stranger (order_id bigint, writer smallint, lane smallint, node smallint, blocked_by smallint);
    CREATE FUNCTION witness.look() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        writer smallint := substring(current_setting('application_name') FROM '^millrace [a-z]+ ([0-9]+)/');
    BEGIN
        INSERT INTO witness.stranger
        SELECT NEW.order_id, writer, lane, node, blocked_by FROM millrace.lane
         WHERE lane = (NEW.order_id >> 16) & 63
           AND (writer IS NULL OR node IS DISTINCT FROM writer AND blocked_by IS DISTINCT FROM writer);
        RETURN NULL;
    END $$;
    CREATE TRIGGER witness AFTER INSERT ON millrace.orders FOR EACH ROW EXECUTE FUNCTION witness.look();";

/// The library that sets a process's clock apart.
fn faketime() -> Result<PathBuf, Why> {
    let folders = std::fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten();
    let places = folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
    let missing = || Why::NotRun("libfaketime is not installed".to_owned());
    places
        .into_iter()
        .find(|place| place.exists())
        .ok_or_else(missing)
}

/// What every node has in common.
struct Common {
    settings: Vec<(String, String)>,
    dir: TempDir,
    doors: Arc<Doors>,
    faketime: PathBuf,
}

impl Common {
    /// What sets the clock of a machine, and leaves the one that runs since its start alone (`faketime(1)`).
    fn clock_of(&self, machine: u8) -> Vec<(String, String)> {
        let apart = CLOCKS_APART.as_secs();
        let time = match machine {
            1 => format!("+{apart}"),
            2 => format!("-{apart}"),
            _ => return Vec::new(),
        };
        [
            ("LD_PRELOAD", self.faketime.display().to_string()),
            ("FAKETIME", time),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }
}

pub struct Cluster<'a> {
    pub network: &'a Network,
    pub database: Server,
    pub broker: Broker,
    pub machines: Vec<Machine<'a>>,
    /// The nodes that the load balancer has.
    pub doors: Arc<Doors>,
    common: Common,
    failovers: u32,
}

/// A machine, and the node on it while there is one.
pub struct Machine<'a> {
    pub number: u8,
    space: &'a Space,
    data_dir: PathBuf,
    /// Processes so far.
    lives: u32,
    log: PathBuf,
    served: Option<Served>,
    /// Processes that ended by themselves.
    pub ended: u64,
}

impl<'a> Cluster<'a> {
    /// Three nodes, each with a third of the lanes.
    pub fn start(network: &'a Network, bug: Option<&str>) -> Result<Self, Why> {
        let faketime = faketime()?;
        let dir = test_dir();
        let rules = dir.path().join("rules.conf");
        let subnet = format!("host all all {}/24 trust", Link::Database.outside());
        std::fs::write(
            &rules,
            format!("local all,replication all trust\n{subnet}\n"),
        )
        .map_err(|error| format!("write the rules: {error}"))?;
        let settings = [
            ("listen_addresses", Link::Database.outside().to_string()),
            ("hba_file", rules.display().to_string()),
            ("max_connections", "200".to_owned()),
        ];
        let settings: Vec<(&str, &str)> = (settings.iter())
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let database = block_on(Server::start_in(dir.path(), &settings));
        let outside = Link::Broker.outside();
        let setup = Setup {
            lines: Some(Box::new(move |_, _| {
                format!("bind 127.0.0.1 {outside}\nprotected-mode no\n")
            })),
            ..Setup::default()
        };
        let missing = || Why::NotRun("no Redis could be had".to_owned());
        let broker = Broker::start_with(Kind::Redis, setup).ok_or_else(missing)?;
        let port = broker.address().port();
        let url = format!(
            "postgres://{USER}@{}:5432/{DATABASE}",
            Link::Database.outside()
        );
        let mut settings: Vec<(String, String)> = [
            ("DATABASE__URL", url),
            ("DATABASE__POOL_SIZE", "4".to_owned()),
            (
                "DATABASE__CLOCK_DIFFERENCE_MAX_MS",
                (2 * CLOCKS_APART.as_millis()).to_string(),
            ),
            ("DATA_PLANE__TRUST_NETWORK", "true".to_owned()),
            ("DATA_PLANE__THREADS", "2".to_owned()),
            ("WORKERS__COUNT", "2".to_owned()),
            ("QUEUE__BACKEND", "redis".to_owned()),
            ("QUEUE__REDIS__URL", format!("redis://{outside}:{port}/")),
            ("ORDERS__PAYMENT_TTL_MS", PAYMENT_TTL_MS.to_string()),
            ("PAYMENTS__STANDARD__SECRET", SECRET.to_owned()),
            ("PAYMENTS__ORPHAN_CHECK_MS", "200".to_owned()),
            ("PAYMENTS__ORPHAN_CHECKS", "2".to_owned()),
            ("RECEIPT__KEY", "a-key-that-all-nodes-have".to_owned()),
            ("CLUSTER__ENABLED", "true".to_owned()),
            (
                "CLUSTER__SECRET",
                "a secret that all of the nodes have".to_owned(),
            ),
            ("CLUSTER__LEASE_MS", LEASE.as_millis().to_string()),
            ("CLUSTER__ANSWER_LEASE_MS", ANSWER_LEASE_MS.to_string()),
        ]
        .map(|(name, value)| (format!("MILLRACE_{name}"), value))
        .to_vec();
        settings.extend(bug.map(|bug| ("MILLRACE_FAULT".to_owned(), format!("bug@{bug}"))));
        let doors = Arc::new(Doors::of_nodes(Vec::new()));
        let common = Common {
            settings,
            dir,
            doors: Arc::clone(&doors),
            faketime,
        };
        let machine = |(number, space)| Machine {
            number,
            space,
            data_dir: common.dir.path().join(format!("machine-{number}")),
            lives: 0,
            log: PathBuf::new(),
            served: None,
            ended: 0,
        };
        let machines = (1..).zip(&network.machines).map(machine).collect();
        let mut cluster = Cluster {
            network,
            database,
            broker,
            machines,
            doors,
            common,
            failovers: 0,
        };
        // The first one makes the tables.
        cluster.machines[0].start(&cluster.common)?;
        block_on(cluster.database.sql(WITNESS));
        cluster.start_all()?;
        cluster.until_whole()?;
        Ok(cluster)
    }

    /// Starts the nodes of all machines that have none, at the same time.
    pub fn start_all(&mut self) -> Result<(), String> {
        let common = &self.common;
        std::thread::scope(|scope| {
            let idle = self.machines.iter_mut().filter(|one| one.served.is_none());
            let starts: Vec<_> = idle
                .map(|machine| scope.spawn(|| machine.start(common)))
                .collect();
            let ends = starts
                .into_iter()
                .map(|start| start.join().expect("a start"));
            ends.collect::<Result<Vec<()>, String>>().map(drop)
        })
    }

    /// Waits until all nodes run and know that each has a third of the lanes. What has ended by itself is started again,
    /// as whoever keeps a service running would.
    pub fn until_whole(&mut self) -> Result<(), String> {
        let all: Vec<usize> = (0..self.machines.len()).collect();
        let deadline = Instant::now() + PATIENCE;
        let mut before = self.renewals();
        loop {
            self.until_dealt(&all, &DEALT)?;
            let now = self.renewals();
            if !before.keys().eq(now.keys()) {
                before = now;
            } else if before
                .values()
                .zip(now.values())
                .all(|(one, two)| one < two)
            {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!("not every node has renewed: {before:?}"));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// How often each node has renewed, by its number and epoch. One that was paused is not fenced any more once it has.
    fn renewals(&self) -> BTreeMap<(i16, i64), i64> {
        block_on(async {
            let sql = "SELECT node, epoch, renewals FROM millrace.node WHERE state = 'active'";
            let rows = self.database.session().await.query(sql, &[]).await;
            let rows = rows.expect("what each node has renewed");
            rows.iter()
                .map(|row| ((row.get(0), row.get(1)), row.get(2)))
                .collect()
        })
    }

    /// Waits until these machines have nodes that know that lanes are dealt like this.
    pub fn until_dealt(&mut self, among: &[usize], expected: &[usize]) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for at in among {
                self.machines[*at].look(&self.common)?;
            }
            let known = among.iter().map(|at| dealt(self.machines[*at].data()));
            let known: Vec<_> = known.collect();
            if known
                .iter()
                .all(|(counts, nowhere)| counts == expected && *nowhere == 0)
            {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!("lanes are dealt as {known:?}, not {expected:?}"));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Orders that were written by another node than their lane's.
    pub fn strangers(&self) -> Vec<String> {
        block_on(async {
            let sql = "SELECT s::text FROM witness.stranger s";
            let rows = self.database.session().await.query(sql, &[]).await;
            let rows = rows.expect("what the witness has seen");
            rows.iter().map(|row| row.get(0)).collect()
        })
    }

    /// What the logs of all processes have of panics.
    pub fn panics(&self) -> Vec<String> {
        let mut panics = Vec::new();
        for log in self.logs() {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines = text.lines().filter(|line| line.contains("panicked at"));
            panics.extend(lines.map(|line| format!("{}: {line}", log.display())));
        }
        panics
    }

    fn logs(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.common.dir.path())
            .into_iter()
            .flatten();
        let paths = files.flatten().map(|entry| entry.path());
        paths
            .filter(|path| path.extension().is_some_and(|end| end == "log"))
            .collect()
    }

    /// Copies the logs of all processes, and what is in the database, to where they stay. Returns the place.
    pub fn keep_evidence(&self, name: &str) -> String {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_dir_all(&kept);
        let _ = std::fs::create_dir_all(&kept);
        for log in self.logs() {
            if let Some(name) = log.file_name() {
                let _ = std::fs::copy(&log, kept.join(name));
            }
        }
        for table in [
            "node",
            "lane",
            "sku",
            "stock_share",
            "stock_log",
            "orders",
            "payments",
        ] {
            let sql = format!("SELECT t::text FROM millrace.{table} t");
            let rows = block_on(async { self.database.session().await.query(&sql, &[]).await });
            let lines = rows
                .iter()
                .flatten()
                .map(|row| row.get::<_, String>(0) + "\n");
            let _ = std::fs::write(kept.join(table), lines.collect::<String>());
        }
        kept.display().to_string()
    }

    /// A synchronous standby takes the place of the database, which is gone. `moment`: how long they run together.
    pub fn fail_over(&mut self, moment: Duration) {
        self.failovers += 1;
        let name = format!("standby-{}", self.failovers);
        let (dir, primary) = (self.common.dir.path(), &mut self.database);
        block_on(async {
            let standby = primary.follow(dir, &name).await;
            primary.wait_for_standby(true).await;
            tokio::time::sleep(moment).await;
            primary.stop_immediately();
            standby.promote().await;
            let gone = std::mem::replace(primary, standby);
            primary.replace(gone).await;
        });
    }

    /// Makes a machine start its node.
    pub fn start_at(&mut self, at: usize) -> Result<(), String> {
        self.machines[at].start(&self.common)
    }
}

impl Machine<'_> {
    /// Where clients call.
    pub fn data(&self) -> SocketAddr {
        Link::Clients.at(self.number, PORT)
    }

    /// Starts its node and waits until it is ready.
    fn start(&mut self, common: &Common) -> Result<(), String> {
        let listen = |link: Link, port| link.at(self.number, port).to_string();
        let mut settings = common.settings.clone();
        for (name, value) in [
            ("DATA_PLANE__LISTEN", listen(Link::Clients, PORT)),
            ("CLUSTER__LISTEN", listen(Link::Peers, PORT)),
        ] {
            settings.push((format!("MILLRACE_{name}"), value));
        }
        settings.extend(common.clock_of(self.number));
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.lives += 1;
            let name = format!("machine-{}-{}.log", self.number, self.lives);
            self.log = common.dir.path().join(name);
            std::fs::create_dir_all(&self.data_dir).map_err(|e| format!("a directory: {e}"))?;
            let start = || Served::try_start(&self.data_dir, &settings, &self.log);
            match self.space.within(start) {
                Ok(served) => {
                    self.served = Some(served);
                    let mut open = common.doors.open();
                    open.retain(|door| *door != self.data());
                    open.push(self.data());
                    return Ok(());
                }
                // As whoever keeps a service running does.
                Err(ended) if ended.status.code() == Some(1) && Instant::now() < deadline => {
                    self.ended += 1;
                    std::thread::sleep(LOOK);
                }
                Err(ended) => {
                    let number = self.number;
                    return Err(format!(
                        "machine {number} does not start: {}: {}",
                        ended.status, ended.log
                    ));
                }
            }
        }
    }

    /// Starts its node again if that has ended by itself, in a way in which a node may end.
    fn look(&mut self, common: &Common) -> Result<(), String> {
        let Some(served) = &mut self.served else {
            return self.start(common);
        };
        let status = served.child.try_wait().map_err(|e| e.to_string())?;
        match status {
            None => Ok(()),
            Some(status) if status.code() == Some(1) => {
                self.ended += 1;
                self.served = None;
                self.start(common)
            }
            Some(status) => Err(format!(
                "machine {} ended by itself: {status}: {}",
                self.number,
                tail(&self.log)
            )),
        }
    }

    /// Kills its node.
    pub fn kill(&mut self) {
        if let Some(served) = self.served.take() {
            served.kill();
        }
    }

    /// Kills its node and deletes its directory.
    pub fn lose(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.data_dir);
    }

    /// Ends its node in an orderly way.
    pub fn stop(&mut self) -> Result<(), String> {
        let Some(served) = self.served.take() else {
            return Ok(());
        };
        served.terminate();
        match served.wait() {
            Some(0) => Ok(()),
            code => Err(format!(
                "SIGTERM ended machine {} with {code:?}: {}",
                self.number,
                tail(&self.log)
            )),
        }
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(served) = &self.served {
            served.signal(signal);
        }
    }

    /// Does something with the address at which operators of this machine call.
    pub fn control<T: Send>(&self, what: impl FnOnce(SocketAddr) -> T + Send) -> Option<T> {
        let control = self.served.as_ref()?.control;
        Some(self.space.within(|| what(control)))
    }

    /// Its node's number.
    pub fn node(&self) -> Option<i64> {
        let ask = |control| try_call(control, "GET", "/admin/v1/nodes", &[], "");
        self.control(ask)?.ok()?.json()["node"].as_i64()
    }

    /// Asks a node to hand its lanes over.
    pub fn drain(&self, node: i64) -> Option<Answer> {
        let target = format!("/admin/v1/nodes/{node}/drain");
        self.control(|control| call(control, "POST", &target, &[], ""))
    }
}

/// How many lanes each node has, as the one at `asked` knows, in ascending order; and how many are open nowhere.
fn dealt(asked: SocketAddr) -> (Vec<usize>, usize) {
    let lanes = try_call(asked, "GET", "/v1/lanes", &[], "");
    let lanes = lanes.map(|answer| answer.json()).unwrap_or_default();
    let lanes = lanes["lanes"].as_array().cloned().unwrap_or_default();
    let mut counts = BTreeMap::new();
    for lane in &lanes {
        *counts.entry(lane["node"].as_i64()).or_insert(0) += 1;
    }
    let unknown = 64 * usize::from(lanes.is_empty());
    let nowhere = counts.remove(&None).unwrap_or(unknown);
    let mut counts: Vec<usize> = counts.into_values().collect();
    counts.sort_unstable();
    (counts, nowhere)
}
