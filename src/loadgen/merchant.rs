//! The merchant: hears of every order that was placed and has the platform's callbacks delivered.
//!
//! A thread of its own with connections of its own, so that a data plane that is busy with orders
//! delays callbacks only by what it does to them. Open-loop like the clicks: each delivery has a
//! moment at which it is due and its latency counts from there. What fails is delivered again
//! after a growing pause, as a platform does it, until the grace after the last order is over.

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

use super::client::{Link, request, send};
use super::error::LoadError;
use super::fate::{Fates, LATE_TAIL_NS, Planned};
use super::outcome::Fault;
use super::payment::{Bill, Forgery, PaymentKind};
use super::payment_report::{Books, DeliveryResult, PaymentReport, PaymentTold};
use super::plan::LoadPlan;
use super::webhook::{Signer, Succeeded};
use super::worker::{Common, pacer};

/// Where the sending threads hand over what is to be paid. The merchant closes once all of them
/// are dropped and nothing is left to be sent.
pub(super) type Till = mpsc::UnboundedSender<Bill>;

/// Platforms give up about here.
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

/// The merchant's thread.
pub(super) struct Merchant {
    thread: JoinHandle<PaymentReport>,
    acknowledged: Arc<AtomicU64>,
}

impl Merchant {
    /// Opens the merchant of a plan that passed its check, and its till. `end`: about when the
    /// last click is due, after the start.
    pub(super) fn open(
        plan: &LoadPlan,
        common: &Arc<Common>,
        end: Duration,
    ) -> Result<(Self, Till), LoadError> {
        let failed = |reason: String| LoadError::Thread {
            what: "merchant's thread",
            reason,
        };
        let signer = plan.signer()?;
        let (till, bills) = mpsc::unbounded_channel();
        let acknowledged = Arc::new(AtomicU64::new(0));
        let grace_ns = plan.pay_grace_ms.saturating_mul(1_000_000);
        let terms = Terms {
            common: Arc::clone(common),
            signer,
            fates: Fates::new(plan.seed, plan.pay_share),
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
            .spawn(move || runtime.block_on(drive(terms, bills)))
            .map_err(|e| failed(e.to_string()))?;
        Ok((
            Self {
                thread,
                acknowledged,
            },
            till,
        ))
    }

    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Payments acknowledged so far.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    pub(super) fn close(self) -> Result<PaymentReport, LoadError> {
        self.thread.join().map_err(|_| LoadError::Thread {
            what: "merchant's thread",
            reason: "it panicked, as printed above".to_owned(),
        })
    }
}

/// What the merchant goes by.
struct Terms {
    common: Arc<Common>,
    signer: Signer,
    fates: Fates,
    connections: usize,
    grace_ns: u64,
    /// Until when a payment may fall due, in nanoseconds after the start.
    horizon_ns: u64,
    keep: bool,
    acknowledged: Arc<AtomicU64>,
}

/// What the tasks of the thread share.
struct Desk {
    terms: Terms,
    forger: Signer,
    /// By the moment at which they are due, then as they came.
    due: RefCell<BTreeMap<(u64, u64), Delivery>>,
    number: Cell<u64>,
    /// Connections with nothing to do.
    links: RefCell<Vec<Link>>,
    in_flight: Cell<usize>,
    /// A delivery is over.
    changed: Notify,
    books: RefCell<Books>,
}

/// One attempt to deliver a payment.
struct Delivery {
    case: Rc<Case>,
    failures: u32,
}

/// A payment, in however many deliveries.
struct Case {
    payment: PaymentTold,
    forgery: Option<Forgery>,
    webhook_id: SmolStr,
    /// What is signed, which is what is sent, but for a forgery.
    signed: Bytes,
    body: Bytes,
    place: Cell<Option<usize>>,
    acknowledged: Cell<bool>,
}

async fn drive(terms: Terms, bills: mpsc::UnboundedReceiver<Bill>) -> PaymentReport {
    let keep = terms.keep;
    let desk = Rc::new(Desk {
        terms,
        forger: Signer::of_key(b"another key, not the platform's."),
        due: RefCell::default(),
        number: Cell::new(0),
        links: RefCell::default(),
        in_flight: Cell::new(0),
        changed: Notify::new(),
        books: RefCell::new(Books::new(keep)),
    });
    LocalSet::new()
        .run_until(dispatch(Rc::clone(&desk), bills))
        .await;
    desk.books.replace(Books::new(false)).close()
}

/// Takes bills and sends what is due, until no more can come.
async fn dispatch(desk: Rc<Desk>, mut bills: mpsc::UnboundedReceiver<Bill>) {
    let alarm = Arc::new(Notify::new());
    let pacer = pacer(Arc::clone(&alarm));
    let mut asked = false;
    let mut deadline_ns = None;
    loop {
        while let Ok(bill) = bills.try_recv() {
            desk.take(&bill);
        }
        if deadline_ns.is_none() && bills.is_closed() && bills.is_empty() {
            deadline_ns = Some(desk.now_ns().saturating_add(desk.terms.grace_ns));
        }
        let over = deadline_ns.is_some_and(|deadline| desk.now_ns() >= deadline);
        if over || desk.terms.common.stop.load(Ordering::Relaxed) {
            desk.due.borrow_mut().clear();
        }
        while desk.in_flight.get() < desk.terms.connections
            && let Some((at_ns, delivery)) = desk.next_due()
        {
            desk.in_flight.set(desk.in_flight.get() + 1);
            tokio::task::spawn_local(deliver(Rc::clone(&desk), at_ns, delivery));
        }
        let next_ns = desk.due.borrow().keys().next().map(|(at_ns, _)| *at_ns);
        if deadline_ns.is_some() && next_ns.is_none() && desk.in_flight.get() == 0 {
            break;
        }
        let now = Instant::now();
        let wait = match next_ns {
            // All connections are busy; the first that is done rings.
            _ if desk.in_flight.get() >= desk.terms.connections => LOOK_UP,
            Some(next_ns) => Duration::from_nanos(next_ns.saturating_sub(desk.now_ns())),
            None => LOOK_UP,
        };
        if wait < LOOK_UP && !asked {
            let moment = now + wait.clamp(TICK, TICK_MAX);
            asked = pacer.as_ref().is_some_and(|p| p.send(moment).is_ok());
        }
        tokio::select! {
            bill = bills.recv(), if deadline_ns.is_none() => {
                if let Some(bill) = bill {
                    desk.take(&bill);
                }
            }
            () = desk.changed.notified() => {}
            () = alarm.notified(), if asked => asked = false,
            () = tokio::time::sleep(wait.clamp(TICK_MAX, LOOK_UP)) => {}
        }
    }
}

/// Sends one delivery, and notes what it came to.
async fn deliver(desk: Rc<Desk>, at_ns: u64, delivery: Delivery) {
    let case = &delivery.case;
    desk.note_sent(case);
    let mut link = desk.links.borrow_mut().pop();
    let result = match desk.request(case) {
        Err(fault) => Err(fault),
        Ok(callback) => {
            let address = &desk.terms.common.target.address;
            let timeout = CALLBACK_TIMEOUT_MAX.min(desk.terms.common.request_timeout);
            let sending = send(&mut link, address, callback);
            match tokio::time::timeout(timeout, sending).await {
                Ok(Ok(reply)) => Ok(reply.status.as_u16()),
                Ok(Err(fault)) => Err(fault),
                Err(_) => Err(Fault::Timeout),
            }
        }
    };
    // After a fault the answer may still come, and must not be read as the next one's.
    if let Some(link) = link.filter(|link| result.is_ok() && link.is_open()) {
        desk.links.borrow_mut().push(link);
    }
    desk.note_result(at_ns, delivery, result);
    desk.in_flight.set(desk.in_flight.get() - 1);
    desk.changed.notify_one();
}

impl Desk {
    fn now_ns(&self) -> u64 {
        let start = self.terms.common.start.get();
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

    /// Decides how an order is paid.
    fn take(&self, bill: &Bill) {
        let now_ns = self.now_ns();
        let expires_in_ns = bill.expires_at_ms.and_then(|at_ms| {
            let left_ms = u64::try_from(at_ms.saturating_sub(unix_ms())).ok()?;
            let left_ns = left_ms.saturating_mul(1_000_000);
            let last_ns = now_ns.saturating_add(left_ns).saturating_add(LATE_TAIL_NS);
            (last_ns <= self.terms.horizon_ns).then_some(left_ns)
        });
        let planned = self.terms.fates.of(bill.buyer, bill.sku, expires_in_ns);
        for (number, planned) in planned.iter().enumerate() {
            let case = Rc::new(Case::new(bill, planned, number));
            for after_ns in &planned.deliveries_ns {
                let case = Rc::clone(&case);
                self.plan(now_ns + after_ns, Delivery { case, failures: 0 });
            }
        }
    }

    /// The callback, signed at this moment.
    fn request(&self, case: &Case) -> Result<Request<http_body_util::Full<Bytes>>, Fault> {
        let target = &self.terms.common.target;
        let timestamp_s = unix_ms() / 1000;
        let signer = match case.forgery {
            Some(Forgery::ForeignKey) => &self.forger,
            Some(Forgery::AlteredBody | Forgery::AlteredSignature) | None => &self.terms.signer,
        };
        let mut signature = signer.sign(&case.webhook_id, timestamp_s, &case.signed);
        if case.forgery == Some(Forgery::AlteredSignature) {
            let first = if signature[3..].starts_with('A') {
                "B"
            } else {
                "A"
            };
            signature.replace_range(3..4, first);
        }
        let mut headers = target.callback_headers();
        for (name, value) in [
            ("webhook-id", case.webhook_id.as_str()),
            ("webhook-timestamp", &timestamp_s.to_string()),
            ("webhook-signature", &signature),
        ] {
            let value = HeaderValue::from_str(value).map_err(|_| Fault::NotSent)?;
            headers.insert(name, value);
        }
        let path = target.callbacks.clone();
        Ok(request(Method::POST, path, headers, case.body.clone()))
    }

    fn note_sent(&self, case: &Case) {
        if case.forgery.is_none() && case.place.get().is_none() {
            let place = self.books.borrow_mut().first_sent(case.payment.clone());
            case.place.set(Some(place));
        }
    }

    fn note_result(&self, at_ns: u64, delivery: Delivery, result: DeliveryResult) {
        let Delivery { case, failures } = delivery;
        let now_ns = self.now_ns();
        let taken = matches!(result, Ok(200..=299));
        let done = {
            let mut books = self.books.borrow_mut();
            if case.forgery.is_some() {
                books.forged(result);
                taken || result == Ok(401)
            } else {
                let latency_ns = now_ns.saturating_sub(at_ns);
                books.delivered(result, latency_ns, failures > 0);
                if taken && !case.acknowledged.replace(true) {
                    self.terms.acknowledged.fetch_add(1, Ordering::Relaxed);
                    let PaymentTold {
                        kind,
                        amount,
                        ref currency,
                        ..
                    } = case.payment;
                    let place = case.place.get().unwrap_or(usize::MAX);
                    books.acknowledged(kind, amount, currency, place, unix_ms());
                }
                case.acknowledged.get()
            }
        };
        if !done {
            let backoff_ns = (BACKOFF_NS << failures.min(8)).min(BACKOFF_NS_MAX);
            // Apart from one another by their order, so that they do not come back as one wave.
            let jitter_ns = backoff_ns / 16 * (self.number.get() % 5);
            let failures = failures + 1;
            self.plan(now_ns + backoff_ns + jitter_ns, Delivery { case, failures });
        }
    }
}

impl Case {
    /// Payment number `number` of a bill. Its ids hang on the order's, so that another run with
    /// the same seed on the same server pays anew.
    fn new(bill: &Bill, planned: &Planned, number: usize) -> Self {
        let Bill {
            order_id, amount, ..
        } = *bill;
        let (mut paid_id, mut paid, mut receipt) = (order_id, amount, bill.receipt.clone());
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
                currency: &bill.currency,
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
            payment: PaymentTold {
                order_id: paid_id,
                payment_id,
                kind: planned.kind,
                amount: paid,
                currency: bill.currency.clone(),
                acknowledged_at_ms: None,
                expires_at_ms: bill.expires_at_ms,
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
