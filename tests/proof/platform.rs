//! A payment platform for servers that are killed: buyers pay in many ways, and it delivers the callbacks
//! until they are answered with success, to one process of Millrace after the other.
//!
//! `millrace::loadgen` plays a platform too. Messages, signatures and the checker are the same; that one sends
//! each callback at a planned moment and measures it, which a server that is killed leaves no sense in.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use super::checker::{
    Expected, Findings, KnownOrder, PaymentHistory, PaymentRow, SentPayment, StoredRows,
};
use super::doors::{Caller, Doors};
use crate::support::http::{Connection, try_call};
use crate::support::served::PATIENCE;
use crate::support::webhook::{Paid, SECRET, send};

/// Tolerance of the checker between clocks, in milliseconds.
const MARGIN_MS: i64 = 100;
/// A secret that is not the platform's.
const FALSE_SECRET: &str = "whsec_b3RoZXItc2VjcmV0LW9mLTI0LWJ5dGVzIQ==";
/// Deliveries at the same time.
const THREADS: usize = 4;
/// Deliveries that may wait, so that a long life does not end in a longer queue.
const QUEUE_MAX: usize = 300;
/// Pause after a delivery that was not answered with success. Real ones wait longer.
const AGAIN: Duration = Duration::from_millis(30);

/// Records of buyers and of the platform.
pub struct Records {
    random: StdRng,
    /// For the checker.
    pub history: PaymentHistory,
    /// The messages of `history.sent`, at the same places.
    messages: Vec<Paid>,
    /// The answers that told buyers of their orders, by id.
    answers: HashMap<i64, Value>,
    /// Deliveries to be made: when, a number that tells them apart, the message.
    queue: BTreeSet<(Instant, u64, usize)>,
    queued: u64,
    on_their_way: usize,
}

/// The platform.
pub struct Platform {
    records: Mutex<Records>,
}

impl Platform {
    /// One without customers.
    pub fn new(seed: u64) -> Self {
        Platform {
            records: Mutex::new(Records {
                random: StdRng::seed_from_u64(seed),
                history: PaymentHistory {
                    currency: "EUR".to_owned(),
                    ..PaymentHistory::default()
                },
                messages: Vec::new(),
                answers: HashMap::new(),
                queue: BTreeSet::new(),
                queued: 0,
                on_their_way: 0,
            }),
        }
    }

