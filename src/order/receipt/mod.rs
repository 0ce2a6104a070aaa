//! The receipt: an order in at most 127 URL-safe characters, signed.
//!
//! It travels through the payment platform and returns with the payment. An order whose row was
//! lost can be recovered from it, because a buyer cannot forge the signature. It carries every
//! field but `attributes`; the SKU is a hash of its `sku_id`. WeChat Pay's `attach` sets the limit:
//! 127 characters of base64url without padding are 95 bytes.
//!
//! A receipt is valid only for the database in which its order was placed ([`Issuer`]): the signing
//! key is derived from the secret and the database's random identity. Shops that share a secret, and
//! a database that was lost and made anew, refuse each other's receipts as forged. This costs no
//! characters, of which a user id of 48 leaves none.
//!
//! # Layout, version 2
//!
//! ```text
//!   bytes   field         form  content
//!   ──────  ────────────  ────  ─────────────────────────────────────────────────────────
//!   1       head                4 bits: version │ 0 │ 1 bit: has a key │ 2 bits: form
//!   1       user length         1 to 48
//!   1..42   user                7 bits per character, the last byte padded with zeros
//!   4       SKU                 [`SkuTag`]; in version 1 its number in the database, a varint
//!   1..2    quantity            varint
//!   1..10   adjustment          zigzag varint
//!   2       currency            (letter × 26 + letter) × 26 + letter, A = 0
//!   1..10   created_at          zigzag varint, less the id's own millisecond
//!   1..10   expires_at          zigzag varint, less created_at
//!   1..10   amount        0..1  varint
//!   8       order id      0..1
//!   16      key hash      0     neither this nor the next if the order has no key
//!   8       key hash      1..3  its first half
//!   8       payload hash  0..2
//!   4       payload hash  3     its first half
//!   8..16   MAC                 the room that is left, 16 at most
//! ```
//!
//! Fixed fields are big-endian; a varint is LEB128 in its shortest form. The MAC is the start of
//! HMAC-SHA256 over a prefix that no other use of a key has, every byte before the MAC and, in
//! forms 2 and 3, the order id and the amount (8 bytes each), which the payment itself brings back.
//! Its key is HMAC-SHA256 of the database's identity under the secret.
//!
//! Version 1 was signed with the secret itself and named no database. It is still read, but only
//! for orders that were placed before this very database was migrated to version 2.
//!
//! An order does not always fit whole. It takes the first form that fits:
//!
//! | form | leaves out | first form that fits |
//! |---|---|---|
//! | 0 | nothing | user ids of 36 characters, as UUIDs have |
//! | 1 | the second half of the key hash | user ids of 48 characters and ordinary amounts |
//! | 2 | order id and amount, which the verifier must know | the same and amounts of any size |
//! | 3 | the second half of the payload hash | orders with two fields at the ends of their range |
//!
//! All four stay. Each is in receipts that shops have, so each must be read; and a form that is read
//! costs nothing to write, since the two share every line but their lengths. Writing fewer would take
//! the order id, the amount or half of a hash from receipts that have room for them.
//!
//! A half hash is read with zeros behind it, see [`KeyHash::matches`]. Form 3 may be too small only if
//! `adjustment`, `created_at` and `expires_at` together take more than 23 bytes. The receipt of such
//! an order then says that it was created in its id's own millisecond, which always fits: 85 bytes at
//! most, and a MAC of 10. No real order comes near: its `created_at` lies within its id's lease, and
//! with an adjustment below 2^40 and a year to pay the three take 17 bytes.

mod fields;

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use subtle::ConstantTimeEq;

use self::fields::{Reader, Writer, currency_number, currency_of, varint_bytes};
use super::{
    Currency, KeyHash, Order, OrderId, PayloadHash, Quantity, SkuNumber, SkuTag, UnixMillis, UserId,
};

/// Longest receipt, in characters.
pub const CHARACTERS_MAX: usize = 127;
/// The same in bytes, before base64.
const BYTES_MAX: usize = 95;
const MAC_BYTES_MIN: usize = 8;
const MAC_BYTES_MAX: usize = 16;
/// The longest body: all bytes but the MAC.
const BODY_BYTES_MAX: usize = BYTES_MAX - MAC_BYTES_MIN;

/// Shortest secret, in bytes.
pub const SECRET_BYTES_MIN: usize = 16;

const VERSION: u8 = 2;
/// The version that named neither database nor `sku_id`.
const VERSION_1: u8 = 1;
/// Prefix of the signed bytes; no other use of the secret has it.
const DOMAIN: &[u8] = b"millrace receipt\0";
/// Prefix for deriving the key; no other derivation has it.
const KEY_DOMAIN: &[u8] = b"millrace receipt key of a database\0";

/// The database that issues receipts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Issuer {
    /// Its identity: random, given to it by the migration to schema version 4.
    pub database: [u8; 16],
    /// Receipts of version 1 are accepted for orders whose id is older than this moment; 0 for none,
    /// as in a database that began with version 4.
    pub version_1_until: UnixMillis,
}

