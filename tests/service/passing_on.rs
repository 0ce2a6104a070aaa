//! Requests at any node: each is answered by the owner of its lane, whichever node it came to, and the answer is the same.
//! Three whole servers, each with a database of its own and a third of the lanes; the links between them go through relays
//! that cut and freeze them.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::collector::Collector;
use crate::support::block_on;
use crate::support::http::{Answer, Connection, try_call};
use crate::support::postgres::TestDatabase;
use crate::support::relay::{Relay, Way};
use crate::support::server::TestServer;
use crate::support::waiting::wait_until;
use crate::support::webhook::{Paid, SECRET as PAYMENT_SECRET};
use millrace::app::nodes::NodeParts;
use millrace::config::Config;
use millrace::http::peers::Hint;
use millrace::http::peers::key::ClusterKey;
use millrace::order::{Cutover, Lane, OrderId, UserId};
use millrace::state::lanes::{Lanes, NodeAddress};
use serde_json::{Value, json};

const SECRET: &str = "the secret of the nodes in this test";
const SKU: &str = "A";
const SOLD_OUT: &str = "B";
const UNITS: u32 = 100_000;
const NODES: u8 = 3;
const PATIENCE: Duration = Duration::from_secs(30);

struct Node {
    server: TestServer,
    lanes: Arc<Lanes>,
    /// News from other nodes.
    hints: Arc<Mutex<Vec<(u8, Hint)>>>,
    /// Where it listens for the others.
    address: SocketAddr,
    /// The way of the others to this node, where it is not left out.
    relay: Relay,
    database: TestDatabase,
}

struct Cluster {
    nodes: Vec<Node>,
    /// Whether the links lead through the relays.
    relayed: bool,
}

/// The node that owns a buyer's lane at first.
fn owner_of(user_id: &str) -> usize {
    let lane = Lane::of(&UserId::new(user_id).expect("a user id"));
    usize::from(lane.get() % NODES)
}

/// The next buyer, by number, whose lane this node owns.
fn buyer_of(node: usize, numbers: &mut impl Iterator<Item = usize>) -> String {
    let mut names = numbers.map(|number| format!("buyer-{number}"));
    names.find(|name| owner_of(name) == node).expect("endless")
}

fn accept_payments(config: &mut Config) {
    config.payments.standard.secret.0 = vec![PAYMENT_SECRET.to_owned()];
}

impl Cluster {
    async fn start() -> Self {
        Self::start_where(|_| true).await
    }

    /// Nodes that have, or have not, had contact lately.
    async fn start_where(has_contact: impl Fn(u8) -> bool) -> Self {
        Self::start_with(accept_payments, has_contact, true).await
    }

    async fn start_with(
        configure: impl Fn(&mut Config),
        has_contact: impl Fn(u8) -> bool,
        relayed: bool,
    ) -> Self {
        let mut nodes = Vec::new();
        for node in 0..NODES {
            let database = TestDatabase::create().await;
            let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
            let address = listener.local_addr().expect("its address");
            let relay = Relay::start(address).await;
            let lanes = Arc::new(Lanes::new());
            if has_contact(node) {
                lanes.contact(u64::MAX);
            }
            let hints = Arc::<Mutex<Vec<(u8, Hint)>>>::default();
            let parts = NodeParts {
                listener,
                key: ClusterKey::new(SECRET).expect("a good secret"),
                database: *b"one database of ",
                node,
                epoch: 1,
                lanes: Arc::clone(&lanes),
                cutover: Cutover(OrderId::MIN),
                on_hint: {
                    let hints = Arc::clone(&hints);
                    Box::new(move |from, hint| hints.lock().unwrap().push((from, hint)))
                },
            };
            let server = TestServer::start_node(&database, &configure, parts).await;
            server.put_sku(SKU, UNITS, json!({})).await;
            server.put_sku(SOLD_OUT, 0, json!({})).await;
            nodes.push(Node {
                server,
                lanes,
                hints,
                address,
                relay,
                database,
            });
        }
        let cluster = Cluster { nodes, relayed };
        for lane in Lane::all() {
            cluster.give(lane, lane.get() % NODES, 1);
        }
        cluster.connect();
        cluster
    }

    fn address(&self, node: u8) -> NodeAddress {
        let Node { relay, address, .. } = &self.nodes[usize::from(node)];
        let address = if self.relayed {
            &relay.address
        } else {
            address
        };
        NodeAddress {
            node,
            address: address.to_string().into(),
        }
    }

    /// Gives a lane to a node, and tells everybody.
    fn give(&self, lane: Lane, to: u8, epoch: u64) {
        for (node, one) in (0..).zip(&self.nodes) {
            if node == to {
                one.lanes.open(lane, epoch);
            } else {
                one.lanes.set_elsewhere(lane, epoch, self.address(to));
            }
        }
    }

