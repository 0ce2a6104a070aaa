//! The life of an order, as a shop, its buyers, a payment platform and an operator see it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::fixture::Shop;
use crate::support::block_on;
use crate::support::webhook::{Paid, SECRET, deliver};

#[test]
fn a_payment_in_time_and_in_full_pays_its_order_however_often_it_is_delivered() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let order = shop.order("u").await;
        let receipt = order["receipt"].as_str().expect("a receipt");
        assert!(receipt.len() <= 127, "{receipt}");
        assert_eq!(shop.look(&order).await["receipt"], order["receipt"]);
        assert_eq!(shop.server.stock("A").await, (4, 1, 0));
        let paid = Paid::of(&order);
        for _ in 0..3 {
            shop.pay(&paid).await;
        }
        // Another message about the same payment, as Alipay sends one when a trade is finished.
        let finished = Paid {
            event: "evt-finished".into(),
            ..paid.clone()
        };
        shop.pay(&finished).await;
        assert_eq!(shop.look(&order).await["status"], "paid");
        assert_eq!(shop.server.stock("A").await, (4, 0, 1));
        assert_eq!(shop.money().await, [1, 0, 0, 0]);
        // A retry of the order is told that it is paid.
        let again = shop.server.order("u", "A", Some("k")).await;
        assert_eq!(
            (again.status, &again.json()["status"]),
            (200, &json!("paid"))
        );
        shop.close().await;
    });
}

#[test]
fn a_false_signature_is_refused_and_leaves_nothing() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let order = shop.order("u").await;
        let paid = Paid::of(&order);
        let other = "whsec_b3RoZXItc2VjcmV0LW9mLTI0LWJ5dGVzIQ==";
        let answer = deliver(shop.server.data, "evt", paid.body(), other).await;
        assert_eq!(answer.status, 401, "{answer:?}");
        assert_eq!(shop.money().await, [0; 4]);
        assert_eq!(shop.events().await, 0);
        assert_eq!(shop.look(&order).await["status"], "pending_payment");
        // A provider without its secrets is not there, and neither is one that nobody knows.
        for provider in ["stripe", "alipay", "wechatpay", "nobody"] {
            let target = format!("/v1/payments/{provider}/notify");
            let answer = shop.server.get(&target).await;
            assert_eq!(answer.status, 404, "{provider}: {answer:?}");
        }
        let answer = shop.server.get("/v1/payments/standard/notify").await;
        assert_eq!((answer.status, answer.field("allow")), (405, Some("POST")));
        shop.close().await;
    });
}

#[test]
fn a_callback_needs_no_token_and_a_message_about_something_else_is_stored() {
    block_on(async {
        let shop = Shop::open(5, |config| {
            config.data_plane.token.0 = vec!["a-token".into()];
        })
        .await;
        let body = json!({ "type": "payment.failed", "data": { "anything": 1 } }).to_string();
        let answer = deliver(shop.server.data, "evt-failed", body, SECRET).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let kind: String = shop
            .database
            .connect()
            .await
            .query_one("SELECT kind FROM millrace.payment_events", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(kind, "payment.failed");
        assert_eq!(shop.money().await, [0; 4]);
        shop.close().await;
    });
}

#[test]
fn an_order_that_is_not_paid_expires_and_a_payment_after_that_has_to_go_back() {
    block_on(async {
        let shop = Shop::open(2, |config| config.orders.payment_ttl_ms = 1_000).await;
        let order = shop.order("u").await;
        assert_eq!(shop.server.stock("A").await, (1, 1, 0));
        let expired = shop.until(&order, "expired").await;
        assert_eq!(expired["expires_at"], order["expires_at"]);
        shop.until_stock((2, 0, 0)).await;
        // Readers of the database see it too.
        let status: String = shop
            .database
            .connect()
            .await
            .query_one("SELECT status FROM millrace.order_list", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(status, "expired");
        let id = order["order_id"].as_str().unwrap();
        let cancel = format!("/v1/orders/{id}/cancel");
        let answer =
            crate::support::server::request(shop.server.data, "POST", &cancel, &[], String::new())
                .await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (409, "not_cancellable")
        );
        shop.pay(&Paid::of(&order)).await;
        let found = shop.look(&order).await;
        assert_eq!(found["status"], "refund_due");
        assert_eq!(found["refund_reason"], "order_expired");
        assert_eq!(shop.money().await, [0, 0, 1, 0]);
        assert_eq!(shop.server.stock("A").await, (2, 0, 0));
        let answer = shop.refunded(&order, "re-1", true).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json()["status"], "refunded");
        assert_eq!(answer.json()["restocked"], 0, "its units were back");
        assert_eq!(shop.look(&order).await["status"], "refunded");
        assert_eq!(shop.money().await, [0, 0, 0, 1]);
        // The purchase limit and the key: the order is there, and its key still names it.
        assert_eq!(
            shop.server.order("u", "A", Some("k")).await.json()["status"],
            "refunded"
        );
        shop.close().await;
    });
}

