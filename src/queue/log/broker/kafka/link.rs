//! A connection to one server: requests and their answers, one at a time, each within a deadline.

use std::{
    fmt,
    io::{self, ErrorKind, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use kafka_protocol::{
    messages::{
        ApiKey, ApiVersionsRequest, ApiVersionsResponse, CreatePartitionsRequest,
        CreatePartitionsResponse, CreateTopicsRequest, CreateTopicsResponse, DeleteRecordsRequest,
        DeleteRecordsResponse, DescribeConfigsRequest, DescribeConfigsResponse,
        DescribeLogDirsRequest, DescribeLogDirsResponse, FetchRequest, FetchResponse,
        ListOffsetsRequest, ListOffsetsResponse, MetadataRequest, MetadataResponse, ProduceRequest,
        ProduceResponse, RequestHeader, SaslAuthenticateRequest, SaslAuthenticateResponse,
        SaslHandshakeRequest, SaslHandshakeResponse,
    },
    protocol::{Decodable, Encodable, StrBytes},
};
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};

use super::{
    codes::{self, UNSUPPORTED_SASL_MECHANISM},
    sasl::{Mechanism, Sasl, Scram},
};

/// A request with the one version of it that is spoken. Each is the newest one without tagged fields that Kafka
/// 2.4 knows, and 4.x knows all of them still.
pub(super) trait Ask: Encodable {
    type Answer: Decodable;
    const KEY: ApiKey;
    const VERSION: i16;
}

macro_rules! asks {
    ($($request:ident => $answer:ident, $key:ident $version:literal;)*) => {
        $(impl Ask for $request {
            type Answer = $answer;
            const KEY: ApiKey = ApiKey::$key;
            const VERSION: i16 = $version;
        })*
        const ASKS: &[(ApiKey, i16)] = &[$((ApiKey::$key, $version)),*];
    };
}

asks! {
    ApiVersionsRequest => ApiVersionsResponse, ApiVersions 0;
    CreatePartitionsRequest => CreatePartitionsResponse, CreatePartitions 1;
    CreateTopicsRequest => CreateTopicsResponse, CreateTopics 4;
    DeleteRecordsRequest => DeleteRecordsResponse, DeleteRecords 1;
    DescribeConfigsRequest => DescribeConfigsResponse, DescribeConfigs 2;
    DescribeLogDirsRequest => DescribeLogDirsResponse, DescribeLogDirs 1;
    FetchRequest => FetchResponse, Fetch 11;
    ListOffsetsRequest => ListOffsetsResponse, ListOffsets 5;
    MetadataRequest => MetadataResponse, Metadata 8;
    ProduceRequest => ProduceResponse, Produce 8;
    SaslAuthenticateRequest => SaslAuthenticateResponse, SaslAuthenticate 1;
    SaslHandshakeRequest => SaslHandshakeResponse, SaslHandshake 1;
}

/// Longest answer that is believed. A fetch answers up to 64 MiB and one record batch.
const ANSWER_BYTES_MAX: usize = 128 << 20;

/// A connection that failed. It has to be dropped.
#[derive(Debug)]
pub(super) enum Fault {
    /// No byte of the request has left.
    Unsent(String),
    /// The request may have been read by the server.
    Broken(String),
    /// A person has to change something before a connection can be made.
    Refused(String),
}

/// Host and port of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Server {
    pub(super) host: String,
    pub(super) port: u16,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') {
            write!(f, "kafka [{host}]:{port}")
        } else {
            write!(f, "kafka {host}:{port}")
        }
    }
}

/// A socket whose every read and write ends at the deadline.
struct Timed {
    socket: TcpStream,
    deadline: Instant,
    written: u64,
}

impl Timed {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(ErrorKind::TimedOut.into())
        } else {
            Ok(left)
        }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left()?))?;
        self.socket.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(self.left()?))?;
        let count = self.socket.write(buffer)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Stream {
    Plain(Timed),
    Tls(Box<StreamOwned<ClientConnection, Timed>>),
}

impl Stream {
    fn timed(&mut self) -> &mut Timed {
        match self {
            Self::Plain(timed) => timed,
            Self::Tls(stream) => &mut stream.sock,
        }
    }

