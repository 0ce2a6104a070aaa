//! Delivers the callbacks of payments, and retries them as a payment platform does.
//!
//! It is a thread with connections of its own, so that a data plane busy with orders delays callbacks
//! only by its own work on them. It is open-loop like the orders: each delivery is due at a moment, and
//! its latency counts from there. A failed delivery is retried with exponential backoff until the grace
//! period after the last order is over.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::header::HeaderValue;
use hyper::{Method, Request};
use smol_str::{SmolStr, format_smolstr};
use tokio::sync::{Notify, mpsc};
use tokio::task::LocalSet;

use super::payment::{Forgery, PaymentKind, PlacedOrder};
use super::payment_scenario::{LATE_TAIL_NS, PaymentScenario, PlannedPayment};
use super::payment_stats::{DeliveryResult, PaymentOutcome, PaymentReport, PaymentStats};
use super::webhook::{Signer, Succeeded};
use crate::loadgen::connection::{Connection, request, send};
use crate::loadgen::error::LoadError;
use crate::loadgen::outcome::Fault;
use crate::loadgen::plan::LoadPlan;
use crate::loadgen::sender::{RunShared, pacer};

/// Takes placed orders from the sending threads. The delivery ends once all senders are dropped and
/// every payment is delivered or given up.
pub(in crate::loadgen) type PaymentsTx = mpsc::UnboundedSender<PlacedOrder>;

/// Payment platforms time out at about this.
const CALLBACK_TIMEOUT_MAX: Duration = Duration::from_secs(5);
/// The pause after the first failure; it doubles with each further one, up to the longest.
const BACKOFF_NS: u64 = 250_000_000;
const BACKOFF_NS_MAX: u64 = 4_000_000_000;
/// The dispatcher looks at what is due no more often and, while anything is to come, no more
/// rarely than this; the timer of tokio would be late by up to a millisecond more.
const TICK: Duration = Duration::from_micros(200);
const TICK_MAX: Duration = Duration::from_millis(1);
/// It looks up at least this often, to hear of a stop and of the end.
const LOOK_UP: Duration = Duration::from_millis(50);

/// The thread that delivers callbacks.
pub(in crate::loadgen) struct WebhookDelivery {
    thread: JoinHandle<PaymentReport>,
    acknowledged: Arc<AtomicU64>,
}

impl WebhookDelivery {
    /// Starts the thread of a plan that passed its check. `end`: about when the last request is due,
    /// after the start.
    pub(in crate::loadgen) fn open(
        plan: &LoadPlan,
        common: &Arc<RunShared>,
        end: Duration,
    ) -> Result<(Self, PaymentsTx), LoadError> {
        let failed = |reason: String| LoadError::Thread {
            what: "payment platform's thread",
            reason,
        };
        let signer = plan.signer()?;
        let (payments_tx, placed_orders) = mpsc::unbounded_channel();
        let acknowledged = Arc::new(AtomicU64::new(0));
        let grace_ns = plan.pay_grace_ms.saturating_mul(1_000_000);
        let settings = Settings {
            common: Arc::clone(common),
            signer,
            scenario: PaymentScenario::new(plan.seed, plan.pay_share),
            connections: plan.pay_connections,
            grace_ns,
            horizon_ns: u64::try_from(end.as_nanos())
                .unwrap_or(u64::MAX)
                .saturating_add(grace_ns),
            keep: plan.keep_outcomes,
            acknowledged: Arc::clone(&acknowledged),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| failed(e.to_string()))?;
        let thread = std::thread::Builder::new()
            .name("loadgen-pay".to_owned())
            .spawn(move || runtime.block_on(drive(settings, placed_orders)))
            .map_err(|e| failed(e.to_string()))?;
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
        self.thread.join().map_err(|_| LoadError::Thread {
            what: "payment platform's thread",
            reason: "it panicked, as printed above".to_owned(),
        })
    }
}

/// Settings of the thread.
struct Settings {
    common: Arc<RunShared>,
    signer: Signer,
    scenario: PaymentScenario,
    connections: usize,
    grace_ns: u64,
    /// Until when a payment may fall due, in nanoseconds after the start.
    horizon_ns: u64,
    keep: bool,
    acknowledged: Arc<AtomicU64>,
}

