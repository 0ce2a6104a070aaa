//! The orders of an order log on their way into the database: read in parts on a blocking thread, numbered by the SKUs
//! that the database has now, payable or expired, written idempotently.
//!
//! Used at a start, and for the log of a node that is gone.

use std::collections::HashMap;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

use super::replay::{self, Replayer};
use super::restore::panicked;
use crate::faults::bug;
use crate::order::{Order, OrderStatus, SkuId, SkuNumber, UnixMillis};
use crate::queue::log::record::Record;
use crate::state::orphans::Orphans;
use crate::store::StoreError;
use crate::store::postgres::orders::OrderIds;
use crate::store::postgres::{Database, skus};

/// Orders of the log that are read, looked up and written at once.
const PART: usize = 20_000;
/// The newest of them that wait for the next part: requests that run at once are not recorded in the sequence of their ids,
/// and a part with others' ids between its own is not compared by digests.
const HELD_BACK: usize = 1_000;
/// Parts that are looked up at a time.
const LOOK_UPS: usize = 2;

/// Reads a log on a blocking thread. `read` passes each record on, in the order of writing. Returns the orders in parts,
/// the oldest first but for those that were recorded late, and the result of `read`.
pub fn orders_of<T: Send + 'static>(
    read: impl FnOnce(&mut dyn FnMut(Record)) -> T + Send + 'static,
) -> (mpsc::Receiver<Vec<Order>>, JoinHandle<T>) {
    let (parts, receiver) = mpsc::channel::<Vec<Order>>(1);
    let reading = tokio::task::spawn_blocking(move || {
        let mut part = Vec::with_capacity(PART + HELD_BACK);
        let result = read(&mut |record| {
            if let Record::Order(order) = record {
                part.push(*order);
            }
            if part.len() == PART + HELD_BACK {
                part.sort_unstable_by_key(|order| order.id);
                let mut next = Vec::with_capacity(PART + HELD_BACK);
                next.extend(part.drain(PART..));
                // If the receiver is gone, the replay has failed.
                let _ = parts.blocking_send(std::mem::replace(&mut part, next));
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
    there: OrderIds,
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

    /// Writes through `replayer` what the database lacks of the orders that `parts` brings, while the next parts are
    /// looked up on other sessions. `applied` hears how many orders each part had. Retries as long as the database does not
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
        let parts = stream::poll_fn(|context| parts.poll_recv(context));
        // As tasks, so that their time limits do not run while a part is written.
        let look_up = |part| {
            let looking = look_up(self.database.clone(), self.with_status(part));
            AbortOnDropHandle::new(tokio::spawn(looking))
        };
        let mut looked_up = parts.map(look_up).buffered(LOOK_UPS);
        let mut next = looked_up.try_next().await.map_err(panicked)?;
        while let Some(part) = next {
            let LookedUp { orders, there } = part?;
            let (written, following) = tokio::join!(
                replayer.apply_missing(&orders, &there),
                looked_up.try_next()
            );
            written?;
            applied(orders.len());
            next = following.map_err(panicked)?;
        }
        Ok(())
    }

    /// These orders as they are in the database's numbers, each with the status that its row gets.
    fn with_status(&self, part: Vec<Order>) -> Vec<(Order, OrderStatus)> {
        let with_status = |mut order: Order| {
            order.sku = self.numbers.of(&order);
            let is_late = self.orphans.is_late(order.id, order.expires_at, self.now);
            let status = if is_late {
                OrderStatus::Expired
            } else {
                order.status_in_time()
            };
            (order, status)
        };
        let mut orders: Vec<_> = part.into_iter().map(with_status).collect();
        if bug("skip_a_replay") {
            orders.pop();
        }
        orders
    }
}

async fn look_up(
    database: Database,
    orders: Vec<(Order, OrderStatus)>,
) -> Result<LookedUp, StoreError> {
    let there = replay::look_up(&database, &orders).await?;
    Ok(LookedUp { orders, there })
}
