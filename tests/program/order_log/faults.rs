//! The real binary, while its broker breaks: the network is cut in the middle of accepted orders, the broker is full or
//! fails over to a replica that lags, and a process is paused for longer than its right lasts.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;

use super::{ASYNC, PATIENCE, Shop, accepted, assert_audit, body_of, post, status};
use crate::support::block_on;
use crate::support::broker_admin::redis;
use crate::support::brokers::{Broker, Kind, Setup};
use crate::support::http::{Answer, try_call};
use crate::support::postgres::{TestDatabase, test_dir};
use crate::support::served::Served;
use crate::support::waiting::until;
use crate::support::wire::{Fault, Way, Wire};

/// Where a proxy may be that is not at a fixed port.
const ANY: &str = "127.0.0.1:0";

/// The same, from a server that may be gone.
fn try_post(served: &Served, user: &str, prefer: &[(&str, &str)]) -> std::io::Result<Answer> {
    let mut fields = vec![("Content-Type", "application/json")];
    fields.extend_from_slice(prefer);
    try_call(served.data, "POST", "/v1/orders", &fields, &body_of(user))
}

fn is_accepted(answer: &Answer) -> bool {
    answer.status == 202 && answer.field("preference-applied") == Some("respond-async")
}

/// Tells senders to stop.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends orders until told to stop, and notes the ids of those that were accepted.
fn accept_until(served: &Served, stop: &AtomicBool, name: &str, ids: &Mutex<Vec<String>>) {
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let answer = post(served, &format!("{name}-{number}"), ASYNC);
        if is_accepted(&answer) {
            ids.lock().unwrap().push(accepted(&answer));
        } else {
            // Refused; undecided if it was sent; written by the database meanwhile; given up at its deadline.
            assert!(matches!(answer.status, 201 | 202 | 503 | 504), "{answer:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Each of these orders becomes a row, the audit agrees, and the server stops in order.
fn ends_with_rows_of(served: Served, ids: &[String]) {
    for id in ids {
        until("a row", PATIENCE, || {
            status(&served, id) == "pending_payment"
        });
    }
    assert_audit(&served);
    served.terminate();
    assert_eq!(served.wait(), Some(0));
}

#[test]
fn a_network_to_redis_that_is_cut_loses_nothing_that_was_accepted() {
    a_network_that_is_cut_loses_nothing_that_was_accepted(Kind::Redis);
}

#[test]
fn a_network_to_kafka_that_is_cut_loses_nothing_that_was_accepted() {
    a_network_that_is_cut_loses_nothing_that_was_accepted(Kind::Kafka);
}

#[test]
fn a_network_to_rocketmq_that_is_cut_loses_nothing_that_was_accepted() {
    a_network_that_is_cut_loses_nothing_that_was_accepted(Kind::RocketMq);
}

fn a_network_that_is_cut_loses_nothing_that_was_accepted(kind: Kind) {
    block_on(async {
        let Some((wire, broker)) = Wire::before_broker(kind, Setup::default()) else {
            return;
        };
        let shop = Shop::new(TestDatabase::create().await, broker);
        let (first_dir, second_dir) = (test_dir(), test_dir());
        let served = shop.start(first_dir.path());
        served.put_sku("A", 1_000_000);
        accepted(&post(&served, "before", ASYNC));
        // The ring is full throughout: a group in doubt may not wait for room in it.
        let admin = shop.database.connect().await;
        admin.batch_execute(super::LOCK).await.unwrap();
        let (stop, ids) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            // Also if a condition below does not come true.
            let _end = StopOnDrop(&stop);
            for name in ["a", "b"] {
                let (served, stop, ids) = (&served, &stop, &ids);
                scope.spawn(move || accept_until(served, stop, name, ids));
            }
            for (number, bytes) in [0, 90, 400, 900, 30, 5_000].into_iter().enumerate() {
                // Between an answer and the next group, within a group, within an answer.
                let way = if number % 2 == 0 { Way::Up } else { Way::Down };
                wire.arm(way, bytes, Fault::Cut);
                until("it was cut", PATIENCE, || wire.has_struck());
                wire.heal();
                let before = ids.lock().unwrap().len();
                until("it goes on", PATIENCE, || {
                    ids.lock().unwrap().len() > before + 10
                });
            }
            stop.store(true, Ordering::Relaxed);
        });
        let ids = ids.into_inner().unwrap();
        // From the broker alone, by another process.
        served.kill();
        drop(first_dir);
        admin.batch_execute("ROLLBACK").await.unwrap();
        let served = shop.start(second_dir.path());
        ends_with_rows_of(served, &ids);
    });
}

#[test]
fn a_redis_that_is_full_refuses_accepted_orders_and_lets_waiting_ones_go_on() {
    block_on(async {
        let Some(broker) = Broker::start(Kind::Redis) else {
            return;
        };
        let at = broker.address();
        let shop = Shop::new(TestDatabase::create().await, broker);
        let dir = test_dir();
        let served = shop.start(dir.path());
        served.put_sku("A", 1_000);
        let mut ids = vec![accepted(&post(&served, "before", ASYNC))];
        assert_eq!(redis(at, &["CONFIG", "SET", "maxmemory", "1"]), "+OK");
        let mut number = 0;
        until("a refusal", PATIENCE, || {
            number += 1;
            let answer = post(&served, &format!("full-{number}"), ASYNC);
            assert!(!is_accepted(&answer), "{answer:?}");
            if answer.status == 503 {
                assert_eq!(answer.json()["code"], "queue_unavailable", "{answer:?}");
                assert!(answer.field("retry-after").is_some(), "{answer:?}");
            }
            answer.status == 503
        });
        for number in 0..5 {
            assert_eq!(post(&served, &format!("waiting-{number}"), &[]).status, 201);
        }
        let failing = served.failing_checks();
        assert!(
            failing.iter().any(|(name, _)| name == "journal"),
            "{failing:?}"
        );
        assert_eq!(redis(at, &["CONFIG", "SET", "maxmemory", "0"]), "+OK");
        until("there is room again", PATIENCE, || {
            number += 1;
            let answer = post(&served, &format!("room-{number}"), ASYNC);
            let is_accepted = is_accepted(&answer);
            ids.extend(is_accepted.then(|| accepted(&answer)));
            is_accepted
        });
        ends_with_rows_of(served, &ids);
    });
}

#[test]
fn accepted_orders_are_all_rows_after_redis_fails_over_to_a_replica_that_lags() {
    block_on(async {
        let redis_of = |master| Broker::start_with(Kind::Redis, Setup::redis(master));
        let Some(master) = redis_of(None) else { return };
        let (from, any) = (master.address(), ANY.parse().expect("an address"));
        let (link, front) = (Wire::start(any, from), Wire::start(any, from));
        let replica = redis_of(Some(link.address())).expect("a second one");
        let mut shop = Shop::new(TestDatabase::create().await, master);
        shop.more = vec![(
            "MILLRACE_QUEUE__REDIS__URL".to_owned(),
            format!("redis://{}/", front.address()),
        )];
        let admin = shop.database.connect().await;
        let (first_dir, second_dir) = (test_dir(), test_dir());
        let served = shop.start(first_dir.path());
        served.put_sku("A", 1_000);
        let accept = |name: &str| -> Vec<String> {
            let one = |number| accepted(&post(&served, &format!("{name}-{number}"), ASYNC));
            (0..20).map(one).collect()
        };
        // None of them is written before the process is lost as well.
        admin.batch_execute(super::LOCK).await.unwrap();
        let mut ids = accept("both");
        let stream = redis(from, &["KEYS", "*"]);
        let stream = stream.split(' ').next_back().expect("a stream");
        let length = |at| redis(at, &["XLEN", stream]);
        until("the replica has them", PATIENCE, || {
            length(replica.address()) == length(from)
        });
        link.shut();
        ids.extend(accept("alone"));
        assert_ne!(length(replica.address()), length(from), "it lags");
        shop.broker.kill9();
        assert_eq!(redis(replica.address(), &["REPLICAOF", "NO", "ONE"]), "+OK");
        front.lead_to(replica.address());
        until("it goes on", PATIENCE, || {
            let answer = post(&served, "after", ASYNC);
            ids.extend(is_accepted(&answer).then(|| accepted(&answer)));
            is_accepted(&answer)
        });
        served.kill();
        drop(first_dir);
        admin.batch_execute("ROLLBACK").await.unwrap();
        let served = shop.start(second_dir.path());
        ends_with_rows_of(served, &ids);
    });
}

#[test]
fn a_process_that_was_paused_and_replaced_acknowledges_nothing_in_redis() {
    a_process_that_was_paused_and_replaced_acknowledges_nothing(Kind::Redis);
}

#[test]
fn a_process_that_was_paused_and_replaced_acknowledges_nothing_in_kafka() {
    a_process_that_was_paused_and_replaced_acknowledges_nothing(Kind::Kafka);
}

fn a_process_that_was_paused_and_replaced_acknowledges_nothing(kind: Kind) {
    block_on(async {
        let Some(broker) = Broker::start(kind) else {
            return;
        };
        let shop = Shop::new(TestDatabase::create().await, broker);
        let admin = shop.database.connect().await;
        let (first_dir, second_dir) = (test_dir(), test_dir());
        let mut first = shop.start(first_dir.path());
        first.put_sku("A", 1_000);
        let mut ids = vec![accepted(&post(&first, "first", ASYNC))];
        first.signal(Signal::STOP);
        // As after the loss of the machine, or of the network: PostgreSQL drops its sessions.
        let drop_sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                              WHERE datname = current_database() AND application_name LIKE 'millrace%'";
        admin.execute(drop_sessions, &[]).await.unwrap();
        let second = shop.start(second_dir.path());
        ids.push(accepted(&post(&second, "second", ASYNC)));
        first.signal(Signal::CONT);
        // It may be gone at any moment, but as long as it answers, it promises nothing.
        for number in 0..50 {
            for prefer in [ASYNC, &[]] {
                if let Ok(answer) = try_post(&first, &format!("late-{number}"), prefer) {
                    assert!(!is_accepted(&answer) && answer.status != 201, "{answer:?}");
                }
            }
        }
        let ended = first.ended_by(std::time::Instant::now() + PATIENCE);
        assert!(ended.is_some_and(|status| !status.success()), "{ended:?}");
        ends_with_rows_of(second, &ids);
        let late = "SELECT count(*) FROM millrace.orders WHERE user_id LIKE 'late%'";
        let late: i64 = admin.query_one(late, &[]).await.unwrap().get(0);
        assert_eq!(late, 0);
    });
}
