//! The payment platform against a server that answers by rule.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::loadgen::test_server::{AMOUNT, Callback, Rules, TestServer};
use crate::loadgen::*;

fn secret() -> WebhookSecret {
    WebhookSecret::of_key(&[42; 32])
}

fn rules() -> Rules {
    Rules {
        stock: vec![("HOT", 1_000_000)],
        payment_secret: Some(secret()),
        ..Rules::default()
    }
}

/// Everybody buys, everybody pays.
fn plan(server: &TestServer, orders: u64) -> LoadPlan {
    LoadPlan {
        rate: "2000".parse().unwrap(),
        duration_ms: None,
        requests_max: Some(orders),
        one_order_per_buyer: true,
        connections: 16,
        keep_outcomes: true,
        pay_share: 1.0,
        payment_secret: Some(secret()),
        watch_stock: false,
        ..LoadPlan::new(server.url.clone())
    }
    .with_sku("HOT", 1.0)
}

async fn load(plan: LoadPlan) -> (LoadReport, PaymentReport) {
    let report = run(plan, &mut Silent).await.unwrap();
    let payments = report.payments.clone().unwrap();
    (report, payments)
}

fn text<'a>(callback: &'a Callback, member: &str) -> &'a str {
    callback.body["data"][member].as_str().unwrap_or("")
}

fn kind(payments: &PaymentReport, kind: PaymentKind) -> u64 {
    let mut kinds = payments.kinds.iter();
    kinds.find(|k| k.kind == kind).map_or(0, |k| k.sent)
}

#[tokio::test]
async fn without_a_share_of_payers_nothing_is_sent_and_nothing_reported() {
    let server = TestServer::start(rules()).await;
    let plan = LoadPlan {
        pay_share: 0.0,
        ..plan(&server, 50)
    };
    let report = run(plan, &mut Silent).await.unwrap();
    assert_eq!((report.placed, report.payments.is_none()), (50, true));
    assert!(server.callbacks().is_empty());
    let json = serde_json::to_value(&report).unwrap();
    assert!(json.get("payments").is_none());
}

#[tokio::test]
async fn the_platform_reports_what_the_server_received() {
    let server = TestServer::start(rules()).await;
    let (report, payments) = load(plan(&server, 2000)).await;
    assert_eq!(report.placed, 2000);
    let mut money: HashMap<String, i64> = HashMap::new();
    let (mut deliveries, mut refused) = (0, 0);
    for callback in server.callbacks() {
        if callback.signed {
            deliveries += 1;
            let amount = callback.body["data"]["amount"].as_i64().unwrap();
            money.insert(text(&callback, "payment_id").to_owned(), amount);
        } else {
            refused += 1;
        }
    }
    assert_eq!(payments.sent, money.len() as u64);
    assert_eq!(payments.acknowledged, payments.sent);
    assert_eq!(payments.unacknowledged, 0);
    assert_eq!(payments.deliveries, deliveries);
    assert_eq!(payments.answered_2xx, deliveries);
    assert_eq!((payments.retried, payments.unanswered), (0, 0));
    assert_eq!(payments.latency.count, deliveries);
    assert_eq!(payments.answers["200"], deliveries);
    let sum = money.values().sum();
    let both = Money {
        sent: sum,
        acknowledged: sum,
    };
    assert_eq!(payments.money["EUR"], both);
    let forged = payments.false_signatures;
    assert!(forged.sent > 0);
    assert_eq!(
        (forged.sent, forged.refused, forged.taken),
        (refused, refused, 0)
    );
    assert!(payments.is_clean());

    // All orders are paid, at most one of their payments being regular, and some twice.
    let regular = kind(&payments, PaymentKind::Regular);
    let wrong = kind(&payments, PaymentKind::WrongAmount);
    assert_eq!(regular + wrong, 2000);
    assert!(wrong > 0 && kind(&payments, PaymentKind::Second) > 0);
    assert!(kind(&payments, PaymentKind::Lost) > 0);
    let told = payments.outcomes.unwrap();
    assert_eq!(told.len() as u64, payments.sent);
    for payment in told {
        assert!(payment.acknowledged_at_ms.is_some());
        assert_eq!(
            payment.amount == AMOUNT,
            payment.kind != PaymentKind::WrongAmount
        );
        assert_eq!(
            payment.order_id <= 2000,
            payment.kind != PaymentKind::Lost,
            "{payment:?}"
        );
        assert_eq!(money[payment.payment_id.as_str()], payment.amount);
    }
}

