//! The log level, checked at start: a filter with a typing error would show nothing at all.

use super::{ConfigError, Log};

/// Levels, and `off` for no lines.
const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];

/// Levels below which the lines of libraries are of no use to an operator.
const LIBRARIES: &str = "may=warn,refinery_core=warn,tokio_postgres=warn";

impl Log {
    /// Directives of the filter: those of libraries, then the configured ones, which win. Errors
    /// and warnings are shown unless a directive says otherwise.
    pub fn directives(&self) -> String {
        format!("warn,{LIBRARIES},{}", self.level)
    }
}

/// Checks that `log.level` is a level, or a list of levels for parts of the program.
pub(super) fn check(log: &Log) -> Result<(), ConfigError> {
    let mut overall = 0;
    for directive in log.level.split(',') {
        let directive = directive.trim();
        let (part, level) = match directive.split_once('=') {
            Some((part, level)) => (Some(part), level),
            None => (None, directive),
        };
        let fault = if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
            Some(format!("{level:?} is not a level"))
        } else if !part.is_none_or(is_path) {
            Some(format!("{:?} is not a crate or module", part.unwrap_or("")))
        } else {
            overall += u32::from(part.is_none());
            (overall > 1).then(|| "it has two levels without a part".to_owned())
        };
        if let Some(fault) = fault {
            let given = &log.level;
            return Err(ConfigError::Field {
                field: "log.level",
                message: format!(
                    "{given:?} is invalid: {fault}. Set one of {}, or a list such as \
                     \"info,millrace=debug\", in which the level without a part applies to everything else",
                    LEVELS.join(", ")
                ),
            });
        }
    }
    Ok(())
}

/// A crate or module path, such as `millrace::http`.
fn is_path(text: &str) -> bool {
    let is_word = |word: &str| {
        let mut letters = word.chars();
        letters
            .next()
            .is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
            && letters.all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    text.split("::").all(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LogFormat;

    fn checked(level: &str) -> Result<(), String> {
        let log = Log {
            level: level.into(),
            format: LogFormat::Auto,
        };
        check(&log).map_err(|error| error.to_string())
    }

    #[test]
    fn levels_and_lists_of_them_are_taken() {
        for level in [
            "error",
            "WARN",
            "off",
            "info,millrace=debug",
            "millrace::http=trace, tokio_postgres=off",
            "millrace=debug,info",
        ] {
            assert_eq!(checked(level), Ok(()), "{level}");
        }
    }

    #[test]
    fn what_would_show_nothing_is_named() {
        for level in [
            "warning",
            "",
            "info,",
            "2",
            "millrace",
            "millrace=",
            "millrace=verbose",
            "=info",
            "millrace:http=info",
            "[span]=info",
            "info debug",
            "info,debug",
        ] {
            let message = checked(level).unwrap_err();
            assert!(message.contains("log.level"), "{message}");
            assert!(message.contains(&format!("{level:?}")), "{message}");
            assert!(message.contains("error, warn, info, debug"), "{message}");
        }
    }
}
