//! Payments sent and how they were answered.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::Serialize;
use smol_str::SmolStr;

use super::payment::PaymentKind;
use crate::loadgen::recorder::{microseconds, record};
use crate::loadgen::report::Percentiles;
use crate::loadgen::sender::Fault;

/// The payments of a load: the member `payments` of `--json`.
///
/// A payment counts once, whatever the number of its deliveries. The server may have a payment that was
/// sent and not acknowledged, for an answer can get lost.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PaymentReport {
    /// Payments of which a delivery was sent.
    pub sent: u64,
    /// Payments of which a delivery was answered `2xx`.
    pub acknowledged: u64,
    /// Payments sent and never acknowledged.
    pub unacknowledged: u64,
    /// Payments by kind, those that occurred.
    pub kinds: Vec<PaymentKindCount>,
    /// Amounts by currency.
    pub money: BTreeMap<String, Money>,
    /// Deliveries sent, repeated ones included; those with false signatures are counted apart.
    pub deliveries: u64,
    /// Deliveries answered `2xx`.
    pub answered_2xx: u64,
    /// Deliveries sent again because the one before had failed.
    pub retried: u64,
    /// Deliveries without an answer: no connection, a timeout, a connection that broke.
    pub unanswered: u64,
    /// Deliveries by the status of their answer, or by what broke.
    pub answers: BTreeMap<String, u64>,
    /// How long a delivery took to be answered, counted from the moment it was due.
    pub latency: Percentiles,
    /// Deliveries with a false signature.
    pub false_signatures: FalseSignatures,
    /// Each payment with its outcome, if the plan keeps outcomes.
    #[serde(skip)]
    pub outcomes: Option<Vec<PaymentOutcome>>,
}

/// How many payments there were of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct PaymentKindCount {
    /// The kind.
    pub kind: PaymentKind,
    /// Its name for people.
    pub label: &'static str,
    /// Payments of which a delivery was sent.
    pub sent: u64,
    /// Payments of which a delivery was answered `2xx`.
    pub acknowledged: u64,
}

/// Money in one currency, in minor units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Money {
    /// Of the payments sent.
    pub sent: i64,
    /// Of the payments acknowledged.
    pub acknowledged: i64,
}

/// Deliveries with a false signature, each for a payment that nobody made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct FalseSignatures {
    /// Sent, repeated ones included.
    pub sent: u64,
    /// Answered `401`, as they must be.
    pub refused: u64,
    /// Answered `2xx`: the server believed them.
    pub taken: u64,
    /// Answered otherwise (`503`, say) or not at all, and sent again.
    pub undecided: u64,
}

/// One payment that was sent, for a comparison with the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PaymentOutcome {
    /// The order that it names; of [`PaymentKind::Lost`], one that never existed.
    pub order_id: u64,
    /// The platform's name for it.
    pub payment_id: SmolStr,
    /// How it was paid.
    pub kind: PaymentKind,
    /// In minor units.
    pub amount: i64,
    /// Its currency.
    pub currency: SmolStr,
    /// Whether a receipt was passed back with it.
    pub has_receipt: bool,
    /// When its first delivery was sent, in milliseconds of Unix time.
    pub sent_at_ms: i64,
    /// When a delivery was first answered `2xx`, in milliseconds of Unix time.
    pub acknowledged_at_ms: Option<i64>,
    /// When the order expires, in milliseconds of Unix time, if its answer said so.
    pub expires_at_ms: Option<i64>,
}

/// The result of a delivery: the status of its answer, or why there is none.
pub(in crate::loadgen) type DeliveryResult = Result<u16, Fault>;

/// Counts payments and deliveries while they are made.
#[derive(Debug)]
pub(in crate::loadgen) struct PaymentStats {
    report: PaymentReport,
    sent: [u64; PaymentKind::ALL.len()],
    acknowledged: [u64; PaymentKind::ALL.len()],
    latencies: Histogram<u64>,
}

impl PaymentStats {
    pub(in crate::loadgen) fn new(keep: bool) -> Self {
        Self {
            report: PaymentReport {
                outcomes: keep.then(Vec::new),
                ..PaymentReport::default()
            },
            sent: [0; PaymentKind::ALL.len()],
            acknowledged: [0; PaymentKind::ALL.len()],
            latencies: microseconds(3),
        }
    }

    /// Notes the first delivery of a payment, and returns its place among the kept outcomes.
    pub(in crate::loadgen) fn first_sent(&mut self, payment: PaymentOutcome) -> usize {
        self.sent[payment.kind.place()] += 1;
        self.money(&payment.currency).sent += payment.amount;
        match &mut self.report.outcomes {
            Some(outcomes) => {
                outcomes.push(payment);
                outcomes.len() - 1
            }
            None => 0,
        }
    }

    /// Notes the first `2xx` for a payment.
    pub(in crate::loadgen) fn acknowledged(
        &mut self,
        payment: &PaymentOutcome,
        place: usize,
        at_ms: i64,
    ) {
        self.acknowledged[payment.kind.place()] += 1;
        self.money(&payment.currency).acknowledged += payment.amount;
        if let Some(payment) = self
            .report
            .outcomes
            .as_mut()
            .and_then(|all| all.get_mut(place))
        {
            payment.acknowledged_at_ms = Some(at_ms);
        }
    }

    /// Notes a delivery with a true signature.
    pub(in crate::loadgen) fn delivered(
        &mut self,
        result: DeliveryResult,
        latency_ns: u64,
        retry: bool,
    ) {
        let report = &mut self.report;
        report.deliveries += 1;
        report.retried += u64::from(retry);
        match result {
            Ok(status) => {
                report.answered_2xx += u64::from((200..300).contains(&status));
                *report.answers.entry(status.to_string()).or_default() += 1;
            }
            Err(fault) => {
                report.unanswered += 1;
                *report.answers.entry(fault.name().to_owned()).or_default() += 1;
            }
        }
        // A refused connection is over at once, and would only flatter.
        if matches!(result, Ok(_) | Err(Fault::Timeout)) {
            record(&mut self.latencies, latency_ns);
        }
    }

    /// Notes a delivery with a false signature.
    pub(in crate::loadgen) fn forged(&mut self, result: DeliveryResult) {
        let forged = &mut self.report.false_signatures;
        forged.sent += 1;
        match result {
            Ok(401) => forged.refused += 1,
            Ok(200..=299) => forged.taken += 1,
            Ok(_) | Err(_) => forged.undecided += 1,
        }
    }

    /// The report, once nothing more is sent.
    pub(in crate::loadgen) fn close(self) -> PaymentReport {
        let sent = self.sent.iter().sum();
        let acknowledged = self.acknowledged.iter().sum();
        PaymentReport {
            sent,
            acknowledged,
            unacknowledged: sent - acknowledged,
            kinds: PaymentKind::ALL
                .into_iter()
                .filter(|kind| self.sent[kind.place()] > 0)
                .map(|kind| PaymentKindCount {
                    kind,
                    label: kind.label(),
                    sent: self.sent[kind.place()],
                    acknowledged: self.acknowledged[kind.place()],
                })
                .collect(),
            latency: Percentiles::of(&self.latencies),
            ..self.report
        }
    }

    fn money(&mut self, currency: &str) -> &mut Money {
        self.report.money.entry(currency.to_owned()).or_default()
    }
}

impl PaymentReport {
    /// Whether the server took what it had to take and refused what it had to refuse.
    pub fn is_clean(&self) -> bool {
        self.unacknowledged == 0 && self.false_signatures.taken == 0
    }
}
