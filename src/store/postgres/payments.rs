//! Payments in the database: lists for an operator, and the orphans that are due for a check.

use tokio_postgres::Row;

use super::Database;
use crate::order::payment::{PaymentState, Provider, RefundReason};
use crate::order::{Currency, OrderId, UnixMillis};
use crate::store::StoreError;

/// A payment as stored in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPayment {
    /// Its number in `payments`.
    pub id: i64,
    /// The payment provider.
    pub provider: Provider,
    /// The provider's id of the payment.
    pub payment_id: String,
    /// The order's id as the provider reported it.
    pub order_ref: String,
    /// The order's id, if the reported one can be ours.
    pub order_id: Option<OrderId>,
    /// The amount in minor units.
    pub amount: i64,
    /// The currency of the amount.
    pub currency: Currency,
    /// The receipt from the pass-back field.
    pub receipt: Option<String>,
    /// Its state.
    pub state: PaymentState,
    /// Reason of the refund, if one is due or made.
    pub refund_reason: Option<RefundReason>,
    /// Time of the first message about it.
    pub received_at: UnixMillis,
    /// Time at which it counts as made: its receipt, or an earlier time signed by the provider.
    pub paid_at: UnixMillis,
    /// Time of the last change of state.
    pub changed_at: UnixMillis,
    /// Number of checks for its order.
    pub checks: i32,
    /// Time of the next check, while it is an orphan.
    pub check_at: UnixMillis,
    /// The provider's reference of the refund.
    pub reference: Option<String>,
    /// The operator's note.
    pub note: Option<String>,
    /// Whether its order exists, as a row or as a dead letter.
    pub has_order: bool,
}

/// Open payments, for metrics and alerts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenPayments {
    /// Payments without an order.
    pub orphans: i64,
    /// Time at which the oldest orphan was received.
    pub oldest_orphan: Option<UnixMillis>,
    /// Payments that have to be refunded.
    pub refunds_due: i64,
    /// Time since which the oldest refund has been due.
    pub oldest_refund_due: Option<UnixMillis>,
}

const COLUMNS: &str = "p.id, p.provider, p.payment_id, p.order_ref, p.order_id, p.amount, p.currency, p.receipt, p.state,
    p.refund_reason, (extract(epoch FROM p.received_at) * 1000)::int8, (extract(epoch FROM p.changed_at) * 1000)::int8,
    p.checks, (extract(epoch FROM p.check_at) * 1000)::int8, p.reference, p.note,
    EXISTS (SELECT FROM orders o WHERE o.order_id = p.order_id)
    OR EXISTS (SELECT FROM dead_letters d WHERE d.order_id = p.order_id) AS has_order,
    (extract(epoch FROM least(p.received_at, p.paid_at)) * 1000)::int8 AS counts_at";

pub(super) fn from_row(row: &Row) -> Result<StoredPayment, StoreError> {
    let id: i64 = row.get(0);
    let unexpected = |what: &str| StoreError::Data(format!("payment {id}: {what}"));
    Ok(StoredPayment {
        id,
        provider: Provider::from_word(row.get(1)).ok_or_else(|| unexpected("unknown provider"))?,
        payment_id: row.get(2),
        order_ref: row.get(3),
        order_id: row.get::<_, Option<i64>>(4).and_then(OrderId::from_i64),
        amount: row.get(5),
        currency: Currency::new(row.get(6)).map_err(|e| unexpected(&format!("currency {e}")))?,
        receipt: row.get(7),
        state: PaymentState::from_word(row.get(8)).ok_or_else(|| unexpected("unknown state"))?,
        refund_reason: row
            .get::<_, Option<&str>>(9)
            .and_then(RefundReason::from_word),
        received_at: UnixMillis(row.get(10)),
        changed_at: UnixMillis(row.get(11)),
        checks: row.get(12),
        check_at: UnixMillis(row.get(13)),
        reference: row.get(14),
        note: row.get(15),
        has_order: row.get(16),
        paid_at: UnixMillis(row.get(17)),
    })
}

/// Payments in one of `states` with ids below `before`, newest first, at most `limit`. With
/// `without_order`, only payments whose order does not exist.
///
/// # Errors
/// If the database does not answer.
pub async fn list(
    database: &Database,
    states: &[PaymentState],
    without_order: bool,
    before: i64,
    limit: i64,
) -> Result<Vec<StoredPayment>, StoreError> {
    let client = database.pooled().await?;
    let states: Vec<&str> = states.iter().map(|state| state.as_str()).collect();
    let sql = format!(
        "SELECT * FROM (SELECT {COLUMNS} FROM payments p WHERE p.state = ANY ($1) AND p.id < $3) p
          WHERE NOT ($2 AND has_order) ORDER BY id DESC LIMIT $4"
    );
    let rows = database
        .timed(
            "listing payments",
            client.query(&sql, &[&states, &without_order, &before, &limit]),
        )
        .await?;
    rows.iter().map(from_row).collect()
}

