//! The checker checked: a small history that is true, and then the same with one thing false in it
//! at a time. A falsehood that it misses here would pass in every other proof.

use serde_json::{Value, json};

use super::checker::{
    Checker, Findings, OrderAnswer, OrderRequest, OrderRow, PaymentRow, SentPayment, SkuRow,
    StoredRows,
};
use super::outcome::Why;
use super::platform::{Platform, sent};
use crate::support::webhook::Paid;

/// Something false, and how it has to show.
struct Planted {
    what: &'static str,
    plant: fn(&Checker, &mut StoredRows),
    shows: fn(&Findings) -> bool,
}

const PLANTED: &[Planted] = &[
    Planted {
        what: "an order that was waited for is lost",
        plant: |_, found| {
            found.orders.retain(|row| row.user != "waited");
            counters(found).held -= 1;
        },
        shows: |findings| findings.present + 1 == findings.acked,
    },
    Planted {
        what: "an order that was durable in the queue is lost",
        plant: |_, found| {
            found.orders.retain(|row| row.user != "async");
            counters(found).held -= 2;
        },
        shows: |findings| findings.present + 1 == findings.acked,
    },
    Planted {
        what: "a quantity changed on the way",
        plant: |_, found| {
            found.orders[0].quantity += 1;
            counters(found).held += 1;
        },
        shows: |findings| findings.present + 1 == findings.acked,
    },
    Planted {
        what: "attributes went on the way",
        plant: |_, found| found.orders[0].attributes = None,
        shows: |findings| findings.present + 1 == findings.acked,
    },
    Planted {
        what: "an order was written twice",
        plant: |_, found| {
            let again = OrderRow {
                order_id: 99,
                ..found.orders[0].clone()
            };
            found.orders.push(again);
            counters(found).held += 1;
        },
        shows: |findings| findings.duplicated == 1,
    },
    Planted {
        what: "a retry was told of another order",
        plant: |checker, _| ask(checker, &request("waited", 1), order("waited", 1, 99, 200)),
        shows: |findings| findings.duplicated == 1,
    },
    Planted {
        what: "an order that was refused is there",
        plant: |_, found| {
            found.orders.push(row("refused", 1, 7, "pending_payment"));
            counters(found).held += 1;
        },
        shows: |findings| findings.refused_but_present == 1,
    },
    Planted {
        what: "an order is there though its retry after a crash was refused",
        plant: |checker, found| {
            ask(checker, &request("unanswered", 1), refusal(409, "sold_out"));
            found
                .orders
                .push(row("unanswered", 1, 7, "pending_payment"));
            counters(found).held += 1;
        },
        shows: |findings| findings.refused_but_present == 1,
    },
    Planted {
        what: "an order was accepted and its retry refused",
        plant: |checker, _| ask(checker, &request("async", 2), refusal(409, "sold_out")),
        shows: |findings| findings.faults.len() == 1,
    },
    Planted {
        what: "more units are sold than there are",
        plant: |checker, found| {
            checker.offers("S", 100, 3);
            counters(found).total = 3;
        },
        shows: |findings| findings.oversold == 1,
    },
    Planted {
        what: "units are held that no row explains",
        plant: |_, found| counters(found).held += 2,
        shows: |findings| findings.leaked == 2,
    },
    Planted {
        what: "units are free that a row holds",
        plant: |_, found| counters(found).held -= 1,
        shows: |findings| findings.leaked == 1,
    },
    Planted {
        what: "a cancellation is lost",
        plant: |_, found| {
            for row in found
                .orders
                .iter_mut()
                .filter(|row| row.user == "cancelled")
            {
                row.status = "pending_payment".to_owned();
            }
            counters(found).held += 1;
        },
        shows: |findings| findings.faults.len() == 1,
    },
    Planted {
        what: "an order is cancelled that nobody cancelled",
        plant: |_, found| {
            found.orders[0].status = "cancelled".to_owned();
            counters(found).held -= 1;
        },
        shows: |findings| findings.faults.len() == 1,
    },
    Planted {
        what: "there is a row that nobody asked for",
        plant: |_, found| found.orders.push(row("nobody", 1, 7, "expired")),
        shows: |findings| findings.faults.len() == 1,
    },
    Planted {
        what: "an answer tells of an order that was not asked for",
        plant: |checker, _| ask(checker, &request("waited", 1), order("async", 1, 1, 200)),
        shows: |findings| findings.faults.len() == 1,
    },
    Planted {
        what: "an answer says accepted without Preference-Applied",
        plant: |checker, _| {
            let told = order("another", 1, 8, 202);
            ask(checker, &request("another", 1), without_preference(told));
        },
        shows: |findings| findings.faults.len() == 1,
    },
];

