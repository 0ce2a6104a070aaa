//! What providers are configured with.

use millrace::config::{OneOrMany, Payments};
use millrace::http::data_plane::payments::providers::Providers;
use millrace::http::data_plane::payments::providers::standard::Standard;
use millrace::order::payment::Provider;

use crate::fixture::{KEYS, config, key};

fn mistake(change: impl FnOnce(&mut Payments)) -> String {
    let mut config = config();
    change(&mut config);
    let error = Providers::new(&config).expect_err("a mistake");
    error.to_string()
}

#[test]
fn a_provider_without_its_secrets_is_not_there() {
    let none = Providers::new(&Payments::default()).unwrap();
    let all = Providers::new(&config()).unwrap();
    for provider in Provider::ALL {
        assert!(none.get(*provider).is_none(), "{provider}");
        let there = all.get(*provider).expect("configured");
        assert_eq!(there.provider(), *provider);
    }
}

#[test]
fn keys_never_show() {
    let shown = format!("{:?} {:?}", config(), Providers::new(&config()).unwrap());
    for secret in KEYS["standard"].as_array().unwrap() {
        assert!(!shown.contains(secret.as_str().unwrap()));
    }
    for secret in KEYS["stripe"].as_array().unwrap() {
        assert!(!shown.contains(secret.as_str().unwrap()));
    }
    assert!(!shown.contains(KEYS["apiv3_key"].as_str().unwrap()));
}

#[test]
fn a_public_key_is_pem_or_base64_or_a_certificate() {
    let pem = key("alipay", "public");
    let bare: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let folded = bare.as_bytes().chunks(40).collect::<Vec<_>>().join(&b'\n');
    for good in [
        pem.clone(),
        format!("\n{pem}\n"),
        pem.replace('\n', "\r\n"),
        bare,
        String::from_utf8(folded).unwrap(),
        key("wechatpay_old", "certificate"),
    ] {
        let mut config = config();
        config.alipay.public_key = good.clone();
        assert!(Providers::new(&config).is_ok(), "{good}");
    }
}

#[test]
fn a_key_that_is_none_is_named() {
    let cases = [
        ("", "is empty"),
        ("not base64!", "neither PEM nor base64"),
        ("AAAA", "holds no public key"),
        (
            "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
            "holds no public key",
        ),
        ("-----BEGIN PUBLIC KEY-----\nAAAA", "cannot be read"),
        (
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----",
            "cannot be read",
        ),
    ];
    for (text, expected) in cases {
        let message = mistake(|config| config.alipay.public_key = text.into());
        assert!(message.contains("payments.alipay.public_key"), "{message}");
        assert!(message.contains(expected), "{text}: {message}");
    }
    let private = key("alipay", "private");
    let message = mistake(|config| config.alipay.public_key = private.clone());
    assert!(message.contains("BEGIN PRIVATE KEY"), "{message}");
    assert!(!message.contains(private.lines().nth(1).unwrap()));
    let message = mistake(|config| {
        let keys = &mut config.wechatpay.public_keys;
        keys.insert("5F2B".into(), "AAAA".into());
    });
    assert!(
        message.contains("payments.wechatpay.public_keys: 5F2B holds no"),
        "{message}"
    );
    for bad in ["whsec_", "whsec_%%%", "%"] {
        let secrets = OneOrMany(vec!["whsec_AAAA".into(), bad.into()]);
        let message = mistake(|config| config.standard.secret = secrets);
        assert!(message.contains("payments.standard.secret"), "{message}");
        assert!(!message.contains("%%%"), "{message}");
    }
}

#[test]
fn a_secret_that_examples_print_is_refused_and_a_short_one_is_a_warning() {
    for printed in [
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    ] {
        let secrets = OneOrMany(vec![printed.into()]);
        let message = mistake(|config| config.standard.secret = secrets);
        assert!(message.contains("payments.standard.secret"), "{message}");
        assert!(!message.contains("MfKQ"), "{message}");
    }
    let mut config = config();
    assert_eq!(Standard::warning(&config.standard), None);
    config.standard.secret.0.push("whsec_AAAA".into());
    assert!(Providers::new(&config).is_ok());
    let (name, detail) = Standard::warning(&config.standard).expect("it is short");
    assert_eq!(name, "payment_secret_short");
    assert!(
        detail.contains("3 bytes") && !detail.contains("AAAA"),
        "{detail}"
    );
    assert_eq!(Standard::warning(&Payments::default().standard), None);
}

#[test]
fn weak_and_foreign_keys_are_refused_at_start() {
    for (key, expected) in [(RSA_1024, "1024 bits"), (P_256, "not RSA")] {
        let message = mistake(|config| config.alipay.public_key = key.into());
        assert!(message.contains(expected), "{message}");
    }
}

/// The public half of a key of 1,024 bits.
const RSA_1024: &str = "MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQCl+BiXqWjeEhl9nXozmieavh4jik8TA3VTYzyMXDN529VQUueIabZvTviaNFIqL3+dfuBCeyyW2xO9GlSKZheCWecmY08ja//ppZhX1AdBUFc6Lm5wtKEvFxcNf73ftNr3QA6/RN0qXThHzbB9DB05CGfhQM22fyQxMwoPHcsajwIDAQAB";

/// That of a key on an elliptic curve.
const P_256: &str = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEbtWMOlGZcSkN2f58BVDxCSVCTZZyq9j2OwywrbPQGNkPZSqyGJMtgwxlo99CSv3nLSFjzjrwJDW5ONK5gEuqcQ==";
