//! The waiting list over HTTP, on a real PostgreSQL: units that come back find whoever waits for them, in order,
//! whatever ends and starts again meanwhile.

use std::time::{Duration, Instant};

use crate::support::block_on;
use crate::support::http::{Answer, call, try_call};
use crate::support::postgres::TestDatabase;
use crate::support::proxy::{Cut, Proxy};
use crate::support::served::{DataDir, Served};
use crate::support::server::{TestServer, request};
use crate::support::waiting::{PATIENCE, until, wait_until};
use crate::support::webhook::{Paid, SECRET};
use serde_json::{Value, json};

async fn join(server: &TestServer, user: &str, key: Option<&str>) -> Answer {
    join_for(server, user, 1, key, &[]).await
}

async fn join_for(
    server: &TestServer,
    user: &str,
    quantity: u32,
    key: Option<&str>,
    more: &[(&str, &str)],
) -> Answer {
    let body = json!({"user_id": user, "sku_id": "A", "quantity": quantity, "waitlist": true});
    server.post(body, key, more).await
}

/// Asserts that an order waits at this position, and returns its id.
fn waits_at(answer: &Answer, status: u16, position: u64) -> String {
    let order = answer.json();
    assert_eq!(answer.status, status, "{order}");
    assert_eq!(order["status"], "waitlisted", "{order}");
    assert_eq!(order["position"], position, "{order}");
    assert!(order["expires_at"].is_null(), "{order}");
    assert!(order.get("receipt").is_some_and(Value::is_null), "{order}");
    id(answer)
}

fn id(answer: &Answer) -> String {
    let order = answer.json();
    order["order_id"]
        .as_str()
        .unwrap_or_else(|| panic!("{order}"))
        .to_owned()
}

async fn order(server: &TestServer, id: &str) -> Value {
    server.get(&format!("/v1/orders/{id}")).await.json()
}

/// Polls as a shop does, until the order no longer waits.
async fn assigned(server: &TestServer, id: &str) -> Value {
    let order = server.get(&format!("/v1/orders/{id}?wait=5")).await.json();
    assert_eq!(order["status"], "pending_payment", "{order}");
    assert!(order["receipt"].is_string(), "{order}");
    assert!(order["expires_at"].is_string(), "{order}");
    assert!(order.get("position").is_none(), "{order}");
    order
}

async fn cancel(server: &TestServer, id: &str, query: &str) -> Answer {
    let target = format!("/v1/orders/{id}/cancel{query}");
    request(server.data, "POST", &target, &[], String::new()).await
}

async fn sku(server: &TestServer) -> Value {
    server.get("/v1/skus/A").await.json()
}

/// Units that the view of the database has as free, held and sold.
async fn in_view(database: &TestDatabase, sku: &str) -> (i64, i64, i64) {
    let look = "SELECT free, held, sold FROM millrace.sku_list WHERE sku_id = $1";
    let client = database.connect().await;
    let row = client.query_one(look, &[&sku]).await.expect("the SKU");
    (row.get(0), row.get(1), row.get(2))
}

async fn until_in_view(database: &TestDatabase, sku: &str, wanted: (i64, i64, i64)) {
    wait_until("the view has it", async || {
        in_view(database, sku).await == wanted
    })
    .await;
}

/// Asserts that nobody waits beside units that they could have, and that the list in memory is that of the rows.
async fn assert_whole(server: &TestServer) {
    server.assert_audit().await;
    let audit = server
        .control("GET", "/admin/v1/audit", Value::Null)
        .await
        .json();
    let checks = audit["checks"].as_array().expect("checks");
    assert!(
        checks
            .iter()
            .any(|check| check["name"] == "live counters are those of the database"),
        "{audit:#}"
    );
}

