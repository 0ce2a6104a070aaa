//! A message broker as the place of the order log.
//!
//! A client ([`Broker`]) stores frames and knows no orders. It makes one attempt a call, within its time limit,
//! and never repeats by itself. Repeating, fencing and reading back are decided once, for all brokers:
//!
//! * [`frame`]: the bytes of a group in the broker; `before`: taking the log over at a start;
//! * [`reader`]: which frames count, and what is damage;
//! * `writer`: appending, also after an unknown outcome and after a broker that lost groups;
//! * `log`: all of it as an [`crate::queue::log::OrderLog`].
//!
//! The rules:
//!
//! 1. A group is identified by (epoch, number). Number 0 is the epoch's *marker*, appended by the process that
//!    takes the log over. Groups of an epoch behind the marker of a later one do not count.
//! 2. A group is acknowledged only if its position shows that no marker of a later epoch precedes it.
//! 3. One group is in flight. Once its outcome is unknown, no other number is used until it is there for certain,
//!    or a later epoch's marker is.
//! 4. The *place* up to which every order is settled is kept in PostgreSQL. The frame at the place stays in the
//!    broker, so that a reader can tell a log from an empty one.

mod before;
pub mod frame;
#[cfg(feature = "kafka")]
pub mod kafka;
mod log;
pub mod reader;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "rocketmq")]
pub mod rocketmq;
mod writer;

use std::fmt;
use std::time::{Duration, Instant};

pub use crate::order::log_place::{Place, Position};
pub use before::{BeforeStart, Known, TakenOver};
pub use frame::Owner;
pub(crate) use log::records_of;
pub use log::{BrokerLimits, BrokerLog};

/// A frame that the broker has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The broker's offset of it; 0 for Redis.
    pub offset: u64,
    /// Redis: the place that its id says; `None` for the others, where only the frame says it.
    pub place: Option<Place>,
    /// The frame, byte for byte as it was sent.
    pub frame: Vec<u8>,
}

impl Stored {
    /// Where it is; place 0-0 if neither its id nor its frame says a place.
    pub fn position(&self) -> Position {
        Position {
            place: self.place.or_else(|| self.frame_place()).unwrap_or(Place {
                epoch: 0,
                number: 0,
            }),
            offset: self.offset,
        }
    }

    /// The place that its frame says; `None` if it is no frame.
    fn frame_place(&self) -> Option<Place> {
        frame::decode(&self.frame).ok().map(|frame| frame.place)
    }
}

/// Reasons why a frame was not stored for certain. Each has a sentence that names the server's answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// A frame of this or a later place is stored, and this one is not (Redis only: it refuses such an id).
    #[error("the broker has a later group: {0}")]
    Stale(String),
    /// It is certainly not stored: the broker has no room.
    #[error("the broker is full: {0}")]
    Full(String),
    /// It is certainly not stored: the broker could not be reached, or does not take writes now.
    #[error("the broker is away: {0}")]
    Away(String),
    /// It is certainly not stored, and will not be until a person changes something: credentials, permissions, a
    /// setting that breaks the promise.
    #[error("the broker refuses: {0}")]
    Refused(String),
    /// It may or may not be stored, or is stored and not durable as promised.
    #[error("the broker's answer is unknown: {0}")]
    Unknown(String),
}

/// Reasons why a broker could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// It could not be reached, or does not answer; the same question may be answered later.
    #[error("the broker is away: {0}")]
    Away(String),
    /// Credentials, permissions, or a setting that breaks the promise: a person has to change something. The
    /// sentence says what.
    #[error("{0}")]
    Refused(String),
    /// What was asked for is not there any more.
    #[error("the broker has lost what was asked for: {0}")]
    Lost(String),
}

/// Bytes asked for at once.
const READ_BYTES: usize = 1 << 20;

