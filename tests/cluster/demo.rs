//! `millrace demo --nodes`: a sale that loses one of its nodes.

use serde_json::Value;

use crate::support::brokers::{Broker, Kind};
use crate::support::postgres::test_dir;
use crate::support::served::millrace;

#[test]
fn the_demo_over_three_nodes_loses_one_and_keeps_every_promise() {
    let Some(broker) = Broker::start(Kind::Redis) else {
        return;
    };
    let dir = test_dir();
    let page = dir.path().join("page.html");
    let output = millrace(&[
        "demo",
        "--json",
        "--nodes",
        "3",
        "--stock",
        "400",
        "--rate",
        "200",
        "--duration",
        "4",
        "--page",
    ])
    .arg(&page)
    .envs(broker.env().iter().cloned())
    .output()
    .expect("run the demo");
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}\n{:#}", figures["promises"]);
    assert_eq!(figures["ok"], true);
    let promises = figures["promises"].as_array().expect("the promises");
    let joined = figures["load"]["waitlist"]["joined"].as_u64();
    assert!(
        joined.is_some_and(|joined| joined > 0),
        "{:#}",
        figures["load"]["waitlist"]
    );
    let killed = promises.iter().find(|promise| {
        let name = promise["name"].as_str().unwrap_or_default();
        name.starts_with("A node was killed with -9")
    });
    let killed = killed.expect("the promise about the killed node");
    let detail = killed["detail"].as_str().unwrap_or_default();
    assert!(detail.contains("lanes were open elsewhere"), "{detail}");
    let lanes = figures["load"]["lanes"]["lanes"].as_array();
    let lanes = lanes.expect("the lanes over time");
    assert_eq!(lanes.len(), 64);
    let owner_at_the_end = |lane: &Value| {
        let spans = lane.as_array().and_then(|spans| spans.last().cloned());
        spans.unwrap_or_default()["node"].clone()
    };
    let owners: Vec<Value> = lanes.iter().map(owner_at_the_end).collect();
    assert!(owners.iter().all(Value::is_u64), "{owners:?}");
    let html = std::fs::read_to_string(page).expect("the page");
    assert!(
        html.contains("\"killed\":{\"node\":"),
        "its moment is marked"
    );
}

#[test]
fn several_nodes_without_a_broker_are_refused_with_the_remedy() {
    let output = millrace(&["demo", "--nodes", "3"]).output();
    let output = output.expect("run the demo");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--queue redis"), "{said}");
}
