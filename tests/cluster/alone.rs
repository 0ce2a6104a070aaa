//! A process on its own takes the place of nodes that did not leave.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace::pipeline::failover::lease::waited_ms;
use serde_json::{Value, json};

use crate::nodes::{
    ANSWER_LEASE_MS, Cluster, LEASE_MS, Node, Placed, abandon_log, abandon_log_of,
    assert_all_there, order_at,
};
use crate::support::block_on;
use crate::support::brokers::Kind;
use crate::support::http::{Answer, call};
use crate::support::postgres::TestDatabase;
use crate::support::waiting::wait_until;
use crate::support::webhook::Paid;
use crate::{SKU, THIRDS, UNITS, place_async, three};

/// A SKU for which buyers wait.
const LIST: &str = "W";

async fn number(database: &TestDatabase, sql: &str) -> i64 {
    let client = database.connect().await;
    client.query_one(sql, &[]).await.expect(sql).get(0)
}

fn put(at: &Node, sku: &str, total: usize) {
    let body = json!({ "unit_price": 100, "currency": "EUR", "total": total }).to_string();
    let target = format!("/admin/v1/skus/{sku}");
    let answer = call(at.served.control, "PUT", &target, &[], &body);
    assert!(matches!(answer.status, 200 | 201), "{answer:?}");
}

fn order(at: SocketAddr, user: &str, sku: &str, waits: bool) -> Answer {
    prefer(at, user, sku, waits, "wait=20")
}

fn prefer(at: SocketAddr, user: &str, sku: &str, waits: bool, prefer: &str) -> Answer {
    let fields = [
        ("Content-Type", "application/json"),
        ("Idempotency-Key", "k"),
        ("Prefer", prefer),
    ];
    let body = json!({ "user_id": user, "sku_id": sku, "waitlist": waits });
    call(at, "POST", "/v1/orders", &fields, &body.to_string())
}

fn id(answer: &Answer) -> String {
    let id = answer.json()["order_id"].as_str().map(str::to_owned);
    id.unwrap_or_else(|| panic!("{answer:?}"))
}

/// Free, held and sold units of a SKU, once they can be told.
async fn units(at: SocketAddr, sku: &str) -> (i64, i64, i64) {
    let target = format!("/v1/skus/{sku}");
    wait_until("its counters can be told", async || {
        call(at, "GET", &target, &[], "").status == 200
    })
    .await;
    let sku = call(at, "GET", &target, &[], "").json();
    let of = |name: &str| sku[name].as_i64().unwrap_or(-1);
    (of("free"), of("held"), of("sold"))
}

fn audit(at: &Node) {
    let audit = call(at.served.control, "GET", "/admin/v1/audit", &[], "").json();
    assert_eq!(audit["ok"], true, "{audit:#}");
}

/// Kills every node while the log of each has acknowledged orders that the database lacks. Returns these, and the ids of
/// `waiting` ones.
async fn kill_with_full_logs(
    cluster: &Cluster,
    nodes: [Node; 3],
    from: usize,
    waiting: usize,
) -> (Vec<Placed>, Vec<String>) {
    let mut client = cluster.database.connect().await;
    let transaction = client.transaction().await.expect("a transaction");
    let lock = "LOCK TABLE millrace.orders IN SHARE ROW EXCLUSIVE MODE";
    transaction.batch_execute(lock).await.expect("lock");
    let placed = place_async(&nodes.each_ref(), from..from + 90);
    let waiting: Vec<String> = (0..waiting)
        .map(|number| {
            let at = nodes[number % 3].served.data;
            let waits = prefer(at, &format!("l-{number}"), LIST, true, "respond-async");
            assert_eq!(waits.json()["status"], "waitlisted", "{waits:?}");
            id(&waits)
        })
        .collect();
    for node in nodes {
        node.served.kill();
    }
    transaction.rollback().await.expect("unlock");
    let ids: Vec<i64> = placed
        .iter()
        .map(|placed| &placed.order_id)
        .chain(&waiting)
        .map(|id| id.parse().expect("an id"))
        .collect();
    let sql = "SELECT count(*) FROM millrace.orders WHERE order_id = ANY ($1)";
    let rows = client.query_one(sql, &[&ids]).await.expect("count");
    assert_eq!(rows.get::<_, i64>(0), 0, "they are in the logs alone");
    (placed, waiting)
}

