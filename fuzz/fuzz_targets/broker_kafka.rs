//! What a Kafka server answers, as far as our own code reads it. The first byte chooses:
//! - fetched record batches that were made from the input: the frames behind the offset asked for come out in order, those of
//!   a batch cut off do not, and a byte altered under the checksum is refused;
//! - the bytes of an answer behind their length, however they arrive: exactly those, or a refusal;
//! - the challenge of SCRAM: what it is answered with, a naive server of RFC 5802 takes;
//! - settings of a topic: it passes only with every one that the promise rests on;
//! - the code of a produce request: an answer with an offset never reads as "not stored";
//! - metadata that were made from the input, encoded here: the leader of a partition is the one that they name, with its epoch
//!   and replicas, and what is missing, leaderless or cut off is told apart;
//! - the list of brokers to begin with: hosts and ports as Kafka's own clients take them.

#![no_main]

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use libfuzzer_sys::fuzz_target;
use millrace::queue::log::broker::SendError;
use millrace::queue::log::broker::kafka::fuzz::{Address, Found};
use millrace::queue::log::broker::kafka::{KafkaSettings, Mechanism, Sasl, fuzz};
use ring::{digest, hmac, pbkdf2};

#[derive(Arbitrary, Debug)]
enum Change {
    None,
    /// Bytes are missing at the end.
    Cut(u16),
    /// A byte is another.
    Flip(u16, u8),
    /// The batch is the server's own note about a transaction.
    Note(u8),
    /// It was compressed.
    Compressed(u8),
    /// Offsets behind it were taken out of the log.
    Sparse(u8, u16),
}

#[derive(Arbitrary, Debug)]
struct Fetched {
    first: u32,
    gaps: Vec<u8>,
    frames: Vec<Vec<u8>>,
    from: u8,
    change: Change,
}

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1))
        })
    })
}

/// Alters a batch under its checksum, and mends that.
fn patch(batch: &mut [u8], at: usize, value: &[u8]) {
    batch[at..at + value.len()].copy_from_slice(value);
    let crc = crc32c(&batch[21..]).to_be_bytes();
    batch[17..21].copy_from_slice(&crc);
}

