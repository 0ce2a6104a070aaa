//! Nodes as processes of their own.

use std::fs::File;
use std::net::SocketAddr;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millrace::config::Backend;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::support::broker_admin;
use crate::support::brokers::{Broker, Kind};
use crate::support::http::{Answer, call, try_call};
use crate::support::postgres::{TestDatabase, test_dir};
use crate::support::proxy::Proxy;
use crate::support::served::{Ended, Served, millrace, program};
use crate::support::server::{RECEIPT_KEY, TestServer};
use crate::support::waiting::wait_until;
use crate::support::webhook::SECRET;

/// Leases of the nodes, in milliseconds.
pub const LEASE_MS: u64 = 3_000;
pub const ANSWER_LEASE_MS: u64 = 900;

/// Between two requests of a buyer. Without it, a few buyers keep a small machine from the nodes' own deadlines.
const PAUSE: Duration = Duration::from_millis(20);

/// Clusters at a time. Three nodes that do nothing take a third of a core without optimisation; more of them at once than this
/// lets keep each other from their deadlines, and are done no earlier.
static ROOM: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    Semaphore::new(2 * cores)
});

/// A database and a broker, and the nodes on them.
pub struct Cluster {
    pub database: TestDatabase,
    url: String,
    broker: Broker,
    dir: TempDir,
    started: AtomicU64,
    /// `orders.payment_ttl_ms`.
    payment_ttl_ms: u64,
    /// Given back last.
    _room: SemaphorePermit<'static>,
}

/// A node that runs.
pub struct Node {
    pub served: Served,
    pub data_dir: PathBuf,
    pub log: PathBuf,
    config: PathBuf,
}

/// The node, which has to be there.
fn started(name: &str, start: Result<Node, Ended>) -> Node {
    start.unwrap_or_else(|ended| panic!("{name} ended: {}\n{}", ended.status, ended.log))
}

impl Cluster {
    /// A cluster without nodes; `None` if there is no broker here.
    pub async fn open() -> Option<Self> {
        Self::with_payment_ttl_ms(900_000).await
    }

    /// The same on the server at `url`.
    pub async fn open_at(url: String) -> Option<Self> {
        let mut cluster = Self::open().await?;
        cluster.url = url;
        Some(cluster)
    }

    /// A proxy through which nodes come to the database from now on.
    pub async fn through_a_proxy(&mut self) -> Proxy {
        let config = self.database.config();
        let proxy = Proxy::start(&config).await;
        let names = config.get_user().zip(config.get_dbname());
        let (user, name) = names.expect("a user and a database");
        self.url = proxy.url(user, name);
        proxy
    }

    /// The same with another time to pay.
    pub async fn with_payment_ttl_ms(payment_ttl_ms: u64) -> Option<Self> {
        Self::on(Kind::Redis, payment_ttl_ms).await
    }

    /// The same with the logs on a broker of this kind.
    pub async fn on(kind: Kind, payment_ttl_ms: u64) -> Option<Self> {
        let room = ROOM.acquire().await.expect("it stays open");
        let database = TestDatabase::create().await;
        Some(Cluster {
            _room: room,
            payment_ttl_ms,
            url: database.url().to_owned(),
            broker: Broker::start(kind)?,
            database,
            dir: test_dir(),
            started: AtomicU64::new(0),
        })
    }

    /// Starts a node on a directory of its own, and waits until it is ready.
    pub fn start(&self, name: &str) -> Node {
        started(name, self.try_start(name))
    }

    /// The Redis where the nodes keep their logs.
    pub fn redis(&self) -> String {
        format!("redis://{}/", self.broker.address())
    }

    /// A process on its own inside of the test, with its log on the same Redis.
    pub async fn serve_alone(&self) -> TestServer {
        let redis = self.redis();
        TestServer::start_at(self.database.url(), |config| {
            config.queue.backend = Backend::Redis;
            config.queue.redis.url = redis;
        })
        .await
    }

    /// Deletes the log of a node.
    pub fn delete_log(&self, number: i64) {
        let stream = format!("millrace:millrace:{number}");
        let deleted = broker_admin::redis(self.broker.address(), &["DEL", &stream]);
        assert_eq!(deleted, ":1", "{stream}");
    }

    /// The row of a node as the one at `asked` shows it.
    pub fn row_of(asked: &Node, number: i64) -> Value {
        let nodes = try_call(asked.served.control, "GET", "/admin/v1/nodes", &[], "");
        let nodes = nodes.map(|answer| answer.json()).unwrap_or_default();
        let rows = nodes["nodes"].as_array().cloned().unwrap_or_default();
        let row = rows.into_iter().find(|row| row["node"] == number);
        row.unwrap_or_default()
    }

    /// The same, if it gets that far.
    pub fn try_start(&self, name: &str) -> Result<Node, Ended> {
        self.try_start_with(name, |settings| settings)
    }

