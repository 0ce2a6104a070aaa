//! The frames between two nodes, and their bytes.
//!
//! ```text
//!   ┌────────────┬──────┬───────────────────┐
//!   │ length u32 │ kind │ fields of the kind │    length: of everything behind it; integers big-endian
//!   └────────────┴──────┴───────────────────┘
//! ```
//!
//! A text or a list of bytes is its length and then itself; the last field of a call or an answer is what is left.
//! The version of the protocol is agreed on before the first frame, so an unknown kind, a field that does not end or
//! bytes behind the last field are an error, and the connection ends.
//!
//! Decoding copies nothing: the parts of a frame are slices of the buffer that it was read into.

use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio_util::codec::{Decoder, LengthDelimitedCodec};

use super::{Answer, Identity};
use crate::order::{OrderId, SkuId, UnixMillis};

/// Most bytes of a frame behind its length: an answer to a batch of 1,000 orders, each with 1 KiB of attributes.
pub const FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most bytes of a frame until both sides know one another.
pub const GREETING_BYTES_MAX: usize = 1_024;

/// Header fields of a call. More are not passed on.
pub const HEADERS_MAX: usize = 16;

const LENGTH_BYTES: usize = size_of::<u32>();

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const GOODBYE: u8 = 2;
    pub(super) const CALL: u8 = 3;
    pub(super) const ANSWER: u8 = 4;
    pub(super) const NOT_RUN: u8 = 5;
    pub(super) const HINT: u8 = 6;
    pub(super) const PING: u8 = 7;
    pub(super) const PONG: u8 = 8;
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The first frame of each side.
    Hello(Hello),
    /// Instead of a hello: why this connection is of no use.
    Goodbye(Goodbye),
    /// A request to be run as the owner of its lane.
    Call(Call),
    /// The answer to the call with this number.
    Answer(u64, Answer),
    /// The call with this number was not begun.
    NotRun(u64, NotRun),
    /// News that the receiver would find by itself in a while.
    Hint(Hint),
    /// Asks for a pong with the same number.
    Ping(u64),
    /// The answer to a ping.
    Pong(u64),
}

/// Who speaks, and to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The speaker.
    pub from: Identity,
    /// The node that the speaker believes to have reached.
    pub to: u8,
}

/// Reason why a connection ends before its first call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Goodbye {
    /// The two work on different databases.
    #[error("it works on another database")]
    OtherDatabase,
    /// This is not the node that was meant.
    #[error("it is another node than expected")]
    OtherNode,
    /// A newer process has the number of the caller.
    #[error("a newer process has this node's number")]
    Superseded,
    /// It is shutting down.
    #[error("it is shutting down")]
    Stopping,
}

/// Reason why a call was not begun. Nothing of it has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRun {
    /// The node serves as many calls as it may.
    #[error("that node serves as many passed-on requests as it may")]
    Busy,
    /// The node is shutting down.
    #[error("that node is shutting down")]
    Stopping,
}

/// A request to be run as the owner of its lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number on this connection.
    pub number: u64,
    /// How long the node may take.
    pub wait: Duration,
    /// Whether idempotency keys in it are the sender's own, made for a buyer who gave none.
    pub has_own_keys: bool,
    /// `GET` or `POST`.
    pub method: &'static str,
    /// Path and query.
    pub target: Bytes,
    /// Names and values.
    pub headers: Vec<(Bytes, Bytes)>,
    /// The body.
    pub body: Bytes,
}

/// A call as the sender has it.
#[derive(Clone, Copy, Debug)]
pub struct CallParts<'a> {
    /// How long the node may take.
    pub wait: Duration,
    /// Whether idempotency keys in it are the sender's own.
    pub has_own_keys: bool,
    /// `GET` or `POST`.
    pub method: &'a str,
    /// Path and query.
    pub target: &'a str,
    /// Names and values.
    pub headers: &'a [(&'a str, &'a [u8])],
    /// The body.
    pub body: &'a [u8],
}

