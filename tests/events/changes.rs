//! Which change makes which event.

use serde_json::{Value, json};

use crate::receiver::{Shop, id};
use crate::support::block_on;
use crate::support::server::request;
use crate::support::waiting::wait_until;
use crate::support::webhook::Paid;

#[test]
fn each_change_of_an_order_is_an_event_with_the_order_as_of_then() {
    block_on(async {
        let shop = Shop::open(|config| {
            config.events.include = vec![
                millrace::config::EventMember::Attributes,
                millrace::config::EventMember::Receipt,
            ];
        })
        .await;
        let order = shop.order("payer").await;
        let of = id(&order);
        let placed = shop.receiver.until("order.placed", &of).await;
        assert_eq!(placed.id, format!("{of}:1"));
        assert_eq!(placed.event["data"]["previous_status"], Value::Null);
        let mut as_told = placed.event["data"].clone();
        as_told
            .as_object_mut()
            .expect("an object")
            .remove("previous_status");
        assert_eq!(as_told, order, "what the buyer was told");
        assert_eq!(placed.event.get("resync"), None);

        assert_eq!(Paid::of(&order).deliver(shop.server.data).await.status, 200);
        let paid = shop.receiver.until("order.paid", &of).await;
        assert_eq!(paid.id, format!("{of}:2"));
        assert_eq!(paid.event["data"]["status"], "paid");
        assert_eq!(paid.event["data"]["previous_status"], "pending_payment");

        // A second payment of it, and its refund.
        let again = Paid::of(&order).again("b");
        assert_eq!(again.deliver(shop.server.data).await.status, 200);
        let due = shop.receiver.until("payment.refund_due", &of).await;
        assert_eq!(due.event["data"]["refund_reason"], "already_paid");
        assert!(due.id.starts_with("payment-"), "{}", due.id);
        let refunded = format!("/admin/v1/orders/{of}/refunded");
        for reference in ["r1", "r2"] {
            let body = json!({ "reference": reference });
            let answer = shop.server.control("POST", &refunded, body).await;
            assert_eq!(answer.status, 200, "{answer:?}");
        }
        let refunded = shop.receiver.until("order.refunded", &of).await;
        assert_eq!(refunded.id, format!("{of}:3"));
        assert_eq!(refunded.event["data"]["previous_status"], "paid");

        let other = shop.order("leaver").await;
        let cancel = format!("/v1/orders/{}/cancel", id(&other));
        let answer = request(shop.server.data, "POST", &cancel, &[], String::new()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let cancelled = shop.receiver.until("order.cancelled", &id(&other)).await;
        assert_eq!(cancelled.id, format!("{}:2", id(&other)));
        // Paid all the same.
        assert_eq!(Paid::of(&other).deliver(shop.server.data).await.status, 200);
        let due = shop.receiver.until("order.refund_due", &id(&other)).await;
        assert_eq!(due.id, format!("{}:3", id(&other)));
        assert_eq!(due.event["data"]["refund_reason"], "order_cancelled");
        assert_eq!(due.event["data"]["previous_status"], "cancelled");
        shop.close().await;
    });
}

#[test]
fn an_order_expires_and_a_payment_without_an_order_is_told() {
    block_on(async {
        let shop = Shop::open(|config| config.orders.payment_ttl_ms = 1_000).await;
        let order = shop.order("sleeper").await;
        let expired = shop.receiver.until("order.expired", &id(&order)).await;
        assert_eq!(expired.id, format!("{}:2", id(&order)));
        assert_eq!(expired.event["data"].get("receipt"), None);
        assert_eq!(expired.event["data"].get("attributes"), None);

        let stranger = Paid {
            order: "7300000000000000001".to_owned(),
            receipt: None,
            ..Paid::of(&order).again("x")
        };
        assert_eq!(stranger.deliver(shop.server.data).await.status, 200);
        let orphan = shop
            .receiver
            .until("payment.orphaned", &stranger.order)
            .await;
        let due = shop
            .receiver
            .until("payment.refund_due", &stranger.order)
            .await;
        assert_eq!(due.event["data"]["refund_reason"], "receipt_missing");
        let payment = orphan.id.strip_suffix(":1").expect("its first state");
        assert_eq!(due.id, format!("{payment}:2"));
        shop.close().await;
    });
}

#[test]
fn a_refused_order_has_failed_and_may_be_placed_after_all() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        let client = shop.database.connect().await;
        let check = "ALTER TABLE millrace.orders ADD CONSTRAINT no_bots CHECK (user_id <> 'bot')";
        client.execute(check, &[]).await.expect("a constraint");
        let body = json!({ "user_id": "bot", "sku_id": "A" });
        let answer = shop.server.post(body, None, &[]).await;
        assert_eq!(answer.status, 500, "{answer:?}");
        let heard = || {
            shop.receiver
                .taken()
                .into_iter()
                .find(|one| one.kind() == "order.failed")
        };
        wait_until("order.failed", async || heard().is_some()).await;
        let failed = heard().expect("it was there");
        let of = failed.order().to_owned();
        assert_eq!(failed.id, format!("{of}:1"));
        assert_eq!(failed.event["data"]["status"], "failed");
        client
            .execute("ALTER TABLE millrace.orders DROP CONSTRAINT no_bots", &[])
            .await
            .expect("dropped");
        let letters = shop.admin("GET", "/admin/v1/dead-letters").await.json();
        let retry = format!(
            "/admin/v1/dead-letters/{}/retry",
            letters["dead_letters"][0]["id"]
        );
        assert_eq!(shop.admin("POST", &retry).await.status, 200);
        let placed = shop.receiver.until("order.placed", &of).await;
        assert_eq!(placed.id, format!("{of}:2"));
        assert_eq!(placed.event["data"]["previous_status"], "failed");
        shop.close().await;
    });
}

#[test]
fn what_is_rolled_back_or_already_there_is_no_event() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        let mut client = shop.database.connect().await;
        let order = shop.order("a").await;
        shop.receiver.until("order.placed", &id(&order)).await;
        let transaction = client.transaction().await.expect("BEGIN");
        let expire = "UPDATE millrace.orders SET status = 4";
        transaction.execute(expire, &[]).await.expect("an update");
        transaction.rollback().await.expect("ROLLBACK");
        // Neither is a change of an order's status.
        client
            .execute("UPDATE millrace.sku SET title = 'new'", &[])
            .await
            .expect("an update");
        let other = shop.order("b").await;
        shop.receiver.until("order.placed", &id(&other)).await;
        let heard: Vec<String> = shop
            .receiver
            .heard()
            .into_iter()
            .map(|one| one.id)
            .collect();
        assert_eq!(
            heard,
            [format!("{}:1", id(&order)), format!("{}:1", id(&other))]
        );
        shop.close().await;
    });
}
