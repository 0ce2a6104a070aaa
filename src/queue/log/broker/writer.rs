//! Appending to a broker: one group in flight, each under its number until it is there for certain.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::frame::{self, Owner};
use super::log::BrokerLog;
use super::reader::before;
use super::{Broker, BrokerError, Pages, Place, Position, SendError, Stored};
use crate::faults::{bug, crash_point};
use crate::queue::log::{AppendError, GroupAt, LogWriter, NewGroup};

/// Bytes of frames kept in memory, to be appended again if the broker loses them in a failover.
const KEPT_BYTES: usize = 16 << 20;

/// A frame that the broker has confirmed.
#[derive(Debug)]
struct Kept {
    position: Position,
    frame: Vec<u8>,
}

/// Bytes that a look compares at once: the next group waits for them.
const LOOK_BYTES: usize = 64 << 10;

/// How far a look has come.
#[derive(Clone, Copy, Debug)]
struct Look {
    after: Option<Position>,
    /// The kept frame that has to come next.
    next: Place,
}

/// The writing end of a broker's log.
#[derive(Debug)]
pub(super) struct BrokerWriter {
    log: Arc<BrokerLog>,
    broker: Arc<dyn Broker>,
    owner: Owner,
    /// The marker of this process: everything before it is settled.
    first: Place,
    /// The next group.
    next: Place,
    /// The last frames that were confirmed, the marker or the newest ones that fit; never empty.
    kept: VecDeque<Kept>,
    kept_bytes: usize,
    /// The frame whose outcome is unknown.
    doubt: Option<Vec<u8>>,
    /// Whether the broker may have failed over since the last success: its tail is compared before the next
    /// group.
    suspects: bool,
    look: Option<Look>,
    /// The last group at the end of the last comparison. If nothing was appended since, a look begins here: a failover
    /// loses the end of a log, so this group too.
    compared: Place,
}

impl BrokerWriter {
    /// A writer that goes on after its own marker.
    pub(super) fn new(
        log: Arc<BrokerLog>,
        broker: Arc<dyn Broker>,
        owner: Owner,
        marker: Position,
    ) -> Self {
        let frame = frame::encode(owner, marker.place, &[]);
        BrokerWriter {
            log,
            broker,
            owner,
            first: marker.place,
            next: Place {
                number: marker.place.number + 1,
                ..marker.place
            },
            kept_bytes: frame.len(),
            kept: VecDeque::from([Kept {
                position: marker,
                frame,
            }]),
            doubt: None,
            suspects: false,
            look: None,
            compared: marker.place,
        }
    }

    fn last(&self) -> Position {
        // Never empty.
        self.kept.back().map_or(
            Position {
                place: self.next,
                offset: 0,
            },
            |kept| kept.position,
        )
    }

    /// Sends the frame and finds out where it is.
    fn send(&mut self, frame: &[u8], is_repeat: bool) -> Result<Position, AppendError> {
        let was_sound = !self.suspects;
        match self.send_once(frame, is_repeat) {
            // As after a connection that was idle for too long: connecting anew is all that it takes.
            Err(AppendError::NotNow(_)) if was_sound && !is_repeat => {
                self.send_once(frame, is_repeat)
            }
            sent => sent,
        }
    }

    fn send_once(&mut self, frame: &[u8], is_repeat: bool) -> Result<Position, AppendError> {
        if self.suspects {
            self.reconnect()?;
            // A broker that fences says by itself that it has the frame, and makes sure that it is durable.
            if is_repeat
                && !self.broker.fences()
                && let Some(found) = self.find_in_tail(frame)?
            {
                self.check_between(self.last(), found)?;
                self.suspects = false;
                return Ok(found);
            }
            self.suspects = false;
        }
        let sent = if bug("acknowledge_before_broker") {
            let _ = self.broker.send(self.next, frame);
            Ok(self.last().offset + 1)
        } else {
            self.broker.send(self.next, frame)
        };
        match sent {
            Ok(offset) => {
                let at = Position {
                    place: self.next,
                    offset,
                };
                match self.check_between(self.last(), at) {
                    Ok(()) => Ok(at),
                    // It is stored. What stands before it is not known yet.
                    Err(AppendError::NotNow(reason) | AppendError::Unknown(reason)) => {
                        self.suspects = true;
                        Err(AppendError::Unknown(reason))
                    }
                    Err(error) => Err(error),
                }
            }
            Err(SendError::Unknown(reason)) => {
                self.suspects = true;
                if bug("unknown_is_success") {
                    return Ok(Position {
                        place: self.next,
                        offset: self.last().offset + 1,
                    });
                }
                Err(AppendError::Unknown(reason))
            }
            Err(SendError::Stale(reason)) => {
                // Says so if the group is a later process's.
                self.find_in_tail(frame)?;
                Err(AppendError::Final(format!(
                    "the broker has a later group of this process: {reason}"
                )))
            }
            Err(error @ (SendError::Full(_) | SendError::Away(_) | SendError::Refused(_))) => {
                self.suspects = true;
                Err(AppendError::NotNow(error.to_string()))
            }
        }
    }

