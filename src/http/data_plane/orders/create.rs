//! Placing an order: `POST /v1/orders`, and what each line of a [`batch`](super::batch) has in common with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::elsewhere::{self, Away};
use super::follow::wait_for_other;
use crate::backoff::Backoff;
use crate::http::data_plane::context::Context;
use crate::http::data_plane::nodes::{self, Origin, Place};
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::server::wake::wait;
use crate::http::wire::{OrderBody, OrderView, Preference, idempotency_key, write};
use crate::order::{KeyHash, Order, OrderStatus, Refusal};
use crate::pipeline::orders::intake::{Admission, OrderRequest};
use crate::pipeline::orders::lookup::Found;
use crate::spans::{self, Trace};
use crate::state::pending::{PendingOrder, SlotState};
use crate::state::stock::{Ask, TooManyAsk};

/// Pauses before a retried order that is nowhere to be found is looked for again.
const LOOK_AGAIN: Backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(250));

/// An order that was admitted.
pub(super) enum Admitted {
    /// By this request.
    Placed(Arc<PendingOrder>),
    /// By an earlier request under the same key.
    Earlier {
        /// Where it is now.
        found: Found,
        /// Whether that was a request of the client's, and not an attempt of another node to pass this one on.
        replayed: bool,
    },
}

/// The answer about one order.
pub(super) enum Answer {
    /// The order exists, or may exist.
    Order {
        found: Found,
        status: OrderStatus,
        http_status: u16,
        replayed: bool,
        /// Whether this request has placed it, and learns only that it is durable in the queue.
        is_acknowledged: bool,
    },
    /// The order does not exist.
    Problem(Problem),
}

impl Answer {
    fn order(found: Found, status: OrderStatus, http_status: u16, replayed: bool) -> Self {
        Answer::Order {
            found,
            status,
            http_status,
            replayed,
            is_acknowledged: false,
        }
    }

    /// The status of the single call.
    pub(super) fn status(&self) -> u16 {
        match self {
            Answer::Order { http_status, .. } => *http_status,
            Answer::Problem(problem) => problem.status,
        }
    }

    /// Whether it acknowledges an order as durable that this request has placed.
    pub(super) fn is_acknowledgement(&self) -> bool {
        matches!(
            self,
            Answer::Order {
                is_acknowledged: true,
                ..
            }
        )
    }
}

/// The view of an order, wherever it was found.
pub(super) fn view<'a>(context: &Context, found: &'a Found, status: OrderStatus) -> OrderView<'a> {
    let order = match found {
        Found::InFlight(pending) | Found::Recent(pending) => &pending.order,
        Found::OnDisk(order) => order,
        Found::Stored(stored) => return context.stored_view(stored),
    };
    match status {
        OrderStatus::Accepted => {
            OrderView::accepted(order, context.estimated_wait_ms(), &context.receipts)
        }
        status => context.view(order, status),
    }
}

/// The client's preferences, as far as they can be honoured.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    /// Answer as soon as the order is durable.
    respond_async: bool,
    /// The wait that the client named, at most the order timeout.
    asked: Option<Duration>,
    /// The longest wait.
    pub(super) wait: Duration,
}

impl Wanted {
    /// The preferences in a request. `respond-async` needs a queue that survives the process.
    fn of(context: &Context, request: &Request<'_>, origin: Origin) -> Self {
        let preference = Preference::parse(request.header_values("prefer"));
        let respond_async = preference.respond_async && context.queue.durable().is_some();
        let asked = preference.wait.filter(|_| !respond_async);
        let wait = asked.map(|wait| wait.min(context.order_timeout));
        Wanted {
            respond_async,
            asked: wait,
            wait: origin.limit(wait.unwrap_or(context.order_timeout)),
        }
    }

    /// Names the preference that was honoured. `accepted`: an order was acknowledged as durable.
    pub(super) fn say_applied(self, response: &mut Response, accepted: bool) {
        if accepted {
            response.header("Preference-Applied", "respond-async");
        } else if let Some(wait) = self.asked {
            response.header(
                "Preference-Applied",
                format_args!("wait={}", wait.as_secs()),
            );
        }
    }
}

