//! Nodes that are replaced one after the other under load, by the same release or by another one; and what a node does of
//! which another release has written the row, or migrated the schema.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::nodes::{Buyers, Cluster, Node, Placed, assert_all_there, is_for_a_moment, told};
use crate::support::block_on;
use crate::support::http::{Answer, Connection, call, try_call};
use crate::support::served::Ended;
use crate::support::waiting::{PATIENCE, wait_until};
use crate::support::webhook::{self, Paid};
use crate::{SKU, THIRDS, UNITS};

/// The ends of what a release says of a schema that a newer one has migrated. The last one is from before that had a sentence.
const NO_WAY_BACK: [&str; 3] = [
    "a newer one has migrated it; start that one",
    "is newer than this release of Millrace",
    "is missing from the filesystem",
];

/// Names the program of another release.
const OTHER: &str = "MILLRACE_OTHER_PROGRAM";

#[test]
fn nodes_that_are_replaced_one_after_the_other_refuse_for_a_moment_and_no_more() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        replace_all(&cluster, |name| cluster.try_start(name), false).await;
    });
}

#[test]
fn so_do_nodes_of_an_earlier_release_that_are_replaced_by_this_one() {
    let Ok(other) = std::env::var(OTHER) else {
        println!(
            "not run: nodes of two releases: {OTHER} does not name the program of an earlier one"
        );
        return;
    };
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let earlier = |name: &str| cluster.try_start_other(&other, name);
        replace_all(&cluster, earlier, true).await;
    });
}

/// Three nodes that `earlier` starts are replaced by ones of this release, under orders of both kinds and payments. One is to go
/// back in the middle: it does, or the schema has changed and nothing else happens. With `kills` two of them do not stop: one of
/// this release, whose log the earlier one reads then, and the last of the earlier one.
async fn replace_all(
    cluster: &Cluster,
    earlier: impl Fn(&str) -> Result<Node, Ended>,
    kills: bool,
) {
    let start = |name: &str| earlier(name).unwrap_or_else(|ended| panic!("{name}: {}", ended.log));
    let mut nodes = Vec::from(["one", "two", "three"].map(start));
    Cluster::wait_for_lanes(&nodes.iter().collect::<Vec<_>>(), &THIRDS).await;
    nodes[0].served.put_sku(SKU, UNITS);
    Cluster::wait_for_sku(&nodes.iter().collect::<Vec<_>>(), SKU).await;
    let this = |name: &str| cluster.start(name);
    let back = |name: &str| {
        earlier(name).unwrap_or_else(|ended| {
            let said = ended.log.trim();
            assert!(NO_WAY_BACK.iter().any(|why| said.ends_with(why)), "{said}");
            println!("there is no way back: {said}");
            this(name)
        })
    };
    let under_load = UnderLoad::start(&nodes, kills);
    under_load.stop(&mut nodes, 0).await;
    under_load.add(&mut nodes, this("one")).await;
    under_load.stop(&mut nodes, 2).await;
    under_load.add(&mut nodes, back("one")).await;
    under_load.stop(&mut nodes, 2).await;
    under_load.add(&mut nodes, this("one")).await;
    if kills {
        under_load.kill(&mut nodes, 2).await;
        under_load.add(&mut nodes, this("one")).await;
    }
    under_load.stop(&mut nodes, 0).await;
    under_load.add(&mut nodes, this("two")).await;
    match kills {
        true => under_load.kill(&mut nodes, 0).await,
        false => under_load.stop(&mut nodes, 0).await,
    }
    under_load.add(&mut nodes, this("three")).await;
    under_load.end(cluster, nodes).await;
}

/// Buyers at all nodes, and a platform that reports payments for some of their orders to any node.
struct UnderLoad {
    buyers: Buyers,
    platform: Platform,
    /// Whether connections are lost.
    kills: bool,
}

impl UnderLoad {
    fn start(nodes: &[Node], kills: bool) -> Self {
        let buyers = Buyers::start(6, SKU, addresses(nodes));
        UnderLoad {
            platform: Platform::start(&buyers),
            buyers,
            kills,
        }
    }

    async fn wait_for(&self, orders: usize, payments: usize) {
        let until = self.platform.count() + payments;
        self.buyers.wait_for(orders).await;
        wait_until(&format!("{payments} more are paid"), async || {
            self.platform.count() >= until
        })
        .await;
    }

    /// Stops the node at this place as the documents say.
    async fn stop(&self, nodes: &mut Vec<Node>, at: usize) {
        self.wait_for(60, 20).await;
        let node = nodes.remove(at);
        // Its load balancer has been told.
        self.buyers.go_to(addresses(nodes));
        // Requests that are under way there.
        self.wait_for(20, 2).await;
        node.stop();
    }

