//! Several nodes, each a process of its own as in a shop, so that one can be killed.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::{Child, Command};

use super::status::status;
use crate::app::{OpenDatabase, open_database};
use crate::cli::client::{call_with_token, send};
use crate::config::{Backend, Config};
use crate::store::embedded::{DATABASE, Embedded};
use crate::store::postgres::Database;

/// Leases of the nodes, in milliseconds. Shorter than the defaults, so that a rush of seconds shows a takeover.
const LEASE_MS: u64 = 3_000;
const ANSWER_LEASE_MS: u64 = 1_000;
/// Longest start of a node, and wait until lanes are dealt.
const START: Duration = Duration::from_secs(60);
/// Longest drain of a node. It hands its lanes over first.
const DRAIN: Duration = Duration::from_secs(60);
/// Interval at which a condition is looked at again.
const LOOK: Duration = Duration::from_millis(20);
/// Lanes of buyers, over all nodes.
const LANES: usize = 64;
/// Last lines of a node's log that are shown if something went wrong.
const LOG_LINES: usize = 20;

/// The nodes, and the server of their database, if it is the demo's own.
pub(super) struct Nodes {
    nodes: Vec<Node>,
    database: Database,
    postgres: Option<Embedded>,
}

/// A node.
pub(super) struct Node {
    /// Its number, as the cluster gives it.
    pub(super) number: u8,
    pub(super) data: SocketAddr,
    pub(super) control: SocketAddr,
    data_dir: PathBuf,
    log: PathBuf,
    /// `None` once it was killed.
    child: Mutex<Option<Child>>,
}

impl Nodes {
    /// Starts so many, one after the other, and waits until each has its part of the lanes. `config` is that of the
    /// demo; the processes read the same file and environment.
    pub(super) async fn start(
        count: u8,
        config: &Config,
        file: Option<&Path>,
    ) -> anyhow::Result<Self> {
        match config.queue.backend {
            Backend::Redis | Backend::Kafka | Backend::RocketMq => {}
            Backend::Memory | Backend::Journal => anyhow::bail!(
                "several nodes keep accepted orders on a broker, so that another node finds them: `./x demo --nodes {count} \
                 --queue redis` starts one, or set queue.backend and the broker's address"
            ),
        }
        let OpenDatabase { database, embedded } = open_database(config).await?;
        let url = match &embedded {
            Some(embedded) => embedded.url(DATABASE),
            None => config.database.url.clone(),
        };
        let mut own = Nodes {
            nodes: Vec::new(),
            database,
            postgres: embedded,
        };
        let settings = settings(config, &url);
        let operator = config.control_plane.token.0.first().map(String::as_str);
        for place in 0..count {
            status(&format!("Starting node {} of {count} ...", place + 1));
            let name = format!("node-{place}");
            let node = Node::start(&config.data_dir, &name, &settings, file, operator).await?;
            own.nodes.push(node);
        }
        status("Waiting until each node has its part of the lanes ...");
        let token = config.data_plane.token.0.first().map(String::as_str);
        own.wait_for_lanes(token).await?;
        Ok(own)
    }

    /// Waits until every lane is open, and every node has its part of them and knows it.
    async fn wait_for_lanes(&self, token: Option<&str>) -> anyhow::Result<()> {
        let least = LANES / self.nodes.len().max(1);
        let deadline = Instant::now() + START;
        for node in &self.nodes {
            loop {
                let lanes = lanes_at(node.data, token).await.unwrap_or_default();
                let has_part = |node: &Node| {
                    let of = |owner: &&Option<u64>| **owner == Some(u64::from(node.number));
                    lanes.iter().filter(of).count() >= least
                };
                if lanes.len() == LANES && self.nodes.iter().all(has_part) {
                    break;
                }
                anyhow::ensure!(
                    Instant::now() < deadline,
                    "the lanes are not dealt within {} s: {lanes:?}",
                    START.as_secs()
                );
                tokio::time::sleep(LOOK).await;
            }
        }
        Ok(())
    }

