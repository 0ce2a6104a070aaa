//! The real binary whose journal holds acknowledged orders far apart among many rows, and orders of a
//! SKU whose counters the database refuses. Killed, started, killed again: whoever was told
//! `accepted` has a row in the end, the parked ones once somebody has mended their SKU, and other
//! sales go on all the while. A start reads about as many rows as it looks orders up.
//!
//! `MILLRACE_PARKED_ORDERS=100000` parks so many in each round, `MILLRACE_LATER_ROWS` is the number of
//! rows between the others.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio_postgres::Client;

use super::checker::{Checker, Findings, OrderRequest, read_rows};
use super::load::{audit, compare_counters, place, place_batch_async, put_skus, retry_some};
use super::outcome::{Why, in_series};
use crate::support::http::{Connection, call};
use crate::support::postgres::connect;
use crate::support::sale::count;
use crate::support::served::{DataDir, Ended, OwnPostgres, PATIENCE, Served, tail};

/// Rounds on one database; the next begin with an empty one.
const SERIES: u64 = 5;
/// Acknowledged orders that lie far apart: half of them rows when the process is killed.
const APART: usize = 40;
/// Orders in one request.
const BATCH: usize = 200;
/// Units on sale, more than anybody wants.
const TOTAL: u32 = 1_000_000;
/// How soon a condition is looked at again.
const LOOK: Duration = Duration::from_millis(10);
/// Buyers of rows that no request has asked for begin so.
const BETWEEN: &str = "between-";
/// What a process may need beside its orders: queues and buffers that grow with use up to their limits.
const MEMORY_BESIDE: u64 = 64 << 20;
/// Bytes of memory for each parked order: its buyer's record, as for any other.
const MEMORY_EACH: u64 = 512;

/// Rounds of acceptance, kill -9 and recovery.
pub fn run(rounds: u64) -> Result<String, Why> {
    Ok(with_bug(rounds, None)?)
}

/// The same with a deliberate defect, to show that it is found.
pub fn with_bug(rounds: u64, bug: Option<&str>) -> Result<String, String> {
    let mut sum = Figures::default();
    let figures = in_series("recovery", rounds, SERIES, |seed, rounds, done| {
        let mut proof = Proof::new(seed, bug)?;
        let findings = proof.run(rounds, done);
        sum.add(&proof.figures);
        findings
    })?;
    Ok(format!("{figures} {sum}"))
}

/// What rounds have shown beside the findings.
#[derive(Default)]
struct Figures {
    parked: u64,
    /// Those that a worker has parked; the others were parked by the start after the kill.
    by_worker: u64,
    /// Orders that starts have looked up, and rows of `orders` that they have read for it.
    looked_up: u64,
    read: u64,
    /// Bytes that a process has grown by, at most.
    grown: u64,
}

impl Figures {
    fn add(&mut self, other: &Figures) {
        self.parked += other.parked;
        self.by_worker += other.by_worker;
        self.looked_up += other.looked_up;
        self.read += other.read;
        self.grown = self.grown.max(other.grown);
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Figures {
            parked,
            by_worker,
            looked_up,
            read,
            grown,
        } = self;
        write!(
            f,
            "parked={parked} by_worker={by_worker} looked_up={looked_up} rows_read={read} grown_mib={}",
            grown >> 20
        )
    }
}

struct Proof {
    random: StdRng,
    runtime: Runtime,
    checker: Checker,
    bug: Option<String>,
    figures: Figures,
    /// Orders that the journal has.
    journalled: u64,
    /// For names of buyers.
    next: u64,
    data_dir: DataDir,
}

/// A round's SKUs.
struct Skus {
    parked: String,
    others: [String; 3],
}