/// News for another node. None of them is needed for anything to be right: the receiver looks sooner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Lanes have moved.
    LanesMoved,
    /// Terms or pauses of SKUs have changed.
    Terms,
    /// The sender wants units of this SKU.
    Want(SkuId),
    /// A payment for this order is stored and waits.
    Payment(OrderId),
    /// A payment for this order, made at this moment, has come in and is to be stored.
    PaymentArrives(OrderId, UnixMillis),
}

/// A frame that its sender cannot have meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It does not decode.
    #[error("a frame that does not decode")]
    Malformed,
    /// It is longer than a frame may be.
    #[error("a frame beyond the limit")]
    TooLong,
}

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }
}

/// Takes frames from the bytes that a connection has brought.
#[derive(Debug)]
pub struct FrameReader {
    lengths: LengthDelimitedCodec,
}

impl FrameReader {
    /// A reader of frames of `bytes_max` bytes at most.
    pub fn new(bytes_max: usize) -> Self {
        let lengths = LengthDelimitedCodec::builder()
            .length_field_type::<u32>()
            .max_frame_length(bytes_max)
            .new_codec();
        FrameReader { lengths }
    }

    /// Both sides know one another: longer frames may come.
    pub fn raise_limit(&mut self) {
        self.lengths.set_max_frame_length(FRAME_BYTES_MAX);
    }

    /// The next frame, once it is complete. `input` keeps the rest.
    ///
    /// # Errors
    /// [`FrameError`]; the connection is of no more use.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        match self.lengths.decode(input) {
            Ok(Some(frame)) => decode(frame.freeze()).map(Some),
            Ok(None) => Ok(None),
            Err(_) => Err(FrameError::TooLong),
        }
    }
}

/// Decodes what stands behind the length of a frame.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode(bytes: Bytes) -> Result<Frame, FrameError> {
    let mut fields = Fields(bytes);
    let frame = fields.frame().ok_or(FrameError::Malformed)?;
    if fields.0.is_empty() {
        Ok(frame)
    } else {
        Err(FrameError::Malformed)
    }
}

/// The fields of a frame that are not read yet.
struct Fields(Bytes);

impl Fields {
    fn frame(&mut self) -> Option<Frame> {
        Some(match self.u8()? {
            kind::HELLO => Frame::Hello(Hello {
                from: Identity {
                    database: self.bytes(16)?.as_ref().try_into().ok()?,
                    node: self.u8()?,
                    epoch: self.u64()?,
                    data_plane: {
                        let length = self.u16()?;
                        self.text(length)?
                    },
                },
                to: self.u8()?,
            }),
            kind::GOODBYE => Frame::Goodbye(match self.u8()? {
                1 => Goodbye::OtherDatabase,
                2 => Goodbye::OtherNode,
                3 => Goodbye::Superseded,
                4 => Goodbye::Stopping,
                _ => return None,
            }),
            kind::CALL => Frame::Call(self.call()?),
            kind::ANSWER => {
                let (number, status, length) = (self.u64()?, self.u16()?, self.u32()?);
                let fields = self.bytes(usize::try_from(length).ok()?)?;
                let answer = Answer {
                    status,
                    fields,
                    body: self.rest(),
                };
                let is_final = (200..600).contains(&answer.status);
                (is_final && is_fields(&answer.fields)).then_some(Frame::Answer(number, answer))?
            }
            kind::NOT_RUN => Frame::NotRun(
                self.u64()?,
                match self.u8()? {
                    1 => NotRun::Busy,
                    2 => NotRun::Stopping,
                    _ => return None,
                },
            ),
            kind::HINT => Frame::Hint(match self.u8()? {
                1 => Hint::LanesMoved,
                2 => Hint::Terms,
                3 => {
                    let length = u16::from(self.u8()?);
                    Hint::Want(SkuId::new(&self.text(length)?).ok()?)
                }
                4 => Hint::Payment(OrderId::new(self.u64()?)?),
                5 => {
                    let id = OrderId::new(self.u64()?)?;
                    Hint::PaymentArrives(id, UnixMillis(self.u64()?.cast_signed()))
                }
                _ => return None,
            }),
            kind::PING => Frame::Ping(self.u64()?),
            kind::PONG => Frame::Pong(self.u64()?),
            _ => return None,
        })
    }

