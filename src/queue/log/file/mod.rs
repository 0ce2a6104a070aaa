//! `queue.backend = "journal"`: a write-ahead log on this machine's disk.
//!
//! An order with `respond-async` is acknowledged after the `fdatasync` that covers it. From then on
//! it survives kill -9 and power loss.
//!
//! * [`sector`]: the physical format, and the reason for sectors;
//! * [`segment`]: one file; [`disk`]: the file system's interface;
//! * [`recovery`]: reading a journal back, and the definition of damage;
//! * `writer`: one group, one write, one sync;
//! * `segments`: creating and deleting segments;
//! * [`probe`]: how long an append takes, for a preflight;
//! * `log`: all of it as an [`crate::queue::log::OrderLog`].
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

pub mod disk;
mod log;
pub mod probe;
pub mod recovery;
pub mod sector;
pub mod segment;
mod segments;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::{GROUP_HEAD, Group, RECORD_MAX, Record};
use super::{GroupAt, Log};
use disk::{Disk, RealDisk};
use log::FileWriter;
use recovery::Scanned;
use sector::{PAYLOAD, SECTOR};
pub use segment::{Identity, prepare};
use segments::Segments;
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
         save the readable orders with `millrace queue inspect --orders`, then give up the rest \
         with `millrace queue abandon`"
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
         with `millrace queue inspect --orders`, then give up the rest with `millrace queue \
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

    /// Reads one of its groups.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn read(&self, at: &GroupAt) -> io::Result<Group> {
        let segments = &self.scanned.segments;
        let oldest = segments.first().map_or(0, |oldest| oldest.number);
        // Segments follow each other without gaps.
        segments[(at.span - oldest) as usize].read(at)
    }

    /// Passes every record to `each`, in the order of writing.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn records(&self, mut each: impl FnMut(Record)) -> Result<(), JournalError> {
        for at in &self.scanned.groups {
            let group = self.read(at);
            let group = group.map_err(JournalError::io("reading the journal back"))?;
            group.records.into_iter().for_each(&mut each);
        }
        Ok(())
    }

    /// Makes a log of a journal whose orders have all been replayed: at most `bytes_max` bytes on the disk. Its
    /// old segments are deleted as soon as permitted; with `retain` not before [`super::OrderLog::confirm`].
    ///
    /// # Errors
    /// If its first segment cannot be created.
    pub fn start(self, bytes_max: u64, retain: bool) -> Result<Log, JournalError> {
        let identity = self.identity;
        let segments_max = (bytes_max / identity.segment_bytes) as usize;
        let found = &self.scanned.segments;
        let (segments, first) = Segments::new(self.disk, identity, found, segments_max, retain)
            .map_err(JournalError::io("making the journal's first segment"))?;
        let segments = Arc::new(segments);
        let session = recovery::session(self.scanned.last_group) + 1;
        Ok(Log {
            writer: Box::new(FileWriter {
                writer: Writer::new(first, identity.sectors(), session),
                segments: Arc::clone(&segments),
            }),
            shared: segments,
            next_sequence: self.scanned.last_sequence + 1,
        })
    }
}

/// Size of segments under a limit of `bytes_max`, in bytes.
fn segment_bytes(bytes_max: u64) -> u64 {
    let bytes = (bytes_max / SEGMENTS).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
    bytes - bytes % SECTOR as u64
}
