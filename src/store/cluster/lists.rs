//! Waiting lists of several nodes: an entry for each order that waits, in the sequence of its *turn*.
//!
//! The pool's units belong to the entries in this sequence. An entry is *covered* if the units suffice for it and for all
//! before it; with passing over, if they suffice after those before it that they suffice for. Each node assigns units to the covered
//! entries of its own lanes and to no others ([`settlement::waitlist`](crate::store::settlement::waitlist)), so the units of all
//! others stay for whoever has them. While a SKU has an entry, the pool lends nothing else.

use std::collections::BTreeMap;

use tokio_postgres::{Error, Row, Transaction};

use super::lanes::numbers;
use super::transact_long;
use crate::order::{LaneSet, OrderId, SkuNumber};
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease};

/// Entries that are looked at for one transaction at most.
const FRONT_MAX: i64 = 4_000;

/// Locks SKUs before entries are made, so that their turns ascend from commit to commit.
pub(in crate::store) const LOCK: &str =
    "SELECT FROM sku WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE";

/// Makes entries of those of these orders that wait and have none.
pub(in crate::store) const ENTER: &str = "
    INSERT INTO waitlist_entries (order_id, sku, units)
    SELECT order_id, sku, quantity FROM orders WHERE order_id = ANY ($1) AND status = 7 ORDER BY order_id
    ON CONFLICT DO NOTHING";

/// Deletes the entries of orders.
pub(in crate::store) const LEAVE: &str = "DELETE FROM waitlist_entries WHERE order_id = ANY ($1)";

/// The first entries of a list. $2: those for more than $3 units are passed over.
pub(in crate::store) const FRONT: &str = "
    SELECT order_id, units, turn FROM waitlist_entries WHERE sku = $1 AND (NOT $2::bool OR units <= $3::int8)
     ORDER BY turn LIMIT $4";

/// The entry of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The order.
    pub order_id: OrderId,
    /// Units that it waits for.
    pub units: u32,
    /// Its place in the sequence of the list.
    pub turn: i64,
}

/// Number of entries to read, of which `free` units may cover some.
pub(in crate::store) fn front_of(free: i64) -> i64 {
    free.clamp(0, FRONT_MAX)
}

/// The entries that `free` units cover, of the first of a list.
pub(in crate::store) fn cover(front: &[Row], free: i64, skips: bool) -> Vec<Entry> {
    let mut left = free;
    let mut covered = Vec::new();
    for row in front {
        let (id, units): (i64, i32) = (row.get(0), row.get(1));
        if i64::from(units) <= left {
            left -= i64::from(units);
            let entry = OrderId::from_i64(id).map(|order_id| Entry {
                order_id,
                units: units.unsigned_abs(),
                turn: row.get(2),
            });
            covered.extend(entry);
        } else if !skips {
            break;
        }
    }
    covered
}

/// The entries of a SKU's list that the units of the pool cover now, the first of them.
///
/// # Errors
/// If the database does not answer.
pub async fn covered(
    database: &Database,
    sku: SkuNumber,
    skips: bool,
) -> Result<Vec<Entry>, StoreError> {
    let client = database.pooled().await?;
    let work = async {
        let pool = client
            .query_one(
                "SELECT coalesce((SELECT total - held - sold - lent FROM sku WHERE id = $1 AND recall IS NULL), 0)",
                &[&sku.0],
            )
            .await?;
        let free: i64 = pool.get(0);
        let front = client
            .query(FRONT, &[&sku.0, &skips, &free, &front_of(free)])
            .await?;
        Ok(cover(&front, free, skips))
    };
    database
        .timed("looking for whom units are there", work)
        .await
}

/// The SKUs of which orders wait (true), or of which another node than this one has a want, so that somebody may join there
/// (false). Whoever joins has an entry before the want is withdrawn.
///
/// # Errors
/// If the database does not answer.
pub async fn listed(
    database: &Database,
    node: i16,
) -> Result<BTreeMap<SkuNumber, bool>, StoreError> {
    let sql = "SELECT id, is_listed
                 FROM (SELECT id, EXISTS (SELECT FROM waitlist_entries e WHERE e.sku = s.id) AS is_listed FROM sku s) found
                WHERE is_listed OR EXISTS (SELECT FROM stock_want w WHERE w.sku = id AND w.node <> $1)";
    let rows = database
        .query_prepared("looking for waiting lists", sql, &[&node])
        .await?;
    let of = |row: &Row| (SkuNumber(row.get(0)), row.get(1));
    Ok(rows.iter().map(of).collect())
}

