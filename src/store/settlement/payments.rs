//! Messages of providers are stored, and payments meet their orders: many at once, each with a
//! verdict of its own.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::Error;
use tokio_postgres::types::ToSql;

use super::statements::{Change, Changes, Sql, Statements};
use super::{Moved, MovedTo, SettlementWriter};
use crate::faults::bug;
use crate::order::payment::{Notice, OrderFacts, PaymentState, RefundReason, Verdict, judge};
use crate::order::{Currency, Order, OrderId, OrderStatus, SkuNumber, UnixMillis};
use crate::store::StoreError;
use crate::store::postgres::Connected;
use crate::store::postgres::payments::StoredPayment;

/// A payment that is to meet its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// Its row.
    pub id: i64,
    /// The order that it is for.
    pub order_id: OrderId,
    /// In minor units.
    pub amount: i64,
    /// Its currency.
    pub currency: Currency,
    /// When it was first received.
    pub received_at: UnixMillis,
}

impl Arrived {
    /// A stored payment, where it names an order that can be one of ours.
    pub fn of(payment: &StoredPayment) -> Option<Self> {
        Some(Arrived {
            id: payment.id,
            order_id: payment.order_id?,
            amount: payment.amount,
            currency: payment.currency,
            received_at: payment.received_at,
        })
    }
}

/// What came of a payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Met {
    /// Its row.
    pub id: i64,
    /// The order.
    pub order_id: OrderId,
    /// The verdict; `None`: the order is not there, and the payment stays an orphan.
    pub verdict: Option<Verdict>,
}

/// What a transaction has done.
#[derive(Debug, Default)]
pub struct Settlement {
    /// Messages that were new.
    pub events: u64,
    /// Payments that were new, or that were looked at again, and what came of each.
    pub met: Vec<Met>,
    /// New payments that name no order of ours.
    pub without_order: u64,
    /// Units that moved.
    pub moved: Vec<Moved>,
}

/// How new payments are stored.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// When they came, by Millrace's clock.
    pub now: UnixMillis,
    /// When those that find no order are looked at again.
    pub check_at: UnixMillis,
    /// Whether they meet their orders at once. Without, all are orphans for now: the way out where
    /// rows of orders or SKUs cannot be had.
    pub judge: bool,
    /// Whether any of their orders may have a payment that waits for it. That one came first, and
    /// meets the order first.
    pub with_waiting: bool,
}

/// An order that is locked.
struct Locked {
    facts: OrderFacts,
    sku: SkuNumber,
    quantity: u32,
    user_id: String,
    is_dead_letter: bool,
}

/// How an order's status changes.
struct Step {
    was: OrderStatus,
    now: OrderStatus,
    reason: Option<RefundReason>,
}

impl SettlementWriter {
    /// Stores messages, the payments in them, and lets new payments meet their orders, all or
    /// nothing. Orders of `in_flight` are left alone: their payments stay orphans for a moment.
    ///
    /// # Errors
    /// Nothing is stored then.
    pub async fn take_in(
        &mut self,
        notices: &[&Notice],
        arrival: Arrival,
        in_flight: &[OrderId],
    ) -> Result<Settlement, StoreError> {
        self.transact("storing payments", async |client, statements| {
            let mut done = Settlement {
                events: store_events(client, statements, notices, arrival.now).await?,
                ..Settlement::default()
            };
            let arrived = store_payments(client, statements, notices, arrival).await?;
            let (known, unknown): (Vec<_>, Vec<_>) = arrived
                .into_iter()
                .partition(|(_, arrived)| arrived.is_some());
            done.without_order = unknown.len() as u64;
            let arrived: Vec<Arrived> = known.into_iter().filter_map(|(_, one)| one).collect();
            let (mut meet, wait): (Vec<_>, Vec<_>) = arrived
                .into_iter()
                .partition(|one| arrival.judge && !in_flight.contains(&one.order_id));
            if arrival.with_waiting && !meet.is_empty() {
                meet = waiting_for_the_same(client, statements, &meet).await?;
            }
            done.met.extend(wait.into_iter().map(|one| Met {
                id: one.id,
                order_id: one.order_id,
                verdict: None,
            }));
            meet_orders(client, statements, &meet, arrival.now, &mut done).await?;
            Ok(done)
        })
        .await
    }