#[tokio::test]
async fn deliveries_of_one_event_are_alike_and_lie_among_those_of_others() {
    let server = TestServer::start(rules()).await;
    load(plan(&server, 500)).await;
    let callbacks = server.callbacks();
    let mut bodies = HashMap::new();
    let mut places: HashMap<&str, Vec<usize>> = HashMap::new();
    for (place, callback) in callbacks.iter().enumerate() {
        let body = bodies.entry(&callback.webhook_id).or_insert(&callback.body);
        assert_eq!(*body, &callback.body);
        assert!(
            text(callback, "receipt").starts_with("r-")
                || text(callback, "receipt").is_empty()
                || text(callback, "receipt").starts_with("made-up-")
        );
        places.entry(&callback.webhook_id).or_default().push(place);
    }
    assert!(places.values().all(|places| places.len() <= 8));
    let apart = places.values().filter(|places| {
        let others = places.windows(2).filter(|pair| pair[1] > pair[0] + 1);
        others.count() > 0
    });
    assert!(apart.count() > 20);
}

#[tokio::test]
async fn what_was_refused_is_delivered_again_until_it_is_taken() {
    let server = TestServer::start(Rules {
        callbacks_refused: 2,
        ..rules()
    })
    .await;
    let (_, payments) = load(plan(&server, 300)).await;
    assert_eq!(payments.acknowledged, payments.sent);
    assert!(payments.retried > 0);
    let refused = payments.answers["503"];
    assert!(
        refused >= 2 * payments.sent - 20,
        "{refused} of {}",
        payments.sent
    );
    assert_eq!(payments.answered_2xx + refused, payments.deliveries);
    let taken: HashSet<_> = server
        .callbacks()
        .into_iter()
        .filter(|callback| callback.status == 200)
        .map(|callback| callback.webhook_id)
        .collect();
    assert_eq!(taken.len() as u64, payments.sent);
}

#[tokio::test]
async fn what_is_never_taken_is_given_up_after_the_grace_and_counted() {
    let server = TestServer::start(Rules {
        callbacks_refused: usize::MAX,
        ..rules()
    })
    .await;
    let (_, payments) = load(LoadPlan {
        pay_grace_ms: 1500,
        ..plan(&server, 100)
    })
    .await;
    assert!(payments.sent > 0);
    assert_eq!(payments.acknowledged, 0);
    assert_eq!(payments.unacknowledged, payments.sent);
    assert_eq!(payments.money["EUR"].acknowledged, 0);
    assert!(!payments.is_clean());
}

#[tokio::test]
async fn a_false_signature_that_is_believed_is_reported() {
    let server = TestServer::start(Rules {
        credulous: true,
        ..rules()
    })
    .await;
    let (_, payments) = load(plan(&server, 1000)).await;
    let forged = payments.false_signatures;
    assert!(forged.taken > 0);
    assert_eq!(forged.taken, forged.sent);
    assert!(!payments.is_clean());
    // They claim payments of their own, so that the books of the server could not agree.
    let believed: HashSet<_> = server
        .callbacks()
        .into_iter()
        .filter(|callback| !callback.signed)
        .map(|callback| text(&callback, "payment_id").to_owned())
        .collect();
    let told = payments.outcomes.unwrap();
    assert!(
        told.iter()
            .all(|p| !believed.contains(p.payment_id.as_str()))
    );
}

#[tokio::test]
async fn some_pay_after_their_order_has_expired() {
    let server = TestServer::start(Rules {
        expires_in: Some(Duration::from_millis(300)),
        ..rules()
    })
    .await;
    let (_, payments) = load(plan(&server, 1000)).await;
    assert!(kind(&payments, PaymentKind::Late) > 0);
    let callbacks = server.callbacks();
    for payment in payments.outcomes.unwrap() {
        let mut deliveries = callbacks.iter();
        let first = deliveries
            .find(|c| text(c, "payment_id") == payment.payment_id)
            .unwrap();
        if payment.kind == PaymentKind::Late {
            assert!(first.at.as_millisecond() >= payment.expires_at_ms.unwrap());
        }
    }
}

#[tokio::test]
async fn a_stop_ends_the_platform_too() {
    let server = TestServer::start(Rules {
        callbacks_refused: usize::MAX,
        ..rules()
    })
    .await;
    let plan = LoadPlan {
        requests_max: None,
        duration_ms: Some(3_600_000),
        pay_grace_ms: 3_600_000,
        watch_after_ms: 3_600_000,
        ..plan(&server, 0)
    };
    let stop = async {
        while server.callbacks().len() < 50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let report = run_until(plan, &mut Silent, stop).await.unwrap();
    assert!(report.interrupted);
    assert!(report.payments.unwrap().deliveries >= 40);
}

#[tokio::test]
async fn a_callback_without_an_answer_is_given_up_and_counted() {
    let server = TestServer::start(Rules {
        callbacks_ignored: true,
        ..rules()
    })
    .await;
    let (_, payments) = load(LoadPlan {
        pay_grace_ms: 500,
        request_timeout_ms: 700,
        ..plan(&server, 5)
    })
    .await;
    assert!(payments.unanswered > 0);
    assert_eq!(payments.answers["timeout"], payments.unanswered);
    assert!(payments.latency.max_ms.unwrap() >= 700.0);
}
