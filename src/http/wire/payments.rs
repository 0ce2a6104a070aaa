//! The JSON of payments, as operators see and close them.

use serde::{Deserialize, Serialize};

use super::json::from_object;
use super::time::Time;
use crate::http::problem::Problem;
use crate::order::receipt::{ReceiptKeys, ReceiptOrder};
use crate::order::{Currency, OrderId};
use crate::state::stock::Catalogue;
use crate::store::postgres::payments::StoredPayment;
use crate::store::settlement::refunds::RefundNote;

/// Longest note and reference in bytes.
const TEXT_BYTES_MAX: usize = 1_000;

/// A payment as operators see it: with everything that is needed to decide on it.
#[derive(Debug, Serialize)]
pub struct PaymentView<'a> {
    id: i64,
    provider: &'static str,
    payment_id: &'a str,
    /// The order as the provider named it.
    order_ref: &'a str,
    order_id: Option<OrderId>,
    /// Whether that order is there.
    has_order: bool,
    amount: i64,
    currency: Currency,
    state: &'static str,
    refund_reason: Option<&'static str>,
    received_at: Time,
    /// When it counts as made: at its arrival, or earlier by its provider's signed time.
    paid_at: Time,
    changed_at: Time,
    /// How often its order was looked for.
    checks: i32,
    /// When it is looked for again.
    next_check_at: Option<Time>,
    receipt: Option<&'a str>,
    /// The content of its receipt, if it is ours.
    order_in_receipt: Option<ReceiptView>,
    reference: Option<&'a str>,
    note: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct ReceiptView {
    order_id: OrderId,
    user_id: String,
    /// `null` where it is not known any more.
    sku_id: Option<String>,
    quantity: u32,
    adjustment: i64,
    amount: i64,
    currency: Currency,
    created_at: Time,
    expires_at: Time,
}

impl ReceiptView {
    fn of(order: &ReceiptOrder, catalogue: &Catalogue) -> Self {
        let sku = catalogue.in_receipt(order.sku);
        ReceiptView {
            order_id: order.id,
            user_id: order.user_id.to_string(),
            sku_id: sku.map(|sku| sku.id.to_string()),
            quantity: order.quantity.get(),
            adjustment: order.adjustment,
            amount: order.amount,
            currency: order.currency,
            created_at: Time(order.created_at),
            expires_at: Time(order.expires_at),
        }
    }
}

impl<'a> PaymentView<'a> {
    /// A payment as it is stored.
    pub fn of(payment: &'a StoredPayment, keys: &ReceiptKeys, catalogue: &Catalogue) -> Self {
        let receipt = payment.receipt.as_deref();
        let opened =
            receipt.and_then(|text| keys.open(text, payment.order_id, payment.amount).ok());
        let is_orphan = payment.state == crate::order::payment::PaymentState::Orphan;
        PaymentView {
            id: payment.id,
            provider: payment.provider.as_str(),
            payment_id: &payment.payment_id,
            order_ref: &payment.order_ref,
            order_id: payment.order_id,
            has_order: payment.has_order,
            amount: payment.amount,
            currency: payment.currency,
            state: payment.state.as_str(),
            refund_reason: payment.refund_reason.map(|reason| reason.as_str()),
            received_at: Time(payment.received_at),
            paid_at: Time(payment.paid_at),
            changed_at: Time(payment.changed_at),
            checks: payment.checks,
            next_check_at: is_orphan.then_some(Time(payment.check_at)),
            receipt,
            order_in_receipt: opened.map(|order| ReceiptView::of(&order, catalogue)),
            reference: payment.reference.as_deref(),
            note: payment.note.as_deref(),
        }
    }
}

/// The body of `POST /admin/v1/orders/{order_id}/refunded`.
#[derive(Debug, Deserialize)]
pub struct RefundedBody {
    reference: String,
    #[serde(default)]
    note: Option<String>,
    #[serde(default)]
    restock: bool,
}

/// The body of `POST /admin/v1/orphan-payments/{id}/close`.
#[derive(Debug, Deserialize)]
pub struct CloseBody {
    note: String,
    #[serde(default)]
    reference: Option<String>,
}

impl RefundedBody {
    /// Parses and checks a body.
    ///
    /// # Errors
    /// A `400` problem that names the member.
    pub fn parse(body: &[u8]) -> Result<RefundNote, Problem> {
        let body: Self = from_object(body)?;
        Ok(RefundNote {
            reference: Some(text("reference", body.reference)?),
            note: body.note.map(|note| text("note", note)).transpose()?,
            restock: body.restock,
        })
    }
}

impl CloseBody {
    /// Parses and checks a body.
    ///
    /// # Errors
    /// A `400` problem that names the member.
    pub fn parse(body: &[u8]) -> Result<RefundNote, Problem> {
        let body: Self = from_object(body)?;
        let reference = body.reference.map(|one| text("reference", one));
        Ok(RefundNote {
            reference: reference.transpose()?,
            note: Some(text("note", body.note)?),
            restock: false,
        })
    }
}

fn text(name: &str, text: String) -> Result<String, Problem> {
    if text.trim().is_empty() || text.len() > TEXT_BYTES_MAX || text.contains('\0') {
        let detail = format!("{name}: must be 1 to {TEXT_BYTES_MAX} bytes, without NUL");
        return Err(Problem::new(400, "invalid_field", detail));
    }
    Ok(text)
}