    pub fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().expect("the records")
    }

    /// Compares the payments with the rows, and adds to `findings`. `orders_over`: the last order expired long
    /// enough ago.
    pub fn check(
        &self,
        rows: &StoredRows,
        is_cancel_asked: impl Fn(&str) -> bool,
        orders_over: bool,
        findings: &mut Findings,
    ) {
        let expected = Expected {
            orders_over,
            orphans_over: true,
            margin_ms: MARGIN_MS,
        };
        let records = self.records();
        records
            .history
            .check(rows, expected, is_cancel_asked, findings);
    }

    /// A buyer was told of this order, perhaps not for the first time, and may pay it.
    pub fn orders(&self, answer: &Value) {
        let mut records = self.records();
        if let Some(id) = records.is_told(answer)
            && records.queue.len() < QUEUE_MAX
            && records.random.random_bool(0.7)
        {
            records.pays(id);
        }
    }

    /// Delivers to Millrace until told to stop, or until nobody answers any more.
    pub fn run(&self, doors: &Doors, stop: &AtomicBool) {
        self.deliver(doors, Instant::now, || stop.load(Ordering::Relaxed));
    }

    /// Delivers due messages until all are acknowledged; `all`: also those that are not due yet.
    pub fn deliver_all(&self, doors: &Doors, all: bool) -> Result<(), String> {
        let until = Instant::now() + if all { PATIENCE * 60 } else { Duration::ZERO };
        let deadline = Instant::now() + PATIENCE;
        let is_done = || {
            let records = self.records();
            records.on_their_way == 0 && records.queue.first().is_none_or(|(due, ..)| *due > until)
        };
        self.deliver(doors, || until, || is_done() || Instant::now() >= deadline);
        if is_done() {
            return Ok(());
        }
        let left = self.records().queue.len();
        Err(format!("{left} callbacks are not answered with success"))
    }

    fn deliver(
        &self,
        doors: &Doors,
        horizon: impl Fn() -> Instant + Sync,
        stop: impl Fn() -> bool + Sync,
    ) {
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    let mut caller = Caller::new(doors);
                    while !stop() {
                        match self.take(horizon()) {
                            Some(at) if !self.deliver_one(&mut caller, at) => break,
                            Some(_) => {}
                            None => std::thread::sleep(Duration::from_millis(1)),
                        }
                    }
                });
            }
        });
    }

    fn take(&self, horizon: Instant) -> Option<usize> {
        let mut records = self.records();
        let first = *records.queue.first().filter(|(due, ..)| *due <= horizon)?;
        records.queue.remove(&first);
        records.on_their_way += 1;
        records.history.sent[first.2]
            .sent
            .get_or_insert_with(now_ms);
        Some(first.2)
    }

    /// False: nobody is there.
    fn deliver_one(&self, caller: &mut Caller<'_>, at: usize) -> bool {
        let (event, body, is_genuine, door) = {
            let mut records = self.records();
            let door = records.random.random_range(0..usize::MAX);
            let message = &records.messages[at];
            let is_genuine = records.history.sent[at].is_genuine;
            (message.event.clone(), message.body(), is_genuine, door)
        };
        let secret = if is_genuine { SECRET } else { FALSE_SECRET };
        let deliver = |connection: &mut Connection| send(connection, &event, &body, secret);
        let answer = caller.call(door, deliver);
        let mut records = self.records();
        records.on_their_way -= 1;
        match &answer {
            Ok(answer) if is_genuine && (200..300).contains(&answer.status) => {
                let sent = &mut records.history.sent[at];
                sent.acknowledged.get_or_insert_with(now_ms);
            }
            Ok(answer) if !is_genuine && answer.status == 401 => {}
            Ok(answer) if answer.status == 503 => records.queue_for(at, Instant::now() + AGAIN),
            Ok(answer) => {
                let false_answer = format!("{body} (genuine: {is_genuine}) is answered {answer:?}");
                records.history.false_answers.push(false_answer);
            }
            // It may or may not have been taken.
            Err(_) => records.queue_for(at, Instant::now() + AGAIN),
        }
        drop(records);
        answer.is_ok() || !caller.gives_up()
    }

    /// The rows of these orders are taken away, whose buyers have not paid yet. They do it now, and
    /// only the receipt that the platform passes back is left of them.
    pub fn loses(&self, orders: &[i64]) {
        let mut records = self.records();
        for id in orders {
            let order = records.history.orders.get_mut(id);
            order.expect("it was told of").is_lost = true;
            let paid = Paid::of(&records.answers[id]);
            records.send(paid, true, 1, Instant::now());
        }
    }

    /// Orders that can be lost: told of, of these rows, and nobody has paid them.
    pub fn unpaid_among(&self, found: &StoredRows) -> Vec<i64> {
        let records = self.records();
        let sent = records.history.sent.iter();
        let paid: BTreeSet<&str> = sent.map(|one| one.order.as_str()).collect();
        let rows = found.orders.iter().filter(|row| {
            row.status == "pending_payment"
                // A receipt does not carry them.
                && row.attributes.is_none()
                && records.answers.get(&row.order_id).is_some_and(|answer| answer["receipt"].is_string())
                && !paid.contains(row.order_id.to_string().as_str())
        });
        rows.map(|row| row.order_id).collect()
    }

    /// An operator sends money back, and tells Millrace: half of what has to go back, and what a
    /// few of the paid orders have brought in.
    pub fn refunds_some(&self, control: SocketAddr, found: &StoredRows) -> Result<(), String> {
        let mut records = self.records();
        let mut matched = 5;
        for payment in &found.payments {
            let wanted = match payment.state.as_str() {
                "refund_due" => records.random.random_bool(0.5),
                "matched" => {
                    matched -= 1;
                    matched >= 0
                }
                _ => false,
            };
            if !wanted || records.history.refunded.contains(&payment.order) {
                continue;
            }
            let PaymentRow { id, order, .. } = payment;
            let has_row = found
                .orders
                .iter()
                .any(|row| row.order_id.to_string() == *order);
            let (target, body) = if has_row {
                let body = json!({ "reference": format!("re-{id}"), "restock": true });
                (format!("/admin/v1/orders/{order}/refunded"), body)
            } else {
                let body = json!({ "note": "sent back by hand" });
                (format!("/admin/v1/orphan-payments/{id}/close"), body)
            };
            let answer = try_call(control, "POST", &target, &[], &body.to_string())
                .map_err(|error| format!("{target}: {error}"))?;
            if answer.status != 200 {
                return Err(format!("{target}: {answer:?}"));
            }
            records.history.refunded.insert(if has_row {
                order.clone()
            } else {
                payment.payment.clone()
            });
        }
        Ok(())
    }
}

