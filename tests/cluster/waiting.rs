//! Waiting lists over several nodes: units go to whoever is next among the buyers of all nodes, wherever they come
//! free, whichever nodes are killed or hand their lanes over meanwhile.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use crate::nodes::{Cluster, Node, order_at};
use crate::support::block_on;
use crate::support::http::{Answer, call, try_call};
use crate::support::waiting::{until, wait_until};
use crate::support::webhook::Paid;
use crate::{THIRDS, three};

pub const SKU: &str = "W";

pub fn put(at: &Node, sku: &str, terms: Value) -> Answer {
    let mut body = json!({ "unit_price": 100, "currency": "EUR" });
    let more = terms.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    let target = format!("/admin/v1/skus/{sku}");
    call(at.served.control, "PUT", &target, &[], &body.to_string())
}

pub fn order(at: SocketAddr, body: &Value) -> Answer {
    order_with(at, body, &[])
}

pub fn order_with(at: SocketAddr, body: &Value, more: &[(&str, &str)]) -> Answer {
    let mut fields = vec![
        ("Content-Type", "application/json"),
        ("Idempotency-Key", "k"),
    ];
    fields.extend_from_slice(more);
    decided(at, "POST", "/v1/orders", &fields, &body.to_string())
}

/// Asks again while a node says that it has decided nothing, as busy ones do.
fn decided(
    at: SocketAddr,
    method: &str,
    target: &str,
    fields: &[(&str, &str)],
    body: &str,
) -> Answer {
    let answer = RefCell::new(None);
    until("a decision", Duration::from_secs(30), || {
        let asked = call(at, method, target, fields, body);
        let is_decided = asked.status != 503;
        answer.replace(Some(asked));
        is_decided
    });
    answer.take().expect("an answer")
}

pub fn join(at: SocketAddr, user: &str) -> Answer {
    order(
        at,
        &json!({ "user_id": user, "sku_id": SKU, "waitlist": true }),
    )
}

pub fn id(answer: &Answer) -> String {
    let id = answer.json()["order_id"].as_str().map(str::to_owned);
    id.unwrap_or_else(|| panic!("{answer:?}"))
}

pub fn cancel(at: SocketAddr, id: &str, query: &str) -> Answer {
    let target = format!("/v1/orders/{id}/cancel{query}");
    decided(at, "POST", &target, &[], "")
}

pub async fn until_status(at: SocketAddr, id: &str, wanted: &str) -> Value {
    wait_until(&format!("{id} is {wanted}"), async || {
        order_at(at, id)["status"] == wanted
    })
    .await;
    order_at(at, id)
}

pub fn sku_at(at: SocketAddr, sku: &str) -> Value {
    decided(at, "GET", &format!("/v1/skus/{sku}"), &[], "").json()
}

/// Waits until every promise holds at a node, memory included.
pub async fn assert_whole(node: &Node) {
    wait_until("every promise holds", async || {
        let audit = try_call(node.served.control, "GET", "/admin/v1/audit", &[], "");
        let audit = audit.map(|audit| audit.json()).unwrap_or_default();
        let is_compared = audit["orders_in_flight"] == 0
            && audit["checks"].as_array().is_some_and(|checks| {
                let live = "live counters are those of the database";
                checks.iter().any(|check| check["name"] == live)
            });
        assert!(audit["ok"] != false, "{audit:#}");
        is_compared
    })
    .await;
}

/// A SKU all of whose units are held, by orders of buyers of every node.
async fn sold_out(nodes: &[Node; 3], units: usize) -> Vec<String> {
    assert_eq!(put(&nodes[0], SKU, json!({ "total": units })).status, 201);
    Cluster::wait_for_sku(&nodes.each_ref(), SKU).await;
    let held = (0..units).map(|number| {
        let body = json!({ "user_id": format!("held-{number}"), "sku_id": SKU });
        let placed = order(nodes[number % 3].served.data, &body);
        assert_eq!(placed.status, 201, "{placed:?}");
        id(&placed)
    });
    held.collect()
}

