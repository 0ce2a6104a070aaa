//! Reading the file line by line.

use std::io::{self, BufRead, Read as _};

use crate::order::draw::Row;
use crate::order::draw::document::read_line;

/// No line of a draw is this long; no file makes this program take more memory for one.
const LINE_BYTES_MAX: u64 = 4096;

/// Longest text of a file that is quoted in a verdict.
const QUOTED_CHARACTERS_MAX: usize = 512;

pub(super) enum LineError {
    Io(io::Error),
    Malformed(String),
}

pub(super) struct Lines<R> {
    file: R,
    number: u64,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(file: R) -> Self {
        Lines {
            file,
            number: 0,
            line: Vec::new(),
        }
    }

    /// The next line with its line break.
    pub(super) fn raw(&mut self) -> Result<Option<&[u8]>, LineError> {
        self.line.clear();
        self.number += 1;
        let mut limited = (&mut self.file).take(LINE_BYTES_MAX);
        match limited.read_until(b'\n', &mut self.line) {
            Err(error) => Err(LineError::Io(error)),
            Ok(0) => Ok(None),
            Ok(_) if self.line.len() as u64 == LINE_BYTES_MAX => Err(LineError::Malformed(
                format!("is longer than {LINE_BYTES_MAX} bytes"),
            )),
            Ok(_) => Ok(Some(&self.line)),
        }
    }

    pub(super) fn next(&mut self) -> Result<Option<Row>, LineError> {
        let number = self.number + 1;
        let malformed = |why: String| LineError::Malformed(format!("line {number} {why}"));
        match self.raw() {
            Ok(None) => Ok(None),
            Ok(Some(line)) => read_line(line).map(Some).map_err(|error| {
                malformed(format!("is not an entry: {}", plain(&error.to_string())))
            }),
            Err(LineError::Malformed(why)) => Err(malformed(why)),
            Err(error) => Err(error),
        }
    }
}

/// A text of the file, so that it can be quoted on a terminal.
pub(super) fn plain(text: &str) -> String {
    let shown = text.chars().take(QUOTED_CHARACTERS_MAX);
    shown
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}
