//! Every setting, typed, with its default, unit, range and reason.
//!
//! The settings come from one TOML file. An environment variable overrides a field: `MILLRACE_` and
//! the path in capitals, levels joined by two underscores (`MILLRACE_DATABASE__URL`). With `_FILE`
//! appended, the variable names a file with the value. A list is a JSON array, or in a `_FILE` one
//! text per line. Unknown fields are refused, and fields are checked against one another before the
//! start.

use std::net::SocketAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod check;
mod cluster;
mod environment;
mod events;
mod given;
mod load;
mod log;
mod payments;
pub mod reference;
mod spans;

pub use cluster::Cluster;
pub use events::{EventMember, EventSink, EventSinkKind, Events};
pub use given::given_fields;
pub use payments::{
    AlipayPayments, Payments, Receipt, Secret, StandardPayments, StripePayments, WechatpayPayments,
};
pub use spans::Tracing;

/// Read if no file is named, and if it exists.
pub const DEFAULT_FILE: &str = "millrace.toml";

/// Reasons why there is no valid configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// It is not TOML, or a field is unknown or of the wrong type.
    #[error("{origin}: {message}")]
    Invalid {
        /// File, environment variable, or `defaults`.
        origin: String,
        /// Description of the mistake.
        message: String,
    },
    /// A value is out of range, or contradicts another field.
    #[error("configuration field {field}: {message}")]
    Field {
        /// Path of the field, levels joined by dots.
        field: &'static str,
        /// The mistake and its remedy.
        message: String,
    },
}

/// All settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory for Millrace's own files, including its own PostgreSQL.
    #[schemars(with = "String")]
    pub data_dir: PathBuf,
    /// Connection to PostgreSQL.
    pub database: Database,
    /// The listener for the shop's backend.
    pub data_plane: DataPlane,
    /// The listener for operators and machines.
    pub control_plane: ControlPlane,
    /// The queue between intake and workers.
    pub queue: Queue,
    /// The tasks that write orders to the database.
    pub workers: Workers,
    /// Waiting, payment and idempotency of orders.
    pub orders: Orders,
    /// Rate limits on order requests.
    pub rate_limit: RateLimit,
    /// Payment providers and how their callbacks are verified.
    pub payments: Payments,
    /// Keys that sign receipts.
    pub receipt: Receipt,
    /// Events for the shop's other systems.
    pub events: Events,
    /// Several nodes on one database.
    pub cluster: Cluster,
    /// Deletion of old rows.
    pub retention: Retention,
    /// Log level and format.
    pub log: Log,
    /// Traces of requests.
    pub tracing: Tracing,
}

/// `[database]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// A PostgreSQL URL or key-value string. Empty: Millrace runs its own PostgreSQL under
    /// `data_dir`.
    ///
    /// `sslmode` is `disable`, `allow`, `prefer` (the default), `require`, `verify-ca` or
    /// `verify-full`; `sslrootcert` names a PEM file or is `system`; `sslcert` and `sslkey` are the
    /// client's certificate and key. Certificates are read at start. Of several hosts the first
    /// that accepts writes is used. A connection pooler must pool sessions, not transactions.
    pub url: String,
    /// Schema that holds every object: lower-case letters, digits and underscores.
    pub schema: String,
    /// `auto` migrates the schema at start; `never` leaves that to `millrace migrate`.
    pub migrate: Migrate,
    /// Maintains an index on `(user_id, order_id)`, so that a user's whole history can be listed.
    /// It costs COPY more than half of its rate.
    pub user_index: bool,
    /// Directory with `postgres`, `initdb` and `pg_ctl` for Millrace's own PostgreSQL. Empty: they
    /// are searched for.
    pub embedded_bin_dir: String,
    /// Bytes of WAL segments that Millrace's own PostgreSQL has ready: a start makes them if fewer than
    /// half are there, within an eighth of the free disk space. Otherwise PostgreSQL makes each one in
    /// the middle of a commit, and the buyers of that moment wait for it. 0 makes none.
    #[schemars(range(max = 68_719_476_736_i64))]
    pub embedded_wal_bytes: u64,
    /// Connections besides those of the workers: look-ups, administration, health checks.
    #[schemars(range(min = 1, max = 100))]
    pub pool_size: usize,
    /// Longest time for one step of a conversation with the database, in milliseconds. A slower
    /// step counts as lost and is settled on a new connection. At most 9000 with `cluster.enabled`.
    #[schemars(range(min = 100, max = 600_000))]
    pub step_timeout_ms: u64,
    /// Largest difference at start between this machine's clock and the database's, in
    /// milliseconds. A larger one stops the start. Millrace's own PostgreSQL has the same clock, so
    /// with it the start also stops if that clock is behind the last use of the database by more.
    /// To start with a clock that you know to be right, raise this value once.
    #[schemars(range(min = 1_000, max = 3_155_760_000_000_i64))]
    pub clock_difference_max_ms: u64,
}