    fn call(&mut self) -> Option<Call> {
        let number = self.u64()?;
        let wait = Duration::from_millis(u64::from(self.u32()?));
        let has_own_keys = match self.u8()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let method = match self.u8()? {
            1 => "GET",
            2 => "POST",
            _ => return None,
        };
        let length = self.u16()?;
        let target = self.bytes(usize::from(length))?;
        // As the engines have it: visible ASCII.
        if target.first() != Some(&b'/') || !target.iter().all(u8::is_ascii_graphic) {
            return None;
        }
        let count = usize::from(self.u8()?);
        if count > HEADERS_MAX {
            return None;
        }
        let mut headers = Vec::with_capacity(count);
        for _ in 0..count {
            let length = self.u8()?;
            let name = self.bytes(usize::from(length))?;
            let length = self.u16()?;
            let value = self.bytes(usize::from(length))?;
            if name.is_empty() || !name.iter().all(u8::is_ascii_graphic) {
                return None;
            }
            headers.push((name, value));
        }
        Some(Call {
            number,
            wait,
            has_own_keys,
            method,
            target,
            headers,
            body: self.rest(),
        })
    }

    fn u8(&mut self) -> Option<u8> {
        self.0.try_get_u8().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.0.try_get_u16().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.0.try_get_u32().ok()
    }

    fn u64(&mut self) -> Option<u64> {
        self.0.try_get_u64().ok()
    }

    fn bytes(&mut self, count: usize) -> Option<Bytes> {
        (self.0.len() >= count).then(|| self.0.split_to(count))
    }

    fn text(&mut self, bytes: u16) -> Option<String> {
        let bytes = self.bytes(usize::from(bytes))?;
        String::from_utf8(bytes.into()).ok()
    }

    fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.0)
    }
}

/// Whether these are whole header fields that end no line of their own.
fn is_fields(fields: &[u8]) -> bool {
    let Some(lines) = fields.strip_suffix(b"\r\n") else {
        return fields.is_empty();
    };
    let is_safe = |byte: &u8| *byte == b'\t' || (b' '..=b'~').contains(byte);
    let mut rest = lines;
    loop {
        let end = rest.iter().position(|byte| !is_safe(byte));
        let line = rest.get(..end.unwrap_or(rest.len())).unwrap_or_default();
        if !line.iter().skip(1).any(|byte| *byte == b':') {
            return false;
        }
        let Some(end) = end else {
            return true;
        };
        match rest.get(end..).and_then(|left| left.strip_prefix(b"\r\n")) {
            Some(left) => rest = left,
            None => return false,
        }
    }
}

/// Appends a frame, its length first. `fill` appends the kind and the fields.
fn put(out: &mut BytesMut, fill: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_u32(0);
    fill(out);
    let length = u32::try_from(out.len() - start - LENGTH_BYTES).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(start..start + LENGTH_BYTES) {
        place.copy_from_slice(&length.to_be_bytes());
    }
}

