//! Storing providers' messages and matching their payments, many in one transaction, each payment with its own
//! verdict. A new payment whose order exists is stored in its final state, not as an orphan first.

use std::collections::HashSet;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, Row, Statement};

use super::matching::{Candidate, Matcher, lock, move_payments};
use super::statements::{Change, Changes, Closing, Sql};
use super::{Settlement, SettlementWriter};
use crate::order::payment::{Delivery, Payment, PaymentState, RefundReason, Verdict};
use crate::order::{Order, OrderId, OrderStatus, UnixMillis};
use crate::store::StoreError;
use crate::store::postgres::Connected;

/// Parameters of storing new payments.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The time, by Millrace's clock.
    pub now: UnixMillis,
    /// Time of the first check of those that stay orphans.
    pub check_at: UnixMillis,
    /// Whether payments are matched at once. If false, all are stored as orphans for now, because locks on
    /// orders or SKUs are unavailable.
    pub match_now: bool,
    /// Whether any of their orders may have an orphan already. The orphan came first and is matched first.
    pub with_waiting: bool,
}

/// Stores messages and their payments and matches new payments, all or nothing. Payments of `in_flight`
/// orders, and of orders whose row is locked, stay orphans for a moment. So do those of orders that are `elsewhere`, at
/// another node: their rows are locked, so that this node's orphan and the expiry of the order at the other one see each
/// other.
///
/// # Errors
/// On an error nothing is stored.
pub async fn ingest(
    writer: &mut SettlementWriter,
    deliveries: &[&Delivery],
    arrival: Arrival,
    in_flight: &[OrderId],
    elsewhere: &[OrderId],
) -> Result<Settlement, StoreError> {
    let payments = first_reports(deliveries);
    let mut orders: Vec<i64> = payments
        .iter()
        .filter_map(|(_, payment)| payment.order_id())
        .filter(|id| arrival.match_now && !in_flight.contains(id) && !elsewhere.contains(id))
        .map(OrderId::as_i64)
        .collect();
    orders.sort_unstable();
    orders.dedup();
    writer
        .transact("storing payments", async |client, statements| {
            let events = Events::of(deliveries);
            let names = [
                payments
                    .iter()
                    .map(|(at, _)| at.notice.provider.as_str())
                    .collect::<Vec<_>>(),
                payments
                    .iter()
                    .map(|(_, one)| one.payment_id.as_str())
                    .collect(),
            ];
            let store_events = statements.of(client, Sql::Events).await?;
            let known = statements.of(client, Sql::Known).await?;
            if !elsewhere.is_empty() {
                let ids: Vec<i64> = elsewhere.iter().map(|id| id.as_i64()).collect();
                let share = match arrival.match_now {
                    true => Sql::ShareOrders,
                    false => Sql::TryShareOrders,
                };
                let share = statements.of(client, share).await?;
                client.execute(share, &[&ids]).await?;
            }
            // One flush, the locks in their order. The first error is the cause; those after it only say that
            // the transaction is aborted.
            let (events, known, locked) = tokio::join!(
                events.store(client, store_events),
                known_positions(client, known, &names),
                lock(
                    client,
                    statements,
                    Sql::TryOrders,
                    &orders,
                    arrival.with_waiting
                ),
            );
            let (events, known, locked) = (events?, known?, locked?);
            let mut matcher = Matcher::new(locked);
            let waiting = matcher.match_waiting();
            let mut done = Settlement {
                events,
                ..Settlement::default()
            };
            let mut new = NewPayments::default();
            for (position, (delivery, payment)) in payments.iter().enumerate() {
                if known.contains(&position) {
                    continue;
                }
                let verdict = payment.order_id().and_then(|order_id| {
                    let verdict = matcher.match_payment(&Candidate {
                        order_id,
                        amount: payment.amount,
                        currency: payment.currency,
                        payment_id: &payment.payment_id,
                    });
                    let orphan = verdict.is_none().then(|| (order_id, delivery.paid_at()));
                    done.orphans.extend(orphan);
                    verdict
                });
                done.without_order += u64::from(payment.order_id().is_none());
                new.add(delivery, payment, verdict);
            }
            let mut closing = Closing::default();
            new.store(&mut closing, arrival);
            move_payments(&mut closing, &waiting, arrival.now);
            matcher.close(&mut closing, &mut done);
            Ok((done, closing))
        })
        .await
}