#[test]
fn a_unit_that_comes_back_goes_to_whoever_is_first_in_line_and_to_nobody_else() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server
            .put_sku("A", 1, json!({"waitlist_payment_ttl_ms": 60_000}))
            .await;
        // A unit is free: an order like any other.
        let first = join(&server, "u1", Some("k")).await;
        assert_eq!(first.status, 201, "{first:?}");
        let second = waits_at(&join(&server, "u2", Some("k")).await, 202, 1);
        let third = waits_at(&join(&server, "u3", Some("k")).await, 202, 2);
        assert_eq!(sku(&server).await["waiting"], 2);
        assert_eq!(server.order("u4", "A", None).await.code(), "sold_out");
        // A replay tells the present position, and another body is another request.
        let replayed = join(&server, "u3", Some("k")).await;
        assert_eq!(waits_at(&replayed, 200, 2), third);
        assert_eq!(replayed.field("idempotency-replayed"), Some("true"));
        let other = server.order("u3", "A", Some("k")).await;
        assert_eq!(other.code(), "idempotency_key_reused");
        assert_whole(&server).await;

        let polling = assigned(&server, &second);
        let started = Instant::now();
        let first = id(&first);
        let (polled, cancelled) = tokio::join!(polling, cancel(&server, &first, ""));
        assert_eq!(cancelled.json()["status"], "cancelled");
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "{:?}",
            started.elapsed()
        );
        // Its own time to pay, under the id that it joined with.
        assert_eq!(polled["order_id"], second.as_str());
        let list = server.get("/v1/users/u3/orders").await.json();
        assert_eq!(list["orders"][0]["position"], 1, "{list}");
        assert_eq!(server.stock("A").await, (0, 1, 0));
        assert_eq!(server.order("u4", "A", None).await.code(), "sold_out");

        // Cancelled while it waits: it holds nothing, and the one that was assigned is cancelled like any other.
        let assigned = cancel(&server, &second, "?only=waitlisted").await;
        assert_eq!(
            (assigned.status, assigned.code().as_str()),
            (409, "already_assigned")
        );
        let left = cancel(&server, &third, "?only=waitlisted").await.json();
        assert_eq!(left["status"], "cancelled", "{left}");
        assert!(
            left["expires_at"].is_null() && left["receipt"].is_null(),
            "{left}"
        );
        assert_eq!(
            cancel(&server, &third, "?only=waitlisted").await.status,
            200
        );
        assert_eq!(
            cancel(&server, &second, "?only=paid").await.code(),
            "invalid_field"
        );
        assert_eq!(sku(&server).await["waiting"], 0);
        assert_eq!(server.stock("A").await, (0, 1, 0));
        assert_eq!(cancel(&server, &second, "").await.status, 200);
        assert_eq!(server.stock("A").await, (1, 0, 0));
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

