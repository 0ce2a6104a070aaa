//! Placing an order, and asking for one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{Request, Response};
use super::preference::Preference;
use super::service::{DataPlane, json};
use super::wake::wait;
use crate::http::problem::Problem;
use crate::http::wire::{OrderBody, OrderView};
use crate::order::{IdempotencyKey, OrderId, OrderStatus, Refusal};
use crate::pipeline::intake::{Admission, OrderRequest};
use crate::state::pending::{PendingOrder, SlotState};

/// How a request's order stands in relation to it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// This request placed it.
    Placed,
    /// An earlier one did, under the same key.
    Replayed,
}

impl DataPlane {
    /// `POST /v1/orders`.
    pub(super) fn place_order(
        &self,
        request: &Request<'_>,
        response: &mut Response,
    ) -> Result<(), Problem> {
        self.intake
            .check_open()
            .map_err(|refusal| self.refuse(refusal))?;
        require_json(request)?;
        let key = idempotency_key(request)?;
        let body = OrderBody::parse(request.body)?;
        // `respond-async` needs a queue that survives the process; until there is one, the
        // preference is ignored and the answer says so by not naming it.
        let preference = Preference::parse(request.header_values("prefer"));
        let wait = preference
            .wait
            .map_or(self.order_timeout, |wait| wait.min(self.order_timeout));
        if preference.wait.is_some() {
            response.header(
                "Preference-Applied",
                format_args!("wait={}", wait.as_secs()),
            );
        }
        let started = Instant::now();
        let order = OrderRequest {
            user_id: body.user_id,
            sku_id: body.sku_id,
            quantity: body.quantity,
            adjustment: body.adjustment,
            attributes: body.attributes,
            key,
            wait,
        };
        loop {
            let admission = self
                .intake
                .admit(&order, Some(request.waker))
                .map_err(|refusal| self.refuse(refusal))?;
            match admission {
                Admission::Placed(pending) => {
                    let state = self.wait_for_own(request, &pending);
                    self.metrics
                        .wait_seconds
                        .observe(started.elapsed().as_secs_f64());
                    self.answer(response, &pending, state, Role::Placed);
                    return Ok(());
                }
                Admission::Duplicate {
                    pending: Some(pending),
                    ..
                } => {
                    let state = self.wait_for_other(request, &pending, started + wait);
                    self.answer(response, &pending, state, Role::Replayed);
                    return Ok(());
                }
                Admission::Duplicate { id, pending: None } => {
                    if let Some(stored) = self.find_stored(request, id)? {
                        self.count("replayed");
                        response.header("Idempotency-Replayed", "true");
                        response.header("Location", format_args!("/v1/orders/{id}"));
                        json(response, 200, &OrderView::stored(&stored));
                        return Ok(());
                    }
                    // The first request is between claiming the key and registering its order, or
                    // just undoing that. Either takes it microseconds; then this finds it, or is
                    // the first itself.
                    if started.elapsed() > wait {
                        return Err(self.refuse(Refusal::Overloaded));
                    }
                    may::coroutine::yield_now();
                }
            }
        }
    }

    /// `GET /v1/orders/{order_id}?wait=N`.
    pub(super) fn get_order(
        &self,
        request: &Request<'_>,
        response: &mut Response,
        id: OrderId,
    ) -> Result<(), Problem> {
        let wait = wait_parameter(request.query())?.min(self.order_timeout);
        if let Some(pending) = self.ledger.pending.get(id) {
            let state = self.wait_for_other(request, &pending, Instant::now() + wait);
            match state {
                SlotState::Waiting | SlotState::Claimed => {
                    json(
                        response,
                        200,
                        &OrderView::of(&pending.order, OrderStatus::Undecided),
                    );
                    return Ok(());
                }
                SlotState::Abandoned | SlotState::Unwritten => return Err(unknown_order(id)),
                SlotState::Persisted | SlotState::Failed => {}
            }
        }
        let stored = self
            .find_stored(request, id)?
            .ok_or_else(|| unknown_order(id))?;
        json(response, 200, &OrderView::stored(&stored));
        Ok(())
    }

