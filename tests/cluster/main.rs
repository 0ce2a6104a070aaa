//! Several nodes serve one sale: processes on one PostgreSQL, with their order logs on one Redis, Kafka or RocketMQ. What happens when they
//! come, go in an orderly way, are killed with -9 and lose their directories, or are paused for longer than their lease.

#[path = "../support/mod.rs"]
mod support;

mod alone;
mod demo;
mod draws;
mod nodes;
mod parked;
mod releases;
mod waiting;

use std::time::{Duration, Instant};

use millrace::order::UnixMillis;
use rustix::process::Signal;
use serde_json::json;
use support::block_on;
use support::brokers::Kind;
use support::http::{call, try_call};
use support::proxy::Proxy;
use support::standby::{self, Pair, Server};
use support::waiting::wait_until;
use support::webhook::Paid;

use nodes::{Buyers, Cluster, LEASE_MS, Node, Placed, assert_all_there, order_at};

const SKU: &str = "A";
const UNITS: u32 = 1_000_000;

/// A third of 64 lanes each.
const THIRDS: [usize; 3] = [21, 21, 22];

/// Three nodes, each with a third of the lanes.
async fn three_nodes(cluster: &Cluster) -> [Node; 3] {
    let nodes = ["one", "two", "three"].map(|name| cluster.start(name));
    Cluster::wait_for_lanes(&nodes.each_ref(), &THIRDS).await;
    nodes
}

/// The same with a SKU on sale.
async fn three(cluster: &Cluster) -> [Node; 3] {
    let nodes = three_nodes(cluster).await;
    nodes[0].served.put_sku(SKU, UNITS);
    Cluster::wait_for_sku(&nodes.each_ref(), SKU).await;
    nodes
}

#[test]
fn every_node_serves_every_buyer() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three(&cluster).await;
        for number in 0..60 {
            let body = json!({ "user_id": format!("u-{number}"), "sku_id": SKU }).to_string();
            let at = |shift: usize| nodes[(number + shift) % 3].served.data;
            let fields = [
                ("Content-Type", "application/json"),
                ("Idempotency-Key", "k"),
            ];
            let placed = call(at(0), "POST", "/v1/orders", &fields, &body);
            assert_eq!(placed.status, 201, "{placed:?}");
            let id = placed.json()["order_id"].as_str().unwrap().to_owned();
            // The same request at another node, and the order at the third.
            let again = call(at(1), "POST", "/v1/orders", &fields, &body);
            assert_eq!((again.status, &again.json()["order_id"]), (200, &json!(id)));
            assert_eq!(order_at(at(2), &id)["status"], "pending_payment");
            let list = call(
                at(2),
                "GET",
                &format!("/v1/users/u-{number}/orders"),
                &[],
                "",
            );
            assert_eq!(list.json()["orders"].as_array().map(Vec::len), Some(1));
        }
        // One after the other leaves; what it had is elsewhere, and the last one leaves nothing behind.
        let [one, two, three] = nodes;
        let id_of = |node: &Node, number: usize| {
            let target = format!("/v1/users/u-{number}/orders");
            let list = call(node.served.data, "GET", &target, &[], "").json();
            list["orders"][0]["order_id"].as_str().map(str::to_owned)
        };
        let before: Vec<_> = (0..60).map(|number| id_of(&three, number)).collect();
        let held = |node: &Node| {
            let nodes = call(node.served.control, "GET", "/admin/v1/nodes", &[], "").json();
            let units = |of: &serde_json::Value| of["units_held"].as_i64();
            let held = nodes["nodes"]
                .as_array()
                .map(|of| of.iter().filter_map(units).sum::<i64>());
            (nodes["node"].clone(), held)
        };
        assert_eq!(held(&two), (json!(1), Some(60)), "the rows of all shares");
        let drain = call(
            two.served.control,
            "POST",
            "/admin/v1/nodes/0/drain",
            &[],
            "",
        );
        assert_eq!(drain.status, 200, "{drain:?}");
        Cluster::wait_for_lanes(&[&one, &two, &three], &[32, 32]).await;
        assert_eq!(id_of(&one, 0), before[0], "it passes requests on");
        one.stop();
        assert_eq!(held(&two), (json!(1), Some(60)));
        two.stop();
        Cluster::wait_for_lanes(&[&three], &[64]).await;
        let after: Vec<_> = (0..60).map(|number| id_of(&three, number)).collect();
        assert_eq!(before, after);
        three.stop();
        let client = cluster.database.connect().await;
        let free = "SELECT count(*) FROM millrace.lane WHERE node IS NULL";
        let free: i64 = client.query_one(free, &[]).await.unwrap().get(0);
        assert_eq!(free, 64, "the last one has left its lanes to nobody");
        let held = "SELECT held FROM millrace.sku";
        let held: i64 = client.query_one(held, &[]).await.unwrap().get(0);
        assert_eq!(held, 60, "with the units of their unpaid orders");
    });
}

