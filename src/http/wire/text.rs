//! Ids and keys as they stand in JSON.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use serde_json::value::RawValue;

use super::json;

/// A string, or a JSON integer of any size that means its decimal string.
#[derive(Debug)]
pub(super) struct Text<'a>(Cow<'a, str>);

impl<'a> Text<'a> {
    /// The text.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The text by itself.
    pub(super) fn into_inner(self) -> Cow<'a, str> {
        self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&'a RawValue>::deserialize(deserializer)?;
        let none = || D::Error::custom("must be a string of visible ASCII or an integer");
        json::text(raw).map(Text).ok_or_else(none)
    }
}
