//! The rows of the sale.

use crate::loadgen::checker::{OrderRow, PaymentRow, StoredRows};
use crate::order::UnixMillis;
use crate::order::payment::PaymentState;
use crate::store::postgres::Database;
use crate::store::postgres::orders::{self, StoredOrder};
use crate::store::postgres::payments::{self, StoredPayment};

/// Payments that are read at once.
const PAGE: i64 = 5_000;

/// Reads the orders of buyers with this prefix, and the payments that came since `began_at`.
pub async fn read(
    database: &Database,
    user_prefix: &str,
    began_at: UnixMillis,
) -> anyhow::Result<StoredRows> {
    let mut rows = StoredRows::default();
    orders::read_all(database, |order| {
        if order.user_id.starts_with(user_prefix) {
            rows.orders.push(order_row(order));
        }
    })
    .await?;
    let mut before = i64::MAX;
    loop {
        // Newest first.
        let page = payments::list(database, PaymentState::ALL, false, before, PAGE).await?;
        let is_last = page.len() < PAGE as usize;
        for payment in page {
            if payment.received_at < began_at {
                return Ok(rows);
            }
            before = payment.id;
            rows.payments.push(payment_row(payment));
        }
        if is_last {
            return Ok(rows);
        }
    }
}

fn order_row(order: StoredOrder) -> OrderRow {
    OrderRow {
        order_id: order.id.as_i64(),
        user: order.user_id,
        sku: order.sku_id,
        quantity: order.quantity.into(),
        adjustment: order.adjustment,
        amount: order.amount,
        status: order.status.to_string(),
        refund_reason: order.refund_reason,
        attributes: order
            .attributes
            .map(|text| serde_json::from_str(&text).unwrap_or_default()),
    }
}

fn payment_row(payment: StoredPayment) -> PaymentRow {
    PaymentRow {
        id: payment.id,
        payment: payment.payment_id,
        order: payment.order_ref,
        amount: payment.amount,
        currency: payment.currency.as_str().to_owned(),
        state: payment.state.to_string(),
        refund_reason: payment.refund_reason.map(|why| why.as_str().to_owned()),
    }
}
