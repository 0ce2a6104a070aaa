//! One kept-alive HTTP/1.1 connection: writes a request, reads its answer.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;

use mio::event::Event;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::Fault;

/// The longest answer that is read. Millrace's have some hundred bytes, those to a batch some hundred
/// kilobytes.
const ANSWER_BYTES_MAX: usize = 8 << 20;
/// Fields of an answer.
const FIELDS_MAX: usize = 64;

/// An answer.
#[derive(Debug, Clone, Copy)]
pub struct Reply<'a> {
    /// The status line's code.
    pub status: u16,
    /// The body, whole.
    pub body: &'a [u8],
    fields: &'a [httparse::Header<'a>],
}

impl Reply<'_> {
    /// The value of the first field of this name.
    pub fn field(&self, name: &str) -> Option<&[u8]> {
        let mut fields = self.fields.iter();
        let field = fields.find(|field| field.name.eq_ignore_ascii_case(name))?;
        Some(field.value)
    }
}

/// The state of a connection's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Under way; or there is none.
    Wait,
    /// Answered.
    Answered,
    /// Not a byte of it was taken, because the server had closed the idle connection. Another connection may
    /// carry it.
    Unsent,
    /// There will be no answer.
    Failed(Fault),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Connecting,
    Open,
}

/// A connection, with its request.
pub(super) struct Connection {
    token: Token,
    /// Place of its server among the addresses.
    home: usize,
    /// Servers that could not be reached for this request.
    unreachable: usize,
    state: State,
    stream: Option<TcpStream>,
    /// Whether an answer has come on it: only then the server may have closed it while it was idle.
    is_used: bool,
    /// Whether a request is under way.
    is_busy: bool,
    /// Requests so far.
    turn: u64,
    request: Vec<u8>,
    written: usize,
    /// The beginning of an answer that did not come at once.
    answer: Vec<u8>,
}

