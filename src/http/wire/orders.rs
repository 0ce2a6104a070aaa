//! The JSON of orders: the bodies that place them, and the views that show them.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::headers::parse_key;
use super::json::{self, from_object};
use super::text::Text;
use super::time::Time;
use crate::http::problem::Problem;
use crate::order::receipt::{Receipt, ReceiptKeys, SignedParts};
use crate::order::{
    Currency, KeyHash, Order, OrderId, OrderStatus, Quantity, SkuId, SkuNumber, UnixMillis, UserId,
};
use crate::pipeline::orders::lookup::Found;
use crate::state::State;
use crate::store::postgres::orders::StoredOrder;

/// Longest `attributes` in bytes, as it came.
pub const ATTRIBUTES_BYTES_MAX: usize = 1_024;

#[derive(Debug, Deserialize)]
struct OrderMembers<'a> {
    #[serde(borrow)]
    user_id: Text<'a>,
    #[serde(borrow)]
    sku_id: Text<'a>,
    #[serde(default = "one")]
    quantity: u32,
    #[serde(default)]
    adjustment: i64,
    #[serde(borrow, default)]
    attributes: Option<&'a RawValue>,
    /// Join the waiting list if no units are free.
    #[serde(default)]
    waitlist: bool,
    /// Only on a line of a batch; a single order has the header.
    #[serde(borrow, default)]
    idempotency_key: Option<Text<'a>>,
}

fn one() -> u32 {
    1
}

/// The body of `POST /v1/orders`, every member checked on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderBody<'a> {
    /// The buyer.
    pub user_id: UserId,
    /// The SKU.
    pub sku_id: SkuId,
    /// Units.
    pub quantity: Quantity,
    /// The shop's surcharge or discount, in minor units.
    pub adjustment: i64,
    /// The shop's own object, unchanged.
    pub attributes: Option<&'a str>,
    /// Join the waiting list if no units are free.
    pub waitlist: bool,
}

impl<'a> OrderBody<'a> {
    /// Parses and checks a body.
    ///
    /// # Errors
    /// A `400` problem: `malformed_json`, `unknown_field` or `invalid_field`, naming the member.
    pub fn parse(body: &'a [u8]) -> Result<Self, Problem> {
        let members: OrderMembers<'a> = from_object(body)?;
        if members.idempotency_key.is_some() {
            let detail = "idempotency_key: belongs into the Idempotency-Key header";
            return Err(Problem::new(400, "unknown_field", detail));
        }
        Self::check(members)
    }

    fn check(members: OrderMembers<'a>) -> Result<Self, Problem> {
        let field = |name: &str, what: &dyn fmt::Display| {
            Problem::new(400, "invalid_field", format!("{name}: {what}"))
        };
        let attributes = match members.attributes.map(RawValue::get) {
            None => None,
            Some(raw) if !raw.starts_with('{') => {
                return Err(field("attributes", &"must be an object"));
            }
            Some(raw) if raw.len() > ATTRIBUTES_BYTES_MAX => {
                return Err(field(
                    "attributes",
                    &format!(
                        "is {} bytes long, {ATTRIBUTES_BYTES_MAX} at most",
                        raw.len()
                    ),
                ));
            }
            checked => checked,
        };
        Ok(OrderBody {
            user_id: UserId::new(members.user_id.as_str()).map_err(|e| field("user_id", &e))?,
            sku_id: SkuId::new(members.sku_id.as_str()).map_err(|e| field("sku_id", &e))?,
            quantity: Quantity::new(members.quantity)
                .ok_or_else(|| field("quantity", &format!("must be 1 to {}", Quantity::MAX)))?,
            adjustment: members.adjustment,
            attributes,
            waitlist: members.waitlist,
        })
    }
}

/// One line of `POST /v1/orders:batch`.
#[derive(Debug)]
pub struct BatchLine<'a> {
    /// The order.
    pub body: OrderBody<'a>,
    /// Its idempotency key, which is valid.
    pub key: Option<Cow<'a, str>>,
}

impl<'a> BatchLine<'a> {
    /// Parses and checks a line.
    ///
    /// # Errors
    /// As [`OrderBody::parse`], and `invalid_idempotency_key`.
    pub fn parse(line: &'a [u8]) -> Result<Self, Problem> {
        let mut members: OrderMembers<'a> = from_object(line)?;
        let key = members.idempotency_key.take().map(Text::into_inner);
        key.as_deref().map(parse_key).transpose()?;
        Ok(BatchLine {
            body: OrderBody::check(members)?,
            key,
        })
    }

