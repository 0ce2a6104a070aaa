//! Draws over several nodes, and draws that go from a process on its own to nodes and back, at every step.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;

use millrace::order::draw::{EntryToken, Row};
use millrace::order::{UnixMillis, UserId};
use serde_json::{Value, json};

use crate::nodes::{Cluster, Node, order_at};
use crate::support::block_on;
use crate::support::http::{Answer, call};
use crate::support::served::millrace;
use crate::support::waiting::{PATIENCE, wait_until, wait_until_within};
use crate::three_nodes;
use crate::waiting::{
    SKU, assert_whole, cancel, id, join, order, order_with, put, sku_at, until_status,
};

/// Units of the draw. Entries are for one, two or three.
const UNITS: usize = 20;

/// How much longer than at first entries are open, each time that the machine was too slow to make all of them.
const LONGER: [u32; 3] = [1, 4, 16];

/// The entries ended before all were made.
struct TooLate;

/// Plays a draw on a cluster of its own, whose entries are open for so long, or for longer until that is enough.
async fn with_time_enough(open_ms: u64, play: impl AsyncFn(&Cluster, u64) -> Result<(), TooLate>) {
    for open_ms in LONGER.map(|times| u64::from(times) * open_ms) {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        match play(&cluster, open_ms).await {
            Ok(()) => return,
            Err(TooLate) => println!("entries ended after {open_ms} ms before all were made"),
        }
    }
    panic!("the entries ended before all were made");
}

/// Asserts that it is an entry, if that was asked for in time.
fn entered(answer: &Answer) -> Result<Value, TooLate> {
    let order = answer.json();
    if order["code"] == "draw_under_way" {
        return Err(TooLate);
    }
    assert_eq!(
        (answer.status, &order["status"]),
        (202, &json!("waitlisted")),
        "{order}"
    );
    Ok(order)
}

/// A draw, as its buyers and whoever looks at it know it.
#[derive(Default)]
struct Draw {
    /// The entries, as they were answered.
    entries: Vec<Value>,
    /// Its first line, as it was at several moments.
    earlier: Vec<String>,
}

/// Terms of a draw whose entries are open for so long.
fn terms(open_ms: u64) -> Value {
    let now = UnixMillis::now();
    json!({
        "total": UNITS,
        "allocation": "draw",
        "opens_at": UnixMillis(now.0 - 60_000).to_string(),
        "draw_at": now.plus_ms(open_ms).to_string(),
        "closes_at": now.plus_ms(3_600_000).to_string(),
        "draw_beacon": "the number of the day",
    })
}

fn supply_beacon(at: &Node) -> Answer {
    let target = format!("/admin/v1/skus/{SKU}/draw");
    let beacon = json!({ "beacon": "4242" }).to_string();
    call(at.served.control, "POST", &target, &[], &beacon)
}

fn published(at: SocketAddr) -> String {
    let target = format!("/v1/skus/{SKU}/draw?limit=1000");
    String::from_utf8(call(at, "GET", &target, &[], "").body).expect("a text")
}

async fn until_state(nodes: &[&Node], state: &str) {
    let patience = LONGER[2] * PATIENCE;
    for node in nodes {
        wait_until_within(&format!("the draw is {state}"), patience, async || {
            sku_at(node.served.data, SKU)["state"] == state
        })
        .await;
    }
}

/// What the buyer of this number asks for.
fn entry(number: usize) -> Value {
    json!({ "user_id": format!("u-{number}"), "sku_id": SKU, "quantity": 1 + number % 3 })
}

impl Draw {
    /// So many more entries, one after the other at one node after the other.
    fn enter(&mut self, nodes: &[&Node], more: usize) -> Result<(), TooLate> {
        for number in self.entries.len()..self.entries.len() + more {
            let answer = order(nodes[number % nodes.len()].served.data, &entry(number));
            let entry = entered(&answer)?;
            assert_eq!(entry.get("position"), None, "{entry}");
            self.entries.push(entry);
        }
        Ok(())
    }

