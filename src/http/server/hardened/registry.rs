//! Every connection of a server, for the reaper, the acceptor and the drain.
//!
//! A connection that has ended stays here for one or two ticks of the reaper. This is a matter of
//! memory safety: the runtime's event loop may still read the socket's record after it has made the
//! coroutine runnable on another thread, which may have run it to its end by then. The delay keeps
//! the record alive for that read. The client notices nothing: the connection is shut down when it
//! ends, and only the descriptor outlives it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::queue::SegQueue;
use parking_lot::Mutex;

use super::conn_state::{ConnState, Phase, PhaseStamp};
use super::counters::CloseReason;

/// The index of a connection in the registry.
pub(super) type Slot = usize;

/// How many candidates for eviction one pass over the connections collects, so that a flood of
/// new connections against a full server costs a pass in so many, not one each.
const CANDIDATES_MAX: usize = 256;

/// The connections of one server.
#[derive(Default)]
pub(super) struct Registry {
    table: Mutex<Table>,
    ended: SegQueue<Slot>,
    // Connections that count against the limit: neither ended nor closed. A plain count that is
    // compared with a limit; only the acceptor adds to it.
    admitted: AtomicUsize,
}

#[derive(Default)]
struct Table {
    slots: Vec<Option<Arc<ConnState>>>,
    free: Vec<Slot>,
    dying: Vec<Slot>,
    candidates: Vec<(Slot, PhaseStamp)>,
    barren_ms: Option<u64>,
}

impl Registry {
    pub(super) fn admitted(&self) -> usize {
        self.admitted.load(Ordering::Relaxed)
    }

    /// Connections whose descriptor is held, those that have ended lately included.
    pub(super) fn held(&self) -> usize {
        let table = self.table.lock();
        table.slots.len() - table.free.len()
    }

    pub(super) fn insert(&self, conn: Arc<ConnState>) -> Slot {
        self.admitted.fetch_add(1, Ordering::Relaxed);
        let mut table = self.table.lock();
        match table.free.pop() {
            Some(slot) => {
                if let Some(place) = table.slots.get_mut(slot) {
                    *place = Some(conn);
                }
                slot
            }
            None => {
                table.slots.push(Some(conn));
                table.slots.len() - 1
            }
        }
    }

    /// Called once by a connection at its end.
    pub(super) fn end(&self, slot: Slot, was_closed: bool) {
        if !was_closed {
            self.admitted.fetch_sub(1, Ordering::Relaxed);
        }
        self.ended.push(slot);
    }

    fn close(&self, conn: &ConnState, seen: PhaseStamp, reason: CloseReason) -> bool {
        let closed = conn.close(seen, reason);
        if closed {
            self.admitted.fetch_sub(1, Ordering::Relaxed);
        }
        closed
    }

    /// Releases the connections that had ended by the tick before.
    pub(super) fn reap(&self) {
        // Closing descriptors takes its time, so it happens after the lock is released.
        let mut released = Vec::new();
        let mut table = self.table.lock();
        let dead = std::mem::take(&mut table.dying);
        for slot in dead {
            if let Some(place) = table.slots.get_mut(slot) {
                released.extend(place.take());
                table.free.push(slot);
            }
        }
        while let Some(slot) = self.ended.pop() {
            table.dying.push(slot);
        }
        drop(table);
    }

    /// Closes each connection for which `reason_for` gives a reason.
    pub(super) fn close_where(
        &self,
        mut reason_for: impl FnMut(&ConnState, PhaseStamp) -> Option<CloseReason>,
    ) {
        for conn in self.table.lock().slots.iter().flatten() {
            let seen = conn.state();
            if let Some(reason) = reason_for(conn, seen) {
                self.close(conn, seen, reason);
            }
        }
    }

    /// Evicts one connection to make room: the one that has lingered longest, else the oldest with an
    /// incomplete request, else the longest idle one. False if all are being served.
    pub(super) fn make_room(&self, now_ms: u64) -> bool {
        let mut table = self.table.lock();
        loop {
            while let Some((slot, seen)) = table.candidates.pop() {
                if let Some(Some(conn)) = table.slots.get(slot)
                    && self.close(conn, seen, CloseReason::Evicted)
                {
                    return true;
                }
            }
            // Another pass within the same tick would find the same.
            if table.barren_ms == Some(now_ms) {
                return false;
            }
            table.collect_candidates();
            if table.candidates.is_empty() {
                table.barren_ms = Some(now_ms);
                return false;
            }
        }
    }
}

impl Table {
    fn collect_candidates(&mut self) {
        let mut found: Vec<(u8, u64, Slot, PhaseStamp)> = Vec::new();
        for (slot, conn) in self.slots.iter().enumerate() {
            let Some(state) = conn.as_ref().map(|conn| conn.state()) else {
                continue;
            };
            let rank = match state.phase() {
                Phase::Lingering | Phase::Late => 0,
                Phase::Reading => 1,
                Phase::Idle => 2,
                Phase::Serving | Phase::Writing | Phase::Closed => continue,
            };
            found.push((rank, state.since_ms(), slot, state));
        }
        let keep = found.len().min(CANDIDATES_MAX);
        if keep < found.len() {
            found.select_nth_unstable_by_key(keep, |(rank, since, ..)| (*rank, *since));
            found.truncate(keep);
        }
        // The first to go is popped from the end.
        found.sort_unstable_by_key(|(rank, since, ..)| std::cmp::Reverse((*rank, *since)));
        self.candidates = found
            .into_iter()
            .map(|(.., slot, state)| (slot, state))
            .collect();
    }
}
