//! The one place where connections to PostgreSQL are made, pooled or not.
//!
//! Every host gets the attempts that `sslmode` allows, in order:
//!
//! | `sslmode` | attempts | the next one follows if |
//! |---|---|---|
//! | `disable` | plain | |
//! | `allow` | plain, TLS | the server does not admit us plain |
//! | `prefer` | TLS if the server has it, plain | the handshake fails, or the server does not admit us over TLS |
//! | `require` and above | TLS | |
//!
//! Unlike with `libpq`, a wrong password causes no second attempt: that would send over a plain connection the
//! password that was refused over TLS. A unix socket never carries TLS, whatever `sslmode` says; no server
//! offers it there.

use std::pin::Pin;

use rand::seq::SliceRandom;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio_postgres::config::{Host, LoadBalanceHosts, SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Connection};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls;
use super::url::{TlsMode, TlsParameters};
use crate::store::StoreError;
use crate::store::error::{chain, rustls_error};

/// A connection's client, and the task that drives it.
pub(super) type Driven = (Client, JoinHandle<()>);

/// How a connection was made.
#[derive(Clone)]
pub(super) struct Way {
    /// Its host alone, with the `sslmode` that has led there.
    pub(super) host: Config,
    pub(super) tls: MakeRustlsConnect,
}

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.host.fmt(f)
    }
}

/// Connects to the configured hosts.
pub(super) struct Connector {
    /// One configuration for each host, in the order of `database.url`.
    hosts: Vec<Config>,
    shuffled: bool,
    mode: TlsMode,
    tls: MakeRustlsConnect,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The driver's own form hides the password.
        f.debug_struct("Connector")
            .field("hosts", &self.hosts)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl Connector {
    /// Reads the certificates that `parameters` name; connects to nothing yet.
    ///
    /// # Errors
    /// [`StoreError::Url`] if `config` and `parameters` do not describe a connection.
    pub fn new(config: &Config, parameters: &TlsParameters) -> Result<Self, StoreError> {
        Ok(Connector {
            hosts: split(config)?,
            shuffled: config.get_load_balance_hosts() == LoadBalanceHosts::Random,
            mode: parameters.mode,
            tls: tls::connector(parameters)?,
        })
    }

    /// Connects to the first host that admits us, as `name` in `pg_stat_activity`.
    ///
    /// # Errors
    /// The error of the last host.
    pub async fn connect(&self, name: &str) -> Result<(Driven, Way), tokio_postgres::Error> {
        let mut hosts: Vec<&Config> = self.hosts.iter().collect();
        if self.shuffled {
            hosts.shuffle(&mut rand::rng());
        }
        let mut last = None;
        for host in hosts {
            match self.connect_to(host, name).await {
                Ok(connected) => return Ok(connected),
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error),
            // The driver's own complaint about a configuration without a host.
            None => self.connect_to(&Config::new(), name).await,
        }
    }

    async fn connect_to(
        &self,
        host: &Config,
        name: &str,
    ) -> Result<(Driven, Way), tokio_postgres::Error> {
        let mut host = host.clone();
        host.application_name(name);
        let (first, second) = attempts(self.mode, &host);
        host.ssl_mode(first);
        let driven = match (self.once(&host).await, second) {
            (Err(error), Some(second)) if another_way_may_help(&error) => {
                tracing::debug!(reason = %chain(&error), "another attempt, as sslmode allows");
                host.ssl_mode(second);
                self.once(&host).await
            }
            (result, _) => result,
        }?;
        let tls = self.tls.clone();
        Ok((driven, Way { host, tls }))
    }

    async fn once(&self, config: &Config) -> Result<Driven, tokio_postgres::Error> {
        #[cfg(feature = "faults")]
        if let Some(stream) = crate::simulated::surroundings().map(|here| here.dial()) {
            let mut config = config.clone();
            let config = config.ssl_mode(SslMode::Disable);
            let connected = config.connect_raw(stream, tokio_postgres::NoTls);
            return connected.await.map(drive);
        }
        config.connect(self.tls.clone()).await.map(drive)
    }
}
/// Drives a connection on a task of its own.
fn drive<S, T>((client, connection): (Client, Connection<S, T>)) -> Driven
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let driver = tokio::spawn(async move {
        if let Err(e) = connection.await {
            tracing::debug!(reason = %chain(&e), "a database connection ended");
        }
    });
    (client, driver)
}

