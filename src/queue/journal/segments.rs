//! What keeps the journal in segments: the next one is made before it is needed, and those that
//! nobody needs any more are deleted, oldest first. A thread of its own, so that neither the
//! appender nor a worker waits for it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::disk::Disk;
use super::segment::{self, Identity, Segment, file_name};
use super::space::Space;
use crate::faults::crash_point;
use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering};

/// How often making a segment is tried again where the disk was full.
const RETRY: Duration = Duration::from_millis(500);
/// Sectors at the end of a segment that may stay empty, because a record does not fit into them.
const TAIL: i64 = super::RECORD_SECTORS_MAX as i64;

/// The segments of a running journal.
#[derive(Debug)]
pub(super) struct Segments {
    disk: Arc<dyn Disk>,
    identity: Identity,
    segments_max: usize,
    pub(super) space: Arc<Space>,
    state: Mutex<State>,
    changed: Condvar,
    /// Segments up to this number may be deleted; `u64::MAX` where nobody else needs them.
    confirmed: AtomicU64,
    /// Why there is no next segment, where there is none.
    full: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Those with content or about to have some, oldest first; the last is written to.
    segments: VecDeque<Arc<Segment>>,
    spare: Option<Arc<Segment>>,
    next_number: u64,
    stopping: bool,
}