impl CallParts<'_> {
    /// Bytes of the frame, its length included.
    pub fn frame_bytes(&self) -> usize {
        let headers = self.headers.iter().take(HEADERS_MAX);
        let headers: usize = headers
            .map(|(name, value)| 3 + name.len() + value.len())
            .sum();
        LENGTH_BYTES + 18 + self.target.len() + headers + self.body.len()
    }

    /// Whether every part fits its field.
    pub fn fits(&self) -> bool {
        let fits_u16 = |length: usize| u16::try_from(length).is_ok();
        matches!(self.method, "GET" | "POST")
            && self.frame_bytes() <= FRAME_BYTES_MAX
            && fits_u16(self.target.len())
            && self.headers.len() <= HEADERS_MAX
            && self
                .headers
                .iter()
                .all(|(name, value)| u8::try_from(name.len()).is_ok() && fits_u16(value.len()))
    }

    /// Appends the frame of a call that [fits](CallParts::fits).
    pub fn put(&self, number: u64, out: &mut BytesMut) {
        out.reserve(self.frame_bytes());
        put(out, |out| {
            out.put_u8(kind::CALL);
            out.put_u64(number);
            out.put_u32(u32::try_from(self.wait.as_millis()).unwrap_or(u32::MAX));
            out.put_u8(u8::from(self.has_own_keys));
            out.put_u8(if self.method == "GET" { 1 } else { 2 });
            out.put_u16(self.target.len() as u16);
            out.put_slice(self.target.as_bytes());
            out.put_u8(self.headers.len() as u8);
            for (name, value) in self.headers {
                out.put_u8(name.len() as u8);
                out.put_slice(name.as_bytes());
                out.put_u16(value.len() as u16);
                out.put_slice(value);
            }
            out.put_slice(self.body);
        });
    }
}

/// Bytes of the frame of an answer, its length included.
pub fn answer_bytes(fields: &[u8], body: &[u8]) -> usize {
    LENGTH_BYTES + 15 + fields.len() + body.len()
}

/// Appends the answer to a call.
pub fn put_answer(number: u64, status: u16, fields: &[u8], body: &[u8], out: &mut BytesMut) {
    out.reserve(answer_bytes(fields, body));
    put(out, |out| {
        out.put_u8(kind::ANSWER);
        out.put_u64(number);
        out.put_u16(status);
        out.put_u32(u32::try_from(fields.len()).unwrap_or(u32::MAX));
        out.put_slice(fields);
        out.put_slice(body);
    });
}