/// The reason why a receipt is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    /// Not a receipt of a known version.
    #[error("the receipt is malformed: it is cut off, altered, or of a later version of Millrace")]
    Malformed,
    /// Not signed by a configured key for this database, order id and amount.
    #[error(
        "the receipt was not signed for this database, order and amount with any configured key: \
         it is forged, altered, moved from another payment, of another database, or its key was \
         removed from `receipt.key`"
    )]
    NotOurs,
    /// Genuine, but of another order.
    #[error("the receipt is genuine, but of another order than the payment names")]
    OtherOrder,
}

/// The signed fields, borrowed from any representation of an order.
#[derive(Clone, Copy, Debug)]
pub struct SignedParts<'a> {
    /// Id of the order.
    pub id: OrderId,
    /// The buyer.
    pub user_id: &'a str,
    /// The SKU.
    pub sku: SkuTag,
    /// Units.
    pub quantity: u32,
    /// The shop's surcharge, or discount if negative, in minor units.
    pub adjustment: i64,
    /// The price, in minor units.
    pub amount: i64,
    /// The currency of both.
    pub currency: Currency,
    /// Time of admission.
    pub created_at: UnixMillis,
    /// End of the time to pay.
    pub expires_at: UnixMillis,
    /// The hash of its idempotency key, if it has one.
    pub key: Option<KeyHash>,
    /// The hash of its body.
    pub payload: PayloadHash,
}

impl<'a> From<&'a Order> for SignedParts<'a> {
    fn from(order: &'a Order) -> Self {
        SignedParts {
            id: order.id,
            user_id: order.user_id.as_str(),
            sku: SkuTag::of(order.sku_id.as_str()),
            quantity: order.quantity.get(),
            adjustment: order.adjustment,
            amount: order.amount,
            currency: order.currency,
            created_at: order.created_at,
            expires_at: order.expires_at,
            key: order.key,
            payload: order.payload,
        }
    }
}

/// The SKU in a receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiptSku {
    /// By a hash of its `sku_id`.
    Tag(SkuTag),
    /// By its number in the database, in version 1.
    Number(SkuNumber),
}

/// The order in a receipt: every field but `attributes`. A hash may be short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptOrder {
    /// Id of the order.
    pub id: OrderId,
    /// The buyer.
    pub user_id: UserId,
    /// The SKU.
    pub sku: ReceiptSku,
    /// Units.
    pub quantity: Quantity,
    /// The shop's surcharge, or discount if negative, in minor units.
    pub adjustment: i64,
    /// The price, in minor units; to be compared with the payment.
    pub amount: i64,
    /// The currency of both.
    pub currency: Currency,
    /// Time of admission.
    pub created_at: UnixMillis,
    /// End of the time to pay.
    pub expires_at: UnixMillis,
    /// The hash of its idempotency key, if it has one; compare by [`KeyHash::matches`].
    pub key: Option<KeyHash>,
    /// The hash of its body; compare by [`PayloadHash::matches`].
    pub payload: PayloadHash,
}

impl ReceiptOrder {
    /// The fields to sign for its receipt; `None` for version 1, which is no longer signed.
    pub fn signed_parts(&self) -> Option<SignedParts<'_>> {
        let ReceiptSku::Tag(sku) = self.sku else {
            return None;
        };
        Some(SignedParts {
            id: self.id,
            user_id: self.user_id.as_str(),
            sku,
            quantity: self.quantity.get(),
            adjustment: self.adjustment,
            amount: self.amount,
            currency: self.currency,
            created_at: self.created_at,
            expires_at: self.expires_at,
            key: self.key,
            payload: self.payload,
        })
    }
}

/// A receipt: at most [`CHARACTERS_MAX`] characters of `A`–`Z`, `a`–`z`, `0`–`9`, `-` and `_`,
/// held inline.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    characters: [u8; CHARACTERS_MAX],
    length: u8,
}

impl Receipt {
    const EMPTY: Receipt = Receipt {
        characters: [0; CHARACTERS_MAX],
        length: 0,
    };

    fn of(bytes: &[u8]) -> Self {
        let mut receipt = Self::EMPTY;
        let length = URL_SAFE_NO_PAD.encode_slice(bytes, &mut receipt.characters);
        // Never fails: 95 bytes make 127 characters.
        receipt.length = length.map_or(0, |length| length as u8);
        receipt
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        let text = self.characters.get(..self.length.into());
        text.and_then(|text| std::str::from_utf8(text).ok())
            .unwrap_or_default()
    }
}

impl std::ops::Deref for Receipt {
    type Target = str;

    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl AsRef<str> for Receipt {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Receipt").field(&self.as_str()).finish()
    }
}

impl serde::Serialize for Receipt {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// The receipt keys of one database: the first signs, any may verify. To replace a secret, put a new
/// one before it, and remove the old one when no payment with its receipts can come any more.
pub struct ReceiptKeys {
    signing: SecretKeys,
    retired: Vec<SecretKeys>,
    version_1_until: UnixMillis,
}

/// The keys of one secret.
struct SecretKeys {
    /// For this database only.
    bound: hmac::Key,
    /// For version 1: the secret itself.
    unbound: hmac::Key,
}

impl SecretKeys {
    fn new(secret: &[u8], issuer: &Issuer) -> Self {
        let unbound = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let mut derived = hmac::Context::with_key(&unbound);
        derived.update(KEY_DOMAIN);
        derived.update(&issuer.database);
        SecretKeys {
            bound: hmac::Key::new(hmac::HMAC_SHA256, derived.sign().as_ref()),
            unbound,
        }
    }
}

impl fmt::Debug for ReceiptKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = 1 + self.retired.len();
        f.debug_struct("ReceiptKeys")
            .field("keys", &keys)
            .finish_non_exhaustive()
    }
}

