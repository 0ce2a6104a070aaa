//! Payments sent against the server's sums and against the rows: promise I7.

use serde_json::Value;

use super::super::catalogue::CURRENCY;
use super::check;
use crate::loadgen::checker::{Findings, StoredRows};
use crate::loadgen::{Check, PaymentOutcome, PaymentReport};

/// Payments and their sum in minor units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sum {
    count: i64,
    amount: i64,
}

impl Sum {
    /// A member of `payments` in an audit.
    fn read(audit: &Value, member: &str) -> Self {
        let sum = &audit["payments"][member];
        Self {
            count: sum["count"].as_i64().unwrap_or(0),
            amount: sum["amount"][CURRENCY].as_i64().unwrap_or(0),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            amount: self.amount + other.amount,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            count: self.count - other.count,
            amount: self.amount - other.amount,
        }
    }

    fn add_payment(&mut self, payment: &PaymentOutcome) {
        *self = self.plus(Self {
            count: 1,
            amount: payment.amount,
        });
    }
}

/// The sums of an audit. Those of an earlier sale in the same database are in `before` too.
struct Sums {
    received: Sum,
    matched: Sum,
    orphan: Sum,
    refund_due: Sum,
    refunded: Sum,
}

impl Sums {
    fn read(audit: &Value) -> Self {
        Self {
            received: Sum::read(audit, "received"),
            matched: Sum::read(audit, "matched"),
            orphan: Sum::read(audit, "orphan"),
            refund_due: Sum::read(audit, "refund_due"),
            refunded: Sum::read(audit, "refunded"),
        }
    }

    fn accounted(&self) -> Sum {
        let Self {
            received: _,
            matched,
            orphan,
            refund_due,
            refunded,
        } = self;
        matched.plus(*orphan).plus(*refund_due).plus(*refunded)
    }
}

/// The checks of payments. `before` and `after` are the audits of before the sale and after it.
pub fn checks(
    payments: &PaymentReport,
    rows: &StoredRows,
    findings: &Findings,
    before: &Value,
    after: &Value,
) -> Vec<Check> {
    vec![
        every_callback_taken(payments),
        accounted_for(payments, findings, before, after),
        no_false_signature(payments),
        one_payment_an_order(rows, findings, before, after),
        unpaid_units_are_back(rows, after),
    ]
}

fn every_callback_taken(payments: &PaymentReport) -> Check {
    check(
        "Every payment was taken from its platform",
        payments.sent > 0 && payments.unacknowledged == 0,
        format!(
            "{} payments in {} deliveries, {} without a yes; 99 of 100 callbacks were answered within {:.1} ms, the \
             slowest after {:.0} ms",
            payments.sent,
            payments.deliveries,
            payments.unacknowledged,
            payments.latency.p99_ms.unwrap_or(0.0),
            payments.latency.max_ms.unwrap_or(0.0),
        ),
    )
}

