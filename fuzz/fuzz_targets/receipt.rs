//! `ReceiptKeys::open` on any text never panics, and what it takes, one of the keys signs to the
//! same text again. The first byte chooses: any text (no fuzzer finds a MAC, but the text is read
//! before the MAC is checked), or any order, whose receipt comes back and, altered, does not.

#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use millrace::order::receipt::{
    CHARACTERS_MAX, Issuer, ReceiptKeys, ReceiptOrder, ReceiptSku, SignedParts,
};
use millrace::order::{Currency, KeyHash, OrderId, PayloadHash, SkuTag, UnixMillis};

/// The seeds are signed with the first.
const KEYS: [&str; 2] = ["the key of the fuzz target", "the key that it retired"];

/// A database that took no receipt of version 1 over.
const ISSUER: Issuer = Issuer {
    database: *b"the fuzz target.",
    version_1_until: UnixMillis(0),
};

#[derive(Arbitrary, Debug)]
struct Raw {
    id: u64,
    user: Vec<u8>,
    sku: u32,
    quantity: u16,
    adjustment: i64,
    amount: i64,
    currency: [u8; 3],
    created_after_id: Moment,
    expires_after_created: Moment,
    key: Option<[u8; 16]>,
    payload: u64,
    /// Which character of the receipt to alter, and into which.
    at: u8,
    to: u8,
}

#[derive(Arbitrary, Debug)]
enum Moment {
    Near(i16),
    Soon(i32),
    Ever(i64),
}

impl Moment {
    fn after(&self, start: UnixMillis) -> UnixMillis {
        UnixMillis(start.0.wrapping_add(match *self {
            Moment::Near(ms) => ms.into(),
            Moment::Soon(ms) => ms.into(),
            Moment::Ever(ms) => ms,
        }))
    }
}

fn zigzag_bytes(value: i64) -> u32 {
    let bits = 65 - (value ^ (value >> 63)).leading_zeros();
    bits.div_ceil(7)
}

/// What must come back: the same, but for short hashes and, where it has no room, `created_at`.
fn same(parts: &SignedParts<'_>, opened: &ReceiptOrder) -> bool {
    let keys_match = match (parts.key, opened.key) {
        (None, None) => true,
        (Some(one), Some(other)) => one.matches(other),
        _ => false,
    };
    // Three zigzag varints that share what room is left; see the module.
    let created_at_given_up = zigzag_bytes(parts.adjustment)
        + zigzag_bytes(parts.created_at.0.wrapping_sub(parts.id.millis().0))
        + zigzag_bytes(parts.expires_at.0.wrapping_sub(parts.created_at.0))
        > 23;
    keys_match
        && parts.payload.matches(opened.payload)
        && (parts.id, parts.user_id) == (opened.id, opened.user_id.as_str())
        && ReceiptSku::Tag(parts.sku) == opened.sku
        && (parts.quantity, parts.adjustment) == (opened.quantity.get(), opened.adjustment)
        && (parts.amount, parts.currency) == (opened.amount, opened.currency)
        && parts.expires_at == opened.expires_at
        && (parts.created_at == opened.created_at
            || created_at_given_up && opened.created_at == parts.id.millis())
}

fn text(keys: &ReceiptKeys, text: &str) {
    let id = OrderId::new(1);
    for order_id in [None, id] {
        if let Ok(order) = keys.open(text, order_id, 1) {
            let parts = order.signed_parts().expect("no version 1 is taken");
            let again = KEYS.map(|key| ReceiptKeys::new(&[key], &ISSUER).sign(&parts));
            assert!(again.iter().any(|again| again.as_str() == text), "{text}");
        }
    }
}

fn order(keys: &ReceiptKeys, raw: &Raw) {
    let user: String = raw
        .user
        .iter()
        .take(48)
        .map(|byte| char::from(b'!' + byte % 94))
        .collect();
    let code = raw.currency.map(|byte| char::from(b'A' + byte % 26));
    let code: String = code.iter().collect();
    let Some(id) = OrderId::new(raw.id >> 1) else {
        return;
    };
    let created_at = raw.created_after_id.after(id.millis());
    let parts = SignedParts {
        id,
        user_id: &user,
        sku: SkuTag(raw.sku),
        quantity: raw.quantity.into(),
        adjustment: raw.adjustment,
        amount: raw.amount,
        currency: Currency::new(&code).expect("three capital letters"),
        created_at,
        expires_at: raw.expires_after_created.after(created_at),
        key: raw.key.map(KeyHash),
        payload: PayloadHash(raw.payload),
    };
    let receipt = keys.sign(&parts);
    if user.is_empty() || !(1..=10_000).contains(&raw.quantity) {
        assert_eq!(receipt.as_str(), "");
        return;
    }
    assert!((1..=CHARACTERS_MAX).contains(&receipt.len()));
    let opened = keys.open(&receipt, Some(id), raw.amount);
    let opened = opened.expect("what was signed opens");
    assert!(same(&parts, &opened), "{parts:?}\n{opened:?}");
    let parts = opened.signed_parts().expect("version 2");
    assert_eq!(keys.sign(&parts), receipt);

    let mut altered = receipt.as_bytes().to_vec();
    let at = usize::from(raw.at) % altered.len();
    altered[at] = raw.to & 0x7f;
    let altered = String::from_utf8(altered).expect("ASCII");
    if altered != *receipt {
        assert!(keys.open(&altered, Some(id), raw.amount).is_err());
        assert!(keys.open(&altered, None, raw.amount).is_err());
    }
}

fuzz_target!(|input: &[u8]| {
    let keys = ReceiptKeys::new(&KEYS, &ISSUER);
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    if kind % 2 == 0 {
        text(&keys, &String::from_utf8_lossy(rest));
    } else if let Ok(raw) = Unstructured::new(rest).arbitrary::<Raw>() {
        order(&keys, &raw);
    }
});
