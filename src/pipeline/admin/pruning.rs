//! Row retention: rows that are older than `[retention]` says are deleted, in the background.
//!
//! (`retention`, next door, keeps segments of the order journal until standbys have them.)
//!
//! ```text
//!   every 10 minutes:  orders ─► payment_events ─► stock_journal, SKU by SKU
//!   a part: 2,000 rows, the oldest first ─► a pause of four times what it took ─► the next
//! ```
//!
//! The sale goes first: parts wait while orders are in flight in numbers, though not for ever, and
//! while an audit runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use crate::config::Retention;
use crate::metrics::Metrics;
use crate::order::{OrderId, UnixMillis};
use crate::state::State;
use crate::store::StoreError;
use crate::store::postgres::pruning::{Part, PrunedPart, Pruner};
use crate::store::postgres::{Database, NodeLease};

const CYCLE: Duration = Duration::from_secs(600);
/// Rows that a part looks at.
const PART_ROWS: i64 = 2_000;
/// A part is followed by a pause of so many times what it took.
const PAUSE_FACTOR: u32 = 4;
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// How long an audit, or a busy queue, is waited for before it is looked at again.
const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// With more orders in flight than this the queue is busy.
const BUSY_IN_FLIGHT: usize = 64;
/// A sale that never ends holds up a part no longer than this.
const BUSY_MAX: Duration = Duration::from_secs(30);

/// Orders with smaller ids may have been deleted: one that is missing is not lost.
pub type PrunedBelow = Arc<AtomicI64>;

/// Deletes old rows.
pub struct Pruning {
    /// The database.
    pub database: Database,
    /// Who this process is.
    pub lease: NodeLease,
    /// For its clock, and for how busy it is.
    pub state: Arc<State>,
    /// For how long rows are kept.
    pub settings: Retention,
    /// Raised before orders are deleted.
    pub pruned_below: PrunedBelow,
    /// What is counted.
    pub metrics: Metrics,
}

/// Rows deleted in one cycle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Of `orders`.
    pub orders: u64,
    /// Of `payment_events`.
    pub events: u64,
    /// Of `stock_journal`.
    pub entries: u64,
}

impl Pruning {
    /// Runs until it is dropped.
    pub async fn keep(self) {
        loop {
            match self.cycle(PART_ROWS).await {
                Ok(pruned) if pruned != Pruned::default() => tracing::info!(
                    orders = pruned.orders,
                    payment_events = pruned.events,
                    stock_journal = pruned.entries,
                    "deleted rows that are older than retention keeps them"
                ),
                Ok(_) => {}
                Err(error @ StoreError::Fenced { .. }) => {
                    tracing::warn!(reason = %error, "old rows are no longer deleted by this process");
                    std::future::pending::<()>().await;
                }
                Err(error) => {
                    tracing::warn!(reason = %error, "could not delete old rows; retrying in 10 minutes");
                }
            }
            tokio::time::sleep(CYCLE).await;
        }
    }

    /// Deletes everything that is too old by now, in parts of so many rows.
    ///
    /// # Errors
    /// If the database does not answer, or this process may not write any more; the parts that
    /// were done are done.
    pub async fn cycle(&self, rows: i64) -> Result<Pruned, StoreError> {
        let mut pruner = self.database.pruner(self.lease).await?;
        // Neither clock alone makes a row old.
        let now = pruner.now().await?.min(self.state.ids.real_now());
        let mut pruned = Pruned::default();
        let counted = &self.metrics.pruned_rows;
        if let Some(cutoff) = before(now, self.settings.orders_days) {
            let below = OrderId::floor_of(cutoff);
            self.pruned_below
                .fetch_max(below.as_i64(), Ordering::AcqRel);
            let mut after = Some(0);
            while let Some(from) = after {
                let part = Part::Orders {
                    after: from,
                    below,
                    ended: cutoff,
                };
                let (gone, next) = self.part(&mut pruner, part, rows).await?;
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
                let (gone, next) = self.part(&mut pruner, part, rows).await?;
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
                    let (gone, next) = self.part(&mut pruner, part, rows).await?;
                    counted.add("stock_journal", gone);
                    pruned.entries += gone;
                    more = next.is_some();
                }
            }
        }
        let oldest = pruner.oldest().await?;
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

/// The moment so many days before `now`; none, where rows are kept for ever.
fn before(now: UnixMillis, days: u32) -> Option<UnixMillis> {
    (days > 0).then(|| UnixMillis(now.0.saturating_sub(i64::from(days) * 86_400_000)))
}
