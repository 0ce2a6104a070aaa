//! Where the money went: what the platform and the buyers know, held against the database. It
//! knows nothing of how Millrace matches and judges; the promises of I7 and the times are enough.

use std::collections::HashMap;
use std::fmt;

use super::checker::{Found, PaymentRow, Row, Verdict};
use super::platform::{Bill, Book, Ordered, Platform};

/// What two clocks of one machine may differ by, and what a moment may take, in milliseconds. An
/// answer this long before an order's end came in time, a payment sent as long after it did not.
const MARGIN_MS: i64 = 100;

/// What came of payments.
#[derive(Clone, Debug, Default)]
pub struct Money {
    /// Payments in the database.
    pub payments: u64,
    pub matched: u64,
    pub refund_due: u64,
    pub refunded: u64,
    pub orphan: u64,
    /// Payments answered with success that are not there.
    pub lost: u64,
    /// Rows beyond one for a payment, and orders paid by more than one.
    pub twice: u64,
    /// Rows that were taken away, and those of them that are there again.
    pub wiped: u64,
    pub recovered: u64,
}

impl Money {
    /// Whether nothing is lost, counted twice, or between two states.
    pub fn adds_up(&self) -> bool {
        let states = self.matched + self.orphan + self.refund_due + self.refunded;
        self.lost == 0 && self.twice == 0 && self.payments == states
    }

    /// Adds the figures of another database.
    pub fn add(&mut self, other: &Money) {
        self.payments += other.payments;
        self.matched += other.matched;
        self.refund_due += other.refund_due;
        self.refunded += other.refunded;
        self.orphan += other.orphan;
        self.lost += other.lost;
        self.twice += other.twice;
        self.wiped += other.wiped;
        self.recovered += other.recovered;
    }
}

impl fmt::Display for Money {
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

impl Platform {
    /// Adds to `verdict` what the database has done with the money. `settled`: long enough ago
    /// that every order is paid or over.
    pub fn judge(
        &self,
        found: &Found,
        is_cancel_asked: impl Fn(&str) -> bool,
        settled: bool,
        verdict: &mut Verdict,
    ) {
        let book = self.book();
        verdict.faults.extend(book.lies.iter().cloned());
        let mut judge = Judge {
            book: &book,
            verdict,
            rows: found
                .rows
                .iter()
                .map(|row| (row.order_id.to_string(), row))
                .collect(),
            bills: HashMap::new(),
            bills_for: HashMap::new(),
            payments: HashMap::new(),
        };
        for bill in &book.bills {
            judge
                .bills
                .entry(&bill.paid.payment)
                .or_default()
                .push(bill);
            judge
                .bills_for
                .entry(&bill.paid.order)
                .or_default()
                .push(bill);
        }
        for payment in &found.payments {
            judge
                .payments
                .entry(&payment.order)
                .or_default()
                .push(payment);
        }
        let wiped = book.orders.iter().filter(|(_, order)| order.is_lost);
        for (id, _) in wiped {
            judge.verdict.money.wiped += 1;
            judge.verdict.money.recovered += u64::from(judge.rows.contains_key(&id.to_string()));
        }
        judge.presence(found);
        for payment in &found.payments {
            judge.payment(payment, &is_cancel_asked);
        }
        for row in &found.rows {
            judge.order(row, is_cancel_asked(&row.user), settled);
        }
    }
}

struct Judge<'a> {
    book: &'a Book,
    verdict: &'a mut Verdict,
    /// By the order's id in words, as payments name it.
    rows: HashMap<String, &'a Row>,
    /// By the payment's id.
    bills: HashMap<&'a str, Vec<&'a Bill>>,
    /// By the order that they name.
    bills_for: HashMap<&'a str, Vec<&'a Bill>>,
    payments: HashMap<&'a str, Vec<&'a PaymentRow>>,
}

