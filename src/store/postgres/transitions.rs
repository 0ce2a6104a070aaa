//! Cancellation and other ends of unpaid orders: one guarded statement each, with the counters and the stock
//! log in the same transaction.

use tokio_postgres::Transaction;

use super::{Database, NodeLease};
use crate::order::{Ended, OrderId, OrderStatus, OrderUnits, SkuNumber, UnixMillis, UserId};
use crate::store::cluster::lists;
use crate::store::{Ledger, StoreError};

/// Outcome of ending an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The order has ended now, and its units are released in the database.
    Now(OrderUnits),
    /// The order has ended now; it waited for units and held none.
    Left(OrderUnits),
    /// The order has this status; nothing was changed.
    StandsAt(OrderStatus),
    /// There is no such order.
    Unknown,
}

/// Reads a row of buyer, SKU and quantity.
fn units_of(order_id: OrderId, row: &tokio_postgres::Row) -> OrderUnits {
    OrderUnits {
        order_id,
        user_id: UserId::from_row(row.get(0)),
        sku: SkuNumber(row.get(1)),
        quantity: u32::try_from(row.get::<_, i32>(2)).unwrap_or(0),
    }
}

/// Locks the node's row and checks the epoch, so that a replaced process changes nothing. The key-share lock
/// conflicts with a takeover but not with a renewal of the lease.
pub(super) async fn fence(
    transaction: &Transaction<'_>,
    lease: NodeLease,
) -> Result<bool, tokio_postgres::Error> {
    transaction
        .query_opt(
            "SELECT 1 FROM node WHERE node = $1 AND epoch = $2 FOR KEY SHARE",
            &[&lease.node, &lease.epoch],
        )
        .await
        .map(|row| row.is_some())
}

/// The orders that a cancellation is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Which {
    /// Unpaid orders, and those that wait for units.
    #[default]
    Unpaid,
    /// Only those that wait for units.
    Waiting,
}

/// Cancels an unpaid order: its status, its SKU's counter and the stock log, all or nothing. With `now`, an
/// order past its payment deadline is not cancelled; its status is then given as `expired`.
///
/// # Errors
/// If the database does not answer; the cancellation is then in doubt, and repeating it tells the outcome.
pub async fn cancel(
    database: &Database,
    lease: NodeLease,
    id: OrderId,
    now: Option<UnixMillis>,
    which: Which,
) -> Result<Transition, StoreError> {
    end_unpaid(database, lease, id, OrderStatus::Cancelled, now, which).await
}

/// Ends an order that is open in the database as it had ended before a failover.
///
/// # Errors
/// As [`cancel`].
pub async fn end(
    database: &Database,
    lease: NodeLease,
    id: OrderId,
    ended: Ended,
) -> Result<Transition, StoreError> {
    let to = match ended {
        Ended::Expired => OrderStatus::Expired,
        Ended::Cancelled | Ended::Failed => OrderStatus::Cancelled,
    };
    end_unpaid(database, lease, id, to, None, Which::Unpaid).await
}

