//! Every setting, typed: its default, unit, range and reason.
//!
//! One TOML file, each field overridable by an environment variable: `MILLRACE_` and the path in
//! capitals, levels joined by two underscores (`MILLRACE_DATABASE__URL`); with `_FILE` appended
//! the value is read from the file that it names. A list is a JSON array, or one text a line in a
//! `_FILE`. Unknown fields are refused, and fields are checked against one another before anything
//! starts.

use std::net::SocketAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod check;
mod environment;
mod given;
mod load;
mod log;
mod payments;
pub mod reference;

pub use payments::{
    AlipayPayments, Payments, Receipt, Secret, StandardPayments, StripePayments, WechatpayPayments,
};

/// The file that is read where none is named, if it exists.
pub const DEFAULT_FILE: &str = "millrace.toml";

/// Why there is no valid configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or a field is unknown or of the wrong type.
    #[error("{origin}: {message}")]
    Invalid {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        message: String,
    },
    /// A field's value, or two together, make no sense.
    #[error("configuration field {field}: {message}")]
    Field {
        /// The field's path.
        field: &'static str,
        /// What is wrong and what to do.
        message: String,
    },
}

/// All settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where Millrace keeps its own files, its own PostgreSQL among them.
    #[schemars(with = "String")]
    pub data_dir: PathBuf,
    /// The database.
    pub database: Database,
    /// The listener for the shop's backend.
    pub data_plane: DataPlane,
    /// The listener for operators and machines.
    pub control_plane: ControlPlane,
    /// Between intake and workers.
    pub queue: Queue,
    /// Who writes.
    pub workers: Workers,
    /// The life of an order.
    pub orders: Orders,
    /// How often a user, and all together, may ask for an order.
    pub rate_limit: RateLimit,
    /// Whose word about payments is taken.
    pub payments: Payments,
    /// What orders are signed with on their way through a payment platform.
    pub receipt: Receipt,
    /// For how long rows are kept.
    pub retention: Retention,
    /// What is said about it.
    pub log: Log,
}

/// `[database]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// A PostgreSQL URL or key-value string; empty: Millrace runs its own PostgreSQL under
    /// `data_dir`.
    ///
    /// `sslmode` is `disable`, `allow`, `prefer` (the default), `require`, `verify-ca` or
    /// `verify-full`; `sslrootcert` names a PEM file or is `system`; `sslcert` and `sslkey` prove
    /// who we are. Certificates are read at start. Of several hosts the first that takes writes is
    /// used. A pooler in between has to pool sessions, not transactions.
    pub url: String,
    /// The schema that holds every object: lower-case letters, digits and underscores.
    pub schema: String,
    /// `auto` brings the schema up to date at start; `never` leaves that to `millrace migrate`.
    pub migrate: Migrate,
    /// Keeps an index on `(user_id, order_id)`, so that a user's whole history can be listed; it
    /// costs COPY more than half of its rate.
    pub user_index: bool,
    /// Directory with `postgres`, `initdb` and `pg_ctl` for Millrace's own PostgreSQL; empty: searched.
    pub embedded_bin_dir: String,
    /// Connections beside those of the workers: look-ups, administration, health.
    #[schemars(range(min = 1, max = 100))]
    pub pool_size: usize,
    /// Longest time for one step of a conversation with the database, in milliseconds. A
    /// step that takes longer counts as lost and is settled on a new connection.
    #[schemars(range(min = 100, max = 600_000))]
    pub step_timeout_ms: u64,
    /// Most that this machine's clock and the database's may differ at start, in milliseconds; beyond
    /// it the start is refused. So is one on Millrace's own PostgreSQL, which has the same clock, where
    /// that is behind the last use of the database. Raise it for the one start that is to go by a
    /// clock that you know to be right.
    #[schemars(range(min = 1_000, max = 3_155_760_000_000_i64))]
    pub clock_difference_max_ms: u64,
}

/// What happens to the schema at start.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Migrate {
    /// It is brought up to date.
    Auto,
    /// It is checked and left alone.
    Never,
}

