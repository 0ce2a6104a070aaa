//! Callbacks that the providers' SDKs signed, and what they made of them (`vectors/make.py`).

use std::collections::BTreeMap;

use millrace::order::UnixMillis;
use millrace::order::payment::{Notice, Provider};
use serde::Deserialize;

use crate::fixture::Callback;

#[derive(Deserialize)]
struct File {
    vectors: Vec<Vector>,
}

#[derive(Deserialize)]
pub struct Vector {
    pub name: String,
    provider: String,
    at_ms: i64,
    headers: Vec<(String, String)>,
    body: String,
    expect: Expected,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Expected {
    /// `refused`, or `not ours`: the SDK verifies and leaves the account to its caller.
    Refused(String),
    Read {
        event_id: String,
        kind: String,
        payment: Option<ExpectedPayment>,
    },
}

#[derive(Deserialize)]
struct ExpectedPayment {
    payment_id: String,
    order_ref: String,
    amount: i64,
    currency: String,
    receipt: Option<String>,
}

impl Vector {
    fn provider(&self) -> Provider {
        Provider::from_word(&self.provider).expect("a provider")
    }

    pub fn callback(&self) -> Callback {
        let bytes = |(name, value): &(String, String)| (name.clone(), value.as_bytes().to_vec());
        Callback {
            provider: self.provider(),
            headers: self.headers.iter().map(bytes).collect(),
            // The one that is not in UTF-8 is all percent signs.
            body: self.body.as_bytes().to_vec(),
            at: UnixMillis(self.at_ms),
        }
    }
}

pub fn all() -> Vec<Vector> {
    let file: File = serde_json::from_str(include_str!("vectors/vectors.json")).expect("vectors");
    file.vectors
}

/// The plain payment of a provider.
pub fn a_payment(provider: Provider) -> Callback {
    let is_it = |vector: &Vector| vector.provider() == provider && vector.name == "a payment";
    let vectors = all();
    let vector = vectors.iter().find(|vector| is_it(vector));
    vector.expect("there is one").callback()
}

#[test]
fn every_callback_is_judged_as_the_providers_sdk_judged_it() {
    let mut counts: BTreeMap<Provider, (usize, usize)> = BTreeMap::new();
    for vector in all() {
        let callback = vector.callback();
        let label = format!("{}: {}", vector.provider, vector.name);
        let read = callback.read();
        let count = counts.entry(vector.provider()).or_default();
        match &vector.expect {
            Expected::Refused(word) => {
                let error = read.expect_err(&label);
                let not_ours = error.problem().code == "wrong_account";
                assert_eq!(not_ours, word == "not ours", "{label}: {error}");
                count.1 += 1;
            }
            Expected::Read {
                event_id,
                kind,
                payment,
            } => {
                let notice = read.unwrap_or_else(|error| panic!("{label}: {error}"));
                assert_eq!(notice.provider, vector.provider(), "{label}");
                assert_eq!(&notice.event_id, event_id, "{label}");
                assert_eq!(&notice.kind, kind, "{label}");
                assert_eq!(*notice.body, *callback.body, "{label}");
                same_payment(&label, &notice, payment.as_ref());
                count.0 += 1;
            }
        }
    }
    for provider in Provider::ALL {
        let (read, refused) = counts.get(provider).copied().unwrap_or_default();
        assert!(
            read >= 4 && refused >= 3,
            "{provider}: {read} and {refused}"
        );
    }
}

fn same_payment(label: &str, notice: &Notice, expected: Option<&ExpectedPayment>) {
    let (Some(payment), Some(expected)) = (&notice.payment, expected) else {
        assert_eq!(notice.payment.is_some(), expected.is_some(), "{label}");
        return;
    };
    assert_eq!(payment.payment_id, expected.payment_id, "{label}");
    assert_eq!(payment.order_ref, expected.order_ref, "{label}");
    assert_eq!(payment.amount, expected.amount, "{label}");
    assert_eq!(payment.currency.as_str(), expected.currency, "{label}");
    assert_eq!(payment.receipt, expected.receipt, "{label}");
}
