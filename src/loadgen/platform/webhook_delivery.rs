//! Delivers the callbacks of payments, and retries them as a payment platform does.
//!
//! It is a thread with connections of its own, so that a data plane busy with orders delays callbacks
//! only by its own work on them. It is open-loop like the orders: each delivery is due at a moment, and
//! its latency counts from there. A failed delivery is retried with exponential backoff until the grace
//! period after the last order is over.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use smol_str::{SmolStr, format_smolstr};

use super::payment::{Forgery, PaymentKind, PlacedOrder};
use super::payment_scenario::{LATE_TAIL_NS, PaymentScenario, PlannedPayment};
use super::payment_stats::{DeliveryResult, PaymentOutcome, PaymentReport, PaymentStats};
use super::webhook::{PaymentMessage, Signer};
use crate::loadgen::buyers::RunShared;
use crate::loadgen::error::LoadError;
use crate::loadgen::plan::LoadPlan;
use crate::loadgen::sender::{Fault, Reply, Sender, Traffic};

/// Payment platforms time out at about this.
const CALLBACK_TIMEOUT_MAX: Duration = Duration::from_secs(5);
/// The pause after the first failure; it doubles with each further one, up to the longest.
const BACKOFF_NS: u64 = 250_000_000;
const BACKOFF_NS_MAX: u64 = 4_000_000_000;
/// Placed orders are looked for this often.
const TICK: Duration = Duration::from_millis(1);

/// The thread that delivers callbacks.
pub(in crate::loadgen) struct WebhookDelivery {
    thread: JoinHandle<std::io::Result<PaymentReport>>,
    acknowledged: Arc<AtomicU64>,
}

impl WebhookDelivery {
    /// Starts the thread of a plan that passed its check. It ends once all senders of placed orders are
    /// dropped and every payment is delivered or given up. `end`: about when the last request is due,
    /// after the start.
    pub(in crate::loadgen) fn open(
        plan: &LoadPlan,
        shared: &Arc<RunShared>,
        end: Duration,
    ) -> Result<(Self, mpsc::Sender<PlacedOrder>), LoadError> {
        let signer = plan.signer()?;
        let (payments_tx, placed_orders) = mpsc::channel();
        let acknowledged = Arc::new(AtomicU64::new(0));
        let grace_ns = plan.pay_grace_ms.saturating_mul(1_000_000);
        let timeout = CALLBACK_TIMEOUT_MAX.min(shared.request_timeout);
        let mut sender = Sender::over(shared.addresses.clone(), plan.pay_connections, timeout)
            .map_err(|e| failed(&e))?;
        let settings = Settings {
            shared: Arc::clone(shared),
            signer,
            forger: Signer::of_key(b"another key, not the platform's."),
            scenario: PaymentScenario::new(plan.seed, plan.pay_share),
            grace_ns,
            horizon_ns: u64::try_from(end.as_nanos())
                .unwrap_or(u64::MAX)
                .saturating_add(grace_ns),
            acknowledged: Arc::clone(&acknowledged),
        };
        let keep_outcomes = plan.keep_outcomes;
        let thread = std::thread::Builder::new()
            .name("loadgen-pay".to_owned())
            .spawn(move || {
                let mut deliveries = Deliveries {
                    settings,
                    placed_orders,
                    due: BTreeMap::new(),
                    next_number: 0,
                    deadline_ns: None,
                    stats: PaymentStats::new(keep_outcomes),
                };
                sender.run(&mut deliveries)?;
                Ok(deliveries.stats.close())
            })
            .map_err(|e| failed(&e))?;
        Ok((
            Self {
                thread,
                acknowledged,
            },
            payments_tx,
        ))
    }

    pub(in crate::loadgen) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Payments acknowledged so far.
    pub(in crate::loadgen) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    pub(in crate::loadgen) fn close(self) -> Result<PaymentReport, LoadError> {
        match self.thread.join() {
            Ok(report) => report.map_err(|e| failed(&e)),
            Err(_) => Err(failed(&"it panicked, as printed above")),
        }
    }
}

fn failed(reason: &dyn std::fmt::Display) -> LoadError {
    LoadError::Thread {
        what: "payment platform's thread",
        reason: reason.to_string(),
    }
}

/// Settings of the thread.
struct Settings {
    shared: Arc<RunShared>,
    signer: Signer,
    forger: Signer,
    scenario: PaymentScenario,
    grace_ns: u64,
    /// Until when a payment may fall due, in nanoseconds after the start.
    horizon_ns: u64,
    acknowledged: Arc<AtomicU64>,
}

