//! The context of every handler of the data plane: the parts that it calls, and the look-ups that
//! handlers share.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::nodes::Nodes;
use crate::http::message::Request;
use crate::http::problem::Problem;
use crate::http::server::tokio_bridge::{self, TaskLost};
use crate::http::wire::OrderView;
use crate::metrics::Metrics;
use crate::order::receipt::ReceiptKeys;
use crate::order::{Order, OrderId, OrderStatus, SkuNumber};
use crate::pipeline::orders::cancel::Canceller;
use crate::pipeline::orders::intake::Intake;
use crate::pipeline::orders::lookup::{Found, LookupError, OrderLookup};
use crate::pipeline::payments::callbacks::CallbacksHandle;
use crate::queue::OrderQueue;
use crate::state::State;
use crate::state::stock::{HasLeft, Sku};
use crate::store::StoreError;
use crate::store::postgres::Database;
use crate::store::postgres::orders::StoredOrder;

/// Time that an answer about an order waits for its place among those of all nodes.
const TURN_WITHIN: Duration = Duration::from_secs(1);

/// Interval at which that is looked for.
const TURN_LOOK: Duration = Duration::from_millis(5);

/// Interval at which requests that wait for units look whether the process stops.
const STOPPING_LOOK: Duration = Duration::from_secs(1);

/// The context of every handler.
pub struct Context {
    /// Admits new orders.
    pub intake: Arc<Intake>,
    /// The in-memory state.
    pub state: Arc<State>,
    /// The queue of admitted orders.
    pub queue: Arc<dyn OrderQueue>,
    /// Finds orders wherever they are.
    pub lookup: OrderLookup,
    /// For published draws.
    pub database: Database,
    /// Cancels orders.
    pub canceller: Canceller,
    /// Stores payment callbacks.
    pub callbacks: CallbacksHandle,
    /// Signs and reads receipts.
    pub receipts: Arc<ReceiptKeys>,
    /// Whether the database has the index by user, so that a whole history can be listed.
    pub user_index: bool,
    /// Runs the futures of handlers.
    pub runtime: Handle,
    /// The metrics.
    pub metrics: Metrics,
    /// Longest wait for persistence.
    pub order_timeout: Duration,
    /// The other nodes of the cluster; `None` for a single node.
    pub nodes: Option<Nodes>,
    /// Set at shutdown: requests that wait for an undecided order are answered at once.
    pub stopping: AtomicBool,
}

impl Context {
    /// Whether requests should stop waiting for undecided orders.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Runs a future on tokio while the request's coroutine is parked, until `deadline` at most.
    /// The future runs to its end even after that, and after the client has gone away.
    pub(super) fn on_tokio<T: Send + 'static>(
        &self,
        request: &Request<'_>,
        deadline: Instant,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Problem> {
        let limit = deadline.saturating_duration_since(Instant::now());
        // After its deadline a request starts nothing more; its earlier futures go on by themselves.
        if limit.is_zero() {
            return Err(out_of_time());
        }
        let task = async move { tokio::time::timeout(limit, tokio::spawn(future)).await };
        match tokio_bridge::run(request, &self.runtime, task) {
            Ok(Ok(Ok(done))) => Ok(done),
            Ok(Err(_)) => Err(out_of_time()),
            Ok(Ok(Err(_))) | Err(TaskLost) => Err(Problem::internal()),
        }
    }

