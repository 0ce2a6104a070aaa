//! The service as one plain function: routes a request, checks who calls, answers.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::runtime::Handle;

use super::bridge;
use super::hardened::framing::{BATCH_PATH, CALLBACKS_PATH};
use super::message::{Request, Response, Service};
use super::payments::{PaymentProvider, Providers};
use crate::http::origin::SiteFields;
use crate::http::problem::Problem;
use crate::http::tokens::Tokens;
use crate::http::wire::{OrderView, SkuView, no_members, query, require_identity};
use crate::metrics::Metrics;
use crate::order::payment::Provider;
use crate::order::receipt::ReceiptKeys;
use crate::order::{Order, OrderId, OrderStatus, Refusal, SkuId, UserId};
use crate::pipeline::orders::cancel::Canceller;
use crate::pipeline::orders::intake::Intake;
use crate::pipeline::payments::callbacks::CallbacksHandle;
use crate::queue::OrderQueue;
use crate::state::State;
use crate::state::pending::PendingOrder;
use crate::store::StoreError;
use crate::store::postgres::Database;
use crate::store::postgres::orders::StoredOrder;

/// Everything that an answer of the data plane needs.
pub struct DataPlane {
    pub(super) intake: Arc<Intake>,
    pub(super) state: Arc<State>,
    pub(super) queue: Arc<dyn OrderQueue>,
    pub(super) database: Database,
    pub(super) canceller: Canceller,
    pub(super) callbacks: CallbacksHandle,
    pub(super) providers: Providers,
    pub(super) receipts: Arc<ReceiptKeys>,
    /// Whether a user's whole history can be listed.
    pub(super) user_index: bool,
    pub(super) runtime: Handle,
    pub(super) metrics: Metrics,
    /// Longest wait for persistence.
    pub(super) order_timeout: Duration,
    tokens: Tokens,
    /// Whether it is asked under other names than those of this machine, without a token.
    trust_network: bool,
    stopping: AtomicBool,
}

/// What a [`DataPlane`] is made of.
pub struct DataPlaneParts {
    /// The way in.
    pub intake: Arc<Intake>,
    /// The in-memory state.
    pub state: Arc<State>,
    /// What orders wait in.
    pub queue: Arc<dyn OrderQueue>,
    /// For look-ups.
    pub database: Database,
    /// For cancelling.
    pub canceller: Canceller,
    /// For payments.
    pub callbacks: CallbacksHandle,
    /// Whose callbacks are taken.
    pub providers: Providers,
    /// What signs receipts.
    pub receipts: Arc<ReceiptKeys>,
    /// Whether a user's whole history can be listed.
    pub user_index: bool,
    /// Where futures run.
    pub runtime: Handle,
    /// What is counted.
    pub metrics: Metrics,
    /// Longest wait for persistence.
    pub order_timeout: Duration,
    /// Who may call.
    pub tokens: Tokens,
    /// Whether `data_plane.trust_network` is set.
    pub trust_network: bool,
}

/// Method and path of everything that the data plane serves, as OpenAPI writes paths. `route`
/// below knows the same ones; `tests/openapi.rs` asks for each.
pub const ROUTES: [(&str, &str); 7] = [
    ("POST", "/v1/orders"),
    ("POST", BATCH_PATH),
    ("GET", "/v1/orders/{order_id}"),
    ("POST", "/v1/orders/{order_id}/cancel"),
    ("GET", "/v1/users/{user_id}/orders"),
    ("GET", "/v1/skus/{sku_id}"),
    ("POST", "/v1/payments/{provider}/notify"),
];

impl DataPlane {
    /// The service over its parts.
    pub fn new(parts: DataPlaneParts) -> Self {
        DataPlane {
            intake: parts.intake,
            state: parts.state,
            queue: parts.queue,
            database: parts.database,
            canceller: parts.canceller,
            callbacks: parts.callbacks,
            providers: parts.providers,
            receipts: parts.receipts,
            user_index: parts.user_index,
            runtime: parts.runtime,
            metrics: parts.metrics,
            order_timeout: parts.order_timeout,
            tokens: parts.tokens,
            trust_network: parts.trust_network,
            stopping: AtomicBool::new(false),
        }
    }