/// One payment.
///
/// # Errors
/// If the database does not answer.
pub async fn find(database: &Database, id: i64) -> Result<Option<StoredPayment>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!("SELECT {COLUMNS} FROM payments p WHERE p.id = $1");
    let row = database
        .timed("reading a payment", client.query_opt(&sql, &[&id]))
        .await?;
    row.as_ref().map(from_row).transpose()
}

/// The query for the payments that name an order ($1), oldest first, at most $2.
pub(super) fn of_order() -> String {
    format!("SELECT {COLUMNS} FROM payments p WHERE p.order_id = $1 ORDER BY p.id LIMIT $2")
}

/// Orphans with ids above `after` whose order exists, oldest first, at most `limit`.
///
/// # Errors
/// If the database does not answer.
pub async fn orphans_with_order(
    database: &Database,
    after: i64,
    limit: i64,
) -> Result<Vec<StoredPayment>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT * FROM (SELECT {COLUMNS} FROM payments p WHERE p.state = 'orphan' AND p.id > $1) p
          WHERE has_order ORDER BY id LIMIT $2"
    );
    let rows = database
        .timed("matching payments", client.query(&sql, &[&after, &limit]))
        .await?;
    rows.iter().map(from_row).collect()
}

/// Orphans whose check is due by `now`, the longest due first, at most `limit`. Of several orphans of one
/// order, only the first: its decision settles the others.
///
/// # Errors
/// If the database does not answer.
pub async fn due_orphans(
    database: &Database,
    now: UnixMillis,
    limit: i64,
) -> Result<Vec<StoredPayment>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT {COLUMNS} FROM payments p WHERE p.state = 'orphan' AND p.check_at <= to_timestamp($1::int8 / 1000.0)
            AND NOT EXISTS (SELECT FROM payments e WHERE e.order_id = p.order_id AND e.state = 'orphan' AND e.id < p.id)
          ORDER BY p.check_at LIMIT $2"
    );
    let rows = database
        .timed(
            "looking for orders of payments",
            client.query(&sql, &[&now.0, &limit]),
        )
        .await?;
    rows.iter().map(from_row).collect()
}

/// Records the number of checks of an orphan and the time of the next.
///
/// # Errors
/// If the database does not answer.
pub async fn note_check(
    database: &Database,
    id: i64,
    checks: i32,
    check_at: UnixMillis,
) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    database
        .timed(
            "noting a check of a payment",
            client.execute(
                "UPDATE payments SET checks = $2, check_at = to_timestamp($3::int8 / 1000.0)
              WHERE id = $1 AND state = 'orphan'",
                &[&id, &checks, &check_at.0],
            ),
        )
        .await
        .map(|_| ())
}

/// Records the order of an orphan from its receipt, if the provider reported none of ours.
///
/// # Errors
/// If the database does not answer.
pub async fn note_order(database: &Database, id: i64, order_id: OrderId) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    database.timed(
        "noting the order of a payment",
        client.execute(
            "UPDATE payments SET order_id = $2 WHERE id = $1 AND state = 'orphan' AND order_id IS NULL",
            &[&id, &order_id.as_i64()],
        ),
    )
    .await
    .map(|_| ())
}

/// The orders of orphans, each with the moment at which its first orphan counts as made.
///
/// # Errors
/// If the database does not answer.
pub async fn orphaned_orders(
    database: &Database,
) -> Result<Vec<(OrderId, UnixMillis)>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "reading the orphan payments",
            client.query(
                "SELECT order_id, (extract(epoch FROM min(least(received_at, paid_at))) * 1000)::int8 FROM payments
                  WHERE state = 'orphan' AND order_id IS NOT NULL GROUP BY order_id",
                &[],
            ),
        )
        .await?;
    let pair = |row: &Row| Some((OrderId::from_i64(row.get(0))?, UnixMillis(row.get(1))));
    Ok(rows.iter().filter_map(pair).collect())
}

/// Number and age of open payments.
///
/// # Errors
/// If the database does not answer.
pub async fn count_open(database: &Database) -> Result<OpenPayments, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "counting open payments",
            client.query_one(
                "SELECT count(*) FILTER (WHERE state = 'orphan'),
                        (extract(epoch FROM min(received_at) FILTER (WHERE state = 'orphan')) * 1000)::int8,
                        count(*) FILTER (WHERE state = 'refund_due'),
                        (extract(epoch FROM min(changed_at) FILTER (WHERE state = 'refund_due')) * 1000)::int8
                   FROM payments WHERE state IN ('orphan', 'refund_due')",
                &[],
            ),
        )
        .await?;
    Ok(OpenPayments {
        orphans: row.get(0),
        oldest_orphan: row.get::<_, Option<i64>>(1).map(UnixMillis),
        refunds_due: row.get(2),
        oldest_refund_due: row.get::<_, Option<i64>>(3).map(UnixMillis),
    })
}