#[test]
fn a_node_that_leaves_takes_over_none_that_dies_while_another_stays() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let [leaving, dying, staying] = three(&cluster).await;
        let target = "/admin/v1/nodes/0/drain";
        let drain = call(staying.served.control, "POST", target, &[], "");
        assert_eq!(drain.status, 200, "{drain:?}");
        Cluster::wait_for_lanes(&[&leaving, &dying, &staying], &[32, 32]).await;
        dying.served.kill();
        Cluster::wait_for_lanes(&[&leaving, &staying], &[64]).await;
        let takeovers = |node: &Node| node.served.metric("millrace_takeovers_total").unwrap();
        assert_eq!((takeovers(&leaving), takeovers(&staying)), (0.0, 1.0));
        leaving.stop();
        staying.stop();
    });
}

#[test]
fn a_node_whose_machine_has_a_wrong_clock_goes_by_that_of_the_database() {
    const AHEAD_MS: u64 = 3_600_000;
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let node = cluster.start_ahead("one", AHEAD_MS);
        node.served.put_sku(SKU, UNITS);
        let opens_at = UnixMillis::now().plus_ms(AHEAD_MS / 2).to_string();
        let terms =
            json!({ "unit_price": 100, "currency": "EUR", "total": 10, "opens_at": opens_at });
        let (target, body) = ("/admin/v1/skus/later", terms.to_string());
        let put = call(node.served.control, "PUT", target, &[], &body);
        assert!((200..300).contains(&put.status), "{put:?}");
        let order = |sku: &str| {
            let body = json!({ "user_id": "u", "sku_id": sku }).to_string();
            let fields = [("Content-Type", "application/json")];
            call(node.served.data, "POST", "/v1/orders", &fields, &body)
        };
        let early = order("later");
        assert_eq!(early.json()["code"], "sale_not_open", "{early:?}");
        let placed = order(SKU);
        assert_eq!(placed.status, 201, "{placed:?}");
        let paid = Paid::of(&placed.json()).deliver(node.served.data).await;
        assert_eq!(paid.status, 200, "its timestamp is of now: {paid:?}");
        node.stop();
    });
}

