//! Messages as a broker stores and hands them out.
//!
//! ```text
//! total length 4 | magic 4 | CRC of the body 4 | queue 4 | flag 4 | offset in the queue 8 | offset in the
//! commit log 8 | system flags 4 | born: time 8, host 4 or 16, port 4 | stored: time 8, host 4 or 16, port 4 |
//! reconsumed 4 | prepared 8 | body: length 4, bytes | topic: length 1 or 2, bytes | properties: length 2, bytes
//! ```

use super::wire::Bytes;

/// Magic of messages whose topic has a length of one byte.
pub(super) const MAGIC: u32 = 0xDAA3_20A7;
/// Magic of messages whose topic has a length of two bytes.
const MAGIC_LONG_TOPIC: u32 = 0xDAA3_20AB;
/// System flag: the host where it was born has an IPv6 address.
const BORN_V6: u32 = 1 << 4;
/// System flag: the host that stored it has an IPv6 address.
const STORED_V6: u32 = 1 << 5;

/// One stored message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    /// The queue of the topic.
    pub(super) queue: i32,
    /// The offset in the queue.
    pub(super) offset: u64,
    /// The topic.
    pub(super) topic: &'a [u8],
    /// What was sent.
    pub(super) body: &'a [u8],
}

/// Takes the message at the front of `bytes`; `None` at their end.
///
/// # Errors
/// The reason why the bytes are no message, or a damaged one.
pub(super) fn next<'a>(bytes: &mut Bytes<'a>) -> Option<Result<Message<'a>, &'static str>> {
    if bytes.0.is_empty() {
        return None;
    }
    Some(match whole(bytes) {
        Some(mut whole) => parse(&mut whole).unwrap_or(Err("its lengths contradict each other")),
        None => Err("it is shorter than it says"),
    })
}

/// The bytes of one message, behind its total length.
fn whole<'a>(bytes: &mut Bytes<'a>) -> Option<Bytes<'a>> {
    let total = u32::from_be_bytes(bytes.array()?) as usize;
    bytes.take(total.checked_sub(4)?).map(Bytes)
}

fn parse<'a>(bytes: &mut Bytes<'a>) -> Option<Result<Message<'a>, &'static str>> {
    let magic = u32::from_be_bytes(bytes.array()?);
    if magic != MAGIC && magic != MAGIC_LONG_TOPIC {
        return Some(Err("it has an unknown magic number"));
    }
    let crc = u32::from_be_bytes(bytes.array()?);
    let queue = i32::from_be_bytes(bytes.array()?);
    bytes.take(4)?;
    let offset = u64::try_from(i64::from_be_bytes(bytes.array()?)).ok()?;
    bytes.take(8)?;
    let flags = u32::from_be_bytes(bytes.array()?);
    let host = |v6: u32| if flags & v6 == 0 { 4 + 4 } else { 16 + 4 };
    bytes.take(8 + host(BORN_V6))?;
    bytes.take(8 + host(STORED_V6))?;
    bytes.take(4 + 8)?;
    let length = u32::from_be_bytes(bytes.array()?) as usize;
    let body = bytes.take(length)?;
    let length = match magic {
        MAGIC => usize::from(u8::from_be_bytes(bytes.array()?)),
        _ => usize::from(u16::from_be_bytes(bytes.array()?)),
    };
    let topic = bytes.take(length)?;
    let length = usize::from(u16::from_be_bytes(bytes.array()?));
    bytes.take(length)?;
    // The broker keeps 31 bits of the checksum.
    if crc32fast::hash(body) & 0x7FFF_FFFF != crc & 0x7FFF_FFFF {
        return Some(Err("its body does not match its checksum"));
    }
    Some(Ok(Message {
        queue,
        offset,
        topic,
        body,
    }))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A message of the topic `t` at offset 42 of queue 3.
    pub(in super::super) fn message(flags: u32, magic: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&magic.to_be_bytes());
        bytes.extend_from_slice(&(crc32fast::hash(body) & 0x7FFF_FFFF).to_be_bytes());
        bytes.extend_from_slice(&3_i32.to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&42_i64.to_be_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.resize(
            bytes.len() + 8 + if flags & BORN_V6 == 0 { 8 } else { 20 },
            0,
        );
        bytes.resize(
            bytes.len() + 8 + if flags & STORED_V6 == 0 { 8 } else { 20 } + 12,
            0,
        );
        bytes.extend_from_slice(&(body.len() as u32).to_be_bytes());
        bytes.extend_from_slice(body);
        if magic == MAGIC_LONG_TOPIC {
            bytes.push(0);
        }
        bytes.extend_from_slice(b"\x01t\x00\x02pp");
        let total = bytes.len() as u32;
        bytes[..4].copy_from_slice(&total.to_be_bytes());
        bytes
    }

    #[test]
    fn both_forms_of_hosts_and_topics_are_read_one_after_the_other() {
        for magic in [MAGIC, MAGIC_LONG_TOPIC] {
            for flags in [0, BORN_V6, STORED_V6, BORN_V6 | STORED_V6] {
                let one = message(flags, magic, b"frame");
                let two = [one.clone(), one].concat();
                let mut bytes = Bytes(&two);
                for _ in 0..2 {
                    let read = next(&mut bytes).unwrap().unwrap();
                    assert_eq!(
                        read,
                        Message {
                            queue: 3,
                            offset: 42,
                            topic: b"t",
                            body: b"frame"
                        }
                    );
                }
                assert_eq!(next(&mut bytes), None);
            }
        }
    }

    #[test]
    fn damage_is_found_wherever_it_matters() {
        let good = message(0, MAGIC, b"frame");
        let at = good.len() - b"frame\x01t\x00\x02pp".len();
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert_eq!(
            next(&mut Bytes(&bad)),
            Some(Err("its body does not match its checksum"))
        );
        let mut bad = good.clone();
        bad[4] ^= 1;
        assert_eq!(
            next(&mut Bytes(&bad)),
            Some(Err("it has an unknown magic number"))
        );
        let mut bad = good.clone();
        bad[at - 1] = 200;
        assert_eq!(
            next(&mut Bytes(&bad)),
            Some(Err("its lengths contradict each other"))
        );
        assert_eq!(
            next(&mut Bytes(&good[..good.len() - 1])),
            Some(Err("it is shorter than it says"))
        );
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(
            flags in proptest::num::u32::ANY,
            long in proptest::bool::ANY,
            changes in proptest::collection::vec((proptest::num::usize::ANY, proptest::num::u8::ANY), 0..8),
            noise in proptest::collection::vec(proptest::num::u8::ANY, 0..128),
            cut in proptest::num::usize::ANY,
        ) {
            let mut bytes = message(flags, if long { MAGIC_LONG_TOPIC } else { MAGIC }, b"frame");
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            bytes.extend_from_slice(&noise);
            bytes.truncate(cut % (bytes.len() + 1));
            for bytes in [&bytes, &noise] {
                let mut bytes = Bytes(bytes);
                while let Some(Ok(_)) = next(&mut bytes) {}
            }
        }
    }
}
