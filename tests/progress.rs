//! Readiness is about progress: what `readyz`, the dashboard and the metrics say while orders wait, and
//! that nothing which others ask of the database holds up the leases, the orders or the answer.

mod support;

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};
use support::block_on;
use support::postgres::TestDatabase;
use support::server::TestServer;

async fn wait_until(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A check of `readyz` by its name: whether it holds, and its detail.
async fn check(server: &TestServer, name: &str) -> (bool, String) {
    let answer = server.control("GET", "/readyz", Value::Null).await;
    let ready = answer.json();
    assert_eq!(answer.status == 200, ready["ready"] == true, "{ready}");
    let checks = ready["checks"].as_array().expect("checks");
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.unwrap_or_else(|| panic!("no check {name}: {ready}"));
    assert!(ready["ready"] == false || check["ok"] == true, "{ready}");
    let detail = check["detail"].as_str().expect("a detail").to_owned();
    (check["ok"] == true, detail)
}

async fn metric(server: &TestServer, name: &str) -> f64 {
    let text = server.control("GET", "/metrics", Value::Null).await.body;
    let text = String::from_utf8(text).expect("text");
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.unwrap_or_else(|| panic!("no metric {name}"));
    value.parse().expect("a number")
}

#[test]
fn orders_that_wait_while_none_is_written_make_it_unready_until_one_is() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| config.orders.timeout_ms = 1_000).await;
        server.put_sku("A", 10, Value::Null).await;
        assert_eq!(server.order("first", "A", None).await.status, 201);
        assert!(
            check(&server, "progress").await.0,
            "an idle service is fine"
        );
        assert_eq!(metric(&server, "millrace_stalled_seconds").await, 0.0);

        let mut blocker = database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        lock.execute("SELECT 1 FROM millrace.sku FOR UPDATE", &[])
            .await
            .expect("lock");
        let undecided = server.order("u", "A", None).await;
        assert_eq!(undecided.json()["status"], "undecided", "{undecided:?}");
        wait_until("it is unready", async || {
            !check(&server, "progress").await.0
        })
        .await;
        let (_, detail) = check(&server, "progress").await;
        assert!(detail.contains("1 wait"), "{detail}");
        assert!(
            check(&server, "database").await.0,
            "which answers all the while"
        );
        let live = server.control("GET", "/admin/v1/live", Value::Null).await;
        let live = live.json();
        assert_eq!(live["state"], "not_ready", "{live}");
        let reason = live["reason"].as_str().unwrap_or_default();
        assert!(
            reason.starts_with("progress: no order was written"),
            "{live}"
        );
        assert_eq!(metric(&server, "millrace_ready").await, 0.0);
        assert!(metric(&server, "millrace_stalled_seconds").await > 1.0);

        lock.rollback().await.expect("unlock");
        wait_until("it is ready again", async || {
            check(&server, "progress").await.0
        })
        .await;
        assert_eq!(metric(&server, "millrace_ready").await, 1.0);
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn orders_of_a_sku_that_waits_for_a_person_are_no_stall() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| config.orders.timeout_ms = 1_000).await;
        server.put_sku("A", 10, Value::Null).await;
        let operator = database.connect().await;
        operator
            .execute("UPDATE millrace.sku SET total = 0", &[])
            .await
            .expect("break the counters");
        let body = json!({ "user_id": "u", "sku_id": "A" });
        let fields = [("Prefer", "respond-async")];
        assert_eq!(server.post(body, None, &fields).await.status, 202);
        wait_until("the order is parked", async || {
            metric(&server, "millrace_orders_parked").await == 1.0
        })
        .await;
        // Its retries are over within moments, so nothing is stalled between them.
        wait_until("nothing is stalled", async || {
            metric(&server, "millrace_orders_parked").await == 1.0
                && metric(&server, "millrace_stalled_seconds").await == 0.0
        })
        .await;
        assert!(check(&server, "progress").await.0);
        operator
            .execute("UPDATE millrace.sku SET total = 10", &[])
            .await
            .expect("mend them");
        wait_until("the order is written", async || {
            metric(&server, "millrace_orders_parked").await == 0.0
        })
        .await;
        assert!(server.stop().await);
    });
}

