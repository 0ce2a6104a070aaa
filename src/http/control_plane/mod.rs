//! The control plane, for operators and machines: health, metrics, administration, audit.
//!
//! It answers from the first moment on; before recovery is done health, metrics and profiles do (a
//! start that takes long is worth one), and everything else is `503 not_ready`.

mod access;
mod dashboard;
mod dead_letters;
mod extract;
mod failure;
mod health;
mod live;
mod payments;
mod profile;
mod routes;
mod skus;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::HeaderMap;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};

use crate::http::problem::Problem;
use crate::http::tokens::Tokens;
use crate::metrics::Metrics;
use crate::order::IdempotencyKey;
use crate::order::receipt::ReceiptKeys;
use crate::pipeline::admin::audit::Auditor;
use crate::pipeline::admin::operator::Operator;
use crate::pipeline::failover::health::Health;
use crate::pipeline::failover::lease::AcknowledgeLease;
use crate::pipeline::orders::intake::Intake;
use crate::pipeline::payments::processor::{OrphanChecks, PaymentsHandle};
use crate::queue::OrderQueue;
use crate::queue::journal::JournalQueue;
use crate::store::postgres::Database;
use access::Sessions;
use failure::Failure;

/// Longest body of a request in bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Refreshes gauges that somebody else counts, before metrics are rendered.
pub type Refresh = Arc<dyn Fn(&Metrics) + Send + Sync>;

/// The control plane. Cheap to clone.
#[derive(Clone)]
pub struct ControlPlane {
    shared: Arc<Shared>,
}

struct Shared {
    metrics: Metrics,
    tokens: Tokens,
    sessions: Sessions,
    progress: ArcSwap<String>,
    parts: OnceLock<Parts>,
}

/// What it administers, there once recovery is done.
pub struct Parts {
    /// The in-memory state.
    pub state: Arc<crate::state::State>,
    /// The way in, for its gate.
    pub intake: Arc<Intake>,
    /// The queue, for its depth.
    pub queue: Arc<dyn OrderQueue>,
    /// The same, where it is a journal.
    pub journal: Option<Arc<JournalQueue>>,
    /// The right to acknowledge orders before they are rows.
    pub acknowledge: Arc<AcknowledgeLease>,
    /// How the database does.
    pub health: Arc<Health>,
    /// How long an order may wait, and so how long none may be written while one does.
    pub order_timeout: Duration,
    /// The database.
    pub database: Database,
    /// For payments.
    pub payments: PaymentsHandle,
    /// How long a payment looks for its order.
    pub orphan_checks: OrphanChecks,
    /// What reads receipts.
    pub receipts: Arc<ReceiptKeys>,
    /// Recomputes what the database can show.
    pub auditor: Auditor,
    /// An operator's hands.
    pub operator: Operator,
    /// Brings gauges up to date.
    pub refresh: Refresh,
}

impl ControlPlane {
    /// A control plane that answers health and metrics.
    pub fn new(metrics: Metrics, tokens: Tokens) -> Self {
        let shared = Shared {
            metrics,
            tokens,
            sessions: Sessions::default(),
            progress: ArcSwap::from_pointee("starting".to_owned()),
            parts: OnceLock::new(),
        };
        ControlPlane {
            shared: Arc::new(shared),
        }
    }

    /// Says how far recovery is, for `readyz`.
    pub fn progress(&self, text: String) {
        self.shared.progress.store(Arc::new(text));
    }

    /// Gives it what it administers, once.
    pub fn recovered(&self, parts: Parts) {
        let _ = self.shared.parts.set(parts);
    }

    /// Everything in the list of `routes`, and a problem for everything else.
    pub fn router(&self) -> Router {
        let (mut open, mut finished, mut guarded) = (Router::new(), Router::new(), Router::new());
        for route in routes::routes() {
            let routes = match (route.open, route.ends_with_client) {
                (true, _) => &mut open,
                (false, false) => &mut finished,
                (false, true) => &mut guarded,
            };
            let mut serve = route.serve;
            if let Some(takes) = route.takes {
                serve = serve.route_layer(middleware::from_fn_with_state(takes, extract::only));
            }
            *routes = std::mem::take(routes).route(route.path, serve);
        }
        let guard = middleware::from_fn_with_state(self.clone(), access::authorize);
        // Innermost, so that it wraps only what is carried out.
        let finished = finished.route_layer(middleware::from_fn(run_to_the_end));
        open.merge(guarded.merge(finished).route_layer(guard))
            .fallback(|| async { Failure(Problem::new(404, "not_found", "nothing is here")) })
            .method_not_allowed_fallback(|| async {
                Failure(Problem::new(
                    405,
                    "method_not_allowed",
                    "this method is not allowed here",
                ))
            })
            .layer(middleware::from_fn_with_state(self.clone(), access::look))
            .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
            .with_state(self.clone())
    }

    /// Method and path of everything that the control plane serves, as OpenAPI writes paths.
    pub fn routes() -> Vec<(&'static str, &'static str)> {
        let routes = routes::routes().into_iter();
        routes.map(|route| (route.method, route.path)).collect()
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    fn parts(&self) -> Result<&Parts, Failure> {
        self.shared.parts.get().ok_or_else(|| {
            Failure(Problem::new(503, "not_ready", "still recovering; see /readyz").retry_after(1))
        })
    }
}

async fn openapi() -> Response {
    let json = [(axum::http::header::CONTENT_TYPE, "application/json")];
    (json, crate::http::OPENAPI).into_response()
}

/// A client that goes away ends the audit, since this future is dropped with it.
async fn run_audit(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let verdict = parts.auditor.audit().await?;
    Ok(axum::Json(verdict).into_response())
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey<'_>>, Problem> {
    let values = headers
        .get_all("idempotency-key")
        .iter()
        .map(|value| value.as_bytes());
    crate::http::wire::idempotency_key(values)
}

/// Carries a request out also when its client goes away: an operator's change that stopped between
/// the database and memory would leave the two apart.
async fn run_to_the_end(request: Request, next: Next) -> Response {
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(error) => {
            tracing::error!(%error, "a request to the control plane failed");
            Failure(Problem::internal()).into_response()
        }
    }
}
