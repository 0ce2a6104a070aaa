//! Orphan payments (payments without an order): matched as soon as the order appears; if it never does, the
//! order is recovered from the receipt that travelled with the payment, or the payment is left to be refunded.
//! Never dropped (I7).
//!
//! ```text
//!   orphan ─┬─ its order is a row or a dead letter ──────────────────► matched, as a callback is
//!           ├─ its order is in flight, or waits in the journal ──────► waits with it
//!           ├─ not found, and fewer checks than configured ──────────► waits twice as long
//!           └─ checks used up ──────────► receipt ─┬─ ours, and it fits ─► the order is written, paid
//!                                                  └─ else, or deleted ──► refund_due
//! ```
//!
//! The reconciler runs in the same process as the callbacks on purpose: if it is down, so are they, and the
//! provider delivers again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::settler::{Settler, Signals};
use crate::clock;
use crate::faults::bug;
use crate::order::payment::{PaymentState, RefundReason};
use crate::order::receipt::{ReceiptKeys, ReceiptOrder};
use crate::order::{Order, OrderId, OrderUnits, Quantity, Refusal, UnixMillis};
use crate::pipeline::cluster::held::hold;
use crate::pipeline::cluster::lending;
use crate::pipeline::orders::lookup::OrderLookup;
use crate::queue::OrderQueue;
use crate::state::buyers::{BuyerClaim, BuyerOrder, Claimed, NothingSticky};
use crate::state::stock::Sku;
use crate::store::postgres::payments::StoredPayment;
use crate::store::postgres::pruning;
use crate::store::{StoreError, postgres, settlement};

/// Maximum of payments matched in one transaction.
const MATCH_MAX: i64 = 1_000;
/// Maximum of orphans checked in one pass, each decided on its own.
const CHECKS_MAX: i64 = 100;
/// Minimum interval between two attempts to match orphans to orders that have appeared.
const MATCH: Duration = Duration::from_millis(200);
/// Time for matching payments one by one before operators are served again.
const ONE_BY_ONE: Duration = Duration::from_millis(200);
/// Interval at which open payments are counted.
const COUNT: Duration = Duration::from_secs(5);
/// Delay until an order in flight is looked for again, in milliseconds.
const IN_FLIGHT_MS: u64 = 1_000;
/// Delay until a payment is retried whose decision the database refused, in milliseconds.
const UNDECIDED_MS: u64 = 5_000;

/// Decision about an orphan whose order was not found.
enum Decision {
    /// Write its order as paid; `held`: memory holds the units already.
    Recover { order: Order, held: bool },
    /// Write its order, and leave the payment to be refunded.
    RecoverForRefund(Order, RefundReason),
    /// Leave the payment to be refunded, without an order.
    GiveUp(RefundReason),
    /// Others may have units for it, which are asked for.
    Ask(Arc<Sku>, Quantity),
    /// Decide later.
    Later,
}

/// Schedule of the checks for an orphan's order.
#[derive(Clone, Copy, Debug)]
pub struct OrphanChecks {
    /// Checks before the order is recovered from the receipt.
    pub count: u32,
    /// Pause before the first check; doubled after each.
    pub first: Duration,
}

impl OrphanChecks {
    /// The time that all checks take if nothing delays them.
    pub fn take(self) -> Duration {
        let pauses = 1_u32.checked_shl(self.count).unwrap_or(0).wrapping_sub(1);
        self.first.saturating_mul(pauses)
    }
}

/// Finds the orders of orphan payments, or decides about their money.
pub struct Reconciler {
    pub(super) settler: Settler,
    lookup: OrderLookup,
    receipts: Arc<ReceiptKeys>,
    orphan_checks: OrphanChecks,
    /// When orphans are matched and due ones checked next.
    next_match: Instant,
    next_count: Instant,
    /// The last payment that was matched one by one.
    matched_up_to: i64,
}

impl Reconciler {
    /// A reconciler that writes through `settler`, looks up orders in `queue` and opens receipts with
    /// `receipts`.
    pub fn new(
        settler: Settler,
        queue: Arc<dyn OrderQueue>,
        receipts: Arc<ReceiptKeys>,
        orphan_checks: OrphanChecks,
    ) -> Self {
        let now = clock::now();
        let (state, database) = (&settler.parts.state, &settler.parts.database);
        let lookup = OrderLookup::new(Arc::clone(state), queue, database.clone());
        Reconciler {
            settler,
            lookup,
            receipts,
            orphan_checks,
            next_match: now,
            next_count: now,
            matched_up_to: 0,
        }
    }

