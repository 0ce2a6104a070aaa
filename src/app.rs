//! All wiring: what starts in which order, how state is recovered, how it is drained.
//!
//! ```text
//!   start:  bind ─► control plane ─► PostgreSQL ─► schema ─► take over ─► recover
//!           ─► workers, deadlines, lease ─► open the intake
//!   drain:  close the intake ─► run the queue empty ─► settle what is left
//!           ─► answer what is in flight ─► close the control plane ─► PostgreSQL
//! ```

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};

use crate::config::{Backend, Config, Engine, Migrate};
use crate::http::control_plane::{ControlPlane, Parts, Refresh};
use crate::http::data_plane::dispatcher::Dispatcher;
use crate::http::data_plane::hardened::{self, CloseReason, Limits};
use crate::http::data_plane::message::{Request, Response, Service};
use crate::http::data_plane::service::{DataPlane, DataPlaneParts};
use crate::http::data_plane::{minihttp, runtime};
use crate::http::tokens::Tokens;
use crate::metrics::Metrics;
use crate::order::IdClock;
use crate::pipeline::cancel::Canceller;
use crate::pipeline::intake::Intake;
use crate::pipeline::ledger::Ledger;
use crate::pipeline::operator::Operator;
use crate::pipeline::worker::{Worker, WorkerError};
use crate::pipeline::{WakeAll, deadlines};
use crate::queue::{OrderQueue, RingQueue};
use crate::state::buyers::Buyers;
use crate::state::pending::{Pending, SlotState};
use crate::state::poison::Poison;
use crate::state::recent::Recent;
use crate::state::refusals::Refusals;
use crate::state::stock::Catalogue;
use crate::store::batch::BatchWriter;
use crate::store::embedded::{DATABASE, Embedded, EmbeddedError, EmbeddedOptions};
use crate::store::postgres::lease::{self, Taken};
use crate::store::postgres::{Connected, Database, NodeLease};
use crate::store::{StoreError, schema};

/// How often the lease on order ids is renewed.
const LEASE_RENEWAL: Duration = Duration::from_secs(5);
/// How often what has left the idempotency window, and rate limits that are whole again, are
/// forgotten.
const EVICTION: Duration = Duration::from_secs(20);
/// How often our own PostgreSQL is looked at.
const POSTGRES_WATCH: Duration = Duration::from_millis(250);
/// Connections for health, the lease on order ids, and operators.
const OPERATORS_POOL: usize = 4;
/// Orders written a moment ago that are answered from memory, about 200 bytes each.
const RECENT_ORDERS: usize = 65_536;
/// What a drain may take beyond the order timeout.
const DRAIN_MARGIN: Duration = Duration::from_secs(3);

