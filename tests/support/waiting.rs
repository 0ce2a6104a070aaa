//! Waiting for a condition, with a deadline in place of a guess at how long it takes.

use std::time::{Duration, Instant};

/// How long a condition may take to come true, on a slow and busy machine.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// Pause between two looks, each of which may be a connection of its own.
const LOOK: Duration = Duration::from_millis(5);

/// Waits until the condition holds; panics after [`PATIENCE`].
pub async fn wait_until(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(LOOK).await;
    }
}