    /// From now on those who wait for an order of unknown outcome are told so at once.
    pub fn stop_waiting(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// The answer while there is no service yet.
    pub fn answer_not_ready(response: &mut Response) {
        Problem::from(Refusal::NotReady).write_to(response);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn provider(&self, path: &str, word: &str) -> Result<&dyn PaymentProvider, Problem> {
        let provider = Provider::from_word(word).and_then(|known| self.providers.get(known));
        provider.ok_or_else(|| not_found(path))
    }

    /// Whether a request may pass, by its head.
    fn judge_head(&self, head: &Request<'_>) -> Result<(), Problem> {
        let path = head.path();
        // A payment platform has no token: it signs, and its message is judged as a whole.
        if let Some(word) = callback_word(path) {
            return self.provider(path, word).map(|_| ());
        }
        if !self.tokens.is_open() {
            return match self.tokens.allow(head.header("authorization")) {
                true => Ok(()),
                false => Err(Problem::unauthorized()),
            };
        }
        let site = SiteFields {
            host: head.header("host"),
            origin: head.header("origin"),
            sec_fetch_site: head.header("sec-fetch-site"),
        };
        if !self.trust_network {
            site.check_host()?;
        }
        if head.method != "GET" {
            site.check_site()?;
        }
        Ok(())
    }

    fn count_refusal(&self, problem: &Problem) {
        match problem.code {
            "unknown_order" => self.metrics.unknown.count("order"),
            "unknown_sku" => self.metrics.unknown.count("sku"),
            "not_found" => self.metrics.unknown.count("other"),
            _ => {}
        }
    }

    fn route(&self, request: &Request<'_>, response: &mut Response) -> Result<(), Problem> {
        let path = request.path();
        if let Some(provider) = callback_word(path) {
            let provider = self.provider(path, provider)?;
            allow(request, response, "POST")?;
            self.take_callback(request, response, provider);
            return Ok(());
        }
        require_identity(request.header_values("content-encoding")).inspect_err(|_| {
            // RFC 9110 15.5.16: it may try again with what is taken.
            response.header("Accept-Encoding", "identity");
        })?;
        let Some(resource) = path.strip_prefix("/v1/") else {
            return Err(not_found(path));
        };
        let (collection, name) = resource.split_once('/').unwrap_or((resource, ""));
        match (collection, name) {
            _ if path == "/v1/orders" => {
                allow(request, response, "POST")?;
                query::only(request.query(), &[])?;
                self.place_order(request, response)
            }
            _ if path == BATCH_PATH => {
                allow(request, response, "POST")?;
                query::only(request.query(), &[])?;
                self.place_batch(request, response)
            }
            ("orders", name) => {
                let (id, action) = name.split_once('/').unwrap_or((name, ""));
                let id = OrderId::parse(id).ok_or_else(|| not_found(path))?;
                match action {
                    "" if !name.ends_with('/') => {
                        allow(request, response, "GET")?;
                        query::only(request.query(), &["wait"])?;
                        self.get_order(request, response, id)
                    }
                    "cancel" => {
                        allow(request, response, "POST")?;
                        query::only(request.query(), &[])?;
                        no_members(request.body)?;
                        self.cancel_order(request, response, id)
                    }
                    _ => Err(not_found(path)),
                }
            }
            ("users", name) => {
                let user = name
                    .strip_suffix("/orders")
                    .ok_or_else(|| not_found(path))?;
                let user_id = percent_decoded(user).and_then(|user| UserId::new(&user).ok());
                let user_id = user_id.ok_or_else(|| not_found(path))?;
                allow(request, response, "GET")?;
                query::only(request.query(), &["limit", "before"])?;
                self.list_orders(request, response, user_id)
            }
            ("skus", name) => {
                let id = percent_decoded(name).and_then(|name| SkuId::new(&name).ok());
                let id = id.ok_or_else(|| not_found(path))?;
                allow(request, response, "GET")?;
                query::only(request.query(), &[])?;
                let sku = self.state.catalogue.get(&id).ok_or_else(unknown_sku)?;
                let all_paused = self.state.catalogue.is_paused();
                json(response, 200, &SkuView::of(&sku, all_paused));
                Ok(())
            }
            _ => Err(not_found(path)),
        }
    }

    /// Runs a future on tokio while the request's coroutine is parked, until `deadline` at most. It
    /// goes on to its end by itself after that, and when the client goes away.
    pub(super) fn on_tokio<T: Send + 'static>(
        &self,
        request: &Request<'_>,
        deadline: Instant,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Problem> {
        let limit = deadline.saturating_duration_since(Instant::now());
        // A request whose time is over starts nothing more: what it started goes on by itself.
        if limit.is_zero() {
            return Err(out_of_time());
        }
        let task = async move { tokio::time::timeout(limit, tokio::spawn(future)).await };
        match bridge::run(request, &self.runtime, task) {
            Ok(Ok(Ok(done))) => Ok(done),
            Ok(Err(_)) => Err(out_of_time()),
            Ok(Ok(Err(_))) | Err(bridge::Gone) => Err(Problem::internal()),
        }
    }

    /// An order that was written a moment ago and is still to be paid.
    pub(super) fn recent(&self, id: OrderId) -> Option<Arc<PendingOrder>> {
        self.state.recent_orders.get(id, self.state.ids.real_now())
    }

    /// An order from the database. One that is past its time is expired, whether or not its row
    /// has been moved yet.
    pub(super) fn stored_view<'a>(&self, order: &'a StoredOrder) -> OrderView<'a> {
        let past = order.status == OrderStatus::PendingPayment
            && order.expires_at <= self.state.ids.real_now()
            && !self.state.orphans.paid_in_time(order.id, order.expires_at);
        let status = if past {
            OrderStatus::Expired
        } else {
            order.status
        };
        OrderView::stored(order, status, &self.receipts)
    }

