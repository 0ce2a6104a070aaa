//! The journal as a client sees it: acknowledged orders, duplicates, backlog, recovery, limits.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::block_on;
use crate::support::http::{Answer, try_call};
use crate::support::postgres::{TestDatabase, test_dir};
use crate::support::served::{Served, run};
use crate::support::server::TestServer;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

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
            let answer = crate::support::server::request(
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

/// Accepts orders in batches until one is refused with `code`; returns the ids of the accepted.
async fn flood(server: &TestServer, prefix: &str, rounds: usize, code: &str) -> Vec<String> {
    let mut ids = Vec::new();
    for round in 0..rounds {
        let lines: Vec<String> = (0..1_000)
            .map(|line| {
                json!({ "user_id": format!("{prefix}-{round}-{line}"), "sku_id": "A" }).to_string()
            })
            .collect();
        let answer = crate::support::server::request(
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
        let mut refused = false;
        for line in String::from_utf8_lossy(&answer.body).lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            match line["http_status"].as_u64() {
                Some(202) => ids.push(line["order_id"].as_str().unwrap().to_owned()),
                // The next segment is being made.
                Some(503) if line["code"] == "overloaded" => {}
                Some(503) => {
                    assert_eq!(line["code"], code, "{line}");
                    refused = true;
                }
                _ => panic!("{line}"),
            }
        }
        if refused {
            return ids;
        }
    }
    panic!("{} orders were accepted and none refused", ids.len());
}

#[test]
fn a_full_journal_refuses_before_anything_is_held_and_takes_orders_again_when_there_is_room() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.queue.journal.bytes_max = 1 << 20;
            config.queue.capacity = 2_000;
            config.database.step_timeout_ms = 1_000;
        })
        .await;
        server.put_sku("A", 1_000_000, Value::Null).await;
        let admin = database.connect().await;
        admin
            .batch_execute("BEGIN; LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        let ids = flood(&server, "u", 100, "journal_full").await;
        let (_, held, _) = server.stock("A").await;
        assert_eq!(held, ids.len() as u64, "a refused order holds units");
        // What was refused had reserved more than the others turned out to need; that is soon used.
        let mut more = 0;
        let refused = loop {
            let one = accept(&server, &format!("more-{more}"), "k").await;
            match one.status {
                202 => more += 1,
                503 if one.code() == "overloaded" => {}
                _ => break one,
            }
            assert!(more < 20_000, "the journal never ends");
        };
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (503, "journal_full")
        );
        let live = server.control("GET", "/admin/v1/live", Value::Null).await;
        assert_eq!(live.json()["order_log"]["state"], "full");
        admin.batch_execute("COMMIT").await.unwrap();
        until_status(&server, ids.last().unwrap(), "pending_payment").await;
        let deadline = Instant::now() + PATIENCE;
        while accept(&server, "late", "k").await.status != 202 {
            assert!(Instant::now() < deadline, "there is no room again");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn what_a_stop_leaves_in_the_journal_the_next_start_writes_and_late_orders_as_expired() {
    block_on(async {
        let database = TestDatabase::create().await;
        let dir = test_dir();
        let configure = |config: &mut millrace::config::Config| {
            config.queue.journal.dir = dir.path().join("journal");
            config.queue.capacity = 100;
            config.orders.timeout_ms = 500;
            config.orders.payment_ttl_ms = 1_000;
            config.database.step_timeout_ms = 1_500;
        };
        let server = TestServer::start(&database, configure).await;
        server.put_sku("A", 100, Value::Null).await;
        let admin = database.connect().await;
        admin
            .batch_execute("BEGIN; LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        for number in 0..20 {
            let answer = accept(&server, &format!("u-{number}"), "k").await;
            assert_eq!(answer.status, 202, "{answer:?}");
        }
        let left = server.stop().await;
        assert!(!left, "orders were left, and that was not said");
        admin.batch_execute("COMMIT").await.unwrap();
        let rows = |sql: &'static str| {
            let admin = &admin;
            async move { admin.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) }
        };
        assert_eq!(rows("SELECT count(*) FROM millrace.orders").await, 0);
        // The drain took longer than the time to pay.
        let server = TestServer::start(&database, configure).await;
        let expired = "SELECT count(*) FROM millrace.order_list WHERE status = 'expired'";
        assert_eq!(rows(expired).await, 20);
        assert_eq!(server.stock("A").await, (100, 0, 0));
        let again = accept(&server, "u-3", "k").await;
        assert_eq!(
            (again.status, &again.json()["status"]),
            (200, &json!("expired"))
        );
        server.assert_audit().await;
        assert!(server.stop().await);
        // Once more: everything is there, so nothing is written twice.
        let server = TestServer::start(&database, configure).await;
        assert_eq!(rows("SELECT count(*) FROM millrace.orders").await, 20);
        assert!(server.stop().await);
    });
}

/// Settings of a process that shares `database` and has everything else to itself.
fn settings(database: &TestDatabase, more: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut settings = vec![("MILLRACE_DATABASE__URL".to_owned(), database.url())];
    for (name, value) in more {
        settings.push(((*name).to_owned(), (*value).to_owned()));
    }
    settings
}

