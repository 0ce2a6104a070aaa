//! The data of the dashboard as JSON: the state in memory, without a query to the database.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::health::{NO_LEASE, failing};
use super::{ControlPlane, Parts};
use crate::http::wire::OperatorSkuView;
use crate::http::wire::events::SinkView;
use crate::metrics::{Metrics, Totals};
use crate::order::{Refusal, UnixMillis};
use crate::queue::NotDurable;

/// `GET /admin/v1/live`. Counters count from the start of the process; rates are differences.
#[derive(Debug, Serialize)]
struct Live {
    now: String,
    /// `recovering`, `ready`, `not_ready`, `draining` or `poisoned`.
    state: &'static str,
    /// The reason of the state, if it has one.
    reason: Option<String>,
    /// Whether every sale is paused.
    paused: bool,
    skus: Vec<OperatorSkuView>,
    /// Answers to orders by outcome.
    orders: Totals,
    queue: Queue,
    orders_in_flight: usize,
    connections: i64,
    batches: Batches,
    batch_retries: Totals,
    orders_parked: i64,
    /// Since the start.
    dead_letters: u64,
    /// Counted every few seconds, up to 10,000.
    dead_letters_open: i64,
    /// `null` with a volatile queue.
    order_log: Option<OrderLog>,
    waitlist: Waitlist,
    payments: Payments,
    /// Sinks of events.
    sinks: Vec<SinkView>,
}

/// Waiting lists, since the start; each SKU has the number of orders that wait for it.
#[derive(Debug, Serialize)]
struct Waitlist {
    assigned: u64,
    expired: u64,
    oldest_seconds: f64,
    overdue_seconds: f64,
}

/// Payments since the start. The payment processor counts open ones every few seconds.
#[derive(Debug, Serialize)]
struct Payments {
    matched: u64,
    orphans: i64,
    orphan_oldest_seconds: f64,
    /// Duration of all configured checks of an orphan, in seconds.
    orphan_checks_seconds: f64,
    refunds_due: i64,
    refund_due_oldest_seconds: f64,
    orders_expired: u64,
}

/// The log of orders that are acknowledged before they are rows.
#[derive(Debug, Serialize)]
struct OrderLog {
    title: String,
    /// What the next order with `respond-async` would meet: `open`, `busy`, `full`, `failed`, `no_lease` or `away`.
    state: &'static str,
    /// Why it is not open.
    detail: Option<String>,
    bytes: u64,
    bytes_max: i64,
    /// Orders that are not settled in the database.
    outstanding: u64,
}

#[derive(Debug, Serialize)]
struct Queue {
    depth: usize,
    capacity: i64,
}

#[derive(Debug, Serialize)]
struct Batches {
    count: u64,
    rows: u64,
    /// Sum of the time that each took, in seconds.
    seconds: f64,
    /// Batches that took at most `le` seconds, cumulative, as Prometheus counts them.
    within: Vec<Bucket>,
}

#[derive(Debug, Serialize)]
struct Bucket {
    le: f64,
    count: u64,
}

pub(super) async fn live(State(plane): State<ControlPlane>) -> Response {
    let metrics = plane.metrics();
    let parts = plane.parts().ok();
    if let Some(parts) = parts {
        (parts.refresh)(metrics);
    }
    let (state, reason) = parts.map_or(("recovering", None), state);
    let live = Live {
        now: UnixMillis::now().to_string(),
        state,
        reason,
        paused: parts.is_some_and(|parts| parts.state.catalogue.is_paused()),
        skus: parts.map_or_else(Vec::new, skus),
        orders: metrics.orders.totals(),
        queue: Queue {
            depth: parts.map_or(0, |parts| parts.queue.depth()),
            capacity: metrics.queue_capacity.get(),
        },
        orders_in_flight: parts.map_or(0, |parts| parts.state.pending.len()),
        connections: metrics.connections.get(),
        batches: batches(metrics),
        batch_retries: metrics.batch_retries.totals(),
        orders_parked: metrics.orders_parked.get(),
        dead_letters: metrics.dead_letters.get(),
        dead_letters_open: metrics.dead_letters_open.get(),
        order_log: parts.and_then(|parts| order_log(metrics, parts)),
        waitlist: Waitlist {
            assigned: metrics.waitlist.assigned.get(),
            expired: metrics.waitlist.expired.get(),
            oldest_seconds: metrics.waitlist.oldest_seconds.get(),
            overdue_seconds: metrics.waitlist.overdue_seconds.get(),
        },
        payments: payments(metrics, parts),
        sinks: parts.map_or_else(Vec::new, |parts| SinkView::all(&parts.sinks)),
    };
    axum::Json(live).into_response()
}

fn state(parts: &Parts) -> (&'static str, Option<String>) {
    if let Some(reason) = parts.state.poison.reason() {
        return ("poisoned", Some(reason.to_owned()));
    }
    if parts.intake.check_open() == Err(Refusal::Draining) {
        return ("draining", None);
    }
    match failing(parts) {
        None => ("ready", None),
        Some(reason) => ("not_ready", Some(reason)),
    }
}

fn order_log(metrics: &Metrics, parts: &Parts) -> Option<OrderLog> {
    let durable = parts.queue.durable()?;
    let (bytes, bytes_max) = (durable.bytes(), metrics.journal_bytes_max.get());
    // As an order would, and given back at once.
    let (state, detail) = match durable.reserve(None).map(drop) {
        Ok(()) => ("open", None),
        Err(NotDurable::Busy) => ("busy", None),
        Err(NotDurable::Full) => (
            "full",
            Some(format!(
                "{} MiB of {} MiB are in use, or the disk is full; {} orders are not rows yet",
                bytes >> 20,
                bytes_max >> 20,
                durable.outstanding()
            )),
        ),
        Err(NotDurable::Failed) => ("failed", durable.failure()),
        Err(NotDurable::NoLease) => ("no_lease", Some(NO_LEASE.to_owned())),
        Err(NotDurable::Away) => ("away", durable.away()),
    };
    Some(OrderLog {
        title: durable.title(),
        state,
        detail,
        bytes,
        bytes_max,
        outstanding: durable.outstanding(),
    })
}

fn skus(parts: &Parts) -> Vec<OperatorSkuView> {
    let catalogue = &parts.state.catalogue;
    let all = catalogue.all();
    all.iter()
        .map(|sku| OperatorSkuView::of(sku, catalogue.is_paused()))
        .collect()
}

fn payments(metrics: &Metrics, parts: Option<&Parts>) -> Payments {
    let checks = parts.map(|parts| parts.orphan_checks.take());
    let payments = &metrics.payments;
    let verdicts = payments.verdicts.totals();
    let paid = ["matched", "recovered"].map(|verdict| verdicts.get(verdict).map_or(0, |n| *n));
    Payments {
        matched: paid.iter().sum(),
        orphans: payments.orphan_payments.get(),
        orphan_oldest_seconds: payments.orphan_oldest_seconds.get(),
        orphan_checks_seconds: checks.unwrap_or_default().as_secs_f64(),
        refunds_due: payments.refunds_due.get(),
        refund_due_oldest_seconds: payments.refund_due_oldest_seconds.get(),
        orders_expired: payments.orders_expired.get(),
    }
}

fn batches(metrics: &Metrics) -> Batches {
    let within = metrics.batch_seconds_within();
    Batches {
        count: metrics.batches.get(),
        rows: metrics.rows_written.get(),
        seconds: metrics.batch_seconds.get_sample_sum(),
        within: within
            .into_iter()
            .map(|(le, count)| Bucket { le, count })
            .collect(),
    }
}
