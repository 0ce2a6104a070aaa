//! The writing end of the journal: one group, one write, one sync.

use std::io;
use std::sync::Arc;

use super::sector::{self, GROUP_SECTORS_MAX, PAYLOAD, SECTOR};
use super::segment::Segment;
use crate::faults::{bug, crash_point};
use crate::queue::log::record::GROUP_HEAD;
use crate::queue::log::{GroupAt, NewGroup};

/// Appends groups to segments. Used by one thread.
///
/// After an error nothing may be appended: the data may or may not be on the disk, and a second
/// sync of the same file cannot tell.
#[derive(Debug)]
pub struct Writer {
    segment: Arc<Segment>,
    /// Sectors of each segment.
    sectors: u64,
    /// Index of the first unwritten sector.
    place: u64,
    next_group: u64,
    bytes: Vec<u8>,
    failed: bool,
}

impl Writer {
    /// A writer that begins with `segment`, of `sectors` sectors. `session` is the number of this
    /// process in the journal's history.
    pub fn new(segment: Arc<Segment>, sectors: u64, session: u64) -> Self {
        Writer {
            segment,
            sectors,
            place: 1,
            next_group: session << 32 | 1,
            bytes: Vec::new(),
            failed: false,
        }
    }

    /// Room for a group in the current segment, in bytes.
    pub fn room(&self) -> usize {
        self.sectors_left().min(GROUP_SECTORS_MAX as u64) as usize * PAYLOAD
    }

    /// Writes a group and syncs it.
    ///
    /// # Errors
    /// The error of the disk. The writer has then failed for good.
    ///
    /// # Panics
    /// If an earlier call failed.
    pub fn commit(&mut self, group: &NewGroup<'_>) -> io::Result<GroupAt> {
        assert!(!self.failed, "a journal that failed was written to");
        let payload = group.payload;
        debug_assert!(payload.len() > GROUP_HEAD, "an empty group");
        self.bytes.clear();
        sector::encode(
            &mut self.bytes,
            self.segment.seal,
            self.place,
            self.next_group,
            payload,
        );
        let sectors = (self.bytes.len() / SECTOR) as u64;
        let at = GroupAt {
            span: self.segment.number,
            place: self.place,
            length: sectors as u32,
            group: self.next_group,
            records: group.records,
            ids: group.ids,
        };
        // Before the write: from then on they may be on the disk.
        self.segment.add_outstanding(u64::from(group.orders));
        crash_point("journal.before_write");
        if let Err(error) = self.write_and_sync() {
            self.failed = true;
            return Err(error);
        }
        self.place += sectors;
        self.next_group += 1;
        Ok(at)
    }

    fn write_and_sync(&self) -> io::Result<()> {
        let file = &self.segment.file;
        file.write_at(&self.bytes, self.place * SECTOR as u64)?;
        crash_point("journal.after_write");
        if !bug("no_sync") {
            match file.sync() {
                // The second sync reports nothing, because the first has marked the pages clean.
                Err(_) if bug("reuse_failed_file") => file.sync()?,
                synced => synced?,
            }
        }
        crash_point("journal.after_sync");
        Ok(())
    }

    /// Continues in the next segment and seals the previous one.
    pub fn rotate(&mut self, segment: Arc<Segment>) {
        std::mem::replace(&mut self.segment, segment).seal();
        self.place = 1;
    }

    /// Unwritten sectors of the current segment.
    pub fn sectors_left(&self) -> u64 {
        self.sectors - self.place
    }

    /// The current segment.
    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }
}
