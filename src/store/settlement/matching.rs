//! Matching payments to their orders: the orders are locked, each payment gets a verdict in order of arrival,
//! and the verdicts are written together with the COMMIT.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, Row};

use super::statements::{Change, Changes, Closing, Sql, Statements};
use super::{Destination, Matched, Settlement, UnitMove};
use crate::faults::bug;
use crate::order::payment::{OrderFacts, PaymentState, RefundReason, Verdict, judge};
use crate::order::{
    Currency, Ended, OrderId, OrderStatus, OrderUnits, SkuNumber, UnixMillis, UserId,
};
use crate::store::postgres::Connected;

/// A payment to be matched.
pub(super) struct Candidate<'a> {
    pub(super) order_id: OrderId,
    pub(super) amount: i64,
    pub(super) currency: Currency,
    pub(super) payment_id: &'a str,
}

/// A locked order.
struct Locked {
    facts: OrderFacts,
    sku: SkuNumber,
    quantity: u32,
    user_id: UserId,
    is_dead_letter: bool,
}

/// A change of an order's status.
struct Step {
    was: OrderStatus,
    now: OrderStatus,
    reason: Option<RefundReason>,
}

/// Locked orders, and their orphan payments in order of arrival.
pub(super) struct Found {
    orders: HashMap<OrderId, Locked>,
    waiting: Vec<Row>,
}

/// Locks orders, rows and dead letters alike, and then, if there may be any, their orphans. Sent in one flush.
pub(super) async fn lock(
    client: &Connected,
    statements: &Statements,
    orders: Sql,
    ids: &Vec<i64>,
    with_waiting: bool,
) -> Result<Found, Error> {
    let mut found = Found {
        orders: HashMap::new(),
        waiting: Vec::new(),
    };
    if ids.is_empty() {
        return Ok(found);
    }
    let lock_orders = statements.of(client, orders).await?;
    let lock_dead_letters = statements.of(client, Sql::LockDeadLetters).await?;
    let waiting = statements.of(client, Sql::Waiting).await?;
    let wanted: [&(dyn ToSql + Sync); 1] = [ids];
    let (rows, dead_letters, waiting) = tokio::join!(
        client.query(lock_orders, &wanted),
        client.query(lock_dead_letters, &wanted),
        async {
            match with_waiting {
                true => client.query(waiting, &wanted).await,
                false => Ok(Vec::new()),
            }
        },
    );
    let (rows, dead_letters) = (rows?, dead_letters?);
    found.waiting = waiting?;
    for (rows, are_dead) in [(rows, false), (dead_letters, true)] {
        let rows = rows.iter();
        found
            .orders
            .extend(rows.filter_map(|row| locked_from_row(row, are_dead)));
    }
    Ok(found)
}

/// Matches payments to locked orders, one after the other.
pub(super) struct Matcher {
    orders: HashMap<OrderId, Locked>,
    waiting: Vec<Row>,
    steps: BTreeMap<OrderId, Step>,
    matched: Vec<Matched>,
}

impl Matcher {
    pub(super) fn new(found: Found) -> Self {
        Matcher {
            orders: found.orders,
            waiting: found.waiting,
            steps: BTreeMap::new(),
            matched: Vec::new(),
        }
    }

    /// The verdict on a payment, or `None` if its order is not locked. The next payment sees the order as this
    /// one leaves it.
    pub(super) fn match_payment(&mut self, payment: &Candidate<'_>) -> Option<Verdict> {
        let order = self.orders.get_mut(&payment.order_id)?;
        let mut facts = order.facts;
        if bug("pay_after_the_deadline") && facts.status == OrderStatus::Expired {
            facts.status = OrderStatus::PendingPayment;
        }
        let verdict = judge(&facts, payment.amount, payment.currency);
        let (status, reason) = match verdict {
            Verdict::Pay => (Some(OrderStatus::Paid), None),
            Verdict::Refund { reason, order_too } => {
                (order_too.then_some(OrderStatus::RefundDue), Some(reason))
            }
        };
        if let Some(status) = status {
            self.steps.entry(payment.order_id).or_insert(Step {
                was: order.facts.status,
                now: status,
                reason,
            });
            order.facts.status = status;
        }
        self.matched.push(Matched {
            payment_id: payment.payment_id.to_owned(),
            order_id: payment.order_id,
            verdict,
        });
        Some(verdict)
    }

    /// The verdicts on the orphans, in order of arrival.
    pub(super) fn match_waiting(&mut self) -> Vec<(i64, PaymentState, Option<RefundReason>)> {
        let rows = std::mem::take(&mut self.waiting);
        rows.iter()
            .filter_map(|row| {
                let verdict = self.match_payment(&Candidate {
                    order_id: OrderId::from_i64(row.get(1))?,
                    amount: row.get(2),
                    currency: Currency::new(row.get(3)).ok()?,
                    payment_id: row.get(4),
                })?;
                let (state, reason) = match verdict {
                    Verdict::Pay => (PaymentState::Matched, None),
                    Verdict::Refund { reason, .. } => (PaymentState::RefundDue, Some(reason)),
                };
                Some((row.get(0), state, reason))
            })
            .collect()
    }

