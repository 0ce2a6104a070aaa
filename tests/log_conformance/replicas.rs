//! Replicas that an acknowledgement waits for: missing, lagging, taking over.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use millrace::queue::log::AppendError;
use millrace::queue::log::broker::kafka::{KafkaBroker, KafkaSettings};
use millrace::queue::log::broker::redis::RedisSettings;
use millrace::queue::log::broker::{Broker, SendError};

use crate::bed::{
    Bed, LONG, PATIENCE, all, bytes, connect, fresh, judge, place, redis_client, refused, rough,
    says,
};
use crate::support::broker_admin::{kafka_set, redis, rocketmq_set};
use crate::support::brokers::{Kind, Setup};
use crate::support::waiting::until;
use crate::support::wire::Wire;
use crate::writers::{append, take_over};

/// Where a proxy may be that is not at a fixed port.
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A Redis of its own, a replica of `master` if there is one.
fn redis_of(master: Option<SocketAddr>) -> Option<Bed> {
    Bed::start(Kind::Redis, Setup::redis(master))
}

#[test]
fn an_append_to_redis_waits_for_its_replicas() {
    let Some(master) = redis_of(None) else { return };
    let log = fresh("replicas");
    let client = redis_client(RedisSettings {
        replicas_min: 1,
        ..master.redis_settings(&log, Duration::from_secs(1))
    });
    let warnings = client.check().expect("a server without replicas").warnings;
    says(
        &warnings[0],
        &["0 of the 1 replicas", "queue.redis.replicas_min"],
    );
    let replica = redis_of(Some(master.address())).expect("a second one");
    let length = |bed: &Bed| redis(bed.address(), &["XLEN", &log]);
    // A replica confirms nothing until its first file is complete.
    until("the replica confirms", PATIENCE, || {
        client.send(place(1, 0), b"marker").is_ok()
    });
    assert_eq!(length(&replica), ":1");
    // Acknowledged by one of two servers would be no majority.
    assert_eq!(
        client.check().expect("a server with a replica").warnings,
        [""; 0]
    );
    let alone = redis_client(master.redis_settings(&log, Duration::from_secs(1)));
    let warnings = alone.check().expect("a server with a replica").warnings;
    says(
        &warnings[0],
        &["has 1 replicas", "replicas_min = 0", "set it to 1 or more"],
    );
    replica.server.pause();
    // The second time it is there already.
    for _ in 0..2 {
        let sent = client.send(place(1, 1), b"one");
        assert!(matches!(sent, Err(SendError::Unknown(_))), "{sent:?}");
        says(sent.expect_err("no replica"), &["0 of 1 replicas"]);
    }
    // A fence needs no replica.
    let other = client.send(place(1, 1), b"another");
    assert!(matches!(other, Err(SendError::Stale(_))), "{other:?}");
    replica.server.resume();
    until("the replica is back", PATIENCE, || {
        client.send(place(1, 1), b"one").is_ok()
    });
    assert_eq!(
        (length(&master), length(&replica)),
        (":2".to_owned(), ":2".to_owned())
    );
}

#[test]
fn groups_that_a_redis_loses_in_a_failover_are_appended_again() {
    let Some(master) = redis_of(None) else { return };
    let log = fresh("failover");
    let link = Wire::start(ANY, master.address());
    let replica = redis_of(Some(link.address())).expect("a second one");
    let front = Wire::start(ANY, master.address());
    let client = || {
        Arc::new(redis_client(RedisSettings {
            url: format!("redis://{}/", front.address()),
            ..master.redis_settings(&log, Duration::from_secs(2))
        }))
    };
    let first = client();
    connect(&*first);
    let (mut writer, _, marker) = take_over(first, 1, None);
    for number in 1..=5 {
        append(&mut writer, number).expect("an append");
    }
    until("the replica has them", PATIENCE, || {
        redis(replica.address(), &["XLEN", &log]) == ":6"
    });
    // A replica takes no groups.
    let away = replica
        .client(&log, LONG)
        .check()
        .expect_err("it is a replica");
    says(away, &["away", "replica of 127.0.0.1"]);
    link.shut();
    for number in 6..=9 {
        append(&mut writer, number).expect("an append");
    }
    master.server.kill9();
    assert_eq!(redis(replica.address(), &["REPLICAOF", "NO", "ONE"]), "+OK");
    assert_eq!(redis(replica.address(), &["XLEN", &log]), ":6", "it lagged");
    front.lead_to(replica.address());
    until("the writer goes on", PATIENCE, || {
        match append(&mut writer, 10) {
            Ok(_) => true,
            Err(AppendError::Final(why)) => panic!("{why}"),
            Err(_) => false,
        }
    });
    let second = client();
    connect(&*second);
    let (_, found, _) = take_over(second, 2, Some(marker));
    assert_eq!(found, (1..=10).collect::<Vec<_>>());
}

