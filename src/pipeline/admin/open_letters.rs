//! The number of open dead letters, for metrics and the dashboard: retried and discarded ones no longer count.

use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::metrics::Metrics;
use crate::store::postgres::{Database, dead_letters};

/// Interval between counts.
const COUNT: Duration = Duration::from_secs(2);
/// More are not counted.
const OPEN_MAX: i64 = 10_000;

/// Counts the open dead letters for as long as the process lives. While the database is away the last number stays.
pub async fn keep(database: Database, metrics: Metrics) {
    let mut tick = tokio::time::interval(COUNT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match dead_letters::count_open(&database, OPEN_MAX).await {
            Ok(open) => metrics.dead_letters_open.set(open),
            Err(error) => tracing::debug!(reason = %error, "the dead letters were not counted"),
        }
    }
}
