//! The running journal's segments: the next one is created before it is needed, and segments that
//! are done are deleted, oldest first. A thread of its own does both, so that neither the appender
//! nor a worker waits for it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::disk::Disk;
use super::segment::{self, Identity, Segment, file_name};
use crate::faults::crash_point;
use crate::queue::log::Space;
use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering};

/// Pause before the next attempt to create or delete a segment.
const RETRY: Duration = Duration::from_millis(500);
/// Sectors at the end of a segment that may stay empty, because a record does not fit.
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
    /// Segments up to this number may be deleted; `u64::MAX` if the journal does not retain them.
    confirmed: AtomicU64,
    /// Set while no further segment can be created, because the disk is full or fails.
    full: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Segments with records, oldest first; the last is being written to.
    segments: VecDeque<Arc<Segment>>,
    spare: Option<Arc<Segment>>,
    next_number: u64,
    stopping: bool,
}

impl Segments {
    /// Continues after the segments `found`. Returns the first segment of this process too.
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
                // The disk is full of replayed segments. The last is kept, because it has the
                // journal's id.
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

    /// Whether there will be no more room until orders are settled: the limit in bytes is reached,
    /// or the disk is full. If false, the next segment is being created.
    pub(super) fn is_full(&self) -> bool {
        let state = self.state.lock();
        self.full.load(Ordering::Relaxed)
            || (state.spare.is_none() && state.segments.len() >= self.segments_max)
    }

    /// Sectors of a segment that records are certain to fit into.
    fn usable(&self) -> i64 {
        self.identity.sectors() as i64 - 1 - TAIL
    }

    /// Main loop of the thread, until [`Segments::stop`].
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
                        // Only this thread removes from the front.
                        state.segments.pop_front();
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(
                            segment = file_name(oldest.number),
                            reason = %error,
                            "could not delete a segment of the journal; retrying"
                        );
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
                            tracing::error!(
                                reason = %error,
                                "cannot create a further segment of the journal; once the present \
                                 ones are full, orders with respond-async are refused; free disk \
                                 space or repair the disk"
                            );
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

    /// Deletes every segment, after the thread has ended and every order is settled.
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
        // One by one, so that a power loss leaves no gap.
        self.disk.sync_directory()?;
        crash_point("journal.after_retire");
        Ok(())
    }

    /// Makes the spare segment the current one, and waits for it if necessary. `left`: sectors that
    /// stay empty in the previous one. `None`: the thread was stopped.
    pub(super) fn next(&self, left: u64) -> Option<Arc<Segment>> {
        let mut state = self.state.lock();
        loop {
            if let Some(spare) = state.spare.take() {
                // The tail was set aside; correct the count by the part of it that was used.
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

    /// Counts settled orders, given as pairs of segment number and orders.
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

    /// Wakes the thread: a segment may be done.
    pub(super) fn look(&self) {
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    /// Permits deletion of segments up to `number` once they are done.
    pub(super) fn confirm(&self, number: u64) {
        self.confirmed.fetch_max(number, Ordering::AcqRel);
        self.look();
    }

    /// The segment of this number, until it is deleted.
    pub(super) fn find(&self, number: u64) -> Option<Arc<Segment>> {
        let state = self.state.lock();
        let oldest = state.segments.front()?.number;
        let index = usize::try_from(number.checked_sub(oldest)?).ok()?;
        state.segments.get(index).map(Arc::clone)
    }

    /// The segments, oldest first.
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
