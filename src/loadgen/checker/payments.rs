//! Payments as buyers and the platform know them, compared with the rows. Nothing here knows how Millrace
//! matches and settles payments: promise I7 and the times are enough.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use super::{Findings, OrderRow, PaymentRow, StoredRows};

/// A payment as the platform knows it. Times are of this machine's clock, as Millrace's are.
#[derive(Clone, Debug)]
pub struct SentPayment {
    /// The platform's id.
    pub payment: String,
    /// The order that it names.
    pub order: String,
    /// In minor units.
    pub amount: i64,
    /// Its currency.
    pub currency: String,
    /// Whether a receipt was passed back with it.
    pub has_receipt: bool,
    /// Whether the platform signed it. A forgery is sent by somebody who wants goods for nothing.
    pub is_genuine: bool,
    /// When it was first sent, in milliseconds of Unix time.
    pub sent: Option<i64>,
    /// When it was first answered with success, in milliseconds of Unix time.
    pub acknowledged: Option<i64>,
}

/// An order as its buyer knows it.
#[derive(Clone, Debug)]
pub struct KnownOrder {
    /// In minor units.
    pub amount: i64,
    /// In milliseconds of Unix time.
    pub expires_at: i64,
    /// Whether its row was taken away.
    pub is_lost: bool,
}

/// Orders and payments as buyers and the platform know them.
#[derive(Clone, Debug, Default)]
pub struct PaymentHistory {
    /// The currency of the sale.
    pub currency: String,
    /// Orders by id.
    pub orders: HashMap<i64, KnownOrder>,
    /// Payments; one that several messages report may be there several times.
    pub sent: Vec<SentPayment>,
    /// Orders, and payments without one, that an operator has refunded.
    pub refunded: BTreeSet<String>,
    /// Answers that are false by themselves.
    pub false_answers: Vec<String>,
}

/// The state that a sale has to have reached.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Every order is paid or over: the last one expired long enough ago.
    pub orders_over: bool,
    /// No payment waits for an order that never existed.
    pub orphans_over: bool,
    /// The tolerance between clocks, in milliseconds: a payment that was acknowledged this long before an
    /// order's expiry came in time, one that was sent as long after it did not.
    pub margin_ms: i64,
}

/// Findings about payments.
#[derive(Clone, Debug, Default)]
pub struct PaymentFindings {
    /// Payments in the database.
    pub payments: u64,
    /// Of these, those that pay their order.
    pub matched: u64,
    /// Of these, those to be refunded.
    pub refund_due: u64,
    /// Of these, those that were refunded.
    pub refunded: u64,
    /// Of these, those that wait for their order.
    pub orphan: u64,
    /// Payments answered with success that are not there.
    pub lost: u64,
    /// Rows beyond one for a payment, and payments beyond one for an order.
    pub twice: u64,
    /// Orders whose rows were taken away.
    pub wiped: u64,
    /// Of these, those that are there again.
    pub recovered: u64,
    /// Orders whose status does not agree with their payments.
    pub disagree: u64,
    /// Orders that were paid in time, and are not paid.
    pub without_effect: u64,
}

impl PaymentFindings {
    /// Whether nothing is lost, counted twice, or between two states.
    pub fn adds_up(&self) -> bool {
        let states = self.matched + self.orphan + self.refund_due + self.refunded;
        self.lost == 0 && self.twice == 0 && self.payments == states
    }

    /// Adds the findings of another database.
    pub(super) fn add(&mut self, other: &PaymentFindings) {
        self.payments += other.payments;
        self.matched += other.matched;
        self.refund_due += other.refund_due;
        self.refunded += other.refunded;
        self.orphan += other.orphan;
        self.lost += other.lost;
        self.twice += other.twice;
        self.wiped += other.wiped;
        self.recovered += other.recovered;
        self.disagree += other.disagree;
        self.without_effect += other.without_effect;
    }
}

impl fmt::Display for PaymentFindings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.payments + self.lost == 0 {
            return Ok(());
        }
        write!(
            f,
            " payments={} matched={} refund_due={} refunded={} orphan={} lost={} twice={} wiped={} recovered={}",
            self.payments,
            self.matched,
            self.refund_due,
            self.refunded,
            self.orphan,
            self.lost,
            self.twice,
            self.wiped,
            self.recovered,
        )
    }
}

