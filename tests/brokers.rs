//! The brokers of the other tests: each one starts, is killed, starts again on its data, is paused, and stops. What is
//! asked of them here is written by hand from their protocols, so that no client library stands between.

mod support;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use support::brokers::{Broker, Kind};
use support::waiting::{PATIENCE, until};

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream
}

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

// --- Redis ----------------------------------------------------------------------------------------

/// The first line of the answer to an inline command, and what follows it.
fn redis(broker: &Broker, command: &str) -> String {
    let mut stream = connect(broker.address());
    stream
        .write_all(format!("{command}\r\nQUIT\r\n").as_bytes())
        .expect("ask");
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines.collect::<Vec<_>>().join(" ")
}

#[test]
fn redis_lives_through_a_kill_with_its_data() {
    let write = |broker: &Broker| assert!(redis(broker, "SET order 42").starts_with("+OK"));
    lives(Kind::Redis, write, |broker| {
        redis(broker, "GET order").starts_with("$2 42 ")
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
        let answer = redis(&broker, &format!("CONFIG GET {name}"));
        assert!(answer.contains(&format!(" {value} ")), "{name}: {answer}");
    }
}

// --- Kafka ----------------------------------------------------------------------------------------
// Format: Kafka protocol guide, "Request Header v1" and versions below the flexible ones.

const CREATE_TOPICS: u16 = 19;
const METADATA: u16 = 3;

fn kafka_text(text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).expect("a short text");
    [&length.to_be_bytes(), text.as_bytes()].concat()
}

/// The body of the answer to a request, from behind the time that the client was throttled for.
fn kafka(broker: &Broker, key: u16, version: u16, body: &[u8]) -> Vec<u8> {
    let correlation = [0, 0, 0, 7];
    let request = [
        &key.to_be_bytes(),
        &version.to_be_bytes(),
        &correlation[..],
        &kafka_text("tests"),
        body,
    ]
    .concat();
    let answer = framed(broker.address(), &request);
    assert_eq!(answer[..4], correlation);
    answer[8..].to_vec()
}

/// Sends a message behind its length, and returns the answer from behind its own.
fn framed(to: SocketAddr, message: &[u8]) -> Vec<u8> {
    let mut stream = connect(to);
    let length = u32::try_from(message.len()).expect("a short message");
    stream
        .write_all(&[&length.to_be_bytes(), message].concat())
        .expect("ask");
    let mut length = [0; 4];
    stream.read_exact(&mut length).expect("a length");
    let mut answer = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut answer).expect("an answer");
    answer
}

/// Creates a topic with one partition and one replica.
fn kafka_create(broker: &Broker, topic: &str) {
    let body = [
        &1_u32.to_be_bytes()[..],
        &kafka_text(topic),
        &1_u32.to_be_bytes(),
        &1_u16.to_be_bytes(),
        // No assignment and no settings; a time-out; not only to validate.
        &0_u32.to_be_bytes(),
        &0_u32.to_be_bytes(),
        &30_000_u32.to_be_bytes(),
        &[0],
    ]
    .concat();
    let answer = kafka(broker, CREATE_TOPICS, 4, &body);
    let created = [&1_u32.to_be_bytes()[..], &kafka_text(topic), &[0, 0]].concat();
    assert!(answer.starts_with(&created), "{answer:?}");
}

/// The host and the port where clients find the broker, as its metadata begin; and what follows.
fn kafka_metadata(broker: &Broker, topic: &str) -> (String, u32, Vec<u8>) {
    // `true`: it may make the topic for the question, which it must not.
    let body = [&1_u32.to_be_bytes()[..], &kafka_text(topic), &[1]].concat();
    let answer = kafka(broker, METADATA, 4, &body);
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
    if let Some(broker) = Broker::start_advertised(Kind::Kafka, "127.0.0.2") {
        let (host, port, _) = kafka_metadata(&broker, "orders");
        assert_eq!(
            (&*host, port),
            ("127.0.0.2", broker.address().port().into())
        );
    }
}

#[test]
fn kafka_lives_through_a_kill_with_its_data() {
    let create = |broker: &Broker| kafka_create(broker, "orders");
    lives(Kind::Kafka, create, |broker| kafka_has(broker, "orders"));
}

// --- RocketMQ -------------------------------------------------------------------------------------
// Format: RocketMQ's remoting command, its header in JSON.

const SEND_MESSAGE: u16 = 10;
const PULL_MESSAGE: u16 = 11;
const UPDATE_AND_CREATE_TOPIC: u16 = 17;
const GET_ROUTE: u16 = 105;
const GET_BROKER_CLUSTER: u16 = 106;

/// The code and the body of the answer to a command.
fn rocketmq(to: SocketAddr, code: u16, fields: &[(&str, &str)], body: &str) -> (u64, Vec<u8>) {
    let fields: serde_json::Map<_, _> = fields
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).into()))
        .collect();
    let header = serde_json::json!({
        "code": code, "language": "OTHER", "version": 401, "opaque": 1, "flag": 0,
        "serializeTypeCurrentRPC": "JSON", "extFields": fields,
    })
    .to_string();
    let length = u32::try_from(header.len()).expect("a short header");
    let message = [&length.to_be_bytes(), header.as_bytes(), body.as_bytes()].concat();
    let answer = framed(to, &message);
    let (length, rest) = answer.split_at(4);
    let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
    let (header, body) = rest.split_at(length);
    let header: serde_json::Value = serde_json::from_slice(header).expect("a header in JSON");
    (header["code"].as_u64().expect("a code"), body.to_vec())
}

/// The broker's address, as its name server tells it.
fn rocketmq_broker(broker: &Broker) -> SocketAddr {
    let (code, body) = rocketmq(broker.address(), GET_BROKER_CLUSTER, &[], "");
    assert_eq!(code, 0);
    // Not parsed: the keys in it are numbers.
    let body = String::from_utf8(body).expect("a text");
    let address = body.split('"').find_map(|part| part.parse().ok());
    address.unwrap_or_else(|| panic!("no address in {body}"))
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
    if let Some(broker) = Broker::start_advertised(Kind::RocketMq, "127.0.0.2") {
        let told = rocketmq_broker(&broker);
        assert_eq!(told.ip().to_string(), "127.0.0.2");
        // It listens where it always does, on the same port.
        let ports: Vec<_> = broker.addresses().iter().map(SocketAddr::port).collect();
        assert!(ports.contains(&told.port()), "{told} and {ports:?}");
    }
}