#[test]
fn a_process_on_its_own_takes_the_place_of_nodes_that_were_all_killed() {
    takes_their_place(Kind::Redis);
}

#[test]
fn it_also_takes_that_of_nodes_whose_logs_are_partitions_of_kafka() {
    takes_their_place(Kind::Kafka);
}

/// The settings with another broker, or none.
fn with_backend(settings: String, backend: &str) -> String {
    let lines = settings.lines().map(|line| {
        if line.trim_start().starts_with("queue.backend") {
            return format!("queue.backend = \"{backend}\"");
        }
        line.to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn takes_their_place(kind: Kind) {
    block_on(async {
        let Some(cluster) = Cluster::on(kind, 900_000).await else {
            return;
        };
        let nodes = three(&cluster).await;
        let mut placed = place_async(&nodes.each_ref(), 0..30);
        let paid: Vec<Value> = (0..6)
            .map(|number| {
                let order = order(
                    nodes[number % 3].served.data,
                    &format!("p-{number}"),
                    SKU,
                    false,
                );
                assert_eq!(order.status, 201, "{order:?}");
                order.json()
            })
            .collect();
        for (number, order) in paid.iter().enumerate() {
            let answer = Paid::of(order)
                .deliver(nodes[(number + 1) % 3].served.data)
                .await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let id = order["order_id"].as_str().expect("an id");
            wait_until("it is paid", async || {
                order_at(nodes[0].served.data, id)["status"] == "paid"
            })
            .await;
        }
        // All units of the other SKU are held, and nine buyers wait.
        put(&nodes[0], LIST, 6);
        Cluster::wait_for_sku(&nodes.each_ref(), LIST).await;
        for number in 0..6 {
            let held = order(
                nodes[number % 3].served.data,
                &format!("h-{number}"),
                LIST,
                false,
            );
            assert_eq!(held.status, 201, "{held:?}");
        }
        let waiting: Vec<String> = (0..9)
            .map(|number| {
                let waits = order(
                    nodes[number % 3].served.data,
                    &format!("w-{number}"),
                    LIST,
                    true,
                );
                assert_eq!(waits.json()["position"], number + 1, "{waits:?}");
                id(&waits)
            })
            .collect();
        assert_all_there(&cluster.database, &placed).await;
        let (late, late_waiting) = kill_with_full_logs(&cluster, nodes, 30, 6).await;
        placed.extend(late);

        // With settings that do not lead to the logs it changes nothing, and names them.
        let state =
            "SELECT sum(hashtext((node, epoch, state, journal_in_use)::text)) FROM millrace.node";
        let before = number(&cluster.database, state).await;
        let refused = cluster
            .try_start_with("lost", |settings| {
                let settings = settings.replace("enabled = true", "enabled = false");
                with_backend(settings, "memory")
            })
            .err()
            .expect("it must not start");
        for part in ["node 0: ", "node 2: ", "abandon --node N"] {
            assert!(refused.log.contains(part), "{part}: {}", refused.log);
        }
        assert_eq!(number(&cluster.database, state).await, before);

        let started = Instant::now();
        let alone = cluster
            .try_start_alone("alone")
            .unwrap_or_else(|ended| panic!("{}", ended.log));
        // One that is alive may come back, and one that is cut off may answer for so long.
        let ms = LEASE_MS + waited_ms(ANSWER_LEASE_MS);
        assert!(started.elapsed() >= Duration::from_millis(ms));
        let data = alone.served.data;
        assert_all_there(&cluster.database, &placed).await;
        for placed in &placed {
            let again = placed.again(data, SKU);
            assert_eq!(again.json()["order_id"], placed.order_id, "{again:?}");
        }
        let held = placed.len() as i64;
        assert_eq!(
            units(data, SKU).await,
            (i64::from(UNITS) - held - 6, held, 6)
        );
        assert_eq!(units(data, LIST).await, (0, 6, 0));
        let left = "SELECT (SELECT count(*) FROM millrace.node WHERE state <> 'left' AND node <> 0)
            + (SELECT count(*) FROM millrace.stock_share) + (SELECT count(*) FROM millrace.lane WHERE node IS NOT NULL)
            + (SELECT sum(lent)::int8 FROM millrace.sku)";
        assert_eq!(number(&cluster.database, left).await, 0);
        // Whoever waits is served in the sequence of joining.
        put(&alone, LIST, 8);
        for (number, id) in waiting.iter().enumerate() {
            let expected = if number < 2 {
                "pending_payment"
            } else {
                "waitlisted"
            };
            wait_until(&format!("{number} is {expected}"), async || {
                order_at(data, id)["status"] == expected
            })
            .await;
        }
        for id in &late_waiting {
            assert_eq!(order_at(data, id)["status"], "waitlisted");
        }
        let more = order(data, "later", SKU, false);
        assert_eq!(more.status, 201, "{more:?}");
        audit(&alone);
        alone.stop();

        // And back to nodes.
        let nodes = ["one", "two", "three"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &THIRDS).await;
        for sku in [SKU, LIST] {
            Cluster::wait_for_sku(&nodes.each_ref(), sku).await;
        }
        for (number, placed) in placed.iter().enumerate() {
            let again = placed.again(nodes[number % 3].served.data, SKU);
            assert_eq!(again.json()["order_id"], placed.order_id, "{again:?}");
        }
        let refused = cluster.try_start_alone("alone").err();
        let refused = refused.expect("it must not start while nodes run");
        assert!(
            refused.log.contains("another Millrace is active"),
            "{}",
            refused.log
        );
        put(&nodes[1], LIST, 6 + waiting.len() + late_waiting.len());
        for id in waiting.iter().chain(&late_waiting) {
            wait_until("everybody has a unit", async || {
                order_at(nodes[2].served.data, id)["status"] == "pending_payment"
            })
            .await;
        }
        for node in &nodes {
            audit(node);
        }
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn nodes_that_are_cut_off_acknowledge_nothing_that_a_process_in_their_place_does_not_have() {
    block_on(async {
        let Some(mut cluster) = Cluster::open().await else {
            return;
        };
        let proxy = cluster.through_a_proxy().await;
        let nodes = three(&cluster).await;
        let mut placed = place_async(&nodes.each_ref(), 0..30);
        proxy.cut_off();
        // They go on by their logs, and are asked all the time.
        placed.extend(place_async(&nodes.each_ref(), 30..60));
        let (stop, at) = (
            Arc::new(AtomicBool::new(false)),
            nodes.each_ref().map(|node| node.served.data),
        );
        let stopped = Arc::clone(&stop);
        let asking = std::thread::spawn(move || {
            let mut placed = Vec::new();
            for number in 60.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let user = format!("u-{number}");
                let answer = prefer(at[number % 3], &user, SKU, false, "respond-async");
                if answer.status == 202 && answer.json()["status"] == "accepted" {
                    placed.push(Placed::of(&user, "k", &answer));
                }
            }
            placed
        });
        let url = cluster.database.url();
        let alone = cluster.try_start_with("alone", |settings| {
            let settings = settings.replace("enabled = true", "enabled = false");
            let other = |line: &str| match line.trim_start().starts_with("url = ") {
                true => format!("url = \"{url}\""),
                false => line.to_owned(),
            };
            settings.lines().map(other).collect::<Vec<_>>().join("\n")
        });
        let alone = alone.unwrap_or_else(|ended| panic!("{}", ended.log));
        stop.store(true, Ordering::Relaxed);
        placed.extend(asking.join().expect("those who ask"));
        assert_all_there(&cluster.database, &placed).await;
        for placed in &placed {
            let again = placed.again(alone.served.data, SKU);
            assert_eq!(again.json()["order_id"], placed.order_id, "{again:?}");
        }
        // None of them answers any more, and they end once they reach the database.
        for node in &nodes {
            let late = prefer(node.served.data, "late", SKU, false, "respond-async");
            assert_eq!(late.status, 503, "{late:?}");
        }
        proxy.shut(false);
        for node in nodes {
            node.wait_for_its_end();
        }
        audit(&alone);
        alone.stop();
    });
}

#[test]
fn nodes_without_logs_leave_their_rows_to_a_process_on_its_own() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let in_memory = |settings| with_backend(settings, "memory");
        let nodes = ["one", "two"].map(|name| {
            let node = cluster.try_start_with(name, in_memory);
            node.unwrap_or_else(|ended| panic!("{}", ended.log))
        });
        Cluster::wait_for_lanes(&nodes.each_ref(), &[32, 32]).await;
        put(&nodes[0], SKU, 40);
        Cluster::wait_for_sku(&nodes.each_ref(), SKU).await;
        for number in 0..20 {
            let at = nodes[number % 2].served.data;
            assert_eq!(order(at, &format!("u-{number}"), SKU, false).status, 201);
        }
        for node in nodes {
            node.served.kill();
        }
        let alone = cluster.try_start_with("one", |settings| {
            in_memory(settings.replace("enabled = true", "enabled = false"))
        });
        let alone = alone.unwrap_or_else(|ended| panic!("{}", ended.log));
        assert_eq!(units(alone.served.data, SKU).await, (20, 20, 0));
        for number in 0..20 {
            let again = order(alone.served.data, &format!("u-{number}"), SKU, false);
            assert_eq!(again.status, 200, "{again:?}");
        }
        audit(&alone);
        alone.stop();
    });
}

#[test]
fn a_log_that_a_process_on_its_own_cannot_read_stops_it_until_it_is_given_up_and_nodes_may_go_on() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three(&cluster).await;
        let early = place_async(&nodes.each_ref(), 0..30);
        assert_all_there(&cluster.database, &early).await;
        let config = nodes[0].data_dir.join("millrace.toml");
        let (late, _) = kill_with_full_logs(&cluster, nodes, 30, 0).await;
        cluster.delete_log(2);
        for _ in 0..2 {
            let stopped = cluster.try_start_alone("alone").err();
            let stopped = stopped.expect("acknowledged orders are missing");
            assert!(
                stopped.log.contains("does not reach back to group"),
                "{}",
                stopped.log
            );
        }
        let dead = "SELECT count(*) FROM millrace.node WHERE state = 'dead' AND taken_by IS NULL";
        assert_eq!(number(&cluster.database, dead).await, 2);
        abandon_log_of(&config, 2);
        // Nodes go on from where it was stopped: as after a failover.
        let nodes = ["one", "two", "three"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &THIRDS).await;
        Cluster::wait_for_sku(&nodes.each_ref(), SKU).await;
        assert_all_there(&cluster.database, &early).await;
        let there = number(&cluster.database, "SELECT count(*) FROM millrace.orders").await;
        assert!(
            (31..120).contains(&there),
            "those of one log are lost: {there}"
        );
        for (number, placed) in late.iter().enumerate() {
            let again = placed.again(nodes[number % 3].served.data, SKU);
            assert!(matches!(again.status, 200..=202), "{again:?}");
        }
        let held = (early.len() + late.len()) as i64;
        wait_until("the counters of the sale are those of now", async || {
            units(nodes[0].served.data, SKU).await.1 == held
        })
        .await;
        for node in &nodes {
            audit(node);
        }
        let config = nodes[0].data_dir.join("millrace.toml");
        for node in nodes {
            node.served.kill();
        }
        // A log may also be given up before anything was tried, as no node runs; and that of node 0 is its own.
        cluster.delete_log(0);
        cluster.delete_log(1);
        abandon_log_of(&config, 1);
        let stopped = cluster.try_start_alone("alone").err();
        let stopped = stopped.expect("its own log is gone");
        assert!(stopped.log.contains("millrace:0` does not reach back"));
        abandon_log(&config, &[]);
        let alone = cluster
            .try_start_alone("alone")
            .unwrap_or_else(|ended| panic!("{}", ended.log));
        audit(&alone);
        alone.stop();
    });
}