/// The same for payments.
struct PlantedMoney {
    what: &'static str,
    plant: fn(&mut StoredRows),
    shows: fn(&Findings) -> bool,
}

const PLANTED_MONEY: &[PlantedMoney] = &[
    PlantedMoney {
        what: "a payment is lost",
        plant: |found| found.payments.retain(|one| one.payment != "nobody's"),
        shows: |findings| findings.payments.lost == 1,
    },
    PlantedMoney {
        what: "a payment is there twice",
        plant: |found| {
            let again = payment(found, "nobody's").clone();
            found.payments.push(again);
        },
        shows: |findings| findings.payments.twice == 1,
    },
    PlantedMoney {
        what: "a payment with a false signature was taken",
        plant: |found| payment(found, "second").payment = "forged".to_owned(),
        shows: |findings| {
            findings
                .faults
                .iter()
                .any(|why| why.contains("nobody has paid"))
        },
    },
    PlantedMoney {
        what: "a payment that nobody has made",
        plant: |found| payment(found, "nobody's").payment = "unheard of".to_owned(),
        shows: |findings| {
            findings
                .faults
                .iter()
                .any(|why| why.contains("nobody has paid"))
        },
    },
    PlantedMoney {
        what: "an amount changed on the way",
        plant: |found| payment(found, "nobody's").amount += 1,
        shows: |findings| findings.faults.len() == 1,
    },
    PlantedMoney {
        what: "a payment still looks for its order",
        plant: |found| stands(found, "nobody's", "orphan", None),
        shows: |findings| findings.payments.orphan == 1,
    },
    PlantedMoney {
        what: "an order is paid by nothing",
        plant: |found| found.orders[6].status = "paid".to_owned(),
        shows: |findings| findings.faults.len() == 1,
    },
    PlantedMoney {
        what: "an order is paid by two payments",
        plant: |found| stands(found, "second", "matched", None),
        shows: |findings| findings.payments.twice == 1,
    },
    PlantedMoney {
        what: "an order is paid with another amount",
        plant: |found| {
            stands(found, "wrong", "matched", None);
            found.orders[2].status = "paid".to_owned();
        },
        shows: |findings| findings.faults.len() == 1,
    },
    PlantedMoney {
        what: "an order that was paid in time has expired",
        plant: |found| {
            stands(found, "in time", "refund_due", Some("order_expired"));
            found.orders[0].status = "refund_due".to_owned();
        },
        shows: |findings| findings.faults.len() == 2,
    },
    PlantedMoney {
        what: "an order that is paid has expired too",
        plant: |found| found.orders[0].status = "expired".to_owned(),
        shows: |findings| !findings.faults.is_empty(),
    },
    PlantedMoney {
        what: "money went back that nobody sent",
        plant: |found| stands(found, "second", "refunded", Some("already_paid")),
        shows: |findings| findings.faults.len() == 1,
    },
    PlantedMoney {
        what: "a receipt is missing that was there",
        plant: |found| {
            stands(found, "in time", "refund_due", Some("receipt_missing"));
            found.orders.remove(0);
        },
        shows: |findings| !findings.faults.is_empty(),
    },
    PlantedMoney {
        what: "money goes back for a cancellation that nobody wanted",
        plant: |found| stands(found, "wrong", "refund_due", Some("order_cancelled")),
        shows: |findings| findings.faults.len() == 1,
    },
    PlantedMoney {
        what: "an order never expires",
        plant: |found| found.orders[6].status = "pending_payment".to_owned(),
        shows: |findings| findings.faults.len() == 1,
    },
];