    fn exchange(&mut self, request: &[u8]) -> io::Result<Bytes> {
        match self {
            Self::Plain(stream) => exchange(stream, request),
            Self::Tls(stream) => exchange(stream.as_mut(), request),
        }
    }
}

pub(super) fn exchange(stream: &mut (impl Read + Write), request: &[u8]) -> io::Result<Bytes> {
    stream.write_all(request)?;
    stream.flush()?;
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = usize::try_from(i32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > ANSWER_BYTES_MAX {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "its answer is no answer of Kafka (does this listener want TLS?)",
        ));
    }
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer)?;
    Ok(answer.into())
}

/// A connection, ready for requests.
pub(super) struct Link {
    pub(super) server: Server,
    stream: Stream,
    correlation: i32,
    /// The server ends the session then.
    expires: Option<Instant>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Link").field(&self.server).finish()
    }
}

impl Link {
    /// Connects, and says who we are. Nothing but that has been sent if it fails.
    pub(super) fn open(
        server: &Server,
        tls: Option<&Arc<ClientConfig>>,
        sasl: Option<&Sasl>,
        deadline: Instant,
    ) -> Result<Self, Fault> {
        let socket = connect(server, deadline).map_err(|e| Fault::Unsent(told(server, &e)))?;
        let timed = Timed {
            socket,
            deadline,
            written: 0,
        };
        let stream = match tls {
            None => Stream::Plain(timed),
            Some(config) => Stream::Tls(Box::new(handshake(server, config, timed)?)),
        };
        let mut link = Self {
            server: server.clone(),
            stream,
            correlation: 0,
            expires: None,
        };
        link.versions(deadline)?;
        if let Some(sasl) = sasl {
            link.authenticate(sasl, deadline)
                .map_err(|fault| match fault {
                    Fault::Unsent(said) => Fault::Unsent(sasl.redact(said)),
                    Fault::Broken(said) => Fault::Broken(sasl.redact(said)),
                    Fault::Refused(said) => Fault::Refused(sasl.redact(said)),
                })?;
        }
        Ok(link)
    }

    /// Sends a request and waits for its answer.
    pub(super) fn call<Q: Ask>(
        &mut self,
        request: &Q,
        deadline: Instant,
    ) -> Result<Q::Answer, Fault> {
        self.correlation = self.correlation.wrapping_add(1);
        let header = RequestHeader::default()
            .with_request_api_key(Q::KEY as i16)
            .with_request_api_version(Q::VERSION)
            .with_correlation_id(self.correlation)
            .with_client_id(Some(StrBytes::from_static_str("millrace")));
        let mut message = BytesMut::zeroed(4);
        header
            .encode(&mut message, Q::KEY.request_header_version(Q::VERSION))
            .and_then(|()| request.encode(&mut message, Q::VERSION))
            .map_err(|e| Fault::Unsent(format!("the request cannot be encoded: {e}")))?;
        let length = u32::try_from(message.len() - 4)
            .map_err(|_| Fault::Unsent("the request is too long".to_owned()))?;
        message[..4].copy_from_slice(&length.to_be_bytes());

        let timed = self.stream.timed();
        timed.deadline = deadline;
        let written = timed.written;
        let answer = self.stream.exchange(&message);
        let mut answer = answer.map_err(|error| {
            let said = told(&self.server, &error);
            if self.stream.timed().written == written {
                Fault::Unsent(said)
            } else {
                Fault::Broken(said)
            }
        })?;
        let broken =
            |reason: &str| Fault::Broken(format!("{} answered nonsense: {reason}", self.server));
        let Some(number) = answer.first_chunk().map(|bytes| i32::from_be_bytes(*bytes)) else {
            return Err(broken("no number"));
        };
        if number != self.correlation {
            return Err(broken("the number of another request"));
        }
        let mut answer = answer.split_off(4);
        Q::Answer::decode(&mut answer, Q::VERSION).map_err(|e| broken(&e.to_string()))
    }

    /// Whether the connection is still open, as far as this side knows. Nothing is on its way between two
    /// requests, so bytes that have come are the server's farewell.
    pub(super) fn is_open(&mut self) -> bool {
        if self.expires.is_some_and(|end| end <= Instant::now()) {
            return false;
        }
        let socket = &self.stream.timed().socket;
        let silent = socket.set_nonblocking(true).and_then(|()| {
            let peeked = socket.peek(&mut [0]);
            socket.set_nonblocking(false).map(|()| peeked)
        });
        matches!(silent, Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock)
    }

