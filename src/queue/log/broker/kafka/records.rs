//! Record batches: one frame to send, and the frames of an answer.

use bytes::{Bytes, BytesMut};
use kafka_protocol::records::{
    Compression, NO_PARTITION_LEADER_EPOCH, NO_PRODUCER_EPOCH, NO_PRODUCER_ID, NO_SEQUENCE, Record,
    RecordBatchDecoder, RecordBatchEncoder, RecordEncodeOptions, TimestampType,
};

use super::Stored;
use crate::order::UnixMillis;

/// Bytes of a batch of one record without its value, at most: header 61, and lengths, attributes and deltas of the
/// record 27.
pub(super) const OVERHEAD_BYTES: usize = 100;

/// The batch of one record whose value is `frame`.
pub(super) fn batch(frame: &[u8]) -> Result<Bytes, String> {
    let record = record(0, None, Bytes::copy_from_slice(frame));
    let options = RecordEncodeOptions {
        version: 2,
        compression: Compression::None,
    };
    let mut buffer = BytesMut::with_capacity(frame.len() + OVERHEAD_BYTES);
    RecordBatchEncoder::encode(&mut buffer, [&record], &options).map_err(|e| e.to_string())?;
    Ok(buffer.freeze())
}

/// A record of this moment, with its place in its batch.
pub(super) fn record(offset: i64, key: Option<Bytes>, value: Bytes) -> Record {
    Record {
        transactional: false,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: NO_PARTITION_LEADER_EPOCH,
        producer_id: NO_PRODUCER_ID,
        producer_epoch: NO_PRODUCER_EPOCH,
        timestamp_type: TimestampType::Creation,
        offset,
        // The encoder begins another batch where numbers do not go on, and a server takes one in a request.
        sequence: NO_SEQUENCE.wrapping_add(i32::try_from(offset).unwrap_or(i32::MAX)),
        timestamp: UnixMillis::now().0,
        key,
        value: Some(value),
        headers: Default::default(),
    }
}

/// Frames of an answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Frames {
    /// From the offset asked for on.
    pub(super) stored: Vec<Stored>,
    /// The offset behind the last whole batch, if there is one.
    pub(super) next: Option<u64>,
}

/// Fields of a batch's header, by their place.
const LENGTH_AT: usize = 8;
const HEADER_BYTES: usize = 61;
const ATTRIBUTES_AT: usize = 21;
const LAST_DELTA_AT: usize = 23;

/// The frames from offset `from` on. A batch that begins before it is passed over up to there, the last one may be
/// cut off, and the server's own notes about transactions are no frames.
pub(super) fn frames(mut bytes: Bytes, from: u64) -> Result<Frames, String> {
    let mut frames = Frames::default();
    while let (Some(base), Some(length)) = (number::<8>(&bytes, 0), number::<4>(&bytes, LENGTH_AT))
    {
        let base = i64::from_be_bytes(base);
        let bad =
            |reason: &str| format!("the record batch at offset {base} is unreadable: {reason}");
        let length =
            usize::try_from(i32::from_be_bytes(length)).map_err(|_| bad("negative length"))?;
        let whole = length.saturating_add(LENGTH_AT + 4);
        if whole > bytes.len() {
            break;
        }
        let mut batch = bytes.split_to(whole);
        let (Some(attributes), Some(delta), HEADER_BYTES..) = (
            number::<2>(&batch, ATTRIBUTES_AT),
            number::<4>(&batch, LAST_DELTA_AT),
            batch.len(),
        ) else {
            return Err(bad("too short"));
        };
        if i16::from_be_bytes(attributes) & 7 != 0 {
            return Err(bad("it is compressed, so nobody of us wrote it"));
        }
        let next = base
            .saturating_add(i64::from(i32::from_be_bytes(delta)))
            .saturating_add(1);
        let records = RecordBatchDecoder::decode(&mut batch)
            .map_err(|e| bad(&e.to_string()))?
            .records;
        for record in records {
            match u64::try_from(record.offset) {
                Ok(offset) if offset >= from && !record.control => frames.stored.push(Stored {
                    offset,
                    place: None,
                    frame: record.value.unwrap_or_default().to_vec(),
                }),
                _ => {}
            }
        }
        frames.next = u64::try_from(next).ok();
    }
    Ok(frames)
}

fn number<const N: usize>(bytes: &Bytes, at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: i64, frame: &[u8]) -> Vec<u8> {
        let mut bytes = batch(frame).unwrap().to_vec();
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes
    }

    #[test]
    fn the_overhead_is_never_greater_than_said() {
        for length in [0, 1, 63, 64, 8191, 8192, 1 << 20] {
            assert!(
                batch(&vec![7; length]).unwrap().len() <= length + OVERHEAD_BYTES,
                "{length}"
            );
        }
    }

    #[test]
    fn frames_before_the_offset_and_a_batch_cut_off_are_left_out() {
        let mut bytes = [at(4, b"four"), at(5, b"five"), at(6, b""), at(7, b"seven")].concat();
        for cut in 1..at(7, b"seven").len() {
            let answer = frames(Bytes::copy_from_slice(&bytes[..bytes.len() - cut]), 5).unwrap();
            let told: Vec<_> = answer
                .stored
                .iter()
                .map(|s| (s.offset, s.frame.as_slice()))
                .collect();
            assert_eq!(told, [(5, b"five".as_slice()), (6, b"")]);
            assert_eq!(answer.next, Some(7));
        }
        assert_eq!(
            frames(Bytes::copy_from_slice(&bytes), 5)
                .unwrap()
                .stored
                .len(),
            3
        );
        let damaged = bytes.len() - 3;
        bytes[damaged] ^= 1;
        assert!(frames(bytes.into(), 5).unwrap_err().contains("at offset 7"));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let whole = at(3, b"three");
        for place in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[place] ^= 1 << bit;
                let _ = frames(bytes.into(), 0);
            }
        }
        for length in 0..whole.len() {
            assert_eq!(
                frames(Bytes::copy_from_slice(&whole[..length]), 0),
                Ok(Frames::default())
            );
        }
    }

    #[test]
    fn a_compressed_batch_is_named() {
        let mut bytes = at(9, b"nine");
        bytes[ATTRIBUTES_AT + 1] |= 4;
        assert!(
            frames(bytes.into(), 0)
                .unwrap_err()
                .contains("offset 9 is unreadable: it is compressed")
        );
    }
}
