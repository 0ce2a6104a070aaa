//! The parts that callbacks, the payment processor and expiry have in common: a writer of their own each, and
//! what memory owes after a commit.
//!
//! Each of them has a task, a connection and a row of `writer`. Two of them never move the same
//! units: the row of the order is locked, and whoever finds it where it was moves it. Memory is
//! told by each of them what its own transactions have moved, and of nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use crate::metrics::Metrics;
use crate::order::payment::Verdict;
use crate::order::{OrderId, OrderUnits};
use crate::state::State;
use crate::state::effects::Row;
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease};
use crate::store::settlement::payments::Settlement;
use crate::store::settlement::{Destination, SettlementWriter, UnitMove};

/// How often the units of a refund are looked for that its payment has not moved yet in memory.
const COUNTER_LOOK: Duration = Duration::from_millis(1);
/// How often at most. It was committed before, so it moves them in an instant.
const COUNTER_LOOKS: u32 = 10_000;

/// What the settlers tell one another.
#[derive(Debug, Default)]
pub struct Signals {
    /// Whether any payment may be an orphan, also one that names no order of ours.
    may_have_orphans: AtomicBool,
    /// Whether rows could not be had of late: payments are stored first, and matched one by one.
    rows_are_held: AtomicBool,
    /// Held by whoever moves units, from before the transaction until memory has been told; and
    /// alone by whoever compares memory with the database.
    moving: Arc<RwLock<()>>,
}

impl Signals {
    /// Whether any payment may be an orphan.
    pub(super) fn may_have_orphans(&self) -> bool {
        self.may_have_orphans.load(Ordering::Acquire)
    }

    /// Says whether any payment may be an orphan.
    pub(super) fn set_may_have_orphans(&self, may: bool) {
        self.may_have_orphans.store(may, Ordering::Release);
    }

    /// Whether payments are matched one by one.
    pub(super) fn rows_are_held(&self) -> bool {
        self.rows_are_held.load(Ordering::Acquire)
    }

    /// Says whether they are.
    pub(super) fn set_rows_are_held(&self, held: bool) {
        self.rows_are_held.store(held, Ordering::Release);
    }
}

/// The parts of a settler.
pub struct SettlerParts {
    /// The state in memory.
    pub state: Arc<State>,
    /// For reading.
    pub database: Database,
    /// Who this process is.
    pub lease: NodeLease,
    /// For writing.
    pub writer: SettlementWriter,
    /// Shared by all settlers.
    pub signals: Arc<Signals>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Somebody who settles what happens to orders after their rows are there.
pub struct Settler {
    pub(super) parts: SettlerParts,
    /// Orders whose rows have changed while a worker was about to note them as recent.
    landing: Vec<OrderId>,
    /// Commits that a failover has lost and memory has been told of.
    commits_lost: u64,
}

impl Settler {
    /// A settler.
    pub fn new(parts: SettlerParts) -> Self {
        Settler {
            parts,
            landing: Vec::new(),
            commits_lost: 0,
        }
    }

    /// The writer, and the right to move units, to be kept until memory has been told. Where a
    /// failover has lost commits, memory is told first what is sold now.
    pub(super) async fn writer(
        &mut self,
    ) -> Result<(OwnedRwLockReadGuard<()>, &mut SettlementWriter), StoreError> {
        self.parts.writer.connected().await?;
        let lost = self.parts.writer.commits_lost();
        if lost > self.commits_lost {
            self.correct_memory().await?;
            let newly_lost = lost - self.commits_lost;
            self.parts.metrics.commits_lost.inc_by(newly_lost);
            self.commits_lost = lost;
        }
        let moving = Arc::clone(&self.parts.signals.moving).read_owned().await;
        Ok((moving, &mut self.parts.writer))
    }

