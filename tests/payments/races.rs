//! What happens at the same time: one wins, the others see it.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::fixture::Shop;
use crate::support::block_on;
use crate::support::server::request;
use crate::support::webhook::Paid;

#[test]
fn of_a_payment_and_a_cancellation_one_wins_and_the_other_sees_it() {
    block_on(async {
        let shop = Shop::open(100, |_| {}).await;
        let orders = join_all((0..40).map(|n| {
            let shop = &shop;
            async move { shop.order(&format!("u-{n}")).await }
        }))
        .await;
        let outcomes = join_all(orders.iter().map(|order| {
            let shop = &shop;
            async move {
                let cancel = format!("/v1/orders/{}/cancel", order["order_id"].as_str().unwrap());
                let paid = Paid::of(order);
                let (cancelled, ()) = tokio::join!(
                    request(shop.server.data, "POST", &cancel, &[], String::new()),
                    shop.pay(&paid),
                );
                (order, cancelled.status)
            }
        }))
        .await;
        let mut sold = 0;
        for (order, cancelled) in outcomes {
            let found = shop.until_settled(order).await;
            match cancelled {
                200 => assert_eq!(found["refund_reason"], "order_cancelled", "{found}"),
                409 => {
                    assert_eq!(found["status"], "paid", "{found}");
                    sold += 1;
                }
                other => panic!("{other}"),
            }
        }
        assert_eq!(shop.server.stock("A").await, (100 - sold, 0, sold));
        shop.close().await;
    });
}

#[test]
fn of_a_payment_and_an_expiry_one_wins_and_the_other_sees_it() {
    block_on(async {
        let shop = Shop::open(100, |config| config.orders.payment_ttl_ms = 1_500).await;
        let orders = join_all((0..40).map(|n| {
            let shop = &shop;
            async move { shop.order(&format!("u-{n}")).await }
        }))
        .await;
        // Spread over the moment at which they expire.
        join_all(orders.iter().enumerate().map(|(n, order)| {
            let shop = &shop;
            let at = Duration::from_millis(1_000 + 25 * n as u64);
            async move {
                // The moment is what is tested.
                tokio::time::sleep(at).await;
                shop.pay(&Paid::of(order)).await;
            }
        }))
        .await;
        let mut sold = 0;
        for order in &orders {
            let found = shop.until_settled(order).await;
            match found["status"].as_str() {
                Some("paid") => sold += 1,
                Some("refund_due") => assert_eq!(found["refund_reason"], "order_expired"),
                other => panic!("{other:?}"),
            }
        }
        shop.until_stock((100 - sold, 0, sold)).await;
        assert_eq!(shop.money().await, [sold as i64, 0, 40 - sold as i64, 0]);
        shop.close().await;
    });
}

#[test]
fn the_same_message_by_many_connections_at_once_has_one_effect() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let order = shop.order("u").await;
        let paid = Paid::of(&order);
        let finished = Paid {
            event: "evt-finished".into(),
            ..paid.clone()
        };
        let both = [&paid, &finished];
        join_all((0..60).map(|n| shop.pay(both[n % 2]))).await;
        assert_eq!(shop.money().await, [1, 0, 0, 0]);
        assert_eq!(shop.server.stock("A").await, (4, 0, 1));
        assert_eq!(shop.events().await, 2);
        shop.close().await;
    });
}

#[test]
fn a_callback_is_answered_while_somebody_holds_what_it_needs_and_takes_effect_afterwards() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let mut client = shop.database.connect().await;
        for lock in [
            "SELECT FROM millrace.orders FOR UPDATE",
            "SELECT FROM millrace.sku FOR UPDATE",
        ] {
            let order = shop
                .order(if lock.contains("sku") { "u" } else { "v" })
                .await;
            let transaction = client.transaction().await.unwrap();
            transaction.query(lock, &[]).await.unwrap();
            let paid = Paid::of(&order);
            let started = Instant::now();
            shop.pay(&paid).await;
            let took = started.elapsed();
            assert!(took < Duration::from_secs(3), "{lock}: {took:?}");
            let orphans = shop.open_payments("/admin/v1/payments?state=orphan").await;
            assert_eq!(orphans.len(), 1, "{lock}: {orphans:?}");
            transaction.rollback().await.unwrap();
            shop.until(&order, "paid").await;
            shop.until_no_orphan().await;
        }
        assert_eq!(shop.money().await, [2, 0, 0, 0]);
        shop.close().await;
    });
}

