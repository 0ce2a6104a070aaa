//! A sink so far behind that its slot is given up, and resyncs while orders change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use crate::receiver::{Shop, id};
use crate::support::block_on;
use crate::support::server::request;
use crate::support::waiting::wait_until;
use crate::support::webhook::Paid;

#[test]
fn a_slot_beyond_its_bound_is_dropped_and_the_sink_is_refilled_from_its_place_on() {
    block_on(async {
        let shop = Shop::open(|config| config.events.lag_bytes_max = 64 << 20).await;
        let old = shop.order("old").await;
        shop.receiver.until("order.placed", &id(&old)).await;
        let untouched = shop.order("untouched").await;
        shop.receiver.until("order.placed", &id(&untouched)).await;
        // Its place is noted once a second.
        let client = shop.database.connect().await;
        let behind = "SELECT place_xid::text::int8 FROM millrace.event_sinks";
        let from: i64 = client
            .query_one(
                "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8",
                &[],
            )
            .await
            .expect("a snapshot")
            .get(0);
        let mut users = 0;
        wait_until("the place", async || {
            client
                .query_one(behind, &[])
                .await
                .is_ok_and(|row| row.get::<_, i64>(0) >= from)
                || client.execute("CHECKPOINT", &[]).await.is_err()
        })
        .await;
        shop.receiver.answer(|_, _| 503);
        assert_eq!(Paid::of(&old).deliver(shop.server.data).await.status, 200);
        let missed = shop.order("missed").await;
        let cancel = format!("/v1/orders/{}/cancel", id(&missed));
        request(shop.server.data, "POST", &cancel, &[], String::new()).await;
        // 96 MiB of somebody else's WAL.
        for _ in 0..96 {
            let sql = "SELECT pg_logical_emit_message(false, 'test', repeat('x', 1048576))";
            client.execute(sql, &[]).await.expect("a message");
        }
        let slots = "SELECT FROM pg_replication_slots WHERE database = current_database()";
        wait_until("the slot is dropped", async || {
            client.query(slots, &[]).await.expect("slots").is_empty()
        })
        .await;
        let ready = shop.admin("GET", "/readyz").await.json();
        assert_eq!(ready["ready"], true, "{ready}");
        users += 1;
        let later = shop.order(&format!("later-{users}")).await;
        shop.receiver.answer(|_, _| 200);
        let paid = shop.receiver.until("order.paid", &id(&old)).await;
        assert_eq!(paid.id, format!("{}:2", id(&old)));
        shop.receiver.until("order.cancelled", &id(&missed)).await;
        shop.receiver.until("order.placed", &id(&later)).await;
        let state = async || {
            shop.admin("GET", "/admin/v1/events").await.json()["sinks"][0]["state"].clone()
        };
        wait_until("it is refilled", async || state().await == "delivering").await;
        let again = shop
            .receiver
            .taken()
            .iter()
            .filter(|one| one.order() == id(&untouched))
            .count();
        assert_eq!(again, 1, "what has not changed is not told again");
        shop.close().await;
    });
}

#[test]
fn a_resync_of_all_orders_keeps_the_order_of_each_while_they_change() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        let mut orders = Vec::new();
        for user in 0..60 {
            orders.push(shop.order(&format!("u{user}")).await);
        }
        let last = id(orders.last().expect("orders"));
        shop.receiver.until("order.placed", &last).await;
        let is_done = Arc::new(AtomicBool::new(false));
        let answer = shop
            .admin("POST", "/admin/v1/events/shop/resync?after=0")
            .await;
        assert_eq!(answer.status, 200, "{answer:?}");
        for (at, order) in orders.iter().enumerate() {
            assert_eq!(Paid::of(order).deliver(shop.server.data).await.status, 200);
            if at % 3 == 0 {
                let refunded = format!("/admin/v1/orders/{}/refunded", id(order));
                let body = json!({ "reference": "r" });
                let answer = shop.server.control("POST", &refunded, body).await;
                assert_eq!(answer.status, 200, "{answer:?}");
            }
        }
        is_done.store(true, Ordering::Relaxed);
        for (at, order) in orders.iter().enumerate() {
            let last = if at % 3 == 0 {
                "order.refunded"
            } else {
                "order.paid"
            };
            shop.receiver.until(last, &id(order)).await;
        }
        let state = async || {
            shop.admin("GET", "/admin/v1/events").await.json()["sinks"][0]["state"].clone()
        };
        wait_until("it is refilled", async || state().await == "delivering").await;
        let taken = shop.receiver.taken();
        assert!(
            taken.iter().any(|one| one.event["resync"] == true),
            "nothing was told again"
        );
        for order in &orders {
            let of = id(order);
            let heard = taken.iter().filter(|one| one.order() == of);
            let numbers: Vec<u32> = heard
                .filter_map(|one| one.id.rsplit_once(':')?.1.parse().ok())
                .collect();
            assert!(numbers.is_sorted(), "{of}: {numbers:?}");
        }
        shop.close().await;
    });
}