/// Shared by the tasks of the thread.
struct Shared {
    settings: Settings,
    forger: Signer,
    /// By the moment at which they are due, then by their number.
    due: RefCell<BTreeMap<(u64, u64), Delivery>>,
    number: Cell<u64>,
    /// Idle connections.
    connections: RefCell<Vec<Connection>>,
    in_flight: Cell<usize>,
    /// A delivery is over.
    changed: Notify,
    stats: RefCell<PaymentStats>,
}

/// One attempt to deliver a payment.
struct Delivery {
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

async fn drive(
    settings: Settings,
    placed_orders: mpsc::UnboundedReceiver<PlacedOrder>,
) -> PaymentReport {
    let keep = settings.keep;
    let shared = Rc::new(Shared {
        settings,
        forger: Signer::of_key(b"another key, not the platform's."),
        due: RefCell::default(),
        number: Cell::new(0),
        connections: RefCell::default(),
        in_flight: Cell::new(0),
        changed: Notify::new(),
        stats: RefCell::new(PaymentStats::new(keep)),
    });
    LocalSet::new()
        .run_until(dispatch(Rc::clone(&shared), placed_orders))
        .await;
    shared.stats.replace(PaymentStats::new(false)).close()
}

/// Takes placed orders and sends due deliveries, until no more can come.
async fn dispatch(shared: Rc<Shared>, mut placed_orders: mpsc::UnboundedReceiver<PlacedOrder>) {
    let alarm = Arc::new(Notify::new());
    let pacer = pacer(Arc::clone(&alarm));
    let mut asked = false;
    let mut deadline_ns = None;
    loop {
        while let Ok(order) = placed_orders.try_recv() {
            shared.take(&order);
        }
        if deadline_ns.is_none() && placed_orders.is_closed() && placed_orders.is_empty() {
            deadline_ns = Some(shared.now_ns().saturating_add(shared.settings.grace_ns));
        }
        let over = deadline_ns.is_some_and(|deadline| shared.now_ns() >= deadline);
        if over || shared.settings.common.stop.load(Ordering::Relaxed) {
            shared.due.borrow_mut().clear();
        }
        while shared.in_flight.get() < shared.settings.connections
            && let Some((at_ns, delivery)) = shared.next_due()
        {
            shared.in_flight.set(shared.in_flight.get() + 1);
            tokio::task::spawn_local(deliver(Rc::clone(&shared), at_ns, delivery));
        }
        let next_ns = shared.due.borrow().keys().next().map(|(at_ns, _)| *at_ns);
        if deadline_ns.is_some() && next_ns.is_none() && shared.in_flight.get() == 0 {
            break;
        }
        let now = Instant::now();
        let wait = match next_ns {
            // All connections are busy; the first one that is done notifies.
            _ if shared.in_flight.get() >= shared.settings.connections => LOOK_UP,
            Some(next_ns) => Duration::from_nanos(next_ns.saturating_sub(shared.now_ns())),
            None => LOOK_UP,
        };
        if wait < LOOK_UP && !asked {
            let moment = now + wait.clamp(TICK, TICK_MAX);
            asked = pacer.as_ref().is_some_and(|p| p.send(moment).is_ok());
        }
        tokio::select! {
            order = placed_orders.recv(), if deadline_ns.is_none() => {
                if let Some(order) = order {
                    shared.take(&order);
                }
            }
            () = shared.changed.notified() => {}
            () = alarm.notified(), if asked => asked = false,
            () = tokio::time::sleep(wait.clamp(TICK_MAX, LOOK_UP)) => {}
        }
    }
}

/// Sends one delivery and records its result.
async fn deliver(shared: Rc<Shared>, at_ns: u64, delivery: Delivery) {
    let payment = &delivery.payment;
    shared.note_sent(payment);
    let mut connection = shared.connections.borrow_mut().pop();
    let result = match shared.request(payment) {
        Err(fault) => Err(fault),
        Ok(callback) => {
            let address = &shared.settings.common.target.address;
            let timeout = CALLBACK_TIMEOUT_MAX.min(shared.settings.common.request_timeout);
            let sending = send(&mut connection, address, callback);
            match tokio::time::timeout(timeout, sending).await {
                Ok(Ok(reply)) => Ok(reply.status.as_u16()),
                Ok(Err(fault)) => Err(fault),
                Err(_) => Err(Fault::Timeout),
            }
        }
    };
    // After a fault the answer may still come, and must not be read as the next one's.
    if let Some(connection) = connection.filter(|connection| result.is_ok() && connection.is_open())
    {
        shared.connections.borrow_mut().push(connection);
    }
    shared.note_result(at_ns, delivery, result);
    shared.in_flight.set(shared.in_flight.get() - 1);
    shared.changed.notify_one();
}

impl Shared {
    fn now_ns(&self) -> u64 {
        let start = self.settings.common.start.get();
        start.map_or(0, |start| start.elapsed().as_nanos() as u64)
    }

