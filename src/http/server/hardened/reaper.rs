//! The thread that keeps the clock, closes connections at their deadlines, and releases ended ones.
//!
//! Deadlines are kept here and not by timers of the coroutines, because a coroutine that times out
//! goes on running on the runtime's single timer thread. A connection past its deadline has its
//! socket shut down, which its coroutine sees as the end of the stream; one whose request began
//! and is late is woken to answer `408` first.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::conn_state::{ConnState, Phase, PhaseStamp};
use super::counters::CloseReason;
use super::shared::Shared;
use crate::http::server::limits::Limits;
use crate::supervise::Supervisor;

/// How often the clock is brought up to date and ended connections are released.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// How long the client may take to read the last answer and close, after our side has ended.
const LINGER_MS: u64 = 1_000;

/// How long a connection is idle before it gives back the buffers that a large request left.
pub(super) const SHRINK_AFTER_MS: u64 = 1_000;

/// Starts the reaper; it ends once the server is closed and its last connection is gone.
pub(super) fn start(
    shared: Arc<Shared>,
    supervisor: &Supervisor,
) -> std::io::Result<JoinHandle<()>> {
    let closing = Arc::clone(&shared);
    let asked = move || closing.closed.load(Ordering::Acquire);
    supervisor.thread("http-reaper", asked, move || run(&shared))
}

fn run(shared: &Shared) {
    let deadlines = Deadlines::new(&shared.limits);
    let mut next_pass_ms = 0;
    loop {
        thread::park_timeout(TICK);
        shared.clock.tick();
        shared.registry.reap();
        let now_ms = shared.clock.now_ms();
        if now_ms >= next_pass_ms {
            next_pass_ms = now_ms + deadlines.pass_interval_ms;
            shared
                .registry
                .close_where(|conn, state| deadlines.overdue(conn, state, now_ms));
        }
        if shared.closed.load(Ordering::Acquire) && shared.registry.held() == 0 {
            return;
        }
    }
}

struct Deadlines {
    request_ms: u64,
    idle_ms: u64,
    pass_interval_ms: u64,
}

impl Deadlines {
    fn new(limits: &Limits) -> Self {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX >> 3);
        let request_ms = millis(limits.request_timeout);
        let idle_ms = millis(limits.idle_timeout);
        Self {
            request_ms,
            idle_ms,
            // A pass touches every connection: a twentieth of the shortest deadline is exact
            // enough, and keeps 20,000 connections below one per cent of a core.
            pass_interval_ms: (request_ms.min(idle_ms) / 20).clamp(1, LINGER_MS / 2),
        }
    }

    /// The reason to close a connection in this state; none while its deadline is ahead.
    fn overdue(&self, conn: &ConnState, state: PhaseStamp, now_ms: u64) -> Option<CloseReason> {
        let age_ms = now_ms.saturating_sub(state.since_ms());
        let (limit_ms, reason) = match state.phase() {
            Phase::Idle => {
                if age_ms > SHRINK_AFTER_MS {
                    conn.nudge_if_bloated();
                }
                (self.idle_ms, CloseReason::IdleTimeout)
            }
            Phase::Reading => {
                if age_ms > self.request_ms {
                    conn.expire(state, now_ms);
                }
                return None;
            }
            // Its coroutine needs a moment to say so, and no more.
            Phase::Late => (LINGER_MS, CloseReason::RequestTimeout),
            Phase::Writing => (self.request_ms, CloseReason::UnreadReply),
            Phase::Lingering => (LINGER_MS.min(self.request_ms), CloseReason::Lingered),
            // The service keeps its own deadline, and every one of its answers is due.
            Phase::Serving | Phase::Closed => return None,
        };
        // The clock is coarse: strictly more, so that no deadline comes early by its grain.
        (age_ms > limit_ms).then_some(reason)
    }
}