    /// Adds the statements that carry out the verdicts: orders, then counters.
    pub(super) fn close(self, closing: &mut Closing<'_>, done: &mut Settlement) {
        let (mut paid, mut released) = (Changes::default(), Changes::default());
        for (id, step) in &self.steps {
            let Some(order) = self.orders.get(id) else {
                continue;
            };
            let units = i64::from(order.quantity);
            let to = match (step.was, step.now) {
                (OrderStatus::PendingPayment, OrderStatus::Paid) => {
                    let change = Change {
                        held: -units,
                        sold: units,
                        ..Change::default()
                    };
                    paid.add(order.sku, change);
                    Destination::Sold
                }
                (OrderStatus::PendingPayment, _) => {
                    let change = Change {
                        held: -units,
                        ..Change::default()
                    };
                    released.add(order.sku, change);
                    Destination::Free(Ended::Cancelled)
                }
                // Its units were released when it was cancelled, expired or refused.
                _ => Destination::Nowhere,
            };
            let units = OrderUnits {
                order_id: *id,
                user_id: order.user_id.clone(),
                sku: order.sku,
                quantity: order.quantity,
            };
            done.moved.push(UnitMove { units, to });
        }
        let is_dead = |id: &OrderId| self.orders.get(id).is_some_and(|one| one.is_dead_letter);
        let (dead, alive): (Vec<_>, Vec<_>) = self.steps.iter().partition(|(id, _)| is_dead(id));
        let ids =
            |of: &[(&OrderId, &Step)]| of.iter().map(|(id, _)| id.as_i64()).collect::<Vec<_>>();
        let code = |of: &[(&OrderId, &Step)], status: fn(&Step) -> OrderStatus| {
            let codes = of.iter().map(|(_, step)| status(step).code());
            codes.collect::<Vec<Option<i16>>>()
        };
        let reasons = |of: &[(&OrderId, &Step)]| {
            let reasons = of
                .iter()
                .map(|(_, step)| step.reason.map(RefundReason::as_str));
            reasons.collect::<Vec<Option<&'static str>>>()
        };
        if !alive.is_empty() {
            closing.add(
                Sql::MoveOrders,
                vec![
                    Box::new(ids(&alive)),
                    Box::new(code(&alive, |step| step.was)),
                    Box::new(code(&alive, |step| step.now)),
                    Box::new(reasons(&alive)),
                ],
            );
        }
        if !dead.is_empty() {
            closing.add(
                Sql::MoveDeadLetters,
                vec![
                    Box::new(ids(&dead)),
                    Box::new(code(&dead, |step| step.now)),
                    Box::new(reasons(&dead)),
                ],
            );
        }
        let first = self
            .matched
            .first()
            .map_or("", |matched| &matched.payment_id);
        let reference = format!("{} payments from {first}", self.matched.len());
        closing.move_counters(&[("paid", paid), ("refund due", released)], &reference);
        done.matched = self.matched;
    }
}

/// Adds the statement that moves orphans to their new state.
pub(super) fn move_payments(
    closing: &mut Closing<'_>,
    moved: &[(i64, PaymentState, Option<RefundReason>)],
    now: UnixMillis,
) {
    if moved.is_empty() {
        return;
    }
    let ids: Vec<i64> = moved.iter().map(|(id, ..)| *id).collect();
    let states: Vec<&'static str> = moved.iter().map(|(_, state, _)| state.as_str()).collect();
    let reasons: Vec<Option<&'static str>> = moved
        .iter()
        .map(|(.., reason)| reason.map(RefundReason::as_str))
        .collect();
    closing.add(
        Sql::MovePayments,
        vec![
            Box::new(ids),
            Box::new(states),
            Box::new(reasons),
            Box::new(now.0),
        ],
    );
}

fn locked_from_row(row: &Row, is_dead_letter: bool) -> Option<(OrderId, Locked)> {
    let id = OrderId::from_i64(row.get(0))?;
    let code: Option<i16> = row.get(1);
    // A dead letter has a status only after it was paid.
    let status = code.map_or(Some(OrderStatus::Failed), OrderStatus::from_code)?;
    Some((
        id,
        Locked {
            facts: OrderFacts {
                status,
                amount: row.get(2),
                currency: Currency::new(row.get(3)).ok()?,
                was_payable: row.get(7),
            },
            sku: SkuNumber(row.get(4)),
            quantity: u32::try_from(row.get::<_, i32>(5)).ok()?,
            user_id: UserId::from_row(row.get(6)),
            is_dead_letter,
        },
    ))
}