    /// Opens the links, and waits until all are there.
    fn connect(&self) {
        let all: Vec<NodeAddress> = (0..NODES).map(|node| self.address(node)).collect();
        for node in &self.nodes {
            node.server.millrace().peers().expect("a node").keep(&all);
        }
        self.connected();
    }

    fn connected(&self) {
        let deadline = Instant::now() + PATIENCE;
        for node in &self.nodes {
            let peers = node.server.millrace().peers().expect("a node");
            while !peers.report().iter().all(|link| link.identity.is_some()) {
                assert!(Instant::now() < deadline, "{:?}", peers.report());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn server(&self, node: usize) -> &TestServer {
        &self.nodes[node].server
    }

    /// The orders that a buyer has at the owner of the buyer's lane.
    async fn orders(&self, user_id: &str) -> Vec<Value> {
        let target = format!("/v1/users/{user_id}/orders");
        let list = self.server(owner_of(user_id)).get(&target).await.json();
        list["orders"].as_array().cloned().expect("a list")
    }

    async fn stop(self) {
        for node in self.nodes {
            assert!(node.server.stop().await, "nothing is left");
        }
    }
}

/// An answer without what differs from order to order.
fn shape(answer: &Answer) -> (u16, Vec<String>, Vec<String>) {
    let mut fields: Vec<String> = answer.fields.keys().cloned().collect();
    fields.sort();
    let body = answer.json();
    // Only of an order that is no row yet.
    let is_steady = |name: &&String| *name != "estimated_wait_ms";
    let members = body
        .as_object()
        .map(|members| members.keys().filter(is_steady).cloned().collect());
    (answer.status, fields, members.unwrap_or_default())
}

#[test]
fn an_order_is_the_same_at_every_node() {
    block_on(async {
        let cluster = Cluster::start().await;
        let mut numbers = 0..;
        for owner in 0..3 {
            for respond_async in [false, true] {
                let mut shapes = Vec::new();
                for node in 0..3 {
                    let user = buyer_of(owner, &mut numbers);
                    let order = json!({ "user_id": user, "sku_id": SKU, "quantity": 2, "attributes": { "a": 1 } });
                    let prefer = [("Prefer", "respond-async")];
                    let more = if respond_async { &prefer[..] } else { &[] };
                    let server = cluster.server(node);

                    // Without a key, under one, again, at another node, with another body.
                    let keyless = server.post(order.clone(), None, more).await;
                    let placed = server.post(order.clone(), Some("k"), more).await;
                    let again = server.post(order.clone(), Some("k"), more).await;
                    let other = cluster.server((node + 1) % 3);
                    let elsewhere = other.post(order, Some("k"), more).await;
                    let changed = json!({ "user_id": user, "sku_id": SKU, "quantity": 3 });
                    let reused = other.post(changed, Some("k"), more).await;
                    let id = placed.json()["order_id"]
                        .as_str()
                        .expect("an id")
                        .to_owned();
                    for replay in [&again, &elsewhere] {
                        assert_eq!(replay.status, 200, "{replay:?}");
                        assert_eq!(replay.json()["order_id"], id);
                        assert_eq!(replay.field("idempotency-replayed"), Some("true"));
                    }
                    assert_eq!(
                        (reused.status, reused.code().as_str()),
                        (422, "idempotency_key_reused")
                    );
                    assert_eq!(placed.field("location"), Some(&*format!("/v1/orders/{id}")));
                    let expected = if respond_async { 202 } else { 201 };
                    assert_eq!((keyless.status, placed.status), (expected, expected));

                    // Read, list and cancel at another node still.
                    let third = cluster.server((node + 2) % 3);
                    let read = third.get(&format!("/v1/orders/{id}?wait=5")).await;
                    assert_eq!(
                        (read.status, &read.json()["status"]),
                        (200, &json!("pending_payment"))
                    );
                    let list = third.get(&format!("/v1/users/{user}/orders?limit=1")).await;
                    assert_eq!(list.json()["orders"][0]["order_id"], id, "{list:?}");
                    let cancelled = crate::support::server::request(
                        third.data,
                        "POST",
                        &format!("/v1/orders/{id}/cancel"),
                        &[],
                        String::new(),
                    )
                    .await;
                    assert_eq!(
                        (cancelled.status, &cancelled.json()["status"]),
                        (200, &json!("cancelled"))
                    );
                    let unknown = third.get("/v1/orders/1").await;
                    assert_eq!(
                        (unknown.status, unknown.code().as_str()),
                        (404, "unknown_order")
                    );
                    let unknown = third.order(&user, "none", None).await;
                    assert_eq!(
                        (unknown.status, unknown.code().as_str()),
                        (404, "unknown_sku")
                    );
                    shapes.push([&keyless, &placed, &again, &reused, &cancelled].map(shape));
                }
                assert!(shapes.windows(2).all(|two| two[0] == two[1]), "{shapes:#?}");
            }
        }
        // Units are held where the buyers are, and nowhere else.
        for node in 0..3 {
            let (_, held, _) = cluster.server(node).stock(SKU).await;
            assert_eq!(
                held,
                3 * 2 * 2,
                "node {node}: one order of two a turn is left"
            );
            cluster.server(node).assert_audit().await;
        }
        cluster.stop().await;
    });
}

#[test]
fn an_order_does_not_expire_while_another_node_cannot_store_its_payment() {
    block_on(async {
        let soon = |config: &mut Config| {
            accept_payments(config);
            config.orders.payment_ttl_ms = 2_000;
        };
        let cluster = Cluster::start_with(soon, |_| true, true).await;
        let mut numbers = 0..;
        let (owner, other) = (cluster.server(0), cluster.server(1));
        let mut place = async || {
            let user = buyer_of(0, &mut numbers);
            owner.order(&user, SKU, None).await.json()
        };
        let (paid_for, unpaid) = (place().await, place().await);
        let mut client = cluster.nodes[1].database.connect().await;
        let transaction = client.transaction().await.unwrap();
        let hold = "LOCK TABLE millrace.payment_events IN EXCLUSIVE MODE";
        transaction.batch_execute(hold).await.unwrap();
        let answer = Paid::of(&paid_for).deliver(other.data).await;
        assert_eq!(answer.status, 503, "{answer:?}");
        let client = cluster.nodes[0].database.connect().await;
        let status = async |order: &Value| -> i32 {
            let id: i64 = order["order_id"].as_str().unwrap().parse().unwrap();
            let status = "SELECT status::int4 FROM millrace.orders WHERE order_id = $1";
            client.query_one(status, &[&id]).await.unwrap().get(0)
        };
        let deadline = Instant::now() + PATIENCE;
        // It was placed later, so the other one is due too.
        while status(&unpaid).await != 4 {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(status(&paid_for).await, 1, "it waits for its payment");
        transaction.rollback().await.unwrap();
        cluster.stop().await;
    });
}

#[test]
fn an_order_that_is_passed_on_is_one_trace_at_both_nodes() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    block_on(async {
        let collector = Collector::start().await;
        let url = collector.url();
        let traced = |config: &mut Config| {
            config.tracing.otlp_url.clone_from(&url);
            // Whoever is asked decides, and not the owner once more.
            config.tracing.sample = 1.0;
        };
        let cluster = Cluster::start_with(traced, |_| true, true).await;
        let mut numbers = 0..;
        let server = cluster.server(0);
        let line = |user: &str| json!({ "user_id": user, "sku_id": SKU });
        let not_sampled = format!("00-{TRACE}-00f067aa0ba902b7-00");
        let user = buyer_of(1, &mut numbers);
        let fields = [("traceparent", &*not_sampled)];
        let answer = server.post(line(&user), None, &fields).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        let sampled = format!("00-{TRACE}-00f067aa0ba902b7-01");
        for route in ["/v1/orders", "/v1/orders:batch"] {
            let is_batch = route.ends_with("batch");
            let user = buyer_of(1, &mut numbers);
            let media = if is_batch {
                "application/x-ndjson"
            } else {
                "application/json"
            };
            let fields = [
                ("Content-Type", media),
                ("traceparent", &*sampled),
                ("tracestate", "a=b"),
            ];
            let body = line(&user).to_string();
            let answer =
                crate::support::server::request(server.data, "POST", route, &fields, body).await;
            assert!(answer.status < 300, "{answer:?}");
            let name = format!("POST {route}");
            let of_route = || {
                let mut spans = collector.heard();
                spans.retain(|span| span.name == name && span.trace_id == TRACE);
                spans
            };
            wait_until("both requests", async || of_route().len() >= 2).await;
            let spans = of_route();
            let first = spans.iter().find(|span| span.parent == "00f067aa0ba902b7");
            let first = first.expect("the node that was asked");
            let below = spans.iter().filter(|span| span.parent == first.span_id);
            assert_eq!((below.count(), spans.len()), (1, 2), "{spans:?}");
        }
        let names = ["admission", "queue", "COPY orders"];
        let parts = || {
            collector
                .heard()
                .into_iter()
                .filter(|span| names.contains(&&*span.name))
                .count()
        };
        wait_until("the parts of both orders", async || parts() >= 6).await;
        assert_eq!(parts(), 6, "{:?}", collector.heard());
        assert!(collector.heard().iter().all(|span| span.trace_id == TRACE));
        cluster.stop().await;
    });
}

#[test]
fn a_callback_at_another_node_is_stored_there_and_the_owner_is_told() {
    block_on(async {
        let cluster = Cluster::start().await;
        let mut numbers = 0..;
        for (from, owner) in [(1, 1), (0, 1), (2, 0)] {
            let user = buyer_of(owner, &mut numbers);
            let order = cluster.server(from).order(&user, SKU, None).await.json();
            let paid = Paid::of(&order);
            let answer = paid.deliver(cluster.server(from).data).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let read = format!("/v1/orders/{}", paid.order);
            let status = cluster.server(owner).get(&read).await.json()["status"].clone();
            let payments = cluster
                .server(from)
                .control("GET", "/admin/v1/payments?state=orphan", Value::Null)
                .await;
            let is_orphan = payments.json().to_string().contains(&paid.payment);
            if from == owner {
                assert_eq!((status, is_orphan), (json!("paid"), false), "{payments:?}");
                continue;
            }
            // The owner has another database here, so it finds nothing.
            assert_eq!(
                (status, is_orphan),
                (json!("pending_payment"), true),
                "{payments:?}"
            );
            let id = OrderId::parse(&paid.order).expect("an id");
            let told = (from as u8, Hint::Payment(id));
            let deadline = Instant::now() + PATIENCE;
            while !cluster.nodes[owner].hints.lock().unwrap().contains(&told) {
                assert!(Instant::now() < deadline, "{told:?}: it was not told");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        cluster.stop().await;
    });
}

#[test]
fn every_node_tells_which_lane_is_where() {
    block_on(async {
        let cluster = Cluster::start().await;
        cluster.nodes[1].lanes.close(Lane::FIRST);
        for node in 0..3 {
            let answer = cluster.server(node).get("/v1/lanes").await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let lanes = answer.json()["lanes"].as_array().cloned().expect("a list");
            assert_eq!(lanes.len(), 64);
            for (number, lane) in lanes.iter().enumerate() {
                let owner = number % 3;
                let expected = json!({
                    "lane": number,
                    "node": owner,
                    "data_plane": cluster.server(owner).data.to_string(),
                });
                let closed = json!({ "lane": number, "node": null, "data_plane": null });
                let is_closed = node == 1 && number == 0;
                assert_eq!(*lane, if is_closed { closed } else { expected });
            }
        }
        cluster.stop().await;
    });
}

#[test]
fn one_key_at_three_nodes_at_the_same_instant_is_one_order() {
    block_on(async {
        let cluster = Cluster::start().await;
        let mut numbers = 0..;
        for turn in 0..30 {
            let user = buyer_of(turn % 3, &mut numbers);
            let body = json!({ "user_id": user, "sku_id": SKU });
            let (a, b, c) = tokio::join!(
                cluster.server(0).post(body.clone(), Some("k"), &[]),
                cluster.server(1).post(body.clone(), Some("k"), &[]),
                cluster.server(2).post(body.clone(), Some("k"), &[]),
            );
            let mut statuses = [a.status, b.status, c.status];
            statuses.sort_unstable();
            assert_eq!(statuses, [200, 200, 201]);
            let ids = [a, b, c].map(|answer| answer.json()["order_id"].clone());
            assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
            assert_eq!(cluster.orders(&user).await.len(), 1);
        }
        cluster.stop().await;
    });
}

#[test]
fn a_batch_is_split_by_lane_and_joined_in_order() {
    block_on(async {
        let cluster = Cluster::start().await;
        for node in 0..3 {
            let mut lines = Vec::new();
            for number in 0..300 {
                let user = format!("batch-{node}-{number}");
                lines.push(match number % 7 {
                    0 => {
                        format!(r#"{{"user_id":"{user}","sku_id":"{SKU}","idempotency_key":"k"}}"#)
                    }
                    1 => format!(
                        r#"  {{ "user_id" : "{user}", "sku_id" : "{SKU}" , "quantity": 2}} "#
                    ),
                    2 => format!(r#"{{"user_id":"{user}","sku_id":"none"}}"#),
                    3 => "{".to_owned(),
                    4 => format!(r#"{{"user_id":"{user}","sku_id":"{SOLD_OUT}"}}"#),
                    _ => format!(
                        r#"{{"user_id":"{user}","sku_id":"{SKU}","attributes":{{"n":{number}}}}}"#
                    ),
                });
            }
            let body = lines.join("\n");
            for prefer in ["wait=5", "respond-async"] {
                let fields = [("Content-Type", "application/x-ndjson"), ("Prefer", prefer)];
                let address = cluster.server(node).data;
                let answer = crate::support::server::request(
                    address,
                    "POST",
                    "/v1/orders:batch",
                    &fields,
                    body.clone(),
                )
                .await;
                assert_eq!(answer.status, 200, "{answer:?}");
                assert_eq!(answer.field("preference-applied"), Some(prefer));
                let text = String::from_utf8(answer.body).expect("text");
                let answers: Vec<Value> = text
                    .lines()
                    .map(|line| serde_json::from_str(line).expect("JSON"))
                    .collect();
                assert_eq!(answers.len(), lines.len());
                let is_async = prefer == "respond-async";
                for (number, answer) in answers.iter().enumerate() {
                    let status = &answer["http_status"];
                    match number % 7 {
                        2 => assert_eq!(
                            (status, &answer["code"]),
                            (&json!(404), &json!("unknown_sku"))
                        ),
                        3 => assert_eq!(
                            (status, &answer["code"]),
                            (&json!(400), &json!("malformed_json"))
                        ),
                        4 => {
                            assert_eq!((status, &answer["code"]), (&json!(409), &json!("sold_out")))
                        }
                        remainder => {
                            assert_eq!(answer["user_id"], format!("batch-{node}-{number}"));
                            // The second batch finds the keyed ones of the first.
                            let expected = match (is_async, remainder) {
                                (true, 0) => 200,
                                (true, _) => 202,
                                (false, _) => 201,
                            };
                            assert_eq!(*status, expected, "line {number}: {answer}");
                            if remainder >= 5 {
                                assert_eq!(answer["attributes"]["n"], number);
                            }
                        }
                    }
                }
            }
        }
        for node in 0..3 {
            cluster.server(node).assert_audit().await;
        }
        cluster.stop().await;
    });
}

#[test]
fn a_closed_lane_an_absent_owner_and_an_old_contact_are_told_apart() {
    block_on(async {
        let cluster = Cluster::start().await;
        let mut numbers = 0..;
        let user = buyer_of(1, &mut numbers);
        let lane = Lane::of(&UserId::new(&user).unwrap());

        // The owner is cut off: nothing was sent.
        cluster.nodes[1].relay.shut(true);
        cluster.nodes[1].relay.sever();
        until_away(&cluster, 0, 1);
        let refused = cluster.server(0).order(&user, SKU, Some("k")).await;
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (421, "misdirected")
        );
        let list = cluster
            .server(0)
            .get(&format!("/v1/users/{user}/orders"))
            .await;
        assert_eq!(list.status, 421);
        let at_home = cluster.server(1).order(&user, SKU, Some("k")).await;
        assert_eq!(at_home.status, 201, "it was not placed before");
        cluster.nodes[1].relay.shut(false);
        cluster.connected();

        // The lane is closed: at its owner, and everywhere.
        cluster.nodes[1].lanes.close(lane);
        for node in 0..3 {
            let refused = cluster.server(node).order(&user, SKU, Some("l")).await;
            assert_eq!(
                (refused.status, refused.code().as_str()),
                (503, "not_ready"),
                "node {node}"
            );
            assert_eq!(refused.field("retry-after"), Some("1"));
        }
        cluster.nodes[0].lanes.close(lane);
        let refused = cluster.server(0).order(&user, SKU, Some("l")).await;
        assert_eq!(
            (refused.status, refused.field("retry-after")),
            (503, Some("1"))
        );

        // What is a row is told while its lane is closed, by whoever sees the row.
        let id = at_home.json()["order_id"]
            .as_str()
            .expect("an id")
            .to_owned();
        let read = cluster.server(1).get(&format!("/v1/orders/{id}")).await;
        assert_eq!(
            (read.status, &read.json()["status"]),
            (200, &json!("pending_payment"))
        );
        let cancel = format!("/v1/orders/{id}/cancel");
        let refused = crate::support::server::request(
            cluster.server(0).data,
            "POST",
            &cancel,
            &[],
            String::new(),
        )
        .await;
        assert_eq!(refused.status, 503);
        cluster.give(lane, 1, 2);
        assert_eq!(
            cluster.server(0).order(&user, SKU, Some("l")).await.status,
            201
        );
        cluster.stop().await;
    });
}

fn until_away(cluster: &Cluster, from: usize, to: u8) {
    let peers = cluster.server(from).millrace().peers().expect("a node");
    let deadline = Instant::now() + PATIENCE;
    let is_there = || {
        let links = peers.report();
        links
            .iter()
            .any(|link| link.peer.node == to && link.identity.is_some())
    };
    while is_there() {
        assert!(Instant::now() < deadline, "the link stays");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_node_without_contact_acknowledges_and_says_nothing_else() {
    block_on(async {
        let cluster = Cluster::start_where(|node| node != 2).await;
        let mut numbers = 0..;
        let user = buyer_of(2, &mut numbers);
        let placed = cluster.server(2).order(&user, SKU, Some("k")).await;
        assert_eq!(placed.status, 201);
        for node in 0..3 {
            let server = cluster.server(node);
            let fresh = buyer_of(2, &mut numbers);
            assert_eq!(
                server.order(&fresh, SKU, None).await.status,
                201,
                "node {node}"
            );
            let replay = server.order(&user, SKU, Some("k")).await;
            let refusal = server.order(&user, "none", None).await;
            let list = server.get(&format!("/v1/users/{user}/orders")).await;
            for answer in [replay, refusal, list] {
                assert_eq!(
                    (answer.status, answer.code().as_str()),
                    (503, "not_ready"),
                    "node {node}"
                );
            }
        }
        cluster.stop().await;
    });
}

#[test]
fn a_lane_that_moves_is_followed() {
    block_on(async {
        let cluster = Cluster::start().await;
        let mut numbers = 0..;
        let user = buyer_of(1, &mut numbers);
        let lane = Lane::of(&UserId::new(&user).unwrap());
        // Node 1 has given it to node 2, and node 0 does not know yet.
        cluster.nodes[1]
            .lanes
            .set_elsewhere(lane, 2, cluster.address(2));
        let order = cluster.server(0).order(&user, SKU, Some("k"));
        let news = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            cluster.nodes[2].lanes.open(lane, 2);
            cluster.nodes[0]
                .lanes
                .set_elsewhere(lane, 2, cluster.address(2));
        };
        let (placed, ()) = tokio::join!(order, news);
        assert_eq!(placed.status, 201, "{placed:?}");
        let list = cluster
            .server(2)
            .get(&format!("/v1/users/{user}/orders"))
            .await
            .json();
        assert_eq!(list["orders"].as_array().map(Vec::len), Some(1));
        // Two that point at one another pass nothing on for ever.
        cluster.nodes[2]
            .lanes
            .set_elsewhere(lane, 3, cluster.address(0));
        let begun = Instant::now();
        let refused = cluster
            .server(0)
            .post(
                json!({ "user_id": user, "sku_id": SKU }),
                None,
                &[("Prefer", "wait=1")],
            )
            .await;
        assert_eq!(
            (refused.status, refused.field("retry-after")),
            (503, Some("1")),
            "{refused:?}"
        );
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
        cluster.stop().await;
    });
}

#[test]
fn a_link_cut_at_any_byte_leaves_every_answer_true() {
    block_on(async {
        let cluster = Cluster::start().await;
        let relay = &cluster.nodes[1].relay;
        let mut numbers = 0..;
        let mut undecided = 0;
        let cuts = (0..12)
            .map(|at| (Way::Forth, 1_400 + at * 60))
            .chain((0..12).map(|at| (Way::Back, 900 + at * 60)))
            .chain([(Way::Forth, 0), (Way::Back, 0)]);
        for (turn, cut) in cuts.enumerate() {
            let user = buyer_of(1, &mut numbers);
            let key = (turn % 2 == 0).then_some("mine");
            let prefer = [("Prefer", "wait=2")];
            relay.cut(Some(cut));
            relay.sever();
            // Once there is a link again it is cut in the middle of something.
            tokio::time::sleep(Duration::from_millis(120)).await;
            let body = json!({ "user_id": user, "sku_id": SKU });
            let begun = Instant::now();
            let answer = cluster.server(0).post(body.clone(), key, &prefer).await;
            assert!(
                begun.elapsed() < Duration::from_millis(2_600),
                "{:?}",
                begun.elapsed()
            );
            relay.cut(None);
            cluster.connected();
            match answer.status {
                201 | 200 => assert_eq!(cluster.orders(&user).await.len(), 1, "{cut:?}"),
                // Nothing was sent, so nothing is there.
                421 => assert_eq!(cluster.orders(&user).await.len(), 0, "{cut:?}"),
                202 => {
                    undecided += 1;
                    assert_eq!(answer.json()["status"], "undecided", "{answer:?}");
                    let under = answer.field("idempotency-key").expect("a key").to_owned();
                    assert_eq!(answer.json()["idempotency_key"], under);
                    assert!(key.is_none_or(|key| key == under));
                    assert!(cluster.orders(&user).await.len() <= 1, "{cut:?}");
                    // A retry under it tells, and leaves one order.
                    let retry = cluster.server(2).post(body, Some(&under), &[]).await;
                    assert!(matches!(retry.status, 200 | 201), "{retry:?}");
                }
                other => panic!("{cut:?}: {other}: {answer:?}"),
            }
            assert!(cluster.orders(&user).await.len() <= 1, "{cut:?}");
        }
        println!("{undecided} undecided");
        cluster.server(1).assert_audit().await;
        cluster.stop().await;
    });
}

#[test]
fn a_silent_link_is_undecided_within_the_wait_and_a_retry_under_the_key_tells() {
    block_on(async {
        let cluster = Cluster::start().await;
        let mut numbers = 0..;
        let (one, two) = (buyer_of(1, &mut numbers), buyer_of(1, &mut numbers));
        let relay = &cluster.nodes[1].relay;
        relay.freeze(true);
        let begun = Instant::now();
        let prefer = [("Prefer", "wait=1")];
        let alone = cluster
            .server(0)
            .post(json!({ "user_id": one, "sku_id": SKU }), None, &prefer);
        let body = format!("{{\"user_id\":\"{two}\",\"sku_id\":\"{SKU}\"}}\n");
        let fields = [
            ("Content-Type", "application/x-ndjson"),
            ("Prefer", "wait=1"),
        ];
        let data = cluster.server(0).data;
        let batch =
            crate::support::server::request(data, "POST", "/v1/orders:batch", &fields, body);
        let (alone, batch) = tokio::join!(alone, batch);
        assert!(
            begun.elapsed() < Duration::from_millis(2_000),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(
            (alone.status, &alone.json()["status"]),
            (202, &json!("undecided"))
        );
        assert_eq!(alone.json()["order_id"], Value::Null);
        let line = batch.json();
        assert_eq!(
            (&line["http_status"], &line["status"]),
            (&json!(202), &json!("undecided"))
        );
        relay.freeze(false);
        cluster.connected();
        for (user, key) in [
            (&one, alone.field("idempotency-key").expect("a key")),
            (&two, line["idempotency_key"].as_str().expect("a key")),
        ] {
            let body = json!({ "user_id": user, "sku_id": SKU });
            let retry = cluster.server(2).post(body, Some(key), &[]).await;
            assert!(matches!(retry.status, 200 | 201), "{retry:?}");
            assert_eq!(cluster.orders(user).await.len(), 1);
        }
        cluster.stop().await;
    });
}

#[test]
fn a_node_that_stops_answers_what_it_was_passed() {
    block_on(async {
        let cluster = Cluster::start().await;
        let Cluster { mut nodes, .. } = cluster;
        let mut numbers = 0..;
        let user = buyer_of(1, &mut numbers);
        let address = nodes[0].server.data;
        let placing = tokio::task::spawn_blocking(move || {
            let body = format!("{{\"user_id\":\"{user}\",\"sku_id\":\"{SKU}\"}}");
            let fields = [("Content-Type", "application/json")];
            let mut seen = Vec::new();
            for _ in 0..400 {
                let answer =
                    try_call(address, "POST", "/v1/orders", &fields, &body).expect("an answer");
                seen.push((answer.status, answer.code()));
            }
            seen
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        let leaving = nodes.remove(1);
        assert!(leaving.server.stop().await, "nothing is left");
        let seen = placing.await.expect("all were answered");
        let of = |status: u16| seen.iter().filter(|(one, _)| *one == status).count();
        assert!(of(201) > 0 && of(421) + of(503) > 0, "{seen:?}");
        assert_eq!(of(201) + of(421) + of(503), seen.len(), "{seen:?}");
        for node in nodes {
            assert!(node.server.stop().await, "nothing is left");
        }
    });
}

#[test]
fn a_node_that_stops_and_has_handed_its_lanes_over_says_so_to_whoever_does_not_know() {
    block_on(async {
        let mut cluster = Cluster::start().await;
        let mut numbers = 0..;
        let user = buyer_of(1, &mut numbers);
        let lane = Lane::of(&UserId::new(&user).unwrap());
        let wait = [("Prefer", "wait=1")];
        // An order that waits for its row keeps node 1 from ending.
        let locking = cluster.nodes[1].database.connect().await;
        let lock = "BEGIN; LOCK TABLE millrace.orders";
        locking.batch_execute(lock).await.expect(lock);
        let address = cluster.server(1).data;
        let waiting = buyer_of(1, &mut numbers);
        let waiting = tokio::task::spawn_blocking(move || {
            let body = json!({ "user_id": waiting, "sku_id": SKU }).to_string();
            let fields = [("Content-Type", "application/json")];
            try_call(address, "POST", "/v1/orders", &fields, &body)
        });
        wait_until("the order waits", async || {
            cluster.server(1).stock(SKU).await.1 == 1
        })
        .await;
        // It stops; the lane is node 2's, and node 0 does not know.
        let owner = cluster.address(2);
        cluster.nodes[1].lanes.set_elsewhere(lane, 2, owner.clone());
        cluster.nodes[2].lanes.open(lane, 2);
        let leaving = cluster.nodes.remove(1);
        let control = leaving.server.control;
        let leaving = tokio::spawn(leaving.server.stop());
        wait_until("it drains", async || {
            let live = try_call(control, "GET", "/admin/v1/live", &[], "");
            live.is_ok_and(|live| live.json()["state"] == "draining")
        })
        .await;
        let order = json!({ "user_id": user, "sku_id": SKU });
        let refused = cluster
            .server(0)
            .post(order.clone(), Some("k"), &wait)
            .await;
        let shown = (refused.status, refused.code(), refused.field("retry-after"));
        assert_eq!(shown, (503, "not_ready".to_owned(), Some("1")));
        cluster.nodes[0].lanes.set_elsewhere(lane, 2, owner);
        let placed = cluster.server(0).post(order, Some("k"), &wait).await;
        assert_eq!(placed.status, 201, "{placed:?}");
        locking.batch_execute("ROLLBACK").await.expect("unlock");
        let _ = waiting.await;
        leaving.await.expect("it ends");
        cluster.stop().await;
    });
}

/// Processor time of this process without the present thread.
fn servers_time() -> Duration {
    let time = |clock| {
        let now = rustix::time::clock_gettime(clock);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    };
    let process = time(rustix::time::ClockId::ProcessCPUTime);
    process.saturating_sub(time(rustix::time::ClockId::ThreadCPUTime))
}

/// Processor time of the servers for an order, in µs: `orders` of these buyers, placed by a crowd at one address.
fn cost_of(crowd: &mut [Connection], buyers: &[String]) -> f64 {
    let fields = [("Content-Type", "application/json")];
    let before = servers_time();
    for buyers in buyers.chunks(crowd.len()) {
        for (connection, user) in crowd.iter_mut().zip(buyers) {
            let body = format!("{{\"user_id\":\"{user}\",\"sku_id\":\"{SKU}\"}}");
            let sent = connection.begin("POST", "/v1/orders", &fields, &body);
            sent.expect("sent");
        }
        for (connection, _) in crowd.iter_mut().zip(buyers) {
            assert_eq!(connection.answer().expect("an answer").status, 201);
        }
    }
    (servers_time() - before).as_secs_f64() * 1e6 / buyers.len() as f64
}

/// Orders without a key, so that one that is passed on also pays for the key that it is given. By hand, in release:
/// `MILLRACE_PASSED_ON=10000 cargo test --release --test service passing_on::costs -- --nocapture`.
#[test]
fn costs_of_an_order_that_is_passed_on_and_of_one_at_its_node_beside_a_process_on_its_own() {
    const CROWD: usize = 128;
    const ROUNDS: usize = 7;
    let Ok(orders) = std::env::var("MILLRACE_PASSED_ON") else {
        return;
    };
    let orders: usize = orders.parse().expect("a number of orders");
    block_on(async move {
        // A relay's time would count as the servers'.
        let cluster = Cluster::start_with(accept_payments, |_| true, false).await;
        let database = TestDatabase::create().await;
        let alone = TestServer::start(&database, accept_payments).await;
        alone.put_sku(SKU, 2 * UNITS, json!({})).await;
        let (node, single) = (cluster.server(0).data, alone.data);
        let measured = tokio::task::spawn_blocking(move || {
            let crowd_at = |address| {
                let open = |_| Connection::open(address).expect("a connection");
                (0..CROWD).map(open).collect::<Vec<_>>()
            };
            let (mut at_node, mut at_single) = (crowd_at(node), crowd_at(single));
            let mut numbers = 0..;
            let mut buyers = |owner: usize, count: usize| -> Vec<String> {
                (0..count).map(|_| buyer_of(owner, &mut numbers)).collect()
            };
            cost_of(&mut at_node, &buyers(0, CROWD));
            cost_of(&mut at_node, &buyers(1, CROWD));
            cost_of(&mut at_single, &buyers(0, CROWD));
            let mut passed_on = Vec::new();
            let mut at_home = Vec::new();
            for _ in 0..ROUNDS {
                let alone = cost_of(&mut at_single, &buyers(0, orders));
                let local = cost_of(&mut at_node, &buyers(0, orders));
                let passed = cost_of(&mut at_node, &buyers(1, orders));
                println!(
                    "µs an order: {alone:.1} alone, {local:.1} at its node, {passed:.1} passed on"
                );
                passed_on.push(passed / local);
                at_home.push(local / alone);
            }
            [passed_on, at_home].map(|mut ratios| {
                ratios.sort_by(f64::total_cmp);
                ratios
            })
        });
        let [passed_on, at_home] = measured.await.expect("it was measured");
        for (what, of) in [
            ("passed on / at its node", &passed_on),
            ("at its node / alone", &at_home),
        ] {
            println!(
                "{what}: {:.2} ({:.2} to {:.2})",
                of[ROUNDS / 2],
                of[0],
                of[ROUNDS - 1]
            );
        }
        assert!(passed_on[ROUNDS / 2] <= 1.6, "{passed_on:?}");
        // 15 % fewer orders for a second of a processor.
        assert!(at_home[ROUNDS / 2] <= 1.0 / 0.85, "{at_home:?}");
        cluster.stop().await;
        assert!(alone.stop().await, "nothing is left");
    });
}
