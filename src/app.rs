//! All wiring: what starts in which order, how state is recovered, how it is drained.
//!
//! ```text
//!   start:  bind ─► control plane ─► read the journal ─► PostgreSQL ─► schema ─► compare clocks
//!           ─► take over
//!           ─► replay the journal ─► recover ─► workers, deadlines, leases ─► open the intake
//!   drain:  close the intake ─► run the queue empty ─► settle what is left
//!           ─► answer what is in flight ─► close the control plane ─► PostgreSQL
//! ```

mod background;
mod clock;
pub mod preflight;
mod receipt_keys;
mod recovery;

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use self::background::{Background, evict, keep_running};
pub use self::clock::ClockError;
use crate::config::{Config, ConfigError, Engine, Migrate, Retention};
use crate::http::control_plane::{self, ControlPlane, Parts, Refresh};
use crate::http::data_plane::context::Context;
use crate::http::data_plane::router::{BODY_RULES, Router};
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::server::Service;
use crate::http::server::dispatcher::Dispatcher;
use crate::http::server::hardened::{self, CloseReason};
use crate::http::server::limits::{BodyLimits, Limits};
use crate::http::server::{minihttp, runtime};
use crate::http::tokens::Tokens;
use crate::metrics::Metrics;
use crate::order::receipt::ReceiptKeys;
use crate::order::{IdClock, OrderId, Refusal};
use crate::pipeline::admin::audit::Auditor;
use crate::pipeline::admin::operator::Operator;
use crate::pipeline::admin::pauses::Pauses;
use crate::pipeline::admin::pruning::{PrunedBelow, Pruning};
use crate::pipeline::failover::health::{self, Health, Looker};
use crate::pipeline::failover::lease::{self, AcknowledgeLease, Leases};
use crate::pipeline::failover::restore::{Restorer, Watermarks};
use crate::pipeline::orders::cancel::Canceller;
use crate::pipeline::orders::intake::Intake;
use crate::pipeline::orders::parking::Parking;
use crate::pipeline::orders::worker::{Worker, WorkerError, WorkerSlot};
use crate::pipeline::orders::worker_pool::WorkerPool;
use crate::pipeline::payments::callbacks::Callbacks;
use crate::pipeline::payments::expiry::Expiry;
use crate::pipeline::payments::processor::PaymentProcessor;
use crate::pipeline::payments::reconciler::{OrphanChecks, Reconciler};
use crate::pipeline::payments::settler::{Settler, SettlerParts, Signals};
use crate::pipeline::{WakeAll, failover::wal_retention, orders::deadlines};
use crate::queue::journal::disk::make_directory;
use crate::queue::journal::{JournalError, JournalParts, JournalQueue};
use crate::queue::{OrderQueue, RingQueue};
use crate::state::State;
use crate::state::pending::SlotState;
use crate::state::poison::Poison;
use crate::store::batch::BatchWriter;
use crate::store::embedded::{DATABASE, Embedded, EmbeddedError, EmbeddedOptions};
use crate::store::postgres::lease::{NodeGuard, Taken};
use crate::store::postgres::{Database, NodeLease};
use crate::store::settlement::SettlementWriter;
use crate::store::{StoreError, schema};
use crate::supervise::Supervisor;

