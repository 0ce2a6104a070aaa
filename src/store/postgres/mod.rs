//! Connections, and all database work that is not a worker's batch.
//!
//! * this file: the pool and single connections, each set up the same way;
//! * `url`, `tls`, `connector`: parsing of `database.url`, verification of the server's certificate, and the
//!   one place where connections are made;
//! * [`pooling`]: detects a pooler that shares our sessions with other clients;
//! * [`clock`]: the server's clock;
//! * [`lanes`]: from which order id on ids name the lanes of buyers;
//! * [`lease`]: the right to write, and the lease of order ids;
//! * [`order_log`]: the database's record of the order log;
//! * `by_key`: reads by primary key, whose cost does not depend on the size of the table;
//! * [`window`]: reading orders back into memory at start-up;
//! * [`orders`]: look-ups of orders; [`transitions`]: cancellation and other ends of orders;
//! * [`payments`]: lists of payments, and orphans that are due for a check;
//! * [`parked`]: orders of SKUs whose counters the database refuses;
//! * [`dead_letters`]: orders that the database refused, their retry and discarding;
//! * [`draws`]: the secrets of draws, their entries and their outcome;
//! * [`skus`]: reading and administration of SKUs;
//! * [`replication`]: replication to standbys, and holders of old row versions;
//! * `replication_stream`: the way of the replication protocol to the server;
//! * [`blockers`]: sessions of others whose locks our sessions wait for;
//! * [`preflight`]: what tells before a sale whether the database will hold it;
//! * [`audit`]: recomputes every promise that the database can show;
//! * [`pruning`]: deletes rows past their retention.
//!
//! [`Database`] has the methods that all of them need. The rest are functions of their module, with the database
//! as first parameter: `orders::find(&database, id)`.

pub mod audit;
pub mod blockers;
mod by_key;
pub mod clock;
mod connector;
pub mod dead_letters;
pub mod draws;
pub mod lanes;
pub mod lease;
pub mod order_history;
pub mod order_log;
pub mod orders;
pub mod parked;
pub mod payments;
pub mod pooling;
pub mod preflight;
pub mod pruning;
pub mod replication;
mod replication_stream;
pub mod skus;
mod tls;
pub mod transitions;
mod url;
pub mod window;

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{
    Hook, HookError, Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime,
};
use tokio::task::JoinHandle;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use self::connector::{Connector, PoolConnector, Way};
use self::url::TlsParameters;
use super::StoreError;
pub use lease::NodeLease;
pub use replication_stream::ReplicationStream;

/// A connector, and a pool of connections for all work that is not a worker's batch.
#[derive(Clone, Debug)]
pub struct Database {
    connector: Arc<Connector>,
    schema: String,
    step_timeout: Duration,
    pool: Pool,
    /// The `application_name` of pooled connections.
    name: Arc<str>,
}

/// Pooled connections of a process that is no node of a cluster.
const NAME: &str = "millrace";

/// A connection outside of the pool. Dropping it closes the socket at once, even if the server has stopped
/// answering.
#[derive(Debug)]
pub struct Connected {
    client: Client,
    driver: JoinHandle<()>,
    way: Way,
}

