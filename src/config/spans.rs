//! `[tracing]`: where the spans of requests go, and of how many requests.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// `[tracing]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// Address of the OpenTelemetry collector's receiver for OTLP over HTTP, `http://host:4318`; `/v1/traces` is appended.
    /// Empty: nothing is traced.
    pub otlp_url: String,
    /// Share of requests that are traced, 0 to 1. A request with a `traceparent` is traced if that says so, whatever the
    /// share.
    pub sample: f64,
}

impl Default for Tracing {
    fn default() -> Self {
        Tracing {
            otlp_url: String::new(),
            sample: 0.01,
        }
    }
}

pub(super) fn check(tracing: &Tracing) -> Result<(), ConfigError> {
    if (0.0..=1.0).contains(&tracing.sample) {
        return Ok(());
    }
    Err(ConfigError::Field {
        field: "tracing.sample",
        message: format!("{} is not 0 to 1", tracing.sample),
    })
}
