//! The order log on Apache Kafka: one partition of one topic, and one record a group.
//!
//! ```text
//!  mod ─ send, read, forget ─────────► session ─ finds the leader, checks the topic ──► link ─ one connection
//!   │                                      └── topic  settings that the promise rests on      ├── sasl
//!   ├── records  batches                                                                      └── (TLS: rustls)
//!   └── codes    what an error says
//! ```
//!
//! `producer` sends records with keys to other topics, for events.
//!
//! The messages are those of the crate `kafka-protocol`; the connection is our own, because a client library repeats
//! and batches by itself and hides what is certain.
//!
//! **Durable** is a record once the leader has answered a produce request with `acks = all`: every replica in sync
//! has it then, at least `min.insync.replicas`.
//!
//! **The end is the end.** A leader that has just been elected may have a high watermark behind what its predecessor
//! acknowledged, and answers a fetch there with nothing. So `read` asks for the latest offset first (ListOffsets 5,
//! which such a leader answers with `OFFSET_NOT_AVAILABLE` until it has caught up, KIP-207), and says that there is
//! nothing more only at that offset. Both requests carry the leader's epoch, so a deposed leader cannot answer for
//! the new one.

mod codes;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod link;
mod producer;
mod records;
mod sasl;
mod session;
mod topic;

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use kafka_protocol::{
    messages::{
        BrokerId, DeleteRecordsRequest, FetchRequest, ListOffsetsRequest, ProduceRequest,
        TopicName,
        delete_records_request::{DeleteRecordsPartition, DeleteRecordsTopic},
        fetch_request::{FetchPartition, FetchTopic},
        list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic},
        produce_request::{PartitionProduceData, TopicProduceData},
    },
    protocol::StrBytes,
};
use parking_lot::Mutex;

use super::{Broker, BrokerError, Checked, Place, Position, SendError, Stored};

pub use producer::{KeyedRecord, Producer};
pub use sasl::{Mechanism, Sasl};

use codes::OFFSET_OUT_OF_RANGE;
use link::Fault;
use session::{Cluster, Leader, milliseconds};

/// Longest record batch that Millrace sends, whatever the topic takes.
const BATCH_BYTES_MAX: usize = 1_000_000;
/// Most that one answer to `read` holds, unless its first frame alone is longer.
const READ_BYTES_MAX: usize = 64 << 20;
/// How long a server may keep a fetch that finds nothing. It finds something: the end was asked before.
const FETCH_WAIT_MS_MAX: i32 = 500;

/// Certificates that a server must show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Of an authority in this file (PEM).
    File(PathBuf),
    /// Of an authority that this machine trusts.
    System,
}

/// Where the log is.
#[derive(Clone, Debug)]
pub struct KafkaSettings {
    /// Brokers to begin with, `host:port`, separated by commas.
    pub bootstrap: String,
    /// The topic.
    pub topic: String,
    /// The partition, from 0.
    pub partition: i32,
    /// TLS, if the listener wants it.
    pub tls: Option<Tls>,
    /// Credentials, if the listener wants them.
    pub sasl: Option<Sasl>,
    /// Time limit of a call.
    pub timeout: Duration,
}

/// The client.
///
/// Sending has a connection of its own, so it never waits for a question; questions wait for one another.
#[derive(Debug)]
pub struct KafkaBroker {
    cluster: Cluster,
    frame_max: AtomicUsize,
    sending: Mutex<Option<Leader>>,
    asking: Mutex<Option<Leader>>,
}

impl KafkaBroker {
    /// A client that connects when it is needed.
    ///
    /// # Errors
    /// [`BrokerError::Refused`]: an address that is none, or certificates that cannot be read.
    pub fn new(settings: KafkaSettings) -> Result<Self, BrokerError> {
        Ok(Self {
            cluster: Cluster::new(settings)?,
            frame_max: AtomicUsize::new(BATCH_BYTES_MAX - records::OVERHEAD_BYTES),
            sending: Mutex::new(None),
            asking: Mutex::new(None),
        })
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.cluster.settings.timeout
    }

    fn topic(&self) -> TopicName {
        TopicName(StrBytes::from_string(self.cluster.settings.topic.clone()))
    }

    fn partition(&self) -> i32 {
        self.cluster.settings.partition
    }

    /// The leader, on a connection that is still open. A new connection has checked the topic.
    fn ready(&self, kept: Option<Leader>, deadline: Instant) -> Result<Leader, BrokerError> {
        match still_open(kept) {
            Some(leader) => Ok(leader),
            None => self.connect(deadline),
        }
    }

    fn connect(&self, deadline: Instant) -> Result<Leader, BrokerError> {
        let leader = self.cluster.open(deadline, false)?;
        self.note(&leader);
        Ok(leader)
    }

