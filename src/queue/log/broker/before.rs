//! A broker's log before the start: taking it over, and reading what the database does not have yet.

use std::sync::Arc;
use std::time::Duration;

use super::frame::{self, Owner};
use super::log::records_of;
use super::reader::{Counted, ReadError, Reader, before};
use super::{
    Broker, BrokerError, BrokerLimits, BrokerLog, Pages, Place, Position, SendError, while_away,
};
use crate::faults::crash_point;
use crate::order::UnixMillis;
use crate::queue::log::record::Record;
use crate::queue::log::{Log, id_high_water};

/// Epochs that a start tries before it believes that another process goes on.
const EPOCHS_TRIED: u32 = 8;

/// What PostgreSQL knows of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Whether the log may hold acknowledged orders that are not rows yet.
    pub in_use: bool,
    /// The place up to which all orders are settled, if it is this log's.
    pub place: Option<Position>,
}

/// A log that is to be taken over.
#[derive(Debug)]
pub struct BeforeStart {
    /// The broker, which has been checked.
    pub broker: Arc<dyn Broker>,
    /// The database and node that take it over.
    pub owner: Owner,
    /// The epoch of this process.
    pub epoch: u64,
    /// What PostgreSQL knows of it.
    pub known: Known,
    /// Time for which each answer of a broker that is away is waited for.
    pub patience: Duration,
}

/// A log that was taken over and read.
#[derive(Debug)]
pub struct TakenOver {
    before: BeforeStart,
    /// Its marker: every group before it was passed on.
    pub marker: Position,
    /// Number of records that were passed on.
    pub records: u64,
    /// Exclusive upper bound of its order ids, from leases and orders.
    pub id_high_water: UnixMillis,
}