    /// Something of each node that runs.
    pub(super) fn running<T>(&self, of: impl Fn(&Node) -> T) -> Vec<T> {
        let running = self.nodes.iter().filter(|node| node.child.lock().is_some());
        running.map(of).collect()
    }

    pub(super) fn database(&self) -> &Database {
        &self.database
    }

    /// Waits until a SKU is known at every node.
    pub(super) async fn wait_for_sku(&self, sku: &str, token: Option<&str>) -> anyhow::Result<()> {
        let deadline = Instant::now() + START;
        for node in &self.nodes {
            let (address, path) = (node.data.to_string(), format!("/v1/skus/{sku}"));
            loop {
                let asked = send(&address, "GET", &path, None, String::new(), token).await;
                if asked.is_ok_and(|(status, _)| status.is_success()) {
                    break;
                }
                anyhow::ensure!(
                    Instant::now() < deadline,
                    "node {} does not sell {sku}",
                    node.number
                );
                tokio::time::sleep(LOOK).await;
            }
        }
        Ok(())
    }

    /// Kills the last node with SIGKILL, and deletes its directory. Returns its number.
    pub(super) async fn kill_one(&self) -> anyhow::Result<u8> {
        let node = self.nodes.last().context("there is no node")?;
        let taken = node.child.lock().take();
        let mut child = taken.context("it was killed already")?;
        child.kill().await.context("cannot kill it")?;
        std::fs::remove_dir_all(&node.data_dir)
            .with_context(|| format!("cannot delete {}", node.data_dir.display()))?;
        Ok(node.number)
    }

