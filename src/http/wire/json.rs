//! The one way from the JSON of a request to a struct.
//!
//! `serde_json` takes an array for any struct, member by member in the order of the declaration,
//! and a derived struct ignores members that it does not know, unless told otherwise each time. So
//! no body is decoded by `serde_json` itself (`tests/architecture.rs` looks for that): the
//! deserializer here stands in between, on every level, and takes only an object for a struct. It
//! builds no tree and allocates nothing, and it knows which member it is at, so that a refusal can
//! name it.
//!
//! A request is made of structs, options, lists, maps, strings, numbers, booleans and raw JSON.
//! Anything else a type asks for (an untagged enum, a flattened struct: both would read through a
//! tree of their own and take arrays again) is an error on its first use.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

use serde::de::value::CowStrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::error::Category;
use serde_json::value::RawValue;

use crate::http::problem::Problem;

/// Reads a body that has to be one object, with each member at most once and none that is unknown.
///
/// # Errors
/// A `400` problem: `malformed_json`, `unknown_field` or `invalid_field`, which name the member.
pub fn from_object<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    let rules = Rules::default();
    read(body, &rules).map_err(|error| {
        let code = match (error.classify(), rules.unknown.get()) {
            (Category::Data, true) => "unknown_field",
            (Category::Data, false) => "invalid_field",
            _ => "malformed_json",
        };
        let detail = match rules.member.get() {
            Some(member) => format!("{member}: {error}"),
            None => error.to_string(),
        };
        Problem::new(400, code, detail)
    })
}

/// Refuses every body but an empty one and `{}`.
///
/// # Errors
/// As [`from_object`].
pub fn no_members(body: &[u8]) -> Result<(), Problem> {
    #[derive(Deserialize)]
    struct Nothing {}
    if body.is_empty() {
        return Ok(());
    }
    from_object::<Nothing>(body).map(|Nothing {}| ())
}

/// The same for the message of a payment platform, which may add members without asking: unknown
/// ones are skipped, and of one that comes more than once the first counts.
///
/// # Errors
/// As `serde_json` words them. The words may quote values.
pub fn from_callback<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, serde_json::Error> {
    read(
        text,
        &Rules {
            tolerant: true,
            ..Rules::default()
        },
    )
}

/// JSON of our own, to be written into an answer as it is; none where it is not JSON.
pub fn raw(text: &str) -> Option<&RawValue> {
    serde_json::from_str(text).ok()
}

/// The text of a JSON string, or the decimal string of a JSON integer of any size; none for
/// everything else. `-0` is the integer 0.
pub fn text(raw: &RawValue) -> Option<Cow<'_, str>> {
    let raw = raw.get();
    if let Some(inner) = raw
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
    {
        return match inner.contains('\\') {
            false => Some(Cow::Borrowed(inner)),
            true => serde_json::from_str(raw).ok().map(Cow::Owned),
        };
    }
    integer(raw).map(Cow::Borrowed)
}

/// The digits of a JSON integer, with its sign; none for everything else.
pub fn integer(raw: &str) -> Option<&str> {
    // The grammar was checked when it was read: there is no leading zero, and no sign alone.
    let digits = raw.strip_prefix('-').unwrap_or(raw);
    match raw {
        "-0" => Some("0"),
        _ if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => Some(raw),
        _ => None,
    }
}

#[derive(Default)]
struct Rules {
    /// Skips what is unknown or repeated, instead of refusing it.
    tolerant: bool,
    /// The member that is being read.
    member: Cell<Option<&'static str>>,
    /// Whether it failed for a member that is unknown.
    unknown: Cell<bool>,
}

fn read<'a, T: Deserialize<'a>>(text: &'a [u8], rules: &Rules) -> Result<T, serde_json::Error> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = T::deserialize(Objects {
        inner: &mut json,
        rules,
    })?;
    json.end()?;
    Ok(value)
}

/// A deserializer, a visitor, a list or a seed, with the rules that go on inwards.
struct Objects<'r, I> {
    inner: I,
    rules: &'r Rules,
}

impl<'r, I> Objects<'r, I> {
    fn over<J>(&self, inner: J) -> Objects<'r, J> {
        Objects {
            inner,
            rules: self.rules,
        }
    }
}

