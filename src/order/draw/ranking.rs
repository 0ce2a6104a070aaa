//! Who is where: ranks, entry tokens, and the hash of all entries.

use std::fmt;

use ring::hmac;
use serde::de::{Deserialize, Deserializer, Error as _};
use serde::ser::{Serialize, Serializer};
use sha2::{Digest, Sha256};
use smol_str::SmolStr;

use super::digest::unhex;
use super::{EntriesHash, EntryHash, Rank, Salt, Seed};
use crate::order::{InvalidText, Quantity, UserId, visible_ascii};

/// The public value that takes part in the ranks: 1 to 256 characters of visible ASCII. It is used as it was written, so its
/// notation has to be agreed on beforehand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beacon(SmolStr);

impl Beacon {
    /// Highest length in characters.
    pub const LEN_MAX: usize = 256;

    /// Checks `text` and copies it.
    ///
    /// # Errors
    /// [`InvalidText`] if it is empty, too long or not visible ASCII.
    pub fn new(text: &str) -> Result<Self, InvalidText> {
        visible_ascii(text, Self::LEN_MAX).map(|text| Beacon(SmolStr::new(text)))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Serialize for Beacon {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Beacon {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Beacon::new(&text).map_err(|error| D::Error::custom(format_args!("a beacon {error}")))
    }
}

/// Ranks user ids by one seed and one beacon.
#[derive(Debug)]
pub struct Ranking {
    /// HMAC-SHA256 under the seed, already fed with the beacon.
    begun: hmac::Context,
}

impl Ranking {
    /// The ranking of a draw. A draw without a beacon is ranked by the seed alone.
    pub fn new(seed: &Seed, beacon: Option<&Beacon>) -> Self {
        let mut begun = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &seed.0));
        begun.update(beacon.map_or("", Beacon::as_str).as_bytes());
        Ranking { begun }
    }

    /// HMAC-SHA256(seed, beacon ‖ user id). All users of a draw have the same beacon, so different user ids are different
    /// messages although nothing stands between the two.
    pub fn rank(&self, user: &UserId) -> Rank {
        let mut context = self.begun.clone();
        context.update(user.as_str().as_bytes());
        Rank(first(&context.sign()))
    }
}

/// Makes the entry tokens of one draw.
pub struct EntryTokens(hmac::Key);

impl EntryTokens {
    /// The tokens of the draw that has this salt.
    pub fn new(salt: &Salt) -> Self {
        EntryTokens(hmac::Key::new(hmac::HMAC_SHA256, &salt.0))
    }

    /// The token of a user's entry: the same each time it is asked for.
    pub fn of(&self, user: &UserId) -> EntryToken {
        EntryToken(first(&hmac::sign(&self.0, user.as_str().as_bytes())))
    }
}

impl fmt::Debug for EntryTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EntryTokens(secret)")
    }
}

/// What the shop is told of an entry, to find it in the published file: 128 bits, written as 32 hexadecimal digits.
/// Whoever has it and the user id can show that this user entered; nobody can without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryToken([u8; 16]);

impl EntryToken {
    /// The token of 32 lower-case hexadecimal digits.
    pub fn from_hex(digits: &str) -> Option<Self> {
        unhex(digits).map(Self)
    }

    /// What the published file says of the entry of `user`: SHA-256 of the token's digits and the user id. The token has
    /// a fixed length, so no two pairs of token and user id are the same message.
    pub fn entry_hash(&self, user: &UserId) -> EntryHash {
        let mut hasher = Sha256::new();
        hasher.update(self.to_string());
        hasher.update(user.as_str());
        EntryHash(hasher.finalize().into())
    }
}

impl fmt::Display for EntryToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The bytes at the start of an HMAC.
fn first<const N: usize>(tag: &hmac::Tag) -> [u8; N] {
    let mut bytes = [0; N];
    bytes
        .iter_mut()
        .zip(tag.as_ref())
        .for_each(|(to, from)| *to = *from);
    bytes
}

/// An entry, as it is fixed before the seed is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// In place of the user id.
    pub hash: EntryHash,
    /// Units that it is for.
    pub quantity: Quantity,
}

/// An entry with its rank. They sort by rank; two user ids of one rank are not to be found, and the entry hash would
/// decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ranked {
    /// Of its user id.
    pub rank: Rank,
    /// The entry.
    pub entry: Entry,
}

/// Sorts the entries by hash and makes the hash of all of them: SHA-256 of a line for each, of its hash, a space, its
/// quantity and a line feed. The sequence in which they came in is in neither.
pub fn entries_hash(entries: &mut [Entry]) -> EntriesHash {
    entries.sort_unstable();
    let mut hasher = Sha256::new();
    for entry in entries.iter() {
        hasher.update(format!("{} {}\n", entry.hash, entry.quantity.get()));
    }
    EntriesHash(hasher.finalize().into())
}