    /// Waits until a node ends that nobody has killed.
    pub(super) async fn ended(&self) -> String {
        loop {
            for node in &self.nodes {
                let ended = node.child.lock().as_mut().map(Child::try_wait);
                if let Some(Ok(Some(how))) = ended {
                    return format!("node {} ended: {how}\n{}", node.number, node.last_lines());
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Stops one node after the other, and the database's server.
    pub(super) async fn drain(self) -> bool {
        let mut is_clean = true;
        for node in &self.nodes {
            let Some(child) = node.child.lock().take() else {
                continue;
            };
            let ended = end(child).await;
            if !ended.is_some_and(|how| how.success()) {
                is_clean = false;
                tracing::error!(
                    node = node.number,
                    log = node.last_lines(),
                    "a node did not stop well"
                );
            }
        }
        drop(self.database);
        match self.postgres {
            None => is_clean,
            Some(postgres) => match postgres.stop().await {
                Ok(()) => is_clean,
                Err(error) => {
                    tracing::error!(reason = %error, "PostgreSQL did not stop well");
                    false
                }
            },
        }
    }
}

impl Node {
    async fn start(
        home: &Path,
        name: &str,
        settings: &[(&'static str, String)],
        file: Option<&Path>,
        operator: Option<&str>,
    ) -> anyhow::Result<Self> {
        let data_dir = home.join(name);
        let log = home.join(format!("{name}.log"));
        std::fs::create_dir_all(&data_dir)
            .with_context(|| format!("cannot use {}", data_dir.display()))?;
        // That of an earlier process, if the directory was named.
        let addresses = data_dir.join("addresses.json");
        let _ = std::fs::remove_file(&addresses);
        let output =
            File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let binary = std::env::current_exe().context("cannot find the program itself")?;
        let mut command = Command::new(binary);
        command.arg("serve");
        if let Some(file) = file {
            command.arg("--config").arg(file);
        }
        for (name, value) in settings {
            command.env(format!("MILLRACE_{name}"), value);
        }
        command
            .env("MILLRACE_DATA_DIR", &data_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .kill_on_drop(true)
            // An interrupt at the terminal is the demo's to handle.
            .process_group(0);
        let child = command.spawn().context("cannot start a node")?;
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut node = Node {
            number: 0,
            data: nowhere,
            control: nowhere,
            data_dir,
            log,
            child: Mutex::new(Some(child)),
        };
        let deadline = Instant::now() + START;
        while !node.is_ready(&addresses, operator).await {
            let ended = node.child.lock().as_mut().map(Child::try_wait);
            if let Some(Ok(Some(how))) = ended {
                anyhow::bail!("{name} ended: {how}\n{}", node.last_lines());
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{name} is not ready after {} s\n{}",
                START.as_secs(),
                node.last_lines()
            );
            tokio::time::sleep(LOOK).await;
        }
        Ok(node)
    }

    /// Notes where it listens and its number, once it is ready.
    async fn is_ready(&mut self, addresses: &Path, operator: Option<&str>) -> bool {
        let text = std::fs::read_to_string(addresses).unwrap_or_default();
        let read: Value = serde_json::from_str(&text).unwrap_or_default();
        let of = |plane: &str| read[plane].as_str()?.parse().ok();
        let (Some(data), Some(control)) = (of("data_plane"), of("control_plane")) else {
            return false;
        };
        (self.data, self.control) = (data, control);
        let address = control.to_string();
        let asked = send(&address, "GET", "/readyz", None, String::new(), None).await;
        if !asked.is_ok_and(|(status, _)| status.is_success()) {
            return false;
        }
        let nodes = call_with_token(&address, "GET", "/admin/v1/nodes", None, operator).await;
        let number = nodes.ok().and_then(|nodes| nodes["node"].as_u64());
        let number = number.and_then(|number| u8::try_from(number).ok());
        self.number = number.unwrap_or(self.number);
        number.is_some()
    }

    fn last_lines(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(LOG_LINES);
        lines[from..].join("\n")
    }
}

/// What every node is told beyond the demo's own file and environment.
fn settings(config: &Config, url: &str) -> Vec<(&'static str, String)> {
    let secret = format!("{:032x}", rand::random::<u128>());
    let mut settings = vec![
        ("DATABASE__URL", url.to_owned()),
        ("DATABASE__SCHEMA", config.database.schema.clone()),
        // A part each of what one process has by default: they share a machine and a PostgreSQL.
        ("DATABASE__POOL_SIZE", "4".to_owned()),
        ("WORKERS__COUNT", "2".to_owned()),
        ("DATA_PLANE__LISTEN", "127.0.0.1:0".to_owned()),
        ("CONTROL_PLANE__LISTEN", "127.0.0.1:0".to_owned()),
        ("CLUSTER__ENABLED", "true".to_owned()),
        ("CLUSTER__LISTEN", "127.0.0.1:0".to_owned()),
        ("CLUSTER__SECRET", secret),
        ("CLUSTER__LEASE_MS", LEASE_MS.to_string()),
        ("CLUSTER__ANSWER_LEASE_MS", ANSWER_LEASE_MS.to_string()),
        (
            "PAYMENTS__STANDARD__SECRET",
            config.payments.standard.secret.0.concat(),
        ),
        (
            "ORDERS__PAYMENT_TTL_MS",
            config.orders.payment_ttl_ms.to_string(),
        ),
        ("LOG__LEVEL", config.log.level.clone()),
    ];
    if config.receipt.key.0.is_empty() {
        let key = format!("{:032x}", rand::random::<u128>());
        settings.push(("RECEIPT__KEY", key));
    }
    settings
}

/// Asks a process to drain, and kills it if it does not.
async fn end(mut child: Child) -> Option<ExitStatus> {
    let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()))?;
    kill_process(pid, Signal::TERM).ok()?;
    match tokio::time::timeout(DRAIN, child.wait()).await {
        Ok(ended) => ended.ok(),
        Err(_) => {
            child.kill().await.ok()?;
            None
        }
    }
}

/// The owner of each lane, as a node knows it.
async fn lanes_at(data: SocketAddr, token: Option<&str>) -> Option<Vec<Option<u64>>> {
    let asked = send(
        &data.to_string(),
        "GET",
        "/v1/lanes",
        None,
        String::new(),
        token,
    )
    .await;
    let (_, body) = asked.ok()?;
    let read: Value = serde_json::from_slice(&body).ok()?;
    let lanes = read["lanes"].as_array()?;
    Some(lanes.iter().map(|lane| lane["node"].as_u64()).collect())
}
