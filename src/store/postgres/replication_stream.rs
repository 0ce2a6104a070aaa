//! A session of the replication protocol beside one of SQL: to the same host, with the same TLS, user and database.
//!
//! `pgwire-replication` speaks the protocol. It knows one host and its own few kinds of TLS, where [`connector`] knows every form
//! of `database.url`; but it speaks over any Unix socket. So it is given the server's own, or one that leads to the
//! server over the connection that is made here.
//!
//! [`connector`]: super::connector

use std::io;
use std::os::unix::fs::PermissionsExt as _;

use pgwire_replication::protocol::framing::write_ssl_request;
use pgwire_replication::{PgWireError, ReplicationClient, ReplicationConfig, ReplicationEvent};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, copy_bidirectional};
use tokio::net::{TcpStream, UnixListener};
use tokio::task::JoinHandle;
use tokio_postgres::config::{Host, SslMode, SslNegotiation};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};

use super::connector::Way;
use super::{Connected, Database};
use crate::store::StoreError;
use crate::store::pgoutput::Lsn;

/// PostgreSQL's port.
const PORT: u16 = 5432;
/// Messages that are read ahead of whoever takes them. The rest stays in the socket, and wakes nobody until then.
const AHEAD: usize = 64;
/// Interval at which the server is told how far the changes were taken.
const STATUS: std::time::Duration = std::time::Duration::from_millis(200);

/// A session of the replication protocol. Dropping it closes the socket.
pub struct ReplicationStream {
    client: ReplicationClient,
    _relay: Option<Relay>,
}

impl std::fmt::Debug for ReplicationStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicationStream").finish_non_exhaustive()
    }
}

impl ReplicationStream {
    /// Connects as `session` has connected, and starts nothing.
    ///
    /// # Errors
    /// [`StoreError::Events`] with the server's reason.
    pub async fn connect(database: &Database, session: &Connected) -> Result<Self, StoreError> {
        let (config, relay) = way(database, session, "", "").await?;
        let connecting = async {
            let mut client = ReplicationClient::connect_gated(config).await?;
            client.identify_system().await?;
            Ok(client)
        };
        Self::within(database, connecting, relay).await
    }

    /// Connects as `session` has connected, and streams the changes of `publication` from `slot` on.
    ///
    /// # Errors
    /// [`StoreError::Events`] with the server's reason, as when somebody else reads the slot.
    pub async fn start(
        database: &Database,
        session: &Connected,
        slot: &str,
        publication: &str,
        from: Lsn,
    ) -> Result<Self, StoreError> {
        let (config, relay) = way(database, session, slot, publication).await?;
        let config = config.with_start_lsn(pgwire_replication::Lsn(from.0));
        let starting = async {
            let mut client = ReplicationClient::connect(config).await?;
            client.wait_started().await?;
            Ok(client)
        };
        Self::within(database, starting, relay).await
    }

    async fn within(
        database: &Database,
        opening: impl Future<Output = Result<ReplicationClient, PgWireError>>,
        relay: Option<Relay>,
    ) -> Result<Self, StoreError> {
        let client = match tokio::time::timeout(database.step_timeout(), opening).await {
            Ok(opened) => opened.map_err(refused)?,
            Err(_) => {
                return Err(StoreError::Timeout {
                    doing: "starting the stream of changes",
                    after: database.step_timeout(),
                });
            }
        };
        Ok(ReplicationStream {
            client,
            _relay: relay,
        })
    }

    /// The next message. May be dropped and called again.
    ///
    /// # Errors
    /// [`StoreError::Events`] if the session has ended.
    pub async fn next(&mut self) -> Result<ReplicationEvent, StoreError> {
        let event = self.client.recv().await.map_err(refused)?;
        event.ok_or_else(|| {
            StoreError::Events("the server has ended the stream of changes".to_owned())
        })
    }

    /// Tells the server soon that all before `to` is taken for good.
    pub fn taken(&self, to: Lsn) {
        self.client
            .update_applied_lsn(pgwire_replication::Lsn(to.0));
    }
}

