//! An independent checker: it knows what was asked for and what clients were told, and nothing of
//! how Millrace works. It compares that with the two public views of the database.
//!
//! Every order is asked for by a user of its own, so that a row in `order_list`, which shows no
//! keys, says by itself which requests it can come from: those of one user, all under one key.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::seq::IndexedRandom as _;
use serde_json::Value;

use super::money::Money;
use crate::support::postgres::connect;

/// An order as a client wants it. Asked for again, it is the same word for word.
#[derive(Clone, Debug, PartialEq)]
pub struct Wish {
    /// A user who has no other wish.
    pub user: String,
    /// Its Idempotency-Key; without one it is asked for once.
    pub key: Option<String>,
    pub sku: String,
    pub quantity: u32,
    pub adjustment: i64,
    /// What the price of the SKU and the adjustment make of it.
    pub amount: i64,
    pub attributes: Option<Value>,
}

/// What one request for a wish came to.
#[derive(Clone, Debug)]
pub enum Told {
    /// No answer came, and none will.
    Nothing,
    /// A status and a body, of a whole answer or of one line of a batch.
    Answer {
        status: u16,
        body: Value,
        /// Whether `Preference-Applied: respond-async` came with it.
        respond_async: bool,
        /// Whether it is one line of a batch, whose fields speak of all lines.
        in_batch: bool,
    },
}

/// A request that was begun; [`Checker::told`] ends it.
#[must_use]
pub struct Attempt {
    user: String,
    number: usize,
}

/// What an answer promises.
#[derive(Clone, Debug, PartialEq)]
enum Promise {
    /// The request has no answer yet, or never got one.
    Unknown,
    /// `undecided`.
    Nothing,
    /// The order is there, or will be.
    Accepted(i64),
    /// This request placed no order. Conclusive: nor did an earlier one under the same key.
    Refused { code: String, conclusive: bool },
}

#[derive(Clone, Debug)]
struct Try {
    /// In which life of the server it was sent.
    life: u32,
    sent: u64,
    answered: u64,
    promise: Promise,
    /// Whether it was answered with `202` and `Preference-Applied`.
    respond_async: bool,
}

#[derive(Clone, Debug)]
struct Asked {
    wish: Wish,
    tries: Vec<Try>,
    /// Whether anyone asked for its cancellation, and whether that was confirmed.
    cancel_asked: bool,
    cancelled: bool,
}

impl Asked {
    fn accepted(&self) -> impl Iterator<Item = (&Try, i64)> {
        self.tries.iter().filter_map(|one| match one.promise {
            Promise::Accepted(id) => Some((one, id)),
            Promise::Unknown | Promise::Nothing | Promise::Refused { .. } => None,
        })
    }

    fn order_id(&self) -> Option<i64> {
        self.accepted().map(|(_, id)| id).next()
    }

    /// Whether what was told leaves no room for a row.
    fn is_refused(&self) -> bool {
        // A request that may have placed it, as far as its client knows.
        let open = |one: &&Try| !matches!(one.promise, Promise::Refused { .. });
        let Some(last_life) = self.tries.iter().filter(open).map(|one| one.life).max() else {
            return !self.tries.is_empty();
        };
        // The process that it was sent to is gone, and a later one has looked at the key and
        // found no order under it.
        self.order_id().is_none()
            && self.tries.iter().any(|one| {
                one.life > last_life
                    && matches!(
                        one.promise,
                        Promise::Refused {
                            conclusive: true,
                            ..
                        }
                    )
            })
    }
}

#[derive(Clone, Copy, Debug)]
struct Offer {
    unit_price: i64,
    total: i64,
}

#[derive(Default)]
struct Book {
    clock: u64,
    life: u32,
    answers: u64,
    asked: HashMap<String, Asked>,
    /// The users in the order in which they came.
    users: Vec<String>,
    offers: BTreeMap<String, Offer>,
    /// Answers that are false by themselves.
    lies: Vec<String>,
}

/// Everything that clients asked for and were told. Shared by all of their threads.
#[derive(Default)]
pub struct Checker {
    book: Mutex<Book>,
}