    /// Makes memory agree with the database about what is sold: nobody but settlers moves that, and
    /// none does meanwhile. An order whose payment is lost is to be paid again, and falls due
    /// again; what was lost of a refund is sold again.
    async fn correct_memory(&self) -> Result<(), StoreError> {
        let _alone = self.parts.signals.moving.write().await;
        let (database, lease) = (&self.parts.database, self.parts.lease);
        let unpaid = database.unpaid_below(lease, OrderId::MAX).await?;
        self.parts.state.expiry_index.note(unpaid);
        for found in self.parts.database.load_skus().await? {
            let Some(sku) = self.parts.state.catalogue.by_number(found.number) else {
                continue;
            };
            let (found, live) = (
                found.counter().snapshot().sold,
                sku.counter().snapshot().sold,
            );
            if found < live {
                sku.counter().hold_again(live - found);
            } else if found > live && sku.counter().hold(found - live).is_ok() {
                sku.counter().sell(found - live);
            }
            if found != live {
                tracing::error!(sku_id = %sku.id, sold = found, believed = live, "the database has lost payments or refunds");
            }
        }
        Ok(())
    }

    /// Says that something did not go well. A process that was replaced ends.
    pub(super) fn note_failure(&self, error: &StoreError) {
        if let StoreError::Fenced { .. } = error {
            self.parts.state.poison.set(error.to_string());
        } else {
            tracing::warn!(reason = %error, "payments or expiries wait; it is tried again");
        }
    }

    /// Forgets orders again that a worker has noted as recent after their rows had changed.
    pub(super) fn forget_landed(&mut self) {
        let state = &self.parts.state;
        self.landing.retain(|id| {
            // In this order: its worker notes it before it leaves the map.
            let stays = state.pending.get(*id).is_some();
            state.recent_orders.forget(*id);
            stays
        });
    }

    /// Notes orphans, counts verdicts and moves memory, after a commit.
    pub(super) async fn settled(&mut self, settlement: &Settlement) {
        let payments = &self.parts.metrics.payments;
        for (order_id, paid_at) in &settlement.orphans {
            self.parts.state.orphans.insert(*order_id, *paid_at);
            payments.verdicts.count("orphan");
        }
        if settlement.without_order > 0 || !settlement.orphans.is_empty() {
            self.parts.signals.set_may_have_orphans(true);
        }
        for matched in &settlement.matched {
            self.parts.state.orphans.remove(matched.order_id);
            match matched.verdict {
                Verdict::Pay => payments.verdicts.count("matched"),
                Verdict::Refund { reason, .. } => {
                    payments.verdicts.count("refund_due");
                    payments.refunds.count(reason.as_str());
                    tracing::warn!(order_id = %matched.order_id, payment = matched.payment_id, %reason, "a payment has to go back");
                }
            }
        }
        self.settle_memory(&settlement.moved).await;
    }

    /// What memory owes for units that have moved in the database.
    pub(super) async fn settle_memory(&mut self, moved: &[UnitMove]) {
        let state = Arc::clone(&self.parts.state);
        for moved in moved {
            let units = &moved.units;
            if state.pending.get(units.order_id).is_some() {
                self.landing.push(units.order_id);
            }
            state.recent_orders.forget(units.order_id);
            match moved.to {
                Destination::Sold => state.paid(units),
                Destination::Free(how) => state.end_unpaid(units, how, Row::Moved),
                Destination::Nowhere => {}
                Destination::Restocked => {
                    wait_until_sold(&state, units).await;
                    state.restocked(units);
                }
                Destination::Withdrawn => {
                    wait_until_sold(&state, units).await;
                    state.withdrawn(units);
                }
            }
        }
    }
}

/// The payment of refunded units was committed before, by another settler, which may not have told
/// memory yet.
async fn wait_until_sold(state: &State, units: &OrderUnits) {
    let Some(sku) = state.catalogue.by_number(units.sku) else {
        return;
    };
    for _ in 0..COUNTER_LOOKS {
        if sku.counter().snapshot().sold >= units.quantity {
            return;
        }
        tokio::time::sleep(COUNTER_LOOK).await;
    }
}
