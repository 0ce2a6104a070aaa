//! Results on standard output. A reader that has gone ends the output without an error; any other failure is an
//! error, never a panic.

use std::io::{self, ErrorKind, Write as _};

use anyhow::Context;

/// Prints the text and a line break.
pub fn print_line(text: &str) -> anyhow::Result<()> {
    print(&format!("{text}\n"))
}

/// Prints the text.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed.context("cannot write to standard output"),
    }
}