/// Connections for operators.
const OPERATORS_POOL: usize = 4;
/// Connections for what watches a failover: lost commits, and how far standbys are.
const WATCH_POOL: usize = 2;
/// Expiry, the payment processor, callbacks.
const SETTLERS: usize = 3;
/// Connections of each settler, for reading.
const SETTLER_POOL: usize = 1;
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
    /// A directory cannot be used.
    #[error("cannot use {path} ({field}): {source}")]
    Directory {
        /// Which setting.
        field: &'static str,
        /// Its value.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The key that signs receipts cannot be read or made.
    #[error("cannot use the key of receipts in {path}: {source}")]
    ReceiptKey {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A setting that only shows at its use.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A thread or socket could not be made.
    #[error("cannot start the data plane: {0}")]
    Engine(std::io::Error),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(JournalError),
    /// The journal that may hold acknowledged orders is not here.
    #[error(
        "journal {noted} may hold acknowledged orders that the database does not have yet, and it is not here: {found}. Start with queue.backend = \"journal\" and queue.journal.dir where it is; or, if it is lost, give its orders up with `millrace journal abandon`"
    )]
    JournalAbsent {
        /// Its name.
        noted: String,
        /// What is here instead.
        found: String,
    },
    /// The journal here was written for another database.
    #[error(
        "the journal in {directory} holds {records} orders, and this database does not know it: it belongs to another one. Correct database.url or queue.journal.dir, or move the directory away"
    )]
    JournalForeign {
        /// Where it is.
        directory: PathBuf,
        /// How many records it has.
        records: u64,
    },
    /// The clocks do not agree.
    #[error(transparent)]
    Clock(#[from] ClockError),
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
    state: Arc<State>,
    intake: Arc<Intake>,
    queue: Arc<dyn OrderQueue>,
    /// The same, where it is a journal, and the name of that.
    journal: Option<(Arc<JournalQueue>, String)>,
    service: Arc<Router>,
    front: Front,
    workers: JoinHandle<Option<bool>>,
    cut: watch::Sender<bool>,
    wake_all: WakeAll,
    background: Background,
    control: (oneshot::Sender<()>, JoinHandle<Option<()>>),
    supervisor: Supervisor,
    database: Database,
    lease: NodeLease,
    /// Keeps other processes away from this database.
    guard: Arc<Mutex<NodeGuard>>,
    embedded: Option<Arc<Mutex<Embedded>>>,
}

/// The engine that carries the data plane.
enum Front {
    Hardened(Arc<hardened::Server>),
    Minihttp,
}

/// Answers `503` until recovery has set the service.
#[derive(Default)]
struct NotReadyGate {
    service: OnceLock<Arc<Router>>,
}

impl Service for NotReadyGate {
    fn authorize(&self, head: &Request<'_>) -> Result<(), Problem> {
        match self.service.get() {
            Some(service) => service.authorize(head),
            None => Err(Problem::from(Refusal::NotReady)),
        }
    }

