//! Orders to be paid, and the ways in which buyers pay them.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use crate::loadgen::arrival::Arrival;

/// The ways in which buyers pay. The names are stable, as `--json` shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PaymentKind {
    /// The order's amount, soon after it was placed.
    Regular,
    /// The order's amount, after its `expires_at`.
    Late,
    /// Another amount than the order's.
    WrongAmount,
    /// Once more for an order that a regular payment pays too, whichever comes first.
    Second,
    /// For an order that never existed.
    Lost,
}

impl PaymentKind {
    /// Every kind, in the order of a table.
    pub const ALL: [Self; 5] = [
        Self::Regular,
        Self::Late,
        Self::WrongAmount,
        Self::Second,
        Self::Lost,
    ];

    /// The name that people read.
    pub fn label(self) -> &'static str {
        match self {
            Self::Regular => "regular",
            Self::Late => "too late",
            Self::WrongAmount => "wrong amount",
            Self::Second => "second for its order",
            Self::Lost => "for no order",
        }
    }

    /// Begins the part of the `payment_id` that tells an order's payments apart.
    pub(in crate::loadgen) fn mark(self) -> &'static str {
        match self {
            Self::Regular | Self::Late => "a",
            Self::WrongAmount => "w",
            Self::Second => "b",
            Self::Lost => "l",
        }
    }

    pub(in crate::loadgen) fn place(self) -> usize {
        self as usize
    }
}

/// How a false signature is false.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::loadgen) enum Forgery {
    /// Signed with a key that is not the platform's.
    ForeignKey,
    /// One byte of the body altered after it was signed.
    AlteredBody,
    /// One character of the signature altered.
    AlteredSignature,
}

/// An order as its answer describes it to the buyer, who may pay it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::loadgen) struct PlacedOrder {
    /// The arrival's buyer and SKU, which decide whether and how it is paid.
    pub buyer: u32,
    pub sku: u16,
    pub order_id: u64,
    /// In minor units.
    pub amount: i64,
    pub currency: SmolStr,
    pub receipt: Option<SmolStr>,
    /// Milliseconds of Unix time.
    pub expires_at_ms: Option<i64>,
}

#[derive(Deserialize)]
struct OrderBody<'a> {
    #[serde(borrow)]
    order_id: Cow<'a, str>,
    amount: i64,
    #[serde(borrow)]
    currency: Cow<'a, str>,
    #[serde(borrow, default)]
    receipt: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    expires_at: Option<Cow<'a, str>>,
}

impl PlacedOrder {
    /// Reads the answer that placed an order; none if there is nothing to pay.
    pub(in crate::loadgen) fn read(arrival: &Arrival, body: &[u8]) -> Option<Self> {
        let order: OrderBody<'_> = serde_json::from_slice(body).ok()?;
        (order.amount > 0).then_some(())?;
        Some(Self {
            buyer: arrival.buyer,
            sku: arrival.sku,
            order_id: order.order_id.parse().ok()?,
            amount: order.amount,
            currency: SmolStr::from(order.currency),
            receipt: order.receipt.map(SmolStr::from),
            expires_at_ms: order
                .expires_at
                .and_then(|at| at.parse::<jiff::Timestamp>().ok())
                .map(|at| at.as_millisecond()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placed_order_is_read_from_the_answer_with_and_without_a_receipt() {
        let arrival = Arrival {
            scheduled_ns: 0,
            buyer: 3,
            sku: 1,
            double: false,
        };
        let body = br#"{"order_id":"7","status":"accepted","amount":100,"currency":"EUR",
            "receipt":"r-7","expires_at":"2026-01-02T03:04:05.678Z","new":[1]}"#;
        let order = PlacedOrder::read(&arrival, body).unwrap();
        assert_eq!((order.buyer, order.sku, order.order_id), (3, 1, 7));
        assert_eq!((order.amount, order.currency.as_str()), (100, "EUR"));
        assert_eq!(order.receipt.as_deref(), Some("r-7"));
        assert_eq!(order.expires_at_ms, Some(1_767_323_045_678));
        let body = br#"{"order_id":"7","amount":100,"currency":"EUR"}"#;
        let order = PlacedOrder::read(&arrival, body).unwrap();
        assert_eq!((order.receipt, order.expires_at_ms), (None, None));
        for body in [
            r#"{"order_id":"7","status":"accepted"}"#,
            r#"{"order_id":"7","amount":0,"currency":"EUR"}"#,
            "nothing",
        ] {
            assert_eq!(PlacedOrder::read(&arrival, body.as_bytes()), None, "{body}");
        }
    }

    #[test]
    fn kinds_stand_at_their_own_place() {
        for (place, kind) in PaymentKind::ALL.into_iter().enumerate() {
            assert_eq!(kind.place(), place);
        }
    }
}