    /// Lets payments that are stored as orphans meet their orders.
    ///
    /// # Errors
    /// Nothing has changed then.
    pub async fn meet(
        &mut self,
        arrived: &[Arrived],
        now: UnixMillis,
    ) -> Result<Settlement, StoreError> {
        self.transact("matching payments", async |client, statements| {
            let mut done = Settlement::default();
            meet_orders(client, statements, arrived, now, &mut done).await?;
            Ok(done)
        })
        .await
    }

    /// Leaves an orphan at `refund_due`: no order was found, and none can be recovered. False: its
    /// order is there after all, or it is no orphan any more, and nothing was changed.
    ///
    /// # Errors
    /// Nothing has changed then.
    pub async fn give_up(
        &mut self,
        id: i64,
        reason: RefundReason,
        now: UnixMillis,
    ) -> Result<bool, StoreError> {
        self.transact(
            "leaving a payment for a refund",
            async |client, statements| {
                let given_up = client
                    .execute(
                        statements.of(client, Sql::GiveUp).await?,
                        &[&id, &reason.as_str(), &now.0],
                    )
                    .await?;
                Ok(given_up > 0)
            },
        )
        .await
    }

    /// Writes an order that was lost, as its receipt tells it, paid by the payment `id`; or, with
    /// a `reason`, as one whose money must go back. False: it is there after all, and nothing was
    /// changed.
    ///
    /// # Errors
    /// Nothing has changed then.
    pub async fn recover(
        &mut self,
        id: i64,
        order: &Order,
        reason: Option<RefundReason>,
        now: UnixMillis,
    ) -> Result<bool, StoreError> {
        self.transact("recovering an order", async |client, statements| {
            let (status, state) = match reason {
                None => (OrderStatus::Paid, PaymentState::Matched),
                Some(_) => (OrderStatus::RefundDue, PaymentState::RefundDue),
            };
            let written = client
                .execute(
                    statements.of(client, Sql::Recover).await?,
                    &[
                        &order.id.as_i64(),
                        &order.user_id.as_str(),
                        &order.sku.0,
                        &(order.quantity.get() as i32),
                        &order.adjustment,
                        &order.amount,
                        &order.currency.as_str(),
                        &status.code(),
                        &order.created_at.0,
                        &order.expires_at.0,
                        &order.key.map(|key| key.0.to_vec()),
                        &(order.payload.0 as i64),
                        &reason.map(RefundReason::as_str),
                    ],
                )
                .await?;
            if written == 0 {
                return Ok(false);
            }
            move_payments(client, statements, &[(id, state, reason)], now).await?;
            let mut changes = Changes::default();
            if reason.is_none() {
                let sold = i64::from(order.quantity.get());
                changes.add(
                    order.sku,
                    Change {
                        sold,
                        ..Change::default()
                    },
                );
            }
            let reference = order.id.to_string();
            statements
                .move_counters(client, &[("recovered", changes)], &reference)
                .await?;
            Ok(true)
        })
        .await
    }
}

async fn store_events(
    client: &Connected,
    statements: &Statements,
    notices: &[&Notice],
    now: UnixMillis,
) -> Result<u64, Error> {
    let column = |of: fn(&Notice) -> &str| notices.iter().map(|n| of(n)).collect::<Vec<&str>>();
    let bodies: Vec<&[u8]> = notices.iter().map(|notice| &*notice.body).collect();
    let payment_ids: Vec<Option<&str>> = notices
        .iter()
        .map(|notice| {
            notice
                .payment
                .as_ref()
                .map(|payment| payment.payment_id.as_str())
        })
        .collect();
    client
        .execute(
            statements.of(client, Sql::Events).await?,
            &[
                &now.0,
                &column(|notice| notice.provider.as_str()),
                &column(|notice| &notice.event_id),
                &column(|notice| &notice.kind),
                &bodies,
                &payment_ids,
            ],
        )
        .await
}

