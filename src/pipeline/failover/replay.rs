//! Idempotent writing of orders that may be rows already: the order log's after a start, and those that a
//! failover lost.
//!
//! The orders' ids are looked up first and only missing orders are copied; counters move by the orders written. An order
//! whose row retention has deleted is not missing.
//! A refused row becomes a dead letter. An order that turns out to exist, because a worker was faster, counts
//! as present. Orders of a SKU whose counters are refused are parked ([`crate::pipeline::orders::parking`]).

use std::collections::BTreeSet;
use std::time::Duration;

use crate::faults::bug;
use crate::order::{Order, OrderStatus, SkuNumber};
use crate::pipeline::orders::apply::{How, Isolated, Parts, Refusal};
use crate::store::StoreError;
use crate::store::WriteError;
use crate::store::batch::{BatchWriter, Refused};
use crate::store::postgres::orders::OrderIds;
use crate::store::postgres::{Database, orders, pruning};

const RETRY: Duration = Duration::from_millis(200);
/// SQLSTATE of a dead letter whose own is unknown: `data_exception`.
const LOST: &str = "22000";

/// Numbers of applied orders by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Missing, and written.
    pub written: u64,
    /// Already there, or deleted since.
    pub present: u64,
    /// Refused by the database; dead letters now.
    pub refused: u64,
    /// Parked, because the database refuses their SKU's counters.
    pub parked: u64,
}

/// Applies orders idempotently.
#[derive(Debug)]
pub struct Replayer {
    database: Database,
    writer: BatchWriter,
    rows_max: usize,
    applied: Applied,
    refused: Vec<Order>,
    /// SKUs whose counters were refused; their orders are parked without another attempt.
    faulted: BTreeSet<SkuNumber>,
}

impl Replayer {
    /// A replayer that writes through `writer`, at most `rows_max` rows at once.
    pub fn new(database: Database, writer: BatchWriter, rows_max: usize) -> Self {
        Replayer {
            database,
            writer,
            rows_max,
            applied: Applied::default(),
            refused: Vec::new(),
            faulted: BTreeSet::new(),
        }
    }

    /// The orders applied so far.
    pub fn applied(&self) -> Applied {
        self.applied
    }

    /// Forgets refused counters, so that every SKU is tried again.
    pub fn forget_faults(&mut self) {
        self.faulted.clear();
    }

