//! The control plane, for operators and machines: health, metrics, administration, audit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::http::problem::{MEDIA_TYPE, Problem};
use crate::http::wire::{SkuBody, SkuView};
use crate::metrics::Metrics;
use crate::order::SkuId;
use crate::pipeline::audit::audit;
use crate::pipeline::intake::Intake;
use crate::pipeline::ledger::Ledger;
use crate::pipeline::operator::{Operator, OperatorError};
use crate::queue::OrderQueue;
use crate::store::postgres::Database;

/// Refreshes gauges that somebody else counts, before metrics are rendered.
pub type Refresh = Arc<dyn Fn(&Metrics) + Send + Sync>;

/// Everything that an answer of the control plane needs. Before recovery is done there is no
/// [`Parts`], and only health answers.
#[derive(Clone)]
pub struct ControlPlane {
    shared: Arc<Shared>,
}

struct Shared {
    metrics: Metrics,
    tokens: Vec<[u8; 32]>,
    parts: std::sync::OnceLock<Parts>,
    recovered: AtomicBool,
}

/// What is there once the database is.
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

/// One named check of readiness.
#[derive(Debug, Serialize)]
struct ReadyCheck {
    name: &'static str,
    ok: bool,
    detail: String,
}

impl ControlPlane {
    /// A control plane that answers health and metrics; without `tokens` none is asked for.
    pub fn new(metrics: Metrics, tokens: &[String]) -> Self {
        let tokens = tokens.iter();
        ControlPlane {
            shared: Arc::new(Shared {
                metrics,
                tokens: tokens
                    .map(|token| Sha256::digest(token.as_bytes()).into())
                    .collect(),
                parts: std::sync::OnceLock::new(),
                recovered: AtomicBool::new(false),
            }),
        }
    }

    /// Gives it what it administers, once recovery is done.
    pub fn recovered(&self, parts: Parts) {
        let _ = self.shared.parts.set(parts);
        self.shared.recovered.store(true, Ordering::Release);
    }

