//! The rest of the contract over HTTP: cancelling, batches, lists, restocking, dead letters, sticky
//! refusals, rate limits.

use crate::support::block_on;
use crate::support::http::Answer;
use crate::support::postgres::TestDatabase;
use crate::support::server::{TestServer, request};
use serde_json::{Value, json};

async fn post_raw(server: &TestServer, target: &str, media_type: &str, body: &str) -> Answer {
    request(
        server.data,
        "POST",
        target,
        &[("Content-Type", media_type)],
        body.to_owned(),
    )
    .await
}

fn lines(answer: &Answer) -> Vec<Value> {
    let text = String::from_utf8(answer.body.clone()).expect("text");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a JSON object a line"))
        .collect()
}

#[test]
fn cancelling_gives_the_units_back_once_in_memory_and_database() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 3, json!({ "per_user_limit": 1 })).await;
        let order = server.order("u", "A", Some("k")).await.json();
        let cancel = format!(
            "/v1/orders/{}/cancel",
            order["order_id"].as_str().expect("an id")
        );
        let answer = post_raw(&server, &cancel, "application/json", "").await;
        assert_eq!(
            (answer.status, answer.json()["status"].as_str()),
            (200, Some("cancelled"))
        );
        let again = post_raw(&server, &cancel, "application/json", "").await;
        assert_eq!((again.status, again.json()), (200, answer.json()));
        assert_eq!(server.stock("A").await, (3, 0, 0));
        // The limit is free again, the key still means the cancelled order.
        assert_eq!(
            server.order("u", "A", Some("k")).await.json()["status"],
            "cancelled"
        );
        assert_eq!(server.order("u", "A", Some("k2")).await.status, 201);

        let rows = database.connect().await;
        rows.execute(
            "UPDATE millrace.orders SET status = 2 WHERE status = 1",
            &[],
        )
        .await
        .expect("pay by hand");
        rows.execute("UPDATE millrace.sku SET held = 0, sold = 1", &[])
            .await
            .expect("by hand");
        let paid = server.order("u", "A", Some("k2")).await.json();
        let cancel = format!(
            "/v1/orders/{}/cancel",
            paid["order_id"].as_str().expect("an id")
        );
        let refused = post_raw(&server, &cancel, "application/json", "").await;
        assert_eq!(
            (refused.status, refused.code()),
            (409, "not_cancellable".to_owned())
        );
        let unknown = post_raw(&server, "/v1/orders/17/cancel", "application/json", "").await;
        assert_eq!(
            (unknown.status, unknown.code()),
            (404, "unknown_order".to_owned())
        );
        assert!(server.stop().await);
    });
}

