//! A whole Millrace over HTTP, on a real PostgreSQL: what a shop's backend and an operator see.

use std::time::{Duration, Instant};

use crate::support::block_on;
use crate::support::http::{Answer, Connection};
use crate::support::postgres::TestDatabase;
use crate::support::server::{TestServer, request};
use crate::support::waiting::wait_until;
use futures_util::future::join_all;
use millrace::config::{Config, Engine};
use millrace::order::OrderId;
use millrace::state::buyers::Eviction;
use serde_json::{Value, json};

#[test]
fn a_waiting_order_is_created_once_its_row_is_there() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server
            .put_sku("A", 5, json!({ "unit_price": 199_900, "currency": "CNY" }))
            .await;
        let body = json!({
            "user_id": "u-42", "sku_id": "A", "quantity": 2, "adjustment": -100,
            "attributes": { "address_id": "a-7" },
        });
        let answer = server.post(body, Some("k1"), &[]).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        let order = answer.json();
        let id = order["order_id"].as_str().expect("a string").to_owned();
        assert_eq!(
            answer.field("location"),
            Some(format!("/v1/orders/{id}").as_str())
        );
        assert_eq!(order["amount"], 399_700);
        assert_eq!(order["currency"], "CNY");
        assert_eq!(order["status"], "pending_payment");
        assert_eq!(order["attributes"], json!({ "address_id": "a-7" }));

        let row = database
            .connect()
            .await
            .query_one(
                "SELECT user_id, sku_id, quantity, amount, currency, status FROM millrace.order_list WHERE order_id = $1",
                &[&id.parse::<i64>().expect("an integer")],
            )
            .await
            .expect("exactly one row");
        assert_eq!(row.get::<_, &str>(0), "u-42");
        assert_eq!(row.get::<_, &str>(1), "A");
        assert_eq!(row.get::<_, i32>(2), 2);
        assert_eq!(row.get::<_, i64>(3), 399_700);
        assert_eq!(row.get::<_, &str>(4), "CNY");
        assert_eq!(row.get::<_, &str>(5), "pending_payment");

        let asked = server.get(&format!("/v1/orders/{id}")).await;
        assert_eq!((asked.status, asked.json()), (200, order));
        assert_eq!(server.stock("A").await, (3, 2, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn every_refusal_has_its_status_and_code_and_holds_nothing() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server =
            TestServer::start(&database, |config| config.data_plane.body_bytes_max = 2_048).await;
        server
            .put_sku("ONE", 1, json!({ "per_user_limit": 1 }))
            .await;
        server
            .put_sku(
                "SOON",
                1,
                json!({ "opens_at": "2100-01-01T00:00:00+08:00" }),
            )
            .await;
        server
            .put_sku("OVER", 1, json!({ "closes_at": "2020-01-01T00:00:00Z" }))
            .await;
        server.put_sku("PAUSED", 1, Value::Null).await;
        let paused = server
            .control("POST", "/admin/v1/skus/PAUSED/pause", Value::Null)
            .await;
        assert_eq!(
            (paused.status, paused.json()["state"].as_str()),
            (200, Some("paused"))
        );

        let refused = async |body: Value, key: Option<&str>| {
            let answer = server.post(body, key, &[]).await;
            assert_eq!(
                answer.field("content-type"),
                Some("application/problem+json")
            );
            let problem = answer.json();
            assert_eq!(problem["status"], answer.status);
            (answer.status, answer.code())
        };
        let order = |user: &str, sku: &str| json!({ "user_id": user, "sku_id": sku });
        let is = |status: u16, code: &str| (status, code.to_owned());
        assert_eq!(
            refused(order("u", "NONE"), None).await,
            is(404, "unknown_sku")
        );
        assert_eq!(
            refused(order("u", "SOON"), None).await,
            is(409, "sale_not_open")
        );
        assert_eq!(
            refused(order("u", "OVER"), None).await,
            is(409, "sale_closed")
        );
        assert_eq!(
            refused(order("u", "PAUSED"), None).await,
            is(409, "sale_paused")
        );
        assert_eq!(
            refused(
                json!({ "user_id": "u", "sku_id": "ONE", "quantity": 2 }),
                None
            )
            .await,
            is(409, "purchase_limit")
        );
        assert_eq!(
            refused(
                json!({ "user_id": "u", "sku_id": "ONE", "adjustment": -101 }),
                None
            )
            .await,
            is(400, "invalid_field")
        );
        assert_eq!(server.order("u", "ONE", Some("k")).await.status, 201);
        assert_eq!(
            refused(order("u", "ONE"), Some("k2")).await,
            is(409, "purchase_limit")
        );
        assert_eq!(refused(order("v", "ONE"), None).await, is(409, "sold_out"));
        let sold_out = server.order("v", "ONE", None).await.json();
        assert_eq!(sold_out["available"], 0);
        assert_eq!(
            refused(
                json!({ "user_id": "u", "sku_id": "ONE", "adjustment": 1 }),
                Some("k")
            )
            .await,
            is(422, "idempotency_key_reused")
        );
        assert_eq!(
            refused(order("u", "ONE"), Some("a b")).await,
            is(400, "invalid_idempotency_key")
        );
        let long = "k".repeat(65);
        assert_eq!(
            refused(order("u", "ONE"), Some(&long)).await,
            is(400, "invalid_idempotency_key")
        );

        let data = server.data;
        let raw = async |method: &str, target: &str, fields: &[(&str, &str)], body: &str| {
            let answer = request(data, method, target, fields, body.to_owned()).await;
            (answer.status, answer.code())
        };
        let as_json = ("Content-Type", "application/json");
        assert_eq!(
            raw("POST", "/v1/orders", &[as_json], "{").await,
            is(400, "malformed_json")
        );
        assert_eq!(
            raw("POST", "/v1/orders", &[], "{}").await,
            is(415, "unsupported_media_type")
        );
        assert_eq!(
            raw("GET", "/v1/orders", &[], "").await,
            is(405, "method_not_allowed")
        );
        assert_eq!(raw("GET", "/v2", &[], "").await, is(404, "not_found"));
        assert_eq!(
            raw("GET", "/v1/orders/17", &[], "").await,
            is(404, "unknown_order")
        );
        assert_eq!(
            raw("GET", "/v1/orders/x", &[], "").await,
            is(404, "not_found")
        );
        assert_eq!(
            raw("GET", "/v1/skus/NONE", &[], "").await,
            is(404, "unknown_sku")
        );
        let big = "x".repeat(4_096);
        assert_eq!(raw("POST", "/v1/orders", &[as_json], &big).await.0, 413);

        assert_eq!(server.stock("ONE").await, (0, 1, 0));
        assert_eq!(server.stock("SOON").await, (1, 0, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_key_has_one_order_over_retries_and_restarts() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server
            .put_sku("A", 10, json!({ "per_user_limit": 2 }))
            .await;
        let first = server.order("u", "A", Some("k")).await;
        assert_eq!(first.status, 201);
        let again = server.order("u", "A", Some("k")).await;
        assert_eq!(
            (again.status, again.field("idempotency-replayed")),
            (200, Some("true"))
        );
        assert_eq!(again.json(), first.json());
        assert_eq!(
            server.order("v", "A", Some("k")).await.status,
            201,
            "another user's key"
        );
        assert!(server.stop().await);

        let server = TestServer::start(&database, |_| {}).await;
        let replay = server.order("u", "A", Some("k")).await;
        assert_eq!((replay.status, replay.json()), (200, first.json()));
        assert_eq!(server.stock("A").await, (8, 2, 0));
        assert_eq!(server.order("u", "A", Some("k2")).await.status, 201);
        assert_eq!(
            server.order("u", "A", Some("k3")).await.code(),
            "purchase_limit"
        );
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

/// Moves the idempotency window past every order that is there.
fn end_the_window(server: &TestServer) {
    let state = server.millrace().state();
    let everything = Eviction::before(OrderId::MAX);
    state.buyers.evict(everything, |sku| state.is_limited(sku));
}

async fn cancel(server: &TestServer, order: &Answer) -> u16 {
    let id = order.json()["order_id"].as_str().unwrap().to_owned();
    let target = format!("/v1/orders/{id}/cancel");
    let answer = request(server.data, "POST", &target, &[], String::new()).await;
    answer.status
}

#[test]
fn a_limit_counts_live_orders_after_the_window_and_over_restarts() {
    block_on(async {
        let database = TestDatabase::create().await;
        let briefly = |config: &mut Config| config.orders.idempotency_window_ms = 1_000;
        let server = TestServer::start(&database, briefly).await;
        let terms = json!({ "per_user_limit": 2 });
        server.put_sku("A", 10, terms.clone()).await;
        let first = server.order("u", "A", Some("k1")).await;
        let second = server.order("u", "A", Some("k2")).await;
        assert_eq!((first.status, second.status), (201, 201));
        end_the_window(&server);
        let third = server.order("u", "A", None).await;
        assert_eq!(third.code(), "purchase_limit");
        assert_eq!(
            server.order("v", "A", None).await.status,
            201,
            "another buyer's"
        );
        let list = server.get("/v1/users/u/orders").await.json();
        assert_eq!(list["orders"], json!([]), "the window's orders");
        assert_eq!(cancel(&server, &first).await, 200);
        assert_eq!(cancel(&server, &first).await, 200, "again");
        assert_eq!(server.stock("A").await, (8, 2, 0), "its unit is back once");
        let third = server.order("u", "A", Some("k3")).await;
        assert_eq!(third.status, 201);
        assert_eq!(server.order("u", "A", None).await.code(), "purchase_limit");
        let last = third.json()["order_id"]
            .as_str()
            .and_then(OrderId::parse)
            .unwrap();
        let ids = &server.millrace().state().ids;
        let deadline = Instant::now() + Duration::from_secs(20);
        while ids.window_floor(1_000) <= last {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(server.stop().await);

        let server = TestServer::start(&database, briefly).await;
        assert_eq!(server.order("u", "A", None).await.code(), "purchase_limit");
        assert_eq!(cancel(&server, &second).await, 200);
        assert_eq!(server.order("u", "A", None).await.status, 201);
        assert_eq!(server.stock("A").await, (7, 3, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_limit_that_is_set_later_counts_what_was_bought_before() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 10, json!({})).await;
        let first = server.order("u", "A", None).await;
        let second = server.order("u", "A", None).await;
        let third = server.order("u", "A", None).await;
        end_the_window(&server);
        assert!(server.millrace().state().buyers.is_empty());
        assert_eq!(cancel(&server, &third).await, 200);
        server
            .put_sku("A", 10, json!({ "per_user_limit": 2 }))
            .await;
        assert_eq!(server.order("u", "A", None).await.code(), "purchase_limit");
        assert_eq!(cancel(&server, &second).await, 200);
        assert_eq!(server.order("u", "A", None).await.status, 201);
        // Taken off, it needs no memory.
        server.put_sku("A", 10, json!({})).await;
        end_the_window(&server);
        assert!(server.millrace().state().buyers.is_empty());
        assert_eq!(cancel(&server, &first).await, 200);
        assert_eq!(server.stock("A").await, (9, 1, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn readiness_warns_before_memory_refuses_orders() {
    block_on(async {
        let database = TestDatabase::create().await;
        let small = |config: &mut Config| {
            config.queue.capacity = 10;
            config.orders.remembered_max = 10;
        };
        let server = TestServer::start(&database, small).await;
        server.put_sku("A", 100, json!({})).await;
        let warnings = async || {
            let ready = server.control("GET", "/readyz", Value::Null).await.json();
            assert_eq!(ready["ready"], true, "{ready}");
            ready["warnings"].to_string()
        };
        for number in 0..6 {
            let key = format!("k{number}");
            assert_eq!(server.order("u", "A", Some(&key)).await.status, 201);
        }
        // Without a key they do not count.
        for _ in 0..6 {
            assert_eq!(server.order("u", "A", None).await.status, 201);
        }
        assert!(!warnings().await.contains("orders.remembered_max"));
        assert_eq!(server.order("u", "A", Some("k6")).await.status, 201);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !warnings().await.contains("70 % of orders.remembered_max") {
            assert!(Instant::now() < deadline);
        }
        for number in 7..10 {
            let key = format!("k{number}");
            assert_eq!(server.order("u", "A", Some(&key)).await.status, 201);
        }
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn duplicates_in_flight_share_one_outcome() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 1_000, Value::Null).await;
        for round in 0..20 {
            let key = format!("k-{round}");
            let answers = join_all((0..10).map(|_| server.order("u", "A", Some(&key)))).await;
            let created = answers.iter().filter(|answer| answer.status == 201).count();
            let replayed = answers.iter().filter(|answer| answer.status == 200).count();
            assert_eq!((created, replayed), (1, 9), "{answers:?}");
            let id = answers[0].json()["order_id"].clone();
            assert!(answers.iter().all(|answer| answer.json()["order_id"] == id));
        }
        assert_eq!(server.stock("A").await, (980, 20, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_rush_sells_every_unit_once_on_either_engine() {
    block_on(async {
        for engine in [Engine::Hardened, Engine::Minihttp] {
            let database = TestDatabase::create().await;
            let server = TestServer::start(&database, |config| {
                config.data_plane.engine = engine;
                if engine == Engine::Minihttp {
                    // It cannot say which port it got.
                    config.data_plane.listen.set_port(free_port());
                }
            })
            .await;
            server.put_sku("A", 50, Value::Null).await;
            let users: Vec<String> = (0..400).map(|n| format!("u-{n}")).collect();
            let answers = join_all(users.iter().map(|user| server.order(user, "A", None))).await;
            let count = |status| {
                answers
                    .iter()
                    .filter(|answer| answer.status == status)
                    .count()
            };
            assert_eq!((count(201), count(409)), (50, 350), "{engine:?}");
            assert_eq!(server.stock("A").await, (0, 50, 0));
            server.assert_audit().await;
            assert!(server.stop().await);
        }
    });
}

fn free_port() -> u16 {
    let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    probe.local_addr().expect("its address").port()
}

#[test]
fn on_a_volatile_queue_respond_async_waits_and_says_so() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.queue.backend = millrace::config::Backend::Memory;
        })
        .await;
        server.put_sku("A", 5, Value::Null).await;
        let body = json!({ "user_id": "u", "sku_id": "A" });
        let answer = server
            .post(body.clone(), None, &[("Prefer", "respond-async")])
            .await;
        assert_eq!(
            (answer.status, answer.field("preference-applied")),
            (201, None)
        );
        let answer = server
            .post(body, None, &[("Prefer", "respond-async, wait=5")])
            .await;
        assert_eq!(
            (answer.status, answer.field("preference-applied")),
            (201, Some("wait=5"))
        );
        assert!(server.stop().await);
    });
}

/// The SKU's row is locked by somebody else for longer than the wait.
#[test]
fn an_order_that_is_late_is_undecided_or_not_placed_and_both_are_true() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.orders.timeout_ms = 400;
            config.workers.count = 1;
        })
        .await;
        server.put_sku("A", 100, Value::Null).await;
        let mut blocker = database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        lock.execute("SELECT 1 FROM millrace.sku FOR UPDATE", &[])
            .await
            .expect("lock the SKU");

        // One worker: it claims the first and is stuck with it; the rest is never claimed.
        let first = server.order("u-first", "A", Some("k"));
        let rest = async {
            wait_until("an order in flight", async || {
                server.metric("millrace_orders_in_flight").await >= 1.0
            })
            .await;
            let users: Vec<String> = (0..20).map(|n| format!("u-{n}")).collect();
            join_all(users.iter().map(|user| server.order(user, "A", Some("k")))).await
        };
        let (first, rest) = tokio::join!(first, rest);
        let answers: Vec<_> = std::iter::once(first).chain(rest).collect();
        for answer in &answers {
            assert!(matches!(answer.status, 202 | 504), "{answer:?}");
        }
        let undecided: Vec<String> = answers
            .iter()
            .filter(|answer| answer.status == 202)
            .map(|answer| {
                assert_eq!(answer.json()["status"], "undecided");
                assert!(answer.json()["receipt"].is_null());
                answer.json()["order_id"]
                    .as_str()
                    .expect("an id")
                    .to_owned()
            })
            .collect();
        assert!(!undecided.is_empty(), "the first was claimed");
        let timed_out = answers.iter().filter(|answer| answer.status == 504).count();
        assert!(timed_out > 0, "the others were not");
        let waiting = server.get(&format!("/v1/orders/{}", undecided[0])).await;
        assert_eq!(waiting.json()["status"], "undecided");

        lock.rollback().await.expect("unlock");
        for id in &undecided {
            let settled = server.get(&format!("/v1/orders/{id}?wait=5")).await;
            wait_until("the row", async || {
                server.get(&format!("/v1/orders/{id}?wait=1")).await.json()["status"]
                    == "pending_payment"
            })
            .await;
            assert!(matches!(settled.status, 200), "{settled:?}");
        }
        assert_eq!(
            server.stock("A").await,
            (100 - undecided.len() as u64, undecided.len() as u64, 0)
        );
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn an_operator_raises_and_lowers_a_total_and_never_below_what_is_taken() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 2, Value::Null).await;
        for user in ["u", "v"] {
            assert_eq!(server.order(user, "A", None).await.status, 201);
        }
        let body = |total: u32| json!({ "unit_price": 100, "currency": "EUR", "total": total });
        let below = server.control("PUT", "/admin/v1/skus/A", body(1)).await;
        assert_eq!(
            (below.status, below.code()),
            (409, "total_below_committed".to_owned())
        );
        server.put_sku("A", 4, Value::Null).await;
        assert_eq!(server.stock("A").await, (2, 2, 0));
        server.put_sku("A", 2, Value::Null).await;
        assert_eq!(server.order("w", "A", None).await.code(), "sold_out");
        let all = server.control("POST", "/admin/v1/pause", Value::Null).await;
        assert_eq!(all.json()["paused"], true);
        assert_eq!(server.order("w", "A", None).await.code(), "sale_paused");
        server.assert_audit().await;
        assert!(server.stop().await);

        let server = TestServer::start(&database, |_| {}).await;
        assert_eq!(
            server.order("w", "A", None).await.code(),
            "sale_paused",
            "kept over a restart"
        );
        server
            .control("POST", "/admin/v1/resume", Value::Null)
            .await;
        assert_eq!(server.order("w", "A", None).await.code(), "sold_out");
        assert!(server.stop().await);
    });
}

#[test]
fn tokens_guard_both_planes_but_not_health() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.data_plane.token.0 = vec!["shop".into()];
            config.control_plane.token.0 = vec!["old".into(), "new".into()];
        })
        .await;
        let status = async |address, target: &str, token: Option<&str>| {
            let bearer = token.map(|token| format!("Bearer {token}"));
            let fields: Vec<_> = bearer
                .iter()
                .map(|bearer| ("Authorization", bearer.as_str()))
                .collect();
            request(address, "GET", target, &fields, String::new())
                .await
                .status
        };
        assert_eq!(status(server.data, "/v1/skus/A", None).await, 401);
        assert_eq!(status(server.data, "/v1/skus/A", Some("new")).await, 401);
        assert_eq!(status(server.data, "/v1/skus/A", Some("shop")).await, 404);
        assert_eq!(status(server.control, "/admin/v1/skus", None).await, 401);
        assert_eq!(
            status(server.control, "/admin/v1/skus", Some("new")).await,
            200
        );
        assert_eq!(
            status(server.control, "/admin/v1/skus", Some("old")).await,
            200
        );
        assert_eq!(status(server.control, "/healthz", None).await, 200);
        assert_eq!(status(server.control, "/readyz", None).await, 200);
        assert_eq!(status(server.control, "/metrics", None).await, 200);
        assert!(server.stop().await);
    });
}

