//! The frames between nodes from any bytes: decoding never panics, a frame that is taken is written to the same bytes
//! again, and however the bytes arrive, the outcome is the same.

#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use millrace::http::peers::frame::{Frame, FrameError, FrameReader, decode};

/// Small, so that the fuzzer finds the limit.
const FRAME_BYTES_MAX: usize = 512;

/// What a reader makes of `input` if it comes `step` bytes at a time.
fn read(input: &[u8], step: usize) -> (Vec<Frame>, Option<FrameError>) {
    let (mut reader, mut buffer) = (FrameReader::new(FRAME_BYTES_MAX), BytesMut::new());
    let mut frames = Vec::new();
    for part in input.chunks(step) {
        buffer.extend_from_slice(part);
        loop {
            match reader.next(&mut buffer) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

fuzz_target!(|input: &[u8]| {
    if let Ok(frame) = decode(Bytes::copy_from_slice(input)) {
        let mut again = BytesMut::new();
        frame.put(&mut again);
        let (length, bytes) = again.split_at(4);
        assert_eq!(bytes, input, "{frame:?}");
        assert_eq!(length, (input.len() as u32).to_be_bytes());
    }
    let whole = read(input, input.len().max(1));
    for step in [1, 3, 64] {
        assert_eq!(read(input, step), whole, "{step} bytes at a time");
    }
});
