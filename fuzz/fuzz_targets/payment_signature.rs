//! Callbacks of every provider with any fields and any body: a signature holds exactly if a second, naive reader, who has the
//! private keys and signs the text himself, says so; nothing else is read, and what is read is fresh and keeps its limits.
//! The first byte chooses the provider. Lines `Name: value` follow, then an empty line and the body; `{0}` and `{1}` stand
//! for the right signatures of two keys.

#![no_main]

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::task::Waker;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use httparse::Header;
use libfuzzer_sys::fuzz_target;
use millrace::config::{AlipayPayments, OneOrMany, Payments, Secret};
use millrace::http::data_plane::payments::providers::alipay::Alipay;
use millrace::http::data_plane::payments::providers::{CallbackError, Providers};
use millrace::http::message::Request;
use millrace::order::UnixMillis;
use millrace::order::payment::{Notice, Provider};
use percent_encoding::percent_decode;
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use serde_json::Value;

#[path = "../notice.rs"]
mod notice;

const NOW: UnixMillis = UnixMillis(1_794_000_000_000);

/// As many signatures of a message are tried.
const SIGNATURES_MAX: usize = 16;

static KEYS: LazyLock<Value> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../tests/providers/vectors/keys.json")).expect("keys")
});

static PROVIDERS: LazyLock<Providers> = LazyLock::new(|| {
    let secrets =
        |name: &str| -> OneOrMany { serde_json::from_value(KEYS[name].clone()).expect("secrets") };
    let mut config = Payments::default();
    config.standard.secret = secrets("standard");
    config.stripe.secret = secrets("stripe");
    config.alipay.app_id = "1".into();
    config.alipay.public_key = notice::key("alipay");
    config.wechatpay.mchid = "1".into();
    config.wechatpay.appid = "1".into();
    config.wechatpay.apiv3_key = Secret(KEYS["apiv3_key"].as_str().expect("a key").into());
    config.wechatpay.public_keys = BTreeMap::from([
        (serial("wechatpay"), notice::key("wechatpay")),
        (serial("wechatpay_old"), notice::key("wechatpay_old")),
    ]);
    Providers::new(&config).expect("the keys")
});

static RSA: LazyLock<BTreeMap<&str, RsaKeyPair>> = LazyLock::new(|| {
    let pair = |name| {
        let pem = KEYS[name]["private"].as_str().expect("a key");
        let dense: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        let der = STANDARD.decode(dense).expect("base64");
        (name, RsaKeyPair::from_pkcs8(&der).expect("a key"))
    };
    ["alipay", "wechatpay", "wechatpay_old"].map(pair).into()
});

fn serial(name: &str) -> String {
    KEYS[name]["serial"].as_str().expect("a serial").to_owned()
}

/// The one signature of this text, in base64.
fn rsa(name: &str, text: &[u8]) -> String {
    let pair = &RSA[name];
    let mut signature = vec![0; pair.public().modulus_len()];
    let random = SystemRandom::new();
    pair.sign(&RSA_PKCS1_SHA256, &random, text, &mut signature)
        .expect("a signature");
    STANDARD.encode(signature)
}

