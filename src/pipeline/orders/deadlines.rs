//! Abandons orders that no worker claimed in time, and wakes clients whose wait is over.
//!
//! Deadlines are kept on the tokio side, because a coroutine that times out would continue on `may`'s single
//! timer thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::metrics::Metrics;
use crate::pipeline::WakeAll;
use crate::state::State;

/// Maximum delay until a deadline is noticed: the "small bound" of I6.
const TICK: Duration = Duration::from_millis(20);

/// Runs until the future is dropped.
pub async fn keep(state: Arc<State>, wake_all: WakeAll, metrics: Metrics) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        state.throughput.refresh();
        look_at_progress(&state);
        expire(&state, &wake_all, &metrics, clock::now());
    }
}

/// Records whether any order waits for a worker. Parked orders wait elsewhere, for an operator.
pub fn look_at_progress(state: &State) {
    state.progress.look(state.pending.in_flight() > 0);
}

/// Abandons overdue orders as of `now` and wakes their waiters.
pub fn expire(state: &State, wake_all: &WakeAll, metrics: &Metrics, now: Instant) {
    let mut wakers = Vec::new();
    for pending in state.pending.due(now) {
        if pending.is_overdue(now) && state.abandon(&pending) {
            metrics.orders_abandoned.inc();
            state.progress.given_up();
        }
        pending.slot.take_wakers(|waker| wakers.push(waker));
    }
    if !wakers.is_empty() {
        wake_all(wakers);
    }
}
