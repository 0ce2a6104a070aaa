//! WeChat Pay, API version 3: SHA256withRSA over `timestamp\nnonce\nbody\n` by the key that
//! `Wechatpay-Serial` names, and what it is about encrypted with AES-256-GCM.
//!
//! Now and then it sends false signatures (`WECHATPAY/SIGNTEST/…`) to see that they are refused.

use std::collections::HashMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};

use super::keys::RsaKey;
use super::message::{
    Loose, Whole, amount, check_fresh, currency, cut, event_id, field, json, name, payment_json,
    receipt, rfc3339,
};
use super::{CallbackError, PaymentProvider, challenge};
use crate::config::{ConfigError, WechatpayPayments};
use crate::http::message::{Request, Response};
use crate::order::UnixMillis;
use crate::order::payment::{Notice, Payment, Provider};

/// The type of an event that tells of a payment, and the state of a trade that is paid.
const PAID: &str = "TRANSACTION.SUCCESS";
const SUCCESS: &str = "SUCCESS";

/// How a signature begins that is meant to be refused.
const PROBE: &str = "WECHATPAY/SIGNTEST/";

/// The provider.
#[derive(Debug)]
pub struct Wechatpay {
    mchid: String,
    appid: String,
    /// By serial, in capitals.
    keys: HashMap<String, RsaKey>,
    apiv3_key: Apiv3Key,
}

struct Apiv3Key(LessSafeKey);

impl fmt::Debug for Apiv3Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default)]
    id: Loose<'a>,
    #[serde(borrow, default)]
    event_type: Loose<'a>,
    #[serde(borrow, default)]
    resource: Resource<'a>,
}

#[derive(Default, Deserialize)]
struct Resource<'a> {
    #[serde(borrow, default)]
    algorithm: Loose<'a>,
    #[serde(borrow, default)]
    ciphertext: Loose<'a>,
    #[serde(borrow, default)]
    nonce: Loose<'a>,
    #[serde(borrow, default)]
    associated_data: Loose<'a>,
}

#[derive(Deserialize)]
struct Transaction<'a> {
    #[serde(borrow, default)]
    mchid: Loose<'a>,
    #[serde(borrow, default)]
    appid: Loose<'a>,
    #[serde(borrow, default)]
    trade_state: Loose<'a>,
    #[serde(borrow, default)]
    transaction_id: Loose<'a>,
    #[serde(borrow, default)]
    out_trade_no: Loose<'a>,
    #[serde(borrow, default)]
    attach: Loose<'a>,
    #[serde(borrow, default)]
    success_time: Loose<'a>,
    #[serde(borrow, default)]
    amount: Amount<'a>,
}

#[derive(Default, Deserialize)]
struct Amount<'a> {
    #[serde(default)]
    total: Whole,
    #[serde(borrow, default)]
    currency: Loose<'a>,
}

#[derive(Serialize)]
struct Failure<'a> {
    code: &'static str,
    message: &'a str,
}

impl Wechatpay {
    /// The provider, where it is configured.
    ///
    /// # Errors
    /// [`ConfigError`] where one of its keys cannot be read.
    pub fn new(config: &WechatpayPayments) -> Result<Option<Self>, ConfigError> {
        if config.mchid.is_empty() {
            return Ok(None);
        }
        let mut keys = HashMap::new();
        for (serial, text) in &config.public_keys {
            let key = RsaKey::read(text).map_err(|what| ConfigError::Field {
                field: "payments.wechatpay.public_keys",
                message: format!("{serial} {what}"),
            })?;
            keys.insert(serial.to_ascii_uppercase(), key);
        }
        let key = UnboundKey::new(&AES_256_GCM, config.apiv3_key.0.as_bytes());
        let key = key.map_err(|_| ConfigError::Field {
            field: "payments.wechatpay.apiv3_key",
            message: "is not 32 bytes long".into(),
        })?;
        Ok(Some(Wechatpay {
            mchid: config.mchid.clone(),
            appid: config.appid.clone(),
            keys,
            apiv3_key: Apiv3Key(LessSafeKey::new(key)),
        }))
    }

    /// Reads a body that is verified.
    ///
    /// # Errors
    /// [`CallbackError::Malformed`], [`CallbackError::NotForUs`] and [`CallbackError::Unbookable`].
    pub fn parse(&self, body: &[u8]) -> Result<Notice, CallbackError> {
        self.notice(body, |resource| self.open(resource))
    }

