//! `[events]`: what the shop's other systems hear, and where.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Config, ConfigError, OneOrMany};

/// The table of sinks: its names are chosen by the operator.
pub(super) const SINKS: &str = "events.sinks";

/// Longest name of a replication slot in bytes (PostgreSQL's `NAMEDATALEN`).
const SLOT_BYTES_MAX: usize = 63;

/// `[events]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Events {
    /// Connection that reads changes, direct to the primary, as a role with REPLICATION. Empty: `database.url`.
    pub database_url: String,
    /// Most bytes of WAL that PostgreSQL keeps for a sink that is away. Beyond it the sink's replication slot is
    /// dropped, and the sink is refilled from the rows once it is back.
    #[schemars(range(min = 67_108_864, max = 1_099_511_627_776_i64))]
    pub lag_bytes_max: u64,
    /// Members of an order that events have only if they are named here: `attributes`, `receipt`.
    pub include: Vec<EventMember>,
    /// Who gets the events, by names of a to z and 0 to 9. Each has a replication slot of its own,
    /// `millrace_{schema}_{name}`.
    pub sinks: BTreeMap<String, EventSink>,
}

/// Members of an order that are left out of events unless they are asked for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum EventMember {
    /// The shop's own object.
    Attributes,
    /// The order's signed form.
    Receipt,
}

/// `[events.sinks.NAME]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct EventSink {
    /// How events are delivered.
    pub kind: EventSinkKind,
    /// Address: `https://…` of a webhook, `redis://…` or `rediss://…` of Redis, `host:port,…` of the brokers of Kafka to
    /// ask first. TLS and SASL towards Kafka are those of `[queue.kafka]`.
    pub url: String,
    /// Topic of Kafka, which has to be there. Empty: `millrace-{schema}-events`.
    pub topic: String,
    /// Key of the stream in Redis. Empty: `millrace:{schema}:events`.
    pub stream: String,
    /// Secrets of a webhook in base64, with or without the prefix `whsec_`, one or a list: each message is signed with
    /// each, so that secrets can be rotated. None of them may be one of `payments.standard.secret`.
    #[schemars(with = "Vec<String>")]
    pub secret: OneOrMany,
    /// Requests of a webhook at once, each about another order.
    #[schemars(range(min = 1, max = 256))]
    pub in_flight_max: usize,
}

/// Kinds of sinks.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum EventSinkKind {
    /// A POST for each event, as Standard Webhooks says.
    #[default]
    Webhook,
    /// A record for each event in a topic of Apache Kafka, whose key is the order's id.
    Kafka,
    /// An entry for each event in a stream of Redis or Valkey.
    Redis,
}

impl Default for Events {
    fn default() -> Self {
        Events {
            database_url: String::new(),
            lag_bytes_max: 1 << 30,
            include: Vec::new(),
            sinks: BTreeMap::new(),
        }
    }
}

impl Default for EventSink {
    fn default() -> Self {
        EventSink {
            kind: EventSinkKind::default(),
            url: String::new(),
            topic: String::new(),
            stream: String::new(),
            secret: OneOrMany::default(),
            in_flight_max: 16,
        }
    }
}

fn fault(field: &'static str, message: String) -> Result<(), ConfigError> {
    Err(ConfigError::Field { field, message })
}

/// Checks the sinks against one another and against the payments. The content of addresses and secrets is checked by
/// their users (`http::webhook`).
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    for (name, sink) in &config.events.sinks {
        let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        if name.is_empty() || !name.bytes().all(is_allowed) {
            return fault(
                SINKS,
                format!("{name:?} is no name of a sink: it has a to z and 0 to 9 alone"),
            );
        }
        let slot = format!("millrace_{}_{name}", config.database.schema);
        if slot.len() > SLOT_BYTES_MAX {
            let longer = slot.len() - SLOT_BYTES_MAX;
            return fault(
                SINKS,
                format!("the name {name:?} makes the name of its slot {longer} bytes too long"),
            );
        }
        if sink.url.is_empty() {
            return fault(SINKS, format!("{name}: url is missing"));
        }
        let unused = |field: &str| {
            fault(
                SINKS,
                format!("{name}: {field} is not of this kind of sink"),
            )
        };
        match sink.kind {
            EventSinkKind::Webhook if !sink.topic.is_empty() => return unused("topic"),
            EventSinkKind::Webhook | EventSinkKind::Kafka if !sink.stream.is_empty() => {
                return unused("stream");
            }
            EventSinkKind::Redis if !sink.topic.is_empty() => return unused("topic"),
            EventSinkKind::Kafka | EventSinkKind::Redis if !sink.secret.0.is_empty() => {
                return unused("secret");
            }
            EventSinkKind::Kafka | EventSinkKind::Redis => {}
            EventSinkKind::Webhook => {
                if sink.secret.0.is_empty() {
                    return fault(
                        SINKS,
                        format!("{name}: secret is missing; openssl rand -base64 32 makes one"),
                    );
                }
                let bare = |secret: &String| {
                    secret
                        .trim_start_matches("whsec_")
                        .trim_end_matches('=')
                        .to_owned()
                };
                let payments: Vec<String> =
                    config.payments.standard.secret.0.iter().map(bare).collect();
                if sink
                    .secret
                    .0
                    .iter()
                    .map(bare)
                    .any(|secret| payments.contains(&secret))
                {
                    return fault(
                        SINKS,
                        format!(
                            "{name}: secret is one of payments.standard.secret, so who hears of orders could report payments; make another one"
                        ),
                    );
                }
            }
        }
    }
    Ok(())
}