/// The deliveries to come, and the statistics of those that were made.
struct Deliveries {
    settings: Settings,
    placed_orders: mpsc::Receiver<PlacedOrder>,
    /// By the moment at which they are due, then by their number.
    due: BTreeMap<(u64, u64), Delivery>,
    next_number: u64,
    /// When the grace period ends; none while orders may still come.
    deadline_ns: Option<u64>,
    stats: PaymentStats,
}

/// One attempt to deliver a payment.
struct Delivery {
    due_ns: u64,
    payment: Rc<Payment>,
    failures: u32,
}

/// A payment with all of its deliveries.
struct Payment {
    outcome: PaymentOutcome,
    forgery: Option<Forgery>,
    webhook_id: SmolStr,
    /// The signed text; only a forgery sends another one.
    signed: Bytes,
    body: Bytes,
    place: Cell<Option<usize>>,
    acknowledged: Cell<bool>,
}

impl Traffic for Deliveries {
    type Request = Delivery;

    fn take_due(&mut self, _: Instant, out: &mut Vec<u8>) -> Option<Delivery> {
        let first = self.due.first_entry()?;
        if first.key().0 > self.settings.now_ns() {
            return None;
        }
        let delivery = first.remove();
        let payment = &delivery.payment;
        if payment.forgery.is_none() && payment.place.get().is_none() {
            let place = self.stats.first_sent(PaymentOutcome {
                sent_at_ms: unix_ms(),
                ..payment.outcome.clone()
            });
            payment.place.set(Some(place));
        }
        self.settings.write(payment, out);
        Some(delivery)
    }

    fn next_due(&self) -> Option<Instant> {
        let start = self.settings.shared.start.get()?;
        let due = self.due.keys().next();
        let due = due.map(|(due_ns, _)| *start + Duration::from_nanos(*due_ns));
        // Orders come without a wake-up.
        let look = self.deadline_ns.is_none().then(|| Instant::now() + TICK);
        match (due, look) {
            (Some(due), Some(look)) => Some(due.min(look)),
            (due, look) => due.or(look),
        }
    }

    fn answered(&mut self, delivery: Delivery, _: Instant, answer: Result<Reply<'_>, Fault>) {
        let Delivery {
            due_ns,
            payment,
            failures,
        } = delivery;
        let result = answer.map(|reply| reply.status);
        let now_ns = self.settings.now_ns();
        if self.is_done(
            &payment,
            result,
            now_ns.saturating_sub(due_ns),
            failures > 0,
        ) {
            return;
        }
        let backoff_ns = (BACKOFF_NS << failures.min(8)).min(BACKOFF_NS_MAX);
        // Jitter by number, so that retries do not come back as one wave.
        let jitter_ns = backoff_ns / 16 * (self.next_number % 5);
        self.plan(Delivery {
            due_ns: now_ns + backoff_ns + jitter_ns,
            payment,
            failures: failures + 1,
        });
    }

    fn go_on(&mut self, _: Instant, busy: usize) -> bool {
        while self.deadline_ns.is_none() {
            match self.placed_orders.try_recv() {
                Ok(order) => self.plan_payments(&order),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    let now_ns = self.settings.now_ns();
                    self.deadline_ns = Some(now_ns.saturating_add(self.settings.grace_ns));
                }
            }
        }
        let is_over = self
            .deadline_ns
            .is_some_and(|deadline_ns| self.settings.now_ns() >= deadline_ns);
        if is_over || self.settings.shared.stop.load(Ordering::Relaxed) {
            self.due.clear();
        }
        busy > 0 || !self.due.is_empty() || self.deadline_ns.is_none()
    }
}

impl Deliveries {
    fn plan(&mut self, delivery: Delivery) {
        self.due
            .insert((delivery.due_ns, self.next_number), delivery);
        self.next_number += 1;
    }

    /// Plans the payments of an order.
    fn plan_payments(&mut self, order: &PlacedOrder) {
        let now_ns = self.settings.now_ns();
        let expires_in_ns = order.expires_at_ms.and_then(|at_ms| {
            let left_ms = u64::try_from(at_ms.saturating_sub(unix_ms())).ok()?;
            let left_ns = left_ms.saturating_mul(1_000_000);
            let last_ns = now_ns.saturating_add(left_ns).saturating_add(LATE_TAIL_NS);
            (last_ns <= self.settings.horizon_ns).then_some(left_ns)
        });
        let scenario = self.settings.scenario;
        let planned = scenario.of(order.buyer, order.sku, expires_in_ns);
        for (number, planned) in planned.iter().enumerate() {
            let payment = Rc::new(Payment::new(order, planned, number));
            for after_ns in &planned.deliveries_ns {
                self.plan(Delivery {
                    due_ns: now_ns + after_ns,
                    payment: Rc::clone(&payment),
                    failures: 0,
                });
            }
        }
    }