/// What holds no value of its own is left to the deserializer below.
macro_rules! scalars {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
            self.inner.$method(visitor)
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Objects<'_, D> {
    type Error = D::Error;

    scalars! {
        deserialize_bool
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64
        deserialize_f32 deserialize_f64
        deserialize_str deserialize_string
        deserialize_ignored_any
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, D::Error> {
        Err(D::Error::custom("no shape was declared for this value"))
    }

    forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct enum identifier
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.over(visitor);
        self.inner.deserialize_option(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = self.over(visitor);
        self.inner.deserialize_newtype_struct(name, visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.over(visitor);
        self.inner.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.over(visitor);
        self.inner.deserialize_map(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.inner.deserialize_map(StructVisitor {
            visitor,
            fields,
            rules: self.rules,
        })
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Objects<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        let deserializer = self.over(deserializer);
        self.inner.visit_some(deserializer)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<V::Value, D::Error> {
        let deserializer = self.over(deserializer);
        self.inner.visit_newtype_struct(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<V::Value, A::Error> {
        let seq = self.over(seq);
        self.inner.visit_seq(seq)
    }

    // Of a map, whose keys are anybody's. Raw JSON comes this way too, and is handed on as it is.
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        let map = self.over(map);
        self.inner.visit_map(map)
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Objects<'_, A> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, A::Error> {
        let seed = self.over(seed);
        self.inner.next_element_seed(seed)
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Objects<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        self.inner.next_key_seed(seed)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        let seed = self.over(seed);
        self.inner.next_value_seed(seed)
    }
}

impl<'de, T: DeserializeSeed<'de>> DeserializeSeed<'de> for Objects<'_, T> {
    type Value = T::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T::Value, D::Error> {
        let deserializer = self.over(deserializer);
        self.inner.deserialize(deserializer)
    }
}

/// Takes an object for a struct, and nothing else.
struct StructVisitor<'r, V> {
    visitor: V,
    fields: &'static [&'static str],
    rules: &'r Rules,
}

impl<'de, V: Visitor<'de>> Visitor<'de> for StructVisitor<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        let members = Members {
            map,
            fields: self.fields,
            seen: 0,
            rules: self.rules,
        };
        self.visitor.visit_map(members)
    }
}

/// The members of an object that becomes a struct.
struct Members<'r, A> {
    map: A,
    fields: &'static [&'static str],
    /// A bit for each of the first 64 fields that came already; a derived struct refuses a later
    /// one that repeats by itself.
    seen: u64,
    rules: &'r Rules,
}