    fn call(&self, request: &Request<'_>, response: &mut Response) {
        match self.service.get() {
            Some(service) => service.call(request, response),
            None => Problem::from(Refusal::NotReady).write_to(response),
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
        let providers = preflight::look(&config)?;
        make_directory(&config.data_dir).map_err(data_dir)?;
        // The first two lines of the log are the addresses, whatever else there is to say.
        let data_listener = bind("data_plane.listen", config.data_plane.listen)?;
        let control_listener = bind("control_plane.listen", config.control_plane.listen)?;
        let data_plane = data_listener.local_addr().map_err(StartError::Engine)?;
        let control_plane = control_listener.local_addr().map_err(StartError::Engine)?;
        tracing::info!(address = %data_plane, "data plane listening");
        tracing::info!(address = %control_plane, "control plane listening");
        let metrics = Metrics::new()?;
        let receipt_secrets = receipt_keys::load(&config)?;

        let control =
            ControlPlane::new(metrics.clone(), Tokens::new(&config.control_plane.token.0));
        // What ends by itself, from here on, stops the process.
        let poison = Arc::<Poison>::default();
        let poisoning = Arc::clone(&poison);
        let supervisor = Supervisor::new(Arc::new(move |reason| poisoning.set(reason)));
        let control_task =
            serve_control(&control, control_listener, &supervisor).map_err(StartError::Engine)?;
        let gate = Arc::new(NotReadyGate::default());
        let (front, refresh) = serve_data(&config, data_listener, Arc::clone(&gate), &supervisor)?;
        let dispatcher = Dispatcher::start_supervised(&supervisor);
        let wake_all: WakeAll = Arc::new(move |wakers| dispatcher.wake_all(wakers));

        let journal = recovery::open_journal(&config, &control).await?;
        control.progress("opening the database".to_owned());
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
        let noted = database.noted_journal(&guard).await?;
        recovery::check_journal(&config, journal.as_ref(), noted.as_ref())?;
        let worker_count = config.worker_count();
        // More writers than workers: one for the replay and for what a failover loses, one for parked
        // orders, and three for what happens to orders afterwards (expiry, processor, callbacks).
        let writers = i16::try_from(worker_count + 2 + SETTLERS).unwrap_or(i16::MAX);
        let clock = clock::check(&config, &database, &guard, embedded.is_some()).await?;
        let ids_from = recovery::id_high_water(journal.as_ref()).max(clock.now());
        let Taken {
            lease,
            id_high_water,
            ids_leased_until,
            paused,
            receipts: issuer,
            guard,
        } = database.take_over(guard, writers, ids_from).await?;
        let guard = Arc::new(Mutex::new(NodeGuard::keep(database.clone(), guard).await?));
        let receipts = Arc::new(ReceiptKeys::new(&receipt_secrets, &issuer));
        let orphans = recovery::orphans(&database).await?;
        let journal = match journal {
            None => None,
            Some(journal) => Some(
                recovery::replay(
                    &config, &database, lease, journal, &orphans, clock, &control,
                )
                .await?,
            ),
        };
        control.progress("reading the database".to_owned());
        let ids = IdClock::going_on(clock, lease.node as u8, id_high_water, ids_leased_until);
        // From here on a key is known for this long. What the journal brought is of an earlier window.
        let window_from = OrderId::floor_of(ids.now());
        database
            .note_window(lease, window_from, config.orders.idempotency_window_ms)
            .await?;
        let recovered = recovery::recover(
            &config,
            &database,
            lease,
            ids,
            orphans,
            Arc::clone(&poison),
            &control,
        );
        let state = Arc::new(recovered.await?);
        state.catalogue.set_paused(paused);
        metrics
            .recovery_seconds
            .set(started.elapsed().as_secs_f64());
        metrics.recovered_orders.set(state.buyers.len() as i64);
        metrics.queue_capacity.set(config.queue.capacity as i64);

        let journal_settings = &config.queue.journal;
        let retain = !journal_settings.retain_for_slots.0.is_empty();
        let acknowledge = Arc::new(AcknowledgeLease::new(journal_settings.lease_ms));
        let journal_name = journal.as_ref().map(|journal| journal.identity.name());
        let journal = match journal {
            None => None,
            Some(opened) => {
                metrics
                    .journal_bytes_max
                    .set(journal_settings.bytes_max as i64);
                let may_acknowledge = Arc::clone(&acknowledge);
                let parts = JournalParts {
                    capacity: config.queue.capacity,
                    bytes_max: journal_settings.bytes_max,
                    epoch: lease.epoch,
                    retain,
                    pending: Arc::clone(&state.pending),
                    wake_all: Arc::clone(&wake_all),
                    may_acknowledge: Arc::new(move || may_acknowledge.holds()),
                    on_end: Arc::new(move |reason| poison.set(reason)),
                    metrics: metrics.clone(),
                };
                // Makes its first segment, which waits for the disk.
                let started =
                    tokio::task::spawn_blocking(move || JournalQueue::start(opened, parts));
                let started = started
                    .await
                    .map_err(|panic| StartError::Engine(std::io::Error::other(panic)))?;
                Some(Arc::new(started?))
            }
        };
        if let Some(name) = &journal_name {
            // After its first segment is there, which keeps its name, and before it acknowledges.
            database.note_journal(lease, name).await?;
        }
        let queue: Arc<dyn OrderQueue> = match &journal {
            Some(journal) => Arc::clone(journal) as Arc<dyn OrderQueue>,
            None => Arc::new(RingQueue::new(config.queue.capacity)),
        };
        let intake = Intake::new(
            Arc::clone(&state),
            Arc::clone(&queue),
            config.orders.payment_ttl_ms,
        );
        let intake = Arc::new(intake.with_rate_limits(&config.rate_limit));
        let (cut, cut_seen) = watch::channel(false);
        let watermarks = Arc::new(Watermarks::new(worker_count));
        let pool = Arc::<WorkerPool>::default();
        let mut workers = JoinSet::new();
        for shard in 0..worker_count {
            let number = i16::try_from(shard).unwrap_or(i16::MAX);
            let worker = Worker::new(
                BatchWriter::new(database.clone(), lease, number),
                WorkerSlot {
                    shard,
                    watermarks: Arc::clone(&watermarks),
                    pool: Arc::clone(&pool),
                },
                Arc::clone(&queue),
                Arc::clone(&state),
                Arc::clone(&wake_all),
                metrics.clone(),
                config.workers.batch_rows_max,
                cut_seen.clone(),
            );
            let state = Arc::clone(&state);
            supervisor.task_of(&mut workers, "a worker", work(worker, state));
        }
        let embedded = embedded.map(|embedded| Arc::new(Mutex::new(embedded)));
        let workers = supervisor.task("the wait for the workers", all_end(workers));
        let operators = database.with_own_pool(OPERATORS_POOL)?;
        let mut background = Background::new(supervisor.clone());
        background.run(
            "the deadline keeper",
            deadlines::keep(Arc::clone(&state), Arc::clone(&wake_all), metrics.clone()),
        );
        let leases = Leases {
            guard: Arc::clone(&guard),
            lease,
            state: Arc::clone(&state),
            acknowledge: Arc::clone(&acknowledge),
            journal: journal.clone(),
        };
        leases.renew().await?;
        background.run("the leases", lease::keep(leases));
        let watching = database.with_own_pool(WATCH_POOL)?;
        let pruned_below = PrunedBelow::default();
        let restorer = Restorer {
            state: Arc::clone(&state),
            queue: Arc::clone(&queue),
            journal: journal.clone(),
            database: watching.clone(),
            lease,
            watermarks: Arc::clone(&watermarks),
            pruned_below: Arc::clone(&pruned_below),
            metrics: metrics.clone(),
            rows_max: config.workers.batch_rows_max,
        };
        background.run("the watch for lost commits", restorer.watch());
        if let Some(journal) = journal.as_ref().filter(|_| retain) {
            let slots = journal_settings.retain_for_slots.0.clone();
            let keeping = wal_retention::keep(Arc::clone(journal), watching, slots, watermarks);
            background.run("the retention of the journal", keeping);
        }
        let window_ms = config.orders.idempotency_window_ms;
        let orphan_checks = OrphanChecks {
            count: config.payments.orphan_checks,
            first: Duration::from_millis(config.payments.orphan_check_ms),
        };
        let signals = Arc::new(Signals::default());
        let settler = |writer: i16| -> Result<Settler, StoreError> {
            Ok(Settler::new(SettlerParts {
                state: Arc::clone(&state),
                database: database.with_own_pool(SETTLER_POOL)?,
                lease,
                writer: SettlementWriter::new(database.clone(), lease, writer),
                signals: Arc::clone(&signals),
                metrics: metrics.clone(),
            }))
        };
        let (callbacks_handle, callbacks) =
            Callbacks::new(settler(writers - 1)?, config.payments.orphan_check_ms);
        background.run("callbacks", callbacks.run());
        let (payments_handle, processor) = PaymentProcessor::new(Reconciler::new(
            settler(writers - 2)?,
            Arc::clone(&queue),
            Arc::clone(&receipts),
            orphan_checks,
        ));
        background.run("the payment processor", processor.run());
        background.run(
            "expiry",
            Expiry::new(settler(writers - 3)?, window_ms).run(),
        );
        let (parking_desk, parking) = Parking::new(
            Arc::clone(&state),
            operators.clone(),
            lease,
            BatchWriter::new(database.clone(), lease, writers - 4),
            metrics.clone(),
        );
        background.run("the keeper of parked orders", parking.run());
        if config.retention != Retention::default() {
            let pruning = Pruning {
                database: database.clone(),
                lease,
                state: Arc::clone(&state),
                settings: config.retention,
                pruned_below,
                metrics: metrics.clone(),
            };
            background.run("the deletion of old rows", pruning.keep());
        }
        // On a connection of its own: an emergency waits behind nobody.
        let own = database.with_own_pool(1)?;
        let pauses = Arc::new(Pauses::new(Arc::clone(&state), own, lease));
        background.run("the keeper of pauses", Arc::clone(&pauses).keep_storing());
        let evicting = evict(
            Arc::clone(&state),
            Arc::clone(&intake),
            window_ms,
            config.orders.payment_ttl_ms,
        );
        background.run("the eviction of old orders", evicting);
        if let Some(embedded) = &embedded {
            background.run(
                "the keeper of our own PostgreSQL",
                keep_running(Arc::clone(embedded)),
            );
        }

        let canceller = Canceller::new(Arc::clone(&state), database.clone(), lease);
        background.run(
            "the settling of cancellations",
            canceller.clone().settle_lost(),
        );
        let context = Context {
            intake: Arc::clone(&intake),
            state: Arc::clone(&state),
            queue: Arc::clone(&queue),
            database: database.clone(),
            canceller,
            callbacks: callbacks_handle,
            receipts: Arc::clone(&receipts),
            user_index: config.database.user_index,
            runtime: Handle::current(),
            metrics,
            order_timeout: Duration::from_millis(config.orders.timeout_ms),
            stopping: Default::default(),
        };
        let service = Arc::new(Router::new(
            context,
            providers,
            Tokens::new(&config.data_plane.token.0),
            config.data_plane.trust_network,
        ));
        let _ = gate.service.set(Arc::clone(&service));
        let health = Arc::<Health>::default();
        let mut looker = Looker::new(database.with_own_pool(1)?, Arc::clone(&health));
        // So that whoever is told that orders are taken finds it ready.
        looker.look().await;
        background.run("the look at the database", health::keep(looker));
        // Operators never wait behind buyers' look-ups.
        control.recovered(Parts {
            state: Arc::clone(&state),
            intake: Arc::clone(&intake),
            queue: Arc::clone(&queue),
            journal: journal.clone(),
            acknowledge,
            health,
            order_timeout: Duration::from_millis(config.orders.timeout_ms),
            database: operators.clone(),
            payments: payments_handle.clone(),
            orphan_checks,
            receipts,
            auditor: Auditor::new(
                operators.clone(),
                Arc::clone(&state),
                Duration::from_millis(config.control_plane.audit_timeout_ms),
            ),
            operator: Operator::new(
                Arc::clone(&state),
                operators,
                lease,
                payments_handle,
                pauses,
                parking_desk,
                config.orders.payment_ttl_ms,
            ),
            refresh,
        });
        intake.open();
        tracing::info!(
            workers = worker_count,
            skus = state.catalogue.all().len(),
            remembered = state.buyers.len(),
            epoch = lease.epoch,
            ms = started.elapsed().as_millis() as u64,
            "taking orders"
        );
        Ok(Millrace {
            data_plane,
            control_plane,
            config,
            state,
            intake,
            queue,
            journal: journal.zip(journal_name),
            service,
            front,
            workers,
            cut,
            wake_all,
            background,
            control: control_task,
            supervisor,
            database,
            lease,
            guard,
            embedded,
        })
    }

    /// The in-memory state.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// The way in, beside HTTP.
    pub fn intake(&self) -> &Arc<Intake> {
        &self.intake
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
            if let Some(reason) = self.state.poison.reason() {
                return reason.to_owned();
            }
        }
    }