/// Orders 1 to 7 that could be paid until second 10, and their payments.
fn truth_of_money() -> (Platform, StoredRows) {
    let platform = Platform::new(0);
    let mut records = platform.records();
    let mut found = StoredRows::default();
    for id in 1..=7 {
        let user = format!("u-{id}");
        records.is_told(&json!({
            "order_id": id.to_string(), "user_id": user, "amount": 100, "expires_at": "1970-01-01T00:00:10Z",
        }));
        found.orders.push(row(&user, 1, id, "expired"));
    }
    // The payment, its order, amount, moment, and the state of both in the end.
    let mut pays = |name: &str, order: i64, amount, at, state: &str, reason: Option<&str>| {
        let message = Paid {
            event: format!("evt-{name}"),
            payment: name.to_owned(),
            order: order.to_string(),
            amount,
            currency: "EUR".to_owned(),
            receipt: (order < 100).then(|| "a receipt".to_owned()),
        };
        let is_genuine = name != "forged";
        records.history.sent.push(SentPayment {
            sent: Some(at),
            acknowledged: is_genuine.then_some(at + 5),
            ..sent(&message, is_genuine)
        });
        if name != "forged" {
            found.payments.push(PaymentRow {
                id: found.payments.len() as i64,
                payment: name.to_owned(),
                order: order.to_string(),
                amount,
                currency: "EUR".to_owned(),
                state: state.to_owned(),
                refund_reason: reason.map(str::to_owned),
            });
        }
        if let Some(row) = found.orders.iter_mut().find(|row| row.order_id == order)
            && row.status == "expired"
        {
            row.status = state.replace("matched", "paid");
            row.refund_reason = reason.map(str::to_owned);
        }
    };
    pays("in time", 1, 100, 5_000, "matched", None);
    pays("late", 2, 100, 11_000, "refund_due", Some("order_expired"));
    pays("wrong", 3, 99, 5_000, "refund_due", Some("amount_mismatch"));
    pays("first", 4, 100, 5_000, "matched", None);
    pays("second", 4, 100, 6_000, "refund_due", Some("already_paid"));
    pays(
        "nobody's",
        999,
        100,
        5_000,
        "refund_due",
        Some("receipt_missing"),
    );
    pays("forged", 5, 100, 5_000, "expired", None);
    drop(records);
    (platform, found)
}

fn payment<'a>(found: &'a mut StoredRows, name: &str) -> &'a mut PaymentRow {
    let mut payments = found.payments.iter_mut();
    payments
        .find(|one| one.payment == name)
        .expect("the payment")
}

fn stands(found: &mut StoredRows, name: &str, state: &str, reason: Option<&str>) {
    let payment = payment(found, name);
    payment.state = state.to_owned();
    payment.refund_reason = reason.map(str::to_owned);
}

fn check_money(plant: fn(&mut StoredRows)) -> Findings {
    let ((platform, mut found), mut findings) = (truth_of_money(), Findings::default());
    plant(&mut found);
    platform.check(&found, |_| false, true, &mut findings);
    findings
}

/// Rounds of everything; nothing in it is random.
pub fn run(rounds: u64) -> Result<String, Why> {
    for _ in 0..rounds {
        let findings = check_money(|_| {});
        if !findings.holds() {
            return Err(format!("true money is no fault: {}", findings.into_words()).into());
        }
        for PlantedMoney { what, plant, shows } in PLANTED_MONEY {
            let findings = check_money(*plant);
            if findings.holds() || !shows(&findings) {
                return Err(format!("not found: {what}: {}", findings.into_words()).into());
            }
        }
        let (checker, found) = truth();
        let findings = checker.check(&found);
        if !findings.holds() {
            return Err(format!("the truth is no fault: {}", findings.into_words()).into());
        }
        for Planted { what, plant, shows } in PLANTED {
            let (checker, mut found) = truth();
            plant(&checker, &mut found);
            let findings = checker.check(&found);
            if findings.holds() || !shows(&findings) {
                return Err(format!("not found: {what}: {}", findings.into_words()).into());
            }
        }
    }
    let count = PLANTED.len() + PLANTED_MONEY.len();
    Ok(format!("planted={count} found={count}"))
}

