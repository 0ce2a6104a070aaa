//! The orders of an order log on their way into the database: read in parts on a blocking thread, numbered by the SKUs
//! that the database has now, payable or expired, written idempotently.
//!
//! Used at a start, and for the log of a node that is gone.

use std::collections::{HashMap, HashSet};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::replay::{self, Replayer};
use crate::faults::bug;
use crate::order::{Order, OrderId, OrderStatus, SkuId, SkuNumber, UnixMillis};
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

/// A part of a log.
struct LookedUp {
    orders: Vec<(Order, OrderStatus)>,
    /// Those that exist already.
    there: HashSet<OrderId>,
}

/// Applies the orders of a log.
pub struct LogReplay<'a> {
    database: &'a Database,
    numbers: Numbers,
    /// Orders that payments wait for: one that is written late but was paid in time is payable.
    orphans: &'a Orphans,
    /// An order whose time to pay is over by now is written as expired.
    now: UnixMillis,
}

impl<'a> LogReplay<'a> {
    /// A replay into the SKUs that the database has now.
    ///
    /// # Errors
    /// If the SKUs cannot be read.
    pub async fn new(
        database: &'a Database,
        orphans: &'a Orphans,
        now: UnixMillis,
    ) -> Result<Self, StoreError> {
        Ok(LogReplay {
            database,
            numbers: Numbers::read(database).await?,
            orphans,
            now,
        })
    }

    /// Writes through `replayer` what the database lacks of the orders that `parts` brings, while the next part is looked
    /// up on another session. `applied` hears how many orders each part had. Retries as long as the database does not
    /// answer.
    ///
    /// # Errors
    /// As [`Replayer::apply`].
    pub async fn run(
        &self,
        replayer: &mut Replayer,
        mut parts: mpsc::Receiver<Vec<Order>>,
        mut applied: impl FnMut(usize),
    ) -> Result<(), StoreError> {
        let mut next = self.look_up(parts.recv().await).await?;
        while let Some(LookedUp { orders, there }) = next {
            let following = async { self.look_up(parts.recv().await).await };
            let (written, looked_up) =
                tokio::join!(replayer.apply_missing(&orders, &there), following);
            written?;
            applied(orders.len());
            next = looked_up?;
        }
        Ok(())
    }

    async fn look_up(&self, part: Option<Vec<Order>>) -> Result<Option<LookedUp>, StoreError> {
        let Some(part) = part else {
            return Ok(None);
        };
        let mut orders: Vec<(Order, OrderStatus)> = part
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
            orders.pop();
        }
        let there = replay::look_up(self.database, &orders).await?;
        Ok(Some(LookedUp { orders, there }))
    }
}
