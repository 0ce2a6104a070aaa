//! Refunds that an operator has made. Millrace records them; it never calls a provider.

use tokio_postgres::Error;

use super::statements::{Change, Changes, Closing, Sql};
use super::{Destination, SettlementWriter, UnitMove};
use crate::faults::bug;
use crate::order::{OrderId, OrderStatus, OrderUnits, SkuNumber, UnixMillis, UserId};
use crate::store::cluster::shares::SWEEP;
use crate::store::postgres::{Connected, NodeLease};
use crate::store::{Ledger, StoreError};

/// An operator's note about a refund.
#[derive(Clone, Debug)]
pub struct RefundNote {
    /// The provider's reference of the refund.
    pub reference: Option<String>,
    /// Free text.
    pub note: Option<String>,
    /// Whether the units of a paid order are offered for sale again.
    pub restock: bool,
}

/// Outcome of recording a refund.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// Recorded; for a paid order, with the units that moved.
    Done(Option<UnitMove>),
    /// The same refund was recorded before.
    Already,
    /// The order has another status, and none of its payments is to be refunded.
    StandsAt(OrderStatus),
    /// The order is paid, and another node counts its units as sold. It gives them to `sku` within a second; nothing has
    /// changed.
    UnitsElsewhere,
    /// There is no such order.
    Unknown,
}

/// Outcome of closing a payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The payment is `refunded`, with its note; the order is given if no other payment waits for it.
    Done(Option<OrderId>),
    /// Its order exists: record the refund with the order.
    HasOrder(OrderId),
    /// The payment is matched or closed already.
    Settled,
    /// There is no such payment.
    Unknown,
}

/// Records that the money of an order was refunded. Its `refund_due` payments become `refunded`, and so
/// does an order at `refund_due`. If no payment is due and the order is paid, its payment and the order
/// become `refunded`, and its units are restocked or leave the sale. A reference recorded with the order
/// before changes nothing.
///
/// # Errors
/// On an error nothing has changed.
pub async fn record(
    writer: &mut SettlementWriter,
    order_id: OrderId,
    note: &RefundNote,
    now: UnixMillis,
) -> Result<Recorded, StoreError> {
    writer.transact("recording a refund", async |client, statements| {
        let nothing = |recorded| Ok((recorded, Closing::default()));
        let ids = vec![order_id.as_i64()];
        let order = client.query_opt(statements.of(client, Sql::LockOrders).await?, &[&ids]).await?;
        let dead = client.query_opt(statements.of(client, Sql::LockDeadLetters).await?, &[&ids]).await?;
        let (row, is_dead) = match (order, dead) {
            (Some(row), _) => (row, false),
            (None, Some(row)) => (row, true),
            (None, None) => return nothing(Recorded::Unknown),
        };
        let code: Option<i16> = row.get(1);
        let status = code
            .and_then(OrderStatus::from_code)
            .unwrap_or(OrderStatus::Failed);
        let mark_refunded = async |from: &str| {
            client
                .execute(
                    "UPDATE payments SET state = 'refunded', changed_at = to_timestamp($3::int8 / 1000.0),
                            reference = $4, note = $5
                      WHERE order_id = $1 AND state = $2",
                    &[&order_id.as_i64(), &from, &now.0, &note.reference, &note.note],
                )
                .await
        };
        let recorded = client
            .query_opt(
                "SELECT FROM payments WHERE order_id = $1 AND state = 'refunded' AND reference = $2 LIMIT 1",
                &[&order_id.as_i64(), &note.reference],
            )
            .await?;
        if recorded.is_some() && !bug("refund_again") {
            // A repeated request whose answer was lost: anything that came due since belongs to another
            // refund.
            return nothing(Recorded::Already);
        }
        let due = mark_refunded("refund_due").await?;
        let refunded = OrderStatus::Refunded.code();
        match status {
            OrderStatus::RefundDue => {
                let table = if is_dead { "dead_letters" } else { "orders" };
                let move_it = format!("UPDATE {table} SET status = $2 WHERE order_id = $1");
                client
                    .execute(&move_it, &[&order_id.as_i64(), &refunded])
                    .await?;
                nothing(Recorded::Done(None))
            }
            _ if due > 0 => nothing(Recorded::Done(None)),
            OrderStatus::Paid => {
                let (sku, quantity) = (SkuNumber(row.get(4)), row.get::<_, i32>(5));
                let units = i64::from(quantity);
                let lease = statements.lease();
                let swept = match lease.ledger {
                    Ledger::Sku => None,
                    Ledger::Share => match sweep(client, lease, sku, units).await? {
                        None => return nothing(Recorded::UnitsElsewhere),
                        swept => swept,
                    },
                };
                mark_refunded("matched").await?;
                client
                    .execute(
                        statements.of(client, Sql::MoveOrders).await?,
                        &[
                            &ids,
                            &vec![status.code()],
                            &vec![refunded],
                            &vec![None::<&str>],
                        ],
                    )
                    .await?;
                let (cause, to, total) = if note.restock {
                    ("restocked after a refund", Destination::Restocked, 0)
                } else {
                    ("refunded, not restocked", Destination::Withdrawn, -units)
                };
                let mut closing = Closing::default();
                let to = match swept {
                    None => {
                        let mut changes = Changes::default();
                        let change = Change { total, held: 0, sold: -units };
                        changes.add(sku, change);
                        closing.move_counters(&[(cause, changes)], &order_id.to_string());
                        to
                    }
                    Some(swept) => {
                        closing.add(
                            Sql::RefundSwept,
                            vec![
                                Box::new(sku.0),
                                Box::new(total),
                                Box::new(-units),
                                Box::new(cause),
                                Box::new(order_id.to_string()),
                                Box::new(lease.node),
                                Box::new(i64::from(swept)),
                            ],
                        );
                        Destination::Pool { swept, is_free: note.restock }
                    }
                };
                let units = OrderUnits {
                    order_id,
                    user_id: UserId::from_row(row.get(6)),
                    sku,
                    quantity: u32::try_from(quantity).unwrap_or(0),
                };
                let moved = UnitMove { units, to };
                Ok((Recorded::Done(Some(moved)), closing))
            }
            OrderStatus::Refunded => nothing(Recorded::Already),
            other => nothing(Recorded::StandsAt(other)),
        }
    })
    .await
}