    /// Connects, to a server that may be another one, and appends again what it has lost.
    fn reconnect(&mut self) -> Result<(), AppendError> {
        self.look = None;
        let checked = self.broker.check();
        checked.map_err(|error| AppendError::NotNow(error.to_string()))?;
        self.compare_tail()
    }

    /// Rule 2: nothing that counts more lies between `last`, which this process wrote before, and `at`.
    fn check_between(&self, last: Position, at: Position) -> Result<(), AppendError> {
        if self.broker.fences() || at.offset == last.offset + 1 || bug("no_fence") {
            return Ok(());
        }
        if at.offset <= last.offset {
            // The broker has lost what stood there, in a failover that went unnoticed. The comparison of the log's
            // end says how much.
            return Err(AppendError::Unknown(format!(
                "the broker gave offset {} after {}: it has lost groups",
                at.offset, last.offset
            )));
        }
        let (mut pages, mut reached) = (Pages::after(&*self.broker, Some(last)), last.offset);
        while reached + 1 < at.offset {
            let page = self.read(&mut pages)?;
            let Some(end) = page.last() else { break };
            reached = end.offset;
        }
        Ok(())
    }

    /// After a failure the broker may be another one, which lacks the last groups: those are appended again under
    /// their numbers.
    fn compare_tail(&mut self) -> Result<(), AppendError> {
        let kept_from = self.drop_forgotten();
        let (begins_at, present) = self.tail()?;
        // It deletes by age.
        if let Some(begins_at) = begins_at
            && self
                .kept
                .iter()
                .any(|kept| kept.position.place == begins_at)
        {
            while self
                .kept
                .front()
                .is_some_and(|oldest| oldest.position.place != begins_at)
            {
                self.drop_oldest();
            }
        }
        for kept in &mut self.kept {
            let place = kept.position.place;
            kept.position.offset = present.get(&place).copied().unwrap_or(kept.position.offset);
        }
        let is_lost = |kept: &Kept| !present.contains_key(&kept.position.place);
        let from = self
            .kept
            .iter()
            .position(is_lost)
            .unwrap_or(self.kept.len());
        // What is lost has to be the end of the log, and to begin behind a group that is there: only then are the
        // groups before it known to be there, and the lost ones come into their order again.
        let is_end = !present.contains_key(&self.next) && self.kept.iter().skip(from).all(is_lost);
        // Or nothing of this process is there, and everything before it was settled and may be forgotten.
        let is_all = from == 0
            && self
                .kept
                .front()
                .is_some_and(|oldest| oldest.position.place <= kept_from.max(self.first))
            && !present.keys().any(|place| place.epoch == self.next.epoch);
        if (from == 0 && !is_all) || (from < self.kept.len() && !is_end) {
            return Err(AppendError::Final(format!(
                "{} has lost acknowledged groups from {} on, more than this process can append again; it writes their \
                 orders as long as it runs",
                self.broker.title(),
                self.kept[from.min(self.kept.len() - 1)].position.place
            )));
        }
        let lost: Vec<usize> = (from..self.kept.len()).collect();
        if !lost.is_empty() {
            tracing::warn!(
                groups = lost.len(),
                "{} has lost groups in a failover; they are appended again",
                self.broker.title()
            );
        }
        for index in lost {
            let kept = &self.kept[index];
            let sent = self.broker.send(kept.position.place, &kept.frame);
            let offset = sent.map_err(|error| AppendError::NotNow(error.to_string()))?;
            let at = Position {
                offset,
                ..kept.position
            };
            match index.checked_sub(1) {
                Some(before) => self.check_between(self.kept[before].position, at)?,
                // A marker may have come since the look at the tail, before the first of all that is there.
                None => {
                    let mut pages = Pages::after(&*self.broker, None);
                    while !self.read(&mut pages)?.is_empty() {}
                }
            }
            self.kept[index].position = at;
        }
        self.compared = self.last().place;
        Ok(())
    }