#[test]
fn a_sku_that_somebody_holds_keeps_no_payment_of_another_waiting() {
    block_on(async {
        let shop = Shop::open(100, |_| {}).await;
        shop.server.put_sku("B", 100, Value::Null).await;
        let order = async |user: &str, sku: &str| shop.server.order(user, sku, None).await.json();
        let (mut held, mut free) = (Vec::new(), Vec::new());
        for n in 0..15 {
            held.push(order(&format!("a-{n}"), "A").await);
            free.push(order(&format!("b-{n}"), "B").await);
        }
        let mut client = shop.database.connect().await;
        let transaction = client.transaction().await.unwrap();
        transaction.query(HOLD_A, &[]).await.unwrap();
        // Every one is answered with success, which a platform waits five seconds for.
        for (held, free) in held.iter().zip(&free) {
            shop.pay(&Paid::of(held)).await;
            shop.pay(&Paid::of(free)).await;
        }
        for order in &free {
            shop.until(order, "paid").await;
        }
        transaction.rollback().await.unwrap();
        for order in &held {
            shop.until(order, "paid").await;
        }
        shop.close().await;
    });
}

#[test]
fn a_sku_that_somebody_holds_keeps_no_expiry_of_another_waiting() {
    block_on(async {
        let shop = Shop::open(10, |config| config.orders.payment_ttl_ms = 1_000).await;
        shop.server.put_sku("B", 10, Value::Null).await;
        let mut client = shop.database.connect().await;
        for (user, sku) in [("u", "A"), ("v", "B"), ("w", "A"), ("x", "B")] {
            assert_eq!(shop.server.order(user, sku, None).await.status, 201);
        }
        let transaction = client.transaction().await.unwrap();
        transaction.query(HOLD_A, &[]).await.unwrap();
        let deadline = Instant::now() + crate::fixture::PATIENCE;
        while shop.server.stock("B").await != (10, 0, 0) {
            assert!(Instant::now() < deadline, "B's units do not come back");
            tokio::time::sleep(crate::fixture::LOOK).await;
        }
        transaction.rollback().await.unwrap();
        shop.until_stock((10, 0, 0)).await;
        shop.close().await;
    });
}

const HOLD_A: &str = "SELECT FROM millrace.sku WHERE sku_id = 'A' FOR UPDATE";

#[test]
fn callbacks_are_answered_and_take_effect_while_the_order_queue_is_full() {
    block_on(async {
        let shop = Shop::open(10_000, |config| {
            config.queue.capacity = 50;
            config.orders.timeout_ms = 60_000;
        })
        .await;
        let mut orders = Vec::new();
        for part in 0..5 {
            let placed = (0..40).map(|n| {
                let (shop, user) = (&shop, format!("u-{part}-{n}"));
                async move { shop.order(&user).await }
            });
            orders.extend(join_all(placed).await);
        }
        // Workers cannot write while somebody holds their rows; the row of callbacks is the last but one, before the assigner's.
        let mut client = shop.database.connect().await;
        let transaction = client.transaction().await.unwrap();
        let hold = "SELECT FROM millrace.writer WHERE shard <> (SELECT max(shard) - 1 FROM millrace.writer) FOR UPDATE";
        transaction.query(hold, &[]).await.unwrap();
        let full = |user: String| {
            let shop = &shop;
            async move {
                let body = json!({ "user_id": user, "sku_id": "A" });
                shop.server
                    .post(body, Some("k"), &[("Prefer", "wait=1")])
                    .await
            }
        };
        let flood = join_all((0..300).map(|n| full(format!("flood-{n}"))));
        let paying = async {
            let mut took = Vec::new();
            for order in &orders {
                let started = Instant::now();
                shop.pay(&Paid::of(order)).await;
                took.push(started.elapsed());
            }
            took.sort_unstable();
            took
        };
        let (flood, took) = tokio::join!(flood, paying);
        let refused = flood.iter().filter(|answer| answer.status == 503).count();
        assert!(refused > 0, "the queue was full");
        println!(
            "{} callbacks while the queue was full ({refused} of 300 orders refused): p50 {:?} p99 {:?} max {:?}",
            took.len(),
            took[took.len() / 2],
            took[took.len() * 99 / 100],
            took[took.len() - 1]
        );
        assert_eq!(shop.money().await, [orders.len() as i64, 0, 0, 0]);
        transaction.rollback().await.unwrap();
        shop.close().await;
    });
}

