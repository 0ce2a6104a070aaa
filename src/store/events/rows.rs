//! A change out of a decoded row.

use super::{Change, Changed, ChangedPayment, Table};
use crate::order::payment::{PaymentState, RefundReason};
use crate::order::{KeyHash, OrderId, OrderStatus, PayloadHash, SkuNumber, UnixMillis};
use crate::store::StoreError;
use crate::store::pgoutput::{Message, Row};
use crate::store::postgres::orders::StoredOrder;

/// The change that a message tells of; `None` if it makes no event. Names of SKUs are filled in later.
pub(super) fn change_of(message: &Message, at: UnixMillis) -> Result<Option<Change>, StoreError> {
    let (old, new) = match message {
        Message::Insert(new) => (None, new),
        Message::Update { old, new } => (old.as_ref(), new),
        Message::Other => return Ok(None),
    };
    let (table, of) = match new.table() {
        "orders" => (Table::Orders, Some(order(new, false)?)),
        "dead_letters" if !is_same(old, new, "status")? => {
            (Table::DeadLetters, Some(order(new, true)?))
        }
        "payments" if !is_same(old, new, "state")? => (Table::Payments, payment(new)?),
        _ => return Ok(None),
    };
    let Some(of) = of else {
        return Ok(None);
    };
    let transition = new.integer("transition")?.unwrap_or(1);
    let transition = u32::try_from(transition)
        .map_err(|_| new.unexpected("transition", "is no number of a transition"))?;
    Ok(Some(Change {
        table,
        transition,
        at,
        traceparent: match table {
            Table::Orders | Table::DeadLetters => {
                new.text_if_there("traceparent")?.map(str::to_owned)
            }
            Table::Payments => None,
        },
        of,
    }))
}

/// Whether a change left a column as it was.
fn is_same(old: Option<&Row>, new: &Row, column: &str) -> Result<bool, StoreError> {
    match old {
        Some(old) => Ok(old.bytes(column)? == new.bytes(column)?),
        None => Ok(false),
    }
}

/// The status with a code of `previous_status`.
pub(super) fn previous(code: i16) -> Option<OrderStatus> {
    match code {
        0 => Some(OrderStatus::Failed),
        code => OrderStatus::from_code(code),
    }
}

fn order(row: &Row, is_dead_letter: bool) -> Result<Changed, StoreError> {
    let number = |column: &str| row.must(column, row.integer(column)?);
    let text = |column: &str| row.must(column, row.text(column)?).map(str::to_owned);
    let moment = |column: &str| row.must(column, row.moment(column)?);
    let code = |column: &str| -> Result<Option<i16>, StoreError> {
        Ok(row
            .integer(column)?
            .and_then(|code| i16::try_from(code).ok()))
    };
    let status = match code("status")? {
        None if is_dead_letter => Some(OrderStatus::Failed),
        code => code.and_then(OrderStatus::from_code),
    };
    let id = OrderId::from_i64(number("order_id")?);
    let order = StoredOrder {
        id: id.ok_or_else(|| row.unexpected("order_id", "is no order id"))?,
        user_id: text("user_id")?,
        sku_id: String::new(),
        sku: SkuNumber(
            i32::try_from(number("sku")?)
                .map_err(|_| row.unexpected("sku", "is no number of a SKU"))?,
        ),
        quantity: u32::try_from(number("quantity")?)
            .map_err(|_| row.unexpected("quantity", "is negative"))?,
        adjustment: number("adjustment")?,
        amount: number("amount")?,
        currency: text("currency")?,
        status: status.ok_or_else(|| row.unexpected("status", "is not known to this release"))?,
        created_at: moment("created_at")?,
        expires_at: moment("expires_at")?,
        attributes: row.text("attributes")?.map(str::to_owned),
        refund_reason: row.text("refund_reason")?.map(str::to_owned),
        key: row
            .bytes("key_hash")?
            .and_then(|bytes| bytes.try_into().ok())
            .map(KeyHash),
        payload: PayloadHash(number("payload_hash")?.cast_unsigned()),
    };
    let previous = code("previous_status")?.and_then(previous);
    Ok(Changed::Order(Box::new(order), previous))
}

/// A payment in a state that somebody has to hear of.
fn payment(row: &Row) -> Result<Option<Changed>, StoreError> {
    let number = |column: &str| row.must(column, row.integer(column)?);
    let text = |column: &str| row.must(column, row.text(column)?).map(str::to_owned);
    let state = PaymentState::from_word(&text("state")?)
        .ok_or_else(|| row.unexpected("state", "is not known to this release"))?;
    match state {
        PaymentState::Orphan | PaymentState::RefundDue => {}
        PaymentState::Matched | PaymentState::Refunded => return Ok(None),
    }
    let payment = ChangedPayment {
        id: number("id")?,
        provider: text("provider")?,
        payment_id: text("payment_id")?,
        order_ref: text("order_ref")?,
        order_id: row.integer("order_id")?.and_then(OrderId::from_i64),
        amount: number("amount")?,
        currency: text("currency")?,
        state,
        refund_reason: row.text("refund_reason")?.and_then(RefundReason::from_word),
        received_at: row.must("received_at", row.moment("received_at")?)?,
    };
    Ok(Some(Changed::Payment(Box::new(payment))))
}