/// `[data_plane]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct DataPlane {
    /// Address to listen at; port 0 picks a free one.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Bearer tokens that callers may use, one or a list; none: no token is asked for.
    #[schemars(with = "Vec<String>")]
    pub token: OneOrMany,
    /// Allows a listener that is not loopback without a token.
    pub trust_network: bool,
    /// Which HTTP engine carries the service.
    pub engine: Engine,
    /// Threads that run the data plane's coroutines; 0: one for each core.
    #[schemars(range(min = 0, max = 256))]
    pub threads: usize,
    /// Most connections at once, each with a stack of 256 KiB of address space; idle ones make room
    /// for new ones.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections_max: usize,
    /// Longest request head in bytes; beyond it a request is answered `431`.
    #[schemars(range(min = 1_024, max = 1_048_576))]
    pub head_bytes_max: usize,
    /// Longest request body in bytes, that of a batch aside (2 MiB); beyond it: `413`.
    #[schemars(range(min = 1_024, max = 1_048_576))]
    pub body_bytes_max: usize,
    /// Bytes of request bodies that all connections together may hold, a quarter of them for payment
    /// callbacks; beyond it a request is answered `503 overloaded` before its body is read. Bodies
    /// below 2 KiB are not counted.
    #[schemars(range(min = 8_388_608, max = 1_099_511_627_776_i64))]
    pub body_bytes_total_max: usize,
    /// Longest time from a request's first byte to its last, and for a client to take its
    /// answer, in milliseconds.
    #[schemars(range(min = 100, max = 600_000))]
    pub request_timeout_ms: u64,
    /// Longest time between requests on one connection, in milliseconds; keep a proxy's shorter.
    #[schemars(range(min = 100, max = 3_600_000))]
    pub idle_timeout_ms: u64,
}

/// The HTTP engines of the data plane.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Millrace's own loop: safe in public.
    Hardened,
    /// Stock `may_minihttp`: for benchmarks, and behind something that re-frames every request.
    Minihttp,
}

/// `[control_plane]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct ControlPlane {
    /// Address to listen at; port 0 picks a free one.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Bearer tokens that operators may use, one or a list; none: loopback only.
    #[schemars(with = "Vec<String>")]
    pub token: OneOrMany,
    /// Longest time for an audit in milliseconds. It reads every order once, and once more for each
    /// million orders in the busiest idempotency window.
    #[schemars(range(min = 1_000, max = 86_400_000))]
    pub audit_timeout_ms: u64,
}

/// `[queue]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// What an order survives in the queue.
    pub backend: Backend,
    /// Orders that may wait in memory at once; beyond it new ones are refused with
    /// `503 overloaded` before anything is held.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub capacity: usize,
    /// The write-ahead log of `backend = "journal"`.
    pub journal: Journal,
}

/// `[queue.journal]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Its directory, for it alone; empty: `journal` under `data_dir`. Not on a network file system.
    #[schemars(with = "String")]
    pub dir: PathBuf,
    /// Bytes that it may take on the disk; beyond it `respond-async` is refused with
    /// `503 journal_full`. Its segments are a sixteenth of this, at most 16 MiB each, as they were
    /// when the journal was begun.
    #[schemars(range(min = 1_048_576, max = 1_099_511_627_776_i64))]
    pub bytes_max: u64,
    /// For how long orders are acknowledged without a sign of life from the database, in
    /// milliseconds. It is also the time after which an operator may abandon the journal of a lost
    /// process.
    #[schemars(range(min = 1_000, max = 86_400_000))]
    pub lease_ms: u64,
    /// Names of physical replication slots, one or a list: a segment is deleted only once the standbys behind them
    /// have everything in it, so that a failover to one of them loses no acknowledged order.
    #[schemars(with = "Vec<String>")]
    pub retain_for_slots: OneOrMany,
}

/// The queue backends.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// A write-ahead log on this machine's disk: `respond-async` is acknowledged after the sync
    /// that covers it.
    Journal,
    /// The ring alone; `respond-async` falls back to waiting.
    Memory,
}

