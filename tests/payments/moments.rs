//! Whether a payment came in time is judged by when it came in, or by its platform's signed time
//! where that is earlier; never by when the database took it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::{LOOK, PATIENCE, Shop};
use crate::orphans::lose;
use crate::support::block_on;
use crate::support::webhook::{Paid, SECRET, deliver};

/// Waits until an order is past its time.
async fn until_past(order: &Value, by: Duration) {
    let expires_at = order["expires_at"].as_str().expect("a time");
    let expires_at: jiff::Timestamp = expires_at.parse().expect("RFC 3339");
    let past = expires_at + by;
    while jiff::Timestamp::now() < past {
        tokio::time::sleep(LOOK).await;
    }
}

/// A payment's message that says when it was made.
fn dated(paid: &Paid, made_at: &Value) -> String {
    let mut body: Value = serde_json::from_str(&paid.body()).expect("JSON");
    body["timestamp"] = made_at.clone();
    body.to_string()
}

#[test]
fn an_order_that_was_paid_while_the_database_took_no_payment_is_paid_once_it_does() {
    block_on(async {
        let shop = Shop::open(5, |config| config.orders.payment_ttl_ms = 2_000).await;
        let (paid_for, unpaid) = (shop.order("u").await, shop.order("v").await);
        let mut client = shop.database.connect().await;
        let transaction = client.transaction().await.unwrap();
        let hold = "LOCK TABLE millrace.payment_events IN EXCLUSIVE MODE";
        transaction.batch_execute(hold).await.unwrap();
        let paid = Paid::of(&paid_for);
        // It comes in time, and the platform is told to come again.
        let answer = paid.deliver(shop.server.data).await;
        assert_eq!(answer.status, 503, "{answer:?}");
        // Meanwhile what nobody has paid expires.
        shop.until(&unpaid, "expired").await;
        until_past(&paid_for, Duration::from_secs(1)).await;
        assert_eq!(shop.look(&paid_for).await["status"], "pending_payment");
        transaction.rollback().await.unwrap();
        shop.pay(&paid).await;
        shop.until(&paid_for, "paid").await;
        shop.until_stock((4, 0, 1)).await;
        assert_eq!(shop.money().await, [1, 0, 0, 0]);
        shop.close().await;
    });
}

#[test]
fn an_order_that_is_still_to_be_paid_is_paid_however_late() {
    block_on(async {
        let shop = Shop::open(5, |config| config.orders.payment_ttl_ms = 1_000).await;
        let order = shop.order("u").await;
        let mut client = shop.database.connect().await;
        let transaction = client.transaction().await.unwrap();
        // Expiry cannot move it. The row of callbacks is the last but one, before the assigner's.
        let hold = "SELECT FROM millrace.writer WHERE shard <> (SELECT max(shard) - 1 FROM millrace.writer) FOR UPDATE";
        transaction.query(hold, &[]).await.unwrap();
        until_past(&order, Duration::from_millis(100)).await;
        shop.pay(&Paid::of(&order)).await;
        assert_eq!(shop.look(&order).await["status"], "paid");
        transaction.rollback().await.unwrap();
        assert_eq!(shop.money().await, [1, 0, 0, 0]);
        shop.close().await;
    });
}

