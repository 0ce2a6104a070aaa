//! The published file: a line of JSON about the draw, then one for each entry, in the order of rank.
//!
//! ```text
//! {"draw":"millrace-draw-1","sku_id":"IPHONE-15","state":"drawn","draw_at":"…","draw_beacon":"…","commitment":"…",
//!  "fixed_at":"…","units":1000,"entries":1000000,"entries_hash":"…","beacon":"…","seed":"…"}
//! {"place":1,"entry":"…","quantity":1,"rank":"00000a","won":true}
//! {"place":2,"entry":"…","quantity":1,"rank":"00001f","won":true}
//! ```

use std::fmt;

use serde::de::{Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use smol_str::SmolStr;

use super::{Beacon, Commitment, EntriesHash, EntryHash, Rank, Ranked, Seed};
use crate::order::Quantity;

/// The format of the file, its first member. Another format has another name.
pub const VERSION: &str = "millrace-draw-1";

/// How far a draw has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Entries come in. Only the commitment and the terms are known.
    EntriesOpen,
    /// Number and hash of the entries are known, the seed is still secret.
    EntriesFixed,
    /// Everything is known.
    Drawn,
}

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`VERSION`].
    pub draw: String,
    /// The SKU.
    pub sku_id: String,
    /// How far it has come.
    pub state: State,
    /// When entries end, RFC 3339.
    pub draw_at: String,
    /// The name of the public value that takes part in the ranks; none if the seed alone ranks.
    pub draw_beacon: Option<String>,
    /// SHA-256 of the seed.
    pub commitment: Commitment,
    /// When number and hash of the entries were published, RFC 3339.
    pub fixed_at: Option<String>,
    /// Units to be drawn for.
    pub units: Option<u64>,
    /// Number of entries.
    pub entries: Option<u64>,
    /// Their hash.
    pub entries_hash: Option<EntriesHash>,
    /// The public value, as it was supplied.
    pub beacon: Option<Beacon>,
    /// The seed.
    pub seed: Option<Seed>,
}

/// The line of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Its place in the order of rank, from 1.
    pub place: u64,
    /// In place of the user id.
    pub entry: EntryHash,
    /// Units that it is for, 1 to [`Quantity::MAX`].
    #[serde(with = "quantity")]
    pub quantity: Quantity,
    /// The first digits of its rank, as many as tell it from its neighbours.
    pub rank: RankDigits,
    /// Whether the units sufficed when its turn came.
    pub won: bool,
}

/// The first digits of a rank, at least one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RankDigits(SmolStr);

impl RankDigits {
    /// As many digits of `rank` as none of its neighbours begins with.
    fn between(before: Option<&Rank>, rank: &Rank, after: Option<&Rank>) -> Self {
        let digits = rank.digits();
        let common = |other: &Rank| {
            let pairs = other.digits();
            let same = digits.iter().zip(&pairs).take_while(|(a, b)| a == b);
            same.count()
        };
        let common = before.map_or(0, common).max(after.map_or(0, common));
        let end = (common + 1).min(digits.len());
        let text = std::str::from_utf8(&digits[..end]).unwrap_or_default();
        RankDigits(SmolStr::new(text))
    }

    /// Checks `digits` and copies them.
    pub fn new(digits: &str) -> Option<Self> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let is_rank = (1..=64).contains(&digits.len()) && digits.bytes().all(is_digit);
        is_rank.then(|| RankDigits(SmolStr::new(digits)))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `rank` begins with these digits.
    pub fn begin(&self, rank: &Rank) -> bool {
        rank.digits().starts_with(self.0.as_bytes())
    }

    /// Whether every rank that begins with these digits is lower than every rank that begins with those of `other`.
    pub fn are_below(&self, other: &RankDigits) -> bool {
        self < other && !other.0.starts_with(self.0.as_str())
    }
}

impl fmt::Display for RankDigits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for RankDigits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for RankDigits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Digits;
        impl Visitor<'_> for Digits {
            type Value = RankDigits;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("1 to 64 lower-case hexadecimal digits")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<RankDigits, E> {
                let unexpected = serde::de::Unexpected::Str(text);
                RankDigits::new(text).ok_or_else(|| E::invalid_value(unexpected, &self))
            }
        }
        deserializer.deserialize_str(Digits)
    }
}

/// A quantity as a number.
mod quantity {
    use super::{Deserialize as _, Deserializer, Quantity, Serializer};
    use serde::de::Error as _;

    pub(super) fn serialize<S: Serializer>(
        quantity: &Quantity,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(quantity.get())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Quantity, D::Error> {
        let units = u32::deserialize(deserializer)?;
        let range = format!("quantity {units} is not 1 to {}", Quantity::MAX);
        Quantity::new(units).ok_or_else(|| D::Error::custom(range))
    }
}

/// Sorts the entries by rank and makes their rows: each in its turn takes its quantity of the `units`, if so many are
/// left.
pub fn rows(entries: &mut [Ranked], units: u64) -> impl Iterator<Item = Row> {
    entries.sort_unstable();
    let entries = &*entries;
    let mut left = units;
    entries.iter().enumerate().map(move |(at, ranked)| {
        let rank = |at: Option<usize>| at.and_then(|at| entries.get(at)).map(|ranked| &ranked.rank);
        let wants = u64::from(ranked.entry.quantity.get());
        let won = wants <= left;
        if won {
            left -= wants;
        }
        Row {
            place: at as u64 + 1,
            entry: ranked.entry.hash,
            quantity: ranked.entry.quantity,
            rank: RankDigits::between(
                rank(at.checked_sub(1)),
                &ranked.rank,
                rank(at.checked_add(1)),
            ),
            won,
        }
    })
}

/// A line of the file, without its line break.
///
/// # Errors
/// As `serde_json` words them, with the reason.
pub(super) fn read_line<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, serde_json::Error> {
    // `serde_json` takes a list for any struct.
    match line.first() {
        Some(b'{') => serde_json::from_slice(line),
        _ => Err(serde_json::Error::custom("a line must be a JSON object")),
    }
}

/// A header or a row as a line with its line break.
///
/// # Errors
/// None: both are made of text and numbers.
pub fn write_line(line: &impl Serialize, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    serde_json::to_writer(&mut *out, line)?;
    out.push(b'\n');
    Ok(())
}