    /// The places from the oldest kept frame on, each with its first offset. Also the first frame of the log, if it
    /// was read from there: after a failover the kept frame may stand elsewhere, and a later marker before it.
    fn tail(&self) -> Result<(Option<Place>, HashMap<Place, u64>), AppendError> {
        let oldest = self.kept.front().map(|kept| kept.position);
        let from = oldest.and_then(|oldest| before(oldest, self.broker.fences()));
        let mut pages = Pages::after(&*self.broker, from);
        let first = match pages.read() {
            Ok(page) if self.broker.fences() || page.first().map(Stored::position) == oldest => {
                Some(self.unfenced(page)?)
            }
            Ok(_) | Err(BrokerError::Lost(_)) => None,
            Err(error) => return Err(AppendError::NotNow(error.to_string())),
        };
        let is_there = first.is_some();
        let mut page = match first {
            Some(page) => page,
            None => {
                pages = Pages::after(&*self.broker, None);
                self.read(&mut pages)?
            }
        };
        let (mut begins_at, mut places) = (None, HashMap::new());
        while !page.is_empty() {
            for stored in &page {
                let Some(place) = stored.frame_place() else {
                    continue;
                };
                if !is_there {
                    begins_at.get_or_insert(place);
                }
                places.entry(place).or_insert(stored.offset);
            }
            page = self.read(&mut pages)?;
        }
        Ok((begins_at, places))
    }

    /// The position of the frame in doubt, if the broker has it.
    fn find_in_tail(&self, frame: &[u8]) -> Result<Option<Position>, AppendError> {
        let mut pages = Pages::after(&*self.broker, Some(self.last()));
        loop {
            let page = self.read(&mut pages)?;
            if page.is_empty() {
                return Ok(None);
            }
            if let Some(found) = page.iter().find(|stored| stored.frame == frame) {
                return Ok(Some(Position {
                    place: self.next,
                    offset: found.offset,
                }));
            }
        }
    }

    /// The next frames behind something of this process. A later epoch among them fences it.
    fn read(&self, pages: &mut Pages<'_>) -> Result<Vec<Stored>, AppendError> {
        let page = pages.read().map_err(|error| match error {
            BrokerError::Lost(what) => AppendError::Final(format!(
                "{} has lost acknowledged groups: {what}",
                self.broker.title()
            )),
            error => AppendError::NotNow(error.to_string()),
        })?;
        self.unfenced(page)
    }

    fn unfenced(&self, page: Vec<Stored>) -> Result<Vec<Stored>, AppendError> {
        let newest = page
            .iter()
            .filter_map(Stored::frame_place)
            .map(|place| place.epoch)
            .max();
        match newest.filter(|newest| *newest > self.next.epoch) {
            Some(newest) => Err(self.fenced(newest)),
            None => Ok(page),
        }
    }

    fn fenced(&self, by: u64) -> AppendError {
        AppendError::Final(format!(
            "another process has taken {} over (epoch {by}, ours is {})",
            self.broker.title(),
            self.next.epoch
        ))
    }

    fn keep(&mut self, position: Position, frame: Vec<u8>) {
        self.kept_bytes += frame.len();
        self.kept.push_back(Kept { position, frame });
        while self.kept_bytes > KEPT_BYTES && self.kept.len() > 1 {
            self.drop_oldest();
        }
    }

    /// What the broker was allowed to forget cannot be compared. Returns the first place that it may not forget.
    fn drop_forgotten(&mut self) -> Place {
        let kept_from = self.log.kept_from();
        while self.kept.len() > 1
            && let Some(oldest) = self.kept.front()
            && oldest.position.place < kept_from
        {
            self.drop_oldest();
        }
        kept_from
    }

