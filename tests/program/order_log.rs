//! The order log on every broker, as a client and an operator see it: the real binary, a real PostgreSQL, the real
//! broker. A broker that cannot be had here is said not to have been run.

mod faults;

use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::block_on;
use crate::support::broker_admin::redis;
use crate::support::brokers::{Broker, Kind};
use crate::support::http::{Answer, call, try_call};
use crate::support::postgres::{TestDatabase, test_dir};
use crate::support::served::{Served, run};
use crate::support::waiting::until;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);
const ASYNC: &[(&str, &str)] = &[("Prefer", "respond-async")];
const LOCK: &str = "BEGIN; LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE";

#[test]
fn redis_keeps_what_was_accepted() {
    keeps_what_was_accepted(Kind::Redis);
}

#[test]
fn kafka_keeps_what_was_accepted() {
    keeps_what_was_accepted(Kind::Kafka);
}

#[test]
fn rocketmq_keeps_what_was_accepted() {
    keeps_what_was_accepted(Kind::RocketMq);
}

/// A shop with its log on a broker.
struct Shop {
    database: TestDatabase,
    broker: Broker,
    /// Settings besides the broker's.
    more: Vec<(String, String)>,
}

impl Shop {
    fn new(database: TestDatabase, broker: Broker) -> Self {
        Shop {
            database,
            broker,
            more: Vec::new(),
        }
    }

    fn settings(&self) -> Vec<(String, String)> {
        let mut settings = self.journal_settings();
        settings.extend_from_slice(self.broker.env());
        settings.extend_from_slice(&self.more);
        settings
    }

    /// The same with the log on the machine's disk.
    fn journal_settings(&self) -> Vec<(String, String)> {
        let own = [
            ("MILLRACE_DATABASE__URL", self.database.url()),
            ("MILLRACE_DATABASE__STEP_TIMEOUT_MS", "2000".to_owned()),
            // Small, so that a backlog waits in the log.
            ("MILLRACE_QUEUE__CAPACITY", "64".to_owned()),
            ("MILLRACE_ORDERS__TIMEOUT_MS", "3000".to_owned()),
        ];
        own.map(|(name, value)| (name.to_owned(), value)).into()
    }

    fn start(&self, dir: &Path) -> Served {
        let settings = self.settings();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Served::try_start(dir, &settings, &dir.join("log")) {
                Ok(served) => return served,
                // Transactions of an earlier process that was killed end later than `database.step_timeout_ms` on a busy
                // machine. Whatever watches over the process starts it again.
                Err(ended) if ended.log.contains("lock timeout") && Instant::now() < deadline => {}
                Err(ended) => panic!("millrace ended: {}\n{}", ended.status, ended.log),
            }
        }
    }

    /// Runs a command of the binary. Its exit code and what it said.
    fn command(&self, dir: &Path, args: &[&str]) -> (Option<i32>, String) {
        run(dir, &self.settings(), args)
    }
}

fn post(served: &Served, user: &str, prefer: &[(&str, &str)]) -> Answer {
    let mut fields = vec![("Content-Type", "application/json")];
    fields.extend_from_slice(prefer);
    call(served.data, "POST", "/v1/orders", &fields, &body_of(user))
}

fn body_of(user: &str) -> String {
    json!({ "user_id": user, "sku_id": "A" }).to_string()
}

/// The id of an order that was accepted.
fn accepted(answer: &Answer) -> String {
    assert_eq!(answer.status, 202, "{answer:?}");
    assert_eq!(
        answer.field("preference-applied"),
        Some("respond-async"),
        "{answer:?}"
    );
    let order = answer.json();
    assert_eq!(order["status"], "accepted", "{order}");
    order["order_id"].as_str().expect("an id").to_owned()
}

fn status(served: &Served, id: &str) -> Value {
    let order = call(served.data, "GET", &format!("/v1/orders/{id}"), &[], "");
    order.json()["status"].clone()
}

fn assert_audit(served: &Served) {
    until("nothing is in flight", PATIENCE, || {
        let audit = call(served.control, "GET", "/admin/v1/audit", &[], "").json();
        assert_eq!(audit["ok"], true, "{audit:#}");
        audit["orders_in_flight"] == 0
    });
}

