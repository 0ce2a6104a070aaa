//! A proxy between a writer and PostgreSQL that understands the wire protocol well enough to cut
//! a connection around a COMMIT, that can stop passing anything on, and that can lead to another
//! server from one moment to the next.
//!
//! Format: PostgreSQL documentation, "Message Formats": a type byte and a 32-bit length that counts
//! itself; the first message of a client has no type.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

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
    /// Nothing is cut, but the COMMIT reaches the server only after a while, also where its client
    /// has given up meanwhile.
    Late(Duration),
}

/// Whose COMMIT is cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Anyone,
    /// Not a worker.
    BesideWorkers,
    /// Somebody beside workers whose transaction changes stock.
    StockChange,
}

struct Shared {
    socket: Mutex<PathBuf>,
    cut: Mutex<Option<(Target, Cut)>>,
    late: AtomicUsize,
    frozen: watch::Sender<bool>,
    severed: watch::Sender<()>,
    /// Close the door with the next cut.
    last: AtomicBool,
    closed: AtomicBool,
}

impl Shared {
    fn take_cut(&self, of_worker: bool, of_stock: bool) -> Option<Cut> {
        let is_meant = |(target, _): &mut (Target, Cut)| match target {
            Target::Anyone => true,
            Target::BesideWorkers => !of_worker,
            Target::StockChange => !of_worker && of_stock,
        };
        let (_, cut) = self.cut.lock().unwrap().take_if(is_meant)?;
        if self.last.load(Ordering::SeqCst) {
            self.closed.store(true, Ordering::SeqCst);
        }
        Some(cut)
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
        Self::start_at(&directory.join(".s.PGSQL.5432")).await
    }

    /// One in front of the server with this socket.
    pub async fn start_at(socket: &Path) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            socket: Mutex::new(socket.to_owned()),
            cut: Mutex::new(None),
            late: AtomicUsize::new(0),
            frozen: watch::Sender::new(false),
            severed: watch::Sender::new(()),
            last: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        let door = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let shared = Arc::clone(&shared);
                    let mut severed = shared.severed.subscribe();
                    tokio::spawn(async move {
                        tokio::select! {
                            () = relay(client, shared) => {}
                            _ = severed.changed() => {}
                        }
                    });
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

    /// How a process of its own comes through this proxy.
    pub fn url(&self, user: &str, database: &str) -> String {
        let port = self.port;
        format!("postgresql://{user}@127.0.0.1:{port}/{database}?sslmode=disable")
    }

    /// Leads whoever comes from here on to the server with this socket, and ends everyone else's
    /// connection.
    pub fn lead_to(&self, socket: &Path) {
        *self.shared.socket.lock().unwrap() = socket.to_owned();
        self.shared.severed.send_replace(());
    }

    /// Cuts the next connection that commits.
    pub fn cut(&self, cut: Cut) {
        self.cut_of(Target::Anyone, cut);
    }

    fn cut_of(&self, target: Target, cut: Cut) {
        *self.shared.cut.lock().unwrap() = Some((target, cut));
    }

    /// Cuts the next connection that commits and is not a worker's.
    pub fn cut_beside_workers(&self, cut: Cut) {
        self.cut_of(Target::BesideWorkers, cut);
    }

    /// Cuts the next connection that commits a change of stock and is not a worker's: an operator's, and
    /// nothing that a task in the background happens to commit at that moment.
    pub fn cut_change_of_stock(&self, cut: Cut) {
        self.cut_of(Target::StockChange, cut);
    }

    /// Cuts the next connection that commits, and lets nobody in afterwards.
    pub fn cut_and_close(&self, cut: Cut) {
        self.shared.last.store(true, Ordering::SeqCst);
        self.cut(cut);
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        self.shut(true);
    }

    /// Ends every connection, and lets nobody in any more.
    pub fn cut_off(&self) {
        self.close();
        self.shared.severed.send_replace(());
    }

    /// Lets nobody in, or everybody again; connections that are there stay.
    pub fn shut(&self, shut: bool) {
        self.shared.closed.store(shut, Ordering::SeqCst);
    }

    /// Whether the last [`Proxy::cut`] has happened.
    pub fn has_cut(&self) -> bool {
        self.shared.cut.lock().unwrap().is_none()
    }

    /// How many commits were held back and are not with the server yet.
    pub fn late(&self) -> usize {
        self.shared.late.load(Ordering::SeqCst)
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

/// A COMMIT that is on its way for longer than it should be.
struct Late<'a>(&'a AtomicUsize);

impl<'a> Late<'a> {
    fn count(shared: &'a Shared) -> Self {
        shared.late.fetch_add(1, Ordering::SeqCst);
        Late(&shared.late)
    }
}

impl Drop for Late<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn relay(client: TcpStream, shared: Arc<Shared>) {
    if shared.closed.load(Ordering::SeqCst) {
        return;
    }
    // One message at a time is passed on: none may wait for the last one to be acknowledged.
    client.set_nodelay(true).unwrap();
    let socket = shared.socket.lock().unwrap().clone();
    let Ok(server) = UnixStream::connect(&socket).await else {
        return;
    };
    let (mut client_read, mut client_write) = client.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    let (mut asked, mut answered) = (BytesMut::new(), BytesMut::new());
    let mut frozen = shared.frozen.subscribe();
    let (mut started, mut of_worker, mut swallow) = (false, false, None);
    // Of the transaction that is open.
    let mut of_stock = false;
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
                match shared.take_cut(of_worker, std::mem::take(&mut of_stock)) {
                    Some(Cut::Before) => return,
                    Some(Cut::Late(after)) => {
                        let _late = Late::count(&shared);
                        tokio::time::sleep(after).await;
                        if server_write.write_all(&message).await.is_err() {
                            return;
                        }
                        continue;
                    }
                    Some(cut) => swallow = Some(cut),
                    None => {}
                }
            }
            if !started {
                // The first message has the session's name in it.
                of_worker = contains(&message, b"millrace worker");
            }
            // Operators' statements are prepared anew each time, so their text passes here. BEGIN and ROLLBACK are
            // simple queries.
            of_stock =
                contains(&message, b"INTO stock_log") || of_stock && message.first() != Some(&b'Q');
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

fn contains(message: &[u8], part: &[u8]) -> bool {
    message.windows(part.len()).any(|window| window == part)
}

fn next_message(buffer: &mut BytesMut, typed: bool) -> Option<Bytes> {
    let head = usize::from(typed);
    let length = buffer.get(head..head + 4)?;
    let length = head + u32::from_be_bytes(length.try_into().unwrap()) as usize;
    (buffer.len() >= length).then(|| buffer.split_to(length).freeze())
}
