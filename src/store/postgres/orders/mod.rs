//! Look-ups of orders.
//!
//! * this file: single orders, and orders by status;
//! * `present`: which orders of a list exist already.

mod present;

use std::collections::BTreeMap;

use futures_util::{StreamExt, pin_mut};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

pub use self::present::{OrderIds, absent_among, present_among};
use super::{Database, NodeLease};
use crate::order::receipt::SignedParts;
use crate::order::{
    Currency, KeyHash, LaneSet, OrderId, OrderStatus, OrderUnits, PayloadHash, SkuNumber, SkuTag,
    UnixMillis, UserId,
};
use crate::store::StoreError;
use crate::store::cluster::lanes::{is_of, numbers};

/// An order as stored in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredOrder {
    /// Its id.
    pub id: OrderId,
    /// The buyer.
    pub user_id: String,
    /// The shop's id of the SKU.
    pub sku_id: String,
    /// The database's number of the SKU.
    pub sku: SkuNumber,
    /// Units.
    pub quantity: u32,
    /// The shop's surcharge or discount, in minor units.
    pub adjustment: i64,
    /// The amount in minor units.
    pub amount: i64,
    /// The currency of the amount.
    pub currency: String,
    /// Its status.
    pub status: OrderStatus,
    /// Time of admission.
    pub created_at: UnixMillis,
    /// Payment deadline; [`UnixMillis::NEVER`] if no units were ever assigned to it.
    pub expires_at: UnixMillis,
    /// The shop's JSON object.
    pub attributes: Option<String>,
    /// Reason of the refund, due or made.
    pub refund_reason: Option<String>,
    /// The hash of its idempotency key.
    pub key: Option<KeyHash>,
    /// The hash of the request.
    pub payload: PayloadHash,
}

impl StoredOrder {
    /// What its receipt signs. `currency` is its own, parsed.
    pub fn signed_parts(&self, currency: Currency) -> SignedParts<'_> {
        SignedParts {
            id: self.id,
            user_id: &self.user_id,
            sku: SkuTag::of(&self.sku_id),
            quantity: self.quantity,
            adjustment: self.adjustment,
            amount: self.amount,
            currency,
            created_at: self.created_at,
            expires_at: self.expires_at,
            key: self.key,
            payload: self.payload,
        }
    }
}

const COLUMNS: &str = "order_id, user_id, sku_id, quantity, adjustment, amount, currency, status,
    (extract(epoch FROM created_at) * 1000)::int8, (extract(epoch FROM expires_at) * 1000)::int8, attributes,
    sku, refund_reason, decode(replace(key_hash::text, '-', ''), 'hex'), payload_hash";

fn from_row(row: &Row) -> Result<StoredOrder, StoreError> {
    let raw: i64 = row.get(0);
    let word: Option<&str> = row.get(7);
    let unexpected = |what: &str| StoreError::Data(format!("order {raw}: {what}"));
    Ok(StoredOrder {
        id: OrderId::from_i64(raw).ok_or_else(|| unexpected("not an order id"))?,
        user_id: row.get(1),
        sku_id: row.get(2),
        quantity: u32::try_from(row.get::<_, i32>(3))
            .map_err(|_| unexpected("negative quantity"))?,
        adjustment: row.get(4),
        amount: row.get(5),
        currency: row.get(6),
        status: word
            .and_then(OrderStatus::from_word)
            .ok_or_else(|| unexpected(&format!("unknown status {word:?}")))?,
        created_at: UnixMillis(row.get(8)),
        expires_at: UnixMillis(row.get(9)),
        attributes: row.get(10),
        sku: SkuNumber(row.get(11)),
        refund_reason: row.get(12),
        key: row
            .get::<_, Option<&[u8]>>(13)
            .and_then(|bytes| bytes.try_into().ok())
            .map(KeyHash),
        payload: PayloadHash(row.get::<_, i64>(14) as u64),
    })
}

/// Passes every order to `read`, dead letters included, in no particular order.
///
/// # Errors
/// If the database does not answer.
pub async fn read_all(
    database: &Database,
    mut read: impl FnMut(StoredOrder),
) -> Result<(), StoreError> {
    let doing = "reading the orders";
    let client = database.pooled().await?;
    let none: [i32; 0] = [];
    let rows = client
        .query_raw(&format!("SELECT {COLUMNS} FROM order_rows"), none)
        .await
        .map_err(StoreError::statement(doing))?;
    pin_mut!(rows);
    while let Some(row) = rows.next().await {
        read(from_row(&row.map_err(StoreError::statement(doing))?)?);
    }
    Ok(())
}

/// The orders with these ids, in no particular order.
///
/// # Errors
/// If the database does not answer.
pub async fn find_among(
    database: &Database,
    ids: &[OrderId],
) -> Result<Vec<StoredOrder>, StoreError> {
    let client = database.pooled().await?;
    let ids: Vec<i64> = ids.iter().map(|id| id.as_i64()).collect();
    let sql = format!("SELECT {COLUMNS} FROM order_rows WHERE order_id = ANY ($1)");
    let rows = database
        .timed("looking orders up", client.query(&sql, &[&ids]))
        .await?;
    rows.iter().map(from_row).collect()
}