impl Deref for Connected {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Connected {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

impl Connected {
    /// Waits until the connection has ended. Must not be called again afterwards.
    async fn ended(&mut self) {
        let _ = (&mut self.driver).await;
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Database {
    /// Checks `url`, reads the certificates that it names and creates a pool, without connecting.
    ///
    /// # Errors
    /// [`StoreError::Url`] with the fault.
    pub fn new(
        url: &str,
        schema: &str,
        pool_size: usize,
        step_timeout: Duration,
    ) -> Result<Self, StoreError> {
        let (config, parameters) = url::parse(url)?;
        Self::with_parameters(config, &parameters, schema, pool_size, step_timeout)
    }

    /// The same from a configuration of the driver, as the embedded PostgreSQL gives it.
    ///
    /// # Errors
    /// If no pool can be made.
    pub fn with_config(
        config: tokio_postgres::Config,
        schema: &str,
        pool_size: usize,
        step_timeout: Duration,
    ) -> Result<Self, StoreError> {
        let parameters = TlsParameters::of(&config);
        Self::with_parameters(config, &parameters, schema, pool_size, step_timeout)
    }

    fn with_parameters(
        mut config: tokio_postgres::Config,
        parameters: &TlsParameters,
        schema: &str,
        pool_size: usize,
        step_timeout: Duration,
    ) -> Result<Self, StoreError> {
        config
            .connect_timeout(step_timeout)
            .tcp_user_timeout(step_timeout);
        let connector = Arc::new(Connector::new(&config, parameters)?);
        let name = Arc::from(NAME);
        let pool = make_pool(&connector, &name, schema, pool_size, step_timeout)?;
        Ok(Database {
            connector,
            schema: schema.to_owned(),
            step_timeout,
            pool,
            name,
        })
    }

    /// The same database with a small pool of its own, whose users never wait behind the users of this one.
    ///
    /// # Errors
    /// If no pool can be made.
    pub fn with_own_pool(&self, pool_size: usize) -> Result<Self, StoreError> {
        let Database {
            connector, name, ..
        } = self;
        let pool = make_pool(connector, name, &self.schema, pool_size, self.step_timeout)?;
        Ok(Database {
            pool,
            ..self.clone()
        })
    }

    /// The same database for a node of a cluster, with a pool whose connections bear its number, so that whoever fences it
    /// may end them.
    ///
    /// # Errors
    /// If no pool can be made.
    pub fn of_node(mut self, node: i16) -> Result<Self, StoreError> {
        self.name = Arc::from(format!("{NAME} pool {node}"));
        self.with_own_pool(self.pool.status().max_size)
    }

    /// Longest time for one step of a conversation, from `database.step_timeout_ms`.
    pub fn step_timeout(&self) -> Duration {
        self.step_timeout
    }

    /// The schema that holds every object.
    pub fn schema(&self) -> &str {
        &self.schema
    }

    /// A pooled connection.
    ///
    /// # Errors
    /// [`StoreError::Connect`] if no connection could be made, [`StoreError::Pool`] if none became free in
    /// time.
    pub async fn pooled(&self) -> Result<deadpool_postgres::Client, StoreError> {
        self.pool.get().await.map_err(|error| match error {
            PoolError::Backend(source) => StoreError::Connect(source),
            other => StoreError::Pool(super::error::chain(&other)),
        })
    }

    /// A connection outside of the pool, called `name` in `pg_stat_activity`.
    ///
    /// # Errors
    /// [`StoreError::Connect`] or [`StoreError::Timeout`].
    pub async fn connect(&self, name: &str) -> Result<Connected, StoreError> {
        let connecting = async {
            let ((client, driver), way) = self
                .connector
                .connect(name)
                .await
                .map_err(StoreError::Connect)?;
            let connected = Connected {
                client,
                driver,
                way,
            };
            connected
                .batch_execute(&session_setup(&self.schema, self.step_timeout))
                .await
                .map_err(StoreError::statement("setting up a session"))?;
            Ok(connected)
        };
        tokio::time::timeout(self.step_timeout, connecting)
            .await
            .map_err(|_| StoreError::Timeout {
                doing: "connecting",
                after: self.step_timeout,
            })?
    }

    /// Awaits `step`, no longer than the step timeout.
    ///
    /// # Errors
    /// [`StoreError::Timeout`], or the error of `step`.
    pub async fn timed<T>(
        &self,
        doing: &'static str,
        step: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(self.step_timeout, step).await {
            Ok(done) => done.map_err(StoreError::statement(doing)),
            Err(_) => Err(StoreError::Timeout {
                doing,
                after: self.step_timeout,
            }),
        }
    }

    /// Rows of a statement that is asked many times: each connection of the pool parses and plans it once.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn query_prepared(
        &self,
        doing: &'static str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let client = self.pooled().await?;
        let querying = async {
            let statement = client.prepare_cached(sql).await?;
            client.query(&statement, parameters).await
        };
        self.timed(doing, querying).await
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// The reason why it does not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let client = self.pooled().await?;
        self.timed("SELECT 1", client.simple_query("SELECT 1"))
            .await
            .map(|_| ())
    }

    /// Closes the pool.
    pub fn close(&self) {
        self.pool.close();
    }
}

fn make_pool(
    connector: &Arc<Connector>,
    name: &Arc<str>,
    schema: &str,
    pool_size: usize,
    step_timeout: Duration,
) -> Result<Pool, StoreError> {
    let setup = session_setup(schema, step_timeout);
    let manager = Manager::from_connect(
        // The connector knows the hosts; this only fills the driver's parameter.
        tokio_postgres::Config::new(),
        PoolConnector {
            connector: Arc::clone(connector),
            name: Arc::clone(name),
        },
        ManagerConfig {
            recycling_method: RecyclingMethod::Verified,
        },
    );
    Pool::builder(manager)
        .max_size(pool_size)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(step_timeout))
        .create_timeout(Some(step_timeout))
        .recycle_timeout(Some(step_timeout))
        .post_create(Hook::async_fn(move |client, _| {
            let setup = setup.clone();
            Box::pin(async move {
                client
                    .batch_execute(&setup)
                    .await
                    .map_err(HookError::Backend)
            })
        }))
        .build()
        .map_err(|e| StoreError::Pool(e.to_string()))
}

/// The set-up of every session. Keepalives let the server notice within half a minute that our machine is gone,
/// and release our locks. `synchronous_commit` is turned back on if a role or database default has turned it
/// off, because an answer of `201` promises that the row survives a crash.
fn session_setup(schema: &str, step_timeout: Duration) -> String {
    let lock_ms = (step_timeout.as_millis() / 2).max(50);
    format!(
        "SET search_path = \"{schema}\", pg_temp;
         SET lock_timeout = {lock_ms};
         SET idle_in_transaction_session_timeout = {};
         SET TIME ZONE 'UTC';
         SET tcp_keepalives_idle = 10;
         SET tcp_keepalives_interval = 5;
         SET tcp_keepalives_count = 3;
         SELECT set_config('synchronous_commit', 'on', false)
          WHERE current_setting('synchronous_commit') = 'off';",
        step_timeout.as_millis() * 2
    )
}
