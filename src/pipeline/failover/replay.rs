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
use crate::pipeline::orders::apply::{How, Isolated, Parts, Refusal};
use crate::store::StoreError;
use crate::store::WriteError;
use crate::store::batch::{BatchWriter, Refused};
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
        for (how, orders) in [(How::Write, written), (How::Park, parked)] {
            for part in orders.chunks(self.rows_max) {
                self.store(how, part.to_vec()).await?;
            }
        }
        Ok(())
    }

    /// Stores a part of the orders, in smaller parts where something of it is refused.
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
                        "the database refuses this SKU's counters: its orders of the journal are parked"
                    );
                    self.faulted.insert(sku);
                    // No counter moves for those that have ended.
                    let (live, ended): (Vec<_>, Vec<_>) =
                        orders.into_iter().partition(|(_, status)| status.is_live());
                    parts.push(How::Write, ended);
                    parts.push(How::Park, live);
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
