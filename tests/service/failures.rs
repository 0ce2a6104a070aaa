//! Failures inside: what a buyer and an operator are told when a part of Millrace or its database
//! fails.

use std::time::{Duration, Instant};

use crate::support::block_on;
use crate::support::postgres::TestDatabase;
use crate::support::server::{TestServer, request};
use crate::support::standby::{DATABASE, Pair, USER};
use crate::support::waiting::wait_until;
use futures_util::future::join_all;
use millrace::state::pending::{Settled, SlotState};
use millrace::store::postgres::{Database, replication};
use serde_json::{Value, json};

/// Holds every row of `sku`, so that workers get stuck with what they have claimed.
async fn lock_stock(client: &mut tokio_postgres::Client) -> tokio_postgres::Transaction<'_> {
    let lock = client.transaction().await.expect("begin");
    lock.execute("SELECT 1 FROM millrace.sku FOR UPDATE", &[])
        .await
        .expect("lock");
    lock
}

#[test]
fn a_worker_that_panics_poisons_the_process() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| config.orders.timeout_ms = 2_000).await;
        server.put_sku("A", 10, Value::Null).await;
        let mut blocker = database.connect().await;
        let lock = lock_stock(&mut blocker).await;
        let order = server.order("u", "A", None);
        let sabotage = async {
            let pending = || server.millrace().state().pending.all().into_iter().next();
            wait_until("an order in flight", async || pending().is_some()).await;
            let pending = pending().expect("in flight");
            let claimed = async || pending.slot.state() == SlotState::Claimed;
            wait_until("a claim", claimed).await;
            // The worker will find the slot settled by somebody else: a broken invariant.
            pending.slot.settle(Settled::Persisted);
            lock.rollback().await.expect("unlock");
            server.millrace().poisoned().await
        };
        let (_, reason) = tokio::join!(order, sabotage);
        assert!(reason.contains("panicked"), "{reason}");
        let refused = server.order("v", "A", None).await;
        assert_eq!(
            (refused.status, refused.code()),
            (503, "not_ready".to_owned())
        );
        assert!(refused.field("retry-after").is_some());
        let ready = server.control("GET", "/readyz", Value::Null).await;
        assert_eq!(ready.status, 503);
        assert!(
            ready.json()["checks"].to_string().contains("panicked"),
            "{}",
            ready.json()
        );
        assert!(!server.stop().await, "it must exit non-zero");
    });
}

