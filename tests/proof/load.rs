//! Mixed load of orders, batches, retries and cancellations; every answer goes to the checker.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use super::checker::{
    Attempt, Checker, Findings, OrderAnswer, OrderRequest, StoredRows, read_rows,
};
use super::doors::{Caller, Doors};
use super::outcome::block_on;
use super::platform::Platform;
use crate::support::http::{Answer, Connection, try_call};
use crate::support::served::{PATIENCE, Served};
use crate::support::waiting::until;

/// Requests one after the other, from several threads.
pub struct Load<'a> {
    /// The data plane; each request takes any of the doors.
    pub doors: Arc<Doors>,
    pub checker: &'a Checker,
    /// The SKUs of the orders; one that stands here twice is bought twice as often.
    pub skus: Vec<String>,
    /// The seed of all random choices; also a part of each user's name, so that no two loads share one.
    pub seed: u64,
    pub threads: u64,
    /// In hundredths, how many of the orders are to be answered once they are durable.
    pub respond_async: u32,
    /// Most orders of one batch.
    pub batch_max: usize,
    /// Whether some orders are cancelled again.
    pub cancels: bool,
    /// Whether some buyers wait if no units are free.
    pub waits: bool,
    /// The payment platform, if buyers pay.
    pub platform: Option<&'a Platform>,
}

impl<'a> Load<'a> {
    /// One of a cycle of kill and recovery: SKUs of its own, one of which sells out, and others
    /// that all cycles share; the rest as chance will have it. An error: the server is gone.
    pub fn prepare(
        served: &Served,
        checker: &'a Checker,
        cycle: u64,
        random: &mut StdRng,
    ) -> std::io::Result<Self> {
        let (hot, plain) = (format!("HOT-{cycle}"), format!("A-{cycle}"));
        let offers = [
            (hot.clone(), random.random_range(20..200)),
            (plain.clone(), 2_000),
            ("B".to_owned(), 1_000_000),
            ("C".to_owned(), 50_000_000),
        ];
        put_skus(served.control, checker, &offers)?;
        Ok(Load {
            doors: Arc::new(served.data.into()),
            checker,
            skus: vec![hot, plain, "B".to_owned(), "C".to_owned(), "C".to_owned()],
            seed: random.random(),
            threads: random.random_range(2..=8),
            respond_async: random.random_range(10..=90),
            batch_max: random.random_range(3..=60),
            cancels: true,
            waits: false,
            platform: None,
        })
    }

    /// Buys until told to stop, or until nobody answers any more. Returns how many orders were
    /// accepted.
    pub fn run(&self, stop: &AtomicBool) -> u64 {
        let open = self.checker.open_requests(self.threads as usize * 8);
        let accepted = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for number in 0..self.threads {
                // Every thread retries the requests that a crash has left open: the same key at once from
                // several sides.
                let open = open.clone();
                let accepted = &accepted;
                scope.spawn(move || {
                    let mut shop = Shop {
                        load: self,
                        random: StdRng::seed_from_u64(self.seed ^ (number << 48)),
                        name: format!("{:x}-{number}", self.seed),
                        next: 0,
                        again: open,
                        bought: Vec::new(),
                        caller: Caller::new(&self.doors),
                    };
                    while !stop.load(Ordering::Relaxed) {
                        match shop.next_step() {
                            Ok(count) => accepted.fetch_add(count, Ordering::Relaxed),
                            // The server is gone, or it ended this connection.
                            Err(_) if shop.caller.gives_up() => break,
                            Err(_) => 0,
                        };
                    }
                });
            }
        });
        accepted.into_inner()
    }
}

/// One thread of the shop's backend.
struct Shop<'a> {
    load: &'a Load<'a>,
    random: StdRng,
    name: String,
    next: u64,
    /// Requests that may be retried under their key.
    again: Vec<OrderRequest>,
    /// Users with an order.
    bought: Vec<String>,
    caller: Caller<'a>,
}

