//! What a check has found, in words.

use serde::Serialize;

/// The outcome of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its stable name.
    pub name: &'static str,
    /// What has to hold, in words.
    pub holds: &'static str,
    /// Whether it does.
    pub ok: bool,
    /// What was found, in words.
    pub found: String,
}

/// What is wrong, of which the first is told and the rest counted.
#[derive(Default)]
pub(super) struct Faults {
    first: Option<String>,
    more: u64,
}

impl Faults {
    pub(super) fn note(&mut self, fault: impl FnOnce() -> String) {
        match self.first {
            None => self.first = Some(fault()),
            Some(_) => self.more += 1,
        }
    }

    pub(super) fn result(&self, found: impl FnOnce() -> String) -> Result<String, String> {
        match (&self.first, self.more) {
            (None, _) => Ok(found()),
            (Some(first), 0) => Err(first.clone()),
            (Some(first), more) => Err(format!("{first} (and {more} more like this)")),
        }
    }
}

pub(super) fn check(
    name: &'static str,
    holds: &'static str,
    found: Result<String, String>,
) -> Check {
    let ok = found.is_ok();
    let (Ok(found) | Err(found)) = found;
    Check {
        name,
        holds,
        ok,
        found,
    }
}

pub(super) fn equal<T: PartialEq + ToString>(
    name: &str,
    said: &T,
    is: &T,
) -> Result<String, String> {
    match said == is {
        true => Ok(is.to_string()),
        false => Err(format!(
            "the {name} should be {} and is {}",
            said.to_string(),
            is.to_string()
        )),
    }
}

pub(super) fn opt<T: ToString>(value: &Option<T>) -> String {
    value.as_ref().map_or("none".to_owned(), T::to_string)
}
