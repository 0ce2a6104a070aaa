//! Readiness is about progress: what `readyz`, the dashboard and the metrics say while orders wait, and
//! that nothing which others ask of the database holds up the leases, the orders or the answer.

use std::cell::Cell;

use crate::support::block_on;
use crate::support::postgres::TestDatabase;
use crate::support::server::TestServer;
use crate::support::waiting::wait_until;
use futures_util::future::join_all;
use serde_json::{Value, json};

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

/// Sessions of the database that wait for a lock.
async fn waiting_for_locks(watcher: &tokio_postgres::Client) -> i64 {
    let waiting = watcher.query_one(
        "SELECT count(*) FROM pg_stat_activity
          WHERE datname = current_database() AND wait_event_type = 'Lock'",
        &[],
    );
    waiting.await.expect("activity").get(0)
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
        assert_eq!(server.metric("millrace_stalled_seconds").await, 0.0);

        let mut blocker = database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        let locked = lock.query_one(
            "SELECT pg_backend_pid(), 'secret' FROM millrace.sku FOR UPDATE",
            &[],
        );
        let pid: i32 = locked.await.expect("lock").get(0);
        let undecided = server.order("u", "A", None).await;
        assert_eq!(undecided.json()["status"], "undecided", "{undecided:?}");
        wait_until("it is unready", async || {
            !check(&server, "progress").await.0
        })
        .await;
        let (_, detail) = check(&server, "progress").await;
        assert!(detail.contains("1 wait"), "{detail}");
        let named = format!("held up by session {pid} (");
        wait_until("the session is named", async || {
            check(&server, "progress").await.1.contains(&named)
        })
        .await;
        let (_, detail) = check(&server, "progress").await;
        assert!(detail.contains("idle in transaction, since "), "{detail}");
        assert!(
            detail.contains(&format!("pg_terminate_backend({pid})")),
            "{detail}"
        );
        assert!(
            detail.contains("SELECT pg_backend_pid) (") && !detail.contains("secret"),
            "of its statement no value: {detail}"
        );
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
        assert_eq!(server.metric("millrace_ready").await, 0.0);
        assert!(server.metric("millrace_stalled_seconds").await > 1.0);

        lock.rollback().await.expect("unlock");
        wait_until("it is ready again", async || {
            check(&server, "progress").await.0
        })
        .await;
        assert_eq!(server.metric("millrace_ready").await, 1.0);
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
            server.metric("millrace_orders_parked").await == 1.0
        })
        .await;
        // Its retries are over within moments, so nothing is stalled between them.
        wait_until("nothing is stalled", async || {
            server.metric("millrace_orders_parked").await == 1.0
                && server.metric("millrace_stalled_seconds").await == 0.0
        })
        .await;
        assert!(check(&server, "progress").await.0);
        operator
            .execute("UPDATE millrace.sku SET total = 10", &[])
            .await
            .expect("mend them");
        wait_until("the order is written", async || {
            server.metric("millrace_orders_parked").await == 0.0
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
        let answered = Cell::new(0);
        let operators = (0..12).map(async |_| {
            let answer = server.control("GET", "/admin/v1/dead-letters", Value::Null);
            let answer = answer.await;
            answered.set(answered.get() + 1);
            answer
        });
        let meanwhile = async {
            wait_until("every connection is taken", async || {
                waiting_for_locks(&watcher).await >= 4
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
            let waiting = waiting_for_locks(&watcher).await;
            assert!(waiting >= 4, "the operators' sessions: {waiting}");
            assert_eq!(answered.get(), 0, "operators wait all the while");
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
        let proxy = crate::support::proxy::Proxy::start(&database.config()).await;
        let config = database.config();
        let url = proxy.url(
            config.get_user().expect("a user"),
            config.get_dbname().expect("a database"),
        );
        let server = TestServer::start_at(url, |config| {
            // Long enough for an order on a busy machine.
            config.queue.journal.lease_ms = 3_000;
            config.database.step_timeout_ms = 1_500;
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

/// Whether `A` is paused in the database.
async fn stored_paused(client: &tokio_postgres::Client) -> bool {
    let row = client
        .query_one("SELECT paused FROM millrace.sku WHERE sku_id = 'A'", &[])
        .await
        .expect("the SKU");
    row.get(0)
}

#[test]
fn a_pause_is_in_force_at_once_and_stored_when_it_can_be() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.database.step_timeout_ms = 4_000;
        })
        .await;
        server.put_sku("A", 10, Value::Null).await;
        let mut blocker = database.connect().await;
        let watcher = database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        lock.execute("SELECT 1 FROM millrace.sku FOR UPDATE", &[])
            .await
            .expect("lock");
        // Another operator's change waits for the row, and holds up those that come behind it.
        let answered = Cell::new(false);
        let other = async {
            let body = json!({ "quantity": 5 });
            let answer = server.control("POST", "/admin/v1/skus/A/restock", body);
            let answer = answer.await;
            answered.set(true);
            answer
        };
        let emergency = async {
            wait_until("the other's change waits", async || {
                waiting_for_locks(&watcher).await > 0
            })
            .await;
            let pause = server.control("POST", "/admin/v1/skus/A/pause", Value::Null);
            let in_force = async {
                wait_until("it is in force", async || {
                    server.get("/v1/skus/A").await.json()["state"] == "paused"
                })
                .await;
                assert!(!answered.get(), "the other's change waits still");
                assert!(!stored_paused(&watcher).await, "the row is locked");
                assert_eq!(server.order("u", "A", None).await.code(), "sale_paused");
            };
            let (answer, ()) = tokio::join!(pause, in_force);
            // Only what is stored is called done.
            assert_eq!(
                (answer.status, answer.code()),
                (503, "not_stored".to_owned())
            );
            assert!(
                answer.json()["detail"].to_string().contains("IS paused"),
                "{answer:?}"
            );
            lock.rollback().await.expect("unlock");
            wait_until("it is stored", async || stored_paused(&watcher).await).await;
        };
        tokio::join!(other, emergency);
        let resumed = server
            .control("POST", "/admin/v1/skus/A/resume", Value::Null)
            .await;
        assert_eq!(
            (resumed.status, resumed.json()["state"].clone()),
            (200, json!("open"))
        );
        assert!(!stored_paused(&watcher).await);
        assert_eq!(server.order("u", "A", None).await.status, 201);
        assert!(server.stop().await);
    });
}

#[test]
fn of_pauses_and_resumes_at_once_memory_and_database_keep_the_same_one() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 10, Value::Null).await;
        let client = database.connect().await;
        for round in 0..20 {
            let calls = (0..6).map(|call| {
                let word = if (round + call) % 2 == 0 {
                    "pause"
                } else {
                    "resume"
                };
                let server = &server;
                async move {
                    let (one, every) = (
                        format!("/admin/v1/skus/A/{word}"),
                        format!("/admin/v1/{word}"),
                    );
                    let sku = server.control("POST", &one, Value::Null);
                    let all = server.control("POST", &every, Value::Null);
                    let (sku, all) = tokio::join!(sku, all);
                    assert_eq!((sku.status, all.status), (200, 200));
                }
            });
            join_all(calls).await;
            let listed = server
                .control("GET", "/admin/v1/skus", Value::Null)
                .await
                .json();
            let all = client
                .query_one("SELECT paused FROM millrace.node", &[])
                .await;
            let all: bool = all.expect("the node").get(0);
            assert_eq!(listed["paused"], all, "{listed}");
            let paused = all || stored_paused(&client).await;
            assert_eq!(listed["skus"][0]["state"] == "paused", paused, "{listed}");
        }
        assert!(server.stop().await);
    });
}

