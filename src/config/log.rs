//! The level of the log: checked at start, because a filter with a typing error shows nothing at all.

use super::{ConfigError, Log};

/// The levels, and no line at all.
const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];

/// What libraries say below these levels is of no use to an operator.
const LIBRARIES: &str = "may=warn,refinery_core=warn,tokio_postgres=warn";

impl Log {
    /// The directives of the filter: those of libraries, then the configured ones, which win. Errors
    /// and warnings are shown wherever no directive says otherwise.
    pub fn directives(&self) -> String {
        format!("warn,{LIBRARIES},{}", self.level)
    }
}

/// Whether `log.level` is a level, or a list of levels for parts of the program.
pub(super) fn check(log: &Log) -> Result<(), ConfigError> {
    let mut overall = 0;
    for directive in log.level.split(',') {
        let directive = directive.trim();
        let (part, level) = match directive.split_once('=') {
            Some((part, level)) => (Some(part), level),
            None => (None, directive),
        };
        let fault = if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
            Some(format!("{level:?} is no level"))
        } else if !part.is_none_or(is_path) {
            Some(format!("{:?} is no part of a program", part.unwrap_or("")))
        } else {
            overall += u32::from(part.is_none());
            (overall > 1).then(|| "it has two levels for everything".to_owned())
        };
        if let Some(fault) = fault {
            let given = &log.level;
            return Err(ConfigError::Field {
                field: "log.level",
                message: format!(
                    "{given:?} cannot be used: {fault}. Give one of {}, or a list such as \
                     \"info,millrace=debug\", where the one without a part holds for everything else",
                    LEVELS.join(", ")
                ),
            });
        }
    }
    Ok(())
}

/// A crate or a module, such as `millrace::http`.
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
