//! The bytes of a group in a broker.
//!
//! ```text
//!   "MRLG" │ version u8 │ 0 u8 │ node u16 │ epoch u64 │ number u64 │ database 16 bytes
//!   │ payload length u32 │ CRC-32C of all other bytes u32 │ payload
//! ```
//!
//! All integers are little-endian. The payload is that of [`crate::queue::log::record`], empty for a marker, or
//! [`CLOSING`].

use super::Place;

/// Bytes before the payload.
pub const HEAD: usize = 48;
/// Payload of the last group of an orderly stop: no order before it is needed.
pub const CLOSING: &[u8] = b"closed";
const MAGIC: &[u8; 4] = b"MRLG";
/// Version of this format.
pub const VERSION: u8 = 1;
const CRC: std::ops::Range<usize> = 44..48;

/// The database and the node that a log belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The random identity of the database, made with its schema.
    pub database: [u8; 16],
    /// The node in it.
    pub node: u16,
}

/// A decoded frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The database and node that it belongs to.
    pub owner: Owner,
    /// The identity of its group.
    pub place: Place,
    /// The group's payload.
    pub payload: &'a [u8],
}

/// Reasons why bytes are no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// They do not begin as a frame does.
    #[error("it was not written by Millrace")]
    Foreign,
    /// A later release wrote it.
    #[error("it has version {0}, which this release does not know")]
    Version(u8),
    /// The checksum or the length is wrong.
    #[error("its checksum or length is wrong")]
    Damaged,
}

/// The bytes of a frame.
pub fn encode(owner: Owner, place: Place, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD + payload.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&[VERSION, 0]);
    out.extend_from_slice(&owner.node.to_le_bytes());
    out.extend_from_slice(&place.epoch.to_le_bytes());
    out.extend_from_slice(&place.number.to_le_bytes());
    out.extend_from_slice(&owner.database);
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
    let crc = checksum(&out);
    out[CRC].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Decodes a frame.
///
/// # Errors
/// [`FrameError`].
pub fn decode(bytes: &[u8]) -> Result<Frame<'_>, FrameError> {
    if !bytes.starts_with(MAGIC) {
        return Err(FrameError::Foreign);
    }
    match bytes.get(4) {
        Some(&VERSION) => {}
        Some(other) => return Err(FrameError::Version(*other)),
        None => return Err(FrameError::Damaged),
    }
    let (head, payload) = bytes.split_at_checked(HEAD).ok_or(FrameError::Damaged)?;
    let length = u32::from_le_bytes(array(head, 40));
    let crc = u32::from_le_bytes(array(head, CRC.start));
    if length as usize != payload.len() || crc != checksum(bytes) {
        return Err(FrameError::Damaged);
    }
    Ok(Frame {
        owner: Owner {
            database: array(head, 24),
            node: u16::from_le_bytes(array(head, 6)),
        },
        place: Place {
            epoch: u64::from_le_bytes(array(head, 8)),
            number: u64::from_le_bytes(array(head, 16)),
        },
        payload,
    })
}

/// The checksum over everything but itself.
fn checksum(bytes: &[u8]) -> u32 {
    let head = crc32c::crc32c(&bytes[..CRC.start]);
    crc32c::crc32c_append(head, &bytes[HEAD..])
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_round_trips_and_every_changed_byte_is_seen() {
        let owner = Owner {
            database: [7; 16],
            node: 3,
        };
        let place = Place {
            epoch: 1 << 40,
            number: 9,
        };
        for payload in [&b""[..], b"payload"] {
            let bytes = encode(owner, place, payload);
            let frame = decode(&bytes).unwrap();
            assert_eq!(
                (frame.owner, frame.place, frame.payload),
                (owner, place, payload)
            );
            for at in 0..bytes.len() {
                // Byte 5 is reserved, and covered by the checksum.
                let mut changed = bytes.clone();
                changed[at] ^= 1;
                assert!(decode(&changed).is_err(), "byte {at}");
                assert!(decode(&bytes[..at]).is_err(), "cut at {at}");
            }
        }
    }
}
