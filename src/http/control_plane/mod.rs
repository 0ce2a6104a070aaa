//! The control plane, for operators and machines: health, metrics, administration, audit.
//!
//! It answers from the first moment on; before recovery is done only health and metrics do, and
//! everything else is `503 not_ready`.

mod dead_letters;
mod failure;
mod health;
mod skus;

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};

use crate::http::problem::Problem;
use crate::http::tokens::Tokens;
use crate::metrics::Metrics;
use crate::order::IdempotencyKey;
use crate::pipeline::audit::audit;
use crate::pipeline::intake::Intake;
use crate::pipeline::ledger::Ledger;
use crate::pipeline::operator::Operator;
use crate::queue::OrderQueue;
use crate::store::postgres::Database;
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
    parts: OnceLock<Parts>,
}

/// What it administers, there once recovery is done.
pub struct Parts {
    /// The in-memory state.
    pub ledger: Arc<Ledger>,
    /// The way in, for its gate.
    pub intake: Arc<Intake>,
    /// The queue, for its depth.
    pub queue: Arc<dyn OrderQueue>,
    /// The database.
    pub database: Database,
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
            parts: OnceLock::new(),
        };
        ControlPlane {
            shared: Arc::new(shared),
        }
    }

    /// Gives it what it administers, once.
    pub fn recovered(&self, parts: Parts) {
        let _ = self.shared.parts.set(parts);
    }

    /// Every route.
    pub fn router(&self) -> Router {
        let admin = Router::new()
            .route("/admin/v1/skus", get(skus::list))
            .route("/admin/v1/skus/{sku_id}", put(skus::put))
            .route("/admin/v1/skus/{sku_id}/restock", post(skus::restock))
            .route("/admin/v1/skus/{sku_id}/pause", post(skus::pause))
            .route("/admin/v1/skus/{sku_id}/resume", post(skus::resume))
            .route("/admin/v1/pause", post(skus::pause_all))
            .route("/admin/v1/resume", post(skus::resume_all))
            .route("/admin/v1/dead-letters", get(dead_letters::list))
            .route("/admin/v1/dead-letters/{id}", get(dead_letters::get))
            .route(
                "/admin/v1/dead-letters/{id}/retry",
                post(dead_letters::retry),
            )
            .route(
                "/admin/v1/dead-letters/{id}/discard",
                post(dead_letters::discard),
            )
            .route("/admin/v1/audit", get(run_audit))
            .route_layer(middleware::from_fn_with_state(self.clone(), authorize));
        Router::new()
            .route("/healthz", get(health::healthz))
            .route("/readyz", get(health::readyz))
            .route("/metrics", get(health::metrics))
            .merge(admin)
            .fallback(|| async { Failure(Problem::new(404, "not_found", "nothing is here")) })
            .method_not_allowed_fallback(|| async {
                Failure(Problem::new(
                    405,
                    "method_not_allowed",
                    "this method is not allowed here",
                ))
            })
            .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
            .with_state(self.clone())
    }

    fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    fn parts(&self) -> Result<&Parts, Failure> {
        self.shared.parts.get().ok_or_else(|| {
            Failure(Problem::new(503, "not_ready", "still recovering; see /readyz").retry_after(1))
        })
    }
}

async fn authorize(
    State(plane): State<ControlPlane>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let field = request.headers().get(header::AUTHORIZATION);
    if plane
        .shared
        .tokens
        .allow(field.map(|value| value.as_bytes()))
    {
        return Ok(next.run(request).await);
    }
    Err(Failure(Problem::unauthorized()))
}

async fn run_audit(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let verdict = audit(&parts.database, Some(&parts.ledger)).await?;
    Ok(axum::Json(verdict).into_response())
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, Problem> {
    let values = headers
        .get_all("idempotency-key")
        .iter()
        .map(|value| value.as_bytes());
    crate::http::wire::idempotency_key(values)
}
