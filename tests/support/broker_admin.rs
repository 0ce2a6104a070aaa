//! Brokers asked as their operators ask them, by hand from their protocols, so that neither the clients under test nor a
//! client library stands between.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::waiting::PATIENCE;

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream
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

/// All of the answer of Redis to one command, as text.
pub fn redis(to: SocketAddr, words: &[&str]) -> String {
    let mut stream = connect(to);
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        request += &format!("${}\r\n{word}\r\n", word.len());
    }
    request += "*1\r\n$4\r\nQUIT\r\n";
    stream.write_all(request.as_bytes()).expect("ask Redis");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer of Redis");
    let answer = String::from_utf8_lossy(&answer);
    let answer = answer.strip_suffix("+OK\r\n").unwrap_or(&answer);
    answer.replace("\r\n", " ").trim_end().to_owned()
}

// --- Kafka ----------------------------------------------------------------------------------------
// Format: Kafka protocol guide, "Request Header v1" and versions below the flexible ones.

const CREATE_TOPICS: u16 = 19;
const INCREMENTAL_ALTER_CONFIGS: u16 = 44;

/// A text behind its length.
pub fn kafka_text(text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).expect("a short text");
    [&length.to_be_bytes(), text.as_bytes()].concat()
}

/// The body of the answer to a request, from behind the time that the client was throttled for.
pub fn kafka(to: SocketAddr, key: u16, version: u16, body: &[u8]) -> Vec<u8> {
    let correlation = [0, 0, 0, 7];
    let request = [
        &key.to_be_bytes(),
        &version.to_be_bytes(),
        &correlation[..],
        &kafka_text("tests"),
        body,
    ]
    .concat();
    let answer = framed(to, &request);
    assert_eq!(answer[..4], correlation);
    answer[8..].to_vec()
}

/// Creates a topic with one partition, one replica and these settings.
pub fn kafka_create(to: SocketAddr, topic: &str, settings: &[(&str, &str)]) {
    let count = |count: usize| (count as u32).to_be_bytes();
    let mut body = [
        &count(1)[..],
        &kafka_text(topic),
        &1_u32.to_be_bytes(),
        &1_u16.to_be_bytes(),
        // No assignment.
        &count(0),
        &count(settings.len()),
    ]
    .concat();
    for (name, value) in settings {
        body.extend([kafka_text(name), kafka_text(value)].concat());
    }
    // A time-out; not only to validate.
    body.extend([&30_000_u32.to_be_bytes()[..], &[0]].concat());
    let answer = kafka(to, CREATE_TOPICS, 4, &body);
    let created = [&count(1)[..], &kafka_text(topic), &[0, 0]].concat();
    assert!(answer.starts_with(&created), "{answer:?}");
}

/// Changes a setting of a topic.
pub fn kafka_set(to: SocketAddr, topic: &str, name: &str, value: &str) {
    let one = 1_u32.to_be_bytes();
    let body = [
        &one[..],
        // The resource is a topic; the operation is to set.
        &[2],
        &kafka_text(topic),
        &one,
        &kafka_text(name),
        &[0],
        &kafka_text(value),
        &[0],
    ]
    .concat();
    let answer = kafka(to, INCREMENTAL_ALTER_CONFIGS, 0, &body);
    assert!(
        answer.starts_with(&[&one[..], &[0, 0]].concat()),
        "{answer:?}"
    );
}

// --- RocketMQ -------------------------------------------------------------------------------------
// Format: RocketMQ's remoting command, its header in JSON.

const UPDATE_BROKER_CONFIG: u16 = 25;

/// The code and the body of the answer to a command.
pub fn rocketmq(to: SocketAddr, code: u16, fields: &[(&str, &str)], body: &str) -> (u64, Vec<u8>) {
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

/// Changes a setting of a running broker, until it starts again.
pub fn rocketmq_set(to: SocketAddr, name: &str, value: &str) {
    let (code, said) = rocketmq(to, UPDATE_BROKER_CONFIG, &[], &format!("{name}={value}\n"));
    assert_eq!(code, 0, "{name}: {}", String::from_utf8_lossy(&said));
}
