//! Pipes for a process that nobody listens to.

use std::io::{PipeReader, PipeWriter, Write as _};

/// A pipe that takes nothing more until it is read, and who could read it.
pub fn full() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("non-blocking");
    for size in [4_096, 1] {
        while writer.write(&vec![b'\n'; size]).is_ok() {}
    }
    rustix::io::ioctl_fionbio(&writer, false).expect("blocking");
    (reader, writer)
}
