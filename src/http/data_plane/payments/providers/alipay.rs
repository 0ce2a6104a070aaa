//! Alipay: a form, signed with RSA2 (SHA256withRSA) over its parameters.
//!
//! # The signed text
//!
//! All parameters but `sign` and `sign_type`, decoded, sorted by name, joined as `name=value` with
//! `&`. Alipay's own SDKs disagree about parameters without a value: Java's and Python's keep
//! them, PHP's leaves them out. Either text is taken, and here an empty parameter means the same as
//! none, so it makes no difference which.
//!
//! That text does not tell `a=1&b=2` from one parameter `a` with the value `1&b=2`. So a message
//! in which a value carries `&` and one of the names that count here is refused: it would be a
//! signed text cut at other places than Alipay cut it.

use std::borrow::Cow;

use percent_encoding::percent_decode;

use super::keys::RsaKey;
use super::message::{currency, cut, event_id, name, receipt, rfc3339};
use super::{CallbackError, PaymentProvider};
use crate::config::{AlipayPayments, ConfigError};
use crate::http::message::{Request, Response};
use crate::order::UnixMillis;
use crate::order::payment::{Notice, Payment, Provider};

/// The parameters that decide what a message means.
const NAMES: &[&str] = &[
    "app_id",
    "charset",
    "gmt_payment",
    "gmt_refund",
    "notify_id",
    "out_trade_no",
    "passback_params",
    "refund_fee",
    "seller_id",
    "total_amount",
    "trade_no",
    "trade_status",
    "trans_currency",
];

/// The provider.
#[derive(Debug)]
pub struct Alipay {
    app_id: String,
    /// Empty: any.
    seller_id: String,
    key: RsaKey,
}

impl Alipay {
    /// The provider, where it is configured.
    ///
    /// # Errors
    /// [`ConfigError`] where its key cannot be read.
    pub fn new(config: &AlipayPayments) -> Result<Option<Self>, ConfigError> {
        if config.app_id.is_empty() {
            return Ok(None);
        }
        let key = RsaKey::read(&config.public_key).map_err(|message| ConfigError::Field {
            field: "payments.alipay.public_key",
            message,
        })?;
        Ok(Some(Alipay {
            app_id: config.app_id.clone(),
            seller_id: config.seller_id.clone(),
            key,
        }))
    }

    fn verify(&self, form: &Form<'_>) -> Result<(), CallbackError> {
        let sign_type = form.bytes("sign_type").unwrap_or(b"RSA2");
        if sign_type != b"RSA2" {
            return Err(CallbackError::BadSignature("its sign_type is not RSA2"));
        }
        let sign = form
            .bytes("sign")
            .ok_or(CallbackError::BadSignature("it has no sign"))?;
        let held = self.key.verify(&form.signed_text(true), sign)
            || form.has_empty() && self.key.verify(&form.signed_text(false), sign);
        if !held {
            return Err(CallbackError::BadSignature("it is not that of this text"));
        }
        Ok(())
    }

    /// Reads a body that is verified.
    ///
    /// # Errors
    /// [`CallbackError::Malformed`], [`CallbackError::NotForUs`] and [`CallbackError::Unbookable`].
    pub fn parse(&self, body: &[u8]) -> Result<Notice, CallbackError> {
        self.notice(&Form::decode(body)?, body)
    }

    fn notice(&self, form: &Form<'_>, body: &[u8]) -> Result<Notice, CallbackError> {
        form.check_cuts()?;
        let charset = form.text("charset")?;
        if !charset.is_empty() && !charset.eq_ignore_ascii_case("utf-8") {
            let why = "its charset is not utf-8; ask for that when paying";
            return Err(CallbackError::Unbookable(why.into()));
        }
        if form.text("app_id")? != self.app_id {
            return Err(CallbackError::NotForUs("app_id"));
        }
        if !self.seller_id.is_empty() && form.text("seller_id")? != self.seller_id {
            return Err(CallbackError::NotForUs("seller_id"));
        }
        let (status, trade_no) = (form.text("trade_status")?, form.text("trade_no")?);
        let paid = matches!(status, "TRADE_SUCCESS" | "TRADE_FINISHED") && !is_refund(form)?;
        let payment = if paid { Some(payment(form)?) } else { None };
        let id = match form.text("notify_id")? {
            "" => Cow::Owned(format!("{trade_no} {status}")),
            id => Cow::Borrowed(id),
        };
        let kind = match status {
            "" => form.text("notify_type")?,
            status => status,
        };
        Ok(Notice {
            provider: Provider::Alipay,
            event_id: event_id(id.trim(), "notify_id", payment.as_ref())?,
            kind: cut(kind),
            body: body.into(),
            payment,
        })
    }
}