/// Why Millrace did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port cannot be had.
    #[error(
        "cannot listen at {address} ({field}): {source}; stop what is there, or set another address"
    )]
    Listen {
        /// Which setting.
        field: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// `data_dir` cannot be used.
    #[error("cannot use data_dir {path}: {source}")]
    DataDir {
        /// Which directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A thread or socket could not be made.
    #[error("cannot start the data plane: {0}")]
    Engine(std::io::Error),
    /// Our own PostgreSQL did not start.
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A metric's name; a defect.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// A database that is ready to be used, and our own server behind it, where there is one.
#[derive(Debug)]
pub struct OpenDatabase {
    /// The database.
    pub database: Database,
    /// Our own server.
    pub embedded: Option<Embedded>,
}

/// Connects to the configured database, or starts our own. Does not touch the schema. Every command
/// that uses the database comes through here, so a pooler that would break it is refused for all.
///
/// # Errors
/// Where there is none to be had.
pub async fn open_database(config: &Config) -> Result<OpenDatabase, StartError> {
    let settings = &config.database;
    let step = Duration::from_millis(settings.step_timeout_ms);
    if !settings.url.is_empty() {
        let database = Database::new(&settings.url, &settings.schema, settings.pool_size, step)?;
        database.check_session_pooling().await?;
        return Ok(OpenDatabase {
            database,
            embedded: None,
        });
    }
    let mut options = EmbeddedOptions::new(&config.data_dir);
    if !settings.embedded_bin_dir.is_empty() {
        options.bin_dir = Some(PathBuf::from(&settings.embedded_bin_dir));
    }
    let embedded = Embedded::start(options).await?;
    tracing::info!(
        version = embedded.version(), directory = %embedded.home().display(),
        "database.url is not set: running a PostgreSQL of our own"
    );
    let database = Database::with_config(
        embedded.config(DATABASE),
        &settings.schema,
        settings.pool_size,
        step,
    )?;
    Ok(OpenDatabase {
        database,
        embedded: Some(embedded),
    })
}

/// Brings the schema up to date, or checks it, as `database.migrate` says.
///
/// # Errors
/// Where it is not, or cannot be, what this release needs.
pub async fn prepare_schema(config: &Config, database: &Database) -> Result<(), StartError> {
    let mut client = database.connect("millrace migrate").await?;
    match config.database.migrate {
        Migrate::Auto => {
            let applied = schema::migrate(&mut client, database.schema()).await?;
            if applied > 0 {
                tracing::info!(applied, schema = database.schema(), "migrated the schema");
            }
        }
        Migrate::Never => schema::check(&mut client, database.schema()).await?,
    }
    schema::ensure_user_index(&client, config.database.user_index).await?;
    Ok(())
}

/// A running Millrace.
pub struct Millrace {
    /// Where the data plane listens.
    pub data_plane: SocketAddr,
    /// Where the control plane listens.
    pub control_plane: SocketAddr,
    config: Config,
    ledger: Arc<Ledger>,
    intake: Arc<Intake>,
    queue: Arc<dyn OrderQueue>,
    service: Arc<DataPlane>,
    front: Front,
    workers: JoinHandle<Result<(), WorkerError>>,
    cut: watch::Sender<bool>,
    wake_all: WakeAll,
    background: Background,
    control: (oneshot::Sender<()>, JoinHandle<()>),
    database: Database,
    lease: NodeLease,
    /// Keeps other processes away from this database.
    guard: Connected,
    embedded: Option<Arc<Mutex<Embedded>>>,
}

/// The engine that carries the data plane.
enum Front {
    Hardened(Arc<hardened::Server>),
    Minihttp,
}

/// Answers `503` until recovery has put the real service in its place.
#[derive(Default)]
struct Doorway {
    service: OnceLock<Arc<DataPlane>>,
}

impl Service for Doorway {
    fn call(&self, request: &Request<'_>, response: &mut Response) {
        match self.service.get() {
            Some(service) => service.call(request, response),
            None => DataPlane::answer_not_ready(response),
        }
    }
}

impl Millrace {
    /// Starts everything, in the order of this module's text. Returns once orders are taken.
    ///
    /// # Errors
    /// [`StartError`]; what was started is stopped again.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let started = Instant::now();
        let data_dir = |source| StartError::DataDir {
            path: config.data_dir.clone(),
            source,
        };
        std::fs::create_dir_all(&config.data_dir).map_err(data_dir)?;
        let metrics = Metrics::new()?;

        let data_listener = bind("data_plane.listen", config.data_plane.listen)?;
        let control_listener = bind("control_plane.listen", config.control_plane.listen)?;
        let data_plane = data_listener.local_addr().map_err(StartError::Engine)?;
        let control_plane = control_listener.local_addr().map_err(StartError::Engine)?;
        tracing::info!(address = %data_plane, "data plane listening");
        tracing::info!(address = %control_plane, "control plane listening");
        let control =
            ControlPlane::new(metrics.clone(), Tokens::new(&config.control_plane.token.0));
        let control_task = serve_control(&control, control_listener).map_err(StartError::Engine)?;
        let doorway = Arc::new(Doorway::default());
        let (front, refresh) = serve_data(&config, data_listener, Arc::clone(&doorway))?;
        let dispatcher = Dispatcher::start();
        let wake_all: WakeAll = Arc::new(move |wakers| dispatcher.wake_all(wakers));

        let OpenDatabase { database, embedded } = open_database(&config).await?;
        let guard = database.claim().await?;
        // Only now: another process may run on this `data_dir`, and its file is not ours to replace.
        let addresses = serde_json::json!({
            "data_plane": data_plane.to_string(),
            "control_plane": control_plane.to_string(),
            "pid": std::process::id(),
        });
        std::fs::write(
            config.data_dir.join("addresses.json"),
            format!("{addresses:#}\n"),
        )
        .map_err(data_dir)?;
        prepare_schema(&config, &database).await?;
        let worker_count = config.worker_count();
        let Taken {
            lease,
            id_high_water,
            ids_leased_until,
            paused,
            guard,
        } = database
            .take_over(guard, i16::try_from(worker_count).unwrap_or(i16::MAX))
            .await?;
        let ids = IdClock::new(lease.node as u8, id_high_water, ids_leased_until);
        let ledger = Arc::new(recover(&config, &database, ids, paused).await?);
        metrics
            .recovery_seconds
            .set(started.elapsed().as_secs_f64());
        metrics.recovered_orders.set(ledger.buyers.len() as i64);
        metrics.queue_capacity.set(config.queue.capacity as i64);

        let queue: Arc<dyn OrderQueue> = match config.queue.backend {
            Backend::Memory => Arc::new(RingQueue::new(config.queue.capacity)),
        };
        let intake = Intake::new(
            Arc::clone(&ledger),
            Arc::clone(&queue),
            config.orders.payment_ttl_ms,
        );
        let intake = Arc::new(intake.with_rate_limits(&config.rate_limit));
        let (cut, cut_seen) = watch::channel(false);
        let mut workers = JoinSet::new();
        for shard in 0..worker_count {
            let shard = i16::try_from(shard).unwrap_or(i16::MAX);
            let worker = Worker::new(
                BatchWriter::new(database.clone(), lease, shard),
                Arc::clone(&queue),
                Arc::clone(&ledger),
                Arc::clone(&wake_all),
                metrics.clone(),
                config.workers.batch_rows_max,
                cut_seen.clone(),
            );
            workers.spawn(worker.run());
        }
        let embedded = embedded.map(|embedded| Arc::new(Mutex::new(embedded)));
        let workers = tokio::spawn(watch_workers(workers, Arc::clone(&ledger)));
        let operators = database.with_own_pool(OPERATORS_POOL)?;
        let mut background = Background::new(Arc::clone(&ledger));
        background.run(
            "the deadline keeper",
            deadlines::keep(Arc::clone(&ledger), Arc::clone(&wake_all), metrics.clone()),
        );
        background.run(
            "the lease on order ids",
            renew_lease(operators.clone(), lease, Arc::clone(&ledger)),
        );
        let window_ms = config.orders.idempotency_window_ms;
        let evicting = evict(Arc::clone(&ledger), Arc::clone(&intake), window_ms);
        background.run("the eviction of old orders", evicting);
        if let Some(embedded) = &embedded {
            background.run(
                "the keeper of our own PostgreSQL",
                keep_running(Arc::clone(embedded)),
            );
        }

        let service = Arc::new(DataPlane::new(DataPlaneParts {
            intake: Arc::clone(&intake),
            ledger: Arc::clone(&ledger),
            database: database.clone(),
            canceller: Canceller::new(Arc::clone(&ledger), database.clone(), lease),
            user_index: config.database.user_index,
            runtime: Handle::current(),
            metrics,
            order_timeout: Duration::from_millis(config.orders.timeout_ms),
            tokens: Tokens::new(&config.data_plane.token.0),
        }));
        let _ = doorway.service.set(Arc::clone(&service));
        // Health, the lease and operators never wait behind buyers' look-ups.
        control.recovered(Parts {
            ledger: Arc::clone(&ledger),
            intake: Arc::clone(&intake),
            queue: Arc::clone(&queue),
            database: operators.clone(),
            operator: Operator::new(
                Arc::clone(&ledger),
                operators,
                lease,
                config.orders.payment_ttl_ms,
            ),
            refresh,
        });
        intake.open();
        tracing::info!(
            workers = worker_count,
            skus = ledger.catalogue.all().len(),
            remembered = ledger.buyers.len(),
            epoch = lease.epoch,
            ms = started.elapsed().as_millis() as u64,
            "taking orders"
        );
        Ok(Millrace {
            data_plane,
            control_plane,
            config,
            ledger,
            intake,
            queue,
            service,
            front,
            workers,
            cut,
            wake_all,
            background,
            control: control_task,
            database,
            lease,
            guard,
            embedded,
        })
    }

    /// The in-memory state.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The database behind it.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// Waits until an internal fault stops the process from taking orders.
    pub async fn poisoned(&self) -> String {
        let mut tick = tokio::time::interval(Duration::from_millis(50));
        loop {
            tick.tick().await;
            if let Some(reason) = self.ledger.poison.reason() {
                return reason.to_owned();
            }
        }
    }

    /// Stops taking orders, writes and answers what is held, and stops. True: nothing was left
    /// unwritten and nothing was wrong.
    pub async fn drain(self) -> bool {
        let Millrace {
            config,
            ledger,
            intake,
            queue,
            service,
            front,
            mut workers,
            cut,
            wake_all,
            ..
        } = self;
        let patience = Duration::from_millis(config.orders.timeout_ms) + DRAIN_MARGIN;
        tracing::info!(in_flight = ledger.pending.len(), "draining");
        intake.drain();
        if let Front::Hardened(server) = &front {
            server.stop_accepting();
        }
        queue.close();
        let ended = match tokio::time::timeout(patience, &mut workers).await {
            Ok(ended) => ended,
            Err(_) => {
                tracing::warn!(
                    "the database did not take every order in time; giving up what is not written"
                );
                let _ = cut.send(true);
                workers.await
            }
        };
        let mut clean = match ended {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::error!(reason = %error, "a worker did not finish");
                false
            }
            Err(_) => false,
        };

        // What nobody claimed is not placed; what may or may not be written is undecided.
        service.stop_waiting();
        let mut wakers = Vec::new();
        for pending in ledger.pending.all() {
            ledger.abandon(&pending);
            clean &= pending.slot.state() != SlotState::Claimed;
            pending.slot.take_wakers(|waker| wakers.push(waker));
        }
        wake_all(wakers);
        match front {
            Front::Hardened(server) => {
                let cut = tokio::task::spawn_blocking(move || server.drain(DRAIN_MARGIN))
                    .await
                    .unwrap_or_default();
                if cut > 0 {
                    tracing::warn!(
                        connections = cut,
                        "cut connections that did not take their answer"
                    );
                }
            }
            // It has no drain: its connections end with the process.
            Front::Minihttp => {}
        }

        let (stop_control, control_task) = self.control;
        let _ = stop_control.send(());
        let _ = tokio::time::timeout(DRAIN_MARGIN, control_task).await;
        self.background.stop();
        if let Err(error) = self
            .database
            .return_lease(self.lease, ledger.ids.now())
            .await
        {
            tracing::debug!(reason = %error, "could not give the lease on order ids back");
        }
        drop(self.guard);
        self.database.close();
        if let Some(embedded) = self.embedded {
            // Its keeper was aborted above and lets go at its next await.
            let embedded = Arc::into_inner(wait_for_sole_owner(embedded).await);
            if let Some(embedded) = embedded
                && let Err(error) = embedded.into_inner().stop().await
            {
                tracing::warn!(reason = %error, "our own PostgreSQL did not stop as it should");
            }
        }
        let _ = std::fs::remove_file(config.data_dir.join("addresses.json"));
        clean &= !ledger.poison.is_set();
        tracing::info!(clean, "stopped");
        clean
    }
}