/// The settings of the library, and what they lead over.
async fn way(
    database: &Database,
    session: &Connected,
    slot: &str,
    publication: &str,
) -> Result<(ReplicationConfig, Option<Relay>), StoreError> {
    let names = session.query_one("SELECT session_user::text, current_database()::text", &[]);
    let names = database
        .timed("asking for the names of a session", names)
        .await?;
    let Way { host, .. } = &session.way;
    let port = host.get_ports().first().copied().unwrap_or(PORT);
    let (directory, port, relay) = match host.get_hosts() {
        [Host::Unix(directory)] => (directory.display().to_string(), port, None),
        _ => {
            let failed = |error: io::Error| {
                StoreError::Events(format!(
                    "no connection for changes to the database: {error}"
                ))
            };
            let dialing = tokio::time::timeout(database.step_timeout(), dial(&session.way));
            let socket = match dialing.await {
                Ok(dialed) => dialed.map_err(failed)?,
                Err(_) => return Err(failed(io::ErrorKind::TimedOut.into())),
            };
            let (directory, relay) = Relay::to(socket).map_err(failed)?;
            (directory, PORT, Some(relay))
        }
    };
    let password = host.get_password().unwrap_or_default();
    let mut config = ReplicationConfig::unix(
        directory,
        port,
        names.get::<_, &str>(0),
        String::from_utf8_lossy(password),
        names.get::<_, &str>(1),
        slot,
        publication,
    )
    .with_binary(true)
    .with_buffer_size(AHEAD)
    .with_status_interval(STATUS);
    if let Some(name) = host.get_application_name() {
        config = config.with_application_name(name);
    }
    if let Some(options) = host.get_options() {
        config = config.with_options(options);
    }
    Ok((config, relay))
}

fn refused(error: PgWireError) -> StoreError {
    StoreError::Events(format!("the stream of changes: {error}"))
}

/// A connection to a server, encrypted or not.
trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

/// Connects as the session of this way has, up to the first message.
async fn dial(way: &Way) -> io::Result<Box<dyn Socket>> {
    let Way { host, tls } = way;
    let port = host.get_ports().first().copied().unwrap_or(PORT);
    let name = match host.get_hosts() {
        [Host::Tcp(name)] => name.as_str(),
        _ => return Err(io::Error::other("it names no host")),
    };
    let mut tcp = match host.get_hostaddrs() {
        [address] => TcpStream::connect((*address, port)).await?,
        _ => TcpStream::connect((name, port)).await?,
    };
    tcp.set_nodelay(true)?;
    let mode = host.get_ssl_mode();
    if mode == SslMode::Disable {
        return Ok(Box::new(tcp));
    }
    if host.get_ssl_negotiation() == SslNegotiation::Postgres {
        write_ssl_request(&mut tcp)
            .await
            .map_err(io::Error::other)?;
        match (tcp.read_u8().await?, mode) {
            (b'S', _) => {}
            (_, SslMode::Prefer) => return Ok(Box::new(tcp)),
            _ => return Err(io::Error::other("the server has no TLS")),
        }
    }
    let mut tls = tls.clone();
    let tls =
        MakeTlsConnect::<TcpStream>::make_tls_connect(&mut tls, name).map_err(io::Error::other)?;
    let stream = tls.connect(tcp).await.map_err(io::Error::other)?;
    Ok(Box::new(stream))
}

/// Carries bytes between one connection of a Unix socket and a server.
#[derive(Debug)]
struct Relay(JoinHandle<()>);

impl Relay {
    /// A relay, and the directory of its socket, which is gone once it is connected to. No other user can do that.
    fn to(mut server: Box<dyn Socket>) -> io::Result<(String, Self)> {
        let directory = tempfile::Builder::new()
            .prefix("millrace-")
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir()?;
        let path = directory.path().display().to_string();
        let listener = UnixListener::bind(directory.path().join(format!(".s.PGSQL.{PORT}")))?;
        let relaying = tokio::spawn(async move {
            let accepted = listener.accept().await;
            drop((listener, directory));
            if let Ok((mut client, _)) = accepted {
                // Whoever reads the client's side sees the end.
                let _ = copy_bidirectional(&mut client, &mut server).await;
            }
        });
        Ok((path, Relay(relaying)))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.abort();
    }
}
