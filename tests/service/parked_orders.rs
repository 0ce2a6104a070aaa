//! Orders of a SKU whose counters the database refuses: they wait on disk, harm nobody else, survive a
//! restart, and go on by themselves once somebody has mended the row.

use std::path::Path;

use crate::support::block_on;
use crate::support::http::Answer;
use crate::support::postgres::{TestDatabase, test_dir};
use crate::support::server::TestServer;
use crate::support::waiting::wait_until;
use crate::support::webhook::{Paid, SECRET, deliver};
use millrace::config::Config;
use millrace::pipeline::admin::audit::LIVE_CHECK;
use serde_json::{Value, json};

const ASYNC: &[(&str, &str)] = &[("Prefer", "respond-async")];

async fn accept(server: &TestServer, user: &str, sku: &str) -> String {
    let body = json!({ "user_id": user, "sku_id": sku });
    let answer = server.post(body, Some("k"), ASYNC).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.json()["order_id"].as_str().unwrap().to_owned()
}

async fn status(server: &TestServer, id: &str) -> String {
    let order = server.get(&format!("/v1/orders/{id}")).await.json();
    order["status"].as_str().unwrap_or_default().to_owned()
}

async fn until_number(admin: &tokio_postgres::Client, wanted: i64, query: &str) {
    wait_until(query, async || number(admin, query).await == wanted).await;
}

async fn number(admin: &tokio_postgres::Client, query: &str) -> i64 {
    admin.query_one(query, &[]).await.unwrap().get(0)
}

async fn start(database: &TestDatabase, journal: &Path, more: fn(&mut Config)) -> TestServer {
    TestServer::start(database, |config| {
        config.queue.journal.dir = journal.to_owned();
        more(config);
    })
    .await
}

async fn state(server: &TestServer, sku: &str) -> String {
    let sku = server.get(&format!("/v1/skus/{sku}")).await.json();
    sku["state"].as_str().unwrap_or_default().to_owned()
}

async fn cancel(server: &TestServer, id: &str) -> Answer {
    let target = format!("/v1/orders/{id}/cancel");
    crate::support::server::request(server.data, "POST", &target, &[], String::new()).await
}

const PARKED: &str = "SELECT count(*) FROM millrace.parked_orders";

/// Makes the database refuse any order of A: by its total, or by units that nobody holds.
const REFUSALS: [(&str, &str); 2] = [("total = 0", "total = 100"), ("held = total", "held = 0")];

#[test]
fn parked_orders_harm_nobody_else_survive_a_restart_and_go_on_once_the_row_is_mended() {
    block_on(async {
        for (broken, mended) in REFUSALS {
            let (database, dir) = (TestDatabase::create().await, test_dir());
            let admin = database.connect().await;
            let server = start(&database, dir.path(), |_| {}).await;
            server
                .put_sku("A", 100, json!({ "per_user_limit": 1 }))
                .await;
            server.put_sku("B", 100, Value::Null).await;
            let set = |what: &str| format!("UPDATE millrace.sku SET {what} WHERE sku_id = 'A'");
            admin.batch_execute(&set(broken)).await.unwrap();
            let mut ids = vec![accept(&server, "u-0", "A").await];
            until_number(&admin, 1, PARKED).await;

            // Its sale is paused, in words; others go on.
            assert_eq!(state(&server, "A").await, "paused");
            let refused = server.order("late", "A", None).await;
            assert_eq!(
                (refused.status, refused.code()),
                (409, "sale_paused".into())
            );
            assert_eq!(server.order("b-0", "B", None).await.status, 201);
            // The order stands as accepted, and its key and its unit are its own.
            assert_eq!(status(&server, &ids[0]).await, "accepted");
            let again = server.post(json!({ "user_id": "u-0", "sku_id": "A" }), Some("k"), ASYNC);
            let again = again.await;
            assert_eq!(
                (again.status, &again.json()["order_id"]),
                (200, &json!(ids[0]))
            );
            assert_eq!(server.stock("A").await, (99, 1, 0));
            let audit = server.control("GET", "/admin/v1/audit", Value::Null);
            let audit = audit.await.json();
            let checks = audit["checks"].as_array().cloned().unwrap_or_default();
            let live = checks.iter().find(|check| check["name"] == LIVE_CHECK);
            assert!(live.is_some_and(|check| check["ok"] == true), "{audit:#}");
            assert!(server.stop().await, "nothing is left to do");

            // As it was, after a restart.
            let server = start(&database, dir.path(), |_| {}).await;
            assert_eq!(state(&server, "A").await, "paused");
            let stock = server.stock("A").await;
            assert_eq!((stock.1, stock.2), (1, 0));
            assert_eq!(status(&server, &ids[0]).await, "accepted");
            let again = server.post(json!({ "user_id": "u-0", "sku_id": "A" }), Some("k"), ASYNC);
            assert_eq!(again.await.json()["order_id"], json!(ids[0]));
            assert_eq!(server.order("b-1", "B", None).await.status, 201);
            assert_eq!(number(&admin, PARKED).await, 1);

            admin.batch_execute(&set(mended)).await.unwrap();
            wait_until("its sale goes on", async || {
                state(&server, "A").await == "open"
            })
            .await;
            assert_eq!(status(&server, &ids[0]).await, "pending_payment");
            assert_eq!(number(&admin, PARKED).await, 0);
            assert_eq!(server.stock("A").await, (99, 1, 0));
            let limited = server.order("u-0", "A", Some("other")).await;
            assert_eq!(
                (limited.status, limited.code()),
                (409, "purchase_limit".into())
            );
            ids.push(accept(&server, "u-1", "A").await);
            wait_until("it is a row", async || {
                status(&server, &ids[1]).await == "pending_payment"
            })
            .await;
            assert_eq!(server.stock("A").await, (98, 2, 0));
            assert!(server.stop().await);
        }
    });
}

