//! Answers about sinks of events, held against the document. The rows are put there: no sink is configured here.

use serde_json::Value;

use super::{Checker, OPS};
use crate::support::postgres::TestDatabase;
use crate::support::server::{TestServer, request};

const SINKS: &str = "/admin/v1/events";
const RESYNC: &str = "/admin/v1/events/{sink}/resync";
const LIST: &str = "/admin/v1/event-dead-letters";
const RETRY: &str = "/admin/v1/event-dead-letters/{id}/retry";
const DISCARD: &str = "/admin/v1/event-dead-letters/{id}/discard";

/// Everything about events that a running Millrace answers.
pub async fn check(server: &TestServer, database: &TestDatabase, checker: &mut Checker) {
    let rows = "INSERT INTO millrace.event_sinks (sink, place_xid) VALUES ('erp', 700);
        INSERT INTO millrace.event_deliveries (sink, event_id, subject, type, body, attempts, first_failed_at,
               next_attempt_at, last_error, dead_at)
        SELECT 'erp', '7:' || n, '7', 'order.paid', '{\"id\":\"7:1\"}', 9, now(), now(), 'HTTP 500', now()
          FROM generate_series(1, 2) n";
    database
        .connect()
        .await
        .batch_execute(rows)
        .await
        .expect("rows");
    let list = request(server.control, "GET", LIST, &[OPS], String::new()).await;
    let ids: Vec<String> = list.json()["event_dead_letters"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|letter: &Value| letter["id"].to_string())
        .collect();
    let (first, second) = (ids[0].as_str(), ids[1].as_str());
    for (method, path, name, query, status) in [
        ("GET", SINKS, "", "", 200),
        ("GET", LIST, "", "?sink=erp&limit=1", 200),
        ("GET", LIST, "", "?limit=0", 400),
        ("POST", RESYNC, "erp", "", 200),
        ("POST", RESYNC, "erp", "?after=0", 200),
        ("POST", RESYNC, "erp", "?after=734012345678901234", 200),
        ("POST", RESYNC, "erp", "?after=x", 400),
        ("POST", RESYNC, "nobody", "", 404),
        ("POST", RETRY, first, "", 200),
        ("POST", RETRY, first, "", 404),
        ("POST", DISCARD, second, "", 200),
        ("POST", DISCARD, "x", "", 404),
    ] {
        let target = path.replace("{sink}", name).replace("{id}", name);
        let target = format!("{target}{query}");
        let answer = request(server.control, method, &target, &[OPS], String::new()).await;
        assert_eq!(answer.status, status, "{method} {target}: {answer:?}");
        checker.check(method, path, &answer);
    }
}
