//! The promise as a whole: orders are placed, paid and cancelled while Millrace and PostgreSQL are killed and the sink
//! fails a third of the time. Each committed change is heard at least once, none is invented, and the order of each order is
//! kept.
//!
//! `MILLRACE_EVENTS_ORDERS=1000000 cargo test --test events -- every_committed --nocapture` runs it for longer.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use millrace::store::embedded::{DATABASE, Embedded};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::receiver::{Receiver, SECRETS};
use crate::support::block_on;
use crate::support::http::{Connection, try_call};
use crate::support::postgres::{connect, copy_template, options, test_dir};
use crate::support::served::Served;
use crate::support::waiting::wait_until_within;
use crate::support::webhook::{self, Paid};

/// Buyers at once.
const BUYERS: usize = 32;
/// A long run has a kill for each so many orders.
const ORDERS_PER_KILL: usize = 25_000;

fn orders_wanted() -> usize {
    let wanted = std::env::var("MILLRACE_EVENTS_ORDERS").ok();
    wanted.and_then(|text| text.parse().ok()).unwrap_or(400)
}

/// What the buyers share: where the server is by now, and how many orders are done.
struct Sale {
    at: Mutex<SocketAddr>,
    next: AtomicUsize,
    orders: usize,
}

impl Sale {
    fn at(&self) -> SocketAddr {
        *self.at.lock().expect("no panic")
    }