    /// Does one pass over the orphans, if there may be any. Returns true if more are due.
    pub(super) async fn run_pass(&mut self) -> Result<bool, StoreError> {
        self.count_open().await?;
        if !self.signals().may_have_orphans() || clock::now() < self.next_match {
            return Ok(false);
        }
        let started = clock::now();
        let matched = self.match_orphans().await?;
        let checked = self.check_orphans().await?;
        // A pass over many orphans takes longer, so the next one waits longer.
        self.next_match = clock::now() + MATCH.max(clock::since(started) * 3);
        let more = matched || checked;
        if more {
            self.next_match = clock::now();
        }
        Ok(more)
    }

    async fn count_open(&mut self) -> Result<(), StoreError> {
        if clock::now() < self.next_count {
            return Ok(());
        }
        self.next_count = clock::now() + COUNT;
        // Before the count: a payment that arrives meanwhile sets it again.
        self.signals().set_may_have_orphans(false);
        let counted = postgres::payments::count_open(&self.settler.parts.database).await;
        let open = counted.inspect_err(|_| self.signals().set_may_have_orphans(true))?;
        let now = self.settler.parts.state.ids.real_now();
        let age = |since: Option<UnixMillis>| {
            since.map_or(0.0, |since| (now.0 - since.0).max(0) as f64 / 1_000.0)
        };
        let metrics = &self.settler.parts.metrics;
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
        if open.orphans > 0 {
            self.signals().set_may_have_orphans(true);
        }
        Ok(())
    }

    fn signals(&self) -> &Signals {
        &self.settler.parts.signals
    }

    /// Matches orphans to orders that have appeared. If one row cannot be locked, they are matched one by one.
    async fn match_orphans(&mut self) -> Result<bool, StoreError> {
        let one_by_one = self.signals().rows_are_held();
        let after = if one_by_one { self.matched_up_to } else { 0 };
        let database = &self.settler.parts.database;
        let found = postgres::payments::orphans_with_order(database, after, MATCH_MAX).await?;
        let full = found.len() as i64 == MATCH_MAX;
        let pending = &self.settler.parts.state.pending;
        let orders = found
            .iter()
            .filter_map(|one| Some((one.id, one.order_id?)))
            .filter(|(_, order_id)| pending.get(*order_id).is_none());
        let orders: Vec<(i64, OrderId)> = orders.collect();
        if !one_by_one {
            let ids: Vec<OrderId> = orders.iter().map(|(_, order_id)| *order_id).collect();
            return match self.match_orders(&ids).await {
                Ok(any) => Ok(full && any),
                Err(error) if error.is_about_rows() => {
                    tracing::warn!(reason = %error, payments = orders.len(), "payments could not be matched together; matching them one by one");
                    self.matched_up_to = 0;
                    self.signals().set_rows_are_held(true);
                    Ok(false)
                }
                Err(error) => Err(error),
            };
        }
        let started = clock::now();
        for (payment, order_id) in orders {
            self.matched_up_to = payment;
            match self.match_orders(&[order_id]).await {
                Ok(_) => {}
                Err(error) if error.is_about_rows() => {
                    tracing::warn!(payment, %order_id, reason = %error, "a payment could not be matched yet; retrying");
                }
                Err(error) => return Err(error),
            }
            if clock::since(started) > ONE_BY_ONE {
                return Ok(false);
            }
        }
        if !full {
            // All were tried; match together again, from the start.
            self.matched_up_to = 0;
            self.signals().set_rows_are_held(false);
        }
        Ok(false)
    }

    /// Matches the orphans of these orders to them. Returns true if any matched.
    async fn match_orders(&mut self, orders: &[OrderId]) -> Result<bool, StoreError> {
        // Orders of other nodes are matched there.
        let state = Arc::clone(&self.settler.parts.state);
        let database = self.settler.parts.database.clone();
        let (_held, orders, _) = hold(state.lanes.as_ref(), &database, orders.to_vec()).await?;
        if orders.is_empty() {
            return Ok(false);
        }
        let settler = &mut self.settler;
        let now = settler.parts.state.ids.real_now();
        for order_id in &orders {
            settler.parts.state.recent_orders.forget(*order_id);
        }
        let (moving, writer) = settler.writer().await?;
        let settlement = settlement::payments::match_orphans(writer, &orders, now).await?;
        settler.apply_settlement(&settlement).await;
        drop(moving);
        Ok(!settlement.matched.is_empty())
    }

