//! The JSON of both planes: what is read, and how it is checked; what is written.

pub mod json;
pub mod payments;
mod text;
mod time;
pub mod write;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use self::json::from_object;
use self::text::Text;
use super::problem::Problem;
use crate::order::receipt::{Receipt, ReceiptKeys, SignedParts};
use crate::order::{
    Currency, IdempotencyKey, KeyHash, Order, OrderId, OrderStatus, Quantity, SkuId, SkuTag,
    UnixMillis, UserId,
};
use crate::state::stock::{SaleTerms, Sku};
use crate::store::postgres::dead_letters::DeadLetter;
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
    /// On a line of a batch only; alone, an order has the header.
    #[serde(borrow, default)]
    idempotency_key: Option<Text<'a>>,
}

fn one() -> u32 {
    1
}

/// The body of `POST /v1/orders`, every member checked on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderBody<'a> {
    /// Who buys.
    pub user_id: UserId,
    /// What.
    pub sku_id: SkuId,
    /// How many units.
    pub quantity: Quantity,
    /// What the shop adds or takes off, in minor units.
    pub adjustment: i64,
    /// The shop's own object as it came.
    pub attributes: Option<&'a str>,
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
        })
    }
}

/// One line of `POST /v1/orders:batch`.
#[derive(Debug)]
pub struct BatchLine<'a> {
    /// The order.
    pub body: OrderBody<'a>,
    /// The hash of its key.
    pub key: Option<KeyHash>,
}

impl<'a> BatchLine<'a> {
    /// Parses and checks a line.
    ///
    /// # Errors
    /// As [`OrderBody::parse`], and `invalid_idempotency_key`.
    pub fn parse(line: &'a [u8]) -> Result<Self, Problem> {
        let mut members: OrderMembers<'a> = from_object(line)?;
        let key = members.idempotency_key.take();
        let key = key
            .as_ref()
            .map(|key| parse_key(key.as_str()))
            .transpose()?;
        Ok(BatchLine {
            body: OrderBody::check(members)?,
            key: key.map(KeyHash::of),
        })
    }
}

/// A page of a user's orders.
#[derive(Debug, Serialize)]
pub struct OrderList<'a> {
    /// Newest first.
    pub orders: Vec<OrderView<'a>>,
    /// The `before` of the next page, where there may be one.
    pub next_before: Option<OrderId>,
}

/// Members of a query string.
pub mod query {
    use super::Problem;

    /// The value under a name, as it came.
    pub fn value<'a>(query: &'a str, name: &str) -> Option<&'a str> {
        query
            .split('&')
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// Refuses what a request could not honour: parameters other than `names`, and one that comes
    /// twice.
    ///
    /// # Errors
    /// `400 unknown_field` and `400 invalid_field`.
    pub fn only(query: &str, names: &[&'static str]) -> Result<(), Problem> {
        let mut seen: Vec<&str> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let name = pair.split('=').next().unwrap_or_default();
            if !names.contains(&name) {
                let known = match names {
                    [] => "none is known here".to_owned(),
                    names => format!("known here: {}", names.join(", ")),
                };
                let detail = format!("{name}: unknown query parameter; {known}");
                return Err(Problem::new(400, "unknown_field", detail));
            }
            if seen.contains(&name) {
                let detail = format!("{name}: comes twice in the query");
                return Err(Problem::new(400, "invalid_field", detail));
            }
            seen.push(name);
        }
        Ok(())
    }

    /// The same as a number.
    ///
    /// # Errors
    /// `400 invalid_field` where it is none.
    pub fn number(query: &str, name: &str) -> Result<Option<u64>, Problem> {
        let Some(text) = value(query, name) else {
            return Ok(None);
        };
        text.parse().map(Some).map_err(|_| {
            Problem::new(
                400,
                "invalid_field",
                format!("{name}: must be a whole number, 0 or more"),
            )
        })
    }
}

/// An order as API.md writes it.
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
    /// With one whose money has to go back, or went back.
    #[serde(skip_serializing_if = "Option::is_none")]
    refund_reason: Option<&'a str>,
    created_at: Time,
    expires_at: Time,
    /// With every order that there is, or will be.
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<Receipt>,
    /// With an order that was accepted just now.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated_wait_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attributes: Option<&'a RawValue>,
}

