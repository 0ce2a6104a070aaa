//! Payment providers: verify and read the callback of a payment platform, and answer in its dialect.
//!
//! ```text
//!   request ──► signature over the raw bytes ──► fresh? ──► for us? ──► parsed ──► Notice
//!                       │                           │          │          │
//!                       └───────────────────────────┴──────────┴──────────┴──► CallbackError
//! ```
//!
//! No part of a message is trusted before its signature is verified. Only the members that are needed
//! are read: platforms add new ones without notice. The caller stores the [`Notice`], answers with
//! [`PaymentProvider::accept`] once it is committed, and with [`PaymentProvider::refuse`] otherwise;
//! the platform then delivers again. This module does not wait, does no I/O, and keeps no state
//! between two calls.
//!
//! The name and the amount of a payment are required; without them the message is
//! [`CallbackError::Unbookable`], which the log reports as an error. No other fault costs a payment:
//! an order reference that is too long is cut, an impossible receipt is left out.

pub mod alipay;
mod keys;
mod message;
pub mod standard;
pub mod stripe;
pub mod wechatpay;

use crate::config::{ConfigError, Payments};
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::order::UnixMillis;
use crate::order::payment::{Notice, Provider};

use alipay::Alipay;
use standard::Standard;
use stripe::Stripe;
use wechatpay::Wechatpay;

/// Seconds by which a dated message may differ from our clock, as Standard Webhooks, Stripe and
/// WeChat Pay say. A stolen delivery is worthless later.
pub const FRESHNESS_S: i64 = 300;

/// The callbacks of one payment platform.
pub trait PaymentProvider: Send + Sync {
    /// The platform.
    fn provider(&self) -> Provider;

    /// Verifies and reads the message in `request`, which came at `now`.
    ///
    /// # Errors
    /// [`CallbackError`], to be answered with [`PaymentProvider::refuse`].
    fn read(&self, request: &Request<'_>, now: UnixMillis) -> Result<Notice, CallbackError>;

    /// Makes `response`, which is clear, the answer that ends the platform's deliveries.
    fn accept(&self, response: &mut Response) {
        response.set_status(200);
    }

    /// Makes `response`, which is clear, the answer after which the platform delivers again, and
    /// logs why.
    fn refuse(&self, response: &mut Response, error: &CallbackError) {
        error.log(self.provider());
        let problem = error.problem();
        challenge(response, &problem);
        problem.write_to(response);
    }
}

/// RFC 9110 15.5.2 asks for a challenge with each `401`; a bearer token would not help.
fn challenge(response: &mut Response, problem: &Problem) {
    if problem.status == 401 {
        response.header("WWW-Authenticate", "Signature");
    }
}

/// The reason why a callback is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallbackError {
    /// Nothing proves that it comes from the platform.
    #[error("the signature does not hold: {0}")]
    BadSignature(&'static str),
    /// WeChat Pay checks whether false signatures are refused. This is not an attack.
    #[error("a probe with a false signature")]
    SignatureProbe,
    /// Authentic, but dated too far from our clock.
    #[error(
        "it is dated {off_s} s from our clock, {FRESHNESS_S} at most are allowed: a replay, or a clock is wrong"
    )]
    Stale {
        /// Seconds by which our clock is ahead of it.
        off_s: i64,
    },
    /// Authentic, but about another account.
    #[error("{0} is not the configured one")]
    NotForUs(&'static str),
    /// Authentic, but malformed.
    #[error("it cannot be read: {0}")]
    Malformed(String),
    /// Authentic, and perhaps a payment, but without the members to book one.
    #[error("a payment that cannot be booked: {0}")]
    Unbookable(String),
    /// Authentic, but not stored now.
    #[error("it could not be stored now")]
    NotStored,
}

impl CallbackError {
    /// The answer to the caller. A stranger, whose signature does not hold, hears no reason; the sender of an authentic
    /// message hears the one that the log has, which repeats nothing of the message but the names of its members.
    pub fn problem(&self) -> Problem {
        let (status, code) = match self {
            CallbackError::BadSignature(_) | CallbackError::SignatureProbe => {
                let detail = "the signature does not hold, or a header field that it needs is missing or comes twice";
                return Problem::new(401, "invalid_signature", detail);
            }
            CallbackError::Stale { .. } => (400, "stale_callback"),
            CallbackError::NotForUs(_) => (400, "wrong_account"),
            CallbackError::Malformed(_) => (400, "malformed_callback"),
            CallbackError::Unbookable(_) => (400, "unbookable_payment"),
            CallbackError::NotStored => {
                let detail = "the message could not be stored; send it again";
                return Problem::new(503, "not_stored", detail).retry_after(1);
            }
        };
        Problem::new(status, code, self.to_string())
    }

    /// Logs the error without any byte of the message but the names of its members. Errors that
    /// strangers can cause have a log statement of their own: the log limits lines by kind, and a
    /// flood of strangers' must not hide errors of authentic callbacks.
    pub fn log(&self, provider: Provider) {
        match self {
            CallbackError::SignatureProbe => {
                tracing::info!(%provider, reason = %self, "a payment callback was refused");
            }
            CallbackError::Unbookable(_) => {
                tracing::error!(%provider, reason = %self, "a payment callback was refused: look the payment up at the provider");
            }
            CallbackError::BadSignature(_) => {
                tracing::warn!(%provider, reason = %self, "a payment callback with a false signature was refused");
            }
            CallbackError::Stale { .. }
            | CallbackError::NotForUs(_)
            | CallbackError::Malformed(_) => {
                tracing::warn!(%provider, reason = %self, "a payment callback was refused");
            }
            CallbackError::NotStored => {
                tracing::warn!(%provider, "a payment callback could not be stored; the provider was told to send it again");
            }
        }
    }
}

/// The providers that are configured.
#[derive(Debug)]
pub struct Providers {
    standard: Option<Standard>,
    stripe: Option<Stripe>,
    alipay: Option<Alipay>,
    wechatpay: Option<Wechatpay>,
}

impl Providers {
    /// Reads their keys.
    ///
    /// # Errors
    /// [`ConfigError`] that names the field whose key is none.
    pub fn new(config: &Payments) -> Result<Self, ConfigError> {
        Ok(Providers {
            standard: Standard::new(&config.standard)?,
            stripe: Stripe::new(&config.stripe),
            alipay: Alipay::new(&config.alipay)?,
            wechatpay: Wechatpay::new(&config.wechatpay)?,
        })
    }

    /// The provider, if it is configured.
    pub fn get(&self, provider: Provider) -> Option<&dyn PaymentProvider> {
        fn known<P: PaymentProvider>(provider: &Option<P>) -> Option<&dyn PaymentProvider> {
            provider.as_ref().map(|provider| provider as _)
        }
        match provider {
            Provider::Standard => known(&self.standard),
            Provider::Stripe => known(&self.stripe),
            Provider::Alipay => known(&self.alipay),
            Provider::Wechatpay => known(&self.wechatpay),
        }
    }
}
