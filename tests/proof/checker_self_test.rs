//! The checker checked: a small history that is true, and then the same with one thing false in it
//! at a time. What it would not find here, no other proof could show.

use serde_json::{Value, json};

use super::checker::{Checker, Counters, Found, PaymentRow, Row, Told, Verdict, Wish};
use super::outcome::Why;
use super::platform::{Bill, Platform};
use crate::support::webhook::Paid;

/// Something false, and how it has to show.
struct Planted {
    what: &'static str,
    plant: fn(&Checker, &mut Found),
    shows: fn(&Verdict) -> bool,
}

const PLANTED: &[Planted] = &[
    Planted {
        what: "an order that was waited for is lost",
        plant: |_, found| {
            found.rows.retain(|row| row.user != "waited");
            counters(found).held -= 1;
        },
        shows: |verdict| verdict.present + 1 == verdict.acked,
    },
    Planted {
        what: "an order that was durable in the queue is lost",
        plant: |_, found| {
            found.rows.retain(|row| row.user != "async");
            counters(found).held -= 2;
        },
        shows: |verdict| verdict.present + 1 == verdict.acked,
    },
    Planted {
        what: "a quantity changed on the way",
        plant: |_, found| {
            found.rows[0].quantity += 1;
            counters(found).held += 1;
        },
        shows: |verdict| verdict.present + 1 == verdict.acked,
    },
    Planted {
        what: "attributes went on the way",
        plant: |_, found| found.rows[0].attributes = None,
        shows: |verdict| verdict.present + 1 == verdict.acked,
    },
    Planted {
        what: "an order was written twice",
        plant: |_, found| {
            let again = Row {
                order_id: 99,
                ..found.rows[0].clone()
            };
            found.rows.push(again);
            counters(found).held += 1;
        },
        shows: |verdict| verdict.duplicated == 1,
    },
    Planted {
        what: "a retry was told of another order",
        plant: |checker, _| ask(checker, &wish("waited", 1), order("waited", 1, 99, 200)),
        shows: |verdict| verdict.duplicated == 1,
    },
    Planted {
        what: "an order that was refused is there",
        plant: |_, found| {
            found.rows.push(row("refused", 1, 7, "pending_payment"));
            counters(found).held += 1;
        },
        shows: |verdict| verdict.refused_but_present == 1,
    },
    Planted {
        what: "an order is there though its retry after a crash was refused",
        plant: |checker, found| {
            ask(checker, &wish("unanswered", 1), refusal(409, "sold_out"));
            found.rows.push(row("unanswered", 1, 7, "pending_payment"));
            counters(found).held += 1;
        },
        shows: |verdict| verdict.refused_but_present == 1,
    },
    Planted {
        what: "an order was accepted and its retry refused",
        plant: |checker, _| ask(checker, &wish("async", 2), refusal(409, "sold_out")),
        shows: |verdict| verdict.faults.len() == 1,
    },
    Planted {
        what: "more units are sold than there are",
        plant: |checker, found| {
            checker.offers("S", 100, 3);
            counters(found).total = 3;
        },
        shows: |verdict| verdict.oversold == 1,
    },
    Planted {
        what: "units are held that no row explains",
        plant: |_, found| counters(found).held += 2,
        shows: |verdict| verdict.leaked == 2,
    },
    Planted {
        what: "units are free that a row holds",
        plant: |_, found| counters(found).held -= 1,
        shows: |verdict| verdict.leaked == 1,
    },
    Planted {
        what: "a cancellation is lost",
        plant: |_, found| {
            for row in found.rows.iter_mut().filter(|row| row.user == "cancelled") {
                row.status = "pending_payment".to_owned();
            }
            counters(found).held += 1;
        },
        shows: |verdict| verdict.faults.len() == 1,
    },
    Planted {
        what: "an order is cancelled that nobody cancelled",
        plant: |_, found| {
            found.rows[0].status = "cancelled".to_owned();
            counters(found).held -= 1;
        },
        shows: |verdict| verdict.faults.len() == 1,
    },
    Planted {
        what: "there is a row that nobody asked for",
        plant: |_, found| found.rows.push(row("nobody", 1, 7, "expired")),
        shows: |verdict| verdict.faults.len() == 1,
    },
    Planted {
        what: "an answer tells of an order that was not asked for",
        plant: |checker, _| ask(checker, &wish("waited", 1), order("async", 1, 1, 200)),
        shows: |verdict| verdict.faults.len() == 1,
    },
    Planted {
        what: "an answer says accepted without Preference-Applied",
        plant: |checker, _| {
            let told = order("another", 1, 8, 202);
            ask(checker, &wish("another", 1), without_preference(told));
        },
        shows: |verdict| verdict.faults.len() == 1,
    },
];

/// The same for what is made of payments.
struct PlantedMoney {
    what: &'static str,
    plant: fn(&mut Found),
    shows: fn(&Verdict) -> bool,
}

