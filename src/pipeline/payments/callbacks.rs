//! Callbacks of payment providers, on a task and a connection of their own: a provider gives up after five
//! seconds, so callbacks do not queue behind expiry, look-ups or refunds.
//!
//! Callbacks gather while a transaction runs and for 20 ms from its beginning: a flood shares commits, as
//! orders do, and a single callback costs one. No callback waits for the order pipeline: if its order is not a
//! row yet, or the row is locked, the payment is an orphan for a moment.
//!
//! A payment is registered in `state::orphans` on arrival, with the moment at which it counts as made, so its
//! order does not expire while the payment waits to be stored. If it cannot be stored because the database is
//! away, the provider delivers it again, and the order is kept that long.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::settler::{Settler, Signals};
use crate::faults::bug;
use crate::order::payment::Delivery;
use crate::order::{OrderId, UnixMillis};
use crate::pipeline::cluster::held::hold;
use crate::state::State;
use crate::store::StoreError;
use crate::store::settlement::payments::{self, Arrival};

/// Callbacks that may be queued; beyond that they are refused, and the provider delivers them again.
const CALLBACKS_MAX: usize = 8_192;
/// Messages stored in one transaction.
const BATCH_MAX: usize = 1_000;
/// Minimum time between the beginnings of two transactions: a flood shares few commits and leaves the database
/// to orders, and a single callback does not wait. Without it the demo's flood made 330 transactions a second,
/// of two callbacks each.
const BATCH_EVERY: Duration = Duration::from_millis(20);
/// How long an order that was paid in time is kept for a payment that could not be stored, in milliseconds.
/// Providers deliver again within half an hour, most within minutes.
const EXPECTED_MS: u64 = 3_600_000;

/// Reason why a message was not stored. The provider gets an error and sends the message again.
#[derive(Debug, thiserror::Error)]
pub enum NotStored {
    /// The queue of callbacks is full.
    #[error("too many callbacks are waiting")]
    Busy,
    /// The process is stopping.
    #[error("the service is stopping")]
    Stopped,
    /// The database did not store it.
    #[error("{0}")]
    Store(String),
}

struct Request {
    delivery: Delivery,
    answer: oneshot::Sender<Result<(), NotStored>>,
    _incoming: Option<IncomingPayment>,
}

/// Registers a payment that has arrived and is not stored yet; dropping it ends the registration.
struct IncomingPayment {
    state: Arc<State>,
    order_id: OrderId,
}

impl IncomingPayment {
    fn new(state: &Arc<State>, delivery: &Delivery) -> Option<Self> {
        let order_id = delivery.notice.payment.as_ref()?.order_id()?;
        state.orphans.arrives(order_id, delivery.paid_at());
        Some(IncomingPayment {
            state: Arc::clone(state),
            order_id,
        })
    }
}

impl Drop for IncomingPayment {
    fn drop(&mut self) {
        self.state.orphans.arrived(self.order_id);
    }
}

/// Handle to the callbacks task. Cheap to clone.
#[derive(Clone)]
pub struct CallbacksHandle {
    requests: mpsc::Sender<Request>,
    state: Arc<State>,
    signals: Arc<Signals>,
}

