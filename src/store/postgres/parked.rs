//! Parked orders: acknowledged orders of SKUs whose counters the database refuses. See `V6__parked_orders.sql`.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_postgres::Row;

use super::{Database, NodeLease};
use crate::order::{
    Currency, KeyHash, LaneSet, Order, OrderId, PayloadHash, Quantity, SkuId, SkuNumber,
    UnixMillis, UserId,
};
use crate::store::StoreError;
use crate::store::cluster::lanes::{OF_ROW, is_of, numbers};

/// Parked orders of a SKU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParkedOf {
    /// Number of orders.
    pub orders: u64,
    /// Their units.
    pub units: u64,
}

const COLUMNS: &str = "p.order_id, p.user_id, s.sku_id, p.sku, p.quantity, p.adjustment, p.amount, p.currency,
    (extract(epoch FROM p.created_at) * 1000)::int8, (extract(epoch FROM p.expires_at) * 1000)::int8,
    decode(replace(p.key_hash::text, '-', ''), 'hex'), p.payload_hash, p.attributes::text";

fn from_row(row: &Row) -> Result<Order, StoreError> {
    let raw: i64 = row.get(0);
    let wrong = |what: &str| StoreError::Data(format!("parked order {raw}: {what}"));
    let quantity = u32::try_from(row.get::<_, i32>(4)).ok();
    Ok(Order {
        id: OrderId::from_i64(raw).ok_or_else(|| wrong("not an order id"))?,
        user_id: UserId::new(row.get(1)).map_err(|e| wrong(&format!("user_id {e}")))?,
        sku_id: Arc::new(SkuId::new(row.get(2)).map_err(|e| wrong(&format!("sku_id {e}")))?),
        sku: SkuNumber(row.get(3)),
        quantity: quantity
            .and_then(Quantity::new)
            .ok_or_else(|| wrong("quantity"))?,
        adjustment: row.get(5),
        amount: row.get(6),
        currency: Currency::new(row.get(7)).map_err(|e| wrong(&format!("currency {e}")))?,
        created_at: UnixMillis(row.get(8)),
        expires_at: UnixMillis(row.get(9)),
        key: row
            .get::<_, Option<&[u8]>>(10)
            .and_then(|bytes| bytes.try_into().ok())
            .map(KeyHash),
        payload: PayloadHash(row.get::<_, i64>(11) as u64),
        attributes: row.get::<_, Option<&str>>(12).map(Into::into),
    })
}

/// Parked orders of these lanes by SKU, without SKUs that have none.
///
/// # Errors
/// If the database does not answer.
pub async fn by_sku(
    database: &Database,
    lanes: LaneSet,
) -> Result<BTreeMap<SkuNumber, ParkedOf>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT sku, count(*), sum(quantity)::int8 FROM parked_orders WHERE {} GROUP BY sku",
        is_of("$1")
    );
    let rows = client
        .query(&sql, &[&numbers(lanes)])
        .await
        .map_err(StoreError::statement("counting parked orders"))?;
    let count = |row: &Row, at| u64::try_from(row.get::<_, i64>(at)).unwrap_or(0);
    Ok(rows
        .iter()
        .map(|row| {
            let (orders, units) = (count(row, 1), count(row, 2));
            (SkuNumber(row.get(0)), ParkedOf { orders, units })
        })
        .collect())
}

/// Number of parked orders of a SKU whose lanes the node has, by their rows, open or not.
///
/// # Errors
/// If the database does not answer.
pub async fn count_of_node(
    database: &Database,
    node: i16,
    sku: SkuNumber,
) -> Result<i64, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT count(*) FROM parked_orders WHERE sku = $1 AND ({OF_ROW}) IN (SELECT lane FROM lane WHERE node = $2)"
    );
    let row = database
        .timed(
            "counting parked orders",
            client.query_one(&sql, &[&sku.0, &node]),
        )
        .await?;
    Ok(row.get(0))
}

/// Parked orders of a SKU and these lanes, at most `limit`, the oldest first.
///
/// # Errors
/// If the database does not answer.
pub async fn of_sku(
    database: &Database,
    sku: SkuNumber,
    lanes: LaneSet,
    limit: i64,
) -> Result<Vec<Order>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT {COLUMNS} FROM parked_orders p JOIN sku s ON s.id = p.sku
          WHERE p.sku = $1 AND {} ORDER BY p.order_id LIMIT $2",
        is_of("$3")
    );
    let rows = database
        .timed(
            "reading parked orders",
            client.query(&sql, &[&sku.0, &limit, &numbers(lanes)]),
        )
        .await?;
    rows.iter().map(from_row).collect()
}

/// Parked orders of these lanes whose payment deadline is at or before `now`, at most `limit`, after the position `after`
/// in the order of deadline and id.
///
/// # Errors
/// If the database does not answer.
pub async fn due(
    database: &Database,
    now: UnixMillis,
    after: (UnixMillis, i64),
    lanes: LaneSet,
    limit: i64,
) -> Result<Vec<Order>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT {COLUMNS} FROM parked_orders p JOIN sku s ON s.id = p.sku
          WHERE p.expires_at <= to_timestamp($1::int8 / 1000.0)
            AND (p.expires_at, p.order_id) > (to_timestamp($2::int8 / 1000.0), $3) AND {}
          ORDER BY p.expires_at, p.order_id LIMIT $4",
        is_of("$5")
    );
    let numbers = numbers(lanes);
    let rows = database
        .timed(
            "reading parked orders",
            client.query(&sql, &[&now.0, &after.0.0, &after.1, &limit, &numbers]),
        )
        .await?;
    rows.iter().map(from_row).collect()
}

/// Whether an order is parked.
///
/// # Errors
/// If the database does not answer.
pub async fn contains(database: &Database, id: OrderId) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "looking for a parked order",
            client.query_opt(
                "SELECT FROM parked_orders WHERE order_id = $1",
                &[&id.as_i64()],
            ),
        )
        .await?;
    Ok(row.is_some())
}

/// Turns a parked order into a dead letter, because the database refuses its row. Returns whether it is one now, by this call or
/// by one before whose answer was lost.
///
/// # Errors
/// If the database does not answer.
pub async fn make_dead_letter(
    database: &Database,
    lease: NodeLease,
    id: OrderId,
    sqlstate: &str,
    reason: &str,
) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "writing a dead letter",
            client.query_one(
                "WITH gone AS (
                     DELETE FROM parked_orders WHERE order_id = $1
                        AND EXISTS (SELECT FROM node WHERE node = $4 AND epoch = $5 FOR SHARE) RETURNING *
                 ), made AS (
                     INSERT INTO dead_letters (order_id, user_id, sku, quantity, adjustment, amount, currency,
                            created_at, expires_at, key_hash, payload_hash, attributes, sqlstate, reason)
                     SELECT order_id, user_id, sku, quantity, adjustment, amount, currency,
                            created_at, expires_at, key_hash, payload_hash, attributes::text, $2, $3
                       FROM gone RETURNING order_id
                 )
                 SELECT EXISTS (SELECT FROM made) OR EXISTS (SELECT FROM dead_letters WHERE order_id = $1)",
                &[&id.as_i64(), &sqlstate, &reason, &lease.node, &lease.epoch],
            ),
        )
        .await?;
    Ok(row.get(0))
}