/// A user's newest orders below `before`, dead letters included. Needs `database.user_index`: without the
/// index it reads the whole table.
///
/// # Errors
/// If the database does not answer.
pub async fn of_user(
    database: &Database,
    user_id: &UserId,
    before: OrderId,
    limit: i64,
) -> Result<Vec<StoredOrder>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT {COLUMNS} FROM order_rows WHERE user_id = $1 AND order_id < $2 ORDER BY order_id DESC LIMIT $3"
    );
    let before = before.as_i64();
    let rows = database
        .timed(
            "listing a user's orders",
            client.query(&sql, &[&user_id.as_str(), &before, &limit]),
        )
        .await?;
    rows.iter().map(from_row).collect()
}

/// The order with this id, dead letters included.
///
/// # Errors
/// If the database does not answer.
pub async fn find(database: &Database, id: OrderId) -> Result<Option<StoredOrder>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM order_rows WHERE order_id = $1");
    let rows = database
        .query_prepared("looking an order up", &sql, &[&id.as_i64()])
        .await?;
    rows.first().map(from_row).transpose()
}

/// An order that is open in the database: payable, or waiting for units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOrder {
    /// The order and its units.
    pub units: OrderUnits,
    /// Payment deadline; [`UnixMillis::NEVER`] if it waits.
    pub expires_at: UnixMillis,
}

impl OpenOrder {
    /// Whether it waits for units.
    pub fn waits(&self) -> bool {
        self.expires_at == UnixMillis::NEVER
    }
}

/// Those of these orders that are payable in the database, or wait for units.
///
/// # Errors
/// If the database does not answer.
pub async fn open_among(database: &Database, ids: &[OrderId]) -> Result<Vec<OrderId>, StoreError> {
    let client = database.pooled().await?;
    let ids: Vec<i64> = ids.iter().map(|id| id.as_i64()).collect();
    let rows = database
        .timed(
            "looking which orders are payable",
            client.query(
                "SELECT order_id FROM orders WHERE order_id = ANY ($1) AND status IN (1, 7)",
                &[&ids],
            ),
        )
        .await?;
    Ok(rows
        .iter()
        .filter_map(|row| OrderId::from_i64(row.get(0)))
        .collect())
}

/// Open orders of these lanes with ids below `window_floor`, from the recorded lowest one on.
///
/// # Errors
/// If the database does not answer.
pub async fn open_below(
    database: &Database,
    lease: NodeLease,
    window_floor: OrderId,
    lanes: LaneSet,
) -> Result<Vec<OpenOrder>, StoreError> {
    let doing = "looking for unpaid orders";
    let client = database.pooled().await?;
    let parameters: [&(dyn ToSql + Sync); 3] =
        [&lease.node, &window_floor.as_i64(), &numbers(lanes)];
    // Without a step timeout, because there may be many.
    let rows = client
        .query_raw(
            &format!(
                "SELECT order_id, user_id, sku, quantity, (extract(epoch FROM expires_at) * 1000)::int8 FROM orders
                  WHERE order_id >= (SELECT unpaid_from FROM node WHERE node = $1) AND order_id < $2 AND status IN (1, 7)
                    AND {}",
                is_of("$3")
            ),
            parameters,
        )
        .await
        .map_err(StoreError::statement(doing))?;
    pin_mut!(rows);
    let mut found = Vec::new();
    while let Some(row) = rows.next().await {
        let row = row.map_err(StoreError::statement(doing))?;
        found.extend(OrderId::from_i64(row.get(0)).map(|order_id| OpenOrder {
            units: OrderUnits {
                order_id,
                user_id: UserId::from_row(row.get(1)),
                sku: SkuNumber(row.get(2)),
                quantity: u32::try_from(row.get::<_, i32>(3)).unwrap_or(0),
            },
            expires_at: UnixMillis(row.get(4)),
        }));
    }
    Ok(found)
}

/// Units that unpaid rows of these SKUs and lanes hold, whatever their counters say. `window_floor`: the lowest id of
/// the idempotency window.
///
/// # Errors
/// If the database does not answer.
pub async fn held_units(
    database: &Database,
    lease: NodeLease,
    window_floor: OrderId,
    lanes: LaneSet,
    skus: &[SkuNumber],
) -> Result<BTreeMap<SkuNumber, u64>, StoreError> {
    let client = database.pooled().await?;
    let skus: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
    let unpaid = OrderStatus::PendingPayment.code();
    // Without a step timeout, because there may be many.
    let rows = client
        .query(
            &format!(
                "SELECT sku, sum(quantity)::int8 FROM orders
                  WHERE order_id >= (SELECT least(unpaid_from, $2) FROM node WHERE node = $1)
                    AND status = $3 AND sku = ANY ($4) AND {} GROUP BY sku",
                is_of("$5")
            ),
            &[
                &lease.node,
                &window_floor.as_i64(),
                &unpaid,
                &skus,
                &numbers(lanes),
            ],
        )
        .await
        .map_err(StoreError::statement("adding up what unpaid orders hold"))?;
    Ok(rows
        .iter()
        .map(|row| {
            let units = u64::try_from(row.get::<_, i64>(1)).unwrap_or(0);
            (SkuNumber(row.get(0)), units)
        })
        .collect())
}