    /// Checks the orphans that are due. Returns true if more are due.
    async fn check_orphans(&mut self) -> Result<bool, StoreError> {
        let now = self.settler.parts.state.ids.real_now();
        let started = clock::now();
        let due =
            postgres::payments::due_orphans(&self.settler.parts.database, now, CHECKS_MAX).await?;
        let full = due.len() as i64 == CHECKS_MAX;
        let checks = self.orphan_checks;
        let state = Arc::clone(&self.settler.parts.state);
        let database = self.settler.parts.database.clone();
        for payment in due {
            let ids: Vec<OrderId> = payment.order_id.into_iter().collect();
            let (_held, here, _) = hold(state.lanes.as_ref(), &database, ids).await?;
            if here.is_empty() && payment.order_id.is_some() {
                // Its owner decides.
                continue;
            }
            if payment.has_order || self.is_under_way(payment.order_id).await? {
                // Matched in the next pass, or once the order is a row.
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
                // A failing payment must not delay the others.
                tracing::warn!(payment = payment.id, reason = %error, "a payment could not be decided yet; retrying");
                self.put_off(&payment, payment.checks, UNDECIDED_MS).await?;
            }
            if clock::since(started) > ONE_BY_ONE {
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
        let at = self.settler.parts.state.ids.real_now().plus_ms(pause_ms);
        postgres::payments::note_check(&self.settler.parts.database, payment.id, checks, at).await
    }

    async fn is_under_way(&self, id: Option<OrderId>) -> Result<bool, StoreError> {
        match id {
            Some(id) => Ok(self.lookup.is_under_way(id).await?),
            None => Ok(false),
        }
    }

    /// Decides an orphan now, at an operator's request. Returns false if there is no such orphan.
    pub(super) async fn retry(&mut self, id: i64) -> Result<bool, StoreError> {
        let payment = postgres::payments::find(&self.settler.parts.database, id).await?;
        let Some(payment) = payment.filter(|one| one.state == PaymentState::Orphan) else {
            return Ok(false);
        };
        if payment.has_order {
            let orders: Vec<OrderId> = payment.order_id.into_iter().collect();
            self.match_orders(&orders).await?;
        } else if !self.is_under_way(payment.order_id).await? {
            self.decide(&payment).await?;
        }
        Ok(true)
    }

    /// Recovers an order that was not found, or leaves the payment to be refunded.
    async fn decide(&mut self, payment: &StoredPayment) -> Result<(), StoreError> {
        let now = self.settler.parts.state.ids.real_now();
        let state = Arc::clone(&self.settler.parts.state);
        let opened = payment.receipt.as_deref().map(|receipt| {
            self.receipts
                .open(receipt, payment.order_id, payment.amount)
        });
        let decision = match opened {
            None => Decision::GiveUp(RefundReason::ReceiptMissing),
            Some(Err(error)) => {
                tracing::warn!(payment = payment.id, reason = %error, "a payment's receipt is invalid; the payment has to be refunded");
                Decision::GiveUp(RefundReason::ReceiptInvalid)
            }
            // The provider has garbled the order id. With the id of the receipt the payment is checked as any
            // other orphan.
            Some(Ok(receipt)) if payment.order_id.is_none() => {
                state.orphans.insert(receipt.id, payment.paid_at);
                let database = &self.settler.parts.database;
                return postgres::payments::note_order(database, payment.id, receipt.id).await;
            }
            Some(Ok(receipt)) => match self.decide_on(payment, receipt.clone()) {
                Decision::Ask(sku, quantity) => {
                    // Released at once: what it says is looked at again.
                    drop(lending::hold(&sku, quantity).await);
                    self.decide_on(payment, receipt)
                }
                decision => decision,
            },
        };
        let over = match &decision {
            Decision::Recover { order, .. } | Decision::RecoverForRefund(order, _) => {
                self.end_of_deleted(payment, order).await?
            }
            _ => None,
        };
        match over.map_or(decision, Decision::GiveUp) {
            Decision::Later | Decision::Ask(..) => {
                return self.put_off(payment, payment.checks, IN_FLIGHT_MS).await;
            }
            Decision::GiveUp(reason) => {
                let (_moving, writer) = self.settler.writer().await?;
                if !settlement::payments::give_up(writer, payment.id, reason, now).await? {
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
            state.orphans.remove(id);
        }
        Ok(())
    }

    /// Why the payment of an order has to be refunded that retention has deleted. `None`: it was not deleted.
    async fn end_of_deleted(
        &self,
        payment: &StoredPayment,
        order: &Order,
    ) -> Result<Option<RefundReason>, StoreError> {
        let database = &self.settler.parts.database;
        if order.id.as_i64() >= pruning::deleted_below(database).await? {
            return Ok(None);
        }
        Ok(Some(if pruning::was_paid(database, order.id).await? {
            RefundReason::AlreadyPaid
        } else if payment.paid_at >= order.expires_at {
            RefundReason::OrderExpired
        } else {
            RefundReason::OrderCancelled
        }))
    }

    /// Writes a lost order as `refund_due`. If memory does not know the order, its key is claimed first;
    /// otherwise its units are released.
    async fn recover_for_refund(
        &mut self,
        payment: &StoredPayment,
        order: Order,
        reason: RefundReason,
        now: UnixMillis,
    ) -> Result<(), StoreError> {
        let state = Arc::clone(&self.settler.parts.state);
        let (buyers, user_id) = (&state.buyers, &order.user_id);
        let mut claim = None;
        if buyers.find(user_id, order.id).is_none() {
            let remembered = BuyerOrder::of(&order);
            match buyers.claim(user_id, remembered, None, Ok(()), &NothingSticky) {
                Ok(Claimed::Fresh(fresh)) => claim = Some(fresh),
                // A concurrent order was faster; the next check decides.
                Ok(Claimed::Duplicate(_)) | Err(_) => {
                    return self.put_off(payment, payment.checks, IN_FLIGHT_MS).await;
                }
            }
        }
        // A claim made here never held units.
        let held = claim.is_none();
        let (_moving, writer) = self.settler.writer().await?;
        if !settlement::payments::recover_order(writer, payment.id, &order, Some(reason), now)
            .await?
        {
            return Ok(());
        }
        claim.into_iter().for_each(BuyerClaim::commit);
        state.recovered_for_refund(&OrderUnits::of(&order), held);
        state.recent_orders.forget(order.id);
        state.orphans.remove(order.id);
        self.note_refund(payment, reason);
        Ok(())
    }

    fn note_refund(&self, payment: &StoredPayment, reason: RefundReason) {
        self.settler
            .parts
            .metrics
            .payments
            .verdicts
            .count("refund_due");
        self.settler
            .parts
            .metrics
            .payments
            .refunds
            .count(reason.as_str());
        tracing::warn!(payment = payment.id, order = payment.order_ref, %reason, "a payment has to be refunded");
    }

    /// Decides about an orphan by comparing its receipt with the payment and with memory.
    fn decide_on(&self, payment: &StoredPayment, receipt: ReceiptOrder) -> Decision {
        let state = &self.settler.parts.state;
        let Some(sku) = state.catalogue.in_receipt(receipt.sku) else {
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
        // A failover may have lost the row of an order that memory knows: one that waits for units, or has them.
        if sku.waitlist().has(order.id) {
            return Decision::GiveUp(RefundReason::NotAssigned);
        }
        let known = state.buyers.find(&order.user_id, order.id);
        let held = known.is_some_and(|known| known.is_live());
        let late = payment.paid_at >= order.expires_at;
        if known.is_some() && !held && !late {
            return Decision::RecoverForRefund(order, RefundReason::OrderCancelled);
        }
        // Its buyer may have ordered again under the same key.
        let look = || {
            let remembered = BuyerOrder::of(&order);
            state.buyers.under_key(&order.user_id, &remembered)
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
            match sku.refuse(order.quantity, 0) {
                Refusal::StockElsewhere => Decision::Ask(sku, order.quantity),
                _ => Decision::RecoverForRefund(order, RefundReason::SoldOut),
            }
        } else {
            Decision::Recover { order, held }
        }
    }

    /// Writes a lost order as paid. Unless memory holds its units and key already, both are claimed first, as
    /// for any other order.
    async fn recover(
        &mut self,
        payment: &StoredPayment,
        order: Order,
        held: bool,
        now: UnixMillis,
    ) -> Result<(), StoreError> {
        let state = Arc::clone(&self.settler.parts.state);
        let Some(sku) = state.catalogue.by_number(order.sku) else {
            return Ok(());
        };
        let mut taken = None;
        if !held {
            let buyers = &state.buyers;
            let remembered = BuyerOrder::of(&order);
            let claim = buyers.claim(&order.user_id, remembered, None, Ok(()), &NothingSticky);
            let (Ok(Claimed::Fresh(claim)), Ok(hold)) = (claim, sku.hold(order.quantity)) else {
                // A concurrent order was faster; the next check decides.
                return self.put_off(payment, payment.checks, IN_FLIGHT_MS).await;
            };
            taken = Some((claim, hold));
        }
        let (_moving, writer) = self.settler.writer().await?;
        if !settlement::payments::recover_order(writer, payment.id, &order, None, now).await? {
            return Ok(());
        }
        if let Some((claim, hold)) = taken {
            claim.commit();
            if !bug("recover_without_holding") {
                hold.commit();
            }
        }
        if !bug("recover_without_holding") {
            state.paid(&OrderUnits::of(&order));
        }
        state.recent_orders.forget(order.id);
        state.orphans.remove(order.id);
        self.settler
            .parts
            .metrics
            .payments
            .verdicts
            .count("recovered");
        tracing::info!(order_id = %order.id, payment = payment.id, "recovered a lost order from the receipt of its payment");
        Ok(())
    }
}
