//! The clients of the brokers that this build knows.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{Backend, Config, ConfigError};
use crate::queue::log::broker::{Broker, BrokerError};

/// Time limit of one call to a broker.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The same if replicas have to confirm: Redis gives their disks a part of it.
const REPLICAS_TIMEOUT: Duration = Duration::from_secs(10);

/// The client of a node's order log; 0 for a process that is no node of a cluster. It has not connected yet.
///
/// # Errors
/// [`ConfigError::Field`] with the setting that is missing or invalid, or if this build lacks the backend.
pub(crate) fn client(config: &Config, node: u8) -> Result<Arc<dyn Broker>, ConfigError> {
    match config.queue.backend {
        Backend::Journal | Backend::Memory => fault("queue.backend", "is not a broker"),
        Backend::Redis => redis(config, node),
        Backend::Kafka => kafka(config, node),
        Backend::RocketMq => rocketmq(config, node),
    }
}

fn fault<T>(field: &'static str, message: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Field {
        field,
        message: message.into(),
    })
}

fn needed(field: &'static str, value: &str) -> Result<(), ConfigError> {
    if value.trim().is_empty() {
        return fault(field, "is needed for this queue.backend");
    }
    Ok(())
}

fn made<B: Broker + 'static>(
    field: &'static str,
    client: Result<B, BrokerError>,
) -> Result<Arc<dyn Broker>, ConfigError> {
    match client {
        Ok(client) => Ok(Arc::new(client)),
        Err(error) => fault(field, error.to_string()),
    }
}

#[cfg(feature = "redis")]
fn redis(config: &Config, node: u8) -> Result<Arc<dyn Broker>, ConfigError> {
    use crate::queue::log::broker::redis::{RedisBroker, RedisSettings};
    let settings = &config.queue.redis;
    needed("queue.redis.url", &settings.url)?;
    let client = RedisBroker::new(RedisSettings {
        url: settings.url.clone(),
        stream: config.redis_stream(node),
        replicas_min: settings.replicas_min,
        timeout: match settings.replicas_min {
            0 => TIMEOUT,
            _ => REPLICAS_TIMEOUT,
        },
    });
    made("queue.redis.url", client)
}

#[cfg(not(feature = "redis"))]
fn redis(_: &Config, _: u8) -> Result<Arc<dyn Broker>, ConfigError> {
    absent("redis")
}

#[cfg(feature = "kafka")]
fn kafka(config: &Config, node: u8) -> Result<Arc<dyn Broker>, ConfigError> {
    use crate::queue::log::broker::kafka::{KafkaBroker, KafkaSettings};
    needed("queue.kafka.bootstrap", &config.queue.kafka.bootstrap)?;
    let settings = KafkaSettings {
        partition: node.into(),
        ..kafka_settings(config)?
    };
    made("queue.kafka.bootstrap", KafkaBroker::new(settings))
}

/// How to connect to Kafka.
///
/// # Errors
/// [`ConfigError::Field`] with the setting that is invalid.
#[cfg(feature = "kafka")]
pub(super) fn kafka_settings(
    config: &Config,
) -> Result<crate::queue::log::broker::kafka::KafkaSettings, ConfigError> {
    use crate::queue::log::broker::kafka::{KafkaSettings, Mechanism, Sasl, Tls};
    let settings = &config.queue.kafka;
    let sasl = match settings.sasl_mechanism.as_str() {
        "" => None,
        mechanism => Some(Sasl {
            mechanism: mechanism.parse::<Mechanism>().or_else(|_| {
                let message =
                    format!("{mechanism:?} is none of plain, scram-sha-256, scram-sha-512");
                fault("queue.kafka.sasl_mechanism", message)
            })?,
            user: settings.sasl_user.clone(),
            password: settings.sasl_password.0.clone(),
        }),
    };
    let has_ca_file = !settings.ca_file.as_os_str().is_empty();
    if has_ca_file && !settings.tls {
        return fault("queue.kafka.ca_file", "needs queue.kafka.tls = true");
    }
    Ok(KafkaSettings {
        bootstrap: settings.bootstrap.clone(),
        topic: config.kafka_topic(),
        partition: 0,
        tls: settings.tls.then(|| match has_ca_file {
            true => Tls::File(settings.ca_file.clone()),
            false => Tls::System,
        }),
        sasl,
        timeout: TIMEOUT,
    })
}

#[cfg(not(feature = "kafka"))]
fn kafka(_: &Config, _: u8) -> Result<Arc<dyn Broker>, ConfigError> {
    absent("kafka")
}

#[cfg(feature = "rocketmq")]
fn rocketmq(config: &Config, node: u8) -> Result<Arc<dyn Broker>, ConfigError> {
    use crate::queue::log::broker::rocketmq::{RocketMqBroker, RocketMqSettings};
    let settings = &config.queue.rocketmq;
    needed("queue.rocketmq.namesrv", &settings.namesrv)?;
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let (access_key, secret_key) = (given(&settings.access_key), given(&settings.secret_key.0));
    if access_key.is_some() != secret_key.is_some() {
        return fault(
            "queue.rocketmq.access_key",
            "and secret_key belong together",
        );
    }
    made(
        "queue.rocketmq.namesrv",
        Ok(RocketMqBroker::new(RocketMqSettings {
            namesrv: settings.namesrv.clone(),
            topic: config.rocketmq_topic(),
            queue: node.into(),
            access_key,
            secret_key,
            timeout: TIMEOUT,
        })),
    )
}

#[cfg(not(feature = "rocketmq"))]
fn rocketmq(_: &Config, _: u8) -> Result<Arc<dyn Broker>, ConfigError> {
    absent("rocketmq")
}

#[cfg(not(all(feature = "redis", feature = "kafka", feature = "rocketmq")))]
fn absent(feature: &str) -> Result<Arc<dyn Broker>, ConfigError> {
    fault(
        "queue.backend",
        format!("this build has no feature {feature}"),
    )
}
