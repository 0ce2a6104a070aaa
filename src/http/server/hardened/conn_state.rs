//! The part of a connection that other threads see: its socket and its phase.
//!
//! ```text
//!            first byte           request complete          answer written
//!   Idle ──────────────► Reading ──────────────► Serving ──────────────► Idle …
//!    │ request complete at once ───────────────────▲ │ │ answer not read
//!    │                      │                        │ └────► Writing ───► Idle …
//!    │                      └─ not in time ─► Late ─┴ closing ─► Lingering ─► gone
//!    └───────────────────────── any phase but Serving may be ──► Closed ─► gone
//! ```
//!
//! The connection's coroutine moves between phases; the reaper, the acceptor and the drain
//! close. Both do it by compare-and-swap on one word, so a deadline can never cut a request that has
//! just entered the service: one of the two wins, and the loser sees it.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use may::io::{CoIo, WaitIo};

use super::counters::CloseReason;

/// The phase of a connection.
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
    /// The reaper found its request late, and its coroutine is about to answer so.
    Late,
    /// Shut down by another thread.
    Closed,
}

/// A phase with its beginning in milliseconds of the coarse clock, or, for `Closed`, its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PhaseStamp(u64);

impl PhaseStamp {
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
            _ => Phase::Closed,
        }
    }

    pub(super) fn since_ms(self) -> u64 {
        self.0 >> Self::PHASE_BITS
    }
}

/// The shared part of one connection.
pub(super) struct ConnState {
    // A PhaseStamp. It publishes no other memory, so its accesses are relaxed.
    state: AtomicU64,
    // Set while idle with large buffers, for the reaper to ask for them back.
    bloated: AtomicBool,
    // Declared, and so dropped, before the last handle of the socket: the runtime forgets a
    // descriptor by its number, which must not be another connection's by then.
    io: CoIo<Arc<TcpStream>>,
    socket: Arc<TcpStream>,
}

impl ConnState {
    pub(super) fn new(socket: TcpStream, now_ms: u64) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let socket = Arc::new(socket);
        Ok(Self {
            state: AtomicU64::new(PhaseStamp::new(Phase::Idle, now_ms).0),
            bloated: AtomicBool::new(false),
            io: CoIo::new(socket.clone())?,
            socket,
        })
    }

    /// The socket, which never blocks.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(super) fn state(&self) -> PhaseStamp {
        PhaseStamp(self.state.load(Ordering::Relaxed))
    }

    /// Moves the connection on; false when another thread has closed it meanwhile.
    pub(super) fn enter(&self, from: PhaseStamp, to: PhaseStamp) -> bool {
        // A coroutine may find itself closed before its first step: that is no state to leave.
        from.phase() != Phase::Closed
            && self
                .state
                .compare_exchange(from.0, to.0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Shuts the connection down if it is still in the state that `seen` shows.
    pub(super) fn close(&self, seen: PhaseStamp, reason: CloseReason) -> bool {
        let closed = self.enter(seen, PhaseStamp::new(Phase::Closed, reason as u64));
        if closed {
            // The coroutine is woken by the end of its stream. An error means it has ended itself.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        closed
    }

    /// Has the coroutine answer that its request is late, if it is still in the state of `seen`.
    pub(super) fn expire(&self, seen: PhaseStamp, now_ms: u64) {
        if self.enter(seen, PhaseStamp::new(Phase::Late, now_ms)) {
            self.io.waker().wakeup();
        }
    }

    /// Why another thread has closed it, if one has.
    pub(super) fn close_reason(&self) -> Option<CloseReason> {
        let state = self.state();
        (state.phase() == Phase::Closed).then(|| {
            CloseReason::ALL
                .into_iter()
                .find(|reason| *reason as u64 == state.since_ms())
                .unwrap_or(CloseReason::Lingered)
        })
    }

    /// Waits, in the connection's coroutine, for any event of the socket. Returns the events.
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
    fn a_close_is_final_and_happens_once() {
        crate::http::server::runtime::configure(2);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let socket = TcpStream::connect(address).expect("a connection");
        let conn = ConnState::new(socket, 7).expect("a connection");
        let fresh = conn.state();
        assert!(conn.close(fresh, CloseReason::Evicted));
        assert!(!conn.close(fresh, CloseReason::Drained));
        assert!(!conn.close(conn.state(), CloseReason::Drained));
        assert!(!conn.enter(fresh, PhaseStamp::new(Phase::Serving, 8)));
        assert!(!conn.enter(conn.state(), PhaseStamp::new(Phase::Serving, 8)));
        assert_eq!(conn.close_reason(), Some(CloseReason::Evicted));
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
            Phase::Closed,
        ] {
            let state = PhaseStamp::new(phase, 12_345);
            assert_eq!((state.phase(), state.since_ms()), (phase, 12_345));
        }
    }
}