    /// Starts a process on its own with the settings of the nodes, if it gets that far.
    pub fn try_start_alone(&self, name: &str) -> Result<Node, Ended> {
        self.try_start_with(name, |settings| {
            settings.replace("enabled = true", "enabled = false")
        })
    }

    /// Starts one, and waits until it is ready.
    pub fn start_alone(&self, name: &str) -> Node {
        started(name, self.try_start_alone(name))
    }

    /// Writes a file, and returns its path.
    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("write a file");
        path.to_str().expect("a path in UTF-8").to_owned()
    }

    /// The same as [`Self::try_start`] with other settings.
    pub fn try_start_with(
        &self,
        name: &str,
        change: impl Fn(String) -> String,
    ) -> Result<Node, Ended> {
        self.try_start_as(name, change, millrace)
    }

    /// The same as [`Self::start`] on a machine whose clock is so many milliseconds ahead.
    pub fn start_ahead(&self, name: &str, ahead_ms: u64) -> Node {
        let allow = format!("pool_size = 4\nclock_difference_max_ms = {}", 2 * ahead_ms);
        let start = |args: &[&str]| {
            let mut command = millrace(args);
            command.env("MILLRACE_FAULT", format!("clock@{ahead_ms}"));
            command
        };
        let change = |settings: String| settings.replace("pool_size = 4", &allow);
        started(name, self.try_start_as(name, change, start))
    }

    /// The same as [`Self::try_start`] with the program of another release.
    pub fn try_start_other(&self, other: &str, name: &str) -> Result<Node, Ended> {
        self.try_start_as(name, |settings| settings, |args| program(other, args))
    }

    fn try_start_as(
        &self,
        name: &str,
        change: impl Fn(String) -> String,
        program: impl Fn(&[&str]) -> Command,
    ) -> Result<Node, Ended> {
        let data_dir = self.dir.path().join(name);
        std::fs::create_dir_all(&data_dir).expect("a directory");
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let log = self.dir.path().join(format!("{name}-{number}.log"));
        let config = data_dir.join("millrace.toml");
        std::fs::write(&config, change(self.config(&data_dir))).expect("write the configuration");
        let output = File::create(&log).expect("a log");
        let path = config.to_str().expect("a path in UTF-8");
        let mut command = program(&["serve", "--config", path]);
        command.stderr(output);
        let served = Served::try_start_as(&mut command, &data_dir, &log)?;
        Ok(Node {
            served,
            data_dir,
            log,
            config,
        })
    }

    fn config(&self, data_dir: &Path) -> String {
        // The broker's settings, named as variables of the environment.
        let setting = |(name, value): &(String, String)| {
            let path = name.trim_start_matches("MILLRACE_").replace("__", ".");
            format!("{} = \"{value}\"\n", path.to_lowercase())
        };
        let queue: String = self.broker.env().iter().map(setting).collect();
        format!(
            r#"
            {queue}
            data_dir = "{data_dir}"
            [database]
            url = "{url}"
            pool_size = 4
            [data_plane]
            listen = "127.0.0.1:0"
            threads = 2
            [control_plane]
            listen = "127.0.0.1:0"
            [workers]
            count = 2
            [orders]
            payment_ttl_ms = {payment_ttl_ms}
            [receipt]
            key = "{RECEIPT_KEY}"
            [payments.standard]
            secret = "{SECRET}"
            [log]
            level = "info"
            [cluster]
            enabled = true
            listen = "127.0.0.1:0"
            secret = "the secret of the nodes in this test"
            lease_ms = {LEASE_MS}
            answer_lease_ms = {ANSWER_LEASE_MS}
            "#,
            data_dir = data_dir.display(),
            url = self.url,
            payment_ttl_ms = self.payment_ttl_ms,
        )
    }

    /// How many lanes each node has open, as the one at `asked` knows; the last number is that of lanes open nowhere.
    pub fn dealt(asked: SocketAddr) -> (Vec<usize>, usize) {
        let lanes = try_call(asked, "GET", "/v1/lanes", &[], "");
        let lanes = lanes.map(|answer| answer.json()).unwrap_or_default();
        let lanes = lanes["lanes"].as_array().cloned().unwrap_or_default();
        let mut counts = std::collections::BTreeMap::new();
        for lane in &lanes {
            *counts.entry(lane["node"].as_i64()).or_insert(0) += 1;
        }
        let nowhere = counts
            .remove(&None)
            .unwrap_or(64 * usize::from(lanes.is_empty()));
        let mut counts: Vec<usize> = counts.into_values().collect();
        counts.sort_unstable();
        (counts, nowhere)
    }

    /// Waits until every node knows that the lanes are dealt like this.
    pub async fn wait_for_lanes(nodes: &[&Node], expected: &[usize]) {
        for node in nodes {
            wait_until(&format!("lanes are dealt as {expected:?}"), async || {
                Self::dealt(node.served.data) == (expected.to_vec(), 0)
            })
            .await;
        }
    }

    /// Waits until every node takes orders of a SKU.
    pub async fn wait_for_sku(nodes: &[&Node], sku: &str) {
        for node in nodes {
            wait_until("every node knows the SKU", async || {
                let target = format!("/v1/skus/{sku}");
                let answer = try_call(node.served.data, "GET", &target, &[], "");
                answer.is_ok_and(|answer| answer.status == 200)
            })
            .await;
        }
    }
}