impl Segments {
    /// Goes on from the segments that were found, and makes the first of its own. Returns it too.
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        identity: Identity,
        found: &[Arc<Segment>],
        segments_max: usize,
        retain: bool,
    ) -> std::io::Result<(Self, Arc<Segment>)> {
        found.iter().for_each(|segment| segment.seal());
        let number = found.last().map_or(1, |last| last.number + 1);
        let mut segments: VecDeque<_> = found.iter().map(Arc::clone).collect();
        let first = match segment::prepare(&*disk, &identity, number) {
            Err(_) if !retain && segments.len() > 1 => {
                // The disk is full of what is not needed any more. The last stays: it tells which
                // journal this is.
                while segments.len() > 1 {
                    if let Some(oldest) = segments.pop_front() {
                        disk.remove(&file_name(oldest.number))?;
                        disk.sync_directory()?;
                    }
                }
                segment::prepare(&*disk, &identity, number)?
            }
            prepared => prepared?,
        };
        let first = Arc::new(first);
        segments.push_back(Arc::clone(&first));
        let segments = Segments {
            disk,
            identity,
            segments_max: segments_max.max(2),
            space: Arc::new(Space::new(0)),
            state: Mutex::new(State {
                segments,
                spare: None,
                next_number: number + 1,
                stopping: false,
            }),
            changed: Condvar::new(),
            confirmed: AtomicU64::new(if retain { 0 } else { u64::MAX }),
            full: AtomicBool::new(false),
        };
        segments.space.give(segments.usable());
        Ok((segments, first))
    }

    /// Whether there will be no more room before something in it is decided: the limit in bytes is
    /// reached, or the disk is full. Otherwise the next segment is on its way.
    pub(super) fn is_full(&self) -> bool {
        let state = self.state.lock();
        self.full.load(Ordering::Relaxed)
            || (state.spare.is_none() && state.segments.len() >= self.segments_max)
    }

    /// Sectors of a segment that records are sure to find room in.
    fn usable(&self) -> i64 {
        self.identity.sectors() as i64 - 1 - TAIL
    }

    /// The thread's work, until it is stopped.
    pub(super) fn run(&self) {
        let mut state = self.state.lock();
        while !state.stopping {
            let mut retry = false;
            let oldest = state.segments.front().filter(|oldest| {
                // The last one is being written to.
                state.segments.len() > 1
                    && oldest.is_done()
                    && oldest.number <= self.confirmed.load(Ordering::Acquire)
            });
            if let Some(oldest) = oldest.map(Arc::clone) {
                drop(state);
                let removed = self.remove(&oldest);
                state = self.state.lock();
                match removed {
                    Ok(()) => {
                        // Only this thread takes from the front.
                        state.segments.pop_front();
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(segment = file_name(oldest.number), reason = %error, "could not delete a segment of the journal; it is tried again");
                        retry = true;
                    }
                }
            }
            if state.spare.is_none() && state.segments.len() < self.segments_max {
                let number = state.next_number;
                drop(state);
                let made = segment::prepare(&*self.disk, &self.identity, number);
                state = self.state.lock();
                match made {
                    Ok(segment) => {
                        state.next_number += 1;
                        state.spare = Some(Arc::new(segment));
                        self.space.give(self.usable());
                        if self.full.swap(false, Ordering::Relaxed) {
                            tracing::info!("the journal has room again");
                        }
                        self.changed.notify_all();
                    }
                    Err(error) => {
                        if !self.full.swap(true, Ordering::Relaxed) {
                            tracing::error!(reason = %error, "no further segment of the journal can be made; once the present ones are full, orders that ask for respond-async are refused");
                        }
                        self.changed.wait_for(&mut state, RETRY);
                    }
                }
                continue;
            }
            if retry {
                self.changed.wait_for(&mut state, RETRY);
            } else {
                self.changed.wait(&mut state);
            }
        }
    }

    /// Deletes every segment, once the thread has ended and everything is decided.
    pub(super) fn erase(&self) -> std::io::Result<()> {
        let mut state = self.state.lock();
        while let Some(oldest) = state.segments.front().map(Arc::clone) {
            self.remove(&oldest)?;
            state.segments.pop_front();
        }
        match state.spare.take() {
            Some(spare) => self.remove(&spare),
            None => Ok(()),
        }
    }

    fn remove(&self, segment: &Segment) -> std::io::Result<()> {
        crash_point("journal.before_retire");
        match self.disk.remove(&file_name(segment.number)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // One after the other: after a power loss there must be no gap.
        self.disk.sync_directory()?;
        crash_point("journal.after_retire");
        Ok(())
    }

    /// Makes the spare segment the one that is written to; waits for it where it is not ready.
    /// `left`: sectors that stay empty in the one before. `None`: the keeper was stopped.
    pub(super) fn next(&self, left: u64) -> Option<Arc<Segment>> {
        let mut state = self.state.lock();
        loop {
            if let Some(spare) = state.spare.take() {
                // The end of a segment was set aside; what was used of it was not counted.
                self.space.give(TAIL - left as i64);
                state.segments.push_back(Arc::clone(&spare));
                self.changed.notify_all();
                return Some(spare);
            }
            if state.stopping {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Counts an order's outcome in its segment.
    pub(super) fn settled(&self, by_segment: &[(u64, u64)]) {
        let state = self.state.lock();
        let Some(oldest) = state.segments.front().map(|oldest| oldest.number) else {
            return;
        };
        let mut done = false;
        for (number, orders) in by_segment {
            let index = number.checked_sub(oldest).map(|index| index as usize);
            let segment = index.and_then(|index| state.segments.get(index));
            if let Some(segment) = segment {
                done |= segment.settled(*orders);
            }
        }
        if done {
            self.changed.notify_all();
        }
    }

    /// Looks again: a segment is sealed and may be done.
    pub(super) fn look(&self) {
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    /// Allows segments up to `number` to be deleted once they are done.
    pub(super) fn confirm(&self, number: u64) {
        self.confirmed.fetch_max(number, Ordering::AcqRel);
        self.look();
    }

    /// The segments there are, oldest first.
    pub(super) fn segments(&self) -> Vec<Arc<Segment>> {
        self.state.lock().segments.iter().map(Arc::clone).collect()
    }

    /// Bytes on the disk, the spare included.
    pub(super) fn bytes(&self) -> u64 {
        let state = self.state.lock();
        let count = state.segments.len() + usize::from(state.spare.is_some());
        count as u64 * self.identity.segment_bytes
    }

    pub(super) fn stop(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }
}