/// `POST /v1/orders`.
pub(in crate::http::data_plane) fn one(
    context: &Context,
    request: &Request<'_>,
    origin: Origin,
    response: &mut Response,
) -> Result<(), Problem> {
    check_open(context, origin)?;
    require_media_type(request, &["application/json"])?;
    let key = idempotency_key(request.header_values("idempotency-key"))?;
    let body = OrderBody::parse(request.body)?;
    let creation = Creation::begin(context, request, origin);
    let held = match nodes::place(context.nodes.as_ref(), origin, &body.user_id)? {
        Place::Here(held) => held,
        Place::Elsewhere(nodes, lane) => {
            let until = creation.started + creation.wanted.wait;
            let away = Away {
                nodes,
                lane,
                request,
            };
            return elsewhere::one(context, away, response, &body, key, until);
        }
    };
    let own_key = origin.has_own_keys();
    let answer = match creation.admit(body, key.map(KeyHash::of), own_key) {
        Ok(admitted) => creation.wait(admitted),
        Err(problem) => Answer::Problem(problem),
    };
    let decided_at = request.trace.map(|trace| (trace, Instant::now()));
    held.vouch(answer.status())?;
    creation
        .wanted
        .say_applied(response, answer.is_acknowledgement());
    let (found, status, http_status, replayed) = match answer {
        Answer::Problem(problem) => return Err(problem),
        Answer::Order {
            found,
            status,
            http_status,
            replayed,
            is_acknowledged: _,
        } => (found, status, http_status, replayed),
    };
    if http_status == 201 {
        let waited = creation.started.elapsed();
        context.metrics.wait_seconds.observe(waited.as_secs_f64());
    }
    let view = view(context, &found, status);
    response.header("Location", format_args!("/v1/orders/{}", view.order_id()));
    if replayed {
        response.header("Idempotency-Replayed", "true");
    }
    write::json(response, http_status, &view);
    if let Some((trace, decided_at)) = decided_at {
        trace.child("answer", decided_at, vec![spans::order_id(view.order_id())]);
    }
    Ok(())
}

/// A request that creates orders.
pub(super) struct Creation<'r> {
    pub(super) context: &'r Context,
    pub(super) request: &'r Request<'r>,
    pub(super) wanted: Wanted,
    pub(super) started: Instant,
}

impl<'r> Creation<'r> {
    pub(super) fn begin(context: &'r Context, request: &'r Request<'r>, origin: Origin) -> Self {
        Creation {
            context,
            request,
            wanted: Wanted::of(context, request, origin),
            started: Instant::now(),
        }
    }

    /// `own_key`: the key is that of a node, so an order under it is this request's.
    pub(super) fn admit(
        &self,
        body: OrderBody<'_>,
        key: Option<KeyHash>,
        own_key: bool,
    ) -> Result<Admitted, Problem> {
        let Creation {
            context, request, ..
        } = *self;
        let order = OrderRequest {
            user_id: body.user_id,
            sku_id: body.sku_id,
            quantity: body.quantity,
            adjustment: body.adjustment,
            attributes: body.attributes,
            key,
            wait: self.wanted.wait,
            respond_async: self.wanted.respond_async,
            waitlist: body.waitlist,
            trace: request.trace,
        };
        context
            .intake
            .check_rate(&order.user_id)
            .map_err(|refusal| refuse(context, refusal))?;
        let earlier = |found| Admitted::Earlier {
            found,
            replayed: !own_key,
        };
        let mut backoff = LOOK_AGAIN;
        loop {
            let admission = match context.intake.admit(&order, Some(request.waker)) {
                Err(Refusal::StockElsewhere) if self.stock_may_have_come(&order)? => continue,
                admission => admission.map_err(|refusal| refuse(context, refusal))?,
            };
            let id = match admission {
                Admission::Placed(pending) => return Ok(Admitted::Placed(pending)),
                Admission::Duplicate {
                    pending: Some(pending),
                    ..
                } => return Ok(earlier(Found::InFlight(pending))),
                Admission::Duplicate { id, pending: None } => id,
            };
            // One deadline for all orders of a batch: no request waits beyond the order timeout.
            let deadline = self.started + context.order_timeout;
            if let Some(found) = context.find(request, deadline, id)? {
                return Ok(earlier(found));
            }
            // The first request is between claiming the key and registering its order, or is
            // undoing that. Either takes microseconds; afterwards this request finds the order or
            // places it. After a failover the order may also be lost, until that is found out.
            if self.started.elapsed() > context.order_timeout {
                return Err(refuse(context, Refusal::Overloaded));
            }
            may::coroutine::yield_now();
            let pause = backoff.pause();
            context.on_tokio(request, deadline, async move {
                tokio::time::sleep(pause).await;
            })?;
        }
    }

    /// At a node whose share is dry: waits until units came, or it is known that there are none. False: it has no share.
    fn stock_may_have_come(&self, order: &OrderRequest<'_>) -> Result<bool, Problem> {
        let context = self.context;
        let Some(sku) = context.state.catalogue.get(&order.sku_id) else {
            return Ok(false);
        };
        let may_join = order.waitlist && sku.terms().waitlist.max > 0;
        let ask = Ask::new(&sku, order.quantity.get(), may_join);
        let Some(ask) = ask.map_err(|TooManyAsk| refuse(context, Refusal::Overloaded))? else {
            return Ok(false);
        };
        let deadline = self.started + self.wanted.wait;
        // It ends by itself at the deadline, and gives its place up.
        let asking = async move { tokio::time::timeout_at(deadline.into(), ask).await };
        let answered = context.on_tokio(self.request, deadline, asking);
        match answered {
            Ok(Ok(())) => Ok(true),
            Ok(Err(_)) | Err(_) => Err(refuse(context, Refusal::StockElsewhere)),
        }
    }

