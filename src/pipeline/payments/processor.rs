//! Refunds and decisions of operators, and the reconciling of orphan payments, on one task with one connection.
//!
//! ```text
//!   providers ──► callbacks ──┐
//!   operators ──► processor ──┼──► store::settlement ──► payments, orders, sku
//!   time      ──► expiry   ───┘          │
//!                                        └─ after each commit: counters and buyers in memory
//! ```
//!
//! * this file: the entry point for operators;
//! * `reconciler`: orphan payments; `callbacks` and `expiry` are tasks of their own; `settler`: the parts that
//!   all three share.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::reconciler::Reconciler;
use crate::clock;
use crate::order::OrderId;
use crate::store::StoreError;
use crate::store::settlement::refunds::{self, Closed, Recorded, RefundNote};

/// Requests that may be queued; when the queue is full, operators wait for a place.
const REQUESTS_MAX: usize = 64;
/// Interval between two passes over the orphans.
const PASS_EVERY: Duration = Duration::from_millis(100);
/// Pause after a pass failed because of the database.
pub(super) const PAUSE: Duration = Duration::from_secs(1);

enum Request {
    Refund(
        OrderId,
        RefundNote,
        oneshot::Sender<Result<Recorded, StoreError>>,
    ),
    Close(i64, RefundNote, oneshot::Sender<Result<Closed, StoreError>>),
    Retry(i64, oneshot::Sender<Result<bool, StoreError>>),
}

/// Handle to the payment processor. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PaymentsHandle {
    requests: mpsc::Sender<Request>,
}

impl PaymentsHandle {
    /// Records that the money of an order was refunded.
    ///
    /// # Errors
    /// If the database does not answer; nothing has changed.
    pub async fn record_refund(
        &self,
        order_id: OrderId,
        note: RefundNote,
    ) -> Result<Recorded, StoreError> {
        self.ask(|answer| Request::Refund(order_id, note, answer))
            .await
    }

    /// Closes a payment without an order.
    ///
    /// # Errors
    /// If the database does not answer; nothing has changed.
    pub async fn close(&self, payment: i64, note: RefundNote) -> Result<Closed, StoreError> {
        self.ask(|answer| Request::Close(payment, note, answer))
            .await
    }

    /// Looks for an orphan's order now and, if there is none, recovers it from the receipt. Returns false if
    /// there is no such orphan.
    ///
    /// # Errors
    /// If the database does not answer; the payment stays an orphan.
    pub async fn retry(&self, payment: i64) -> Result<bool, StoreError> {
        self.ask(|answer| Request::Retry(payment, answer)).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Request,
    ) -> Result<T, StoreError> {
        let stopped = || StoreError::Pool("the service is stopping".to_owned());
        let (answer, answered) = oneshot::channel();
        let sent = self.requests.send(request(answer)).await;
        sent.map_err(|_| stopped())?;
        answered.await.unwrap_or_else(|_| Err(stopped()))
    }
}

/// The task.
pub struct PaymentProcessor {
    reconciler: Reconciler,
    requests: mpsc::Receiver<Request>,
}

impl PaymentProcessor {
    /// A processor and its handle.
    pub fn new(reconciler: Reconciler) -> (PaymentsHandle, PaymentProcessor) {
        let (sender, requests) = mpsc::channel(REQUESTS_MAX);
        let processor = PaymentProcessor {
            reconciler,
            requests,
        };
        (PaymentsHandle { requests: sender }, processor)
    }

    /// Runs until the future is dropped or another process takes over.
    pub async fn run(mut self) {
        let mut next_pass = clock::now();
        loop {
            tokio::select! {
                biased;
                request = self.requests.recv() => match request {
                    Some(request) => self.serve(request).await,
                    None => return,
                },
                () = tokio::time::sleep_until(next_pass.into()) => {
                    next_pass = match self.reconcile().await {
                        Ok(true) => clock::now(),
                        Ok(false) => clock::now() + PASS_EVERY,
                        Err(error) => {
                            self.reconciler.settler.note_failure(&error);
                            clock::now() + PAUSE
                        }
                    };
                }
            }
            if self.reconciler.settler.parts.state.poison.is_set() {
                return;
            }
        }
    }

    /// Does one part of the due work on orphans. Returns true if more is due.
    async fn reconcile(&mut self) -> Result<bool, StoreError> {
        self.reconciler.settler.forget_landed();
        let state = &self.reconciler.settler.parts.state;
        state.orphans.forget_expected(state.ids.real_now());
        self.reconciler.run_pass().await
    }

    async fn serve(&mut self, request: Request) {
        let now = self.reconciler.settler.parts.state.ids.real_now();
        match request {
            Request::Refund(order_id, note, answer) => {
                let _ = answer.send(self.refund(order_id, &note).await);
            }
            Request::Close(payment, note, answer) => {
                let closed = match self.reconciler.settler.writer().await {
                    Ok((_moving, writer)) => {
                        refunds::close_payment(writer, payment, &note, now).await
                    }
                    Err(error) => Err(error),
                };
                if let Ok(Closed::Done(Some(order_id))) = &closed {
                    self.reconciler
                        .settler
                        .parts
                        .state
                        .orphans
                        .remove(*order_id);
                }
                let _ = answer.send(closed);
            }
            Request::Retry(payment, answer) => {
                let _ = answer.send(self.reconciler.retry(payment).await);
            }
        }
    }

    async fn refund(
        &mut self,
        order_id: OrderId,
        note: &RefundNote,
    ) -> Result<Recorded, StoreError> {
        let settler = &mut self.reconciler.settler;
        let now = settler.parts.state.ids.real_now();
        settler.parts.state.recent_orders.forget(order_id);
        let (moving, writer) = settler.writer().await?;
        let recorded = refunds::record(writer, order_id, note, now).await?;
        if let Recorded::Done(Some(moved)) = &recorded {
            settler.apply_moves(std::slice::from_ref(moved)).await;
        }
        drop(moving);
        Ok(recorded)
    }
}