#[test]
fn cancelling_at_once_from_many_sides_gives_back_once() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 20, Value::Null).await;
        for round in 0..10 {
            let order = server
                .order("u", "A", Some(&format!("k-{round}")))
                .await
                .json();
            let cancel = format!(
                "/v1/orders/{}/cancel",
                order["order_id"].as_str().expect("an id")
            );
            let answers = futures_util::future::join_all(
                (0..8).map(|_| post_raw(&server, &cancel, "application/json", "")),
            )
            .await;
            assert!(
                answers.iter().all(|answer| answer.status == 200),
                "{answers:?}"
            );
        }
        assert_eq!(server.stock("A").await, (20, 0, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_batch_has_one_verdict_a_line_and_a_bad_line_spoils_no_other() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 3, Value::Null).await;
        let batch = [
            r#"{"user_id":"u1","sku_id":"A","idempotency_key":"k"}"#,
            r#"{"user_id":"u1","sku_id":"A","idempotency_key":"k"}"#,
            r#"{"user_id":"u1","sku_id":"A","quantity":2,"idempotency_key":"k"}"#,
            "nonsense",
            r#"{"user_id":"u2","sku_id":"A","quantity":2}"#,
            r#"{"user_id":"u3","sku_id":"A"}"#,
            r#"{"user_id":"u4","sku_id":"B"}"#,
            "",
            r#"{"user_id":"u4","sku_id":"A","idempotency_key":"a b"}"#,
        ]
        .join("\n");
        let answer = post_raw(
            &server,
            "/v1/orders:batch",
            "application/x-ndjson",
            &format!("{batch}\n"),
        )
        .await;
        assert_eq!(
            (answer.status, answer.field("content-type")),
            (200, Some("application/x-ndjson"))
        );
        let verdicts = lines(&answer);
        let seen: Vec<(u64, Option<&str>)> = verdicts
            .iter()
            .map(|verdict| {
                (
                    verdict["http_status"].as_u64().expect("a status"),
                    verdict["code"].as_str(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                (201, None),
                (200, None),
                (422, Some("idempotency_key_reused")),
                (400, Some("malformed_json")),
                (201, None),
                (409, Some("sold_out")),
                (404, Some("unknown_sku")),
                (400, Some("malformed_json")),
                (400, Some("invalid_idempotency_key")),
            ]
        );
        assert_eq!(verdicts[0]["order_id"], verdicts[1]["order_id"]);
        assert_eq!(verdicts[4]["status"], "pending_payment");
        assert_eq!(server.stock("A").await, (0, 3, 0));

        let many = r#"{"user_id":"u","sku_id":"A"}"#.to_owned() + "\n";
        let too_many = post_raw(
            &server,
            "/v1/orders:batch",
            "application/x-ndjson",
            &many.repeat(1_001),
        )
        .await;
        assert_eq!(too_many.status, 413);
        assert_eq!(
            lines(
                &post_raw(
                    &server,
                    "/v1/orders:batch",
                    "application/x-ndjson",
                    &many.repeat(1_000)
                )
                .await
            )
            .len(),
            1_000
        );
        assert_eq!(
            post_raw(&server, "/v1/orders:batch", "application/x-ndjson", "")
                .await
                .status,
            400
        );
        assert_eq!(
            post_raw(&server, "/v1/orders:batch", "text/plain", &many)
                .await
                .status,
            415
        );
        let alone = post_raw(
            &server,
            "/v1/orders",
            "application/json",
            r#"{"user_id":"u","sku_id":"A","idempotency_key":"k"}"#,
        );
        assert_eq!(alone.await.code(), "unknown_field");
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_users_orders_come_newest_first_in_pages() {
    block_on(async {
        for user_index in [false, true] {
            let database = TestDatabase::create().await;
            let server =
                TestServer::start(&database, |config| config.database.user_index = user_index)
                    .await;
            server.put_sku("A", 100, Value::Null).await;
            let mut placed = Vec::new();
            for _ in 0..5 {
                placed.push(server.order("u/1", "A", None).await.json()["order_id"].clone());
            }
            server.order("other", "A", None).await;
            placed.reverse();
            let page = server.get("/v1/users/u%2F1/orders?limit=3").await.json();
            let ids = |page: &Value| -> Vec<Value> {
                page["orders"]
                    .as_array()
                    .expect("a list")
                    .iter()
                    .map(|order| order["order_id"].clone())
                    .collect()
            };
            assert_eq!(ids(&page), placed[..3]);
            let before = page["next_before"].as_str().expect("more to come");
            let page = server
                .get(&format!("/v1/users/u%2F1/orders?limit=3&before={before}"))
                .await
                .json();
            assert_eq!(ids(&page), placed[3..]);
            assert_eq!(page["next_before"], Value::Null);
            assert_eq!(
                server.get("/v1/users/nobody/orders").await.json()["orders"],
                json!([])
            );
            for bad in ["limit=0", "limit=101", "limit=x", "before=x"] {
                assert_eq!(
                    server
                        .get(&format!("/v1/users/u/orders?{bad}"))
                        .await
                        .code(),
                    "invalid_field",
                    "{bad}"
                );
            }
            assert!(server.stop().await);
        }
    });
}

#[test]
fn what_was_sold_out_stays_so_under_its_key_and_other_refusals_do_not() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 1, json!({ "per_user_limit": 1 })).await;
        assert_eq!(server.order("u", "A", Some("k")).await.status, 201);
        assert_eq!(server.order("v", "A", Some("k")).await.code(), "sold_out");
        assert_eq!(
            server.order("u", "A", Some("k2")).await.code(),
            "purchase_limit"
        );
        server.put_sku("A", 10, Value::Null).await;
        assert_eq!(
            server.order("v", "A", Some("k")).await.code(),
            "sold_out",
            "sticky"
        );
        assert_eq!(
            server.order("u", "A", Some("k2")).await.code(),
            "purchase_limit",
            "sticky"
        );
        let other_body = json!({ "user_id": "v", "sku_id": "A", "quantity": 2 });
        assert_eq!(
            server.post(other_body, Some("k"), &[]).await.code(),
            "idempotency_key_reused"
        );
        assert_eq!(server.order("v", "A", Some("k3")).await.status, 201);
        server
            .control("POST", "/admin/v1/skus/A/pause", Value::Null)
            .await;
        assert_eq!(
            server.order("w", "A", Some("k")).await.code(),
            "sale_paused"
        );
        server
            .control("POST", "/admin/v1/skus/A/resume", Value::Null)
            .await;
        assert_eq!(
            server.order("w", "A", Some("k")).await.status,
            201,
            "judged afresh"
        );
        assert!(server.stop().await);
    });
}

