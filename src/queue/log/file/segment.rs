//! One file of the journal: creating, naming and reading it.
//!
//! A segment is filled with zeros and synced before it gets its name. The disk thus has room for
//! all of it. Every later sync finds its blocks in place, which is a third faster than blocks that
//! are only reserved. A sector that was never written reads as zeros.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::JournalError;
use super::disk::{Disk, DiskFile};
use super::sector::{self, SECTOR, Seal, Sector};
use crate::faults::{bug, crash_point};
use crate::order::UnixMillis;
use crate::queue::log::GroupAt;
use crate::queue::log::outstanding::Outstanding;
use crate::queue::log::record::{self, Group};

const MAGIC: &[u8; 8] = b"MILLRACE";
/// Version of this format. A release reads its predecessor's.
const VERSION: u16 = 1;
const SUFFIX: &str = ".segment";
pub(super) const UNFINISHED: &str = ".unfinished";
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Id of a journal, and the size of its segments.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Random, created with the journal. Part of every checksum.
    pub id: [u8; 16],
    /// Bytes of each segment, a multiple of [`SECTOR`].
    pub segment_bytes: u64,
}

impl Identity {
    /// The id as 32 hexadecimal digits.
    pub fn name(&self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.id))
    }

    /// Sectors of each segment, its header included.
    pub fn sectors(&self) -> u64 {
        self.segment_bytes / SECTOR as u64
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.name(), self.segment_bytes)
    }
}

/// File name of a segment.
pub fn file_name(number: u64) -> String {
    format!("{number:016}{SUFFIX}")
}

/// Segment number in a file name; `None` if it is not a segment's.
pub fn file_number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(SUFFIX)?;
    (number.len() == 16).then(|| number.parse().ok()).flatten()
}

/// Whether a process left the file unfinished.
pub fn is_unfinished(name: &str) -> bool {
    name.ends_with(UNFINISHED)
}

/// One segment, while its file exists.
#[derive(Debug)]
pub struct Segment {
    /// Segment number, from 1.
    pub number: u64,
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) seal: Seal,
    outstanding: Outstanding,
}

impl Segment {
    pub(super) fn new(number: u64, file: Arc<dyn DiskFile>, identity: &Identity) -> Self {
        Segment {
            number,
            file,
            seal: Seal::new(&identity.id, number),
            outstanding: Outstanding::new(),
        }
    }

    /// Counts orders about to be written to it.
    pub fn add_outstanding(&self, orders: u64) {
        self.outstanding.add(orders);
    }

    /// Counts settled orders. True: the segment is sealed, and no order in it is outstanding.
    ///
    /// # Panics
    /// If more orders are settled than were written: the segment would be deleted under an order.
    pub fn settled(&self, orders: u64) -> bool {
        let before = self.outstanding.settled(orders);
        assert!(
            before >= orders,
            "segment {}: {orders} orders settled, {before} outstanding",
            self.number
        );
        self.is_done()
    }

    /// Marks the segment as complete: nothing more is written to it.
    pub fn seal(&self) {
        self.outstanding.seal();
    }

    /// Whether the segment is sealed and all its orders are settled.
    pub fn is_done(&self) -> bool {
        self.outstanding.is_done()
    }

    /// Orders in it that are not yet settled in the database.
    pub fn outstanding(&self) -> u64 {
        self.outstanding.orders()
    }

    /// Reads one of its groups.
    ///
    /// # Errors
    /// If the disk fails, or the content is not the group that was written.
    pub fn read(&self, at: &GroupAt) -> io::Result<Group> {
        let mut bytes = vec![0; at.length as usize * SECTOR];
        self.file.read_at(&mut bytes, at.place * SECTOR as u64)?;
        let damaged = || {
            let offset = at.place * SECTOR as u64;
            let what = format!(
                "{} at offset {offset}: the content is not the group written there",
                file_name(self.number)
            );
            io::Error::new(io::ErrorKind::InvalidData, what)
        };
        let mut payload = Vec::with_capacity(bytes.len());
        for (place, sector) in (at.place..).zip(bytes.chunks_exact(SECTOR)) {
            match sector::decode(sector, self.seal, place) {
                Sector::Part {
                    group,
                    payload: part,
                    ..
                } if group == at.group => payload.extend_from_slice(&sector[part]),
                _ => return Err(damaged()),
            }
        }
        record::decode(&payload).map_err(|_| damaged())
    }
}

/// Creates a segment ready for writing: durable, and all zeros but its header.
///
/// # Errors
/// If the disk is full or fails; the unfinished file is removed if possible.
pub fn prepare(disk: &dyn Disk, identity: &Identity, number: u64) -> io::Result<Segment> {
    let name = file_name(number);
    let unfinished = format!("{name}{UNFINISHED}");
    let make = || {
        let file = disk.create(&unfinished)?;
        file.allocate(identity.segment_bytes)?;
        let mut at = 0;
        while at < identity.segment_bytes {
            let length = (identity.segment_bytes - at).min(ZEROS.len() as u64);
            file.write_at(&ZEROS[..length as usize], at)?;
            at += length;
        }
        file.write_at(&header(identity, number), 0)?;
        file.sync()?;
        crash_point("journal.segment_created");
        disk.rename(&unfinished, &name)?;
        crash_point("journal.segment_renamed");
        if !bug("no_directory_sync") {
            disk.sync_directory()?;
        }
        Ok(Segment::new(number, file, identity))
    };
    make().inspect_err(|_| {
        // Frees its space. If that fails too, the next start removes the file.
        let _ = disk.remove(&unfinished);
    })
}

fn header(identity: &Identity, number: u64) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[4..12].copy_from_slice(MAGIC);
    sector[12..14].copy_from_slice(&VERSION.to_le_bytes());
    sector[14..22].copy_from_slice(&number.to_le_bytes());
    sector[22..30].copy_from_slice(&identity.segment_bytes.to_le_bytes());
    sector[30..46].copy_from_slice(&identity.id);
    sector[46..54].copy_from_slice(&UnixMillis::now().0.to_le_bytes());
    let crc = Seal::new(&identity.id, number).of(0, &sector[4..]);
    sector[..4].copy_from_slice(&crc.to_le_bytes());
    sector
}

/// Reads and checks a segment's header.
pub(super) fn read_header(sector: &[u8], number: u64) -> Result<Identity, JournalError> {
    let damaged = |what: &str| JournalError::damaged(number, 0, what);
    let Some(sector) = sector.get(..SECTOR) else {
        return Err(damaged("the file is too short for a header"));
    };
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&sector[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if sector[4..12] != *MAGIC {
        return Err(damaged("the file does not begin with MILLRACE"));
    }
    let mut id = [0; 16];
    id.copy_from_slice(&sector[30..46]);
    let crc = u32::from_le_bytes([sector[0], sector[1], sector[2], sector[3]]);
    if crc != Seal::new(&id, number).of(0, &sector[4..]) {
        return Err(damaged("the checksum of its header is wrong"));
    }
    let version = u16::from_le_bytes([sector[12], sector[13]]);
    if version != VERSION {
        return Err(JournalError::Version {
            segment: file_name(number),
            version,
        });
    }
    Ok(Identity {
        id,
        segment_bytes: word(22),
    })
}