impl ReceiptKeys {
    /// Takes the secrets, of [`SECRET_BYTES_MIN`] bytes or more, for the orders of `issuer`.
    ///
    /// # Panics
    /// If there is none, or one is shorter: a short secret can be found by trying, and then every
    /// receipt can be forged.
    pub fn new(secrets: &[impl AsRef<[u8]>], issuer: &Issuer) -> Self {
        let mut keys = secrets.iter().map(|secret| {
            let secret = secret.as_ref();
            assert!(
                secret.len() >= SECRET_BYTES_MIN,
                "a receipt key has at least {SECRET_BYTES_MIN} bytes"
            );
            SecretKeys::new(secret, issuer)
        });
        let Some(signing) = keys.next() else {
            panic!("there is no receipt key to sign with");
        };
        ReceiptKeys {
            signing,
            retired: keys.collect(),
            version_1_until: issuer.version_1_until,
        }
    }

    /// The receipt of an order; every valid order fits. The same order under the same key has the
    /// same receipt.
    ///
    /// An invalid order (a row changed by hand may have an impossible user id or quantity) has the
    /// empty receipt, which [`ReceiptKeys::open`] refuses.
    pub fn sign(&self, order: &SignedParts<'_>) -> Receipt {
        let user = order.user_id.as_bytes();
        let is_order = (1..=UserId::LEN_MAX).contains(&user.len())
            && user.iter().all(u8::is_ascii_graphic)
            && Quantity::new(order.quantity).is_some();
        if !is_order {
            return Receipt::EMPTY;
        }
        let mut writer = Writer::default();
        let form = write_body(&mut writer, order);
        let mac = mac(
            &self.signing.bound,
            writer.written(),
            form,
            order.id,
            order.amount,
        );
        let (mac, _) = mac.as_ref().split_at(mac_bytes(writer.length));
        writer.put(mac);
        Receipt::of(writer.written())
    }

    /// Reads a receipt that came with a payment of `amount` for the order `order_id`, if the payment
    /// names one.
    ///
    /// Forms 2 and 3 are bound to both without carrying them, so a wrong one of the two cannot be
    /// named. Forms 0 and 1 carry them: another id is refused, but the caller compares the amount.
    ///
    /// # Errors
    /// [`ReceiptError`]; [`ReceiptError::NotOurs`] also if an id is needed and there is none.
    pub fn open(
        &self,
        text: &str,
        order_id: Option<OrderId>,
        amount: i64,
    ) -> Result<ReceiptOrder, ReceiptError> {
        // The decoder may need room for a whole last group of characters.
        let mut buffer = [0; BYTES_MAX + 1];
        if text.len() > CHARACTERS_MAX {
            return Err(ReceiptError::Malformed);
        }
        let length = URL_SAFE_NO_PAD
            .decode_slice(text, &mut buffer)
            .map_err(|_| ReceiptError::Malformed)?;
        let bytes = buffer.get(..length).ok_or(ReceiptError::Malformed)?;

        // Read first: the fields before the MAC determine where it begins.
        let mut reader = Reader(bytes);
        let (form, order) = read_body(&mut reader, order_id, amount)?;
        let is_version_1 = matches!(order.sku, ReceiptSku::Number(_));
        let Reader(received) = reader;
        let (body, _) = bytes.split_at(length - received.len());
        if body.len() > BODY_BYTES_MAX || received.len() != mac_bytes(body.len()) {
            return Err(ReceiptError::Malformed);
        }
        let signed = |keys: &SecretKeys| {
            let key = if is_version_1 {
                &keys.unbound
            } else {
                &keys.bound
            };
            let mac = mac(key, body, form, order.id, order.amount);
            let (mac, _) = mac.as_ref().split_at(received.len());
            bool::from(mac.ct_eq(received))
        };
        let all = std::iter::once(&self.signing).chain(&self.retired);
        // Version 1 does not name its database. The age of the id tells whether this database can
        // have issued it.
        let may_be_ours = !is_version_1 || order.id.millis() < self.version_1_until;
        if !may_be_ours || !all.into_iter().any(signed) {
            return Err(ReceiptError::NotOurs);
        }
        if order_id.is_some_and(|order_id| order_id != order.id) {
            return Err(ReceiptError::OtherOrder);
        }
        Ok(order)
    }
}

/// The MAC's length behind a body: the room that is left. At least [`MAC_BYTES_MIN`], because a body
/// has at most [`BODY_BYTES_MAX`].
fn mac_bytes(body: usize) -> usize {
    BYTES_MAX.saturating_sub(body).min(MAC_BYTES_MAX)
}

fn mac(key: &hmac::Key, body: &[u8], form: Form, id: OrderId, amount: i64) -> hmac::Tag {
    let mut context = hmac::Context::with_key(key);
    context.update(DOMAIN);
    // No two inputs run together: the body's head tells its form and each field tells its end.
    context.update(body);
    if form.is_detached() {
        context.update(&id.get().to_be_bytes());
        context.update(&amount.to_be_bytes());
    }
    context.sign()
}

