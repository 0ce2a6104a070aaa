//! A payment platform: some buyers pay through it, in every way that buyers do, and it tells
//! Millrace of it, again and again until it is answered with success.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use super::checker::{Found, PaymentRow};
use crate::support::http::{Connection, try_call};
use crate::support::served::PATIENCE;
use crate::support::webhook::{Paid, SECRET, send};

/// Who signs with it is not the platform.
const FALSE_SECRET: &str = "whsec_b3RoZXItc2VjcmV0LW9mLTI0LWJ5dGVzIQ==";
/// Deliveries at the same time.
const THREADS: usize = 4;
/// Deliveries that may wait, so that a long life does not end in a longer queue.
const QUEUE_MAX: usize = 300;
/// Pause after a delivery that was not answered with success. Real ones wait longer.
const AGAIN: Duration = Duration::from_millis(30);

/// A message about a payment, as the platform remembers it. Times are of this machine's clock, as
/// Millrace's are.
#[derive(Debug)]
pub struct Bill {
    pub paid: Paid,
    /// Signed by the platform. Another is sent by somebody who wants goods for nothing.
    pub is_genuine: bool,
    /// When it was sent first, in milliseconds.
    pub sent: Option<i64>,
    /// When it was first answered with success.
    pub acknowledged: Option<i64>,
}

/// An order as its buyer was told of it.
#[derive(Debug)]
pub struct Ordered {
    pub amount: i64,
    pub expires_at: i64,
    /// Its row was taken away.
    pub is_lost: bool,
    answer: Value,
}

/// What buyers and the platform know.
pub struct Book {
    random: StdRng,
    pub orders: HashMap<i64, Ordered>,
    pub bills: Vec<Bill>,
    /// Orders and payments without one that an operator has settled, by what was told of it.
    pub refunded: BTreeSet<String>,
    /// Answers that are false by themselves.
    pub lies: Vec<String>,
    /// Deliveries to be made: when, a number that tells them apart, the bill.
    queue: BTreeSet<(Instant, u64, usize)>,
    queued: u64,
    on_their_way: usize,
}

/// The platform.
pub struct Platform {
    book: Mutex<Book>,
}

impl Platform {
    /// One without customers.
    pub fn new(seed: u64) -> Self {
        Platform {
            book: Mutex::new(Book {
                random: StdRng::seed_from_u64(seed),
                orders: HashMap::new(),
                bills: Vec::new(),
                refunded: BTreeSet::new(),
                lies: Vec::new(),
                queue: BTreeSet::new(),
                queued: 0,
                on_their_way: 0,
            }),
        }
    }

    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("the book")
    }

    /// A buyer was told of this order, perhaps not for the first time, and may pay it.
    pub fn orders(&self, answer: &Value) {
        let mut book = self.book();
        if let Some(id) = book.is_told(answer)
            && book.queue.len() < QUEUE_MAX
            && book.random.random_bool(0.7)
        {
            book.pays(id);
        }
    }

    /// Delivers to Millrace at `data` until told to stop, or until nobody answers any more.
    pub fn run(&self, data: SocketAddr, stop: &AtomicBool) {
        self.deliver(data, Instant::now, || stop.load(Ordering::Relaxed));
    }

    /// Delivers what is due until all of it is acknowledged; `all`: also what is not due yet.
    pub fn deliver_all(&self, data: SocketAddr, all: bool) -> Result<(), String> {
        let until = Instant::now() + if all { PATIENCE * 60 } else { Duration::ZERO };
        let deadline = Instant::now() + PATIENCE;
        let is_done = || {
            let book = self.book();
            book.on_their_way == 0 && book.queue.first().is_none_or(|(due, ..)| *due > until)
        };
        self.deliver(data, || until, || is_done() || Instant::now() >= deadline);
        if is_done() {
            return Ok(());
        }
        let left = self.book().queue.len();
        Err(format!("{left} callbacks are not answered with success"))
    }

    fn deliver(
        &self,
        data: SocketAddr,
        horizon: impl Fn() -> Instant + Sync,
        stop: impl Fn() -> bool + Sync,
    ) {
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    let mut connection = None;
                    while !stop() {
                        match self.take(horizon()) {
                            Some(bill) if !self.deliver_one(data, &mut connection, bill) => break,
                            Some(_) => {}
                            None => std::thread::sleep(Duration::from_millis(1)),
                        }
                    }
                });
            }
        });
    }

    fn take(&self, horizon: Instant) -> Option<usize> {
        let mut book = self.book();
        let first = *book.queue.first().filter(|(due, ..)| *due <= horizon)?;
        book.queue.remove(&first);
        book.on_their_way += 1;
        book.bills[first.2].sent.get_or_insert_with(now_ms);
        Some(first.2)
    }

    /// False: nobody is there.
    fn deliver_one(
        &self,
        data: SocketAddr,
        connection: &mut Option<Connection>,
        bill: usize,
    ) -> bool {
        let (event, body, is_genuine) = {
            let Bill {
                paid, is_genuine, ..
            } = &self.book().bills[bill];
            (paid.event.clone(), paid.body(), *is_genuine)
        };
        let secret = if is_genuine { SECRET } else { FALSE_SECRET };
        if connection.is_none() {
            *connection = Connection::open(data).ok();
        }
        let answer = connection
            .as_mut()
            .map(|connection| send(connection, &event, &body, secret));
        let mut book = self.book();
        book.on_their_way -= 1;
        match &answer {
            Some(Ok(answer)) if is_genuine && (200..300).contains(&answer.status) => {
                book.bills[bill].acknowledged.get_or_insert_with(now_ms);
            }
            Some(Ok(answer)) if !is_genuine && answer.status == 401 => {}
            Some(Ok(answer)) if answer.status == 503 => {
                book.queue_for(bill, Instant::now() + AGAIN)
            }
            Some(Ok(answer)) => {
                let lie = format!("{body} (genuine: {is_genuine}) is answered {answer:?}");
                book.lies.push(lie);
            }
            // It may or may not have been taken.
            Some(Err(_)) | None => book.queue_for(bill, Instant::now()),
        }
        if !matches!(answer, Some(Ok(_))) {
            *connection = Connection::open(data).ok();
        }
        connection.is_some()
    }

    /// The rows of these orders are taken away, whose buyers have not paid yet. They do it now, and
    /// what the platform passes back is all that is left of them.
    pub fn loses(&self, orders: &[i64]) {
        let mut book = self.book();
        for id in orders {
            let order = book.orders.get_mut(id).expect("it was told of");
            order.is_lost = true;
            let paid = Paid::of(&order.answer);
            book.bill(paid, true, 1, Instant::now());
        }
    }

    /// Orders that can be lost: told of, of these rows, and nobody has paid them.
    pub fn unpaid_among(&self, found: &Found) -> Vec<i64> {
        let book = self.book();
        let billed: BTreeSet<&str> = book.bills.iter().map(|b| b.paid.order.as_str()).collect();
        let rows = found.rows.iter().filter(|row| {
            row.status == "pending_payment"
                // A receipt does not carry them.
                && row.attributes.is_none()
                && book.orders.get(&row.order_id).is_some_and(|order| order.answer["receipt"].is_string())
                && !billed.contains(row.order_id.to_string().as_str())
        });
        rows.map(|row| row.order_id).collect()
    }

    /// An operator sends money back, and tells Millrace: half of what has to go back, and what a
    /// few of the paid orders have brought in.
    pub fn refunds_some(&self, control: SocketAddr, found: &Found) -> Result<(), String> {
        let mut book = self.book();
        let mut matched = 5;
        for payment in &found.payments {
            let wanted = match payment.state.as_str() {
                "refund_due" => book.random.random_bool(0.5),
                "matched" => {
                    matched -= 1;
                    matched >= 0
                }
                _ => false,
            };
            if !wanted || book.refunded.contains(&payment.order) {
                continue;
            }
            let PaymentRow { id, order, .. } = payment;
            let has_row = found
                .rows
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
            book.refunded.insert(if has_row {
                order.clone()
            } else {
                payment.payment.clone()
            });
        }
        Ok(())
    }
}