/// RFC 3339, UTC, milliseconds.
#[derive(Debug)]
struct Time(UnixMillis);

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'a> OrderView<'a> {
    /// Its id.
    pub fn order_id(&self) -> OrderId {
        self.order_id
    }

    /// An order in flight, or one whose row was just committed. What may never be has no receipt.
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
            refund_reason: None,
            created_at: Time(order.created_at),
            expires_at: Time(order.expires_at),
            receipt: has_receipt.then(|| keys.sign(&SignedParts::from(order))),
            estimated_wait_ms: None,
            attributes: order.attributes.as_deref().and_then(json::raw),
        }
    }

    /// An order that is durable in the queue and will take so long to become a row.
    pub fn accepted(order: &'a Order, estimated_wait_ms: u64, keys: &ReceiptKeys) -> Self {
        OrderView {
            estimated_wait_ms: Some(estimated_wait_ms),
            ..Self::of(order, OrderStatus::Accepted, keys)
        }
    }

    /// An order from the database, which stands at `status` now.
    pub fn stored(order: &'a StoredOrder, status: OrderStatus, keys: &ReceiptKeys) -> Self {
        let sign = |currency| {
            keys.sign(&SignedParts {
                id: order.id,
                user_id: &order.user_id,
                sku: SkuTag::of(&order.sku_id),
                quantity: order.quantity,
                adjustment: order.adjustment,
                amount: order.amount,
                currency,
                created_at: order.created_at,
                expires_at: order.expires_at,
                key: order.key,
                payload: order.payload,
            })
        };
        let currency = Currency::new(&order.currency).ok();
        OrderView {
            order_id: order.id,
            user_id: &order.user_id,
            sku_id: &order.sku_id,
            quantity: order.quantity,
            adjustment: order.adjustment,
            amount: order.amount,
            currency: &order.currency,
            status: status.as_str(),
            refund_reason: order.refund_reason.as_deref(),
            created_at: Time(order.created_at),
            expires_at: Time(order.expires_at),
            receipt: currency.filter(|_| status != OrderStatus::Failed).map(sign),
            estimated_wait_ms: None,
            attributes: order.attributes.as_deref().and_then(json::raw),
        }
    }
}

/// The answer to a `PUT` of a SKU.
#[derive(Debug, Serialize)]
pub struct PutSkuView {
    #[serde(flatten)]
    sku: SkuView,
    /// The terms that differ from before: one that was left out takes its default.
    changed: Vec<&'static str>,
}

impl PutSkuView {
    /// A SKU as it now stands, and the terms that were changed.
    pub fn of(sku: SkuView, changed: Vec<&'static str>) -> Self {
        PutSkuView { sku, changed }
    }
}

/// A SKU as both planes write it.
#[derive(Debug, Serialize)]
pub struct SkuView {
    sku_id: SkuId,
    title: String,
    unit_price: i64,
    currency: Currency,
    total: u32,
    free: u32,
    held: u32,
    sold: u32,
    state: &'static str,
    opens_at: Option<Time>,
    closes_at: Option<Time>,
    per_user_limit: Option<u32>,
    now: Time,
}

impl SkuView {
    /// A SKU as it stands now; `all_paused`: every sale is.
    pub fn of(sku: &Sku, all_paused: bool) -> Self {
        let now = UnixMillis::now();
        let terms = sku.terms();
        let stock = sku.counter().snapshot();
        SkuView {
            sku_id: SkuId::clone(&sku.id),
            title: terms.title.clone(),
            unit_price: terms.unit_price,
            currency: terms.currency,
            total: stock.total,
            free: stock.free,
            held: stock.held,
            sold: stock.sold,
            state: if all_paused {
                "paused"
            } else {
                sku.state(now).as_str()
            },
            opens_at: terms.opens_at.map(Time),
            closes_at: terms.closes_at.map(Time),
            per_user_limit: terms.per_user_limit,
            now: Time(now),
        }
    }
}

#[derive(Debug, Deserialize)]
struct SkuMembers {
    #[serde(default)]
    title: Option<String>,
    unit_price: i64,
    currency: String,
    total: u32,
    #[serde(default)]
    per_user_limit: Option<u32>,
    #[serde(default)]
    opens_at: Option<String>,
    #[serde(default)]
    closes_at: Option<String>,
}

/// The body of `PUT /admin/v1/skus/{sku_id}`, checked.
#[derive(Debug)]
pub struct SkuBody {
    /// The terms of the sale.
    pub terms: SaleTerms,
    /// Units that it offers.
    pub total: u32,
}

/// Longest title in bytes.
const TITLE_BYTES_MAX: usize = 200;

