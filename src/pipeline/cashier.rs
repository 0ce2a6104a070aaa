//! What happens to orders after their rows are there: callbacks of payment providers, orphan
//! payments, expiry, refunds. One task does it all, one transaction after the other.
//!
//! ```text
//!   callbacks ──► requests ──► cashier ──► store::settlement ──► payments, orders, sku
//!   operators ──►                │
//!                                ├─ every look: match orphans, recover orders, expire orders
//!                                └─ after each commit: counters and buyers in memory
//! ```
//!
//! While one transaction runs, what came meanwhile gathers: a flood of callbacks shares commits,
//! as orders do, and a single one costs one. Requests come before the other work, which is cut
//! into small parts, so that a callback never waits for a backlog of expiries. It never waits for
//! the order pipeline either: an order that is not a row yet leaves its payment an orphan for a
//! moment, and a lock that somebody holds does too.
//!
//! * here: the way in, storing, and what memory owes after a commit;
//! * `reconciler`: orphans; `expiry`: orders that were not paid in time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::expiry::Expiring;
use super::ledger::Ledger;
use crate::faults::bug;
use crate::metrics::Metrics;
use crate::order::payment::{Notice, Verdict};
use crate::order::receipt::ReceiptKeys;
use crate::order::{OrderId, UserId};
use crate::queue::OrderQueue;
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease};
use crate::store::settlement::payments::{Arrival, Settlement};
use crate::store::settlement::refunds::{Closed, Recorded, RefundNote};
use crate::store::settlement::{Moved, MovedTo, SettlementWriter};

/// Requests that may wait; beyond it callbacks are refused and the provider comes again.
const REQUESTS_MAX: usize = 8_192;
/// Messages stored in one transaction.
const BATCH_MAX: usize = 1_000;
/// How often orphans and expiries are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Pause after the database has failed a look.
const PAUSE: Duration = Duration::from_secs(1);

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

enum Request {
    Notice(Box<Notice>, oneshot::Sender<Result<(), NotStored>>),
    Refund(
        OrderId,
        RefundNote,
        oneshot::Sender<Result<Recorded, StoreError>>,
    ),
    Close(i64, RefundNote, oneshot::Sender<Result<Closed, StoreError>>),
    Retry(i64, oneshot::Sender<Result<bool, StoreError>>),
}

/// The way to the cashier. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CashierDesk {
    requests: mpsc::Sender<Request>,
}

impl CashierDesk {
    /// Stores a provider's message and lets its payment meet its order. `Ok` means committed.
    ///
    /// # Errors
    /// [`NotStored`]; nothing is stored then, or it is not known, and the same message again
    /// settles it.
    pub async fn take_in(&self, notice: Notice) -> Result<(), NotStored> {
        let (answer, answered) = oneshot::channel();
        self.requests
            .try_send(Request::Notice(Box::new(notice), answer))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => NotStored::Busy,
                mpsc::error::TrySendError::Closed(_) => NotStored::Stopped,
            })?;
        if bug("answer_before_commit") {
            return Ok(());
        }
        answered.await.unwrap_or(Err(NotStored::Stopped))
    }

    /// Records that the money of an order went back.
    ///
    /// # Errors
    /// Where the database does not answer; nothing has changed then.
    pub async fn record_refund(
        &self,
        order_id: OrderId,
        note: RefundNote,
    ) -> Result<Recorded, StoreError> {
        self.ask(|answer| Request::Refund(order_id, note, answer))
            .await
    }

    /// Closes a payment that has no order.
    ///
    /// # Errors
    /// Where the database does not answer; nothing has changed then.
    pub async fn close(&self, payment: i64, note: RefundNote) -> Result<Closed, StoreError> {
        self.ask(|answer| Request::Close(payment, note, answer))
            .await
    }

    /// Looks for an orphan's order now, and recovers it from the receipt where it is not found.
    /// False: there is no such orphan.
    ///
    /// # Errors
    /// Where the database does not answer; it stays an orphan then.
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

/// How long a payment looks for its order.
#[derive(Clone, Copy, Debug)]
pub struct OrphanChecks {
    /// So many times; then the order is recovered from the receipt.
    pub count: u32,
    /// Pause before the first, doubled each time.
    pub first: Duration,
}

