//! Callbacks of payment providers, on a task and a connection of their own: neither expiry nor
//! look-ups nor refunds stand before a platform that gives up after five seconds.
//!
//! While one transaction runs, and for 20 ms from its beginning, callbacks gather: a flood shares
//! commits, as orders do, and a single one costs one. None waits for the order pipeline: an order that is
//! not a row yet, or whose row somebody holds, leaves its payment an orphan for a moment.
//!
//! A payment is known to `state::orphans` from the door on, by the moment at which it counts as
//! made, so its order does not expire while the payment waits to be stored. Where it could not be
//! stored, because the database is away, its provider comes again, and the order waits that long.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::settler::Settler;
use crate::faults::bug;
use crate::order::payment::Delivery;
use crate::order::{OrderId, UnixMillis};
use crate::state::State;
use crate::store::StoreError;
use crate::store::settlement::payments::Arrival;

/// Callbacks that may wait; beyond it they are refused and the provider comes again.
const CALLBACKS_MAX: usize = 8_192;
/// Messages stored in one transaction.
const BATCH_MAX: usize = 1_000;
/// From the beginning of one transaction to that of the next, at least: a flood shares few commits and
/// leaves the database to orders, and a callback on its own does not wait. Without it the demo's flood
/// made 330 transactions a second, of two callbacks each.
const BATCH_EVERY: Duration = Duration::from_millis(20);
/// How long an order that was paid in time is kept for a payment that could not be stored, in
/// milliseconds. Providers come again within half an hour, most within minutes.
const EXPECTED_MS: u64 = 3_600_000;

/// Why a message was not stored. The provider is told, and sends it again.
#[derive(Debug, thiserror::Error)]
pub enum NotStored {
    /// More are waiting than may wait.
    #[error("too many callbacks are waiting")]
    Busy,
    /// The process is stopping.
    #[error("the service is stopping")]
    Stopped,
    /// The database did not take it.
    #[error("{0}")]
    Store(String),
}

struct Request {
    delivery: Delivery,
    answer: oneshot::Sender<Result<(), NotStored>>,
    _on_its_way: Option<OnItsWay>,
}

/// A payment that is known, and not stored yet.
struct OnItsWay {
    state: Arc<State>,
    order_id: OrderId,
}

impl OnItsWay {
    fn new(state: &Arc<State>, delivery: &Delivery) -> Option<Self> {
        let order_id = delivery.notice.payment.as_ref()?.order_id()?;
        state.orphans.arrives(order_id, delivery.paid_at());
        Some(OnItsWay {
            state: Arc::clone(state),
            order_id,
        })
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.state.orphans.arrived(self.order_id);
    }
}

/// The way in for callbacks. Cheap to clone.
#[derive(Clone)]
pub struct CallbacksHandle {
    requests: mpsc::Sender<Request>,
    state: Arc<State>,
}

impl CallbacksHandle {
    /// Stores a provider's message and lets its payment meet its order. `Ok` means committed.
    ///
    /// # Errors
    /// [`NotStored`]; nothing is stored then, or it is not known, and the same message again
    /// settles it.
    pub async fn take_in(&self, delivery: Delivery) -> Result<(), NotStored> {
        let (answer, answered) = oneshot::channel();
        let request = Request {
            _on_its_way: OnItsWay::new(&self.state, &delivery),
            delivery,
            answer,
        };
        self.requests
            .try_send(request)
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(request) => {
                    expect_again(&self.state, &request.delivery);
                    NotStored::Busy
                }
                mpsc::error::TrySendError::Closed(_) => NotStored::Stopped,
            })?;
        if bug("answer_before_commit") {
            return Ok(());
        }
        answered.await.unwrap_or(Err(NotStored::Stopped))
    }

    /// The time by which a callback's arrival is judged.
    pub fn now(&self) -> UnixMillis {
        self.state.ids.real_now()
    }
}

/// A payment that was not stored will be delivered again.
fn expect_again(state: &State, delivery: &Delivery) {
    let payment = delivery.notice.payment.as_ref();
    if let Some(id) = payment.and_then(|payment| payment.order_id()) {
        let until = state.ids.real_now().plus_ms(EXPECTED_MS);
        state.orphans.expect(id, delivery.paid_at(), until);
    }
}

/// The task.
pub struct Callbacks {
    settler: Settler,
    requests: mpsc::Receiver<Request>,
    /// When an orphan is looked at first, in milliseconds from its arrival.
    first_check_ms: u64,
}