    /// Stops taking orders, writes and answers what is held, and stops. True: nothing was left
    /// unwritten and nothing was wrong.
    pub async fn drain(self) -> bool {
        let Millrace {
            config,
            state,
            intake,
            queue,
            journal,
            service,
            front,
            mut workers,
            cut,
            wake_all,
            supervisor,
            ..
        } = self;
        let patience = Duration::from_millis(config.orders.timeout_ms) + DRAIN_MARGIN;
        tracing::info!(in_flight = state.pending.len(), "draining");
        supervisor.stop();
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
                if let Some((journal, _)) = &journal {
                    journal.leave_backlog();
                }
                let _ = cut.send(true);
                workers.await
            }
        };
        let mut clean = matches!(ended, Ok(Some(true)));

        // What nobody claimed is not placed; what may or may not be written is undecided.
        service.stop_waiting();
        let mut wakers = Vec::new();
        if let Some((journal, _)) = &journal {
            let stopping = Arc::clone(journal);
            let never_written = tokio::task::spawn_blocking(move || stopping.stop()).await;
            for pending in never_written.unwrap_or_default() {
                state.refuse(&pending);
                pending.slot.take_wakers(|waker| wakers.push(waker));
            }
        }
        for pending in state.pending.all() {
            clean &= !state.abandon(&pending);
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
            .return_lease(self.lease, state.ids.now())
            .await
        {
            tracing::debug!(reason = %error, "could not give the lease on order ids back");
        }
        if let Some((journal, name)) = &journal {
            match journal.outstanding() {
                0 => {
                    // Another process may go on without it.
                    let released = self.database.release_journal(self.lease, name).await;
                    if let Err(error) = released {
                        tracing::debug!(reason = %error, "could not note that the journal is empty");
                    } else if config.queue.journal.retain_for_slots.0.is_empty()
                        && let Err(error) = journal.erase()
                    {
                        tracing::warn!(reason = %error, "could not delete the journal's segments");
                    }
                }
                left => {
                    clean = false;
                    tracing::warn!(
                        orders = left,
                        "acknowledged orders stay in the journal; the next start writes them"
                    );
                }
            }
        }
        // Its keeper was aborted above and lets go at its next await.
        drop(wait_for_sole_owner(self.guard).await);
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
        clean &= !state.poison.is_set();
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
    supervisor: &Supervisor,
) -> std::io::Result<(oneshot::Sender<()>, JoinHandle<Option<()>>)> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let router = control_plane::router::router(control);
    let task = supervisor.task("the control plane", async move {
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
    service: Arc<NotReadyGate>,
    supervisor: &Supervisor,
) -> Result<(Front, Refresh), StartError> {
    let settings = &config.data_plane;
    runtime::configure(settings.threads);
    let limits = Limits {
        connections_max: settings.connections_max,
        head_bytes_max: settings.head_bytes_max,
        bodies: BodyLimits {
            bytes_max: settings.body_bytes_max,
            rules: BODY_RULES,
        },
        body_bytes_total_max: settings.body_bytes_total_max,
        request_timeout: Duration::from_millis(settings.request_timeout_ms),
        idle_timeout: Duration::from_millis(settings.idle_timeout_ms),
    };
    match settings.engine {
        Engine::Hardened => {
            let server = hardened::serve_supervised(listener, service, limits, supervisor);
            let server = Arc::new(server.map_err(StartError::Engine)?);
            let counted = Arc::clone(&server);
            let refresh: Refresh =
                Arc::new(move |metrics| refresh_connections(metrics, counted.counters()));
            Ok((Front::Hardened(server), refresh))
        }
        Engine::Minihttp => {
            // It binds by itself.
            let address = listener.local_addr().map_err(StartError::Engine)?;
            drop(listener);
            minihttp::serve_supervised(address, service, &limits, supervisor)
                .map_err(StartError::Engine)?;
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

/// A worker's whole life. One that may not go on poisons the process with its reason.
async fn work(worker: Worker, state: Arc<State>) -> Result<(), WorkerError> {
    let ended = worker.run().await;
    if let Err(error @ WorkerError::Fatal(_)) = &ended {
        state.poison.set(error.to_string());
    }
    ended
}

/// Waits for every worker. False: one did not finish what it had.
async fn all_end(mut workers: JoinSet<Option<Result<(), WorkerError>>>) -> bool {
    let mut finished = true;
    while let Some(ended) = workers.join_next().await {
        match ended {
            Ok(Some(Ok(()))) => {}
            Ok(Some(Err(error))) => {
                tracing::error!(reason = %error, "a worker did not finish");
                finished = false;
            }
            // Reported by its supervisor.
            Ok(None) | Err(_) => finished = false,
        }
    }
    finished
}

async fn wait_for_sole_owner<T>(shared: Arc<T>) -> Arc<T> {
    while Arc::strong_count(&shared) > 1 {
        tokio::task::yield_now().await;
    }
    shared
}