    /// Takes the orders refused since the last call.
    pub fn take_refused(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.refused)
    }

    /// Writes each order that does not exist yet as a row with its status; an order with status `failed`
    /// becomes a dead letter. Retries as long as the database does not answer.
    ///
    /// # Errors
    /// If this process may not write any more, or the database has other orders under these ids.
    pub async fn apply(&mut self, orders: &[(Order, OrderStatus)]) -> Result<(), StoreError> {
        let there = look_up(&self.database, orders).await?;
        self.apply_missing(orders, &there).await
    }

    /// As [`Replayer::apply`], of orders that were looked up before: those of `there` exist.
    ///
    /// # Errors
    /// If this process may not write any more, or the database has another order under the id of one of them.
    pub async fn apply_missing(
        &mut self,
        orders: &[(Order, OrderStatus)],
        there: &OrderIds,
    ) -> Result<(), StoreError> {
        let missing: Vec<(&Order, OrderStatus)> = orders
            .iter()
            .filter(|(order, _)| !there.contains(&order.id) || bug("replay_without_looking"))
            .map(|(order, status)| (order, *status))
            .collect();
        self.applied.present += (orders.len() - missing.len()) as u64;
        let (failed, missing): (Vec<_>, Vec<_>) = missing
            .into_iter()
            .partition(|(_, status)| *status == OrderStatus::Failed);
        for (order, _) in failed {
            self.dead_letter(
                order,
                LOST,
                "a failover has lost this dead letter with its reason",
            )
            .await?;
        }
        let (parked, written): (Vec<_>, Vec<_>) = missing
            .into_iter()
            .partition(|(order, status)| status.holds_units() && self.faulted.contains(&order.sku));
        for (how, orders) in [(How::Write, written), (How::Park, parked)] {
            for part in orders.chunks(self.rows_max) {
                self.store(how, part.to_vec()).await?;
            }
        }
        Ok(())
    }

    /// Stores a part of the orders, in smaller parts if something in it is refused.
    async fn store(
        &mut self,
        how: How,
        part: Vec<(&Order, OrderStatus)>,
    ) -> Result<(), StoreError> {
        let mut parts = Parts::default();
        parts.push(how, part);
        while let Some((how, part)) = parts.pop() {
            let attempted = match how {
                How::Write => self.writer.write_as(&part).await,
                How::Park => {
                    let orders: Vec<&Order> = part.iter().map(|(order, _)| *order).collect();
                    self.writer.park(&orders).await
                }
            };
            let refusal = match attempted {
                Ok(()) => {
                    let count = match how {
                        How::Write => &mut self.applied.written,
                        How::Park => &mut self.applied.parked,
                    };
                    *count += part.len() as u64;
                    continue;
                }
                Err(WriteError::Retry(error)) => {
                    pause(error).await?;
                    parts.push(how, part);
                    continue;
                }
                Err(WriteError::Fatal(error)) => return Err(error),
                Err(WriteError::Counter { reason, .. }) if how == How::Write => {
                    Refusal::Counter { reason }
                }
                Err(
                    WriteError::Row { sqlstate, reason } | WriteError::Counter { sqlstate, reason },
                ) => Refusal::Row { sqlstate, reason },
            };
            match parts.isolate(how, part, refusal) {
                None => {}
                Some(Isolated::Order {
                    order: (order, _),
                    sqlstate,
                    reason,
                    ..
                }) => self.dead_letter(order, &sqlstate, &reason).await?,
                Some(Isolated::Sku {
                    sku,
                    orders,
                    reason,
                }) => {
                    let sku_id = orders.first().map(|(order, _)| order.sku_id.as_str());
                    tracing::error!(
                        sku_id,
                        reason,
                        "the database refuses this SKU's counters: its orders of the order log are parked until its row in `sku` is repaired"
                    );
                    self.faulted.insert(sku);
                    // Orders that have ended, or wait for units, move no counter.
                    let (holding, others): (Vec<_>, Vec<_>) = orders
                        .into_iter()
                        .partition(|(_, status)| status.holds_units());
                    parts.push(How::Write, others);
                    parts.push(How::Park, holding);
                }
            }
        }
        Ok(())
    }

    async fn dead_letter(
        &mut self,
        order: &Order,
        sqlstate: &str,
        reason: &str,
    ) -> Result<(), StoreError> {
        loop {
            match self.writer.refuse(order, sqlstate, reason).await {
                Ok(Refused::AlreadyPresent) => {
                    self.applied.present += 1;
                    return Ok(());
                }
                Ok(Refused::DeadLettered) => {
                    tracing::error!(order_id = %order.id, sqlstate, reason, "the database refused an order of the order log; it is a dead letter now: retry or discard it at /admin/v1/dead-letters");
                    self.applied.refused += 1;
                    self.refused.push(order.clone());
                    return Ok(());
                }
                Err(error) => pause(error).await?,
            }
        }
    }
}

/// Those of `orders` that are not to be written: they exist already, or were deleted since by retention, which an order log
/// may outlast. Retries as long as the database does not answer.
///
/// # Errors
/// If the database has other orders under these ids.
pub async fn look_up(
    database: &Database,
    orders: &[(Order, OrderStatus)],
) -> Result<OrderIds, StoreError> {
    let wanted: Vec<&Order> = orders.iter().map(|(order, _)| order).collect();
    let looking = async || {
        let mut there = orders::present_among(database, &wanted).await?;
        if there.len() < wanted.len() {
            // Not before: rows may be deleted meanwhile.
            let below = pruning::deleted_below(database).await?;
            let ids = wanted.iter().map(|order| order.id);
            there.extend(ids.filter(|id| id.as_i64() < below));
        }
        Ok(there)
    };
    loop {
        match looking().await {
            Ok(there) => return Ok(there),
            Err(error) => pause(error).await?,
        }
    }
}

/// Waits before another attempt, or returns a final error.
async fn pause(error: StoreError) -> Result<(), StoreError> {
    if error.is_final() {
        return Err(error);
    }
    tracing::warn!(reason = %error, "orders of the order log could not be written yet; retrying");
    tokio::time::sleep(RETRY).await;
    Ok(())
}