/// A history, and a database that agrees with it.
fn truth() -> (Checker, StoredRows) {
    let checker = Checker::new();
    checker.offers("S", 100, 10);
    ask(&checker, &request("waited", 1), order("waited", 1, 1, 201));
    ask(&checker, &request("async", 2), order("async", 2, 2, 202));
    ask(
        &checker,
        &request("cancelled", 1),
        order("cancelled", 1, 3, 201),
    );
    checker.asks_to_cancel("cancelled");
    checker.cancel_confirmed("cancelled");
    ask(&checker, &request("refused", 1), refusal(409, "sold_out"));
    ask(&checker, &request("unanswered", 1), None);
    // Refused for a moment, and accepted later under the same key.
    ask(&checker, &request("later", 1), refusal(503, "overloaded"));
    ask(&checker, &request("later", 1), order("later", 1, 5, 201));
    ask(&checker, &request("dead", 1), refusal(500, "internal"));
    checker.server_is_gone();
    ask(&checker, &request("waited", 1), order("waited", 1, 1, 200));
    let rows = vec![
        row("waited", 1, 1, "pending_payment"),
        row("async", 2, 2, "pending_payment"),
        row("cancelled", 1, 3, "cancelled"),
        row("dead", 1, 4, "failed"),
        row("later", 1, 5, "pending_payment"),
    ];
    let counters = SkuRow {
        total: 10,
        held: 4,
        sold: 0,
    };
    let skus = [("S".to_owned(), counters)].into();
    let found = StoredRows {
        orders: rows,
        skus,
        payments: Vec::new(),
    };
    (checker, found)
}

fn counters(found: &mut StoredRows) -> &mut SkuRow {
    found.skus.get_mut("S").expect("the SKU")
}

fn ask(checker: &Checker, request: &OrderRequest, told: Option<OrderAnswer>) {
    let attempt = checker.asks(request);
    checker.answered(attempt, told);
}

fn request(user: &str, quantity: u32) -> OrderRequest {
    OrderRequest {
        user: user.to_owned(),
        key: Some("k".to_owned()),
        sku: "S".to_owned(),
        quantity,
        adjustment: 0,
        amount: 100 * i64::from(quantity),
        attributes: Some(json!({ "user": user })),
        waitlist: false,
    }
}

fn row(user: &str, quantity: u32, order_id: i64, status: &str) -> OrderRow {
    let request = request(user, quantity);
    OrderRow {
        order_id,
        user: request.user,
        sku: request.sku,
        quantity: quantity.into(),
        adjustment: request.adjustment,
        amount: request.amount,
        status: status.to_owned(),
        refund_reason: None,
        attributes: request.attributes,
    }
}

fn order(user: &str, quantity: u32, order_id: i64, status: u16) -> Option<OrderAnswer> {
    let request = request(user, quantity);
    let respond_async = status == 202;
    answer(
        status,
        respond_async,
        json!({
            "order_id": order_id.to_string(),
            "user_id": request.user,
            "sku_id": request.sku,
            "quantity": quantity,
            "adjustment": 0,
            "amount": request.amount,
            "status": if respond_async { "accepted" } else { "pending_payment" },
        }),
    )
}

fn refusal(status: u16, code: &str) -> Option<OrderAnswer> {
    answer(status, false, json!({ "status": status, "code": code }))
}

fn answer(status: u16, respond_async: bool, body: Value) -> Option<OrderAnswer> {
    Some(OrderAnswer {
        status,
        body,
        respond_async,
        in_batch: false,
    })
}

fn without_preference(told: Option<OrderAnswer>) -> Option<OrderAnswer> {
    let OrderAnswer { status, body, .. } = told?;
    answer(status, false, body)
}