impl Connection {
    pub(super) fn new(number: usize) -> Self {
        Self {
            token: Token(number),
            home: number,
            unreachable: 0,
            state: State::Closed,
            stream: None,
            is_used: false,
            is_busy: false,
            turn: 0,
            request: Vec::new(),
            written: 0,
            answer: Vec::new(),
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    pub(super) fn is_connecting(&self) -> bool {
        self.state == State::Connecting
    }

    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Tells this request from earlier ones on the same connection.
    pub(super) fn turn(&self) -> u64 {
        self.turn
    }

    /// Where the next request is to be written.
    pub(super) fn next_request(&mut self) -> &mut Vec<u8> {
        self.request.clear();
        &mut self.request
    }

    /// The request is written, and about to be sent. Returns its turn.
    pub(super) fn begin(&mut self) -> u64 {
        self.turn += 1;
        self.unreachable = 0;
        self.is_busy = true;
        self.turn
    }

    /// Sends the request, on a new connection if there is none.
    pub(super) fn send(&mut self, addresses: &[SocketAddr], registry: &Registry) -> Step {
        self.written = 0;
        self.answer.clear();
        match self.state {
            State::Open => match self.write() {
                Step::Unsent => {
                    self.open(addresses, registry);
                    self.connecting()
                }
                step => step,
            },
            State::Connecting => Step::Wait,
            State::Closed => {
                self.open(addresses, registry);
                self.connecting()
            }
        }
    }

    fn connecting(&self) -> Step {
        match self.state {
            State::Closed => Step::Failed(Fault::Connect),
            State::Connecting | State::Open => Step::Wait,
        }
    }

    /// Goes to the next of so many servers, none of which has got a byte of its request. False: it has tried all of
    /// them. The connections of a server that is gone spread over the others.
    pub(super) fn go_elsewhere(&mut self, servers: usize) -> bool {
        self.unreachable += 1;
        if self.unreachable >= servers {
            return false;
        }
        self.disconnect();
        self.home += match (self.token.0 / servers).is_multiple_of(2) {
            true => 1,
            false => servers - 1,
        };
        true
    }

    /// Begins to connect; an event tells when that is done.
    pub(super) fn open(&mut self, addresses: &[SocketAddr], registry: &Registry) {
        self.disconnect();
        let Some(address) = addresses.get(self.home % addresses.len().max(1)) else {
            return;
        };
        let interest = Interest::READABLE | Interest::WRITABLE;
        let opened = TcpStream::connect(*address).and_then(|mut stream| {
            registry.register(&mut stream, self.token, interest)?;
            Ok(stream)
        });
        if let Ok(stream) = opened {
            self.stream = Some(stream);
            self.state = State::Connecting;
        }
    }

    /// Closes it, and forgets its request.
    pub(super) fn close(&mut self) {
        self.is_busy = false;
        self.disconnect();
    }

    fn disconnect(&mut self) {
        self.stream = None;
        self.state = State::Closed;
        self.is_used = false;
        self.answer.clear();
    }

    /// Goes on after an event; `take` gets the answer if it is complete.
    pub(super) fn advance(
        &mut self,
        event: &Event,
        scratch: &mut [u8],
        take: impl FnOnce(Reply<'_>),
    ) -> Step {
        match self.state {
            // An event of the connection before.
            State::Closed => return Step::Wait,
            State::Connecting => match self.is_connected() {
                Ok(false) => return Step::Wait,
                Ok(true) => self.state = State::Open,
                Err(_) if self.is_busy => return Step::Failed(Fault::Connect),
                Err(_) => {
                    self.disconnect();
                    return Step::Wait;
                }
            },
            State::Open => {}
        }
        if self.is_busy && self.written < self.request.len() {
            match self.write() {
                Step::Wait => {}
                step => return step,
            }
        }
        let closed = event.is_read_closed() || event.is_error();
        self.read(scratch, closed, take)
    }

    fn is_connected(&self) -> io::Result<bool> {
        let Some(stream) = &self.stream else {
            return Ok(false);
        };
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        match stream.peer_addr() {
            Ok(_) => {
                stream.set_nodelay(true)?;
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::NotConnected => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn write(&mut self) -> Step {
        let Some(stream) = &mut self.stream else {
            return Step::Failed(Fault::Closed);
        };
        while let Some(rest) = self
            .request
            .get(self.written..)
            .filter(|rest| !rest.is_empty())
        {
            match stream.write(rest) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) if self.is_used && self.written == 0 => {
                    self.disconnect();
                    return Step::Unsent;
                }
                Err(_) => return Step::Failed(Fault::Closed),
            }
        }
        Step::Wait
    }

    /// Reads until the answer is complete or there is no more.
    fn read(&mut self, scratch: &mut [u8], closed: bool, take: impl FnOnce(Reply<'_>)) -> Step {
        let mut take = Some(take);
        loop {
            let Some(stream) = &mut self.stream else {
                return Step::Wait;
            };
            let (count, is_over) = match stream.read(scratch) {
                Ok(0) => (0, true),
                Ok(count) => (count, false),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Step::Wait,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => (0, true),
            };
            if !self.is_busy {
                // Closed while it was idle, or a byte that nobody asked for.
                self.disconnect();
                return Step::Wait;
            }
            if is_over && self.is_used && self.written == 0 {
                self.disconnect();
                return Step::Unsent;
            }
            // Nearly every answer comes at once, and is parsed where it was read.
            let bytes = if self.answer.is_empty() {
                &scratch[..count]
            } else {
                self.answer.extend_from_slice(&scratch[..count]);
                &self.answer
            };
            let Some(give) = take.take() else {
                return Step::Wait;
            };
            match parse(bytes, is_over, give) {
                Err(fault) => return Step::Failed(fault),
                Ok(Parsed::Complete { keep_alive }) => {
                    self.answer.clear();
                    self.is_busy = false;
                    self.is_used = true;
                    if !keep_alive || closed || is_over {
                        self.disconnect();
                    }
                    return Step::Answered;
                }
                Ok(Parsed::Incomplete(given_back)) => {
                    take = Some(given_back);
                    if is_over {
                        return Step::Failed(Fault::Closed);
                    }
                    if self.answer.is_empty() {
                        self.answer.extend_from_slice(&scratch[..count]);
                    }
                    if self.answer.len() > ANSWER_BYTES_MAX {
                        return Step::Failed(Fault::BadAnswer);
                    }
                    // Less than fits: there is no more, and an event tells when there is. The end of the
                    // connection has been told already.
                    if count < scratch.len() && !closed {
                        return Step::Wait;
                    }
                }
            }
        }
    }
}

enum Parsed<F> {
    /// More bytes are needed.
    Incomplete(F),
    Complete {
        /// Whether the connection may carry another request.
        keep_alive: bool,
    },
}

/// Reads the answer at the beginning of `bytes`, after which nothing may come; `is_over`: the connection
/// has ended behind them.
fn parse<F: FnOnce(Reply<'_>)>(
    mut bytes: &[u8],
    is_over: bool,
    take: F,
) -> Result<Parsed<F>, Fault> {
    loop {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut head = httparse::Response::new(&mut fields);
        let length = match head.parse(bytes) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Ok(Parsed::Incomplete(take)),
            Err(_) => return Err(Fault::BadAnswer),
        };
        let (status, version) = (head.code.unwrap_or(0), head.version);
        let body = bytes.get(length..).unwrap_or_default();
        // An interim answer, such as `100 Continue`.
        if (100..200).contains(&status) {
            bytes = body;
            continue;
        }
        let mut reply = Reply {
            status,
            body: &[],
            fields: head.headers,
        };
        let has = |name: &str, word: &[u8]| {
            let value = reply.field(name).unwrap_or_default();
            let mut words = value.split(|byte| *byte == b',');
            words.any(|one| one.trim_ascii().eq_ignore_ascii_case(word))
        };
        let keep_alive = version == Some(1) && !has("connection", b"close");
        let mut chunks = Vec::new();
        let (rest, is_delimited) = if status == 204 || status == 304 {
            (body, true)
        } else if has("transfer-encoding", b"chunked") {
            match dechunk(body, &mut chunks)? {
                Some(rest) => {
                    reply.body = &chunks;
                    (rest, true)
                }
                None => return Ok(Parsed::Incomplete(take)),
            }
        } else if let Some(length) = reply.field("content-length") {
            let length = std::str::from_utf8(length).ok();
            let length = length.and_then(|text| text.trim().parse::<usize>().ok());
            let length = length.ok_or(Fault::BadAnswer)?;
            let Some((whole, rest)) = body.split_at_checked(length) else {
                return Ok(Parsed::Incomplete(take));
            };
            reply.body = whole;
            (rest, true)
        } else if is_over {
            reply.body = body;
            (&[][..], false)
        } else {
            return Ok(Parsed::Incomplete(take));
        };
        // An answer to no request.
        if !rest.is_empty() {
            return Err(Fault::BadAnswer);
        }
        take(reply);
        return Ok(Parsed::Complete {
            keep_alive: keep_alive && is_delimited,
        });
    }
}

/// Joins the chunks of a body; returns the bytes after its end, or none if it has not ended.
fn dechunk<'a>(mut bytes: &'a [u8], body: &mut Vec<u8>) -> Result<Option<&'a [u8]>, Fault> {
    loop {
        let (start, size) = match httparse::parse_chunk_size(bytes) {
            Ok(httparse::Status::Complete(found)) => found,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(Fault::BadAnswer),
        };
        let size = usize::try_from(size).map_err(|_| Fault::BadAnswer)?;
        if size > ANSWER_BYTES_MAX {
            return Err(Fault::BadAnswer);
        }
        let rest = bytes.get(start..).unwrap_or_default();
        if size == 0 {
            // Trailer fields are read and left.
            let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
            return match httparse::parse_headers(rest, &mut fields) {
                Ok(httparse::Status::Complete((end, _))) => Ok(rest.get(end..)),
                Ok(httparse::Status::Partial) => Ok(None),
                Err(_) => Err(Fault::BadAnswer),
            };
        }
        let Some((chunk, rest)) = rest.split_at_checked(size) else {
            return Ok(None);
        };
        body.extend_from_slice(chunk);
        match rest {
            [b'\r', b'\n', after @ ..] => bytes = after,
            [] | [b'\r'] => return Ok(None),
            _ => return Err(Fault::BadAnswer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Status and body of the answer, and whether the connection may go on; none while it is incomplete.
    fn parsed(bytes: &[u8], is_over: bool) -> Result<Option<(u16, Vec<u8>, bool)>, Fault> {
        let mut found = None;
        let parsed = parse(bytes, is_over, |reply: Reply<'_>| {
            found = Some((reply.status, reply.body.to_vec()));
        })?;
        Ok(match parsed {
            Parsed::Incomplete(_) => None,
            Parsed::Complete { keep_alive } => {
                let (status, body) = found.expect("it was given");
                Some((status, body, keep_alive))
            }
        })
    }

    #[test]
    fn an_answer_is_whole_at_its_last_byte_and_not_before() {
        for (answer, body) in [
            (&b"HTTP/1.1 201 Created\r\ncontent-length: 5\r\n\r\nhello"[..], "hello"),
            (b"HTTP/1.1 204 No Content\r\n\r\n", ""),
            (
                b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
                "ok",
            ),
            (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nA: b\r\n\r\n",
                "hello",
            ),
        ] {
            for end in 0..answer.len() {
                assert_eq!(parsed(&answer[..end], false), Ok(None), "{end}");
            }
            let (_, found, keep_alive) = parsed(answer, false).unwrap().unwrap();
            assert_eq!(found, body.as_bytes());
            assert!(keep_alive);
            let longer = [answer, b"x"].concat();
            assert_eq!(parsed(&longer, false), Err(Fault::BadAnswer));
        }
    }

    #[test]
    fn a_server_that_closes_says_so_or_ends_the_body_by_it() {
        let told =
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive, Close\r\n\r\nok";
        assert_eq!(parsed(told, false), Ok(Some((200, b"ok".to_vec(), false))));
        let old = b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok";
        assert_eq!(parsed(old, false), Ok(Some((200, b"ok".to_vec(), false))));
        let until_close = b"HTTP/1.1 200 OK\r\n\r\nok";
        assert_eq!(parsed(until_close, false), Ok(None));
        assert_eq!(
            parsed(until_close, true),
            Ok(Some((200, b"ok".to_vec(), false)))
        );
    }

    #[test]
    fn an_answer_that_is_none_is_refused() {
        for bytes in [
            &b"SSH-2.0-OpenSSH\r\n"[..],
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        ] {
            assert_eq!(parsed(bytes, false), Err(Fault::BadAnswer));
        }
    }
}