impl PaymentHistory {
    /// Compares the history with the rows, and adds to `findings`. `is_cancel_asked`: whether a
    /// cancellation of this user's order was sent.
    pub fn check(
        &self,
        rows: &StoredRows,
        expected: Expected,
        is_cancel_asked: impl Fn(&str) -> bool,
        findings: &mut Findings,
    ) {
        findings.faults.extend(self.false_answers.iter().cloned());
        let mut comparison = Comparison {
            history: self,
            expected,
            findings,
            orders: (rows.orders.iter())
                .map(|row| (row.order_id.to_string(), row))
                .collect(),
            sent: group(&self.sent, |one| &one.payment),
            sent_for: group(&self.sent, |one| &one.order),
            payments: group(&rows.payments, |row| &row.order),
        };
        comparison.recovery();
        comparison.presence(rows);
        for payment in &rows.payments {
            comparison.payment(payment, &is_cancel_asked);
        }
        for row in &rows.orders {
            comparison.order(row, is_cancel_asked(&row.user));
        }
    }
}

fn group<T>(all: &[T], key: impl Fn(&T) -> &str) -> HashMap<&str, Vec<&T>> {
    let mut groups: HashMap<&str, Vec<&T>> = HashMap::new();
    for one in all {
        groups.entry(key(one)).or_default().push(one);
    }
    groups
}

struct Comparison<'a> {
    history: &'a PaymentHistory,
    expected: Expected,
    findings: &'a mut Findings,
    /// By the order's id in words, as payments name it.
    orders: HashMap<String, &'a OrderRow>,
    /// By the payment's id.
    sent: HashMap<&'a str, Vec<&'a SentPayment>>,
    /// By the order that they name.
    sent_for: HashMap<&'a str, Vec<&'a SentPayment>>,
    /// By the order that they name.
    payments: HashMap<&'a str, Vec<&'a PaymentRow>>,
}