fn keeps_what_was_accepted(kind: Kind) {
    block_on(async {
        let Some(broker) = Broker::start(kind) else {
            return;
        };
        let mut shop = Shop::new(TestDatabase::create().await, broker);
        let admin = shop.database.connect().await;
        let (first_dir, second_dir) = (test_dir(), test_dir());

        // A backlog waits in the broker, is found there, and outlives the machine.
        let first = shop.start(first_dir.path());
        first.put_sku("A", 10_000);
        admin.batch_execute(LOCK).await.unwrap();
        let ids: Vec<String> = (0..150)
            .map(|number| accepted(&post(&first, &format!("u-{number}"), ASYNC)))
            .collect();
        for id in [&ids[0], &ids[149]] {
            assert_eq!(status(&first, id), "accepted");
        }
        first.kill();
        drop(first_dir);
        admin.batch_execute("ROLLBACK").await.unwrap();
        let mut second = shop.start(second_dir.path());
        for id in &ids {
            assert_eq!(status(&second, id), "pending_payment", "{id}");
        }
        assert_audit(&second);

        // A backlog is read back from the broker by the process that wrote it.
        admin.batch_execute(LOCK).await.unwrap();
        let ids: Vec<String> = (0..150)
            .map(|number| accepted(&post(&second, &format!("v-{number}"), ASYNC)))
            .collect();
        admin.batch_execute("ROLLBACK").await.unwrap();
        for id in &ids {
            until("a row", PATIENCE, || {
                status(&second, id) == "pending_payment"
            });
        }

        // The broker dies: nothing is accepted, nothing is held, waiting orders go on.
        shop.broker.kill9();
        let mut undecided = Vec::new();
        until("a refusal", PATIENCE, || {
            let answer = post(&second, &format!("w-{}", undecided.len()), ASYNC);
            match answer.status {
                503 => {
                    let problem = answer.json();
                    assert_eq!(problem["code"], "queue_unavailable", "{problem}");
                    assert!(answer.field("retry-after").is_some(), "{answer:?}");
                    true
                }
                // Sent when the broker died, or not answered in time: a restart may find it, or nothing was sent.
                202 => {
                    assert_eq!(answer.field("preference-applied"), None, "{answer:?}");
                    undecided.push(answer.json()["order_id"].clone());
                    false
                }
                // Sent before the broker died, and written by the database meanwhile.
                201 | 504 => false,
                _ => panic!("{answer:?}"),
            }
        });
        assert_eq!(post(&second, "waiting", &[]).status, 201);
        until("the live data says so", PATIENCE, || {
            let live = call(second.control, "GET", "/admin/v1/live", &[], "").json();
            live["order_log"]["state"] == "away"
        });
        let failing = second.failing_checks();
        assert!(
            failing.iter().any(|(name, _)| name == "journal"),
            "{failing:?}"
        );
        shop.broker.start_again();
        until("the broker is used again", PATIENCE, || {
            post(&second, "x", ASYNC).status != 503
        });
        accepted(&post(&second, "y", ASYNC));
        until("ready again", PATIENCE, || {
            second.failing_checks().is_empty()
        });
        for id in &undecided {
            let id = id.as_str().expect("an id");
            until("an outcome", PATIENCE, || {
                let status = status(&second, id);
                status == "pending_payment" || status == Value::Null
            });
        }
        assert_audit(&second);

        // Another backend would not find what this one may still hold.
        admin.batch_execute(LOCK).await.unwrap();
        let left = accepted(&post(&second, "z", ASYNC));
        second.kill();
        let (dir, log) = (second_dir.path(), second_dir.path().join("log"));
        let refused = Served::try_start(dir, &shop.journal_settings(), &log);
        let refused = refused.err().expect("the orders are elsewhere");
        assert!(
            refused.log.contains("may hold acknowledged orders"),
            "{refused:?}"
        );
        // A broker that has just started may be away for a moment.
        until("the log is verified", PATIENCE, || {
            shop.command(dir, &["queue", "verify"]).0 == Some(0)
        });
        until("the order is shown", PATIENCE, || {
            let (code, said) = shop.command(dir, &["queue", "inspect", "--orders"]);
            code == Some(0) && said.contains(&left)
        });
        admin.batch_execute("ROLLBACK").await.unwrap();
        second = shop.start(dir);
        assert_eq!(status(&second, &left), "pending_payment");
        second.terminate();
        assert_eq!(second.wait(), Some(0));

        // After an orderly stop nothing is left in it.
        let third = Served::try_start(dir, &shop.journal_settings(), &log);
        let third = third.unwrap_or_else(|ended| panic!("{ended:?}"));
        accepted(&post(&third, "journal", ASYNC));
        assert_audit(&third);
        third.terminate();
        assert_eq!(third.wait(), Some(0));
        let fourth = shop.start(dir);
        accepted(&post(&fourth, "again", ASYNC));
        assert_audit(&fourth);
        fourth.terminate();
        assert_eq!(fourth.wait(), Some(0));
    });
}

#[test]
fn a_redis_that_may_lose_orders_is_refused_in_a_sentence() {
    block_on(async {
        let Some(broker) = Broker::start(Kind::Redis) else {
            return;
        };
        let address = broker.address();
        let shop = Shop::new(TestDatabase::create().await, broker);
        let dir = test_dir();
        let configure = |setting: &str, value: &str| {
            let said = redis(address, &["CONFIG", "SET", setting, value]);
            assert_eq!(said, "+OK");
        };
        for (setting, value, needed) in [
            ("appendfsync", "everysec", "always"),
            ("maxmemory-policy", "allkeys-lru", "noeviction"),
        ] {
            configure(setting, value);
            let log = dir.path().join("log");
            let refused = Served::try_start(dir.path(), &shop.settings(), &log);
            let refused = refused.err().expect("it may lose orders");
            let log = &refused.log;
            assert!(log.contains(setting) && log.contains(needed), "{refused:?}");
            // The control plane that ends with such a start is not another error.
            assert!(!log.contains("poisoned"), "{refused:?}");
            configure(setting, needed);
        }
        let served = shop.start(dir.path());
        served.put_sku("A", 10);
        accepted(&post(&served, "u", ASYNC));
        // It is noticed while the service runs, too, once the connection is made anew.
        assert!(try_call(served.control, "GET", "/readyz", &[], "").is_ok());
        served.terminate();
        assert_eq!(served.wait(), Some(0));
    });
}