#[test]
fn one_payment_that_the_database_refuses_keeps_no_other_from_being_stored() {
    block_on(async {
        let shop = Shop::open(100, |_| {}).await;
        shop.database
            .connect()
            .await
            .batch_execute(
                "ALTER TABLE millrace.payment_events ADD CONSTRAINT test CHECK (event_id NOT LIKE '%-u-7%')",
            )
            .await
            .unwrap();
        let orders = join_all((0..20).map(|n| {
            let shop = &shop;
            async move { (n, shop.order(&format!("u-{n}")).await) }
        }))
        .await;
        let answers = join_all(orders.iter().map(|(n, order)| {
            let paid = Paid {
                event: format!("evt-u-{n}"),
                ..Paid::of(order)
            };
            let data = shop.server.data;
            async move { (*n, paid.deliver(data).await.status) }
        }))
        .await;
        for (n, status) in answers {
            assert_eq!(status, if n == 7 { 503 } else { 200 }, "u-{n}");
        }
        shop.until_money([19, 0, 0, 0]).await;
        shop.close().await;
    });
}

#[test]
fn a_sku_whose_units_the_database_does_not_take_back_holds_up_no_other() {
    block_on(async {
        let shop = Shop::open(5, |config| config.orders.payment_ttl_ms = 1_500).await;
        shop.server.put_sku("B", 5, Value::Null).await;
        let client = shop.database.connect().await;
        client
            .batch_execute(
                "CREATE FUNCTION millrace.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     RAISE EXCEPTION 'no' USING ERRCODE = 'check_violation'; END $$;
                 CREATE TRIGGER refuse BEFORE UPDATE ON millrace.sku FOR EACH ROW
                     WHEN (OLD.sku_id = 'A' AND NEW.held < OLD.held) EXECUTE FUNCTION millrace.refuse()",
            )
            .await
            .unwrap();
        let nobody = Paid {
            order: "123456789".into(),
            receipt: None,
            ..Paid::of(&shop.order("u").await)
        };
        assert_eq!(shop.server.order("u", "B", None).await.status, 201);
        let deadline = Instant::now() + crate::fixture::PATIENCE;
        while shop.server.stock("B").await != (5, 0, 0) {
            assert!(Instant::now() < deadline, "B waits for A");
            tokio::time::sleep(crate::fixture::LOOK).await;
        }
        assert_eq!(shop.server.stock("A").await, (4, 1, 0));
        shop.pay(&nobody).await;
        shop.until_money([0, 0, 1, 0]).await;
        let mend = "DROP TRIGGER refuse ON millrace.sku";
        client.batch_execute(mend).await.unwrap();
        shop.until_stock((5, 0, 0)).await;
        shop.close().await;
    });
}

#[test]
fn the_first_of_two_payments_counts_also_where_it_had_to_wait_for_its_order() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let mut client = shop.database.connect().await;
        let order = shop.order("u").await;
        let transaction = client.transaction().await.unwrap();
        transaction
            .query("SELECT FROM millrace.orders FOR UPDATE", &[])
            .await
            .unwrap();
        let paid = Paid::of(&order);
        shop.pay(&paid).await;
        assert_eq!(shop.money().await, [0, 1, 0, 0]);
        transaction.rollback().await.unwrap();
        // Before or after the first was looked at again: it came first.
        let wrong = Paid {
            amount: paid.amount + 1,
            ..paid.again("wrong")
        };
        shop.pay(&wrong).await;
        shop.until(&order, "paid").await;
        assert_eq!(shop.money().await, [1, 0, 1, 0]);
        shop.close().await;
    });
}

impl Shop {
    /// Waits until an order is neither payable nor merely past its time.
    async fn until_settled(&self, order: &Value) -> Value {
        let deadline = Instant::now() + crate::fixture::PATIENCE;
        loop {
            let found = self.look(order).await;
            let settled = [json!("paid"), json!("refund_due")];
            if settled.contains(&found["status"]) {
                return found;
            }
            assert!(Instant::now() < deadline, "{found}");
            tokio::time::sleep(crate::fixture::LOOK).await;
        }
    }

    /// Waits until no payment looks for its order.
    async fn until_no_orphan(&self) {
        let deadline = Instant::now() + crate::fixture::PATIENCE;
        while self.money().await[1] > 0 {
            assert!(Instant::now() < deadline, "an orphan stays");
            tokio::time::sleep(crate::fixture::LOOK).await;
        }
    }
}
