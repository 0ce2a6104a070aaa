//! The values of 32 bytes, each written as 64 lower-case hexadecimal digits.

use std::fmt;

use rand::TryRngCore;
use rand::rngs::OsRng;
use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// The system gave no random bytes.
#[derive(Debug, thiserror::Error)]
#[error("the system gave no random bytes: {0}")]
pub struct NoRandomness(#[from] rand::rand_core::OsError);

macro_rules! bytes_32 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The value of 64 lower-case hexadecimal digits.
            pub fn from_hex(digits: &str) -> Option<Self> {
                unhex(digits).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(text(&hex(&self.0)))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(text(&hex(&self.0)))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str(Digits).map(Self)
            }
        }
    };
}

bytes_32!(
    /// What decides the draw, with the beacon. Secret until the entries are fixed.
    Seed
);
bytes_32!(
    /// SHA-256 of the seed, shown before the first entry.
    Commitment
);
bytes_32!(
    /// The secret from which the entry tokens of one draw are made. Never published: with it anyone could test user ids
    /// against the entry hashes.
    Salt
);
bytes_32!(
    /// What the published file says of an entry in place of its user id.
    EntryHash
);
bytes_32!(
    /// The hash of all entries, published before the seed.
    EntriesHash
);
bytes_32!(
    /// What the seed and the beacon make of a user id. The lowest comes first.
    Rank
);

macro_rules! secret {
    ($name:ident) => {
        impl $name {
            /// A new one, of the system's randomness.
            ///
            /// # Errors
            /// [`NoRandomness`] if the system has none.
            pub fn random() -> Result<Self, NoRandomness> {
                let mut bytes = [0; 32];
                OsRng.try_fill_bytes(&mut bytes)?;
                Ok(Self(bytes))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(secret)"))
            }
        }
    };
}

macro_rules! public {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    )*};
}

secret!(Seed);
secret!(Salt);
public!(Commitment EntryHash EntriesHash Rank);

impl Seed {
    /// What is shown of it before the draw.
    pub fn commitment(&self) -> Commitment {
        Commitment(Sha256::digest(self.0).into())
    }
}

impl Rank {
    /// Its 64 digits.
    pub(super) fn digits(&self) -> [u8; 64] {
        hex(&self.0)
    }
}

/// Reads 64 digits.
struct Digits;

impl Visitor<'_> for Digits {
    type Value = [u8; 32];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("64 lower-case hexadecimal digits")
    }

    fn visit_str<E: serde::de::Error>(self, digits: &str) -> Result<[u8; 32], E> {
        unhex(digits).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(digits), &self))
    }
}

fn hex(bytes: &[u8; 32]) -> [u8; 64] {
    let mut digits = [0; 64];
    for (pair, byte) in digits.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
        *pair = [digit(byte >> 4), digit(byte & 15)];
    }
    digits
}

fn digit(value: u8) -> u8 {
    match value {
        0..=9 => b'0' + value,
        _ => b'a' + value - 10,
    }
}

fn text(digits: &[u8; 64]) -> &str {
    std::str::from_utf8(digits).unwrap_or_default()
}

/// The bytes that lower-case hexadecimal digits mean.
pub(super) fn unhex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = value(*high)? << 4 | value(*low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_back_from_its_64_digits_and_from_nothing_else() {
        let value = Rank([0xa5; 32]);
        let digits = value.to_string();
        assert_eq!(digits, "a5".repeat(32));
        assert_eq!(Rank::from_hex(&digits), Some(value));
        for other in [
            String::new(),
            digits[1..].to_owned(),
            format!("{digits}a5"),
            digits.to_uppercase(),
            digits.replace('5', "g"),
        ] {
            assert_eq!(Rank::from_hex(&other), None, "{other}");
        }
    }

    #[test]
    fn a_secret_is_not_in_a_log_line() {
        let seed = Seed::random().unwrap();
        assert_ne!(seed, Seed::random().unwrap());
        assert_eq!(format!("{seed:?}"), "Seed(secret)");
    }
}
