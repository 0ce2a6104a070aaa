//! The order log on Apache RocketMQ: one queue of one topic, over the remoting protocol of 4.x and 5.x.
//!
//! ```text
//! name server  <- route of the topic -  RocketMqBroker  - send | pull, offsets ->  master of the broker group
//! ```
//!
//! **Send.** A frame is the body of one message. The broker answers `SUCCESS` once its commit log is flushed
//! (`flushDiskType = SYNC_FLUSH`, checked at every connect) and the replicas it is told to wait for have the message.
//! The answer holds the message's offset in the queue; offsets of a queue have no gaps.
//!
//! **Read.** Pulls see a message only once the broker has put it into its *consume queue*, shortly after it has
//! acknowledged it, and so do the offsets that the broker tells. "There is none after it" is therefore said only once
//! the broker has dispatched everything that was in its commit log when reading began.
//!
//! **Which broker.** The topic must be on one broker group. A name server forgets the topics of a broker that is down,
//! so a topic that it does not know is made only if this process has never seen it and the cluster has one
//! master; the name of the group is remembered, and the topic is never sought elsewhere.
//!
//! **Forgetting.** RocketMQ deletes by age and by space only, read or not: [`Broker::forget`] has nothing to do.
//!
//! Connections: one to send, one to read, each with its own lock, so that reading does not delay sending. A
//! connection that failed, or whose answer was not the wanted one, is closed, and the next call looks the master up.

mod codes;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod message;
mod promise;
mod read;
mod route;
mod session;
mod wire;

use std::fmt;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use self::route::Route;
use self::session::Session;
use self::wire::{CallError, Credentials, Fields};
use super::{Broker, BrokerError, Checked, Place, Position, SendError, Stored};
use crate::order::UnixMillis;

/// Greatest length of a frame; brokers take messages of 4 MiB unless told otherwise.
const FRAME_BYTES_MAX: usize = 1024 * 1024;
/// Room for the rest of a message: its fixed part, the topic's name and the properties.
const MESSAGE_OVERHEAD_BYTES: usize = 64 * 1024;
/// Request code of one message.
const SEND_MESSAGE: u16 = 10;

/// Where the log is, and who asks for it.
#[derive(Clone)]
pub struct RocketMqSettings {
    /// Name servers, `host:port`, separated by semicolons or commas; the first that answers counts.
    pub namesrv: String,
    /// The topic, which is also the name of the consumer group that reads.
    pub topic: String,
    /// The queue of the topic, from 0.
    pub queue: i32,
    /// The access key, if the broker has access lists.
    pub access_key: Option<String>,
    /// The secret key that belongs to it.
    pub secret_key: Option<String>,
    /// Time limit of one call, with connecting and everything that it looks up.
    pub timeout: Duration,
}

impl fmt::Debug for RocketMqSettings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            namesrv,
            topic,
            queue,
            access_key,
            secret_key,
            timeout,
        } = self;
        formatter
            .debug_struct("RocketMqSettings")
            .field("namesrv", namesrv)
            .field("topic", topic)
            .field("queue", queue)
            .field("access_key", access_key)
            .field("secret_key", &secret_key.as_ref().map(|_| "…"))
            .field("timeout", timeout)
            .finish()
    }
}

/// A RocketMQ broker that keeps one log.
pub struct RocketMqBroker {
    settings: RocketMqSettings,
    name_servers: Vec<String>,
    credentials: Option<Credentials>,
    /// The place of the topic, once it was seen.
    pinned: Mutex<Option<Route>>,
    writer: Mutex<Option<Session>>,
    reader: Mutex<Option<Session>>,
}