impl Shop<'_> {
    fn send(
        &mut self,
        method: &str,
        target: &str,
        fields: &[(&str, &str)],
        body: &str,
    ) -> std::io::Result<Answer> {
        let door = self.random.random_range(0..usize::MAX);
        let ask = |connection: &mut Connection| connection.send(method, target, fields, body);
        self.caller.call(door, ask)
    }

    /// Does one of the things that shops do; returns how many orders were accepted.
    fn next_step(&mut self) -> std::io::Result<u64> {
        let respond_async = self.random.random_range(0..100) < self.load.respond_async;
        match self.random.random_range(0..100) {
            0..60 => {
                let request = self.request();
                self.place(request, respond_async)
            }
            60..75 => self.place_batch(respond_async),
            75..90 => match self.again.choose(&mut self.random).cloned() {
                Some(request) => self.place(request, respond_async),
                None => Ok(0),
            },
            _ if self.load.cancels => self.cancel(),
            _ => Ok(0),
        }
    }

    fn request(&mut self) -> OrderRequest {
        self.next += 1;
        let user = format!("{}-{}", self.name, self.next);
        let random = &mut self.random;
        let sku = self.load.skus.choose(random).expect("a SKU").clone();
        let quantity = if random.random_bool(0.3) {
            random.random_range(2..=5)
        } else {
            1
        };
        let adjustment = if random.random_bool(0.2) {
            random.random_range(-50..=500)
        } else {
            0
        };
        let unit_price = self.load.checker.unit_price(&sku).expect("on sale");
        let amount = unit_price * i64::from(quantity) + adjustment;
        OrderRequest {
            key: random
                .random_bool(0.9)
                .then(|| format!("k-{:x}", random.random::<u64>())),
            attributes: random
                .random_bool(0.3)
                .then(|| json!({ "address_id": user, "gift": "ü \"\n" })),
            waitlist: self.load.waits && random.random_bool(0.5),
            user,
            sku,
            quantity,
            adjustment,
            amount,
        }
    }

    fn place(&mut self, request: OrderRequest, respond_async: bool) -> std::io::Result<u64> {
        let (fields, body) = (fields(&request, respond_async), body(&request).to_string());
        let attempt = self.load.checker.asks(&request);
        let answer = self.send("POST", "/v1/orders", &fields, &body);
        let accepted = match &answer {
            Ok(answer) => {
                let told = whole(answer);
                self.ended(attempt, &request, Some(told))
            }
            Err(_) => self.ended(attempt, &request, None),
        };
        answer.map(|_| u64::from(accepted))
    }

    fn place_batch(&mut self, respond_async: bool) -> std::io::Result<u64> {
        let count = self.random.random_range(2..=self.load.batch_max);
        let mut requests: Vec<OrderRequest> = (0..count).map(|_| self.request()).collect();
        // One of them twice in the same request.
        if requests[0].key.is_some() && self.random.random_bool(0.3) {
            requests.push(requests[0].clone());
        }
        let (fields, lines) = (batch_fields(respond_async), batch_lines(&requests));
        let attempts: Vec<Attempt> = requests
            .iter()
            .map(|request| self.load.checker.asks(request))
            .collect();
        let answer = self.send("POST", "/v1/orders:batch", &fields, &lines);
        let told = match &answer {
            Ok(answer) => told_of_batch(answer, requests.len()),
            Err(_) => vec![None; requests.len()],
        };
        let mut accepted = 0;
        for ((attempt, request), told) in attempts.into_iter().zip(&requests).zip(told) {
            accepted += u64::from(self.ended(attempt, request, told));
        }
        answer.map(|_| accepted)
    }

    fn ended(
        &mut self,
        attempt: Attempt,
        request: &OrderRequest,
        told: Option<OrderAnswer>,
    ) -> bool {
        // A client that is pushed back retries a moment later, not at once.
        if told.as_ref().is_some_and(|told| told.status == 503) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let body = told.as_ref().map(|told| told.body.clone());
        let order = self.load.platform.zip(body);
        let accepted = self.load.checker.answered(attempt, told);
        if let Some((platform, order)) = order.filter(|_| accepted) {
            platform.orders(&order);
        }
        if request.key.is_some() && self.random.random_bool(0.3) {
            self.again.push(request.clone());
        }
        if accepted {
            self.bought.push(request.user.clone());
        }
        accepted
    }

    fn cancel(&mut self) -> std::io::Result<u64> {
        if self.bought.is_empty() {
            return Ok(0);
        }
        let at = self.random.random_range(0..self.bought.len());
        let user = self.bought.swap_remove(at);
        let checker = self.load.checker;
        let Some(id) = checker.order_id(&user) else {
            return Ok(0);
        };
        checker.asks_to_cancel(&user);
        let answer = self.send("POST", &format!("/v1/orders/{id}/cancel"), &[], "")?;
        if answer.status == 200 {
            checker.cancel_confirmed(&user);
        }
        Ok(0)
    }
}

/// Asks for one order, on a connection of the caller's.
pub fn place(
    connection: &mut Connection,
    checker: &Checker,
    request: &OrderRequest,
    respond_async: bool,
) -> std::io::Result<Answer> {
    let attempt = checker.asks(request);
    let (fields, body) = (fields(request, respond_async), body(request).to_string());
    let answer = connection.send("POST", "/v1/orders", &fields, &body);
    let told = answer.as_ref().ok().map(whole);
    checker.answered(attempt, told);
    answer
}

