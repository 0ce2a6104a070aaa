//! Parked orders belong to a lane: the node that has it writes them, and whoever takes the node over.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;

use millrace::order::{Lane, UserId};
use serde_json::json;

use crate::nodes::{Cluster, Node};
use crate::support::block_on;
use crate::support::http::{Answer, call};
use crate::support::waiting::wait_until;

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
    let fields = [("Content-Type", "application/json"), ("Prefer", prefer)];
    let body = json!({ "user_id": user, "sku_id": SKU }).to_string();
    call(at, "POST", "/v1/orders", &fields, &body)
}

#[test]
fn parked_orders_are_those_of_the_node_of_their_lane_and_of_whoever_takes_it_over() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = ["one", "two", "three"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &crate::THIRDS).await;
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

        // The others sell, also one that starts now, and leave them alone.
        two.stop();
        Cluster::wait_for_lanes(&[&one, &three], &[32, 32]).await;
        let two = cluster.start("two");
        Cluster::wait_for_lanes(&[&one, &two, &three], &crate::THIRDS).await;
        let of = owners(one.served.data);
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
        let (late, refused) = (Cell::new(0), Cell::new(0));
        wait_until("it is sold out", async || {
            late.set(late.get() + 1);
            let buyer = format!("late-{}", late.get());
            let answer = order(one.served.data, &buyer, "wait=5");
            assert!(matches!(answer.status, 201 | 409 | 503), "{answer:?}");
            let is_refused = answer.status == 409 && answer.code() == "sold_out";
            refused.set(refused.get() + i64::from(is_refused));
            refused.get() > 3
        })
        .await;
        assert_eq!(
            count("SELECT count(*) FROM millrace.orders").await,
            i64::from(UNITS)
        );
        for node in [&one, &two] {
            wait_until("memory agrees with the rows", async || {
                call(node.served.control, "GET", "/admin/v1/audit", &[], "").json()["ok"] == true
            })
            .await;
        }
        one.stop();
        two.stop();
    });
}