    /// So many more, which are answered before they are rows. Their ids.
    fn accepted(&self, at: &Node, more: usize) -> Result<Vec<String>, TooLate> {
        let numbers = self.entries.len()..self.entries.len() + more;
        let accepted = numbers.map(|number| {
            let fields = [("Prefer", "respond-async")];
            let accepted = order_with(at.served.data, &entry(number), &fields);
            entered(&accepted)?;
            Ok(id(&accepted))
        });
        accepted.collect()
    }

    /// Finds those that were accepted.
    async fn find(&mut self, at: &Node, accepted: Vec<String>) {
        for id in accepted {
            let entry = RefCell::new(Value::Null);
            wait_until("it is an entry", async || {
                let found = order_at(at.served.data, &id);
                let is_found = found["entry_token"].is_string();
                entry.replace(found);
                is_found
            })
            .await;
            self.entries.push(entry.into_inner());
        }
    }

    /// Notes the first line as it is now.
    fn look(&mut self, at: &Node) {
        let file = published(at.served.data);
        self.earlier
            .push(file.lines().next().expect("its first line").to_owned());
    }

    /// Waits until entries are as they were answered, whoever is asked now: a busy node may answer later, or from the row alone.
    async fn until_known(&self, at: &Node) {
        for entry in &self.entries {
            let id = entry["order_id"].as_str().expect("an id");
            wait_until("it is as it was answered", async || {
                let now = order_at(at.served.data, id);
                let members = ["user_id", "quantity", "entry_token", "created_at"];
                members.iter().all(|member| now[member] == entry[member])
            })
            .await;
        }
    }

    /// The ids of the entries in the order of the published draw, with whether they have won. Each is there once, and the program
    /// finds everything right.
    fn verified(&self, file: &str, cluster: &Cluster) -> Vec<(String, bool)> {
        let lines = |values: &[Value]| values.iter().map(|entry| format!("{entry}\n")).collect();
        let openings: String = lines(&self.entries);
        let mut words = vec![
            "draw".to_owned(),
            "verify".to_owned(),
            cluster.write("draw.ndjson", file),
        ];
        for (number, line) in self.earlier.iter().enumerate() {
            words.push("--earlier".to_owned());
            words.push(cluster.write(&format!("earlier-{number}.ndjson"), line));
        }
        words.push("--openings".to_owned());
        words.push(cluster.write("openings.ndjson", &openings));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let verdict = millrace(&words).output().expect("run the program");
        assert!(
            verdict.status.success(),
            "{}",
            String::from_utf8_lossy(&verdict.stdout)
        );
        let mut ids: BTreeMap<String, String> = self.entries.iter().map(Self::hashed).collect();
        let rows = file.lines().skip(1).map(|line| {
            let row: Row = serde_json::from_str(line).expect("a row");
            (
                ids.remove(&row.entry.to_string()).expect("an entry, once"),
                row.won,
            )
        });
        let rows: Vec<_> = rows.collect();
        assert!(ids.is_empty(), "not in the file: {ids:?}");
        rows
    }

    /// The hash and the id of an entry.
    fn hashed(entry: &Value) -> (String, String) {
        let text = |name: &str| entry[name].as_str().expect("a text");
        let user = UserId::new(text("user_id")).expect("a user id");
        let token = EntryToken::from_hex(text("entry_token")).expect("a token");
        (
            token.entry_hash(&user).to_string(),
            text("order_id").to_owned(),
        )
    }
}

/// Waits until those that have won have their units, and all others wait in the order of rank. Returns these.
async fn until_served(at: &Node, rows: &[(String, bool)]) -> Vec<String> {
    let mut waiting = Vec::new();
    for (id, won) in rows {
        if *won {
            until_status(at.served.data, id, "pending_payment").await;
            continue;
        }
        waiting.push(id.clone());
    }
    until_waiting(at, &waiting).await;
    waiting
}

