//! The payment platform's callback: a Standard Webhooks message.
//!
//! <https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>:
//! the signed text is `id.timestamp.body`, the signature `v1,` and the base64 of its HMAC-SHA256.
//! Implemented here from the specification and not shared with the server, so that it tests the server's
//! implementation.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use ring::hmac;
use serde::{Deserialize, Serialize};

/// The prefix of every secret.
const PREFIX: &str = "whsec_";
/// Bytes that a key has by the specification.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// The secret that the platform signs with, `whsec_` and base64; no log and no report shows it.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct WebhookSecret(String);

impl WebhookSecret {
    /// Wraps the secret's text; [`LoadPlan::check`](crate::loadgen::LoadPlan::check) says whether it is one.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// A secret of this key.
    pub fn of_key(key: &[u8]) -> Self {
        Self(format!("{PREFIX}{}", STANDARD.encode(key)))
    }

    /// The text, for the configuration of a server that is to trust it.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The value of `webhook-signature` for a message.
    ///
    /// # Errors
    /// The fault of the text, if it is no secret.
    pub fn sign(&self, id: &str, timestamp_s: i64, body: &[u8]) -> Result<String, &'static str> {
        Ok(self.signer()?.sign(id, timestamp_s, body))
    }

    /// The signer with this secret, or the fault of the text.
    pub(in crate::loadgen) fn signer(&self) -> Result<Signer, &'static str> {
        let encoded = self.0.trim();
        let encoded = encoded.strip_prefix(PREFIX).unwrap_or(encoded);
        let key = STANDARD
            .decode(encoded)
            .map_err(|_| "it is not whsec_ and base64")?;
        if KEY_BYTES.contains(&key.len()) {
            Ok(Signer::of_key(&key))
        } else {
            Err("its key is not of 24 to 64 bytes")
        }
    }
}

impl fmt::Debug for WebhookSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebhookSecret(…)")
    }
}

/// Signs messages.
pub(in crate::loadgen) struct Signer(hmac::Key);

impl Signer {
    pub(in crate::loadgen) fn of_key(key: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// The value of `webhook-signature`.
    pub(in crate::loadgen) fn sign(&self, id: &str, timestamp_s: i64, body: &[u8]) -> String {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(format!("{id}.{timestamp_s}.").as_bytes());
        context.update(body);
        format!("v1,{}", STANDARD.encode(context.sign()))
    }
}

/// The data of a `payment.succeeded` message.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PaymentMessage<'a> {
    /// The order that was paid.
    pub order_id: &'a str,
    /// The platform's id of the payment.
    pub payment_id: &'a str,
    /// In minor units.
    pub amount: i64,
    /// Three capital letters.
    pub currency: &'a str,
    /// The order's receipt, passed back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<&'a str>,
}

impl PaymentMessage<'_> {
    /// The body of the callback.
    pub fn body(&self) -> Bytes {
        #[derive(Serialize)]
        struct Message<'a> {
            r#type: &'static str,
            data: &'a PaymentMessage<'a>,
        }
        let message = Message {
            r#type: "payment.succeeded",
            data: self,
        };
        // Texts and a number: there is nothing in it that JSON cannot write.
        Bytes::from(serde_json::to_vec(&message).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vector of the specification's own libraries.
    #[test]
    fn the_published_message_gets_the_published_signature() {
        let secret = WebhookSecret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let signature = secret.signer().unwrap().sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn what_is_no_secret_is_refused_and_never_shown() {
        for text in ["", "whsec_", "whsec_AAAA", "whsec_not base64 at all, no"] {
            assert!(WebhookSecret::new(text).signer().is_err(), "{text:?}");
        }
        let secret = WebhookSecret::of_key(&[7; 32]);
        assert!(secret.signer().is_ok());
        assert!(!format!("{secret:?}").contains("BwcH"));
    }

    #[test]
    fn a_body_is_written_as_the_contract_has_it() {
        let mut message = PaymentMessage {
            order_id: "734",
            payment_id: "p-1",
            amount: 199_900,
            currency: "CNY",
            receipt: Some("r"),
        };
        assert_eq!(
            &message.body()[..],
            br#"{"type":"payment.succeeded","data":{"order_id":"734","payment_id":"p-1","amount":199900,"currency":"CNY","receipt":"r"}}"#
        );
        message.receipt = None;
        assert!(!String::from_utf8_lossy(&message.body()).contains("receipt"));
    }
}