/// `[workers]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// Workers, each with a connection of its own; 0: one for each core, at least 2 and at most 8,
    /// because more contend for the same SKU rows. The first writes alone while it keeps up.
    #[schemars(range(min = 0, max = 64))]
    pub count: usize,
    /// Most rows in one COPY: what a retry repeats and what one buyer may wait behind.
    #[schemars(range(min = 1, max = 100_000))]
    pub batch_rows_max: usize,
}

/// `[orders]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Orders {
    /// Longest wait for persistence in milliseconds; an order that is not being written by then is
    /// given up, and its stock is back.
    #[schemars(range(min = 50, max = 600_000))]
    pub timeout_ms: u64,
    /// Time to pay in milliseconds; it is told to the buyer as `expires_at`.
    #[schemars(range(min = 1_000, max = 31_536_000_000_i64))]
    pub payment_ttl_ms: u64,
    /// How long a key and a buyer's orders are remembered, in milliseconds. A
    /// longer window reads more at start. Purchase limits count live orders of any age.
    #[schemars(range(min = 1_000, max = 31_536_000_000_i64))]
    pub idempotency_window_ms: u64,
    /// Orders remembered at once, 160 to 220 bytes each (one a buyer): those of the window, and as long as they are live those
    /// of SKUs with a limit. Beyond it new ones are refused; `readyz` warns at 70 %. Orders without a key that are
    /// over, or paid and without a limit, do not count, and go first where memory is short.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub remembered_max: usize,
    /// `sold_out` and `purchase_limit` answers remembered under their keys, about 56 bytes each, taken
    /// at the start; old ones make room.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub sticky_refusals_max: usize,
}

/// `[rate_limit]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// For each `user_id`: `off`, or a rate such as `5/s` or `100/min`.
    #[schemars(with = "String")]
    pub per_user: Rate,
    /// For all together: `off`, or a rate such as `20000/s`.
    #[schemars(with = "String")]
    pub overall: Rate,
}

/// A number of requests in a second or a minute, evened out; up to the whole number may come at
/// once.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String", into = "String")]
pub enum Rate {
    /// No limit.
    #[default]
    Off,
    /// Requests in a second.
    PerSecond(std::num::NonZeroU32),
    /// Requests in a minute.
    PerMinute(std::num::NonZeroU32),
}

impl TryFrom<String> for Rate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no rate: write off, 5/s or 100/min");
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

/// `[retention]`
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// Days after which an order that is cancelled, expired, refunded or paid is deleted; 0: never. At
    /// least 7, so that no platform delivers a payment of it any more, and longer than
    /// `orders.idempotency_window_ms` and `orders.payment_ttl_ms`. A deleted order is
    /// `404 unknown_order`, and no refund is recorded with it.
    ///
    /// Orders with an open payment stay, and so do paid orders of a SKU with a `per_user_limit` until
    /// its `closes_at` lies so long ago. A limit that is set later does not count deleted orders.
    /// Payments and dead letters are never deleted. The audit adds up what was deleted in checkpoints.
    #[schemars(range(min = 0, max = 36_500))]
    pub orders_days: u32,
    /// Days after which a payment platform's message, with its body, is deleted; 0: never. Messages
    /// about open payments stay.
    #[schemars(range(min = 0, max = 36_500))]
    pub events_days: u32,
    /// Days after which entries of `stock_journal` are folded into one checkpoint for each SKU; 0:
    /// never. Entries of requests with an `Idempotency-Key` stay, and so does all that the entries
    /// before it do not explain.
    #[schemars(range(min = 0, max = 36_500))]
    pub stock_log_days: u32,
}

/// `[log]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace` or `off`, or a list such as `info,millrace=debug`
    /// that sets parts of the program apart; a list without a level for the rest leaves it at `warn`.
    pub level: String,
    /// How lines are written.
    pub format: LogFormat,
}

/// The forms of a log line.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `text` on a terminal, else `json`.
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// One text or a list of texts, none of them empty; an empty list means none. Its `Debug` form hides what it holds.
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
            return Err("an empty text; leave it out for none");
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
            retention: Retention::default(),
            log: Log::default(),
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
            journal: Journal::default(),
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
