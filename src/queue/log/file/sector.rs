//! The physical format: a group of records as a run of sectors.
//!
//! ```text
//!   0      4          12       14       16      18                                512
//!   ├ crc ─┼── group ──┼─ index ┼─ count ┼─ used ┼────────── payload ──────────────┤
//! ```
//!
//! All integers are little-endian. `crc` is CRC-32C over the journal's id, the segment's number,
//! the sector's place in it, and the rest of the sector. The lower half of `group` counts the
//! groups of a process from 1, over all segments; the upper half is the number of the process.
//! `index` is the sector's place in its group, `count` the group's number of sectors. `used` is the
//! payload's length in bytes; the rest is zero.
//!
//! Why sectors, although a checksum for each record would be smaller: a disk writes a sector of 512
//! bytes whole or not at all, and a segment is filled with zeros before it is used. After a power
//! loss a sector is therefore either valid or zero, and anything else is damage. In the last group
//! a checksum alone could not tell a torn write, which was not acknowledged, from a flipped bit in
//! an acknowledged order. A sector is never written twice, so a torn write cannot reach
//! acknowledged records.
//!
//! The id in the checksum is random and never published: a client cannot send `attributes` that
//! look like a sector.

use std::ops::Range;

/// Bytes of a sector; the smallest unit that any disk writes atomically.
pub const SECTOR: usize = 512;
/// Bytes of a sector's header.
const HEAD: usize = 18;
/// Payload bytes of a sector.
pub const PAYLOAD: usize = SECTOR - HEAD;
/// Most sectors of a group.
pub const GROUP_SECTORS_MAX: usize = 2_048;

/// Sectors needed for `payload` bytes.
pub fn sectors_of(payload: usize) -> usize {
    payload.div_ceil(PAYLOAD)
}

/// Seed of a segment's checksums: a sector is valid only in its journal, segment and place.
#[derive(Clone, Copy, Debug)]
pub struct Seal {
    seed: u32,
}

impl Seal {
    /// The seal of a segment.
    pub fn new(journal_id: &[u8; 16], segment: u64) -> Self {
        let seed = crc32c::crc32c(journal_id);
        Seal {
            seed: crc32c::crc32c_append(seed, &segment.to_le_bytes()),
        }
    }

    /// Checksum of `content`, a sector without its first four bytes, at `place`.
    pub fn of(self, place: u64, content: &[u8]) -> u32 {
        let seed = crc32c::crc32c_append(self.seed, &place.to_le_bytes());
        crc32c::crc32c_append(seed, content)
    }
}

/// State of one sector.
#[derive(Debug, PartialEq, Eq)]
pub enum Sector {
    /// Never written.
    Zero,
    /// Written, but with the wrong checksum or fields.
    Damaged,
    /// Part of a group.
    Part {
        /// Number of the group.
        group: u64,
        /// Index of the sector in the group, from 0.
        index: u16,
        /// Sectors of the group.
        count: u16,
        /// Bytes of the sector that are payload.
        payload: Range<usize>,
    },
}

/// Appends `payload` to `out` as sectors of group `group`, the first of them at `place`.
pub fn encode(out: &mut Vec<u8>, seal: Seal, place: u64, group: u64, payload: &[u8]) {
    let count = sectors_of(payload.len());
    for (index, part) in payload.chunks(PAYLOAD).enumerate() {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&group.to_le_bytes());
        // Neither wraps: a group has at most GROUP_SECTORS_MAX sectors, a part PAYLOAD bytes.
        out.extend_from_slice(&(index as u16).to_le_bytes());
        out.extend_from_slice(&(count as u16).to_le_bytes());
        out.extend_from_slice(&(part.len() as u16).to_le_bytes());
        out.extend_from_slice(part);
        out.resize(start + SECTOR, 0);
        let crc = seal.of(place + index as u64, &out[start + 4..]);
        out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Decodes the sector at `place`.
///
/// # Panics
/// If it is not [`SECTOR`] bytes long.
pub fn decode(sector: &[u8], seal: Seal, place: u64) -> Sector {
    assert_eq!(sector.len(), SECTOR, "a sector has {SECTOR} bytes");
    if sector.iter().all(|byte| *byte == 0) {
        return Sector::Zero;
    }
    let crc = u32::from_le_bytes([sector[0], sector[1], sector[2], sector[3]]);
    if crc != seal.of(place, &sector[4..]) && !crate::faults::bug("trust_any_sector") {
        return Sector::Damaged;
    }
    let short = |at: usize| u16::from_le_bytes([sector[at], sector[at + 1]]);
    let mut group = [0; 8];
    group.copy_from_slice(&sector[4..12]);
    let (index, count, used) = (short(12), short(14), usize::from(short(16)));
    if used == 0 || used > PAYLOAD || index >= count {
        return Sector::Damaged;
    }
    Sector::Part {
        group: u64::from_le_bytes(group),
        index,
        count,
        payload: HEAD..HEAD + used,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_round_trips_and_every_flipped_bit_is_damage() {
        let seal = Seal::new(&[7; 16], 3);
        let payload: Vec<u8> = (0..1_200_u32).map(|n| n as u8).collect();
        let mut out = Vec::new();
        encode(&mut out, seal, 9, 42, &payload);
        assert_eq!(out.len(), 3 * SECTOR);
        let mut back = Vec::new();
        for (number, sector) in out.chunks(SECTOR).enumerate() {
            match decode(sector, seal, 9 + number as u64) {
                Sector::Part {
                    group: 42,
                    index,
                    count: 3,
                    payload,
                } => {
                    assert_eq!(usize::from(index), number);
                    back.extend_from_slice(&sector[payload]);
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(back, payload);
        let mut sector = out[..SECTOR].to_vec();
        for bit in 0..SECTOR * 8 {
            sector[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&sector, seal, 9), Sector::Damaged, "bit {bit}");
            sector[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_sector_is_valid_only_in_its_place() {
        let seal = Seal::new(&[7; 16], 3);
        let mut out = Vec::new();
        encode(&mut out, seal, 9, 42, b"x");
        assert_eq!(decode(&out, seal, 10), Sector::Damaged);
        assert_eq!(decode(&out, Seal::new(&[7; 16], 4), 9), Sector::Damaged);
        assert_eq!(decode(&out, Seal::new(&[8; 16], 3), 9), Sector::Damaged);
        assert_eq!(decode(&[0; SECTOR], seal, 9), Sector::Zero);
    }

    #[test]
    fn a_sealed_sector_that_makes_no_sense_is_damage() {
        let seal = Seal::new(&[7; 16], 3);
        let sealed = |index: u16, count: u16, used: usize| {
            let mut sector = [0; SECTOR];
            sector[12..14].copy_from_slice(&index.to_le_bytes());
            sector[14..16].copy_from_slice(&count.to_le_bytes());
            sector[16..18].copy_from_slice(&(used as u16).to_le_bytes());
            let crc = seal.of(9, &sector[4..]);
            sector[..4].copy_from_slice(&crc.to_le_bytes());
            decode(&sector, seal, 9)
        };
        assert!(matches!(
            sealed(1, 2, PAYLOAD),
            Sector::Part { index: 1, .. }
        ));
        assert_eq!(sealed(0, 1, 0), Sector::Damaged);
        assert_eq!(sealed(0, 1, PAYLOAD + 1), Sector::Damaged);
        assert_eq!(sealed(1, 1, 1), Sector::Damaged);
    }
}
