//! Orders that were not paid in time: their units come back in the database and in memory, within
//! a second of falling due and what is due before them.
//!
//! Which ids to look at and when is kept by `state::unpaid`; due is what Millrace's own monotonic
//! clock says (I10). A payment and an expiry lock the order's row: one wins, the other sees it.

use std::time::{Duration, Instant};

use super::cashier::Cashier;
use crate::faults::bug;
use crate::order::OrderId;
use crate::state::unpaid::Due;
use crate::store::StoreError;

/// Orders expired in one transaction: what a callback may wait behind.
const PART: i64 = 2_000;
/// How often the least unpaid order is noted, for the next start.
const NOTE: Duration = Duration::from_secs(10);

/// How far it has come.
#[derive(Debug, Default)]
pub(super) struct Expiring {
    /// The entry that is being worked on, and from which id on.
    current: Option<(Due, OrderId)>,
    noted: Option<(OrderId, Instant)>,
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
        let Some((due, from)) = self.expiring.current.or_else(|| {
            let due = self.parts.ledger.unpaid.due(now)?;
            Some((due, due.from))
        }) else {
            self.note_least().await;
            return Ok(false);
        };
        let with_orphans = !self.parts.ledger.orphans.is_empty();
        let moved = self
            .parts
            .writer
            .expire(from, due.to, now, PART, with_orphans)
            .await?;
        self.expiring.current = match moved.last() {
            Some(last) if moved.len() as i64 == PART => {
                OrderId::new(last.order_id.get() + 1).map(|next| (due, next))
            }
            _ => {
                self.parts.ledger.unpaid.done(due);
                None
            }
        };
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
        Ok(self.expiring.current.is_some() || self.parts.ledger.unpaid.due(now).is_some())
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