#[test]
fn a_cancelled_order_that_is_paid_all_the_same_has_to_be_refunded() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let order = shop.order("u").await;
        let id = order["order_id"].as_str().unwrap();
        let cancel = format!("/v1/orders/{id}/cancel");
        let answer =
            crate::support::server::request(shop.server.data, "POST", &cancel, &[], String::new())
                .await;
        assert_eq!(answer.status, 200, "{answer:?}");
        shop.pay(&Paid::of(&order)).await;
        let found = shop.look(&order).await;
        assert_eq!(
            (&found["status"], &found["refund_reason"]),
            (&json!("refund_due"), &json!("order_cancelled"))
        );
        shop.close().await;
    });
}

#[test]
fn a_payment_of_another_amount_or_currency_leaves_its_order_to_be_refunded() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let (first, second) = (shop.order("u").await, shop.order("v").await);
        let less = Paid {
            amount: 99,
            ..Paid::of(&first)
        };
        shop.pay(&less).await;
        let found = shop.look(&first).await;
        assert_eq!(
            (&found["status"], &found["refund_reason"]),
            (&json!("refund_due"), &json!("amount_mismatch"))
        );
        let foreign = Paid {
            currency: "USD".into(),
            ..Paid::of(&second)
        };
        shop.pay(&foreign).await;
        let found = shop.look(&second).await;
        assert_eq!(found["refund_reason"], "currency_mismatch");
        assert_eq!(shop.server.stock("A").await, (5, 0, 0));
        // The right amount afterwards is a payment of an order that is over.
        shop.pay(&Paid::of(&first).again("right")).await;
        assert_eq!(shop.money().await, [0, 0, 3, 0]);
        let listed = shop.open_payments("/admin/v1/payments").await;
        let reasons: Vec<_> = listed.iter().map(|one| &one["refund_reason"]).collect();
        assert_eq!(
            reasons,
            ["already_refunded", "currency_mismatch", "amount_mismatch"]
        );
        assert_eq!(shop.refunded(&first, "re-1", false).await.status, 200);
        assert_eq!(shop.money().await, [0, 0, 1, 2]);
        shop.close().await;
    });
}

#[test]
fn an_order_paid_twice_stays_paid_and_its_second_payment_goes_back() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let order = shop.order("u").await;
        let paid = Paid::of(&order);
        shop.pay(&paid).await;
        shop.pay(&paid.again("second")).await;
        assert_eq!(shop.look(&order).await["status"], "paid");
        assert_eq!(shop.money().await, [1, 0, 1, 0]);
        let due = shop
            .open_payments("/admin/v1/payments?state=refund_due")
            .await;
        assert_eq!(due.len(), 1);
        assert_eq!(due[0]["refund_reason"], "already_paid");
        assert_eq!(due[0]["has_order"], true);
        // Its refund is recorded with the order, which stays paid.
        let close = format!("/admin/v1/orphan-payments/{}/close", due[0]["id"]);
        let answer = shop.control("POST", &close, json!({ "note": "n" })).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (409, "not_an_orphan")
        );
        // Sent again, because its answer was lost, it gives up nothing more.
        for _ in 0..2 {
            let answer = shop.refunded(&order, "re-1", false).await;
            assert_eq!(answer.json()["status"], "paid", "{answer:?}");
            assert_eq!(shop.money().await, [1, 0, 0, 1]);
        }
        // Now there is nothing left but the payment that paid it: the buyer sends it back.
        let answer = shop.refunded(&order, "re-2", true).await;
        assert_eq!(answer.json()["status"], "refunded", "{answer:?}");
        assert_eq!(answer.json()["restocked"], 1);
        assert_eq!(shop.server.stock("A").await, (5, 0, 0));
        assert_eq!(shop.money().await, [0, 0, 0, 2]);
        // The same again changes nothing.
        assert_eq!(shop.refunded(&order, "re-2", true).await.status, 200);
        assert_eq!(shop.server.stock("A").await, (5, 0, 0));
        shop.close().await;
    });
}

