//! Liveness, readiness, metrics: for orchestrators and monitoring, without a token.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::{ControlPlane, Parts, preflight};
use crate::faults::bug;
use crate::logging;
use crate::pipeline::cluster::member::Member;
use crate::pipeline::failover::health::STALE;
use crate::pipeline::orders::deadlines::look_at_progress;

/// Why nothing may be acknowledged although the order log is sound.
pub(super) const NO_LEASE: &str =
    "the database has not answered for longer than queue.journal.lease_ms";

/// One named check of readiness.
#[derive(Debug, Serialize)]
struct ReadyCheck {
    name: &'static str,
    ok: bool,
    detail: String,
}

/// A risk for later that does not stop the intake.
#[derive(Debug, Serialize)]
struct Warning<'a> {
    name: &'a str,
    detail: &'a str,
}

pub(super) async fn healthz() -> &'static str {
    "alive\n"
}

pub(super) async fn readyz(State(plane): State<ControlPlane>) -> Response {
    let parts = plane.parts().ok();
    let checks = match parts {
        None => vec![ReadyCheck {
            name: "recovery",
            ok: false,
            detail: plane.shared.progress.load().to_string(),
        }],
        Some(parts) => checks(parts),
    };
    let look = parts.and_then(|parts| parts.health.last());
    let memory = parts.and_then(|parts| memory(&parts.state));
    let unready = parts.and_then(preflight::warning);
    let events = parts.map(|parts| parts.sinks.warnings());
    let warnings: Vec<Warning> = look
        .iter()
        .flat_map(|look| &look.warnings)
        .chain(&memory)
        .chain(&unready)
        .chain(events.iter().flatten())
        .chain(parts.and_then(|parts| parts.settings.as_ref()))
        .map(|(name, detail)| Warning { name, detail })
        .collect();
    let ready = checks.iter().all(|check| check.ok);
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = serde_json::json!({
        "ready": ready,
        "checks": checks,
        "warnings": warnings,
        "database_seen_ms_ago": look.as_ref().map(|look| look.at.elapsed().as_millis() as u64),
    });
    (status, axum::Json(body)).into_response()
}

/// Share of `orders.remembered_max` from which on a warning is due.
const REMEMBERED_WARN: f64 = 0.7;

/// The warning that `orders.remembered_max` is going to refuse orders.
fn memory(state: &crate::state::State) -> Option<(&'static str, String)> {
    let used = state.buyers.used();
    let detail = format!(
        "{:.0} % of orders.remembered_max are in use; at 100 % every new order is refused. Raise it, shorten \
         orders.idempotency_window_ms, or take the limit off SKUs that are no longer sold",
        used * 100.0
    );
    (used >= REMEMBERED_WARN).then_some(("remembered_orders", detail))
}

/// Every check of readiness, from memory alone, so that a check costs no I/O.
fn checks(parts: &Parts) -> Vec<ReadyCheck> {
    let mut checks = Vec::with_capacity(5);
    let mut check = |name, ok, detail: String| checks.push(ReadyCheck { name, ok, detail });
    check("recovery", true, "done".into());
    let gate = parts.intake.check_open();
    let detail = match parts.state.poison.reason() {
        Some(reason) => format!("stopped by an internal fault: {reason}"),
        None => gate.map_or_else(|refusal| refusal.code().into(), |()| "open".into()),
    };
    check("intake", gate.is_ok(), detail);
    let (ok, detail) = progress(parts);
    check("progress", ok, detail);
    if let Some(durable) = parts.queue.durable() {
        let (failure, away) = (durable.failure(), durable.away());
        let detail = match failure.as_ref().or(away.as_ref()) {
            Some(reason) if failure.is_some() => {
                format!("failed; respond-async is refused until a restart: {reason}")
            }
            Some(reason) => {
                format!("takes no orders; respond-async is refused until it does: {reason}")
            }
            None if !parts.acknowledge.holds() => format!("{NO_LEASE}; respond-async is refused"),
            None => format!("{} orders are not rows yet", durable.outstanding()),
        };
        let ok = failure.is_none() && away.is_none() && parts.acknowledge.holds();
        check("journal", ok, detail);
    }
    if let Some(member) = &parts.member {
        let (ok, detail) = membership(member);
        check("membership", ok, detail);
    }
    let (ok, detail) = match parts.health.last() {
        None => (false, "not looked at yet".into()),
        Some(look) => match &look.failure {
            Some(reason) => (false, reason.clone()),
            None if look.at.elapsed() > STALE => {
                let seconds = look.at.elapsed().as_secs();
                (false, format!("has not answered for {seconds} s"))
            }
            None => (true, "answers".into()),
        },
    };
    check("database", ok, detail);
    checks
}

