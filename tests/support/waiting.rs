//! Waiting for a condition, with a deadline in place of a guess at how long it takes.

use std::time::{Duration, Instant};

/// How long a condition may take to come true, on a slow and busy machine.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// Pause between two looks, each of which may be a connection of its own.
const LOOK: Duration = Duration::from_millis(5);

/// The same for a thread that may block, with a patience of its own.
pub fn until(what: &str, patience: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {patience:?}");
        std::thread::sleep(LOOK);
    }
}

/// Waits until the condition holds; panics after [`PATIENCE`].
pub async fn wait_until(what: &str, condition: impl AsyncFn() -> bool) {
    wait_until_within(what, PATIENCE, condition).await;
}

/// The same with a patience of its own.
pub async fn wait_until_within(what: &str, patience: Duration, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + patience;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not within {patience:?}");
        tokio::time::sleep(LOOK).await;
    }
}