impl SkuBody {
    /// Parses and checks a body; a missing title is the id.
    ///
    /// # Errors
    /// As [`OrderBody::parse`].
    pub fn parse(id: &SkuId, body: &[u8]) -> Result<Self, Problem> {
        let members: SkuMembers = from_object(body)?;
        let field = |name: &str, what: &dyn fmt::Display| {
            Problem::new(400, "invalid_field", format!("{name}: {what}"))
        };
        let moment = |name: &'static str, text: Option<String>| match text {
            None => Ok(None),
            Some(text) => time::parse(&text).map(Some).map_err(|e| field(name, &e)),
        };
        let title = members.title.unwrap_or_else(|| id.to_string());
        if title.len() > TITLE_BYTES_MAX || title.contains('\0') {
            return Err(field(
                "title",
                &format!("must be at most {TITLE_BYTES_MAX} bytes, without NUL"),
            ));
        }
        if members.unit_price < 0 {
            return Err(field("unit_price", &"must be 0 or more, in minor units"));
        }
        if members.per_user_limit == Some(0) {
            return Err(field(
                "per_user_limit",
                &"must be 1 or more; leave it out for none",
            ));
        }
        let (opens_at, closes_at) = (
            moment("opens_at", members.opens_at)?,
            moment("closes_at", members.closes_at)?,
        );
        if let (Some(opens_at), Some(closes_at)) = (opens_at, closes_at)
            && closes_at <= opens_at
        {
            return Err(field("closes_at", &"must be after opens_at"));
        }
        Ok(SkuBody {
            terms: SaleTerms {
                title,
                unit_price: members.unit_price,
                currency: Currency::new(&members.currency).map_err(|e| field("currency", &e))?,
                per_user_limit: members.per_user_limit,
                opens_at,
                closes_at,
            },
            total: members.total,
        })
    }
}

/// The `Idempotency-Key` of a request, out of every such field that it has.
///
/// # Errors
/// `400 invalid_idempotency_key`.
pub fn idempotency_key<'a>(
    mut fields: impl Iterator<Item = &'a [u8]>,
) -> Result<Option<IdempotencyKey<'a>>, Problem> {
    let Some(field) = fields.next() else {
        return Ok(None);
    };
    if fields.next().is_some() {
        return Err(invalid_key("came more than once"));
    }
    let text = std::str::from_utf8(field).map_err(|_| invalid_key("must be visible ASCII"))?;
    parse_key(text).map(Some)
}

/// An idempotency key out of a text.
///
/// # Errors
/// `400 invalid_idempotency_key`.
pub fn parse_key(text: &str) -> Result<IdempotencyKey<'_>, Problem> {
    IdempotencyKey::new(text).map_err(invalid_key)
}

/// Refuses a body that would have to be decoded first. `fields`: every `Content-Encoding`.
///
/// # Errors
/// `415 unsupported_media_type`.
pub fn require_identity<'a>(fields: impl Iterator<Item = &'a [u8]>) -> Result<(), Problem> {
    for coding in fields.flat_map(|field| field.split(|byte| *byte == b',')) {
        let coding = coding.trim_ascii();
        if !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity") {
            let detail = "Content-Encoding: send the body as it is; no coding is decoded here";
            return Err(Problem::new(415, "unsupported_media_type", detail));
        }
    }
    Ok(())
}

/// Refuses an `Idempotency-Key` of a whole batch: each of its lines has its own.
///
/// # Errors
/// `400 invalid_idempotency_key`.
pub fn no_batch_key(has_key: bool) -> Result<(), Problem> {
    if has_key {
        return Err(invalid_key(
            "a batch takes none; give each line its own \"idempotency_key\"",
        ));
    }
    Ok(())
}

/// Refuses a body where none is taken: anything but nothing and `{}`.
///
/// # Errors
/// As [`OrderBody::parse`].
pub fn no_members(body: &[u8]) -> Result<(), Problem> {
    #[derive(Deserialize)]
    struct Nothing {}
    if body.is_empty() {
        return Ok(());
    }
    from_object::<Nothing>(body).map(|Nothing {}| ())
}

fn invalid_key(what: impl fmt::Display) -> Problem {
    Problem::new(
        400,
        "invalid_idempotency_key",
        format!("Idempotency-Key: {what}"),
    )
}

/// The body of `POST /admin/v1/skus/{sku_id}/restock`.
#[derive(Debug, Deserialize)]
pub struct RestockBody {
    /// Units to add; negative ones are taken away.
    pub quantity: i64,
}

impl RestockBody {
    /// Parses and checks a body.
    ///
    /// # Errors
    /// As [`OrderBody::parse`].
    pub fn parse(body: &[u8]) -> Result<Self, Problem> {
        let body: Self = from_object(body)?;
        if body.quantity == 0 || body.quantity.unsigned_abs() > u64::from(u32::MAX) {
            return Err(Problem::new(
                400,
                "invalid_field",
                "quantity: must be a number of units other than 0 and within 4294967295",
            ));
        }
        Ok(body)
    }
}