    /// Waits for an admitted order as long as the client wants, and answers.
    pub(super) fn wait(&self, admitted: Admitted) -> Answer {
        let answer = self.decide(admitted);
        match &answer {
            Answer::Order {
                found: Found::InFlight(pending) | Found::Recent(pending),
                status: OrderStatus::Waitlisted,
                replayed,
                ..
            } => {
                let (context, order) = (self.context, &pending.order);
                if pending.slot.state() == SlotState::Persisted {
                    context.wait_for_turn(self.request, order.sku, order.id);
                }
                if context.is_listed(order) {
                    return answer;
                }
                self.left(order, *replayed).unwrap_or(answer)
            }
            _ => answer,
        }
    }

    /// The answer about an order that has left its waiting list since it was found: its row tells.
    fn left(&self, order: &Order, replayed: bool) -> Option<Answer> {
        let deadline = self.started + self.context.order_timeout;
        let found = self.context.find_stored(self.request, deadline, order.id);
        let stored = found.ok().flatten()?;
        let status = stored.status;
        let http_status = match status {
            _ if replayed => 200,
            OrderStatus::PendingPayment => 201,
            _ => 202,
        };
        let found = Found::Stored(Box::new(stored));
        Some(Answer::order(found, status, http_status, replayed))
    }

    fn decide(&self, admitted: Admitted) -> Answer {
        let Creation {
            context, request, ..
        } = *self;
        let deadline = self.started + self.wanted.wait;
        let (found, replayed) = match admitted {
            Admitted::Placed(pending) => {
                let queued_at = request.trace.map(|trace| (trace, Instant::now()));
                let state = wait_for_own(context, request, &pending, deadline);
                if let Some((trace, queued_at)) = queued_at {
                    note_wait(trace, queued_at, &pending, state);
                }
                return answer_by_slot(context, pending, state, false);
            }
            Admitted::Earlier { found, replayed } => (found, replayed),
        };
        match found {
            Found::InFlight(pending) => {
                let is_enough =
                    |pending: &PendingOrder| self.wanted.respond_async && pending.slot.is_durable();
                let state = wait_for_other(context, request, &pending, deadline, is_enough);
                answer_by_slot(context, pending, state, replayed)
            }
            Found::Recent(pending) => {
                answer_by_slot(context, pending, SlotState::Persisted, replayed)
            }
            // Another process may have abandoned it.
            Found::OnDisk(_) if !may_acknowledge(context) => {
                Answer::Problem(refuse(context, Refusal::NotReady))
            }
            Found::OnDisk(_) => accepted(context, found, replayed),
            Found::Stored(ref stored) => {
                let status = stored.status;
                if replayed || status == OrderStatus::Failed {
                    count(context, "replayed");
                    return Answer::order(found, status, 200, true);
                }
                count(context, "created");
                Answer::order(found, status, 201, false)
            }
        }
    }
}

/// Whether this process may still acknowledge durable orders. Checked again for each answer: the
/// check before the wake-up may be old by now.
fn may_acknowledge(context: &Context) -> bool {
    let durable = context.queue.durable();
    durable.is_some_and(|queue| queue.may_acknowledge())
}

fn accepted(context: &Context, found: Found, replayed: bool) -> Answer {
    let status = match &found {
        Found::InFlight(pending) | Found::Recent(pending) => pending.order.acknowledged_status(),
        Found::OnDisk(order) => order.acknowledged_status(),
        Found::Stored(stored) => stored.status,
    };
    count(
        context,
        if replayed {
            "replayed"
        } else {
            status.as_str()
        },
    );
    Answer::Order {
        found,
        status,
        http_status: if replayed { 200 } else { 202 },
        replayed,
        is_acknowledged: !replayed,
    }
}