/// A member's name, borrowed unless it had escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Members<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        while let Some(Name(name)) = self.map.next_key()? {
            let known = self.fields.iter().position(|field| *field == name);
            let bit = known.map_or(0, |at| 1_u64.checked_shl(at as u32).unwrap_or(0));
            if self.rules.tolerant && (known.is_none() || self.seen & bit != 0) {
                self.map.next_value::<IgnoredAny>()?;
                continue;
            }
            let Some(known) = known else {
                self.rules.unknown.set(true);
                return Err(A::Error::unknown_field(&name, self.fields));
            };
            self.seen |= bit;
            self.rules.member.set(self.fields.get(known).copied());
            return seed.deserialize(CowStrDeserializer::new(name)).map(Some);
        }
        Ok(None)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        let value = self.map.next_value_seed(Objects {
            inner: seed,
            rules: self.rules,
        })?;
        self.rules.member.set(None);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    struct Inner {
        #[serde(default)]
        a: u32,
        #[serde(default)]
        b: Option<String>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Outer {
        one: Inner,
        #[serde(default)]
        option: Option<Inner>,
        #[serde(default)]
        list: Vec<Inner>,
        #[serde(default)]
        map: BTreeMap<String, Inner>,
    }

    fn refused(text: &str) -> (&'static str, String) {
        let problem = from_object::<Outer>(text.as_bytes()).unwrap_err();
        (problem.code, problem.detail.into_owned())
    }

    #[test]
    fn an_array_is_no_object_on_any_level() {
        let good = r#"{"one":{"a":1},"option":{"b":"x"},"list":[{"a":2}],"map":{"k":{"a":3}}}"#;
        assert!(from_object::<Outer>(good.as_bytes()).is_ok());
        for (bad, named) in [
            (r#"[{"a":1}]"#, "expected an object"),
            (r#"{"one":[1,"x"]}"#, "one: "),
            (r#"{"one":[]}"#, "one: "),
            (r#"{"one":{},"option":[1]}"#, "option: "),
            (r#"{"one":{},"list":[[1]]}"#, "list: "),
            (r#"{"one":{},"map":{"k":[1]}}"#, "map: "),
        ] {
            assert!(serde_json::from_str::<Outer>(bad).is_ok(), "{bad}");
            let (code, detail) = refused(bad);
            assert_eq!(code, "invalid_field", "{bad}");
            assert!(detail.contains(named), "{bad}: {detail}");
            assert!(from_callback::<Outer>(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_member_that_is_unknown_or_repeated_is_refused_and_named_on_every_level() {
        for (bad, code, named) in [
            (r#"{"one":{},"two":1}"#, "unknown_field", "two"),
            (r#"{"one":{"c":1}}"#, "unknown_field", "`c`"),
            (r#"{"one":{},"one":{}}"#, "invalid_field", "one"),
            (r#"{"one":{"a":1,"\u0061":2}}"#, "invalid_field", "`a`"),
            (r#"{"one":{"a":-1}}"#, "invalid_field", "a: "),
            (r#"{"one":{"a":1.0}}"#, "invalid_field", "a: "),
            (r#"{"list":[]}"#, "invalid_field", "missing field `one`"),
            (r#"{"one":{}"#, "malformed_json", "EOF"),
            (r#"{"one":{}} {}"#, "malformed_json", "trailing"),
            ("", "malformed_json", "EOF"),
        ] {
            let (found, detail) = refused(bad);
            assert_eq!(found, code, "{bad}: {detail}");
            assert!(detail.contains(named), "{bad}: {detail}");
        }
    }

    #[test]
    fn of_a_callback_what_is_unknown_is_skipped_and_the_first_of_a_name_counts() {
        let text = br#"{"one":{"a":1,"new":[{"x":[]}],"a":2},"one":{"a":9},"new":{}}"#;
        let read: Outer = from_callback(text).unwrap();
        assert_eq!(read.one.a, 1);
        // Also where the second one is of another shape.
        assert!(from_callback::<Outer>(br#"{"one":{},"one":[7]}"#).is_ok());
    }

    #[test]
    fn a_type_that_would_read_around_the_rules_is_an_error() {
        #[derive(PartialEq, Deserialize)]
        #[serde(untagged)]
        enum Either {
            Struct(Inner),
        }
        #[derive(PartialEq, Deserialize)]
        struct Flat {
            #[serde(flatten)]
            inner: Inner,
        }
        assert!(from_object::<Either>(br#"[1]"#).is_err());
        assert!(from_object::<Flat>(br#"{"a":1}"#).is_err());
        assert!(from_object::<serde_json::Value>(b"[]").is_err());
    }

    #[test]
    fn an_integer_of_any_size_means_its_decimal_string() {
        let text = |json: &str| {
            let raw: &RawValue = raw(json).unwrap_or_else(|| panic!("{json}"));
            text(raw).map(Cow::into_owned)
        };
        for (json, expected) in [
            ("0", Some("0")),
            ("-0", Some("0")),
            ("-7", Some("-7")),
            ("18446744073709551616", Some("18446744073709551616")),
            ("-9223372036854775809", Some("-9223372036854775809")),
            ("\"a\\u002db\"", Some("a-b")),
            ("\"\"", Some("")),
            ("\"\\ud800\"", None),
            ("1.0", None),
            ("1e3", None),
            ("1E3", None),
            ("-0.0", None),
            ("true", None),
            ("null", None),
            ("[1]", None),
            ("{}", None),
        ] {
            assert_eq!(text(json).as_deref(), expected, "{json}");
        }
        for no_json in ["01", "-", "+1", "0x1", "-01"] {
            assert!(raw(no_json).is_none(), "{no_json}");
        }
    }
}
