//! The order log under the durable queue: groups of records, written by one process at a time.
//!
//! * [`record`]: the records and the bytes of a group;
//! * `space`: room reserved for records; `outstanding`: when a span may be forgotten;
//! * [`mod@file`]: the log on this machine's disk (`queue.backend = "journal"`);
//! * [`broker`]: the log on a message broker.
//!
//! A log is divided into *spans*: groups that are forgotten together. A span may be forgotten once no more
//! groups are added to it, each of its orders is settled in the database, and every span before it may be
//! forgotten.

pub mod broker;
pub mod file;
mod outstanding;
pub mod record;
mod space;

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::order::{OrderId, UnixMillis};
use crate::queue::Durability;
use record::Record;
pub use space::{Permit, Space};

/// A group that is in the log, as its reader addresses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupAt {
    /// Number of its span, from 1.
    pub span: u64,
    /// Its place in the span or in the log; ascending within a span. File: its first sector.
    pub place: u64,
    /// Its length. File: in sectors.
    pub length: u32,
    /// Number of the group.
    pub group: u64,
    /// Number of its records.
    pub records: u32,
    /// Lowest and highest order id in it.
    pub ids: Option<(OrderId, OrderId)>,
}

/// A group to be appended.
#[derive(Debug)]
pub struct NewGroup<'a> {
    /// Its bytes, see [`record`].
    pub payload: &'a [u8],
    /// Number of its records.
    pub records: u32,
    /// Number of orders among them.
    pub orders: u32,
    /// Lowest and highest order id in it.
    pub ids: Option<(OrderId, OrderId)>,
}

/// Reasons why a group is not in the log for certain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// It is not in the log, and the same group may be appended later: the log has no room or is away.
    #[error("{0}")]
    NotNow(String),
    /// It may or may not be in the log. Only the same group may be appended next.
    #[error("{0}")]
    Unknown(String),
    /// This log takes no further group from this process. The group may or may not be in it.
    #[error("{0}")]
    Final(String),
}

/// The writing end of a log, for one thread.
pub trait LogWriter: Send + fmt::Debug {
    /// Room for the next group in bytes, at least `at_least`; the longest record always fits. May wait for
    /// the next span. `None`: the log was stopped.
    fn room(&mut self, at_least: usize) -> Option<usize>;

    /// Number of the span that the next group is appended to.
    fn span(&self) -> u64;

    /// Asks a log that was away whether it takes groups again, and appends again what it has lost.
    ///
    /// # Errors
    /// [`AppendError`].
    fn probe(&mut self) -> Result<(), AppendError> {
        Ok(())
    }

    /// Compares the next part of what this process has appended with the log, while nothing is known to have failed. Called
    /// between two groups, so a part is short. True: the log was compared to its end, and has everything.
    ///
    /// # Errors
    /// [`AppendError`].
    fn look(&mut self) -> Result<bool, AppendError> {
        Ok(true)
    }

    /// Appends a group, and returns once it is durable. `reserved` is the room of its permits; what the group
    /// does not take of it is returned to the log's space.
    ///
    /// # Errors
    /// [`AppendError`]. After [`AppendError::NotNow`] nothing of `reserved` is taken.
    fn append(&mut self, group: &NewGroup<'_>, reserved: u32) -> Result<GroupAt, AppendError>;
}

/// A log, for every thread but the writing one.
pub trait OrderLog: Send + Sync + fmt::Debug {
    /// The events that a group in it survives.
    fn durability(&self) -> Durability;

    /// Name of the place in messages: the journal, the Redis stream `…`.
    fn title(&self) -> String;

    /// Reserves room for a record of at most so many bytes, as a group of its own; `None` if there is not
    /// enough now.
    fn reserve(&self, record_bytes: usize) -> Option<Permit>;

    /// Whether there will be no more room until orders are settled.
    fn is_full(&self) -> bool;

    /// Counts settled orders, given as pairs of span and orders.
    fn settled(&self, by_span: &[(u64, u64)]);

    /// Reads a group back.
    ///
    /// # Errors
    /// If the log cannot be read, or has something else there.
    fn read(&self, at: &GroupAt) -> io::Result<Vec<Record>>;

    /// Passes the records of every group that is still in it to `each`, oldest first, with the group's span
    /// and place. A group that is being appended may be among them.
    ///
    /// # Errors
    /// If the log cannot be read.
    fn read_all(&self, each: &mut dyn FnMut(u64, u64, Vec<Record>)) -> io::Result<()>;

    /// Orders that are not yet settled in the database.
    fn outstanding(&self) -> u64;

    /// Number of the newest span of which every order is settled, with all spans before it; 0 if there is none.
    fn settled_up_to(&self) -> u64;

    /// The place of the last group of `span`, if the log's place is kept in PostgreSQL: a journal keeps its own.
    fn position_of(&self, _span: u64) -> Option<broker::Position> {
        None
    }

    /// Notes that PostgreSQL has the place of `span`.
    fn note(&self, _span: u64) {}

    /// The place of the last group, if the log's place is kept in PostgreSQL.
    fn last_position(&self) -> Option<broker::Position> {
        None
    }

    /// Permits forgetting of spans up to `span`, if the log retains them.
    fn confirm(&self, span: u64);

    /// Bytes that it takes.
    fn bytes(&self) -> u64;

    /// Looks for spans that may be forgotten, in the background.
    fn look(&self);

    /// Main loop of the thread that prepares and forgets spans, until [`OrderLog::stop`].
    fn maintain(&self);

    /// Ends [`OrderLog::maintain`] and whoever waits for a span.
    fn stop(&self);

    /// Gives the log up, after the threads have ended and every order is settled: another log may then take its
    /// place. A journal deletes its files, a broker's log says so in a last group.
    ///
    /// # Errors
    /// If that fails. What remains is a sound log.
    fn erase(&self) -> io::Result<()>;
}

/// A log that may be appended to.
#[derive(Debug)]
pub struct Log {
    /// Its writing end.
    pub writer: Box<dyn LogWriter>,
    /// The log itself.
    pub shared: Arc<dyn OrderLog>,
    /// Sequence number of the next record.
    pub next_sequence: u64,
}

/// Widens the range `ids` by `id`.
pub(super) fn widen(ids: Option<(OrderId, OrderId)>, id: OrderId) -> Option<(OrderId, OrderId)> {
    let (low, high) = ids.unwrap_or((id, id));
    Some((low.min(id), high.max(id)))
}

/// The exclusive upper bound of the ids of these records: leases and orders.
pub fn id_high_water(records: &[Record]) -> UnixMillis {
    let bounds = records.iter().map(|record| match record {
        Record::Order(order) => order.id.millis().plus_ms(1),
        Record::Lease(until) => *until,
    });
    bounds.max().unwrap_or(UnixMillis(0))
}
