//! `millrace serve`

use tokio::signal::unix::{SignalKind, signal};

use super::{ConfigArgs, logging};
use crate::app::Millrace;

/// Serves until a signal or an internal fault. True: drained clean.
pub async fn run(args: &ConfigArgs) -> anyhow::Result<bool> {
    let config = args.load()?;
    logging::start(&config.log)?;
    // Registered before anything starts, and never released: a second signal changes nothing.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let millrace = tokio::select! {
        started = Millrace::start(config) => started?,
        _ = terminate.recv() => return Ok(true),
        _ = interrupt.recv() => return Ok(true),
    };
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM"),
        _ = interrupt.recv() => tracing::info!("SIGINT"),
        reason = millrace.poisoned() => tracing::error!(%reason, "stopping because of an internal fault"),
    }
    Ok(millrace.drain().await)
}