impl Proof {
    fn new(seed: u64, bug: Option<&str>) -> Result<Self, String> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|e| format!("a runtime: {e}"))?;
        Ok(Proof {
            random: StdRng::seed_from_u64(seed),
            checker: Checker::new(),
            bug: bug.map(|name| format!("bug@{name}")),
            figures: Figures::default(),
            journalled: 0,
            next: 0,
            data_dir: runtime.block_on(DataDir::fresh()),
            runtime,
        })
    }

    fn run(&mut self, rounds: u64, done: &dyn Fn(u64)) -> Result<Findings, String> {
        let mut findings = Findings::default();
        for number in 0..rounds {
            done(number);
            findings = self
                .round(number)
                .map_err(|why| format!("round {number}: {why}"))?;
            if !findings.holds() {
                break;
            }
        }
        Ok(findings)
    }

    fn round(&mut self, number: u64) -> Result<Findings, String> {
        let skus = Skus {
            parked: format!("PARKED-{number}"),
            others: ["A", "B", "C"].map(|name| format!("{name}-{number}")),
        };
        let parked = count("MILLRACE_PARKED_ORDERS", 40);
        let served = self.start()?;
        let all = skus.others.iter().chain([&skus.parked]);
        let offers: Vec<(String, u32)> = all.map(|sku| (sku.clone(), TOTAL)).collect();
        put_skus(served.control, &self.checker, &offers).map_err(|e| format!("SKUs: {e}"))?;
        let before = served.resident_bytes();

        // Some are rows when it is killed, some are parked, some are in the journal alone.
        let written = self.accept_apart(&served, &skus.others)?;
        let rows = format!(
            "SELECT count(*) = {APART} FROM orders WHERE order_id = ANY ('{{{}}}')",
            list(&written)
        );
        self.until(&rows)?;
        let refuse = self.session();
        let refusal = format!(
            "BEGIN; UPDATE sku SET total = 0 WHERE sku_id = '{}'",
            skus.parked
        );
        self.sql(&refuse, &refusal)?;
        self.accept_parked(&served, &skus.parked, parked)?;
        // By a worker and by the start after the kill, in turns.
        let by_worker = number.is_multiple_of(2);
        if by_worker {
            self.sql(&refuse, "COMMIT")?;
            self.until_parked(&skus.parked, parked)?;
            self.figures.by_worker += parked;
        }
        let hold = self.session();
        let others = format!(
            "BEGIN; SELECT FROM sku WHERE sku_id <> '{}' FOR UPDATE",
            skus.parked
        );
        self.sql(&hold, &others)?;
        let journalled = self.accept_apart(&served, &skus.others)?;
        let mut grown = vec![served.resident_bytes()];
        self.kill(served);
        self.end_sessions(&[&refuse, &hold])?;
        self.sql(&hold, "ROLLBACK")?;
        if !by_worker {
            self.sql(&refuse, "COMMIT")?;
        }
        drop((refuse, hold));
        self.put_rows_between(&[written, journalled].concat())?;
        if self.bug.is_none() {
            self.start_until_replayed()?;
        }

        // Twice: as it was, after each kill.
        for again in 0..2 {
            let served = self.start()?;
            self.until_parked(&skus.parked, parked)?;
            self.goes_on(&served, &skus, parked)
                .map_err(|why| format!("after kill {again}: {why}"))?;
            grown.push(served.resident_bytes());
            self.kill(served);
        }

        let served = self.start()?;
        self.mend(&served, &skus, parked)?;
        grown.push(served.resident_bytes());
        let most = grown.iter().map(|bytes| bytes.saturating_sub(before)).max();
        let most = most.unwrap_or_default();
        if most > MEMORY_BESIDE + parked * MEMORY_EACH {
            return Err(format!("{parked} parked orders: grown by {most} bytes"));
        }
        self.figures.parked += parked;
        self.figures.grown = self.figures.grown.max(most);
        let findings = self.judge(&served)?;
        served.terminate();
        match served.wait() {
            Some(0) => {
                self.checker.server_is_gone();
                // An orderly end leaves nothing in it.
                self.journalled = 0;
            }
            code => return Err(format!("SIGTERM ended it with {code:?}: {}", self.log())),
        }
        Ok(findings)
    }

    fn start(&self) -> Result<Served, String> {
        let fault = self.bug.as_deref();
        self.start_with(fault)
            .map_err(|ended| format!("it does not start: {}: {}", ended.status, ended.log))
    }

    fn start_with(&self, fault: Option<&str>) -> Result<Served, Ended> {
        let fault = fault.map(|fault| ("MILLRACE_FAULT".to_owned(), fault.to_owned()));
        let settings: Vec<(String, String)> = fault.into_iter().collect();
        let dir = self.data_dir.path();
        Served::try_start(dir, &settings, &dir.join("serve.log"))
    }

    fn kill(&self, served: Served) {
        served.kill();
        self.checker.server_is_gone();
    }

    fn log(&self) -> String {
        tail(&self.data_dir.path().join("serve.log"))
    }

    fn config(&self) -> tokio_postgres::Config {
        let config = OwnPostgres::of(self.data_dir.path()).config();
        config.expect("PostgreSQL runs, whatever became of Millrace")
    }

    fn session(&self) -> Client {
        self.runtime.block_on(async {
            let client = connect(&self.config()).await;
            // Whatever holds a row for longer is a fault.
            let settings = "SET search_path = millrace; SET statement_timeout = '60s'";
            let set = client.batch_execute(settings).await;
            set.expect("set the path");
            client
        })
    }

    fn sql(&self, session: &Client, statements: &str) -> Result<(), String> {
        let done = self.runtime.block_on(session.batch_execute(statements));
        done.map_err(|error| format!("{statements}: {error:?}"))
    }

    fn number(&self, query: &str) -> i64 {
        let row = self.runtime.block_on(async {
            // One of its own, so that what it has read is told at once.
            let session = connect(&self.config()).await;
            let path = session.batch_execute("SET search_path = millrace");
            path.await.expect("set the path");
            session.query_one(query, &[]).await
        });
        row.unwrap_or_else(|error| panic!("{query}: {error:?}"))
            .get(0)
    }

    /// Waits until `query` returns true.
    fn until(&self, query: &str) -> Result<(), String> {
        let session = self.session();
        wait(PATIENCE, query, || {
            let row = self.runtime.block_on(session.query_one(query, &[]));
            Ok(row.map_err(|error| format!("{query}: {error:?}"))?.get(0))
        })
    }

    fn until_parked(&self, sku: &str, wanted: u64) -> Result<(), String> {
        let query = format!(
            "SELECT count(*) FROM parked_orders JOIN sku ON sku.id = sku WHERE sku_id = '{sku}'"
        );
        let patience = PATIENCE + Duration::from_millis(wanted);
        let session = self.session();
        wait(patience, &format!("{wanted} parked orders"), || {
            let row = self.runtime.block_on(session.query_one(&query, &[]));
            let parked: i64 = row.map_err(|error| format!("{query}: {error:?}"))?.get(0);
            Ok(parked == wanted as i64)
        })
    }

    fn request(&mut self, sku: &str) -> OrderRequest {
        self.next += 1;
        OrderRequest {
            user: format!("u-{}", self.next),
            key: Some(format!("k-{:x}", self.random.random::<u64>())),
            sku: sku.to_owned(),
            quantity: 1,
            adjustment: 0,
            amount: self.checker.unit_price(sku).expect("on sale"),
            attributes: None,
            waitlist: false,
        }
    }

    /// Has orders accepted one by one, so that ids lie between them.
    fn accept_apart(&mut self, served: &Served, skus: &[String]) -> Result<Vec<i64>, String> {
        let mut connection = open(served.data)?;
        let mut ids = Vec::with_capacity(APART);
        for number in 0..APART {
            let request = self.request(&skus[number % skus.len()]);
            let answer = place(&mut connection, &self.checker, &request, true);
            let answer = answer.map_err(|e| format!("an order: {e}"))?;
            let id = self.checker.order_id(&request.user);
            ids.push(id.ok_or_else(|| format!("not accepted: {answer:?}"))?);
            self.journalled += 1;
            // The next id is of another millisecond.
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(ids)
    }

    fn accept_parked(&mut self, served: &Served, sku: &str, count: u64) -> Result<(), String> {
        let mut connection = open(served.data)?;
        let mut left = count as usize;
        while left > 0 {
            let requests: Vec<OrderRequest> =
                (0..left.min(BATCH)).map(|_| self.request(sku)).collect();
            let accepted = place_batch_async(&mut connection, &self.checker, &requests);
            let accepted = accepted.map_err(|e| format!("a batch: {e}"))?;
            if accepted < requests.len() {
                return Err(format!("{accepted} of {} are accepted", requests.len()));
            }
            left -= accepted;
        }
        self.journalled += count;
        Ok(())
    }

    /// Ends the killed process's sessions, so that none of them commits what it still has, and waits
    /// until they are gone; spares `ours`.
    fn end_sessions(&self, ours: &[&Client]) -> Result<(), String> {
        let mut spared = Vec::new();
        for session in ours {
            let row = self
                .runtime
                .block_on(session.query_one("SELECT pg_backend_pid()", &[]));
            let pid: i32 = row.map_err(|e| format!("{e:?}"))?.get(0);
            spared.push(pid.to_string());
        }
        let spared = spared.join(",");
        self.until(&format!(
            "SELECT count(pg_terminate_backend(pid)) = 0 FROM pg_stat_activity
              WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND pid <> ALL ('{{{spared}}}')"
        ))
    }

    /// Puts rows between these orders, as a sale that others wait for would have.
    fn put_rows_between(&self, ids: &[i64]) -> Result<(), String> {
        let each = count("MILLRACE_LATER_ROWS", 20_000) as usize / ids.len();
        let list = list(ids);
        let statement = format!(
            "WITH id AS (SELECT id AS low, lead(id) OVER (ORDER BY id) AS high FROM unnest('{{{list}}}'::int8[]) id)
             INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                                 expires_at, payload_hash)
             SELECT low + i * ((high - low) / ({each} + 1)), '{BETWEEN}' || low || '-' || i,
                    (SELECT min(id) FROM sku), 1, 0, 100, 'EUR', 4, now(), now(), 0
               FROM id, generate_series(1, {each}) i WHERE high - low > {each};
             ANALYZE orders"
        );
        self.sql(&self.session(), &statement)
    }

    /// Starts it, and kills it when the journal has been replayed and nothing else was read.
    fn start_until_replayed(&mut self) -> Result<(), String> {
        self.end_sessions(&[])?;
        let rows = self.number("SELECT count(*) FROM orders");
        self.end_sessions(&[])?;
        // So few rows are read whole sooner than a few hundred of them by an index; as many as the
        // promise is about are not.
        let by_index = "ALTER DATABASE millrace SET enable_seqscan = off";
        self.sql(&self.session(), by_index)?;
        let before = self.rows_read();
        match self.start_with(Some("crash@recovery.replayed")) {
            Err(ended) if ended.is_killed() => {}
            Err(ended) => {
                return Err(format!(
                    "it does not start: {}: {}",
                    ended.status, ended.log
                ));
            }
            Ok(served) => {
                self.kill(served);
                return Err("it had nothing to replay".to_owned());
            }
        }
        self.end_sessions(&[])?;
        self.sql(
            &self.session(),
            "ALTER DATABASE millrace RESET enable_seqscan",
        )?;
        let read = self.rows_read().checked_sub(before);
        let read = read.ok_or("PostgreSQL has lost its statistics")?;
        // Once in a range that turns out too wide, once by their ids, and what the start itself asks.
        let bound = 4 * self.journalled + 100;
        if read > bound {
            return Err(format!(
                "{read} of {rows} rows were read to look {} orders up",
                self.journalled
            ));
        }
        self.figures.looked_up += self.journalled;
        self.figures.read += read;
        Ok(())
    }

    /// Rows of `orders` that sessions which have ended have read.
    fn rows_read(&self) -> u64 {
        self.number(
            "SELECT (coalesce(idx_tup_fetch, 0) + seq_tup_read)::int8 FROM pg_stat_user_tables WHERE relname = 'orders'",
        ) as u64
    }

    /// The SKU's orders stay parked, and others sell.
    fn goes_on(&mut self, served: &Served, skus: &Skus, parked: u64) -> Result<(), String> {
        let stands = look(served, &skus.parked);
        if (&stands["state"], &stands["held"]) != (&"paused".into(), &parked.into()) {
            return Err(format!("{parked} are parked, and it stands so: {stands}"));
        }
        let counted = served.metric("millrace_orders_parked");
        let counted = counted.map_err(|e| format!("no metrics: {e}"))?;
        if counted != parked as f64 {
            return Err(format!("{counted} are called parked, not {parked}"));
        }
        // It waits for a person, which is no stall.
        let failing = served.failing_checks();
        if !failing.is_empty() {
            return Err(format!("not ready: {failing:?}"));
        }
        let mut connection = open(served.data)?;
        let refused = self.request(&skus.parked);
        let answer = place(&mut connection, &self.checker, &refused, false);
        let answer = answer.map_err(|e| format!("an order: {e}"))?;
        if answer.code() != "sale_paused" {
            return Err(format!("while orders are parked: {answer:?}"));
        }
        for sku in &skus.others {
            self.sells(&mut connection, sku)?;
            let request = self.request(sku);
            let answer = place(&mut connection, &self.checker, &request, true);
            let answer = answer.map_err(|e| format!("an order: {e}"))?;
            if answer.status != 202 {
                return Err(format!("not accepted: {answer:?}"));
            }
            self.journalled += 1;
        }
        Ok(())
    }

    fn sells(&mut self, connection: &mut Connection, sku: &str) -> Result<(), String> {
        let request = self.request(sku);
        let answer = place(connection, &self.checker, &request, false);
        let answer = answer.map_err(|e| format!("an order: {e}"))?;
        match answer.status {
            201 => Ok(()),
            _ => Err(format!("{sku} does not sell: {answer:?}")),
        }
    }

    /// Somebody mends the row. All go through by themselves, and others sell meanwhile.
    fn mend(&mut self, served: &Served, skus: &Skus, parked: u64) -> Result<(), String> {
        let mended = format!(
            "UPDATE sku SET total = {TOTAL} WHERE sku_id = '{}'",
            skus.parked
        );
        self.sql(&self.session(), &mended)?;
        let mut connection = open(served.data)?;
        let deadline = Instant::now() + PATIENCE + Duration::from_millis(parked);
        while look(served, &skus.parked)["state"] != "open" {
            if Instant::now() >= deadline {
                return Err(format!("its sale does not go on: {}", self.log()));
            }
            self.sells(&mut connection, &skus.others[0])?;
            std::thread::sleep(LOOK);
        }
        let left = self.number("SELECT count(*) FROM parked_orders");
        if left > 0 {
            return Err(format!("its sale goes on, and {left} are parked"));
        }
        self.sells(&mut connection, &skus.parked)
    }

    /// Holds everything that buyers were told against the database, once it is quiet.
    fn judge(&mut self, served: &Served) -> Result<Findings, String> {
        let mut said = Findings::default();
        let seed = self.random.random();
        retry_some(served.data, &self.checker, 30, seed, &mut said);
        let config = self.config();
        let mut findings = Findings::default();
        let _ = wait(PATIENCE, "a findings that holds", || {
            let mut found = self.runtime.block_on(read_rows(&config));
            found.orders.retain(|row| !row.user.starts_with(BETWEEN));
            findings = self.checker.check(&found);
            compare_counters(served.data, &found, &mut findings);
            audit(served.control, &mut findings);
            findings.faults.extend(said.faults.clone());
            Ok(findings.holds())
        });
        Ok(findings)
    }
}

/// Looks until `condition` holds.
fn wait(
    patience: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<bool, String>,
) -> Result<(), String> {
    let deadline = Instant::now() + patience;
    while !condition()? {
        if Instant::now() >= deadline {
            return Err(format!("not in time: {what}"));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn list(ids: &[i64]) -> String {
    let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
    ids.join(",")
}

fn open(data: SocketAddr) -> Result<Connection, String> {
    Connection::open(data).map_err(|e| format!("to connect: {e}"))
}

fn look(served: &Served, sku: &str) -> Value {
    call(served.data, "GET", &format!("/v1/skus/{sku}"), &[], "").json()
}
