//! Checks that each setting is valid, and that they are consistent with one another.

use super::{Config, ConfigError, Retention, cluster, events, log, payments, reference, spans};

const DAY_MS: u64 = 86_400_000;

/// Checks everything that needs neither the machine nor the database.
///
/// # Errors
/// [`ConfigError::Field`] with the first invalid field and the remedy.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    ranges(config)?;
    payments::check(&config.payments, &config.receipt)?;
    events::check(config)?;
    cluster::check(config)?;
    retention(config)?;
    log::check(&config.log)?;
    spans::check(&config.tracing)?;
    schema(&config.database.schema)?;
    tokens(config)?;
    addresses(config)?;
    if config.orders.remembered_max < config.queue.capacity {
        return fault(
            "orders.remembered_max",
            "must be at least queue.capacity: every order in the queue is remembered",
        );
    }
    access(config)
}

fn fault(field: &'static str, message: impl Into<String>) -> Result<(), ConfigError> {
    Err(ConfigError::Field {
        field,
        message: message.into(),
    })
}

/// Checks every number against the range in the types of [`super`].
fn ranges(config: &Config) -> Result<(), ConfigError> {
    let values = toml::Table::try_from(config).map_err(|error| ConfigError::Invalid {
        origin: "configuration".to_owned(),
        message: error.to_string(),
    })?;
    let values = toml::Value::Table(values);
    for field in reference::fields() {
        let Some((least, most)) = field.range else {
            continue;
        };
        for value in at(&values, &field.path) {
            if let Some(value) = value.as_integer()
                && !(least..=most).contains(&value)
            {
                return fault(&field.path, format!("{value} is not {least} to {most}"));
            }
        }
    }
    Ok(())
}

/// The values of a field: one, or one for each name where its path has a level that the operator names.
fn at<'a>(values: &'a toml::Value, path: &str) -> Vec<&'a toml::Value> {
    path.split('.').fold(vec![values], |values, level| {
        let values = values.into_iter();
        match level {
            reference::NAME => values
                .filter_map(toml::Value::as_table)
                .flat_map(|table| table.values())
                .collect(),
            level => values.filter_map(|value| value.get(level)).collect(),
        }
    })
}

fn retention(config: &Config) -> Result<(), ConfigError> {
    let Retention { orders_days, .. } = config.retention;
    let days = u64::from(orders_days);
    let shortest = [
        (7 * DAY_MS, "7 days, because payments may arrive that late"),
        (
            config.orders.idempotency_window_ms,
            "orders.idempotency_window_ms",
        ),
        (config.orders.payment_ttl_ms, "orders.payment_ttl_ms"),
    ];
    for (ms, what) in shortest {
        if days > 0 && days * DAY_MS < ms {
            let message =
                format!("{days} days are shorter than {what}; raise it, or set 0 for never");
            return fault("retention.orders_days", message);
        }
    }
    Ok(())
}

/// An identifier that PostgreSQL accepts without quotes, of at most 63 bytes (its manual, 4.1.1).
fn schema(name: &str) -> Result<(), ConfigError> {
    let is_allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    let begins_well = name.bytes().next().is_some_and(|b| !b.is_ascii_digit());
    if !begins_well || name.len() > 63 || !name.bytes().all(is_allowed) {
        return fault(
            "database.schema",
            "must be 1 to 63 of a-z, 0-9 and _, not starting with a digit",
        );
    }
    if name.starts_with("pg_") || name == "information_schema" {
        return fault(
            "database.schema",
            "is a name that PostgreSQL reserves; choose another",
        );
    }
    Ok(())
}

fn tokens(config: &Config) -> Result<(), ConfigError> {
    for (field, tokens) in [
        ("data_plane.token", &config.data_plane.token),
        ("control_plane.token", &config.control_plane.token),
    ] {
        let can_be_sent = |token: &String| token.bytes().all(|byte| byte.is_ascii_graphic());
        if !tokens.0.iter().all(can_be_sent) {
            return fault(
                field,
                "must be visible ASCII without spaces, because a header field carries it",
            );
        }
    }
    Ok(())
}

fn addresses(config: &Config) -> Result<(), ConfigError> {
    let (data, control) = (config.data_plane.listen, config.control_plane.listen);
    if data.port() != 0 && data == control {
        return fault(
            "control_plane.listen",
            "is the address of data_plane.listen; give each plane an address of its own",
        );
    }
    Ok(())
}

/// Refuses a plane that other machines can reach unless it is protected.
fn access(config: &Config) -> Result<(), ConfigError> {
    let (data, control) = (&config.data_plane, &config.control_plane);
    if !data.listen.ip().is_loopback() && data.token.0.is_empty() && !data.trust_network {
        return fault(
            "data_plane.listen",
            "is not loopback: set data_plane.token, or data_plane.trust_network = true if only \
             the shop's backend can reach it",
        );
    }
    if !control.listen.ip().is_loopback() && control.token.0.is_empty() {
        return fault(
            "control_plane.listen",
            "is not loopback: set control_plane.token",
        );
    }
    Ok(())
}
