//! Pruning: deletes rows past their `[retention]`, in the background.
//!
//! Not to be confused with `failover::wal_retention`, which keeps segments of the order journal until standbys
//! have their orders.
//!
//! ```text
//!   every 10 minutes:  orders ─► payment_events ─► stock_log, SKU by SKU
//!   a part: 2,000 rows, the oldest first ─► a pause of four times what it took ─► the next
//! ```
//!
//! The sale has priority: parts wait while many orders are in flight, though not for ever, and while an audit
//! runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Retention;
use crate::metrics::Metrics;
use crate::order::{OrderId, UnixMillis};
use crate::state::State;
use crate::store::StoreError;
use crate::store::postgres::pruning::{Part, PrunedPart, Pruner};
use crate::store::postgres::{Database, NodeLease};

const CYCLE: Duration = Duration::from_secs(600);
/// Rows read in a part.
const PART_ROWS: i64 = 2_000;
/// Pause after a part, as a multiple of the part's duration.
const PAUSE_FACTOR: u32 = 4;
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Pause before an audit or a busy queue is checked again.
const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// Orders in flight above which the queue counts as busy.
const BUSY_IN_FLIGHT: usize = 64;
/// Longest time that a busy queue delays a part.
const BUSY_MAX: Duration = Duration::from_secs(30);

/// Deletes old rows.
pub struct Pruning {
    /// The database.
    pub database: Database,
    /// The lease of this process.
    pub lease: NodeLease,
    /// The state in memory, for the clock and the orders in flight.
    pub state: Arc<State>,
    /// The retention of each table.
    pub settings: Retention,
    /// The metrics.
    pub metrics: Metrics,
}

/// Rows deleted in one cycle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Rows of `orders`.
    pub orders: u64,
    /// Rows of `payment_events`.
    pub events: u64,
    /// Rows of `stock_log`.
    pub entries: u64,
}

impl Pruning {
    /// Runs until the future is dropped.
    pub async fn keep(self) {
        loop {
            match self.cycle(PART_ROWS).await {
                Ok(pruned) if pruned != Pruned::default() => tracing::info!(
                    orders = pruned.orders,
                    payment_events = pruned.events,
                    stock_log = pruned.entries,
                    "deleted rows past their retention"
                ),
                Ok(_) => {}
                Err(error @ StoreError::Fenced { .. }) => {
                    tracing::warn!(reason = %error, "this process was replaced and deletes no more old rows");
                    std::future::pending::<()>().await;
                }
                Err(error) => {
                    tracing::warn!(reason = %error, "old rows could not be deleted; retrying in 10 minutes");
                }
            }
            tokio::time::sleep(CYCLE).await;
        }
    }

    /// Deletes all rows past their retention, in parts of `rows` rows. Of several nodes one does; the others delete none.
    ///
    /// # Errors
    /// If the database does not answer, or this process may not write any more; completed parts stay deleted.
    pub async fn cycle(&self, rows: i64) -> Result<Pruned, StoreError> {
        let mut pruner = Pruner::connect(&self.database, self.lease).await?;
        // A row is old only if both clocks say so.
        let now = pruner.now().await?.min(self.state.ids.real_now());
        let pruned = match pruner.is_chosen().await? {
            true => self.prune(&mut pruner, now, rows).await?,
            false => Pruned::default(),
        };
        let oldest = pruner.oldest().await?;
        // The label of the stock log keeps the name that dashboards know.
        for (table, moment) in [
            ("orders", oldest.order),
            ("payment_events", oldest.event),
            ("stock_journal", oldest.entry),
        ] {
            let age_ms = moment.map_or(0, |moment| now.0.saturating_sub(moment.0).max(0));
            self.metrics.set_oldest_row(table, age_ms / 1_000);
        }
        Ok(pruned)
    }

    async fn prune(
        &self,
        pruner: &mut Pruner,
        now: UnixMillis,
        rows: i64,
    ) -> Result<Pruned, StoreError> {
        let mut pruned = Pruned::default();
        let counted = &self.metrics.pruned_rows;
        if let Some(cutoff) = before(now, self.settings.orders_days) {
            let below = OrderId::floor_of(cutoff);
            let mut after = Some(0);
            while let Some(from) = after {
                let part = Part::Orders {
                    after: from,
                    below,
                    ended: cutoff,
                };
                let (gone, next) = self.part(pruner, part, rows).await?;
                counted.add("orders", gone);
                pruned.orders += gone;
                after = next;
            }
        }
        if let Some(cutoff) = before(now, self.settings.events_days) {
            let mut after = Some(0);
            while let Some(from) = after {
                let part = Part::Events {
                    after: from,
                    before: cutoff,
                };
                let (gone, next) = self.part(pruner, part, rows).await?;
                counted.add("payment_events", gone);
                pruned.events += gone;
                after = next;
            }
        }
        if let Some(cutoff) = before(now, self.settings.stock_log_days) {
            for sku in self.state.catalogue.all() {
                let mut more = true;
                while more {
                    let part = Part::Entries {
                        sku: sku.number,
                        before: cutoff,
                    };
                    let (gone, next) = self.part(pruner, part, rows).await?;
                    counted.add("stock_journal", gone);
                    pruned.entries += gone;
                    more = next.is_some();
                }
            }
        }
        Ok(pruned)
    }

    /// One part, and the pause after it.
    async fn part(
        &self,
        pruner: &mut Pruner,
        part: Part,
        rows: i64,
    ) -> Result<(u64, Option<i64>), StoreError> {
        let asked = Instant::now();
        while self.state.pending.in_flight() > BUSY_IN_FLIGHT && asked.elapsed() < BUSY_MAX {
            tokio::time::sleep(BUSY_PAUSE).await;
        }
        loop {
            let started = Instant::now();
            match pruner.part(part, rows).await? {
                PrunedPart::Done { rows: gone, next } => {
                    if gone > 0 || next.is_some() {
                        let pause = (started.elapsed() * PAUSE_FACTOR).max(PAUSE_MIN);
                        tokio::time::sleep(pause).await;
                    }
                    return Ok((gone, next));
                }
                PrunedPart::AuditRunning => tokio::time::sleep(BUSY_PAUSE).await,
            }
        }
    }
}

/// The moment `days` days before `now`; `None` if rows are kept for ever.
fn before(now: UnixMillis, days: u32) -> Option<UnixMillis> {
    (days > 0).then(|| UnixMillis(now.0.saturating_sub(i64::from(days) * 86_400_000)))
}