    /// The hash of its key.
    pub fn key_hash(&self) -> Option<KeyHash> {
        let key = self.key.as_deref()?;
        parse_key(key).ok().map(KeyHash::of)
    }
}

/// A page of a user's orders.
#[derive(Debug, Serialize)]
pub struct OrderList<'a> {
    /// Newest first.
    pub orders: Vec<OrderView<'a>>,
    /// The `before` of the next page, if there may be one.
    pub next_before: Option<OrderId>,
}

impl<'a> OrderList<'a> {
    /// A page of at most `limit` orders, the newest first.
    pub fn of(orders: Vec<OrderView<'a>>, limit: usize) -> Self {
        let last = orders.last().filter(|_| orders.len() == limit);
        OrderList {
            next_before: last.map(OrderView::order_id),
            orders,
        }
    }
}

/// An order in an answer.
#[derive(Debug, Serialize)]
pub struct OrderView<'a> {
    order_id: OrderId,
    user_id: &'a str,
    sku_id: &'a str,
    quantity: u32,
    adjustment: i64,
    amount: i64,
    currency: &'a str,
    status: &'static str,
    /// Only of an order that waits for units: the number of orders ahead of it, plus one.
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<usize>,
    /// Only of an entry of a draw: finds it in the published draw.
    #[serde(skip_serializing_if = "Option::is_none")]
    entry_token: Option<String>,
    /// Only of an order whose money is or was to be refunded.
    #[serde(skip_serializing_if = "Option::is_none")]
    refund_reason: Option<&'a str>,
    created_at: Time,
    /// `null` if it waits for units, or has never had any.
    expires_at: Option<Time>,
    /// Only of an order that exists, or will; `null` if it waits for units, or has never had any.
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<Option<Receipt>>,
    /// Only of an order that was accepted just now.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated_wait_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attributes: Option<&'a RawValue>,
}

impl<'a> OrderView<'a> {
    /// Its id.
    pub fn order_id(&self) -> OrderId {
        self.order_id
    }

    /// An order in flight or a recent one, with its position if it waits for units.
    pub fn now(order: &'a Order, status: OrderStatus, state: &State, keys: &ReceiptKeys) -> Self {
        Self::of(order, status, keys).placed(order.sku, status, state)
    }

    /// The same with its position if it waits for units. An entry of a draw has its token, and a position once the draw is
    /// made.
    fn placed(mut self, sku: SkuNumber, status: OrderStatus, state: &State) -> Self {
        let Some(sku) = state.catalogue.by_number(sku) else {
            return self;
        };
        if status == OrderStatus::Waitlisted && sku.is_drawn() {
            self.position = sku.waitlist().position(self.order_id);
        }
        let entries_until = sku.terms().draw.as_ref().map(|draw| draw.at);
        if let Some(until) = entries_until
            && self.created_at.0 < until
            && let Some(draw) = sku.draw()
        {
            let token = draw.token(&UserId::from_row(self.user_id));
            self.entry_token = Some(token.to_string());
        }
        self
    }

    /// An order in flight, or one whose row was just committed. An order that may never exist has no
    /// receipt.
    pub fn of(order: &'a Order, status: OrderStatus, keys: &ReceiptKeys) -> Self {
        let has_receipt = !matches!(status, OrderStatus::Undecided | OrderStatus::Failed);
        OrderView {
            order_id: order.id,
            user_id: order.user_id.as_str(),
            sku_id: order.sku_id.as_str(),
            quantity: order.quantity.get(),
            adjustment: order.adjustment,
            amount: order.amount,
            currency: order.currency.as_str(),
            status: status.as_str(),
            position: None,
            entry_token: None,
            refund_reason: None,
            created_at: Time(order.created_at),
            expires_at: until(order.expires_at),
            receipt: has_receipt
                .then(|| (!order.waits()).then(|| keys.sign(&SignedParts::from(order)))),
            estimated_wait_ms: None,
            attributes: order.attributes.as_deref().and_then(json::raw),
        }
    }

