//! Parked orders belong to a lane: the node that has it writes them, whoever that is by then.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use millrace::order::{Lane, UserId};
use serde_json::json;

use crate::nodes::{Cluster, Node, Placed, order_at};
use crate::support::block_on;
use crate::support::http::{Answer, call};
use crate::support::waiting::{PATIENCE, wait_until};
use crate::{THIRDS, three_nodes};

const SKU: &str = "A";
const UNITS: u32 = 60;

/// The next buyer, by number, whose lane this node owns.
fn buyer_of(
    owners: &BTreeMap<u64, i64>,
    node: i64,
    numbers: &mut impl Iterator<Item = usize>,
) -> String {
    let mut names = numbers.map(|number| format!("buyer-{number}"));
    let is_its = |name: &String| {
        let lane = Lane::of(&UserId::new(name).expect("a user id"));
        owners[&u64::from(lane.get())] == node
    };
    names.find(is_its).expect("endless")
}

fn owners(at: SocketAddr) -> BTreeMap<u64, i64> {
    let lanes = call(at, "GET", "/v1/lanes", &[], "").json();
    let lanes = lanes["lanes"].as_array().expect("lanes").iter();
    lanes
        .map(|lane| {
            (
                lane["lane"].as_u64().unwrap(),
                lane["node"].as_i64().unwrap(),
            )
        })
        .collect()
}

fn number_of(node: &Node) -> i64 {
    let nodes = call(node.served.control, "GET", "/admin/v1/nodes", &[], "").json();
    nodes["node"].as_i64().expect("its number")
}

fn order(at: SocketAddr, user: &str, prefer: &str) -> Answer {
    let fields = [
        ("Content-Type", "application/json"),
        ("Idempotency-Key", user),
        ("Prefer", prefer),
    ];
    let body = json!({ "user_id": user, "sku_id": SKU }).to_string();
    call(at, "POST", "/v1/orders", &fields, &body)
}

#[test]
fn parked_orders_are_those_of_the_node_of_their_lane_and_of_whoever_takes_it_over() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three_nodes(&cluster).await;
        nodes[0].served.put_sku(SKU, UNITS);
        Cluster::wait_for_sku(&nodes.each_ref(), SKU).await;
        let [one, two, three] = nodes;
        let client = cluster.database.connect().await;
        let count = async |sql: &str| -> i64 { client.query_one(sql, &[]).await.unwrap().get(0) };
        let (mut numbers, lost) = (0.., number_of(&three));
        let of = owners(one.served.data);
        let first = order(
            three.served.data,
            &buyer_of(&of, lost, &mut numbers),
            "wait=5",
        );
        assert_eq!(first.status, 201, "{first:?}");

        // The database refuses the counters of the third node alone, and its accepted orders are parked.
        let broken = format!(
            "ALTER TABLE millrace.stock_share ADD CONSTRAINT broken CHECK (node <> {lost} OR held <= 1) NOT VALID"
        );
        client.batch_execute(&broken).await.unwrap();
        let mut accepted = 0;
        for _ in 0..8 {
            let answer = order(
                three.served.data,
                &buyer_of(&of, lost, &mut numbers),
                "respond-async",
            );
            accepted += i64::from(answer.status == 202);
        }
        assert!(accepted > 0);
        let parked = "SELECT count(*) FROM millrace.parked_orders";
        wait_until("what was accepted is parked", async || {
            count(parked).await == accepted
        })
        .await;

        // The others sell, and leave them alone.
        for node in [&one, &two] {
            let buyer = buyer_of(&of, number_of(node), &mut numbers);
            let answer = order(node.served.data, &buyer, "wait=5");
            assert_eq!(answer.status, 201, "{answer:?}");
        }
        assert_eq!(count(parked).await, accepted);

        // It is lost, and they become rows where their lanes are now, with the units that they have held all the time.
        let data_dir = three.data_dir.clone();
        three.served.kill();
        std::fs::remove_dir_all(data_dir).expect("delete its directory");
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        wait_until("nothing is parked any more", async || {
            count(parked).await == 0
        })
        .await;
        sell_out(&cluster, &[&one, &two]).await;
        one.stop();
        two.stop();
    });
}

