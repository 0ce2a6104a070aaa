//! Liveness, readiness, metrics: for orchestrators and monitoring, without a token.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::ControlPlane;

/// One named check of readiness.
#[derive(Debug, Serialize)]
struct ReadyCheck {
    name: &'static str,
    ok: bool,
    detail: String,
}

pub(super) async fn healthz() -> &'static str {
    "alive\n"
}

pub(super) async fn readyz(State(plane): State<ControlPlane>) -> Response {
    let mut checks = Vec::new();
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
        }
    }
    let ready = checks.iter().all(|check| check.ok);
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = serde_json::json!({ "ready": ready, "checks": checks });
    (status, axum::Json(body)).into_response()
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