const PLANTED_MONEY: &[PlantedMoney] = &[
    PlantedMoney {
        what: "a payment is lost",
        plant: |found| found.payments.retain(|one| one.payment != "nobody's"),
        shows: |verdict| verdict.money.lost == 1,
    },
    PlantedMoney {
        what: "a payment is there twice",
        plant: |found| {
            let again = payment(found, "nobody's").clone();
            found.payments.push(again);
        },
        shows: |verdict| verdict.money.twice == 1,
    },
    PlantedMoney {
        what: "a payment with a false signature was taken",
        plant: |found| payment(found, "second").payment = "forged".to_owned(),
        shows: |verdict| {
            verdict
                .faults
                .iter()
                .any(|why| why.contains("nobody has paid"))
        },
    },
    PlantedMoney {
        what: "a payment that nobody has made",
        plant: |found| payment(found, "nobody's").payment = "unheard of".to_owned(),
        shows: |verdict| {
            verdict
                .faults
                .iter()
                .any(|why| why.contains("nobody has paid"))
        },
    },
    PlantedMoney {
        what: "an amount changed on the way",
        plant: |found| payment(found, "nobody's").amount += 1,
        shows: |verdict| verdict.faults.len() == 1,
    },
    PlantedMoney {
        what: "a payment still looks for its order",
        plant: |found| stands(found, "nobody's", "orphan", None),
        shows: |verdict| verdict.money.orphan == 1,
    },
    PlantedMoney {
        what: "an order is paid by nothing",
        plant: |found| found.rows[6].status = "paid".to_owned(),
        shows: |verdict| verdict.faults.len() == 1,
    },
    PlantedMoney {
        what: "an order is paid by two payments",
        plant: |found| stands(found, "second", "matched", None),
        shows: |verdict| verdict.money.twice == 1,
    },
    PlantedMoney {
        what: "an order is paid with another amount",
        plant: |found| {
            stands(found, "wrong", "matched", None);
            found.rows[2].status = "paid".to_owned();
        },
        shows: |verdict| verdict.faults.len() == 1,
    },
    PlantedMoney {
        what: "an order that was paid in time has expired",
        plant: |found| {
            stands(found, "in time", "refund_due", Some("order_expired"));
            found.rows[0].status = "refund_due".to_owned();
        },
        shows: |verdict| verdict.faults.len() == 2,
    },
    PlantedMoney {
        what: "an order that is paid has expired too",
        plant: |found| found.rows[0].status = "expired".to_owned(),
        shows: |verdict| !verdict.faults.is_empty(),
    },
    PlantedMoney {
        what: "money went back that nobody sent",
        plant: |found| stands(found, "second", "refunded", Some("already_paid")),
        shows: |verdict| verdict.faults.len() == 1,
    },
    PlantedMoney {
        what: "a receipt is missing that was there",
        plant: |found| {
            stands(found, "in time", "refund_due", Some("receipt_missing"));
            found.rows.remove(0);
        },
        shows: |verdict| !verdict.faults.is_empty(),
    },
    PlantedMoney {
        what: "money goes back for a cancellation that nobody wanted",
        plant: |found| stands(found, "wrong", "refund_due", Some("order_cancelled")),
        shows: |verdict| verdict.faults.len() == 1,
    },
    PlantedMoney {
        what: "an order never expires",
        plant: |found| found.rows[6].status = "pending_payment".to_owned(),
        shows: |verdict| verdict.faults.len() == 1,
    },
];