    /// Kills the node at this place, and waits until the others have its lanes.
    async fn kill(&self, nodes: &mut Vec<Node>, at: usize) {
        self.wait_for(60, 20).await;
        nodes.remove(at).served.kill();
        self.buyers.go_to(addresses(nodes));
        Cluster::wait_for_lanes(&nodes.iter().collect::<Vec<_>>(), &[32, 32]).await;
        self.wait_for(60, 20).await;
    }

    /// A node comes, and gets its lanes.
    async fn add(&self, nodes: &mut Vec<Node>, node: Node) {
        nodes.push(node);
        Cluster::wait_for_lanes(&nodes.iter().collect::<Vec<_>>(), &THIRDS).await;
        self.buyers.go_to(addresses(nodes));
    }

    async fn end(self, cluster: &Cluster, nodes: Vec<Node>) {
        self.wait_for(60, 20).await;
        let (paid, mut odd) = self.platform.stop();
        let (placed, strange) = self.buyers.stop();
        odd.extend(strange);
        println!(
            "{} orders were acknowledged, {} paid",
            placed.len(),
            paid.len()
        );
        assert_all_there(&cluster.database, &placed).await;
        let client = cluster.database.connect().await;
        wait_until("each payment has found its order", async || {
            let sql =
                "SELECT count(*) FROM millrace.orders WHERE status = 2 AND order_id = ANY ($1)";
            let found = client
                .query_one(sql, &[&paid])
                .await
                .unwrap()
                .get::<_, i64>(0);
            found == paid.len() as i64
        })
        .await;
        for node in &nodes {
            let audit = call(node.served.control, "GET", "/admin/v1/audit", &[], "").json();
            assert_eq!(audit["ok"], true, "{audit:#}");
        }
        for node in nodes {
            node.stop();
        }
        odd.retain(|what| !self.kills || !what.starts_with("lost:"));
        assert!(odd.is_empty(), "{odd:?}");
    }
}

fn addresses(nodes: &[Node]) -> Vec<SocketAddr> {
    nodes.iter().map(|node| node.served.data).collect()
}

/// A payment platform, and somebody who adds the counters of the SKU up in every answer.
struct Platform {
    stop: Arc<AtomicBool>,
    paid: Arc<AtomicUsize>,
    /// The orders that were paid, and what should not have been answered.
    thread: JoinHandle<(Vec<i64>, Vec<String>)>,
}

impl Platform {
    /// Every third order of these buyers is paid.
    fn start(buyers: &Buyers) -> Self {
        let (stop, paid) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (placed, targets) = (Arc::clone(&buyers.placed), Arc::clone(&buyers.targets));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&paid));
        let thread = std::thread::spawn(move || {
            let (mut ids, mut odd) = (Vec::new(), Vec::new());
            for next in (0..).step_by(3) {
                let order = loop {
                    if stopped.load(Ordering::Relaxed) {
                        return (ids, odd);
                    }
                    match placed.lock().unwrap().get(next) {
                        Some(Placed { order_id, .. }) => break order_id.clone(),
                        None => std::thread::sleep(Duration::from_millis(2)),
                    }
                };
                if pay(&order, next, &targets, &mut odd) {
                    ids.push(order.parse().expect("an id"));
                    count.fetch_add(1, Ordering::Relaxed);
                }
                let target = format!("/v1/skus/{SKU}");
                let sku = try_call(turn(&targets, next), "GET", &target, &[], "");
                note(sku.as_ref(), &mut odd);
                if let Ok(sku) = sku.map(|answer| answer.json())
                    && let Some(total) = sku["total"].as_u64()
                {
                    let units = ["free", "held", "sold"].map(|name| sku[name].as_u64());
                    let sum = units.into_iter().flatten().sum::<u64>();
                    if (sum, total) != (UNITS.into(), UNITS.into()) {
                        odd.push(format!("the counters of a SKU: {sku}"));
                    }
                }
            }
            unreachable!("there are numbers enough")
        });
        Platform { stop, paid, thread }
    }

    fn count(&self) -> usize {
        self.paid.load(Ordering::Relaxed)
    }

    fn stop(self) -> (Vec<i64>, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the platform")
    }
}

/// One of the nodes in their turn.
fn turn(targets: &Mutex<Vec<SocketAddr>>, number: usize) -> SocketAddr {
    let targets = targets.lock().unwrap();
    targets[number % targets.len()]
}

/// Notes an answer that no client should see, and a lost connection.
fn note(answer: Result<&Answer, &std::io::Error>, odd: &mut Vec<String>) {
    match answer {
        Ok(answer) if answer.status == 200 || is_for_a_moment(answer) => {}
        Ok(answer) => odd.push(told(answer)),
        Err(error) => odd.push(format!("lost: {error}")),
    }
}