fn fetched(mut raw: Fetched) {
    raw.frames.truncate(8);
    let mut offset = u64::from(raw.first);
    let from = offset + u64::from(raw.from % 8);
    let (mut bytes, mut ends, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for (at, frame) in raw.frames.iter().enumerate() {
        let mut batch = fuzz::batch(frame).expect("a batch").to_vec();
        assert!(batch.len() <= frame.len() + 100);
        batch[..8].copy_from_slice(&offset.to_be_bytes());
        let mut last = offset;
        let (mut is_frame, mut is_refused) = (true, false);
        match raw.change {
            Change::Note(which) if at == usize::from(which) => {
                patch(&mut batch, 21, &[0, 0x20]);
                is_frame = false;
            }
            Change::Compressed(which) if at == usize::from(which >> 3) => {
                patch(&mut batch, 21, &[0, which & 7]);
                is_refused = which & 7 != 0;
            }
            Change::Sparse(which, more) if at == usize::from(which) => {
                last += u64::from(more);
                patch(&mut batch, 23, &u32::from(more).to_be_bytes());
            }
            _ => {}
        }
        bytes.extend(batch);
        ends.push(bytes.len());
        wanted.push((offset, last, frame, is_frame, is_refused));
        offset = last + 1 + u64::from(raw.gaps.get(at).copied().unwrap_or(0));
    }
    let mut altered = None;
    match raw.change {
        Change::Cut(missing) => {
            bytes.truncate(bytes.len() - usize::from(missing).min(bytes.len()));
            wanted.truncate(ends.iter().filter(|end| **end <= bytes.len()).count());
        }
        Change::Flip(at, bits) if !bytes.is_empty() && bits != 0 => {
            let at = usize::from(at) % bytes.len();
            bytes[at] ^= bits;
            let start = ends.iter().rfind(|end| **end <= at).copied();
            altered = Some(at - start.unwrap_or(0));
        }
        _ => {}
    }
    let read = fuzz::frames(bytes.into(), from);
    match altered {
        // Its offset, its length, the leader's epoch and its format are not under the checksum.
        Some(..17) => return,
        Some(_) => {
            assert!(read.is_err(), "a damaged batch is taken");
            return;
        }
        None => {}
    }
    if wanted.iter().any(|(.., is_refused)| *is_refused) {
        assert!(read.is_err(), "a compressed batch is taken");
        return;
    }
    let (stored, next) = read.expect("right batches");
    let found: Vec<_> = stored
        .iter()
        .map(|one| (one.offset, one.frame.as_slice()))
        .collect();
    let due: Vec<_> = wanted
        .iter()
        .filter(|(offset, _, _, is_frame, _)| *offset >= from && *is_frame)
        .map(|(offset, _, frame, ..)| (*offset, frame.as_slice()))
        .collect();
    assert_eq!(found, due);
    assert_eq!(next, wanted.last().map(|(_, last, ..)| last + 1));
}

/// A stream that gives its bytes in pieces.
struct Pieces<'a> {
    left: &'a [u8],
    piece: usize,
    sent: Vec<u8>,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.piece.min(self.left.len()).min(buffer.len());
        let (now, later) = self.left.split_at(count);
        buffer[..count].copy_from_slice(now);
        self.left = later;
        Ok(count)
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.piece);
        self.sent.extend(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn exchange(input: &[u8]) {
    let Some((piece, left)) = input.split_first() else {
        return;
    };
    let mut stream = Pieces {
        left,
        piece: usize::from(*piece).max(1),
        sent: Vec::new(),
    };
    let answer = fuzz::exchange(&mut stream, b"a request");
    assert_eq!(stream.sent, b"a request");
    let wanted = left.split_first_chunk().and_then(|(length, rest)| {
        let length = i32::from_be_bytes(*length);
        rest.get(..usize::try_from(length).ok()?)
    });
    match answer {
        Ok(answer) => assert_eq!(Some(&answer[..]), wanted),
        Err(_) => assert_eq!(wanted, None),
    }
}

const NONCE: &str = "fuzz";

/// RFC 5802 3, from the server's side.
fn scram(input: &[u8]) {
    let Some((kind, challenge)) = input.split_first() else {
        return;
    };
    let text = std::str::from_utf8(challenge).unwrap_or_default();
    let value = |name: &str| text.split(',').find_map(|part| part.strip_prefix(name));
    let iterations: Option<u32> = value("i=").and_then(|text| text.parse().ok());
    if iterations.is_some_and(|count| (51..=1_000_000).contains(&count)) {
        // Slow, and nothing else.
        return;
    }
    let (mechanism, hash, keyed, derived) = match kind % 2 {
        0 => (
            Mechanism::ScramSha256,
            &digest::SHA256,
            hmac::HMAC_SHA256,
            pbkdf2::PBKDF2_HMAC_SHA256,
        ),
        _ => (
            Mechanism::ScramSha512,
            &digest::SHA512,
            hmac::HMAC_SHA512,
            pbkdf2::PBKDF2_HMAC_SHA512,
        ),
    };
    let sasl = Sasl {
        mechanism,
        user: "a,b=c".into(),
        password: "secret".into(),
    };
    let Ok((last, wanted)) = fuzz::prove(&sasl, NONCE, challenge) else {
        return;
    };
    assert_eq!(value("e="), None);
    let nonce = value("r=").expect("a nonce");
    assert!(nonce.starts_with(NONCE) && nonce.len() > NONCE.len());
    let salt = STANDARD
        .decode(value("s=").expect("a salt"))
        .expect("base64");
    let iterations = iterations
        .and_then(std::num::NonZeroU32::new)
        .expect("in range");
    let mut salted = vec![0; hash.output_len()];
    pbkdf2::derive(derived, iterations, &salt, b"secret", &mut salted);
    let salted = hmac::Key::new(keyed, &salted);
    let stored = digest::digest(hash, hmac::sign(&salted, b"Client Key").as_ref());
    let last = String::from_utf8(last).expect("text");
    let (without_proof, proof) = last.split_once(",p=").expect("a proof");
    assert_eq!(without_proof, format!("c=biws,r={nonce}"));
    let message = format!("n=a=2Cb=3Dc,r={NONCE},{text},{without_proof}");
    let signature = hmac::sign(&hmac::Key::new(keyed, stored.as_ref()), message.as_bytes());
    let proof = STANDARD.decode(proof).expect("base64");
    let key: Vec<u8> = proof
        .iter()
        .zip(signature.as_ref())
        .map(|(a, b)| a ^ b)
        .collect();
    assert_eq!(digest::digest(hash, &key).as_ref(), stored.as_ref());
    let server_key = hmac::Key::new(keyed, hmac::sign(&salted, b"Server Key").as_ref());
    let answer = STANDARD.encode(hmac::sign(&server_key, message.as_bytes()));
    assert_eq!(wanted, format!("v={answer}").into_bytes());
}

/// Lines `name=value`, behind the number of replicas.
fn settings(input: &[u8]) {
    let Some((replicas, lines)) = input.split_first() else {
        return;
    };
    let replicas = usize::from(replicas % 5);
    let text = String::from_utf8_lossy(lines);
    let settings: HashMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let value = |name: &str| settings.get(name).map_or("", String::as_str);
    let in_sync: Option<usize> = value("min.insync.replicas").parse().ok();
    let right = value("cleanup.policy") == "delete"
        && value("retention.ms") == "-1"
        && value("retention.bytes") == "-1"
        && value("unclean.leader.election.enable") == "false"
        && ["producer", "uncompressed"].contains(&value("compression.type"))
        && in_sync
            .is_some_and(|count| count <= replicas && count >= if replicas < 3 { 1 } else { 2 });
    let longest: Option<usize> = value("max.message.bytes").parse().ok();
    match fuzz::judge(replicas, &settings) {
        Ok((warnings, batch_bytes_max)) => {
            assert!(right);
            assert_eq!(Some(batch_bytes_max), longest);
            let is_safe = replicas > 2 || replicas == 2 && in_sync == Some(2);
            assert_eq!(warnings.is_empty(), is_safe, "{warnings:?}");
        }
        Err(_) => assert!(!right || longest.is_none()),
    }
}

const TOPIC: &str = "orders";

#[derive(Arbitrary, Debug)]
enum Code {
    None,
    UnknownTopicOrPartition,
    LeaderNotAvailable,
    ReplicaNotAvailable,
    Other(i16),
}

impl Code {
    fn number(&self) -> i16 {
        match self {
            Code::None => 0,
            Code::UnknownTopicOrPartition => 3,
            Code::LeaderNotAvailable => 5,
            Code::ReplicaNotAvailable => 9,
            Code::Other(number) => *number,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Port {
    Usual,
    Other(i32),
}

#[derive(Arbitrary, Debug)]
struct Member<'a> {
    id: u8,
    host: &'a str,
    port: Port,
    rack: Option<&'a str>,
}

#[derive(Arbitrary, Debug)]
struct Partition {
    code: Code,
    index: u8,
    leader: u8,
    epoch: i32,
    replicas: Vec<u8>,
    in_sync: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
struct Topic<'a> {
    other_name: Option<&'a str>,
    code: Code,
    partitions: Vec<Partition>,
}

#[derive(Arbitrary, Debug)]
struct Metadata<'a> {
    wanted: u8,
    members: Vec<Member<'a>>,
    cluster: Option<&'a str>,
    controller: u8,
    topics: Vec<Topic<'a>>,
    cut: u8,
}

/// Ids, and numbers of partitions, so few that they meet.
fn id(byte: u8) -> i32 {
    i32::from(byte % 8) - 1
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
    bytes.extend(text.as_bytes());
}

fn nullable(bytes: &mut Vec<u8>, text: Option<&str>) {
    match text {
        Some(text) => string(bytes, text),
        None => bytes.extend((-1_i16).to_be_bytes()),
    }
}

fn count(bytes: &mut Vec<u8>, count: usize) {
    bytes.extend(i32::try_from(count).unwrap().to_be_bytes());
}

fn ids(bytes: &mut Vec<u8>, list: &[u8]) {
    count(bytes, list.len());
    for one in list {
        bytes.extend(id(*one).to_be_bytes());
    }
}

impl Port {
    fn number(&self) -> i32 {
        match self {
            Port::Usual => 9092,
            Port::Other(number) => *number,
        }
    }
}

/// MetadataResponse 8 of Kafka's protocol.
fn encoded(raw: &Metadata) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    count(&mut bytes, raw.members.len());
    for member in &raw.members {
        bytes.extend(id(member.id).to_be_bytes());
        string(&mut bytes, member.host);
        bytes.extend(member.port.number().to_be_bytes());
        nullable(&mut bytes, member.rack);
    }
    nullable(&mut bytes, raw.cluster);
    bytes.extend(id(raw.controller).to_be_bytes());
    count(&mut bytes, raw.topics.len());
    for topic in &raw.topics {
        bytes.extend(topic.code.number().to_be_bytes());
        string(&mut bytes, topic.other_name.unwrap_or(TOPIC));
        bytes.push(0);
        count(&mut bytes, topic.partitions.len());
        for partition in &topic.partitions {
            bytes.extend(partition.code.number().to_be_bytes());
            bytes.extend(id(partition.index).to_be_bytes());
            bytes.extend(id(partition.leader).to_be_bytes());
            bytes.extend(partition.epoch.to_be_bytes());
            ids(&mut bytes, &partition.replicas);
            ids(&mut bytes, &partition.in_sync);
            ids(&mut bytes, &[]);
        }
        bytes.extend(i32::MIN.to_be_bytes());
    }
    bytes.extend(i32::MIN.to_be_bytes());
    bytes
}

/// A host of the characters that Kafka's own clients take, and a port.
fn address(host: &str, port: i32) -> Option<Address> {
    let right =
        |one: char| matches!(one, '0'..='9' | 'a'..='z' | 'A'..='Z' | '-' | '%' | '.' | '_' | ':');
    let port = u16::try_from(port).ok()?;
    (port > 0 && !host.is_empty() && host.chars().all(right)).then(|| (host.to_owned(), port))
}

fn metadata(raw: &Metadata) {
    let wanted = i32::from(raw.wanted % 8);
    let settings = KafkaSettings {
        bootstrap: "broker:9092".to_owned(),
        topic: TOPIC.to_owned(),
        partition: wanted,
        tls: None,
        sasl: None,
        timeout: Duration::from_secs(1),
    };
    let mut bytes = encoded(raw);
    bytes.truncate(bytes.len() - usize::from(raw.cut).min(bytes.len()));
    let said = fuzz::metadata(settings, bytes.into());
    if raw.cut > 0 {
        assert!(said.is_err(), "an answer cut off is taken");
        return;
    }
    let said = said.expect("an answer");

    let named = raw.members.iter();
    let named = named.filter_map(|member| address(member.host, member.port.number()));
    assert_eq!(said.named, named.take(16).collect::<Vec<_>>());

    let leader = |partition: &Partition| {
        if !matches!(partition.code.number(), 0 | 9) {
            return None;
        }
        let mut members = raw.members.iter();
        let member = members.find(|member| id(member.id) == id(partition.leader))?;
        address(member.host, member.port.number())
    };
    let mut topics = raw.topics.iter();
    let topic = topics.find(|topic| topic.other_name.unwrap_or(TOPIC) == TOPIC);
    let (code, partitions) = match topic {
        Some(topic) => (topic.code.number(), topic.partitions.as_slice()),
        None => (3, [].as_slice()),
    };
    let due = match code {
        0 => {
            let mut partitions = partitions.iter();
            match partitions.find(|partition| id(partition.index) == wanted) {
                Some(partition) => Ok(match leader(partition) {
                    Some(server) => Found::Led {
                        server,
                        epoch: partition.epoch,
                        replicas: partition.replicas.len(),
                    },
                    None => Found::Leaderless,
                }),
                None => Ok(Found::TooFew),
            }
        }
        3 => Ok(Found::Missing),
        5 => Ok(Found::Leaderless),
        _ => Err(()),
    };
    assert_eq!(said.partition.map_err(|_| ()), due);

    // One of each number, from 0 on.
    let mut leaders = (code == 0).then(Vec::new);
    for number in 0..partitions.len() {
        let mut found = partitions
            .iter()
            .filter(|partition| usize::try_from(id(partition.index)) == Ok(number));
        let server = match (found.next(), found.next()) {
            (Some(partition), None) => leader(partition),
            _ => None,
        };
        leaders = leaders.zip(server).map(|(mut leaders, server)| {
            leaders.push(server);
            leaders
        });
    }
    assert_eq!(said.leaders.ok(), leaders);
}

/// The list, character by character.
fn bootstrap(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let mut due = Some(Vec::new());
    for item in text.split(',') {
        let item = item.trim();
        if item.is_empty() {
            continue;
        }
        let found = item.rfind(':').and_then(|colon| {
            let (host, port) = (&item[..colon], &item[colon + 1..]);
            let is_bracketed = host.len() > 1 && host.starts_with('[') && host.ends_with(']');
            let host = if is_bracketed {
                &host[1..host.len() - 1]
            } else {
                host
            };
            let mut number: i32 = 0;
            for digit in port.chars() {
                let digit = i32::try_from(digit.to_digit(10)?).unwrap();
                number = number.saturating_mul(10).saturating_add(digit);
            }
            address(host, number)
        });
        due = due.zip(found).map(|(mut due, found)| {
            due.push(found);
            due
        });
    }
    let due = due.filter(|due| !due.is_empty());
    match fuzz::servers(&text) {
        Ok(servers) => assert_eq!(Some(servers), due),
        Err(_) => assert_eq!(due, None),
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    match kind.wrapping_sub(b'A') % 7 {
        0 => {
            if let Ok(raw) = Unstructured::new(rest).arbitrary() {
                fetched(raw);
            }
        }
        1 => exchange(rest),
        2 => scram(rest),
        3 => settings(rest),
        4 => {
            let [a, b, base @ ..] = rest else {
                return;
            };
            let base = base
                .first_chunk()
                .map_or(-1, |base| i64::from_be_bytes(*base));
            let error = fuzz::refusal(i16::from_be_bytes([*a, *b]), base);
            assert!(
                base < 0 || matches!(error, SendError::Unknown(_)),
                "{error}"
            );
        }
        5 => {
            if let Ok(raw) = Unstructured::new(rest).arbitrary() {
                metadata(&raw);
            }
        }
        _ => bootstrap(rest),
    }
});
