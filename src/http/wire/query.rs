//! The fields of a query string.

use crate::http::problem::Problem;

/// The value under a name, not decoded; empty if the name stands alone.
pub fn value<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (this, value) = pair.split_once('=').unwrap_or((pair, ""));
        (this == name).then_some(value)
    })
}

/// Refuses query fields that would be ignored: those other than `names`, and a second one of the
/// same name.
///
/// # Errors
/// `400 unknown_field` and `400 invalid_field`.
pub fn only(query: &str, names: &[&'static str]) -> Result<(), Problem> {
    let mut seen: Vec<&str> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let name = pair.split('=').next().unwrap_or_default();
        if !names.contains(&name) {
            let known = match names {
                [] => "none is known here".to_owned(),
                names => format!("known here: {}", names.join(", ")),
            };
            let detail = format!("{name}: unknown query parameter; {known}");
            return Err(Problem::new(400, "unknown_field", detail));
        }
        if seen.contains(&name) {
            let detail = format!("{name}: comes twice in the query");
            return Err(Problem::new(400, "invalid_field", detail));
        }
        seen.push(name);
    }
    Ok(())
}

/// The value under a name as a number.
///
/// # Errors
/// `400 invalid_field` if it is not a number.
pub fn number(query: &str, name: &str) -> Result<Option<u64>, Problem> {
    let Some(text) = value(query, name) else {
        return Ok(None);
    };
    decimal(text).map(Some).ok_or_else(|| {
        Problem::new(
            400,
            "invalid_field",
            format!("{name}: must be a whole number, 0 or more"),
        )
    })
}

/// The number that `text` writes in digits alone: no sign, which the standard library takes too.
pub fn decimal<T: std::str::FromStr>(text: &str) -> Option<T> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_digits_alone() {
        assert_eq!(number("wait=7&limit=007", "wait").ok(), Some(Some(7)));
        assert_eq!(number("limit=007", "limit").ok(), Some(Some(7)));
        assert_eq!(number("wait=7", "limit").ok(), Some(None));
        assert!(number("limit=7&wait", "wait").is_err(), "not left out");
        for value in ["", "+5", "-0", "5 ", "5.0", "18446744073709551616"] {
            let refused = number(&format!("wait={value}"), "wait").unwrap_err();
            assert_eq!((refused.status, refused.code), (400, "invalid_field"));
        }
    }
}