/// Whether this node renews its membership, and the detail of the check. A node without lanes is ready: it passes
/// requests on.
fn membership(member: &Member) -> (bool, String) {
    let (node, ago_ms) = (member.lease.node, member.renewed_ago_ms());
    let lanes = member.lanes.open_here().len();
    if ago_ms >= member.lease_ms {
        let detail = format!(
            "node {node} has renewed nothing for {} s, and may be taken over",
            ago_ms / 1_000
        );
        return (false, detail);
    }
    (true, format!("node {node} has {lanes} lanes open"))
}

/// Whether orders are written while orders wait, and the detail of the check.
fn progress(parts: &Parts) -> (bool, String) {
    look_at_progress(&parts.state);
    let stalled = parts.state.progress.stalled_for();
    let waiting = parts.state.pending.in_flight();
    if stalled <= parts.order_timeout || bug("ready_without_progress") {
        return (true, format!("{waiting} orders wait or are being written"));
    }
    let mut detail = format!(
        "no order was written for {} s, and {waiting} wait",
        stalled.as_secs()
    );
    if let Some(reason) = parts.state.progress.failure() {
        detail.push_str(&format!("; the last attempt: {reason}"));
    }
    if let Some(blockers) = parts.health.last().and_then(|look| look.blockers.clone()) {
        detail.push_str(&format!("; held up by {blockers}"));
    }
    (false, detail)
}

/// The first check that fails, with its reason.
pub(super) fn failing(parts: &Parts) -> Option<String> {
    let failed = checks(parts).into_iter().find(|check| !check.ok);
    failed.map(|check| format!("{}: {}", check.name, check.detail))
}

pub(super) async fn metrics(State(plane): State<ControlPlane>) -> Response {
    let metrics = plane.metrics();
    let dropped = logging::dropped();
    for (reason, lines) in [
        ("full", dropped.full),
        ("sink", dropped.sink),
        ("limited", dropped.limited),
    ] {
        metrics.log_lines_dropped.catch_up(reason, lines);
    }
    if let Ok(parts) = plane.parts() {
        (parts.refresh)(metrics);
        metrics.ready.set(i64::from(failing(parts).is_none()));
        metrics
            .stalled_seconds
            .set(parts.state.progress.stalled_for().as_secs_f64());
        metrics.poisoned.set(i64::from(parts.state.poison.is_set()));
        if let Some(member) = &parts.member {
            let age = member.renewed_ago_ms() as f64 / 1_000.0;
            metrics.cluster.renewal_age_seconds.set(age);
            let apart = member.clock_apart_ms() as f64 / 1_000.0;
            metrics.cluster.clock_apart_seconds.set(apart);
            let open = member.lanes.open_here().len();
            metrics.cluster.lanes_open.set(open as i64);
        }
        metrics.queue_depth.set(parts.queue.depth() as i64);
        if let Some(durable) = parts.queue.durable() {
            metrics.journal_bytes.set(durable.bytes() as i64);
            metrics.journal_backlog.set(durable.spilled() as i64);
            metrics
                .journal_outstanding
                .set(durable.outstanding() as i64);
        }
        metrics
            .orders_in_flight
            .set(parts.state.pending.in_flight() as i64);
        metrics
            .orders_remembered
            .set(parts.state.buyers.len() as i64);
        metrics.remembered_ratio.set(parts.state.buyers.used());
        for sku in parts.state.catalogue.all() {
            let stock = sku.counter().snapshot();
            metrics.observe_stock(sku.id.as_str(), stock.free, stock.held, stock.sold);
            metrics.observe_waitlist(sku.id.as_str(), sku.waitlist().len(), sku.counter().kept());
        }
    }
    let text = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    (text, metrics.render()).into_response()
}