#[test]
fn orders_are_paid_or_expire_wherever_their_callbacks_come_in_and_their_lanes_go() {
    block_on(async {
        let Some(cluster) = Cluster::with_payment_ttl_ms(6_000).await else {
            return;
        };
        let nodes = three(&cluster).await;
        let mut placed = Vec::new();
        for number in 0..48 {
            let body = json!({ "user_id": format!("p-{number}"), "sku_id": SKU }).to_string();
            let fields = [("Content-Type", "application/json")];
            let at = nodes[number % 3].served.data;
            let order = call(at, "POST", "/v1/orders", &fields, &body);
            assert_eq!(order.status, 201, "{order:?}");
            placed.push(order.json());
        }
        // Every other one is paid, at another node; meanwhile the lanes of the first node move.
        let drain = call(
            nodes[1].served.control,
            "POST",
            "/admin/v1/nodes/0/drain",
            &[],
            "",
        );
        assert_eq!(drain.status, 200, "{drain:?}");
        for (number, order) in placed.iter().enumerate().step_by(2) {
            let paid = Paid::of(order);
            let answer = paid.deliver(nodes[(number + 1) % 3].served.data).await;
            assert_eq!(answer.status, 200, "{answer:?}");
        }
        for (number, order) in placed.iter().enumerate() {
            let expected = if number % 2 == 0 { "paid" } else { "expired" };
            let id = order["order_id"].as_str().unwrap();
            wait_until(&format!("order {number} is {expected}"), async || {
                order_at(nodes[number % 3].served.data, id)["status"] == expected
            })
            .await;
        }
        // An operator's decision about an order is made by the node that has its buyer's lane.
        let id = placed[1]["order_id"].as_str().unwrap();
        let target = format!("/admin/v1/orders/{id}/refunded");
        let fields = [("Content-Type", "application/json")];
        let mut statuses: Vec<u16> = nodes
            .iter()
            .map(|node| {
                let body = json!({ "reference": "r", "restock": false }).to_string();
                call(node.served.control, "POST", &target, &fields, &body).status
            })
            .collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [409, 421, 421], "it has expired");
        for node in &nodes {
            wait_until("every node has the counters of the sale", async || {
                let sku = call(node.served.data, "GET", &format!("/v1/skus/{SKU}"), &[], "");
                if sku.status == 503 {
                    // Its counters are older than it may tell.
                    return false;
                }
                let sku = sku.json();
                let units = |name: &str| sku[name].as_u64().unwrap_or(u64::MAX);
                assert_eq!(
                    u64::from(UNITS),
                    units("free") + units("held") + units("sold"),
                    "{sku}"
                );
                (units("held"), units("sold")) == (0, 24)
            })
            .await;
            let audit = call(node.served.control, "GET", "/admin/v1/audit", &[], "").json();
            assert_eq!(audit["ok"], true, "{audit:#}");
        }
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn a_node_that_is_killed_and_loses_its_directory_loses_nothing_that_was_acknowledged() {
    loses_nothing(Kind::Redis);
}

#[test]
fn nor_does_one_whose_log_is_a_partition_of_kafka() {
    loses_nothing(Kind::Kafka);
}

#[test]
fn nor_does_one_whose_log_is_a_queue_of_rocketmq() {
    loses_nothing(Kind::RocketMq);
}

fn loses_nothing(kind: Kind) {
    block_on(async {
        let Some(cluster) = Cluster::on(kind, 900_000).await else {
            return;
        };
        let [one, two, three] = three(&cluster).await;
        let all = [&one, &two, &three].map(|node| node.served.data);
        let buyers = Buyers::start(8, SKU, all.to_vec());
        buyers.wait_for(200).await;
        let killed = Instant::now();
        let (data_dir, left) = (three.data_dir.clone(), all[..2].to_vec());
        three.served.kill();
        std::fs::remove_dir_all(data_dir).expect("delete its directory");
        buyers.go_to(left);
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        println!("lanes were elsewhere after {:?}", killed.elapsed());
        buyers.wait_for(200).await;
        let (placed, strange) = buyers.stop();
        let strange: Vec<_> = strange
            .into_iter()
            .filter(|what| !what.starts_with("lost:"))
            .collect();
        assert!(strange.is_empty(), "{strange:?}");
        assert_all_there(&cluster.database, &placed).await;
        // Its buyers' keys are known where their lanes are now.
        for placed in placed.iter().step_by(17) {
            let again = placed.again(one.served.data, SKU);
            assert_eq!(again.json()["order_id"], placed.order_id, "{again:?}");
        }
        // A new machine takes the place.
        let four = cluster.start("four");
        Cluster::wait_for_lanes(&[&one, &two, &four], &THIRDS).await;
        for node in [one, two, four] {
            node.stop();
        }
    });
}

#[test]
fn a_log_that_cannot_be_read_keeps_its_own_lanes_closed_and_no_others_until_it_is_given_up() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let [one, two, three] = three(&cluster).await;
        three.served.kill();
        cluster.delete_log(2);
        wait_until("somebody takes it over", async || {
            Cluster::row_of(&one, 2)["state"] == "dead"
        })
        .await;
        let taker = Cluster::row_of(&one, 2)["taken_over_by"].clone();
        let (taker, other) = if taker == 0 { (one, two) } else { (two, one) };
        // Another one dies, whose log is there.
        other.served.kill();
        wait_until("its lanes are open at the one that is left", async || {
            let (dealt, nowhere) = Cluster::dealt(taker.served.data);
            matches!(dealt[..], [42 | 43]) && nowhere == 64 - dealt[0]
        })
        .await;
        let mut statuses = std::collections::BTreeSet::new();
        for number in 0..100 {
            let body = json!({ "user_id": format!("u-{number}"), "sku_id": SKU }).to_string();
            let fields = [("Content-Type", "application/json")];
            statuses.insert(call(taker.served.data, "POST", "/v1/orders", &fields, &body).status);
        }
        assert_eq!(Vec::from_iter(statuses), [201, 503]);
        // Started again, it does not wait for that log either.
        taker.served.kill();
        let name = if taker.data_dir.ends_with("one") {
            "one"
        } else {
            "two"
        };
        let taker = cluster.start(name);
        wait_until("the other lanes are open again", async || {
            matches!(Cluster::dealt(taker.served.data), (dealt, _) if matches!(dealt[..], [42 | 43]))
        })
        .await;
        taker.abandon_log_of(2);
        Cluster::wait_for_lanes(&[&taker], &[64]).await;
        taker.stop();
    });
}

