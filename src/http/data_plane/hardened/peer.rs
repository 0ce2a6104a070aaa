//! What the other threads know of a connection: its socket and its phase.
//!
//! ```text
//!            first byte           request complete          answer written
//!   Idle ──────────────► Reading ──────────────► Serving ──────────────► Idle …
//!    │ request complete at once ───────────────────▲ │ │ answer not read
//!    │                      │                        │ └────► Writing ───► Idle …
//!    │                      └─ not in time ─► Late ─┴ closing ─► Lingering ─► gone
//!    └───────────────────────── any phase but Serving may be ──► Doomed ─► gone
//! ```
//!
//! The connection's coroutine moves between phases; the janitor, the acceptor and the drain doom.
//! Both do it by compare-and-swap on one word, so a deadline can never cut a request that has
//! just entered the service: one of the two wins, and the loser sees it.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use may::io::{CoIo, WaitIo};

use super::counters::CloseReason;

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Between requests.
    Idle,
    /// Part of a request is here.
    Reading,
    /// The service runs.
    Serving,
    /// An answer waits for the client to read.
    Writing,
    /// The last answer is written; what the client still sends is thrown away.
    Lingering,
    /// The janitor found its request late, and its coroutine is about to answer so.
    Late,
    /// Shut down by another thread.
    Doomed,
}

/// A phase and since when (milliseconds of the coarse clock) it lasts, or, for `Doomed`, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(u64);

impl State {
    const PHASE_BITS: u32 = 3;

    pub(super) fn new(phase: Phase, since_ms: u64) -> Self {
        Self((since_ms << Self::PHASE_BITS) | phase as u64)
    }

    pub(super) fn phase(self) -> Phase {
        match self.0 & ((1 << Self::PHASE_BITS) - 1) {
            0 => Phase::Idle,
            1 => Phase::Reading,
            2 => Phase::Serving,
            3 => Phase::Writing,
            4 => Phase::Lingering,
            5 => Phase::Late,
            _ => Phase::Doomed,
        }
    }

    pub(super) fn since_ms(self) -> u64 {
        self.0 >> Self::PHASE_BITS
    }
}

/// The shared part of one connection.
pub(super) struct Peer {
    // Everything that is decided through this word is in the word, so its accesses are relaxed.
    state: AtomicU64,
    // Set while idle with large buffers, for the janitor to ask for them back.
    bloated: AtomicBool,
    // Declared, and so dropped, before the last handle of the socket: the runtime forgets a
    // descriptor by its number, which must not be another connection's by then.
    io: CoIo<Arc<TcpStream>>,
    socket: Arc<TcpStream>,
}

impl Peer {
    pub(super) fn new(socket: TcpStream, now_ms: u64) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let socket = Arc::new(socket);
        Ok(Self {
            state: AtomicU64::new(State::new(Phase::Idle, now_ms).0),
            bloated: AtomicBool::new(false),
            io: CoIo::new(socket.clone())?,
            socket,
        })
    }

    /// The socket, which never blocks.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(super) fn state(&self) -> State {
        State(self.state.load(Ordering::Relaxed))
    }

    /// Moves the connection on; false when another thread has doomed it meanwhile.
    pub(super) fn enter(&self, from: State, to: State) -> bool {
        // A coroutine may find itself doomed before its first step: that is no state to leave.
        from.phase() != Phase::Doomed
            && self
                .state
                .compare_exchange(from.0, to.0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Shuts the connection down if it is still in the state that `seen` shows.
    pub(super) fn doom(&self, seen: State, reason: CloseReason) -> bool {
        let doomed = self.enter(seen, State::new(Phase::Doomed, reason as u64));
        if doomed {
            // The coroutine is woken by the end of its stream. An error means it has ended itself.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        doomed
    }

    /// Has the coroutine answer that its request is late, if it is still in the state of `seen`.
    pub(super) fn expire(&self, seen: State, now_ms: u64) {
        if self.enter(seen, State::new(Phase::Late, now_ms)) {
            self.io.waker().wakeup();
        }
    }

    /// The reason it was doomed for, if it was.
    pub(super) fn doomed_for(&self) -> Option<CloseReason> {
        let state = self.state();
        (state.phase() == Phase::Doomed).then(|| {
            CloseReason::ALL
                .into_iter()
                .find(|reason| *reason as u64 == state.since_ms())
                .unwrap_or(CloseReason::Lingered)
        })
    }

    /// Waits, in the connection's coroutine, for any event of the socket; returns the events.
    pub(super) fn wait(&self) -> usize {
        self.io.wait_io()
    }

    pub(super) fn set_bloated(&self, bloated: bool) {
        if self.bloated.load(Ordering::Relaxed) != bloated {
            self.bloated.store(bloated, Ordering::Relaxed);
        }
    }

    /// Wakes a bloated connection once, so that it gives its buffers back.
    pub(super) fn nudge_if_bloated(&self) {
        if self.bloated.load(Ordering::Relaxed) && self.bloated.swap(false, Ordering::Relaxed) {
            self.io.waker().wakeup();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doom_is_final_and_happens_once() {
        crate::http::data_plane::runtime::configure(2);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let socket = TcpStream::connect(address).expect("a connection");
        let peer = Peer::new(socket, 7).expect("a peer");
        let fresh = peer.state();
        assert!(peer.doom(fresh, CloseReason::Evicted));
        assert!(!peer.doom(fresh, CloseReason::Drained));
        assert!(!peer.doom(peer.state(), CloseReason::Drained));
        assert!(!peer.enter(fresh, State::new(Phase::Serving, 8)));
        assert!(!peer.enter(peer.state(), State::new(Phase::Serving, 8)));
        assert_eq!(peer.doomed_for(), Some(CloseReason::Evicted));
    }

    #[test]
    fn a_state_keeps_its_phase_and_its_time() {
        for phase in [
            Phase::Idle,
            Phase::Reading,
            Phase::Serving,
            Phase::Writing,
            Phase::Lingering,
            Phase::Late,
            Phase::Doomed,
        ] {
            let state = State::new(phase, 12_345);
            assert_eq!((state.phase(), state.since_ms()), (phase, 12_345));
        }
    }
}
