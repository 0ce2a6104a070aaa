//! The fields that the operator has set, for a command that sets some of them itself.

use std::path::Path;

use super::DEFAULT_FILE;
use super::environment::{ENV_PREFIX, FILE_SUFFIX};

/// Paths of the fields that the file or the environment sets, such as `database.url`. Unreadable
/// sources count as empty here; [`Config::load`](super::Config::load) reports them.
pub fn given_fields(file: Option<&Path>) -> Vec<String> {
    let path = file.unwrap_or(Path::new(DEFAULT_FILE));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    fields(&text, names)
}

fn fields(text: &str, variables: impl Iterator<Item = String>) -> Vec<String> {
    let mut fields = Vec::new();
    leaves("", &toml::from_str(text).unwrap_or_default(), &mut fields);
    fields.extend(variables.filter_map(|name| {
        let path = name.strip_prefix(ENV_PREFIX)?;
        let path = path.strip_suffix(FILE_SUFFIX).unwrap_or(path);
        Some(path.to_ascii_lowercase().replace("__", "."))
    }));
    fields.sort();
    fields.dedup();
    fields
}

fn leaves(prefix: &str, table: &toml::Table, into: &mut Vec<String>) {
    for (name, value) in table {
        match value {
            toml::Value::Table(table) => leaves(&format!("{prefix}{name}."), table, into),
            _ => into.push(format!("{prefix}{name}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_file_and_of_the_environment_are_named_alike() {
        let variables = [
            "MILLRACE_DATABASE__URL",
            "MILLRACE_RECEIPT__KEY_FILE",
            "MILLRACE_DATA_DIR",
            "PATH",
        ];
        let text = "data_dir = \"d\"\n[queue.journal]\nbytes_max = 5\n[log]\nlevel = \"info\"";
        assert_eq!(
            fields(text, variables.map(str::to_owned).into_iter()),
            [
                "data_dir",
                "database.url",
                "log.level",
                "queue.journal.bytes_max",
                "receipt.key"
            ]
        );
        assert_eq!(fields("not = [toml", std::iter::empty()), [""; 0]);
    }
}