    /// Looks an order up in the database, until `deadline` at most.
    pub(super) fn find_stored(
        &self,
        request: &Request<'_>,
        deadline: Instant,
        id: OrderId,
    ) -> Result<Option<StoredOrder>, Problem> {
        let database = self.database.clone();
        self.on_tokio(
            request,
            deadline,
            async move { database.find_order(id).await },
        )?
        .map_err(|error| DataPlane::database_problem(&error))
    }

    /// Looks an order up among those that wait on the disk, until `deadline` at most. Costs nothing
    /// where none do.
    pub(super) fn find_on_disk(
        &self,
        request: &Request<'_>,
        deadline: Instant,
        id: OrderId,
    ) -> Result<Option<Order>, Problem> {
        if !self.queue.durable().is_some_and(|queue| queue.may_hold(id)) {
            return Ok(None);
        }
        let queue = Arc::clone(&self.queue);
        let found = self.on_tokio(request, deadline, async move {
            tokio::task::spawn_blocking(move || queue.durable().map(|queue| queue.find(id))).await
        })?;
        match found {
            Ok(Some(Ok(found))) => Ok(found),
            Ok(None) => Ok(None),
            Ok(Some(Err(error))) => {
                tracing::error!(order_id = %id, reason = %error, "the journal cannot be read");
                Err(Problem::internal())
            }
            Err(_) => Err(Problem::internal()),
        }
    }

    /// How long an order that is queued now will take to become a row, in milliseconds, judged
    /// by the rate of late.
    pub(super) fn estimated_wait_ms(&self) -> u64 {
        self.state.throughput.wait_ms(self.queue.depth())
    }

    /// What a client is told where the database fails a look-up.
    pub(super) fn database_problem(error: &StoreError) -> Problem {
        tracing::warn!(reason = %error, "a request to the database failed");
        if error.is_transient() {
            database_silent()
        } else {
            Problem::internal()
        }
    }
}

impl Service for DataPlane {
    fn authorize(&self, head: &Request<'_>) -> Result<(), Problem> {
        self.judge_head(head)
            .inspect_err(|problem| self.count_refusal(problem))
    }

    fn call(&self, request: &Request<'_>, response: &mut Response) {
        if let Err(problem) = self.route(request, response) {
            self.count_refusal(&problem);
            problem.write_to(response);
        }
    }
}

fn database_silent() -> Problem {
    Problem::new(503, "not_ready", "the database does not answer; try again").retry_after(1)
}

/// The provider's word in the path of a callback; none where it is no such path.
fn callback_word(path: &str) -> Option<&str> {
    path.strip_prefix(CALLBACKS_PATH)?.strip_suffix("/notify")
}

fn out_of_time() -> Problem {
    let detail = "the look-up took longer than orders.timeout_ms; try again";
    Problem::new(503, "not_ready", detail).retry_after(1)
}

fn unknown_sku() -> Problem {
    Problem::new(404, "unknown_sku", "no such SKU")
}

fn not_found(path: &str) -> Problem {
    Problem::new(404, "not_found", format!("nothing is at {path}"))
}

/// A segment of a path with its percent-encoding undone (RFC 3986 2.1).
fn percent_decoded(segment: &str) -> Option<Cow<'_, str>> {
    percent_encoding::percent_decode_str(segment)
        .decode_utf8()
        .ok()
}

/// Refuses every method but `method`. `HEAD` comes as `GET`.
fn allow(
    request: &Request<'_>,
    response: &mut Response,
    method: &'static str,
) -> Result<(), Problem> {
    if request.method == method {
        return Ok(());
    }
    response.header("Allow", if method == "GET" { "GET, HEAD" } else { method });
    Err(Problem::new(
        405,
        "method_not_allowed",
        format!("{} is not allowed here", request.method),
    ))
}

/// Writes a JSON answer.
pub(super) fn json(response: &mut Response, status: u16, body: &impl Serialize) {
    response.set_status(status);
    response.header("Content-Type", "application/json");
    if serde_json::to_writer(&mut *response.body_mut(), body).is_err() {
        // Our own types always serialize; a body cut short must not look like an answer.
        response.clear();
        Problem::internal().write_to(response);
    }
}
