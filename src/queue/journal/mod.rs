//! `queue.backend = "journal"`: a write-ahead log on this machine's disk.
//!
//! An order with `respond-async` is acknowledged after the `fdatasync` that covers it. From then on
//! it survives kill -9 and power loss. The journal is also the queue of such orders: those that do
//! not fit in memory wait on the disk and are read back in order.
//!
//! * [`sector`]: the physical format, and the reason for sectors; [`record`]: the logical format;
//! * [`segment`]: one file; [`disk`]: the file system's interface;
//! * [`recovery`]: reading a journal back, and the definition of damage;
//! * `writer`: one group, one write, one sync; `appender`: the thread that uses it;
//! * `segments`: creating and deleting segments; `outstanding`: when a segment may be deleted;
//! * `space`: room reserved for records; `spill`: orders that wait on the disk;
//! * `reader`: the thread that reads them back; `mpsc`: the appender's input; `parker`: its wake-up;
//! * `queue`: the [`crate::queue::OrderQueue`] over all of it; `shared`: state of queue and threads.
//!
//! Recovery relies on these rules:
//!
//! 1. A group is written only after the sync of the one before it has returned.
//! 2. No sector is written twice; a segment is all zeros, and durable, before it is used.
//! 3. A process never appends to a segment of another.
//! 4. A failed write or sync is final: nothing is appended or acknowledged after it.
//! 5. Segments are deleted one by one, oldest first, and only once every order in them is a
//!    committed row or a dead letter.
//! 6. Before a process appends, every record that it found has been written to the database.

mod appender;
pub mod disk;
mod mpsc;
mod outstanding;
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

/// Sectors of the longest record, as a group of its own.
const RECORD_SECTORS_MAX: u64 = (GROUP_HEAD + RECORD_MAX).div_ceil(PAYLOAD) as u64;
const SEGMENT_BYTES_MIN: u64 = 64 << 10;
const SEGMENT_BYTES_MAX: u64 = 16 << 20;
/// Most segments of a journal, if `bytes_max` is small.
const SEGMENTS: u64 = 16;

/// Reasons why a journal cannot be opened or started.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system failed.
    #[error("{doing}: {source}")]
    Io {
        /// The operation that failed.
        doing: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Another process uses the journal.
    #[error(
        "the journal in {0} is in use by another process; stop that process first, or give this one a \
         queue.journal.dir of its own"
    )]
    InUse(PathBuf),
    /// The content is neither a record nor the trace of a crash.
    #[error(
        "the journal is damaged: segment {segment}, offset {offset}: {what}. Acknowledged orders \
         may be in or behind it, so Millrace does not start. Restore the file from a copy; or \
         save the readable orders with `millrace journal inspect --orders`, then give up the rest \
         with `millrace journal abandon`"
    )]
    Damaged {
        /// File name of the segment.
        segment: String,
        /// Offset in the segment, in bytes.
        offset: u64,
        /// Description of the damage.
        what: String,
    },
    /// A segment between two others is missing.
    #[error(
        "the journal is damaged: segment {segment} is missing between others. Acknowledged orders \
         may be in it, so Millrace does not start. Restore the file; or save the readable orders \
         with `millrace journal inspect --orders`, then give up the rest with `millrace journal \
         abandon`"
    )]
    Missing {
        /// File name of the segment.
        segment: String,
    },
    /// Another release wrote the segment.
    #[error(
        "segment {segment} of the journal has version {version}, which this release does not \
         know; start the release that wrote it and stop it with SIGTERM, so that it empties the \
         journal"
    )]
    Version {
        /// File name of the segment.
        segment: String,
        /// Its format version.
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

/// A journal that is locked and checked, but does not run yet.
#[derive(Debug)]
pub struct Opened {
    disk: Arc<dyn Disk>,
    /// Id and segment size of the journal.
    pub identity: Identity,
    /// Content of the journal.
    pub scanned: Scanned,
}

impl Opened {
    /// Locks the journal in `directory` and checks all of it. If there is none, creates one with
    /// the id `new_id` and segments sized for a limit of `bytes_max`. `progress` gets segments read
    /// and total.
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

    /// Same as [`Opened::at`], on any disk.
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

    /// Passes every record to `each`, in the order of writing.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn records(&self, mut each: impl FnMut(record::Record)) -> Result<(), JournalError> {
        for at in &self.scanned.groups {
            let group = at.segment.read(at);
            let group = group.map_err(JournalError::io("reading the journal back"))?;
            group.records.into_iter().for_each(&mut each);
        }
        Ok(())
    }
}

/// Size of segments under a limit of `bytes_max`, in bytes.
fn segment_bytes(bytes_max: u64) -> u64 {
    let bytes = (bytes_max / SEGMENTS).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
    bytes - bytes % SECTOR as u64
}
