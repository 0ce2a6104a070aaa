//! What a preflight judges a sale by, from the settings.

use std::time::Duration;

use super::{background, brokers};
use crate::config::{Backend, Config, ConfigError};
use crate::metrics::Metrics;
use crate::pipeline::admin::preflight::{LogProbe, Settings};

/// The settings of a preflight; with the metrics of the service, if it is the running one.
///
/// # Errors
/// [`ConfigError`] if the broker's client cannot be made.
pub fn settings(config: &Config, service: Option<&Metrics>) -> Result<Settings, ConfigError> {
    let log = match config.queue.backend {
        Backend::Memory => LogProbe::Memory,
        Backend::Journal => LogProbe::Journal(config.journal_dir()),
        Backend::Redis | Backend::Kafka | Backend::RocketMq => {
            LogProbe::Broker(brokers::client(config, 0)?, service.cloned())
        }
    };
    Ok(Settings {
        embedded: config.database.url.is_empty(),
        connections: background::connections_max(config) as u64,
        batch_rows_max: config.workers.batch_rows_max,
        order_timeout: Duration::from_millis(config.orders.timeout_ms),
        clock_difference_max_ms: config.database.clock_difference_max_ms,
        log,
    })
}
