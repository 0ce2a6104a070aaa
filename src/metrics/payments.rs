//! Metrics of payments, and of orders that are not paid.

use prometheus::{Gauge, Histogram, IntCounter, IntGauge};

use super::{Counters, ROWS, Registrar, SECONDS};
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

/// Handles to them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Payments {
    /// Answers to callbacks of payment providers.
    pub callbacks: Counters,
    /// Time to answer a callback, in seconds.
    pub callback_seconds: Histogram,
    /// Messages of payment providers that were stored.
    pub events: IntCounter,
    /// Messages that had been stored before.
    pub duplicates: IntCounter,
    /// Messages in one transaction.
    pub batch_rows: Histogram,
    /// What came of payments.
    pub verdicts: Counters,
    /// Payments that have to go back, by why.
    pub refunds: Counters,
    /// Payments whose order is not there.
    pub orphan_payments: IntGauge,
    /// Age of the oldest of them, in seconds.
    pub orphan_oldest_seconds: Gauge,
    /// Payments that have to go back and have not yet.
    pub refunds_due: IntGauge,
    /// For how long the oldest of them has been waiting, in seconds.
    pub refund_due_oldest_seconds: Gauge,
    /// Orders that were not paid in time.
    pub orders_expired: IntCounter,
    /// For how long the earliest order that is to expire has been due, in seconds.
    pub expiry_backlog_seconds: Gauge,
    /// Rows that were read to find orders that are to expire.
    pub expiry_rows: IntCounter,
    /// SKUs whose units cannot come back for now.
    pub expiry_deferred_skus: IntGauge,
}

impl Payments {
    pub(super) fn register(make: &mut Registrar) -> prometheus::Result<Self> {
        let callbacks = make.counters(
            "millrace_callbacks_total",
            "Callbacks of payment providers by what they were answered; not_stored: the provider was told to come again.",
            "outcome",
            &CALLBACKS,
        )?;
        let callback_seconds = make.histogram(
            "millrace_callback_seconds",
            "Time to answer a callback whose signature was right.",
            &SECONDS,
        )?;
        let events = make.counter(
            "millrace_payment_events_total",
            "Messages of payment providers that were stored.",
        )?;
        let duplicates = make.counter(
            "millrace_payment_duplicates_total",
            "Messages of payment providers that had been stored before; they change nothing.",
        )?;
        let batch_rows = make.histogram(
            "millrace_payment_batch_rows",
            "Messages of payment providers that shared a transaction.",
            &ROWS,
        )?;
        let verdicts = make.counters(
            "millrace_payments_total",
            "What came of payments; an orphan is counted again once its order is found.",
            "verdict",
            &PAYMENTS,
        )?;
        let reasons: Vec<&'static str> = RefundReason::ALL
            .iter()
            .map(|reason| reason.as_str())
            .chain(["other"])
            .collect();
        let refunds = make.counters(
            "millrace_refunds_due_total",
            "Payments that have to go back, by why: docs/PAYMENTS.md says what to do about each.",
            "reason",
            &reasons,
        )?;
        let orphan_payments = make.gauge(
            "millrace_orphan_payments",
            "Verified payments whose order is not there.",
        )?;
        let orphan_oldest_seconds = Gauge::new(
            "millrace_orphan_payment_oldest_seconds",
            "Age of the oldest of them; alert where it is longer than the configured checks take.",
        )?;
        let orphan_oldest_seconds = make.add(orphan_oldest_seconds, "gauge", String::new())?;
        let refunds_due = make.gauge(
            "millrace_refunds_due",
            "Payments that have to go back and have not been recorded as refunded.",
        )?;
        let refund_due_oldest_seconds = Gauge::new(
            "millrace_refund_due_oldest_seconds",
            "For how long the oldest of them has been waiting for a person.",
        )?;
        let refund_due_oldest_seconds =
            make.add(refund_due_oldest_seconds, "gauge", String::new())?;
        let orders_expired = make.counter(
            "millrace_orders_expired_total",
            "Orders that were not paid in time and whose units came back.",
        )?;
        let expiry_backlog_seconds = Gauge::new(
            "millrace_expiry_backlog_seconds",
            "For how long the earliest order that is to expire has been due.",
        )?;
        let expiry_backlog_seconds = make.add(expiry_backlog_seconds, "gauge", String::new())?;
        let expiry_rows = make.counter(
            "millrace_expiry_rows_total",
            "Rows that were read to find orders that are to expire.",
        )?;
        let expiry_deferred_skus = make.gauge(
            "millrace_expiry_deferred_skus",
            "SKUs whose expired units do not come back for now, because their row is held or refuses it; alert where it stays above 0.",
        )?;
        Ok(Payments {
            callbacks,
            callback_seconds,
            events,
            duplicates,
            batch_rows,
            verdicts,
            refunds,
            orphan_payments,
            orphan_oldest_seconds,
            refunds_due,
            refund_due_oldest_seconds,
            orders_expired,
            expiry_backlog_seconds,
            expiry_rows,
            expiry_deferred_skus,
        })
    }
}
