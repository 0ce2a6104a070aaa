//! Settings from the environment: `MILLRACE_` and the path of a field in capitals; with `_FILE`,
//! from the named file. Ambiguous values are refused.

use std::collections::HashMap;

use super::events;

pub(super) const ENV_PREFIX: &str = "MILLRACE_";
pub(super) const FILE_SUFFIX: &str = "_FILE";

/// Tables with field names chosen by the operator, of any case, and text values.
pub(super) const OPEN_TABLES: &[&str] = &["payments.wechatpay.public_keys"];

/// The variables of this process that begin with `MILLRACE_`. Others may hold any bytes.
pub(super) fn read() -> Result<Vec<(String, String)>, String> {
    let mut ours = Vec::new();
    for (name, value) in std::env::vars_os() {
        let Some(name) = name.to_str().filter(|name| name.starts_with(ENV_PREFIX)) else {
            continue;
        };
        // A release build has no such variable, and refuses it like any other mistake.
        if Some(name) == crate::faults::VARIABLE {
            continue;
        }
        let value = value
            .into_string()
            .map_err(|_| format!("{name} is not UTF-8"))?;
        ours.push((name.to_owned(), value));
    }
    Ok(ours)
}

/// Overlays variables on a table of settings.
///
/// # Errors
/// The variable, and the mistake in it.
pub(super) fn lay_over(
    table: &mut toml::Table,
    defaults: &toml::Table,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<(), (String, String)> {
    let mut variables: Vec<_> = env
        .into_iter()
        .filter(|(name, _)| name.starts_with(ENV_PREFIX))
        .collect();
    variables.sort();
    // The variable that sets each field.
    let mut set_by: HashMap<String, String> = HashMap::new();
    for (name, value) in variables {
        let path = name.strip_prefix(ENV_PREFIX).unwrap_or(&name);
        let (path, is_file) = match path.strip_suffix(FILE_SUFFIX) {
            Some(path) => (path.to_ascii_lowercase(), true),
            None => (path.to_ascii_lowercase(), false),
        };
        let laid = match set_by.get(&path) {
            Some(other) => Err(format!("{other} sets the same field; keep one of them")),
            None => overlay(table, defaults, &path, value, is_file),
        };
        if let Err(message) = laid {
            return Err((name, message));
        }
        set_by.insert(path, name);
    }
    Ok(())
}

/// Overlays one variable. The type of a field is that of its default.
fn overlay(
    table: &mut toml::Table,
    defaults: &toml::Table,
    path: &str,
    value: String,
    is_file: bool,
) -> Result<(), String> {
    let keys: Vec<&str> = path.split("__").collect();
    let unknown = || format!("there is no configuration field {}", keys.join("."));
    let (field, sections) = keys.split_last().ok_or_else(unknown)?;
    let (mut into, mut like) = (table, defaults);
    let of_each_sink = toml::Table::try_from(super::EventSink::default()).map_err(|_| unknown())?;
    for (level, section) in sections.iter().enumerate() {
        like = match sections[..level].join(".") == events::SINKS {
            true => &of_each_sink,
            false => like
                .get(*section)
                .and_then(toml::Value::as_table)
                .ok_or_else(unknown)?,
        };
        into = into
            .entry(*section)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(unknown)?;
    }
    let is_open = OPEN_TABLES.contains(&sections.join(".").as_str());
    let default = like.get(*field);
    if !is_open && default.is_none_or(toml::Value::is_table) {
        return Err(unknown());
    }
    let value = if is_file { from_file(&value)? } else { value };
    if is_open {
        into.retain(|name, _| !name.eq_ignore_ascii_case(field));
        into.insert((*field).to_owned(), toml::Value::String(value));
        return Ok(());
    }
    let value = match default {
        Some(toml::Value::Integer(_)) => toml::Value::Integer(
            value
                .trim()
                .parse()
                .map_err(|_| format!("{value:?} is not a whole number"))?,
        ),
        Some(toml::Value::Float(_)) => toml::Value::Float(
            value
                .trim()
                .parse()
                .map_err(|_| format!("{value:?} is not a number"))?,
        ),
        Some(toml::Value::Boolean(_)) => toml::Value::Boolean(
            value
                .trim()
                .parse()
                .map_err(|_| format!("{value:?} is not true or false"))?,
        ),
        Some(toml::Value::Array(_)) => {
            let items = list(&value, is_file)?;
            toml::Value::Array(items.into_iter().map(toml::Value::String).collect())
        }
        _ => toml::Value::String(value),
    };
    into.insert((*field).to_owned(), value);
    Ok(())
}

/// The content of a file, without the line break at its end.
fn from_file(path: &str) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"))?;
    let text = text.trim_end_matches(['\r', '\n']);
    if text.trim().is_empty() {
        return Err(format!(
            "{path} is empty; write the value into it, or unset the variable"
        ));
    }
    Ok(text.to_owned())
}