/// Matches the orphans of these orders in order of arrival. Orphans of orders whose row is locked stay as
/// they are.
///
/// # Errors
/// On an error nothing has changed.
pub async fn match_orphans(
    writer: &mut SettlementWriter,
    orders: &[OrderId],
    now: UnixMillis,
) -> Result<Settlement, StoreError> {
    let mut orders: Vec<i64> = orders.iter().map(|id| id.as_i64()).collect();
    orders.sort_unstable();
    orders.dedup();
    writer
        .transact("matching payments", async |client, statements| {
            let locked = lock(client, statements, Sql::TryOrders, &orders, true).await?;
            let mut matcher = Matcher::new(locked);
            let waiting = matcher.match_waiting();
            let (mut done, mut closing) = (Settlement::default(), Closing::default());
            move_payments(&mut closing, &waiting, now);
            matcher.close(&mut closing, &mut done);
            Ok((done, closing))
        })
        .await
}

/// Moves an orphan to `refund_due`: no order was found, and none can be recovered. Returns false, with
/// nothing changed, if its order exists after all or it is no longer an orphan.
///
/// # Errors
/// On an error nothing has changed.
pub async fn give_up(
    writer: &mut SettlementWriter,
    id: i64,
    reason: RefundReason,
    now: UnixMillis,
) -> Result<bool, StoreError> {
    writer
        .transact(
            "leaving a payment for a refund",
            async |client, statements| {
                let given_up = client
                    .execute(
                        statements.of(client, Sql::GiveUp).await?,
                        &[&id, &reason.as_str(), &now.0],
                    )
                    .await?;
                Ok((given_up > 0, Closing::default()))
            },
        )
        .await
}

/// Writes a lost order from its receipt: paid by the payment `id`, or, if a `reason` is given,
/// `refund_due`. Returns false, with nothing changed, if the order exists after all.
///
/// # Errors
/// On an error nothing has changed.
pub async fn recover_order(
    writer: &mut SettlementWriter,
    id: i64,
    order: &Order,
    reason: Option<RefundReason>,
    now: UnixMillis,
) -> Result<bool, StoreError> {
    writer
        .transact("recovering an order", async |client, statements| {
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
            let mut closing = Closing::default();
            if written == 0 {
                return Ok((false, closing));
            }
            move_payments(&mut closing, &[(id, state, reason)], now);
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
            closing.move_counters(&[("recovered", changes)], &reference);
            Ok((true, closing))
        })
        .await
}

/// The payments reported, each by its first message.
fn first_reports<'a>(deliveries: &[&'a Delivery]) -> Vec<(&'a Delivery, &'a Payment)> {
    let mut names = HashSet::new();
    deliveries
        .iter()
        .filter_map(|delivery| Some((*delivery, delivery.notice.payment.as_ref()?)))
        .filter(|(delivery, payment)| {
            names.insert((delivery.notice.provider, payment.payment_id.as_str()))
        })
        .collect()
}

/// Messages as columns.
struct Events<'a> {
    received_at: Vec<i64>,
    providers: Vec<&'a str>,
    event_ids: Vec<&'a str>,
    kinds: Vec<&'a str>,
    bodies: Vec<&'a [u8]>,
    payment_ids: Vec<Option<&'a str>>,
}