#[test]
fn orders_that_expire_together_are_all_passed_on_and_the_list_survives_a_restart() {
    const UNITS: usize = 60;
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        let terms = json!({"waitlist_payment_ttl_ms": 600_000, "per_user_limit": 1});
        server.put_sku("A", UNITS as u32, terms).await;
        for buyer in 0..UNITS {
            let placed = server.order(&format!("b{buyer}"), "A", None).await;
            assert_eq!(placed.status, 201, "{placed:?}");
        }
        let mut waiting = Vec::new();
        for buyer in 0..UNITS + 5 {
            // Every other one is acknowledged before it is a row.
            let prefer: &[(&str, &str)] = match buyer % 2 {
                0 => &[],
                _ => &[("Prefer", "respond-async")],
            };
            let joined = join_for(&server, &format!("w{buyer}"), 1, None, prefer).await;
            let applied = joined.field("preference-applied");
            assert_eq!(applied.is_some(), buyer % 2 == 1, "{joined:?}");
            waiting.push(id(&joined));
            assert_eq!(joined.json()["status"], "waitlisted", "{joined:?}");
        }
        // Units that are waited for count toward the limit.
        assert_eq!(join(&server, "w0", None).await.code(), "purchase_limit");
        assert!(server.stop().await);
        let admin = database.connect().await;
        let due = "UPDATE millrace.orders SET expires_at = now() + interval '1 s' WHERE status = 1";
        assert_eq!(
            admin.execute(due, &[]).await.expect("an update"),
            UNITS as u64
        );
        let server = TestServer::start(&database, |_| {}).await;
        wait_until("the last units are assigned", async || {
            let stock = sku(&server).await;
            assert_eq!(stock["free"], 0, "{stock}");
            stock["waiting"] == 5
        })
        .await;
        for (place, id) in waiting.iter().enumerate() {
            let order = order(&server, id).await;
            if place < UNITS {
                assert_eq!(order["status"], "pending_payment", "{place}: {order}");
            } else {
                assert_eq!(order["position"], (place - UNITS + 1) as u64, "{order}");
            }
        }
        assert_eq!(join(&server, "w0", None).await.code(), "purchase_limit");
        assert_eq!(join(&server, "w64", None).await.code(), "purchase_limit");
        let late = join(&server, "late", None).await;
        waits_at(&late, 202, 6);
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

/// While units are taken for an order, memory is ahead of the rows; from the COMMIT until memory hears of it, the rows are.
#[test]
fn an_audit_in_the_midst_of_an_assignment_is_no_false_alarm() {
    block_on(async {
        let database = TestDatabase::create().await;
        let config = database.config();
        let proxy = Proxy::start(&config).await;
        let (user, name) = (config.get_user().unwrap(), config.get_dbname().unwrap());
        let server = TestServer::start_at(proxy.url(user, name), |config| {
            config.database.step_timeout_ms = 3_000;
        })
        .await;
        server.put_sku("A", 1, json!({})).await;
        let first = join(&server, "u1", None).await;
        let second = waits_at(&join(&server, "u2", None).await, 202, 1);
        let audit = async || {
            let audit = server.control("GET", "/admin/v1/audit", Value::Null);
            let audit = audit.await.json();
            let checks = audit["checks"].as_array().expect("checks").iter();
            // After a second in this state one is right to fail.
            let mut broken = checks.filter(|check| {
                check["ok"] != true && check["name"] != "nobody waits for units that are there"
            });
            assert!(broken.next().is_none(), "{audit:#}");
        };
        let watcher = database.connect().await;
        let is_so = async |query: &str| -> bool {
            let row = watcher.query_one(query, &[]).await.expect("a row");
            row.get(0)
        };

        let mut blocker = database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        let rows = "SELECT FROM millrace.orders WHERE status = 7 FOR UPDATE";
        lock.execute(rows, &[]).await.expect("lock");
        assert_eq!(cancel(&server, &id(&first), "").await.status, 200);
        for _ in 0..4 {
            let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)";
            wait_until("the assignment waits for the row", async || {
                is_so(waits).await
            })
            .await;
            audit().await;
        }
        proxy.cut_change_of_stock(Cut::AfterInSilence);
        lock.rollback().await.expect("rollback");
        let assigned_row = "SELECT EXISTS (SELECT FROM millrace.orders WHERE status = 1)";
        wait_until("the assignment is committed", async || {
            is_so(assigned_row).await
        })
        .await;
        assert!(proxy.has_cut(), "another transaction was cut");
        let mut audits = 0;
        while sku(&server).await["waiting"] == 1 {
            audit().await;
            audits += 1;
        }
        assert!(audits > 0, "memory heard of it at once");
        assigned(&server, &second).await;
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_list_whose_assignments_the_database_refuses_keeps_no_other_waiting() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        let mut lists = Vec::new();
        for name in ["A", "B"] {
            server.put_sku(name, 1, json!({})).await;
            let holds = id(&server.order("u1", name, None).await);
            let body = json!({"user_id": "u2", "sku_id": name, "waitlist": true});
            let waits = waits_at(&server.post(body, None, &[]).await, 202, 1);
            lists.push((holds, waits));
        }
        let client = database.connect().await;
        let refuse = format!(
            "ALTER TABLE millrace.orders
               ADD CONSTRAINT refused CHECK (order_id <> {} OR status = 7) NOT VALID",
            lists[0].1
        );
        client.batch_execute(&refuse).await.expect("a constraint");
        for (holds, _) in &lists {
            assert_eq!(cancel(&server, holds, "").await.status, 200);
        }
        let is = async |waits: &str, status: &str| order(&server, waits).await["status"] == status;
        wait_until("the other list is served", async || {
            is(&lists[1].1, "pending_payment").await
        })
        .await;
        // Its unit waits with it, and nobody else gets that.
        assert!(is(&lists[0].1, "waitlisted").await);
        assert_eq!(server.order("u3", "A", None).await.code(), "sold_out");
        let mend = "ALTER TABLE millrace.orders DROP CONSTRAINT refused";
        client.batch_execute(mend).await.expect("no constraint");
        wait_until("this one too", async || {
            is(&lists[0].1, "pending_payment").await
        })
        .await;
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_strict_list_serves_nobody_before_its_first_order_and_a_skipping_one_does() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 3, json!({})).await;
        let taken = server
            .post(
                json!({"user_id": "u", "sku_id": "A", "quantity": 3}),
                None,
                &[],
            )
            .await;
        assert_eq!(taken.status, 201);
        let too_many = join_for(&server, "v", 4, None, &[]).await;
        assert_eq!(too_many.code(), "sold_out", "it could never be served");
        let big = waits_at(&join_for(&server, "big", 2, None, &[]).await, 202, 1);
        let small = waits_at(&join(&server, "small", None).await, 202, 2);
        // A restock is for the list, too.
        let restock = json!({"quantity": 1});
        let restocked = server
            .control("POST", "/admin/v1/skus/A/restock", restock.clone())
            .await;
        let stock = restocked.json();
        assert_eq!(
            (&stock["free"], &stock["held"]),
            (&json!(0), &json!(4)),
            "{stock}"
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(order(&server, &small).await["position"], 2);
        assert_eq!(
            server.metric("millrace_waitlist_overdue_seconds").await,
            0.0
        );
        assert_whole(&server).await;

        server
            .put_sku("A", 4, json!({"waitlist_skips": true}))
            .await;
        assigned(&server, &small).await;
        assert_eq!(order(&server, &big).await["position"], 1);
        // Nothing is assigned while the sale is paused, or outside of its hours.
        assert_eq!(
            server
                .control("POST", "/admin/v1/skus/A/pause", Value::Null)
                .await
                .status,
            200
        );
        server
            .control("POST", "/admin/v1/skus/A/restock", json!({"quantity": 2}))
            .await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(order(&server, &big).await["status"], "waitlisted");
        let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
        let at = |hours: i64| {
            let then = now
                .checked_add(jiff::Span::new().hours(hours))
                .expect("a time");
            then.strftime("%H:%MZ").to_string()
        };
        let elsewhere = json!({"assign_between": [at(3), at(6)]});
        server.put_sku("A", 6, elsewhere).await;
        assert_eq!(
            server
                .control("POST", "/admin/v1/skus/A/resume", Value::Null)
                .await
                .status,
            200
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(order(&server, &big).await["status"], "waitlisted");
        server
            .put_sku("A", 6, json!({"assign_between": [at(-3), at(3)]}))
            .await;
        assigned(&server, &big).await;
        assert_eq!(server.stock("A").await, (0, 6, 0));
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

#[test]
fn an_order_for_more_units_than_a_lower_total_ends_and_the_list_goes_on() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 5, json!({"per_user_limit": 4})).await;
        let body = json!({"user_id": "u", "sku_id": "A", "quantity": 3});
        assert_eq!(server.post(body, None, &[]).await.status, 201);
        assert_eq!(in_view(&database, "A").await, (2, 3, 0));
        let big = waits_at(&join_for(&server, "big", 4, None, &[]).await, 202, 1);
        let small = waits_at(&join(&server, "small", None).await, 202, 2);
        // Two units are kept for the first, which no row holds.
        assert_eq!(server.stock("A").await, (0, 5, 0));
        until_in_view(&database, "A", (0, 5, 0)).await;
        assert_whole(&server).await;

        server.put_sku("A", 3, json!({"per_user_limit": 4})).await;
        let ended = server.get(&format!("/v1/orders/{big}?wait=5")).await.json();
        assert_eq!(ended["status"], "expired", "{ended}");
        assert!(ended["expires_at"].is_null(), "{ended}");
        assert_eq!(order(&server, &small).await["position"], 1);
        assert_eq!(
            join_for(&server, "big", 4, None, &[]).await.code(),
            "sold_out"
        );
        // Its units no longer count toward the limit.
        let again = waits_at(&join_for(&server, "big", 3, None, &[]).await, 202, 2);
        let restock = json!({"quantity": 1});
        server
            .control("POST", "/admin/v1/skus/A/restock", restock)
            .await;
        assigned(&server, &small).await;
        assert_eq!(server.stock("A").await, (0, 4, 0));
        assert_eq!(cancel(&server, &again, "").await.status, 200);
        server
            .control("POST", "/admin/v1/skus/A/restock", json!({"quantity": 2}))
            .await;
        until_in_view(&database, "A", (2, 4, 0)).await;
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

/// A metric of the SKU `A`.
async fn metric_of(server: &TestServer, name: &str) -> f64 {
    server.metric(&format!("{name}{{sku_id=\"A\"}}")).await
}

#[test]
fn metrics_and_the_live_figures_tell_who_waits_for_how_long_and_what_was_assigned() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        let live = async || {
            let live = server.control("GET", "/admin/v1/live", Value::Null);
            live.await.json()["waitlist"].clone()
        };
        server.put_sku("A", 2, json!({})).await;
        let body = json!({"user_id": "u", "sku_id": "A", "quantity": 2});
        let first = id(&server.post(body, None, &[]).await);
        assert_eq!(server.metric("millrace_waitlist_oldest_seconds").await, 0.0);
        let before = Instant::now();
        let oldest = waits_at(&join_for(&server, "big", 2, None, &[]).await, 202, 1);
        let joined = Instant::now();
        waits_at(&join(&server, "small", None).await, 202, 2);
        assert_eq!(metric_of(&server, "millrace_waitlist_orders").await, 2.0);
        assert_eq!(
            metric_of(&server, "millrace_waitlist_kept_units").await,
            0.0
        );
        wait_until("the oldest has waited for a second", async || {
            // As of half a second ago at most.
            let least = joined.elapsed().as_secs_f64();
            let told = server.metric("millrace_waitlist_oldest_seconds").await;
            let most = before.elapsed().as_secs_f64();
            assert!(told < most + 0.01, "{told} s of {most}");
            told >= 1.0 && least >= 1.0
        })
        .await;
        assert!(live().await["oldest_seconds"].as_f64() >= Some(1.0));

        // One unit does not suffice for the first.
        let restock = json!({"quantity": 1});
        server
            .control("POST", "/admin/v1/skus/A/restock", restock)
            .await;
        assert_eq!(
            metric_of(&server, "millrace_waitlist_kept_units").await,
            1.0
        );
        assert_eq!(server.metric("millrace_waitlist_assigned_total").await, 0.0);
        assert_eq!(cancel(&server, &first, "").await.status, 200);
        assigned(&server, &oldest).await;
        wait_until("both are assigned", async || {
            server.metric("millrace_waitlist_assigned_total").await == 2.0
        })
        .await;
        assert_eq!(live().await["assigned"], 2);
        assert_eq!(metric_of(&server, "millrace_waitlist_orders").await, 0.0);
        assert_eq!(
            metric_of(&server, "millrace_waitlist_kept_units").await,
            0.0
        );
        let took = server
            .metric("millrace_waitlist_assign_seconds_count")
            .await;
        assert!((1.0..=2.0).contains(&took), "{took} transactions");
        wait_until("nobody waits", async || {
            server.metric("millrace_waitlist_oldest_seconds").await == 0.0
        })
        .await;
        assert!(server.stop().await);
    });
}