impl BeforeStart {
    /// Takes the log over, and passes every record behind the place to `each`, in order. From the marker on no
    /// other process can acknowledge anything in this log. Its epoch is higher than that of this process if the log has a
    /// higher one already: PostgreSQL has forgotten that in a failover.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn take_over(self, each: impl FnMut(Record)) -> Result<TakenOver, ReadError> {
        self.take(each, |_| Ok(()))
    }

    /// The same under no other epoch than `epoch`. A process that was paused and replaced in between cannot tell a failover
    /// from its replacement, whose log it must leave alone; PostgreSQL can.
    ///
    /// # Errors
    /// [`ReadError::LaterEpoch`]; some records may have been passed on before.
    pub fn take_over_as(self, each: impl FnMut(Record)) -> Result<TakenOver, ReadError> {
        self.take(each, |epoch| Err(ReadError::LaterEpoch(epoch)))
    }

    fn take(
        self,
        mut each: impl FnMut(Record),
        beyond: impl Fn(u64) -> Result<(), ReadError>,
    ) -> Result<TakenOver, ReadError> {
        let mut taken = TakenOver {
            marker: Position {
                place: Place {
                    epoch: 0,
                    number: 0,
                },
                offset: 0,
            },
            records: 0,
            id_high_water: UnixMillis(0),
            before: self,
        };
        let before = &taken.before;
        let (newest, has_unknown) = while_away(before.patience, || before.survey())?;
        let mut epoch = before.epoch.max(newest + 1);
        if let Some(place) = before.known.place {
            epoch = epoch.max(place.place.epoch + 1);
        }
        if epoch > before.epoch {
            beyond(epoch)?;
        }
        if !before.known.in_use && has_unknown && before.known.place.is_none() {
            return Err(ReadError::Foreign(format!(
                "{} holds orders that this database does not know; configure another stream or topic, or delete it if \
                 its orders are not needed",
                before.broker.title()
            )));
        }
        if !before.known.in_use && !has_unknown {
            taken.marker = before
                .marker(epoch)?
                .map_err(|reason| BrokerError::Refused(before.is_used(epoch, &reason)))?;
            return Ok(taken);
        }
        let broker = Arc::clone(&before.broker);
        let (owner, place) = (before.owner, before.known.place);
        let mut reader = Reader::after(&*broker, owner, place);
        for _ in 0..EPOCHS_TRIED {
            // A broker that fences refuses an epoch that PostgreSQL has forgotten in a failover. Reading says which
            // one is needed.
            let marker = taken.before.marker(epoch)?;
            crash_point("log.marked");
            loop {
                let counted = while_away(taken.before.patience, || reader.read())?;
                if counted.is_empty() {
                    break;
                }
                for Counted { position, payload } in counted {
                    let records = records_of(position.place, &payload)?;
                    taken.records += records.len() as u64;
                    taken.id_high_water = taken.id_high_water.max(id_high_water(&records));
                    records.into_iter().for_each(&mut each);
                }
            }
            let last = reader.last();
            if let Ok(marker) = marker
                && last == Some(marker.place)
            {
                taken.marker = marker;
                return Ok(taken);
            }
            epoch = epoch.max(last.map_or(0, |last| last.epoch)) + 1;
            beyond(epoch)?;
        }
        Err(ReadError::Broker(BrokerError::Refused(
            taken.before.is_used(epoch, "its epochs go on"),
        )))
    }

    fn is_used(&self, epoch: u64, reason: &str) -> String {
        format!(
            "{} has groups of a later epoch than {epoch}, so another process uses it: {reason}",
            self.broker.title()
        )
    }

    /// Appends the marker of `epoch`, and repeats until it is there for certain. `Err` inside: the broker has a
    /// later group.
    fn marker(&self, epoch: u64) -> Result<Result<Position, String>, BrokerError> {
        let place = Place { epoch, number: 0 };
        let marker = frame::encode(self.owner, place, &[]);
        while_away(self.patience, || match self.broker.send(place, &marker) {
            Ok(offset) => Ok(Ok(Position { place, offset })),
            Err(SendError::Stale(reason)) => Ok(Err(reason)),
            Err(SendError::Refused(reason)) => Err(BrokerError::Refused(reason)),
            // A marker that is there twice counts once, so an unknown outcome is simply repeated.
            Err(error) => {
                let _ = self.broker.check();
                Err(BrokerError::Away(error.to_string()))
            }
        })
    }

    /// The highest epoch in the log, and whether it has orders behind the place that PostgreSQL knows. Reads all
    /// of it if the database believes it to be unused; then there should be next to nothing in it.
    fn survey(&self) -> Result<(u64, bool), ReadError> {
        if self.known.in_use {
            return Ok((0, true));
        }
        let by_place = self.broker.fences();
        let from = self.known.place.and_then(|place| before(place, by_place));
        let mut pages = Pages::after(&*self.broker, from);
        let (mut newest, mut has_unknown, mut is_begun) = (0, false, from.is_none());
        let mut settled = self.known.place.map(|known| known.place);
        loop {
            let stored = match pages.read() {
                // The place is gone; from the first frame on.
                Err(BrokerError::Lost(_)) if !std::mem::replace(&mut is_begun, true) => {
                    pages = Pages::after(&*self.broker, None);
                    continue;
                }
                stored => stored?,
            };
            is_begun = true;
            if stored.is_empty() {
                return Ok((newest, has_unknown));
            }
            for one in &stored {
                let Ok(frame) = frame::decode(&one.frame) else {
                    return Err(ReadError::Foreign(format!(
                        "{} has entries that are not Millrace's; configure a stream or topic of its own",
                        self.broker.title()
                    )));
                };
                if frame.owner != self.owner {
                    return Err(ReadError::Foreign(format!(
                        "{} belongs to another database or node; configure a stream or topic of its own",
                        self.broker.title()
                    )));
                }
                newest = newest.max(frame.place.epoch);
                if frame.payload == frame::CLOSING {
                    // A repeat of an earlier group may arrive behind it.
                    settled = settled.max(Some(frame.place));
                    has_unknown = false;
                } else {
                    has_unknown |= !frame.payload.is_empty() && Some(frame.place) > settled;
                }
            }
        }
    }
}

impl TakenOver {
    /// Makes a log of it, once every record that was passed on is in the database.
    pub fn start(self, limits: BrokerLimits) -> Log {
        let BeforeStart {
            broker,
            owner,
            known,
            ..
        } = self.before;
        // What a database that fails over to a standby may ask for again.
        let kept_from = known.place.filter(|_| known.in_use).unwrap_or(self.marker);
        BrokerLog::start(broker, owner, limits, self.marker, kept_from)
    }
}