/// The tags of both secrets.
fn tags(provider: &str, text: &[u8]) -> [Vec<u8>; 2] {
    [0, 1].map(|at| {
        let secret = KEYS[provider][at].as_str().expect("a secret");
        let secret = match (provider, secret.strip_prefix("whsec_")) {
            ("standard", Some(text)) => STANDARD.decode(text).expect("base64"),
            _ => secret.as_bytes().to_vec(),
        };
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        hmac::sign(&key, text).as_ref().to_vec()
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Callback {
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Callback {
    fn parse(input: &[u8]) -> Option<Self> {
        let end = input.windows(2).position(|two| two == b"\n\n")?;
        let head = std::str::from_utf8(&input[..end]).ok()?;
        let lines = head.lines().filter_map(|line| line.split_once(": "));
        Some(Callback {
            headers: lines
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            body: input[end + 2..].to_vec(),
        })
    }

    /// The field that comes once, in visible ASCII and spaces.
    fn field(&self, name: &str) -> Option<&str> {
        let mut values = self
            .headers
            .iter()
            .filter(|(other, _)| other.eq_ignore_ascii_case(name));
        let (_, value) = values.next().filter(|_| values.next().is_none())?;
        let is_plain = value.chars().all(|c| (' '..='~').contains(&c));
        is_plain.then_some(value)
    }

    fn read(&self, provider: Provider) -> Result<Notice, CallbackError> {
        let headers: Vec<_> = self
            .headers
            .iter()
            .map(|(name, value)| Header {
                name,
                value: value.as_bytes(),
            })
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
        PROVIDERS
            .get(provider)
            .expect("configured")
            .read(&request, NOW)
    }

    /// Writes signatures where they are wanted.
    fn sign(&mut self, provider: Provider) {
        let signatures = match provider {
            Provider::Standard => {
                let Some(text) = self.standard_text() else {
                    return;
                };
                tags("standard", &text).map(|tag| STANDARD.encode(tag))
            }
            Provider::Stripe => {
                let Some(text) = self.stripe_text() else {
                    return;
                };
                tags("stripe", &text).map(|tag| hex(&tag))
            }
            Provider::Wechatpay => {
                let Some(text) = self.wechatpay_text() else {
                    return;
                };
                ["wechatpay", "wechatpay_old"].map(|name| rsa(name, &text))
            }
            Provider::Alipay => {
                let Some([whole, dense]) = alipay_form(&self.body).map(|form| alipay_texts(&form))
                else {
                    return;
                };
                let body = String::from_utf8_lossy(&self.body).into_owned();
                if !body.contains("{0}") && !body.contains("{1}") {
                    return;
                }
                let escaped = |text: &[u8]| {
                    let signature = rsa("alipay", text).replace('+', "%2B");
                    signature.replace('/', "%2F").replace('=', "%3D")
                };
                let body = body.replace("{0}", &escaped(&whole));
                self.body = body.replace("{1}", &escaped(&dense)).into_bytes();
                return;
            }
        };
        for (_, value) in &mut self.headers {
            for (at, signature) in signatures.iter().enumerate() {
                *value = value.replace(&format!("{{{at}}}"), signature);
            }
        }
    }

    fn standard_text(&self) -> Option<Vec<u8>> {
        let (id, at) = (self.field("webhook-id")?, self.field("webhook-timestamp")?);
        Some([id.as_bytes(), at.as_bytes(), &self.body].join(&b'.'))
    }

    fn stripe_time(&self) -> Option<&str> {
        let mut times = self
            .field("stripe-signature")?
            .split(',')
            .filter_map(|item| item.strip_prefix("t="));
        times.next().filter(|_| times.next().is_none())
    }

    fn stripe_text(&self) -> Option<Vec<u8>> {
        Some([self.stripe_time()?.as_bytes(), &self.body].join(&b'.'))
    }

    fn wechatpay_text(&self) -> Option<Vec<u8>> {
        let (at, nonce) = (
            self.field("wechatpay-timestamp")?,
            self.field("wechatpay-nonce")?,
        );
        Some([at.as_bytes(), nonce.as_bytes(), &self.body, b""].join(&b'\n'))
    }

    /// Whether its signature holds; `None` if it carries so many that not all are tried.
    fn holds(&self, provider: Provider) -> Option<bool> {
        let any = |signatures: Vec<&str>, right: [String; 2]| {
            let holds = signatures.iter().any(|one| right.iter().any(|r| r == one));
            (!holds || signatures.len() <= SIGNATURES_MAX).then_some(holds)
        };
        let held = match provider {
            Provider::Standard => self.standard_text().and_then(|text| {
                let field = self.field("webhook-signature")?;
                let signatures = field.split(' ').filter_map(|one| one.strip_prefix("v1,"));
                let right = tags("standard", &text).map(|tag| STANDARD.encode(tag));
                Some(any(signatures.collect(), right))
            }),
            Provider::Stripe => self.stripe_text().and_then(|text| {
                let field = self.field("stripe-signature")?;
                let signatures = field.split(',').filter_map(|one| one.strip_prefix("v1="));
                let right = tags("stripe", &text).map(|tag| hex(&tag));
                Some(any(signatures.collect(), right))
            }),
            Provider::Wechatpay => self.wechatpay_text().and_then(|text| {
                let signature = self.field("wechatpay-signature")?;
                let named = self.field("wechatpay-serial")?;
                let mut names = ["wechatpay", "wechatpay_old"].into_iter();
                let name = names.find(|name| serial(name).eq_ignore_ascii_case(named))?;
                Some(Some(signature == rsa(name, &text)))
            }),
            Provider::Alipay => alipay_form(&self.body).and_then(|form| {
                let sign_type = form.get(&b"sign_type"[..]).filter(|text| !text.is_empty());
                let sign = form.get(&b"sign"[..]).filter(|text| !text.is_empty())?;
                sign_type.is_none_or(|text| text == b"RSA2").then_some(())?;
                // Signing takes longest.
                (sign.len() == 344).then_some(())?;
                let texts = alipay_texts(&form);
                Some(Some(
                    texts
                        .iter()
                        .any(|text| rsa("alipay", text).as_bytes() == sign),
                ))
            }),
        };
        held.unwrap_or(Some(false))
    }

    /// The second that the message is dated, if it is dated at all.
    fn dated(&self, provider: Provider) -> Option<&str> {
        match provider {
            Provider::Standard => self.field("webhook-timestamp"),
            Provider::Stripe => self.stripe_time(),
            Provider::Wechatpay => self.field("wechatpay-timestamp"),
            Provider::Alipay => None,
        }
    }
}

type Form = BTreeMap<Vec<u8>, Vec<u8>>;

/// The parameters of a form; `None` if one comes twice.
fn alipay_form(body: &[u8]) -> Option<Form> {
    let mut form = Form::new();
    for pair in body
        .split(|byte| *byte == b'&')
        .filter(|pair| !pair.is_empty())
    {
        let mut parts = pair.splitn(2, |byte| *byte == b'=');
        let mut decoded = || {
            let part = parts.next().unwrap_or_default();
            let spaced: Vec<u8> = part
                .iter()
                .map(|byte| if *byte == b'+' { b' ' } else { *byte })
                .collect();
            percent_decode(&spaced).collect::<Vec<u8>>()
        };
        let (name, value) = (decoded(), decoded());
        if form.insert(name, value).is_some() {
            return None;
        }
    }
    Some(form)
}

/// The text that is signed, with parameters that are empty and without.
fn alipay_texts(form: &Form) -> [Vec<u8>; 2] {
    [true, false].map(|with_empty| {
        let pairs: Vec<_> = form
            .iter()
            .filter(|(name, _)| *name != b"sign" && *name != b"sign_type")
            .filter(|(_, value)| with_empty || !value.is_empty())
            .map(|(name, value)| [name.as_slice(), value].join(&b'='))
            .collect();
        pairs.join(&b'&')
    })
}

/// A key in one form is a key in the other.
fn key(text: &str) {
    let taken = |text: &str| {
        let config = AlipayPayments {
            app_id: "1".into(),
            seller_id: String::new(),
            public_key: text.into(),
        };
        Alipay::new(&config).is_ok()
    };
    if !text.contains("-----") {
        let text: String = text.split_whitespace().collect();
        let pem = format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n");
        assert!(!taken(&text) || taken(&pem), "{text}");
    } else {
        let _ = taken(text);
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    let provider = match kind % 5 {
        0 => Provider::Standard,
        1 => Provider::Stripe,
        2 => Provider::Wechatpay,
        3 => Provider::Alipay,
        _ => return key(&String::from_utf8_lossy(rest)),
    };
    let Some(mut callback) = Callback::parse(rest) else {
        return;
    };
    callback.sign(provider);
    let read = callback.read(provider);
    let held = !matches!(
        read,
        Err(CallbackError::BadSignature(_) | CallbackError::SignatureProbe)
    );
    match callback.holds(provider) {
        Some(holds) => assert_eq!(held, holds, "{read:?}"),
        None => return,
    }
    if let (Ok(_), Some(dated)) = (&read, callback.dated(provider)) {
        let seconds: i64 = dated.parse().expect("a number");
        assert!((NOW.0 / 1_000 - seconds).abs() <= 300, "{dated}");
    }
    notice::check(provider, &callback.body, read);
});
