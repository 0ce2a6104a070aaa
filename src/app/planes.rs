//! The two planes. They answer from the first moment on: the control plane with its progress, the data plane
//! with `503 not_ready` until its service is set.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use opentelemetry_otlp::SpanExporter;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::StartError;
use crate::config::{Config, ConfigError, Engine};
use crate::http::control_plane::{self, ControlPlane, Refresh};
use crate::http::data_plane::router::{BODY_RULES, Router};
use crate::http::message::{Request, Response};
use crate::http::otlp;
use crate::http::problem::Problem;
use crate::http::server::Service;
use crate::http::server::dispatcher::Dispatcher;
use crate::http::server::hardened::{self, CloseReason};
use crate::http::server::limits::{BodyLimits, Limits};
use crate::http::server::{minihttp, runtime};
use crate::http::tokens::Tokens;
use crate::metrics::Metrics;
use crate::order::Refusal;
use crate::pipeline::WakeAll;
use crate::spans::Spans;
use crate::spans::export::Bounded;
use crate::supervise::Supervisor;

/// The file under `data_dir` with both addresses and the process id, while the process runs.
const ADDRESSES: &str = "addresses.json";

/// Both sockets, bound but not served yet.
pub(super) struct Listeners {
    data: TcpListener,
    control: TcpListener,
    pub(super) data_plane: SocketAddr,
    pub(super) control_plane: SocketAddr,
}

impl Listeners {
    /// Binds both. Their addresses are the first two lines of the log.
    pub(super) fn bind(config: &Config) -> Result<Self, StartError> {
        let data = bind("data_plane.listen", config.data_plane.listen)?;
        let control = bind("control_plane.listen", config.control_plane.listen)?;
        let data_plane = data.local_addr().map_err(StartError::Engine)?;
        let control_plane = control.local_addr().map_err(StartError::Engine)?;
        tracing::info!(address = %data_plane, "data plane listening");
        tracing::info!(address = %control_plane, "control plane listening");
        Ok(Listeners {
            data,
            control,
            data_plane,
            control_plane,
        })
    }
}

fn bind(field: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).map_err(|source| StartError::Listen {
        field,
        address,
        source,
    })
}

/// Both planes, being served.
pub(super) struct Planes {
    pub(super) data_plane: SocketAddr,
    pub(super) control_plane: SocketAddr,
    pub(super) control: ControlPlane,
    pub(super) gate: Arc<NotReadyGate>,
    pub(super) engine: RunningEngine,
    /// Refreshes the gauges of the data plane's connections.
    pub(super) refresh: Refresh,
    /// Wakes the connections that wait for orders.
    pub(super) wake_all: WakeAll,
    /// If requests are traced.
    pub(super) spans: Option<Spans>,
    control_task: ControlTask,
}

/// The control plane's task. Dropping it asks the task to end, also in a start that failed.
struct ControlTask {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Option<()>>,
    supervisor: Supervisor,
}

impl Drop for ControlTask {
    fn drop(&mut self) {
        // Before the sender is dropped: an end that was asked for poisons nothing.
        self.supervisor.stop();
    }
}

impl Planes {
    /// Serves both.
    pub(super) fn serve(
        config: &Config,
        listeners: Listeners,
        metrics: &Metrics,
        supervisor: &Supervisor,
    ) -> Result<Self, StartError> {
        let control =
            ControlPlane::new(metrics.clone(), Tokens::new(&config.control_plane.token.0));
        let control_task =
            serve_control(&control, listeners.control, supervisor).map_err(StartError::Engine)?;
        let gate = Arc::new(NotReadyGate::default());
        let (engine, refresh) = serve_data(config, listeners.data, Arc::clone(&gate), supervisor)?;
        let dispatcher = Dispatcher::start_supervised(supervisor);
        Ok(Planes {
            data_plane: listeners.data_plane,
            control_plane: listeners.control_plane,
            control,
            gate,
            engine,
            refresh,
            wake_all: Arc::new(move |wakers| dispatcher.wake_all(wakers)),
            spans: spans(config, metrics)?,
            control_task,
        })
    }

    /// Writes the file with the addresses, for scripts.
    pub(super) fn write_addresses(&self, data_dir: &Path) -> std::io::Result<()> {
        let addresses = serde_json::json!({
            "data_plane": self.data_plane.to_string(),
            "control_plane": self.control_plane.to_string(),
            "pid": std::process::id(),
        });
        std::fs::write(data_dir.join(ADDRESSES), format!("{addresses:#}\n"))
    }

    /// Stops the control plane, within `limit`.
    pub(super) async fn stop_control(self, limit: Duration) {
        let mut control = self.control_task;
        control.stop.take();
        let _ = tokio::time::timeout(limit, &mut control.task).await;
    }
}

/// The spans of requests, if there is a collector.
fn spans(config: &Config, metrics: &Metrics) -> Result<Option<Spans>, StartError> {
    let Some(exporter) = span_exporter(config)? else {
        return Ok(None);
    };
    let (delivered, dropped) = (&metrics.spans_delivered, &metrics.spans_dropped);
    let exporter = Bounded::new(exporter, delivered.clone(), dropped.clone());
    Ok(Some(Spans::new(exporter, config.tracing.sample)))
}

/// The exporter to the configured collector. It has not connected yet.
pub(super) fn span_exporter(config: &Config) -> Result<Option<SpanExporter>, StartError> {
    let url = &config.tracing.otlp_url;
    if url.is_empty() {
        return Ok(None);
    }
    let exporter = otlp::exporter(url, Handle::current());
    exporter.map(Some).map_err(|message| {
        StartError::Config(ConfigError::Field {
            field: "tracing.otlp_url",
            message,
        })
    })
}

/// Removes the file with the addresses.
pub(super) fn remove_addresses(data_dir: &Path) {
    let _ = std::fs::remove_file(data_dir.join(ADDRESSES));
}

/// The engine that carries the data plane.
#[derive(Clone)]
pub(super) enum RunningEngine {
    Hardened(Arc<hardened::Server>),
    Minihttp,
}

/// Answers `503` until recovery has set the service.
#[derive(Default)]
pub(super) struct NotReadyGate {
    service: OnceLock<Arc<Router>>,
}

impl NotReadyGate {
    /// Passes requests to `service` from now on.
    pub(super) fn open(&self, service: Arc<Router>) {
        let _ = self.service.set(service);
    }
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

fn serve_control(
    control: &ControlPlane,
    listener: TcpListener,
    supervisor: &Supervisor,
) -> std::io::Result<ControlTask> {
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
    Ok(ControlTask {
        stop: Some(stop),
        task,
        supervisor: supervisor.clone(),
    })
}

/// Serves `service` on the configured engine; returns the function that refreshes its gauges.
fn serve_data(
    config: &Config,
    listener: TcpListener,
    service: Arc<NotReadyGate>,
    supervisor: &Supervisor,
) -> Result<(RunningEngine, Refresh), StartError> {
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
            Ok((RunningEngine::Hardened(server), refresh))
        }
        Engine::Minihttp => {
            // This engine binds the address by itself.
            let address = listener.local_addr().map_err(StartError::Engine)?;
            drop(listener);
            minihttp::serve_supervised(address, service, &limits, supervisor)
                .map_err(StartError::Engine)?;
            Ok((RunningEngine::Minihttp, Arc::new(|_| {})))
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