#[test]
fn a_full_queue_refuses_with_retry_after_and_holds_nothing() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.queue.capacity = 3;
            config.workers.count = 1;
            config.workers.batch_rows_max = 1;
            config.orders.timeout_ms = 3_000;
        })
        .await;
        server.put_sku("A", 100, Value::Null).await;
        let mut blocker = database.connect().await;
        let lock = lock_stock(&mut blocker).await;
        let waiting = async {
            // The worker has its one before the others come, so that the queue is theirs alone.
            let claimed = async || {
                let all = server.millrace().state().pending.all();
                all.iter()
                    .any(|order| order.slot.state() == SlotState::Claimed)
            };
            let users: Vec<String> = (1..20).map(|n| format!("u-{n}")).collect();
            let others = async {
                wait_until("a claim", claimed).await;
                join_all(users.iter().map(|user| server.order(user, "A", None))).await
            };
            let (first, mut answers) = tokio::join!(server.order("u-0", "A", None), others);
            answers.push(first);
            answers
        };
        let unlock = async {
            let refused = async || {
                let metrics = server.control("GET", "/metrics", Value::Null).await.body;
                let text = String::from_utf8(metrics).expect("text");
                text.contains("millrace_orders_total{outcome=\"overloaded\"} 16")
            };
            wait_until("16 refusals", refused).await;
            assert_eq!(
                server.stock("A").await,
                (96, 4, 0),
                "one claimed, three queued"
            );
            lock.rollback().await.expect("unlock");
        };
        let (answers, ()) = tokio::join!(waiting, unlock);
        let overloaded: Vec<_> = answers
            .iter()
            .filter(|answer| answer.code() == "overloaded")
            .collect();
        assert_eq!(overloaded.len(), 16);
        assert!(
            overloaded
                .iter()
                .all(|answer| answer.status == 503 && answer.field("retry-after").is_some())
        );
        assert_eq!(
            answers.iter().filter(|answer| answer.status == 201).count(),
            4
        );
        assert_eq!(server.stock("A").await, (96, 4, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

/// A database that takes about a thousand rows a second on each connection.
async fn slow_down(database: &TestDatabase) {
    database
        .connect()
        .await
        .batch_execute(
            "CREATE FUNCTION millrace.slowly() RETURNS trigger LANGUAGE plpgsql
                 AS $$ BEGIN PERFORM pg_sleep(0.001); RETURN NEW; END $$;
             CREATE TRIGGER slowly BEFORE INSERT ON millrace.orders
                 FOR EACH ROW EXECUTE FUNCTION millrace.slowly()",
        )
        .await
        .expect("slow the database down");
}

/// Many orders in batches: how many of them got each status.
async fn flood(
    server: &TestServer,
    name: &str,
    requests: usize,
    lines: usize,
) -> std::collections::BTreeMap<u64, usize> {
    let bodies = (0..requests).map(|request| {
        let line = |n| format!("{{\"user_id\":\"{name}-{request}-{n}\",\"sku_id\":\"A\"}}\n");
        (0..lines).map(line).collect::<String>()
    });
    let fields = [("Content-Type", "application/x-ndjson")];
    let answers = join_all(bodies.map(|body| {
        crate::support::server::request(server.data, "POST", "/v1/orders:batch", &fields, body)
    }))
    .await;
    let mut statuses = std::collections::BTreeMap::new();
    for answer in answers {
        assert_eq!(answer.status, 200, "{answer:?}");
        for line in answer
            .body
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
        {
            let verdict: Value = serde_json::from_slice(line).expect("a line of JSON");
            let status = verdict["http_status"].as_u64().expect("a status");
            *statuses.entry(status).or_default() += 1;
        }
    }
    statuses
}

#[test]
fn a_slow_database_gets_what_it_can_take_in_time_and_the_rest_is_refused_on_arrival() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.workers.count = 2;
            config.orders.timeout_ms = 4_000;
        })
        .await;
        server.put_sku("A", 1_000_000, Value::Null).await;
        slow_down(&database).await;
        // What it can take is learned from what it takes.
        let warm_up = flood(&server, "warm", 2, 200).await;
        assert_eq!(warm_up.keys().collect::<Vec<_>>(), [&201], "{warm_up:?}");
        // Ten times of what could be written within the wait.
        let statuses = flood(&server, "u", 50, 1_000).await;
        let of = |status: u64| statuses.get(&status).copied().unwrap_or(0);
        assert!(of(201) > 500, "it went on writing: {statuses:?}");
        assert!(of(503) > 10_000, "the rest was refused: {statuses:?}");
        assert!(
            of(504) * 100 <= of(201),
            "what was let in was written in time: {statuses:?}"
        );
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_refusal_says_when_to_come_again_and_an_estimate_is_honest() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| config.workers.count = 2).await;
        server.put_sku("A", 1_000_000, Value::Null).await;
        slow_down(&database).await;
        flood(&server, "warm", 2, 200).await;
        let seen = std::cell::Cell::new(false);
        let crowd = async {
            for round in 0_u32.. {
                if seen.get() {
                    break;
                }
                flood(&server, &format!("u-{round}"), 4, 1_000).await;
            }
        };
        let asking = async {
            let hurried = |n: u32| {
                let body = json!({ "user_id": format!("hasty-{n}"), "sku_id": "A" });
                server.post(body, None, &[("Prefer", "wait=1")])
            };
            let mut hasty = hurried(0).await;
            for n in 1..1_000 {
                if hasty.status == 503 {
                    break;
                }
                hasty = hurried(n).await;
            }
            assert_eq!((hasty.status, hasty.code().as_str()), (503, "overloaded"));
            let retry_after = hasty.field("retry-after").expect("Retry-After");
            assert!(
                retry_after.parse::<u32>().expect("seconds") >= 1,
                "{hasty:?}"
            );
            let started = Instant::now();
            let body = json!({ "user_id": "patient", "sku_id": "A" });
            let accepted = server
                .post(body, None, &[("Prefer", "respond-async")])
                .await;
            assert_eq!(accepted.status, 202, "{accepted:?}");
            let order = accepted.json();
            let estimated = order["estimated_wait_ms"].as_u64().expect("an estimate");
            let target = format!("/v1/orders/{}", order["order_id"].as_str().expect("an id"));
            wait_until("the row", async || {
                server.get(&target).await.json()["status"] == "pending_payment"
            })
            .await;
            seen.set(true);
            (estimated, started.elapsed().as_millis() as u64)
        };
        let (_, (estimated, took)) = tokio::join!(crowd, asking);
        assert!(
            (took / 4..=took * 4).contains(&estimated),
            "{estimated} ms estimated, {took} ms taken"
        );
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_lost_database_connection_is_made_good_before_the_buyer_notices() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 100, Value::Null).await;
        let operator = database.connect().await;
        for round in 0..10 {
            let user = format!("u-{round}");
            assert_eq!(server.order(&user, "A", None).await.status, 201);
            operator
                .execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                      WHERE datname = current_database() AND application_name LIKE 'millrace worker%'",
                    &[],
                )
                .await
                .expect("terminate");
        }
        assert_eq!(server.order("last", "A", None).await.status, 201);
        assert_eq!(server.stock("A").await, (89, 11, 0));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn look_ups_while_the_pool_is_stuck_are_told_to_come_back() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.database.pool_size = 1;
            config.database.step_timeout_ms = 1_500;
        })
        .await;
        server.put_sku("A", 10, Value::Null).await;
        let order = server.order("u", "A", None).await.json();
        let path = format!("/v1/orders/{}", order["order_id"].as_str().expect("an id"));
        let mut blocker = database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        lock.batch_execute("LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
            .await
            .expect("lock");
        let answers = join_all((0..8).map(|_| server.get("/v1/orders/17"))).await;
        for answer in answers {
            assert_eq!(
                (answer.status, answer.code()),
                (503, "not_ready".to_owned())
            );
            assert!(answer.field("retry-after").is_some());
        }
        // What needs no database is answered meanwhile, an order of a moment ago included.
        assert_eq!(server.get(&path).await.json(), order);
        assert_eq!(server.stock("A").await, (9, 1, 0));
        lock.rollback().await.expect("unlock");
        wait_until("the pool is back", async || {
            server.get("/v1/orders/17").await.status == 404
        })
        .await;
        assert!(server.stop().await);
    });
}