/// Handling of the schema at start.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Migrate {
    /// Migrates the schema.
    Auto,
    /// Checks the schema and does not change it.
    Never,
}

/// `[data_plane]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct DataPlane {
    /// Address to listen on; port 0 picks a free one.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Bearer tokens for callers, one or a list. None: no token is required.
    #[schemars(with = "Vec<String>")]
    pub token: OneOrMany,
    /// Permits a listener without a token on an address that is not loopback.
    pub trust_network: bool,
    /// HTTP engine that runs the service.
    pub engine: Engine,
    /// Threads for the data plane's coroutines; 0: one per core.
    #[schemars(range(min = 0, max = 256))]
    pub threads: usize,
    /// Most connections at once, each with a stack of 256 KiB of address space. An idle one is
    /// closed to make room for a new one.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections_max: usize,
    /// Longest request head in bytes; a longer one is answered `431`.
    #[schemars(range(min = 1_024, max = 1_048_576))]
    pub head_bytes_max: usize,
    /// Longest request body in bytes, except for batches (2 MiB); a longer one is answered `413`.
    #[schemars(range(min = 1_024, max = 1_048_576))]
    pub body_bytes_max: usize,
    /// Bytes of request bodies that all connections together may hold, a quarter of them for
    /// payment callbacks. Beyond it a request is answered `503 overloaded` before its body is read.
    /// Bodies below 2 KiB are not counted.
    #[schemars(range(min = 8_388_608, max = 1_099_511_627_776_i64))]
    pub body_bytes_total_max: usize,
    /// Longest time for receiving a request, from its first byte to its last, and for sending the
    /// answer to a client, in milliseconds.
    #[schemars(range(min = 100, max = 600_000))]
    pub request_timeout_ms: u64,
    /// Longest time between requests on one connection, in milliseconds. A proxy's must be shorter.
    #[schemars(range(min = 100, max = 3_600_000))]
    pub idle_timeout_ms: u64,
}

/// HTTP engines of the data plane.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Millrace's own parser and loop, safe on public networks.
    Hardened,
    /// Stock `may_minihttp`, for benchmarks and behind a proxy that re-frames every request.
    Minihttp,
}

/// `[control_plane]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct ControlPlane {
    /// Address to listen on; port 0 picks a free one.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Bearer tokens for operators, one or a list. None: loopback only.
    #[schemars(with = "Vec<String>")]
    pub token: OneOrMany,
    /// Longest time for an audit, in milliseconds. An audit reads every order once, and once more
    /// per million orders in the busiest idempotency window.
    #[schemars(range(min = 1_000, max = 86_400_000))]
    pub audit_timeout_ms: u64,
}

/// `[queue]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// Queue backend, which decides whether accepted orders survive a crash.
    pub backend: Backend,
    /// Most orders that wait in memory. Further ones are refused with `503 overloaded` before
    /// anything is held.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub capacity: usize,
    /// Longest time for which a broker keeps orders after they are settled, in milliseconds: a failover of
    /// PostgreSQL that loses commits finds them there. Less, once half of `queue.journal.bytes_max` is used. The journal keeps them for `queue.journal.retain_for_slots` alone.
    #[schemars(range(min = 0, max = 604_800_000))]
    pub retain_ms: u64,
    /// The write-ahead log of `backend = "journal"`. Its `bytes_max`, `lease_ms` and `retain_for_slots` hold for
    /// every durable backend.
    pub journal: Journal,
    /// The stream of `backend = "redis"`.
    pub redis: Redis,
    /// The topic of `backend = "kafka"`.
    pub kafka: Kafka,
    /// The topic of `backend = "rocketmq"`.
    pub rocketmq: RocketMq,
}

