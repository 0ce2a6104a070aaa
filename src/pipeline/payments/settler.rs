//! The parts that callbacks, the payment processor and expiry share: a fenced writer each, and the changes in
//! memory that follow a commit.
//!
//! Each of the three has a task, a connection and a row of `writer`. Two of them never move the same units: the
//! order's row is locked, and only a writer that finds it in the expected status moves it. Each task applies to
//! memory the moves of its own transactions and no others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use super::processor::PAUSE;
use crate::metrics::Metrics;
use crate::order::payment::Verdict;
use crate::order::{LaneSet, OrderId, SkuNumber};
use crate::state::State;
use crate::state::effects::Row;
use crate::state::row_changes::RowChange;
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease, orders, skus};
use crate::store::settlement::{Destination, Settlement, SettlementWriter, UnitMove};

/// Poll interval while the units of a refund are not sold yet in memory, because the payment's task has not
/// applied its move.
const COUNTER_LOOK: Duration = Duration::from_millis(1);
/// Polls at most. The payment was committed before the refund, so its task applies the move within an instant.
const COUNTER_LOOKS: u32 = 10_000;

/// Signals between the settlers.
#[derive(Debug, Default)]
pub struct Signals {
    /// Whether any payment may be an orphan, payments that name no order of ours included.
    may_have_orphans: AtomicBool,
    /// Whether row locks were unavailable recently: payments are then stored first and matched one by one.
    rows_are_held: AtomicBool,
    /// Held shared by a settler from before a transaction that moves units until memory is updated; held
    /// exclusively while memory is compared with the database.
    moving: Arc<RwLock<()>>,
}

impl Signals {
    /// Whether any payment may be an orphan.
    pub(super) fn may_have_orphans(&self) -> bool {
        self.may_have_orphans.load(Ordering::Acquire)
    }

    /// Sets whether any payment may be an orphan.
    pub(super) fn set_may_have_orphans(&self, may: bool) {
        self.may_have_orphans.store(may, Ordering::Release);
    }

    /// Whether payments are matched one by one.
    pub(super) fn rows_are_held(&self) -> bool {
        self.rows_are_held.load(Ordering::Acquire)
    }

    /// Sets whether payments are matched one by one.
    pub(super) fn set_rows_are_held(&self, held: bool) {
        self.rows_are_held.store(held, Ordering::Release);
    }
}

/// The right to move units; kept until memory is updated.
pub(super) struct Moving {
    _shared: OwnedRwLockReadGuard<()>,
    _change: RowChange,
}

/// The parts of a settler.
pub struct SettlerParts {
    /// The state in memory.
    pub state: Arc<State>,
    /// The database, for reads.
    pub database: Database,
    /// The lease of this process.
    pub lease: NodeLease,
    /// The writer of this settler.
    pub writer: SettlementWriter,
    /// Shared by all settlers.
    pub signals: Arc<Signals>,
    /// The metrics.
    pub metrics: Metrics,
}

/// Moves units of orders that are rows, in the database and then in memory.
pub struct Settler {
    pub(super) parts: SettlerParts,
    /// Orders whose rows changed while a worker was about to note them as recent.
    landing: Vec<OrderId>,
    /// Lost commits that memory has been corrected for.
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

    /// Returns the writer and a guard that permits moving units; keep the guard until memory is updated.
    pub(super) async fn writer(&mut self) -> Result<(Moving, &mut SettlementWriter), StoreError> {
        self.plain_writer().await?;
        let moving = Moving {
            _shared: Arc::clone(&self.parts.signals.moving).read_owned().await,
            _change: self.parts.state.row_changes.begin(),
        };
        Ok((moving, &mut self.parts.writer))
    }

    /// Returns the writer, for work that moves no units. If a failover has lost commits, the sold counters in memory
    /// are corrected first.
    pub(super) async fn plain_writer(&mut self) -> Result<&mut SettlementWriter, StoreError> {
        self.parts.writer.connected().await?;
        let lost = self.parts.writer.commits_lost();
        if lost > self.commits_lost {
            self.correct_memory().await?;
            let newly_lost = lost - self.commits_lost;
            self.parts.metrics.commits_lost.inc_by(newly_lost);
            self.commits_lost = lost;
        }
        Ok(&mut self.parts.writer)
    }

