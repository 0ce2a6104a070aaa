//! The journal as a client sees it: acknowledged orders, duplicates, backlog, recovery, limits.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::block_on;
use support::http::Answer;
use support::postgres::{TestDatabase, test_dir};
use support::server::TestServer;

const PATIENCE: Duration = Duration::from_secs(30);

async fn accept(server: &TestServer, user: &str, key: &str) -> Answer {
    server
        .post(
            json!({ "user_id": user, "sku_id": "A", "attributes": { "a": user } }),
            Some(key),
            &[("Prefer", "respond-async")],
        )
        .await
}

async fn until_status(server: &TestServer, id: &str, status: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let order = server.get(&format!("/v1/orders/{id}")).await.json();
        if order["status"] == status {
            return;
        }
        assert!(Instant::now() < deadline, "not {status} in time: {order}");
    }
}

#[test]
fn an_order_is_acknowledged_once_it_is_durable_and_becomes_a_row() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 10, Value::Null).await;
        let answer = accept(&server, "u-1", "k").await;
        assert_eq!(answer.status, 202, "{answer:?}");
        assert_eq!(answer.field("preference-applied"), Some("respond-async"));
        let order = answer.json();
        assert_eq!(order["status"], "accepted");
        assert!(order["estimated_wait_ms"].is_u64(), "{order}");
        let id = order["order_id"].as_str().unwrap();
        assert_eq!(answer.field("location"), Some(&*format!("/v1/orders/{id}")));
        until_status(&server, id, "pending_payment").await;
        let again = accept(&server, "u-1", "k").await;
        assert_eq!(again.status, 200, "{again:?}");
        assert_eq!(again.field("idempotency-replayed"), Some("true"));
        assert_eq!(again.json()["order_id"], order["order_id"]);
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn what_does_not_fit_in_memory_waits_on_the_disk_and_is_written_when_the_database_is_back() {
    block_on(async {
        let database = TestDatabase::create().await;
        let dir = test_dir();
        let server = TestServer::start(&database, |config| {
            config.queue.capacity = 64;
            config.queue.journal.dir = dir.path().join("journal");
            config.database.step_timeout_ms = 1_000;
        })
        .await;
        server.put_sku("A", 5_000, Value::Null).await;
        let admin = database.connect().await;
        admin
            .batch_execute("BEGIN; LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        let mut ids = Vec::new();
        for number in 0..3 {
            let lines: Vec<String> = (0..300)
                .map(|line| {
                    let user = format!("u-{number}-{line}");
                    json!({ "user_id": user, "sku_id": "A", "idempotency_key": "k" }).to_string()
                })
                .collect();
            // More than the appender takes at once is refused, and that is said.
            let answer = support::server::request(
                server.data,
                "POST",
                "/v1/orders:batch",
                &[
                    ("Content-Type", "application/x-ndjson"),
                    ("Prefer", "respond-async"),
                ],
                lines.join("\n"),
            )
            .await;
            assert_eq!(answer.status, 200, "{answer:?}");
            for line in String::from_utf8_lossy(&answer.body).lines() {
                let line: Value = serde_json::from_str(line).unwrap();
                match line["http_status"].as_u64() {
                    Some(202) => ids.push(line["order_id"].as_str().unwrap().to_owned()),
                    Some(503) => {}
                    _ => panic!("{line}"),
                }
            }
        }
        let one = accept(&server, "u-late", "k").await;
        assert_eq!(one.status, 202, "{one:?}");
        let late = one.json()["order_id"].as_str().unwrap().to_owned();
        ids.push(late.clone());
        assert!(ids.len() > 150, "only {} accepted", ids.len());
        // The newest waits on the disk, and is found there.
        let found = server.get(&format!("/v1/orders/{late}")).await.json();
        assert_eq!(found["status"], "accepted", "{found}");
        let again = accept(&server, "u-late", "k").await;
        assert_eq!(
            (again.status, &again.json()["order_id"]),
            (200, &json!(late))
        );
        let list = server.get("/v1/users/u-late/orders").await.json();
        assert_eq!(list["orders"][0]["status"], "accepted", "{list}");
        admin.batch_execute("COMMIT").await.unwrap();
        for id in &ids {
            until_status(&server, id, "pending_payment").await;
        }
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}
