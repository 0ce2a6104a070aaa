//! Reading a journal from the disk: the longest valid prefix, or the reason why there is none.
//!
//! A group is written only after the sync of the previous one has returned. Only the last group on
//! the disk may therefore be incomplete, and only by sectors that are still zero:
//!
//! * zero sectors in place of the rest of a group: a crash came first. The group was not
//!   acknowledged, and is left out;
//! * a sector that is neither valid nor zero, anywhere: damage;
//! * a valid group after an incomplete one: damage, because the latter was complete once.
//!
//! Damage is never skipped: acknowledged orders may be in it or after it.

use std::sync::Arc;

use super::JournalError;
use super::disk::Disk;
use super::sector::{self, SECTOR, Sector};
use super::segment::{self, Identity, Segment};
use crate::faults::bug;
use crate::order::UnixMillis;
use crate::queue::log::record::{self, Record};
use crate::queue::log::{GroupAt, id_high_water, widen};

/// The content of a journal.
#[derive(Debug)]
pub struct Scanned {
    /// Id and segment size of the journal; `None` if there is none yet.
    pub identity: Option<Identity>,
    /// Its segments, oldest first, without gaps.
    pub segments: Vec<Arc<Segment>>,
    /// Its groups, in the order of writing.
    pub groups: Vec<GroupAt>,
    /// Number of its records.
    pub records: u64,
    /// Number of the last group, complete or not; 0 if there is none.
    pub last_group: u64,
    /// Sequence number of the last record; 0 if there is none.
    pub last_sequence: u64,
    /// Exclusive upper bound of its order ids, from leases and orders.
    pub id_high_water: UnixMillis,
    /// Sectors of an incomplete last group, which was left out.
    pub torn_sectors: u64,
    /// Names of files that a process left unfinished.
    pub unfinished: Vec<String>,
}

/// Reads all segments on `disk` and checks every byte. `progress` gets segments read and total.
///
/// # Errors
/// [`JournalError::Damaged`] or another [`JournalError`].
pub fn scan(disk: &dyn Disk, mut progress: impl FnMut(u64, u64)) -> Result<Scanned, JournalError> {
    let mut names = disk
        .list()
        .map_err(JournalError::io("listing the journal"))?;
    let unfinished: Vec<String> = {
        let (unfinished, rest) = names.into_iter().partition(|n| segment::is_unfinished(n));
        names = rest;
        unfinished
    };
    let mut numbers: Vec<u64> = names
        .iter()
        .filter_map(|name| segment::file_number(name))
        .collect();
    numbers.sort_unstable();
    let mut scan = Scan {
        found: Scanned {
            identity: None,
            segments: Vec::new(),
            groups: Vec::new(),
            records: 0,
            last_group: 0,
            last_sequence: 0,
            id_high_water: UnixMillis(0),
            torn_sectors: 0,
            unfinished,
        },
        torn: None,
    };
    let total = numbers.len() as u64;
    for (done, number) in (0..).zip(&numbers) {
        if let Some(before) = scan.found.segments.last().map(|segment| segment.number)
            && before + 1 != *number
        {
            return Err(JournalError::Missing {
                segment: segment::file_name(before + 1),
            });
        }
        scan.segment(disk, *number)?;
        progress(done + 1, total);
    }
    Ok(scan.found)
}

struct Scan {
    found: Scanned,
    /// The incomplete group: its number, segment and offset in bytes.
    torn: Option<(u64, u64, u64)>,
}

