//! Ids and keys as they stand in JSON.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use smol_str::{SmolStr, ToSmolStr};

/// A string, or a JSON integer that means its decimal string.
#[derive(Debug)]
pub(super) enum Text<'a> {
    /// Borrowed from the body.
    AsItCame(&'a str),
    /// An integer, which is held inline, or a string that had escapes.
    Rewritten(SmolStr),
}

impl Text<'_> {
    /// The text.
    pub(super) fn as_str(&self) -> &str {
        match self {
            Text::AsItCame(text) => text,
            Text::Rewritten(text) => text,
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an integer")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text::AsItCame(text))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text::Rewritten(SmolStr::new(text)))
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
                Ok(Text::Rewritten(number.to_smolstr()))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
                Ok(Text::Rewritten(number.to_smolstr()))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}
