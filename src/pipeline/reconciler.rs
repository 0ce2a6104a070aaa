//! Payments whose order is not there: found as soon as it is, recovered from the receipt that
//! travelled with the payment where it never comes, or left to be refunded. Never dropped (I7).
//!
//! ```text
//!   orphan ─┬─ its order is a row or a dead letter ──────────────────► judged, as a callback is
//!           ├─ its order is in flight, or waits in the journal ──────► waits with it
//!           ├─ looked for in vain, less often than configured ───────► waits twice as long
//!           └─ looked for often enough ─► receipt ─┬─ ours, and it fits ─► the order is written, paid
//!                                                  └─ else ──────────────► refund_due
//! ```
//!
//! It is in the same process as callbacks on purpose: if it is down, so are they, and the provider
//! comes again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cashier::Cashier;
use crate::faults::bug;
use crate::order::payment::{PaymentState, RefundReason};
use crate::order::receipt::ReceiptOrder;
use crate::order::{Order, OrderId, Refusal, UnixMillis};
use crate::state::buyers::{BuyerClaim, Claimed, Remembered};
use crate::store::StoreError;
use crate::store::postgres::payments::StoredPayment;
use crate::store::settlement::payments::Arrived;

/// Payments matched in one transaction.
const MATCH_MAX: i64 = 1_000;
/// Orphans looked for at one look, each with a decision of its own.
const CHECKS_MAX: i64 = 100;
/// How often payments are matched with orders that have appeared, at most.
const MATCH: Duration = Duration::from_millis(200);
/// How long payments are matched one by one before callbacks are served again.
const ONE_BY_ONE: Duration = Duration::from_millis(200);
/// How often open payments are counted.
const COUNT: Duration = Duration::from_secs(5);
/// When an order in flight is looked for again, in milliseconds.
const IN_FLIGHT_MS: u64 = 1_000;
/// When a payment is looked at again whose decision the database has refused, in milliseconds.
const UNDECIDED_MS: u64 = 5_000;

/// What is to become of an orphan whose order was not found.
enum Decision {
    /// Its order is written as paid; `held`: memory holds its units already.
    Recover { order: Order, held: bool },
    /// Its order is written, and its money goes back.
    RecoverForRefund(Order, RefundReason),
    /// Its money goes back, and there is no order to write.
    GiveUp(RefundReason),
    /// It cannot be decided now.
    Later,
}

impl Cashier {
    /// Looks at orphans, where there may be any. True: there are more that are due.
    pub(super) async fn look_at_orphans(&mut self) -> Result<bool, StoreError> {
        self.count_open().await?;
        if !self.may_have_orphans || Instant::now() < self.next_match {
            return Ok(false);
        }
        let started = Instant::now();
        let matched = self.match_orphans().await?;
        let checked = self.check_orphans().await?;
        // A crowd of orphans takes longer to look through, and is looked through less often.
        self.next_match = Instant::now() + MATCH.max(started.elapsed() * 3);
        let more = matched || checked;
        if more {
            self.next_match = Instant::now();
        }
        Ok(more)
    }

    async fn count_open(&mut self) -> Result<(), StoreError> {
        if Instant::now() < self.next_count {
            return Ok(());
        }
        self.next_count = Instant::now() + COUNT;
        let open = self.parts.database.open_payments().await?;
        let now = self.parts.ledger.ids.real_now();
        let age = |since: Option<UnixMillis>| {
            since.map_or(0.0, |since| (now.0 - since.0).max(0) as f64 / 1_000.0)
        };
        let metrics = &self.parts.metrics;
        metrics.payments.orphan_payments.set(open.orphans);
        metrics
            .payments
            .orphan_oldest_seconds
            .set(age(open.oldest_orphan));
        metrics.payments.refunds_due.set(open.refunds_due);
        metrics
            .payments
            .refund_due_oldest_seconds
            .set(age(open.oldest_refund_due));
        self.may_have_orphans = open.orphans > 0;
        Ok(())
    }