/// `[queue.redis]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Redis {
    /// `redis://` or, with TLS, `rediss://[user:password@]host[:port]`. Redis or Valkey, one primary.
    pub url: String,
    /// Key of the stream. Empty: `millrace:{schema}:{node}`; a process that is no node of a cluster is node 0.
    pub stream: String,
    /// Replicas that must confirm each group (`WAIT`, from 7.2 on `WAITAOF`) before its orders are acknowledged. With fewer than
    /// half of them, no majority of the servers has a group; a warning says so.
    #[schemars(range(min = 0, max = 16))]
    pub replicas_min: u32,
}

/// `[queue.kafka]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Kafka {
    /// Brokers to ask first: `host:port`, separated by commas.
    pub bootstrap: String,
    /// The topic. Empty: `millrace-{schema}`. Each node of a cluster uses the partition of its number, others
    /// partition 0.
    pub topic: String,
    /// Whether connections use TLS, with the system's certificate authorities or those of `ca_file`.
    pub tls: bool,
    /// PEM file with the certificate authorities to trust. Empty: the system's.
    #[schemars(with = "String")]
    pub ca_file: PathBuf,
    /// SASL mechanism: `plain`, `scram-sha-256` or `scram-sha-512`. Empty: no SASL.
    pub sasl_mechanism: String,
    /// User of SASL.
    pub sasl_user: String,
    /// Password of SASL.
    #[schemars(with = "String")]
    pub sasl_password: Secret,
}

/// `[queue.rocketmq]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct RocketMq {
    /// Name servers: `host:port`, separated by semicolons.
    pub namesrv: String,
    /// The topic. Empty: `millrace-{schema}`. Each node of a cluster uses the queue of its number, others queue 0.
    pub topic: String,
    /// Access key, if the broker checks permissions.
    pub access_key: String,
    /// Secret key of the access key.
    #[schemars(with = "String")]
    pub secret_key: Secret,
}

/// `[queue.journal]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Directory for the journal alone. Empty: `journal` under `data_dir`. Not on a network file
    /// system.
    #[schemars(with = "String")]
    pub dir: PathBuf,
    /// Most bytes of the log, on the disk or in the broker; beyond it `respond-async` is refused with `503 journal_full`. A
    /// segment has a sixteenth of this, at most 16 MiB. The size of segments is fixed when the
    /// journal is created.
    #[schemars(range(min = 1_048_576, max = 1_099_511_627_776_i64))]
    pub bytes_max: u64,
    /// Time for which orders are acknowledged while the database is unreachable, in milliseconds.
    /// After the same time an operator may abandon the journal of a lost process.
    #[schemars(range(min = 1_000, max = 86_400_000))]
    pub lease_ms: u64,
    /// Names of physical replication slots, one or a list. A segment is deleted only once the
    /// standbys behind them have everything in it, so that a failover to one of them loses no
    /// acknowledged order.
    #[schemars(with = "Vec<String>")]
    pub retain_for_slots: OneOrMany,
}

/// Queue backends.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// A write-ahead log on this machine's disk: `respond-async` is acknowledged after the sync
    /// that covers the order.
    Journal,
    /// The ring in memory alone: `respond-async` falls back to waiting.
    Memory,
    /// A stream of Redis or Valkey: an acknowledged order survives the loss of this machine.
    Redis,
    /// A topic of Apache Kafka, likewise.
    Kafka,
    /// A topic of Apache RocketMQ, likewise.
    RocketMq,
}

/// `[workers]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// Number of workers, each with a connection of its own; 0: one per core, at least 2 and at
    /// most 8, because more contend for the same SKU rows. The first writes alone while it keeps
    /// up.
    #[schemars(range(min = 0, max = 64))]
    pub count: usize,
    /// Most rows in one COPY. A retry repeats all of them, and a buyer may wait behind all of them.
    #[schemars(range(min = 1, max = 100_000))]
    pub batch_rows_max: usize,
}