impl Scan {
    fn segment(&mut self, disk: &dyn Disk, number: u64) -> Result<(), JournalError> {
        let file = disk
            .open(&segment::file_name(number))
            .map_err(JournalError::io("opening a segment"))?;
        let length = file
            .length()
            .map_err(JournalError::io("measuring a segment"))?;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        file.read_at(&mut bytes, 0)
            .map_err(JournalError::io("reading a segment"))?;
        let identity = segment::read_header(&bytes, number)?;
        match &self.found.identity {
            None => self.found.identity = Some(identity),
            Some(known) if *known == identity => {}
            Some(known) => {
                let what = format!(
                    "it belongs to journal {}, the segments before it to {}",
                    identity.name(),
                    known.name()
                );
                return Err(JournalError::damaged(number, 0, what));
            }
        }
        if length != identity.segment_bytes {
            let what = format!(
                "it is {length} bytes long and was made with {}",
                identity.segment_bytes
            );
            return Err(JournalError::damaged(number, length, what));
        }
        let segment = Arc::new(Segment::new(number, file, &identity));
        self.found.segments.push(Arc::clone(&segment));
        let sectors: Vec<&[u8]> = bytes.chunks_exact(SECTOR).collect();
        let mut place = 1;
        while place < sectors.len() {
            match self.group(&segment, &sectors, place)? {
                Some(count) => place += count,
                None => return self.tail(&segment, &sectors, place),
            }
        }
        Ok(())
    }

    /// Reads the group that begins at `place`. Returns its number of sectors, or `None` if it is
    /// not complete.
    fn group(
        &mut self,
        segment: &Arc<Segment>,
        sectors: &[&[u8]],
        place: usize,
    ) -> Result<Option<usize>, JournalError> {
        let damaged = |place: usize, what: &str| {
            JournalError::damaged(segment.number, (place * SECTOR) as u64, what)
        };
        let (group, count) = match sector::decode(sectors[place], segment.seal, place as u64) {
            Sector::Zero => return Ok(None),
            Sector::Damaged if bug("cut_at_damage") => return Ok(None),
            Sector::Damaged => return Err(damaged(place, "a sector is damaged")),
            Sector::Part {
                index: 0,
                group,
                count,
                ..
            } => (group, usize::from(count)),
            Sector::Part { .. } => {
                return Err(damaged(place, "a group begins in its middle"));
            }
        };
        let Some(payload) = payload(segment, sectors, place, group, count)? else {
            return Ok(None);
        };
        let content =
            record::decode(&payload).map_err(|malformed| damaged(place, &malformed.to_string()))?;
        let next_sequence = content
            .sequence
            .checked_add(content.records.len() as u64)
            .ok_or_else(|| damaged(place, "a record is numbered beyond all numbers"))?;
        let found = &mut self.found;
        let first = found.groups.is_empty();
        // Records may be missing between two processes: the later one found groups that were
        // written but not synced, replayed them, and a power loss removed them afterwards.
        let begins_anew = session(group) > session(found.last_group);
        let in_order = first || begins_anew || content.sequence == found.last_sequence + 1;
        // Segments before the oldest are deleted, so it may begin anywhere. A later segment begins
        // in the middle of a process only if the one before is full.
        let begins = first
            && self.torn.is_none()
            && (found.segments.len() == 1 || is_first_of_process(group));
        if !(begins || follows(group, found.last_group)) || !in_order {
            let what = format!(
                "group {group:#x} with record {} follows group {:#x} with record {}",
                content.sequence, found.last_group, found.last_sequence
            );
            return Err(damaged(place, &what));
        }
        if let Some((torn, in_segment, at)) = self.torn
            && session(group) == session(torn)
        {
            let what =
                format!("group {torn:#x} is incomplete, and group {group:#x} was written after it");
            return Err(JournalError::damaged(in_segment, at, what));
        }
        let ids = content
            .records
            .iter()
            .fold(None, |ids, record| match record {
                Record::Order(order) => widen(ids, order.id),
                Record::Lease(_) => ids,
            });
        found.id_high_water = found.id_high_water.max(id_high_water(&content.records));
        let records = content.records.len() as u32;
        found.records += u64::from(records);
        found.last_group = group;
        found.last_sequence = next_sequence - 1;
        found.groups.push(GroupAt {
            span: segment.number,
            place: place as u64,
            length: count as u32,
            group,
            records,
            ids,
        });
        Ok(Some(count))
    }