    fn next_due(&self) -> Option<(u64, Delivery)> {
        let mut due = self.due.borrow_mut();
        let first = due.first_entry()?;
        let at_ns = first.key().0;
        (at_ns <= self.now_ns()).then(|| (at_ns, first.remove()))
    }

    fn plan(&self, at_ns: u64, delivery: Delivery) {
        let number = self.number.get();
        self.number.set(number + 1);
        self.due.borrow_mut().insert((at_ns, number), delivery);
    }

    /// Plans the payments of an order.
    fn take(&self, order: &PlacedOrder) {
        let now_ns = self.now_ns();
        let expires_in_ns = order.expires_at_ms.and_then(|at_ms| {
            let left_ms = u64::try_from(at_ms.saturating_sub(unix_ms())).ok()?;
            let left_ns = left_ms.saturating_mul(1_000_000);
            let last_ns = now_ns.saturating_add(left_ns).saturating_add(LATE_TAIL_NS);
            (last_ns <= self.settings.horizon_ns).then_some(left_ns)
        });
        let planned = self
            .settings
            .scenario
            .of(order.buyer, order.sku, expires_in_ns);
        for (number, planned) in planned.iter().enumerate() {
            let payment = Rc::new(Payment::new(order, planned, number));
            for after_ns in &planned.deliveries_ns {
                let payment = Rc::clone(&payment);
                self.plan(
                    now_ns + after_ns,
                    Delivery {
                        payment,
                        failures: 0,
                    },
                );
            }
        }
    }

    /// The callback, signed at this moment.
    fn request(&self, payment: &Payment) -> Result<Request<http_body_util::Full<Bytes>>, Fault> {
        let target = &self.settings.common.target;
        let timestamp_s = unix_ms() / 1000;
        let signer = match payment.forgery {
            Some(Forgery::ForeignKey) => &self.forger,
            Some(Forgery::AlteredBody | Forgery::AlteredSignature) | None => &self.settings.signer,
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
        let mut headers = target.callback_headers();
        for (name, value) in [
            ("webhook-id", payment.webhook_id.as_str()),
            ("webhook-timestamp", &timestamp_s.to_string()),
            ("webhook-signature", &signature),
        ] {
            let value = HeaderValue::from_str(value).map_err(|_| Fault::NotSent)?;
            headers.insert(name, value);
        }
        let path = target.callbacks.clone();
        Ok(request(Method::POST, path, headers, payment.body.clone()))
    }

    fn note_sent(&self, payment: &Payment) {
        if payment.forgery.is_none() && payment.place.get().is_none() {
            let place = self.stats.borrow_mut().first_sent(payment.outcome.clone());
            payment.place.set(Some(place));
        }
    }

    fn note_result(&self, at_ns: u64, delivery: Delivery, result: DeliveryResult) {
        let Delivery { payment, failures } = delivery;
        let now_ns = self.now_ns();
        let taken = matches!(result, Ok(200..=299));
        let done = {
            let mut stats = self.stats.borrow_mut();
            if payment.forgery.is_some() {
                stats.forged(result);
                taken || result == Ok(401)
            } else {
                let latency_ns = now_ns.saturating_sub(at_ns);
                stats.delivered(result, latency_ns, failures > 0);
                if taken && !payment.acknowledged.replace(true) {
                    self.settings.acknowledged.fetch_add(1, Ordering::Relaxed);
                    let PaymentOutcome {
                        kind,
                        amount,
                        ref currency,
                        ..
                    } = payment.outcome;
                    let place = payment.place.get().unwrap_or(usize::MAX);
                    stats.acknowledged(kind, amount, currency, place, unix_ms());
                }
                payment.acknowledged.get()
            }
        };
        if !done {
            let backoff_ns = (BACKOFF_NS << failures.min(8)).min(BACKOFF_NS_MAX);
            // Jitter by number, so that retries do not come back as one wave.
            let jitter_ns = backoff_ns / 16 * (self.number.get() % 5);
            let failures = failures + 1;
            self.plan(
                now_ns + backoff_ns + jitter_ns,
                Delivery { payment, failures },
            );
        }
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
            let message = Succeeded {
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