// --- The body: everything before the MAC ----------------------------------------------------

/// The fields that are left out so that the rest fits; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Full = 0,
    ShortKey = 1,
    Detached = 2,
    ShortPayload = 3,
}

impl Form {
    const ALL: [Form; 4] = [
        Form::Full,
        Form::ShortKey,
        Form::Detached,
        Form::ShortPayload,
    ];

    /// Whether order id and amount are bound by the MAC and left out of the body.
    fn is_detached(self) -> bool {
        match self {
            Form::Full | Form::ShortKey => false,
            Form::Detached | Form::ShortPayload => true,
        }
    }

    fn key_bytes(self) -> usize {
        match self {
            Form::Full => 16,
            Form::ShortKey | Form::Detached | Form::ShortPayload => 8,
        }
    }

    fn payload_bytes(self) -> usize {
        match self {
            Form::Full | Form::ShortKey | Form::Detached => 8,
            Form::ShortPayload => 4,
        }
    }

    /// Length of everything behind `expires_at`.
    fn tail_bytes(self, order: &SignedParts<'_>) -> usize {
        let key = order.key.map_or(0, |_| self.key_bytes());
        let id_and_amount = if self.is_detached() {
            0
        } else {
            8 + varint_bytes(order.amount as u64)
        };
        id_and_amount + key + self.payload_bytes()
    }
}

const HAS_KEY: u8 = 0b0100;

/// Writes an order in the first form that has room.
fn write_body(writer: &mut Writer, order: &SignedParts<'_>) -> Form {
    let id_ms = order.id.millis();
    for created_at in [order.created_at, id_ms] {
        writer.length = 0;
        // The head is known once the form is.
        writer.put(&[0, order.user_id.len() as u8]);
        writer.put_user(order.user_id);
        writer.put(&order.sku.0.to_be_bytes());
        writer.put_varint(order.quantity.into());
        writer.put_zigzag(order.adjustment);
        writer.put(&currency_number(order.currency).to_be_bytes());
        // Differences wrap, and wrap back when they are read.
        writer.put_zigzag(created_at.0.wrapping_sub(id_ms.0));
        writer.put_zigzag(order.expires_at.0.wrapping_sub(created_at.0));

        let fits = |form: &Form| writer.length + form.tail_bytes(order) <= BODY_BYTES_MAX;
        let Some(form) = Form::ALL.into_iter().find(fits) else {
            continue;
        };
        if !form.is_detached() {
            writer.put_varint(order.amount as u64);
            writer.put(&order.id.get().to_be_bytes());
        }
        if let Some(KeyHash(key)) = order.key {
            let (key, _) = key.split_at(form.key_bytes());
            writer.put(key);
        }
        let payload = order.payload.0.to_be_bytes();
        let (payload, _) = payload.split_at(form.payload_bytes());
        writer.put(payload);
        let [head, ..] = &mut writer.bytes;
        *head = VERSION << 4 | if order.key.is_some() { HAS_KEY } else { 0 } | form as u8;
        return form;
    }
    unreachable!("an order created in its id's millisecond takes 85 bytes at most")
}