    /// Waits for an order that this request placed. At its deadline it is abandoned by the
    /// deadline keeper, or a worker has claimed it; until then `Waiting` is no answer.
    fn wait_for_own(&self, request: &Request<'_>, pending: &PendingOrder) -> SlotState {
        wait(request, || match pending.slot.state() {
            SlotState::Waiting => false,
            SlotState::Claimed => Instant::now() >= pending.deadline || self.is_stopping(),
            _ => true,
        });
        pending.slot.state()
    }

    /// Waits for an order that another request placed, until it is decided or `deadline` comes.
    fn wait_for_other(
        &self,
        request: &Request<'_>,
        pending: &PendingOrder,
        deadline: Instant,
    ) -> SlotState {
        let over =
            || pending.slot.state().is_final() || Instant::now() >= deadline || self.is_stopping();
        if !over() {
            wait(request, || {
                // Announced before the look: a change in between is either seen or wakes us.
                pending.slot.subscribe(request.waker.clone());
                self.ledger.pending.wake_by(pending, deadline);
                over()
            });
        }
        pending.slot.state()
    }

    fn answer(
        &self,
        response: &mut Response,
        pending: &Arc<PendingOrder>,
        state: SlotState,
        role: Role,
    ) {
        let order = &pending.order;
        match state {
            SlotState::Persisted => {
                response.header("Location", format_args!("/v1/orders/{}", order.id));
                let status = if role == Role::Replayed {
                    self.count("replayed");
                    response.header("Idempotency-Replayed", "true");
                    200
                } else {
                    self.count("created");
                    201
                };
                json(
                    response,
                    status,
                    &OrderView::of(order, OrderStatus::PendingPayment),
                );
            }
            SlotState::Waiting | SlotState::Claimed => {
                self.count("undecided");
                response.header("Location", format_args!("/v1/orders/{}", order.id));
                json(response, 202, &OrderView::of(order, OrderStatus::Undecided));
            }
            SlotState::Abandoned => {
                self.count("timed_out");
                let problem = Problem::new(
                    504,
                    "timed_out",
                    "the order was not written within its wait: it is not placed and nothing is held",
                );
                problem.write_to(response);
            }
            SlotState::Unwritten => {
                self.count("unwritten");
                Problem::from(Refusal::Draining).write_to(response);
            }
            SlotState::Failed => {
                self.count("failed");
                let detail = format!(
                    "the database refused order {}: it is not placed, nothing is held, and a dead letter keeps it",
                    order.id
                );
                Problem::new(500, "internal", detail).write_to(response);
            }
        }
    }

    fn refuse(&self, refusal: Refusal) -> Problem {
        self.count(refusal.code());
        Problem::from(refusal)
    }

    fn count(&self, outcome: &'static str) {
        self.metrics.orders.count(outcome);
    }
}

fn unknown_order(id: OrderId) -> Problem {
    Problem::new(404, "unknown_order", format!("there is no order {id}"))
}

fn require_json(request: &Request<'_>) -> Result<(), Problem> {
    let is_json = request.header("content-type").is_some_and(|value| {
        let media_type = value.split(|byte| *byte == b';').next().unwrap_or_default();
        media_type
            .trim_ascii()
            .eq_ignore_ascii_case(b"application/json")
    });
    if is_json {
        return Ok(());
    }
    Err(Problem::new(
        415,
        "unsupported_media_type",
        "Content-Type: must be application/json",
    ))
}

fn idempotency_key(request: &Request<'_>) -> Result<Option<IdempotencyKey>, Problem> {
    let mut values = request.header_values("idempotency-key");
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let invalid = |what: &dyn std::fmt::Display| {
        Problem::new(
            400,
            "invalid_idempotency_key",
            format!("Idempotency-Key: {what}"),
        )
    };
    if values.next().is_some() {
        return Err(invalid(&"came more than once"));
    }
    let text = std::str::from_utf8(value).map_err(|_| invalid(&"must be visible ASCII"))?;
    IdempotencyKey::new(text).map(Some).map_err(|e| invalid(&e))
}

/// The `wait` of a query in seconds; zero where there is none.
fn wait_parameter(query: &str) -> Result<Duration, Problem> {
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        if let Some(value) = pair.strip_prefix("wait=") {
            return value.parse().map(Duration::from_secs).map_err(|_| {
                Problem::new(
                    400,
                    "invalid_field",
                    "wait: must be a whole number of seconds",
                )
            });
        }
    }
    Ok(Duration::ZERO)
}