#[test]
fn units_that_are_refunded_and_not_restocked_leave_the_sale() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let order = shop.order("u").await;
        let answer = shop.refunded(&order, "re-1", false).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (409, "not_refundable")
        );
        shop.pay(&Paid::of(&order)).await;
        let answer = shop.refunded(&order, "re-1", false).await;
        assert_eq!(answer.json()["status"], "refunded", "{answer:?}");
        assert_eq!(shop.server.stock("A").await, (4, 0, 0));
        let nobody = json!({ "order_id": "42" });
        assert_eq!(
            shop.refunded(&nobody, "re-1", false).await.code(),
            "unknown_order"
        );
        let id = order["order_id"].as_str().unwrap();
        for body in [
            json!({}),
            json!({ "reference": "" }),
            json!({ "reference": "r", "x": 1 }),
        ] {
            let target = format!("/admin/v1/orders/{id}/refunded");
            assert_eq!(shop.control("POST", &target, body).await.status, 400);
        }
        shop.close().await;
    });
}

#[test]
fn what_expires_and_what_waits_comes_back_after_a_restart() {
    block_on(async {
        let shop = Shop::open(5, |config| config.orders.payment_ttl_ms = 2_000).await;
        let (unpaid, lost) = (shop.order("u").await, json!({ "order_id": "1234567" }));
        let mut paid = Paid::of(&unpaid);
        paid.order = lost["order_id"].as_str().unwrap().to_owned();
        paid.receipt = None;
        shop.pay(&paid).await;
        let Shop { database, server } = shop;
        assert!(server.stop().await);
        let server = crate::support::server::TestServer::start(&database, |config| {
            config.payments.standard.secret.0 = vec![SECRET.to_owned()];
            config.payments.orphan_check_ms = 100;
            config.payments.orphan_checks = 1;
        })
        .await;
        let shop = Shop { database, server };
        shop.until(&unpaid, "expired").await;
        shop.until_stock((5, 0, 0)).await;
        shop.until_money([0, 0, 1, 0]).await;
        shop.close().await;
    });
}

/// 5,000 of them; more with `MILLRACE_EXPIRE=250000`.
#[test]
fn a_crowd_of_orders_that_fall_due_together_expires_while_callbacks_are_answered() {
    block_on(async {
        let count = crate::support::sale::count("MILLRACE_EXPIRE", 5_000);
        let shop = Shop::open(u32::try_from(count).unwrap() + 1, |config| {
            config.orders.payment_ttl_ms = 31_536_000_000;
        })
        .await;
        let order = shop.order("u").await;
        // Rows as a worker would have written them; due a second from now, all together.
        let client = shop.database.connect().await;
        client
            .batch_execute(&format!(
                "SET search_path = millrace;
                 INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                                     expires_at, payload_hash)
                 SELECT order_id + i, 'crowd-' || i, sku, 1, 0, 100, 'EUR', 1, now(), now() + interval '3 seconds', 0
                   FROM orders, generate_series(1, {count}) i;
                 WITH moved AS (UPDATE sku SET held = held + {count} RETURNING *)
                 INSERT INTO stock_log (sku, cause, reference, held_delta, total_after, held_after, sold_after)
                 SELECT id, 'test', 'test', {count}, total, held, sold FROM moved"
            ))
            .await
            .unwrap();
        // A start reads them back.
        let Shop { database, server } = shop;
        assert!(server.stop().await);
        let server = crate::support::server::TestServer::start(&database, |config| {
            config.payments.standard.secret.0 = vec![SECRET.to_owned()];
        })
        .await;
        let shop = Shop { database, server };
        let started = std::time::Instant::now();
        let mut slowest = Duration::ZERO;
        let paid = Paid::of(&order);
        let mut number = 0;
        loop {
            let before = std::time::Instant::now();
            let other = Paid {
                receipt: None,
                ..paid.again(&format!("{number}"))
            };
            shop.pay(&if number == 0 { paid.clone() } else { other })
                .await;
            slowest = slowest.max(before.elapsed());
            number += 1;
            let stock = shop.server.stock("A").await;
            if stock == (count, 0, 1) {
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(120), "{stock:?}");
            tokio::time::sleep(crate::fixture::LOOK).await;
        }
        println!(
            "{count} orders expired within {:?}, {number} callbacks meanwhile, the slowest took {slowest:?}",
            started.elapsed()
        );
        let status = shop.look(&order).await["status"].clone();
        assert_eq!(status, Value::from("paid"));
        shop.close().await;
    });
}
