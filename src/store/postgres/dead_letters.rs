//! Dead letters: orders whose row the database refused. An operator retries or discards them.

use tokio_postgres::Transaction;

use super::transitions::fence;
use super::{Database, NodeLease};
use crate::order::{OrderId, SkuNumber, UnixMillis};
use crate::store::{Ledger, StoreError, cluster};

/// One dead letter.
#[derive(Clone, Debug)]
pub struct DeadLetter {
    /// Its number in `dead_letters`.
    pub id: i64,
    /// Time of the refusal.
    pub at: UnixMillis,
    /// The order.
    pub order_id: OrderId,
    /// The buyer.
    pub user_id: String,
    /// The shop's id of the SKU.
    pub sku_id: String,
    /// The database's number of the SKU.
    pub sku: SkuNumber,
    /// Units.
    pub quantity: u32,
    /// The amount in minor units.
    pub amount: i64,
    /// The currency of the amount.
    pub currency: String,
    /// SQLSTATE.
    pub sqlstate: String,
    /// The server's message.
    pub reason: String,
    /// The shop's JSON object.
    pub attributes: Option<String>,
    /// Time at which an operator discarded it.
    pub discarded_at: Option<UnixMillis>,
    /// The operator's note.
    pub note: Option<String>,
}

const COLUMNS: &str = "d.id, (extract(epoch FROM d.at) * 1000)::int8, d.order_id, d.user_id, s.sku_id, d.sku, d.quantity,
    d.amount, d.currency, d.sqlstate, d.reason, d.attributes, (extract(epoch FROM d.discarded_at) * 1000)::int8, d.note";

pub(super) fn from_row(row: &tokio_postgres::Row) -> Result<DeadLetter, StoreError> {
    let raw: i64 = row.get(2);
    Ok(DeadLetter {
        id: row.get(0),
        at: UnixMillis(row.get(1)),
        order_id: OrderId::from_i64(raw)
            .ok_or_else(|| StoreError::Data(format!("order id {raw}")))?,
        user_id: row.get(3),
        sku_id: row.get(4),
        sku: SkuNumber(row.get(5)),
        quantity: u32::try_from(row.get::<_, i32>(6)).unwrap_or(0),
        amount: row.get(7),
        currency: row.get(8),
        sqlstate: row.get(9),
        reason: row.get(10),
        attributes: row.get(11),
        discarded_at: row.get::<_, Option<i64>>(12).map(UnixMillis),
        note: row.get(13),
    })
}

/// Whether a dead letter exists. Waits for a retry of it that is under way.
///
/// # Errors
/// If the database does not answer.
pub async fn is_committed(database: &Database, id: i64) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    database
        .timed(
            "looking a dead letter up",
            client.query_opt("SELECT FROM dead_letters WHERE id = $1 FOR UPDATE", &[&id]),
        )
        .await
        .map(|row| row.is_some())
}

/// Dead letters, newest first; discarded ones only if `discarded`.
///
/// # Errors
/// If the database does not answer.
pub async fn list(
    database: &Database,
    discarded: bool,
    limit: i64,
) -> Result<Vec<DeadLetter>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "listing the dead letters",
            client.query(
                &format!(
                    "SELECT {COLUMNS} FROM dead_letters d JOIN sku s ON s.id = d.sku
                      WHERE $1 OR d.discarded_at IS NULL ORDER BY d.id DESC LIMIT $2"
                ),
                &[&discarded, &limit],
            ),
        )
        .await?;
    rows.iter().map(from_row).collect()
}

/// One dead letter.
///
/// # Errors
/// If the database does not answer.
pub async fn find(database: &Database, id: i64) -> Result<Option<DeadLetter>, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "reading a dead letter",
            client.query_opt(
                &format!("SELECT {COLUMNS} FROM dead_letters d JOIN sku s ON s.id = d.sku WHERE d.id = $1"),
                &[&id],
            ),
        )
        .await?;
    row.as_ref().map(from_row).transpose()
}

