//! Orders that were not paid in time: their units come back in the database and in memory, within
//! a second of falling due and what is due before them.
//!
//! Which ids to look at and when is kept by `state::unpaid`; due is what Millrace's own monotonic
//! clock says (I10). A payment and an expiry lock the order's row: one wins, the other sees it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cashier::Cashier;
use crate::faults::bug;
use crate::order::{OrderId, SkuNumber, UnixMillis};
use crate::state::stock::Sku;
use crate::state::unpaid::Due;
use crate::store::StoreError;
use crate::store::settlement::Moved;

/// Orders expired in one transaction: what a callback may wait behind.
const PART: i64 = 2_000;
/// How often the least unpaid order is noted, for the next start.
const NOTE: Duration = Duration::from_secs(10);

/// When orders are looked at again whose units could not come back, in milliseconds.
const REFUSED_MS: u64 = 5_000;

/// How far it has come.
#[derive(Debug, Default)]
pub(super) struct Expiring {
    /// The entry that is being worked on, and from which id on.
    current: Option<(Due, OrderId)>,
    by_sku: Option<BySku>,
    noted: Option<(OrderId, Instant)>,
}

/// An entry that is worked on SKU by SKU, because rows of one of them cannot be had.
#[derive(Debug)]
struct BySku {
    due: Due,
    left: Vec<Arc<Sku>>,
    /// Whether some of its orders are still to expire.
    is_left: bool,
}

impl Cashier {
    /// Expires one part of what is due. True: there is more.
    pub(super) async fn look_at_expiries(&mut self) -> Result<bool, StoreError> {
        let now = self.parts.ledger.ids.real_now();
        let backlog_ms = self.parts.ledger.unpaid.backlog_ms(now);
        let metrics = &self.parts.metrics;
        metrics
            .payments
            .expiry_backlog_seconds
            .set(backlog_ms as f64 / 1_000.0);
        if let Some(by_sku) = self.expiring.by_sku.take() {
            return self.expire_by_sku(by_sku, now).await;
        }
        let Some((due, from)) = self.expiring.current.or_else(|| {
            let due = self.parts.ledger.unpaid.due(now)?;
            Some((due, due.from))
        }) else {
            self.note_least().await;
            return Ok(false);
        };
        let moved = match self.expire((from, due.to), now, None).await {
            Err(error) if error.is_about_rows() => {
                self.expiring.current = None;
                self.expiring.by_sku = Some(BySku {
                    due,
                    left: self.parts.ledger.catalogue.all(),
                    is_left: false,
                });
                return Ok(true);
            }
            expired => expired?,
        };
        self.expiring.current = match moved.last() {
            Some(last) if moved.len() as i64 == PART => {
                OrderId::new(last.order_id.get() + 1).map(|next| (due, next))
            }
            _ => {
                self.parts.ledger.unpaid.done(due);
                None
            }
        };
        Ok(self.expiring.current.is_some() || self.parts.ledger.unpaid.due(now).is_some())
    }

    /// Expires one part of the orders of a range of ids, in the database and in memory.
    async fn expire(
        &mut self,
        (from, to): (OrderId, OrderId),
        now: UnixMillis,
        sku: Option<SkuNumber>,
    ) -> Result<Vec<Moved>, StoreError> {
        let with_orphans = !self.parts.ledger.orphans.is_empty();
        let writer = self.writer().await?;
        let moved = writer
            .expire(from, to, now, PART, with_orphans, sku)
            .await?;
        if !moved.is_empty() {
            self.parts
                .metrics
                .payments
                .orders_expired
                .inc_by(moved.len() as u64);
            tracing::debug!(orders = moved.len(), "orders have expired");
            if !bug("keep_expired_units") {
                self.settle_memory(&moved);
            }
        }
        Ok(moved)
    }

    /// Rows of some SKU cannot be had: its orders are tried again later, and those of the others
    /// expire. One part a look, as otherwise.
    async fn expire_by_sku(
        &mut self,
        mut by_sku: BySku,
        now: UnixMillis,
    ) -> Result<bool, StoreError> {
        let due = by_sku.due;
        let Some(sku) = by_sku.left.last().map(Arc::clone) else {
            let unpaid = &self.parts.ledger.unpaid;
            unpaid.done(due);
            if by_sku.is_left {
                let later = now.plus_ms(REFUSED_MS);
                unpaid.note([(due.from, later), (due.to, later)]);
            }
            return Ok(true);
        };
        match self.expire((due.from, due.to), now, Some(sku.number)).await {
            Ok(moved) if moved.len() as i64 == PART => {}
            Ok(_) => drop(by_sku.left.pop()),
            Err(error) if error.is_about_rows() => {
                tracing::error!(
                    sku_id = %sku.id, reason = %error,
                    "the units of orders that have expired do not come back yet: somebody holds rows of this SKU, or its \
                     row in `sku` disagrees with its orders (see the audit)"
                );
                by_sku.is_left = true;
                by_sku.left.pop();
            }
            Err(error) => {
                self.expiring.by_sku = Some(by_sku);
                return Err(error);
            }
        }
        self.expiring.by_sku = Some(by_sku);
        Ok(true)
    }

    /// Notes below which no unpaid order lies that a start would not find in the idempotency
    /// window anyway. A failure only makes the next start look at more.
    async fn note_least(&mut self) {
        let ledger = &self.parts.ledger;
        let floor = ledger.ids.window_floor(self.parts.window_ms);
        let least = ledger
            .unpaid
            .least()
            .map_or(floor, |least| least.min(floor));
        let due = match self.expiring.noted {
            Some((noted, at)) => noted != least && at.elapsed() >= NOTE,
            None => true,
        };
        if due {
            let noted = self
                .parts
                .database
                .note_unpaid_from(self.parts.lease, least);
            if noted.await.is_ok() {
                self.expiring.noted = Some((least, Instant::now()));
            }
        }
    }
}
