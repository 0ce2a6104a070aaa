//! A producer of records with keys, for other systems: acks = all, to the partition that Kafka's own clients choose for
//! a key. A record is sent again by the caller, who knows the order that has to be kept.

use std::collections::HashMap;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use kafka_protocol::messages::{
    ProduceRequest, TopicName,
    produce_request::{PartitionProduceData, TopicProduceData},
};
use kafka_protocol::protocol::StrBytes;
use kafka_protocol::records::{Compression, RecordBatchEncoder, RecordEncodeOptions};
use parking_lot::Mutex;

use super::link::{Fault, Link, Server};
use super::session::{Cluster, milliseconds};
use super::{BATCH_BYTES_MAX, BrokerError, KafkaSettings, SendError, codes, records};

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyedRecord {
    /// Records of one key are in one partition.
    pub key: String,
    /// Its content.
    pub value: String,
    /// The header of that name.
    pub traceparent: Option<String>,
}

/// Sends records to a topic that is there.
#[derive(Debug)]
pub struct Producer {
    cluster: Cluster,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The leader of each partition; empty: not asked yet.
    leaders: Vec<Server>,
    links: HashMap<String, Link>,
}

impl Producer {
    /// A producer that connects when it is needed. The settings' partition counts for nothing.
    ///
    /// # Errors
    /// As [`super::KafkaBroker::new`].
    pub fn new(settings: KafkaSettings) -> Result<Self, BrokerError> {
        Ok(Producer {
            cluster: Cluster::new(settings)?,
            state: Mutex::default(),
        })
    }

    /// Sends records, those of a partition in their order. Each record's outcome; after a failure in its partition a
    /// record was not sent, and has the same one. Blocks.
    pub fn send(&self, sent: &[KeyedRecord]) -> Vec<Result<(), SendError>> {
        let mut state = self.state.lock();
        let deadline = Instant::now() + self.cluster.settings.timeout;
        if state.leaders.is_empty() {
            match self.cluster.leaders(deadline) {
                Ok(leaders) => state.leaders = leaders,
                Err(error) => {
                    let error = match error {
                        BrokerError::Refused(said) => SendError::Refused(said),
                        BrokerError::Away(said) | BrokerError::Lost(said) => SendError::Away(said),
                    };
                    return sent.iter().map(|_| Err(error.clone())).collect();
                }
            }
        }
        let mut by_partition: HashMap<usize, Vec<usize>> = HashMap::new();
        for (at, record) in sent.iter().enumerate() {
            let partition = partition_of(record.key.as_bytes(), state.leaders.len());
            by_partition.entry(partition).or_default().push(at);
        }
        let mut outcomes = vec![Ok(()); sent.len()];
        for (partition, places) in by_partition {
            let mut failure = None;
            for part in parts(&places, sent) {
                failure = match failure {
                    Some(error) => Some(error),
                    None => self.send_part(&mut state, partition, &part, sent).err(),
                };
                if let Some(error) = &failure {
                    for at in part {
                        outcomes[at] = Err(error.clone());
                    }
                }
            }
            if failure.is_some() {
                // The leader may be another by now.
                state.links.clear();
            }
        }
        if outcomes.iter().any(Result::is_err) {
            state.leaders.clear();
        }
        outcomes
    }

    fn send_part(
        &self,
        state: &mut State,
        partition: usize,
        part: &[usize],
        sent: &[KeyedRecord],
    ) -> Result<(), SendError> {
        let deadline = Instant::now() + self.cluster.settings.timeout;
        let Some(server) = state.leaders.get(partition) else {
            return Err(SendError::Away("the topic has lost a partition".to_owned()));
        };
        let name = server.to_string();
        let kept = state.links.remove(&name);
        let kept = kept.and_then(|mut link| link.is_open().then_some(link));
        let mut link = match kept {
            Some(link) => link,
            None => self
                .cluster
                .link(server, deadline)
                .map_err(|error| match error {
                    BrokerError::Refused(said) => SendError::Refused(said),
                    BrokerError::Away(said) | BrokerError::Lost(said) => SendError::Away(said),
                })?,
        };
        let batch = batch(part.iter().map(|at| &sent[*at]))
            .map_err(|reason| SendError::Refused(format!("records cannot be encoded: {reason}")))?;
        let data = PartitionProduceData::default()
            .with_index(i32::try_from(partition).unwrap_or(i32::MAX))
            .with_records(Some(batch));
        let topic = self.cluster.settings.topic.clone();
        let topic = TopicProduceData::default()
            .with_name(TopicName(StrBytes::from_string(topic)))
            .with_partition_data(vec![data]);
        const ALL: i16 = -1;
        let request = ProduceRequest::default()
            .with_acks(ALL)
            .with_timeout_ms(milliseconds(deadline))
            .with_topic_data(vec![topic]);
        let answer = link.call(&request, deadline).map_err(|fault| match fault {
            Fault::Unsent(said) => SendError::Away(said),
            Fault::Broken(said) | Fault::Refused(said) => SendError::Unknown(said),
        })?;
        let mut answered = answer
            .responses
            .iter()
            .flat_map(|topic| &topic.partition_responses);
        let Some(one) = answered.next() else {
            return Err(SendError::Unknown(format!(
                "{name} did not answer for the partition"
            )));
        };
        if one.error_code != 0 {
            let said = one.error_message.as_deref();
            return Err(codes::of_send(&name, one.error_code, one.base_offset, said));
        }
        state.links.insert(name, link);
        Ok(())
    }
}

