//! Writing orders that may be rows already: after a start from the journal's, and after a failover
//! that lost commits.
//!
//! Which orders are there is looked up first, by their ids, and only the missing ones are copied; counters move by what
//! is written. A row that the database refuses becomes a dead letter. One that is there after all,
//! because a worker was faster, counts as present. Orders of a SKU whose counters are refused are
//! parked ([`crate::pipeline::orders::parking`]).

use std::collections::BTreeSet;
use std::time::Duration;

use crate::faults::bug;
use crate::order::{Order, OrderStatus, SkuNumber};
use crate::store::StoreError;
use crate::store::batch::{BatchWriter, Refused, WriteError};
use crate::store::postgres::Database;

const RETRY: Duration = Duration::from_millis(200);
/// The SQLSTATE of a dead letter whose own is not known: `data_exception`.
const LOST: &str = "22000";

/// What became of orders that were applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Those that were missing and are rows now.
    pub written: u64,
    /// Those that were there.
    pub present: u64,
    /// Those that the database refused; dead letters now.
    pub refused: u64,
    /// Those of SKUs whose counters the database refuses.
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
    /// SKUs whose counters were refused, so that it is not tried with each part.
    faulted: BTreeSet<SkuNumber>,
}

impl Replayer {
    /// One that writes through `writer`, at most `rows_max` rows at once.
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

    /// What was applied so far.
    pub fn applied(&self) -> Applied {
        self.applied
    }

    /// Tries the counters of every SKU again.
    pub fn forget_faults(&mut self) {
        self.faulted.clear();
    }

    /// The orders that were refused since this was asked last.
    pub fn take_refused(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.refused)
    }

    /// Makes every order of `orders` a row with its status, or a dead letter that has failed, where it is none. Tries again for as
    /// long as the database does not answer.
    ///
    /// # Errors
    /// Where this process may not write any more, or the database has other orders under these ids.
    pub async fn apply(&mut self, orders: &[(Order, OrderStatus)]) -> Result<(), StoreError> {
        let wanted: Vec<&Order> = orders.iter().map(|(order, _)| order).collect();
        let there = loop {
            match self.database.present_among(&wanted).await {
                Ok(there) => break there,
                Err(error) => pause(error).await?,
            }
        };
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
            .partition(|(order, status)| status.is_live() && self.faulted.contains(&order.sku));
        for part in written.chunks(self.rows_max) {
            self.write(part.to_vec()).await?;
        }
        for part in parked.chunks(self.rows_max) {
            self.park(part.iter().map(|(order, _)| *order).collect())
                .await?;
        }
        Ok(())
    }

    async fn write(&mut self, part: Vec<(&Order, OrderStatus)>) -> Result<(), StoreError> {
        let mut parts = vec![part];
        while let Some(mut part) = parts.pop() {
            let refused = match self.writer.write_as(&part).await {
                Ok(()) => {
                    self.applied.written += part.len() as u64;
                    continue;
                }
                Err(WriteError::Retry(error)) => {
                    pause(error).await?;
                    parts.push(part);
                    continue;
                }
                Err(WriteError::Fatal(error)) => return Err(error),
                Err(refused) => refused,
            };
            match (refused, part.as_slice()) {
                (WriteError::Row { sqlstate, reason }, [(order, _)]) => {
                    self.dead_letter(order, &sqlstate, &reason).await?;
                }
                (WriteError::Counter { reason, .. }, [(first, _), ..]) => {
                    let sku = first.sku;
                    let (same, others): (Vec<_>, Vec<_>) = part
                        .iter()
                        .copied()
                        .partition(|(order, _)| order.sku == sku);
                    if !others.is_empty() {
                        parts.extend([others, same]);
                        continue;
                    }
                    tracing::error!(sku_id = %first.sku_id, reason, "the database refuses this SKU's counters: its orders of the journal are parked");
                    self.faulted.insert(sku);
                    let (live, ended): (Vec<_>, Vec<_>) =
                        same.into_iter().partition(|(_, status)| status.is_live());
                    self.park(live.into_iter().map(|(order, _)| order).collect())
                        .await?;
                    if !ended.is_empty() {
                        parts.push(ended);
                    }
                }
                (_, _) => {
                    let newer = part.split_off(part.len() / 2);
                    parts.extend([newer, part]);
                }
            }
        }
        Ok(())
    }

    async fn park(&mut self, part: Vec<&Order>) -> Result<(), StoreError> {
        let mut parts = vec![part];
        while let Some(mut part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            match self.writer.park(&part).await {
                Ok(()) => self.applied.parked += part.len() as u64,
                Err(WriteError::Retry(error)) => {
                    pause(error).await?;
                    parts.push(part);
                }
                Err(WriteError::Fatal(error)) => return Err(error),
                Err(
                    WriteError::Row { sqlstate, reason } | WriteError::Counter { sqlstate, reason },
                ) => match part.as_slice() {
                    [order] => self.dead_letter(order, &sqlstate, &reason).await?,
                    _ => {
                        let newer = part.split_off(part.len() / 2);
                        parts.extend([newer, part]);
                    }
                },
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
                    tracing::error!(order_id = %order.id, sqlstate, reason, "the database refused an order of the journal; it is a dead letter now");
                    self.applied.refused += 1;
                    self.refused.push(order.clone());
                    return Ok(());
                }
                Err(error) => pause(error).await?,
            }
        }
    }
}

/// Waits before another attempt, where one makes sense.
async fn pause(error: StoreError) -> Result<(), StoreError> {
    if error.is_final() {
        return Err(error);
    }
    tracing::warn!(reason = %error, "orders of the journal are not written yet; it is tried again");
    tokio::time::sleep(RETRY).await;
    Ok(())
}