/// Waits until these are the first of the list.
async fn until_waiting(at: &Node, ids: &[String]) {
    for (ahead, id) in ids.iter().enumerate() {
        wait_until("it waits at its place", async || {
            let order = order_at(at.served.data, id);
            order["status"] == "waitlisted" && order["position"] == ahead + 1
        })
        .await;
    }
}

#[test]
fn a_draw_over_three_nodes_is_one_draw_and_its_published_file_is_right() {
    block_on(with_time_enough(8_000, async |cluster, open_ms| {
        let nodes = three_nodes(cluster).await;
        let mut terms = terms(open_ms);
        let made = put(&nodes[0], SKU, terms.clone());
        assert_eq!(made.status, 201, "{made:?}");
        Cluster::wait_for_sku(&nodes.each_ref(), SKU).await;
        let mut draw = Draw::default();
        draw.enter(&nodes.each_ref(), 60)?;
        // Whichever node is asked: the terms stay once somebody has entered at any.
        terms["draw_beacon"] = json!("another number");
        for node in &nodes {
            let changed = put(node, SKU, terms.clone());
            assert_eq!(changed.json()["code"], "draw_fixed", "{changed:?}");
        }
        let body = json!({ "user_id": "u-7", "sku_id": SKU, "quantity": 1 });
        let twice = order(nodes[0].served.data, &body);
        assert_eq!(twice.status, 422, "another body under its key: {twice:?}");
        until_state(&nodes.each_ref(), "entries_fixed").await;
        let late = order(
            nodes[2].served.data,
            &json!({ "user_id": "late", "sku_id": SKU }),
        );
        assert_eq!(late.json()["code"], "draw_under_way", "{late:?}");
        draw.look(&nodes[1]);
        // A node dies before the beacon is known, which another one is given.
        let [one, two, three] = nodes;
        three.served.kill();
        let supplied = supply_beacon(&two);
        assert_eq!(supplied.status, 200, "{supplied:?}");
        until_state(&[&one, &two], "drawn").await;
        let file = published(one.served.data);
        assert_eq!(file, published(two.served.data));
        let rows = draw.verified(&file, cluster);
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        // Those that have won get their units, those of the dead node too.
        let waiting = until_served(&one, &rows).await;
        let behind = join(one.served.data, "after");
        assert_eq!(behind.json()["position"], waiting.len() + 1, "{behind:?}");
        for node in [&one, &two] {
            assert_whole(node).await;
        }
        one.stop();
        two.stop();
        Ok(())
    }));
}

/// Who sells.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    /// A process on its own.
    Alone,
    /// Three nodes.
    Nodes,
}
use Who::{Alone, Nodes};

/// How a process on its own ends.
#[derive(Clone, Copy)]
enum End {
    Stopped,
    Killed,
}

/// The processes that sell now.
struct Sellers<'a> {
    cluster: &'a Cluster,
    who: Who,
    nodes: Vec<Node>,
}

impl<'a> Sellers<'a> {
    async fn start(cluster: &'a Cluster, who: Who) -> Self {
        let nodes = match who {
            Alone => vec![cluster.start_alone("alone")],
            Nodes => three_nodes(cluster).await.into(),
        };
        Sellers {
            cluster,
            who,
            nodes,
        }
    }

    fn all(&self) -> Vec<&Node> {
        self.nodes.iter().collect()
    }

    /// The same ones, or the others once these have ended.
    async fn then(self, who: Who, end: End) -> Self {
        if self.who == who {
            return self;
        }
        let cluster = self.cluster;
        self.end(end);
        Self::start(cluster, who).await
    }

    fn end(self, end: End) {
        for node in self.nodes {
            match (self.who, end) {
                (Alone, End::Killed) => node.served.kill(),
                _ => node.stop(),
            }
        }
    }
}