/// The frames of a log from a position on, as they are, page by page.
#[derive(Debug)]
pub struct Pages<'a> {
    broker: &'a dyn Broker,
    after: Option<Position>,
}

impl<'a> Pages<'a> {
    /// The frames after `after`; `None`: from the first one on.
    pub fn after(broker: &'a dyn Broker, after: Option<Position>) -> Self {
        Pages { broker, after }
    }

    /// The next frames. Empty: there are none.
    ///
    /// # Errors
    /// As [`Broker::read`].
    pub fn read(&mut self) -> Result<Vec<Stored>, BrokerError> {
        let page = self.broker.read(self.after, READ_BYTES)?;
        self.after = page.last().map(Stored::position).or(self.after);
        Ok(page)
    }
}

/// Time for which a broker that is away is waited for, before a start and by `millrace queue`. A broker of RocketMQ
/// tells a name server of itself every 30 s.
pub const PATIENCE: Duration = Duration::from_secs(45);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(200);

/// Whether an error passes when the broker comes back.
pub trait IsAway {
    /// Whether it does.
    fn is_away(&self) -> bool;
}

impl IsAway for BrokerError {
    fn is_away(&self) -> bool {
        matches!(self, BrokerError::Away(_))
    }
}

/// Repeats what failed because the broker is away, for as long as `patience`.
///
/// # Errors
/// The last attempt's.
pub fn while_away<T, E: IsAway>(
    patience: Duration,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let until = Instant::now() + patience;
    loop {
        match attempt() {
            Err(error) if error.is_away() && Instant::now() < until => std::thread::sleep(RETRY),
            result => return result,
        }
    }
}

/// What [`Broker::check`] has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// What weakens the promise, a sentence each.
    pub warnings: Vec<String>,
    /// Whether the connection of [`Broker::send`] is a new one, which may lead to a server that has lost groups.
    pub is_anew: bool,
}

/// A broker that keeps one log.
pub trait Broker: Send + Sync + fmt::Debug {
    /// Connects anew if the connection of [`Broker::send`] is gone, makes the stream or topic if it is missing and may be made, and reads every setting
    /// of the server that the promise rests on.
    ///
    /// # Errors
    /// [`BrokerError::Refused`] with one sentence: the setting, its value, and the value that it needs.
    fn check(&self) -> Result<Checked, BrokerError>;

    /// Stores a frame behind all others, and returns its offset once it is durable by the broker's own promise.
    /// It never connects by itself: a new connection may lead to a server that has lost groups in a failover, so
    /// without one it is [`SendError::Away`] until [`Broker::check`] has connected and the log's end has been
    /// compared.
    ///
    /// # Errors
    /// [`SendError`]. Anything that is not certain is [`SendError::Unknown`].
    fn send(&self, place: Place, frame: &[u8]) -> Result<u64, SendError>;

    /// The frames after `after` (`None`: from the first that it still has), in their order: about `bytes_max`
    /// bytes, at least one frame if there is one. Empty: there is none after it.
    ///
    /// # Errors
    /// [`BrokerError::Lost`] if frames between `after` and the first that it still has are known to be gone.
    fn read(&self, after: Option<Position>, bytes_max: usize) -> Result<Vec<Stored>, BrokerError>;

    /// Allows the broker to delete every frame before `before`; the frame at `before` stays readable.
    ///
    /// # Errors
    /// [`BrokerError`].
    fn forget(&self, before: Position) -> Result<(), BrokerError>;

    /// Greatest length of a frame in bytes.
    fn frame_max(&self) -> usize;

    /// Name of the place in messages, such as: the Redis stream `…`.
    fn title(&self) -> String;

    /// Whether the broker addresses frames by their place. Then the server itself refuses a frame whose place is not
    /// above all others, [`Broker::read`] goes by the place, and [`Broker::send`] recognises a frame that is there
    /// already. Otherwise frames have ascending offsets, which show whether something came between.
    fn fences(&self) -> bool {
        false
    }
}
