//! A proxy between a writer and PostgreSQL that understands the wire protocol well enough to cut
//! a connection around a COMMIT, and that can stop passing anything on.
//!
//! Format: PostgreSQL documentation, "Message Formats": a type byte and a 32-bit length that counts
//! itself; the first message of a client has no type.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::config::{Host, SslMode};

/// Where the next connection that commits is cut. Once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The COMMIT never reaches the server.
    Before,
    /// The server has committed, and nobody hears of it.
    After,
    /// The same, but the connection stays open and silent.
    AfterInSilence,
}

struct Shared {
    socket: PathBuf,
    cut: Mutex<Option<Cut>>,
    frozen: watch::Sender<bool>,
    /// Close the door with the next cut.
    last: AtomicBool,
    closed: AtomicBool,
}

impl Shared {
    fn take_cut(&self) -> Option<Cut> {
        let cut = self.cut.lock().unwrap().take();
        if cut.is_some() && self.last.load(Ordering::SeqCst) {
            self.closed.store(true, Ordering::SeqCst);
        }
        cut
    }
}

/// A running proxy; dropping it closes its door.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    door: JoinHandle<()>,
}

impl Proxy {
    /// One in front of the server that `config` names by its socket directory.
    pub async fn start(config: &tokio_postgres::Config) -> Self {
        let [Host::Unix(directory)] = config.get_hosts() else {
            panic!("a test's server listens on one unix socket");
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            socket: directory.join(".s.PGSQL.5432"),
            cut: Mutex::new(None),
            frozen: watch::Sender::new(false),
            last: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        let door = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(relay(client, Arc::clone(&shared)));
                }
            }
        });
        Proxy { port, shared, door }
    }

    /// `config`, but through this proxy.
    pub fn config(&self, config: &tokio_postgres::Config) -> tokio_postgres::Config {
        let mut through = tokio_postgres::Config::new();
        through
            .host("127.0.0.1")
            .port(self.port)
            // It reads the protocol, so it must be spoken in the clear.
            .ssl_mode(SslMode::Disable)
            .user(config.get_user().unwrap())
            .dbname(config.get_dbname().unwrap());
        through
    }

    /// Cuts the next connection that commits.
    pub fn cut(&self, cut: Cut) {
        *self.shared.cut.lock().unwrap() = Some(cut);
    }

    /// Cuts the next connection that commits, and lets nobody in afterwards.
    pub fn cut_and_close(&self, cut: Cut) {
        self.shared.last.store(true, Ordering::SeqCst);
        self.cut(cut);
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::SeqCst);
    }

    /// Whether the last [`Proxy::cut`] has happened.
    pub fn has_cut(&self) -> bool {
        self.shared.cut.lock().unwrap().is_none()
    }

    /// Stops passing anything on, or goes on with what has come meanwhile, also from clients that
    /// have gone.
    pub fn freeze(&self, frozen: bool) {
        self.shared.frozen.send_replace(frozen);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.door.abort();
    }
}

async fn relay(client: TcpStream, shared: Arc<Shared>) {
    if shared.closed.load(Ordering::SeqCst) {
        return;
    }
    let Ok(server) = UnixStream::connect(&shared.socket).await else {
        return;
    };
    let (mut client_read, mut client_write) = client.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    let (mut asked, mut answered) = (BytesMut::new(), BytesMut::new());
    let mut frozen = shared.frozen.subscribe();
    let (mut started, mut swallow) = (false, None);
    loop {
        if frozen.wait_for(|frozen| !frozen).await.is_err() {
            return;
        }
        let read = tokio::select! {
            _ = frozen.changed() => continue,
            read = client_read.read_buf(&mut asked) => read,
            read = server_read.read_buf(&mut answered) => read,
        };
        if !matches!(read, Ok(1..)) || frozen.wait_for(|frozen| !frozen).await.is_err() {
            return;
        }
        while let Some(message) = next_message(&mut asked, started) {
            if started && &message[..] == b"Q\0\0\0\x0bCOMMIT\0" {
                match shared.take_cut() {
                    Some(Cut::Before) => return,
                    Some(cut) => swallow = Some(cut),
                    None => {}
                }
            }
            started = true;
            if server_write.write_all(&message).await.is_err() {
                return;
            }
        }
        while let Some(message) = next_message(&mut answered, true) {
            if let Some(cut) = swallow
                && &message[..] == b"C\0\0\0\x0bCOMMIT\0"
            {
                if cut == Cut::AfterInSilence {
                    // Until the client hangs up.
                    while matches!(client_read.read_buf(&mut asked).await, Ok(1..)) {}
                }
                return;
            }
            if client_write.write_all(&message).await.is_err() {
                return;
            }
        }
    }
}

fn next_message(buffer: &mut BytesMut, typed: bool) -> Option<Bytes> {
    let head = usize::from(typed);
    let length = buffer.get(head..head + 4)?;
    let length = head + u32::from_be_bytes(length.try_into().unwrap()) as usize;
    (buffer.len() >= length).then(|| buffer.split_to(length).freeze())
}