impl Callbacks {
    /// The task, and the way to it.
    pub fn new(settler: Settler, first_check_ms: u64) -> (CallbacksHandle, Callbacks) {
        let (sender, requests) = mpsc::channel(CALLBACKS_MAX);
        let desk = CallbacksHandle {
            requests: sender,
            state: Arc::clone(&settler.parts.state),
        };
        let callbacks = Callbacks {
            settler,
            requests,
            first_check_ms,
        };
        (desk, callbacks)
    }

    /// Works until the future is dropped, or another process has taken over.
    pub async fn run(mut self) {
        let mut batch = Vec::new();
        let mut not_before = Instant::now();
        while self.requests.recv_many(&mut batch, BATCH_MAX).await > 0 {
            if batch.len() < BATCH_MAX {
                tokio::time::sleep_until(not_before).await;
                while batch.len() < BATCH_MAX
                    && let Ok(request) = self.requests.try_recv()
                {
                    batch.push(request);
                }
            }
            not_before = Instant::now() + BATCH_EVERY;
            self.serve(std::mem::take(&mut batch)).await;
            self.settler.forget_landed();
            if self.settler.parts.state.poison.is_set() {
                return;
            }
        }
    }

    async fn serve(&mut self, requests: Vec<Request>) {
        // Halved until each that the database refuses stands alone.
        let mut parts = vec![requests];
        while let Some(mut part) = parts.pop() {
            let deliveries: Vec<&Delivery> = part.iter().map(|one| &one.delivery).collect();
            let stored = self.store(&deliveries).await;
            if let Err(error) = &stored
                && !error.is_transient()
                && part.len() > 1
            {
                let newer = part.split_off(part.len() / 2);
                parts.extend([newer, part]);
                continue;
            }
            if let Err(error) = &stored {
                self.settler.note_failure(error);
            }
            for request in part {
                let answer = match &stored {
                    Ok(()) => Ok(()),
                    Err(error) => {
                        expect_again(&self.settler.parts.state, &request.delivery);
                        Err(NotStored::Store(error.to_string()))
                    }
                };
                // Who has gone was promised nothing, and comes again.
                let _ = request.answer.send(answer);
            }
        }
    }

    /// Stores messages, and lets their payments meet their orders.
    async fn store(&mut self, deliveries: &[&Delivery]) -> Result<(), StoreError> {
        let state = Arc::clone(&self.settler.parts.state);
        let signals = Arc::clone(&self.settler.parts.signals);
        let now = state.ids.real_now();
        let orders = || {
            let payments = deliveries.iter().map(|one| &one.notice.payment);
            payments.filter_map(|payment| payment.as_ref()?.order_id())
        };
        let in_flight: Vec<OrderId> = orders()
            .filter(|id| {
                let in_flight = state.pending.get(*id).is_some();
                if !in_flight {
                    state.recent_orders.forget(*id);
                }
                in_flight
            })
            .collect();
        let arrival = |judge| Arrival {
            now,
            check_at: now.plus_ms(self.first_check_ms),
            judge,
            with_waiting: orders().any(|id| state.orphans.is_stored(id)),
        };
        let (judged, unjudged) = (arrival(true), arrival(false));
        // While rows cannot be had nobody waits for them: what comes is stored and matched later.
        let judge = !signals.rows_are_held();
        let first = if judge { judged } else { unjudged };
        let mut stored = self.take_in(deliveries, first, &in_flight).await;
        if let Err(error) = &stored
            && judge
            && !matches!(error, StoreError::Fenced { .. })
        {
            // A row that somebody holds, or counters that the database refuses: the money is
            // booked all the same, and matched later.
            if error.is_about_rows() {
                signals.set_rows_are_held(true);
            }
            tracing::warn!(reason = %error, payments = deliveries.len(), "payments are stored before they are matched");
            stored = self.take_in(deliveries, unjudged, &in_flight).await;
        }
        stored
    }

    async fn take_in(
        &mut self,
        deliveries: &[&Delivery],
        arrival: Arrival,
        in_flight: &[OrderId],
    ) -> Result<(), StoreError> {
        let (moving, writer) = self.settler.writer().await?;
        let settlement = writer.take_in(deliveries, arrival, in_flight).await?;
        let payments = &self.settler.parts.metrics.payments;
        let count = deliveries.len();
        payments.events.inc_by(settlement.events);
        payments.duplicates.inc_by(count as u64 - settlement.events);
        payments.batch_rows.observe(count as f64);
        self.settler.settled(&settlement).await;
        drop(moving);
        Ok(())
    }
}
