//! The orders of an order log on their way into the database: read in parts on a blocking thread, numbered by the SKUs
//! that the database has now, payable or expired, written idempotently.
//!
//! Used at a start, and for the log of a node that is gone.

use std::collections::HashMap;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::replay::{Applied, Replayer};
use crate::faults::bug;
use crate::order::{Order, OrderStatus, SkuId, SkuNumber, UnixMillis};
use crate::queue::log::record::Record;
use crate::state::orphans::Orphans;
use crate::store::StoreError;
use crate::store::postgres::{Database, skus};

/// Orders of the log that are read, looked up and written at once.
const PART: usize = 20_000;

/// Reads a log on a blocking thread. `read` passes each record on, in the order of writing. Returns the orders in parts,
/// and the result of `read`.
pub fn orders_of<T: Send + 'static>(
    read: impl FnOnce(&mut dyn FnMut(Record)) -> T + Send + 'static,
) -> (mpsc::Receiver<Vec<Order>>, JoinHandle<T>) {
    let (parts, receiver) = mpsc::channel::<Vec<Order>>(1);
    let reading = tokio::task::spawn_blocking(move || {
        let mut part = Vec::with_capacity(PART);
        let result = read(&mut |record| {
            if let Record::Order(order) = record {
                part.push(*order);
            }
            if part.len() == PART {
                // If the receiver is gone, the replay has failed.
                let _ = parts.blocking_send(std::mem::replace(&mut part, Vec::with_capacity(PART)));
            }
        });
        let _ = parts.blocking_send(part);
        result
    });
    (receiver, reading)
}

/// The database's number of each SKU. A database that has lost SKUs, in a failover or as a backup from before
/// them, gives their numbers to others; an order was placed for a `sku_id`.
struct Numbers(HashMap<SkuId, SkuNumber>);

/// The number of no SKU.
const NO_SKU: SkuNumber = SkuNumber(0);

impl Numbers {
    async fn read(database: &Database) -> Result<Self, StoreError> {
        Ok(Numbers(skus::numbers(database).await?))
    }

    /// The number of the SKU of an order of the log.
    fn of(&self, order: &Order) -> SkuNumber {
        match self.0.get(&*order.sku_id) {
            Some(number) => *number,
            None if self.0.values().any(|number| *number == order.sku) => {
                tracing::error!(
                    order_id = %order.id, sku_id = %order.sku_id,
                    "the SKU of an acknowledged order is not in this database, which has given its number to another SKU; \
                     the order is kept and takes no units of that SKU"
                );
                NO_SKU
            }
            None => order.sku,
        }
    }
}

/// Applies the orders of a log.
pub struct LogReplay<'a> {
    numbers: Numbers,
    replayer: Replayer,
    /// Orders that payments wait for: one that is written late but was paid in time is payable.
    orphans: &'a Orphans,
    /// An order whose time to pay is over by now is written as expired.
    now: UnixMillis,
}

impl<'a> LogReplay<'a> {
    /// A replay through `replayer`.
    ///
    /// # Errors
    /// If the SKUs cannot be read.
    pub async fn new(
        database: &Database,
        replayer: Replayer,
        orphans: &'a Orphans,
        now: UnixMillis,
    ) -> Result<Self, StoreError> {
        Ok(LogReplay {
            numbers: Numbers::read(database).await?,
            replayer,
            orphans,
            now,
        })
    }

    /// Writes those of `orders` that the database lacks. Retries as long as the database does not answer.
    ///
    /// # Errors
    /// As [`Replayer::apply`].
    pub async fn apply(&mut self, orders: Vec<Order>) -> Result<(), StoreError> {
        let mut part: Vec<(Order, OrderStatus)> = orders
            .into_iter()
            .map(|mut order| {
                order.sku = self.numbers.of(&order);
                let is_late = self.orphans.is_late(order.id, order.expires_at, self.now);
                let status = if is_late {
                    OrderStatus::Expired
                } else {
                    order.status_in_time()
                };
                (order, status)
            })
            .collect();
        if bug("skip_a_replay") {
            part.pop();
        }
        self.replayer.apply(&part).await
    }

    /// The orders applied so far.
    pub fn applied(&self) -> Applied {
        self.replayer.applied()
    }
}
