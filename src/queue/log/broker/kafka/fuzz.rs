//! Entrances to the decoders of what a Kafka server answers, as far as they are our own, for the target `broker_kafka`.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use bytes::Bytes;

use super::sasl::{Sasl, Scram};
use super::{BrokerError, SendError, Stored, codes, link, records, topic};

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