    /// Compares the next page of the log with what is kept, and says whether it was the last one. `None`: it is not as
    /// it was kept, or the server may be another one.
    fn compare_page(&mut self) -> Result<Option<bool>, BrokerError> {
        let mut look = match self.look.take() {
            Some(look) => look,
            None if self.broker.check()?.is_anew || self.suspects => return Ok(None),
            None => self.new_look(),
        };
        let page = self.broker.read(look.after, LOOK_BYTES)?;
        let Some(last) = page.last().map(Stored::position) else {
            if look.next != self.next {
                return Ok(None);
            }
            self.compared = self.last().place;
            return Ok(Some(true));
        };
        look.after = Some(last);
        let kept_from = self.log.kept_from();
        for stored in &page {
            // Before what is kept, or a group that was sent twice.
            let Some(place) = stored.frame_place().filter(|place| *place >= look.next) else {
                continue;
            };
            // It was allowed to forget more since the look began.
            look.next = look.next.max(kept_from.min(place));
            let kept = self.kept_at(place);
            let is_elsewhere = kept.is_some_and(|kept| kept.position.offset != stored.offset);
            if place != look.next || is_elsewhere {
                return Ok(None);
            }
            look.next.number += 1;
        }
        self.look = Some(look);
        Ok(Some(false))
    }

    fn new_look(&mut self) -> Look {
        self.drop_forgotten();
        let last = self.last();
        let begin = match self.kept.front() {
            Some(oldest) if last.place != self.compared => oldest.position,
            _ => last,
        };
        Look {
            after: before(begin, self.broker.fences()),
            next: begin.place,
        }
    }

    /// The frame of a group of this process, if it is still kept: numbers have no gaps.
    fn kept_at(&self, place: Place) -> Option<&Kept> {
        let oldest = self.kept.front()?.position.place.number;
        self.kept.get(place.number.checked_sub(oldest)? as usize)
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.kept.pop_front() {
            self.kept_bytes -= oldest.frame.len();
        }
    }
}

impl LogWriter for BrokerWriter {
    fn room(&mut self, _at_least: usize) -> Option<usize> {
        self.log.begin_span_if_due();
        // The longest record is far shorter than the shortest limit of a broker.
        Some(self.broker.frame_max() - frame::HEAD)
    }

    fn span(&self) -> u64 {
        self.log.span()
    }

    fn probe(&mut self) -> Result<(), AppendError> {
        self.suspects = true;
        self.reconnect()?;
        self.suspects = false;
        Ok(())
    }

    fn look(&mut self) -> Result<bool, AppendError> {
        match self.compare_page() {
            Ok(Some(is_whole)) => Ok(is_whole),
            // The whole comparison says what has happened.
            Ok(None) | Err(BrokerError::Lost(_)) => self.probe().map(|()| true),
            Err(error) => {
                self.suspects = true;
                Err(AppendError::NotNow(error.to_string()))
            }
        }
    }

    fn append(&mut self, group: &NewGroup<'_>, reserved: u32) -> Result<GroupAt, AppendError> {
        let (frame, is_repeat) = match self.doubt.take() {
            Some(frame) => (frame, true),
            None => (frame::encode(self.owner, self.next, group.payload), false),
        };
        if !is_repeat {
            // Before it is sent: from then on the broker may have the orders.
            self.log.add_outstanding(group.orders.into());
        }
        crash_point("log.before_send");
        match self.send(&frame, is_repeat) {
            Ok(position) => {
                crash_point("log.after_send");
                let at = GroupAt {
                    span: self.log.span(),
                    place: position.place.number,
                    length: frame.len() as u32,
                    group: position.offset,
                    records: group.records,
                    ids: group.ids,
                };
                self.log.appended(position, frame.len(), reserved);
                self.next.number += 1;
                self.keep(position, frame);
                Ok(at)
            }
            Err(AppendError::NotNow(reason)) if !is_repeat => {
                self.log.remove_outstanding(group.orders.into());
                Err(AppendError::NotNow(reason))
            }
            // Unknown now, or still: a later attempt that came to nothing does not settle it.
            Err(error) => {
                self.doubt = Some(frame);
                Err(error)
            }
        }
    }
}
