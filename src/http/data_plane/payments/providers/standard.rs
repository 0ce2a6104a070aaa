//! Standard Webhooks (version 1): HMAC-SHA256 over `id.timestamp.body`.
//!
//! The three parts cannot be cut in another way under the same signature: a timestamp is digits,
//! and a body that can be read begins with a brace.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::keys::HmacKeys;
use super::message::{
    Loose, Whole, amount, check_fresh, currency, cut, event_id, field, json, name, payment_json,
    receipt, rfc3339,
};
use super::{CallbackError, PaymentProvider};
use crate::config::{ConfigError, StandardPayments};
use crate::http::message::Request;
use crate::http::webhook_secret::{self, BYTES_MIN};
use crate::order::UnixMillis;
use crate::order::payment::{Notice, Payment, Provider};

/// The type of a message that tells of a payment.
const PAID: &str = "payment.succeeded";

/// The secret of Standard Webhooks' examples, which documents of Millrace printed too: anyone can sign with it.
const PUBLISHED: &str = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// The provider.
#[derive(Debug)]
pub struct Standard {
    keys: HmacKeys,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default)]
    r#type: Loose<'a>,
    #[serde(borrow, default)]
    timestamp: Loose<'a>,
    /// Of a shape that its type tells.
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow, default)]
    order_id: Loose<'a>,
    #[serde(borrow, default)]
    payment_id: Loose<'a>,
    #[serde(default)]
    amount: Whole,
    #[serde(borrow, default)]
    currency: Loose<'a>,
    #[serde(borrow, default)]
    receipt: Loose<'a>,
}

impl Standard {
    /// The provider, where it has secrets.
    ///
    /// # Errors
    /// [`ConfigError`] where a secret is not base64, or the one that examples print.
    pub fn new(config: &StandardPayments) -> Result<Option<Self>, ConfigError> {
        let published = webhook_secret::bytes(PUBLISHED);
        let mut secrets = Vec::new();
        for secret in &config.secret.0 {
            let bytes = webhook_secret::bytes(secret).filter(|bytes| !bytes.is_empty());
            let message = match bytes {
                Some(bytes) if Some(&bytes) != published.as_ref() => {
                    secrets.push(bytes);
                    continue;
                }
                Some(_) => {
                    "is the one that examples print: anyone could report payments. echo \"whsec_$(openssl rand -base64 \
                     32)\" makes another"
                }
                None => "is not base64, with or without whsec_ before it",
            };
            return Err(ConfigError::Field {
                field: "payments.standard.secret",
                message: message.into(),
            });
        }
        Ok((!secrets.is_empty()).then(|| Standard {
            keys: HmacKeys::new(secrets),
        }))
    }

    /// The warning that a secret is so short that it may be guessed. No error: a shop that has such a one goes on.
    pub fn warning(config: &StandardPayments) -> Option<(&'static str, String)> {
        let lengths = config
            .secret
            .0
            .iter()
            .filter_map(|secret| webhook_secret::bytes(secret));
        let shortest = lengths.map(|bytes| bytes.len()).min()?;
        let detail = format!(
            "payments.standard.secret: one has {shortest} bytes, and Standard Webhooks asks for {BYTES_MIN}. Whoever \
             guesses it can report payments. echo \"whsec_$(openssl rand -base64 32)\" makes another; have both in a \
             list until the platform signs with it"
        );
        (shortest < BYTES_MIN).then_some(("payment_secret_short", detail))
    }

    /// Reads a body that is verified, of the message with this id.
    ///
    /// # Errors
    /// [`CallbackError::Malformed`] and [`CallbackError::Unbookable`].
    pub fn parse(id: &str, body: &[u8]) -> Result<Notice, CallbackError> {
        let event: Event<'_> = json(body)?;
        let payment = match (event.r#type.text(), event.data) {
            ("", _) => return Err(CallbackError::Malformed("it has no type".into())),
            (PAID, Some(data)) => {
                let data: Data<'_> = payment_json(data.get().as_bytes())?;
                Some(Payment {
                    payment_id: name(data.payment_id.text(), "payment_id")?,
                    order_ref: cut(data.order_id.text()),
                    amount: amount(data.amount.0)?,
                    currency: currency(data.currency.text())?,
                    receipt: receipt(data.receipt.get()),
                    made_at: rfc3339(event.timestamp.text()),
                })
            }
            (PAID, None) => return Err(CallbackError::Unbookable("it has no data".into())),
            _ => None,
        };
        Ok(Notice {
            provider: Provider::Standard,
            event_id: event_id(id, "webhook-id", payment.as_ref())?,
            kind: cut(event.r#type.text()),
            body: body.into(),
            payment,
        })
    }
}

impl PaymentProvider for Standard {
    fn provider(&self) -> Provider {
        Provider::Standard
    }

    fn read(&self, request: &Request<'_>, now: UnixMillis) -> Result<Notice, CallbackError> {
        let id = field(request, "webhook-id")?;
        let timestamp = field(request, "webhook-timestamp")?;
        let signatures = field(request, "webhook-signature")?;
        let signed = [
            id.as_bytes(),
            b".",
            timestamp.as_bytes(),
            b".",
            request.body,
        ]
        .concat();
        // Other versions stand beside `v1` and are for others.
        let signatures = signatures
            .split(' ')
            .filter_map(|signature| STANDARD.decode(signature.strip_prefix("v1,")?).ok());
        if !self.keys.verify(&signed, signatures) {
            return Err(CallbackError::BadSignature("no secret made any of them"));
        }
        let signed_at = check_fresh(timestamp, now)?;
        let mut notice = Self::parse(id, request.body)?;
        if let Some(payment) = &mut notice.payment {
            // Each attempt is dated anew; what happened was no later.
            payment.made_at = payment.made_at.or(Some(signed_at)).min(Some(signed_at));
        }
        Ok(notice)
    }
}
