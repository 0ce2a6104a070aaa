//! The report of the load as the checker reads it.

use std::collections::HashMap;

use super::super::catalogue::{CATALOGUE, CURRENCY};
use crate::loadgen::checker::{
    AttemptRecord, Checker, Claim, Expected, Findings, KnownOrder, OrderRequest, PaymentHistory,
    SentPayment, StoredRows,
};
use crate::loadgen::{AnswerKind, LoadReport, Outcome, PaymentKind, PaymentOutcome, PaymentReport};

/// Every request with its answers.
pub fn requests(report: &LoadReport) -> Checker {
    let checker = Checker::new();
    for outcome in report.outcomes.iter().flat_map(|all| all.iter()) {
        let item = CATALOGUE.iter().find(|item| item.sku_id == outcome.sku);
        let request = OrderRequest {
            user: outcome.user.to_string(),
            key: outcome.key.as_ref().map(ToString::to_string),
            sku: outcome.sku.to_owned(),
            quantity: 1,
            adjustment: 0,
            amount: item.map_or(0, |item| item.unit_price),
            attributes: None,
            waitlist: true,
        };
        let attempt = AttemptRecord {
            life: 0,
            sent: outcome.scheduled_ns,
            answered: outcome.scheduled_ns.saturating_add(outcome.latency_ns),
            claim: claim(&outcome),
            respond_async: outcome.kind == AnswerKind::Accepted,
        };
        checker.record(&request, attempt);
        if outcome.kind == AnswerKind::Undecided && outcome.final_status == Some("unknown_order") {
            checker.record(&request, unknown_order());
        }
    }
    checker
}

fn claim(outcome: &Outcome<'_>) -> Claim {
    let accepted = || {
        let id = outcome.order_id.and_then(|id| i64::try_from(id).ok());
        id.map_or(Claim::Unknown, Claim::Accepted)
    };
    match outcome.kind {
        AnswerKind::Created
        | AnswerKind::Accepted
        | AnswerKind::Waitlisted
        | AnswerKind::Replayed => accepted(),
        AnswerKind::Undecided => match outcome.final_status {
            Some("unknown_order") | None => Claim::Undecided,
            Some(_) => accepted(),
        },
        AnswerKind::SoldOut
        | AnswerKind::Refused
        | AnswerKind::RateLimited
        | AnswerKind::Unavailable
        | AnswerKind::TimedOut
        | AnswerKind::ClientError => Claim::refused(outcome.code),
        AnswerKind::ServerError | AnswerKind::Transport => Claim::Unknown,
    }
}

/// The final answer about an undecided order, after all others: there is none.
fn unknown_order() -> AttemptRecord {
    AttemptRecord {
        life: 1,
        sent: u64::MAX - 1,
        answered: u64::MAX,
        claim: Claim::Refused {
            code: "unknown_order".to_owned(),
            conclusive: true,
        },
        respond_async: false,
    }
}

/// Compares the payments that were sent with the rows.
pub fn payment_findings(payments: &PaymentReport, rows: &StoredRows) -> Findings {
    let mut findings = Findings::default();
    let amounts: HashMap<i64, i64> = (rows.orders.iter())
        .map(|row| (row.order_id, row.amount))
        .collect();
    let mut history = PaymentHistory {
        currency: CURRENCY.to_owned(),
        ..PaymentHistory::default()
    };
    for payment in payments.outcomes.iter().flatten() {
        history.sent.push(sent_payment(payment));
        if let Ok(id) = i64::try_from(payment.order_id)
            && payment.kind != PaymentKind::Lost
        {
            history.orders.insert(
                id,
                KnownOrder {
                    amount: amounts.get(&id).copied().unwrap_or(payment.amount),
                    expires_at: payment.expires_at_ms.unwrap_or(i64::MAX),
                    is_lost: false,
                },
            );
        }
    }
    let expected = Expected {
        // The checks of payments report orders that still wait.
        orders_over: false,
        // The server looks for the orders of lost payments for longer than the demo lasts.
        orphans_over: false,
        margin_ms: 0,
    };
    history.check(rows, expected, |_| false, &mut findings);
    findings
}

fn sent_payment(payment: &PaymentOutcome) -> SentPayment {
    SentPayment {
        payment: payment.payment_id.to_string(),
        order: payment.order_id.to_string(),
        amount: payment.amount,
        currency: payment.currency.to_string(),
        has_receipt: payment.has_receipt,
        is_genuine: true,
        sent: Some(payment.sent_at_ms),
        acknowledged: payment.acknowledged_at_ms,
    }
}
