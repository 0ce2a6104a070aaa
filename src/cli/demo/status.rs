//! The demo's progress: one line that is written over on a terminal, a few plain lines elsewhere. It goes
//! through the log's thread, so that no line of the log falls into it; `indicatif` would write beside it.

use std::io::IsTerminal;
use std::time::Duration;

use crate::logging::{flush, say, say_part};

/// Erases the line and begins it anew.
const ANEW: &str = "\r\x1b[2K";

/// As much of a line as any terminal shows on one; more could not be erased.
const COLUMNS: usize = 79;

/// Between two lines of the load if they are not written over.
pub(super) const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows a line until [`clear`] or the next one.
pub(super) fn status(text: &str) {
    if std::io::stderr().is_terminal() {
        let start: String = text.chars().take(COLUMNS).collect();
        say_part(&format!("{ANEW}{start}"));
    } else {
        say(text);
    }
}

/// Removes the line from the terminal.
pub(super) fn clear() {
    if std::io::stderr().is_terminal() {
        say_part(ANEW);
        flush(Duration::from_millis(200));
    }
}