impl OrphanChecks {
    /// How long all of them take, where nothing holds them up.
    pub fn take(self) -> Duration {
        let pauses = 1_u32.checked_shl(self.count).unwrap_or(0).wrapping_sub(1);
        self.first.saturating_mul(pauses)
    }
}

/// What a cashier works with.
pub struct CashierParts {
    /// The state in memory.
    pub ledger: Arc<Ledger>,
    /// Where orders may still be on their way.
    pub queue: Arc<dyn OrderQueue>,
    /// For reading.
    pub database: Database,
    /// Who this process is.
    pub lease: NodeLease,
    /// For writing.
    pub writer: SettlementWriter,
    /// What receipts are signed with.
    pub receipts: Arc<ReceiptKeys>,
    /// How long a payment looks for its order.
    pub orphan_checks: OrphanChecks,
    /// `orders.idempotency_window_ms`.
    pub window_ms: u64,
    /// What is counted.
    pub metrics: Metrics,
}

/// The task.
pub struct Cashier {
    pub(super) parts: CashierParts,
    requests: mpsc::Receiver<Request>,
    pub(super) expiring: Expiring,
    /// Whether any payment may be an orphan, also one that names no order of ours.
    pub(super) may_have_orphans: bool,
    /// When orphans are matched next, and due ones looked at.
    pub(super) next_match: Instant,
    pub(super) next_count: Instant,
    /// The payment up to which they are matched one by one, while they are.
    pub(super) one_by_one: Option<i64>,
    /// Orders whose rows have changed while a worker was about to note them as recent.
    landing: Vec<OrderId>,
    /// Commits that a failover has lost and memory has been told of.
    commits_lost: u64,
}

impl Cashier {
    /// A cashier, and the way to it.
    pub fn new(parts: CashierParts) -> (CashierDesk, Cashier) {
        let (sender, requests) = mpsc::channel(REQUESTS_MAX);
        let now = Instant::now();
        let cashier = Cashier {
            parts,
            requests,
            expiring: Expiring::default(),
            may_have_orphans: true,
            next_match: now,
            next_count: now,
            one_by_one: None,
            landing: Vec::new(),
            commits_lost: 0,
        };
        (CashierDesk { requests: sender }, cashier)
    }

    /// Works until the future is dropped, or another process has taken over.
    pub async fn run(mut self) {
        let (mut next_look, mut requests) = (Instant::now(), Vec::new());
        loop {
            tokio::select! {
                biased;
                count = self.requests.recv_many(&mut requests, BATCH_MAX) => {
                    if count == 0 {
                        return;
                    }
                }
                () = tokio::time::sleep_until(next_look.into()) => {}
            }
            self.serve(std::mem::take(&mut requests)).await;
            if Instant::now() >= next_look {
                next_look = match self.look().await {
                    Ok(true) => Instant::now(),
                    Ok(false) => Instant::now() + LOOK,
                    Err(error) => {
                        self.note_failure(&error);
                        Instant::now() + PAUSE
                    }
                };
            }
            if self.parts.ledger.poison.is_set() {
                return;
            }
        }
    }

    fn note_failure(&self, error: &StoreError) {
        if let StoreError::Fenced { .. } = error {
            self.parts.ledger.poison.set(error.to_string());
        } else {
            tracing::warn!(reason = %error, "payments and expiries wait; it is tried again");
        }
    }

    /// One part of each kind of work that is due. True: there is more of it.
    async fn look(&mut self) -> Result<bool, StoreError> {
        let ledger = &self.parts.ledger;
        self.landing.retain(|id| {
            // In this order: its worker notes it before it leaves the map.
            let stays = ledger.pending.get(*id).is_some();
            ledger.recent.forget(*id);
            stays
        });
        // Neither is held up by what ails the other.
        let orphans = match self.look_at_orphans().await {
            Err(error) if !matches!(error, StoreError::Fenced { .. }) => {
                self.note_failure(&error);
                self.next_match = Instant::now() + PAUSE;
                false
            }
            looked => looked?,
        };
        Ok(self.look_at_expiries().await? || orphans)
    }