/// `[orders]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Orders {
    /// Longest wait for the commit of an order, in milliseconds. An order that is not being written
    /// by then is abandoned, and its stock is released.
    #[schemars(range(min = 50, max = 600_000))]
    pub timeout_ms: u64,
    /// Time to pay in milliseconds; the buyer sees its end as `expires_at`.
    #[schemars(range(min = 1_000, max = 31_536_000_000_i64))]
    pub payment_ttl_ms: u64,
    /// Time for which an order waits for units at most, in milliseconds, if its SKU has no
    /// `closes_at`; then it expires.
    #[schemars(range(min = 1_000, max = 31_536_000_000_i64))]
    pub waitlist_ttl_ms: u64,
    /// Time for which a key and a buyer's orders are kept in memory, in milliseconds. A longer
    /// window reads more at start. Purchase limits count live orders of any age.
    #[schemars(range(min = 1_000, max = 31_536_000_000_i64))]
    pub idempotency_window_ms: u64,
    /// Most orders kept in memory, 160 to 220 bytes each (at one order per buyer): those of the
    /// window, and live ones of SKUs with a limit for longer. Beyond it new orders are refused;
    /// `readyz` warns at 70 %. Orders without a key that have ended, or that are paid and without a
    /// limit, do not count, and are evicted first if memory is short.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub remembered_max: usize,
    /// Most `sold_out` and `purchase_limit` answers kept under their keys, about 56 bytes each,
    /// allocated at start. New ones replace old ones.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub sticky_refusals_max: usize,
}

/// `[rate_limit]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// Limit for each `user_id`: `off`, or a rate such as `5/s` or `100/min`.
    #[schemars(with = "String")]
    pub per_user: Rate,
    /// Limit for all users together: `off`, or a rate such as `20000/s`. Of the whole sale: several nodes share it by the
    /// lanes of buyers that each has.
    #[schemars(with = "String")]
    pub overall: Rate,
}

/// A rate of requests, enforced smoothly: a burst of up to the whole number passes at once.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String", into = "String")]
pub enum Rate {
    /// No limit.
    #[default]
    Off,
    /// Requests per second.
    PerSecond(std::num::NonZeroU32),
    /// Requests per minute.
    PerMinute(std::num::NonZeroU32),
}

impl TryFrom<String> for Rate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a rate; write off, 5/s or 100/min");
        if text == "off" {
            return Ok(Rate::Off);
        }
        let (count, unit) = text.split_once('/').ok_or_else(wrong)?;
        let count = count.parse().map_err(|_| wrong())?;
        match unit {
            "s" => Ok(Rate::PerSecond(count)),
            "min" => Ok(Rate::PerMinute(count)),
            _ => Err(wrong()),
        }
    }
}

impl From<Rate> for String {
    fn from(rate: Rate) -> Self {
        match rate {
            Rate::Off => "off".into(),
            Rate::PerSecond(count) => format!("{count}/s"),
            Rate::PerMinute(count) => format!("{count}/min"),
        }
    }
}

/// `[retention]`, equal on all nodes: one of them deletes for all.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// Days after which a cancelled, expired, refunded or paid order is deleted; 0: never. At least
    /// 7, because platforms deliver payments late, and longer than `orders.idempotency_window_ms`
    /// and `orders.payment_ttl_ms`. A deleted order is answered `404 unknown_order`, no refund
    /// can be recorded with it, and a payment for it that comes later has to be refunded.
    ///
    /// Orders with an open payment are kept. Paid orders of a SKU with a `per_user_limit` are kept
    /// until the same number of days after its `closes_at`. A limit that is set later does not
    /// count deleted orders. Payments and dead letters are never deleted. The audit uses
    /// checkpoints for deleted rows.
    #[schemars(range(min = 0, max = 36_500))]
    pub orders_days: u32,
    /// Days after which a payment provider's message, with its body, is deleted; 0: never. Messages
    /// about open payments are kept.
    #[schemars(range(min = 0, max = 36_500))]
    pub events_days: u32,
    /// Days after which entries of `stock_log` are folded into one checkpoint per SKU; 0:
    /// never. Entries of requests with an `Idempotency-Key` are kept, and so are all that earlier
    /// entries do not explain.
    #[schemars(range(min = 0, max = 36_500))]
    pub stock_log_days: u32,
}

