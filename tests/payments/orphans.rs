//! Payments whose order is not there: yet, any more, or ever.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::{PATIENCE, Shop};
use crate::support::block_on;
use crate::support::http::{Connection, call};
use crate::support::postgres::{connect, test_dir};
use crate::support::served::{OwnPostgres, Served, end_postgres, millrace};
use crate::support::server::{RECEIPT_KEY, TestServer, request};
use crate::support::webhook::{Paid, SECRET, send};

#[test]
fn a_payment_for_an_order_that_nobody_has_is_looked_for_and_then_has_to_go_back() {
    block_on(async {
        let shop = Shop::open(5, |config| config.payments.orphan_checks = 3).await;
        let order = shop.order("u").await;
        let nobody = Paid {
            order: "123456789".into(),
            receipt: None,
            ..Paid::of(&order).again("nobody")
        };
        shop.pay(&nobody).await;
        let orphans = shop.open_payments("/admin/v1/orphan-payments").await;
        assert_eq!(orphans.len(), 1, "{orphans:?}");
        assert_eq!(orphans[0]["order_ref"], "123456789");
        assert_eq!(orphans[0]["has_order"], false);
        // An order reference that can be none of ours is money all the same.
        let garbage = Paid {
            order: "no number".into(),
            ..nobody.again("garbage")
        };
        shop.pay(&garbage).await;
        // A receipt that is altered, and one of another order.
        let mut altered = Paid {
            order: "987654321".into(),
            receipt: Some("A".repeat(100)),
            ..nobody.again("altered")
        };
        shop.pay(&altered).await;
        altered = Paid {
            receipt: order["receipt"].as_str().map(str::to_owned),
            ..altered.again("moved")
        };
        shop.pay(&altered).await;
        shop.until_money([0, 0, 4, 0]).await;
        let due = shop.open_payments("/admin/v1/orphan-payments").await;
        let mut reasons: Vec<_> = due
            .iter()
            .map(|one| one["refund_reason"].as_str().unwrap())
            .collect();
        reasons.sort_unstable();
        assert_eq!(
            reasons,
            [
                "receipt_invalid",
                "receipt_invalid",
                "receipt_missing",
                "receipt_missing"
            ]
        );
        for one in &due {
            let target = format!("/admin/v1/orphan-payments/{}", one["id"]);
            let retry = shop
                .control("POST", &format!("{target}/retry"), Value::Null)
                .await;
            assert_eq!(
                (retry.status, retry.code().as_str()),
                (409, "not_an_orphan")
            );
            let close = json!({ "note": "sent back by bank transfer", "reference": "T-1" });
            let closed = shop
                .control("POST", &format!("{target}/close"), close.clone())
                .await;
            assert_eq!(closed.status, 200, "{closed:?}");
            assert_eq!(closed.json()["state"], "refunded");
            assert_eq!(closed.json()["reference"], "T-1");
            let again = shop
                .control("POST", &format!("{target}/close"), close)
                .await;
            assert_eq!(
                (again.status, again.code().as_str()),
                (409, "not_an_orphan")
            );
        }
        assert_eq!(shop.money().await, [0, 0, 0, 4]);
        let nothing = "/admin/v1/orphan-payments/999";
        assert_eq!(
            shop.control("GET", nothing, Value::Null).await.code(),
            "unknown_payment"
        );
        shop.close().await;
    });
}

#[test]
fn an_operator_need_not_wait_for_the_checks() {
    block_on(async {
        let shop = Shop::open(5, |config| config.payments.orphan_check_ms = 3_600_000).await;
        let order = shop.order("u").await;
        let nobody = Paid {
            order: "123456789".into(),
            receipt: None,
            ..Paid::of(&order)
        };
        shop.pay(&nobody).await;
        let orphans = shop
            .open_payments("/admin/v1/orphan-payments?state=orphan")
            .await;
        let target = format!("/admin/v1/orphan-payments/{}/retry", orphans[0]["id"]);
        let answer = shop.control("POST", &target, Value::Null).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json()["refund_reason"], "receipt_missing");
        shop.close().await;
    });
}

/// Takes every row away, and what it holds.
const FORGET: &str = "
    SET search_path = millrace;
    DELETE FROM orders;
    WITH moved AS (UPDATE sku SET held = 0 RETURNING *)
    INSERT INTO stock_log (sku, cause, reference, held_delta, total_after, held_after, sold_after)
    SELECT id, 'test', 'test', -(SELECT sum(held_delta) FROM stock_log), total, held, sold FROM moved";

/// The rows are taken away, as a failover without its commits would, and memory forgets at a
/// restart.
pub async fn lose(shop: Shop) -> Shop {
    restart_after(shop, FORGET).await
}

