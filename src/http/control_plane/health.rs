//! Liveness, readiness, metrics: for orchestrators and monitoring, without a token.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::ControlPlane;
use crate::store::StoreError;
use crate::store::postgres::Database;

/// One named check of readiness.
#[derive(Debug, Serialize)]
struct ReadyCheck {
    name: &'static str,
    ok: bool,
    detail: String,
}

/// What may cost something later, and is no reason to take no orders.
#[derive(Debug, Serialize)]
struct Warning {
    name: &'static str,
    detail: String,
}

pub(super) async fn healthz() -> &'static str {
    "alive\n"
}

pub(super) async fn readyz(State(plane): State<ControlPlane>) -> Response {
    let mut checks = Vec::new();
    let mut warnings = Vec::new();
    let mut check = |name, ok, detail: String| checks.push(ReadyCheck { name, ok, detail });
    match plane.parts() {
        Err(_) => check("recovery", false, plane.shared.progress.load().to_string()),
        Ok(parts) => {
            check("recovery", true, "done".into());
            let gate = parts.intake.check_open();
            let detail = match parts.ledger.poison.reason() {
                Some(reason) => format!("stopped by an internal fault: {reason}"),
                None => gate.map_or_else(|refusal| refusal.code().into(), |()| "open".into()),
            };
            check("intake", gate.is_ok(), detail);
            if let Some(journal) = &parts.journal {
                let detail = match journal.failure() {
                    Some(reason) => format!("failed; respond-async is refused until a restart: {reason}"),
                    None if !parts.acknowledge.holds() => "the database has not answered for longer than queue.journal.lease_ms; respond-async is refused".into(),
                    None => format!("{} orders are not rows yet", journal.outstanding()),
                };
                let ok = journal.failure().is_none() && parts.acknowledge.holds();
                check("journal", ok, detail);
            }
            let ping = parts.database.ping().await;
            let detail = ping
                .as_ref()
                .map_or_else(ToString::to_string, |()| "answers".into());
            check("database", ping.is_ok(), detail);
            // Who may not look at it gets no warning.
            if ping.is_ok()
                && let Ok(Some(detail)) = asynchronous(&parts.database).await
            {
                warnings.push(Warning {
                    name: "replication",
                    detail,
                });
            }
        }
    }
    let ready = checks.iter().all(|check| check.ok);
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = serde_json::json!({ "ready": ready, "checks": checks, "warnings": warnings });
    (status, axum::Json(body)).into_response()
}

/// What a failover to a standby may cost, where there is one and commits do not wait for it.
async fn asynchronous(database: &Database) -> Result<Option<String>, StoreError> {
    let replication = database.replication().await?;
    let cause = if replication.standbys == 0 {
        return Ok(None);
    } else if replication.synchronous_standby_names.is_empty() {
        "synchronous_standby_names is empty".to_owned()
    } else if matches!(&*replication.synchronous_commit, "off" | "local") {
        format!("synchronous_commit is {}", replication.synchronous_commit)
    } else {
        return Ok(None);
    };
    Ok(Some(format!(
        "standbys are connected ({}) and {cause}: a failover may lose the last orders that were \
         told 201, cancellations and payments",
        replication.standbys
    )))
}

pub(super) async fn metrics(State(plane): State<ControlPlane>) -> Response {
    let metrics = plane.metrics();
    if let Ok(parts) = plane.parts() {
        (parts.refresh)(metrics);
        metrics
            .ready
            .set(i64::from(parts.intake.check_open().is_ok()));
        metrics
            .poisoned
            .set(i64::from(parts.ledger.poison.is_set()));
        metrics.queue_depth.set(parts.queue.depth() as i64);
        if let Some(journal) = &parts.journal {
            metrics.journal_bytes.set(journal.bytes() as i64);
            metrics.journal_backlog.set(journal.backlog() as i64);
            metrics
                .journal_outstanding
                .set(journal.outstanding() as i64);
        }
        metrics
            .orders_in_flight
            .set(parts.ledger.pending.in_flight() as i64);
        metrics
            .orders_remembered
            .set(parts.ledger.buyers.len() as i64);
        for sku in parts.ledger.catalogue.all() {
            let stock = sku.counter().snapshot();
            metrics.observe_stock(sku.id.as_str(), stock.free, stock.held, stock.sold);
        }
    }
    let text = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    (text, metrics.render()).into_response()
}
