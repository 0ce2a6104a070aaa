//! Requests for orders and their answers, and their comparison with the rows.
//!
//! Every order is requested by a user of its own, so that a row of `order_list`, which shows no keys, says by
//! itself which requests it can come from: those of one user, all under one key.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rand::Rng;
use rand::seq::IndexedRandom as _;
use serde_json::Value;

use super::{Findings, OrderRow, StoredRows};

/// An order as a client requests it; a retry is the same word for word.
#[derive(Clone, Debug, PartialEq)]
pub struct OrderRequest {
    /// A user who has no other request.
    pub user: String,
    /// Its Idempotency-Key; without one it is sent once.
    pub key: Option<String>,
    /// The SKU.
    pub sku: String,
    /// Units.
    pub quantity: u32,
    /// In minor units.
    pub adjustment: i64,
    /// Price times quantity plus adjustment, in minor units.
    pub amount: i64,
    /// Its attributes.
    pub attributes: Option<Value>,
    /// Whether it waits if no units are free.
    pub waitlist: bool,
}

/// An answer, whole or one line of a batch's.
#[derive(Clone, Debug)]
pub struct OrderAnswer {
    /// The status line's code, or the line's `http_status`.
    pub status: u16,
    /// The body, or the line.
    pub body: Value,
    /// Whether `Preference-Applied: respond-async` came with it.
    pub respond_async: bool,
    /// Whether it is one line of a batch, whose header fields are about all lines.
    pub in_batch: bool,
}

/// A request under way; [`Checker::answered`] ends it.
#[must_use]
pub struct Attempt {
    user: String,
    number: usize,
}

/// The claim of an answer, which has to be true.
#[derive(Clone, Debug, PartialEq)]
pub enum Claim {
    /// None: the request has no answer yet, or never got one.
    Unknown,
    /// `undecided`.
    Undecided,
    /// The order is there, or will be: its id.
    Accepted(i64),
    /// This request placed no order.
    Refused {
        /// The problem's code.
        code: String,
        /// Nor did an earlier request under the same key.
        conclusive: bool,
    },
}

impl Claim {
    /// A refusal with this code.
    pub fn refused(code: &str) -> Self {
        Self::Refused {
            // Sent only after the key was looked up; other refusals may come before.
            conclusive: ["sold_out", "purchase_limit", "timed_out"].contains(&code),
            code: code.to_owned(),
        }
    }
}

/// One request with the claim of its answer.
#[derive(Clone, Debug)]
pub struct AttemptRecord {
    /// The process of the server that it was sent to: 0 for the first, one more after each that is gone.
    pub life: u32,
    /// When it was sent, on a clock of the caller's.
    pub sent: u64,
    /// When it was answered, on the same clock.
    pub answered: u64,
    /// The claim of the answer.
    pub claim: Claim,
    /// Whether it was answered with `202` and `Preference-Applied`.
    pub respond_async: bool,
}

#[derive(Clone, Debug)]
struct Requested {
    request: OrderRequest,
    attempts: Vec<AttemptRecord>,
    /// Whether anyone asked for its cancellation, and whether that was confirmed.
    cancel_asked: bool,
    cancelled: bool,
}

impl Requested {
    fn accepted(&self) -> impl Iterator<Item = (&AttemptRecord, i64)> {
        self.attempts.iter().filter_map(|one| match one.claim {
            Claim::Accepted(id) => Some((one, id)),
            Claim::Unknown | Claim::Undecided | Claim::Refused { .. } => None,
        })
    }

    fn order_id(&self) -> Option<i64> {
        self.accepted().map(|(_, id)| id).next()
    }

    /// Whether the answers leave no room for a row.
    fn is_refused(&self) -> bool {
        // Attempts that may have placed it, as far as the client knows.
        let open = |one: &&AttemptRecord| !matches!(one.claim, Claim::Refused { .. });
        let Some(last_life) = self.attempts.iter().filter(open).map(|one| one.life).max() else {
            return !self.attempts.is_empty();
        };
        // The process that they were sent to is gone, and a later one has looked at the key and found no
        // order under it.
        self.order_id().is_none()
            && self.attempts.iter().any(|one| {
                one.life > last_life
                    && matches!(
                        one.claim,
                        Claim::Refused {
                            conclusive: true,
                            ..
                        }
                    )
            })
    }
}

#[derive(Clone, Copy, Debug)]
struct SkuOffer {
    unit_price: i64,
    total: i64,
}