    /// The same for a resource that was decrypted already. For the fuzzer, which cannot encrypt.
    #[doc(hidden)]
    pub fn parse_opened(&self, body: &[u8], opened: &[u8]) -> Result<Notice, CallbackError> {
        self.notice(body, |_| Ok(opened.to_vec()))
    }

    fn notice(
        &self,
        body: &[u8],
        open: impl FnOnce(&Resource<'_>) -> Result<Vec<u8>, CallbackError>,
    ) -> Result<Notice, CallbackError> {
        let event: Event<'_> = json(body)?;
        let payment = match event.event_type.text() {
            "" => return Err(CallbackError::Malformed("it has no event_type".into())),
            PAID => self.payment(&open(&event.resource)?)?,
            _ => None,
        };
        Ok(Notice {
            provider: Provider::Wechatpay,
            event_id: event_id(event.id.text(), "id", payment.as_ref())?,
            kind: cut(event.event_type.text()),
            body: body.into(),
            payment,
        })
    }

    fn open(&self, resource: &Resource<'_>) -> Result<Vec<u8>, CallbackError> {
        if resource.algorithm.text() != "AEAD_AES_256_GCM" {
            let why = "its resource is not encrypted with AEAD_AES_256_GCM";
            return Err(CallbackError::Unbookable(why.into()));
        }
        let wrong = |_| {
            let why = "its resource cannot be decrypted: look at payments.wechatpay.apiv3_key";
            CallbackError::Unbookable(why.into())
        };
        let nonce = Nonce::try_assume_unique_for_key(resource.nonce.text().as_bytes());
        let mut text = STANDARD
            .decode(resource.ciphertext.text())
            .map_err(|_| wrong(ring::error::Unspecified))?;
        let aad = Aad::from(resource.associated_data.text().as_bytes());
        let key = &self.apiv3_key.0;
        let opened = key
            .open_in_place(nonce.map_err(wrong)?, aad, &mut text)
            .map_err(wrong)?
            .len();
        text.truncate(opened);
        Ok(text)
    }

    fn payment(&self, transaction: &[u8]) -> Result<Option<Payment>, CallbackError> {
        let it: Transaction<'_> = payment_json(transaction)?;
        if it.mchid.text() != self.mchid {
            return Err(CallbackError::NotForUs("mchid"));
        }
        if it.appid.text() != self.appid {
            return Err(CallbackError::NotForUs("appid"));
        }
        if it.trade_state.text() != SUCCESS {
            return Ok(None);
        }
        Ok(Some(Payment {
            payment_id: name(it.transaction_id.text(), "transaction_id")?,
            order_ref: cut(it.out_trade_no.text()),
            amount: amount(it.amount.total.0)?,
            // The documentation calls it optional.
            currency: currency(it.amount.currency.get().unwrap_or("CNY"))?,
            receipt: receipt(it.attach.get()),
            made_at: rfc3339(it.success_time.text()),
        }))
    }
}

impl PaymentProvider for Wechatpay {
    fn provider(&self) -> Provider {
        Provider::Wechatpay
    }

    fn read(&self, request: &Request<'_>, now: UnixMillis) -> Result<Notice, CallbackError> {
        let signature = field(request, "wechatpay-signature")?;
        if signature.starts_with(PROBE) {
            return Err(CallbackError::SignatureProbe);
        }
        let timestamp = field(request, "wechatpay-timestamp")?;
        let nonce = field(request, "wechatpay-nonce")?;
        let serial = field(request, "wechatpay-serial")?.to_ascii_uppercase();
        let key = self.keys.get(&serial).ok_or(CallbackError::BadSignature(
            "its serial is not among payments.wechatpay.public_keys",
        ))?;
        let signed = [
            timestamp.as_bytes(),
            nonce.as_bytes(),
            request.body,
            b"".as_slice(),
        ]
        .join(&b'\n');
        if !key.verify(&signed, signature.as_bytes()) {
            return Err(CallbackError::BadSignature("it is not that of this text"));
        }
        check_fresh(timestamp, now)?;
        self.parse(request.body)
    }

    fn refuse(&self, response: &mut Response, error: &CallbackError) {
        error.log(self.provider());
        let problem = error.problem();
        response.set_status(problem.status);
        challenge(response, &problem);
        response.header("Content-Type", "application/json");
        if let Some(seconds) = problem.retry_after {
            response.header("Retry-After", seconds);
        }
        let failure = Failure {
            code: "FAIL",
            message: &problem.detail,
        };
        // Writing to a vector cannot fail, and it always serializes.
        let _ = serde_json::to_writer(response.body_mut(), &failure);
    }
}
