//! Callbacks as values: read from the vectors, or signed here with the vectors' keys.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::task::Waker;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use millrace::config::{OneOrMany, Payments, Secret};
use millrace::http::data_plane::payments::providers::{CallbackError, Providers};
use millrace::http::message::Request;
use millrace::order::UnixMillis;
use millrace::order::payment::{Notice, Provider};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;

pub const APP_ID: &str = "2021000000000001";
pub const SELLER_ID: &str = "2088000000000001";
pub const MCHID: &str = "1900000001";
pub const APPID: &str = "wx0000000000000001";

/// When callbacks that are signed here are sent and read.
pub const NOW: UnixMillis = UnixMillis(1_794_000_000_000);

pub static KEYS: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("vectors/keys.json")).expect("keys"));

pub static PROVIDERS: LazyLock<Providers> =
    LazyLock::new(|| Providers::new(&config()).expect("the vectors' keys"));

pub fn key(name: &str, form: &str) -> String {
    KEYS[name][form].as_str().expect("a key").to_owned()
}

fn secrets(name: &str) -> OneOrMany {
    serde_json::from_value(KEYS[name].clone()).expect("secrets")
}

/// Every provider, with the keys that signed the vectors.
pub fn config() -> Payments {
    let mut config = Payments::default();
    config.standard.secret = secrets("standard");
    config.stripe.secret = secrets("stripe");
    config.alipay.app_id = APP_ID.into();
    config.alipay.seller_id = SELLER_ID.into();
    // As Alipay's console shows it.
    let pem = key("alipay", "public");
    config.alipay.public_key = pem.lines().filter(|line| !line.starts_with('-')).collect();
    config.wechatpay.mchid = MCHID.into();
    config.wechatpay.appid = APPID.into();
    config.wechatpay.apiv3_key = Secret(KEYS["apiv3_key"].as_str().expect("a key").into());
    config.wechatpay.public_keys = BTreeMap::from([
        (key("wechatpay", "serial"), key("wechatpay", "public")),
        (
            key("wechatpay_old", "serial"),
            key("wechatpay_old", "certificate"),
        ),
    ]);
    config
}

/// One delivery.
#[derive(Clone)]
pub struct Callback {
    pub provider: Provider,
    pub headers: Vec<(String, Vec<u8>)>,
    pub body: Vec<u8>,
    pub at: UnixMillis,
}

impl Callback {
    /// What its provider makes of it.
    pub fn read(&self) -> Result<Notice, CallbackError> {
        self.read_as(self.provider)
    }

    pub fn read_as(&self, provider: Provider) -> Result<Notice, CallbackError> {
        let headers: Vec<_> = self
            .headers
            .iter()
            .map(|(name, value)| httparse::Header { name, value })
            .collect();
        let request = Request {
            method: "POST",
            target: "/v1/payments/any/notify",
            headers: &headers,
            body: &self.body,
            waker: &Arc::new(Waker::noop().clone()),
            before_wait: &|| {},
            trace: None,
        };
        let provider = PROVIDERS.get(provider).expect("configured");
        provider.read(&request, self.at)
    }

    pub fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut changed = self.clone();
        change(&mut changed);
        changed
    }
}

/// Runs a test on a stack of the size that a coroutine has.
pub fn on_a_small_stack(test: fn()) {
    let thread = std::thread::Builder::new().stack_size(256 << 10);
    let ended = thread.spawn(test).expect("a thread").join();
    if let Err(panic) = ended {
        std::panic::resume_unwind(panic);
    }
}

/// What a callback of any provider tells of a payment; JSON where the provider sends JSON.
#[derive(Clone)]
pub struct Told {
    pub event_id: Value,
    pub payment_id: Value,
    pub order_ref: Value,
    pub amount: Value,
    pub currency: Value,
    pub receipt: Value,
    /// More JSON, members with a comma before them, for the object that tells of the payment.
    pub more: String,
}

impl Told {
    /// A payment of 1,999.00.
    pub fn new() -> Self {
        Told {
            event_id: "event-1".into(),
            payment_id: "payment-1".into(),
            order_ref: "7340123456789012480".into(),
            amount: 199_900.into(),
            currency: "CNY".into(),
            receipt: "mr1.receipt".into(),
            more: String::new(),
        }
    }