    /// Checks that the last complete group of a segment is followed by zeros, or by the incomplete
    /// group that a crash may leave.
    fn tail(
        &mut self,
        segment: &Segment,
        sectors: &[&[u8]],
        from: usize,
    ) -> Result<(), JournalError> {
        let mut torn = None;
        for (place, sector) in sectors.iter().enumerate().skip(from) {
            let offset = (place * SECTOR) as u64;
            let damaged = |what| JournalError::damaged(segment.number, offset, what);
            match sector::decode(sector, segment.seal, place as u64) {
                Sector::Zero => {}
                Sector::Damaged if bug("cut_at_damage") => {}
                Sector::Damaged => return Err(damaged("a sector is damaged".to_owned())),
                Sector::Part { group, index, .. } => {
                    let begins = place.checked_sub(usize::from(index));
                    let nothing_before = self.found.segments.len() == 1 && from == 1;
                    let expected = match torn {
                        Some(torn) => torn == group,
                        None => nothing_before || follows(group, self.found.last_group),
                    };
                    let after_torn = self
                        .torn
                        .is_some_and(|(earlier, ..)| session(earlier) == session(group));
                    if begins != Some(from) || !expected || after_torn {
                        return Err(damaged(format!(
                            "group {group:#x} was written here, and what comes before it is missing"
                        )));
                    }
                    torn = Some(group);
                    self.found.torn_sectors += 1;
                }
            }
        }
        if let Some(group) = torn {
            self.found.last_group = group;
            self.torn = Some((group, segment.number, (from * SECTOR) as u64));
        }
        Ok(())
    }
}

/// The payload of the group of `count` sectors at `place`; `None` if it is not complete.
fn payload(
    segment: &Segment,
    sectors: &[&[u8]],
    place: usize,
    group: u64,
    count: usize,
) -> Result<Option<Vec<u8>>, JournalError> {
    let damaged = |place: usize, what: &str| {
        JournalError::damaged(segment.number, (place * SECTOR) as u64, what)
    };
    if place + count > sectors.len() {
        return Err(damaged(place, "a group reaches beyond its segment"));
    }
    let mut payload = Vec::with_capacity(count * SECTOR);
    for (index, sector) in sectors[place..place + count].iter().enumerate() {
        let at = place + index;
        match sector::decode(sector, segment.seal, at as u64) {
            Sector::Zero => return Ok(None),
            Sector::Part {
                group: g,
                index: i,
                count: c,
                payload: part,
            } if g == group && usize::from(i) == index && usize::from(c) == count => {
                payload.extend_from_slice(&sector[part]);
            }
            Sector::Damaged if bug("cut_at_damage") => return Ok(None),
            Sector::Damaged => return Err(damaged(at, "a sector is damaged")),
            Sector::Part { .. } => {
                return Err(damaged(at, "a sector of another group lies inside a group"));
            }
        }
    }
    Ok(Some(payload))
}

/// Number of the process, in the journal's history, that wrote a group.
pub fn session(group: u64) -> u64 {
    group >> 32
}

/// Whether `group` may follow `last`: the next of its process, or the first of a later one. Each
/// process numbers its groups from 1, because the last may have left an incomplete group.
fn follows(group: u64, last: u64) -> bool {
    group.checked_sub(1) == Some(last)
        || (session(group) > session(last) && is_first_of_process(group))
}

fn is_first_of_process(group: u64) -> bool {
    group as u32 == 1
}