    /// The view of a row as it stands now.
    pub(super) fn stored_view<'a>(&self, order: &'a StoredOrder) -> OrderView<'a> {
        OrderView::stored_now(order, &self.state, &self.receipts)
    }

    /// The view of an order in memory or on the disk.
    pub(super) fn view<'a>(&self, order: &'a Order, status: OrderStatus) -> OrderView<'a> {
        OrderView::now(order, status, &self.state, &self.receipts)
    }

    /// Whether an order is on its waiting list.
    pub(super) fn is_listed(&self, order: &Order) -> bool {
        let sku = self.state.catalogue.by_number(order.sku);
        sku.is_some_and(|sku| sku.waitlist().has(order.id))
    }

    /// At a node: waits until the place of an order among those of all nodes is known, for a moment.
    pub(super) fn wait_for_turn(&self, request: &Request<'_>, sku: SkuNumber, id: OrderId) {
        let sku = self.state.catalogue.by_number(sku);
        let is_shared = |sku: &Arc<Sku>| sku.shared().is_some() && sku.is_drawn();
        let Some(sku) = sku.filter(is_shared) else {
            return;
        };
        if !sku.waitlist().lacks_turn(id) {
            return;
        }
        let waiting = async move {
            let looks = async {
                while sku.waitlist().lacks_turn(id) {
                    tokio::time::sleep(TURN_LOOK).await;
                }
            };
            tokio::time::timeout(TURN_WITHIN, looks).await
        };
        // Without it the position counts all others.
        let _ = self.on_tokio(request, Instant::now() + 2 * TURN_WITHIN, waiting);
    }

    /// Waits until an order has left its waiting list, or `until`. Returns whether it is there still.
    pub(super) fn stays_on_list(
        &self,
        request: &Request<'_>,
        until: Instant,
        sku: SkuNumber,
        id: OrderId,
    ) -> Result<bool, Problem> {
        let Some(sku) = self.state.catalogue.by_number(sku) else {
            return Ok(false);
        };
        loop {
            if !sku.waitlist().has(id) {
                return Ok(false);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_stopping() {
                return Ok(true);
            }
            let has_left = HasLeft::new(Arc::clone(&sku), id);
            let slice = left.min(STOPPING_LOOK);
            let deadline = Instant::now() + 2 * STOPPING_LOOK;
            self.on_tokio(request, deadline, async move {
                // Either is looked at again above.
                let _ = tokio::time::timeout(slice, has_left).await;
            })?;
        }
    }

    /// Looks for an order wherever it may be, until `deadline` at most. Costs no task if it is in memory.
    pub(super) fn find(
        &self,
        request: &Request<'_>,
        deadline: Instant,
        id: OrderId,
    ) -> Result<Option<Found>, Problem> {
        if let Some(found) = self.lookup.in_memory(id) {
            return Ok(Some(found));
        }
        let lookup = self.lookup.clone();
        let found = self.on_tokio(request, deadline, async move { lookup.find(id).await })?;
        found.map_err(|error| lookup_problem(&id, &error))
    }

    /// Looks for an order in the database, until `deadline` at most.
    pub(super) fn find_stored(
        &self,
        request: &Request<'_>,
        deadline: Instant,
        id: OrderId,
    ) -> Result<Option<StoredOrder>, Problem> {
        let lookup = self.lookup.clone();
        let found = self.on_tokio(request, deadline, async move { lookup.stored(id).await })?;
        found.map_err(|error| lookup_problem(&id, &error))
    }

    /// Looks for an order on the disk, until `deadline` at most. Costs nothing if none are there.
    pub(super) fn find_on_disk(
        &self,
        request: &Request<'_>,
        deadline: Instant,
        id: OrderId,
    ) -> Result<Option<Order>, Problem> {
        if !self.lookup.may_be_on_disk(id) {
            return Ok(None);
        }
        let lookup = self.lookup.clone();
        let found = self.on_tokio(request, deadline, async move { lookup.on_disk(id).await })?;
        found.map_err(|error| lookup_problem(&id, &error))
    }

    /// The expected time until an order that is queued now becomes a row, in milliseconds, by the
    /// recent rate of writing.
    pub(super) fn estimated_wait_ms(&self) -> u64 {
        self.state.throughput.wait_ms(self.queue.depth())
    }
}

/// The answer to a request whose order, or whose buyer's orders, could not be looked for.
pub(super) fn lookup_problem(of: &dyn fmt::Display, error: &LookupError) -> Problem {
    match error {
        LookupError::Store(error) => database_problem(error),
        LookupError::Log(error) => {
            tracing::error!(%of, reason = %error, "the journal cannot be read");
            Problem::internal()
        }
    }
}

/// The answer to a request whose access to the database failed.
pub(super) fn database_problem(error: &StoreError) -> Problem {
    tracing::warn!(reason = %error, "a request to the database failed");
    if error.is_transient() {
        Problem::new(503, "not_ready", "the database does not answer; try again").retry_after(1)
    } else {
        Problem::internal()
    }
}

/// The answer to a request for an order that does not exist.
pub(super) fn unknown_order(id: OrderId) -> Problem {
    Problem::new(404, "unknown_order", format!("there is no order {id}"))
}

fn out_of_time() -> Problem {
    let detail = "the look-up took longer than orders.timeout_ms; try again";
    Problem::new(503, "not_ready", detail).retry_after(1)
}