    fn note(&self, leader: &Leader) {
        let batch_bytes_max = leader.facts.batch_bytes_max.min(BATCH_BYTES_MAX);
        let frame_max = batch_bytes_max.saturating_sub(records::OVERHEAD_BYTES);
        self.frame_max.store(frame_max, Ordering::Relaxed);
    }

    /// Asks the leader. The connection is kept if all went well, so a leader that has moved is looked for by the next
    /// call.
    fn ask<T>(
        &self,
        question: impl FnOnce(&mut Leader, Instant) -> Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        let deadline = self.deadline();
        let Some(mut asking) = self.asking.try_lock_until(deadline) else {
            return Err(BrokerError::Away(format!(
                "{} is slow to answer",
                self.title()
            )));
        };
        let mut leader = self.ready(asking.take(), deadline)?;
        let answer = question(&mut leader, deadline);
        if matches!(answer, Ok(_) | Err(BrokerError::Lost(_))) {
            *asking = Some(leader);
        }
        answer
    }

    fn offset(
        &self,
        leader: &mut Leader,
        time: i64,
        deadline: Instant,
    ) -> Result<u64, BrokerError> {
        let partition = ListOffsetsPartition::default()
            .with_partition_index(self.partition())
            .with_current_leader_epoch(leader.epoch)
            .with_timestamp(time);
        let topic = ListOffsetsTopic::default()
            .with_name(self.topic())
            .with_partitions(vec![partition]);
        let request = ListOffsetsRequest::default()
            .with_replica_id(BrokerId(-1))
            .with_topics(vec![topic]);
        let answer = leader.call(&request, deadline)?;
        let partitions = answer.topics.iter().flat_map(|topic| &topic.partitions);
        let found = leader.only(partitions)?;
        leader.passes(found.error_code)?;
        u64::try_from(found.offset).map_err(|_| leader.nonsense("a negative offset"))
    }

    /// Fetches once. `None`: the offset is outside of the log.
    fn fetch(
        &self,
        leader: &mut Leader,
        from: u64,
        bytes_max: usize,
        deadline: Instant,
    ) -> Result<Option<records::Frames>, BrokerError> {
        let bytes_max = i32::try_from(bytes_max.clamp(1, READ_BYTES_MAX)).unwrap_or(i32::MAX);
        let partition = FetchPartition::default()
            .with_partition(self.partition())
            .with_current_leader_epoch(leader.epoch)
            .with_fetch_offset(i64::try_from(from).unwrap_or(i64::MAX))
            .with_log_start_offset(-1)
            .with_partition_max_bytes(bytes_max);
        let topic = FetchTopic::default()
            .with_topic(self.topic())
            .with_partitions(vec![partition]);
        let request = FetchRequest::default()
            .with_replica_id(BrokerId(-1))
            .with_max_wait_ms(milliseconds(deadline).min(FETCH_WAIT_MS_MAX))
            .with_min_bytes(1)
            .with_max_bytes(bytes_max)
            .with_session_id(0)
            .with_session_epoch(-1)
            .with_topics(vec![topic]);
        let answer = leader.call(&request, deadline)?;
        leader.passes(answer.error_code)?;
        let found = leader.only(answer.responses.iter().flat_map(|topic| &topic.partitions))?;
        if found.error_code == OFFSET_OUT_OF_RANGE {
            return Ok(None);
        }
        leader.passes(found.error_code)?;
        let bytes = found.records.clone().unwrap_or_default();
        records::frames(bytes, from).map(Some).map_err(|reason| {
            BrokerError::Refused(format!("topic {}: {reason}", self.cluster.settings.topic))
        })
    }

    fn gone(&self, leader: &mut Leader, from: u64, deadline: Instant) -> BrokerError {
        let topic = &self.cluster.settings.topic;
        match self.offset(leader, EARLIEST, deadline) {
            Ok(start) if start > from => BrokerError::Lost(format!(
                "topic {topic} begins at offset {start}, offset {from} was asked for"
            )),
            Ok(_) => BrokerError::Away(format!("topic {topic} changes its extent just now")),
            Err(error) => error,
        }
    }
}

/// Times that stand for an end of the log.
const LATEST: i64 = -1;
const EARLIEST: i64 = -2;

fn still_open(kept: Option<Leader>) -> Option<Leader> {
    kept.and_then(|mut leader| leader.link.is_open().then_some(leader))
}

impl Broker for KafkaBroker {
    fn check(&self) -> Result<Checked, BrokerError> {
        let mut asking = self.asking.lock();
        *asking = None;
        let leader = self.cluster.open(self.deadline(), true)?;
        self.note(&leader);
        let warnings = leader.facts.warnings.clone();
        *asking = Some(leader);
        let mut sending = self.sending.lock();
        let kept = still_open(sending.take());
        let is_anew = kept.is_none();
        *sending = Some(match kept {
            Some(leader) => leader,
            None => self.connect(self.deadline())?,
        });
        Ok(Checked { warnings, is_anew })
    }

