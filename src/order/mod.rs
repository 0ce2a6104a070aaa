//! Every domain type: ids, quantities, money, [`Order`], [`OrderStatus`], [`Refusal`].
//!
//! # The life of an order
//!
//! ```text
//!                             paid in time, in full            given back
//!   accepted ──► pending_payment ─────────────────► paid ───────────────────┐
//!    │ │              ▲   │ │ │                                             ▼
//!    │ │     assigned │   │ │ └─ paid wrongly or late ─► refund_due ───► refunded
//!    │ └► waitlisted ─┘   │ └──► expired ──────────────────▲
//!    │         └──────────┴────► cancelled, expired ───────┤  (paid all the same)
//!    └─► failed (the database refused the row) ────────────┘
//! ```
//!
//! A paid order stays paid: a second payment is itself `refund_due` ([`payment::judge`]).
//! An `accepted` order that is written too late to be paid becomes `expired` directly. An order that waits for
//! units ([`Order::waits`]) becomes `waitlisted`; a payment for it is given back and changes nothing.
//!
//! `accepted` and `undecided` are answered before a row exists and are never stored.
//! [`OrderStatus::may_become`] is the transition table, and a test walks every pair.

pub mod draw;
mod id;
mod lane;
pub mod log_place;
pub mod payment;
pub mod receipt;
mod refusal;
mod status;

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use smol_str::SmolStr;

pub use id::{ClockReading, IdClock, IdLeaseExhausted, IdRange, OrderId};
pub use lane::{Cutover, Lane, LaneSet};
pub use refusal::Refusal;
pub use status::{Ended, OrderStatus};

/// Milliseconds since the Unix epoch, by the wall clock. For people and for `expires_at`; it
/// decides no safety property (I10).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// The wall clock now; at a node of a cluster the database's, as of its start.
    pub fn now() -> Self {
        UnixMillis(crate::clock::wall_ms())
    }

    /// The machine's wall clock now, to be compared with another; 0 if it is before the epoch.
    pub fn of_machine() -> Self {
        UnixMillis(crate::clock::machine_ms())
    }

    /// The `expires_at` of an order that has no time to pay yet, because it waits for units: 9999-01-01T00:00:00Z.
    /// It stays if the order ends while it waits. A moment that every conversion keeps exactly.
    pub const NEVER: UnixMillis = UnixMillis(253_370_764_800_000);

    /// This moment plus a number of milliseconds, saturating.
    pub fn plus_ms(self, ms: u64) -> Self {
        UnixMillis(self.0.saturating_add(i64::try_from(ms).unwrap_or(i64::MAX)))
    }
}

impl fmt::Display for UnixMillis {
    /// RFC 3339 in UTC with milliseconds, for example `2026-11-11T12:00:00.000Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Ok(timestamp) = jiff::Timestamp::from_millisecond(self.0) {
            return write!(f, "{timestamp:.3}");
        }
        // The `Timestamp` of `jiff` ends a day before the year 9999 does, to leave room for
        // offsets.
        let since = jiff::SignedDuration::from_millis(self.0);
        let epoch = jiff::civil::date(1970, 1, 1).at(0, 0, 0, 0);
        match epoch.checked_add(since) {
            Ok(moment) => write!(f, "{moment:.3}Z"),
            Err(_) => write!(f, "{}", self.0),
        }
    }
}

/// Reasons why a text is not a valid id, key or currency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidText {
    /// Its length in bytes is outside the range.
    #[error("must be {min} to {max} characters long")]
    Length {
        /// Lowest length in bytes.
        min: usize,
        /// Highest length in bytes.
        max: usize,
    },
    /// It contains a byte other than `!` to `~`.
    #[error("must be visible ASCII, without spaces")]
    NotVisibleAscii,
    /// It is not three capital letters.
    #[error("must be three capital letters (ISO 4217)")]
    NotACurrency,
}

fn visible_ascii(text: &str, max: usize) -> Result<&str, InvalidText> {
    if text.is_empty() || text.len() > max {
        return Err(InvalidText::Length { min: 1, max });
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(InvalidText::NotVisibleAscii);
    }
    Ok(text)
}