#[test]
fn lines_of_a_batch_join_in_their_sequence_up_to_the_limit_of_the_list() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 1, json!({"waitlist_max": 2})).await;
        let line = |user: &str, key: &str| {
            json!({"user_id": user, "sku_id": "A", "waitlist": true, "idempotency_key": key})
                .to_string()
        };
        let users = ["a", "b", "c", "d"];
        let body = users.map(|user| line(user, "k")).join("\n");
        let fields = [("Content-Type", "application/x-ndjson")];
        let answer = request(server.data, "POST", "/v1/orders:batch", &fields, body).await;
        let text = String::from_utf8(answer.body.clone()).expect("text");
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        assert_eq!(lines[0]["http_status"], 201, "{text}");
        for (line, position) in [(&lines[1], 1), (&lines[2], 2)] {
            assert_eq!(line["http_status"], 202, "{text}");
            assert_eq!(line["position"], position, "{text}");
        }
        assert_eq!(
            (&lines[3]["http_status"], &lines[3]["code"]),
            (&json!(409), &json!("waitlist_full"))
        );
        // Never sticky.
        let freed = lines[1]["order_id"].as_str().expect("an id");
        assert_eq!(cancel(&server, freed, "").await.status, 200);
        waits_at(&join(&server, "d", Some("k")).await, 202, 2);
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