impl Records {
    /// Notes an order as a buyer was told of it, the first time.
    pub fn is_told(&mut self, answer: &Value) -> Option<i64> {
        // Not to be paid yet, or never.
        if answer["expires_at"].is_null() {
            return None;
        }
        let id = answer["order_id"].as_str().and_then(|id| id.parse().ok());
        let (Some(id), Some(order)) = (id, known(answer)) else {
            let false_answer = format!("no order to pay: {answer}");
            self.history.false_answers.push(false_answer);
            return None;
        };
        if self.answers.contains_key(&id) {
            return None;
        }
        self.history.orders.insert(id, order);
        self.answers.insert(id, answer.clone());
        Some(id)
    }

    /// A buyer pays, in one of the ways in which buyers do.
    fn pays(&mut self, id: i64) {
        let mut paid = Paid::of(&self.answers[&id]);
        let expires_at = self.history.orders[&id].expires_at;
        let left = u64::try_from(expires_at - now_ms()).unwrap_or(0);
        let random = &mut self.random;
        // At once, perhaps before the row is there; in time; around and after the end of it.
        let after = match random.random_range(0..100) {
            0..60 => 0,
            60..80 => random.random_range(0..=left),
            _ => left + random.random_range(0..600),
        };
        let due = Instant::now() + Duration::from_millis(after);
        if random.random_bool(0.3) {
            paid.receipt = None;
        }
        let copies = random.random_range(1..=3);
        match random.random_range(0..100) {
            0..6 => paid.amount += random.random_range(1..=3),
            6..9 => paid.currency = "USD".to_owned(),
            9..17 => {
                let later = Duration::from_millis(random.random_range(0..300));
                self.send(paid.again("second"), true, 1, due + later);
            }
            17..22 => {
                let finished = Paid {
                    event: format!("{}-finished", paid.event),
                    ..paid.clone()
                };
                self.send(finished, true, 2, due);
            }
            22..28 => {
                // Money for an order that nobody has, with another one's receipt or garbage.
                let receipt = match random.random_range(0..3) {
                    0 => None,
                    1 => Some("A".repeat(100)),
                    _ => paid.receipt.clone(),
                };
                let nobody = Paid {
                    order: random.random_range(1..1_u64 << 40).to_string(),
                    receipt,
                    ..paid.again("nobody")
                };
                self.send(nobody, true, copies, due);
            }
            28..32 => self.send(paid.again("forged"), false, copies, due),
            _ => {}
        }
        self.send(paid, true, copies, due);
    }

    fn send(&mut self, paid: Paid, is_genuine: bool, copies: u32, due: Instant) {
        self.history.sent.push(sent(&paid, is_genuine));
        self.messages.push(paid);
        for _ in 0..copies {
            // Some of them at the same time.
            let later = self.random.random_range(0..4) / 2 * 100;
            self.queue_for(self.messages.len() - 1, due + Duration::from_millis(later));
        }
    }

    fn queue_for(&mut self, message: usize, due: Instant) {
        self.queued += 1;
        self.queue.insert((due, self.queued, message));
    }
}

/// An order as its answer describes it.
fn known(answer: &Value) -> Option<KnownOrder> {
    let expires_at: jiff::Timestamp = answer["expires_at"].as_str()?.parse().ok()?;
    Some(KnownOrder {
        amount: answer["amount"].as_i64()?,
        expires_at: expires_at.as_millisecond(),
        is_lost: false,
    })
}

/// A message as the checker knows it, before it is sent.
pub fn sent(paid: &Paid, is_genuine: bool) -> SentPayment {
    SentPayment {
        payment: paid.payment.clone(),
        order: paid.order.clone(),
        amount: paid.amount,
        currency: paid.currency.clone(),
        has_receipt: paid.receipt.is_some(),
        is_genuine,
        sent: None,
        acknowledged: None,
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}