fn bind(field: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).map_err(|source| StartError::Listen {
        field,
        address,
        source,
    })
}

fn serve_control(
    control: &ControlPlane,
    listener: TcpListener,
) -> std::io::Result<(oneshot::Sender<()>, JoinHandle<()>)> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let router = control.router();
    let task = tokio::spawn(async move {
        let serving = axum::serve(listener, router).with_graceful_shutdown(async move {
            let _ = stopped.await;
        });
        if let Err(error) = serving.await {
            tracing::error!(reason = %error, "the control plane stopped");
        }
    });
    Ok((stop, task))
}

/// Mounts `service` on the configured engine, and says how its gauges are refreshed.
fn serve_data(
    config: &Config,
    listener: TcpListener,
    service: Arc<Doorway>,
) -> Result<(Front, Refresh), StartError> {
    let settings = &config.data_plane;
    runtime::configure(settings.threads);
    let limits = Limits {
        connections_max: settings.connections_max,
        head_bytes_max: settings.head_bytes_max,
        body_bytes_max: settings.body_bytes_max,
        request_timeout: Duration::from_millis(settings.request_timeout_ms),
        idle_timeout: Duration::from_millis(settings.idle_timeout_ms),
        ..Limits::default()
    };
    match settings.engine {
        Engine::Hardened => {
            let server =
                Arc::new(hardened::serve(listener, service, limits).map_err(StartError::Engine)?);
            let counted = Arc::clone(&server);
            let refresh: Refresh =
                Arc::new(move |metrics| refresh_connections(metrics, counted.counters()));
            Ok((Front::Hardened(server), refresh))
        }
        Engine::Minihttp => {
            // It binds by itself.
            let address = listener.local_addr().map_err(StartError::Engine)?;
            drop(listener);
            minihttp::serve(address, service, &limits).map_err(StartError::Engine)?;
            Ok((Front::Minihttp, Arc::new(|_| {})))
        }
    }
}

