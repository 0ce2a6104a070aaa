//! Several nodes on one database.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Backend, Config, ConfigError, Secret};

/// Bytes that a secret has at least: whoever can connect can try secrets at leisure.
const SECRET_BYTES_MIN: usize = 32;
/// Longest step of a node, in milliseconds. Units of a dead node are in the rows from a commit on whose answer may be lost, and
/// memory has to have them within ten seconds: `payments::settler` waits for no longer.
const STEP_MS_MAX: u64 = 9_000;
/// What a configured stream has in the place of the node's number.
pub(super) const NODE: &str = "{node}";

/// `[cluster]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// Whether this process is one of several nodes that serve one sale on one database (docs/NODES.md).
    pub enabled: bool,
    /// Address at which other nodes call this one. It must be reachable by them and by nobody else; port 0 picks a
    /// free one.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// The same as the other nodes reach it, `host:port`. Empty: `listen`.
    pub advertise: String,
    /// The secret that all nodes share, 32 bytes or more; `openssl rand -base64 32` makes one.
    #[schemars(with = "String")]
    pub secret: Secret,
    /// Time after which a node that renews nothing is taken over by another, in milliseconds. Equal on all nodes.
    #[schemars(range(min = 1_000, max = 600_000))]
    pub lease_ms: u64,
    /// Time for which a node without contact to the database and the order log answers from its memory, in
    /// milliseconds. A lane opens elsewhere after that. Equal on all nodes; less than `lease_ms`.
    #[schemars(range(min = 300, max = 60_000))]
    pub answer_lease_ms: u64,
}

impl Default for Cluster {
    fn default() -> Self {
        Cluster {
            enabled: false,
            listen: SocketAddr::from(([127, 0, 0, 1], 8082)),
            advertise: String::new(),
            secret: Secret::default(),
            lease_ms: 10_000,
            answer_lease_ms: 3_000,
        }
    }
}

/// Checks the settings of a node against one another.
///
/// # Errors
/// [`ConfigError::Field`] with the first that is wrong.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let cluster = &config.cluster;
    if !cluster.enabled {
        return Ok(());
    }
    let fault = |field, message: String| Err(ConfigError::Field { field, message });
    let bytes = cluster.secret.0.len();
    if bytes < SECRET_BYTES_MIN {
        return fault(
            "cluster.secret",
            format!(
                "has {bytes} bytes and needs {SECRET_BYTES_MIN} or more, the same on every node; `openssl rand -base64 32` \
                 makes one"
            ),
        );
    }
    if cluster.answer_lease_ms >= cluster.lease_ms {
        return fault(
            "cluster.answer_lease_ms",
            format!(
                "{} is not less than cluster.lease_ms, {}: a node must have stopped answering before another takes over",
                cluster.answer_lease_ms, cluster.lease_ms
            ),
        );
    }
    let step_ms = config.database.step_timeout_ms;
    if step_ms > STEP_MS_MAX {
        return fault(
            "database.step_timeout_ms",
            format!(
                "{step_ms} is more than {STEP_MS_MAX}, which a node may take at most: it ends if it has not learnt for longer \
                 what became of a takeover"
            ),
        );
    }
    if config.receipt.key.0.is_empty() {
        let message = "is needed with cluster.enabled, the same on every node: any of them may recover an order from its receipt";
        return fault("receipt.key", message.to_owned());
    }
    if config.database.url.is_empty() {
        let message = "is needed with cluster.enabled: all nodes work on one PostgreSQL";
        return fault("database.url", message.to_owned());
    }
    match config.queue.backend {
        Backend::Memory | Backend::Redis | Backend::Kafka | Backend::RocketMq => {}
        Backend::Journal => {
            let message = "journal is a file on one machine, where no other node could read it after the machine's loss; with \
                           cluster.enabled set redis, kafka or rocketmq, or memory if no order is to be acknowledged before its row";
            return fault("queue.backend", message.to_owned());
        }
    }
    let stream = &config.queue.redis.stream;
    if config.queue.backend == Backend::Redis && !stream.is_empty() && !stream.contains(NODE) {
        return fault(
            "queue.redis.stream",
            format!(
                "each node has a stream of its own: write {NODE} where its number belongs, or leave it empty"
            ),
        );
    }
    let advertised = &cluster.advertise;
    let is_address = advertised
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if advertised.is_empty() && cluster.listen.ip().is_unspecified() {
        let message = "is needed, because cluster.listen names no address that other nodes could call; host:port";
        return fault("cluster.advertise", message.to_owned());
    }
    if !advertised.is_empty() && !is_address {
        return fault(
            "cluster.advertise",
            format!("{advertised:?} is not host:port"),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Config {
        let mut config = Config::default();
        config.cluster.enabled = true;
        config.cluster.secret = Secret("x".repeat(SECRET_BYTES_MIN));
        config.receipt.key.0 = vec!["a key".to_owned()];
        config.database.url = "postgres://db/".to_owned();
        config.queue.backend = Backend::Redis;
        config
    }

    fn refused(change: impl FnOnce(&mut Config)) -> String {
        let mut config = node();
        change(&mut config);
        let refused = check(&config).err();
        refused.map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_node_needs_what_its_cluster_shares() {
        assert_eq!(refused(|_| {}), "");
        assert_eq!(
            check(&Config::default()).map_err(|error| error.to_string()),
            Ok(())
        );
        let short = refused(|config| config.cluster.secret.0.truncate(31));
        assert!(
            short.starts_with("configuration field cluster.secret: has 31 bytes"),
            "{short}"
        );
        let slow = refused(|config| config.database.step_timeout_ms = 9_001);
        assert!(
            slow.contains("database.step_timeout_ms: 9001 is more than 9000"),
            "{slow}"
        );
        let key = refused(|config| config.receipt.key.0.clear());
        assert!(key.contains("receipt.key: is needed"), "{key}");
        let url = refused(|config| config.database.url.clear());
        assert!(url.contains("database.url: is needed"), "{url}");
        let long = refused(|config| config.cluster.answer_lease_ms = config.cluster.lease_ms);
        assert!(
            long.contains("cluster.answer_lease_ms: 10000 is not less"),
            "{long}"
        );
        let journal = refused(|config| config.queue.backend = Backend::Journal);
        assert!(
            journal.contains("queue.backend: journal is a file"),
            "{journal}"
        );
        let stream = refused(|config| config.queue.redis.stream = "sale".to_owned());
        assert!(stream.contains("queue.redis.stream: each node"), "{stream}");
        let nowhere =
            refused(|config| config.cluster.listen = SocketAddr::from(([0, 0, 0, 0], 8082)));
        assert!(
            nowhere.contains("cluster.advertise: is needed"),
            "{nowhere}"
        );
        let bad = refused(|config| config.cluster.advertise = "node-1".to_owned());
        assert!(bad.contains("is not host:port"), "{bad}");
    }
}
