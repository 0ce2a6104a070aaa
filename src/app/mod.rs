//! All wiring: the order in which things start and stop.
//!
//! ```text
//!   start:  start checks ─► listeners, planes ─► ownership: journal read or broker asked, PostgreSQL, schema, clocks, take over
//!                                               (a node of a cluster: PostgreSQL, schema, clocks, join, broker asked;
//!                                               a process on its own where nodes have not left: see `gone_nodes`)
//!           ─► recovery: broker's log read, order log replayed, memory rebuilt ─► order path: queue, workers
//!           ─► background tasks ─► the data plane's service, the intake opens
//!   drain:  the same from the end, see `drain`
//! ```

mod aside;
mod background;
pub(crate) mod brokers;
mod clock;
mod drain;
mod error;
mod events;
mod gone_nodes;
mod joining;
pub mod nodes;
mod open;
mod order_log;
mod order_path;
mod ownership;
mod planes;
pub mod preflight;
mod receipt_keys;
mod recovery;
pub mod start_checks;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use self::background::{Background, Handles};
pub use self::clock::ClockError;
pub use self::error::StartError;
pub use self::events::slots_database;
use self::joining::JoinParts;
use self::nodes::{Node, NodeParts};
pub use self::open::{OpenDatabase, open_database, open_existing_database, prepare_schema};
use self::order_path::OrderPath;
use self::ownership::Ownership;
use self::planes::{Listeners, Planes};
use crate::config::Config;
use crate::http::control_plane;
use crate::http::data_plane::context::Context;
use crate::http::data_plane::nodes::Nodes;
use crate::http::data_plane::payments::providers::Providers;
use crate::http::data_plane::payments::providers::standard::Standard;
use crate::http::data_plane::router::Router;
use crate::http::peers::pool::Peers;
use crate::http::tokens::Tokens;
use crate::metrics::Metrics;
use crate::pipeline::admin::audit::Auditor;
use crate::pipeline::admin::operator::{Operator, OperatorParts};
use crate::pipeline::admin::preflight::Preflighter;
use crate::pipeline::orders::intake::Intake;
use crate::pipeline::orders::lookup::OrderLookup;
use crate::queue::log::file::disk::make_directory;
use crate::spans::Spans;
use crate::state::State;
use crate::state::poison::Poison;
use crate::store::postgres::Database;
use crate::supervise::Supervisor;

/// A running Millrace.
pub struct Millrace {
    /// Address of the data plane.
    pub data_plane: SocketAddr,
    /// Address of the control plane.
    pub control_plane: SocketAddr,
    config: Config,
    state: Arc<State>,
    path: OrderPath,
    planes: Planes,
    service: Arc<Router>,
    node: Option<Node>,
    background: Background,
    ownership: Ownership,
    supervisor: Supervisor,
}

impl Millrace {
    /// Starts everything, in the order drawn above. Returns once orders are taken.
    ///
    /// # Errors
    /// [`StartError`]; everything started is stopped again.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_as(config, None).await
    }

    /// The same, with lanes that `node` deals by hand, for tests of requests at any node.
    ///
    /// # Errors
    /// [`StartError`]; everything started is stopped again.
    pub async fn start_as(config: Config, node: Option<NodeParts>) -> Result<Self, StartError> {
        let started = Instant::now();
        let providers = start_checks::look(&config)?;
        make_directory(&config.data_dir).map_err(|source| StartError::data_dir(&config, source))?;
        let listeners = Listeners::bind(&config)?;
        let metrics = Metrics::new()?;
        let receipt_secrets = receipt_keys::load(&config)?;
        // From here on, any task that ends by itself poisons the process.
        let poison = Arc::<Poison>::default();
        let poisoning = Arc::clone(&poison);
        let supervisor = Supervisor::new(Arc::new(move |reason| poisoning.set(reason)));
        let cluster = nodes::listener(&config)?;
        let planes = Planes::serve(&config, listeners, &metrics, &supervisor)?;
        let mut ownership = match cluster {
            None => Ownership::take(&config, &planes, &receipt_secrets).await?,
            Some(listener) => {
                let joining = JoinParts {
                    config: &config,
                    listener,
                    planes: &planes,
                    poison: &poison,
                    supervisor: &supervisor,
                };
                Ownership::join(joining, &receipt_secrets).await?
            }
        };
        let state = recovery::state(&config, &mut ownership, poison, &planes.control).await?;
        let seconds = started.elapsed().as_secs_f64();
        metrics.recovery_seconds.set(seconds);
        let path = OrderPath::start(
            &config,
            &planes,
            &mut ownership,
            &state,
            &metrics,
            &supervisor,
        );
        let path = path.await?;
        let joined = ownership.node.take();
        let parts = background::Parts {
            config: &config,
            state: &state,
            path: &path,
            ownership: &ownership,
            wake_all: &planes.wake_all,
            metrics: &metrics,
            member: joined.as_ref().map(|joined| Arc::clone(&joined.member)),
        };
        let (mut background, handles) = Background::start(&parts, supervisor.clone()).await?;
        let node = match &joined {
            None => node,
            Some(joined) => Some(joined.parts(&config, &ownership, &state)?),
        };
        let (nodes, joining) = node
            .map(|node| node.join(&config, &planes, &supervisor))
            .unzip();
        let service = data_plane_service(&parts, &handles, providers, nodes, planes.spans.clone());
        let calls = joining.map(|joining| joining.serve(&service, &supervisor));
        let mut node = calls.transpose()?;
        if let (Some(joined), Some(node)) = (joined, &mut node) {
            node.live(joined, &parts, &handles, &mut background).await?;
        }
        planes.gate.open(Arc::clone(&service));
        planes
            .control
            .recovered(control_plane_parts(&parts, handles, &planes)?);
        path.intake.open();
        tracing::info!(
            workers = config.worker_count(),
            skus = state.catalogue.all().len(),
            remembered = state.buyers.len(),
            epoch = ownership.lease.epoch,
            ms = started.elapsed().as_millis() as u64,
            "taking orders"
        );
        Ok(Millrace {
            data_plane: planes.data_plane,
            control_plane: planes.control_plane,
            config,
            state,
            path,
            planes,
            service,
            node,
            background,
            ownership,
            supervisor,
        })
    }

    /// The in-memory state.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// The intake, for callers without HTTP.
    pub fn intake(&self) -> &Arc<Intake> {
        &self.path.intake
    }

    /// The database.
    pub fn database(&self) -> &Database {
        &self.ownership.database
    }

    /// The links to the other nodes, if this process is one of a cluster.
    pub fn peers(&self) -> Option<&Arc<Peers>> {
        self.node.as_ref().map(|node| &node.peers)
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

    /// Stops taking orders, writes and answers the orders in flight, and stops. Returns true if nothing was
    /// left unwritten and nothing failed.
    pub async fn drain(self) -> bool {
        drain::drain(self).await
    }
}