macro_rules! opaque_text {
    ($(#[$doc:meta])* $name:ident, $max:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(SmolStr);

        impl $name {
            /// Highest length in characters.
            pub const LEN_MAX: usize = $max;

            /// Checks `text` and copies it.
            ///
            /// # Errors
            /// [`InvalidText`] if it is empty, too long or not visible ASCII.
            pub fn new(text: &str) -> Result<Self, InvalidText> {
                visible_ascii(text, $max).map(|text| Self(SmolStr::new(text)))
            }

            /// Copies `text` from one of Millrace's rows without a check, because it was checked
            /// for the row.
            pub fn from_row(text: &str) -> Self {
                Self(SmolStr::new(text))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    };
}

opaque_text!(
    /// The shop's id of a buyer: 1 to 48 characters of visible ASCII, opaque to Millrace.
    UserId,
    48
);
opaque_text!(
    /// The shop's id of a stock item: 1 to 32 characters of visible ASCII.
    SkuId,
    32
);

/// A client's `Idempotency-Key`: 1 to 64 characters of visible ASCII, scoped to the user. Borrowed
/// from the request, because only its hash is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdempotencyKey<'a>(&'a str);

impl<'a> IdempotencyKey<'a> {
    /// Highest length in characters.
    pub const LEN_MAX: usize = 64;

    /// Checks `text`.
    ///
    /// # Errors
    /// [`InvalidText`] if it is empty, too long or not visible ASCII.
    pub fn new(text: &'a str) -> Result<Self, InvalidText> {
        visible_ascii(text, Self::LEN_MAX).map(Self)
    }

    /// The text.
    pub fn as_str(self) -> &'a str {
        self.0
    }
}

/// The database's number for a SKU: the primary key of `sku`, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SkuNumber(pub i32);

/// A 32-bit hash of a `sku_id`: the CRC-32C of its text. It names a SKU if there is no room for
/// the whole id. Its readers know every SKU, and a signature protects it from forgery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SkuTag(pub u32);

impl SkuTag {
    /// The hash of a `sku_id`. It is stored with payments, so it must never change.
    pub fn of(sku_id: &str) -> Self {
        SkuTag(crc32c::crc32c(sku_id.as_bytes()))
    }
}

/// Units in one order: 1 to 10,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(NonZeroU32);

impl Quantity {
    /// Most units of one order.
    pub const MAX: u32 = 10_000;
    /// One unit, the default.
    pub const ONE: Quantity = Quantity(NonZeroU32::MIN);

    /// A quantity; `None` unless `units` is 1 to [`Quantity::MAX`].
    pub fn new(units: u32) -> Option<Self> {
        NonZeroU32::new(units)
            .filter(|units| units.get() <= Self::MAX)
            .map(Self)
    }

    /// The number of units.
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

/// An ISO 4217 currency code, three capital letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Currency([u8; 3]);

impl Currency {
    /// Checks a code and copies it.
    ///
    /// # Errors
    /// [`InvalidText::NotACurrency`] if it is not three capital ASCII letters.
    pub fn new(code: &str) -> Result<Self, InvalidText> {
        match <[u8; 3]>::try_from(code.as_bytes()) {
            Ok(bytes) if bytes.iter().all(u8::is_ascii_uppercase) => Ok(Self(bytes)),
            _ => Err(InvalidText::NotACurrency),
        }
    }

    /// The code.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("XXX")
    }
}

impl serde::Serialize for Currency {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// First 128 bits of the SHA-256 of an idempotency key. Stored as a `uuid` column.
///
/// The hash is cryptographic because keys come from buyers' devices. With a weaker one a buyer
/// could craft two keys with one hash, and the second order would be answered with the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyHash(pub [u8; 16]);

impl KeyHash {
    /// The hash of a key. Its scope, the user, is kept by the map that contains it.
    pub fn of(key: IdempotencyKey<'_>) -> Self {
        let digest = Sha256::digest(key.as_str().as_bytes());
        let mut first = [0; 16];
        first.copy_from_slice(&digest[..16]);
        KeyHash(first)
    }

    /// Whether both may belong to one key: they are equal, or one is short (its last 8 bytes are
    /// zero) and the first 8 bytes agree.
    ///
    /// A receipt with little room carries only the first 8 bytes, and an order recovered from it is
    /// stored with zeros after them. The buyer's retry has the whole hash and must still find that
    /// order. Keys that agree in 8 bytes can be crafted, but keys are scoped to a user, so an
    /// attacker can confuse only orders of their own.
    pub fn matches(self, other: KeyHash) -> bool {
        let halves = |hash: KeyHash| {
            let whole = u128::from_be_bytes(hash.0);
            ((whole >> 64) as u64, whole as u64)
        };
        let ((first, last), (other_first, other_last)) = (halves(self), halves(other));
        first == other_first && (last == other_last || last == 0 || other_last == 0)
    }
}

/// First 64 bits of the SHA-256 of an order's request. It distinguishes a retry from another order
/// under the same key. Stored as a `bigint` column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadHash(pub u64);

impl PayloadHash {
    /// The hash of a request. Each part is length-prefixed or of fixed size, so that different
    /// requests have different inputs.
    /// `waitlist`: the request accepts to wait for units. It is part of the hash only if true, so that hashes of
    /// orders from before stay valid.
    pub fn of(
        sku: &SkuId,
        quantity: Quantity,
        adjustment: i64,
        attributes: Option<&str>,
        waitlist: bool,
    ) -> Self {
        let mut hasher = Sha256::new();
        hasher.update([u8::try_from(sku.as_str().len()).unwrap_or(u8::MAX)]);
        hasher.update(sku.as_str().as_bytes());
        hasher.update(quantity.get().to_be_bytes());
        hasher.update(adjustment.to_be_bytes());
        hasher.update(attributes.unwrap_or_default().as_bytes());
        if waitlist {
            // No JSON object ends like this.
            hasher.update(b"\0waitlist");
        }
        let digest = hasher.finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        PayloadHash(u64::from_be_bytes(first))
    }

    /// Whether both may belong to one request: they are equal, or one is short (its low 4 bytes are
    /// zero) and the high 4 bytes agree. As with [`KeyHash::matches`], an order recovered from a
    /// receipt may be stored with a short hash, and its retry has the whole one.
    pub fn matches(self, other: PayloadHash) -> bool {
        let (low, other_low) = (self.0 as u32, other.0 as u32);
        self.0 >> 32 == other.0 >> 32 && (low == other_low || low == 0 || other_low == 0)
    }
}

/// A complete order, as it is queued and written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Time-ordered id.
    pub id: OrderId,
    /// The buyer.
    pub user_id: UserId,
    /// The shop's id of the SKU, shared with the stock and every other order of the SKU.
    pub sku_id: Arc<SkuId>,
    /// The database's number of the SKU.
    pub sku: SkuNumber,
    /// Units, 1 to 10,000.
    pub quantity: Quantity,
    /// The shop's surcharge, or discount if negative, in minor units.
    pub adjustment: i64,
    /// `unit_price × quantity + adjustment` in minor units; never negative.
    pub amount: i64,
    /// Currency of both.
    pub currency: Currency,
    /// Time of admission.
    pub created_at: UnixMillis,
    /// End of the time to pay; [`UnixMillis::NEVER`] if the order waits for units.
    pub expires_at: UnixMillis,
    /// Hash of its idempotency key, if it came with one.
    pub key: Option<KeyHash>,
    /// Hash of the request.
    pub payload: PayloadHash,
    /// The shop's JSON object, unchanged, at most 1 KiB.
    pub attributes: Option<Box<str>>,
}

impl Order {
    /// Whether it waits for units, holding none, and has no time to pay yet.
    pub fn waits(&self) -> bool {
        self.expires_at == UnixMillis::NEVER
    }

    /// The status of a durable order that is not a row yet.
    pub fn acknowledged_status(&self) -> OrderStatus {
        if self.waits() {
            OrderStatus::Waitlisted
        } else {
            OrderStatus::Accepted
        }
    }

    /// The status of its row if it is written in time.
    pub fn status_in_time(&self) -> OrderStatus {
        if self.waits() {
            OrderStatus::Waitlisted
        } else {
            OrderStatus::PendingPayment
        }
    }
}

/// The units of an order, with its buyer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderUnits {
    /// Id of the order.
    pub order_id: OrderId,
    /// Its buyer.
    pub user_id: UserId,
    /// Its SKU.
    pub sku: SkuNumber,
    /// Units, at least 1.
    pub quantity: u32,
}

impl OrderUnits {
    /// The units of `order`.
    pub fn of(order: &Order) -> Self {
        OrderUnits {
            order_id: order.id,
            user_id: order.user_id.clone(),
            sku: order.sku,
            quantity: order.quantity.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_take_visible_ascii_of_their_length_only() {
        assert!(UserId::new("u-42").is_ok());
        assert_eq!(
            UserId::new(""),
            Err(InvalidText::Length { min: 1, max: 48 })
        );
        assert!(UserId::new(&"u".repeat(48)).is_ok());
        assert!(UserId::new(&"u".repeat(49)).is_err());
        for bad in ["a b", "a\0", "é", "a\n", "\u{7f}"] {
            assert_eq!(
                SkuId::new(bad),
                Err(InvalidText::NotVisibleAscii),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn quantity_is_one_to_ten_thousand() {
        assert!(Quantity::new(0).is_none());
        assert_eq!(Quantity::new(1), Some(Quantity::ONE));
        assert!(Quantity::new(10_000).is_some());
        assert!(Quantity::new(10_001).is_none());
    }

    #[test]
    fn payload_hash_sees_every_member() {
        let sku = |text| SkuId::new(text).unwrap();
        let base = PayloadHash::of(&sku("A"), Quantity::ONE, 0, None, false);
        assert_eq!(
            base,
            PayloadHash::of(&sku("A"), Quantity::ONE, 0, None, false)
        );
        assert_ne!(
            base,
            PayloadHash::of(&sku("B"), Quantity::ONE, 0, None, false)
        );
        assert_ne!(
            base,
            PayloadHash::of(&sku("A"), Quantity::new(2).unwrap(), 0, None, false)
        );
        assert_ne!(
            base,
            PayloadHash::of(&sku("A"), Quantity::ONE, -1, None, false)
        );
        assert_ne!(
            base,
            PayloadHash::of(&sku("A"), Quantity::ONE, 0, Some("{}"), false)
        );
        assert_ne!(
            base,
            PayloadHash::of(&sku("A"), Quantity::ONE, 0, None, true)
        );
        // Hashes of rows that are there already stay valid.
        assert_eq!(base.0, 0x2A30_4CD9_C986_ED31);
    }

    #[test]
    fn a_short_hash_matches_the_whole_one_and_no_other() {
        let key = |first: u8, last: u8| {
            let mut hash = [first; 16];
            hash[8..].fill(last);
            KeyHash(hash)
        };
        let payload = PayloadHash;
        for (same, one, other) in [
            (true, key(1, 2), key(1, 2)),
            (true, key(1, 0), key(1, 2)),
            (true, key(1, 0), key(1, 0)),
            (false, key(1, 2), key(1, 3)),
            (false, key(1, 0), key(2, 0)),
            (false, key(1, 0), key(2, 1)),
        ] {
            assert_eq!(one.matches(other), same, "{one:?} and {other:?}");
            assert_eq!(other.matches(one), same, "{other:?} and {one:?}");
        }
        for (same, one, other) in [
            (true, payload(0x1_0000_0002), payload(0x1_0000_0002)),
            (true, payload(0x1_0000_0000), payload(0x1_0000_0002)),
            (false, payload(0x1_0000_0003), payload(0x1_0000_0002)),
            (false, payload(0x2_0000_0000), payload(0x1_0000_0000)),
            (false, payload(0x2_0000_0000), payload(0x1_0000_0002)),
        ] {
            assert_eq!(one.matches(other), same, "{one:?} and {other:?}");
            assert_eq!(other.matches(one), same, "{other:?} and {one:?}");
        }
    }

    #[test]
    fn times_are_rfc_3339_with_milliseconds() {
        assert_eq!(
            UnixMillis(1_700_000_000_123).to_string(),
            "2023-11-14T22:13:20.123Z"
        );
        assert_eq!(UnixMillis(0).to_string(), "1970-01-01T00:00:00.000Z");
    }
}