impl Checker {
    /// One that knows of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("the book")
    }

    /// A SKU is on sale, with this many units in all.
    pub fn offers(&self, sku: &str, unit_price: i64, total: u32) {
        let total = i64::from(total);
        let offer = Offer { unit_price, total };
        self.book().offers.insert(sku.to_owned(), offer);
    }

    /// The price of a SKU that is on sale.
    pub fn unit_price(&self, sku: &str) -> Option<i64> {
        self.book().offers.get(sku).map(|offer| offer.unit_price)
    }

    /// The server's process is gone, with every request that was on its way in it.
    pub fn server_is_gone(&self) {
        self.book().life += 1;
    }

    /// A request is about to be sent.
    pub fn asks(&self, wish: &Wish) -> Attempt {
        let mut book = self.book();
        book.clock += 1;
        let (sent, life) = (book.clock, book.life);
        if !book.asked.contains_key(&wish.user) {
            book.users.push(wish.user.clone());
        }
        let asked = book
            .asked
            .entry(wish.user.clone())
            .or_insert_with(|| Asked {
                wish: wish.clone(),
                tries: Vec::new(),
                cancel_asked: false,
                cancelled: false,
            });
        assert_eq!(asked.wish, *wish, "one user, one wish");
        assert!(
            asked.tries.is_empty() || wish.key.is_some(),
            "only with a key"
        );
        asked.tries.push(Try {
            life,
            sent,
            answered: u64::MAX,
            promise: Promise::Unknown,
            respond_async: false,
        });
        Attempt {
            user: wish.user.clone(),
            number: asked.tries.len() - 1,
        }
    }

    /// The request has ended. True: it was accepted.
    pub fn told(&self, attempt: Attempt, told: Told) -> bool {
        let mut book = self.book();
        book.clock += 1;
        let answered = book.clock;
        book.answers += u64::from(!matches!(told, Told::Nothing));
        let Book { asked, lies, .. } = &mut *book;
        let asked = asked.get_mut(&attempt.user).expect("it was asked for");
        let promise = match &told {
            Told::Nothing => Promise::Unknown,
            Told::Answer {
                status,
                body,
                respond_async,
                in_batch,
            } => match promise(&asked.wish, *status, body, *respond_async, *in_batch) {
                Ok(promise) => promise,
                Err(lie) => {
                    lies.push(format!("{}: {lie}: {told:?}", attempt.user));
                    Promise::Unknown
                }
            },
        };
        let accepted = matches!(promise, Promise::Accepted(_));
        let one = &mut asked.tries[attempt.number];
        (one.promise, one.answered) = (promise, answered);
        one.respond_async = accepted && matches!(told, Told::Answer { status: 202, .. });
        accepted
    }

    /// How many requests were answered so far.
    pub fn answers(&self) -> u64 {
        self.book().answers
    }

    /// A cancellation is about to be sent.
    pub fn asks_to_cancel(&self, user: &str) {
        if let Some(asked) = self.book().asked.get_mut(user) {
            asked.cancel_asked = true;
        }
    }

    /// Whether anybody wanted this user's order cancelled.
    pub fn is_cancel_asked(&self, user: &str) -> bool {
        let book = self.book();
        book.asked.get(user).is_some_and(|asked| asked.cancel_asked)
    }

    /// A cancellation was confirmed.
    pub fn told_cancelled(&self, user: &str) {
        if let Some(asked) = self.book().asked.get_mut(user) {
            asked.cancelled = true;
        }
    }

    /// The order id that a user was told, if any.
    pub fn order_id(&self, user: &str) -> Option<i64> {
        self.book().asked.get(user).and_then(Asked::order_id)
    }

    /// Up to `count` acknowledged wishes with a key, from all times, each with its order.
    pub fn some_acknowledged(&self, count: usize, random: &mut impl Rng) -> Vec<(Wish, i64)> {
        let book = self.book();
        // Most at random; some of the last, which a crash is most likely to have hurt.
        let last = book.users.iter().rev().take(count * 4);
        let all = (0..count * 4).filter_map(|_| book.users.choose(random));
        let mut seen = HashSet::new();
        last.step_by(4)
            .chain(all)
            .filter(|user| seen.insert(user.as_str()))
            .filter_map(|user| {
                let asked = &book.asked[user];
                let id = asked.order_id()?;
                asked.wish.key.as_ref()?;
                Some((asked.wish.clone(), id))
            })
            .take(count)
            .collect()
    }

    /// The last wishes with a key whose clients do not know what came of them.
    pub fn open_wishes(&self, count: usize) -> Vec<Wish> {
        let book = self.book();
        let open = |asked: &&Asked| {
            asked.wish.key.is_some()
                && asked.order_id().is_none()
                && asked
                    .tries
                    .iter()
                    .any(|one| matches!(one.promise, Promise::Unknown | Promise::Nothing))
        };
        book.users
            .iter()
            .rev()
            .map(|user| &book.asked[user])
            .filter(open)
            .take(count)
            .map(|asked| asked.wish.clone())
            .collect()
    }

    /// Compares with what the database says now.
    pub async fn compare(&self, config: &tokio_postgres::Config) -> Verdict {
        let found = Found::read(config).await;
        self.judge(&found)
    }

    /// The same, as often as it takes, for a server that may still be writing what it accepted.
    pub async fn compare_until(
        &self,
        config: &tokio_postgres::Config,
        patience: Duration,
    ) -> Verdict {
        let deadline = Instant::now() + patience;
        loop {
            let verdict = self.compare(config).await;
            if verdict.holds() || Instant::now() >= deadline {
                return verdict;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Compares with what was read.
    pub fn judge(&self, found: &Found) -> Verdict {
        let book = self.book();
        let mut verdict = Verdict {
            faults: book.lies.clone(),
            ..Verdict::default()
        };
        let mut by_user: HashMap<&str, Vec<&Row>> = HashMap::new();
        for row in &found.rows {
            by_user.entry(&row.user).or_default().push(row);
            if !book.asked.contains_key(&row.user) {
                verdict.fault(format!("nobody asked for {row:?}"));
            }
        }
        for (user, asked) in &book.asked {
            let rows = by_user.get(user.as_str()).map_or(&[][..], Vec::as_slice);
            verdict.judge_request(asked, rows);
        }
        verdict.judge_stock(&book.offers, found);
        verdict
    }
}

/// What an answer promises, or why it is false by itself.
fn promise(
    wish: &Wish,
    status: u16,
    body: &Value,
    respond_async: bool,
    in_batch: bool,
) -> Result<Promise, &'static str> {
    let state = body["status"].as_str().unwrap_or_default();
    match status {
        // A dead letter keeps its row as `failed`, and a person may place it after all.
        400.. => {
            let code = body["code"].as_str().unwrap_or_default().to_owned();
            if code.is_empty() {
                return Err("a refusal without a code");
            }
            if code == "idempotency_key_reused" {
                return Err("the key was used with one body only");
            }
            // Said only after the key was looked up; the others may be said before.
            let conclusive = ["sold_out", "purchase_limit", "timed_out"].contains(&code.as_str());
            return Ok(Promise::Refused { code, conclusive });
        }
        202 if state == "undecided" && (in_batch || !respond_async) => {
            return Ok(Promise::Nothing);
        }
        202 if state != "accepted" || !respond_async => {
            return Err("202 is `accepted` with Preference-Applied or `undecided` without");
        }
        200..=202 => {}
        _ => return Err("no such status"),
    }
    let same = body["user_id"] == wish.user.as_str()
        && body["sku_id"] == wish.sku.as_str()
        && body["quantity"] == wish.quantity
        && body["adjustment"] == wish.adjustment
        && body["amount"] == wish.amount;
    if !same {
        return Err("an order that was not asked for");
    }
    let id = body["order_id"].as_str().and_then(|id| id.parse().ok());
    id.map(Promise::Accepted).ok_or("an order without an id")
}

/// A row of `order_list`.
#[derive(Clone, Debug)]
pub struct Row {
    pub order_id: i64,
    pub user: String,
    pub sku: String,
    pub quantity: i64,
    pub adjustment: i64,
    pub amount: i64,
    pub status: String,
    /// Why its money has to go back, or went back.
    pub refund_reason: Option<String>,
    pub attributes: Option<Value>,
}

/// A row of `payment_list`.
#[derive(Clone, Debug)]
pub struct PaymentRow {
    pub id: i64,
    pub payment: String,
    pub order: String,
    pub amount: i64,
    pub currency: String,
    pub state: String,
    pub refund_reason: Option<String>,
}

/// A row of `sku_list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    pub total: i64,
    pub held: i64,
    pub sold: i64,
}

