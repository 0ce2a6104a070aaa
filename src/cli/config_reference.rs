//! `millrace config reference`

use super::output::print;
use crate::config::reference;

/// Prints the reference page of every setting as Markdown.
pub fn run() -> anyhow::Result<bool> {
    print(&reference::page())?;
    Ok(true)
}
