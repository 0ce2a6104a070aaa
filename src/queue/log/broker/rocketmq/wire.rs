//! The remoting protocol: requests and answers over one TCP connection, one at a time.
//!
//! ```text
//! total length (4) | serialisation (1), header length (3) | header | body
//! ```
//! Lengths are big endian; the first one does not count itself. Requests have JSON headers; answers may also
//! have RocketMQ's own binary header, which a broker can be set to prefer. Nothing that a length says is
//! trusted: every decoder here returns an error for bytes that it does not understand, and none panics.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use base64::Engine;
use serde::{Deserialize, Serialize};

/// Greatest length of an answer in bytes, the limit of RocketMQ's own clients.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bit of `flag` that marks an answer.
const ANSWER: i64 = 1;
/// Version of the protocol that requests name: 4.9.4, from which on name servers answer in standard JSON.
const VERSION: u32 = 401;

/// The names and values of a request's header, in the order in which they are signed.
pub(super) type Fields = BTreeMap<&'static str, String>;

/// The key of an access list, and the secret that signs requests.
#[derive(Clone)]
pub(super) struct Credentials {
    access_key: String,
    secret: ring::hmac::Key,
}

impl Credentials {
    /// Credentials of these two.
    pub(super) fn new(access_key: &str, secret_key: &str) -> Self {
        Self {
            access_key: access_key.to_owned(),
            secret: ring::hmac::Key::new(
                ring::hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
                secret_key.as_bytes(),
            ),
        }
    }

    /// Adds the access key and the signature over all values, in the order of their names, and the body.
    fn sign(&self, fields: &mut Fields, body: &[u8]) {
        fields.insert("AccessKey", self.access_key.clone());
        let mut context = ring::hmac::Context::with_key(&self.secret);
        for value in fields.values() {
            context.update(value.as_bytes());
        }
        context.update(body);
        let signature = base64::engine::general_purpose::STANDARD.encode(context.sign());
        fields.insert("Signature", signature);
    }
}

/// A server's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// The response code.
    pub(super) code: i64,
    /// The server's own words.
    pub(super) remark: String,
    /// Names and values of the header.
    pub(super) fields: BTreeMap<String, String>,
    /// The bytes behind the header.
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// The number that a field holds.
    pub(super) fn number(&self, field: &str) -> Option<i64> {
        self.fields.get(field)?.parse().ok()
    }
}

/// Reasons why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CallError {
    /// No byte of the request has left.
    NotSent(String),
    /// Some of it has left, so the server may have carried it out.
    NoAnswer(String),
}