impl Drop for Cluster {
    /// What the nodes of a test that fails have said.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let logs = std::fs::read_dir(self.dir.path()).into_iter().flatten();
        let logs = logs.flatten().map(|entry| entry.path());
        for log in logs.filter(|path| path.extension().is_some_and(|end| end == "log")) {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            println!("--- {}\n{said}", log.display());
        }
    }
}

impl Node {
    pub fn signal(&self, signal: Signal) {
        self.served.signal(signal);
    }

    /// Gives up the log of a node, with this one's settings.
    pub fn abandon_log_of(&self, number: i64) {
        abandon_log_of(&self.config, number);
    }

    /// Waits until it gives up.
    pub fn wait_for_its_end(self) {
        let code = self.served.wait();
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        assert_ne!(code, Some(0), "{log}");
    }

    /// Waits until a clean end.
    pub fn stop(self) {
        self.served.terminate();
        let code = self.served.wait();
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        assert_eq!(code, Some(0), "{log}");
    }
}

/// Gives up the log of a node, with the settings in a file.
pub fn abandon_log_of(config: &Path, number: i64) {
    abandon_log(config, &["--node", &number.to_string()]);
}

/// Gives up the log of node 0 as that of a process on its own, or the one that `more` names.
pub fn abandon_log(config: &Path, more: &[&str]) {
    let config = config.to_str().expect("a path in UTF-8");
    let words = [
        "queue",
        "abandon",
        "--config",
        config,
        "--yes",
        "--process-is-gone",
    ];
    let mut command = millrace(&words);
    let done = command.args(more).output().expect("run the program");
    assert!(done.status.success(), "{done:?}");
}

/// What became of an order that was asked for again until it was placed or refused for good.
#[derive(Clone, Debug)]
pub struct Placed {
    pub user: String,
    pub key: String,
    pub order_id: String,
}

impl Placed {
    /// An order that was acknowledged.
    pub fn of(user: &str, key: &str, answer: &Answer) -> Self {
        assert!(matches!(answer.status, 201 | 202), "{answer:?}");
        Placed {
            user: user.to_owned(),
            key: key.to_owned(),
            order_id: answer.json()["order_id"]
                .as_str()
                .expect("an id")
                .to_owned(),
        }
    }

    /// The same request again.
    pub fn again(&self, at: SocketAddr, sku: &str) -> Answer {
        let fields = [
            ("Content-Type", "application/json"),
            ("Idempotency-Key", self.key.as_str()),
        ];
        let body = json!({ "user_id": self.user, "sku_id": sku }).to_string();
        call(at, "POST", "/v1/orders", &fields, &body)
    }
}

/// Buyers who click all the time, at whichever node is there.
pub struct Buyers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    pub placed: Arc<Mutex<Vec<Placed>>>,
    /// Answers that no client should see, and lost connections.
    pub strange: Arc<Mutex<Vec<String>>>,
    pub targets: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Buyers {
    /// Begins with so many at once.
    pub fn start(count: usize, sku: &str, targets: Vec<SocketAddr>) -> Self {
        let targets = Arc::new(Mutex::new(targets));
        let mut buyers = Buyers {
            stop: Arc::default(),
            threads: Vec::new(),
            placed: Arc::default(),
            strange: Arc::default(),
            targets,
        };
        for number in 0..count {
            let (stop, placed) = (Arc::clone(&buyers.stop), Arc::clone(&buyers.placed));
            let (strange, targets) = (Arc::clone(&buyers.strange), Arc::clone(&buyers.targets));
            let sku = sku.to_owned();
            buyers.threads.push(std::thread::spawn(move || {
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let user = format!("buyer-{number}-{turn}");
                    let placing = Placing {
                        user,
                        sku: &sku,
                        is_async: turn % 2 == 0,
                        turn: number + turn,
                        targets: &targets,
                        strange: &strange,
                        stop: &stop,
                    };
                    placed.lock().unwrap().extend(placing.until_placed());
                    std::thread::sleep(PAUSE);
                }
            }));
        }
        buyers
    }

    /// The nodes that buyers click at from now on.
    pub fn go_to(&self, targets: Vec<SocketAddr>) {
        *self.targets.lock().unwrap() = targets;
    }

    /// Orders that were acknowledged so far.
    pub fn count(&self) -> usize {
        self.placed.lock().unwrap().len()
    }

    /// Waits until so many more orders were acknowledged.
    pub async fn wait_for(&self, more: usize) {
        let until = self.count() + more;
        wait_until(&format!("{more} more orders are placed"), async || {
            self.count() >= until
        })
        .await;
    }

    /// Ends the clicks. What was acknowledged, and what was strange.
    pub fn stop(self) -> (Vec<Placed>, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a buyer");
        }
        let placed = std::mem::take(&mut *self.placed.lock().unwrap());
        let strange = std::mem::take(&mut *self.strange.lock().unwrap());
        (placed, strange)
    }
}