/// Moves the sold units of the node's share to `sku`, where those of lanes that have moved are too, and returns their
/// number. `None`, with nothing changed: there are fewer than `units` then, because another node has not moved its own yet.
async fn sweep(
    client: &Connected,
    lease: NodeLease,
    sku: SkuNumber,
    units: i64,
) -> Result<Option<u32>, Error> {
    let is_there: bool = client
        .query_one(
            "SELECT s.sold + coalesce((SELECT sold FROM stock_share WHERE sku = s.id AND node = $2), 0) >= $3
               FROM sku s WHERE s.id = $1 FOR UPDATE OF s",
            &[&sku.0, &lease.node, &units],
        )
        .await?
        .get(0);
    if !is_there {
        return Ok(None);
    }
    let swept = client
        .query(SWEEP, &[&vec![sku.0], &lease.node, &false])
        .await?;
    let swept = swept.first().map_or(0, |row| row.get::<_, i64>(1));
    Ok(Some(u32::try_from(swept).unwrap_or(u32::MAX)))
}

/// Closes a payment without an order: an operator has dealt with the money.
///
/// # Errors
/// On an error nothing has changed.
pub async fn close_payment(
    writer: &mut SettlementWriter,
    id: i64,
    note: &RefundNote,
    now: UnixMillis,
) -> Result<Closed, StoreError> {
    writer.transact("closing a payment", async |client, _| {
        let nothing = |closed| Ok((closed, Closing::default()));
        let row = client
            .query_opt(
                "SELECT p.state, p.order_id, EXISTS (SELECT FROM order_rows o WHERE o.order_id = p.order_id),
                        EXISTS (SELECT FROM payments q WHERE q.order_id = p.order_id AND q.id <> p.id
                                                         AND q.state = 'orphan')
                   FROM payments p WHERE p.id = $1 FOR UPDATE OF p",
                &[&id],
            )
            .await?;
        let Some(row) = row else {
            return nothing(Closed::Unknown);
        };
        let (state, order_id, has_order): (&str, Option<i64>, bool) =
            (row.get(0), row.get(1), row.get(2));
        if state != "orphan" && state != "refund_due" {
            return nothing(Closed::Settled);
        }
        if let Some(order_id) = order_id.filter(|_| has_order).and_then(OrderId::from_i64) {
            return nothing(Closed::HasOrder(order_id));
        }
        client
            .execute(
                "UPDATE payments SET state = 'refunded', changed_at = to_timestamp($2::int8 / 1000.0),
                        reference = $3, note = $4 WHERE id = $1",
                &[&id, &now.0, &note.reference, &note.note],
            )
            .await?;
        let others_wait: bool = row.get(3);
        let order_id = order_id.filter(|_| !others_wait);
        nothing(Closed::Done(order_id.and_then(OrderId::from_i64)))
    })
    .await
}
