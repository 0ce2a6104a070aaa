//! Opening a connection: TCP, TLS, and a hello from each side. The caller speaks first.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{client, server};

use super::frame::{Frame, FrameReader, GREETING_BYTES_MAX, Goodbye, Hello};
use super::key::ClusterKey;
use super::{Identity, OPEN_WITHIN, PROTOCOL};

/// Room for a read, made once less than a quarter of it is left.
const READ_BYTES: usize = 16 * 1024;

/// Time for the other side to read why it is turned away.
const GOODBYE_WITHIN: Duration = Duration::from_millis(500);

/// Reason why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It could not be opened, or was closed: nobody listens there, another secret, another version.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It took too long.
    #[error("no answer within {} ms", OPEN_WITHIN.as_millis())]
    TooSlow,
    /// The other side said why, or this side did.
    #[error("{0}")]
    Refused(Goodbye),
    /// The other side speaks no version of the protocol that this release speaks.
    #[error("no common version of the protocol")]
    Version,
}

/// A connection that is open, and the bytes of it that were read already.
pub(super) struct Opened<S> {
    pub(super) stream: S,
    pub(super) reader: FrameReader,
    pub(super) input: BytesMut,
    pub(super) hello: Hello,
}

/// Opens a connection to node `to`, as `own`.
pub(super) async fn call(
    key: &ClusterKey,
    own: &Identity,
    to: u8,
    address: &str,
) -> Result<Opened<client::TlsStream<TcpStream>>, OpenError> {
    let opening = async {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        // Not sent: nodes are known by their key and their hello.
        let name = ServerName::try_from("millrace").map_err(io::Error::other)?;
        let mut stream = key.connector.connect(name, socket).await?;
        if stream.get_ref().1.alpn_protocol() != Some(PROTOCOL) {
            return Err(OpenError::Version);
        }
        let from = own.clone();
        send(&mut stream, &Frame::Hello(Hello { from, to })).await?;
        let mut reader = FrameReader::new(GREETING_BYTES_MAX);
        let mut input = BytesMut::new();
        let hello = read_hello(&mut stream, &mut reader, &mut input).await?;
        check(own, to, &hello).map_err(OpenError::Refused)?;
        reader.raise_limit();
        Ok(Opened {
            stream,
            reader,
            input,
            hello,
        })
    };
    let opened = timeout(OPEN_WITHIN, opening).await;
    opened.unwrap_or(Err(OpenError::TooSlow))
}

/// Answers a connection that came in. `admit` decides about the caller.
pub(super) async fn answer(
    key: &ClusterKey,
    own: &Identity,
    socket: TcpStream,
    admit: impl FnOnce(&Hello) -> Result<(), Goodbye>,
) -> Result<Opened<server::TlsStream<TcpStream>>, OpenError> {
    let opening = async {
        socket.set_nodelay(true)?;
        let mut stream = key.acceptor.accept(socket).await?;
        if stream.get_ref().1.alpn_protocol() != Some(PROTOCOL) {
            return Err(OpenError::Version);
        }
        let mut reader = FrameReader::new(GREETING_BYTES_MAX);
        let mut input = BytesMut::new();
        let hello = read_hello(&mut stream, &mut reader, &mut input).await?;
        if let Err(reason) = check(own, hello.from.node, &hello).and_then(|()| admit(&hello)) {
            let turned_away = async {
                send(&mut stream, &Frame::Goodbye(reason)).await?;
                stream.shutdown().await
            };
            // It is gone, or hears why.
            let _ = timeout(GOODBYE_WITHIN, turned_away).await;
            return Err(OpenError::Refused(reason));
        }
        let (from, to) = (own.clone(), hello.from.node);
        send(&mut stream, &Frame::Hello(Hello { from, to })).await?;
        reader.raise_limit();
        Ok(Opened {
            stream,
            reader,
            input,
            hello,
        })
    };
    let opened = timeout(OPEN_WITHIN, opening).await;
    opened.unwrap_or(Err(OpenError::TooSlow))
}

/// Whether a hello comes from node `from` of the same database and is meant for this node.
fn check(own: &Identity, from: u8, hello: &Hello) -> Result<(), Goodbye> {
    if hello.from.database != own.database {
        return Err(Goodbye::OtherDatabase);
    }
    // A node that calls itself has the wrong address of another one.
    if hello.to != own.node || hello.from.node != from || hello.from.node == own.node {
        return Err(Goodbye::OtherNode);
    }
    Ok(())
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let mut bytes = BytesMut::new();
    frame.put(&mut bytes);
    stream.write_all(&bytes).await?;
    stream.flush().await
}

async fn read_hello(
    stream: &mut (impl AsyncRead + Unpin),
    reader: &mut FrameReader,
    input: &mut BytesMut,
) -> Result<Hello, OpenError> {
    loop {
        match reader.next(input).map_err(io::Error::from)? {
            Some(Frame::Hello(hello)) => return Ok(hello),
            Some(Frame::Goodbye(reason)) => return Err(OpenError::Refused(reason)),
            Some(_) => return Err(io::Error::from(super::frame::FrameError::Malformed).into()),
            None => read_some(stream, input).await?,
        }
    }
}

/// Reads what is there, at least a byte.
pub(super) async fn read_some(
    stream: &mut (impl AsyncRead + Unpin),
    input: &mut BytesMut,
) -> io::Result<()> {
    if input.capacity() - input.len() < READ_BYTES / 4 {
        input.reserve(READ_BYTES);
    }
    match stream.read_buf(input).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}