    pub fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut told = Self::new();
        change(&mut told);
        told
    }

    /// The callback that tells this.
    pub fn by(&self, provider: Provider) -> Callback {
        let Told {
            event_id,
            payment_id,
            order_ref,
            amount,
            currency,
            receipt,
            more,
        } = self;
        match provider {
            Provider::Standard => {
                let data = format!(
                    r#"{{"order_id":{order_ref},"payment_id":{payment_id},"amount":{amount},"currency":{currency},"receipt":{receipt}{more}}}"#
                );
                let body = format!(r#"{{"type":"payment.succeeded","data":{data}}}"#);
                standard(event_id.as_str().unwrap_or_default(), &body)
            }
            Provider::Stripe => {
                let metadata = format!(r#"{{"order_id":{order_ref},"receipt":{receipt}}}"#);
                let intent = format!(
                    r#"{{"id":{payment_id},"amount_received":{amount},"currency":{currency},"metadata":{metadata}{more}}}"#
                );
                stripe(&format!(
                    r#"{{"id":{event_id},"type":"payment_intent.succeeded","data":{{"object":{intent}}}}}"#
                ))
            }
            Provider::Alipay => {
                let text = |value: &Value| match value {
                    Value::String(text) => text.clone(),
                    Value::Null => String::new(),
                    other => other.to_string(),
                };
                let amount = match amount.as_i64() {
                    Some(minor) => {
                        let sign = if minor < 0 { "-" } else { "" };
                        let minor = minor.unsigned_abs();
                        format!("{sign}{}.{:02}", minor / 100, minor % 100)
                    }
                    None => text(amount),
                };
                alipay(&[
                    ("app_id", APP_ID),
                    ("charset", "utf-8"),
                    ("notify_id", &text(event_id)),
                    ("out_trade_no", &text(order_ref)),
                    ("passback_params", &text(receipt)),
                    ("seller_id", SELLER_ID),
                    ("total_amount", &amount),
                    ("trade_no", &text(payment_id)),
                    ("trade_status", "TRADE_SUCCESS"),
                    ("trans_currency", &text(currency)),
                ])
            }
            Provider::Wechatpay => wechatpay(
                event_id,
                &format!(
                    r#"{{"mchid":"{MCHID}","appid":"{APPID}","trade_state":"SUCCESS","transaction_id":{payment_id},"out_trade_no":{order_ref},"attach":{receipt},"amount":{{"total":{amount},"currency":{currency}}}{more}}}"#
                ),
            ),
        }
    }
}

fn seconds() -> String {
    (NOW.0 / 1_000).to_string()
}

fn hmac_sha256(key: &[u8], text: &str) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, text.as_bytes()).as_ref().to_vec()
}

fn callback(provider: Provider, headers: &[(&str, &str)], body: &str) -> Callback {
    Callback {
        provider,
        headers: headers
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec()))
            .collect(),
        body: body.into(),
        at: NOW,
    }
}

/// A Standard Webhooks message with this id and body.
pub fn standard(id: &str, body: &str) -> Callback {
    let secret = KEYS["standard"][0].as_str().expect("a secret");
    let secret = STANDARD.decode(secret.strip_prefix("whsec_").expect("a prefix"));
    let text = format!("{id}.{}.{body}", seconds());
    let signature = STANDARD.encode(hmac_sha256(&secret.expect("base64"), &text));
    let headers = [
        ("webhook-id", id),
        ("webhook-timestamp", &seconds()),
        ("webhook-signature", &format!("v1,{signature}")),
    ];
    callback(Provider::Standard, &headers, body)
}

/// A Stripe event with this body.
pub fn stripe(body: &str) -> Callback {
    let secret = KEYS["stripe"][0].as_str().expect("a secret");
    let signature = hmac_sha256(secret.as_bytes(), &format!("{}.{body}", seconds()));
    let hex: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
    let header = format!("t={},v1={hex}", seconds());
    callback(Provider::Stripe, &[("Stripe-Signature", &header)], body)
}

fn rsa_sign(name: &str, text: &str) -> String {
    let pem = key(name, "private");
    let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).expect("PEM");
    let pair = RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).expect("a key");
    let mut signature = vec![0; pair.public().modulus_len()];
    pair.sign(
        &RSA_PKCS1_SHA256,
        &SystemRandom::new(),
        text.as_bytes(),
        &mut signature,
    )
    .expect("a signature");
    STANDARD.encode(signature)
}

/// Form encoding, with everything but letters and digits escaped.
pub fn encoded(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// An Alipay notification with these parameters, which are sorted.
pub fn alipay(form: &[(&str, &str)]) -> Callback {
    assert!(form.is_sorted(), "{form:?}");
    let text: Vec<_> = form.iter().map(|(n, v)| format!("{n}={v}")).collect();
    let sign = rsa_sign("alipay", &text.join("&"));
    let body: Vec<_> = form
        .iter()
        .chain(&[("sign", sign.as_str()), ("sign_type", "RSA2")])
        .map(|(name, value)| format!("{name}={}", encoded(value)))
        .collect();
    callback(Provider::Alipay, &[], &body.join("&"))
}

/// A WeChat Pay notification of a payment with this id and (plain) resource.
pub fn wechatpay(id: &Value, transaction: &str) -> Callback {
    let key_bytes = KEYS["apiv3_key"].as_str().expect("a key").as_bytes();
    let cipher = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key_bytes).expect("32 bytes"));
    let mut text = transaction.as_bytes().to_vec();
    cipher
        .seal_in_place_append_tag(
            Nonce::assume_unique_for_key(*b"twelve bytes"),
            Aad::from(b"transaction"),
            &mut text,
        )
        .expect("encrypted");
    let ciphertext = STANDARD.encode(text);
    wechatpay_raw(&format!(
        r#"{{"id":{id},"event_type":"TRANSACTION.SUCCESS","resource":{{"algorithm":"AEAD_AES_256_GCM","ciphertext":"{ciphertext}","nonce":"twelve bytes","associated_data":"transaction"}}}}"#
    ))
}

/// A WeChat Pay notification with this body.
pub fn wechatpay_raw(body: &str) -> Callback {
    let signature = rsa_sign("wechatpay", &format!("{}\nn0nce\n{body}\n", seconds()));
    let headers = [
        ("Wechatpay-Timestamp", seconds()),
        ("Wechatpay-Nonce", "n0nce".into()),
        ("Wechatpay-Signature", signature),
        ("Wechatpay-Serial", key("wechatpay", "serial")),
    ];
    let headers: Vec<_> = headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
    callback(Provider::Wechatpay, &headers, body)
}