impl CallbacksHandle {
    /// Stores a provider's message and matches its payment to its order. `Ok` means committed.
    ///
    /// # Errors
    /// [`NotStored`]: nothing is stored, or the outcome is unknown. Delivering the same message again is safe.
    pub async fn ingest(&self, delivery: Delivery) -> Result<(), NotStored> {
        let (answer, answered) = oneshot::channel();
        let request = Request {
            _incoming: IncomingPayment::new(&self.state, &delivery),
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

    /// Another node has stored a payment for an order of this one: it is looked for soon.
    pub fn look_for_orphans(&self) {
        self.signals.set_may_have_orphans(true);
    }

    /// Another node is about to store a payment for an order of this one, made at `paid_at`.
    pub fn expect(&self, id: OrderId, paid_at: UnixMillis) {
        expect(&self.state, id, paid_at);
    }

    /// The time of a callback's arrival, in milliseconds since the epoch.
    pub fn now(&self) -> UnixMillis {
        self.state.ids.real_now()
    }
}

/// Keeps the order of a payment that was not stored until the provider delivers it again.
fn expect_again(state: &State, delivery: &Delivery) {
    let payment = delivery.notice.payment.as_ref();
    if let Some(id) = payment.and_then(|payment| payment.order_id()) {
        expect(state, id, delivery.paid_at());
    }
}

fn expect(state: &State, id: OrderId, paid_at: UnixMillis) {
    let until = state.ids.real_now().plus_ms(EXPECTED_MS);
    state.orphans.expect(id, paid_at, until);
}

/// The task.
pub struct Callbacks {
    settler: Settler,
    requests: mpsc::Receiver<Request>,
    /// Delay between an orphan's arrival and its first check, in milliseconds.
    first_check_ms: u64,
}

impl Callbacks {
    /// The task and its handle.
    pub fn new(settler: Settler, first_check_ms: u64) -> (CallbacksHandle, Callbacks) {
        let (sender, requests) = mpsc::channel(CALLBACKS_MAX);
        let handle = CallbacksHandle {
            requests: sender,
            state: Arc::clone(&settler.parts.state),
            signals: Arc::clone(&settler.parts.signals),
        };
        let callbacks = Callbacks {
            settler,
            requests,
            first_check_ms,
        };
        (handle, callbacks)
    }

    /// Runs until the future is dropped or another process takes over.
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
        // A refused part is halved until each message that the database refuses stands alone.
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
                // A caller that has gone got no answer, so its provider delivers again.
                let _ = request.answer.send(answer);
            }
        }
    }

    /// Stores messages and matches their payments to their orders. Lanes of orders that are matched here are held until
    /// memory is updated; payments of other orders are stored as orphans, and the owner of their lane matches them.
    async fn store(&mut self, deliveries: &[&Delivery]) -> Result<(), StoreError> {
        let state = Arc::clone(&self.settler.parts.state);
        let signals = Arc::clone(&self.settler.parts.signals);
        let now = state.ids.real_now();
        let orders = || {
            let payments = deliveries.iter().map(|one| &one.notice.payment);
            payments.filter_map(|payment| payment.as_ref()?.order_id())
        };
        let (_held, elsewhere) = match &state.lanes {
            None => (None, Vec::new()),
            Some(lanes) => {
                let database = &self.settler.parts.database;
                let (held, here, _) = hold(Some(lanes), database, orders().collect()).await?;
                let elsewhere = orders().filter(|id| !here.contains(id)).collect();
                (Some(held), elsewhere)
            }
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
        let arrival = |match_now| Arrival {
            now,
            check_at: now.plus_ms(self.first_check_ms),
            match_now,
            with_waiting: orders().any(|id| state.orphans.is_stored(id)),
        };
        let (matched, unmatched) = (arrival(true), arrival(false));
        // While row locks are unavailable, payments are stored without waiting for rows and matched later.
        let match_now = !signals.rows_are_held();
        let first = if match_now { matched } else { unmatched };
        let mut stored = self.ingest(deliveries, first, &in_flight, &elsewhere).await;
        if let Err(error) = &stored
            && match_now
            && !matches!(error, StoreError::Fenced { .. })
        {
            // A row was locked, or the database refused the counters: store the payments unmatched, and match
            // them later.
            if error.is_about_rows() {
                signals.set_rows_are_held(true);
            }
            tracing::warn!(reason = %error, payments = deliveries.len(), "payments could not be matched now; storing them first, matching later");
            stored = self
                .ingest(deliveries, unmatched, &in_flight, &elsewhere)
                .await;
        }
        stored
    }

    async fn ingest(
        &mut self,
        deliveries: &[&Delivery],
        arrival: Arrival,
        in_flight: &[OrderId],
        elsewhere: &[OrderId],
    ) -> Result<(), StoreError> {
        let (moving, writer) = self.settler.writer().await?;
        let mut settlement =
            payments::ingest(writer, deliveries, arrival, in_flight, elsewhere).await?;
        // Their owner keeps them from expiring, and matches them.
        settlement.orphans.retain(|(id, _)| !elsewhere.contains(id));
        let payments = &self.settler.parts.metrics.payments;
        let count = deliveries.len();
        payments.events.inc_by(settlement.events);
        payments.duplicates.inc_by(count as u64 - settlement.events);
        payments.batch_rows.observe(count as f64);
        self.settler.apply_settlement(&settlement).await;
        drop(moving);
        Ok(())
    }
}