#[test]
fn money_buys_no_place() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.payments.standard.secret.0 = vec![SECRET.to_owned()];
        })
        .await;
        server.put_sku("A", 1, json!({})).await;
        let first = join(&server, "u1", None).await;
        let second = join(&server, "u2", None).await;
        let third = join(&server, "u3", None).await;
        // While it waits: it keeps its place, and the money goes back.
        assert_eq!(
            Paid::of(&second.json()).deliver(server.data).await.status,
            200
        );
        waits_at(
            &server.get(&format!("/v1/orders/{}", id(&second))).await,
            200,
            1,
        );
        // After it has left.
        assert_eq!(cancel(&server, &id(&third), "").await.status, 200);
        assert_eq!(
            Paid::of(&third.json()).deliver(server.data).await.status,
            200
        );
        let left = order(&server, &id(&third)).await;
        assert_eq!(left["status"], "refund_due", "{left}");
        assert_eq!(left["refund_reason"], "not_assigned", "{left}");
        let due = "/admin/v1/payments?state=refund_due";
        let due = server.control("GET", due, Value::Null).await.json();
        let reasons: Vec<_> = due["payments"]
            .as_array()
            .expect("payments")
            .iter()
            .map(|payment| payment["refund_reason"].clone())
            .collect();
        assert_eq!(reasons, ["not_assigned", "not_assigned"], "{due}");
        // Assigned, it is paid like any other.
        assert_eq!(cancel(&server, &id(&first), "").await.status, 200);
        let payable = assigned(&server, &id(&second)).await;
        let paid = Paid::of(&payable).again("once more");
        assert_eq!(paid.deliver(server.data).await.status, 200);
        assert_eq!(order(&server, &id(&second)).await["status"], "paid");
        assert_eq!(server.stock("A").await, (0, 0, 1));
        // Its units return to the sale: to whoever waits by then.
        let fourth = join(&server, "u4", None).await;
        let refund = format!("/admin/v1/orders/{}/refunded", id(&second));
        // The first is about the payment that bought no place, the second gives the sale up.
        for note in [
            json!({"reference": "r-1"}),
            json!({"reference": "r-2", "restock": true}),
        ] {
            assert_eq!(server.control("POST", &refund, note).await.status, 200);
        }
        assigned(&server, &id(&fourth)).await;
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_list_ends_with_its_sale_or_after_its_time() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server =
            TestServer::start(&database, |config| config.orders.waitlist_ttl_ms = 1_000).await;
        let closes_at = jiff::Timestamp::now() + jiff::Span::new().seconds(3);
        for (sku_id, more) in [
            ("A", json!({})),
            ("B", json!({"closes_at": closes_at.to_string()})),
        ] {
            server.put_sku(sku_id, 1, more).await;
            assert_eq!(server.order("u", sku_id, None).await.status, 201);
        }
        let timed = join(&server, "w", None).await;
        let body = json!({"user_id": "w", "sku_id": "B", "waitlist": true});
        let closing = server.post(body.clone(), None, &[]).await;
        let expired = server
            .get(&format!("/v1/orders/{}?wait=7", id(&timed)))
            .await
            .json();
        assert_eq!(expired["status"], "expired", "{expired}");
        assert!(expired["expires_at"].is_null(), "{expired}");
        // With an end of the sale its time is not counted.
        assert_eq!(order(&server, &id(&closing)).await["status"], "waitlisted");
        let ended = server
            .get(&format!("/v1/orders/{}?wait=7", id(&closing)))
            .await
            .json();
        assert_eq!(ended["status"], "expired", "{ended}");
        assert_eq!(server.post(body, None, &[]).await.code(), "sale_closed");
        // What nobody waits for any more is free.
        server
            .control("POST", "/admin/v1/skus/B/restock", json!({"quantity": 2}))
            .await;
        assert_eq!(server.stock("B").await, (2, 1, 0));
        assert_eq!(server.metric("millrace_waitlist_expired_total").await, 2.0);
        assert_whole(&server).await;
        assert!(server.stop().await);
    });
}