impl CallError {
    /// The reason.
    pub(super) fn into_reason(self) -> String {
        match self {
            Self::NotSent(reason) | Self::NoAnswer(reason) => reason,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RequestHeader<'a> {
    code: u16,
    language: &'static str,
    version: u32,
    opaque: u32,
    flag: u32,
    ext_fields: &'a Fields,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnswerHeader {
    code: i64,
    #[serde(default)]
    flag: i64,
    opaque: i64,
    remark: Option<String>,
    ext_fields: Option<BTreeMap<String, Option<String>>>,
}

/// The bytes of a request.
fn encode(
    code: u16,
    opaque: u32,
    mut fields: Fields,
    body: &[u8],
    credentials: Option<&Credentials>,
) -> Result<Vec<u8>, String> {
    if let Some(credentials) = credentials {
        credentials.sign(&mut fields, body);
    }
    let header = RequestHeader {
        code,
        language: "OTHER",
        version: VERSION,
        opaque,
        flag: 0,
        ext_fields: &fields,
    };
    let header = serde_json::to_vec(&header).map_err(|error| error.to_string())?;
    let total = u32::try_from(4 + header.len() + body.len())
        .map_err(|_| "the request is too long".to_owned())?;
    if header.len() > 0x00FF_FFFF {
        return Err("the request's header is too long".to_owned());
    }
    let mut bytes = Vec::with_capacity(8 + header.len() + body.len());
    bytes.extend_from_slice(&total.to_be_bytes());
    // Serialisation 0 is JSON, so the upper byte of the header's length stays 0.
    bytes.extend_from_slice(&(header.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&header);
    bytes.extend_from_slice(body);
    Ok(bytes)
}

/// A frame behind its total length: the number of the request that it answers (`None`: it is no answer), and
/// the answer.
pub(super) fn decode(frame: &[u8]) -> Result<(Option<i64>, Answer), &'static str> {
    let (length, rest) = frame
        .split_first_chunk::<4>()
        .ok_or("an answer without a header")?;
    let length = u32::from_be_bytes(*length);
    let (serialisation, length) = (length >> 24, (length & 0x00FF_FFFF) as usize);
    let (header, body) = rest
        .split_at_checked(length)
        .ok_or("an answer whose header is longer than itself")?;
    let header = match serialisation {
        0 => serde_json::from_slice(header).map_err(|_| "an answer whose header is no JSON")?,
        1 => binary_header(header).ok_or("an answer whose binary header cannot be read")?,
        _ => return Err("an answer in an unknown serialisation"),
    };
    let AnswerHeader {
        code,
        flag,
        opaque,
        remark,
        ext_fields,
    } = header;
    let fields = ext_fields
        .unwrap_or_default()
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect();
    let answer = Answer {
        code,
        remark: remark.unwrap_or_default(),
        fields,
        body: body.to_vec(),
    };
    Ok(((flag & ANSWER != 0).then_some(opaque), answer))
}

/// RocketMQ's own header: code, language, version, number, flag, remark, fields.
fn binary_header(bytes: &[u8]) -> Option<AnswerHeader> {
    let mut bytes = Bytes(bytes);
    let code = i64::from(i16::from_be_bytes(bytes.array()?));
    bytes.take(1 + 2)?;
    let opaque = i64::from(i32::from_be_bytes(bytes.array()?));
    let flag = i64::from(i32::from_be_bytes(bytes.array()?));
    let remark = bytes.text32()?;
    let length = usize::try_from(i32::from_be_bytes(bytes.array()?)).ok()?;
    let mut fields = Bytes(bytes.take(length)?);
    let mut ext_fields = BTreeMap::new();
    while !fields.0.is_empty() {
        let length = usize::from(u16::from_be_bytes(fields.array()?));
        let name = String::from_utf8(fields.take(length)?.to_vec()).ok()?;
        ext_fields.insert(name, Some(fields.text32()?));
    }
    Some(AnswerHeader {
        code,
        flag,
        opaque,
        remark: Some(remark),
        ext_fields: Some(ext_fields),
    })
}

/// Bytes that are read from the front, within their bounds.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl<'a> Bytes<'a> {
    /// The next `length` bytes.
    pub(super) fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    /// Text behind its length of four bytes.
    fn text32(&mut self) -> Option<String> {
        let length = usize::try_from(i32::from_be_bytes(self.array()?)).ok()?;
        String::from_utf8(self.take(length)?.to_vec()).ok()
    }
}

/// The time until `deadline`, or `None` if it has passed.
fn left(deadline: Instant) -> Option<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
}

/// One connection to a name server or broker.
pub(super) struct Connection {
    stream: TcpStream,
    address: String,
    credentials: Option<Credentials>,
    opaque: u32,
    /// An answer is owed, or was read in part.
    is_broken: bool,
}

impl Connection {
    /// Connects to `address` (`host:port`).
    ///
    /// # Errors
    /// The reason why it cannot be reached.
    pub(super) fn open(
        address: &str,
        credentials: Option<Credentials>,
        deadline: Instant,
    ) -> Result<Self, String> {
        let addresses = address
            .to_socket_addrs()
            .map_err(|error| format!("{address}: {error}"))?;
        let mut reason = format!("{address}: the name has no address");
        for socket_address in addresses {
            let Some(left) = left(deadline) else {
                return Err(format!("{address}: no connection in time"));
            };
            match TcpStream::connect_timeout(&socket_address, left) {
                Ok(stream) => {
                    stream
                        .set_nodelay(true)
                        .map_err(|error| format!("{address}: {error}"))?;
                    return Ok(Self {
                        stream,
                        address: address.to_owned(),
                        credentials,
                        opaque: 0,
                        is_broken: false,
                    });
                }
                Err(error) => reason = format!("{address}: {error}"),
            }
        }
        Err(reason)
    }