    /// Corrects the sold counters in memory to those of the database. Only settlers move sold units, and none
    /// does while this holds the lock exclusively. An order whose payment was lost is payable again and falls
    /// due again; units of a lost refund are sold again.
    async fn correct_memory(&self) -> Result<(), StoreError> {
        let _alone = self.parts.signals.moving.write().await;
        let (database, lease) = (&self.parts.database, self.parts.lease);
        let open = orders::open_below(database, lease, OrderId::MAX, LaneSet::ALL).await?;
        let payable = open.iter().filter(|open| !open.waits());
        let until = payable.map(|open| (open.units.order_id, open.expires_at));
        self.parts.state.expiry_index.note(until);
        for found in skus::load_all(database, lease).await? {
            let Some(sku) = self.parts.state.catalogue.by_number(found.number) else {
                continue;
            };
            let (found, live) = (
                found.counter().snapshot().sold,
                sku.counter().snapshot().sold,
            );
            if found < live {
                sku.counter().hold_again(live - found);
            } else if found > live {
                let units = found - live;
                // While orders wait, no unit is free, and some may be kept.
                if sku.counter().hold(units).is_ok() || sku.counter().take_kept(units) {
                    sku.counter().sell(units);
                }
            }
            if found != live {
                tracing::error!(sku_id = %sku.id, sold = found, believed = live, "the database has lost payments or refunds; the sold counter in memory is set to the database's");
            }
        }
        Ok(())
    }

    /// Logs a failure. A process that has been replaced is poisoned.
    pub(super) fn note_failure(&self, error: &StoreError) {
        if let StoreError::Fenced { .. } = error {
            self.parts.state.poison.set(error.to_string());
        } else {
            tracing::warn!(reason = %error, "payments or expiries are delayed; retrying");
        }
    }

    /// Waits after a step of a task: for `look` if nothing more is to be done, longer after an error. Returns false
    /// if the process is poisoned, so that the task ends.
    pub(super) async fn rest(&self, step: Result<bool, StoreError>, look: Duration) -> bool {
        let pause = match step {
            Ok(true) => None,
            Ok(false) => Some(look),
            Err(error) => {
                self.note_failure(&error);
                Some(if error.is_overlong() { look } else { PAUSE })
            }
        };
        if self.parts.state.poison.is_set() {
            return false;
        }
        match pause {
            Some(pause) => tokio::time::sleep(pause).await,
            None => tokio::task::yield_now().await,
        }
        true
    }

    /// Removes orders that a worker noted as recent after their rows had changed.
    pub(super) fn forget_landed(&mut self) {
        let state = &self.parts.state;
        self.landing.retain(|id| {
            // In this order, because the worker notes the order as recent before it removes it from `pending`.
            let stays = state.pending.get(*id).is_some();
            state.recent_orders.forget(*id);
            stays
        });
    }

    /// Applies a committed settlement to memory: orphans, metrics of verdicts, units.
    pub async fn apply_settlement(&mut self, settlement: &Settlement) {
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
                    tracing::warn!(order_id = %matched.order_id, payment = matched.payment_id, %reason, "a payment has to be refunded");
                }
            }
        }
        self.apply_moves(&settlement.moved).await;
    }

    /// Applies committed moves of units to memory.
    pub async fn apply_moves(&mut self, moved: &[UnitMove]) {
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
                Destination::Pool { swept, .. } => {
                    wait_until_sold(&state, units.sku, swept).await;
                    state.refunded_to_pool(units, swept);
                }
                Destination::Restocked => {
                    wait_until_sold(&state, units.sku, units.quantity).await;
                    state.restocked(units);
                }
                Destination::Withdrawn => {
                    wait_until_sold(&state, units.sku, units.quantity).await;
                    state.withdrawn(units);
                }
            }
        }
    }
}

/// Waits for the payments of units that leave the sold ones to reach memory: another settler committed it and may not have
/// updated memory yet.
pub(crate) async fn wait_until_sold(state: &State, sku: SkuNumber, units: u32) {
    let Some(sku) = state.catalogue.by_number(sku) else {
        return;
    };
    for _ in 0..COUNTER_LOOKS {
        if sku.counter().snapshot().sold >= units {
            return;
        }
        tokio::time::sleep(COUNTER_LOOK).await;
    }
}