/// So many who wait, one after the other at one node after the other, with what they are told of their positions.
fn waiting(nodes: &[&Node], buyers: std::ops::Range<usize>) -> Vec<String> {
    let joined = buyers.map(|number| {
        let at = nodes[number % nodes.len()].served.data;
        let answer = join(at, &format!("waits-{number}"));
        let order = answer.json();
        assert_eq!(
            (answer.status, &order["status"]),
            (202, &json!("waitlisted"))
        );
        assert_eq!(order["position"], number + 1, "{order}");
        id(&answer)
    });
    joined.collect()
}

/// The first of a list waits at one node, and a unit comes free at another that has not read any list since.
#[test]
fn nobody_overtakes_the_first_who_waits_at_another_node() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three(&cluster).await;
        let at: Vec<SocketAddr> = nodes.iter().map(|node| node.served.data).collect();
        for round in 0..6 {
            let sku = format!("F{round}");
            assert_eq!(put(&nodes[0], &sku, json!({ "total": 6 })).status, 201);
            Cluster::wait_for_sku(&nodes.each_ref(), &sku).await;
            let buy = |number: usize, user: String, waits: bool| {
                let user = format!("{sku}-{user}");
                let body = json!({ "user_id": user, "sku_id": sku, "waitlist": waits });
                order(at[number % 3], &body)
            };
            let held: Vec<String> = (0..6)
                .map(|number| id(&buy(number, format!("held-{number}"), false)))
                .collect();
            let first = buy(round, "first".to_owned(), true);
            assert_eq!(first.json()["status"], "waitlisted", "{first:?}");
            for (number, held) in held.iter().enumerate() {
                assert_eq!(cancel(at[number % 3], held, "").status, 200);
                if number > 0 {
                    continue;
                }
                for newcomer in 0..12 {
                    let refused = buy(newcomer, format!("new-{newcomer}"), false);
                    let order = order_at(at[0], &id(&first));
                    assert!(
                        refused.json()["code"] == "sold_out"
                            || order["status"] == "pending_payment",
                        "{refused:?}, {order}"
                    );
                }
            }
            until_status(at[round % 3], &id(&first), "pending_payment").await;
            // Nobody waits any more, and the units of the others are on sale.
            let later = Cell::new(0);
            for _ in 0..5 {
                wait_until("a unit is sold", async || {
                    later.set(later.get() + 1);
                    buy(later.get(), format!("later-{}", later.get()), false).status == 201
                })
                .await;
            }
            let last = buy(0, "last".to_owned(), false);
            assert_eq!(last.json()["code"], "sold_out", "{last:?}");
        }
        assert_whole(&nodes[0]).await;
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn units_that_come_back_anywhere_go_to_whoever_is_next_at_whatever_node() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three(&cluster).await;
        let at: Vec<SocketAddr> = nodes.iter().map(|node| node.served.data).collect();
        let held = sold_out(&nodes, 12).await;
        let refused = order(at[1], &json!({ "user_id": "u", "sku_id": SKU }));
        assert_eq!(refused.json()["code"], "sold_out", "{refused:?}");
        let ids = waiting(&nodes.each_ref(), 0..12);
        // The same request at another node, and whoever does not want to wait.
        let again = join(at[2], "waits-3");
        assert_eq!((again.status, id(&again)), (200, ids[3].clone()));
        assert_eq!(again.json()["position"], 4, "{again:?}");
        let refused = order(at[2], &json!({ "user_id": "v", "sku_id": SKU }));
        assert_eq!(refused.json()["code"], "sold_out", "{refused:?}");
        for at in &at {
            wait_until("every node knows how many wait", async || {
                sku_at(*at, SKU)["waiting"] == 12
            })
            .await;
            let sku = sku_at(*at, SKU);
            assert_eq!((&sku["free"], &sku["held"]), (&json!(0), &json!(12)));
        }
        // A payment buys no place.
        let mut unpayable = order_at(at[0], &ids[11]);
        unpayable["receipt"] = Value::Null;
        let paid = Paid::of(&unpayable).deliver(at[1]).await;
        assert_eq!(paid.status, 200, "{paid:?}");
        let due = "/admin/v1/payments?state=refund_due";
        wait_until("the payment is refunded", async || {
            let due = call(nodes[0].served.control, "GET", due, &[], "").json();
            due["payments"][0]["refund_reason"] == "not_assigned"
        })
        .await;
        // One who leaves makes everybody behind advance.
        let left = cancel(at[0], &ids[5], "?only=waitlisted");
        assert_eq!(left.json()["status"], "cancelled", "{left:?}");
        wait_until("everybody behind has advanced", async || {
            order_at(at[0], &ids[11])["position"] == 11
        })
        .await;
        // A unit comes free at the node of its order's lane, at each in its turn; newcomers try all the time.
        for (number, held) in held.iter().take(6).enumerate() {
            assert_eq!(cancel(at[number % 3], held, "").status, 200);
            let next = &ids[number + usize::from(number >= 5)];
            let newcomer = json!({ "user_id": format!("new-{number}"), "sku_id": SKU });
            let refused = order(at[(number + 1) % 3], &newcomer);
            assert_eq!(
                refused.json()["code"],
                "sold_out",
                "nobody overtakes: {refused:?}"
            );
            let assigned = until_status(at[(number + 2) % 3], next, "pending_payment").await;
            assert!(assigned["receipt"].is_string(), "{assigned}");
            assert!(assigned["expires_at"].is_string(), "{assigned}");
            let late = cancel(at[0], next, "?only=waitlisted");
            assert_eq!(late.json()["code"], "already_assigned", "{late:?}");
        }
        let waiting: Vec<Value> = ids[7..]
            .iter()
            .map(|id| order_at(at[1], id)["status"].clone())
            .collect();
        assert!(
            waiting.iter().all(|status| status == "waitlisted"),
            "{waiting:?}"
        );
        // A raised total, and an order that is paid and refunded.
        assert_eq!(put(&nodes[2], SKU, json!({ "total": 14 })).status, 200);
        for id in &ids[7..9] {
            until_status(at[0], id, "pending_payment").await;
        }
        let paid = Paid::of(&order_at(at[0], &ids[0])).deliver(at[2]).await;
        assert_eq!(paid.status, 200, "{paid:?}");
        until_status(at[1], &ids[0], "paid").await;
        for node in &nodes {
            assert_whole(node).await;
        }
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn whoever_waits_at_a_node_that_is_killed_keeps_the_place_and_the_unit() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three(&cluster).await;
        let held = sold_out(&nodes, 9).await;
        let ids = waiting(&nodes.each_ref(), 0..9);
        let [one, two, three] = nodes;
        let data_dir = three.data_dir.clone();
        three.served.kill();
        std::fs::remove_dir_all(data_dir).expect("delete its directory");
        // Half of the units come free while its lanes are closed, as far as the lanes of their orders are open.
        let at = [one.served.data, two.served.data];
        let mut freed = 0;
        for held in &held {
            if freed < 4 && cancel(at[freed % 2], held, "").status == 200 {
                freed += 1;
            }
        }
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        for held in &held {
            if freed < 5 && order_at(at[0], held)["status"] == "pending_payment" {
                assert_eq!(cancel(at[0], held, "").status, 200);
                freed += 1;
            }
        }
        assert_eq!(freed, 5);
        for id in &ids[..5] {
            until_status(at[1], id, "pending_payment").await;
        }
        for (ahead, id) in ids[5..].iter().enumerate() {
            let waits = order_at(at[0], id);
            assert_eq!(waits["status"], "waitlisted", "{waits}");
            wait_until("its position is among those left", async || {
                order_at(at[0], id)["position"] == ahead + 1
            })
            .await;
        }
        assert_whole(&one).await;
        // All are killed, and go on where they were.
        one.served.kill();
        two.served.kill();
        let nodes = ["one", "two"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &[32, 32]).await;
        let at = nodes[0].served.data;
        assert_eq!(cancel(at, &ids[0], "").status, 200);
        until_status(at, &ids[5], "pending_payment").await;
        assert_eq!(order_at(at, &ids[6])["status"], "waitlisted");
        for node in &nodes {
            assert_whole(node).await;
        }
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn nodes_are_replaced_one_after_the_other_while_buyers_wait() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let nodes = three(&cluster).await;
        let held = sold_out(&nodes, 9).await;
        let mut nodes = Vec::from(nodes);
        let mut ids = waiting(&nodes.iter().collect::<Vec<_>>(), 0..3);
        let mut served = 0;
        for (turn, name) in ["one", "two", "three"].into_iter().enumerate() {
            let node = nodes.remove(0);
            node.stop();
            let at = nodes[0].served.data;
            // A unit comes free between two moves of the lanes.
            wait_until("the order can be cancelled", async || {
                cancel(at, &held[turn], "").status == 200
            })
            .await;
            until_status(at, &ids[served], "pending_payment").await;
            served += 1;
            nodes.push(cluster.start(name));
            let all: Vec<&Node> = nodes.iter().collect();
            Cluster::wait_for_lanes(&all, &THIRDS).await;
            for number in ids.len()..ids.len() + 3 {
                let joined = join(all[number % 3].served.data, &format!("waits-{number}"));
                assert_eq!(
                    joined.json()["position"],
                    ids.len() - served + 1,
                    "{joined:?}"
                );
                ids.push(id(&joined));
            }
        }
        let at = nodes[1].served.data;
        for held in &held[3..6] {
            assert_eq!(cancel(at, held, "").status, 200);
        }
        for id in &ids[served..served + 3] {
            until_status(at, id, "pending_payment").await;
        }
        for id in &ids[served + 3..] {
            assert_eq!(order_at(at, id)["status"], "waitlisted");
        }
        for node in &nodes {
            assert_whole(node).await;
        }
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn a_list_goes_from_a_process_on_its_own_to_nodes_and_back() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let single = cluster.serve_alone().await;
        single.put_sku(SKU, 4, json!({})).await;
        let mut held = Vec::new();
        for number in 0..4 {
            let placed = single.order(&format!("held-{number}"), SKU, None).await;
            held.push(id(&placed));
        }
        let mut ids = Vec::new();
        for number in 0..6 {
            let body =
                json!({ "user_id": format!("waits-{number}"), "sku_id": SKU, "waitlist": true });
            let joined = single.post(body, None, &[]).await;
            assert_eq!(joined.json()["position"], number + 1, "{joined:?}");
            ids.push(id(&joined));
        }
        assert!(single.stop().await);
        let [one, two] = ["one", "two"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        let at = [one.served.data, two.served.data];
        for (ahead, id) in ids.iter().enumerate() {
            wait_until("it waits where it did", async || {
                order_at(at[1], id)["position"] == ahead + 1
            })
            .await;
        }
        let newcomer = join(at[1], "waits-6");
        assert_eq!(newcomer.json()["position"], 7, "{newcomer:?}");
        ids.push(id(&newcomer));
        for held in &held[..2] {
            assert_eq!(cancel(at[0], held, "").status, 200);
        }
        for id in &ids[..2] {
            until_status(at[1], id, "pending_payment").await;
        }
        assert_whole(&one).await;
        one.stop();
        two.stop();
        let single = cluster.serve_alone().await;
        for (ahead, id) in ids[2..].iter().enumerate() {
            let order = single.get(&format!("/v1/orders/{id}")).await.json();
            assert_eq!(order["position"], ahead + 1, "{order}");
        }
        single.assert_audit().await;
        assert!(single.stop().await);
    });
}