    async fn serve(&mut self, requests: Vec<Request>) {
        let mut notices = Vec::new();
        let mut others = Vec::new();
        for request in requests {
            match request {
                Request::Notice(notice, answer) => notices.push((notice, answer)),
                other => others.push(other),
            }
        }
        // Halved until each that the database refuses stands alone.
        let mut parts = vec![notices];
        while let Some(mut part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            let messages: Vec<&Notice> = part.iter().map(|(notice, _)| &**notice).collect();
            match self.store(&messages).await {
                Err(error) if !error.is_transient() && part.len() > 1 => {
                    let newer = part.split_off(part.len() / 2);
                    parts.extend([newer, part]);
                }
                Err(error) => {
                    self.note_failure(&error);
                    for (_, answer) in part {
                        let _ = answer.send(Err(NotStored::Store(error.to_string())));
                    }
                }
                Ok(()) => {
                    for (_, answer) in part {
                        // Who has gone was promised nothing, and comes again.
                        let _ = answer.send(Ok(()));
                    }
                }
            }
        }
        for request in others {
            self.serve_operator(request).await;
        }
    }

    async fn serve_operator(&mut self, request: Request) {
        let now = self.parts.ledger.ids.real_now();
        match request {
            Request::Notice(..) => {}
            Request::Refund(order_id, note, answer) => {
                self.parts.ledger.recent.forget(order_id);
                let recorded = match self.writer().await {
                    Ok(writer) => writer.record_refund(order_id, &note, now).await,
                    Err(error) => Err(error),
                };
                if let Ok(Recorded::Done(Some(moved))) = &recorded {
                    self.settle_memory(std::slice::from_ref(moved));
                }
                let _ = answer.send(recorded);
            }
            Request::Close(payment, note, answer) => {
                let closed = match self.writer().await {
                    Ok(writer) => writer.close_payment(payment, &note, now).await,
                    Err(error) => Err(error),
                };
                if let Ok(Closed::Done(Some(order_id))) = &closed {
                    self.parts.ledger.orphans.remove(*order_id);
                }
                let _ = answer.send(closed);
            }
            Request::Retry(payment, answer) => {
                let _ = answer.send(self.retry(payment).await);
            }
        }
    }

    /// Stores messages, and lets their payments meet their orders.
    async fn store(&mut self, notices: &[&Notice]) -> Result<(), StoreError> {
        let ledger = Arc::clone(&self.parts.ledger);
        let now = ledger.ids.real_now();
        let orders: Vec<OrderId> = notices
            .iter()
            .filter_map(|notice| notice.payment.as_ref()?.order_id())
            .collect();
        // Known before they are stored, so that a worker that writes one of them late sees it.
        let fresh: Vec<OrderId> = orders
            .iter()
            .copied()
            .filter(|id| ledger.orphans.insert(*id, now))
            .collect();
        let in_flight: Vec<OrderId> = orders
            .iter()
            .copied()
            .filter(|id| {
                let in_flight = ledger.pending.get(*id).is_some();
                if !in_flight {
                    ledger.recent.forget(*id);
                }
                in_flight
            })
            .collect();
        let first = u64::try_from(self.parts.orphan_checks.first.as_millis()).unwrap_or(u64::MAX);
        let arrival = |judge| Arrival {
            now,
            check_at: now.plus_ms(first),
            judge,
            with_waiting: fresh.len() < orders.len(),
        };
        // While rows cannot be had nobody waits for them: what comes is stored and matched later.
        let judge = self.one_by_one.is_none();
        let mut stored = self.take_in(notices, arrival(judge), &in_flight).await;
        if let Err(error) = &stored
            && judge
            && !matches!(error, StoreError::Fenced { .. })
        {
            // A row that somebody holds, or counters that the database refuses: the money is
            // booked all the same, and matched later.
            if error.is_about_rows() {
                self.one_by_one = Some(0);
            }
            tracing::warn!(reason = %error, payments = notices.len(), "payments are stored before they are matched");
            stored = self.take_in(notices, arrival(false), &in_flight).await;
        }
        match stored {
            Ok(settlement) => {
                self.may_have_orphans |= settlement.without_order > 0
                    || settlement.met.iter().any(|met| met.verdict.is_none());
                // A message that was known already has left no new orphan.
                let waits = |id: &OrderId| {
                    let mut met = settlement.met.iter();
                    met.any(|met| met.order_id == *id && met.verdict.is_none())
                };
                fresh
                    .iter()
                    .filter(|id| !waits(id))
                    .for_each(|id| ledger.orphans.remove(*id));
                self.parts.metrics.payments.events.inc_by(settlement.events);
                self.parts
                    .metrics
                    .payments
                    .duplicates
                    .inc_by(notices.len() as u64 - settlement.events);
                self.parts
                    .metrics
                    .payments
                    .batch_rows
                    .observe(notices.len() as f64);
                self.settled(&settlement);
                Ok(())
            }
            Err(error) => {
                fresh.iter().for_each(|id| ledger.orphans.remove(*id));
                Err(error)
            }
        }
    }