/// Stores payments; returns the rows of the new ones, and where they name an order, what is to
/// meet it.
async fn store_payments(
    client: &Connected,
    statements: &Statements,
    notices: &[&Notice],
    arrival: Arrival,
) -> Result<Vec<(i64, Option<Arrived>)>, Error> {
    // One payment may be reported by several messages; the first that came counts. They are
    // numbered, and meet their orders, as they came.
    let mut first = HashMap::new();
    let mut names = Vec::with_capacity(notices.len());
    for notice in notices {
        if let Some(payment) = &notice.payment {
            let name = (notice.provider.as_str(), payment.payment_id.as_str());
            first.entry(name).or_insert_with(|| {
                names.push(name);
                payment
            });
        }
    }
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let providers: Vec<&str> = names.iter().map(|(provider, _)| *provider).collect();
    let payment_ids: Vec<&str> = names.iter().map(|(_, id)| *id).collect();
    let of = names.iter().filter_map(|name| first.get(name));
    let rows = client
        .query(
            statements.of(client, Sql::Payments).await?,
            &[
                &arrival.now.0,
                &providers,
                &payment_ids,
                &of.clone().map(|p| p.order_ref.as_str()).collect::<Vec<_>>(),
                &of.clone()
                    .map(|p| p.order_id().map(OrderId::as_i64))
                    .collect::<Vec<_>>(),
                &of.clone().map(|p| p.amount).collect::<Vec<_>>(),
                &of.clone().map(|p| p.currency.as_str()).collect::<Vec<_>>(),
                &of.map(|p| p.receipt.as_deref()).collect::<Vec<_>>(),
                &arrival.check_at.0,
            ],
        )
        .await?;
    Ok(rows
        .iter()
        .filter_map(|row| {
            let (id, provider, payment_id): (i64, &str, &str) =
                (row.get(0), row.get(1), row.get(2));
            let payment = first.get(&(provider, payment_id))?;
            let arrived = payment.order_id().map(|order_id| Arrived {
                id,
                order_id,
                amount: payment.amount,
                currency: payment.currency,
                received_at: arrival.now,
            });
            Some((id, arrived))
        })
        .collect())
}

/// Every orphan of the orders of `arrived`, also of before, as they came.
async fn waiting_for_the_same(
    client: &Connected,
    statements: &Statements,
    arrived: &[Arrived],
) -> Result<Vec<Arrived>, Error> {
    let ids: Vec<i64> = arrived.iter().map(|one| one.order_id.as_i64()).collect();
    let waiting = statements.of(client, Sql::Waiting).await?;
    let rows = client.query(waiting, &[&ids]).await?;
    Ok(rows
        .iter()
        .filter_map(|row| {
            Some(Arrived {
                id: row.get(0),
                order_id: OrderId::from_i64(row.get(1))?,
                amount: row.get(2),
                currency: Currency::new(row.get(3)).ok()?,
                received_at: UnixMillis(row.get(4)),
            })
        })
        .collect())
}