/// Cuts the records of a partition into batches below the longest one.
fn parts(places: &[usize], sent: &[KeyedRecord]) -> Vec<Vec<usize>> {
    let mut parts: Vec<Vec<usize>> = Vec::new();
    let mut bytes = usize::MAX;
    for at in places {
        let record = &sent[*at];
        let length = record.key.len() + record.value.len() + records::OVERHEAD_BYTES;
        if bytes.saturating_add(length) > BATCH_BYTES_MAX {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += length;
        if let Some(part) = parts.last_mut() {
            part.push(*at);
        }
    }
    parts
}

fn batch<'a>(sent: impl Iterator<Item = &'a KeyedRecord>) -> Result<Bytes, String> {
    let records: Vec<_> = sent
        .enumerate()
        .map(|(offset, record)| {
            let offset = i64::try_from(offset).unwrap_or(i64::MAX);
            let key = Bytes::copy_from_slice(record.key.as_bytes());
            let value = Bytes::copy_from_slice(record.value.as_bytes());
            let mut encoded = records::record(offset, Some(key), value);
            if let Some(traceparent) = &record.traceparent {
                let value = Bytes::copy_from_slice(traceparent.as_bytes());
                let name = StrBytes::from_static_str("traceparent");
                encoded.headers.insert(name, Some(value));
            }
            encoded
        })
        .collect();
    let options = RecordEncodeOptions {
        version: 2,
        compression: Compression::None,
    };
    let mut buffer = BytesMut::new();
    RecordBatchEncoder::encode(&mut buffer, &records, &options).map_err(|e| e.to_string())?;
    Ok(buffer.freeze())
}

/// The partition of a key: that of Kafka's Java clients, so that a record of another producer with this key is beside it.
fn partition_of(key: &[u8], partitions: usize) -> usize {
    let positive = murmur2(key) & 0x7FFF_FFFF;
    usize::try_from(positive).unwrap_or(0) % partitions.max(1)
}

/// MurmurHash2 with Kafka's seed (`org.apache.kafka.common.utils.Utils.murmur2`).
fn murmur2(data: &[u8]) -> u32 {
    const MULTIPLIER: u32 = 0x5bd1_e995;
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let mut hash = 0x9747_b28c ^ length;
    let (words, rest) = data.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(MULTIPLIER);
        k ^= k >> 24;
        hash = hash.wrapping_mul(MULTIPLIER) ^ k.wrapping_mul(MULTIPLIER);
    }
    if !rest.is_empty() {
        for (at, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * at);
        }
        hash = hash.wrapping_mul(MULTIPLIER);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cases of Kafka's own `UtilsTest.testMurmur2`.
    #[test]
    fn a_key_has_the_partition_of_the_java_clients() {
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            (
                "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58_897_971,
            ),
        ] {
            assert_eq!(murmur2(key.as_bytes()).cast_signed(), hash, "{key}");
        }
    }

    #[test]
    fn records_that_are_sent_together_are_one_batch() {
        let record = |key: &str| KeyedRecord {
            key: key.to_owned(),
            value: "{}".to_owned(),
            traceparent: (key == "b").then(|| "00-…-01".to_owned()),
        };
        let sent = [record("a"), record("b"), record("c")];
        let mut bytes = batch(sent.iter()).unwrap();
        let length = i32::from_be_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        assert_eq!(
            usize::try_from(length).unwrap() + 12,
            bytes.len(),
            "its header tells of all bytes"
        );
        let read = kafka_protocol::records::RecordBatchDecoder::decode(&mut bytes).unwrap();
        assert_eq!(read.records.len(), 3);
        let headers = read.records.iter().map(|record| record.headers.len());
        assert_eq!(headers.collect::<Vec<_>>(), [0, 1, 0]);
        let header = read.records[1].headers.get(&b"traceparent"[..]);
        assert_eq!(header, Some(&Some(Bytes::from("00-…-01"))));
    }

    #[test]
    fn records_are_cut_into_batches_in_their_order() {
        let long = |key: &str| KeyedRecord {
            key: key.to_owned(),
            value: "x".repeat(400_000),
            traceparent: None,
        };
        let sent = [long("a"), long("b"), long("c"), long("d"), long("e")];
        assert_eq!(parts(&[0, 1, 2, 4], &sent), [vec![0, 1], vec![2, 4]]);
        assert_eq!(parts(&[], &sent), [[0; 0]; 0]);
    }

    #[test]
    fn a_batch_is_full_to_the_last_byte_keys_and_overhead_included() {
        let half = BATCH_BYTES_MAX / 2 - records::OVERHEAD_BYTES;
        let record = |key: usize, more: usize| KeyedRecord {
            key: "k".repeat(key),
            value: "x".repeat(half - key + more),
            traceparent: None,
        };
        let sent = [record(10, 0), record(200, 0), record(200, 1)];
        assert_eq!(parts(&[0, 1], &sent), [vec![0, 1]]);
        assert_eq!(parts(&[0, 2], &sent), [vec![0], vec![2]]);
    }
}