/// Parses a list: a JSON array, or one text; in a file also one text per line. No message quotes a
/// text, because it may be a secret.
fn list(value: &str, is_file: bool) -> Result<Vec<String>, String> {
    if value.trim_start().starts_with('[') {
        return serde_json::from_str(value).map_err(|_| {
            "begins with [ and is not a JSON array of texts, such as [\"a\",\"b\"]".to_owned()
        });
    }
    let items: Vec<String> = match is_file {
        true => value
            .lines()
            .map(|line| line.trim().to_owned())
            .filter(|line| !line.is_empty())
            .collect(),
        false => vec![value.to_owned()],
    };
    if items.iter().any(|item| item.contains([',', '\n', '\r'])) {
        return Err(
            "has a comma or a line break; write a list as a JSON array, such as [\"a\",\"b\"]"
                .to_owned(),
        );
    }
    if items.iter().any(String::is_empty) {
        return Err("is empty; unset it to set none".to_owned());
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, ConfigError};

    fn parse(env: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let env = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config::parse("[data_plane]\ntoken = \"file\"", "test.toml", env)
    }

    fn tokens(value: &str) -> Result<Vec<String>, String> {
        parse(&[("MILLRACE_DATA_PLANE__TOKEN", value)])
            .map(|config| config.data_plane.token.0)
            .map_err(|error| error.to_string())
    }

    fn tokens_in_file(text: &str) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, text).unwrap();
        parse(&[("MILLRACE_DATA_PLANE__TOKEN_FILE", file.to_str().unwrap())])
            .map(|config| config.data_plane.token.0)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_is_a_json_array_or_in_a_file_one_a_line_and_a_plain_value_is_one() {
        let both = Ok(vec!["a".to_owned(), "b".to_owned()]);
        assert_eq!(tokens("a"), Ok(vec!["a".to_owned()]));
        assert_eq!(tokens(r#"["a","b"]"#), both);
        assert_eq!(tokens(" [ \"a\" ,\n\"b\" ] "), both);
        for text in [
            "a\nb",
            "a\nb\n",
            "a\r\nb\r\n",
            "\n a \n\nb",
            r#"["a", "b"]"#,
        ] {
            assert_eq!(tokens_in_file(text), both, "{text:?}");
        }
        assert_eq!(tokens_in_file("a\n"), Ok(vec!["a".to_owned()]));
        assert_eq!(tokens("[]"), Ok(vec![]), "none, and said so");
    }

    #[test]
    fn what_would_become_an_odd_token_is_refused_in_words_that_do_not_quote_it() {
        for (value, remedy) in [
            ("s3cret,b", "JSON array"),
            ("s3cret\nb", "JSON array"),
            ("[s3cret", "JSON array"),
            ("[\"s3cret\", 1]", "JSON array"),
            ("[[\"s3cret\"]]", "JSON array"),
            ("[\"s3cret\", \"\"]", "empty"),
            ("", "unset"),
            ("s3 cret", "visible ASCII"),
            (" s3cret", "visible ASCII"),
        ] {
            let message = tokens(value).unwrap_err();
            assert!(message.contains(remedy), "{value:?}: {message}");
            assert!(!message.contains("s3cret"), "{message}");
        }
        for (text, remedy) in [
            ("", "is empty"),
            ("\n\n", "is empty"),
            (" \n", "is empty"),
            ("a,b\n", "JSON array"),
        ] {
            let message = tokens_in_file(text).unwrap_err();
            assert!(message.contains(remedy), "{text:?}: {message}");
        }
        let file = Config::parse("[data_plane]\ntoken = [\"a\", \"\"]", "f", []);
        assert!(file.unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn a_field_is_set_by_one_variable() {
        for pair in [
            [
                "MILLRACE_DATA_PLANE__TOKEN",
                "MILLRACE_DATA_PLANE__TOKEN_FILE",
            ],
            ["MILLRACE_DATA_PLANE__TOKEN", "MILLRACE_data_plane__token"],
        ] {
            let message = parse(&pair.map(|name| (name, "x")))
                .unwrap_err()
                .to_string();
            assert!(pair.iter().all(|name| message.contains(name)), "{message}");
        }
        for unknown in [
            "MILLRACE_DATA_PLAIN__TOKEN",
            "MILLRACE_DATA_PLANE_TOKEN",
            "MILLRACE_TOKEN_FILE",
            "MILLRACE_",
            "MILLRACE_DATA_PLANE",
        ] {
            let message = parse(&[(unknown, "x")]).unwrap_err().to_string();
            assert!(message.contains("no configuration field"), "{message}");
        }
        let empty = tempfile::NamedTempFile::new().unwrap();
        let message = parse(&[(
            "MILLRACE_DATABASE__URL_FILE",
            empty.path().to_str().unwrap(),
        )]);
        assert!(message.unwrap_err().to_string().contains("is empty"));
    }
}