    /// Lets orphans meet orders that have appeared. Where rows of one of them cannot be had, they
    /// are matched one by one, for no longer at a time than a callback may wait.
    async fn match_orphans(&mut self) -> Result<bool, StoreError> {
        let after = self.one_by_one.unwrap_or(0);
        let found = self.parts.database.orphans_with_order(after, MATCH_MAX);
        let found = found.await?;
        let full = found.len() as i64 == MATCH_MAX;
        let arrived: Vec<Arrived> = found
            .iter()
            .filter_map(Arrived::of)
            .filter(|one| self.parts.ledger.pending.get(one.order_id).is_none())
            .collect();
        if self.one_by_one.is_none() {
            return match self.meet(&arrived).await {
                Ok(()) => Ok(full && !arrived.is_empty()),
                Err(error) if error.is_about_rows() => {
                    tracing::warn!(reason = %error, payments = arrived.len(), "payments are matched one by one");
                    self.one_by_one = Some(0);
                    Ok(false)
                }
                Err(error) => Err(error),
            };
        }
        let started = Instant::now();
        let mut unmatched = HashSet::new();
        for one in &arrived {
            self.one_by_one = Some(one.id);
            // Of several for one order the first that came is judged first.
            if unmatched.contains(&one.order_id) {
                continue;
            }
            match self.meet(std::slice::from_ref(one)).await {
                Ok(()) => {}
                Err(error) if error.is_about_rows() => {
                    self.note_unmatched(one, &error);
                    unmatched.insert(one.order_id);
                }
                Err(error) => return Err(error),
            }
            if started.elapsed() > ONE_BY_ONE {
                return Ok(false);
            }
        }
        if !full {
            // All were tried; together again from the start.
            self.one_by_one = None;
        }
        Ok(false)
    }

    fn note_unmatched(&self, one: &Arrived, error: &StoreError) {
        tracing::warn!(payment = one.id, order_id = %one.order_id, reason = %error, "a payment is not matched yet; it is tried again");
    }

    async fn meet(&mut self, arrived: &[Arrived]) -> Result<(), StoreError> {
        if arrived.is_empty() {
            return Ok(());
        }
        let now = self.parts.ledger.ids.real_now();
        for one in arrived {
            self.parts.ledger.recent.forget(one.order_id);
        }
        let settlement = self.writer().await?.meet(arrived, now).await?;
        self.settled(&settlement);
        Ok(())
    }

    /// Looks for the orders of orphans that are due. True: more are due.
    async fn check_orphans(&mut self) -> Result<bool, StoreError> {
        let now = self.parts.ledger.ids.real_now();
        let started = Instant::now();
        let due = self.parts.database.orphans_due(now, CHECKS_MAX).await?;
        let full = due.len() as i64 == CHECKS_MAX;
        let checks = self.parts.orphan_checks;
        for payment in due {
            if payment.has_order || self.is_in_flight(payment.order_id).await? {
                // Matched at the next look, or once it is a row.
                self.put_off(&payment, payment.checks, IN_FLIGHT_MS).await?;
            } else if u32::try_from(payment.checks).unwrap_or(0) + 1 < checks.count {
                let done = payment.checks + 1;
                let first = u64::try_from(checks.first.as_millis()).unwrap_or(u64::MAX);
                let pause = first.saturating_mul(1 << done.clamp(0, 30));
                self.put_off(&payment, done, pause).await?;
            } else if let Err(error) = self.decide(&payment).await {
                if let StoreError::Fenced { .. } = error {
                    return Err(error);
                }
                // It must not hold up the others.
                tracing::warn!(payment = payment.id, reason = %error, "a payment is not decided yet; it is tried again");
                self.put_off(&payment, payment.checks, UNDECIDED_MS).await?;
            }
            if started.elapsed() > ONE_BY_ONE {
                return Ok(true);
            }
        }
        Ok(full)
    }

    async fn put_off(
        &self,
        payment: &StoredPayment,
        checks: i32,
        pause_ms: u64,
    ) -> Result<(), StoreError> {
        let at = self.parts.ledger.ids.real_now().plus_ms(pause_ms);
        self.parts.database.note_check(payment.id, checks, at).await
    }

    /// Whether an order is on its way: queued, being written, in the journal, or parked.
    async fn is_in_flight(&self, id: Option<OrderId>) -> Result<bool, StoreError> {
        let Some(id) = id else { return Ok(false) };
        if self.parts.ledger.pending.get(id).is_some() {
            return Ok(true);
        }
        let queue = Arc::clone(&self.parts.queue);
        if !queue.durable().is_some_and(|queue| queue.may_hold(id)) {
            return self.parts.database.is_parked(id).await;
        }
        let found =
            tokio::task::spawn_blocking(move || queue.durable().map(|queue| queue.find(id)));
        match found.await {
            Ok(None | Some(Ok(None))) => Ok(self.parts.ledger.pending.get(id).is_some()
                || self.parts.database.is_parked(id).await?),
            Ok(Some(Ok(Some(_)))) => Ok(true),
            Ok(Some(Err(error))) => Err(StoreError::Data(format!("the journal: {error}"))),
            Err(panic) => Err(StoreError::Data(panic.to_string())),
        }
    }