impl Book {
    /// Notes an order as a buyer was told of it, the first time.
    pub fn is_told(&mut self, answer: &Value) -> Option<i64> {
        let id = answer["order_id"].as_str().and_then(|id| id.parse().ok());
        let (Some(id), Some(order)) = (id, Ordered::of(answer)) else {
            self.lies.push(format!("no order to pay: {answer}"));
            return None;
        };
        if self.orders.contains_key(&id) {
            return None;
        }
        self.orders.insert(id, order);
        Some(id)
    }

    /// A buyer pays, in one of the ways in which buyers do.
    fn pays(&mut self, id: i64) {
        let Ordered {
            expires_at, answer, ..
        } = &self.orders[&id];
        let mut paid = Paid::of(answer);
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
                self.bill(paid.again("second"), true, 1, due + later);
            }
            17..22 => {
                let finished = Paid {
                    event: format!("{}-finished", paid.event),
                    ..paid.clone()
                };
                self.bill(finished, true, 2, due);
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
                self.bill(nobody, true, copies, due);
            }
            28..32 => self.bill(paid.again("forged"), false, copies, due),
            _ => {}
        }
        self.bill(paid, true, copies, due);
    }

    fn bill(&mut self, paid: Paid, is_genuine: bool, copies: u32, due: Instant) {
        self.bills.push(Bill {
            paid,
            is_genuine,
            sent: None,
            acknowledged: None,
        });
        for _ in 0..copies {
            // Some of them at the same time.
            let later = self.random.random_range(0..4) / 2 * 100;
            self.queue_for(self.bills.len() - 1, due + Duration::from_millis(later));
        }
    }

    fn queue_for(&mut self, bill: usize, due: Instant) {
        self.queued += 1;
        self.queue.insert((due, self.queued, bill));
    }
}

impl Ordered {
    fn of(answer: &Value) -> Option<Self> {
        let expires_at: jiff::Timestamp = answer["expires_at"].as_str()?.parse().ok()?;
        Some(Ordered {
            amount: answer["amount"].as_i64()?,
            expires_at: expires_at.as_millisecond(),
            is_lost: false,
            answer: answer.clone(),
        })
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}