#[derive(Default)]
struct History {
    clock: u64,
    life: u32,
    answers: u64,
    asked: HashMap<String, Requested>,
    /// The users in the order of their first requests.
    users: Vec<String>,
    offers: BTreeMap<String, SkuOffer>,
    /// Answers that are false by themselves.
    false_answers: Vec<String>,
}

impl History {
    /// The history of a request, which is new or known.
    fn requested(&mut self, request: &OrderRequest) -> &mut Requested {
        let Self { asked, users, .. } = self;
        let requested = asked.entry(request.user.clone()).or_insert_with(|| {
            users.push(request.user.clone());
            Requested {
                request: request.clone(),
                attempts: Vec::new(),
                cancel_asked: false,
                cancelled: false,
            }
        });
        assert_eq!(requested.request, *request, "a user has one request");
        assert!(
            requested.attempts.is_empty() || request.key.is_some(),
            "a request without a key is sent once"
        );
        requested
    }
}

/// All requests and answers. Shared by the threads of clients.
#[derive(Default)]
pub struct Checker {
    history: Mutex<History>,
}

impl Checker {
    /// One without a history.
    pub fn new() -> Self {
        Self::default()
    }

    fn history(&self) -> MutexGuard<'_, History> {
        // A thread that panicked has ended the run; what it left is still what clients were told.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a SKU is on sale with this many units in all.
    pub fn offers(&self, sku: &str, unit_price: i64, total: u32) {
        let total = i64::from(total);
        let offer = SkuOffer { unit_price, total };
        self.history().offers.insert(sku.to_owned(), offer);
    }

    /// The price of a SKU that is on sale.
    pub fn unit_price(&self, sku: &str) -> Option<i64> {
        self.history().offers.get(sku).map(|offer| offer.unit_price)
    }

    /// Notes that the server's process is gone, with every request that was under way in it.
    pub fn server_is_gone(&self) {
        self.history().life += 1;
    }

    /// Notes that a request is about to be sent.
    ///
    /// # Panics
    /// If the user has another request already, or this one without a key was sent before.
    pub fn asks(&self, request: &OrderRequest) -> Attempt {
        let mut history = self.history();
        history.clock += 1;
        let (sent, life) = (history.clock, history.life);
        let requested = history.requested(request);
        requested.attempts.push(AttemptRecord {
            life,
            sent,
            answered: u64::MAX,
            claim: Claim::Unknown,
            respond_async: false,
        });
        Attempt {
            user: request.user.clone(),
            number: requested.attempts.len() - 1,
        }
    }

    /// Notes a request that has ended, with times of the caller's own clock.
    ///
    /// # Panics
    /// As [`Checker::asks`].
    pub fn record(&self, request: &OrderRequest, attempt: AttemptRecord) {
        self.history().requested(request).attempts.push(attempt);
    }

    /// Notes the answer to a request; none: no answer came, and none will. True: the order was accepted.
    pub fn answered(&self, attempt: Attempt, answer: Option<OrderAnswer>) -> bool {
        let mut history = self.history();
        history.clock += 1;
        let answered = history.clock;
        history.answers += u64::from(answer.is_some());
        let History {
            asked,
            false_answers,
            ..
        } = &mut *history;
        let Attempt { user, number } = attempt;
        let Some(asked) = asked.get_mut(&user) else {
            return false;
        };
        let claim = match &answer {
            None => Claim::Unknown,
            Some(answer) => claim(&asked.request, answer).unwrap_or_else(|why| {
                false_answers.push(format!("{user}: {why}: {answer:?}"));
                Claim::Unknown
            }),
        };
        let accepted = matches!(claim, Claim::Accepted(_));
        if let Some(one) = asked.attempts.get_mut(number) {
            (one.claim, one.answered) = (claim, answered);
            one.respond_async = accepted && answer.is_some_and(|answer| answer.status == 202);
        }
        accepted
    }

    /// How many requests were answered so far.
    pub fn answers(&self) -> u64 {
        self.history().answers
    }

    /// Notes that a cancellation is about to be sent.
    pub fn asks_to_cancel(&self, user: &str) {
        if let Some(asked) = self.history().asked.get_mut(user) {
            asked.cancel_asked = true;
        }
    }

    /// Whether a cancellation of this user's order was sent.
    pub fn is_cancel_asked(&self, user: &str) -> bool {
        let history = self.history();
        history
            .asked
            .get(user)
            .is_some_and(|asked| asked.cancel_asked)
    }

    /// Notes that a cancellation was confirmed.
    pub fn cancel_confirmed(&self, user: &str) {
        if let Some(asked) = self.history().asked.get_mut(user) {
            asked.cancelled = true;
        }
    }

