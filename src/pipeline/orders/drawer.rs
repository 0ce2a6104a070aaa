//! The task that makes draws once they are due.
//!
//! ```text
//!   draw_at ──► closed ── every entry a row ──► fixed: number and hash stored ── beacon, if any ──► drawn: ranked, seed public
//! ```
//!
//! Each step is one transaction that does nothing if it is done, so a step that failed, was killed, or whose commit is
//! in doubt is repeated. Of several nodes each does them: each closes the draw for itself, and once all have, whichever is first
//! fixes the entries, and whichever is first makes the draw. Memory follows the database: after a restart the draw goes on where its row says. The units go
//! out by the assigner (`payments::assigner`), like those of any waiting list, once the list is in the order of rank.

use std::sync::Arc;
use std::time::Duration;

use crate::backoff::Backoff;
use crate::order::{OrderId, UnixMillis};
use crate::state::State;
use crate::state::stock::{Draw, DrawPhase, DrawTerms, Sku};
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease, draws};

/// Interval between two looks at the clock.
const LOOK: Duration = Duration::from_millis(100);
/// Pause after an error: first and longest.
const RETRY: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
/// The clock of order ids may be behind the wall clock that opens a sale by so much, in milliseconds.
const CLOCKS_DIFFER_MS: i64 = 86_400_000;

/// The task.
#[derive(Debug)]
pub struct Drawer {
    /// The in-memory state.
    pub state: Arc<State>,
    /// For connections of its own.
    pub database: Database,
    /// The right to write.
    pub lease: NodeLease,
}

impl Drawer {
    /// Runs until the future is dropped.
    pub async fn run(self) {
        let mut retry = RETRY;
        loop {
            let mut failed = false;
            for sku in self.state.catalogue.all() {
                let (terms, draw) = (sku.terms().draw.clone(), sku.draw());
                let (Some(terms), Some(draw)) = (terms, draw) else {
                    continue;
                };
                if draw.is_drawn() || self.state.ids.real_now() < terms.at {
                    continue;
                }
                if let Err(error) = self.advance(&sku, &terms, &draw).await {
                    failed = true;
                    tracing::error!(
                        sku_id = %sku.id, reason = %error,
                        "the draw does not go on; its entries and its seed are as safe as before, and its units are kept; retrying"
                    );
                }
            }
            let pause = if failed { retry.pause() } else { LOOK };
            if !failed {
                retry = RETRY;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Takes a draw that is due as far as it can go now.
    async fn advance(
        &self,
        sku: &Arc<Sku>,
        terms: &DrawTerms,
        draw: &Draw,
    ) -> Result<(), StoreError> {
        // Under the list's lock, which whoever enters holds: from here on nobody does.
        sku.waitlist().locked(|| draw.reach(DrawPhase::Closed));
        if draw.phase() == DrawPhase::Closed {
            if sku.waitlist().joining() > 0 {
                return Ok(());
            }
            if !self.fix(sku, draw).await? {
                return Ok(());
            }
        }
        if terms.beacon.is_some() && !draw.has_beacon() {
            // It may have been supplied at another node.
            if sku.shared().is_none() || !draws::has_beacon(&self.database, sku.number).await? {
                return Ok(());
            }
            draw.note_beacon();
        }
        let now = self.state.ids.real_now();
        let made = draws::draw(&self.database, self.lease, sku.number, now).await?;
        let Some(places) = made else {
            return Ok(());
        };
        if sku.shared().is_none() {
            sku.waitlist().take_places(places);
        }
        draw.reach(DrawPhase::Drawn);
        tracing::info!(
            sku_id = %sku.id,
            "the draw is made, and its seed is public: units go out by rank (GET /v1/skus/{}/draw)", sku.id
        );
        Ok(())
    }

    /// Fixes the entries. False: not yet, because another node takes some.
    async fn fix(&self, sku: &Sku, draw: &Draw) -> Result<bool, StoreError> {
        if sku.shared().is_some() {
            draws::close(&self.database, self.lease, sku.number).await?;
        }
        // Nobody enters before the sale opens.
        let opens_at = sku.terms().opens_at.unwrap_or_default();
        let first = OrderId::floor_of(UnixMillis(opens_at.0.saturating_sub(CLOCKS_DIFFER_MS)));
        let now = self.state.ids.real_now();
        let fixed = draws::fix(&self.database, self.lease, sku.number, first, now).await?;
        let Some(fixed) = fixed else {
            return Ok(false);
        };
        draw.reach(DrawPhase::Fixed);
        tracing::info!(
            sku_id = %sku.id, entries = fixed.entries, units = fixed.units, entries_hash = %fixed.hash,
            "the entries of the draw are fixed"
        );
        Ok(true)
    }
}