/// A deferred trigger makes each commit slow, as a slow disk would.
#[test]
fn on_a_slow_disk_buyers_wait_or_are_told_the_truth() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.workers.count = 1;
            config.orders.timeout_ms = 700;
        })
        .await;
        server.put_sku("A", 100, Value::Null).await;
        database
            .connect()
            .await
            .batch_execute(
                "CREATE FUNCTION millrace.slow() RETURNS trigger LANGUAGE plpgsql AS
                     $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
                 CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON millrace.stock_log
                     DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION millrace.slow()",
            )
            .await
            .expect("slow commits");
        let users: Vec<String> = (0..60).map(|n| format!("u-{n}")).collect();
        let started = Instant::now();
        let answers = join_all(users.iter().map(|user| server.order(user, "A", Some("k")))).await;
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "nobody waits beyond the order timeout"
        );
        assert!(
            answers
                .iter()
                .all(|answer| matches!(answer.status, 201 | 202 | 504)),
            "{answers:?}"
        );
        assert!(answers.iter().any(|answer| answer.status == 201));
        server.assert_audit().await;
        let (free, held, _) = server.stock("A").await;
        let mut there = 0;
        for (user, told) in users.iter().zip(&answers) {
            let now = server.order_as_it_stands(user).await;
            match told.status {
                201 => assert_eq!(
                    now.as_deref(),
                    Some("pending_payment"),
                    "{user} was told yes"
                ),
                504 => assert_eq!(now, None, "{user} was told no"),
                // Undecided: it has become one or the other by now.
                _ => assert!(
                    matches!(now.as_deref(), None | Some("pending_payment")),
                    "{user}: {now:?}"
                ),
            }
            there += u64::from(now.is_some());
        }
        assert_eq!((free, held), (100 - there, there));
        assert!(server.stop().await);
    });
}

#[test]
fn the_deepest_body_that_is_accepted_fits_a_coroutines_stack() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 10, Value::Null).await;
        let nested = |depth: usize| {
            let inside = format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
            format!("{{\"user_id\":\"u\",\"sku_id\":\"A\",\"attributes\":{inside}}}")
        };
        let post = async |body: String| {
            let fields = [("Content-Type", "application/json")];
            crate::support::server::request(server.data, "POST", "/v1/orders", &fields, body).await
        };
        for depth in [1, 100, 127, 500] {
            let answer = post(nested(depth)).await;
            assert!(matches!(answer.status, 201 | 400), "{depth}: {answer:?}");
        }
        let answer = post(nested(7_000)).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        assert_eq!(post("[".repeat(16_000)).await.status, 400);
        assert_eq!(post("{\"a\":".repeat(3_000)).await.status, 400);
        // It lives.
        assert_eq!(
            server
                .post(json!({ "user_id": "u", "sku_id": "A" }), None, &[])
                .await
                .status,
            201
        );
        assert!(server.stop().await);
    });
}

