//! `[payments]` and `[receipt]`: payment providers, and the keys that verify callbacks and
//! receipts.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ConfigError, OneOrMany};

/// Bytes of a WeChat Pay API v3 key, which is an AES-256 key.
const APIV3_KEY_BYTES: usize = 32;

/// Fewest bytes of a receipt key; a shorter one could be guessed.
const RECEIPT_KEY_BYTES_MIN: usize = 16;

/// `[payments]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Payments {
    /// Most searches for the order of a payment before it is recovered from the receipt.
    #[schemars(range(min = 1, max = 30))]
    pub orphan_checks: u32,
    /// Pause before the first search, in milliseconds; it doubles with each. A shorter pause finds
    /// an order that is still being written sooner, at the cost of more database reads.
    #[schemars(range(min = 100, max = 3_600_000))]
    pub orphan_check_ms: u64,
    /// Any provider that sends Standard Webhooks.
    pub standard: StandardPayments,
    /// Stripe.
    pub stripe: StripePayments,
    /// Alipay.
    pub alipay: AlipayPayments,
    /// WeChat Pay, API version 3.
    pub wechatpay: WechatpayPayments,
}

/// `[payments.standard]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct StandardPayments {
    /// Secrets of at least 24 bytes in base64, with or without the prefix `whsec_`, one or a list. A message
    /// signed with any of them is accepted, so that secrets can be rotated. None: the path answers `404`.
    #[schemars(with = "Vec<String>")]
    pub secret: OneOrMany,
}

/// `[payments.stripe]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct StripePayments {
    /// The endpoint's signing secrets as Stripe shows them (`whsec_…`), one or a list. A message
    /// signed with any of them is accepted. None: the path answers `404`.
    #[schemars(with = "Vec<String>")]
    pub secret: OneOrMany,
}

/// `[payments.alipay]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct AlipayPayments {
    /// Id of the Alipay application; messages of another are refused. Empty: the path answers
    /// `404`.
    pub app_id: String,
    /// The seller's account (2088…); messages for another are refused. Empty: it is not checked.
    pub seller_id: String,
    /// Alipay's public key, not the application's: base64 as the console shows it, or PEM of the
    /// key or of a certificate.
    pub public_key: String,
}

/// `[payments.wechatpay]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct WechatpayPayments {
    /// The merchant id; payments to another are refused. Empty: the path answers `404`.
    pub mchid: String,
    /// Id of the application; payments through another are refused.
    pub appid: String,
    /// The API v3 key, 32 bytes, which decrypts the content of a message.
    #[schemars(with = "String")]
    pub apiv3_key: Secret,
    /// WeChat Pay's public keys by their serial (`PUB_KEY_ID_…`, or the number of a platform
    /// certificate, in any case), each as PEM of the key or of the certificate. Several keys permit
    /// rotation.
    pub public_keys: BTreeMap<String, String>,
}

/// `[receipt]`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Receipt {
    /// Keys of at least 16 bytes, one or a list. The first signs receipts; all of them verify.
    /// None: a key is created under `data_dir` at the first start. A machine that replaces this one
    /// needs that key.
    #[schemars(with = "Vec<String>")]
    pub key: OneOrMany,
}

/// A secret text; empty means none. `Debug` hides it.
#[derive(Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_empty() {
            "(none)"
        } else {
            "(hidden)"
        })
    }
}

impl Default for Payments {
    fn default() -> Self {
        Payments {
            orphan_checks: 5,
            orphan_check_ms: 1_000,
            standard: StandardPayments::default(),
            stripe: StripePayments::default(),
            alipay: AlipayPayments::default(),
            wechatpay: WechatpayPayments::default(),
        }
    }
}

impl AlipayPayments {
    fn check(&self) -> Result<(), ConfigError> {
        let set = [&self.app_id, &self.public_key, &self.seller_id];
        if set.iter().all(|text| text.is_empty()) {
            return Ok(());
        }
        needed("payments.alipay.app_id", &self.app_id)?;
        needed("payments.alipay.public_key", &self.public_key)
    }
}

impl WechatpayPayments {
    fn check(&self) -> Result<(), ConfigError> {
        let key = &self.apiv3_key.0;
        let set = [&self.mchid, &self.appid, key];
        if set.iter().all(|text| text.is_empty()) && self.public_keys.is_empty() {
            return Ok(());
        }
        needed("payments.wechatpay.mchid", &self.mchid)?;
        needed("payments.wechatpay.appid", &self.appid)?;
        needed("payments.wechatpay.apiv3_key", key)?;
        if key.len() != APIV3_KEY_BYTES {
            return Err(ConfigError::Field {
                field: "payments.wechatpay.apiv3_key",
                message: format!("is {} bytes long, not {APIV3_KEY_BYTES}", key.len()),
            });
        }
        let mut serials: Vec<_> = self.public_keys.keys().map(|s| s.to_uppercase()).collect();
        serials.sort();
        let message = match serials.windows(2).find(|pair| pair[0] == pair[1]) {
            _ if serials.is_empty() => {
                "has no key; set one, as in public_keys.PUB_KEY_ID_… = \"…\"".into()
            }
            _ if serials[0].is_empty() => "has a key without a serial".into(),
            Some(pair) => format!("has {} twice; case makes no difference", pair[0]),
            None => return Ok(()),
        };
        let field = "payments.wechatpay.public_keys";
        Err(ConfigError::Field { field, message })
    }
}

fn needed(field: &'static str, text: &str) -> Result<(), ConfigError> {
    if !text.is_empty() {
        return Ok(());
    }
    let section = field.rsplit_once('.').map_or(field, |(section, _)| section);
    let message = format!("is missing; complete [{section}], or remove all of it");
    Err(ConfigError::Field { field, message })
}

/// Checks the fields of both sections against one another. The content of keys is checked by their
/// users (`http::data_plane::payments::providers`).
pub(super) fn check(payments: &Payments, receipt: &Receipt) -> Result<(), ConfigError> {
    payments.alipay.check()?;
    payments.wechatpay.check()?;
    match receipt.key.0.iter().map(String::len).min() {
        Some(bytes) if bytes < RECEIPT_KEY_BYTES_MIN => Err(ConfigError::Field {
            field: "receipt.key",
            message: format!(
                "is {bytes} bytes long; use {RECEIPT_KEY_BYTES_MIN} or more random bytes"
            ),
        }),
        _ => Ok(()),
    }
}
