//! `millrace config reference`

use crate::config::reference;

/// Prints the reference page of every setting as Markdown.
pub fn run() -> bool {
    print!("{}", reference::page());
    true
}