impl Comparison<'_> {
    /// Counts the orders whose rows were taken away.
    fn recovery(&mut self) {
        for (id, _) in self.history.orders.iter().filter(|(_, one)| one.is_lost) {
            self.findings.payments.wiped += 1;
            let is_there = self.orders.contains_key(&id.to_string());
            self.findings.payments.recovered += u64::from(is_there);
        }
    }

    /// A payment that was answered with success is there, once.
    fn presence(&mut self, rows: &StoredRows) {
        let mut count: HashMap<&str, u64> = HashMap::new();
        for payment in &rows.payments {
            *count.entry(&payment.payment).or_default() += 1;
        }
        for (payment, count) in &count {
            if *count > 1 {
                self.findings.payments.twice += count - 1;
                self.findings
                    .fault(format!("{payment} is there {count} times"));
            }
        }
        for one in &self.history.sent {
            let is_there = count.contains_key(one.payment.as_str());
            if one.acknowledged.is_some() && !is_there {
                self.findings.payments.lost += 1;
                self.findings
                    .fault(format!("answered with success and lost: {one:?}"));
            }
        }
    }

    /// A payment is as the platform sent it, and its state can be explained.
    fn payment(&mut self, payment: &PaymentRow, is_cancel_asked: &impl Fn(&str) -> bool) {
        let row = self.orders.get(&payment.order).copied();
        let counts = &mut self.findings.payments;
        counts.payments += 1;
        match payment.state.as_str() {
            "matched" => counts.matched += 1,
            "refund_due" => counts.refund_due += 1,
            "refunded" => counts.refunded += 1,
            "orphan" => {
                counts.orphan += 1;
                if self.expected.orphans_over || row.is_some() {
                    self.findings.fault(format!("still an orphan: {payment:?}"));
                }
            }
            other => self
                .findings
                .fault(format!("no such state: {other}: {payment:?}")),
        }
        let sent = of(&self.sent, &payment.payment);
        let genuine: Vec<&SentPayment> = (sent.iter().copied())
            .filter(|one| one.is_genuine && one.sent.is_some())
            .collect();
        let Some(paid) = genuine.first() else {
            let fault = format!("nobody has paid it: {payment:?}: {sent:?}");
            self.findings.fault(fault);
            return;
        };
        if (&paid.order, paid.amount, &paid.currency)
            != (&payment.order, payment.amount, &payment.currency)
        {
            self.findings
                .fault(format!("changed: {payment:?}: {paid:?}"));
        }
        let acknowledged = genuine.iter().filter_map(|one| one.acknowledged).min();
        let order = row.and_then(|row| self.history.orders.get(&row.order_id));
        let is_cancelled = row.is_some_and(|row| is_cancel_asked(&row.user));
        let refunded = &self.history.refunded;
        let is_explained = match payment.state.as_str() {
            "refund_due" => payment.refund_reason.as_deref().is_some_and(|reason| {
                is_cancelled && reason == "order_cancelled"
                    || self.is_reason(reason, paid, acknowledged, row, order)
            }),
            "refunded" => refunded.contains(&payment.order) || refunded.contains(&payment.payment),
            // Also late: an order that had not expired yet is paid.
            "matched" => order.is_some(),
            _ => true,
        };
        if !is_explained {
            self.findings.fault(format!(
                "not explained: {payment:?}: {paid:?}, acknowledged {acknowledged:?}, {row:?}, {order:?}"
            ));
        }
    }

    /// Whether the history allows a payment to be refunded for this reason.
    fn is_reason(
        &self,
        reason: &str,
        paid: &SentPayment,
        acknowledged: Option<i64>,
        row: Option<&OrderRow>,
        order: Option<&KnownOrder>,
    ) -> bool {
        let Some(row) = row else {
            return match reason {
                "receipt_missing" => !paid.has_receipt,
                "receipt_invalid" => paid.has_receipt,
                _ => false,
            };
        };
        let others = || {
            let all = of(&self.payments, &paid.order).iter();
            all.filter(|other| other.payment != paid.payment)
        };
        match reason {
            "order_expired" => order.is_none_or(|order| {
                let margin_ms = self.expected.margin_ms;
                acknowledged.is_none_or(|at| at + margin_ms >= order.expires_at)
            }),
            "already_paid" => {
                others().any(|other| ["matched", "refunded"].contains(&other.state.as_str()))
            }
            "already_refunded" => row.refund_reason.is_some() && others().next().is_some(),
            "amount_mismatch" => paid.amount != row.amount,
            "currency_mismatch" => paid.currency != self.history.currency,
            "sold_out" => order.is_some_and(|order| order.is_lost),
            _ => false,
        }
    }

    /// An order and the payments that name it agree.
    fn order(&mut self, row: &OrderRow, is_cancel_asked: bool) {
        let id = row.order_id.to_string();
        let payments = of(&self.payments, &id);
        let standing = |state: &str| payments.iter().filter(|one| one.state == state).count();
        let matched = standing("matched");
        if matched > 1 {
            self.findings.payments.twice += matched as u64 - 1;
        }
        let pays = |one: &&&PaymentRow| {
            one.state == "matched"
                && one.amount == row.amount
                && one.currency == self.history.currency
        };
        let agrees = match row.status.as_str() {
            "paid" => matched == 1 && payments.iter().filter(pays).count() == 1,
            "waitlisted" => matched == 0,
            "refund_due" => matched == 0 && standing("refund_due") > 0,
            "refunded" => matched == 0 && standing("refunded") > 0,
            // Any payment for it moves it on.
            "pending_payment" => payments.is_empty() && !self.expected.orders_over,
            "expired" | "cancelled" | "failed" => payments.is_empty(),
            _ => false,
        };
        if !agrees {
            let fault = format!("does not agree with its payments: {row:?}: {payments:?}");
            self.findings.payments.disagree += 1;
            self.findings.fault(fault);
        }
        if is_cancel_asked || self.history.refunded.contains(&id) {
            return;
        }
        let Some(order) = self.history.orders.get(&row.order_id) else {
            return;
        };
        if row.status != "paid" && !order.is_lost && self.is_paid_in_time(&id, order) {
            let fault = format!("paid in time: {row:?}: {payments:?}");
            self.findings.payments.without_effect += 1;
            self.findings.fault(fault);
        }
    }

    /// Whether the platform knows that an order was paid before its expiry, and that no wrong payment came
    /// before that.
    fn is_paid_in_time(&self, id: &str, order: &KnownOrder) -> bool {
        let genuine = of(&self.sent_for, id).iter().filter(|one| one.is_genuine);
        let is_right = |one: &&&SentPayment| {
            one.amount == order.amount && one.currency == self.history.currency
        };
        let (right, wrong): (Vec<&&SentPayment>, Vec<&&SentPayment>) = genuine.partition(is_right);
        let known = right.iter().filter_map(|one| one.acknowledged).min();
        known.is_some_and(|known| {
            known + self.expected.margin_ms < order.expires_at
                && wrong
                    .iter()
                    .all(|one| one.sent.is_none_or(|sent| sent > known))
        })
    }
}

fn of<'m, 'a, T>(groups: &'m HashMap<&'a str, Vec<&'a T>>, key: &str) -> &'m [&'a T] {
    groups.get(key).map_or(&[], Vec::as_slice)
}