    fn send(&self, _place: Place, frame: &[u8]) -> Result<u64, SendError> {
        let mut sending = self.sending.lock();
        let deadline = self.deadline();
        let Some(mut leader) = still_open(sending.take()) else {
            return Err(SendError::Away(format!(
                "{} is not connected",
                self.title()
            )));
        };
        if frame.len() > self.frame_max() {
            *sending = Some(leader);
            return Err(SendError::Refused(format!(
                "a frame of {} bytes is longer than the {} that topic {} takes; raise its max.message.bytes",
                frame.len(),
                self.frame_max(),
                self.cluster.settings.topic,
            )));
        }
        let batch = records::batch(frame).map_err(|reason| {
            SendError::Refused(format!("the frame cannot be encoded: {reason}"))
        })?;
        let partition = PartitionProduceData::default()
            .with_index(self.partition())
            .with_records(Some(batch));
        let topic = TopicProduceData::default()
            .with_name(self.topic())
            .with_partition_data(vec![partition]);
        const ALL: i16 = -1;
        let request = ProduceRequest::default()
            .with_acks(ALL)
            .with_timeout_ms(milliseconds(deadline))
            .with_topic_data(vec![topic]);
        let answer = leader
            .link
            .call(&request, deadline)
            .map_err(|fault| match fault {
                Fault::Unsent(said) => SendError::Away(said),
                Fault::Broken(said) | Fault::Refused(said) => SendError::Unknown(said),
            })?;
        let mut parts = answer
            .responses
            .iter()
            .flat_map(|topic| &topic.partition_responses);
        let server = leader.link.server.to_string();
        let (Some(part), None) = (parts.next(), parts.next()) else {
            return Err(SendError::Unknown(format!(
                "{server} did not answer for the partition"
            )));
        };
        let (code, base) = (part.error_code, part.base_offset);
        if code != 0 {
            return Err(codes::of_send(
                &server,
                code,
                base,
                part.error_message.as_deref(),
            ));
        }
        let offset = u64::try_from(base)
            .map_err(|_| SendError::Unknown(format!("{server} answered without an offset")))?;
        *sending = Some(leader);
        Ok(offset)
    }

    fn read(&self, after: Option<Position>, bytes_max: usize) -> Result<Vec<Stored>, BrokerError> {
        self.ask(|leader, deadline| {
            let end = self.offset(leader, LATEST, deadline)?;
            let mut from = match after {
                Some(position) => position.offset.saturating_add(1),
                None => self.offset(leader, EARLIEST, deadline)?,
            };
            if from > end {
                return Err(BrokerError::Lost(format!(
                    "topic {} ends at offset {end}, offset {from} was asked for",
                    self.cluster.settings.topic
                )));
            }
            while from < end {
                let Some(frames) = self.fetch(leader, from, bytes_max, deadline)? else {
                    return Err(self.gone(leader, from, deadline));
                };
                if !frames.stored.is_empty() {
                    return Ok(frames.stored);
                }
                match frames.next {
                    Some(next) if next > from => from = next,
                    _ => return Err(leader.nonsense("nothing before the end of the log")),
                }
            }
            Ok(Vec::new())
        })
    }

    fn forget(&self, before: Position) -> Result<(), BrokerError> {
        self.ask(|leader, deadline| {
            let partition = DeleteRecordsPartition::default()
                .with_partition_index(self.partition())
                .with_offset(i64::try_from(before.offset).unwrap_or(i64::MAX));
            let topic = DeleteRecordsTopic::default()
                .with_name(self.topic())
                .with_partitions(vec![partition]);
            let request = DeleteRecordsRequest::default()
                .with_topics(vec![topic])
                .with_timeout_ms(milliseconds(deadline));
            let answer = leader.call(&request, deadline)?;
            let found = leader.only(answer.topics.iter().flat_map(|topic| &topic.partitions))?;
            if found.error_code == OFFSET_OUT_OF_RANGE {
                return Err(BrokerError::Lost(format!(
                    "topic {} has no offset {}",
                    self.cluster.settings.topic, before.offset
                )));
            }
            leader.passes(found.error_code)
        })
    }

    fn frame_max(&self) -> usize {
        self.frame_max.load(Ordering::Relaxed)
    }

    fn title(&self) -> String {
        let settings = &self.cluster.settings;
        format!(
            "partition {} of the Kafka topic `{}`",
            settings.partition, settings.topic
        )
    }
}