/// Sells what is left: as many units as there are have orders then, and memory agrees with the rows.
async fn sell_out(cluster: &Cluster, nodes: &[&Node]) {
    let (late, refused) = (Cell::new(0), Cell::new(0));
    wait_until("it is sold out", async || {
        late.set(late.get() + 1);
        let buyer = format!("late-{}", late.get());
        let answer = order(nodes[0].served.data, &buyer, "wait=5");
        assert!(matches!(answer.status, 201 | 409 | 503), "{answer:?}");
        let is_refused = answer.status == 409 && answer.code() == "sold_out";
        refused.set(refused.get() + i64::from(is_refused));
        refused.get() > 3
    })
    .await;
    let client = cluster.database.connect().await;
    let orders = "SELECT count(*) FROM millrace.orders";
    let orders: i64 = client.query_one(orders, &[]).await.unwrap().get(0);
    assert_eq!(orders, i64::from(UNITS));
    for node in nodes {
        agrees(node).await;
    }
}

/// Waits until memory agrees with the rows.
async fn agrees(node: &Node) {
    wait_until("memory agrees with the rows", async || {
        call(node.served.control, "GET", "/admin/v1/audit", &[], "").json()["ok"] == true
    })
    .await;
}

/// Orders that were accepted and are parked.
struct Parked<'a> {
    cluster: &'a Cluster,
    accepted: Vec<Placed>,
}

impl<'a> Parked<'a> {
    /// Makes the database refuse whatever holds units, and has it park orders of buyers of every lane.
    async fn some(cluster: &'a Cluster, at: &Node) -> Self {
        let mut parked = Parked {
            cluster,
            accepted: Vec::new(),
        };
        let deadline = Instant::now() + PATIENCE;
        while parked.accepted.is_empty() {
            assert!(Instant::now() < deadline, "no node has units for an order");
            parked.accepted = parked.accepted_of_some(at).await;
        }
        let all = parked.accepted.len() as i64;
        wait_until("what was accepted is parked", async || {
            parked.count().await == all
        })
        .await;
        parked
    }

    /// Orders that were accepted before the database refuses what holds units, which it does from then on if there are any.
    async fn accepted_of_some(&self, at: &Node) -> Vec<Placed> {
        let mut client = self.cluster.database.connect().await;
        let breaking = client.transaction().await.unwrap();
        for table in ["sku", "stock_share"] {
            let broken =
                format!("ALTER TABLE millrace.{table} ADD CONSTRAINT broken CHECK (held = 0)");
            breaking.batch_execute(&broken).await.unwrap();
        }
        let mut accepted = Vec::new();
        for number in 0..12 {
            let user = format!("parked-{number}");
            let answer = order(at.served.data, &user, "respond-async");
            if answer.status == 202 {
                accepted.push(Placed::of(&user, &user, &answer));
            }
        }
        match accepted.is_empty() {
            // Shares that are empty are filled once the tables are free.
            true => breaking.rollback().await.unwrap(),
            false => breaking.commit().await.unwrap(),
        }
        accepted
    }