#[test]
fn nodes_that_are_all_killed_and_started_again_go_on_with_what_they_had() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three(&cluster).await;
        let buyers = Buyers::start(6, SKU, nodes.iter().map(|node| node.served.data).collect());
        buyers.wait_for(150).await;
        for node in nodes {
            node.served.kill();
        }
        let (placed, _) = buyers.stop();
        let nodes = ["one", "two", "three"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &THIRDS).await;
        assert_all_there(&cluster.database, &placed).await;
        for (number, placed) in placed.iter().enumerate().step_by(11) {
            let again = placed.again(nodes[number % 3].served.data, SKU);
            assert_eq!(again.json()["order_id"], placed.order_id, "{again:?}");
        }
        for node in nodes {
            node.stop();
        }
    });
}

/// Orders that are acknowledged once they are in a log.
fn place_async(nodes: &[&Node], numbers: std::ops::Range<usize>) -> Vec<Placed> {
    let fields = [
        ("Content-Type", "application/json"),
        ("Idempotency-Key", "k"),
        ("Prefer", "respond-async"),
    ];
    let place = |number: usize| {
        let user = format!("u-{number}");
        let body = json!({ "user_id": user, "sku_id": SKU }).to_string();
        let node = nodes[number % nodes.len()];
        let answer = call(node.served.data, "POST", "/v1/orders", &fields, &body);
        assert_eq!(answer.status, 202, "{answer:?}");
        Placed::of(&user, "k", &answer)
    };
    numbers.map(place).collect()
}

#[test]
fn a_failover_that_loses_commits_ends_every_right_and_loses_no_order_that_is_in_a_log() {
    block_on(async {
        let mut pair = Pair::start().await;
        let socket = |server: &Server| server.place.join(".s.PGSQL.5432");
        let proxy = Proxy::start_at(&socket(&pair.primary)).await;
        let url = proxy.url(standby::USER, standby::DATABASE);
        let Some(cluster) = Cluster::open_at(url).await else {
            return;
        };
        let [one, two, three] = three(&cluster).await;
        let mut placed = place_async(&[&one, &two, &three], 0..60);
        // From here on every commit is lost: that a node leaves, comes back and gets other lanes, units that are lent, orders.
        pair.part().await;
        one.stop();
        Cluster::wait_for_lanes(&[&two, &three], &[32, 32]).await;
        placed.extend(place_async(&[&two, &three], 60..120));
        let one = cluster.start("one");
        Cluster::wait_for_lanes(&[&one, &two, &three], &THIRDS).await;
        placed.extend(place_async(&[&one, &two, &three], 120..180));
        pair.primary.stop_immediately();
        pair.promote().await;
        proxy.lead_to(&socket(&pair.standby));
        // Each sees another timeline, or a row that is not its own any more.
        for node in [one, two, three] {
            node.wait_for_its_end();
        }
        let nodes = ["one", "two", "three"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &THIRDS).await;
        Cluster::wait_for_sku(&nodes.each_ref(), SKU).await;
        for (number, placed) in placed.iter().enumerate() {
            let again = placed.again(nodes[number % 3].served.data, SKU);
            assert_eq!(again.json()["order_id"], placed.order_id, "{again:?}");
        }
        let held = "SELECT sum(held)::int8 FROM (SELECT held FROM millrace.sku UNION ALL SELECT held FROM millrace.stock_share) h";
        assert_eq!(pair.standby.number(held).await, placed.len() as i64);
        for node in nodes {
            let audit = call(node.served.control, "GET", "/admin/v1/audit", &[], "").json();
            assert_eq!(audit["ok"], true, "{audit:#}");
            node.stop();
        }
    });
}