impl<'a> Events<'a> {
    fn of(deliveries: &[&'a Delivery]) -> Self {
        let notices = || deliveries.iter().map(|delivery| &delivery.notice);
        let payment_id = |payment: &'a Payment| payment.payment_id.as_str();
        Events {
            received_at: deliveries.iter().map(|one| one.received_at.0).collect(),
            providers: notices().map(|notice| notice.provider.as_str()).collect(),
            event_ids: notices().map(|notice| notice.event_id.as_str()).collect(),
            kinds: notices().map(|notice| notice.kind.as_str()).collect(),
            bodies: notices().map(|notice| &*notice.body).collect(),
            payment_ids: notices()
                .map(|notice| notice.payment.as_ref().map(payment_id))
                .collect(),
        }
    }

    async fn store(&self, client: &Connected, store: &Statement) -> Result<u64, Error> {
        let parameters: [&(dyn ToSql + Sync); 6] = [
            &self.received_at,
            &self.providers,
            &self.event_ids,
            &self.kinds,
            &self.bodies,
            &self.payment_ids,
        ];
        client.execute(store, &parameters).await
    }
}

/// The positions of the payments that are stored already.
async fn known_positions(
    client: &Connected,
    known: &Statement,
    [providers, payment_ids]: &[Vec<&str>; 2],
) -> Result<HashSet<usize>, Error> {
    if providers.is_empty() {
        return Ok(HashSet::new());
    }
    let rows = client.query(known, &[providers, payment_ids]).await?;
    let position = |row: &Row| usize::try_from(row.get::<_, i64>(0) - 1).ok();
    Ok(rows.iter().filter_map(position).collect())
}

/// New payments as columns, each with its initial state.
#[derive(Default)]
struct NewPayments<'a> {
    received_at: Vec<i64>,
    paid_at: Vec<Option<i64>>,
    providers: Vec<&'a str>,
    payment_ids: Vec<&'a str>,
    order_refs: Vec<&'a str>,
    order_ids: Vec<Option<i64>>,
    amounts: Vec<i64>,
    currencies: Vec<&'a str>,
    receipts: Vec<Option<&'a str>>,
    states: Vec<&'static str>,
    reasons: Vec<Option<&'static str>>,
}

impl<'a> NewPayments<'a> {
    fn add(&mut self, delivery: &'a Delivery, payment: &'a Payment, verdict: Option<Verdict>) {
        let (state, reason) = match verdict {
            None => (PaymentState::Orphan, None),
            Some(Verdict::Pay) => (PaymentState::Matched, None),
            Some(Verdict::Refund { reason, .. }) => (PaymentState::RefundDue, Some(reason)),
        };
        let (received_at, paid_at) = (delivery.received_at, delivery.paid_at());
        self.received_at.push(received_at.0);
        self.paid_at
            .push((paid_at < received_at).then_some(paid_at.0));
        self.providers.push(delivery.notice.provider.as_str());
        self.payment_ids.push(&payment.payment_id);
        self.order_refs.push(&payment.order_ref);
        self.order_ids.push(payment.order_id().map(OrderId::as_i64));
        self.amounts.push(payment.amount);
        self.currencies.push(payment.currency.as_str());
        self.receipts.push(payment.receipt.as_deref());
        self.states.push(state.as_str());
        self.reasons.push(reason.map(RefundReason::as_str));
    }

    fn store(self, closing: &mut Closing<'a>, arrival: Arrival) {
        if self.payment_ids.is_empty() {
            return;
        }
        closing.add(
            Sql::Payments,
            vec![
                Box::new(self.received_at),
                Box::new(self.paid_at),
                Box::new(self.providers),
                Box::new(self.payment_ids),
                Box::new(self.order_refs),
                Box::new(self.order_ids),
                Box::new(self.amounts),
                Box::new(self.currencies),
                Box::new(self.receipts),
                Box::new(self.states),
                Box::new(self.reasons),
                Box::new(arrival.now.0),
                Box::new(arrival.check_at.0),
            ],
        );
    }
}