    fn versions(&mut self, deadline: Instant) -> Result<(), Fault> {
        let answer = self.call(&ApiVersionsRequest::default(), deadline)?;
        if answer.error_code != 0 {
            return Err(Fault::Refused(codes::sentence(
                &self.server.to_string(),
                answer.error_code,
                None,
            )));
        }
        for (key, version) in ASKS {
            let known = answer.api_keys.iter().any(|api| {
                api.api_key == *key as i16 && (api.min_version..=api.max_version).contains(version)
            });
            if !known {
                return Err(Fault::Refused(format!(
                    "{} does not know {key:?} in version {version}; Kafka 2.4 or newer is needed",
                    self.server
                )));
            }
        }
        Ok(())
    }

    fn authenticate(&mut self, sasl: &Sasl, deadline: Instant) -> Result<(), Fault> {
        let name = sasl.mechanism.name();
        let request =
            SaslHandshakeRequest::default().with_mechanism(StrBytes::from_static_str(name));
        let answer = self.call(&request, deadline)?;
        if answer.error_code == UNSUPPORTED_SASL_MECHANISM {
            let offered: Vec<_> = answer
                .mechanisms
                .iter()
                .map(|offered| offered.as_str())
                .collect();
            return Err(Fault::Refused(format!(
                "{} does not take {name}; it offers {}",
                self.server,
                offered.join(", ")
            )));
        }
        if answer.error_code != 0 {
            return Err(Fault::Refused(codes::sentence(
                &self.server.to_string(),
                answer.error_code,
                None,
            )));
        }
        if sasl.mechanism == Mechanism::Plain {
            self.token(sasl.plain(), deadline)?;
            return Ok(());
        }
        let server = self.server.to_string();
        let foreign = |reason: String| Fault::Refused(format!("{server} fails {name}: {reason}"));
        let scram = Scram::new(sasl).map_err(foreign)?;
        let challenge = self.token(scram.first(), deadline)?;
        let (last, wanted) = scram.last(&challenge).map_err(foreign)?;
        if self.token(last, deadline)? != wanted {
            return Err(foreign("it does not know the password itself".to_owned()));
        }
        Ok(())
    }

    fn token(&mut self, token: Vec<u8>, deadline: Instant) -> Result<Bytes, Fault> {
        let request = SaslAuthenticateRequest::default().with_auth_bytes(token.into());
        let answer = self.call(&request, deadline)?;
        if answer.error_code != 0 {
            return Err(Fault::Refused(codes::sentence(
                &self.server.to_string(),
                answer.error_code,
                answer.error_message.as_deref(),
            )));
        }
        if let Ok(lifetime @ 1..) = u64::try_from(answer.session_lifetime_ms) {
            // A new connection is made in good time before the server would cut this one.
            self.expires = Instant::now().checked_add(Duration::from_millis(lifetime / 10 * 8));
        }
        Ok(answer.auth_bytes)
    }
}

fn told(server: &Server, error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => format!("{server} did not answer in time"),
        ErrorKind::UnexpectedEof => format!("{server} closed the connection"),
        _ => format!("{server}: {error}"),
    }
}

fn connect(server: &Server, deadline: Instant) -> io::Result<TcpStream> {
    let addresses: Vec<_> = (server.host.as_str(), server.port)
        .to_socket_addrs()?
        .collect();
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for (tried, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        if share.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(address, share) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn handshake(
    server: &Server,
    config: &Arc<ClientConfig>,
    mut timed: Timed,
) -> Result<StreamOwned<ClientConnection, Timed>, Fault> {
    let refused = |reason: String| Fault::Refused(format!("{server}: TLS failed: {reason}"));
    let name = ServerName::try_from(server.host.clone()).map_err(|e| refused(e.to_string()))?;
    let mut connection =
        ClientConnection::new(Arc::clone(config), name).map_err(|e| refused(e.to_string()))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut timed).map_err(|error| {
            let about_tls = error
                .get_ref()
                .is_some_and(|inner| inner.is::<rustls::Error>());
            if about_tls {
                refused(error.to_string())
            } else {
                Fault::Unsent(told(server, &error))
            }
        })?;
    }
    Ok(StreamOwned::new(connection, timed))
}