impl PaymentProvider for Alipay {
    fn provider(&self) -> Provider {
        Provider::Alipay
    }

    fn read(&self, request: &Request<'_>, _: UnixMillis) -> Result<Notice, CallbackError> {
        let form = Form::decode(request.body)?;
        self.verify(&form)?;
        self.notice(&form, request.body)
    }

    fn accept(&self, response: &mut Response) {
        response.set_status(200);
        text(response, "success");
    }

    fn refuse(&self, response: &mut Response, error: &CallbackError) {
        error.log(self.provider());
        let problem = error.problem();
        // Alipay knows `success` and everything else.
        response.set_status(if problem.status == 503 { 503 } else { 400 });
        if let Some(seconds) = problem.retry_after {
            response.header("Retry-After", seconds);
        }
        text(response, "failure");
    }
}

fn text(response: &mut Response, text: &str) {
    response.header("Content-Type", "text/plain; charset=utf-8");
    response.body_mut().extend_from_slice(text.as_bytes());
}

/// A refund is told of under the status of its trade, with what was given back.
fn is_refund(form: &Form<'_>) -> Result<bool, CallbackError> {
    let fee = form.text("refund_fee")?;
    let nothing = fee.bytes().all(|byte| byte == b'0' || byte == b'.');
    Ok(!nothing || !form.text("gmt_refund")?.is_empty())
}

fn payment(form: &Form<'_>) -> Result<Payment, CallbackError> {
    let code = match form.text("trans_currency")? {
        "" => "CNY",
        code => code,
    };
    let currency = currency(code)?;
    let amount = minor_units(form.text("total_amount")?, decimals(currency.as_str()));
    let amount = amount.ok_or_else(|| {
        CallbackError::Unbookable("total_amount is missing or no amount of its currency".into())
    })?;
    // Merchants are asked to encode it once more, and some libraries do it for them.
    let passback = percent_decode(form.bytes("passback_params").unwrap_or_default());
    Ok(Payment {
        payment_id: name(form.text("trade_no")?, "trade_no")?,
        order_ref: cut(form.text("out_trade_no")?),
        amount,
        currency,
        receipt: receipt(passback.decode_utf8().ok().as_deref()),
        made_at: beijing_time(form.text("gmt_payment")?),
    })
}

/// A time such as `2026-11-11 20:00:00`, which Alipay tells in UTC+8.
fn beijing_time(text: &str) -> Option<UnixMillis> {
    let (date, time) = text.split_once(' ')?;
    rfc3339(&format!("{date}T{time}+08:00"))
}

/// Digits of a currency's minor unit (ISO 4217).
fn decimals(currency: &str) -> usize {
    match currency {
        "BIF" | "CLP" | "DJF" | "GNF" | "ISK" | "JPY" | "KMF" | "KRW" | "PYG" | "RWF" | "UGX"
        | "VND" | "VUV" | "XAF" | "XOF" | "XPF" => 0,
        "BHD" | "IQD" | "JOD" | "KWD" | "LYD" | "OMR" | "TND" => 3,
        _ => 2,
    }
}

/// An amount such as `88.8` in minor units of so many digits, exactly.
fn minor_units(text: &str, decimals: usize) -> Option<i64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    // Zeros beyond the minor unit say nothing: yen come as `100.00`.
    let kept = fraction.get(..decimals.min(fraction.len()))?;
    let beyond = fraction.get(kept.len()..)?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let fits = fraction.len() <= decimals.max(2) && beyond.bytes().all(|byte| byte == b'0');
    if whole.is_empty() || fraction.is_empty() || !digits(whole) || !digits(fraction) || !fits {
        return None;
    }
    format!("{whole}{kept:0<decimals$}").parse().ok()
}

/// A form, decoded (`application/x-www-form-urlencoded`) and sorted by name; every name is there
/// once.
struct Form<'a>(Vec<Parameter<'a>>);

/// Name and value.
type Parameter<'a> = (Cow<'a, [u8]>, Cow<'a, [u8]>);

