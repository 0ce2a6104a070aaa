//! Entrances to the decoders of what a Kafka server answers, as far as they are our own, for the target `broker_kafka`.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use bytes::Bytes;
use kafka_protocol::messages::{MetadataRequest, MetadataResponse};
use kafka_protocol::protocol::Decodable;

use super::link::{Ask, Server};
use super::sasl::{Sasl, Scram};
use super::session::{self, Cluster};
use super::{BrokerError, KafkaSettings, SendError, Stored, codes, link, records, topic};

/// The record batch in which a frame is sent.
///
/// # Errors
/// The reason why there is none.
pub fn batch(frame: &[u8]) -> Result<Bytes, String> {
    records::batch(frame)
}

/// The frames of fetched batches from an offset on, and the offset behind the last whole batch.
///
/// # Errors
/// The reason why a batch cannot be read.
pub fn frames(bytes: Bytes, from: u64) -> Result<(Vec<Stored>, Option<u64>), String> {
    records::frames(bytes, from).map(|frames| (frames.stored, frames.next))
}

/// Sends a request and reads the bytes of its answer.
///
/// # Errors
/// The stream's, or that its answer is none.
pub fn exchange(stream: &mut (impl Read + Write), request: &[u8]) -> io::Result<Bytes> {
    link::exchange(stream, request)
}

/// The client's last message to a server with this challenge, and the last one that the server must answer.
///
/// # Errors
/// The reason why the challenge is none.
pub fn prove(sasl: &Sasl, nonce: &str, challenge: &[u8]) -> Result<(Vec<u8>, Vec<u8>), String> {
    Scram::with_nonce(sasl, nonce.to_owned()).last(challenge)
}

/// The warnings about a topic with these settings, and the longest batch that it takes.
///
/// # Errors
/// The reason why it cannot keep the log.
pub fn judge(
    replicas: usize,
    settings: &HashMap<String, String>,
) -> Result<(Vec<String>, usize), BrokerError> {
    let facts = topic::judge("topic", replicas, settings)?;
    Ok((facts.warnings, facts.batch_bytes_max))
}

/// The consequence of an answer to a produce request.
pub fn refusal(code: i16, base: i64) -> SendError {
    codes::of_send("kafka", code, base, None)
}

/// Host and port.
pub type Address = (String, u16);

fn addresses(servers: Vec<Server>) -> Vec<Address> {
    let parts = servers.into_iter().map(|server| (server.host, server.port));
    parts.collect()
}

/// The servers in a list to begin with.
///
/// # Errors
/// The list is none.
pub fn servers(list: &str) -> Result<Vec<Address>, BrokerError> {
    session::servers(list).map(addresses)
}

/// The partition of the settings in metadata.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are those of the private type")]
pub enum Found {
    Missing,
    TooFew,
    Leaderless,
    Led {
        server: Address,
        epoch: i32,
        replicas: usize,
    },
}

/// What metadata say.
#[derive(Debug)]
pub struct Metadata {
    /// Of the partition of the settings.
    pub partition: Result<Found, BrokerError>,
    /// The leader of every partition.
    pub leaders: Result<Vec<Address>, BrokerError>,
    /// The brokers that are asked another time.
    pub named: Vec<Address>,
}

/// What an answer to the request for metadata says.
///
/// # Errors
/// The reason why it is none, or the settings are not.
pub fn metadata(settings: KafkaSettings, mut answer: Bytes) -> Result<Metadata, String> {
    let cluster = Cluster::new(settings).map_err(|error| error.to_string())?;
    let asked = Server {
        host: "asked".to_owned(),
        port: 9092,
    };
    let metadata = MetadataResponse::decode(&mut answer, <MetadataRequest as Ask>::VERSION)
        .map_err(|error| error.to_string())?;
    let partition = cluster.find(&asked, &metadata).map(|found| match found {
        session::Found::Missing => Found::Missing,
        session::Found::TooFew(_) => Found::TooFew,
        session::Found::Leaderless(_) => Found::Leaderless,
        session::Found::Led {
            server,
            epoch,
            replicas,
        } => Found::Led {
            server: (server.host, server.port),
            epoch,
            replicas,
        },
    });
    Ok(Metadata {
        partition,
        leaders: cluster.find_all(&asked, &metadata).map(addresses),
        named: addresses(session::named(&metadata)),
    })
}
