//! A plain HTTP/1.1 client: one request a connection or many, the answer as it came.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// An answer with its parts.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The fields, names in lower case.
    pub fields: HashMap<String, String>,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON; null where it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The `code` of a problem.
    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }

    /// A field's value.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }
}

/// Sends one request and reads its answer; panics where none comes within 30 s.
pub fn call(
    address: SocketAddr,
    method: &str,
    target: &str,
    fields: &[(&str, &str)],
    body: &str,
) -> Answer {
    try_call(address, method, target, fields, body)
        .unwrap_or_else(|e| panic!("{method} {target}: {e}"))
}

/// The same, for servers that may be gone.
pub fn try_call(
    address: SocketAddr,
    method: &str,
    target: &str,
    fields: &[(&str, &str)],
    body: &str,
) -> std::io::Result<Answer> {
    let mut connection = Connection::open(address)?;
    let mut all = vec![("Connection", "close")];
    all.extend_from_slice(fields);
    // The stock engine keeps the connection open: what was promised is enough.
    connection.send(method, target, &all, body)
}

/// A connection that is kept for many requests, one after the other.
pub struct Connection {
    address: SocketAddr,
    stream: TcpStream,
    /// What came and was not taken yet.
    bytes: Vec<u8>,
}

impl Connection {
    /// Connects; a request on it gets its answer within 30 s or none.
    pub fn open(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            address,
            stream,
            bytes: Vec::new(),
        })
    }

    /// Gives each answer this long from now on.
    pub fn set_patience(&self, patience: Duration) -> std::io::Result<()> {
        self.stream.set_read_timeout(Some(patience))
    }

    /// Sends one request and reads its answer. After an error the connection is of no more use.
    pub fn send(
        &mut self,
        method: &str,
        target: &str,
        fields: &[(&str, &str)],
        body: &str,
    ) -> std::io::Result<Answer> {
        self.begin(method, target, fields, body)?;
        self.answer()
    }

    /// Sends one request, for [`Connection::answer`] to read its answer.
    pub fn begin(
        &mut self,
        method: &str,
        target: &str,
        fields: &[(&str, &str)],
        body: &str,
    ) -> std::io::Result<()> {
        let address = self.address;
        let mut request = format!("{method} {target} HTTP/1.1\r\n");
        if !fields.iter().any(|(name, _)| *name == "Host") {
            request.push_str(&format!("Host: {address}\r\n"));
        }
        for (name, value) in fields {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        self.stream.write_all(request.as_bytes())
    }

    /// Reads the answer to the oldest request that has none yet.
    pub fn answer(&mut self) -> std::io::Result<Answer> {
        let mut chunk = [0; 4096];
        loop {
            if let Some((answer, length)) = parse(&self.bytes) {
                self.bytes.drain(..length);
                return Ok(answer);
            }
            let read = match self.stream.read(&mut chunk) {
                // A profile of the test's own process interrupts reads that have a timeout.
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                read => read?,
            };
            match read {
                0 => {
                    return Err(std::io::Error::other(
                        "closed before the answer was complete",
                    ));
                }
                count => self.bytes.extend_from_slice(&chunk[..count]),
            }
        }
    }
}

/// The answer at the beginning of `bytes`, once it is whole, and its length.
fn parse(bytes: &[u8]) -> Option<(Answer, usize)> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let fields: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = fields
        .get("content-length")
        .map_or(Some(0), |text| text.parse().ok())?;
    let whole = end + 4 + length;
    let body = bytes.get(end + 4..whole)?.to_vec();
    let answer = Answer {
        status,
        fields,
        body,
    };
    Some((answer, whole))
}
