//! One kept-alive HTTP/1.1 connection.

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HeaderMap;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::outcome::Fault;

/// The longest answer that is read; Millrace's are some hundred bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// After this much idleness a look at the socket comes before a request: servers close idle
/// connections, and a request written into a closed one fails for no fault of the server.
const IDLE_LOOK: Duration = Duration::from_millis(200);

type Driver = http1::Connection<TokioIo<TcpStream>, Full<Bytes>>;

/// A connection and the future that moves its bytes. Both run in the caller's task, which spares
/// two wake-ups a request.
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// None once the connection has ended.
    driver: Option<Pin<Box<Driver>>>,
    used_at: Instant,
}

/// The whole of an answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Why an exchange gave no answer.
#[derive(Debug)]
pub(super) enum ExchangeError {
    /// The server never saw the request, which is handed back to be sent elsewhere.
    Unsent(Box<Request<Full<Bytes>>>),
    /// It may have seen it.
    Failed(Fault),
}

impl Connection {
    /// Connects to `host:port`.
    pub(super) async fn connect(address: &str) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, driver) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(std::io::Error::other)?;
        Ok(Self {
            sender,
            driver: Some(Box::pin(driver)),
            used_at: Instant::now(),
        })
    }

    /// Sends a request and reads its whole answer. After an error the link is of no more use.
    pub(super) async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Reply, ExchangeError> {
        if self.used_at.elapsed() > IDLE_LOOK {
            self.look().await;
        }
        let Some(driver) = &mut self.driver else {
            return Err(ExchangeError::Unsent(Box::new(request)));
        };
        let sender = &mut self.sender;
        let work = async {
            let response = match sender.try_send_request(request).await {
                Ok(response) => response,
                Err(mut e) => {
                    return Err(match e.take_message() {
                        Some(request) => ExchangeError::Unsent(Box::new(request)),
                        None if e.error().is_parse() => ExchangeError::Failed(Fault::BadAnswer),
                        None => ExchangeError::Failed(Fault::Closed),
                    });
                }
            };
            let (head, body) = response.into_parts();
            let body = read_body(body).await?;
            Ok(Reply {
                status: head.status,
                headers: head.headers,
                body,
            })
        };
        tokio::pin!(work);
        tokio::select! {
            biased;
            result = &mut work => {
                self.used_at = Instant::now();
                return result;
            }
            _ = driver.as_mut() => {}
        }
        // The connection is over, but an answer that arrived before its end is still good. Without
        // the driver `work` cannot wait for more than what is already there.
        self.driver = None;
        work.await
    }

    /// Whether another request may be sent here.
    pub(super) fn is_open(&self) -> bool {
        self.driver.is_some() && !self.sender.is_closed()
    }

    /// Lets the driver notice that the server has closed an idle connection.
    async fn look(&mut self) {
        let ended = match &mut self.driver {
            None => true,
            Some(driver) => {
                std::future::poll_fn(|cx| Poll::Ready(driver.as_mut().poll(cx).is_ready())).await
            }
        };
        if ended {
            self.driver = None;
        }
    }
}

/// Sends a request over `link`, or over a new one where it is gone.
pub(super) async fn send(
    connection: &mut Option<Connection>,
    address: &str,
    mut request: Request<Full<Bytes>>,
) -> Result<Reply, Fault> {
    loop {
        let fresh = !connection.as_ref().is_some_and(Connection::is_open);
        if fresh {
            *connection = Some(
                Connection::connect(address)
                    .await
                    .map_err(|_| Fault::Connect)?,
            );
        }
        let Some(open) = connection.as_mut() else {
            return Err(Fault::Connect);
        };
        match open.exchange(request).await {
            Ok(reply) => return Ok(reply),
            // Never seen by the server: another connection may carry it, unless this one was
            // made for it, in which case the server hangs up on everybody.
            Err(ExchangeError::Unsent(unsent)) if !fresh => {
                *connection = None;
                request = *unsent;
            }
            Err(ExchangeError::Unsent(_)) => return Err(Fault::Closed),
            Err(ExchangeError::Failed(fault)) => return Err(fault),
        }
    }
}

/// A request with no body.
pub(super) fn get(path: &str, headers: HeaderMap) -> Result<Request<Full<Bytes>>, Fault> {
    let uri: Uri = path.parse().map_err(|_| Fault::BadAnswer)?;
    Ok(request(Method::GET, uri, headers, Bytes::new()))
}

/// A request with these parts.
pub(super) fn request(
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    request
}

/// Answers nearly always fit one frame, which is then taken as it is.
async fn read_body(mut body: Incoming) -> Result<Bytes, ExchangeError> {
    let mut first = Bytes::new();
    let mut more: Option<BytesMut> = None;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame
            .map_err(|_| ExchangeError::Failed(Fault::Closed))?
            .into_data()
        else {
            continue;
        };
        if first.is_empty() {
            first = data;
        } else {
            more.get_or_insert_with(|| BytesMut::from(first.as_ref()))
                .extend_from_slice(&data);
        }
        if more.as_ref().map_or(first.len(), BytesMut::len) > ANSWER_BYTES_MAX {
            return Err(ExchangeError::Failed(Fault::BadAnswer));
        }
    }
    Ok(more.map_or(first, BytesMut::freeze))
}

/// A client for the few requests beside the load: connects when it must, repeats what was not sent.
pub(super) struct Getter {
    address: String,
    headers: HeaderMap,
    timeout: Duration,
    connection: Option<Connection>,
}

impl Getter {
    pub(super) fn new(address: &str, headers: HeaderMap, timeout: Duration) -> Self {
        Self {
            address: address.to_owned(),
            headers,
            timeout,
            connection: None,
        }
    }

    /// Connects if there is no open connection.
    pub(super) async fn connect(&mut self) -> std::io::Result<()> {
        let connection = self.take_or_connect().await?;
        self.connection = Some(connection);
        Ok(())
    }

    /// `GET path`; a GET is safe, so one that failed on a kept connection is sent once more.
    pub(super) async fn get(&mut self, path: &str) -> Result<Reply, Fault> {
        let mut last = Fault::Connect;
        for _ in 0..2 {
            // Out of its place while in use: a call that is dropped half-way takes the connection,
            // with the answer still to come on it, along.
            let mut connection = self.take_or_connect().await.map_err(|_| Fault::Connect)?;
            let request = get(path, self.headers.clone())?;
            match tokio::time::timeout(self.timeout, connection.exchange(request)).await {
                Ok(Ok(reply)) => {
                    self.connection = Some(connection);
                    return Ok(reply);
                }
                Ok(Err(ExchangeError::Failed(fault))) => last = fault,
                Ok(Err(ExchangeError::Unsent(_))) => last = Fault::Closed,
                Err(_) => return Err(Fault::Timeout),
            }
        }
        Err(last)
    }

    async fn take_or_connect(&mut self) -> std::io::Result<Connection> {
        match self.connection.take().filter(Connection::is_open) {
            Some(connection) => Ok(connection),
            None => tokio::time::timeout(self.timeout, Connection::connect(&self.address))
                .await
                .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?,
        }
    }
}