    /// The order id in an answer to this user, if any.
    pub fn order_id(&self, user: &str) -> Option<i64> {
        self.history().asked.get(user).and_then(Requested::order_id)
    }

    /// Up to `count` acknowledged requests with a key, from all times, each with its order.
    pub fn some_acknowledged(
        &self,
        count: usize,
        random: &mut impl Rng,
    ) -> Vec<(OrderRequest, i64)> {
        let history = self.history();
        // Most at random; some of the last, which a crash is most likely to have hurt.
        let last = history.users.iter().rev().take(count * 4);
        let all = (0..count * 4).filter_map(|_| history.users.choose(random));
        let mut seen = HashSet::new();
        last.step_by(4)
            .chain(all)
            .filter(|user| seen.insert(user.as_str()))
            .filter_map(|user| {
                let asked = &history.asked[user];
                let id = asked.order_id()?;
                asked.request.key.as_ref()?;
                Some((asked.request.clone(), id))
            })
            .take(count)
            .collect()
    }

    /// The last requests with a key whose clients do not know their outcome.
    pub fn open_requests(&self, count: usize) -> Vec<OrderRequest> {
        let history = self.history();
        let open = |asked: &&Requested| {
            asked.request.key.is_some()
                && asked.order_id().is_none()
                && asked
                    .attempts
                    .iter()
                    .any(|one| matches!(one.claim, Claim::Unknown | Claim::Undecided))
        };
        history
            .users
            .iter()
            .rev()
            .map(|user| &history.asked[user])
            .filter(open)
            .take(count)
            .map(|asked| asked.request.clone())
            .collect()
    }

    /// Compares the history with the rows.
    pub fn check(&self, rows: &StoredRows) -> Findings {
        let history = self.history();
        let mut findings = Findings {
            faults: history.false_answers.clone(),
            ..Findings::default()
        };
        let mut by_user: HashMap<&str, Vec<&OrderRow>> = HashMap::new();
        for row in &rows.orders {
            by_user.entry(&row.user).or_default().push(row);
            if !history.asked.contains_key(&row.user) {
                findings.unexplained += 1;
                findings.fault(format!("nobody asked for {row:?}"));
            }
        }
        for (user, asked) in &history.asked {
            let rows = by_user.get(user.as_str()).map_or(&[][..], Vec::as_slice);
            check_request(&mut findings, asked, rows);
        }
        check_stock(&mut findings, &history.offers, rows);
        findings
    }
}

/// The claim of an answer, or why the answer is false by itself.
fn claim(request: &OrderRequest, answer: &OrderAnswer) -> Result<Claim, &'static str> {
    let OrderAnswer {
        status,
        ref body,
        respond_async,
        in_batch,
    } = *answer;
    let state = body["status"].as_str().unwrap_or_default();
    match status {
        // A dead letter keeps its row as `failed`, and a person may place it after all.
        400.. => {
            let code = body["code"].as_str().unwrap_or_default();
            if code.is_empty() {
                return Err("a refusal without a code");
            }
            if code == "idempotency_key_reused" {
                return Err("the key was used with one body only");
            }
            return Ok(Claim::refused(code));
        }
        202 if state == "undecided" && (in_batch || !respond_async) => {
            return Ok(Claim::Undecided);
        }
        // Waits for units, with Preference-Applied or without.
        202 if state == "waitlisted" => {}
        202 if state != "accepted" || !respond_async => {
            return Err(
                "202 is `accepted` with Preference-Applied, `undecided` without, or `waitlisted`",
            );
        }
        200..=202 => {}
        _ => return Err("no such status"),
    }
    let same = body["user_id"] == request.user.as_str()
        && body["sku_id"] == request.sku.as_str()
        && body["quantity"] == request.quantity
        && body["adjustment"] == request.adjustment
        && body["amount"] == request.amount;
    if !same {
        return Err("an order that was not asked for");
    }
    let id = body["order_id"].as_str().and_then(|id| id.parse().ok());
    id.map(Claim::Accepted).ok_or("an order without an id")
}

