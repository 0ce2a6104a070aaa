//! Tasks that run as long as the process does. One that ends poisons it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use crate::pipeline::intake::Intake;
use crate::pipeline::ledger::Ledger;
use crate::store::embedded::Embedded;
use crate::supervise::Supervisor;

/// How often what has left the idempotency window, and rate limits that are whole again, are
/// forgotten.
const EVICTION: Duration = Duration::from_secs(20);
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
pub(super) async fn evict(ledger: Arc<Ledger>, intake: Arc<Intake>, window_ms: u64) {
    let mut tick = tokio::time::interval(EVICTION);
    loop {
        tick.tick().await;
        let (ledger, intake) = (Arc::clone(&ledger), Arc::clone(&intake));
        // Walks every record: not on a thread that has something better to do.
        let evicted = tokio::task::spawn_blocking(move || {
            intake.forget_idle();
            ledger
                .buyers
                .evict_before(ledger.ids.window_floor(window_ms))
        })
        .await;
        if let Ok(evicted @ 1..) = evicted {
            tracing::debug!(evicted, "forgot orders that left the idempotency window");
        }
    }
}