/// Reads the output of [`write_body`], up to the MAC. `order_id` and `amount` stand in for the fields
/// that a detached form leaves out.
fn read_body(
    reader: &mut Reader<'_>,
    order_id: Option<OrderId>,
    amount: i64,
) -> Result<(Form, ReceiptOrder), ReceiptError> {
    use ReceiptError::Malformed;

    let [head, user_length] = reader.array()?;
    let version = head >> 4;
    let form = Form::ALL
        .into_iter()
        .find(|form| head & !HAS_KEY & 0xf == *form as u8)
        .ok_or(Malformed)?;
    let user_id = reader.user(user_length.into())?;
    let sku = match version {
        VERSION => ReceiptSku::Tag(SkuTag(u32::from_be_bytes(reader.array()?))),
        VERSION_1 => {
            let number = u32::try_from(reader.varint()?).map_err(|_| Malformed)?;
            ReceiptSku::Number(SkuNumber(number as i32))
        }
        _ => return Err(Malformed),
    };
    let quantity = u32::try_from(reader.varint()?).map_err(|_| Malformed)?;
    let quantity = Quantity::new(quantity).ok_or(Malformed)?;
    let adjustment = reader.zigzag()?;
    let currency = currency_of(u16::from_be_bytes(reader.array()?))?;
    let after_id = reader.zigzag()?;
    let after_created = reader.zigzag()?;
    let (id, amount) = if form.is_detached() {
        (order_id.ok_or(ReceiptError::NotOurs)?, amount)
    } else {
        let amount = reader.varint()? as i64;
        let id = u64::from_be_bytes(reader.array()?);
        (OrderId::new(id).ok_or(Malformed)?, amount)
    };
    let key = if head & HAS_KEY == 0 {
        None
    } else {
        let mut key = [0; 16];
        let (part, _) = key.split_at_mut(form.key_bytes());
        part.copy_from_slice(reader.take(form.key_bytes())?);
        Some(KeyHash(key))
    };
    let mut payload = [0; 8];
    let (part, _) = payload.split_at_mut(form.payload_bytes());
    part.copy_from_slice(reader.take(form.payload_bytes())?);

    let created_at = UnixMillis(id.millis().0.wrapping_add(after_id));
    let order = ReceiptOrder {
        id,
        user_id,
        sku,
        quantity,
        adjustment,
        amount,
        currency,
        created_at,
        expires_at: UnixMillis(created_at.0.wrapping_add(after_created)),
        key,
        payload: PayloadHash(u64::from_be_bytes(payload)),
    };
    Ok((form, order))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::order::SkuId;

    const SECRET: [&str; 1] = ["a secret of the tests"];
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

    /// A database created with version 2.
    const DATABASE: Issuer = Issuer {
        database: *b"of the one shop.",
        version_1_until: UnixMillis(0),
    };

    fn keys() -> ReceiptKeys {
        ReceiptKeys::new(&SECRET, &DATABASE)
    }

    /// 2026-11-11T12:00:00.123Z, as an id clock gives it out.
    fn id() -> OrderId {
        OrderId::new(OrderId::floor_of(UnixMillis(1_794_398_400_123)).get() + 5).unwrap()
    }

    fn tag(tag: u32) -> ReceiptSku {
        ReceiptSku::Tag(SkuTag(tag))
    }

    fn parts(order: &ReceiptOrder) -> SignedParts<'_> {
        order.signed_parts().expect("version 2")
    }

    /// The order of a shop that names its users by UUID.
    fn ordinary() -> ReceiptOrder {
        ReceiptOrder {
            id: id(),
            user_id: UserId::new("0b0e0d1c-7f5c-4d7a-9c39-3f5f2f3a1e11").unwrap(),
            sku: tag(0xe7a3_0011),
            quantity: Quantity::ONE,
            adjustment: -500,
            amount: 199_400,
            currency: Currency::new("CNY").unwrap(),
            created_at: id().millis(),
            expires_at: id().millis().plus_ms(900_000),
            key: Some(KeyHash(*b"0123456789abcdef")),
            payload: PayloadHash(0x0123_4567_89ab_cdef),
        }
    }

    /// The order whose every field has its largest encoding.
    fn greatest() -> ReceiptOrder {
        ReceiptOrder {
            user_id: UserId::new(&"~".repeat(48)).unwrap(),
            sku: tag(u32::MAX),
            quantity: Quantity::new(10_000).unwrap(),
            adjustment: i64::MIN,
            amount: i64::MAX,
            currency: Currency::new("ZZZ").unwrap(),
            created_at: UnixMillis(i64::MIN),
            // Far from `created_at` and from the id.
            expires_at: UnixMillis(3 << 61),
            key: Some(KeyHash([0xff; 16])),
            payload: PayloadHash(u64::MAX),
            ..ordinary()
        }
    }

    /// An order for each form, and the largest, for which not even the last has room.
    fn one_of_each_form() -> [ReceiptOrder; 5] {
        let long = || ReceiptOrder {
            user_id: greatest().user_id,
            ..ordinary()
        };
        let dear = ReceiptOrder {
            amount: 1 << 40,
            adjustment: -1 << 39,
            ..long()
        };
        let far = ReceiptOrder {
            sku: tag(u32::MAX),
            adjustment: i64::MIN,
            expires_at: UnixMillis(i64::MAX),
            ..long()
        };
        [ordinary(), long(), dear, far, greatest()]
    }

    fn form_of(receipt: &str) -> u8 {
        let mut head = [0; 3];
        URL_SAFE_NO_PAD
            .decode_slice(&receipt[..4], &mut head)
            .unwrap();
        head[0] & 0b11
    }

    fn short_key(KeyHash(mut key): KeyHash) -> KeyHash {
        key[8..].fill(0);
        KeyHash(key)
    }

    /// The expected result of opening, by the module's text.
    fn expected(order: &ReceiptOrder, receipt: &str) -> ReceiptOrder {
        let mut expected = order.clone();
        if form_of(receipt) >= 1 {
            expected.key = order.key.map(short_key);
        }
        if form_of(receipt) == 3 {
            expected.payload.0 &= !0xffff_ffff;
        }
        expected
    }

    fn sign(order: &ReceiptOrder) -> Receipt {
        let receipt = keys().sign(&parts(order));
        let text = receipt.as_str();
        assert!(!text.is_empty() && text.len() <= CHARACTERS_MAX, "{text}");
        assert!(text.bytes().all(|byte| ALPHABET.contains(&byte)), "{text}");
        receipt
    }

    /// Signs, opens, signs again; returns the opened order.
    fn there_and_back(order: &ReceiptOrder) -> (Receipt, ReceiptOrder) {
        let receipt = sign(order);
        let opened = keys().open(&receipt, Some(order.id), order.amount);
        let opened = opened.unwrap_or_else(|error| panic!("{order:?}: {error}"));
        assert_eq!(sign(&opened), receipt, "one order has one receipt");
        (receipt, opened)
    }

    /// Numbers of every length, including the ends of the range.
    fn number() -> impl Strategy<Value = i64> {
        prop_oneof![
            (any::<i64>(), 0..64_u32).prop_map(|(value, shift)| value >> shift),
            Just(i64::MIN),
            Just(i64::MAX),
        ]
    }

    fn user() -> impl Strategy<Value = UserId> {
        prop_oneof!["[!-~]{1,48}", "[!-~]{48}"].prop_map(|text| UserId::new(&text).unwrap())
    }

    prop_compose! {
        fn any_order()(
            id in 1..=i64::MAX,
            user_id in user(),
            sku in any::<u32>(),
            quantity in 1..=Quantity::MAX,
            (adjustment, amount) in (number(), number()),
            currency in "[A-Z]{3}",
            (created_at, expires_at) in (number(), number()),
            key in any::<Option<[u8; 16]>>(),
            payload in any::<u64>(),
        ) -> ReceiptOrder {
            ReceiptOrder {
                id: OrderId::from_i64(id).unwrap(),
                user_id,
                sku: tag(sku),
                quantity: Quantity::new(quantity).unwrap(),
                adjustment,
                amount,
                currency: Currency::new(&currency).unwrap(),
                created_at: UnixMillis(created_at),
                expires_at: UnixMillis(expires_at),
                key: key.map(KeyHash),
                payload: PayloadHash(payload),
            }
        }
    }

    prop_compose! {
        /// Amounts below 2^40, at most a year to pay, admitted within an hour of the id's clock.
        fn realistic_order()(
            any in any_order(),
            user_id in prop_oneof!["[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "[!-~]{48}"],
            amount in 0..1_i64 << 40,
            adjustment in -1_i64 << 40..1_i64 << 40,
            lag in -3_600_000..3_600_000_i64,
            ttl in 0..31_536_000_000_u64,
        ) -> ReceiptOrder {
            let created_at = UnixMillis(any.id.millis().0 + lag);
            ReceiptOrder {
                user_id: UserId::new(&user_id).unwrap(),
                amount,
                adjustment,
                created_at,
                expires_at: created_at.plus_ms(ttl),
                ..any
            }
        }
    }

    proptest! {
        #[test]
        fn every_order_has_a_receipt_and_comes_back(order in any_order()) {
            let (receipt, opened) = there_and_back(&order);
            let mut expected = expected(&order, &receipt);
            if opened.created_at != order.created_at {
                let taken = |value: i64| varint_bytes(((value << 1) ^ (value >> 63)) as u64);
                let id_ms = order.id.millis();
                let after_id = order.created_at.0.wrapping_sub(id_ms.0);
                let after_created = order.expires_at.0.wrapping_sub(order.created_at.0);
                prop_assert!(taken(order.adjustment) + taken(after_id) + taken(after_created) > 23);
                expected.created_at = id_ms;
            }
            prop_assert_eq!(opened, expected);
        }

        #[test]
        fn a_realistic_order_comes_back_exactly_but_for_short_hashes(order in realistic_order()) {
            let (receipt, opened) = there_and_back(&order);
            prop_assert!(form_of(&receipt) < 3);
            prop_assert_eq!(opened, expected(&order, &receipt));
        }

        #[test]
        fn any_text_is_refused_without_a_panic(
            text in ".{0,160}",
            bytes in prop::collection::vec(any::<u8>(), 0..96),
            version in VERSION_1..=VERSION,
            head in 0..8_u8,
        ) {
            let mut bytes = bytes;
            if let [first, ..] = &mut *bytes {
                *first = version << 4 | head;
            }
            for text in [text.as_str(), &*Receipt::of(&bytes)] {
                for id in [None, Some(id())] {
                    prop_assert!(keys().open(text, id, 0).is_err());
                }
            }
        }

        #[test]
        fn an_altered_receipt_is_no_receipt(order in any_order(), at in any::<prop::sample::Index>(), to in any::<prop::sample::Index>()) {
            let receipt = sign(&order);
            let mut altered = receipt.as_bytes().to_vec();
            altered[at.index(receipt.len())] = ALPHABET[to.index(ALPHABET.len())];
            let altered = String::from_utf8(altered).unwrap();
            if altered != *receipt {
                prop_assert!(keys().open(&altered, Some(order.id), order.amount).is_err());
            }
        }
    }

    #[test]
    fn an_order_takes_the_first_form_that_fits() {
        let forms = one_of_each_form().map(|order| {
            let (receipt, opened) = there_and_back(&order);
            (form_of(&receipt), opened.created_at == order.created_at)
        });
        // The largest loses its `created_at`.
        assert_eq!(
            forms,
            [(0, true), (1, true), (2, true), (3, true), (3, false)]
        );
    }

    #[test]
    fn what_takes_the_most_room_fits() {
        let greatest = greatest();
        let (receipt, opened) = there_and_back(&greatest);
        assert_eq!(receipt.len(), CHARACTERS_MAX);
        assert_eq!(opened.expires_at, greatest.expires_at);
        assert_eq!(opened.adjustment, greatest.adjustment);
        assert_eq!(opened.created_at, greatest.id.millis());
        let ends = [i64::MIN, -1, 0, i64::MAX];
        for id in [OrderId::new(1).unwrap(), id(), OrderId::MAX] {
            for adjustment in ends {
                for amount in ends {
                    for created_at in ends.map(UnixMillis).into_iter().chain([id.millis()]) {
                        for expires_at in ends.map(UnixMillis) {
                            for key in [None, greatest.key] {
                                let (receipt, opened) = there_and_back(&ReceiptOrder {
                                    id,
                                    adjustment,
                                    amount,
                                    created_at,
                                    expires_at,
                                    key,
                                    sku: tag(u32::MAX),
                                    ..greatest.clone()
                                });
                                assert!(receipt.len() <= CHARACTERS_MAX);
                                assert_eq!(opened.expires_at, expires_at);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_least_order_has_a_short_receipt_with_a_long_mac() {
        let order = ReceiptOrder {
            user_id: UserId::new("u").unwrap(),
            adjustment: 0,
            amount: 0,
            created_at: id().millis(),
            expires_at: id().millis(),
            key: None,
            ..ordinary()
        };
        let (receipt, opened) = there_and_back(&order);
        assert_eq!(opened, order);
        // 1 + 1 + 1 + 4 + 1 + 1 + 2 + 1 + 1 + 1 + 8 + 8 and a MAC of 16.
        assert_eq!(receipt.len(), ((30_usize + 16) * 4).div_ceil(3));
    }

    #[test]
    fn nothing_altered_cut_or_lengthened_is_taken() {
        for order in one_of_each_form() {
            let receipt = sign(&order);
            let keys = keys();
            let refused = |text: &str| {
                for id in [Some(order.id), None] {
                    let error = keys.open(text, id, order.amount).unwrap_err();
                    assert_ne!(error, ReceiptError::OtherOrder, "{text}");
                }
            };
            for at in 0..receipt.len() {
                for character in ALPHABET.iter().chain(b"+/= ") {
                    let mut altered = receipt.as_bytes().to_vec();
                    altered[at] = *character;
                    let altered = String::from_utf8(altered).unwrap();
                    if altered != *receipt {
                        refused(&altered);
                    }
                }
                refused(&receipt[..at]);
                refused(&receipt[at + 1..]);
            }
            for more in ["A", "=", "==", "AA", "AAA", "AAAA", "\n", " ", "é"] {
                refused(&format!("{receipt}{more}"));
                refused(&format!("{more}{receipt}"));
            }
        }
    }

    #[test]
    fn a_retired_key_still_verifies_and_a_removed_one_does_not() {
        let (old, new) = ("the old secret of 2025", "the new secret of 2026");
        let order = ordinary();
        let with = |keys: &[&str]| ReceiptKeys::new(keys, &DATABASE);
        let receipt = with(&[old]).sign(&parts(&order));
        let open = |keys: &[&str]| with(keys).open(&receipt, None, order.amount);
        assert_eq!(open(&[old]), Ok(order.clone()));
        assert_eq!(open(&[new, old]), Ok(order.clone()));
        assert_eq!(open(&[new]), Err(ReceiptError::NotOurs));
        let rotated = with(&[new, old]).sign(&parts(&order));
        assert_eq!(rotated, with(&[new]).sign(&parts(&order)));
        assert_ne!(rotated, receipt);
    }

    #[test]
    fn a_receipt_serves_one_order() {
        let other = OrderId::new(id().get() + 1);
        for order in one_of_each_form() {
            let receipt = sign(&order);
            let open = |id, amount| keys().open(&receipt, id, amount);
            let is_detached = form_of(&receipt) >= 2;
            if is_detached {
                assert_eq!(open(other, order.amount), Err(ReceiptError::NotOurs));
                assert_eq!(open(None, order.amount), Err(ReceiptError::NotOurs));
                let other_amount = order.amount - 1;
                assert_eq!(
                    open(Some(order.id), other_amount),
                    Err(ReceiptError::NotOurs)
                );
            } else {
                assert_eq!(open(other, order.amount), Err(ReceiptError::OtherOrder));
                let opened = open(None, order.amount - 1);
                assert_eq!(opened.unwrap().amount, order.amount, "the caller compares");
            }
        }
    }

    #[test]
    fn a_receipt_is_worth_nothing_to_another_database_that_shares_the_secret() {
        let another = Issuer {
            database: *b"of another shop.",
            ..DATABASE
        };
        let other = ReceiptKeys::new(&SECRET, &another);
        for order in one_of_each_form() {
            let receipt = sign(&order);
            let opened = other.open(&receipt, Some(order.id), order.amount);
            assert_eq!(opened, Err(ReceiptError::NotOurs));
        }
    }

    #[test]
    fn a_receipt_names_its_sku_by_the_shops_own_name() {
        let tags = ["PHONE", "CASE", "CASF", "ESAC", "1", "2"].map(SkuTag::of);
        for (at, one) in tags.iter().enumerate() {
            assert!(!tags[at + 1..].contains(one), "{tags:?}");
        }
        // Never changes: receipts in transit carry it.
        assert_eq!(tags[0], SkuTag(0x5461_c612));
    }

    /// Receipts live as long as payments may arrive: months. A change of the layout needs a new
    /// version, and this one must still be read.
    #[test]
    fn a_receipt_of_version_2_stays_readable() {
        let order = ordinary();
        let text = "JCRhiYZWGRjjWt8zXGtaZG-Fa5xs3K1nma5mWZnhY5WLEOejABEB5wcGsgDA7m3olQwFQgounsAABTAxMjM0NTY3ODlh\
                    YmNkZWYBI0VniavN7yChMFz7kRQq_-BK8_c";
        assert_eq!(&*sign(&order), text);
        assert_eq!(keys().open(text, None, 0), Ok(order));
    }

    /// One of each form, as signed by the previous release.
    const VERSION_1_RECEIPTS: [&str; 4] = [
        "FCRhiYZWGRjjWt8zXGtaZG-Fa5xs3K1nma5mWZnhY5WLEBEB5wcGsgDA7m3olQwFQgounsAABTAxMjM0NTY3ODlh\
         YmNkZWYBI0VniavN76HuDv5essOENJsEBX7iUGE",
        "FTD9-_fv379-_fv379-_fv379-_fv379-_fv379-_fv379-_fv379-_fv34RAecHBrIAwO5t6JUMBUIKLp7AAAUwMTIzNDU2\
         NwEjRWeJq83vRVhfO-X54FaxNo7rg_w",
        "FjD9-_fv379-_fv379-_fv379-_fv379-_fv379-_fv379-_fv379-_fv34RAf______HwayAMDubTAxMjM0NTY3ASNFZ4mr\
         ze-9W2VE_1PnzZ0bxKlRFrTi",
        "FzD9-_fv379-_fv379-_fv379-_fv379-_fv379-_fv379-_fv379-_fv37_____BwH___________8BBrIAiMaq2MaX____\
         ATAxMjM0NTY3ASNFZ5ckHpE04PZsyYY",
    ];

    #[test]
    fn a_receipt_of_version_1_is_read_for_orders_from_before_the_migration_alone() {
        let until = |moment: UnixMillis| {
            let issuer = Issuer {
                version_1_until: moment,
                ..DATABASE
            };
            ReceiptKeys::new(&SECRET, &issuer)
        };
        let migrated_afterwards = until(id().millis().plus_ms(1));
        let orders = one_of_each_form();
        for (text, order) in VERSION_1_RECEIPTS.into_iter().zip(&orders) {
            let number = match form_of(text) {
                3 => i32::MAX,
                _ => 17,
            };
            let expected = ReceiptOrder {
                sku: ReceiptSku::Number(SkuNumber(number)),
                ..expected(order, text)
            };
            let open = |keys: &ReceiptKeys| keys.open(text, Some(order.id), order.amount);
            assert_eq!(open(&migrated_afterwards), Ok(expected.clone()));
            assert!(expected.signed_parts().is_none());
            // Placed after it, or in another database: a recreated one, or another shop's.
            for keys in [until(id().millis()), keys()] {
                assert_eq!(open(&keys), Err(ReceiptError::NotOurs));
            }
        }
    }

    #[test]
    fn another_version_is_not_guessed_at() {
        let receipt = sign(&ordinary());
        // The first six bits: four of the version, a zero, and whether there is a key; without one
        // the length differs.
        for (at, first) in ALPHABET.iter().enumerate() {
            if at != 0b00_1001 {
                let text = format!("{}{}", *first as char, &receipt[1..]);
                // Read as version 1 it may happen to be readable, but no key has signed it.
                let opened = keys().open(&text, None, 0);
                let is_version_1 = at >> 2 == usize::from(VERSION_1);
                assert!(
                    opened == Err(ReceiptError::Malformed)
                        || is_version_1 && opened == Err(ReceiptError::NotOurs),
                    "{at:06b}: {opened:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_no_order_has_the_empty_receipt() {
        let order = ordinary();
        let parts = parts(&order);
        let long = "u".repeat(49);
        for user_id in ["", "a b", "é", &long] {
            let receipt = keys().sign(&SignedParts { user_id, ..parts });
            assert_eq!(&*receipt, "", "{user_id}");
        }
        for quantity in [0, 10_001, u32::MAX] {
            let receipt = keys().sign(&SignedParts { quantity, ..parts });
            assert_eq!(&*receipt, "", "{quantity}");
        }
        assert_eq!(keys().open("", None, 0), Err(ReceiptError::Malformed));
    }

    #[test]
    fn an_order_has_the_receipt_of_its_parts() {
        let sku_id = SkuId::new("IPHONE-15").unwrap();
        let parts = ReceiptOrder {
            sku: ReceiptSku::Tag(SkuTag::of(sku_id.as_str())),
            ..ordinary()
        };
        let order = Order {
            id: parts.id,
            user_id: parts.user_id.clone(),
            sku_id: sku_id.into(),
            sku: SkuNumber(17),
            quantity: parts.quantity,
            adjustment: parts.adjustment,
            amount: parts.amount,
            currency: parts.currency,
            created_at: parts.created_at,
            expires_at: parts.expires_at,
            key: parts.key,
            payload: parts.payload,
            attributes: Some(r#"{"address_id":"a-7"}"#.into()),
        };
        let receipt = keys().sign(&(&order).into());
        assert_eq!(receipt, sign(&parts));
        assert_eq!(
            serde_json::to_string(&receipt).unwrap(),
            format!("\"{receipt}\"")
        );
    }

    #[test]
    fn keys_are_not_printed_and_short_ones_not_taken() {
        let printed = format!(
            "{:?}",
            ReceiptKeys::new(&["0123456789abcdef", "fedcba9876543210"], &DATABASE)
        );
        assert_eq!(printed, "ReceiptKeys { keys: 2, .. }");
        let short = std::panic::catch_unwind(|| ReceiptKeys::new(&["0123456789abcde"], &DATABASE));
        assert!(short.is_err());
        let none = std::panic::catch_unwind(|| ReceiptKeys::new(&[] as &[&str], &DATABASE));
        assert!(none.is_err());
    }
}
