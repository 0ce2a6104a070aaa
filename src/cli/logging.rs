//! The log as it is configured: text for people or JSON for machines, on standard error.

use std::io::IsTerminal;

use crate::config::{Log, LogFormat};
use crate::logging::{self, Form};

/// Starts logging as configured. Called once; a second call changes nothing.
pub fn start(log: &Log) -> anyhow::Result<()> {
    let terminal = std::io::stderr().is_terminal();
    let form = match log.format {
        LogFormat::Auto if !terminal => Form::Json,
        LogFormat::Auto | LogFormat::Text => Form::Text { colours: terminal },
        LogFormat::Json => Form::Json,
    };
    logging::start(&log.directives(), form)
        .map_err(|e| anyhow::anyhow!("configuration field log.level: {e}"))
}
