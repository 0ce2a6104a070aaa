//! Tasks that run as long as the process does. One that ends poisons it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use crate::pipeline::orders::intake::Intake;
use crate::state::State;
use crate::state::buyers::Eviction;
use crate::store::embedded::Embedded;
use crate::supervise::Supervisor;

/// How often what has left the idempotency window, and rate limits that are whole again, are
/// forgotten.
const EVICTION: Duration = Duration::from_secs(20);
/// How long after its time to pay an unpaid order may still stand, in milliseconds.
const SETTLING_MS: u64 = 60_000;
/// How often it is looked whether memory is nearly full.
const TIGHT: Duration = Duration::from_secs(1);
/// How often our own PostgreSQL is looked at.
const POSTGRES_WATCH: Duration = Duration::from_millis(250);

/// The running tasks.
pub(super) struct Background {
    supervisor: Supervisor,
    tasks: Vec<AbortHandle>,
}

impl Background {
    pub(super) fn new(supervisor: Supervisor) -> Self {
        let tasks = Vec::new();
        Background { supervisor, tasks }
    }

    pub(super) fn run(
        &mut self,
        name: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let task = self.supervisor.task(name, work);
        self.tasks.push(task.abort_handle());
    }

    pub(super) fn stop(&self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Starts our own PostgreSQL again where it has died. Workers keep their batches meanwhile.
pub(super) async fn keep_running(embedded: Arc<Mutex<Embedded>>) {
    let mut tick = tokio::time::interval(POSTGRES_WATCH);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let mut embedded = embedded.lock().await;
        if embedded.is_running() {
            continue;
        }
        tracing::error!("our own PostgreSQL has died; starting it again");
        match embedded.start_again().await {
            Ok(()) => tracing::info!("our own PostgreSQL runs again"),
            Err(error) => tracing::error!(reason = %error, "it did not start; it is tried again"),
        }
    }
}

/// Forgets what nobody needs any more.
pub(super) async fn evict(
    state: Arc<State>,
    intake: Arc<Intake>,
    window_ms: u64,
    payment_ttl_ms: u64,
) {
    let mut tick = tokio::time::interval(TIGHT);
    let mut last: Option<(Instant, bool)> = None;
    loop {
        tick.tick().await;
        let is_tight = state.buyers.is_tight();
        // A walk that made no room is not repeated at once.
        let is_early =
            |(at, in_vain): (Instant, bool)| at.elapsed() < EVICTION && (in_vain || !is_tight);
        if last.is_some_and(is_early) {
            continue;
        }
        let started = Instant::now();
        let (state, intake) = (Arc::clone(&state), Arc::clone(&intake));
        // Walks every record: not on a thread that has something better to do.
        let evicted = tokio::task::spawn_blocking(move || {
            intake.forget_idle();
            let (buyers, ids) = (&state.buyers, &state.ids);
            let floor = ids.window_floor(window_ms);
            let eviction = if is_tight {
                let payable = ids.window_floor(payment_ttl_ms.saturating_add(SETTLING_MS));
                buyers.early_eviction(floor, payable, ids.window_floor(0))
            } else {
                Eviction::before(floor)
            };
            buyers.evict(eviction, |sku| state.is_limited(sku))
        })
        .await;
        let evicted = evicted.unwrap_or(0);
        last = Some((started, is_tight && evicted == 0));
        if evicted > 0 && is_tight {
            tracing::warn!(
                evicted,
                "orders.remembered_max is nearly reached: orders that neither a key nor a limit needs were forgotten \
                 before they left the idempotency window, the oldest first"
            );
        } else if evicted > 0 {
            tracing::debug!(evicted, "forgot orders that left the idempotency window");
        }
    }
}
