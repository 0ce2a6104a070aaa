//! The checks of the sale after the rush.
//!
//! ```text
//!  answers, payments (report) ─► history ─┐
//!                                         ├─► loadgen::checker ─► findings ─┬─► orders: 6 checks
//!  order_list, payments (database) ► rows ┘                                 ├─► payments: 5 checks
//!                                                                           │
//!  audit before and after the sale ─────────────────────────────────────────┴─► the audit agrees
//! ```
//!
//! Neither the server's counters nor its audit is believed alone: the checker compares the buyers' answers
//! with the rows.

mod history;
mod orders;
mod payments;
mod rows;

use serde_json::Value;

use crate::loadgen::checker::{Findings, StoredRows};
use crate::loadgen::{Check, KilledNode, LoadReport};
use crate::order::UnixMillis;
use crate::pipeline::admin::audit::LIVE_CHECK;
use crate::store::postgres::Database;

/// The terms of a sale.
pub struct Terms {
    /// Begins the ids of its buyers; the database may hold orders of earlier sales.
    pub user_prefix: String,
    /// When it began.
    pub began_at: UnixMillis,
    /// How long an answer may take from the moment that a click was sent, in milliseconds.
    pub answer_ms_max: f64,
    /// The audit before the first click.
    pub audit_before: Value,
}

/// Everything that the checks read.
struct Evidence<'a> {
    report: &'a LoadReport,
    rows: StoredRows,
    answer_ms_max: f64,
    audit: &'a Value,
    /// Of the checker about orders, and about payments.
    orders: Findings,
    payments: Findings,
}

/// Checks the sale. `audit` is of the time after it.
pub async fn run(
    database: &Database,
    report: &LoadReport,
    terms: &Terms,
    audit: &Value,
) -> anyhow::Result<Vec<Check>> {
    let rows = rows::read(database, &terms.user_prefix, terms.began_at).await?;
    let evidence = Evidence {
        orders: history::requests(report).check(&rows),
        payments: match &report.payments {
            Some(payments) => history::payment_findings(payments, &rows),
            None => Findings::default(),
        },
        report,
        rows,
        answer_ms_max: terms.answer_ms_max,
        audit,
    };
    let mut checks = orders::checks(&evidence);
    if let Some(payments) = &report.payments {
        let Evidence {
            rows,
            payments: findings,
            ..
        } = &evidence;
        let before = &terms.audit_before;
        checks.extend(payments::checks(payments, rows, findings, before, audit));
    }
    checks.push(audit_agrees(audit));
    Ok(checks)
}

/// Whether the audit was of a quiet moment, so that it could compare memory with the rows.
pub fn live_compared(audit: &Value) -> bool {
    let checks = audit["checks"].as_array();
    let mut checks = checks.into_iter().flatten();
    checks.any(|check| check["name"] == LIVE_CHECK)
}

/// The same of an audit that another node has made.
pub fn audit_agrees_at(control: &str, audit: &Value) -> Check {
    let mut check = audit_agrees(audit);
    check.name = format!("The audit of the node at {control} agrees");
    check
}

/// Whether every lane of a node that was killed is open elsewhere.
pub fn taken_over(report: &LoadReport, killed: KilledNode) -> Check {
    let lanes = report.lanes.as_ref();
    let closed = lanes.map(|lanes| lanes.closed_ms(killed.node, killed.at_ms));
    let closed = closed.unwrap_or_default();
    let mut times: Vec<f64> = closed.iter().copied().flatten().collect();
    times.sort_by(f64::total_cmp);
    let seconds = |place: usize| times.get(place).copied().unwrap_or_default() / 1_000.0;
    check(
        "A node was killed with -9 and lost its directory, and others went on with its buyers",
        !closed.is_empty() && times.len() == closed.len(),
        format!(
            "node {} after {:.1} s; {} of its {} lanes were open elsewhere after {:.1} to {:.1} s (median {:.1} s); {} clicks \
             asked again",
            killed.node,
            killed.at_ms / 1_000.0,
            times.len(),
            closed.len(),
            seconds(0),
            seconds(times.len().saturating_sub(1)),
            seconds(times.len() / 2),
            report.repeated,
        ),
    )
}

fn audit_agrees(audit: &Value) -> Check {
    let checks = audit["checks"].as_array().map(Vec::as_slice);
    let checks = checks.unwrap_or_default();
    let broken: Vec<&str> = checks
        .iter()
        .filter(|check| check["ok"] != true)
        .filter_map(|check| check["detail"].as_str())
        .collect();
    check(
        "The audit of the database agrees",
        audit["ok"] == true && live_compared(audit),
        if broken.is_empty() {
            format!("{} checks hold", checks.len())
        } else {
            broken.join("; ")
        },
    )
}

fn check(name: &str, ok: bool, detail: String) -> Check {
    Check {
        name: name.to_owned(),
        ok,
        detail,
    }
}
