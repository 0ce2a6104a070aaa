//! The fail-stop flag.
//!
//! A broken invariant or an unexpected panic leaves the state in memory in doubt. The process then
//! takes no more orders, finishes or fails those that it holds, and exits non-zero. It acknowledges
//! nothing from a state in doubt.

use std::sync::OnceLock;

/// Set once, never cleared; the first reason is kept.
#[derive(Debug, Default)]
pub struct Poison {
    reason: OnceLock<String>,
}

impl Poison {
    /// Stops the process from taking orders, with this reason.
    pub fn set(&self, reason: impl Into<String>) {
        let reason = reason.into();
        // First of all: nothing, not even the log, may come before it.
        match self.reason.set(reason.clone()) {
            Ok(()) => tracing::error!(
                %reason,
                "poisoned: this process takes no more orders and stops; restart it, and report the \
                 reason"
            ),
            Err(_) => tracing::warn!(
                %reason,
                "a part of this process has failed while it stops; the line `poisoned` before has the first reason"
            ),
        }
    }

    /// The first reason, if there is one.
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// Whether the flag is set.
    pub fn is_set(&self) -> bool {
        self.reason.get().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let poison = Poison::default();
        assert!(!poison.is_set());
        poison.set("a worker panicked");
        poison.set("and then another");
        assert_eq!(poison.reason(), Some("a worker panicked"));
        assert!(poison.is_set());
    }
}