    async fn count(&self) -> i64 {
        let client = self.cluster.database.connect().await;
        let sql = "SELECT count(*) FROM millrace.parked_orders";
        client.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// They are parked still, and their keys answer for them.
    async fn until_known(&self, at: &Node) {
        assert_eq!(self.count().await, self.accepted.len() as i64);
        for placed in &self.accepted {
            let id = &placed.order_id;
            wait_until("it is parked, and its key answers for it", async || {
                order_at(at.served.data, id)["status"] == "accepted"
                    && placed.again(at.served.data, SKU).json()["order_id"] == json!(id)
            })
            .await;
        }
    }

    /// Mends the database: they become rows.
    async fn mended(&self, at: &Node) {
        let client = self.cluster.database.connect().await;
        for table in ["sku", "stock_share"] {
            let mended = format!("ALTER TABLE millrace.{table} DROP CONSTRAINT broken");
            client.batch_execute(&mended).await.unwrap();
        }
        self.are_rows(at).await;
    }

    async fn are_rows(&self, at: &Node) {
        for placed in &self.accepted {
            let id = &placed.order_id;
            wait_until("it is a row", async || {
                order_at(at.served.data, id)["status"] == "pending_payment"
            })
            .await;
        }
    }
}

#[test]
fn parked_orders_go_with_their_lanes_while_nodes_are_replaced() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three_nodes(&cluster).await;
        nodes[0].served.put_sku(SKU, UNITS);
        Cluster::wait_for_sku(&nodes.each_ref(), SKU).await;
        let parked = Parked::some(&cluster, &nodes[1]).await;
        let mut nodes = Vec::from(nodes);
        for name in ["one", "two", "three"] {
            nodes.remove(0).stop();
            parked.until_known(&nodes[0]).await;
            nodes.push(cluster.start(name));
            let all: Vec<&Node> = nodes.iter().collect();
            Cluster::wait_for_lanes(&all, &THIRDS).await;
            parked.until_known(&nodes[2]).await;
        }
        parked.mended(&nodes[0]).await;
        sell_out(&cluster, &nodes.iter().collect::<Vec<_>>()).await;
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn parked_orders_go_from_a_process_on_its_own_to_nodes_and_back() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let single = cluster.start_alone("alone");
        single.served.put_sku(SKU, UNITS);
        let parked = Parked::some(&cluster, &single).await;
        parked.until_known(&single).await;
        single.stop();
        let two = || ["one", "two"].map(|name| cluster.start(name));
        let nodes = two();
        Cluster::wait_for_lanes(&nodes.each_ref(), &[32, 32]).await;
        parked.until_known(&nodes[1]).await;
        nodes.into_iter().for_each(Node::stop);
        let single = cluster.start_alone("alone");
        parked.until_known(&single).await;
        single.stop();
        let nodes = two();
        Cluster::wait_for_lanes(&nodes.each_ref(), &[32, 32]).await;
        parked.mended(&nodes[0]).await;
        sell_out(&cluster, &nodes.each_ref()).await;
        nodes.into_iter().for_each(Node::stop);
    });
}

#[test]
fn orders_that_were_parked_because_of_an_edited_row_go_on_at_nodes_once_it_is_mended() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let single = cluster.start_alone("alone");
        single.served.put_sku(SKU, UNITS);
        for number in 0..3 {
            let placed = order(single.served.data, &format!("first-{number}"), "wait=5");
            assert_eq!(placed.status, 201, "{placed:?}");
        }
        let client = cluster.database.connect().await;
        let edited = format!("UPDATE millrace.sku SET total = total - {}", UNITS - 3);
        client.batch_execute(&edited).await.unwrap();
        let mut accepted = Vec::new();
        for number in 0..4 {
            let user = format!("parked-{number}");
            let answer = order(single.served.data, &user, "respond-async");
            if answer.status == 202 {
                accepted.push(Placed::of(&user, &user, &answer));
            }
        }
        assert!(!accepted.is_empty());
        let parked = Parked {
            cluster: &cluster,
            accepted,
        };
        wait_until("what was accepted is parked", async || {
            parked.count().await == parked.accepted.len() as i64
        })
        .await;
        single.stop();
        let nodes = ["one", "two"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &[32, 32]).await;
        parked.until_known(&nodes[1]).await;
        let mended = format!("UPDATE millrace.sku SET total = total + {}", UNITS - 3);
        client.batch_execute(&mended).await.unwrap();
        parked.are_rows(&nodes[0]).await;
        for node in &nodes {
            agrees(node).await;
        }
        sell_out(&cluster, &nodes.each_ref()).await;
        nodes.into_iter().for_each(Node::stop);
    });
}