#[test]
fn a_process_on_its_own_and_nodes_take_turns_at_one_database() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let single = cluster.serve_alone().await;
        single.put_sku(SKU, UNITS, json!({})).await;
        let mut placed = Vec::new();
        for number in 0..20 {
            let user = format!("u-{number}");
            let order = single.order(&user, SKU, Some("k")).await;
            placed.push(Placed::of(&user, "k", &order));
        }
        let refused = cluster.try_start("one").err().expect("it must not start");
        assert!(
            refused.log.contains("another Millrace is active"),
            "{}",
            refused.log
        );
        assert!(single.stop().await);

        let [one, two] = ["one", "two"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        for placed in &placed {
            let again = placed.again(two.served.data, SKU);
            assert_eq!(again.json()["order_id"], placed.order_id, "{again:?}");
        }
        for number in 20..40 {
            let user = format!("u-{number}");
            let body = json!({ "user_id": user, "sku_id": SKU }).to_string();
            let fields = [
                ("Content-Type", "application/json"),
                ("Idempotency-Key", "k"),
            ];
            let order = call(one.served.data, "POST", "/v1/orders", &fields, &body);
            placed.push(Placed::of(&user, "k", &order));
        }
        one.stop();
        two.stop();

        let single = cluster.serve_alone().await;
        for placed in &placed {
            let again = placed.again(single.data, SKU);
            assert_eq!(again.json()["order_id"], placed.order_id, "{again:?}");
        }
        assert_eq!(single.stock(SKU).await.1, 40);
        single.assert_audit().await;
        assert!(single.stop().await);
    });
}

#[test]
fn a_node_that_is_paused_for_longer_than_its_lease_acknowledges_nothing_more() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let [one, two, mut three] = three(&cluster).await;
        let all = [&one, &two, &three].map(|node| node.served.data);
        let buyers = Buyers::start(6, SKU, all.to_vec());
        buyers.wait_for(100).await;
        three.signal(Signal::STOP);
        buyers.go_to(all[..2].to_vec());
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        // Orders that wait at the paused node's door, for buyers of every lane.
        let paused = three.served.data;
        let late: Vec<_> = (0..40)
            .map(|number| {
                std::thread::spawn(move || {
                    let body = json!({ "user_id": format!("late-{number}"), "sku_id": SKU });
                    let fields = [
                        ("Content-Type", "application/json"),
                        ("Prefer", "respond-async"),
                    ];
                    try_call(paused, "POST", "/v1/orders", &fields, &body.to_string())
                })
            })
            .collect();
        buyers.wait_for(50).await;
        three.signal(Signal::CONT);
        for answer in late {
            // Passed on to the owner, or refused, or the process has ended; never acknowledged by itself.
            if let Ok(Ok(answer)) = answer.join()
                && matches!(answer.status, 201 | 202)
                && answer.json()["status"] != "undecided"
                && let Some(id) = answer.json()["order_id"].as_str()
            {
                let client = cluster.database.connect().await;
                let id: i64 = id.parse().expect("an id");
                wait_until("an acknowledged order is a row", async || {
                    let sql = "SELECT FROM millrace.orders WHERE order_id = $1";
                    client.query_opt(sql, &[&id]).await.unwrap().is_some()
                })
                .await;
            }
        }
        let ended = three
            .served
            .ended_by(Instant::now() + Duration::from_millis(20 * LEASE_MS));
        let log = std::fs::read_to_string(&three.log).unwrap_or_default();
        assert_eq!(ended.and_then(|ended| ended.code()), Some(1), "{log}");
        // By what it has found first: the epoch of its log, or of its row.
        assert!(log.contains("taken over"), "{log}");
        let (placed, strange) = buyers.stop();
        let strange: Vec<_> = strange
            .into_iter()
            .filter(|what| !what.starts_with("lost:"))
            .collect();
        assert!(strange.is_empty(), "{strange:?}");
        assert_all_there(&cluster.database, &placed).await;
        // Started again on its directory, it is a node like any other.
        let again = cluster.start("three");
        Cluster::wait_for_lanes(&[&one, &two, &again], &THIRDS).await;
        for node in [one, two, again] {
            node.stop();
        }
    });
}