#[test]
fn a_replica_of_rocketmq_that_is_missing_leaves_a_send_unknown() {
    rough(Kind::RocketMq, |bed| {
        let client = bed.ready(&fresh("replicas"));
        let set = |role, count| {
            rocketmq_set(bed.address(), "slaveTimeout", "300");
            rocketmq_set(bed.address(), "inSyncReplicas", count);
            rocketmq_set(bed.address(), "brokerRole", role);
        };
        set("SYNC_MASTER", "1");
        says(
            &connect(&*client)[0],
            &["inSyncReplicas = 1", "without waiting for a replica"],
        );
        set("SYNC_MASTER", "2");
        connect(&*client);
        for number in 0..2 {
            let sent = client.send(place(1, number), &bytes(number, 100));
            assert!(matches!(sent, Err(SendError::Unknown(_))), "{sent:?}");
            // Nothing is sent on a connection that failed.
            connect(&*client);
        }
        set("ASYNC_MASTER", "1");
        // They are on the master's disk, and may be on no other.
        assert_eq!(all(&*client).len(), 2);
    });
}

#[test]
fn a_kafka_without_enough_replicas_stores_nothing_and_a_new_leader_is_followed() {
    let node = |number: u16, controller: Option<u16>| {
        let lines = move |port: u16, _: &std::path::Path| {
            let common = "broker.session.timeout.ms=3000\nbroker.heartbeat.interval.ms=500\n\
                          controlled.shutdown.enable=false\n";
            let Some(controller) = controller else {
                return common.to_owned();
            };
            format!(
                "{common}process.roles=broker\nnode.id={number}\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
                 listeners=PLAINTEXT://127.0.0.1:{port}\nadvertised.listeners=PLAINTEXT://127.0.0.1:{port}\n"
            )
        };
        let setup = Setup {
            lines: Some(Box::new(lines)),
            ..Setup::default()
        };
        Bed::start(Kind::Kafka, setup)
    };
    let Some(one) = node(1, None) else { return };
    let controller = one.address().port() + 1;
    let others = std::thread::scope(|scope| {
        let starts = [2, 3].map(|number| scope.spawn(move || node(number, Some(controller))));
        starts.map(|start| start.join().expect("a start").expect("a broker"))
    });
    let topic = fresh("replicas");
    let client = KafkaBroker::new(KafkaSettings {
        bootstrap: format!("{},{}", one.address(), others[0].address()),
        ..one.kafka_settings(&topic, LONG)
    });
    let client = client.expect("settings");
    // With fewer brokers there would be a warning of fewer replicas.
    assert_eq!(connect(&client), [""; 0]);
    kafka_set(one.address(), &topic, "min.insync.replicas", "1");
    until("the setting is known", PATIENCE, || client.check().is_err());
    says(
        refused(client.check()),
        &["min.insync.replicas is 1 and must be at least 2"],
    );
    kafka_set(one.address(), &topic, "min.insync.replicas", "2");
    until("the setting is known", PATIENCE, || client.check().is_ok());

    let mut said = Vec::new();
    let mut number = 0;
    let mut next = |said: &mut Vec<_>| {
        number += 1;
        let frame = bytes(number, 500);
        let outcome = client
            .check()
            .map_err(|error| SendError::Away(error.to_string()));
        let outcome = outcome.and_then(|_| client.send(place(1, number), &frame));
        said.push((frame, outcome.clone()));
        outcome
    };
    let mut goes_on = |said: &mut Vec<_>| until("it goes on", PATIENCE, || next(said).is_ok());
    goes_on(&mut said);
    others[0].server.kill9();
    goes_on(&mut said);
    others[1].server.kill9();
    until("two are missing", PATIENCE, || match next(&mut said) {
        Err(SendError::Away(why)) => why.contains("NOT_ENOUGH_REPLICAS (19)"),
        _ => false,
    });
    let [_, mut other] = others;
    other.server.start_again();
    until("it goes on", PATIENCE, || next(&mut said).is_ok());
    let found = all(&client);
    for (frame, outcome) in &said {
        judge(&found, frame, outcome).unwrap_or_else(|lie| panic!("{lie}"));
    }
}
