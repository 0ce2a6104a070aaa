//! Metrics of payments, and of orders that are not paid.

use super::{ROWS, SECONDS};
use crate::order::payment::RefundReason;

/// Answers to a payment provider's callback.
const CALLBACKS: [&str; 7] = [
    "stored",
    "bad_signature",
    "stale",
    "malformed",
    "not_ours",
    "not_stored",
    "other",
];
/// Results of a payment. `recovered`: its order had been lost and was written from its receipt.
const PAYMENTS: [&str; 5] = ["matched", "orphan", "recovered", "refund_due", "other"];

fn refund_reasons() -> Vec<&'static str> {
    let reasons = RefundReason::ALL.iter().map(|reason| reason.as_str());
    reasons.chain(["other"]).collect()
}

metrics! {
    /// Metrics of payments.
    pub struct Payments {
        callbacks = counters("millrace_callbacks_total", "outcome", &CALLBACKS):
            "Callbacks of payment providers by answer; not_stored: the provider was asked to deliver \
             again.";
        callback_seconds = histogram("millrace_callback_seconds", &SECONDS):
            "Time to answer a callback with a valid signature.";
        events = counter("millrace_payment_events_total"):
            "Messages of payment providers that were stored.";
        duplicates = counter("millrace_payment_duplicates_total"):
            "Messages of payment providers that were stored before and change nothing.";
        batch_rows = histogram("millrace_payment_batch_rows", &ROWS):
            "Messages of payment providers per transaction.";
        verdicts = counters("millrace_payments_total", "verdict", &PAYMENTS):
            "Payments by result; an orphan is counted again once its order is found.";
        refunds = counters("millrace_refunds_due_total", "reason", &refund_reasons()):
            "Payments that must be refunded, by reason; docs/PAYMENTS.md has the action for each.";
        orphan_payments = gauge("millrace_orphan_payments"):
            "Verified payments without an order.";
        orphan_oldest_seconds = float_gauge("millrace_orphan_payment_oldest_seconds"):
            "Age of the oldest payment without an order; alert if it exceeds the duration of the configured checks.";
        refunds_due = gauge("millrace_refunds_due"):
            "Payments that must be refunded and are not recorded as refunded.";
        refund_due_oldest_seconds = float_gauge("millrace_refund_due_oldest_seconds"):
            "Time for which the oldest payment that must be refunded has waited for an operator.";
        orders_expired = counter("millrace_orders_expired_total"):
            "Orders that were not paid in time and whose units became free.";
        expiry_backlog_seconds = float_gauge("millrace_expiry_backlog_seconds"):
            "Delay of the oldest expiry that is due.";
        expiry_rows = counter("millrace_expiry_rows_total"):
            "Rows read to find orders that must expire.";
        expiry_deferred_skus = gauge("millrace_expiry_deferred_skus"):
            "SKUs whose expired units stay held for now, because their row is locked or refuses the change; \
             alert if it stays above 0.";
    }
}
