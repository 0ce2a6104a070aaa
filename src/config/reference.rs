//! The reference page, `docs/CONFIGURATION.md`, generated from the types in [`super`]: doc comments
//! are the meanings, `Default` the defaults, and `#[schemars(range)]` the ranges, which `check`
//! enforces.

use std::fmt::Write as _;
use std::sync::LazyLock;

use serde_json::Value;

use super::{Config, EventSink};

/// The level of a path whose names are chosen by the operator.
pub(super) const NAME: &str = "<name>";

/// One setting of the page.
#[derive(Debug)]
pub struct Field {
    /// Path, levels joined by dots.
    pub path: String,
    /// Type, or the permitted values.
    pub kind: String,
    /// Default, as TOML.
    pub default: String,
    /// Lowest and highest value, if it has a range.
    pub range: Option<(i64, i64)>,
    /// Meaning, with unit and reason.
    pub meaning: String,
}

impl Field {
    /// Environment variable that overrides it.
    pub fn variable(&self) -> String {
        let path = self.path.replace('.', "__").to_uppercase();
        let name = if self.is_open() { "__<NAME>" } else { "" };
        format!("{}{path}{name}", super::environment::ENV_PREFIX)
    }

    /// Whether it is a table with field names chosen by the operator.
    fn is_open(&self) -> bool {
        super::environment::OPEN_TABLES.contains(&self.path.as_str())
    }
}

/// Every setting, by section and name.
pub fn fields() -> &'static [Field] {
    static FIELDS: LazyLock<Vec<Field>> = LazyLock::new(read_fields);
    &FIELDS
}

fn read_fields() -> Vec<Field> {
    let schema = schemars::schema_for!(Config).to_value();
    let defaults = toml::Table::try_from(Config::default()).unwrap_or_default();
    let mut fields = Vec::new();
    walk(
        &schema,
        &schema,
        &toml::Value::Table(defaults),
        "",
        &mut fields,
    );
    // The page begins with the fields without a section.
    fields.sort_by_key(|field| field.path.rsplit_once('.').map(|(of, _)| of.to_owned()));
    fields
}

fn walk(root: &Value, schema: &Value, default: &toml::Value, path: &str, out: &mut Vec<Field>) {
    let words = text(schema, "description");
    let target = follow(root, schema);
    if let Some(members) = target["properties"].as_object() {
        for (name, member) in members {
            let path = match path {
                "" => name.clone(),
                path => format!("{path}.{name}"),
            };
            let unset = toml::Value::String(String::new());
            walk(
                root,
                member,
                default.get(name).unwrap_or(&unset),
                &path,
                out,
            );
        }
        return;
    }
    // A table of tables, of which `NAME` stands for each.
    let each = &target["additionalProperties"];
    if follow(root, each)["properties"].is_object() {
        let of_each = toml::Value::try_from(EventSink::default());
        let of_each = of_each.unwrap_or_else(|_| default.clone());
        return walk(root, each, &of_each, &format!("{path}.{NAME}"), out);
    }
    let bound = |name: &str| schema[name].as_i64();
    out.push(Field {
        path: path.to_owned(),
        kind: kind(target),
        default: default.to_string(),
        range: bound("minimum").zip(bound("maximum")),
        meaning: words,
    });
}

/// Follows the single reference of a member with a type of this crate.
fn follow<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let reference = schema["$ref"]
        .as_str()
        .or(schema["allOf"][0]["$ref"].as_str());
    reference
        .and_then(|reference| root.pointer(reference.trim_start_matches('#')))
        .unwrap_or(schema)
}

fn kind(schema: &Value) -> String {
    let listed = schema["enum"].as_array();
    let described = schema["oneOf"].as_array();
    let values: Vec<String> = listed
        .into_iter()
        .flatten()
        .chain(described.into_iter().flatten().map(|one| &one["const"]))
        .filter_map(|value| Some(format!("`{}`", value.as_str()?)))
        .collect();
    if !values.is_empty() {
        return values.join(", ");
    }
    match schema["type"].as_str() {
        Some("string") => "text".into(),
        Some("array") => "a text or a list of texts".into(),
        Some("integer") => "whole number".into(),
        Some("number") => "number".into(),
        Some("object") => "a table of texts".into(),
        Some("boolean") => "`true` or `false`".into(),
        _ => "text".into(),
    }
}

fn text(schema: &Value, name: &str) -> String {
    let text = schema[name].as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The whole page.
pub fn page() -> String {
    let mut page = String::from(HEAD);
    let mut section = None;
    for field in fields() {
        let (of, name) = field.path.rsplit_once('.').unwrap_or(("", &field.path));
        if section.as_deref() != Some(of) {
            section = Some(of.to_owned());
            let title = if of.is_empty() {
                "Top level".to_owned()
            } else {
                format!("`[{of}]`")
            };
            // Writing to a String cannot fail.
            let _ = write!(
                page,
                "\n## {title}\n\n| field | default | range | meaning | variable |\n|---|---|---|---|---|\n"
            );
        }
        let range = match field.range {
            Some((least, most)) => format!("{} to {}", grouped(least), grouped(most)),
            None => field.kind.clone(),
        };
        let _ = writeln!(
            page,
            "| `{name}` | `{}` | {range} | {} | `{}` |",
            field.default,
            field.meaning.replace('|', "\\|"),
            field.variable()
        );
    }
    page
}

fn grouped(number: i64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

const HEAD: &str = "\
# Configuration

<!-- Generated from src/config: millrace config reference > docs/CONFIGURATION.md -->

One TOML file (`--config FILE`, else `./millrace.toml` if there is one). The environment variable of a field
overrides it. With `_FILE` appended to its name, the variable names a file with the value, for secrets. A list is
a JSON array there, or in a file one text per line; a plain value is a list of one. Unknown fields are refused. So
are a field that two variables set, an empty file and an empty text. Fields are checked against one another before
the start. `millrace config check` prints the settings in force.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_refused_outside_its_documented_range_and_taken_inside() {
        let mut seen = 0;
        for field in fields() {
            let Some((least, most)) = field.range else {
                assert!(!field.meaning.is_empty(), "{}", field.path);
                continue;
            };
            seen += 1;
            let set = |value: i64| {
                // Passes whatever fields require of one another.
                let more = [
                    ("MILLRACE_ORDERS__REMEMBERED_MAX", "1000000000"),
                    ("MILLRACE_QUEUE__CAPACITY", "1"),
                    ("MILLRACE_EVENTS__SINKS__SHOP__URL", "https://shop.example"),
                    ("MILLRACE_EVENTS__SINKS__SHOP__SECRET", "c2VjcmV0"),
                ];
                let more = more
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value.to_owned()));
                let variable = field.variable().replace("<NAME>", "SHOP");
                let own = (variable, value.to_string());
                let env = more.filter(|(name, _)| *name != own.0).chain([own.clone()]);
                Config::parse("", "test", env)
            };
            for good in [least, most] {
                let set = set(good);
                assert!(set.is_ok(), "{} = {good}: {set:?}", field.path);
            }
            for bad in [least - 1, most + 1] {
                assert!(set(bad).is_err(), "{} = {bad}", field.path);
            }
        }
        assert!(seen > 10);
    }

    #[test]
    fn every_number_has_a_range() {
        let without = fields()
            .iter()
            .filter(|f| f.kind == "whole number" && f.range.is_none());
        assert_eq!(without.map(|f| &*f.path).collect::<Vec<_>>(), [""; 0]);
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            [0, 100, 1_000, 31_536_000_000].map(grouped),
            ["0", "100", "1,000", "31,536,000,000"]
        );
    }
}
