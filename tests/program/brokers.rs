//! The brokers of the other tests: each one starts, is killed, starts again on its data, is paused, and stops. What is
//! asked of them here is written by hand from their protocols, so that no client library stands between.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::support::broker_admin::{kafka, kafka_create, kafka_text, redis, rocketmq};
use crate::support::brokers::{Broker, Kind, Setup};
use crate::support::waiting::{PATIENCE, until};

/// Takes a broker through its life. `write` leaves something in it, `is_there` finds it.
fn lives(kind: Kind, write: impl Fn(&Broker), is_there: impl Fn(&Broker) -> bool + Sync) {
    let Some(mut broker) = Broker::start(kind) else {
        return;
    };
    let address = broker.address();
    let named = |(_, value): &(String, String)| value.contains(&address.to_string());
    assert_eq!(broker.env()[0].0, "MILLRACE_QUEUE__BACKEND");
    assert!(broker.env().iter().any(named), "{:?}", broker.env());
    assert!(!is_there(&broker), "it is new");
    write(&broker);
    // A broker that has just started may still read its own data.
    until("what was written is there", PATIENCE, || is_there(&broker));

    broker.kill9();
    for address in broker.addresses() {
        let error = TcpStream::connect(address).expect_err("it was killed");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    broker.start_again();
    assert_eq!(broker.address(), address);
    until("it is there after SIGKILL", PATIENCE, || is_there(&broker));

    broker.pause();
    let answers = std::thread::scope(|scope| {
        let asking = scope.spawn(|| is_there(&broker));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!asking.is_finished(), "it is paused and answers");
        broker.resume();
        asking.join()
    });
    assert!(answers.expect("an answer"), "it is there after a pause");

    broker.stop();
    assert!(TcpStream::connect(address).is_err(), "it was stopped");
    broker.erase();
    broker.start_again();
    assert!(!is_there(&broker), "its data was deleted");

    let dir = broker.dir().to_owned();
    drop(broker);
    assert!(TcpStream::connect(address).is_err(), "it was dropped");
    assert!(!dir.exists(), "{} is left", dir.display());
}

/// One that sends its clients elsewhere.
fn advertised(kind: Kind) -> Option<Broker> {
    let setup = Setup {
        advertise: Some("127.0.0.2"),
        ..Setup::default()
    };
    Broker::start_with(kind, setup)
}

// --- Redis ----------------------------------------------------------------------------------------

#[test]
fn redis_lives_through_a_kill_with_its_data() {
    let write =
        |broker: &Broker| assert_eq!(redis(broker.address(), &["SET", "order", "42"]), "+OK");
    lives(Kind::Redis, write, |broker| {
        redis(broker.address(), &["GET", "order"]) == "$2 42"
    });
}

#[test]
fn redis_keeps_the_promise_of_a_log() {
    let Some(broker) = Broker::start(Kind::Redis) else {
        return;
    };
    for (name, value) in [
        ("appendonly", "yes"),
        ("appendfsync", "always"),
        ("no-appendfsync-on-rewrite", "no"),
        ("maxmemory-policy", "noeviction"),
    ] {
        let answer = redis(broker.address(), &["CONFIG", "GET", name]);
        assert!(answer.ends_with(&format!(" {value}")), "{name}: {answer}");
    }
}

// --- Kafka ----------------------------------------------------------------------------------------

const METADATA: u16 = 3;

/// The host and the port where clients find the broker, as its metadata begin; and what follows.
fn kafka_metadata(broker: &Broker, topic: &str) -> (String, u32, Vec<u8>) {
    // `true`: it may make the topic for the question, which it must not.
    let body = [&1_u32.to_be_bytes()[..], &kafka_text(topic), &[1]].concat();
    let answer = kafka(broker.address(), METADATA, 4, &body);
    let one_broker_number_one = [1_u32.to_be_bytes(), 1_u32.to_be_bytes()].concat();
    let rest = answer.strip_prefix(&one_broker_number_one[..]);
    let (length, rest) = rest.expect("one broker").split_at(2);
    let length = u16::from_be_bytes(length.try_into().expect("two bytes"));
    let (host, rest) = rest.split_at(usize::from(length));
    let (port, rest) = rest.split_at(4);
    (
        String::from_utf8(host.to_vec()).expect("a text"),
        u32::from_be_bytes(port.try_into().expect("four bytes")),
        rest.to_vec(),
    )
}

