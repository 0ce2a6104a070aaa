//! The `Prefer` field (RFC 7240), as far as an order knows preferences.

use std::time::Duration;

/// What a client prefers. Where a preference comes twice, the first counts (RFC 7240 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Preference {
    /// `respond-async`: an answer as soon as the order is durable in the queue.
    pub respond_async: bool,
    /// `wait=N`: how long to wait for persistence.
    pub wait: Option<Duration>,
}

impl Preference {
    /// Reads every `Prefer` field of a request. Preferences that are unknown or do not parse are
    /// ignored, as the RFC asks.
    pub fn parse<'a>(fields: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut preference = Preference::default();
        for field in fields {
            let Ok(field) = std::str::from_utf8(field) else {
                continue;
            };
            for item in outside_quotes(field, ',') {
                // What follows a semicolon are parameters; none is defined for these two.
                let item = outside_quotes(item, ';').next().unwrap_or_default();
                let (name, value) = item.split_once('=').unwrap_or((item, ""));
                let (name, value) = (name.trim_ascii(), value.trim_ascii());
                let quoted = value
                    .strip_prefix('"')
                    .and_then(|text| text.strip_suffix('"'));
                let value = quoted.unwrap_or(value);
                if name.eq_ignore_ascii_case("respond-async") {
                    preference.respond_async = true;
                } else if name.eq_ignore_ascii_case("wait")
                    && preference.wait.is_none()
                    && value.bytes().all(|byte| byte.is_ascii_digit())
                {
                    preference.wait = value.parse().ok().map(Duration::from_secs);
                }
            }
        }
        preference
    }
}

/// Splits at a separator. Within a quoted string (RFC 9110 5.6.4) it separates nothing.
fn outside_quotes(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    text.split(move |c| {
        let separates = c == separator && !is_quoted;
        is_quoted ^= c == '"' && !is_escaped;
        is_escaped = is_quoted && c == '\\' && !is_escaped;
        separates
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_of_rfc_7240_are_read() {
        let parse =
            |fields: &[&str]| Preference::parse(fields.iter().map(|field| field.as_bytes()));
        let wait = |seconds| Some(Duration::from_secs(seconds));
        let cases: [(&[&str], Preference); 9] = [
            (
                &[],
                Preference {
                    respond_async: false,
                    wait: None,
                },
            ),
            (
                &["respond-async"],
                Preference {
                    respond_async: true,
                    wait: None,
                },
            ),
            (
                &["Respond-Async, wait=10"],
                Preference {
                    respond_async: true,
                    wait: wait(10),
                },
            ),
            (
                &["wait = 3", "wait=9"],
                Preference {
                    respond_async: false,
                    wait: wait(3),
                },
            ),
            (
                &["wait=\"5\"; foo=bar"],
                Preference {
                    respond_async: false,
                    wait: wait(5),
                },
            ),
            (
                &["wait=-1, wait=x, wait=2"],
                Preference {
                    respond_async: false,
                    wait: wait(2),
                },
            ),
            (&["handling=lenient,,;"], Preference::default()),
            (
                &[r#"note="a, respond-async, \", wait=1"; wait=2, wait="3;4", wait=""5"""#],
                Preference::default(),
            ),
            (&["wait=99999999999999999999999"], Preference::default()),
        ];
        for (fields, expected) in cases {
            assert_eq!(parse(fields), expected, "{fields:?}");
        }
    }
}
