//! The sinks of events and their feeders, from the settings.

use std::sync::Arc;
use std::time::Duration;

use super::StartError;
use super::background::Parts;
#[cfg(feature = "kafka")]
use super::brokers;
use crate::config::{Config, ConfigError, EventMember, EventSink, EventSinkKind};
use crate::http::webhook::{Webhook, is_readable_on_the_way};
use crate::pipeline::events::Sink;
use crate::pipeline::events::feeder::{Feeder, FeederParts};
use crate::pipeline::events::form::{Former, Include};
use crate::pipeline::events::status::{Shared, Sinks};
use crate::store::StoreError;
use crate::store::events::slot;
use crate::store::postgres::Database;

/// Connections that each feeder opens at most: its own for the slot, and one for rows.
pub(super) const CONNECTIONS: usize = 2;

/// The sink that the settings of `name` describe. It has not connected yet.
fn sink(config: &Config, name: &str, settings: &EventSink) -> Result<Arc<dyn Sink>, ConfigError> {
    let made = match settings.kind {
        EventSinkKind::Webhook => {
            Webhook::new(&settings.url, &settings.secret.0, settings.in_flight_max).map(shared)
        }
        EventSinkKind::Kafka => kafka(config, settings),
        EventSinkKind::Redis => redis(config, settings),
    };
    made.map_err(|fault| ConfigError::Field {
        field: "events.sinks",
        message: format!("{name}: {fault}"),
    })
}

fn shared(sink: impl Sink + 'static) -> Arc<dyn Sink> {
    Arc::new(sink)
}

#[cfg(feature = "kafka")]
fn kafka(config: &Config, settings: &EventSink) -> Result<Arc<dyn Sink>, String> {
    let mut connection = brokers::kafka_settings(config).map_err(|error| error.to_string())?;
    connection.bootstrap = settings.url.clone();
    connection.topic = match settings.topic.as_str() {
        "" => format!("millrace-{}-events", config.database.schema),
        topic => topic.to_owned(),
    };
    crate::pipeline::events::kafka::KafkaTopic::new(connection).map(shared)
}

#[cfg(not(feature = "kafka"))]
fn kafka(_: &Config, _: &EventSink) -> Result<Arc<dyn Sink>, String> {
    Err("this build has no feature kafka".to_owned())
}

#[cfg(feature = "redis")]
fn redis(config: &Config, settings: &EventSink) -> Result<Arc<dyn Sink>, String> {
    let stream = match settings.stream.as_str() {
        "" => format!("millrace:{}:events", config.database.schema),
        stream => stream.to_owned(),
    };
    crate::pipeline::events::redis::RedisStream::new(&settings.url, stream).map(shared)
}

#[cfg(not(feature = "redis"))]
fn redis(_: &Config, _: &EventSink) -> Result<Arc<dyn Sink>, String> {
    Err("this build has no feature redis".to_owned())
}

/// Reads what the settings of the sinks name; connects to nothing.
pub(super) fn look(config: &Config) -> Result<(), StartError> {
    for (name, settings) in &config.events.sinks {
        let sink = sink(config, name, settings)?;
        if settings.kind == EventSinkKind::Webhook && is_readable_on_the_way(&settings.url) {
            tracing::warn!(
                sink = name,
                to = sink.title(),
                "events go over http:// to another machine: the network between can read them. Use https://, or a network of \
                 your own"
            );
        }
    }
    if !config.events.database_url.is_empty() {
        named_database(config)?;
    }
    Ok(())
}

fn named_database(config: &Config) -> Result<Database, StartError> {
    let settings = &config.database;
    let step = Duration::from_millis(settings.step_timeout_ms);
    let made = Database::new(&config.events.database_url, &settings.schema, 1, step);
    made.map_err(|error| match error {
        StoreError::Url(message) => StartError::Config(ConfigError::Field {
            field: "events.database_url",
            message,
        }),
        error => error.into(),
    })
}

/// The database as changes are read from it: that of `events.database_url`, or `database`.
///
/// # Errors
/// If `events.database_url` is invalid.
pub fn slots_database(config: &Config, database: &Database) -> Result<Database, StartError> {
    match config.events.database_url.as_str() {
        "" => Ok(database.with_own_pool(1)?),
        _ => named_database(config),
    }
}

/// Checks that events can be read, if there are sinks.
pub(super) async fn check(config: &Config, database: &Database) -> Result<(), StartError> {
    if config.events.sinks.is_empty() {
        return Ok(());
    }
    slot::check_publication(database).await?;
    slot::check(&slots_database(config, database)?).await?;
    Ok(())
}

/// A feeder for each sink, and what they say about themselves.
pub(super) fn feeders(parts: &Parts<'_>) -> Result<(Vec<Feeder>, Sinks), StartError> {
    let config = parts.config;
    let include = Include {
        attributes: config.events.include.contains(&EventMember::Attributes),
        receipt: config.events.include.contains(&EventMember::Receipt),
    };
    let former = Former::new(Arc::clone(&parts.ownership.receipts), include);
    let (mut feeders, mut sinks) = (Vec::new(), Vec::new());
    for (name, settings) in &config.events.sinks {
        let sink = sink(config, name, settings)?;
        let status = Shared::new(name.clone(), sink.title());
        sinks.push(status.clone());
        let database = &parts.ownership.database;
        feeders.push(Feeder::new(FeederParts {
            name: name.clone(),
            database: database.with_own_pool(1)?,
            slots_at: slots_database(config, database)?,
            sink,
            former: former.clone(),
            lag_bytes_max: config.events.lag_bytes_max,
            status,
            metrics: parts.metrics.clone(),
        }));
    }
    Ok((feeders, Sinks(sinks.into())))
}