/// The answer about an order in flight, by the `state` of its slot.
fn answer_by_slot(
    context: &Context,
    pending: Arc<PendingOrder>,
    state: SlotState,
    replayed: bool,
) -> Answer {
    // With respond-async the answer is `accepted`, even if the row was written first.
    let written = matches!(state, SlotState::Persisted | SlotState::Failed);
    if pending.slot.is_durable() && !(replayed && written) && may_acknowledge(context) {
        return accepted(context, Found::InFlight(pending), replayed);
    }
    match state {
        SlotState::Persisted => {
            let (http_status, outcome) = match replayed {
                true => (200, "replayed"),
                false if pending.order.waits() => (202, "waitlisted"),
                false => (201, "created"),
            };
            count(context, outcome);
            // An order of the journal may have waited past its payment deadline.
            let state = &context.state;
            let late =
                pending.slot.is_recorded() && state.is_late(&pending.order, state.ids.real_now());
            let status = if late {
                OrderStatus::Expired
            } else {
                pending.order.status_in_time()
            };
            Answer::order(Found::InFlight(pending), status, http_status, replayed)
        }
        SlotState::Appending | SlotState::Waiting | SlotState::Claimed | SlotState::OnDisk => {
            count(context, "undecided");
            Answer::order(Found::InFlight(pending), OrderStatus::Undecided, 202, false)
        }
        SlotState::Abandoned => {
            count(context, "timed_out");
            let detail =
                "the order was not written within its wait: it is not placed and nothing is held";
            Answer::Problem(Problem::new(504, "timed_out", detail))
        }
        SlotState::Unwritten => {
            count(context, "unwritten");
            // A service that goes on leaves an order unwritten only if its SKU's counters are
            // refused.
            let refusal = match context.intake.check_open() {
                Ok(()) => Refusal::SalePaused,
                Err(_) => Refusal::Draining,
            };
            Answer::Problem(problem(context, refusal))
        }
        SlotState::Failed if replayed => {
            count(context, "replayed");
            Answer::order(Found::InFlight(pending), OrderStatus::Failed, 200, replayed)
        }
        SlotState::Failed => {
            count(context, "failed");
            let detail = format!(
                "the database refused order {}: it is not placed and nothing is held; a dead letter keeps it, \
                 and GET tells if a person places it after all",
                pending.order.id
            );
            Answer::Problem(Problem::new(500, "internal", detail))
        }
    }
}

/// Waits for an order that this request placed. At the deadline either the deadline task abandons
/// an unacknowledged order or a worker has claimed it; keep waiting while the slot is still
/// `Waiting`.
fn wait_for_own(
    context: &Context,
    request: &Request<'_>,
    pending: &PendingOrder,
    deadline: Instant,
) -> SlotState {
    wait(request, || match pending.slot.state() {
        _ if pending.slot.is_durable() => true,
        SlotState::Waiting if !pending.slot.is_recorded() => false,
        SlotState::Appending | SlotState::Waiting | SlotState::Claimed => {
            Instant::now() >= deadline || context.is_stopping()
        }
        SlotState::Abandoned
        | SlotState::Persisted
        | SlotState::Failed
        | SlotState::Unwritten
        | SlotState::OnDisk => true,
    });
    pending.slot.state()
}

/// Traces the end of the wait for an order.
fn note_wait(trace: &Trace, from: Instant, pending: &PendingOrder, state: SlotState) {
    let id = pending.order.id;
    if pending.slot.is_durable() {
        trace.child("order log", from, vec![spans::order_id(id)]);
    } else if state == SlotState::Abandoned {
        trace.given_up(id);
    }
}

fn refuse(context: &Context, refusal: Refusal) -> Problem {
    count(context, refusal.code());
    problem(context, refusal)
}

fn problem(context: &Context, refusal: Refusal) -> Problem {
    let problem = Problem::from(refusal);
    match refusal {
        // Other nodes go on.
        Refusal::Draining if context.nodes.is_some() => problem.retry_after(1),
        _ => problem,
    }
}

pub(super) fn count(context: &Context, outcome: &'static str) {
    context.metrics.orders.count(outcome);
}

/// Whether this process takes orders. A node that leaves has no lanes, and says so to another that does not know that yet and
/// passes an order on: that one asks the new owner then.
pub(super) fn check_open(context: &Context, origin: Origin) -> Result<(), Problem> {
    match (context.intake.check_open(), origin) {
        (Err(Refusal::Draining), Origin::Node(_)) => Ok(()),
        (open, _) => open.map_err(|refusal| refuse(context, refusal)),
    }
}

pub(super) fn require_media_type(request: &Request<'_>, allowed: &[&str]) -> Result<(), Problem> {
    let media_type = request.header("content-type").map(|value| {
        let media_type = value.split(|byte| *byte == b';').next().unwrap_or_default();
        media_type.trim_ascii()
    });
    let is_allowed = |media_type: &[u8]| {
        allowed
            .iter()
            .any(|allowed| media_type.eq_ignore_ascii_case(allowed.as_bytes()))
    };
    if media_type.is_some_and(is_allowed) {
        return Ok(());
    }
    let detail = format!(
        "Content-Type: must be {}",
        allowed.first().copied().unwrap_or_default()
    );
    Err(Problem::new(415, "unsupported_media_type", detail))
}
