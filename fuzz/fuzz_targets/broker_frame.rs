//! What a broker hands out as a group of the order log, on any bytes: no panic, and what is taken is what would have been
//! written. The first byte chooses: any bytes, or a payload whose frame comes back and, altered, does not.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::queue::log::broker::frame::{self, CLOSING, Frame, HEAD};
use millrace::queue::log::broker::{Owner, Place};
use millrace::queue::log::record;

fn read(bytes: &[u8]) {
    let Ok(frame) = frame::decode(bytes) else {
        return;
    };
    let Frame {
        owner,
        place,
        payload,
    } = frame;
    assert_eq!(payload, &bytes[HEAD..]);
    let again = frame::encode(owner, place, payload);
    let again = frame::decode(&again).expect("a frame of ours");
    assert_eq!(
        (again.owner, again.place, again.payload),
        (owner, place, payload)
    );
    if !payload.is_empty() && payload != CLOSING {
        let _ = record::decode(payload);
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    if kind % 2 == 0 {
        read(rest);
        return;
    }
    let Some((head, payload)) = rest.split_first_chunk::<38>() else {
        return;
    };
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    let owner = Owner {
        database: head[..16].try_into().expect("16 bytes"),
        node: u16::from_le_bytes([head[16], head[17]]),
    };
    let place = Place {
        epoch: word(18),
        number: word(26),
    };
    let (at, bit) = (u16::from_le_bytes([head[34], head[35]]), head[36] % 8);
    let mut bytes = frame::encode(owner, place, payload);
    let decoded = frame::decode(&bytes).expect("a frame of ours");
    assert_eq!(
        (decoded.owner, decoded.place, decoded.payload),
        (owner, place, payload)
    );
    read(&bytes);
    assert!(frame::decode(&bytes[..bytes.len() - 1]).is_err());
    let at = usize::from(at) % bytes.len();
    bytes[at] ^= 1 << bit;
    assert!(frame::decode(&bytes).is_err(), "byte {at}, bit {bit}");
});