/// Something happens to the database, and memory forgets at a restart.
async fn restart_after(shop: Shop, sql: &str) -> Shop {
    let Shop { database, server } = shop;
    assert!(server.stop().await);
    database.connect().await.batch_execute(sql).await.unwrap();
    let server = TestServer::start(&database, |config| {
        config.payments.standard.secret.0 = vec![SECRET.to_owned()];
        config.payments.orphan_check_ms = 100;
        config.payments.orphan_checks = 2;
        // One of later replaces it; what it has signed is good all the same.
        config.receipt.key.0 = vec!["a newer key of receipts".to_owned(), RECEIPT_KEY.to_owned()];
    })
    .await;
    Shop { database, server }
}

#[test]
fn a_lost_order_is_recovered_from_its_receipt_and_is_there_under_its_key() {
    block_on(async {
        let shop = Shop::open(1, |_| {}).await;
        let body = json!({
            "user_id": "u", "sku_id": "A", "quantity": 1, "adjustment": 7, "attributes": { "a": 1 },
        });
        let answer = shop.server.post(body.clone(), Some("k"), &[]).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        let order = answer.json();
        let shop = lose(shop).await;
        assert_eq!(shop.look(&order).await["code"], "unknown_order");
        shop.pay(&Paid::of(&order)).await;
        let found = shop.until(&order, "paid").await;
        let mut expected = order.clone();
        expected["status"] = json!("paid");
        expected.as_object_mut().unwrap().remove("attributes");
        // Signed by the newer key now.
        expected["receipt"] = found["receipt"].clone();
        assert_eq!(found, expected, "identical but for attributes");
        assert_eq!(shop.server.stock("A").await, (0, 0, 1));
        // A retry under its key finds it, and another body is refused.
        let again = shop.server.post(body, Some("k"), &[]).await;
        assert_eq!(
            (again.status, &again.json()["order_id"]),
            (200, &order["order_id"])
        );
        let other = json!({ "user_id": "u", "sku_id": "A", "quantity": 2 });
        let other = shop.server.post(other, Some("k"), &[]).await;
        assert_eq!(other.code(), "idempotency_key_reused");
        // The receipt is used up: another payment with it goes back.
        shop.pay(&Paid::of(&order).again("second")).await;
        shop.until_money([1, 0, 1, 0]).await;
        shop.close().await;
    });
}

#[test]
fn a_row_that_is_lost_while_memory_knows_its_order_is_not_held_twice() {
    block_on(async {
        let shop = Shop::open(2, |_| {}).await;
        // One with a key, and one without.
        let keyed = shop.order("u").await;
        let plain = shop.server.order("v", "A", None).await.json();
        let client = shop.database.connect().await;
        client.batch_execute(FORGET).await.unwrap();
        for order in [&keyed, &plain] {
            shop.pay(&Paid::of(order)).await;
        }
        shop.until_money([2, 0, 0, 0]).await;
        assert_eq!(shop.server.stock("A").await, (0, 0, 2));
        shop.close().await;
    });
}

/// What retention does, if every order is old enough.
const DELETE_OLD: &str = "
    SET search_path = millrace;
    INSERT INTO orders_checkpoint (sku, orders, sold)
    SELECT sku, count(*), coalesce(sum(quantity) FILTER (WHERE status = 2), 0) FROM orders GROUP BY sku;
    INSERT INTO orders_deleted (below) SELECT max(order_id) + 1 FROM orders;
    UPDATE payments SET order_pruned = true;
    DELETE FROM orders";

#[test]
fn a_payment_for_an_order_that_was_deleted_is_refunded_and_makes_no_order() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let (paid, cancelled) = (shop.order("u").await, shop.order("v").await);
        shop.pay(&Paid::of(&paid)).await;
        shop.until(&paid, "paid").await;
        let id = cancelled["order_id"].as_str().unwrap();
        let cancel = format!("/v1/orders/{id}/cancel");
        let answer = request(shop.server.data, "POST", &cancel, &[], String::new()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let shop = restart_after(shop, DELETE_OLD).await;
        for order in [&paid, &cancelled] {
            assert_eq!(shop.look(order).await["code"], "unknown_order");
            shop.pay(&Paid::of(order).again("second")).await;
        }
        shop.until_money([1, 0, 2, 0]).await;
        let due = shop.open_payments("/admin/v1/orphan-payments").await;
        let mut reasons: Vec<_> = due.iter().map(|one| &one["refund_reason"]).collect();
        reasons.sort_by_key(|reason| reason.to_string());
        assert_eq!(reasons, ["already_paid", "order_cancelled"]);
        assert_eq!(shop.server.stock("A").await, (4, 0, 1));
        assert_eq!(shop.look(&paid).await["code"], "unknown_order");
        shop.close().await;
    });
}

