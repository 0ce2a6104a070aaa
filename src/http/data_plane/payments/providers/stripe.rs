//! Stripe: `Stripe-Signature: t=…,v1=…`, where each `v1` is the hexadecimal HMAC-SHA256 over
//! `t.body` by a signing secret, which is used as it is written, `whsec_` included.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::keys::HmacKeys;
use super::message::{
    Loose, Whole, amount, check_fresh, currency, cut, event_id, field, json, name, payment_json,
    receipt, signed_time,
};
use super::{CallbackError, PaymentProvider};
use crate::config::StripePayments;
use crate::http::message::Request;
use crate::order::UnixMillis;
use crate::order::payment::{Notice, Payment, Provider};

/// The type of an event that tells of a payment.
const PAID: &str = "payment_intent.succeeded";

/// The provider.
#[derive(Debug)]
pub struct Stripe {
    keys: HmacKeys,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default)]
    id: Loose<'a>,
    #[serde(borrow, default)]
    r#type: Loose<'a>,
    /// When it happened, in Unix seconds.
    #[serde(default)]
    created: Whole,
    /// Of a shape that its type tells.
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    object: PaymentIntent<'a>,
}

#[derive(Deserialize)]
struct PaymentIntent<'a> {
    #[serde(borrow, default)]
    id: Loose<'a>,
    #[serde(default)]
    amount_received: Whole,
    #[serde(borrow, default)]
    currency: Loose<'a>,
    /// An object; anything else costs the reference, not the payment.
    #[serde(borrow, default)]
    metadata: Option<&'a RawValue>,
}

/// The metadata that the shop added to the payment intent.
#[derive(Default, Deserialize)]
struct Metadata<'a> {
    #[serde(borrow, default)]
    order_id: Loose<'a>,
    #[serde(borrow, default)]
    receipt: Loose<'a>,
}

impl Stripe {
    /// The provider, where it has secrets.
    pub fn new(config: &StripePayments) -> Option<Self> {
        let secrets = &config.secret.0;
        (!secrets.is_empty()).then(|| Stripe {
            keys: HmacKeys::new(secrets),
        })
    }

    /// Reads a body that is verified.
    ///
    /// # Errors
    /// [`CallbackError::Malformed`] and [`CallbackError::Unbookable`].
    pub fn parse(body: &[u8]) -> Result<Notice, CallbackError> {
        let event: Event<'_> = json(body)?;
        let payment = match (event.r#type.text(), event.data) {
            ("", _) => return Err(CallbackError::Malformed("it has no type".into())),
            (PAID, Some(data)) => {
                let intent = payment_json::<Data<'_>>(data.get().as_bytes())?.object;
                let metadata = intent.metadata.map(|raw| raw.get().as_bytes());
                let metadata: Metadata<'_> = metadata
                    .and_then(|text| json(text).ok())
                    .unwrap_or_default();
                Some(Payment {
                    payment_id: name(intent.id.text(), "data.object.id")?,
                    order_ref: cut(metadata.order_id.text()),
                    amount: amount(intent.amount_received.0)?,
                    currency: currency(intent.currency.text())?,
                    receipt: receipt(metadata.receipt.get()),
                    made_at: event
                        .created
                        .0
                        .and_then(|seconds| signed_time(seconds.checked_mul(1_000)?)),
                })
            }
            (PAID, None) => return Err(CallbackError::Unbookable("it has no data".into())),
            _ => None,
        };
        Ok(Notice {
            provider: Provider::Stripe,
            event_id: event_id(event.id.text(), "id", payment.as_ref())?,
            kind: cut(event.r#type.text()),
            body: body.into(),
            payment,
        })
    }
}

impl PaymentProvider for Stripe {
    fn provider(&self) -> Provider {
        Provider::Stripe
    }

    fn read(&self, request: &Request<'_>, now: UnixMillis) -> Result<Notice, CallbackError> {
        let header = field(request, "stripe-signature")?;
        let items = || header.split(',').filter_map(|item| item.split_once('='));
        let mut times = items().filter(|(name, _)| *name == "t");
        let (Some((_, timestamp)), None) = (times.next(), times.next()) else {
            return Err(CallbackError::BadSignature("it has no t, or two"));
        };
        let signed = [timestamp.as_bytes(), b".", request.body].concat();
        // `v0` is for Stripe's own tests.
        let signatures = items()
            .filter(|(name, _)| *name == "v1")
            .filter_map(|(_, signature)| unhex(signature));
        if !self.keys.verify(&signed, signatures) {
            return Err(CallbackError::BadSignature("no secret made any of them"));
        }
        check_fresh(timestamp, now)?;
        Self::parse(request.body)
    }
}

/// The bytes that lower-case hexadecimal digits mean.
fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
        .collect()
}