impl Judge<'_> {
    /// What was answered with success is there, once.
    fn presence(&mut self, found: &Found) {
        let mut count: HashMap<&str, u64> = HashMap::new();
        for payment in &found.payments {
            *count.entry(&payment.payment).or_default() += 1;
        }
        for (payment, count) in &count {
            if *count > 1 {
                self.verdict.money.twice += count - 1;
                self.verdict
                    .fault(format!("{payment} is there {count} times"));
            }
        }
        for bill in &self.book.bills {
            let is_there = count.contains_key(bill.paid.payment.as_str());
            if bill.acknowledged.is_some() && !is_there {
                self.verdict.money.lost += 1;
                self.verdict
                    .fault(format!("answered with success and lost: {bill:?}"));
            }
        }
    }

    /// A payment is as the platform told it, and where it stands can be explained.
    fn payment(&mut self, payment: &PaymentRow, is_cancel_asked: &impl Fn(&str) -> bool) {
        let money = &mut self.verdict.money;
        money.payments += 1;
        match payment.state.as_str() {
            "matched" => money.matched += 1,
            "refund_due" => money.refund_due += 1,
            "refunded" => money.refunded += 1,
            "orphan" => {
                money.orphan += 1;
                self.verdict.fault(format!("still an orphan: {payment:?}"));
            }
            other => self
                .verdict
                .fault(format!("no such state: {other}: {payment:?}")),
        }
        let bills = self
            .bills
            .get(payment.payment.as_str())
            .map_or(&[][..], Vec::as_slice);
        let genuine: Vec<&Bill> = bills
            .iter()
            .copied()
            .filter(|bill| bill.is_genuine && bill.sent.is_some())
            .collect();
        let Some(bill) = genuine.first() else {
            self.verdict
                .fault(format!("nobody has paid it: {payment:?}: {bills:?}"));
            return;
        };
        let paid = &bill.paid;
        if (&paid.order, paid.amount, &paid.currency)
            != (&payment.order, payment.amount, &payment.currency)
        {
            self.verdict
                .fault(format!("changed: {payment:?}: {paid:?}"));
        }
        let known = genuine.iter().filter_map(|bill| bill.acknowledged).min();
        let row = self.rows.get(&payment.order).copied();
        let order = row.and_then(|row| self.book.orders.get(&row.order_id));
        let is_cancelled = row.is_some_and(|row| is_cancel_asked(&row.user));
        let is_explained = match payment.state.as_str() {
            "refund_due" => payment.refund_reason.as_deref().is_some_and(|reason| {
                self.is_reason(reason, bill, known, row, order, is_cancelled)
            }),
            "refunded" => {
                self.book.refunded.contains(&payment.order)
                    || self.book.refunded.contains(&payment.payment)
            }
            // Also late: an order that had not expired yet is paid.
            "matched" => order.is_some(),
            _ => true,
        };
        if !is_explained {
            self.verdict.fault(format!(
                "not explained: {payment:?}: {bill:?}, acknowledged {known:?}, {row:?}, {order:?}"
            ));
        }
    }

    /// Whether what is known lets a payment go back for this reason.
    fn is_reason(
        &self,
        reason: &str,
        bill: &Bill,
        acknowledged: Option<i64>,
        row: Option<&Row>,
        order: Option<&Ordered>,
        is_cancelled: bool,
    ) -> bool {
        let paid = &bill.paid;
        let Some(row) = row else {
            return match reason {
                "receipt_missing" => paid.receipt.is_none(),
                "receipt_invalid" => paid.receipt.is_some(),
                _ => false,
            };
        };
        let others = || {
            self.payments[paid.order.as_str()]
                .iter()
                .filter(|other| other.payment != paid.payment)
        };
        match reason {
            "order_cancelled" => is_cancelled,
            "order_expired" => order.is_none_or(|order| {
                acknowledged.is_none_or(|at| at + MARGIN_MS >= order.expires_at)
            }),
            "already_paid" => {
                others().any(|other| ["matched", "refunded"].contains(&other.state.as_str()))
            }
            "already_refunded" => row.refund_reason.is_some() && others().next().is_some(),
            "amount_mismatch" => paid.amount != row.amount,
            "currency_mismatch" => paid.currency != "EUR",
            "sold_out" => order.is_some_and(|order| order.is_lost),
            _ => false,
        }
    }

    /// An order and the payments that name it agree.
    fn order(&mut self, row: &Row, is_cancel_asked: bool, settled: bool) {
        let id = row.order_id.to_string();
        let payments = self
            .payments
            .get(id.as_str())
            .map_or(&[][..], Vec::as_slice);
        let standing = |state: &str| payments.iter().filter(|one| one.state == state).count();
        let matched = standing("matched");
        if matched > 1 {
            self.verdict.money.twice += matched as u64 - 1;
        }
        let agrees = match row.status.as_str() {
            "paid" => {
                let pays = |one: &&&PaymentRow| {
                    one.state == "matched" && one.amount == row.amount && one.currency == "EUR"
                };
                matched == 1 && payments.iter().filter(pays).count() == 1
            }
            "refund_due" => matched == 0 && standing("refund_due") > 0,
            "refunded" => matched == 0 && standing("refunded") > 0,
            // Whatever was paid for it has moved it on.
            "pending_payment" => payments.is_empty() && !settled,
            "expired" | "cancelled" | "failed" => payments.is_empty(),
            _ => false,
        };
        if !agrees {
            self.verdict.fault(format!(
                "does not agree with its payments: {row:?}: {payments:?}"
            ));
        }
        if is_cancel_asked || self.book.refunded.contains(&id) {
            return;
        }
        let Some(order) = self.book.orders.get(&row.order_id) else {
            return;
        };
        if row.status != "paid" && !order.is_lost && self.is_paid_in_time(&id, order) {
            self.verdict
                .fault(format!("paid in time: {row:?}: {payments:?}"));
        }
    }

    /// Whether the platform knows that an order was paid before its end, and by nothing else
    /// before that.
    fn is_paid_in_time(&self, id: &str, order: &Ordered) -> bool {
        let bills = self.bills_for.get(id).map_or(&[][..], Vec::as_slice);
        let genuine = bills.iter().copied().filter(|bill| bill.is_genuine);
        let is_right =
            |bill: &&Bill| bill.paid.amount == order.amount && bill.paid.currency == "EUR";
        let (right, wrong): (Vec<&Bill>, Vec<&Bill>) = genuine.partition(is_right);
        let known = right.iter().filter_map(|bill| bill.acknowledged).min();
        known.is_some_and(|known| {
            known + MARGIN_MS < order.expires_at
                && wrong
                    .iter()
                    .all(|bill| bill.sent.is_none_or(|sent| sent > known))
        })
    }
}