#[test]
fn a_receipt_names_the_order_where_the_provider_does_not() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let (there, lost) = (shop.order("u").await, shop.order("v").await);
        let garbled = |order: &Value| Paid {
            order: "order no. 7".into(),
            ..Paid::of(order)
        };
        shop.pay(&garbled(&there)).await;
        shop.until(&there, "paid").await;
        shop.pay(&Paid::of(&there).again("second")).await;
        let id = lost["order_id"].as_str().unwrap();
        shop.database
            .connect()
            .await
            .batch_execute(&format!(
                "SET search_path = millrace;
                 DELETE FROM orders WHERE order_id = {id};
                 WITH moved AS (UPDATE sku SET held = held - 1 RETURNING *)
                 INSERT INTO stock_log (sku, cause, reference, held_delta, total_after, held_after, sold_after)
                 SELECT id, 'test', 'test', -1, total, held, sold FROM moved"
            ))
            .await
            .unwrap();
        shop.pay(&garbled(&lost)).await;
        shop.until(&lost, "paid").await;
        assert_eq!(shop.money().await, [2, 0, 1, 0]);
        assert_eq!(shop.server.stock("A").await, (3, 0, 2));
        shop.close().await;
    });
}

#[test]
fn a_lost_order_whose_units_were_sold_to_others_is_not_oversold() {
    block_on(async {
        let shop = Shop::open(1, |_| {}).await;
        let lost = shop.order("u").await;
        let shop = lose(shop).await;
        let other = shop.order("v").await;
        shop.pay(&Paid::of(&lost)).await;
        let found = shop.until(&lost, "refund_due").await;
        assert_eq!(found["refund_reason"], "sold_out");
        shop.pay(&Paid::of(&other)).await;
        assert_eq!(shop.server.stock("A").await, (0, 0, 1));
        assert_eq!(shop.money().await, [1, 0, 1, 0]);
        shop.close().await;
    });
}

#[test]
fn a_lost_order_that_its_buyer_has_placed_again_under_its_key_is_not_placed_twice() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let lost = shop.order("u").await;
        let shop = lose(shop).await;
        let again = shop.order("u").await;
        assert_ne!(again["order_id"], lost["order_id"]);
        shop.pay(&Paid::of(&lost)).await;
        shop.until_money([0, 0, 1, 0]).await;
        let due = shop.open_payments("/admin/v1/orphan-payments").await;
        assert_eq!(due[0]["refund_reason"], "ordered_again");
        assert_eq!(due[0]["order_in_receipt"]["user_id"], "u");
        assert_eq!(due[0]["order_in_receipt"]["sku_id"], "A");
        shop.close().await;
    });
}

#[test]
fn a_receipt_does_not_pay_with_another_amount() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let lost = shop.order("u").await;
        let shop = lose(shop).await;
        let less = Paid {
            amount: 1,
            ..Paid::of(&lost)
        };
        shop.pay(&less).await;
        let found = shop.until(&lost, "refund_due").await;
        assert_eq!(found["refund_reason"], "amount_mismatch");
        assert_eq!(shop.server.stock("A").await, (5, 0, 0));
        shop.close().await;
    });
}

#[test]
fn a_payment_whose_order_the_database_refuses_holds_up_no_other() {
    block_on(async {
        let shop = Shop::open(5, |_| {}).await;
        let lost = shop.order("u").await;
        let shop = lose(shop).await;
        let client = shop.database.connect().await;
        let edit = "UPDATE millrace.sku SET held = ";
        client
            .batch_execute(&format!("{edit} total"))
            .await
            .unwrap();
        let paid = Paid::of(&lost);
        let nobody = Paid {
            order: "123456789".into(),
            receipt: None,
            ..paid.again("nobody")
        };
        shop.pay(&paid).await;
        shop.pay(&nobody).await;
        shop.until_money([0, 1, 1, 0]).await;
        client.batch_execute(&format!("{edit} 0")).await.unwrap();
        shop.until(&lost, "paid").await;
        shop.close().await;
    });
}

/// The real binary, with a journal, and a database whose workers can be held up.
struct Real {
    directory: tempfile::TempDir,
    served: Served,
}

impl Real {
    fn start(more: &[(&str, &str)]) -> Self {
        let directory = test_dir();
        let served = Self::serve(&directory, more);
        served.put_sku("A", 5);
        Real { directory, served }
    }