#[test]
fn a_sale_whose_counters_are_refused_is_not_resumed_until_they_are_taken() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 10, Value::Null).await;
        let operator = database.connect().await;
        let set_total = async |total: i64| {
            let sql = format!("UPDATE millrace.sku SET total = {total}");
            operator.batch_execute(&sql).await.expect("set the total");
        };
        set_total(0).await;
        let body = json!({ "user_id": "u", "sku_id": "A" });
        let accepted = server
            .post(body, None, &[("Prefer", "respond-async")])
            .await;
        assert_eq!(accepted.status, 202);
        wait_until("the order is parked", async || {
            server.metric("millrace_orders_parked").await == 1.0
        })
        .await;
        let resume = async || {
            server
                .control("POST", "/admin/v1/skus/A/resume", Value::Null)
                .await
        };
        let refused = resume().await;
        assert_eq!(
            (refused.status, refused.code()),
            (409, "counters_refused".to_owned())
        );
        let detail = refused.json()["detail"].to_string();
        assert!(
            detail.contains("1 acknowledged orders are parked"),
            "{detail}"
        );
        assert!(detail.contains("refuses the counters of A"), "{detail}");
        set_total(10).await;
        // It is tried by the call itself: no pause until the next attempt.
        let resumed = resume().await;
        assert_eq!(
            (resumed.status, resumed.json()["state"].clone()),
            (200, json!("open"))
        );
        let target = format!(
            "/v1/orders/{}",
            accepted.json()["order_id"].as_str().expect("an id")
        );
        assert_eq!(
            server.get(&target).await.json()["status"],
            "pending_payment"
        );
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_resumed_sale_has_the_total_that_its_row_has() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 10, Value::Null).await;
        let operator = database.connect().await;
        for total in [4, 10] {
            let edit = format!("UPDATE millrace.sku SET total = {total}");
            operator.batch_execute(&edit).await.expect("edit");
            let resumed = server
                .control("POST", "/admin/v1/skus/A/resume", Value::Null)
                .await;
            let told = (resumed.status, resumed.json()["total"].clone());
            assert_eq!(told, (200, json!(total)));
        }
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}