    /// An operator does not want to wait any longer. False: there is no such orphan.
    pub(super) async fn retry(&mut self, id: i64) -> Result<bool, StoreError> {
        let payment = self.parts.database.payment(id).await?;
        let Some(payment) = payment.filter(|one| one.state == PaymentState::Orphan) else {
            return Ok(false);
        };
        if payment.has_order {
            let arrived: Vec<Arrived> = Arrived::of(&payment).into_iter().collect();
            self.meet(&arrived).await?;
        } else if !self.is_in_flight(payment.order_id).await? {
            self.decide(&payment).await?;
        }
        Ok(true)
    }

    /// Its order was not found: recovers it, or leaves the payment for a refund.
    async fn decide(&mut self, payment: &StoredPayment) -> Result<(), StoreError> {
        let now = self.parts.ledger.ids.real_now();
        let ledger = Arc::clone(&self.parts.ledger);
        let opened = payment.receipt.as_deref().map(|receipt| {
            self.parts
                .receipts
                .open(receipt, payment.order_id, payment.amount)
        });
        let decision = match opened {
            None => Decision::GiveUp(RefundReason::ReceiptMissing),
            Some(Err(error)) => {
                tracing::warn!(payment = payment.id, reason = %error, "a payment's receipt is not good");
                Decision::GiveUp(RefundReason::ReceiptInvalid)
            }
            // Its provider has garbled the order's id. Now it looks for its order as any other does.
            Some(Ok(receipt)) if payment.order_id.is_none() => {
                ledger.orphans.insert(receipt.id, payment.received_at);
                let database = &self.parts.database;
                return database.note_order(payment.id, receipt.id).await;
            }
            Some(Ok(receipt)) => self.decide_on(payment, receipt),
        };
        match decision {
            Decision::Later => return self.put_off(payment, payment.checks, IN_FLIGHT_MS).await,
            Decision::GiveUp(reason) => {
                if !self
                    .writer()
                    .await?
                    .give_up(payment.id, reason, now)
                    .await?
                {
                    return Ok(());
                }
                self.note_refund(payment, reason);
            }
            Decision::RecoverForRefund(order, reason) => {
                return self.recover_for_refund(payment, order, reason, now).await;
            }
            Decision::Recover { order, held } => {
                return self.recover(payment, order, held, now).await;
            }
        }
        if let Some(id) = payment.order_id {
            ledger.orphans.remove(id);
        }
        Ok(())
    }

    /// Writes a lost order as one whose money has to go back. Its key is taken first, unless
    /// memory knows the order, and then its units come back.
    async fn recover_for_refund(
        &mut self,
        payment: &StoredPayment,
        order: Order,
        reason: RefundReason,
        now: UnixMillis,
    ) -> Result<(), StoreError> {
        let ledger = Arc::clone(&self.parts.ledger);
        let (buyers, user_id) = (&ledger.buyers, &order.user_id);
        let known = buyers.orders_of(user_id);
        let mut claim = None;
        if !known.iter().any(|known| known.order_id == order.id) {
            match buyers.claim(user_id, Remembered::of(&order), None, Ok(())) {
                Ok(Claimed::Fresh(fresh)) => claim = Some(fresh),
                // Somebody was faster in this very moment; the next look tells.
                Ok(Claimed::Duplicate(_)) | Err(_) => {
                    return self.put_off(payment, payment.checks, IN_FLIGHT_MS).await;
                }
            }
        }
        let is_claimed = claim.is_some();
        let writer = self.writer().await?;
        if !writer
            .recover(payment.id, &order, Some(reason), now)
            .await?
        {
            return Ok(());
        }
        claim.into_iter().for_each(BuyerClaim::keep);
        if buyers.no_longer_live(user_id, order.id) == Some(true)
            && !is_claimed
            && let Some(sku) = ledger.catalogue.by_number(order.sku)
        {
            sku.counter().release(order.quantity.get());
        }
        ledger.recent.forget(order.id);
        ledger.orphans.remove(order.id);
        self.note_refund(payment, reason);
        Ok(())
    }