fn refresh_connections(metrics: &Metrics, counters: &hardened::Counters) {
    use std::sync::atomic::Ordering::Relaxed;
    metrics.connections.set(counters.open.load(Relaxed) as i64);
    for reason in CloseReason::ALL {
        let closed = counters.closed(reason);
        metrics.connections_cut.catch_up(reason.label(), closed);
    }
}

/// Rebuilds the in-memory state from the database.
async fn recover(
    config: &Config,
    database: &Database,
    ids: IdClock,
    paused: bool,
) -> Result<Ledger, StoreError> {
    let workers_hold = config.worker_count() * config.workers.batch_rows_max;
    let in_flight_max = config.queue.capacity + workers_hold;
    let buyers = Buyers::new(
        config.orders.remembered_max,
        in_flight_max.min(config.orders.remembered_max),
    );
    let catalogue = Catalogue::default();
    catalogue.add(database.load_skus().await?);
    catalogue.set_paused(paused);
    let floor = ids.window_floor(config.orders.idempotency_window_ms);
    let restored = database
        .load_window(floor, |user, order| buyers.restore(user, order))
        .await?;
    tracing::info!(orders = restored, "recovered the idempotency window");
    Ok(Ledger {
        catalogue,
        buyers,
        refusals: Refusals::with_capacity(config.orders.sticky_refusals_max),
        recent: Recent::with_capacity(RECENT_ORDERS),
        pending: Pending::with_capacity(in_flight_max),
        poison: Poison::default(),
        ids,
    })
}