async fn end_unpaid(
    database: &Database,
    lease: NodeLease,
    id: OrderId,
    to: OrderStatus,
    now: Option<UnixMillis>,
    which: Which,
) -> Result<Transition, StoreError> {
    let cause = to.as_str();
    let mut client = database.pooled().await?;
    let mut is_dropped = false;
    let work = async {
        let transaction = client.transaction().await?;
        if !fence(&transaction, lease).await? {
            return Ok(None);
        }
        let to = to.code();
        let from: &[OrderStatus] = match which {
            Which::Unpaid => &[OrderStatus::PendingPayment, OrderStatus::Waitlisted],
            Which::Waiting => &[OrderStatus::Waitlisted],
        };
        let from: Vec<i16> = from.iter().filter_map(|status| status.code()).collect();
        // An order that waits keeps its `expires_at`, which tells it from one that had time to pay.
        let row = transaction
            .query_opt(
                "UPDATE orders SET status = $3
                  WHERE order_id = $1 AND status = ANY ($2)
                    AND ($4::int8 IS NULL OR expires_at > to_timestamp($4 / 1000.0))
                 RETURNING user_id, sku, quantity, expires_at = '9999-01-01 00:00:00+00'",
                &[&id.as_i64(), &from, &to, &now.map(|now| now.0)],
            )
            .await?;
        if let Some(row) = row.as_ref().filter(|row| row.get(3)) {
            if lease.ledger == Ledger::Share {
                transaction
                    .execute(lists::LEAVE, &[&vec![id.as_i64()]])
                    .await?;
            }
            transaction.commit().await?;
            return Ok(Some(Transition::Left(units_of(id, row))));
        }
        let Some(row) = row else {
            // A parked order becomes a cancelled row. Its units are in no counter of the database.
            let is_any = which == Which::Unpaid;
            let parked = transaction
                .query_opt(
                    "WITH gone AS (
                         DELETE FROM parked_orders
                          WHERE order_id = $1 AND $4 AND ($3::int8 IS NULL OR expires_at > to_timestamp($3 / 1000.0))
                         RETURNING *
                     ), written AS (
                         INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status,
                                created_at, expires_at, key_hash, payload_hash, attributes)
                         SELECT order_id, user_id, sku, quantity, adjustment, amount, currency, $2,
                                created_at, expires_at, key_hash, payload_hash, attributes
                           FROM gone RETURNING user_id, sku, quantity
                     )
                     SELECT w.user_id, w.sku, w.quantity FROM gone LEFT JOIN written w ON true",
                    &[&id.as_i64(), &to, &now.map(|now| now.0), &is_any],
                )
                .await?;
            if let Some(row) = parked {
                if row.get::<_, Option<&str>>(0).is_none() {
                    is_dropped = true;
                    transaction.rollback().await?;
                    return Ok(None);
                }
                transaction.commit().await?;
                return Ok(Some(Transition::Now(units_of(id, &row))));
            }
            let word = transaction
                .query_opt(
                    "SELECT status FROM order_rows WHERE order_id = $1",
                    &[&id.as_i64()],
                )
                .await?
                .and_then(|row| row.get::<_, Option<String>>(0));
            // An order that is still payable is past its deadline and about to expire.
            let status =
                word.as_deref()
                    .and_then(OrderStatus::from_word)
                    .map(|found| match found {
                        OrderStatus::PendingPayment | OrderStatus::Accepted if is_any => {
                            OrderStatus::Expired
                        }
                        other => other,
                    });
            // The fence has locked a row, so with synchronous replication this waits for the standby to
            // have the commit that was read: the answer stays true after a failover.
            transaction.commit().await?;
            return Ok(Some(
                status.map_or(Transition::Unknown, Transition::StandsAt),
            ));
        };
        let (sku, quantity): (i32, i32) = (row.get(1), row.get(2));
        // The INSERT reads FROM `moved`, so that its entry is numbered after the SKU's row is locked: the
        // audit follows the chain by number.
        transaction
            .execute(
                &lease.sql("WITH moved AS (
                     UPDATE @ledger SET held = held - $2::int8 WHERE @id = $1@own RETURNING @total, held, sold
                 )
                 INSERT INTO stock_log (sku, @columncause, reference, held_delta, total_after, held_after, sold_after)
                 SELECT w.sku, @node$4, $3, -$2::int8, m.@total, m.held, m.sold
                   FROM (SELECT $1::int4 AS sku) w LEFT JOIN moved m ON true"),
                &[&sku, &i64::from(quantity), &id.to_string(), &cause],
            )
            .await?;
        transaction.commit().await?;
        Ok(Some(Transition::Now(units_of(id, &row))))
    };
    let done = database.timed("cancelling an order", work).await?;
    if is_dropped {
        let why = format!("a trigger on the table orders drops the row of parked order {id}");
        return Err(StoreError::Data(why));
    }
    done.ok_or(lease.is_lost())
}
