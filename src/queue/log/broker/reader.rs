//! Which frames of a broker's log count.
//!
//! ```text
//!   the place (settled up to here)
//!     ▼
//!   …(4,7) (4,8) (4,8)        (5,0)   (4,9)            (5,1)   (5,3)
//!           counts repeat: not marker  stale: does not  counts  a hole: damage
//! ```

use std::cmp::Ordering as Cmp;

use super::frame::{self, Owner};
use super::{Broker, BrokerError, IsAway, Place, Position, READ_BYTES};
use crate::faults::bug;

/// Reasons why a log cannot be read on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The broker could not be asked.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The log is another database's, or something else.
    #[error("{0}")]
    Foreign(String),
    /// Acknowledged groups are missing or damaged.
    #[error("{0}")]
    Damaged(String),
    /// It has groups of a later epoch than that of whoever takes it over, who needs this one.
    #[error("the log has groups of a later epoch; epoch {0} is needed to take it over")]
    LaterEpoch(u64),
}

impl IsAway for ReadError {
    fn is_away(&self) -> bool {
        matches!(self, ReadError::Broker(error) if error.is_away())
    }
}

/// A group that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Where it is.
    pub position: Position,
    /// Its payload; empty for a marker.
    pub payload: Vec<u8>,
}

/// Reads a log from a place on.
#[derive(Debug)]
pub struct Reader<'a> {
    broker: &'a dyn Broker,
    owner: Owner,
    /// The frame that was looked at last, counting or not.
    after: Option<Position>,
    /// The last group that counted.
    last: Option<Place>,
    /// The place at which the log has to begin, until it was found.
    anchor: Option<Place>,
    /// Whether it reads from the first frame on.
    from_start: bool,
    /// False: the first frame counts, whatever its place.
    is_begun: bool,
}

impl<'a> Reader<'a> {
    /// Reads the groups after `place`, which has to be in the log; `None`: from its first frame on.
    pub fn after(broker: &'a dyn Broker, owner: Owner, place: Option<Position>) -> Self {
        Reader {
            broker,
            owner,
            after: place.and_then(|place| before(place, broker.fences())),
            last: None,
            anchor: place.map(|position| position.place),
            from_start: place.is_none(),
            is_begun: true,
        }
    }

    /// Reads the groups from the first frame on, whichever it is.
    pub fn from_first(broker: &'a dyn Broker, owner: Owner) -> Self {
        Reader {
            is_begun: false,
            ..Self::after(broker, owner, None)
        }
    }

    /// The groups that come next. Empty: there are none.
    ///
    /// # Errors
    /// [`ReadError`]. After [`ReadError::Broker`] it may be asked again.
    pub fn read(&mut self) -> Result<Vec<Counted>, ReadError> {
        loop {
            let stored = match self.broker.read(self.after, READ_BYTES) {
                Err(BrokerError::Lost(_)) if self.start_over() => continue,
                stored => stored?,
            };
            if stored.is_empty() {
                let Some(anchor) = self.anchor else {
                    return Ok(Vec::new());
                };
                if self.start_over() {
                    continue;
                }
                return Err(self.no_anchor(anchor, None));
            }
            let mut counted = Vec::new();
            for one in stored {
                let frame = frame::decode(&one.frame).map_err(|error| {
                    let at = self.describe_after();
                    let said = format!(
                        "{}: the entry after {at} cannot be used: {error}",
                        self.broker.title()
                    );
                    match error {
                        frame::FrameError::Foreign => ReadError::Foreign(said),
                        _ => ReadError::Damaged(said),
                    }
                })?;
                if frame.owner != self.owner {
                    return Err(ReadError::Foreign(format!(
                        "{} belongs to another database or node (database {:032x}, node {}); configure a stream or \
                         topic of its own for each",
                        self.broker.title(),
                        u128::from_be_bytes(frame.owner.database),
                        frame.owner.node
                    )));
                }
                let position = Position {
                    place: frame.place,
                    offset: one.offset,
                };
                if let Some(anchor) = self.anchor {
                    match frame.place.cmp(&anchor) {
                        // Settled, or a late frame of an earlier epoch.
                        Cmp::Less => {}
                        Cmp::Equal => (self.anchor, self.last) = (None, Some(anchor)),
                        Cmp::Greater if self.start_over() => break,
                        Cmp::Greater => return Err(self.no_anchor(anchor, Some(frame.place))),
                    }
                } else if !std::mem::replace(&mut self.is_begun, true)
                    || self.counts(frame.place)?
                {
                    self.last = Some(frame.place);
                    counted.push(Counted {
                        position,
                        payload: frame.payload.to_vec(),
                    });
                }
                self.after = Some(position);
            }
            if !counted.is_empty() {
                return Ok(counted);
            }
        }
    }

    /// The last group that counted, or the place from which it reads.
    pub fn last(&self) -> Option<Place> {
        self.last
    }

    /// Reads from the first frame on, if it has not done so yet: the offset of the place is a hint, and the place
    /// is found by reading.
    fn start_over(&mut self) -> bool {
        if self.anchor.is_none() || self.from_start {
            return false;
        }
        (self.after, self.from_start) = (None, true);
        true
    }

    /// Whether the group at `place` counts.
    fn counts(&self, place: Place) -> Result<bool, ReadError> {
        let last = self.last.unwrap_or(Place {
            epoch: 0,
            number: 0,
        });
        let is_next = if place.epoch == last.epoch {
            if place.number <= last.number {
                return Ok(false);
            }
            place.number == last.number + 1
        } else if place.epoch < last.epoch {
            // Behind the marker of a later epoch: its writer was replaced, and acknowledged nothing of it.
            return Ok(bug("read_stale_epoch"));
        } else {
            place.number == 0
        };
        if is_next {
            return Ok(true);
        }
        Err(ReadError::Damaged(format!(
            "{} has a hole: group {place} follows {last}. Acknowledged orders may be in it, so Millrace does not \
             start; restore the broker's data, or give the missing orders up with `millrace queue abandon`",
            self.broker.title()
        )))
    }

    fn no_anchor(&self, anchor: Place, found: Option<Place>) -> ReadError {
        let found = found.map_or("it is empty".to_owned(), |found| {
            format!("it begins with group {found}")
        });
        ReadError::Damaged(format!(
            "{} does not reach back to group {anchor}, up to which orders are settled: {found}. Acknowledged orders \
             may be lost, so Millrace does not start; restore the broker's data, or give them up with `millrace queue \
             abandon`",
            self.broker.title()
        ))
    }

    fn describe_after(&self) -> String {
        match self.after {
            Some(after) => format!("group {}", after.place),
            None => "its beginning".to_owned(),
        }
    }
}

/// The position directly before this one, as far as reading goes; `None`: before everything. `by_place`: the
/// broker addresses frames by their place.
pub(super) fn before(position: Position, by_place: bool) -> Option<Position> {
    let Place { epoch, number } = position.place;
    if !by_place {
        let offset = position.offset.checked_sub(1)?;
        return Some(Position { offset, ..position });
    }
    let place = match (epoch, number) {
        (0 | 1, 0) => return None,
        (epoch, 0) => Place {
            epoch: epoch - 1,
            number: u64::MAX,
        },
        (epoch, number) => Place {
            epoch,
            number: number - 1,
        },
    };
    Some(Position { place, offset: 0 })
}