/// Orders 1 to 7 that could be paid until second 10, and what was paid.
fn truth_of_money() -> (Platform, Found) {
    let platform = Platform::new(0);
    let mut book = platform.book();
    let mut found = Found::default();
    for id in 1..=7 {
        let user = format!("u-{id}");
        book.is_told(&json!({
            "order_id": id.to_string(), "user_id": user, "amount": 100, "expires_at": "1970-01-01T00:00:10Z",
        }));
        found.rows.push(row(&user, 1, id, "expired"));
    }
    // The payment, its order, amount, moment, and what comes of it and of its order.
    let mut pays = |name: &str, order: i64, amount, at, state: &str, reason: Option<&str>| {
        book.bills.push(Bill {
            paid: Paid {
                event: format!("evt-{name}"),
                payment: name.to_owned(),
                order: order.to_string(),
                amount,
                currency: "EUR".to_owned(),
                receipt: (order < 100).then(|| "a receipt".to_owned()),
            },
            is_genuine: name != "forged",
            sent: Some(at),
            acknowledged: (name != "forged").then_some(at + 5),
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
        if let Some(row) = found.rows.iter_mut().find(|row| row.order_id == order)
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
    drop(book);
    (platform, found)
}

fn payment<'a>(found: &'a mut Found, name: &str) -> &'a mut PaymentRow {
    let mut payments = found.payments.iter_mut();
    payments
        .find(|one| one.payment == name)
        .expect("the payment")
}

fn stands(found: &mut Found, name: &str, state: &str, reason: Option<&str>) {
    let payment = payment(found, name);
    payment.state = state.to_owned();
    payment.refund_reason = reason.map(str::to_owned);
}

fn judge_money(plant: fn(&mut Found)) -> Verdict {
    let ((platform, mut found), mut verdict) = (truth_of_money(), Verdict::default());
    plant(&mut found);
    platform.judge(&found, |_| false, true, &mut verdict);
    verdict
}

/// Rounds of everything; there is nothing left to chance in it.
pub fn run(rounds: u64) -> Result<String, Why> {
    for _ in 0..rounds {
        let verdict = judge_money(|_| {});
        if !verdict.holds() {
            return Err(format!("true money is no fault: {}", verdict.into_words()).into());
        }
        for PlantedMoney { what, plant, shows } in PLANTED_MONEY {
            let verdict = judge_money(*plant);
            if verdict.holds() || !shows(&verdict) {
                return Err(format!("not found: {what}: {}", verdict.into_words()).into());
            }
        }
        let (checker, found) = truth();
        let verdict = checker.judge(&found);
        if !verdict.holds() {
            return Err(format!("the truth is no fault: {}", verdict.into_words()).into());
        }
        for Planted { what, plant, shows } in PLANTED {
            let (checker, mut found) = truth();
            plant(&checker, &mut found);
            let verdict = checker.judge(&found);
            if verdict.holds() || !shows(&verdict) {
                return Err(format!("not found: {what}: {}", verdict.into_words()).into());
            }
        }
    }
    let count = PLANTED.len() + PLANTED_MONEY.len();
    Ok(format!("planted={count} found={count}"))
}

/// A history, and a database that agrees with it.
fn truth() -> (Checker, Found) {
    let checker = Checker::new();
    checker.offers("S", 100, 10);
    ask(&checker, &wish("waited", 1), order("waited", 1, 1, 201));
    ask(&checker, &wish("async", 2), order("async", 2, 2, 202));
    ask(
        &checker,
        &wish("cancelled", 1),
        order("cancelled", 1, 3, 201),
    );
    checker.asks_to_cancel("cancelled");
    checker.told_cancelled("cancelled");
    ask(&checker, &wish("refused", 1), refusal(409, "sold_out"));
    ask(&checker, &wish("unanswered", 1), Told::Nothing);
    // Refused for a moment, and accepted later under the same key.
    ask(&checker, &wish("later", 1), refusal(503, "overloaded"));
    ask(&checker, &wish("later", 1), order("later", 1, 5, 201));
    ask(&checker, &wish("dead", 1), refusal(500, "internal"));
    checker.server_is_gone();
    ask(&checker, &wish("waited", 1), order("waited", 1, 1, 200));
    let rows = vec![
        row("waited", 1, 1, "pending_payment"),
        row("async", 2, 2, "pending_payment"),
        row("cancelled", 1, 3, "cancelled"),
        row("dead", 1, 4, "failed"),
        row("later", 1, 5, "pending_payment"),
    ];
    let counters = Counters {
        total: 10,
        held: 4,
        sold: 0,
    };
    let skus = [("S".to_owned(), counters)].into();
    let found = Found {
        rows,
        skus,
        payments: Vec::new(),
    };
    (checker, found)
}

fn counters(found: &mut Found) -> &mut Counters {
    found.skus.get_mut("S").expect("the SKU")
}

fn ask(checker: &Checker, wish: &Wish, told: Told) {
    let attempt = checker.asks(wish);
    checker.told(attempt, told);
}

fn wish(user: &str, quantity: u32) -> Wish {
    Wish {
        user: user.to_owned(),
        key: Some("k".to_owned()),
        sku: "S".to_owned(),
        quantity,
        adjustment: 0,
        amount: 100 * i64::from(quantity),
        attributes: Some(json!({ "user": user })),
    }
}

fn row(user: &str, quantity: u32, order_id: i64, status: &str) -> Row {
    let wish = wish(user, quantity);
    Row {
        order_id,
        user: wish.user,
        sku: wish.sku,
        quantity: quantity.into(),
        adjustment: wish.adjustment,
        amount: wish.amount,
        status: status.to_owned(),
        refund_reason: None,
        attributes: wish.attributes,
    }
}

fn order(user: &str, quantity: u32, order_id: i64, status: u16) -> Told {
    let wish = wish(user, quantity);
    let respond_async = status == 202;
    answer(
        status,
        respond_async,
        json!({
            "order_id": order_id.to_string(),
            "user_id": wish.user,
            "sku_id": wish.sku,
            "quantity": quantity,
            "adjustment": 0,
            "amount": wish.amount,
            "status": if respond_async { "accepted" } else { "pending_payment" },
        }),
    )
}

fn refusal(status: u16, code: &str) -> Told {
    answer(status, false, json!({ "status": status, "code": code }))
}

fn answer(status: u16, respond_async: bool, body: Value) -> Told {
    Told::Answer {
        status,
        body,
        respond_async,
        in_batch: false,
    }
}

fn without_preference(told: Told) -> Told {
    match told {
        Told::Answer { status, body, .. } => answer(status, false, body),
        Told::Nothing => Told::Nothing,
    }
}