#[test]
fn who_waits_for_the_row_is_told_that_the_sale_is_paused_and_holds_nothing() {
    block_on(async {
        let (database, dir) = (TestDatabase::create().await, test_dir());
        let admin = database.connect().await;
        let server = start(&database, dir.path(), |_| {}).await;
        server.put_sku("A", 10, Value::Null).await;
        admin
            .batch_execute("UPDATE millrace.sku SET total = 0")
            .await
            .unwrap();
        let refused = server.order("u", "A", Some("k")).await;
        assert_eq!(
            (refused.status, refused.code()),
            (409, "sale_paused".into()),
            "{refused:?}"
        );
        assert_eq!(server.stock("A").await, (10, 0, 0));
        assert_eq!(number(&admin, PARKED).await, 0);
        admin
            .batch_execute("UPDATE millrace.sku SET total = 5")
            .await
            .unwrap();
        // With the total that whoever mended it has set; under the same key, afresh.
        wait_until("its sale goes on", async || {
            state(&server, "A").await == "open"
        })
        .await;
        assert_eq!(server.stock("A").await, (5, 0, 0));
        assert_eq!(server.order("u", "A", Some("k")).await.status, 201);
        assert!(server.stop().await);
    });
}

#[test]
fn parked_orders_are_cancelled_expire_and_are_paid_as_others_are() {
    block_on(async {
        let (database, dir) = (TestDatabase::create().await, test_dir());
        let admin = database.connect().await;
        let server = start(&database, dir.path(), |config| {
            config.orders.payment_ttl_ms = 4_000;
            config.payments.standard.secret.0 = vec![SECRET.to_owned()];
        })
        .await;
        server.put_sku("A", 100, Value::Null).await;
        // Refused only once all three are there.
        admin
            .batch_execute("BEGIN; UPDATE millrace.sku SET total = 0")
            .await
            .unwrap();
        let (cancelled, expired) = (
            accept(&server, "u-c", "A").await,
            accept(&server, "u-e", "A").await,
        );
        let paid_body = json!({ "user_id": "u-p", "sku_id": "A" });
        let paid = server.post(paid_body, Some("k"), ASYNC).await.json();
        let paid_id = paid["order_id"].as_str().unwrap().to_owned();
        admin.batch_execute("COMMIT").await.unwrap();
        until_number(&admin, 3, PARKED).await;
        let paid = Paid::of(&paid);
        let told = deliver(server.data, &paid.event, paid.body(), SECRET).await;
        assert!((200..300).contains(&told.status), "{told:?}");

        let answer = cancel(&server, &cancelled).await;
        assert_eq!(
            (answer.status, &answer.json()["status"]),
            (200, &json!("cancelled"))
        );
        assert_eq!(server.stock("A").await, (98, 2, 0));
        // Its time runs out though its counters are refused still; who has paid keeps the unit.
        wait_until("one has expired", async || {
            status(&server, &expired).await == "expired"
        })
        .await;
        until_number(&admin, 1, PARKED).await;
        assert_eq!(server.stock("A").await, (99, 1, 0));
        assert_eq!(status(&server, &paid_id).await, "accepted");
        assert_eq!(cancel(&server, &expired).await.status, 409);
        admin
            .batch_execute("UPDATE millrace.sku SET total = 100")
            .await
            .unwrap();
        wait_until("it is paid", async || {
            status(&server, &paid_id).await == "paid"
        })
        .await;
        assert_eq!(server.stock("A").await, (99, 0, 1));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_parked_order_that_is_cancelled_while_a_trigger_drops_its_row_stays_parked() {
    block_on(async {
        let database = TestDatabase::create().await;
        let admin = database.connect().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 10, Value::Null).await;
        let run = async |sql: &str| admin.batch_execute(sql).await.unwrap();
        run("UPDATE millrace.sku SET total = 0").await;
        let order = accept(&server, "u", "A").await;
        until_number(&admin, 1, PARKED).await;
        run("CREATE FUNCTION millrace.drop_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
             CREATE TRIGGER drop_it BEFORE INSERT ON millrace.orders FOR EACH ROW EXECUTE FUNCTION millrace.drop_it()")
            .await;
        let refused = cancel(&server, &order).await;
        assert!(refused.status >= 500, "{refused:?}");
        assert_eq!(number(&admin, PARKED).await, 1);
        run("DROP TRIGGER drop_it ON millrace.orders").await;
        let cancelled = cancel(&server, &order).await;
        assert_eq!(cancelled.json()["status"], "cancelled", "{cancelled:?}");
        run("UPDATE millrace.sku SET total = 10").await;
        wait_until("the sale goes on", async || {
            state(&server, "A").await == "open"
        })
        .await;
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}