    /// Every route.
    pub fn router(&self) -> Router {
        let admin = Router::new()
            .route("/admin/v1/skus", get(list_skus))
            .route("/admin/v1/skus/{sku_id}", put(put_sku))
            .route("/admin/v1/skus/{sku_id}/pause", post(pause_sku))
            .route("/admin/v1/skus/{sku_id}/resume", post(resume_sku))
            .route("/admin/v1/pause", post(pause_all))
            .route("/admin/v1/resume", post(resume_all))
            .route("/admin/v1/audit", get(run_audit))
            .route_layer(middleware::from_fn_with_state(self.clone(), authorize));
        Router::new()
            .route("/healthz", get(|| async { "alive\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .merge(admin)
            .fallback(|| async { Failure(Problem::new(404, "not_found", "nothing is here")) })
            .method_not_allowed_fallback(|| async {
                Failure(Problem::new(
                    405,
                    "method_not_allowed",
                    "this method is not allowed here",
                ))
            })
            .with_state(self.clone())
    }

    fn parts(&self) -> Result<&Parts, Failure> {
        self.shared.parts.get().ok_or_else(|| {
            Failure(Problem::new(503, "not_ready", "still recovering; see /readyz").retry_after(1))
        })
    }
}

/// A problem as an answer.
struct Failure(Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Failure(problem)
    }
}

impl From<OperatorError> for Failure {
    fn from(error: OperatorError) -> Self {
        let detail = error.to_string();
        Failure(match error {
            OperatorError::UnknownSku(_) => Problem::new(404, "unknown_sku", detail),
            OperatorError::TotalBelowCommitted { .. } => {
                Problem::new(409, "total_below_committed", detail)
            }
            OperatorError::Store(error) if error.is_transient() => {
                tracing::warn!(reason = %detail, "an operator's request failed");
                Problem::new(503, "not_ready", detail).retry_after(1)
            }
            OperatorError::Store(_) => {
                tracing::error!(reason = %detail, "an operator's request failed");
                Problem::new(500, "internal", detail)
            }
        })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after = self
            .0
            .retry_after
            .map(|s| (header::RETRY_AFTER, s.to_string()));
        let challenge: Option<(HeaderName, String)> =
            (self.0.status == 401).then(|| (header::WWW_AUTHENTICATE, "Bearer".to_owned()));
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, MEDIA_TYPE)], body).into_response();
        for (name, value) in retry_after.into_iter().chain(challenge) {
            if let Ok(value) = value.parse() {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}

async fn authorize(
    State(plane): State<ControlPlane>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let tokens = &plane.shared.tokens;
    if !tokens.is_empty() {
        let value = request.headers().get(header::AUTHORIZATION);
        let presented = value.and_then(|value| {
            let (scheme, token) = value.as_bytes().split_at_checked(7)?;
            scheme
                .eq_ignore_ascii_case(b"bearer ")
                .then(|| <[u8; 32]>::from(Sha256::digest(token)))
        });
        if !presented.is_some_and(|hash| tokens.contains(&hash)) {
            return Err(Failure(Problem::new(
                401,
                "unauthorized",
                "Authorization: a valid bearer token is needed",
            )));
        }
    }
    Ok(next.run(request).await)
}

async fn readyz(State(plane): State<ControlPlane>) -> Response {
    let mut checks = Vec::new();
    let mut check = |name, ok, detail: String| checks.push(ReadyCheck { name, ok, detail });
    match plane.shared.parts.get() {
        None => check("recovery", false, "still reading the database".into()),
        Some(parts) => {
            check("recovery", true, "done".into());
            let gate = parts.intake.check_open();
            let detail = match parts.ledger.poison.reason() {
                Some(reason) => format!("stopped by an internal fault: {reason}"),
                None => gate.map_or_else(|refusal| refusal.code().into(), |()| "open".into()),
            };
            check("intake", gate.is_ok(), detail);
            let ping = parts.database.ping().await;
            let detail = ping
                .as_ref()
                .map_or_else(ToString::to_string, |()| "answers".into());
            check("database", ping.is_ok(), detail);
        }
    }
    let ready = checks.iter().all(|check| check.ok);
    plane.shared.metrics.ready.set(i64::from(ready));
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (
        status,
        axum::Json(serde_json::json!({ "ready": ready, "checks": checks })),
    )
        .into_response()
}

async fn metrics(State(plane): State<ControlPlane>) -> Response {
    let metrics = &plane.shared.metrics;
    if let Some(parts) = plane.shared.parts.get() {
        (parts.refresh)(metrics);
        metrics
            .ready
            .set(i64::from(parts.intake.check_open().is_ok()));
        metrics.queue_depth.set(parts.queue.depth() as i64);
        metrics
            .orders_in_flight
            .set(parts.ledger.pending.len() as i64);
        metrics
            .orders_remembered
            .set(parts.ledger.buyers.len() as i64);
    }
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        metrics.render(),
    )
        .into_response()
}

async fn list_skus(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let catalogue = &plane.parts()?.ledger.catalogue;
    let skus = catalogue.all();
    let views: Vec<_> = skus
        .iter()
        .map(|sku| SkuView::of(sku, catalogue.is_paused()))
        .collect();
    Ok(
        axum::Json(serde_json::json!({ "skus": views, "paused": catalogue.is_paused() }))
            .into_response(),
    )
}

async fn put_sku(
    State(plane): State<ControlPlane>,
    Path(sku_id): Path<String>,
    body: Bytes,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let id = parse_sku_id(&sku_id)?;
    let body = SkuBody::parse(&id, &body)?;
    let existed = parts.ledger.catalogue.get(&id).is_some();
    let sku = parts.operator.put_sku(&id, body.terms, body.total).await?;
    let status = if existed {
        StatusCode::OK
    } else {
        StatusCode::CREATED
    };
    let view = SkuView::of(&sku, parts.ledger.catalogue.is_paused());
    Ok((status, axum::Json(view)).into_response())
}

async fn pause_sku(plane: State<ControlPlane>, sku_id: Path<String>) -> Result<Response, Failure> {
    set_paused(plane, sku_id, true).await
}

async fn resume_sku(plane: State<ControlPlane>, sku_id: Path<String>) -> Result<Response, Failure> {
    set_paused(plane, sku_id, false).await
}

async fn set_paused(
    State(plane): State<ControlPlane>,
    Path(sku_id): Path<String>,
    paused: bool,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let sku = parts
        .operator
        .set_paused(&parse_sku_id(&sku_id)?, paused)
        .await?;
    Ok(axum::Json(SkuView::of(&sku, parts.ledger.catalogue.is_paused())).into_response())
}

async fn pause_all(plane: State<ControlPlane>) -> Result<Response, Failure> {
    set_all_paused(plane, true).await
}

async fn resume_all(plane: State<ControlPlane>) -> Result<Response, Failure> {
    set_all_paused(plane, false).await
}

async fn set_all_paused(
    State(plane): State<ControlPlane>,
    paused: bool,
) -> Result<Response, Failure> {
    plane.parts()?.operator.set_all_paused(paused).await?;
    Ok(axum::Json(serde_json::json!({ "paused": paused })).into_response())
}

async fn run_audit(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let verdict = audit(&parts.database, Some(&parts.ledger))
        .await
        .map_err(OperatorError::from)?;
    Ok(axum::Json(verdict).into_response())
}

fn parse_sku_id(text: &str) -> Result<SkuId, Problem> {
    SkuId::new(text).map_err(|e| Problem::new(400, "invalid_field", format!("sku_id: {e}")))
}