    /// Whether it is still open, every request on it was answered, and nothing is in it that nobody asked for.
    pub(super) fn is_open(&self) -> bool {
        if self.is_broken {
            return false;
        }
        let peeked = self
            .stream
            .set_nonblocking(true)
            .and_then(|()| self.stream.peek(&mut [0]));
        let silent = matches!(peeked, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        self.stream.set_nonblocking(false).is_ok() && silent
    }

    /// Sends one request and waits for its answer. After an error the connection is no longer open.
    ///
    /// # Errors
    /// [`CallError`].
    pub(super) fn call(
        &mut self,
        code: u16,
        fields: Fields,
        body: &[u8],
        deadline: Instant,
    ) -> Result<Answer, CallError> {
        self.opaque = self.opaque.wrapping_add(1) & 0x7FFF_FFFF;
        let request = encode(code, self.opaque, fields, body, self.credentials.as_ref())
            .map_err(CallError::NotSent)?;
        self.is_broken = true;
        self.write(&request, deadline)?;
        loop {
            let frame = self.read(deadline).map_err(CallError::NoAnswer)?;
            let (answered, answer) = decode(&frame)
                .map_err(|reason| CallError::NoAnswer(format!("{}: {reason}", self.address)))?;
            // Brokers may send requests of their own, such as notices to consumers.
            if answered == Some(i64::from(self.opaque)) {
                self.is_broken = false;
                return Ok(answer);
            }
        }
    }

    fn write(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), CallError> {
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            let attempt = match left(deadline) {
                Some(left) => self
                    .stream
                    .set_write_timeout(Some(left))
                    .and_then(|()| self.stream.write(rest)),
                None => Err(std::io::ErrorKind::TimedOut.into()),
            };
            match attempt {
                Ok(count) if count > 0 => written += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                failed => {
                    let reason = format!(
                        "{}: {}",
                        self.address,
                        failed.err().map_or("closed".to_owned(), reason)
                    );
                    return Err(if written == 0 {
                        CallError::NotSent(reason)
                    } else {
                        CallError::NoAnswer(reason)
                    });
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, deadline: Instant) -> Result<Vec<u8>, String> {
        let mut length = [0; 4];
        self.fill(&mut length, deadline)?;
        let length = u32::from_be_bytes(length) as usize;
        if length > ANSWER_BYTES_MAX {
            return Err(format!(
                "{}: an answer of {length} bytes, which is no answer of RocketMQ's",
                self.address
            ));
        }
        let mut frame = vec![0; length];
        self.fill(&mut frame, deadline)?;
        Ok(frame)
    }

    fn fill(&mut self, bytes: &mut [u8], deadline: Instant) -> Result<(), String> {
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let attempt = match left(deadline) {
                Some(left) => self
                    .stream
                    .set_read_timeout(Some(left))
                    .and_then(|()| self.stream.read(rest)),
                None => Err(std::io::ErrorKind::TimedOut.into()),
            };
            match attempt {
                Ok(0) => return Err(format!("{}: the connection was closed", self.address)),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("{}: {}", self.address, reason(error))),
            }
        }
        Ok(())
    }
}

/// Words for an error; a time limit of a socket is "would block" to the system.
fn reason(error: std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            "no answer in time".to_owned()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(serialisation: u8, header: &[u8], body: &[u8]) -> Vec<u8> {
        let mut frame = ((u32::from(serialisation) << 24) | header.len() as u32)
            .to_be_bytes()
            .to_vec();
        frame.extend_from_slice(header);
        frame.extend_from_slice(body);
        frame
    }

    #[test]
    fn a_json_answer_is_read() {
        let header = br#"{"code":0,"extFields":{"queueOffset":"7","x":null},"flag":1,"language":"JAVA","opaque":3,"serializeTypeCurrentRPC":"JSON","version":477}"#;
        let (answered, answer) = decode(&frame(0, header, b"body")).unwrap();
        assert_eq!(
            (answered, answer.number("queueOffset"), answer.number("x")),
            (Some(3), Some(7), None)
        );
        assert_eq!(
            (answer.code, answer.body.as_slice()),
            (0, b"body".as_slice())
        );
    }

    #[test]
    fn a_request_is_not_taken_for_an_answer() {
        assert_eq!(
            decode(&frame(0, br#"{"code":40,"flag":0,"opaque":3}"#, b""))
                .unwrap()
                .0,
            None
        );
    }

    #[test]
    fn a_binary_answer_is_read() {
        let mut header = vec![0, 14, 0, 1, 200];
        header.extend_from_slice(&9_i32.to_be_bytes());
        header.extend_from_slice(&1_i32.to_be_bytes());
        header.extend_from_slice(&[0, 0, 0, 4]);
        header.extend_from_slice(b"full");
        header.extend_from_slice(&[0, 0, 0, 8, 0, 1, b'k', 0, 0, 0, 1, b'5']);
        let (answered, answer) = decode(&frame(1, &header, b"")).unwrap();
        assert_eq!(
            (answered, answer.code, answer.remark.as_str()),
            (Some(9), 14, "full")
        );
        assert_eq!(answer.number("k"), Some(5));
    }

    #[test]
    fn the_signature_is_that_of_rfc_2202() {
        // Test case 2 of RFC 2202: the key "Jefe" over "what do ya want for nothing?".
        let credentials = Credentials::new("what ", "Jefe");
        let mut fields = Fields::from([("B", "do ya ".to_owned())]);
        credentials.sign(&mut fields, b"want for nothing?");
        assert_eq!(fields["Signature"], "7/zfauXrL6LSdBbV8YTfnCWafHk=");
    }

    proptest::proptest! {
        #[test]
        fn no_frame_makes_the_decoder_panic(
            serialisation in 0_u8..4, length in 0_u32..64, bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..256)
        ) {
            let _ = decode(&bytes);
            let _ = binary_header(&bytes);
            let mut framed = ((u32::from(serialisation) << 24) | length).to_be_bytes().to_vec();
            framed.extend_from_slice(&bytes);
            let _ = decode(&framed);
        }
    }
}