/// What the database says, all of one moment.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pub rows: Vec<Row>,
    pub skus: BTreeMap<String, Counters>,
    pub payments: Vec<PaymentRow>,
}

impl Found {
    /// Reads the three views.
    pub async fn read(config: &tokio_postgres::Config) -> Self {
        let client = connect(config).await;
        client
            .batch_execute(
                "SET search_path = millrace; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
            )
            .await
            .expect("begin");
        let rows = client
            .query(
                "SELECT order_id, user_id, sku_id, quantity, adjustment, amount, status, attributes, \
                        refund_reason FROM order_list",
                &[],
            )
            .await
            .expect("read order_list");
        let skus = client
            .query("SELECT sku_id, total, held, sold FROM sku_list", &[])
            .await
            .expect("read sku_list");
        let payments = client
            .query(
                "SELECT id, payment_id, order_ref, amount, currency, state, refund_reason FROM payment_list",
                &[],
            )
            .await
            .expect("read payment_list");
        let payment = |row: &tokio_postgres::Row| PaymentRow {
            id: row.get(0),
            payment: row.get(1),
            order: row.get(2),
            amount: row.get(3),
            currency: row.get(4),
            state: row.get(5),
            refund_reason: row.get(6),
        };
        let row = |row: &tokio_postgres::Row| Row {
            order_id: row.get(0),
            user: row.get(1),
            sku: row.get(2),
            quantity: row.get::<_, i32>(3).into(),
            adjustment: row.get(4),
            amount: row.get(5),
            status: row.get(6),
            attributes: row
                .get::<_, Option<&str>>(7)
                .map(|text| serde_json::from_str(text).unwrap_or_default()),
            refund_reason: row.get(8),
        };
        let counters = |row: &tokio_postgres::Row| {
            let (total, held, sold) = (row.get(1), row.get(2), row.get(3));
            (row.get(0), Counters { total, held, sold })
        };
        Found {
            rows: rows.iter().map(row).collect(),
            payments: payments.iter().map(payment).collect(),
            skus: skus.iter().map(counters).collect(),
        }
    }
}

