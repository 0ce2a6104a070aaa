//! The service as one plain function: routes a request, checks who calls, answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use super::bridge;
use super::message::{Request, Response, Service};
use crate::http::problem::Problem;
use crate::http::wire::SkuView;
use crate::metrics::Metrics;
use crate::order::{OrderId, Refusal, SkuId};
use crate::pipeline::intake::Intake;
use crate::pipeline::ledger::Ledger;
use crate::store::StoreError;
use crate::store::postgres::Database;
use crate::store::postgres::orders::StoredOrder;

/// Everything that an answer of the data plane needs.
pub struct DataPlane {
    pub(super) intake: Arc<Intake>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) database: Database,
    pub(super) runtime: Handle,
    pub(super) metrics: Metrics,
    /// Longest wait for persistence.
    pub(super) order_timeout: Duration,
    /// Hashes of the tokens; comparing hashes tells a guesser nothing by its timing.
    tokens: Vec<[u8; 32]>,
    stopping: AtomicBool,
}

impl DataPlane {
    /// The service over its parts; without `tokens` none is asked for.
    pub fn new(
        intake: Arc<Intake>,
        ledger: Arc<Ledger>,
        database: Database,
        runtime: Handle,
        metrics: Metrics,
        order_timeout: Duration,
        tokens: &[String],
    ) -> Self {
        DataPlane {
            intake,
            ledger,
            database,
            runtime,
            metrics,
            order_timeout,
            tokens: tokens
                .iter()
                .map(|token| Sha256::digest(token.as_bytes()).into())
                .collect(),
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

    fn authorize(&self, request: &Request<'_>) -> Result<(), Problem> {
        if self.tokens.is_empty() {
            return Ok(());
        }
        let token = request.header("authorization").and_then(|value| {
            let (scheme, token) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
        });
        let presented: Option<[u8; 32]> = token.map(|token| Sha256::digest(token).into());
        match presented {
            Some(hash) if self.tokens.contains(&hash) => Ok(()),
            _ => Err(Problem::new(
                401,
                "unauthorized",
                "Authorization: a valid bearer token is needed",
            )),
        }
    }

    fn route(&self, request: &Request<'_>, response: &mut Response) -> Result<(), Problem> {
        self.authorize(request)?;
        let path = request.path();
        let Some(resource) = path.strip_prefix("/v1/") else {
            return Err(not_found(path));
        };
        let (collection, name) = resource.split_once('/').unwrap_or((resource, ""));
        match (collection, name) {
            ("orders", "") if path == "/v1/orders" => {
                allow(request, response, "POST")?;
                self.place_order(request, response)
            }
            ("orders", name) if !name.is_empty() => {
                let id = OrderId::parse(name).ok_or_else(|| not_found(path))?;
                allow(request, response, "GET")?;
                self.get_order(request, response, id)
            }
            ("skus", name) if !name.is_empty() => {
                let id = SkuId::new(name).map_err(|_| not_found(path))?;
                allow(request, response, "GET")?;
                let sku = self.ledger.catalogue.get(&id).ok_or_else(unknown_sku)?;
                json(
                    response,
                    200,
                    &SkuView::of(&sku, self.ledger.catalogue.is_paused()),
                );
                Ok(())
            }
            _ => Err(not_found(path)),
        }
    }

    /// Looks an order up in the database while the request's coroutine is parked.
    pub(super) fn find_stored(
        &self,
        request: &Request<'_>,
        id: OrderId,
    ) -> Result<Option<StoredOrder>, Problem> {
        let database = self.database.clone();
        match bridge::run(request, &self.runtime, async move {
            database.find_order(id).await
        }) {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => Err(database_problem(&error)),
            Err(bridge::Gone) => Err(Problem::internal()),
        }
    }
}

impl Service for DataPlane {
    fn call(&self, request: &Request<'_>, response: &mut Response) {
        if let Err(problem) = self.route(request, response) {
            problem.write_to(response);
        }
    }
}

fn unknown_sku() -> Problem {
    Problem::new(404, "unknown_sku", "no such SKU")
}

fn not_found(path: &str) -> Problem {
    Problem::new(404, "not_found", format!("nothing is at {path}"))
}

fn database_problem(error: &StoreError) -> Problem {
    tracing::warn!(reason = %error, "a look-up failed");
    if error.is_transient() {
        Problem::new(503, "not_ready", "the database does not answer; try again").retry_after(1)
    } else {
        Problem::internal()
    }
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