/// The query for the dead letter of an order ($1).
pub(super) fn of_order() -> String {
    format!("SELECT {COLUMNS} FROM dead_letters d JOIN sku s ON s.id = d.sku WHERE d.order_id = $1")
}

/// Number of open dead letters, counted up to `most`.
///
/// # Errors
/// If the database does not answer.
pub async fn count_open(database: &Database, most: i64) -> Result<i64, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "counting the dead letters",
            client.query_one(
                "SELECT count(*) FROM (SELECT FROM dead_letters WHERE discarded_at IS NULL LIMIT $1) open",
                &[&most],
            ),
        )
        .await?;
    Ok(row.get(0))
}

/// Discards a dead letter: its order stays `failed`. Returns false if there is no such open dead letter.
///
/// # Errors
/// If the database does not answer; [`StoreError::Fenced`] if this node was taken over.
pub async fn discard(
    database: &Database,
    lease: NodeLease,
    id: i64,
    note: Option<&str>,
) -> Result<bool, StoreError> {
    let doing = "discarding a dead letter";
    let sql = "UPDATE dead_letters SET discarded_at = clock_timestamp(), note = $2
                WHERE id = $1 AND discarded_at IS NULL";
    let changed = match lease.ledger {
        Ledger::Sku => {
            let client = database.pooled().await?;
            database
                .timed(doing, client.execute(sql, &[&id, &note]))
                .await?
        }
        Ledger::Share => {
            let discarding =
                async |transaction: &Transaction<'_>| transaction.execute(sql, &[&id, &note]).await;
            cluster::transact(database, lease, doing, discarding).await?
        }
    };
    Ok(changed == 1)
}

/// Writes the order of a dead letter as a row, its units held, payable until `expires_at`. The caller holds
/// the units in memory. Returns false if there is no such open dead letter.
///
/// # Errors
/// If the database refuses the row again or does not answer; the dead letter stays, unless the commit's
/// answer was lost.
pub async fn revive(
    database: &Database,
    lease: NodeLease,
    id: i64,
    expires_at: UnixMillis,
) -> Result<bool, StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        if !fence(&transaction, lease).await? {
            return Ok(None);
        }
        let row = transaction
            .query_opt(
                "WITH gone AS (
                     DELETE FROM dead_letters WHERE id = $1 AND discarded_at IS NULL AND status IS NULL RETURNING *
                 )
                 INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status,
                        created_at, expires_at, key_hash, payload_hash, attributes, transition, previous_status,
                        traceparent)
                 SELECT order_id, user_id, sku, quantity, adjustment, amount, currency, 1,
                        created_at, to_timestamp($2::int8 / 1000.0), key_hash, payload_hash,
                        attributes::json, coalesce(transition, 1) + 1, 0, traceparent
                   FROM gone RETURNING order_id, sku, quantity",
                &[&id, &expires_at.0],
            )
            .await?;
        let Some(row) = row else {
            return Ok(Some(false));
        };
        let (order_id, sku, quantity): (i64, i32, i32) = (row.get(0), row.get(1), row.get(2));
        transaction
            .execute(
                &lease.sql("WITH moved AS (
                     UPDATE @ledger SET held = held + $2::int8 WHERE @id = $1@own RETURNING @total, held, sold
                 )
                 INSERT INTO stock_log (sku, @columncause, reference, held_delta, total_after, held_after, sold_after)
                 SELECT w.sku, @node'dead letter retried', $3, $2::int8, m.@total, m.held, m.sold
                   FROM (SELECT $1::int4 AS sku) w LEFT JOIN moved m ON true"),
                &[&sku, &i64::from(quantity), &order_id.to_string()],
            )
            .await?;
        // The order may be older than the orders among which a start looks for unpaid ones.
        transaction
            .execute(
                "UPDATE node SET unpaid_from = least(unpaid_from, $2), unpaid_changes = unpaid_changes + 1
                  WHERE node = $1",
                &[&lease.node, &order_id],
            )
            .await?;
        transaction.commit().await?;
        Ok(Some(true))
    };
    database
        .timed("retrying a dead letter", work)
        .await?
        .ok_or(lease.is_lost())
}
