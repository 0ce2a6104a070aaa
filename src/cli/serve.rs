//! `millrace serve`

use super::signals::Signals;
use super::{ConfigArgs, logging};
use crate::app::Millrace;

/// Serves until a signal or an internal fault. True: drained clean.
pub async fn run(args: &ConfigArgs) -> anyhow::Result<bool> {
    let config = args.load()?;
    logging::start(&config.log)?;
    let mut signals = Signals::new()?;
    let millrace = tokio::select! {
        started = Millrace::start(config) => started?,
        _ = signals.recv() => return Ok(true),
    };
    tokio::select! {
        signal = signals.recv() => tracing::info!(signal, "asked to end"),
        reason = millrace.poisoned() => tracing::error!(%reason, "stopping because of an internal fault"),
    }
    Ok(millrace.drain().await)
}