impl<'a> Form<'a> {
    fn decode(body: &'a [u8]) -> Result<Self, CallbackError> {
        let mut pairs: Vec<_> = body
            .split(|byte| *byte == b'&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let equals = pair.iter().position(|byte| *byte == b'=');
                let (name, value) = pair.split_at(equals.unwrap_or(pair.len()));
                (decoded(name), decoded(value.get(1..).unwrap_or_default()))
            })
            .collect();
        pairs.sort_unstable();
        if pairs.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(CallbackError::BadSignature("a parameter comes twice"));
        }
        Ok(Form(pairs))
    }

    /// The value; an empty one counts as none.
    fn bytes(&self, name: &str) -> Option<&[u8]> {
        let place = self
            .0
            .binary_search_by(|(other, _)| other.as_ref().cmp(name.as_bytes()));
        let (_, value) = self.0.get(place.ok()?)?;
        Some(value.as_ref()).filter(|value| !value.is_empty())
    }

    /// The value as text; empty where there is none.
    fn text(&self, name: &'static str) -> Result<&str, CallbackError> {
        std::str::from_utf8(self.bytes(name).unwrap_or_default())
            .map_err(|_| CallbackError::Malformed(format!("{name} is not UTF-8")))
    }

    fn signed(&self) -> impl Iterator<Item = &Parameter<'a>> {
        let unsigned: [&[u8]; 2] = [b"sign", b"sign_type"];
        self.0
            .iter()
            .filter(move |(name, _)| !unsigned.contains(&name.as_ref()))
    }

    fn has_empty(&self) -> bool {
        self.signed().any(|(_, value)| value.is_empty())
    }

    fn signed_text(&self, with_empty: bool) -> Vec<u8> {
        let pairs: Vec<_> = self
            .signed()
            .filter(|(_, value)| with_empty || !value.is_empty())
            .map(|(name, value)| [name, b"=".as_slice(), value].concat())
            .collect();
        pairs.join(&b'&')
    }

    /// Refuses what may be cut elsewhere than it was signed, as told at the head of this file.
    fn check_cuts(&self) -> Result<(), CallbackError> {
        for (name, value) in self.signed() {
            // A name with either of these would join in the same way.
            let odd = name.contains(&b'&') || name.contains(&b'=');
            let mut parts = value.split(|byte| *byte == b'&').skip(1);
            let hidden = parts.any(|part| {
                let name = part.split(|byte| *byte == b'=').next().unwrap_or_default();
                name.len() < part.len() && NAMES.iter().any(|one| one.as_bytes() == name)
            });
            if odd || hidden {
                let why = "a value carries another parameter; it may be cut elsewhere than signed";
                return Err(CallbackError::Unbookable(why.into()));
            }
        }
        Ok(())
    }
}

fn decoded(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.contains(&b'+') {
        return percent_decode(text).into();
    }
    let spaced: Vec<u8> = text
        .iter()
        .map(|byte| if *byte == b'+' { b' ' } else { *byte })
        .collect();
    Cow::Owned(percent_decode(&spaced).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_exact_or_refused() {
        for (text, decimals, expected) in [
            ("88.88", 2, Some(8_888)),
            ("88.8", 2, Some(8_880)),
            ("88", 2, Some(8_800)),
            ("0.01", 2, Some(1)),
            ("007.50", 2, Some(750)),
            ("92233720368547758.07", 2, Some(i64::MAX)),
            ("100.00", 0, Some(100)),
            ("1.234", 3, Some(1_234)),
            ("92233720368547758.08", 2, None),
            ("100.10", 0, None),
            ("88.881", 2, None),
            ("88.880", 2, None),
            ("", 2, None),
            (".5", 2, None),
            ("5.", 2, None),
            ("-1.00", 2, None),
            ("+1.00", 2, None),
            ("1,000.00", 2, None),
            ("1e2", 2, None),
            (" 1.00", 2, None),
            ("1.0.0", 2, None),
            ("１.00", 2, None),
        ] {
            assert_eq!(minor_units(text, decimals), expected, "{text:?}");
        }
    }

    #[test]
    fn the_time_of_a_payment_is_beijing_s_and_anything_else_is_none() {
        let noon = rfc3339("2026-11-11T12:00:00Z");
        assert!(noon.is_some());
        assert_eq!(beijing_time("2026-11-11 20:00:00"), noon);
        for other in ["", "2026-11-11", "2026-11-11 25:00:00", "x y", "1 2 3"] {
            assert_eq!(beijing_time(other), None, "{other:?}");
        }
    }
}