/// The service of the data plane's requests.
fn data_plane_service(
    parts: &background::Parts<'_>,
    handles: &Handles,
    providers: Providers,
    nodes: Option<Nodes>,
    spans: Option<Spans>,
) -> Arc<Router> {
    let config = parts.config;
    let context = Context {
        intake: Arc::clone(&parts.path.intake),
        state: Arc::clone(parts.state),
        queue: Arc::clone(&parts.path.queue),
        lookup: OrderLookup::new(
            Arc::clone(parts.state),
            Arc::clone(&parts.path.queue),
            parts.ownership.database.clone(),
        ),
        database: parts.ownership.database.clone(),
        canceller: handles.canceller.clone(),
        callbacks: handles.callbacks.clone(),
        receipts: Arc::clone(&parts.ownership.receipts),
        user_index: config.database.user_index,
        runtime: Handle::current(),
        metrics: parts.metrics.clone(),
        order_timeout: Duration::from_millis(config.orders.timeout_ms),
        nodes,
        stopping: Default::default(),
    };
    let tokens = Tokens::new(&config.data_plane.token.0);
    let trust_network = config.data_plane.trust_network;
    let router = Router::new(context, providers, tokens, trust_network);
    Arc::new(router.with_spans(spans))
}

/// The parts that the control plane administers after recovery.
fn control_plane_parts(
    parts: &background::Parts<'_>,
    handles: Handles,
    planes: &Planes,
) -> Result<control_plane::Parts, StartError> {
    let (config, state, path) = (parts.config, parts.state, parts.path);
    let operators = handles.operators;
    let preflight = preflight::settings(config, Some(parts.metrics))?;
    Ok(control_plane::Parts {
        state: Arc::clone(state),
        intake: Arc::clone(&path.intake),
        queue: Arc::clone(&path.queue),
        lookup: OrderLookup::new(
            Arc::clone(state),
            Arc::clone(&path.queue),
            operators.clone(),
        ),
        user_index: config.database.user_index,
        member: parts.member.clone(),
        acknowledge: Arc::clone(&path.acknowledge),
        health: handles.health,
        sinks: handles.sinks,
        settings: Standard::warning(&config.payments.standard),
        order_timeout: Duration::from_millis(config.orders.timeout_ms),
        database: operators.clone(),
        payments: handles.payments.clone(),
        orphan_checks: handles.orphan_checks,
        receipts: Arc::clone(&parts.ownership.receipts),
        auditor: Auditor::new(
            operators.clone(),
            Arc::clone(state),
            Duration::from_millis(config.control_plane.audit_timeout_ms),
        ),
        preflighter: Preflighter::new(operators.clone(), preflight),
        operator: Operator::new(OperatorParts {
            state: Arc::clone(state),
            database: operators,
            lease: parts.ownership.lease,
            payments: handles.payments,
            pauses: handles.pauses,
            parking: handles.parking,
            hints: parts.hints(),
            payment_ttl_ms: config.orders.payment_ttl_ms,
        }),
        refresh: Arc::clone(&planes.refresh),
    })
}