    /// An order that is durable in the queue, with the expected time until it is a row.
    pub fn accepted(order: &'a Order, estimated_wait_ms: u64, keys: &ReceiptKeys) -> Self {
        OrderView {
            estimated_wait_ms: Some(estimated_wait_ms),
            ..Self::of(order, OrderStatus::Accepted, keys)
        }
    }

    /// An order, wherever it was found.
    pub fn found(order: &'a Found, state: &State, keys: &ReceiptKeys) -> Self {
        match order {
            Found::InFlight(pending) => {
                let is_durable = pending.slot.is_durable();
                let status = if is_durable {
                    pending.order.acknowledged_status()
                } else {
                    OrderStatus::Undecided
                };
                Self::now(&pending.order, status, state, keys)
            }
            Found::OnDisk(order) => Self::now(order, order.acknowledged_status(), state, keys),
            Found::Recent(pending) => {
                let order = &pending.order;
                Self::now(order, order.status_in_time(), state, keys)
            }
            Found::Stored(order) => Self::stored_now(order, state, keys),
        }
    }

    /// An order from the database as it stands now: one past its payment deadline is shown as expired, even if its
    /// row still says `pending_payment`.
    pub fn stored_now(order: &'a StoredOrder, state: &State, keys: &ReceiptKeys) -> Self {
        let is_past = order.status == OrderStatus::PendingPayment
            && state
                .orphans
                .is_late(order.id, order.expires_at, state.ids.real_now());
        let status = if is_past {
            OrderStatus::Expired
        } else {
            order.status
        };
        Self::stored(order, status, keys).placed(order.sku, status, state)
    }

    /// An order from the database, whose status is `status` by now.
    pub fn stored(order: &'a StoredOrder, status: OrderStatus, keys: &ReceiptKeys) -> Self {
        let sign = |currency| keys.sign(&order.signed_parts(currency));
        // A receipt recovers a lost order, so an order without units has none.
        let currency = Currency::new(&order.currency)
            .ok()
            .filter(|_| order.expires_at != UnixMillis::NEVER);
        let has_receipt = status != OrderStatus::Failed;
        OrderView {
            order_id: order.id,
            user_id: &order.user_id,
            sku_id: &order.sku_id,
            quantity: order.quantity,
            adjustment: order.adjustment,
            amount: order.amount,
            currency: &order.currency,
            status: status.as_str(),
            position: None,
            entry_token: None,
            refund_reason: order.refund_reason.as_deref(),
            created_at: Time(order.created_at),
            expires_at: until(order.expires_at),
            receipt: has_receipt.then(|| currency.map(sign)),
            estimated_wait_ms: None,
            attributes: order.attributes.as_deref().and_then(json::raw),
        }
    }
}

/// An order that was passed on to another node, whose answer did not come. It may or may not exist.
#[derive(Debug, Serialize)]
pub struct UndecidedView<'a> {
    /// Always null: the id is not known here.
    order_id: Option<OrderId>,
    user_id: &'a str,
    sku_id: &'a str,
    quantity: u32,
    adjustment: i64,
    status: &'static str,
    /// A retry under this key tells what became of it, and places it if nothing did.
    idempotency_key: &'a str,
}

impl<'a> UndecidedView<'a> {
    /// The order that `body` asked for, under `key`.
    pub fn new(body: &'a OrderBody<'_>, key: &'a str) -> Self {
        UndecidedView {
            order_id: None,
            user_id: body.user_id.as_str(),
            sku_id: body.sku_id.as_str(),
            quantity: body.quantity.get(),
            adjustment: body.adjustment,
            status: OrderStatus::Undecided.as_str(),
            idempotency_key: key,
        }
    }
}