/// Lets the pool connect through the same connector.
pub(super) struct PoolConnector {
    pub(super) connector: std::sync::Arc<Connector>,
    /// The `application_name` of its connections.
    pub(super) name: std::sync::Arc<str>,
}

impl deadpool_postgres::Connect for PoolConnector {
    fn connect(
        &self,
        _: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<Driven, tokio_postgres::Error>> + Send + '_>> {
        Box::pin(async {
            let (driven, _) = self.connector.connect(&self.name).await?;
            Ok(driven)
        })
    }
}

fn attempts(mode: TlsMode, host: &Config) -> (SslMode, Option<SslMode>) {
    if let [Host::Unix(_)] = host.get_hosts() {
        return (SslMode::Disable, None);
    }
    match mode {
        TlsMode::Disable => (SslMode::Disable, None),
        TlsMode::Allow => (SslMode::Disable, Some(SslMode::Require)),
        TlsMode::Prefer => (SslMode::Prefer, Some(SslMode::Disable)),
        TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull => (SslMode::Require, None),
    }
}

/// Whether the server's `pg_hba.conf` does not admit this kind of connection, or the TLS handshake failed.
fn another_way_may_help(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION)
        || rustls_error(error).is_some()
}

/// A configuration for each host, because `sslmode` applies host by host.
fn split(config: &Config) -> Result<Vec<Config>, StoreError> {
    let (hosts, addresses, ports) = (
        config.get_hosts(),
        config.get_hostaddrs(),
        config.get_ports(),
    );
    let fault = |message: String| Err(StoreError::Url(message));
    let count = hosts.len().max(addresses.len());
    if count == 0 {
        return fault("it names no host; a unix socket is host=/its/directory".to_owned());
    }
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return fault(format!(
            "{} hosts but {} hostaddr",
            hosts.len(),
            addresses.len()
        ));
    }
    if ports.len() > 1 && ports.len() != count {
        return fault(format!("{count} hosts but {} ports", ports.len()));
    }
    let one = |index: usize| {
        let mut one = without_host(config);
        match (hosts.get(index), addresses.get(index)) {
            (Some(Host::Tcp(name)), _) => one.host(name),
            (Some(Host::Unix(path)), _) => one.host_path(path),
            // The name that the certificate must bear.
            (None, Some(address)) => one.host(address.to_string()),
            (None, None) => &mut one,
        };
        if let Some(address) = addresses.get(index) {
            one.hostaddr(*address);
        }
        if let Some(port) = ports.get(index).or(ports.first()) {
            one.port(*port);
        }
        if let Some(timeout) = config.get_connect_timeout() {
            // A host that does not answer must leave time for the others.
            one.connect_timeout(*timeout / u32::try_from(count).unwrap_or(u32::MAX));
        }
        if count > 1 && config.get_target_session_attrs() == TargetSessionAttrs::Any {
            // A standby does not accept writes.
            one.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        one
    };
    Ok((0..count).map(one).collect())
}

/// Copies everything but hosts and ports, because the driver can add to those lists but not clear them.
fn without_host(config: &Config) -> Config {
    let mut copy = Config::new();
    if let Some(user) = config.get_user() {
        copy.user(user);
    }
    if let Some(password) = config.get_password() {
        copy.password(password);
    }
    if let Some(database) = config.get_dbname() {
        copy.dbname(database);
    }
    if let Some(options) = config.get_options() {
        copy.options(options);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        copy.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        copy.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        copy.keepalives_retries(retries);
    }
    copy.keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .ssl_negotiation(config.get_ssl_negotiation())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding());
    copy
}
