//! Where log lines go: standard error, as text for people or JSON for machines.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Starts logging as configured. Called once; a second call changes nothing.
pub fn start(log: &Log) -> anyhow::Result<()> {
    // One line a runtime detail of the coroutine library is nobody's business at `info`.
    let directives = format!(
        "{},may=warn,refinery_core=warn,tokio_postgres=warn",
        log.level
    );
    let filter = EnvFilter::try_new(&directives)
        .map_err(|e| anyhow::anyhow!("configuration field log.level: {e}"))?;
    let text = match log.format {
        LogFormat::Auto => std::io::stderr().is_terminal(),
        LogFormat::Text => true,
        LogFormat::Json => false,
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let started = if text {
        builder
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    if let Err(error) = started {
        tracing::debug!(%error, "logging was started before");
    }
    Ok(())
}