impl fmt::Debug for RocketMqBroker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RocketMqBroker")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl RocketMqBroker {
    /// A broker that is not connected yet.
    #[must_use]
    pub fn new(settings: RocketMqSettings) -> Self {
        let name_servers = settings
            .namesrv
            .split([';', ','])
            .map(str::trim)
            .filter(|address| !address.is_empty());
        let credentials = match (&settings.access_key, &settings.secret_key) {
            (Some(access), Some(secret)) => Some(Credentials::new(access, secret)),
            _ => None,
        };
        Self {
            name_servers: name_servers.map(str::to_owned).collect(),
            credentials,
            settings,
            pinned: Mutex::new(None),
            writer: Mutex::new(None),
            reader: Mutex::new(None),
        }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.settings.timeout
    }

    /// The header of a request about the queue.
    fn queue_fields(&self) -> Fields {
        Fields::from([
            ("topic", self.settings.topic.clone()),
            ("queueId", self.settings.queue.to_string()),
        ])
    }

    fn message_fields(&self) -> Fields {
        let mut fields = self.queue_fields();
        fields.extend([
            ("producerGroup", self.settings.topic.clone()),
            // The topic that a broker would copy to make a missing one: this one itself, so it makes none.
            ("defaultTopic", self.settings.topic.clone()),
            ("defaultTopicQueueNums", "1".to_owned()),
            ("sysFlag", "0".to_owned()),
            ("bornTimestamp", UnixMillis::now().0.to_string()),
            ("flag", "0".to_owned()),
            // The answer waits for the disk and the replicas.
            ("properties", "WAIT\u{1}true\u{2}".to_owned()),
            ("reconsumeTimes", "0".to_owned()),
            ("unitMode", "false".to_owned()),
            ("batch", "false".to_owned()),
        ]);
        fields
    }

    fn send_on(
        &self,
        session: &mut Session,
        frame: &[u8],
        deadline: Instant,
    ) -> Result<u64, SendError> {
        let answer = session
            .connection
            .call(SEND_MESSAGE, self.message_fields(), frame, deadline);
        let answer = answer.map_err(|error| match error {
            CallError::NotSent(reason) => SendError::Away(reason),
            CallError::NoAnswer(reason) => SendError::Unknown(reason),
        })?;
        codes::sent(&answer)?;
        let queue = answer.number("queueId") == Some(i64::from(self.settings.queue));
        let offset = answer
            .number("queueOffset")
            .and_then(|offset| u64::try_from(offset).ok());
        offset
            .filter(|_| queue)
            .ok_or_else(|| SendError::Unknown("SUCCESS without an offset in the queue".to_owned()))
    }
}

impl Broker for RocketMqBroker {
    fn check(&self) -> Result<Checked, BrokerError> {
        let (session, warnings) = session::open_to_write(self, self.deadline())?;
        let mut is_anew = false;
        // A sender that is under way has checked the settings itself.
        if let Some(mut writer) = self.writer.try_lock()
            && writer
                .as_mut()
                .is_none_or(|session| !session.connection.is_open())
        {
            *writer = Some(session);
            is_anew = true;
            // The master may be another one: both connections lead to the same.
            *self.reader.lock() = None;
        }
        Ok(Checked { warnings, is_anew })
    }

    fn send(&self, _place: Place, frame: &[u8]) -> Result<u64, SendError> {
        if frame.is_empty() || frame.len() > FRAME_BYTES_MAX {
            let sentence = format!(
                "a frame of {} bytes; messages have 1 to {FRAME_BYTES_MAX} bytes",
                frame.len()
            );
            return Err(SendError::Refused(sentence));
        }
        let deadline = self.deadline();
        let mut writer = self.writer.lock();
        let kept = writer.take().filter(|session| session.connection.is_open());
        let Some(mut session) = kept else {
            return Err(SendError::Away(format!(
                "{} is not connected",
                self.title()
            )));
        };
        let offset = self.send_on(&mut session, frame, deadline)?;
        *writer = Some(session);
        Ok(offset)
    }

    fn read(&self, after: Option<Position>, bytes_max: usize) -> Result<Vec<Stored>, BrokerError> {
        let after = after.map(|position| position.offset);
        session::with_reader(self, |session, deadline| match session {
            Some(session) => read::frames(self, session, after, bytes_max, deadline),
            None if after.is_none() => Ok(Vec::new()),
            None => Err(BrokerError::Lost(format!(
                "there is no topic {}",
                self.settings.topic
            ))),
        })
    }

    /// Nothing: RocketMQ deletes by age and by space only.
    fn forget(&self, _before: Position) -> Result<(), BrokerError> {
        Ok(())
    }

    fn frame_max(&self) -> usize {
        FRAME_BYTES_MAX
    }

    fn title(&self) -> String {
        let RocketMqSettings { topic, queue, .. } = &self.settings;
        format!("queue {queue} of the RocketMQ topic `{topic}`")
    }
}
