//! `queue.backend = "journal"`: a write-ahead log on this machine's disk.
//!
//! An order that asks for `respond-async` is acknowledged after the `fdatasync` that covers it,
//! and from then on survives kill -9 and power loss. The journal is the queue of such orders: what
//! does not fit in memory waits on the disk and is read back in order.
//!
//! * [`sector`]: the physical format, and why it is made of sectors; [`record`]: what is in it;
//! * [`segment`]: one file; [`disk`]: what is asked of a file system;
//! * [`recovery`]: reading a journal back, and what counts as damage;
//! * `writer`: one group, one write, one sync; `appender`: the thread that does it; `segments`: making and deleting segments;
//! * `space`: what records may still take; `tally`: when a segment is not needed any more;
//! * `spill`: what waits on the disk; `reader`: the thread that reads it back; `mpsc`: what the appender is asked to write, and `parker`: how it is woken;
//! * `queue`: how all that is one [`crate::queue::OrderQueue`]; `shared`: what the queue and both threads share.
//!
//! Rules that recovery relies on:
//!
//! 1. A group is written only after the sync of the one before it has returned.
//! 2. No sector is written twice; a segment is all zeros, and durable, before it is used.
//! 3. A process never appends to a segment of another.
//! 4. A failed write or sync is final: nothing is appended, or acknowledged, after it.
//! 5. Segments are deleted from the oldest on, one by one, and only once every order in them is a
//!    committed row or dead letter.
//! 6. Before a process appends, everything that it found has been written to the database.

mod appender;
pub mod disk;
mod mpsc;
mod parker;
mod queue;
mod reader;
pub mod record;
pub mod recovery;
pub mod sector;
pub mod segment;
mod segments;
mod shared;
mod space;
mod spill;
mod tally;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use disk::{Disk, RealDisk};
pub use queue::JournalQueue;
use record::{GROUP_HEAD, RECORD_MAX};
use recovery::Scanned;
use sector::{PAYLOAD, SECTOR};
pub use segment::{GroupAt, Identity, prepare};
pub use shared::JournalParts;
pub use space::Permit;
pub use writer::Writer;

/// Sectors that the longest record takes as a group of its own.
const RECORD_SECTORS_MAX: u64 = (GROUP_HEAD + RECORD_MAX).div_ceil(PAYLOAD) as u64;
const SEGMENT_BYTES_MIN: u64 = 64 << 10;
const SEGMENT_BYTES_MAX: u64 = 16 << 20;
/// Segments that a journal may have at most, however small its limit in bytes.
const SEGMENTS: u64 = 16;

/// Why there is no journal to work with.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process uses it.
    #[error(
        "the journal in {0} is in use by another process; stop that one first, or give this one a queue.journal.dir of its own"
    )]
    InUse(PathBuf),
    /// Something in it is neither what was written nor what a crash leaves.
    #[error(
        "the journal is damaged: segment {segment}, offset {offset}: {what}. Acknowledged orders may be in or behind it, so nothing is started. Put the file back from a copy; or save what is readable with `millrace journal inspect --orders`, and give the rest up with `millrace journal abandon`"
    )]
    Damaged {
        /// Which file.
        segment: String,
        /// Where in it, in bytes.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A segment between others is not there.
    #[error(
        "the journal is damaged: segment {segment} is missing between others. Acknowledged orders may be in it, so nothing is started. Put the file back; or save what is readable with `millrace journal inspect --orders`, and give the rest up with `millrace journal abandon`"
    )]
    Missing {
        /// Which file.
        segment: String,
    },
    /// Another release wrote it.
    #[error(
        "segment {segment} of the journal has version {version}, which this release does not know; start the release that wrote it and stop it with SIGTERM, so that it runs the journal empty"
    )]
    Version {
        /// Which file.
        segment: String,
        /// Its version.
        version: u16,
    },
}

impl JournalError {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> JournalError {
        move |source| JournalError::Io { doing, source }
    }

    fn damaged(number: u64, offset: u64, what: impl Into<String>) -> Self {
        JournalError::Damaged {
            segment: segment::file_name(number),
            offset,
            what: what.into(),
        }
    }
}

/// A journal that was read and checked, and is locked, and does not run yet.
#[derive(Debug)]
pub struct Opened {
    disk: Arc<dyn Disk>,
    /// Which journal it is.
    pub identity: Identity,
    /// What is in it.
    pub scanned: Scanned,
}

impl Opened {
    /// Locks the journal in `directory`, reads and checks all of it. Where there is none yet, one
    /// with `new_id` begins, with segments for a limit of `bytes_max`.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn at(
        directory: &Path,
        bytes_max: u64,
        new_id: [u8; 16],
        progress: impl FnMut(u64, u64),
    ) -> Result<Self, JournalError> {
        let disk = RealDisk::lock(directory)
            .map_err(JournalError::io("opening the journal's directory"))?
            .ok_or_else(|| JournalError::InUse(directory.to_owned()))?;
        Self::on(Arc::new(disk), bytes_max, new_id, progress)
    }

    /// The same on any disk.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn on(
        disk: Arc<dyn Disk>,
        bytes_max: u64,
        new_id: [u8; 16],
        progress: impl FnMut(u64, u64),
    ) -> Result<Self, JournalError> {
        let scanned = recovery::scan(&*disk, progress)?;
        for name in &scanned.unfinished {
            disk.remove(name)
                .map_err(JournalError::io("removing an unfinished segment"))?;
        }
        let identity = scanned.identity.unwrap_or(Identity {
            id: new_id,
            segment_bytes: segment_bytes(bytes_max),
        });
        Ok(Opened {
            disk,
            identity,
            scanned,
        })
    }

    /// Hands every record in it to `each`, in the order in which they were written.
    ///
    /// # Errors
    /// Where the disk fails.
    pub fn records(&self, mut each: impl FnMut(record::Record)) -> Result<(), JournalError> {
        for at in &self.scanned.groups {
            let group = at.segment.read(at);
            let group = group.map_err(JournalError::io("reading the journal back"))?;
            group.records.into_iter().for_each(&mut each);
        }
        Ok(())
    }
}

/// How large segments are under a limit in bytes.
fn segment_bytes(bytes_max: u64) -> u64 {
    let bytes = (bytes_max / SEGMENTS).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
    bytes - bytes % SECTOR as u64
}