/// Waits for every worker. One that ends before the queue does, or panics, poisons the process.
async fn watch_workers(
    mut workers: JoinSet<Result<(), WorkerError>>,
    ledger: Arc<Ledger>,
) -> Result<(), WorkerError> {
    let mut result = Ok(());
    while let Some(ended) = workers.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                if matches!(error, WorkerError::Fatal(_)) {
                    ledger.poison.set(error.to_string());
                }
                result = Err(error);
            }
            Err(panic) => ledger.poison.set(format!("a worker panicked: {panic}")),
        }
    }
    result
}

/// Starts our own PostgreSQL again where it has died. Workers keep their batches meanwhile.
async fn keep_running(embedded: Arc<Mutex<Embedded>>) {
    let mut tick = tokio::time::interval(POSTGRES_WATCH);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let mut embedded = embedded.lock().await;
        if embedded.is_running() {
            continue;
        }
        tracing::error!("our own PostgreSQL has died; starting it again");
        match embedded.start_again().await {
            Ok(()) => tracing::info!("our own PostgreSQL runs again"),
            Err(error) => tracing::error!(reason = %error, "it did not start; it is tried again"),
        }
    }
}

async fn wait_for_sole_owner<T>(shared: Arc<T>) -> Arc<T> {
    while Arc::strong_count(&shared) > 1 {
        tokio::task::yield_now().await;
    }
    shared
}

/// Tasks that run as long as the process does. One that panics poisons it.
struct Background {
    ledger: Arc<Ledger>,
    tasks: Vec<AbortHandle>,
}

impl Background {
    fn new(ledger: Arc<Ledger>) -> Self {
        let tasks = Vec::new();
        Background { ledger, tasks }
    }

    fn run(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(work);
        self.tasks.push(task.abort_handle());
        let ledger = Arc::clone(&self.ledger);
        tokio::spawn(async move {
            if let Err(ended) = task.await
                && ended.is_panic()
            {
                ledger.poison.set(format!("{name} panicked: {ended}"));
            }
        });
    }

    fn stop(&self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

async fn renew_lease(database: Database, lease: NodeLease, ledger: Arc<Ledger>) {
    let mut tick = tokio::time::interval(LEASE_RENEWAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let until = ledger.ids.now().plus_ms(lease::ID_LEASE_MS);
        match database.renew_lease(lease, until).await {
            Ok(()) => ledger.ids.extend_lease(until),
            Err(error @ StoreError::Fenced { .. }) => {
                ledger.poison.set(error.to_string());
                return;
            }
            Err(error) => {
                tracing::warn!(reason = %error, "the lease on order ids was not renewed; it is tried again")
            }
        }
    }
}

async fn evict(ledger: Arc<Ledger>, intake: Arc<Intake>, window_ms: u64) {
    let mut tick = tokio::time::interval(EVICTION);
    loop {
        tick.tick().await;
        let (ledger, intake) = (Arc::clone(&ledger), Arc::clone(&intake));
        // Walks every record: not on a thread that has something better to do.
        let evicted = tokio::task::spawn_blocking(move || {
            intake.forget_idle();
            ledger
                .buyers
                .evict_before(ledger.ids.window_floor(window_ms))
        })
        .await;
        if let Ok(evicted @ 1..) = evicted {
            tracing::debug!(evicted, "forgot orders that left the idempotency window");
        }
    }
}
