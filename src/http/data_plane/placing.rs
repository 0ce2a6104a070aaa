//! Placing orders: one alone, or many in a batch. Both admit first and await afterwards, and both
//! give each order the same verdict.

use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::message::{Request, Response};
use super::preference::Preference;
use super::service::{DataPlane, json};
use super::wake::wait;
use crate::http::problem::Problem;
use crate::http::wire::{
    BatchLine, OrderBody, OrderView, idempotency_key, ndjson_line, no_batch_key,
};
use crate::order::{KeyHash, Order, OrderStatus, Refusal};
use crate::pipeline::orders::intake::{Admission, OrderRequest};
use crate::state::pending::{PendingOrder, SlotState};
use crate::store::postgres::orders::StoredOrder;

/// Most orders in one batch.
const BATCH_ORDERS_MAX: usize = 1_000;
/// A verdict with its order and its receipt; one of a refusal is shorter.
const LINE_BYTES_TYPICAL: usize = 416;

/// Pause before an order is looked for again whose key is known and which is nowhere: doubled each
/// time, up to the latter.
const LOOK_AGAIN_MIN: Duration = Duration::from_millis(1);
const LOOK_AGAIN_MAX: Duration = Duration::from_millis(250);

/// An order that was admitted and is to be awaited.
enum Admitted {
    /// This request placed it.
    Placed(Arc<PendingOrder>),
    /// An earlier one did, under the same key, and it is in flight.
    Joined(Arc<PendingOrder>),
    /// An earlier one did, a moment ago, and its row is there.
    Recent(Arc<PendingOrder>),
    /// An earlier one did, and its row is there.
    Stored(Box<StoredOrder>),
    /// An earlier one did, and it waits on the disk.
    OnDisk(Box<Order>),
}

/// What the client prefers, as far as it can be honoured.
#[derive(Clone, Copy)]
struct Wanted {
    /// It wants to be answered as soon as the order is durable.
    respond_async: bool,
    /// The wait that it named, at most the order timeout.
    asked: Option<Duration>,
    /// How long it waits at most.
    wait: Duration,
}

