//! An event out of a change.

use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::Event;
use crate::order::payment::PaymentState;
use crate::order::receipt::{Receipt, ReceiptKeys};
use crate::order::{Currency, OrderId, OrderStatus, UnixMillis};
use crate::store::events::{Change, Changed, ChangedPayment};
use crate::store::postgres::orders::StoredOrder;

/// Members of an order that are told only if they are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Include {
    /// The shop's own object.
    pub attributes: bool,
    /// The order's signed form.
    pub receipt: bool,
}

/// Forms events.
#[derive(Clone, Debug)]
pub struct Former {
    receipts: Arc<ReceiptKeys>,
    include: Include,
}

#[derive(Serialize)]
struct Envelope<'a, D> {
    id: &'a str,
    r#type: &'static str,
    timestamp: Time,
    data: D,
    /// Only of an event that is told again from the rows.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    resync: bool,
}

/// RFC 3339, UTC, milliseconds.
struct Time(UnixMillis);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// An order as the data plane shows it, with its status before.
#[derive(Serialize)]
struct OrderData<'a> {
    order_id: OrderId,
    user_id: &'a str,
    sku_id: &'a str,
    quantity: u32,
    adjustment: i64,
    amount: i64,
    currency: &'a str,
    status: &'static str,
    previous_status: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refund_reason: Option<&'a str>,
    created_at: Time,
    /// `null` while it waits for units, and if it never had any.
    expires_at: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<Receipt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attributes: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct PaymentData<'a> {
    id: i64,
    provider: &'a str,
    payment_id: &'a str,
    order_ref: &'a str,
    order_id: Option<OrderId>,
    amount: i64,
    currency: &'a str,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    refund_reason: Option<&'static str>,
    received_at: Time,
}

impl Former {
    /// Forms events with these members.
    pub fn new(receipts: Arc<ReceiptKeys>, include: Include) -> Self {
        Former { receipts, include }
    }

    /// The event of a change; `None` if it makes none. `resync`: it is told again from the row.
    pub fn form(&self, change: &Change, resync: bool) -> Option<Event> {
        let (id, subject, kind, body);
        match &change.of {
            Changed::Order(order, previous) => {
                kind = order_kind(order.status)?;
                subject = order.id.to_string();
                id = format!("{subject}:{}", change.transition);
                body = envelope(&id, kind, change, self.order(order, *previous), resync);
            }
            Changed::Payment(payment) => {
                kind = payment_kind(payment.state)?;
                let name = format!("payment-{}", payment.id);
                id = format!("{name}:{}", change.transition);
                subject = payment.order_id.map_or(name, |order| order.to_string());
                body = envelope(&id, kind, change, payment_data(payment), resync);
            }
        }
        Some(Event {
            id,
            subject,
            kind: kind.to_owned(),
            body,
            at: change.at,
            traceparent: change.traceparent.clone(),
        })
    }

    fn order<'a>(&self, order: &'a StoredOrder, previous: Option<OrderStatus>) -> OrderData<'a> {
        let currency = Currency::new(&order.currency).ok();
        // An order that never had units has no receipt.
        let never = order.expires_at == UnixMillis::NEVER;
        let currency = currency
            .filter(|_| self.include.receipt && order.status != OrderStatus::Failed && !never);
        let attributes = order.attributes.as_deref();
        OrderData {
            order_id: order.id,
            user_id: &order.user_id,
            sku_id: &order.sku_id,
            quantity: order.quantity,
            adjustment: order.adjustment,
            amount: order.amount,
            currency: &order.currency,
            status: order.status.as_str(),
            previous_status: previous.map(OrderStatus::as_str),
            refund_reason: order.refund_reason.as_deref(),
            created_at: Time(order.created_at),
            expires_at: (!never).then_some(Time(order.expires_at)),
            receipt: currency.map(|currency| self.receipts.sign(&order.signed_parts(currency))),
            attributes: attributes
                .filter(|_| self.include.attributes)
                .and_then(|text| serde_json::from_str(text).ok()),
        }
    }
}

/// The type of the event of an order that has got this status.
fn order_kind(status: OrderStatus) -> Option<&'static str> {
    match status {
        // Neither is ever a row.
        OrderStatus::Accepted | OrderStatus::Undecided => None,
        OrderStatus::Waitlisted => Some("order.waitlisted"),
        OrderStatus::PendingPayment => Some("order.placed"),
        OrderStatus::Paid => Some("order.paid"),
        OrderStatus::Cancelled => Some("order.cancelled"),
        OrderStatus::Expired => Some("order.expired"),
        OrderStatus::Failed => Some("order.failed"),
        OrderStatus::RefundDue => Some("order.refund_due"),
        OrderStatus::Refunded => Some("order.refunded"),
    }
}

fn payment_kind(state: PaymentState) -> Option<&'static str> {
    match state {
        PaymentState::Orphan => Some("payment.orphaned"),
        PaymentState::RefundDue => Some("payment.refund_due"),
        // The order's own event tells it.
        PaymentState::Matched | PaymentState::Refunded => None,
    }
}

fn payment_data(payment: &ChangedPayment) -> PaymentData<'_> {
    PaymentData {
        id: payment.id,
        provider: &payment.provider,
        payment_id: &payment.payment_id,
        order_ref: &payment.order_ref,
        order_id: payment.order_id,
        amount: payment.amount,
        currency: &payment.currency,
        state: payment.state.as_str(),
        refund_reason: payment.refund_reason.map(|reason| reason.as_str()),
        received_at: Time(payment.received_at),
    }
}

fn envelope(
    id: &str,
    kind: &'static str,
    change: &Change,
    data: impl Serialize,
    resync: bool,
) -> String {
    let envelope = Envelope {
        id,
        r#type: kind,
        timestamp: Time(change.at),
        data,
        resync,
    };
    // It has neither maps with keys that are no texts nor values that refuse to be written.
    serde_json::to_string(&envelope).unwrap_or_default()
}