    async fn take_in(
        &mut self,
        notices: &[&Notice],
        arrival: Arrival,
        in_flight: &[OrderId],
    ) -> Result<Settlement, StoreError> {
        let writer = self.writer().await?;
        writer.take_in(notices, arrival, in_flight).await
    }

    /// Who writes. Where a failover has lost commits, memory is told first what is sold now.
    pub(super) async fn writer(&mut self) -> Result<&mut SettlementWriter, StoreError> {
        self.parts.writer.connected().await?;
        let lost = self.parts.writer.commits_lost();
        if lost > self.commits_lost {
            self.correct_memory().await?;
            let newly_lost = lost - self.commits_lost;
            self.parts.metrics.commits_lost.inc_by(newly_lost);
            self.commits_lost = lost;
        }
        Ok(&mut self.parts.writer)
    }

    /// Makes memory agree with the database about what is sold: nobody but this task moves that.
    /// An order whose payment is lost is to be paid again, and falls due again; what was lost of a
    /// refund is sold again.
    async fn correct_memory(&self) -> Result<(), StoreError> {
        let (database, lease) = (&self.parts.database, self.parts.lease);
        let unpaid = database.unpaid_below(lease, OrderId::MAX).await?;
        self.parts.ledger.unpaid.note(unpaid);
        for found in self.parts.database.load_skus().await? {
            let Some(sku) = self.parts.ledger.catalogue.by_number(found.number) else {
                continue;
            };
            let (found, live) = (
                found.counter().snapshot().sold,
                sku.counter().snapshot().sold,
            );
            if found < live {
                sku.counter().hold_again(live - found);
            } else if found > live && sku.counter().hold(found - live).is_ok() {
                sku.counter().sell(found - live);
            }
            if found != live {
                tracing::error!(sku_id = %sku.id, sold = found, believed = live, "the database has lost payments or refunds");
            }
        }
        Ok(())
    }

    /// Counts verdicts and moves memory, after a commit.
    pub(super) fn settled(&mut self, settlement: &Settlement) {
        for met in &settlement.met {
            let Some(verdict) = met.verdict else {
                self.parts.metrics.payments.verdicts.count("orphan");
                continue;
            };
            self.parts.ledger.orphans.remove(met.order_id);
            match verdict {
                Verdict::Pay => self.parts.metrics.payments.verdicts.count("matched"),
                Verdict::Refund { reason, .. } => {
                    self.parts.metrics.payments.verdicts.count("refund_due");
                    self.parts.metrics.payments.refunds.count(reason.as_str());
                    tracing::warn!(order_id = %met.order_id, payment = met.id, %reason, "a payment has to go back");
                }
            }
        }
        self.settle_memory(&settlement.moved);
    }

    /// What memory owes for units that have moved in the database.
    pub(super) fn settle_memory(&mut self, moved: &[Moved]) {
        let ledger = &self.parts.ledger;
        for moved in moved {
            if ledger.pending.get(moved.order_id).is_some() {
                self.landing.push(moved.order_id);
            }
            ledger.recent.forget(moved.order_id);
            let Some(sku) = ledger.catalogue.by_number(moved.sku) else {
                continue;
            };
            let ended = || {
                let user_id = UserId::new(&moved.user_id).ok()?;
                ledger.buyers.no_longer_live(&user_id, moved.order_id)
            };
            match moved.to {
                MovedTo::Sold => sku.counter().sell(moved.quantity),
                // Whoever turns the buyer's record over gives the units back, once.
                MovedTo::Free if ended().unwrap_or(true) => {
                    sku.counter().release(moved.quantity);
                }
                MovedTo::Free | MovedTo::Nowhere => {}
                MovedTo::Restocked => {
                    ended();
                    sku.counter().unsell(moved.quantity);
                }
                MovedTo::Withdrawn => {
                    ended();
                    sku.counter().withdraw(moved.quantity);
                }
            }
        }
    }
}