/// Whether orders of a SKU wait.
///
/// # Errors
/// If the database does not answer.
pub async fn is_listed(database: &Database, sku: SkuNumber) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let sql = "SELECT EXISTS (SELECT FROM waitlist_entries WHERE sku = $1)";
    let row = database
        .timed(
            "looking for a waiting list",
            client.query_one(sql, &[&sku.0]),
        )
        .await?;
    Ok(row.get(0))
}

/// The turns of a list behind `after`, ascending, with their orders. Whatever is committed later has a higher one than all of them.
///
/// # Errors
/// If the database does not answer.
pub async fn turns(
    database: &Database,
    sku: SkuNumber,
    after: u64,
) -> Result<Vec<(u64, OrderId)>, StoreError> {
    let client = database.pooled().await?;
    let rows = client
        .query(
            "SELECT turn, order_id FROM waitlist_entries WHERE sku = $1 AND turn > $2 ORDER BY turn",
            &[&sku.0, &i64::try_from(after).unwrap_or(i64::MAX)],
        )
        .await
        .map_err(StoreError::statement("reading a waiting list"))?;
    let entry = |row: &Row| {
        let turn = u64::try_from(row.get::<_, i64>(0)).ok()?;
        Some((turn, OrderId::from_i64(row.get(1))?))
    };
    Ok(rows.iter().filter_map(entry).collect())
}

/// The number of entries of a list in other lanes than these.
///
/// # Errors
/// If the database does not answer.
pub async fn count_elsewhere(
    database: &Database,
    sku: SkuNumber,
    own: LaneSet,
) -> Result<usize, StoreError> {
    let client = database.pooled().await?;
    let own = numbers(own);
    let row = client
        .query_one(
            "SELECT count(*) FROM waitlist_entries WHERE sku = $1 AND (order_id >> 16) & 63 <> ALL ($2)",
            &[&sku.0, &own],
        )
        .await
        .map_err(StoreError::statement("counting the entries of a draw"))?;
    Ok(usize::try_from(row.get::<_, i64>(0)).unwrap_or(0))
}

/// Lets turns go on above the places of draws.
const ABOVE_PLACES: &str = "
    SELECT setval(pg_get_serial_sequence('waitlist_entries', 'turn'), max(place))
      FROM draw_places WHERE sku = ANY ($1)
    HAVING max(place) > coalesce(pg_sequence_last_value(pg_get_serial_sequence('waitlist_entries', 'turn')), 0)";

/// The turns of entries that have places in a draw.
const PLACES: &str = "
    UPDATE waitlist_entries e SET turn = p.place FROM draw_places p
     WHERE p.sku = e.sku AND p.order_id = e.order_id AND p.place <> e.turn";

/// Entries of orders that do not wait.
const STALE: &str = "
    DELETE FROM waitlist_entries e
     WHERE NOT EXISTS (SELECT FROM orders o WHERE o.order_id = e.order_id AND o.status = 7)";

/// Follows what a process on its own, which leaves entries as they are, has made of their orders: some do not wait any more, and
/// some have been drawn.
pub(super) async fn follow_single(transaction: &Transaction<'_>) -> Result<(), Error> {
    transaction.execute(STALE, &[]).await?;
    transaction.execute(PLACES, &[]).await.map(|_| ())
}

/// Makes entries of orders that wait and have none: a process on its own has written them, and has maybe made their draw.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn restore(
    database: &Database,
    lease: NodeLease,
    skus: &[SkuNumber],
    orders: &[OrderId],
) -> Result<(), StoreError> {
    if orders.is_empty() {
        return Ok(());
    }
    let skus: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
    let orders: Vec<i64> = orders.iter().map(|id| id.as_i64()).collect();
    let work = async |transaction: &Transaction<'_>| {
        transaction.execute(LOCK, &[&skus]).await?;
        transaction.query(ABOVE_PLACES, &[&skus]).await?;
        if transaction.execute(ENTER, &[&orders]).await? > 0 {
            transaction.execute(PLACES, &[]).await?;
        }
        Ok(())
    };
    transact_long(database, lease, "entering orders into waiting lists", work).await
}