fn post(served: &Served, user: &str, prefer: &[(&str, &str)]) -> std::io::Result<Answer> {
    let mut fields = vec![("Content-Type", "application/json")];
    fields.extend_from_slice(prefer);
    let body = json!({ "user_id": user, "sku_id": "A" }).to_string();
    try_call(served.data, "POST", "/v1/orders", &fields, &body)
}

const ASYNC: &[(&str, &str)] = &[("Prefer", "respond-async")];

#[test]
fn a_process_that_was_paused_and_replaced_neither_acknowledges_nor_writes() {
    block_on(async {
        let database = TestDatabase::create().await;
        let admin = database.connect().await;
        let (dir_a, dir_b) = (test_dir(), test_dir());
        let settings = settings(
            &database,
            &[
                ("MILLRACE_QUEUE__JOURNAL__LEASE_MS", "1500"),
                ("MILLRACE_DATABASE__STEP_TIMEOUT_MS", "1000"),
            ],
        );
        let start = |dir: &Path| Served::try_start(dir, &settings, &dir.join("log"));
        let mut first = start(dir_a.path()).expect("the first starts");
        first.put_sku("A", 1_000);
        assert_eq!(post(&first, "u-1", ASYNC).unwrap().status, 202);

        let pid = Pid::from_child(&first.child);
        kill_process(pid, Signal::STOP).unwrap();
        let refused = start(dir_b.path()).err().expect("a second is refused");
        assert!(
            refused.log.contains("another Millrace is active"),
            "{refused:?}"
        );
        // As after the loss of the machine, or of the network: PostgreSQL drops its sessions.
        admin
            .execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                  WHERE datname = current_database() AND application_name LIKE 'millrace%'",
                &[],
            )
            .await
            .unwrap();
        let refused = start(dir_b.path()).err().expect("its journal is not here");
        assert!(
            refused.log.contains("may hold acknowledged orders"),
            "{refused:?}"
        );
        // Not before the paused one has lost the right to acknowledge, whatever the database's clock
        // says, which has just jumped ahead.
        admin
            .execute(
                "UPDATE millrace.node SET lease_until = lease_until - interval '1 day'",
                &[],
            )
            .await
            .unwrap();
        let asked = Instant::now();
        let abandon = ["journal", "abandon", "--yes"];
        let (code, said) = run(dir_b.path(), &settings, &abandon);
        assert_eq!(code, Some(0), "{said}");
        assert!(
            asked.elapsed() >= Duration::from_millis(1_500),
            "it waits for as long as the right lasts: {said}"
        );
        let second = start(dir_b.path()).expect("the second starts");
        assert_eq!(post(&second, "u-2", ASYNC).unwrap().status, 202);

        kill_process(pid, Signal::CONT).unwrap();
        // It may be gone at any moment, but as long as it answers, it accepts nothing.
        for number in 0..50 {
            for prefer in [ASYNC, &[]] {
                if let Ok(answer) = post(&first, &format!("late-{number}"), prefer) {
                    let promised = answer.status == 201
                        || answer.field("preference-applied") == Some("respond-async");
                    assert!(!promised, "{answer:?}");
                }
            }
        }
        let ended = first.ended_by(Instant::now() + PATIENCE);
        assert!(
            ended.is_some_and(|status| !status.success()),
            "the first goes on: {ended:?}"
        );
        let late: i64 = admin
            .query_one(
                "SELECT count(*) FROM millrace.orders WHERE user_id LIKE 'late%'",
                &[],
            )
            .await
            .unwrap()
            .get(0);
        assert_eq!(late, 0);
        second.terminate();
        assert_eq!(second.wait(), Some(0));
    });
}

#[test]
fn a_journal_is_not_abandoned_while_its_process_renews_its_right() {
    block_on(async {
        let database = TestDatabase::create().await;
        let admin = database.connect().await;
        let (dir_a, dir_b) = (test_dir(), test_dir());
        let settings = settings(&database, &[("MILLRACE_QUEUE__JOURNAL__LEASE_MS", "2000")]);
        let first = Served::try_start(dir_a.path(), &settings, &dir_a.path().join("log"))
            .expect("it starts");
        kill_process(Pid::from_child(&first.child), Signal::STOP).unwrap();
        admin
            .execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                  WHERE datname = current_database() AND application_name LIKE 'millrace%'",
                &[],
            )
            .await
            .unwrap();
        let (directory, of_b) = (dir_b.path().to_owned(), settings.clone());
        let abandoning = tokio::task::spawn_blocking(move || {
            run(&directory, &of_b, &["journal", "abandon", "--yes"])
        });
        // It has the lock, so it waits.
        let deadline = Instant::now() + PATIENCE;
        let waits = "SELECT count(*) FROM pg_stat_activity
                      WHERE application_name = 'millrace node 0' AND datname = current_database()
                        AND state = 'idle' AND query LIKE '%journal_in_use%'";
        while admin.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 0 {
            assert!(Instant::now() < deadline, "it does not wait");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        kill_process(Pid::from_child(&first.child), Signal::CONT).unwrap();
        let (code, said) = abandoning.await.unwrap();
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("is alive"), "{said}");
        // An operator who knows better does not wait, and what still runs is fenced.
        kill_process(Pid::from_child(&first.child), Signal::STOP).unwrap();
        admin
            .execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                  WHERE datname = current_database() AND application_name LIKE 'millrace%'",
                &[],
            )
            .await
            .unwrap();
        let abandon = ["journal", "abandon", "--yes", "--process-is-gone"];
        let (code, said) = run(dir_b.path(), &settings, &abandon);
        assert_eq!(code, Some(0), "{said}");
        assert!(!said.contains("waiting"), "{said}");
        first.kill();
    });
}