#[test]
fn one_audit_at_a_time_off_the_operators_connections_and_ended_with_its_client() {
    block_on(async {
        const AUDIT: &str = "/admin/v1/audit";
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.database.step_timeout_ms = 60_000;
        })
        .await;
        server.put_sku("A", 5, json!({})).await;
        let admin = database.connect().await;
        let sql = async |text: &str| admin.query_one(text, &[]).await.expect("a row");
        // While somebody else holds the audit's lock, an audit waits for it.
        let lock = "hashtextextended('millrace audit:millrace', 0)";
        sql(&format!("SELECT pg_advisory_lock({lock})")).await;
        let ask = || {
            let mut client = Connection::open(server.control).expect("connect");
            client.begin("GET", AUDIT, &[], "").expect("send");
            client
        };
        let first = ask();
        let sessions =
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'millrace audit'
                           AND datname = current_database()";
        let until = async |wanted: i64| {
            let deadline = Instant::now() + Duration::from_secs(30);
            while sql(sessions).await.get::<_, i64>(0) != wanted {
                assert!(Instant::now() < deadline, "never {wanted} sessions");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        until(1).await;
        // More than operators have connections: all refused at once, and operators are served.
        for _ in 0..6 {
            let refused = server.control("GET", AUDIT, Value::Null).await;
            assert_eq!(
                (refused.status, refused.code().as_str()),
                (409, "audit_running"),
                "{refused:?}"
            );
        }
        server.put_sku("A", 6, json!({})).await;
        // The client goes away, and the audit with it.
        drop(first);
        until(0).await;
        let second = ask();
        until(1).await;
        sql(&format!("SELECT pg_advisory_unlock({lock})")).await;
        let answered = tokio::task::spawn_blocking(move || {
            let mut second = second;
            second.answer().expect("an answer")
        });
        let answer = answered.await.expect("no panic");
        assert_eq!(answer.json()["ok"], true, "{answer:?}");
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn rows_that_are_older_than_retention_keeps_them_are_deleted_in_the_background() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 5, json!({})).await;
        let mut ids = Vec::new();
        for user in ["old", "new"] {
            let order = server.order(user, "A", None).await.json();
            let id = order["order_id"].as_str().expect("an id").to_owned();
            let cancel = format!("/v1/orders/{id}/cancel");
            let cancelled = request(server.data, "POST", &cancel, &[], String::new()).await;
            assert_eq!(cancelled.status, 200, "{cancelled:?}");
            ids.push(id);
        }
        assert!(server.stop().await);
        // Eight days pass for one of them, and for what the stock log says.
        let admin = database.connect().await;
        admin
            .batch_execute(&format!(
                "UPDATE millrace.orders SET order_id = order_id - (8 * 86400000::int8 << 22) WHERE order_id = {};
                 UPDATE millrace.stock_log SET at = at - interval '8 days'",
                ids[0]
            ))
            .await
            .expect("aged");
        let server = TestServer::start(&database, |config| {
            config.retention.orders_days = 7;
            config.retention.stock_log_days = 7;
        })
        .await;
        let left = "SELECT (SELECT count(*) FROM millrace.orders) + (SELECT count(*) FROM millrace.stock_log)";
        let deadline = Instant::now() + Duration::from_secs(30);
        // One order, and the newest entry.
        while admin
            .query_one(left, &[])
            .await
            .expect("a count")
            .get::<_, i64>(0)
            > 2
        {
            assert!(Instant::now() < deadline, "not deleted");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        server.assert_audit().await;
        let audit = server.control("GET", "/admin/v1/audit", Value::Null).await;
        assert_eq!(audit.json()["orders_pruned"], 1, "{audit:?}");
        let young = server.get(&format!("/v1/orders/{}", ids[1])).await;
        assert_eq!(young.json()["status"], "cancelled", "{young:?}");
        let metrics = server.control("GET", "/metrics", Value::Null).await;
        let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
        let counted = "millrace_pruned_rows_total{table=\"orders\"} 1";
        assert!(metrics.contains(counted), "{metrics}");
        assert!(server.stop().await);
    });
}