    fn note_refund(&self, payment: &StoredPayment, reason: RefundReason) {
        self.parts.metrics.payments.verdicts.count("refund_due");
        self.parts.metrics.payments.refunds.count(reason.as_str());
        tracing::warn!(payment = payment.id, order = payment.order_ref, %reason, "a payment has to go back");
    }

    /// Holds what a receipt says against the payment and against what is known.
    fn decide_on(&self, payment: &StoredPayment, receipt: ReceiptOrder) -> Decision {
        let ledger = &self.parts.ledger;
        let Some(sku) = ledger.catalogue.in_receipt(receipt.sku) else {
            return Decision::GiveUp(RefundReason::UnknownSku);
        };
        let order = Order {
            id: receipt.id,
            user_id: receipt.user_id,
            sku_id: Arc::clone(&sku.id),
            sku: sku.number,
            quantity: receipt.quantity,
            adjustment: receipt.adjustment,
            amount: receipt.amount,
            currency: receipt.currency,
            created_at: receipt.created_at,
            expires_at: receipt.expires_at,
            key: receipt.key,
            payload: receipt.payload,
            attributes: None,
        };
        // A failover may have lost the row of an order that memory knows, and its units are held.
        let known = ledger.buyers.orders_of(&order.user_id);
        let known = known.iter().find(|known| known.order_id == order.id);
        let held = known.is_some_and(|known| known.live);
        let late = payment.received_at >= order.expires_at;
        if known.is_some() && !held && !late {
            return Decision::RecoverForRefund(order, RefundReason::OrderCancelled);
        }
        // Its buyer may have ordered again under the same key.
        let look = || {
            let remembered = Remembered::of(&order);
            let buyers = &ledger.buyers;
            buyers.look(&order.user_id, &remembered, None, Ok(()))
        };
        match if known.is_none() { look() } else { Ok(None) } {
            Ok(None) => {}
            Ok(Some(_)) | Err(Refusal::IdempotencyKeyReused) => {
                return Decision::GiveUp(RefundReason::OrderedAgain);
            }
            Err(_) => return Decision::Later,
        }
        if late {
            Decision::RecoverForRefund(order, RefundReason::OrderExpired)
        } else if payment.currency != order.currency {
            Decision::RecoverForRefund(order, RefundReason::CurrencyMismatch)
        } else if payment.amount != order.amount {
            Decision::RecoverForRefund(order, RefundReason::AmountMismatch)
        } else if !held && sku.counter().free() < order.quantity.get() {
            Decision::RecoverForRefund(order, RefundReason::SoldOut)
        } else {
            Decision::Recover { order, held }
        }
    }

    /// Writes a lost order as paid. Its units and its key are held in memory first, as for any
    /// other order, unless they are already.
    async fn recover(
        &mut self,
        payment: &StoredPayment,
        order: Order,
        held: bool,
        now: UnixMillis,
    ) -> Result<(), StoreError> {
        let ledger = Arc::clone(&self.parts.ledger);
        let Some(sku) = ledger.catalogue.by_number(order.sku) else {
            return Ok(());
        };
        let mut taken = None;
        if !held {
            let buyers = &ledger.buyers;
            let claim = buyers.claim(&order.user_id, Remembered::of(&order), None, Ok(()));
            let (Ok(Claimed::Fresh(claim)), Ok(hold)) = (claim, sku.hold(order.quantity)) else {
                // Somebody was faster in this very moment; the next look tells.
                return self.put_off(payment, payment.checks, IN_FLIGHT_MS).await;
            };
            taken = Some((claim, hold));
        }
        let writer = self.writer().await?;
        if !writer.recover(payment.id, &order, None, now).await? {
            return Ok(());
        }
        if let Some((claim, hold)) = taken {
            claim.keep();
            if !bug("recover_without_holding") {
                hold.keep();
            }
        }
        if !bug("recover_without_holding") {
            sku.counter().sell(order.quantity.get());
        }
        ledger.recent.forget(order.id);
        ledger.orphans.remove(order.id);
        self.parts.metrics.payments.verdicts.count("recovered");
        tracing::info!(order_id = %order.id, payment = payment.id, "recovered a lost order from the receipt of its payment");
        Ok(())
    }
}