impl Frame {
    /// Appends the frame.
    pub fn put(&self, out: &mut BytesMut) {
        match self {
            Frame::Call(call) => {
                let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
                let names: Vec<String> = call.headers.iter().map(|(name, _)| text(name)).collect();
                let headers: Vec<(&str, &[u8])> = names
                    .iter()
                    .zip(&call.headers)
                    .map(|(name, (_, value))| (name.as_str(), value.as_ref()))
                    .collect();
                let parts = CallParts {
                    wait: call.wait,
                    has_own_keys: call.has_own_keys,
                    method: call.method,
                    target: &text(&call.target),
                    headers: &headers,
                    body: &call.body,
                };
                parts.put(call.number, out);
            }
            Frame::Answer(number, answer) => {
                put_answer(*number, answer.status, &answer.fields, &answer.body, out);
            }
            Frame::Hello(hello) => put(out, |out| {
                let from = &hello.from;
                out.put_u8(kind::HELLO);
                out.put_slice(&from.database);
                out.put_u8(from.node);
                out.put_u64(from.epoch);
                // Addresses are short; one that is not would not fit a greeting.
                let length = u16::try_from(from.data_plane.len()).unwrap_or(u16::MAX);
                out.put_u16(length);
                out.put_slice(from.data_plane.as_bytes());
                out.put_u8(hello.to);
            }),
            Frame::Goodbye(reason) => put(out, |out| {
                out.put_u8(kind::GOODBYE);
                out.put_u8(match reason {
                    Goodbye::OtherDatabase => 1,
                    Goodbye::OtherNode => 2,
                    Goodbye::Superseded => 3,
                    Goodbye::Stopping => 4,
                });
            }),
            Frame::NotRun(number, reason) => put(out, |out| {
                out.put_u8(kind::NOT_RUN);
                out.put_u64(*number);
                out.put_u8(match reason {
                    NotRun::Busy => 1,
                    NotRun::Stopping => 2,
                });
            }),
            Frame::Hint(hint) => put(out, |out| {
                out.put_u8(kind::HINT);
                match hint {
                    Hint::LanesMoved => out.put_u8(1),
                    Hint::Terms => out.put_u8(2),
                    Hint::Want(sku_id) => {
                        out.put_u8(3);
                        // 32 characters at most.
                        out.put_u8(sku_id.as_str().len() as u8);
                        out.put_slice(sku_id.as_str().as_bytes());
                    }
                    Hint::Payment(id) => {
                        out.put_u8(4);
                        out.put_u64(id.get());
                    }
                    Hint::PaymentArrives(id, paid_at) => {
                        out.put_u8(5);
                        out.put_u64(id.get());
                        out.put_i64(paid_at.0);
                    }
                }
            }),
            Frame::Ping(number) => put(out, |out| {
                out.put_u8(kind::PING);
                out.put_u64(*number);
            }),
            Frame::Pong(number) => put(out, |out| {
                out.put_u8(kind::PONG);
                out.put_u64(*number);
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Frame> {
        let hello = Hello {
            from: Identity {
                database: *b"0123456789abcdef",
                node: 3,
                epoch: 7,
                data_plane: "10.0.0.3:8080".into(),
            },
            to: 63,
        };
        let call = Call {
            number: 9,
            wait: Duration::from_millis(6_900),
            has_own_keys: true,
            method: "POST",
            target: Bytes::from_static(b"/v1/orders?x=1"),
            headers: vec![
                (
                    Bytes::from_static(b"prefer"),
                    Bytes::from_static(b"respond-async"),
                ),
                (Bytes::from_static(b"idempotency-key"), Bytes::new()),
            ],
            body: Bytes::from_static(br#"{"user_id":"u","sku_id":"A"}"#),
        };
        let answer = Answer {
            status: 201,
            fields: Bytes::from_static(b"Location: /v1/orders/1\r\nX: \r\n"),
            body: Bytes::from_static(b"{}"),
        };
        let bare = Answer {
            status: 599,
            fields: Bytes::new(),
            body: Bytes::new(),
        };
        vec![
            Frame::Hello(hello),
            Frame::Goodbye(Goodbye::OtherDatabase),
            Frame::Goodbye(Goodbye::OtherNode),
            Frame::Goodbye(Goodbye::Superseded),
            Frame::Goodbye(Goodbye::Stopping),
            Frame::Call(call),
            Frame::Answer(u64::MAX, answer),
            Frame::Answer(0, bare),
            Frame::NotRun(1, NotRun::Busy),
            Frame::NotRun(1, NotRun::Stopping),
            Frame::Hint(Hint::LanesMoved),
            Frame::Hint(Hint::Terms),
            Frame::Hint(Hint::Want(SkuId::new("A").unwrap())),
            Frame::Hint(Hint::Payment(OrderId::MAX)),
            Frame::Hint(Hint::PaymentArrives(OrderId::MAX, UnixMillis(-1))),
            Frame::Ping(5),
            Frame::Pong(5),
        ]
    }

    fn bytes_of(frame: &Frame) -> BytesMut {
        let mut bytes = BytesMut::new();
        frame.put(&mut bytes);
        bytes
    }

    #[test]
    fn every_frame_is_read_as_it_was_written_however_its_bytes_arrive() {
        let mut wire = BytesMut::new();
        samples().iter().for_each(|frame| frame.put(&mut wire));
        for step in [1, 2, 3, 7, wire.len()] {
            let (mut reader, mut input) = (FrameReader::new(FRAME_BYTES_MAX), BytesMut::new());
            let mut read = Vec::new();
            for part in wire.chunks(step) {
                input.extend_from_slice(part);
                while let Some(frame) = reader.next(&mut input).unwrap() {
                    read.push(frame);
                }
            }
            assert_eq!(read, samples(), "{step} bytes at a time");
            assert!(input.is_empty());
        }
    }

    #[test]
    fn a_frame_that_is_cut_short_or_goes_on_is_refused() {
        for frame in samples() {
            let whole = bytes_of(&frame).split_off(LENGTH_BYTES).freeze();
            // The last field of these two is whatever is left.
            let open = matches!(frame, Frame::Call(_) | Frame::Answer(..));
            let least = match &frame {
                Frame::Call(call) => whole.len() - call.body.len(),
                Frame::Answer(_, answer) => whole.len() - answer.body.len(),
                _ => whole.len(),
            };
            for length in 0..least {
                let cut = decode(whole.slice(..length));
                assert_eq!(cut, Err(FrameError::Malformed), "{frame:?} at {length}");
            }
            let longer = decode([&whole[..], b"x"].concat().into());
            assert_eq!(longer.is_ok(), open, "{frame:?}");
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_come() {
        let mut reader = FrameReader::new(GREETING_BYTES_MAX);
        let long = |bytes: usize| BytesMut::from(&(bytes as u32).to_be_bytes()[..]);
        let refused = reader.next(&mut long(GREETING_BYTES_MAX + 1));
        assert_eq!(refused, Err(FrameError::TooLong));
        assert_eq!(reader.next(&mut long(GREETING_BYTES_MAX)), Ok(None));
        let mut reader = FrameReader::new(GREETING_BYTES_MAX);
        reader.raise_limit();
        assert_eq!(reader.next(&mut long(FRAME_BYTES_MAX)), Ok(None));
        let mut reader = FrameReader::new(FRAME_BYTES_MAX);
        assert_eq!(
            reader.next(&mut long(u32::MAX as usize)),
            Err(FrameError::TooLong)
        );
    }

    #[test]
    fn an_answer_cannot_carry_a_line_of_its_own() {
        let read = |status: u16, fields: &[u8]| {
            let mut bytes = BytesMut::new();
            put_answer(1, status, fields, b"", &mut bytes);
            decode(bytes.split_off(LENGTH_BYTES).freeze()).is_ok()
        };
        assert!(read(200, b"A: b\r\n"));
        assert!(read(200, b"A: b\r\nC:\r\n"));
        for bad in [
            &b"A: b"[..],
            b"A: b\r\n\r\n",
            b"\r\n",
            b"A: b\n",
            b"A: b\nC: d\r\n",
            b"A: b\r\r\n",
            b"no colon\r\n",
            b": no name\r\n",
            b"A: \xff\r\n",
            b"A: b\r\n\r\nHTTP/1.1 200 OK\r\n",
        ] {
            assert!(!read(200, bad), "{:?}", String::from_utf8_lossy(bad));
        }
        for status in [0, 100, 199, 600, u16::MAX] {
            assert!(!read(status, b""), "{status}");
        }
    }

    #[test]
    fn a_call_says_beforehand_how_long_it_is_and_whether_it_fits() {
        let headers: [(&str, &[u8]); 2] = [("prefer", b"wait=1"), ("idempotency-key", b"k")];
        let parts = CallParts {
            wait: Duration::from_secs(u64::MAX),
            has_own_keys: false,
            method: "GET",
            target: "/v1/orders/1?wait=3",
            headers: &headers,
            body: b"",
        };
        let mut bytes = BytesMut::new();
        parts.put(4, &mut bytes);
        assert_eq!(bytes.len(), parts.frame_bytes());
        let read = decode(bytes.split_off(LENGTH_BYTES).freeze());
        let Ok(Frame::Call(call)) = read else {
            panic!("{read:?}");
        };
        assert_eq!(call.wait, Duration::from_millis(u64::from(u32::MAX)));
        assert!(parts.fits());
        let long = vec![b'x'; FRAME_BYTES_MAX];
        let many: Vec<(&str, &[u8])> = (0..=HEADERS_MAX).map(|_| ("a", &b"b"[..])).collect();
        for unfit in [
            CallParts {
                body: &long,
                ..parts
            },
            CallParts {
                headers: &many,
                ..parts
            },
            CallParts {
                method: "PUT",
                ..parts
            },
            CallParts {
                headers: &[("a", &long[..65_536])],
                ..parts
            },
        ] {
            assert!(!unfit.fits());
        }
    }
}