/// The end of the time to pay; `None` if it has not begun.
fn until(expires_at: UnixMillis) -> Option<Time> {
    (expires_at != UnixMillis::NEVER).then_some(Time(expires_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(body: &str) -> (&'static str, String) {
        let problem = OrderBody::parse(body.as_bytes()).unwrap_err();
        assert_eq!(problem.status, 400);
        (problem.code, problem.detail.into_owned())
    }

    #[test]
    fn a_body_is_read_with_its_defaults() {
        let body = OrderBody::parse(br#"{"user_id": 42, "sku_id": "A"}"#).unwrap();
        assert_eq!(body.user_id.as_str(), "42");
        assert_eq!(
            (body.quantity, body.adjustment, body.attributes),
            (Quantity::ONE, 0, None)
        );
        for (integer, text) in [
            ("0", "0"),
            ("-0", "0"),
            ("-7", "-7"),
            ("18446744073709551616", "18446744073709551616"),
            ("-9223372036854775809", "-9223372036854775809"),
        ] {
            let json = format!(r#"{{"user_id":{integer},"sku_id":{integer}}}"#);
            let body = OrderBody::parse(json.as_bytes()).unwrap();
            assert_eq!((body.user_id.as_str(), body.sku_id.as_str()), (text, text));
        }
        let body = OrderBody::parse(
            br#"{"user_id":"u\u002d1","sku_id":"A","quantity":3,"adjustment":-5,"attributes":{"a" : [1, 2]}}"#,
        )
        .unwrap();
        assert_eq!(body.user_id.as_str(), "u-1");
        assert_eq!(body.attributes, Some(r#"{"a" : [1, 2]}"#));
    }

    #[test]
    fn each_mistake_has_its_code_and_names_its_member() {
        let cases = [
            ("", "malformed_json", "EOF"),
            (
                "{\"user_id\":\"u\",\"sku_id\":\"A\"} x",
                "malformed_json",
                "trailing",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","quantitiy":2}"#,
                "unknown_field",
                "quantitiy",
            ),
            (
                r#"{"user_id":"u","user_id":"v","sku_id":"A"}"#,
                "invalid_field",
                "duplicate field `user_id`",
            ),
            (r#"{"user_id":"u"}"#, "invalid_field", "sku_id"),
            (r#"{"user_id":"","sku_id":"A"}"#, "invalid_field", "user_id"),
            (
                r#"{"user_id":"a b","sku_id":"A"}"#,
                "invalid_field",
                "user_id",
            ),
            (
                r#"{"user_id":1.5,"sku_id":"A"}"#,
                "invalid_field",
                "integer",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","quantity":0}"#,
                "invalid_field",
                "quantity",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","quantity":10001}"#,
                "invalid_field",
                "quantity",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","quantity":-1}"#,
                "invalid_field",
                "",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","quantity":"1"}"#,
                "invalid_field",
                "",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","quantity":1.0}"#,
                "invalid_field",
                "",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","adjustment":9223372036854775808}"#,
                "invalid_field",
                "",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","attributes":[]}"#,
                "invalid_field",
                "attributes",
            ),
            (
                r#"{"user_id":"\ud800","sku_id":"A"}"#,
                "invalid_field",
                "user_id",
            ),
            (
                r#"{"user_id":"a\u0000","sku_id":"A"}"#,
                "invalid_field",
                "user_id",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","quantity":1e3}"#,
                "invalid_field",
                "",
            ),
            (
                r#"{"user_id":"u","sku_id":"A","quantity":9223372036854775808}"#,
                "invalid_field",
                "",
            ),
            (
                r#"{"user_id":true,"sku_id":"A"}"#,
                "invalid_field",
                "integer",
            ),
            ("[]", "invalid_field", "expected an object"),
            (r#"["u","A",1,0]"#, "invalid_field", "expected an object"),
            (
                r#"{"user_id":-0.0,"sku_id":"A"}"#,
                "invalid_field",
                "user_id",
            ),
            (
                r#"{"user_id":1e3,"sku_id":"A"}"#,
                "invalid_field",
                "user_id",
            ),
            (r#"{"user_id":"u","sku_id":[1]}"#, "invalid_field", "sku_id"),
            (
                r#"{"user_id":1234567890123456789012345678901234567890123456789,"sku_id":"A"}"#,
                "invalid_field",
                "user_id",
            ),
            (
                r#"{"user_id":"u","sku_id":123456789012345678901234567890123}"#,
                "invalid_field",
                "sku_id",
            ),
            (r#"{"user_id":01,"sku_id":"A"}"#, "malformed_json", ""),
        ];
        for (body, expected, named) in cases {
            let (code, detail) = code(body);
            assert_eq!(code, expected, "{body}: {detail}");
            assert!(detail.contains(named), "{body}: {detail}");
        }
        let long = format!(
            r#"{{"user_id":"u","sku_id":"A","attributes":{{"a":"{}"}}}}"#,
            "x".repeat(1024)
        );
        assert_eq!(code(&long).0, "invalid_field");
    }
}