/// Compares a request with the rows of its user.
fn check_request(findings: &mut Findings, asked: &Requested, rows: &[&OrderRow]) {
    let request = &asked.request;
    let mut ids: Vec<i64> = asked.accepted().map(|(_, id)| id).collect();
    ids.sort_unstable();
    ids.dedup();
    let extra = (rows.len().max(1) - 1).max(ids.len().max(1) - 1) as u64;
    findings.second_rows += rows.len().saturating_sub(1) as u64;
    let mut contradicts = ids.len() > 1;
    if extra > 0 {
        findings.duplicated += extra;
        findings.fault(format!("more than one order for {asked:?}: {rows:?}"));
    }
    if ids.is_empty() {
        let unknown = |one: &AttemptRecord| one.claim == Claim::Unknown;
        if asked.is_refused() {
            findings.refused += 1;
        } else if asked.attempts.iter().any(unknown) {
            findings.unanswered += 1;
        }
        // A dead letter is the row of a refusal.
        if asked.is_refused() && rows.iter().any(|row| row.status != "failed") {
            findings.refused_but_present += 1;
            findings.fault(format!("refused and present: {asked:?}: {rows:?}"));
        }
    }
    let respond_async = asked.attempts.iter().any(|one| one.respond_async);
    findings.respond_async += u64::from(respond_async);
    for id in &ids {
        findings.acked += 1;
        match rows.iter().find(|row| row.order_id == *id) {
            Some(row) if is_of(row, request) => findings.present += 1,
            Some(row) => {
                findings.changed += 1;
                findings.fault(format!("changed: {asked:?}: {row:?}"));
            }
            None => {
                findings.lost += 1;
                findings.fault(format!("acknowledged and lost: {asked:?}: {rows:?}"));
            }
        }
    }
    for row in rows {
        if !is_of(row, request) && !ids.contains(&row.order_id) {
            findings.unexplained += 1;
            findings.fault(format!("not as it was asked for: {asked:?}: {row:?}"));
        }
        // One that was paid all the same has its money to go back.
        let is_cancelled =
            row.status == "cancelled" || row.refund_reason.as_deref() == Some("order_cancelled");
        if asked.cancelled && !is_cancelled {
            findings.fault(format!("its cancellation is lost: {asked:?}: {row:?}"));
        }
        if is_cancelled && !asked.cancel_asked {
            findings.fault(format!("nobody cancelled it: {asked:?}: {row:?}"));
        }
        findings.cancelled += u64::from(is_cancelled);
    }
    // Refused after it was accepted, by a process that must have known.
    for (accepted, _) in asked.accepted() {
        for one in &asked.attempts {
            if one.sent > accepted.answered
                && let Claim::Refused {
                    conclusive: true,
                    code,
                } = &one.claim
            {
                contradicts = true;
                findings.fault(format!("accepted, then refused with {code}: {asked:?}"));
            }
        }
    }
    findings.contradicted += u64::from(contradicts);
}

/// Compares the rows with the counters of each SKU.
fn check_stock(findings: &mut Findings, offers: &BTreeMap<String, SkuOffer>, rows: &StoredRows) {
    let mut live: HashMap<&str, (i64, i64, bool)> = HashMap::new();
    for row in &rows.orders {
        let (held, sold, waited_for) = live.entry(&row.sku).or_default();
        match row.status.as_str() {
            "pending_payment" => *held += row.quantity,
            "paid" => *sold += row.quantity,
            "waitlisted" => *waited_for = true,
            "cancelled" | "expired" | "failed" | "refund_due" | "refunded" => {}
            other => findings.fault(format!("no such status: {other}: {row:?}")),
        }
    }
    for (sku, offer) in offers {
        let found = live.get(sku.as_str()).copied();
        let (mut held, sold, waited_for) = found.unwrap_or_default();
        let over = (held + sold - offer.total).max(0);
        if over > 0 {
            findings.oversold += over;
            findings.fault(format!("{sku}: {over} units sold beyond {}", offer.total));
        }
        let Some(counters) = rows.skus.get(sku) else {
            findings.fault(format!("{sku} is not in sku_list"));
            continue;
        };
        if counters.total != offer.total {
            findings.fault(format!("{sku}: its total is {}", counters.total));
        }
        if waited_for {
            // What nobody holds is kept for whoever waits.
            held = offer.total - sold;
        }
        let leaked = (counters.held - held).abs() + (counters.sold - sold).abs();
        if leaked > 0 {
            findings.leaked += leaked;
            findings.fault(format!(
                "{sku}: {counters:?}, but rows hold {held} and sold {sold}"
            ));
        }
    }
}

fn is_of(row: &OrderRow, request: &OrderRequest) -> bool {
    row.user == request.user
        && row.sku == request.sku
        && row.quantity == i64::from(request.quantity)
        && row.adjustment == request.adjustment
        && row.amount == request.amount
        && row.attributes == request.attributes
}
