//! The writing end of the journal: one group, one write, one sync.

use std::io;
use std::sync::Arc;

use super::record::{GROUP_HEAD, GroupBytes};
use super::sector::{self, GROUP_SECTORS_MAX, PAYLOAD, SECTOR};
use super::segment::{GroupAt, Segment};
use crate::faults::{bug, crash_point};
use crate::order::{Order, OrderId, UnixMillis};

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
    epoch: i64,
    next_group: u64,
    next_sequence: u64,
    group: GroupBytes,
    ids: Option<(OrderId, OrderId)>,
    bytes: Vec<u8>,
    failed: bool,
}

impl Writer {
    /// A writer that begins with `segment`, of `sectors` sectors. `session` is the number of this
    /// process in the journal's history, `sequence` the number of its first record.
    pub fn new(
        segment: Arc<Segment>,
        sectors: u64,
        session: u64,
        sequence: u64,
        epoch: i64,
    ) -> Self {
        let mut writer = Writer {
            segment,
            sectors,
            place: 1,
            epoch,
            next_group: session << 32 | 1,
            next_sequence: sequence,
            group: GroupBytes::default(),
            ids: None,
            bytes: Vec::new(),
            failed: false,
        };
        writer.begin();
        writer
    }

    fn begin(&mut self) {
        self.group.begin(self.epoch, self.next_sequence);
        self.ids = None;
    }

    /// Whether a record of `record_bytes` still fits into the group being gathered.
    pub fn fits(&self, record_bytes: usize) -> bool {
        let sectors = (self.sectors - self.place).min(GROUP_SECTORS_MAX as u64) as usize;
        self.group.as_bytes().len() + record_bytes <= sectors * PAYLOAD
    }

    /// Whether the group being gathered is empty.
    pub fn is_empty(&self) -> bool {
        self.group.records() == 0
    }

    /// Adds an order to the group.
    pub fn push_order(&mut self, order: &Order) {
        self.group.push_order(order);
        let (low, high) = self.ids.unwrap_or((order.id, order.id));
        self.ids = Some((low.min(order.id), high.max(order.id)));
    }

    /// Adds a lease on order ids to the group.
    pub fn push_lease(&mut self, until: UnixMillis) {
        self.group.push_lease(until);
    }

    /// Writes the gathered records as one group and syncs it. `orders` of them are orders.
    ///
    /// # Errors
    /// The error of the disk. The writer has then failed for good.
    ///
    /// # Panics
    /// If an earlier call failed.
    pub fn commit(&mut self, orders: u64) -> io::Result<GroupAt> {
        assert!(!self.failed, "a journal that failed was written to");
        let payload = self.group.as_bytes();
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
            segment: Arc::clone(&self.segment),
            place: self.place,
            sectors: sectors as u32,
            group: self.next_group,
            records: self.group.records(),
            ids: self.ids,
        };
        // Before the write: from then on they may be on the disk.
        self.segment.add_outstanding(orders);
        crash_point("journal.before_write");
        if let Err(error) = self.write_and_sync() {
            self.failed = true;
            return Err(error);
        }
        self.place += sectors;
        self.next_group += 1;
        self.next_sequence += u64::from(self.group.records());
        self.begin();
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
        debug_assert!(self.is_empty(), "a group is lost at a rotation");
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
