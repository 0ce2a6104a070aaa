//! The stream of a slot, put together to whole transactions.

use pgwire_replication::ReplicationEvent;

use super::{Transaction, rows};
use crate::order::UnixMillis;
use crate::store::StoreError;
use crate::store::pgoutput::{self, Decoder, Lsn};
use crate::store::postgres::ReplicationStream;

/// Most changes of one transaction that are read; Millrace's own have 100,000 at most.
const CHANGES_MAX: usize = 200_000;

/// What a stream tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The next transaction, in the order of commits.
    Transaction(Transaction),
    /// Everything before it has been told.
    Place(Lsn),
    /// The next transaction, which somebody else made, has more changes than are held in memory.
    Overlong,
}

/// The transactions of a slot.
#[derive(Debug)]
pub struct Transactions {
    stream: ReplicationStream,
    decoder: Decoder,
    /// The transaction that is being told: its number and the time of its commit.
    open: Option<(u32, UnixMillis)>,
    changes: Vec<super::Change>,
}

impl Transactions {
    pub(super) fn new(stream: ReplicationStream) -> Self {
        Transactions {
            stream,
            decoder: Decoder::default(),
            open: None,
            changes: Vec::new(),
        }
    }

    /// What comes next. May be dropped and called again.
    ///
    /// # Errors
    /// If the stream has ended, or tells what cannot be.
    pub async fn next(&mut self) -> Result<Told, StoreError> {
        loop {
            if self.changes.len() > CHANGES_MAX {
                return Ok(Told::Overlong);
            }
            match (self.stream.next().await?, self.open) {
                (
                    ReplicationEvent::Begin {
                        xid,
                        commit_time_micros,
                        ..
                    },
                    None,
                ) => self.open = Some((xid, pgoutput::moment(commit_time_micros))),
                (ReplicationEvent::XLogData { data, .. }, Some((_, at))) => {
                    let message = self.decoder.decode(data)?;
                    self.changes.extend(rows::change_of(&message, at)?);
                }
                (ReplicationEvent::Commit { end_lsn, .. }, Some((xid, _))) => {
                    self.open = None;
                    return Ok(Told::Transaction(Transaction {
                        xid,
                        end: Lsn(end_lsn.0),
                        changes: std::mem::take(&mut self.changes),
                    }));
                }
                (ReplicationEvent::KeepAlive { wal_end, .. }, None) => {
                    return Ok(Told::Place(Lsn(wal_end.0)));
                }
                (ReplicationEvent::KeepAlive { .. } | ReplicationEvent::Message { .. }, _) => {}
                _ => {
                    return Err(StoreError::Data(
                        "the write-ahead log is decoded into messages in an order that cannot be"
                            .to_owned(),
                    ));
                }
            }
        }
    }

    /// Lets the slot's place move on: everything before `to` is delivered.
    pub fn delivered(&self, to: Lsn) {
        self.stream.taken(to);
    }
}
