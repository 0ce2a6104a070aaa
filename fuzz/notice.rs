//! What every notice keeps, whatever it was read from.

use millrace::http::data_plane::payments::providers::CallbackError;
use millrace::order::payment::{Notice, Provider, REFERENCE_BYTES_MAX};

/// A public key of the tests.
#[allow(dead_code, reason = "not every target needs a key")]
pub fn key(name: &str) -> String {
    let keys = include_str!("../tests/providers/vectors/keys.json");
    let keys: serde_json::Value = serde_json::from_str(keys).expect("keys");
    keys[name]["public"].as_str().expect("a key").to_owned()
}

pub fn check(provider: Provider, body: &[u8], read: Result<Notice, CallbackError>) {
    let notice = match read {
        Ok(notice) => notice,
        Err(error) => {
            assert!((400..600).contains(&error.problem().status), "{error}");
            return;
        }
    };
    let fits = |text: &str| text.len() <= REFERENCE_BYTES_MAX && !text.contains('\0');
    assert_eq!(notice.provider, provider);
    assert!(fits(&notice.event_id) && !notice.event_id.is_empty());
    assert!(fits(&notice.kind));
    assert_eq!(*notice.body, *body);
    let Some(payment) = notice.payment else {
        return;
    };
    assert!(fits(&payment.payment_id) && !payment.payment_id.is_empty());
    assert!(fits(&payment.order_ref));
    assert!(payment.amount >= 0);
    assert!(
        payment
            .currency
            .as_str()
            .bytes()
            .all(|byte| byte.is_ascii_uppercase())
    );
    assert!(
        payment
            .receipt
            .is_none_or(|text| fits(&text) && !text.is_empty())
    );
}