/// A draw whose first entries come in with the first, whose last ones come in and are fixed with the second, which the third make
/// after they have got the beacon, and where units come back with the fourth.
async fn draw_over(
    cluster: &Cluster,
    open_ms: u64,
    [entered, fixed, drawn, went_on]: [Who; 4],
    end: End,
) -> Result<(), TooLate> {
    let sellers = Sellers::start(cluster, entered).await;
    let made = put(&sellers.nodes[0], SKU, terms(open_ms));
    assert_eq!(made.status, 201, "{made:?}");
    Cluster::wait_for_sku(&sellers.all(), SKU).await;
    let mut draw = Draw::default();
    draw.look(&sellers.nodes[0]);
    draw.enter(&sellers.all(), 20)?;
    let accepted = draw.accepted(&sellers.nodes[0], 5)?;

    let sellers = sellers.then(fixed, end).await;
    let last = sellers.nodes.last().expect("a process");
    draw.find(last, accepted).await;
    draw.until_known(last).await;
    draw.enter(&sellers.all(), 30)?;
    draw.look(last);
    until_state(&sellers.all(), "entries_fixed").await;
    draw.look(last);

    let sellers = sellers.then(drawn, end).await;
    until_state(&sellers.all(), "entries_fixed").await;
    let last = sellers.nodes.last().expect("a process");
    draw.until_known(last).await;
    let supplied = supply_beacon(last);
    assert_eq!(supplied.status, 200, "{supplied:?}");
    until_state(&sellers.all(), "drawn").await;
    let file = published(sellers.nodes[0].served.data);
    let rows = draw.verified(&file, cluster);
    assert_eq!(rows.len(), 55);
    let waiting = until_served(&sellers.nodes[0], &rows).await;
    for node in sellers.all() {
        assert_whole(node).await;
    }

    let sellers = sellers.then(went_on, end).await;
    let (one, last) = (&sellers.nodes[0], sellers.nodes.last().expect("a process"));
    assert_eq!(published(last.served.data), file);
    until_waiting(one, &waiting).await;
    let behind = join(last.served.data, "after");
    assert_eq!(behind.json()["position"], waiting.len() + 1, "{behind:?}");
    // As many units as the next in rank waits for come back together: fewer would go to those behind it.
    let units = |id: &str| order_at(one.served.data, id)["quantity"].as_u64();
    let wanted = units(&waiting[0]);
    let mut won = rows.iter().filter(|(_, won)| *won);
    let (enough, _) = won
        .find(|(id, _)| units(id) >= wanted)
        .expect("a winner of as many units");
    wait_until("its units come back", async || {
        cancel(one.served.data, enough, "").status == 200
    })
    .await;
    until_status(last.served.data, &waiting[0], "pending_payment").await;
    for node in sellers.all() {
        assert_whole(node).await;
    }
    sellers.end(End::Stopped);
    Ok(())
}

#[test]
fn a_draw_that_a_process_on_its_own_began_is_made_by_nodes() {
    block_on(with_time_enough(25_000, async |cluster, open_ms| {
        draw_over(cluster, open_ms, [Alone, Nodes, Nodes, Alone], End::Killed).await
    }));
}

#[test]
fn a_draw_that_nodes_began_is_made_by_a_process_on_its_own() {
    block_on(with_time_enough(25_000, async |cluster, open_ms| {
        draw_over(cluster, open_ms, [Nodes, Alone, Alone, Nodes], End::Stopped).await
    }));
}

#[test]
fn entries_that_nodes_have_fixed_are_ranked_by_a_process_on_its_own() {
    block_on(with_time_enough(8_000, async |cluster, open_ms| {
        draw_over(cluster, open_ms, [Nodes, Nodes, Alone, Nodes], End::Killed).await
    }));
}

#[test]
fn entries_that_a_process_on_its_own_has_fixed_are_ranked_by_nodes() {
    block_on(with_time_enough(8_000, async |cluster, open_ms| {
        draw_over(cluster, open_ms, [Alone, Alone, Nodes, Alone], End::Killed).await
    }));
}