/// One order through the real binary. An error: it is gone.
fn send(
    served: &Served,
    user: &str,
    more: Value,
    prefer: &[(&str, &str)],
) -> std::io::Result<Answer> {
    let mut body = json!({"user_id": user, "sku_id": "A"});
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    let mut fields = vec![
        ("Content-Type", "application/json"),
        ("Idempotency-Key", "k"),
    ];
    fields.extend_from_slice(prefer);
    try_call(
        served.data,
        "POST",
        "/v1/orders",
        &fields,
        &body.to_string(),
    )
}

/// A process that ends by SIGKILL at `point`.
fn crashing(dir: &DataDir, point: &str) -> Served {
    let fault = vec![("MILLRACE_FAULT".to_owned(), format!("crash@{point}"))];
    let log = dir.path().join("crashing.log");
    Served::try_start(dir.path(), &fault, &log).expect("it starts")
}

fn whole(served: &Served) {
    let mut audit = Value::Null;
    until("the audit of a quiet moment", PATIENCE, || {
        audit = call(served.control, "GET", "/admin/v1/audit", &[], "").json();
        assert_eq!(audit["ok"], true, "{audit:#}");
        audit["orders_in_flight"] == 0
    });
}

/// Killed at each step of an assignment: the first in line has the unit, once, and the others keep their places.
#[test]
fn an_assignment_that_is_killed_at_any_step_happens_once() {
    block_on(async {
        for point in ["waitlist.selected", "waitlist.assigned"] {
            let dir = DataDir::fresh().await;
            // The first start makes the list, so that only what is assigned passes the point.
            let served = Served::start(dir.path());
            served.put_sku("A", 1);
            let first = send(&served, "first", json!({}), &[]).expect("an answer");
            assert_eq!(first.status, 201, "{first:?}");
            let mut waiting = Vec::new();
            for (place, user) in ["a", "b", "c"].into_iter().enumerate() {
                let prefer: &[_] = match place % 2 {
                    0 => &[],
                    _ => &[("Prefer", "respond-async")],
                };
                let joined =
                    send(&served, user, json!({"waitlist": true}), prefer).expect("an answer");
                waiting.push(waits_at(&joined, 202, place as u64 + 1));
            }
            served.kill();
            let mut served = crashing(&dir, point);
            let cancel = format!("/v1/orders/{}/cancel", id(&first));
            let deadline = Instant::now() + PATIENCE;
            while served.ended_by(Instant::now()).is_none() {
                // Its answer may be lost with the process.
                let _ = try_call(served.data, "POST", &cancel, &[], "");
                assert!(Instant::now() < deadline, "{point}: it goes on");
            }
            drop(served);
            let served = Served::start(dir.path());
            let cancelled = call(served.data, "POST", &cancel, &[], "");
            assert_eq!(
                cancelled.json()["status"],
                "cancelled",
                "{point}: {cancelled:?}"
            );
            until("the first in line has the unit", PATIENCE, || {
                let order = call(
                    served.data,
                    "GET",
                    &format!("/v1/orders/{}", waiting[0]),
                    &[],
                    "",
                );
                order.json()["status"] == "pending_payment"
            });
            for (place, id) in waiting[1..].iter().enumerate() {
                let order = call(served.data, "GET", &format!("/v1/orders/{id}"), &[], "").json();
                assert_eq!(order["position"], place as u64 + 1, "{point}: {order}");
            }
            let stock = call(served.data, "GET", "/v1/skus/A", &[], "").json();
            assert_eq!(
                (&stock["held"], &stock["waiting"]),
                (&json!(1), &json!(2)),
                "{point}: {stock}"
            );
            whole(&served);
            served.terminate();
            assert_eq!(served.wait(), Some(0), "{point}");
        }
    });
}