/// What the comparison has shown.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Requests whose client was told that the order is there or will be.
    pub acked: u64,
    /// Those of them whose row is there, as it was asked for.
    pub present: u64,
    /// Orders beyond one for a key.
    pub duplicated: u64,
    /// Rows of requests that were refused.
    pub refused_but_present: u64,
    /// Units sold beyond what there was.
    pub oversold: i64,
    /// Units by which counters and rows differ.
    pub leaked: i64,
    /// Requests that were refused, that a cancellation undid, and that never got an answer.
    pub refused: u64,
    pub cancelled: u64,
    pub unanswered: u64,
    /// Acknowledged orders that some client was only told to be durable in the queue.
    pub respond_async: u64,
    /// What came of payments, where any were made.
    pub money: Money,
    /// Everything that is wrong, in words.
    pub faults: Vec<String>,
}

impl Verdict {
    /// Whether every promise was kept.
    pub fn holds(&self) -> bool {
        self.acked == self.present
            && self.duplicated == 0
            && self.refused_but_present == 0
            && self.oversold == 0
            && self.leaked == 0
            && self.money.adds_up()
            && self.faults.is_empty()
    }

    /// The figures with the first of what is wrong.
    pub fn into_words(self) -> String {
        let shown: Vec<String> = self.faults.iter().take(5).cloned().collect();
        let more = self.faults.len() - shown.len();
        format!("{self}: {} (and {more} more)", shown.join("; "))
    }

    /// Adds the figures of another database.
    pub fn add(&mut self, other: &Verdict) {
        self.acked += other.acked;
        self.present += other.present;
        self.duplicated += other.duplicated;
        self.refused_but_present += other.refused_but_present;
        self.oversold += other.oversold;
        self.leaked += other.leaked;
        self.refused += other.refused;
        self.cancelled += other.cancelled;
        self.unanswered += other.unanswered;
        self.respond_async += other.respond_async;
        self.money.add(&other.money);
        self.faults.extend_from_slice(&other.faults);
    }

    /// Notes something that is wrong.
    pub fn fault(&mut self, fault: String) {
        self.faults.push(fault);
    }