    /// Records the result of a delivery. True: no retry is needed.
    fn is_done(
        &mut self,
        payment: &Payment,
        result: DeliveryResult,
        latency_ns: u64,
        is_retry: bool,
    ) -> bool {
        let taken = matches!(result, Ok(200..=299));
        if payment.forgery.is_some() {
            self.stats.forged(result);
            return taken || result == Ok(401);
        }
        self.stats.delivered(result, latency_ns, is_retry);
        if taken && !payment.acknowledged.replace(true) {
            self.settings.acknowledged.fetch_add(1, Ordering::Relaxed);
            let place = payment.place.get().unwrap_or(usize::MAX);
            self.stats.acknowledged(&payment.outcome, place, unix_ms());
        }
        payment.acknowledged.get()
    }
}

impl Settings {
    fn now_ns(&self) -> u64 {
        let start = self.shared.start.get();
        start.map_or(0, |start| start.elapsed().as_nanos() as u64)
    }

    /// Writes the callback, signed at this moment.
    fn write(&self, payment: &Payment, out: &mut Vec<u8>) {
        let timestamp_s = unix_ms() / 1000;
        let signer = match payment.forgery {
            Some(Forgery::ForeignKey) => &self.forger,
            Some(Forgery::AlteredBody | Forgery::AlteredSignature) | None => &self.signer,
        };
        let mut signature = signer.sign(&payment.webhook_id, timestamp_s, &payment.signed);
        if payment.forgery == Some(Forgery::AlteredSignature) {
            let first = if signature[3..].starts_with('A') {
                "B"
            } else {
                "A"
            };
            signature.replace_range(3..4, first);
        }
        let (id, body) = (&payment.webhook_id, &payment.body);
        out.extend_from_slice(self.shared.target.callback_head());
        // Writing to memory cannot fail.
        let _ = write!(
            out,
            "webhook-id: {id}\r\nwebhook-timestamp: {timestamp_s}\r\nwebhook-signature: {signature}\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        out.extend_from_slice(body);
    }
}

impl Payment {
    /// Payment number `number` of an order. Its ids contain the order's, so that another run with the same
    /// seed on the same server makes new payments.
    fn new(order: &PlacedOrder, planned: &PlannedPayment, number: usize) -> Self {
        let PlacedOrder {
            order_id, amount, ..
        } = *order;
        let (mut paid_id, mut paid, mut receipt) = (order_id, amount, order.receipt.clone());
        match planned.kind {
            PaymentKind::Regular | PaymentKind::Late | PaymentKind::Second => {}
            PaymentKind::WrongAmount if planned.lot.is_multiple_of(2) && amount > 1 => paid -= 1,
            PaymentKind::WrongAmount => paid += 1,
            PaymentKind::Lost => {
                // Ids are time-ordered, and these are of a moment before there was a Millrace.
                paid_id = (planned.lot ^ order_id) & 0xffff_ffff | 1;
                receipt = (planned.lot.is_multiple_of(2))
                    .then(|| format_smolstr!("made-up-{:016x}", planned.lot));
            }
        }
        let mark = match planned.forgery {
            None => planned.kind.mark(),
            Some(_) => "f",
        };
        let payment_id = format_smolstr!("pay-{order_id}-{mark}{number}");
        let order_text = format_smolstr!("{paid_id}");
        let body_of = |payment_id: &str| {
            let message = PaymentMessage {
                order_id: &order_text,
                payment_id,
                amount: paid,
                currency: &order.currency,
                receipt: receipt.as_deref(),
            };
            message.body()
        };
        let signed = body_of(&payment_id);
        let body = match planned.forgery {
            Some(Forgery::AlteredBody) => body_of(&payment_id.replacen("pay-", "pey-", 1)),
            Some(Forgery::ForeignKey | Forgery::AlteredSignature) | None => signed.clone(),
        };
        Self {
            webhook_id: format_smolstr!("msg-{payment_id}"),
            outcome: PaymentOutcome {
                order_id: paid_id,
                payment_id,
                kind: planned.kind,
                amount: paid,
                currency: order.currency.clone(),
                has_receipt: receipt.is_some(),
                sent_at_ms: 0,
                acknowledged_at_ms: None,
                expires_at_ms: order.expires_at_ms,
            },
            forgery: planned.forgery,
            signed,
            body,
            place: Cell::new(None),
            acknowledged: Cell::new(false),
        }
    }
}

fn unix_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