/// Passes the records of every group of `segments` to `each`, with the segment's number and the
/// group's place. The content was checked or written by this process before. An incomplete group,
/// which is being written or was cut by a crash, ends its segment.
///
/// # Errors
/// If the disk fails or the content is damaged.
pub(super) fn read_segments(
    segments: &[Arc<Segment>],
    mut each: impl FnMut(u64, u64, Vec<Record>),
) -> Result<(), JournalError> {
    for segment in segments {
        let length = segment.file.length();
        let length = length.map_err(JournalError::io("measuring a segment"))?;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        segment
            .file
            .read_at(&mut bytes, 0)
            .map_err(JournalError::io("reading a segment"))?;
        let sectors: Vec<&[u8]> = bytes.chunks_exact(SECTOR).collect();
        let mut place = 1;
        while place < sectors.len() {
            let damaged =
                |what: &str| JournalError::damaged(segment.number, (place * SECTOR) as u64, what);
            let (group, count) = match sector::decode(sectors[place], segment.seal, place as u64) {
                Sector::Part { group, count, .. } => (group, count),
                Sector::Zero => break,
                Sector::Damaged => return Err(damaged("a sector is damaged")),
            };
            let mut payload = Vec::new();
            let mut complete = true;
            let end = (place + usize::from(count)).min(sectors.len());
            for (at, sector) in (place..).zip(&sectors[place..end]) {
                match sector::decode(sector, segment.seal, at as u64) {
                    Sector::Part {
                        group: g,
                        payload: part,
                        ..
                    } if g == group => payload.extend_from_slice(&sector[part]),
                    Sector::Zero => complete = false,
                    Sector::Part { .. } | Sector::Damaged => {
                        return Err(damaged("a group is damaged"));
                    }
                }
            }
            if !complete {
                break;
            }
            let content = record::decode(&payload).map_err(|e| damaged(&e.to_string()))?;
            each(segment.number, place as u64, content.records);
            place = end;
        }
    }
    Ok(())
}

/// Passes every readable record of a damaged journal to `each`. Returns descriptions of the
/// unreadable parts, for people who decide about the damage.
///
/// # Errors
/// If the directory cannot be read.
pub fn salvage(disk: &dyn Disk, mut each: impl FnMut(Record)) -> Result<Vec<String>, JournalError> {
    let mut lost = Vec::new();
    let names = disk
        .list()
        .map_err(JournalError::io("listing the journal"))?;
    let mut numbers: Vec<u64> = names
        .iter()
        .filter_map(|name| segment::file_number(name))
        .collect();
    numbers.sort_unstable();
    for number in numbers {
        let name = segment::file_name(number);
        let read = || -> Result<(Vec<u8>, Identity), JournalError> {
            let file = disk
                .open(&name)
                .map_err(JournalError::io("opening a segment"))?;
            let length = file
                .length()
                .map_err(JournalError::io("measuring a segment"))?;
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            file.read_at(&mut bytes, 0)
                .map_err(JournalError::io("reading a segment"))?;
            let identity = segment::read_header(&bytes, number)?;
            Ok((bytes, identity))
        };
        let (bytes, identity) = match read() {
            Ok(read) => read,
            Err(error) => {
                lost.push(format!("{name}: {error}"));
                continue;
            }
        };
        let seal = sector::Seal::new(&identity.id, number);
        let sectors: Vec<&[u8]> = bytes.chunks_exact(SECTOR).collect();
        let mut place = 1;
        while place < sectors.len() {
            let begin = place;
            place += 1;
            let (group, count) = match sector::decode(sectors[begin], seal, begin as u64) {
                Sector::Zero => continue,
                Sector::Part {
                    index: 0,
                    group,
                    count,
                    ..
                } => (group, usize::from(count)),
                Sector::Part { .. } | Sector::Damaged => {
                    lost.push(format!("{name}: sector at offset {}", begin * SECTOR));
                    continue;
                }
            };
            let end = (begin + count).min(sectors.len());
            let mut payload = Vec::new();
            for (at, sector) in (begin..).zip(&sectors[begin..end]) {
                match sector::decode(sector, seal, at as u64) {
                    Sector::Part {
                        group: g,
                        payload: part,
                        ..
                    } if g == group => {
                        payload.extend_from_slice(&sector[part]);
                    }
                    _ => lost.push(format!("{name}: sector at offset {}", at * SECTOR)),
                }
            }
            match record::decode(&payload) {
                Ok(content) => content.records.into_iter().for_each(&mut each),
                Err(_) => lost.push(format!("{name}: the group at offset {}", begin * SECTOR)),
            }
            place = end;
        }
    }
    Ok(lost)
}

/// Identity of the journal on `disk`, from the first readable header.
pub fn identity(disk: &dyn Disk) -> Option<Identity> {
    let names = disk.list().ok()?;
    names.iter().find_map(|name| {
        let number = segment::file_number(name)?;
        let mut header = [0; SECTOR];
        disk.open(name).ok()?.read_at(&mut header, 0).ok()?;
        segment::read_header(&header, number).ok()
    })
}
