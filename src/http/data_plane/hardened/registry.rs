//! Every connection of a server, for the threads that watch over them.
//!
//! A connection that has ended stays here for one or two ticks of the janitor. That is not
//! bookkeeping: the runtime's event loop may still look at the socket's record after it has made
//! the coroutine runnable, on another thread, which may have run it to its end by then. Keeping
//! the record for some time is what makes that look harmless. The client notices nothing: the
//! connection is shut down when it ends, and only the descriptor outlives it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::queue::SegQueue;
use parking_lot::Mutex;

use super::counters::CloseReason;
use super::peer::{Peer, Phase, State};

/// Where a connection stands in the registry.
pub(super) type Slot = usize;

/// How many candidates for eviction one pass over the connections collects, so that a flood of
/// new connections against a full server costs a pass in so many, not one each.
const CANDIDATES_MAX: usize = 256;

/// The connections of one server.
#[derive(Default)]
pub(super) struct Registry {
    peers: Mutex<Peers>,
    ended: SegQueue<Slot>,
    // Connections that count against the limit: neither ended nor doomed. A plain count that is
    // compared with a limit; only the acceptor adds to it.
    admitted: AtomicUsize,
}

#[derive(Default)]
struct Peers {
    slots: Vec<Option<Arc<Peer>>>,
    free: Vec<Slot>,
    dying: Vec<Slot>,
    candidates: Vec<(Slot, State)>,
    barren_ms: Option<u64>,
}

impl Registry {
    pub(super) fn admitted(&self) -> usize {
        self.admitted.load(Ordering::Relaxed)
    }

    /// Connections whose descriptor is held, those that have ended lately included.
    pub(super) fn held(&self) -> usize {
        let peers = self.peers.lock();
        peers.slots.len() - peers.free.len()
    }

    pub(super) fn insert(&self, peer: Arc<Peer>) -> Slot {
        self.admitted.fetch_add(1, Ordering::Relaxed);
        let mut peers = self.peers.lock();
        match peers.free.pop() {
            Some(slot) => {
                if let Some(place) = peers.slots.get_mut(slot) {
                    *place = Some(peer);
                }
                slot
            }
            None => {
                peers.slots.push(Some(peer));
                peers.slots.len() - 1
            }
        }
    }

    /// Called once by a connection at its end.
    pub(super) fn end(&self, slot: Slot, was_doomed: bool) {
        if !was_doomed {
            self.admitted.fetch_sub(1, Ordering::Relaxed);
        }
        self.ended.push(slot);
    }

    fn doom(&self, peer: &Peer, seen: State, reason: CloseReason) -> bool {
        let doomed = peer.doom(seen, reason);
        if doomed {
            self.admitted.fetch_sub(1, Ordering::Relaxed);
        }
        doomed
    }

    /// Releases the connections that had ended by the tick before.
    pub(super) fn reap(&self) {
        // Closing descriptors takes its time, so it happens after the lock is released.
        let mut released = Vec::new();
        let mut peers = self.peers.lock();
        let dead = std::mem::take(&mut peers.dying);
        for slot in dead {
            if let Some(place) = peers.slots.get_mut(slot) {
                released.extend(place.take());
                peers.free.push(slot);
            }
        }
        while let Some(slot) = self.ended.pop() {
            peers.dying.push(slot);
        }
        drop(peers);
    }

    /// Dooms each connection for which `judge` gives a reason.
    pub(super) fn doom_where(&self, mut judge: impl FnMut(&Peer, State) -> Option<CloseReason>) {
        for peer in self.peers.lock().slots.iter().flatten() {
            let seen = peer.state();
            if let Some(reason) = judge(peer, seen) {
                self.doom(peer, seen, reason);
            }
        }
    }

    /// Evicts one connection to make room: the one that is longest at its last words, else at an
    /// incomplete request, else idle. False when every one is being served.
    pub(super) fn make_room(&self, now_ms: u64) -> bool {
        let mut peers = self.peers.lock();
        loop {
            while let Some((slot, seen)) = peers.candidates.pop() {
                if let Some(Some(peer)) = peers.slots.get(slot)
                    && self.doom(peer, seen, CloseReason::Evicted)
                {
                    return true;
                }
            }
            // Another pass within the same tick would find what the last one found.
            if peers.barren_ms == Some(now_ms) {
                return false;
            }
            peers.collect_candidates();
            if peers.candidates.is_empty() {
                peers.barren_ms = Some(now_ms);
                return false;
            }
        }
    }
}

impl Peers {
    fn collect_candidates(&mut self) {
        let mut found: Vec<(u8, u64, Slot, State)> = Vec::new();
        for (slot, peer) in self.slots.iter().enumerate() {
            let Some(state) = peer.as_ref().map(|peer| peer.state()) else {
                continue;
            };
            let rank = match state.phase() {
                Phase::Lingering | Phase::Late => 0,
                Phase::Reading => 1,
                Phase::Idle => 2,
                Phase::Serving | Phase::Writing | Phase::Doomed => continue,
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