/// Locks the orders that are there, judges, and carries the verdicts out.
async fn meet_orders(
    client: &Connected,
    statements: &Statements,
    arrived: &[Arrived],
    now: UnixMillis,
    done: &mut Settlement,
) -> Result<(), Error> {
    if arrived.is_empty() {
        return Ok(());
    }
    let mut ids: Vec<i64> = arrived.iter().map(|one| one.order_id.as_i64()).collect();
    ids.sort_unstable();
    ids.dedup();
    let mut locked = HashMap::new();
    let wanted: [&(dyn ToSql + Sync); 1] = [&ids];
    let lock_orders = statements.of(client, Sql::LockOrders).await?;
    let lock_dead_letters = statements.of(client, Sql::LockDeadLetters).await?;
    let (orders, dead_letters) = tokio::join!(
        client.query(lock_orders, &wanted),
        client.query(lock_dead_letters, &wanted),
    );
    for (rows, are_dead) in [(orders?, false), (dead_letters?, true)] {
        let rows = rows.iter();
        locked.extend(rows.filter_map(|row| locked_from_row(row, are_dead)));
    }
    let mut changes: BTreeMap<OrderId, Step> = BTreeMap::new();
    let mut payments = Vec::with_capacity(arrived.len());
    for one in arrived {
        let verdict = locked.get_mut(&one.order_id).map(|order| {
            let received_at = match bug("pay_after_the_deadline") {
                true => UnixMillis(i64::MIN),
                false => one.received_at,
            };
            let verdict = judge(&order.facts, one.amount, one.currency, received_at);
            let (state, status, reason) = match verdict {
                Verdict::Pay => (PaymentState::Matched, Some(OrderStatus::Paid), None),
                Verdict::Refund { reason, order_too } => (
                    PaymentState::RefundDue,
                    order_too.then_some(OrderStatus::RefundDue),
                    Some(reason),
                ),
            };
            payments.push((one.id, state, reason));
            if let Some(status) = status {
                changes.entry(one.order_id).or_insert(Step {
                    was: order.facts.status,
                    now: status,
                    reason,
                });
                // Who comes next in this very batch finds it so.
                order.facts.status = status;
            }
            verdict
        });
        done.met.push(Met {
            id: one.id,
            order_id: one.order_id,
            verdict,
        });
    }
    move_payments(client, statements, &payments, now).await?;
    let (mut paid, mut released) = (Changes::default(), Changes::default());
    for (id, change) in &changes {
        let Some(order) = locked.get(id) else {
            continue;
        };
        let units = i64::from(order.quantity);
        let to = match (change.was, change.now) {
            (OrderStatus::PendingPayment, OrderStatus::Paid) => {
                let change = Change {
                    held: -units,
                    sold: units,
                    ..Change::default()
                };
                paid.add(order.sku, change);
                MovedTo::Sold
            }
            (OrderStatus::PendingPayment, _) => {
                let change = Change {
                    held: -units,
                    ..Change::default()
                };
                released.add(order.sku, change);
                MovedTo::Free
            }
            // Its units are back since it was cancelled, expired or refused.
            _ => MovedTo::Nowhere,
        };
        done.moved.push(Moved {
            order_id: *id,
            user_id: order.user_id.clone(),
            sku: order.sku,
            quantity: order.quantity,
            to,
        });
    }
    let is_dead = |id: &OrderId| locked.get(id).is_some_and(|order| order.is_dead_letter);
    let (dead, alive): (Vec<_>, Vec<_>) = changes.iter().partition(|(id, _)| is_dead(id));
    if !alive.is_empty() {
        let ids: Vec<i64> = alive.iter().map(|(id, _)| id.as_i64()).collect();
        let was: Vec<Option<i16>> = alive.iter().map(|(_, c)| c.was.code()).collect();
        let status: Vec<Option<i16>> = alive.iter().map(|(_, c)| c.now.code()).collect();
        let reasons: Vec<Option<&str>> = alive
            .iter()
            .map(|(_, c)| c.reason.map(RefundReason::as_str))
            .collect();
        client
            .execute(
                statements.of(client, Sql::MoveOrders).await?,
                &[&ids, &was, &status, &reasons],
            )
            .await?;
    }
    if !dead.is_empty() {
        let ids: Vec<i64> = dead.iter().map(|(id, _)| id.as_i64()).collect();
        let status: Vec<Option<i16>> = dead.iter().map(|(_, c)| c.now.code()).collect();
        let reasons: Vec<Option<&str>> = dead
            .iter()
            .map(|(_, c)| c.reason.map(RefundReason::as_str))
            .collect();
        client
            .execute(
                statements.of(client, Sql::MoveDeadLetters).await?,
                &[&ids, &status, &reasons],
            )
            .await?;
    }
    let first = arrived.first().map_or(0, |one| one.id);
    statements
        .move_counters(
            client,
            &[("paid", paid), ("refund due", released)],
            &format!("{} payments from {first}", arrived.len()),
        )
        .await
}

async fn move_payments(
    client: &Connected,
    statements: &Statements,
    moved: &[(i64, PaymentState, Option<RefundReason>)],
    now: UnixMillis,
) -> Result<u64, Error> {
    if moved.is_empty() {
        return Ok(0);
    }
    let ids: Vec<i64> = moved.iter().map(|(id, ..)| *id).collect();
    let states: Vec<&str> = moved.iter().map(|(_, state, _)| state.as_str()).collect();
    let reasons: Vec<Option<&str>> = moved
        .iter()
        .map(|(.., reason)| reason.map(RefundReason::as_str))
        .collect();
    client
        .execute(
            statements.of(client, Sql::MovePayments).await?,
            &[&ids, &states, &reasons, &now.0],
        )
        .await
}

fn locked_from_row(row: &tokio_postgres::Row, is_dead_letter: bool) -> Option<(OrderId, Locked)> {
    let id = OrderId::from_i64(row.get(0))?;
    let code: Option<i16> = row.get(1);
    let status = match code {
        // A dead letter has one only once it was paid all the same.
        None => OrderStatus::Failed,
        Some(_) => OrderStatus::ALL
            .into_iter()
            .find(|status| status.code() == code)?,
    };
    Some((
        id,
        Locked {
            facts: OrderFacts {
                status,
                amount: row.get(2),
                currency: Currency::new(row.get(3)).ok()?,
                expires_at: UnixMillis(row.get(4)),
            },
            sku: SkuNumber(row.get(5)),
            quantity: u32::try_from(row.get::<_, i32>(6)).ok()?,
            user_id: row.get(7),
            is_dead_letter,
        },
    ))
}