#[test]
fn the_platform_s_own_signed_time_counts_where_it_is_earlier() {
    block_on(async {
        let shop = Shop::open(5, |config| config.orders.payment_ttl_ms = 1_000).await;
        let (in_time, late) = (shop.order("u").await, shop.order("v").await);
        let future = shop.order("w").await;
        // Their rows are lost, so whether they can be recovered is a question of time.
        let shop = lose(shop).await;
        for order in [&in_time, &late, &future] {
            until_past(order, Duration::from_millis(1_500)).await;
        }
        for (order, made_at) in [
            (&in_time, &in_time["created_at"]),
            (&late, &late["expires_at"]),
            (&future, &json!("2999-01-01T00:00:00Z")),
        ] {
            let paid = Paid::of(order);
            let body = dated(&paid, made_at);
            let answer = deliver(shop.server.data, &paid.event, body, SECRET).await;
            assert_eq!(answer.status, 200, "{answer:?}");
        }
        shop.until(&in_time, "paid").await;
        for order in [&late, &future] {
            let found = shop.until(order, "refund_due").await;
            assert_eq!(found["refund_reason"], "order_expired");
        }
        let client = shop.database.connect().await;
        let earlier = "SELECT count(*) FROM millrace.payments WHERE paid_at < received_at";
        let earlier: i64 = client.query_one(earlier, &[]).await.unwrap().get(0);
        // The header dates each attempt, by the second.
        assert!((2..=3).contains(&earlier), "{earlier}");
        shop.close().await;
    });
}

#[test]
fn two_payments_under_one_event_id_are_both_booked_and_both_bodies_are_kept() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let (first, second) = (shop.order("u").await, shop.order("v").await);
        let paid = [&first, &second].map(|order| Paid {
            event: "evt-one".into(),
            ..Paid::of(order)
        });
        for _ in 0..2 {
            for paid in &paid {
                shop.pay(paid).await;
            }
        }
        assert_eq!(shop.money().await, [2, 0, 0, 0]);
        let client = shop.database.connect().await;
        let bodies = client
            .query("SELECT body FROM millrace.payment_events ORDER BY id", &[])
            .await
            .unwrap();
        let bodies: Vec<Vec<u8>> = bodies.iter().map(|row| row.get(0)).collect();
        let sent = paid.map(|paid| paid.body().into_bytes());
        assert_eq!(bodies, sent);
        // Messages about something else are known by their id alone.
        let body = json!({ "type": "payment.failed", "data": {} }).to_string();
        for _ in 0..2 {
            let answer = deliver(shop.server.data, "evt-one", body.clone(), SECRET).await;
            assert_eq!(answer.status, 200, "{answer:?}");
        }
        assert_eq!(shop.events().await, 3);
        shop.close().await;
    });
}

#[test]
fn callbacks_are_booked_while_operators_expiry_and_look_ups_stand_still() {
    block_on(async {
        let shop = Shop::open(50, |_| {}).await;
        let (refunded, mut orders) = (shop.order("refunded").await, Vec::new());
        shop.pay(&Paid::of(&refunded)).await;
        for n in 0..10 {
            orders.push(shop.order(&format!("u-{n}")).await);
        }
        let mut client = shop.database.connect().await;
        let transaction = client.transaction().await.unwrap();
        // The writers of expiry and of the payment processor.
        let hold =
            "SELECT FROM millrace.writer w, (SELECT max(shard) - 1 AS callbacks FROM millrace.writer) m
                     WHERE w.shard IN (m.callbacks - 1, m.callbacks - 2) FOR UPDATE OF w";
        let held = transaction.query(hold, &[]).await.unwrap();
        assert_eq!(held.len(), 2);
        let refund = shop.refunded(&refunded, "re-1", true);
        let pay = async {
            let started = Instant::now();
            for order in &orders {
                shop.pay(&Paid::of(order)).await;
                assert_eq!(shop.look(order).await["status"], "paid");
            }
            started.elapsed()
        };
        let (refund, took) = tokio::join!(refund, pay);
        assert!(took < PATIENCE, "{took:?}");
        assert_ne!(refund.status, 200, "the payment processor's row is held");
        transaction.rollback().await.unwrap();
        let deadline = Instant::now() + PATIENCE;
        while shop.refunded(&refunded, "re-1", true).await.status != 200 {
            assert!(Instant::now() < deadline, "the refund is not recorded");
            tokio::time::sleep(LOOK).await;
        }
        shop.until_stock((40, 0, 10)).await;
        shop.close().await;
    });
}