/// `[log]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace` or `off`, or a list such as `info,millrace=debug`
    /// with levels for parts of the program. Without a level for the rest, a list leaves the rest
    /// at `warn`.
    pub level: String,
    /// Format of log lines.
    pub format: LogFormat,
}

/// Formats of a log line.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `text` on a terminal, else `json`.
    Auto,
    /// Coloured text for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// One text or a list of texts, none of them empty; an empty list means none. `Debug` hides the
/// texts.
#[derive(Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(try_from = "OneOrManyForm", into = "Vec<String>")]
pub struct OneOrMany(pub Vec<String>);

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrManyForm {
    One(String),
    Many(Vec<String>),
}

impl TryFrom<OneOrManyForm> for OneOrMany {
    type Error = &'static str;

    fn try_from(form: OneOrManyForm) -> Result<Self, Self::Error> {
        let all = match form {
            OneOrManyForm::One(one) => vec![one],
            OneOrManyForm::Many(many) => many,
        };
        if all.iter().any(String::is_empty) {
            return Err("an empty text; remove it to set none");
        }
        Ok(OneOrMany(all))
    }
}

impl From<OneOrMany> for Vec<String> {
    fn from(texts: OneOrMany) -> Self {
        texts.0
    }
}

impl std::fmt::Debug for OneOrMany {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} hidden]", self.0.len())
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            data_dir: PathBuf::from("./millrace-data"),
            database: Database::default(),
            data_plane: DataPlane::default(),
            control_plane: ControlPlane::default(),
            queue: Queue::default(),
            workers: Workers::default(),
            orders: Orders::default(),
            rate_limit: RateLimit::default(),
            payments: Payments::default(),
            receipt: Receipt::default(),
            events: Events::default(),
            cluster: Cluster::default(),
            retention: Retention::default(),
            log: Log::default(),
            tracing: Tracing::default(),
        }
    }
}

impl Default for Database {
    fn default() -> Self {
        Database {
            url: String::new(),
            schema: "millrace".into(),
            migrate: Migrate::Auto,
            user_index: false,
            embedded_bin_dir: String::new(),
            embedded_wal_bytes: 960 << 20,
            pool_size: 8,
            step_timeout_ms: 5_000,
            clock_difference_max_ms: 120_000,
        }
    }
}

impl Default for DataPlane {
    fn default() -> Self {
        DataPlane {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            token: OneOrMany::default(),
            trust_network: false,
            engine: Engine::Hardened,
            threads: 0,
            connections_max: 20_000,
            head_bytes_max: 16_384,
            body_bytes_max: 16_384,
            body_bytes_total_max: 256 << 20,
            request_timeout_ms: 10_000,
            idle_timeout_ms: 60_000,
        }
    }
}

impl Default for ControlPlane {
    fn default() -> Self {
        ControlPlane {
            listen: SocketAddr::from(([127, 0, 0, 1], 8081)),
            token: OneOrMany::default(),
            audit_timeout_ms: 600_000,
        }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Queue {
            backend: Backend::Journal,
            capacity: 65_536,
            retain_ms: 600_000,
            journal: Journal::default(),
            redis: Redis::default(),
            kafka: Kafka::default(),
            rocketmq: RocketMq::default(),
        }
    }
}

impl Default for Journal {
    fn default() -> Self {
        Journal {
            dir: PathBuf::new(),
            bytes_max: 4 << 30,
            lease_ms: 600_000,
            retain_for_slots: OneOrMany::default(),
        }
    }
}

impl Default for Workers {
    fn default() -> Self {
        Workers {
            count: 0,
            batch_rows_max: 5_000,
        }
    }
}

impl Default for Orders {
    fn default() -> Self {
        Orders {
            timeout_ms: 7_000,
            payment_ttl_ms: 900_000,
            waitlist_ttl_ms: 86_400_000,
            idempotency_window_ms: 86_400_000,
            remembered_max: 10_000_000,
            sticky_refusals_max: 100_000,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Log {
            level: "info".into(),
            format: LogFormat::Auto,
        }
    }
}