/// Asks for orders that are to be accepted once they are durable, in one request. Returns how many
/// were.
pub fn place_batch_async(
    connection: &mut Connection,
    checker: &Checker,
    requests: &[OrderRequest],
) -> std::io::Result<usize> {
    let attempts: Vec<Attempt> = requests
        .iter()
        .map(|request| checker.asks(request))
        .collect();
    let (fields, lines) = (batch_fields(true), batch_lines(requests));
    let answer = connection.send("POST", "/v1/orders:batch", &fields, &lines);
    let told = match &answer {
        Ok(answer) => told_of_batch(answer, requests.len()),
        Err(_) => vec![None; requests.len()],
    };
    let accepted = attempts.into_iter().zip(told);
    let accepted =
        accepted.filter_map(|(attempt, told)| checker.answered(attempt, told).then_some(()));
    let accepted = accepted.count();
    answer.map(|_| accepted)
}

type Fields<'a> = Vec<(&'static str, &'a str)>;

fn fields(request: &OrderRequest, respond_async: bool) -> Fields<'_> {
    let mut fields = vec![("Content-Type", "application/json")];
    fields.extend(request.key.as_deref().map(|key| ("Idempotency-Key", key)));
    fields.extend(respond_async.then_some(("Prefer", "respond-async")));
    fields
}

fn batch_fields(respond_async: bool) -> Fields<'static> {
    let mut fields = vec![("Content-Type", "application/x-ndjson")];
    fields.extend(respond_async.then_some(("Prefer", "respond-async")));
    fields
}

fn batch_lines(requests: &[OrderRequest]) -> String {
    let mut lines = String::new();
    for request in requests {
        let mut body = body(request);
        if let Some(key) = &request.key {
            body["idempotency_key"] = key.as_str().into();
        }
        lines.push_str(&body.to_string());
        lines.push('\n');
    }
    lines
}

/// The answer to each line of a batch.
fn told_of_batch(answer: &Answer, count: usize) -> Vec<Option<OrderAnswer>> {
    // Refused as a whole: no line of it was looked at.
    if answer.status != 200 {
        return vec![Some(whole(answer)); count];
    }
    let line = |line: &str| {
        let body: Value = serde_json::from_str(line).unwrap_or_default();
        Some(OrderAnswer {
            status: body["http_status"].as_u64().unwrap_or_default() as u16,
            body,
            respond_async: is_async(answer),
            in_batch: true,
        })
    };
    let text = String::from_utf8_lossy(&answer.body);
    let told: Vec<Option<OrderAnswer>> = text.lines().map(line).collect();
    assert_eq!(told.len(), count, "a line an order: {answer:?}");
    told
}

fn body(request: &OrderRequest) -> Value {
    let mut body =
        json!({ "user_id": request.user, "sku_id": request.sku, "quantity": request.quantity });
    if request.adjustment != 0 {
        body["adjustment"] = request.adjustment.into();
    }
    if let Some(attributes) = &request.attributes {
        body["attributes"] = attributes.clone();
    }
    if request.waitlist {
        body["waitlist"] = true.into();
    }
    body
}

fn whole(answer: &Answer) -> OrderAnswer {
    OrderAnswer {
        status: answer.status,
        body: answer.json(),
        respond_async: is_async(answer),
        in_batch: false,
    }
}

fn is_async(answer: &Answer) -> bool {
    answer
        .field("preference-applied")
        .is_some_and(|applied| applied.contains("respond-async"))
}

/// Puts SKUs on sale, each with its units, unless they are. An error: the server is gone.
pub fn put_skus(
    control: SocketAddr,
    checker: &Checker,
    skus: &[(String, u32)],
) -> std::io::Result<()> {
    for (number, (sku, total)) in skus.iter().enumerate() {
        if checker.unit_price(sku).is_some() {
            continue;
        }
        let unit_price = 100 + number as i64;
        let body = json!({
            "unit_price": unit_price, "currency": "EUR", "total": total, "waitlist_max": 50,
        });
        let target = format!("/admin/v1/skus/{sku}");
        let put = || try_call(control, "PUT", &target, &[], &body.to_string());
        let answer = decided("a SKU is put on sale", put)?;
        assert!((200..300).contains(&answer.status), "{answer:?}");
        checker.offers(sku, unit_price, *total);
    }
    Ok(())
}

/// Holds a server that has just recovered, and has no load yet, against everything that clients
/// were told.
pub fn check(
    data: SocketAddr,
    checker: &Checker,
    config: &tokio_postgres::Config,
    seed: u64,
) -> Findings {
    // Retries first: their effects must be right as well.
    let mut said = Findings::default();
    retry_some(data, checker, 30, seed, &mut said);
    let found = block_on(read_rows(config));
    let mut findings = checker.check(&found);
    compare_counters(data, &found, &mut findings);
    findings.faults.extend(said.faults);
    findings
}