/// The optional body of requests that close something for good.
#[derive(Debug, Default, Deserialize)]
pub struct NoteBody {
    /// What the person wants to be remembered, at most 1,000 bytes.
    #[serde(default)]
    pub note: Option<String>,
}

impl NoteBody {
    /// Parses and checks a body; an empty one has no note.
    ///
    /// # Errors
    /// As [`OrderBody::parse`].
    pub fn parse(body: &[u8]) -> Result<Self, Problem> {
        if body.is_empty() {
            return Ok(Self::default());
        }
        let body: Self = from_object(body)?;
        if body
            .note
            .as_ref()
            .is_some_and(|note| note.len() > 1_000 || note.contains('\0'))
        {
            return Err(Problem::new(
                400,
                "invalid_field",
                "note: must be at most 1000 bytes, without NUL",
            ));
        }
        Ok(body)
    }
}

/// A dead letter as operators see it.
#[derive(Debug, Serialize)]
pub struct DeadLetterView<'a> {
    id: i64,
    at: Time,
    order_id: OrderId,
    user_id: &'a str,
    sku_id: &'a str,
    quantity: u32,
    amount: i64,
    currency: &'a str,
    sqlstate: &'a str,
    reason: &'a str,
    attributes: Option<&'a RawValue>,
    discarded_at: Option<Time>,
    note: Option<&'a str>,
}

impl<'a> DeadLetterView<'a> {
    /// A dead letter as it is stored.
    pub fn of(letter: &'a DeadLetter) -> Self {
        DeadLetterView {
            id: letter.id,
            at: Time(letter.at),
            order_id: letter.order_id,
            user_id: &letter.user_id,
            sku_id: &letter.sku_id,
            quantity: letter.quantity,
            amount: letter.amount,
            currency: &letter.currency,
            sqlstate: &letter.sqlstate,
            reason: &letter.reason,
            attributes: letter.attributes.as_deref().and_then(json::raw),
            discarded_at: letter.discarded_at.map(Time),
            note: letter.note.as_deref(),
        }
    }
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

    #[test]
    fn an_array_is_no_object_in_any_body() {
        let id = SkuId::new("A").unwrap();
        for (body, problem) in [
            (
                r#"["u","A",1,0,null,"k"]"#,
                BatchLine::parse(br#"["u","A",1,0,null,"k"]"#).err(),
            ),
            (
                r#"["t",1,"CNY",7]"#,
                SkuBody::parse(&id, br#"["t",1,"CNY",7]"#).err(),
            ),
            ("[5]", RestockBody::parse(b"[5]").err()),
            (r#"["n"]"#, NoteBody::parse(br#"["n"]"#).err()),
            (
                r#"["r","n",true]"#,
                payments::RefundedBody::parse(br#"["r","n",true]"#).err(),
            ),
            (
                r#"["n","r"]"#,
                payments::CloseBody::parse(br#"["n","r"]"#).err(),
            ),
        ] {
            let problem = problem.unwrap_or_else(|| panic!("taken: {body}"));
            assert_eq!((problem.status, problem.code), (400, "invalid_field"));
            assert!(problem.detail.contains("expected an object"), "{body}");
        }
    }

    #[test]
    fn a_sku_is_checked_member_by_member() {
        let id = SkuId::new("A").unwrap();
        let parse = |body: &str| SkuBody::parse(&id, body.as_bytes());
        let body = parse(r#"{"unit_price":100,"currency":"EUR","total":5,"opens_at":"2026-11-11T20:00:00+08:00"}"#).unwrap();
        assert_eq!(body.terms.title, "A");
        assert_eq!(
            body.terms.opens_at.unwrap().to_string(),
            "2026-11-11T12:00:00.000Z"
        );
        for (bad, named) in [
            (
                r#"{"unit_price":-1,"currency":"EUR","total":5}"#,
                "unit_price",
            ),
            (r#"{"unit_price":1,"currency":"eur","total":5}"#, "currency"),
            (
                r#"{"unit_price":1,"currency":"EUR","total":4294967296}"#,
                "4294967296",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"per_user_limit":0}"#,
                "per_user_limit",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"opens_at":"tomorrow"}"#,
                "opens_at",
            ),
        ] {
            let problem = parse(bad).unwrap_err();
            assert!(problem.detail.contains(named), "{}", problem.detail);
        }
    }
}