/// Ends by itself before the leases of a second are over, unless they are renewed.
#[test]
fn operators_who_take_every_connection_hold_up_neither_leases_nor_orders_nor_readyz() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.queue.journal.lease_ms = 1_000;
            config.database.step_timeout_ms = 30_000;
        })
        .await;
        server.put_sku("A", 100, Value::Null).await;
        let mut blocker = database.connect().await;
        let watcher = database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        lock.batch_execute("LOCK TABLE millrace.dead_letters IN ACCESS EXCLUSIVE MODE")
            .await
            .expect("lock");
        let operators =
            (0..12).map(|_| server.control("GET", "/admin/v1/dead-letters", Value::Null));
        let meanwhile = async {
            wait_until("every connection is taken", async || {
                let row = watcher
                    .query_one(
                        "SELECT count(*) FROM pg_stat_activity
                          WHERE datname = current_database() AND wait_event_type = 'Lock'",
                        &[],
                    )
                    .await
                    .expect("activity");
                row.get::<_, i64>(0) >= 4
            })
            .await;
            // Three times what the leases last, by the database's clock.
            let renewed = async || {
                let row = watcher
                    .query_one(
                        "SELECT extract(epoch FROM lease_until)::float8 FROM millrace.node",
                        &[],
                    )
                    .await
                    .expect("the lease");
                row.get::<_, f64>(0)
            };
            let begun = renewed().await;
            wait_until("the leases go on", async || renewed().await > begun + 3.0).await;
            assert_eq!(server.order("waits", "A", None).await.status, 201);
            let body = json!({ "user_id": "async", "sku_id": "A" });
            let accepted = server
                .post(body, None, &[("Prefer", "respond-async")])
                .await;
            assert_eq!(accepted.status, 202, "{accepted:?}");
            for name in ["intake", "progress", "journal", "database"] {
                let (ok, detail) = check(&server, name).await;
                assert!(ok, "{name}: {detail}");
            }
            lock.rollback().await.expect("unlock");
        };
        let (answers, ()) = tokio::join!(join_all(operators), meanwhile);
        assert!(answers.iter().all(|answer| answer.status == 200));
        assert!(server.stop().await);
    });
}

#[test]
fn a_process_that_may_acknowledge_no_more_calls_nothing_accepted() {
    block_on(async {
        let database = TestDatabase::create().await;
        let proxy = support::proxy::Proxy::start(&database.config()).await;
        let config = database.config();
        let url = proxy.url(
            config.get_user().expect("a user"),
            config.get_dbname().expect("a database"),
        );
        let server = TestServer::start_at(url, |config| {
            config.queue.journal.lease_ms = 1_000;
            config.database.step_timeout_ms = 500;
        })
        .await;
        server.put_sku("A", 100, Value::Null).await;
        proxy.freeze(true);
        let send = async || {
            let body = json!({ "user_id": "u", "sku_id": "A" });
            server
                .post(body, Some("k"), &[("Prefer", "respond-async")])
                .await
        };
        let accepted = send().await;
        assert_eq!(
            (accepted.status, accepted.json()["status"].clone()),
            (202, json!("accepted"))
        );
        wait_until("the right is over", async || {
            !check(&server, "journal").await.0
        })
        .await;
        // The journal may have been given up by now, and the order with it.
        let again = send().await;
        assert_eq!(
            (again.status, again.json()["status"].clone()),
            (202, json!("undecided"))
        );
        assert_eq!(again.json()["order_id"], accepted.json()["order_id"]);
        wait_until("the database is seen to be silent", async || {
            !check(&server, "database").await.0
        })
        .await;
        proxy.freeze(false);
        wait_until("the order is written", async || {
            send().await.json()["status"] == "pending_payment"
        })
        .await;
        wait_until("it is ready", async || {
            server.control("GET", "/readyz", Value::Null).await.status == 200
        })
        .await;
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}