fn kafka_has(broker: &Broker, topic: &str) -> bool {
    let (host, port, answer) = kafka_metadata(broker, topic);
    assert_eq!(format!("{host}:{port}"), broker.address().to_string());
    // An error, before the topic's name; 3 is UNKNOWN_TOPIC_OR_PARTITION.
    let with_error = |error: u16| [&error.to_be_bytes()[..], &kafka_text(topic)].concat();
    let contains = |part: &[u8]| answer.windows(part.len()).any(|window| window == part);
    let has = contains(&with_error(0));
    assert!(has || contains(&with_error(3)), "{answer:?}");
    has
}

#[test]
fn kafka_sends_its_clients_where_a_proxy_waits() {
    if let Some(broker) = advertised(Kind::Kafka) {
        let (host, port, _) = kafka_metadata(&broker, "orders");
        assert_eq!(
            (&*host, port),
            ("127.0.0.2", broker.address().port().into())
        );
    }
}

#[test]
fn kafka_lives_through_a_kill_with_its_data() {
    let create = |broker: &Broker| kafka_create(broker.address(), "orders", &[]);
    lives(Kind::Kafka, create, |broker| kafka_has(broker, "orders"));
}

// --- RocketMQ -------------------------------------------------------------------------------------

const SEND_MESSAGE: u16 = 10;
const PULL_MESSAGE: u16 = 11;
const UPDATE_AND_CREATE_TOPIC: u16 = 17;
const GET_ROUTE: u16 = 105;
const GET_BROKER_CLUSTER: u16 = 106;

/// The broker's address, as its name server tells it, as soon as it knows one.
fn rocketmq_broker(broker: &Broker) -> SocketAddr {
    let mut address = None;
    until("the name server has an address", PATIENCE, || {
        let (code, body) = rocketmq(broker.address(), GET_BROKER_CLUSTER, &[], "");
        assert_eq!(code, 0);
        // Not parsed: the keys in it are numbers.
        let body = String::from_utf8(body).expect("a text");
        address = body.split('"').find_map(|part| part.parse().ok());
        address.is_some()
    });
    address.expect("an address")
}

fn rocketmq_send(broker: &Broker, text: &str) {
    let to = rocketmq_broker(broker);
    let topic = [
        ("topic", "orders"),
        ("defaultTopic", "TBW102"),
        ("readQueueNums", "1"),
        ("writeQueueNums", "1"),
        ("perm", "6"),
        ("topicFilterType", "SINGLE_TAG"),
        ("topicSysFlag", "0"),
        ("order", "false"),
    ];
    assert_eq!(rocketmq(to, UPDATE_AND_CREATE_TOPIC, &topic, "").0, 0);
    let message = [
        ("producerGroup", "tests"),
        ("topic", "orders"),
        ("defaultTopic", "TBW102"),
        ("defaultTopicQueueNums", "1"),
        ("queueId", "0"),
        ("sysFlag", "0"),
        ("bornTimestamp", "1700000000000"),
        ("flag", "0"),
        ("properties", ""),
        ("reconsumeTimes", "0"),
    ];
    assert_eq!(rocketmq(to, SEND_MESSAGE, &message, text).0, 0, "SEND_OK");
}

fn rocketmq_has(broker: &Broker, text: &str) -> bool {
    if rocketmq(broker.address(), GET_ROUTE, &[("topic", "orders")], "").0 != 0 {
        return false;
    }
    let pull = [
        ("consumerGroup", "tests"),
        ("topic", "orders"),
        ("queueId", "0"),
        ("queueOffset", "0"),
        ("maxMsgNums", "1"),
        // With a subscription.
        ("sysFlag", "4"),
        ("commitOffset", "0"),
        ("suspendTimeoutMillis", "0"),
        ("subscription", "*"),
        ("subVersion", "0"),
        ("expressionType", "TAG"),
    ];
    let (code, body) = rocketmq(rocketmq_broker(broker), PULL_MESSAGE, &pull, "");
    code == 0 && body.windows(text.len()).any(|part| part == text.as_bytes())
}

#[test]
fn rocketmq_lives_through_a_kill_with_its_data() {
    let write = |broker: &Broker| rocketmq_send(broker, "an order of the test");
    lives(Kind::RocketMq, write, |broker| {
        rocketmq_has(broker, "an order of the test")
    });
}

#[test]
fn rocketmq_sends_its_clients_where_a_proxy_waits() {
    if let Some(broker) = advertised(Kind::RocketMq) {
        let told = rocketmq_broker(&broker);
        assert_eq!(told.ip().to_string(), "127.0.0.2");
        // It listens where it always does, on the same port.
        let ports: Vec<_> = broker.addresses().iter().map(SocketAddr::port).collect();
        assert!(ports.contains(&told.port()), "{told} and {ports:?}");
    }
}