/// Killed while orders join: those that were acknowledged wait, in the order in which they joined, and a retry of
/// any finds it or joins.
#[test]
fn orders_that_were_acknowledged_as_waiting_survive_a_kill_at_any_step() {
    block_on(async {
        for point in [
            "journal.after_sync",
            "journal.acknowledged",
            "worker.claimed",
            "worker.before_commit",
            "worker.committed",
        ] {
            let dir = DataDir::fresh().await;
            let served = Served::start(dir.path());
            served.put_sku("A", 1);
            assert_eq!(
                send(&served, "first", json!({}), &[])
                    .expect("an answer")
                    .status,
                201
            );
            served.kill();
            let served = crashing(&dir, &format!("{point}:5"));
            let wants = json!({"waitlist": true});
            let (mut told, mut asked) = (Vec::new(), 0);
            while asked < 500 {
                let prefer: &[_] = match asked % 2 {
                    0 => &[("Prefer", "respond-async")],
                    _ => &[],
                };
                match send(&served, &format!("u{asked}"), wants.clone(), prefer) {
                    Ok(joined) => told.push((asked, waits_at(&joined, 202, told.len() as u64 + 1))),
                    Err(_) => break,
                }
                asked += 1;
            }
            assert!(asked < 500, "{point} is never passed");
            drop(served);
            let served = Served::start(dir.path());
            for (place, (user, id)) in told.iter().enumerate() {
                let again =
                    send(&served, &format!("u{user}"), wants.clone(), &[]).expect("an answer");
                assert_eq!(&waits_at(&again, 200, place as u64 + 1), id, "{point}");
            }
            // The one whose answer was lost is there, behind them all, or joins now.
            let lost = send(&served, &format!("u{asked}"), wants.clone(), &[]).expect("an answer");
            assert_eq!(
                lost.json()["position"],
                told.len() as u64 + 1,
                "{point}: {lost:?}"
            );
            whole(&served);
            served.terminate();
            assert_eq!(served.wait(), Some(0), "{point}");
        }
    });
}
