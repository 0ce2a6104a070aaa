//! Metrics of payments, and of orders that are not paid.

use super::{ROWS, SECONDS};
use crate::order::payment::RefundReason;

/// What a payment provider was told.
const CALLBACKS: [&str; 7] = [
    "stored",
    "bad_signature",
    "stale",
    "malformed",
    "not_ours",
    "not_stored",
    "other",
];
/// What came of a payment; `recovered`: its order had been lost and was written from its receipt.
const PAYMENTS: [&str; 5] = ["matched", "orphan", "recovered", "refund_due", "other"];

fn refund_reasons() -> Vec<&'static str> {
    let reasons = RefundReason::ALL.iter().map(|reason| reason.as_str());
    reasons.chain(["other"]).collect()
}

metrics! {
    /// Metrics of payments.
    pub struct Payments {
        callbacks = counters("millrace_callbacks_total", "outcome", &CALLBACKS):
            "Callbacks of payment providers by what they were answered; not_stored: the provider was \
             told to come again.";
        callback_seconds = histogram("millrace_callback_seconds", &SECONDS):
            "Time to answer a callback whose signature was right.";
        events = counter("millrace_payment_events_total"):
            "Messages of payment providers that were stored.";
        duplicates = counter("millrace_payment_duplicates_total"):
            "Messages of payment providers that had been stored before; they change nothing.";
        batch_rows = histogram("millrace_payment_batch_rows", &ROWS):
            "Messages of payment providers that shared a transaction.";
        verdicts = counters("millrace_payments_total", "verdict", &PAYMENTS):
            "What came of payments; an orphan is counted again once its order is found.";
        refunds = counters("millrace_refunds_due_total", "reason", &refund_reasons()):
            "Payments that have to go back, by why: docs/PAYMENTS.md says what to do about each.";
        orphan_payments = gauge("millrace_orphan_payments"):
            "Verified payments whose order is not there.";
        orphan_oldest_seconds = seconds_gauge("millrace_orphan_payment_oldest_seconds"):
            "Age of the oldest of them; alert where it is longer than the configured checks take.";
        refunds_due = gauge("millrace_refunds_due"):
            "Payments that have to go back and have not been recorded as refunded.";
        refund_due_oldest_seconds = seconds_gauge("millrace_refund_due_oldest_seconds"):
            "For how long the oldest of them has been waiting for a person.";
        orders_expired = counter("millrace_orders_expired_total"):
            "Orders that were not paid in time and whose units came back.";
        expiry_backlog_seconds = seconds_gauge("millrace_expiry_backlog_seconds"):
            "For how long the earliest order that is to expire has been due.";
        expiry_rows = counter("millrace_expiry_rows_total"):
            "Rows that were read to find orders that are to expire.";
        expiry_deferred_skus = gauge("millrace_expiry_deferred_skus"):
            "SKUs whose expired units do not come back for now, because their row is held or refuses it; \
             alert where it stays above 0.";
    }
}