/// A backup from before the SKUs were made, to which they were put again in another sequence.
#[test]
fn an_order_of_the_journal_is_of_the_sku_that_was_bought_where_the_database_numbers_it_anew() {
    block_on(async {
        let database = TestDatabase::create().await;
        let dir = test_dir();
        let settings = settings(&database, &[]);
        let start = || Served::try_start(dir.path(), &settings, &dir.path().join("log"));
        let served = start().expect("it starts");
        served.put_sku("A", 10);
        served.put_sku("B", 10);
        let admin = database.connect().await;
        admin
            .batch_execute("BEGIN; LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        let answer = post(&served, "u", ASYNC).unwrap();
        assert_eq!(answer.status, 202, "{answer:?}");
        served.kill();
        admin
            .batch_execute(
                "COMMIT;
                 UPDATE millrace.sku SET sku_id = 'other' WHERE sku_id = 'A';
                 UPDATE millrace.sku SET sku_id = 'A' WHERE sku_id = 'B';
                 UPDATE millrace.sku SET sku_id = 'B' WHERE sku_id = 'other'",
            )
            .await
            .unwrap();
        let served = start().expect("it starts again");
        let bought =
            "SELECT s.sku_id, s.held FROM millrace.orders o JOIN millrace.sku s ON s.id = o.sku";
        let row = admin.query_one(bought, &[]).await.unwrap();
        assert_eq!((row.get::<_, &str>(0), row.get::<_, i64>(1)), ("A", 1));
        served.terminate();
        assert_eq!(served.wait(), Some(0));
    });
}

#[test]
fn a_journal_is_inspected_verified_locked_and_refused_when_it_is_damaged() {
    block_on(async {
        let database = TestDatabase::create().await;
        let dir = test_dir();
        let settings = settings(&database, &[("MILLRACE_DATABASE__STEP_TIMEOUT_MS", "1000")]);
        let served =
            Served::try_start(dir.path(), &settings, &dir.path().join("log")).expect("it starts");
        served.put_sku("A", 1_000);
        let admin = database.connect().await;
        admin
            .batch_execute("BEGIN; LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        for number in 0..5 {
            let answer = post(&served, &format!("u-{number}"), ASYNC).unwrap();
            assert_eq!(answer.status, 202, "{answer:?}");
        }
        // While it runs.
        let second = Served::try_start(dir.path(), &settings, &dir.path().join("log-2")).err();
        let second = second.expect("the journal is locked");
        assert!(
            second.log.contains("in use by another process"),
            "{second:?}"
        );
        let (code, said) = run(dir.path(), &settings, &["journal", "inspect", "--json"]);
        let summary: Value = serde_json::from_str(&said).unwrap_or_default();
        assert_eq!((code, &summary["records"]), (Some(0), &json!(5)), "{said}");
        let (code, said) = run(dir.path(), &settings, &["journal", "abandon", "--yes"]);
        assert_eq!(code, Some(1), "{said}");
        served.kill();

        let journal = dir.path().join("journal");
        let first = journal.join("0000000000000001.segment");
        let sound = std::fs::read(&first).unwrap();
        let mut damaged = sound.clone();
        damaged[512 + 100] ^= 1;
        std::fs::write(&first, &damaged).unwrap();
        let (code, said) = run(dir.path(), &settings, &["journal", "verify"]);
        assert_eq!(code, Some(1), "{said}");
        assert!(
            said.contains("0000000000000001.segment, offset 512"),
            "{said}"
        );
        let (code, said) = run(dir.path(), &settings, &["journal", "inspect", "--orders"]);
        assert_eq!(code, Some(1), "{said}");
        assert_eq!(said.matches("\"user_id\"").count(), 4, "{said}");
        let refused = Served::try_start(dir.path(), &settings, &dir.path().join("log")).err();
        let refused = refused.expect("it does not start on a damaged journal");
        assert!(
            refused.log.contains("the journal is damaged"),
            "{refused:?}"
        );

        std::fs::write(&first, &sound).unwrap();
        admin.batch_execute("COMMIT").await.unwrap();
        let served = Served::try_start(dir.path(), &settings, &dir.path().join("log"))
            .expect("it starts on what is sound again");
        let rows = admin
            .query_one("SELECT count(*) FROM millrace.orders", &[])
            .await;
        assert_eq!(rows.unwrap().get::<_, i64>(0), 5);
        served.terminate();
        assert_eq!(served.wait(), Some(0));
    });
}