    /// Repeats a request until it is answered and decided.
    fn ask(&self, method: &str, target: &str, fields: &[(&str, &str)], body: &str) -> Value {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            match try_call(self.at(), method, target, fields, body) {
                Ok(answer) if answer.status < 500 && answer.status != 202 => return answer.json(),
                _ => {}
            }
            assert!(Instant::now() < deadline, "{method} {target}: no answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn buy(&self) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.orders {
                return;
            }
            let body = json!({ "user_id": format!("u{number}"), "sku_id": "A" }).to_string();
            let fields = [
                ("Content-Type", "application/json"),
                ("Idempotency-Key", "k"),
            ];
            let order = self.ask("POST", "/v1/orders", &fields, &body);
            let of = order["order_id"]
                .as_str()
                .unwrap_or_else(|| panic!("{order}"))
                .to_owned();
            match number % 3 {
                0 => self.pay(&Paid::of(&order)),
                1 => drop(self.ask("POST", &format!("/v1/orders/{of}/cancel"), &[], "")),
                _ => {}
            }
        }
    }

    fn pay(&self, paid: &Paid) {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let sent = Connection::open(self.at()).and_then(|mut connection| {
                webhook::send(&mut connection, &paid.event, &paid.body(), webhook::SECRET)
            });
            if sent.is_ok_and(|answer| answer.status == 200) {
                return;
            }
            assert!(Instant::now() < deadline, "a payment is not taken");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn every_committed_change_is_heard_and_no_other_over_kills_and_a_failing_sink() {
    block_on(async {
        let (home, data) = (test_dir(), test_dir());
        copy_template(home.path()).await;
        let mut postgres = Embedded::start(options(home.path()))
            .await
            .expect("PostgreSQL");
        let receiver = Receiver::start().await;
        receiver.keep_nothing();
        let books = Arc::new(Mutex::new(Books::default()));
        let noting = Arc::clone(&books);
        // The same message fails or not by its id and its attempt, so a third of all do.
        receiver.answer(move |event, before| {
            let mut books = noting.lock().expect("no panic");
            books.attempts += 1;
            let id = event["id"].as_str().unwrap_or_default();
            let sum = id.bytes().fold(before, |sum, byte| {
                sum.wrapping_mul(31).wrapping_add(byte.into())
            });
            if sum % 3 == 0 {
                return 503;
            }
            books.note(event);
            204
        });
        let settings: Vec<(String, String)> = [
            ("DATABASE__URL", postgres.url(DATABASE)),
            ("PAYMENTS__STANDARD__SECRET", webhook::SECRET.to_owned()),
            (
                "EVENTS__SINKS__SHOP__URL",
                format!("http://{}/", receiver.address),
            ),
            ("EVENTS__SINKS__SHOP__SECRET", SECRETS[0].to_owned()),
            // Each event that fails keeps its turn until it is repeated.
            ("EVENTS__SINKS__SHOP__IN_FLIGHT_MAX", "256".to_owned()),
            // The sink is slower than the sale; of what a refill tells, the newest change alone is heard.
            ("EVENTS__LAG_BYTES_MAX", (1_u64 << 40).to_string()),
            // A start reads what lies in it, and the buyers repeat nothing that is older.
            ("ORDERS__IDEMPOTENCY_WINDOW_MS", "300000".to_owned()),
        ]
        .map(|(name, value)| (format!("MILLRACE_{name}"), value))
        .to_vec();
        let serve = async || {
            let (dir, settings) = (data.path().to_path_buf(), settings.clone());
            let started = tokio::task::spawn_blocking(move || {
                Served::try_start(&dir, &settings, &dir.join("log"))
            });
            started
                .await
                .expect("a thread")
                .unwrap_or_else(|ended| panic!("{}", ended.log))
        };
        let mut served = serve().await;
        served.put_sku("A", u32::MAX);
        let client = connect(&postgres.config(DATABASE)).await;
        let slots = "SELECT FROM pg_replication_slots WHERE confirmed_flush_lsn IS NOT NULL";
        wait_until_within("the slot", Duration::from_secs(60), async || {
            !client
                .query(slots, &[])
                .await
                .expect("the slots")
                .is_empty()
        })
        .await;
        let orders = orders_wanted();
        let sale = Arc::new(Sale {
            at: Mutex::new(served.data),
            next: AtomicUsize::new(0),
            orders,
        });
        let buyers: Vec<_> = (0..BUYERS)
            .map(|_| {
                let sale = Arc::clone(&sale);
                std::thread::spawn(move || sale.buy())
            })
            .collect();
        let kills = (orders / ORDERS_PER_KILL).max(4);
        for part in 1..=kills {
            wait_until_within("orders", Duration::from_secs(600), async || {
                sale.next.load(Ordering::Relaxed) >= orders * part / (kills + 1)
            })
            .await;
            if part % 2 == 0 {
                let pid = postgres
                    .postmaster_pid()
                    .and_then(|pid| Pid::from_raw(pid.cast_signed()));
                kill_process(pid.expect("a postmaster"), Signal::KILL).expect("a kill");
                postgres
                    .start_again()
                    .await
                    .expect("PostgreSQL starts again");
            } else {
                served.kill();
                served = serve().await;
                *sale.at.lock().expect("no panic") = served.data;
            }
        }
        tokio::task::spawn_blocking(move || {
            for buyer in buyers {
                buyer.join().expect("a buyer");
            }
        })
        .await
        .expect("a thread");
        check(&books, &connect(&postgres.config(DATABASE)).await, orders).await;
        drop(served);
        postgres.stop_and_erase().await.expect("PostgreSQL stops");
    });
}

/// What was heard, kept small: a long run has millions of messages.
#[derive(Clone, Default)]
struct Books {
    /// Of each order, its transitions in the order of their numbers.
    orders: HashMap<i64, Vec<Told>>,
    attempts: usize,
    repeats: usize,
    payments: usize,
    /// What must not be.
    wrong: Vec<String>,
}

/// What an event said of a transition.
#[derive(Clone)]
struct Told {
    status: i16,
    hash: u64,
}

/// The status of a row by its number.
const STATUSES: [&str; 7] = [
    "",
    "pending_payment",
    "paid",
    "cancelled",
    "expired",
    "refund_due",
    "refunded",
];

impl Books {
    /// An event that is taken.
    fn note(&mut self, event: &Value) {
        let id = event["id"].as_str().unwrap_or_default();
        if event["type"]
            .as_str()
            .is_some_and(|kind| kind.starts_with("payment."))
        {
            self.payments += 1;
            return;
        }
        let of = id.rsplit_once(':');
        let of = of.and_then(|(order, number)| Some((order.parse().ok()?, number.parse().ok()?)));
        let Some((order, number)) = of.filter(|(_, number): &(i64, usize)| *number > 0) else {
            return self.wrong.push(format!("an event called {id:?}"));
        };
        let status = &event["data"]["status"];
        let status = STATUSES.iter().position(|name| status == name);
        let mut hasher = DefaultHasher::new();
        event.to_string().hash(&mut hasher);
        let told = Told {
            status: status.map_or(-1, |at| i16::try_from(at).unwrap_or(-1)),
            hash: hasher.finish(),
        };
        let before = self.orders.entry(order).or_default();
        match before.get(number - 1) {
            Some(first) => {
                self.repeats += 1;
                if first.hash != told.hash {
                    self.wrong.push(format!("{id} is told in two ways"));
                }
            }
            None if number == before.len() + 1 => before.push(told),
            None => {
                let last = before.len();
                self.wrong.push(format!("{id} is heard after {last}"));
            }
        }
    }

    /// Transitions whose events are not heard.
    fn missing(&self, stands: &Stands) -> usize {
        let heard = |order: &i64| self.orders.get(order).map_or(0, Vec::len);
        let missing = |(order, (last, _)): (&i64, &(i32, i16))| {
            usize::try_from(*last)
                .unwrap_or(0)
                .saturating_sub(heard(order))
        };
        stands.iter().map(missing).sum()
    }
}

/// The number of the newest transition of each order, and its status.
type Stands = HashMap<i64, (i32, i16)>;

async fn rows(client: &tokio_postgres::Client) -> Stands {
    let sql = "SELECT order_id, coalesce(transition, 1)::int4, status FROM millrace.orders";
    let rows = client.query(sql, &[]).await.expect("the orders");
    rows.iter()
        .map(|row| (row.get(0), (row.get(1), row.get(2))))
        .collect()
}

/// The rows against what was heard.
async fn check(books: &Mutex<Books>, client: &tokio_postgres::Client, orders: usize) {
    let patience = Duration::from_secs(120)
        + Duration::from_millis(5) * u32::try_from(orders).unwrap_or(u32::MAX);
    let began = Instant::now();
    let stood = rows(client).await;
    loop {
        let missing = books.lock().expect("no panic").missing(&stood);
        if missing == 0 {
            break;
        }
        assert!(began.elapsed() < patience, "{missing} events are not heard");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let heard = books.lock().expect("no panic").clone();
    // Orders expire meanwhile, and payments are matched: what was heard lies between what stood and what stands.
    let stands = rows(client).await;
    assert_eq!(stands.len(), orders);
    assert!(heard.wrong.is_empty(), "{:#?}", heard.wrong);
    for (order, told) in &heard.orders {
        let Some((last, status)) = stands.get(order) else {
            panic!("invented: order {order}");
        };
        let told_last = i32::try_from(told.len()).expect("few transitions");
        assert!(told_last <= *last, "invented: {order}:{told_last}");
        if told_last == *last {
            assert_eq!(
                told.last().map(|told| told.status),
                Some(*status),
                "{order}"
            );
        }
    }
    println!(
        "{orders} orders, {} events heard, {} repeats, {} of payments, {} attempts, the last {} ms after",
        heard.orders.values().map(Vec::len).sum::<usize>(),
        heard.repeats,
        heard.payments,
        heard.attempts,
        began.elapsed().as_millis()
    );
}