    fn serve(directory: &tempfile::TempDir, more: &[(&str, &str)]) -> Served {
        let settings: Vec<(String, String)> = [
            ("MILLRACE_PAYMENTS__STANDARD__SECRET", SECRET),
            ("MILLRACE_PAYMENTS__ORPHAN_CHECK_MS", "100"),
            ("MILLRACE_PAYMENTS__ORPHAN_CHECKS", "2"),
            ("MILLRACE_QUEUE__JOURNAL__LEASE_MS", "1000"),
        ]
        .iter()
        .chain(more)
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
        let log = directory.path().join("log");
        Served::try_start(directory.path(), &settings, &log).expect("a start")
    }

    fn postgres(&self) -> OwnPostgres {
        OwnPostgres::of(self.directory.path())
    }

    /// Keeps the workers from writing until its result is dropped.
    async fn hold_up(&self) -> tokio_postgres::Client {
        let blocker = connect(&self.postgres().config().expect("PostgreSQL")).await;
        let block = "BEGIN; LOCK TABLE millrace.orders IN SHARE MODE";
        blocker.batch_execute(block).await.unwrap();
        blocker
    }

    fn place(&self, user: &str) -> Value {
        let body = json!({ "user_id": user, "sku_id": "A", "quantity": 2 }).to_string();
        let fields = [
            ("Content-Type", "application/json"),
            ("Prefer", "respond-async"),
            ("Idempotency-Key", "k"),
        ];
        let answer = call(self.served.data, "POST", "/v1/orders", &fields, &body);
        assert!((200..300).contains(&answer.status), "{answer:?}");
        answer.json()
    }

    fn pay(&self, order: &Value) {
        let paid = Paid::of(order);
        let mut connection = Connection::open(self.served.data).expect("connect");
        let answer = send(&mut connection, &paid.event, &paid.body(), SECRET).expect("an answer");
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    fn look(&self, order: &Value) -> Value {
        let id = order["order_id"].as_str().unwrap();
        call(
            self.served.data,
            "GET",
            &format!("/v1/orders/{id}"),
            &[],
            "",
        )
        .json()
    }

    fn until(&self, order: &Value, status: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.look(order);
            if found["status"] == status {
                return found;
            }
            assert!(Instant::now() < deadline, "not {status}: {found}");
            std::thread::sleep(crate::fixture::LOOK);
        }
    }
}

#[test]
fn an_order_that_was_paid_before_its_row_came_is_paid_however_late_that_is() {
    block_on(async {
        let real = Real::start(&[("MILLRACE_ORDERS__PAYMENT_TTL_MS", "1500")]);
        let blocker = real.hold_up().await;
        let (paid, unpaid) = (real.place("paid"), real.place("unpaid"));
        assert_eq!(paid["status"], "accepted");
        real.pay(&paid);
        // Until both are past their time, which is what is tested.
        tokio::time::sleep(Duration::from_millis(2_000)).await;
        blocker.batch_execute("COMMIT").await.unwrap();
        assert_eq!(real.until(&paid, "paid")["receipt"], paid["receipt"]);
        real.until(&unpaid, "expired");
    });
}

#[test]
fn an_acknowledged_order_whose_queue_is_wiped_comes_back_with_its_payment() {
    block_on(async {
        let real = Real::start(&[]);
        let blocker = real.hold_up().await;
        let lost = real.place("lost");
        assert_eq!(lost["status"], "accepted");
        let Real { directory, served } = real;
        served.kill();
        drop(blocker);
        end_postgres(OwnPostgres::of(directory.path()).pid().expect("a pid"));
        std::fs::remove_dir_all(directory.path().join("journal")).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let abandoned = millrace(&["journal", "abandon", "--yes"])
                .env("MILLRACE_DATA_DIR", directory.path())
                .output()
                .unwrap();
            if abandoned.status.success() {
                break;
            }
            // Until the lost process may certainly not acknowledge any more.
            let said = String::from_utf8_lossy(&abandoned.stderr);
            assert!(Instant::now() < deadline, "{said}");
            tokio::time::sleep(crate::fixture::LOOK).await;
        }
        let served = Real::serve(&directory, &[]);
        let real = Real { directory, served };
        assert_eq!(real.look(&lost)["code"], "unknown_order");
        real.pay(&lost);
        let mut expected = lost.clone();
        expected["status"] = json!("paid");
        expected
            .as_object_mut()
            .unwrap()
            .remove("estimated_wait_ms");
        assert_eq!(real.until(&lost, "paid"), expected);
        assert_eq!(real.place("lost")["order_id"], lost["order_id"]);
    });
}