    fn judge_request(&mut self, asked: &Asked, rows: &[&Row]) {
        let wish = &asked.wish;
        let mut ids: Vec<i64> = asked.accepted().map(|(_, id)| id).collect();
        ids.sort_unstable();
        ids.dedup();
        let extra = (rows.len().max(1) - 1).max(ids.len().max(1) - 1) as u64;
        if extra > 0 {
            self.duplicated += extra;
            self.fault(format!("more than one order for {asked:?}: {rows:?}"));
        }
        if ids.is_empty() {
            let unknown = |one: &Try| one.promise == Promise::Unknown;
            if asked.is_refused() {
                self.refused += 1;
            } else if asked.tries.iter().any(unknown) {
                self.unanswered += 1;
            }
            // A dead letter is the row of a refusal.
            if asked.is_refused() && rows.iter().any(|row| row.status != "failed") {
                self.refused_but_present += 1;
                self.fault(format!("refused and present: {asked:?}: {rows:?}"));
            }
        }
        let respond_async = asked.tries.iter().any(|one| one.respond_async);
        self.respond_async += u64::from(respond_async);
        for id in &ids {
            self.acked += 1;
            match rows.iter().find(|row| row.order_id == *id) {
                Some(row) if is_of(row, wish) => self.present += 1,
                Some(row) => self.fault(format!("changed: {asked:?}: {row:?}")),
                None => self.fault(format!("acknowledged and lost: {asked:?}: {rows:?}")),
            }
        }
        for row in rows {
            if !is_of(row, wish) && !ids.contains(&row.order_id) {
                self.fault(format!("not as it was asked for: {asked:?}: {row:?}"));
            }
            // One that was paid all the same has its money to go back.
            let is_cancelled = row.status == "cancelled"
                || row.refund_reason.as_deref() == Some("order_cancelled");
            if asked.cancelled && !is_cancelled {
                self.fault(format!("its cancellation is lost: {asked:?}: {row:?}"));
            }
            if is_cancelled && !asked.cancel_asked {
                self.fault(format!("nobody cancelled it: {asked:?}: {row:?}"));
            }
            self.cancelled += u64::from(is_cancelled);
        }
        // Refused after it was accepted, by a process that must have known.
        for (accepted, _) in asked.accepted() {
            for one in &asked.tries {
                if one.sent > accepted.answered
                    && let Promise::Refused {
                        conclusive: true,
                        code,
                    } = &one.promise
                {
                    self.fault(format!("accepted, then refused with {code}: {asked:?}"));
                }
            }
        }
    }

    fn judge_stock(&mut self, offers: &BTreeMap<String, Offer>, found: &Found) {
        let mut live: HashMap<&str, (i64, i64)> = HashMap::new();
        for row in &found.rows {
            let (held, sold) = live.entry(&row.sku).or_default();
            match row.status.as_str() {
                "pending_payment" => *held += row.quantity,
                "paid" => *sold += row.quantity,
                "cancelled" | "expired" | "failed" | "refund_due" | "refunded" => {}
                other => self.fault(format!("no such status: {other}: {row:?}")),
            }
        }
        for (sku, offer) in offers {
            let (held, sold) = live.get(sku.as_str()).copied().unwrap_or_default();
            let over = (held + sold - offer.total).max(0);
            if over > 0 {
                self.oversold += over;
                self.fault(format!("{sku}: {over} units sold beyond {}", offer.total));
            }
            let Some(counters) = found.skus.get(sku) else {
                self.fault(format!("{sku} is not in sku_list"));
                continue;
            };
            if counters.total != offer.total {
                self.fault(format!("{sku}: its total is {}", counters.total));
            }
            let leaked = (counters.held - held).abs() + (counters.sold - sold).abs();
            if leaked > 0 {
                self.leaked += leaked;
                self.fault(format!(
                    "{sku}: {counters:?}, but rows hold {held} and sold {sold}"
                ));
            }
        }
    }
}

fn is_of(row: &Row, wish: &Wish) -> bool {
    row.user == wish.user
        && row.sku == wish.sku
        && row.quantity == i64::from(wish.quantity)
        && row.adjustment == wish.adjustment
        && row.amount == wish.amount
        && row.attributes == wish.attributes
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "acked={} present={} duplicated={} refused_but_present={} oversold={} leaked={} \
             async={} refused={} cancelled={} unanswered={}",
            self.acked,
            self.present,
            self.duplicated,
            self.refused_but_present,
            self.oversold,
            self.leaked,
            self.respond_async,
            self.refused,
            self.cancelled,
            self.unanswered,
        )?;
        write!(f, "{}", self.money)
    }
}
