//! The drain: queued orders are written, every client is answered, and the database is released.
//!
//! ```text
//!   (a node of a cluster: hand every lane over ─►) close the intake ─► run the queue empty ─► settle the remaining orders ─► answer the requests in flight
//!     ─► stop the control plane and the tasks ─► release leases and order log ─► PostgreSQL
//! ```

use std::sync::Arc;
use std::time::Duration;

use super::Millrace;
use super::nodes::Left;
use super::order_path::OrderPath;
use super::ownership::Ownership;
use super::planes::{RunningEngine, remove_addresses};
use crate::config::Config;
use crate::queue::DurableQueue;
use crate::state::State;
use crate::state::pending::SlotState;
use crate::store::postgres::order_log::{self, LogName};
use crate::store::postgres::{Database, NodeLease, lease};

/// Time that a drain may take beyond the order timeout.
const MARGIN: Duration = Duration::from_secs(3);

/// Time for the last spans to reach the collector.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// Drains. Returns true if nothing was left unwritten and nothing failed.
pub(super) async fn drain(millrace: Millrace) -> bool {
    let Millrace {
        config,
        state,
        mut path,
        planes,
        service,
        node,
        background,
        ownership,
        supervisor,
        ..
    } = millrace;
    tracing::info!(in_flight = state.pending.len(), "draining");
    if let Some(node) = node.as_ref().filter(|_| !state.poison.is_set()) {
        node.hand_everything_over().await;
    }
    supervisor.stop();
    path.intake.drain();
    if let RunningEngine::Hardened(server) = &planes.engine {
        server.stop_accepting();
    }
    path.queue.close();
    let mut clean = run_empty(&config, &mut path).await;
    service.stop_waiting();
    clean &= settle_rest(&state, &path, &planes.wake_all).await;
    let left = match node {
        Some(node) => node.stop(MARGIN).await,
        None => None,
    };
    close_connections(&planes.engine).await;
    let spans = planes.spans.clone();
    planes.stop_control(MARGIN).await;
    background.stop();
    clean &= let_go(&config, &state, &path, ownership, left).await;
    if let Some(spans) = spans {
        let last = tokio::task::spawn_blocking(move || spans.shutdown(LAST_SPANS));
        // Orders are safe by now, whatever becomes of it.
        let _ = last.await;
    }
    remove_addresses(&config.data_dir);
    clean &= !state.poison.is_set();
    tracing::info!(clean, "stopped");
    clean
}

/// Lets the workers empty the queue, for at most the order timeout plus the margin. Returns true if they have
/// finished.
async fn run_empty(config: &Config, path: &mut OrderPath) -> bool {
    let limit = Duration::from_millis(config.orders.timeout_ms) + MARGIN;
    let ended = match tokio::time::timeout(limit, &mut path.workers).await {
        Ok(ended) => ended,
        Err(_) => {
            tracing::warn!(
                "the database did not accept every order in time; giving up the orders that are not written"
            );
            if let Some(durable) = path.queue.durable() {
                durable.leave_backlog();
            }
            let _ = path.cut.send(true);
            (&mut path.workers).await
        }
    };
    matches!(ended, Ok(Some(true)))
}

/// Answers the clients that still wait: an order that no worker claimed is not placed; an order whose commit is
/// in doubt is undecided. Returns true if there were neither.
async fn settle_rest(state: &State, path: &OrderPath, wake_all: &crate::pipeline::WakeAll) -> bool {
    let mut clean = true;
    let mut wakers = Vec::new();
    let queue = Arc::clone(&path.queue);
    let stopping = move || queue.durable().map(|durable| durable.stop());
    if let Ok(Some(never_written)) = tokio::task::spawn_blocking(stopping).await {
        for pending in never_written {
            state.abandon(&pending);
            pending.slot.take_wakers(|waker| wakers.push(waker));
        }
    }
    for pending in state.pending.all() {
        clean &= !state.abandon(&pending);
        clean &= pending.slot.state() != SlotState::Claimed;
        pending.slot.take_wakers(|waker| wakers.push(waker));
    }
    wake_all(wakers);
    clean
}

async fn close_connections(engine: &RunningEngine) {
    match engine {
        RunningEngine::Hardened(server) => {
            let server = Arc::clone(server);
            let cut = tokio::task::spawn_blocking(move || server.drain(MARGIN)).await;
            let cut = cut.unwrap_or_default();
            if cut > 0 {
                tracing::warn!(
                    connections = cut,
                    "closed connections whose clients did not read their answer"
                );
            }
        }
        // This engine has no drain: its connections end with the process.
        RunningEngine::Minihttp => {}
    }
}

/// Releases the leases and the order log, and stops our own PostgreSQL. Returns true if no acknowledged order is
/// left in the log.
async fn let_go(
    config: &Config,
    state: &State,
    path: &OrderPath,
    ownership: Ownership,
    left: Option<Left>,
) -> bool {
    let Ownership {
        database,
        embedded,
        lease,
        guard,
        ..
    } = ownership;
    if left.is_none()
        && let Err(error) = lease::give_back(&database, lease, state.ids.now()).await
    {
        tracing::debug!(reason = %error, "the lease of order ids could not be returned; the next start begins its ids a little later");
    }
    let mut clean = true;
    if let Some((durable, name)) = path.queue.durable().zip(path.log_name.as_ref()) {
        match durable.outstanding() {
            0 => release(config, &database, lease, path, durable, name).await,
            left => {
                clean = false;
                tracing::warn!(
                    orders = left,
                    "acknowledged orders stay in {}; the next start writes them",
                    durable.title()
                );
            }
        }
    }
    if let Some(left) = left {
        clean &= left.leave(state).await;
    }
    if let Some(guard) = guard {
        // Its task was aborted and drops it at its next await.
        drop(wait_for_sole_owner(guard).await);
    }
    database.close();
    if let Some(embedded) = embedded {
        // Its task was aborted too.
        let embedded = Arc::into_inner(wait_for_sole_owner(embedded).await);
        if let Some(embedded) = embedded
            && let Err(error) = embedded.into_inner().stop().await
        {
            tracing::warn!(reason = %error, "our own PostgreSQL did not stop cleanly");
        }
    }
    clean
}

async fn wait_for_sole_owner<T>(shared: Arc<T>) -> Arc<T> {
    while Arc::strong_count(&shared) > 1 {
        tokio::task::yield_now().await;
    }
    shared
}

/// Notes that every order of the log is settled, so that another process may start without it, and gives the log up.
async fn release(
    config: &Config,
    database: &Database,
    lease: NodeLease,
    path: &OrderPath,
    durable: &dyn DurableQueue,
    name: &LogName,
) {
    // After a failover the orders may be missing in the database.
    let Some(timeline) = path.watermarks.whole_timeline() else {
        tracing::warn!(
            "the database was failed over; {} stays in use for the next start",
            durable.title()
        );
        return;
    };
    let place = durable.last_position();
    if let Err(error) = order_log::release(database, lease, &name.id, place, &timeline).await {
        tracing::debug!(reason = %error, "the database could not be told that the order log is empty");
        return;
    }
    if !config.queue.journal.retain_for_slots.0.is_empty() && place.is_none() {
        // The standbys may not have everything in the journal yet.
        return;
    }
    let queue = Arc::clone(&path.queue);
    let erasing = move || queue.durable().map_or(Ok(()), |durable| durable.erase());
    if let Ok(Err(error)) = tokio::task::spawn_blocking(erasing).await {
        tracing::warn!(reason = %error, "{} could not be given up", durable.title());
    }
}