#[test]
fn an_operator_who_hangs_up_leaves_memory_and_database_agreed() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 5, Value::Null).await;
        let mut blocker = database.connect().await;
        let lock = lock_stock(&mut blocker).await;
        let control = server.control;
        let hung_up = tokio::task::spawn_blocking(move || {
            let mut stream = std::net::TcpStream::connect(control).expect("connect");
            let body = r#"{"quantity":7}"#;
            let request = format!(
                "POST /admin/v1/skus/A/restock HTTP/1.1\r\nHost: {control}\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            std::io::Write::write_all(&mut stream, request.as_bytes()).expect("send");
            stream
        })
        .await
        .expect("the operator");
        let watcher = database.connect().await;
        let waits = async || {
            let row = watcher
                .query_one(
                    "SELECT count(*) FROM pg_stat_activity
                      WHERE datname = current_database() AND wait_event_type = 'Lock'",
                    &[],
                )
                .await
                .expect("activity");
            row.get::<_, i64>(0) > 0
        };
        wait_until("the change waits in the database", waits).await;
        drop(hung_up);
        lock.rollback().await.expect("unlock");
        wait_until("the change is in force", async || {
            server.stock("A").await == (12, 0, 0)
        })
        .await;
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn readyz_warns_where_a_failover_may_lose_commits_and_stays_ready() {
    block_on(async {
        let pair = Pair::start().await;
        let socket = pair.primary.place.display().to_string();
        let url = |user: &str| format!("postgresql://{user}@/{DATABASE}?host={socket}");
        let server = TestServer::start_at(url(USER), |_| {}).await;
        let warnings = async || {
            let answer = server.control("GET", "/readyz", Value::Null).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            answer.json()["warnings"].clone()
        };
        wait_until("the warning", async || warnings().await != json!([])).await;
        let asynchronous = warnings().await;
        assert_eq!(asynchronous[0]["name"], "replication", "{asynchronous}");
        let detail = asynchronous[0]["detail"].as_str().unwrap_or_default();
        assert!(
            detail.contains("synchronous_standby_names is empty"),
            "{detail}"
        );
        // Who may not see standbys is told of none.
        pair.primary.sql("CREATE ROLE stranger LOGIN").await;
        let step = Duration::from_secs(20);
        let stranger = Database::new(&url("stranger"), "millrace", 1, step).expect("a URL");
        let seen = replication::read(&stranger).await.expect("a look");
        assert_eq!(seen.standbys, 0);
        let no_warning = async || warnings().await == json!([]);
        pair.synchronous(true).await;
        wait_until("commits wait for the standby", no_warning).await;
        pair.synchronous(false).await;
        wait_until("the warning again", async || !no_warning().await).await;
        pair.part().await;
        wait_until("there is no standby", no_warning).await;
        assert!(server.stop().await);
    });
}

/// Each line asks again for an order that only the database knows, which does not answer.
#[test]
fn a_batch_of_look_ups_ends_with_its_request_not_with_each_line() {
    block_on(async {
        const LINES: usize = 10;
        let timeout = Duration::from_secs(2);
        let database = TestDatabase::create().await;
        let lines: String = (0..LINES)
            .map(|n| json!({ "user_id": format!("u-{n}"), "sku_id": "A", "idempotency_key": "k" }))
            .map(|line| format!("{line}\n"))
            .collect();
        let post = async |server: &TestServer| {
            let fields = [("Content-Type", "application/x-ndjson")];
            let lines = lines.clone();
            let answer = request(server.data, "POST", "/v1/orders:batch", &fields, lines).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let body = String::from_utf8(answer.body).expect("text");
            body.lines()
                .map(|line| serde_json::from_str(line).expect("a line"))
                .collect::<Vec<Value>>()
        };
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 100, Value::Null).await;
        let placed = post(&server).await;
        assert!(server.stop().await);
        // This one knows the keys, and has none of the orders in memory.
        let server = TestServer::start(&database, |config| {
            config.orders.timeout_ms = timeout.as_millis() as u64;
        })
        .await;
        let mut blocker = database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        lock.batch_execute("LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
            .await
            .expect("lock");
        let started = Instant::now();
        let late = post(&server).await;
        let took = started.elapsed();
        assert_eq!(late.len(), LINES);
        for line in &late {
            assert_eq!(line["http_status"], 503, "nothing is said of it: {line}");
        }
        // With a deadline of its own each line would take as long as all may.
        assert!(took < timeout * 2, "{LINES} look-ups took {took:?}");
        lock.rollback().await.expect("unlock");
        for (again, placed) in post(&server).await.iter().zip(&placed) {
            assert_eq!(
                (&again["http_status"], &placed["http_status"]),
                (&json!(200), &json!(201))
            );
            assert_eq!(again["order_id"], placed["order_id"]);
        }
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}