/// Asks until the answer is no 503: the proofs give the database 400 ms a step, and a busy machine may need longer.
fn decided(
    what: &str,
    mut ask: impl FnMut() -> std::io::Result<Answer>,
) -> std::io::Result<Answer> {
    let mut answer = ask();
    until(what, PATIENCE, || {
        let is_decided = answer.as_ref().map_or(true, |answer| answer.status != 503);
        if !is_decided {
            answer = ask();
        }
        is_decided
    });
    answer
}

/// Asks for some acknowledged orders again, under the same keys: each has to be the same order.
pub fn retry_some(
    data: SocketAddr,
    checker: &Checker,
    count: usize,
    seed: u64,
    findings: &mut Findings,
) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut connection = Connection::open(data).expect("connect");
    for (request, id) in checker.some_acknowledged(count, &mut random) {
        let again = || place(&mut connection, checker, &request, false);
        let answer = decided("an order is looked up", again).expect("an answer");
        let same = answer.status == 200
            && answer.field("idempotency-replayed") == Some("true")
            && answer.json()["order_id"].as_str() == Some(&id.to_string());
        if !same {
            findings.fault(format!("retried, {request:?} is not {id}: {answer:?}"));
        }
    }
}

/// Compares the counters that a server without load answers with those of the database.
pub fn compare_counters(data: SocketAddr, found: &StoredRows, findings: &mut Findings) {
    let mut connection = Connection::open(data).expect("connect");
    for (sku, counters) in &found.skus {
        let answer = connection
            .send("GET", &format!("/v1/skus/{sku}"), &[], "")
            .expect("an answer");
        if answer.status != 200 {
            findings.fault(format!("{sku} is not answered: {answer:?}"));
            continue;
        }
        let live = answer.json();
        let units = |name: &str| live[name].as_i64().unwrap_or(i64::MIN / 4);
        if units("total") != units("free") + units("held") + units("sold") {
            findings.fault(format!("{sku} does not add up: {live}"));
        }
        let off = (units("held") - counters.held).abs() + (units("sold") - counters.sold).abs();
        if off > 0 || units("total") != counters.total {
            findings.leaked += off;
            findings.fault(format!(
                "{sku} is {counters:?} in the database, live {live}"
            ));
        }
    }
}

/// Adds the faults that Millrace's own audit finds.
pub fn audit(control: SocketAddr, findings: &mut Findings) {
    match try_call(control, "GET", "/admin/v1/audit", &[], "") {
        Ok(answer) if answer.json()["ok"] == Value::Bool(true) => {}
        Ok(answer) => {
            let said = answer.json();
            let checks = said["checks"].as_array().cloned().unwrap_or_default();
            let failing = checks.iter().filter(|check| check["ok"] != true);
            let failing: Vec<String> = failing.map(Value::to_string).collect();
            let status = answer.status;
            findings.fault(format!("the audit fails: {status}: {failing:?}"));
        }
        Err(error) => findings.fault(format!("the audit fails: {error}")),
    }
}

/// How a server is set up for one cycle.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `queue.capacity`: small, so that accepted orders have to wait on disk.
    pub capacity: Option<u32>,
    /// `queue.journal.bytes_max`: small, so that segments come and go.
    pub journal_bytes: Option<u64>,
    /// `workers.batch_rows_max`: small, so that there are many commits.
    pub batch_rows: Option<u32>,
}

impl Settings {
    /// Any of the combinations.
    pub fn choose(random: &mut StdRng) -> Self {
        Settings {
            capacity: random
                .random_bool(0.5)
                .then(|| random.random_range(8..=256)),
            journal_bytes: random.random_bool(0.5).then_some(1 << 20),
            batch_rows: random.random_bool(0.5).then(|| random.random_range(1..=32)),
        }
    }

    /// Leaves out settings that this Millrace does not know.
    pub fn for_this_build(&mut self) {
        if !has_journal() {
            self.journal_bytes = None;
        }
    }

    /// The same as environment variables.
    pub fn environment(&self) -> Vec<(String, String)> {
        let capacity = self.capacity.map(u64::from);
        let batch_rows = self.batch_rows.map(u64::from);
        [
            ("MILLRACE_QUEUE__CAPACITY", capacity),
            ("MILLRACE_QUEUE__JOURNAL__BYTES_MAX", self.journal_bytes),
            ("MILLRACE_WORKERS__BATCH_ROWS_MAX", batch_rows),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?.to_string())))
        .collect()
    }
}

/// Whether this Millrace has a journal to set up.
pub fn has_journal() -> bool {
    serde_json::to_value(millrace::config::Config::default())
        .is_ok_and(|config| config["queue"]["journal"].is_object())
}