struct Placing<'a> {
    user: String,
    sku: &'a str,
    is_async: bool,
    turn: usize,
    targets: &'a Mutex<Vec<SocketAddr>>,
    strange: &'a Mutex<Vec<String>>,
    stop: &'a AtomicBool,
}

impl Placing<'_> {
    /// Asks under one key, at one node after the other, until the order is placed.
    fn until_placed(&self) -> Option<Placed> {
        let key = format!("key-{}", self.user);
        let body = json!({ "user_id": self.user, "sku_id": self.sku }).to_string();
        let since = Instant::now();
        for attempt in 0.. {
            let target = {
                let targets = self.targets.lock().unwrap();
                targets[(self.turn + attempt) % targets.len()]
            };
            match self.ask(target, &key, &body) {
                Ok(answer) if matches!(answer.status, 200..=202) => {
                    let order = answer.json();
                    if order["status"] != "undecided"
                        && let Some(id) = order["order_id"].as_str()
                    {
                        return Some(Placed {
                            user: self.user.clone(),
                            key,
                            order_id: id.to_owned(),
                        });
                    }
                    // Undecided: the same again.
                }
                // A lane that moves, or a node that cannot reach another: asked again, as the answer says.
                Ok(answer) if is_for_a_moment(&answer) => {}
                Ok(answer) => self.strange.lock().unwrap().push(told(&answer)),
                Err(error) => self.strange.lock().unwrap().push(format!("lost: {error}")),
            }
            if self.stop.load(Ordering::Relaxed) || since.elapsed() > Duration::from_secs(30) {
                return None;
            }
            std::thread::sleep(PAUSE);
        }
        None
    }

    fn ask(&self, target: SocketAddr, key: &str, body: &str) -> std::io::Result<Answer> {
        let mut fields = vec![
            ("Content-Type", "application/json"),
            ("Idempotency-Key", key),
        ];
        if self.is_async {
            fields.push(("Prefer", "respond-async"));
        }
        try_call(target, "POST", "/v1/orders", &fields, body)
    }
}

/// Whether an answer says that the same request may be served in two seconds at most.
pub fn is_for_a_moment(answer: &Answer) -> bool {
    let after = answer.field("retry-after");
    let after = after.and_then(|seconds| seconds.parse::<u64>().ok());
    matches!(answer.status, 503 | 421) && after.is_some_and(|seconds| seconds <= 2)
}

/// An answer for whoever reads why a test fails.
pub fn told(answer: &Answer) -> String {
    let (after, body) = (
        answer.field("retry-after"),
        String::from_utf8_lossy(&answer.body),
    );
    format!("{} {after:?} {body}", answer.status)
}

/// Asserts that each acknowledged order is a row, and that no key has two.
pub async fn assert_all_there(database: &TestDatabase, placed: &[Placed]) {
    let client = database.connect().await;
    let ids: Vec<i64> = placed
        .iter()
        .map(|placed| placed.order_id.parse().expect("an id"))
        .collect();
    let missing = async || {
        let sql = "SELECT count(*) FROM unnest($1::int8[]) AS id
                    WHERE NOT EXISTS (SELECT FROM millrace.orders WHERE order_id = id)";
        let row = client.query_one(sql, &[&ids]).await.expect("count");
        row.get::<_, i64>(0)
    };
    wait_until("every acknowledged order is a row", async || {
        missing().await == 0
    })
    .await;
    let twice = "SELECT count(*) FROM (SELECT user_id, key_hash FROM millrace.orders
                  GROUP BY user_id, key_hash HAVING count(*) > 1) t";
    let twice: i64 = client.query_one(twice, &[]).await.expect("count").get(0);
    assert_eq!(twice, 0, "orders that were placed twice");
}

/// The status of an order at a node.
pub fn order_at(address: SocketAddr, id: &str) -> Value {
    let answer = try_call(address, "GET", &format!("/v1/orders/{id}"), &[], "");
    answer.map(|answer| answer.json()).unwrap_or_default()
}