#[test]
fn restocking_is_carried_out_once_for_each_key_over_restarts() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 2, Value::Null).await;
        let restock = async |server: &TestServer, quantity: i64, key: &str| {
            let body = json!({ "quantity": quantity }).to_string();
            let fields = [("Idempotency-Key", key)];
            request(
                server.control,
                "POST",
                "/admin/v1/skus/A/restock",
                &fields,
                body,
            )
            .await
        };
        let answer = restock(&server, 5, "r1").await;
        assert_eq!(
            (answer.status, answer.json()["total"].as_u64()),
            (200, Some(7))
        );
        let again = restock(&server, 5, "r1").await;
        assert_eq!(
            (
                again.json()["total"].as_u64(),
                again.field("idempotency-replayed")
            ),
            (Some(7), Some("true"))
        );
        assert_eq!(
            restock(&server, 6, "r1").await.code(),
            "idempotency_key_reused"
        );
        assert_eq!(restock(&server, -4, "r2").await.json()["total"], 3);
        assert_eq!(server.order("u", "A", None).await.status, 201);
        assert_eq!(
            restock(&server, -3, "r3").await.code(),
            "total_below_committed"
        );
        assert_eq!(restock(&server, -4, "r4").await.code(), "invalid_field");
        assert_eq!(restock(&server, 0, "r5").await.code(), "invalid_field");
        server.assert_audit().await;
        assert!(server.stop().await);
        let server = TestServer::start(&database, |_| {}).await;
        let after = restock(&server, 5, "r1").await;
        assert_eq!(
            (
                after.json()["total"].as_u64(),
                after.field("idempotency-replayed")
            ),
            (Some(3), Some("true"))
        );
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_dead_letter_can_be_inspected_retried_and_discarded_each_with_its_effect_on_stock() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 2, Value::Null).await;
        let rows = database.connect().await;
        let forbid =
            "ALTER TABLE millrace.orders ADD CONSTRAINT no_mallory CHECK (user_id <> 'mallory')";
        rows.batch_execute(forbid).await.expect("a rule");
        let refused = server.order("mallory", "A", Some("k")).await;
        assert_eq!(
            (refused.status, refused.code()),
            (500, "internal".to_owned())
        );
        assert_eq!(server.stock("A").await, (2, 0, 0));
        assert_eq!(
            server.order("mallory", "A", Some("k")).await.json()["status"],
            "failed"
        );

        let list = server
            .control("GET", "/admin/v1/dead-letters", Value::Null)
            .await
            .json();
        let letter = &list["dead_letters"][0];
        assert_eq!(
            (letter["user_id"].as_str(), letter["sqlstate"].as_str()),
            (Some("mallory"), Some("23514"))
        );
        assert!(
            letter["reason"]
                .as_str()
                .expect("words")
                .contains("no_mallory")
        );
        let path = format!("/admin/v1/dead-letters/{}", letter["id"]);
        assert_eq!(
            server.control("GET", &path, Value::Null).await.json(),
            *letter
        );
        let retried = server
            .control("POST", &format!("{path}/retry"), Value::Null)
            .await;
        assert_eq!(
            (retried.status, retried.code()),
            (409, "refused_again".to_owned())
        );
        assert_eq!(server.stock("A").await, (2, 0, 0));

        rows.batch_execute("ALTER TABLE millrace.orders DROP CONSTRAINT no_mallory")
            .await
            .expect("mended");
        let retried = server
            .control("POST", &format!("{path}/retry"), Value::Null)
            .await;
        assert_eq!(
            (retried.status, retried.json()["order_id"].clone()),
            (200, letter["order_id"].clone())
        );
        assert_eq!(server.stock("A").await, (1, 1, 0));
        assert_eq!(
            server.order("mallory", "A", Some("k")).await.json()["status"],
            "pending_payment"
        );
        assert_eq!(
            server
                .control("POST", &format!("{path}/retry"), Value::Null)
                .await
                .status,
            404
        );
        server.assert_audit().await;

        rows.batch_execute(&format!("{forbid} NOT VALID"))
            .await
            .expect("a rule for new rows");
        assert_eq!(server.order("mallory", "A", Some("k2")).await.status, 500);
        let list = server
            .control("GET", "/admin/v1/dead-letters", Value::Null)
            .await
            .json();
        let path = format!("/admin/v1/dead-letters/{}", list["dead_letters"][0]["id"]);
        let discarded = server
            .control(
                "POST",
                &format!("{path}/discard"),
                json!({ "note": "a bot" }),
            )
            .await;
        assert_eq!(
            (discarded.status, discarded.json()["note"].as_str()),
            (200, Some("a bot"))
        );
        let list = server
            .control("GET", "/admin/v1/dead-letters", Value::Null)
            .await
            .json();
        assert_eq!(list["dead_letters"], json!([]));
        let all = server
            .control("GET", "/admin/v1/dead-letters?discarded=true", Value::Null)
            .await
            .json();
        assert_eq!(all["dead_letters"].as_array().map(Vec::len), Some(1));
        assert_eq!(
            server.order("mallory", "A", Some("k2")).await.json()["status"],
            "failed"
        );
        assert_eq!(server.stock("A").await, (1, 1, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn rates_are_limited_for_each_user_and_over_all() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.rate_limit.per_user = "2/min".to_owned().try_into().expect("a rate");
            config.rate_limit.overall = "5/min".to_owned().try_into().expect("a rate");
        })
        .await;
        server.put_sku("A", 100, Value::Null).await;
        assert_eq!(server.order("u", "A", None).await.status, 201);
        assert_eq!(server.order("u", "A", None).await.status, 201);
        let limited = server.order("u", "A", None).await;
        assert_eq!(
            (limited.status, limited.code()),
            (429, "rate_limited".to_owned())
        );
        let seconds: u64 = limited
            .field("retry-after")
            .and_then(|text| text.parse().ok())
            .expect("Retry-After");
        assert!((1..=60).contains(&seconds));
        for user in ["v", "w", "x"] {
            assert_eq!(server.order(user, "A", None).await.status, 201);
        }
        assert_eq!(server.order("y", "A", None).await.status, 429);
        assert_eq!(server.stock("A").await, (95, 5, 0));
        assert!(server.stop().await);
    });
}