/// Looks an order up at one node and reports its payment to another, until that is taken.
fn pay(id: &str, number: usize, targets: &Mutex<Vec<SocketAddr>>, odd: &mut Vec<String>) -> bool {
    let deadline = Instant::now() + PATIENCE;
    for attempt in number.. {
        let target = format!("/v1/orders/{id}");
        let order = try_call(turn(targets, attempt), "GET", &target, &[], "");
        note(order.as_ref(), odd);
        if let Ok(order) = order
            && order.status == 200
        {
            let paid = Paid::of(&order.json());
            let taken = Connection::open(turn(targets, attempt + 1)).and_then(|mut connection| {
                webhook::send(&mut connection, &paid.event, &paid.body(), webhook::SECRET)
            });
            note(taken.as_ref(), odd);
            if taken.is_ok_and(|answer| answer.status == 200) {
                return true;
            }
        }
        if Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    odd.push(format!("order {id} could not be paid"));
    false
}

async fn execute(cluster: &Cluster, sql: &str) {
    let client = cluster.database.connect().await;
    client.batch_execute(sql).await.expect(sql);
}

#[test]
fn a_release_joins_no_nodes_whose_logs_it_cannot_read_or_that_cannot_read_its_own() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let one = cluster.start("one");
        let refused = |format: i16, by: &str| {
            let cluster = &cluster;
            let by = by.to_owned();
            async move {
                let sql = format!("UPDATE millrace.node SET reads_format = {format}");
                execute(cluster, &sql).await;
                let ended = match by.as_str() {
                    "alone" => cluster.try_start_alone("alone"),
                    name => cluster.try_start(name),
                };
                ended.err().expect("it must not start").log
            }
        };
        let log = refused(9, "two").await;
        let reason = "their logs may be in format 9, and this release reads none newer than 1";
        assert!(log.contains(reason), "{log}");
        let log = refused(0, "two").await;
        assert!(
            log.contains("node 0 reads no log newer than format 0"),
            "{log}"
        );
        // The one that runs goes on.
        one.served.put_sku(SKU, UNITS);
        let fields = [("Content-Type", "application/json")];
        let body = json!({ "user_id": "u", "sku_id": SKU }).to_string();
        let order = call(one.served.data, "POST", "/v1/orders", &fields, &body);
        assert_eq!(order.status, 201, "{order:?}");
        // Neither its own process nor one on its own reads what a later release has left.
        one.served.kill();
        for by in ["one", "alone"] {
            let log = refused(9, by).await;
            assert!(log.contains(reason), "{by}: {log}");
        }
        execute(&cluster, "UPDATE millrace.node SET reads_format = 1").await;
        let nodes = ["one", "two"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &[32, 32]).await;
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn nodes_go_on_when_a_newer_release_adds_to_the_schema_and_no_older_one_starts_after_that() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let [one, two, three] = crate::three(&cluster).await;
        let all = [&one, &two, &three].map(|node| node.served.data);
        let buyers = Buyers::start(6, SKU, all.to_vec());
        buyers.wait_for(60).await;
        // As `millrace serve` of that release does it, while the nodes of this one run.
        let tables = [
            "orders",
            "sku",
            "node",
            "lane",
            "writer",
            "stock_share",
            "payments",
            "stock_log",
        ];
        for table in tables {
            let add = format!("ALTER TABLE millrace.{table} ADD COLUMN of_later text DEFAULT ''");
            execute(&cluster, &add).await;
        }
        let version = "CREATE TABLE millrace.of_later (id integer);
            INSERT INTO millrace.refinery_schema_history VALUES (999, 'of_later', '2030-01-01T00:00:00Z', '1')";
        execute(&cluster, version).await;
        buyers.wait_for(120).await;
        // One that starts again has to be of the newer release; until then the others have its lanes.
        let left = all[..2].to_vec();
        buyers.go_to(left);
        buyers.wait_for(20).await;
        three.stop();
        let refused = cluster.try_start("three").err().expect("it must not start");
        assert!(
            refused
                .log
                .contains("schema millrace is newer than this release"),
            "{}",
            refused.log
        );
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        buyers.wait_for(60).await;
        let (placed, strange) = buyers.stop();
        assert!(strange.is_empty(), "{strange:?}");
        assert_all_there(&cluster.database, &placed).await;
        // Takeovers go on too.
        two.served.kill();
        Cluster::wait_for_lanes(&[&one], &[64]).await;
        let audit = call(one.served.control, "GET", "/admin/v1/audit", &[], "").json();
        assert_eq!(audit["ok"], true, "{audit:#}");
        one.stop();
    });
}