impl Wanted {
    /// Names the preference that was honoured. `accepted`: an order was acknowledged as durable.
    fn say_applied(self, response: &mut Response, accepted: bool) {
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

/// What an order came to.
enum Verdict {
    /// It is there, or it may be.
    Order {
        http_status: u16,
        replayed: bool,
        order: Standing,
    },
    /// It is not.
    Problem(Problem),
}

impl Verdict {
    /// Whether it acknowledges an order as durable, placed by this request.
    fn was_accepted(&self) -> bool {
        matches!(
            self,
            Verdict::Order {
                order: Standing::Accepted { .. },
                replayed: false,
                ..
            }
        )
    }
}

enum Standing {
    InFlight(Arc<PendingOrder>, OrderStatus),
    Accepted {
        order: Durable,
        estimated_wait_ms: u64,
    },
    Stored(Box<StoredOrder>),
}

/// An order that is durable in the queue.
enum Durable {
    InMemory(Arc<PendingOrder>),
    OnDisk(Box<Order>),
}

impl Durable {
    fn order(&self) -> &Order {
        match self {
            Durable::InMemory(pending) => &pending.order,
            Durable::OnDisk(order) => order,
        }
    }
}

impl Standing {
    fn view<'a>(&'a self, plane: &DataPlane) -> OrderView<'a> {
        match self {
            Standing::InFlight(pending, status) => {
                OrderView::of(&pending.order, *status, &plane.receipts)
            }
            Standing::Accepted {
                order,
                estimated_wait_ms,
            } => OrderView::accepted(order.order(), *estimated_wait_ms, &plane.receipts),
            Standing::Stored(stored) => plane.stored_view(stored),
        }
    }
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
        require_media_type(request, &["application/json"])?;
        let key = idempotency_key(request.header_values("idempotency-key"))?.map(KeyHash::of);
        let body = OrderBody::parse(request.body)?;
        let wanted = self.preferred(request);
        let started = Instant::now();
        let order = order_request(body, key, wanted);
        let verdict = match self.admit(request, &order, started) {
            Ok(admitted) => self.settle(request, admitted, started, wanted),
            Err(problem) => Verdict::Problem(problem),
        };
        if let Verdict::Order {
            http_status: 201, ..
        } = verdict
        {
            self.metrics
                .wait_seconds
                .observe(started.elapsed().as_secs_f64());
        }
        wanted.say_applied(response, verdict.was_accepted());
        match verdict {
            Verdict::Problem(problem) => return Err(problem),
            Verdict::Order {
                http_status,
                replayed,
                order,
            } => {
                let view = order.view(self);
                response.header("Location", format_args!("/v1/orders/{}", view.order_id()));
                if replayed {
                    response.header("Idempotency-Replayed", "true");
                }
                json(response, http_status, &view);
            }
        }
        Ok(())
    }

    /// `POST /v1/orders:batch`: one order a line, one verdict a line, in the same sequence. All
    /// lines are admitted before any is awaited.
    pub(super) fn place_batch(
        &self,
        request: &Request<'_>,
        response: &mut Response,
    ) -> Result<(), Problem> {
        self.intake
            .check_open()
            .map_err(|refusal| self.refuse(refusal))?;
        require_media_type(
            request,
            &[
                "application/x-ndjson",
                "application/jsonl",
                "application/json",
            ],
        )?;
        no_batch_key(request.header("idempotency-key").is_some())?;
        let body = request.body.strip_suffix(b"\n").unwrap_or(request.body);
        if body.is_empty() {
            return Err(Problem::new(
                400,
                "malformed_json",
                "a batch has one order on each line, and this has none",
            ));
        }
        if body
            .split(|byte| *byte == b'\n')
            .nth(BATCH_ORDERS_MAX)
            .is_some()
        {
            let detail = format!("a batch has at most {BATCH_ORDERS_MAX} orders");
            return Err(Problem::new(413, "body_too_large", detail));
        }
        let wanted = self.preferred(request);
        let started = Instant::now();
        let admitted: Vec<Result<Admitted, Problem>> = body
            .split(|byte| *byte == b'\n')
            .map(|line| {
                let BatchLine { body, key } = BatchLine::parse(line)?;
                self.admit(request, &order_request(body, key, wanted), started)
            })
            .collect();
        let verdicts: Vec<Verdict> = admitted
            .into_iter()
            .map(|admitted| match admitted {
                Ok(admitted) => self.settle(request, admitted, started, wanted),
                Err(problem) => Verdict::Problem(problem),
            })
            .collect();
        response.set_status(200);
        response.header("Content-Type", "application/x-ndjson");
        wanted.say_applied(response, verdicts.iter().any(Verdict::was_accepted));
        let out = response.body_mut();
        // So that it need not grow in steps, each of which copies all before it.
        out.reserve(verdicts.len() * LINE_BYTES_TYPICAL);
        for verdict in &verdicts {
            match verdict {
                Verdict::Problem(problem) => ndjson_line(out, problem.status, problem),
                Verdict::Order {
                    http_status, order, ..
                } => ndjson_line(out, *http_status, &order.view(self)),
            }
        }
        Ok(())
    }

    /// What the client prefers, as far as it can be honoured: `respond-async` needs a queue that
    /// survives the process.
    fn preferred(&self, request: &Request<'_>) -> Wanted {
        let preference = Preference::parse(request.header_values("prefer"));
        let respond_async = preference.respond_async && self.queue.durable().is_some();
        let asked = preference.wait.filter(|_| !respond_async);
        let wait = asked.map(|wait| wait.min(self.order_timeout));
        Wanted {
            respond_async,
            asked: wait,
            wait: wait.unwrap_or(self.order_timeout),
        }
    }

    fn admit(
        &self,
        request: &Request<'_>,
        order: &OrderRequest<'_>,
        started: Instant,
    ) -> Result<Admitted, Problem> {
        self.intake
            .check_rate(&order.user_id)
            .map_err(|refusal| self.refuse(refusal))?;
        let mut pause = LOOK_AGAIN_MIN;
        loop {
            let admission = self
                .intake
                .admit(order, Some(request.waker))
                .map_err(|refusal| self.refuse(refusal))?;
            let id = match admission {
                Admission::Placed(pending) => return Ok(Admitted::Placed(pending)),
                Admission::Duplicate {
                    pending: Some(pending),
                    ..
                } => return Ok(Admitted::Joined(pending)),
                Admission::Duplicate { id, pending: None } => id,
            };
            // One deadline for all orders of a batch: nobody waits beyond the order timeout.
            let deadline = started + self.order_timeout;
            if let Some(order) = self.find_on_disk(request, deadline, id)? {
                return Ok(Admitted::OnDisk(Box::new(order)));
            }
            if let Some(pending) = self.state.pending.get(id) {
                return Ok(Admitted::Joined(pending));
            }
            if let Some(recent) = self.recent(id) {
                return Ok(Admitted::Recent(recent));
            }
            if let Some(stored) = self.find_stored(request, deadline, id)? {
                return Ok(Admitted::Stored(Box::new(stored)));
            }
            // The first request is between claiming the key and registering its order, or just
            // undoing that. Either takes it microseconds; then this one finds the order, or is
            // the first itself. After a failover it may also be that the order is lost, until that is
            // found out.
            if started.elapsed() > self.order_timeout {
                return Err(self.refuse(Refusal::Overloaded));
            }
            may::coroutine::yield_now();
            self.on_tokio(request, deadline, async move {
                tokio::time::sleep(pause).await;
            })?;
            pause = (pause * 2).min(LOOK_AGAIN_MAX);
        }
    }

    fn settle(
        &self,
        request: &Request<'_>,
        admitted: Admitted,
        started: Instant,
        wanted: Wanted,
    ) -> Verdict {
        let deadline = started + wanted.wait;
        match admitted {
            Admitted::Placed(pending) => {
                let state = self.wait_for_own(request, &pending, deadline);
                self.judge(pending, state, false)
            }
            Admitted::Joined(pending) => {
                let enough =
                    |pending: &PendingOrder| wanted.respond_async && pending.slot.is_durable();
                let state = self.wait_for_other(request, &pending, deadline, enough);
                self.judge(pending, state, true)
            }
            Admitted::Recent(pending) => self.judge(pending, SlotState::Persisted, true),
            // Another process may have given it up.
            Admitted::OnDisk(_) if !self.may_acknowledge() => {
                Verdict::Problem(self.refuse(Refusal::NotReady))
            }
            Admitted::OnDisk(order) => self.accepted(Durable::OnDisk(order), true),
            Admitted::Stored(stored) => {
                self.count("replayed");
                Verdict::Order {
                    http_status: 200,
                    replayed: true,
                    order: Standing::Stored(stored),
                }
            }
        }
    }

    /// Whether this process may still call durable orders accepted: asked where the answer is made,
    /// because the one who wakes us has asked a while ago.
    fn may_acknowledge(&self) -> bool {
        let durable = self.queue.durable();
        durable.is_some_and(|queue| queue.may_acknowledge())
    }

    fn accepted(&self, order: Durable, replayed: bool) -> Verdict {
        let (http_status, outcome) = if replayed {
            (200, "replayed")
        } else {
            (202, "accepted")
        };
        self.count(outcome);
        Verdict::Order {
            http_status,
            replayed,
            order: Standing::Accepted {
                order,
                estimated_wait_ms: self.estimated_wait_ms(),
            },
        }
    }

    fn judge(&self, pending: Arc<PendingOrder>, state: SlotState, replayed: bool) -> Verdict {
        // Who asked to be answered at once gets that answer, also where the row came first.
        let written = matches!(state, SlotState::Persisted | SlotState::Failed);
        if pending.slot.is_durable() && !(replayed && written) && self.may_acknowledge() {
            return self.accepted(Durable::InMemory(pending), replayed);
        }
        match state {
            SlotState::Persisted => {
                let (http_status, outcome) = if replayed {
                    (200, "replayed")
                } else {
                    (201, "created")
                };
                self.count(outcome);
                // One of the journal may have waited for too long to be payable.
                let state = &self.state;
                let late = pending.slot.is_recorded()
                    && state.is_late(&pending.order, state.ids.real_now());
                let status = if late {
                    OrderStatus::Expired
                } else {
                    OrderStatus::PendingPayment
                };
                let order = Standing::InFlight(pending, status);
                Verdict::Order {
                    http_status,
                    replayed,
                    order,
                }
            }
            SlotState::Appending | SlotState::Waiting | SlotState::Claimed | SlotState::OnDisk => {
                self.count("undecided");
                let order = Standing::InFlight(pending, OrderStatus::Undecided);
                Verdict::Order {
                    http_status: 202,
                    replayed: false,
                    order,
                }
            }
            SlotState::Abandoned => {
                self.count("timed_out");
                let detail = "the order was not written within its wait: it is not placed and nothing is held";
                Verdict::Problem(Problem::new(504, "timed_out", detail))
            }
            SlotState::Unwritten => {
                self.count("unwritten");
                // Of a service that goes on, only because its SKU's counters are refused.
                let refusal = match self.intake.check_open() {
                    Ok(()) => Refusal::SalePaused,
                    Err(_) => Refusal::Draining,
                };
                Verdict::Problem(Problem::from(refusal))
            }
            SlotState::Failed if replayed => {
                self.count("replayed");
                let order = Standing::InFlight(pending, OrderStatus::Failed);
                Verdict::Order {
                    http_status: 200,
                    replayed,
                    order,
                }
            }
            SlotState::Failed => {
                self.count("failed");
                let detail = format!(
                    "the database refused order {}: it is not placed and nothing is held; a dead letter keeps it, \
                     and GET tells if a person places it after all",
                    pending.order.id
                );
                Verdict::Problem(Problem::new(500, "internal", detail))
            }
        }
    }

    /// Waits for an order that this request placed. At its deadline one that nobody was promised
    /// anything of is abandoned by the deadline keeper, or a worker has claimed it; until then
    /// `Waiting` is no answer.
    fn wait_for_own(
        &self,
        request: &Request<'_>,
        pending: &PendingOrder,
        deadline: Instant,
    ) -> SlotState {
        wait(request, || match pending.slot.state() {
            _ if pending.slot.is_durable() => true,
            SlotState::Waiting if !pending.slot.is_recorded() => false,
            SlotState::Appending | SlotState::Waiting | SlotState::Claimed => {
                Instant::now() >= deadline || self.is_stopping()
            }
            SlotState::Abandoned
            | SlotState::Persisted
            | SlotState::Failed
            | SlotState::Unwritten
            | SlotState::OnDisk => true,
        });
        pending.slot.state()
    }

    /// Waits for an order that another request placed, until it is decided, or `enough` for who
    /// asks, or `deadline` comes.
    pub(super) fn wait_for_other(
        &self,
        request: &Request<'_>,
        pending: &PendingOrder,
        deadline: Instant,
        enough: impl Fn(&PendingOrder) -> bool,
    ) -> SlotState {
        let over = || {
            pending.slot.state().is_final()
                || enough(pending)
                || Instant::now() >= deadline
                || self.is_stopping()
        };
        if !over() {
            wait(request, || {
                // Announced before the look: a change in between is either seen or wakes us.
                pending.slot.subscribe(Waker::clone(request.waker));
                self.state.pending.wake_by(pending, deadline);
                over()
            });
        }
        pending.slot.state()
    }

    fn refuse(&self, refusal: Refusal) -> Problem {
        self.count(refusal.code());
        Problem::from(refusal)
    }

    fn count(&self, outcome: &'static str) {
        self.metrics.orders.count(outcome);
    }
}

fn order_request(body: OrderBody<'_>, key: Option<KeyHash>, wanted: Wanted) -> OrderRequest<'_> {
    OrderRequest {
        user_id: body.user_id,
        sku_id: body.sku_id,
        quantity: body.quantity,
        adjustment: body.adjustment,
        attributes: body.attributes,
        key,
        wait: wanted.wait,
        respond_async: wanted.respond_async,
    }
}

fn require_media_type(request: &Request<'_>, allowed: &[&str]) -> Result<(), Problem> {
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
