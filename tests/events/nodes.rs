//! Events with several nodes: one of them reads the slot, and another goes on when that one is gone.

use std::cell::RefCell;
use std::path::Path;
use std::time::Duration;

use millrace::store::events::slot::SlotReader;
use millrace::store::postgres::Database;
use serde_json::json;

use crate::receiver::{Receiver, SECRETS, SLOT};
use crate::support::block_on;
use crate::support::http::{call, try_call};
use crate::support::postgres::{TestDatabase, test_dir};
use crate::support::served::{Served, command};
use crate::support::server::RECEIPT_KEY;
use crate::support::waiting::{wait_until, wait_until_within};

const LEASE_MS: u64 = 3_000;

/// A node as a process of its own.
async fn serve(dir: &Path, database: &TestDatabase, receiver: &Receiver) -> Served {
    let settings: Vec<(String, String)> = [
        ("DATABASE__URL", database.url()),
        ("DATABASE__POOL_SIZE", "4".to_owned()),
        ("WORKERS__COUNT", "2".to_owned()),
        ("QUEUE__BACKEND", "memory".to_owned()),
        ("RECEIPT__KEY", RECEIPT_KEY.to_owned()),
        ("CLUSTER__ENABLED", "true".to_owned()),
        ("CLUSTER__LISTEN", "127.0.0.1:0".to_owned()),
        (
            "CLUSTER__SECRET",
            "the secret of the nodes in this test".to_owned(),
        ),
        ("CLUSTER__LEASE_MS", LEASE_MS.to_string()),
        ("CLUSTER__ANSWER_LEASE_MS", "900".to_owned()),
        (
            "EVENTS__SINKS__SHOP__URL",
            format!("http://{}/", receiver.address),
        ),
        ("EVENTS__SINKS__SHOP__SECRET", SECRETS[0].to_owned()),
    ]
    .map(|(name, value)| (format!("MILLRACE_{name}"), value))
    .to_vec();
    let dir = dir.to_path_buf();
    let started = tokio::task::spawn_blocking(move || {
        let log = dir.join("log");
        let output = std::fs::File::create(&log).expect("a log");
        Served::try_start_as(command(&dir, &settings).stderr(output), &dir, &log)
    });
    started
        .await
        .expect("a thread")
        .unwrap_or_else(|ended| panic!("{}", ended.log))
}

/// What a node says about the sink.
fn state_at(node: &Served) -> String {
    let sinks = call(node.control, "GET", "/admin/v1/events", &[], "").json();
    sinks["sinks"][0]["state"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

/// Places an order for each of these buyers, whichever lane is theirs, and returns the ids.
async fn buy(node: &Served, buyers: std::ops::Range<u32>) -> Vec<String> {
    let mut orders = Vec::new();
    for buyer in buyers {
        let body = json!({ "user_id": format!("u{buyer}"), "sku_id": "A" }).to_string();
        let fields = [
            ("Content-Type", "application/json"),
            ("Idempotency-Key", "k"),
        ];
        let placed = RefCell::new(None);
        wait_until("an order is placed", async || {
            let answer = try_call(node.data, "POST", "/v1/orders", &fields, &body);
            if let Ok(answer) = answer
                && matches!(answer.status, 200 | 201)
            {
                let order = answer.json();
                placed.replace(order["order_id"].as_str().map(str::to_owned));
            }
            placed.borrow().is_some()
        })
        .await;
        orders.extend(placed.take());
    }
    orders
}

#[test]
fn one_node_reads_the_slot_and_another_goes_on_when_it_is_killed() {
    block_on(async {
        let (database, receiver) = (TestDatabase::create().await, Receiver::start().await);
        let dirs = [test_dir(), test_dir()];
        let first = serve(dirs[0].path(), &database, &receiver).await;
        // It has nothing to deliver yet. Events begin with the slot.
        wait_until_within("the first node reads the slot", SLOT, async || {
            state_at(&first) == "idle"
        })
        .await;
        let second = serve(dirs[1].path(), &database, &receiver).await;
        first.put_sku("A", 1_000);
        wait_until("the second node sells", async || {
            let sku = try_call(second.data, "GET", "/v1/skus/A", &[], "");
            sku.is_ok_and(|answer| answer.status == 200)
        })
        .await;
        let mut orders = buy(&first, 0..10).await;
        orders.extend(buy(&second, 10..20).await);
        for order in &orders {
            receiver.until("order.placed", order).await;
        }
        assert_eq!(state_at(&second), "elsewhere");
        first.kill();
        wait_until("the second node reads the slot", async || {
            state_at(&second) != "elsewhere"
        })
        .await;
        let more = buy(&second, 20..40).await;
        for order in &more {
            receiver.until("order.placed", order).await;
        }
        for order in orders.iter().chain(&more) {
            assert_eq!(receiver.ids_of(order), [format!("{order}:1")]);
        }
        second.terminate();
        assert_eq!(second.wait(), Some(0));
    });
}

#[test]
fn a_slot_is_taken_from_a_process_that_is_paused() {
    block_on(async {
        let test = TestDatabase::create().await;
        let database = Database::new(&test.url(), "millrace", 1, Duration::from_secs(5));
        let database = database.expect("an address");
        let open = async |silence_max| SlotReader::open(&database, "shop", silence_max).await;
        let paused = open(Duration::from_secs(60)).await.expect("open it");
        assert!(paused.is_some());
        assert!(
            open(Duration::from_secs(60)).await.expect("ask").is_none(),
            "it has asked a moment ago"
        );
        wait_until("it is free", async || {
            open(Duration::ZERO).await.expect("ask").is_some()
        })
        .await;
        let asked = paused.expect("it was there").state().await;
        assert!(asked.is_err(), "its session has ended: {asked:?}");
    });
}
