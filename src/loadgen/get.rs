//! A client for the few GET requests beside the load.

use std::io::{self, ErrorKind};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::HeaderMap;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::sender::Fault;

/// The longest answer that is read; Millrace's have some hundred bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// One kept-alive connection; it is made when it is needed.
pub(super) struct GetClient {
    /// `host:port` of servers that answer alike.
    addresses: Vec<String>,
    /// The one of them that was reached last.
    at: usize,
    headers: HeaderMap,
    timeout: Duration,
    connection: Option<SendRequest<Empty<Bytes>>>,
}

/// An answer.
pub(super) struct Got {
    pub status: StatusCode,
    pub body: Bytes,
}

impl GetClient {
    pub(super) fn new(addresses: &[String], headers: HeaderMap, timeout: Duration) -> Self {
        Self {
            addresses: addresses.to_vec(),
            at: 0,
            headers,
            timeout,
            connection: None,
        }
    }

    /// Connects if there is no open connection.
    pub(super) async fn connect(&mut self) -> io::Result<()> {
        self.connection = Some(self.take_or_connect().await?);
        Ok(())
    }

    /// `GET path`; a GET is safe, so one that failed is sent once more.
    pub(super) async fn get(&mut self, path: &str) -> Result<Got, Fault> {
        let uri: Uri = path.parse().map_err(|_| Fault::BadAnswer)?;
        let mut last = Fault::Connect;
        for _ in 0..2 {
            // Taken while in use: a call that is dropped half-way takes the connection, with the answer
            // still to come on it, along.
            let taken = self.take_or_connect().await;
            let mut connection = taken.map_err(|_| Fault::Connect)?;
            let mut request = Request::new(Empty::new());
            *request.uri_mut() = uri.clone();
            request.headers_mut().clone_from(&self.headers);
            match tokio::time::timeout(self.timeout, exchange(&mut connection, request)).await {
                Ok(Ok(got)) => {
                    self.connection = Some(connection);
                    return Ok(got);
                }
                Ok(Err(fault)) => last = fault,
                Err(_) => return Err(Fault::Timeout),
            }
        }
        Err(last)
    }

    async fn take_or_connect(&mut self) -> io::Result<SendRequest<Empty<Bytes>>> {
        if let Some(open) = self.connection.take().filter(|open| !open.is_closed()) {
            return Ok(open);
        }
        let mut failed = io::Error::from(ErrorKind::AddrNotAvailable);
        for _ in 0..self.addresses.len() {
            let address = &self.addresses[self.at % self.addresses.len()];
            let opened = tokio::time::timeout(self.timeout, open(address)).await;
            match opened.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
                Ok(open) => return Ok(open),
                Err(error) => failed = error,
            }
            self.at += 1;
        }
        Err(failed)
    }
}

async fn open(address: &str) -> io::Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(io::Error::other)?;
    // It ends with its sender, or with the server's connection.
    tokio::spawn(connection);
    Ok(sender)
}

async fn exchange(
    connection: &mut SendRequest<Empty<Bytes>>,
    request: Request<Empty<Bytes>>,
) -> Result<Got, Fault> {
    let answer = connection.send_request(request).await.map_err(|e| {
        if e.is_parse() {
            Fault::BadAnswer
        } else {
            Fault::Closed
        }
    })?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX);
    let body = body.collect().await.map_err(|_| Fault::Closed)?;
    Ok(Got {
        status,
        body: body.to_bytes(),
    })
}