/// In = matched + orphan + refund due + refunded, where in is the sum of acknowledged payments. A payment
/// that was sent and never acknowledged may be there or not. Each is there as it was sent.
fn accounted_for(
    payments: &PaymentReport,
    findings: &Findings,
    before: &Value,
    after: &Value,
) -> Check {
    let (mut acknowledged, mut in_doubt) = (Sum::default(), Sum::default());
    for payment in payments.outcomes.iter().flatten() {
        match payment.acknowledged_at_ms {
            Some(_) => acknowledged.add_payment(payment),
            None => in_doubt.add_payment(payment),
        }
    }
    let (earlier, booked) = (Sums::read(before), Sums::read(after));
    let received = booked.received.minus(earlier.received);
    let most = acknowledged.plus(in_doubt);
    let as_sent = (acknowledged.count..=most.count).contains(&received.count)
        && (acknowledged.amount..=most.amount).contains(&received.amount);
    let broken: Vec<&str> = after["checks"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|check| check["promise"] == "I7" && check["ok"] != true)
        .filter_map(|check| check["detail"].as_str())
        .collect();
    let in_doubt = match in_doubt.count {
        0 => String::new(),
        count => format!(" and {count} without an answer"),
    };
    let mut detail = format!(
        "{} payments of {} acknowledged{in_doubt}; {} of {} booked = {} matched + {} orphans + {} due back + \
         {} gone back",
        acknowledged.count,
        money(acknowledged.amount),
        received.count,
        money(received.amount),
        booked.matched.minus(earlier.matched).count,
        booked.orphan.minus(earlier.orphan).count,
        booked.refund_due.minus(earlier.refund_due).count,
        booked.refunded.minus(earlier.refunded).count,
    );
    let reasons: Vec<String> = after["payments"]["refund_reasons"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    if !reasons.is_empty() {
        detail.push_str(&format!(" ({})", reasons.join(", ")));
    }
    if after["payments"].is_null() {
        detail = format!("the audit says nothing of payments; {detail}");
    }
    for fault in &broken {
        detail.push_str(&format!("; {fault}"));
    }
    // The others are about orders, and another check's.
    let of_orders = findings.payments.disagree + findings.payments.without_effect;
    let faults = findings.faults.len() as u64 - of_orders;
    if faults > 0 {
        detail.push_str(&format!("; {faults} payments not as they were sent"));
    }
    check(
        "Every payment is accounted for, to the cent",
        !after["payments"].is_null()
            && as_sent
            && booked.received == booked.accounted()
            && broken.is_empty()
            && faults == 0,
        detail,
    )
}

fn no_false_signature(payments: &PaymentReport) -> Check {
    let forged = payments.false_signatures;
    check(
        "No false signature was believed",
        forged.taken == 0,
        format!(
            "{} deliveries with a false signature, {} refused, {} believed",
            forged.sent, forged.refused, forged.taken
        ),
    )
}

fn one_payment_an_order(
    rows: &StoredRows,
    findings: &Findings,
    before: &Value,
    after: &Value,
) -> Check {
    let mut sum = Sum::default();
    for row in rows.orders.iter().filter(|row| row.status == "paid") {
        sum = sum.plus(Sum {
            count: 1,
            amount: row.amount,
        });
    }
    let matched = Sum::read(after, "matched").minus(Sum::read(before, "matched"));
    let found = &findings.payments;
    check(
        "Every order paid in time is paid, once, and no other is",
        sum == matched && found.disagree == 0 && found.without_effect == 0 && found.twice == 0,
        format!(
            "{} orders of {} paid, {} payments of {} matched; {} paid in time without effect, \
             {} that nobody paid",
            sum.count,
            money(sum.amount),
            matched.count,
            money(matched.amount),
            found.without_effect,
            found.disagree
        ),
    )
}

fn unpaid_units_are_back(rows: &StoredRows, after: &Value) -> Check {
    let of = |status: &str| {
        let rows = rows.orders.iter();
        rows.filter(|row| row.status == status).count()
    };
    let waiting = of("pending_payment");
    let (mut total, mut held, mut sold, mut free) = (0, 0, 0, 0);
    for sku in after["skus"].as_array().into_iter().flatten() {
        let units = |value: &Value| value.as_i64().unwrap_or(i64::MAX / 4096);
        total += units(&sku["total"]);
        held += units(&sku["held_by_orders"]);
        sold += units(&sku["sold_by_orders"]);
        free += units(&sku["live"]["free"]);
    }
    // At other nodes, and lent to none.
    free += after["free_elsewhere"].as_i64().unwrap_or(0);
    check(
        "Every unpaid order expired and its unit is back",
        waiting == 0 && held == 0 && sold + free == total,
        format!(
            "{} orders expired, {waiting} still wait; {sold} units paid + {held} held + {free} free again or never wanted \
             = {total} in stock",
            of("expired")
        ),
    )
}

/// Minor units of the sale's currency, which has two decimals, for people.
fn money(amount: i64) -> String {
    let (sign, amount) = (if amount < 0 { "-" } else { "" }, amount.unsigned_abs());
    let whole = indicatif::HumanCount(amount / 100);
    format!("{sign}{whole}.{:02} {CURRENCY}", amount % 100)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::history::payment_findings;
    use super::*;
    use crate::loadgen::checker::{OrderRow, PaymentRow};
    use crate::loadgen::{FalseSignatures, PaymentKind};

    const PRICE: i64 = 1000;
    const EXPIRES_MS: i64 = 5000;

    fn payment(order_id: u64, kind: PaymentKind, at_ms: Option<i64>) -> PaymentOutcome {
        PaymentOutcome {
            order_id,
            payment_id: format!("{order_id}-{kind:?}").into(),
            kind,
            amount: match kind {
                PaymentKind::WrongAmount => PRICE - 1,
                _ => PRICE,
            },
            currency: CURRENCY.into(),
            has_receipt: kind != PaymentKind::Lost,
            sent_at_ms: 50,
            acknowledged_at_ms: at_ms,
            expires_at_ms: Some(EXPIRES_MS),
        }
    }

    fn row(order_id: i64, status: &str) -> OrderRow {
        OrderRow {
            order_id,
            user: format!("u-{order_id}"),
            sku: "A".to_owned(),
            quantity: 1,
            adjustment: 0,
            amount: PRICE,
            status: status.to_owned(),
            refund_reason: None,
            attributes: None,
        }
    }

    fn payment_row(payment: &PaymentOutcome, state: &str, reason: &str) -> PaymentRow {
        PaymentRow {
            id: 1,
            payment: payment.payment_id.to_string(),
            order: payment.order_id.to_string(),
            amount: payment.amount,
            currency: payment.currency.to_string(),
            state: state.to_owned(),
            refund_reason: Some(reason.to_owned()),
        }
    }

    fn sum(count: i64, amount: i64) -> Value {
        json!({ "count": count, "amount": { CURRENCY: amount } })
    }

    /// Six units and five orders: two paid (one of them twice), one paid too late, one wrongly, one
    /// not at all; one payment was for no order.
    struct Sale {
        payments: PaymentReport,
        rows: StoredRows,
        before: Value,
        after: Value,
    }

    fn sale() -> Sale {
        use PaymentKind::*;
        let told = vec![
            payment(1, Regular, Some(100)),
            payment(2, Regular, Some(200)),
            payment(2, Second, Some(300)),
            payment(3, Late, Some(6000)),
            payment(4, WrongAmount, Some(400)),
            payment(77, Lost, Some(500)),
        ];
        let states = [
            ("matched", ""),
            ("matched", ""),
            ("refund_due", "already_paid"),
            ("refund_due", "order_expired"),
            ("refund_due", "amount_mismatch"),
            ("orphan", ""),
        ];
        let payments = told.iter().zip(states);
        let payments = payments.map(|(one, (state, reason))| payment_row(one, state, reason));
        let rows = StoredRows {
            payments: payments.collect(),
            orders: vec![
                row(1, "paid"),
                row(2, "paid"),
                row(3, "refund_due"),
                row(4, "refund_due"),
                row(5, "expired"),
            ],
            ..StoredRows::default()
        };
        let none = sum(0, 0);
        Sale {
            payments: PaymentReport {
                sent: 6,
                acknowledged: 6,
                outcomes: Some(told),
                false_signatures: FalseSignatures {
                    sent: 2,
                    refused: 2,
                    ..FalseSignatures::default()
                },
                ..PaymentReport::default()
            },
            rows,
            before: json!({ "payments": { "received": none, "matched": none, "orphan": none,
                "refund_due": none, "refunded": none, "refund_reasons": {} } }),
            after: json!({
                "payments": { "received": sum(6, 5999), "matched": sum(2, 2000),
                    "orphan": sum(1, 1000), "refund_due": sum(3, 2999), "refunded": none,
                    "refund_reasons": { "already_paid": 1, "order_expired": 1 } },
                "checks": [{ "promise": "I7", "ok": true, "detail": "0 found" }],
                "skus": [{ "total": 6, "held_by_orders": 0, "sold_by_orders": 2,
                    "live": { "free": 4 } }],
            }),
        }
    }

    /// The places of the failed checks after a change.
    fn broken_by(change: impl FnOnce(&mut Sale)) -> Vec<usize> {
        let mut sale = sale();
        change(&mut sale);
        let Sale {
            payments,
            rows,
            before,
            after,
        } = sale;
        let findings = payment_findings(&payments, &rows);
        let checks = checks(&payments, &rows, &findings, &before, &after);
        let broken = checks.iter().enumerate().filter(|(_, p)| !p.ok);
        broken.map(|(place, _)| place).collect()
    }

    fn told(sale: &mut Sale) -> &mut Vec<PaymentOutcome> {
        sale.payments.outcomes.as_mut().unwrap()
    }

    #[test]
    fn a_sale_in_order_keeps_every_promise() {
        assert_eq!(broken_by(|_| {}), Vec::<usize>::new());
    }

    #[test]
    fn an_earlier_sale_in_the_same_database_is_left_out() {
        let broken = broken_by(|sale| {
            for (when, received, matched) in [
                (&mut sale.before, sum(10, 7000), sum(10, 7000)),
                (&mut sale.after, sum(16, 12_999), sum(12, 9000)),
            ] {
                when["payments"]["received"] = received;
                when["payments"]["matched"] = matched;
            }
        });
        assert_eq!(broken, Vec::<usize>::new());
    }

    #[test]
    fn money_that_is_missing_invented_or_counted_twice_is_found() {
        // Acknowledged, and in no book.
        assert_eq!(
            broken_by(|sale| told(sale).push(payment(9, PaymentKind::Lost, Some(1)))),
            [1]
        );
        // Booked, and never sent.
        assert_eq!(
            broken_by(|sale| {
                told(sale).pop();
            }),
            [1]
        );
        // Received, and in no state.
        assert_eq!(
            broken_by(|sale| sale.after["payments"]["orphan"] = sum(0, 0)),
            [1]
        );
        // As many payments, and another sum.
        assert_eq!(
            broken_by(|sale| sale.after["payments"]["refund_due"] = sum(3, 3000)),
            [1]
        );
        // The audit's own check.
        assert_eq!(
            broken_by(|sale| sale.after["checks"][0]["ok"] = json!(false)),
            [1]
        );
        // A server that says nothing of payments.
        assert_eq!(
            broken_by(|sale| sale.after["payments"] = Value::Null),
            [1, 3]
        );
    }

    #[test]
    fn a_payment_whose_row_differs_or_is_there_twice_is_found() {
        // The sums agree, and two payments have changed their amounts between them.
        assert_eq!(
            broken_by(|sale| {
                sale.rows.payments[5].amount += 1;
                sale.rows.payments[3].amount -= 1;
            }),
            [1]
        );
        assert_eq!(
            broken_by(|sale| sale.rows.payments[3].refund_reason = Some("sold_out".to_owned())),
            [1]
        );
        // Also matched to an order that is paid already.
        assert_eq!(
            broken_by(|sale| sale.rows.payments[2].state = "matched".to_owned()),
            [3]
        );
    }

    #[test]
    fn a_payment_that_was_never_taken_is_told() {
        assert_eq!(broken_by(|sale| sale.payments.unacknowledged = 1), [0]);
        assert_eq!(broken_by(|sale| sale.payments.sent = 0), [0]);
    }

    #[test]
    fn a_payment_without_an_answer_may_be_booked_or_not() {
        let unanswered = |sale: &mut Sale| told(sale).push(payment(9, PaymentKind::Lost, None));
        assert_eq!(broken_by(unanswered), Vec::<usize>::new());
        assert_eq!(
            broken_by(|sale| {
                unanswered(sale);
                sale.after["payments"]["received"] = sum(7, 6999);
                sale.after["payments"]["orphan"] = sum(2, 2000);
                let payment = told(sale).last().cloned().unwrap();
                sale.rows.payments.push(payment_row(&payment, "orphan", ""));
            }),
            Vec::<usize>::new()
        );
    }

    #[test]
    fn a_false_signature_that_was_believed_is_told() {
        assert_eq!(
            broken_by(|sale| sale.payments.false_signatures.taken = 1),
            [2]
        );
    }

    #[test]
    fn an_order_that_is_paid_by_nobody_and_a_payment_without_effect_are_found() {
        // Nobody paid order 5; the payment that is matched instead was for another.
        assert_eq!(
            broken_by(|sale| {
                sale.rows.orders[4].status = "paid".to_owned();
                sale.rows.orders[0].status = "expired".to_owned();
            }),
            [3]
        );
        // Paid in time, and expired nevertheless.
        assert_eq!(
            broken_by(|sale| sale.rows.orders[0].status = "expired".to_owned()),
            [3]
        );
        // Its first payment came after it expired: nothing was owed.
        assert_eq!(
            broken_by(|sale| {
                told(sale)[0].acknowledged_at_ms = Some(EXPIRES_MS);
                sale.rows.orders[0].status = "refund_due".to_owned();
                let late = told(sale)[0].clone();
                sale.rows.payments[0] = payment_row(&late, "refund_due", "order_expired");
                sale.after["payments"]["matched"] = sum(1, 1000);
                sale.after["payments"]["refund_due"] = sum(4, 3999);
            }),
            Vec::<usize>::new()
        );
    }

    #[test]
    fn an_order_that_still_waits_and_a_unit_that_is_not_back_are_found() {
        assert_eq!(
            broken_by(|sale| sale.rows.orders[4].status = "pending_payment".to_owned()),
            [4]
        );
        assert_eq!(
            broken_by(|sale| sale.after["skus"][0]["held_by_orders"] = json!(1)),
            [4]
        );
        assert_eq!(
            broken_by(|sale| sale.after["skus"][0]["live"]["free"] = json!(3)),
            [4]
        );
    }

    #[test]
    fn money_is_written_for_people() {
        assert_eq!(money(123_456_789), format!("1,234,567.89 {CURRENCY}"));
        assert_eq!(money(-5), format!("-0.05 {CURRENCY}"));
    }
}
