//! The checker checked: a small history that is true, and then the same with one thing false in it
//! at a time. What it would not find here, no other proof could show.

use serde_json::{Value, json};

use super::checker::{Checker, Counters, Found, Row, Told, Verdict, Wish};
use super::outcome::Why;

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

/// Rounds of everything; there is nothing left to chance in it.
pub fn run(rounds: u64) -> Result<String, Why> {
    for _ in 0..rounds {
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
    Ok(format!("planted={0} found={0}", PLANTED.len()))
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
