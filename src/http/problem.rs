//! Errors as RFC 9457 `application/problem+json`.

use std::borrow::Cow;

use serde::Serialize;

use crate::http::message::{Response, reason};
use crate::order::Refusal;

/// The media type of a problem body.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// A problem body: `type`, `title`, `status`, `detail` and a stable `code`, and what a code adds.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// No page describes a code on its own, so always `about:blank` (RFC 9457 4.2.1).
    pub r#type: &'static str,
    /// The status code's meaning.
    pub title: &'static str,
    /// The status code.
    pub status: u16,
    /// What happened, to whom, and what to do.
    pub detail: Cow<'static, str>,
    /// Stable, for programs.
    pub code: &'static str,
    /// With `sold_out`: units that are free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<u32>,
    /// Sent as the `Retry-After` field, in seconds, not in the body.
    #[serde(skip)]
    pub retry_after: Option<u32>,
}

impl Problem {
    /// A problem without extras.
    pub fn new(status: u16, code: &'static str, detail: impl Into<Cow<'static, str>>) -> Self {
        Problem {
            r#type: "about:blank",
            title: reason(status),
            status,
            detail: detail.into(),
            code,
            available: None,
            retry_after: None,
        }
    }

    /// The same with a `Retry-After` in seconds.
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// Makes `response` this problem; fields that it has already stay.
    pub fn write_to(&self, response: &mut Response) {
        response.set_status(self.status);
        response.header("Content-Type", MEDIA_TYPE);
        if let Some(seconds) = self.retry_after {
            response.header("Retry-After", seconds);
        }
        // Other proofs than a token have challenges of their own.
        if self.code == "unauthorized" {
            response.header("WWW-Authenticate", "Bearer");
        }
        response.body_mut().clear();
        // Writing to a vector cannot fail, and a problem always serializes.
        let _ = serde_json::to_writer(response.body_mut(), self);
    }

    /// No valid bearer token came.
    pub fn unauthorized() -> Self {
        Problem::new(
            401,
            "unauthorized",
            "Authorization: a valid bearer token is needed",
        )
    }

    /// A defect of ours.
    pub fn internal() -> Self {
        Problem::new(
            500,
            "internal",
            "an internal error; the server's log has the cause",
        )
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let code = refusal.code();
        match refusal {
            Refusal::StockElsewhere => {
                let detail = "this node has sold its share of the SKU, and whether another has units left is not known yet; nothing was held";
                Problem::new(503, code, detail).retry_after(1)
            }
            Refusal::NotReady => Problem::new(
                503,
                code,
                "the service is not ready to take orders; see /readyz",
            )
            .retry_after(1),
            Refusal::Draining => {
                Problem::new(503, code, "the service is shutting down").retry_after(5)
            }
            Refusal::RateLimited { retry_after_ms } => {
                Problem::new(429, code, "too many requests from this user, or over all")
                    .retry_after(retry_after_ms.div_ceil(1_000).max(1))
            }
            Refusal::UnknownSku => Problem::new(404, code, "sku_id: no such SKU"),
            Refusal::AmountOutOfRange => Problem::new(
                400,
                code,
                "adjustment: unit_price × quantity + adjustment must be 0 or more and less than 2^63",
            ),
            Refusal::IdempotencyKeyReused => Problem::new(
                422,
                code,
                "Idempotency-Key: this key came before with another body",
            ),
            Refusal::SalePaused => Problem::new(409, code, "the sale is paused"),
            Refusal::SaleNotOpen { opens_at } => {
                Problem::new(409, code, format!("the sale opens at {opens_at}"))
            }
            Refusal::SaleClosed => Problem::new(409, code, "the sale is over"),
            Refusal::DrawUnderWay => Problem::new(
                409,
                code,
                "the entries of the draw have ended, and it is not made yet",
            ),
            Refusal::PurchaseLimit { limit, taken } => Problem::new(
                409,
                code,
                format!("the limit is {limit} units a buyer; this buyer's orders hold {taken}"),
            ),
            Refusal::SoldOut { available } => Problem {
                available: Some(available),
                ..Problem::new(409, code, "not enough units are free")
            },
            Refusal::WaitlistFull => Problem::new(
                409,
                code,
                "no unit is free, and as many orders wait as waitlist_max allows",
            ),
            Refusal::Backlogged { retry_after_ms } => Problem::new(
                503,
                code,
                "the database could not take this order within its wait; nothing was held",
            )
            .retry_after(retry_after_ms.div_ceil(1_000).max(1)),
            Refusal::Overloaded => Problem::new(
                503,
                code,
                "too many orders are waiting to be written; nothing was held",
            )
            .retry_after(1),
            Refusal::MemoryFull => Problem::new(
                503,
                code,
                "as many orders are remembered as orders.remembered_max allows; nothing was held",
            )
            .retry_after(60),
            Refusal::JournalFull => Problem::new(
                503,
                code,
                "the journal is full until the database has taken more orders; nothing was held",
            )
            .retry_after(5),
            Refusal::JournalFailed => Problem::new(
                503,
                code,
                "the journal's disk has failed; nothing was held; orders without respond-async are taken",
            )
            .retry_after(30),
            Refusal::QueueUnavailable => Problem::new(
                503,
                code,
                "the broker of the order log takes no orders now; nothing was held; orders without respond-async are taken",
            )
            .retry_after(2),
        }
    }
}
