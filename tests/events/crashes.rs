//! The promise as a whole: orders are placed, paid and cancelled while Millrace and PostgreSQL are killed and the sink
//! fails a third of the time. Each committed change is heard at least once, none is invented, and the order of each order is
//! kept.
//!
//! `MILLRACE_EVENTS_ORDERS=100000 cargo test --test events -- every_committed --nocapture` runs it for longer.

use std::collections::{HashMap, HashSet};
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
const BUYERS: usize = 8;

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
        // The same message fails or not by its id and its attempt, so a third of all do.
        receiver.answer(|event, before| {
            let id = event["id"].as_str().unwrap_or_default();
            let sum = id.bytes().fold(before, |sum, byte| {
                sum.wrapping_mul(31).wrapping_add(byte.into())
            });
            if sum % 3 == 0 { 503 } else { 204 }
        });
        let settings: Vec<(String, String)> = [
            ("DATABASE__URL", postgres.url(DATABASE)),
            ("PAYMENTS__STANDARD__SECRET", webhook::SECRET.to_owned()),
            (
                "EVENTS__SINKS__SHOP__URL",
                format!("http://{}/", receiver.address),
            ),
            ("EVENTS__SINKS__SHOP__SECRET", SECRETS[0].to_owned()),
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
        for part in 1..=4 {
            wait_until_within("orders", Duration::from_secs(600), async || {
                sale.next.load(Ordering::Relaxed) >= orders * part / 5
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
        check(
            &receiver,
            &connect(&postgres.config(DATABASE)).await,
            orders,
        )
        .await;
        drop(served);
        postgres.stop_and_erase().await.expect("PostgreSQL stops");
    });
}

/// The number of the newest transition of each order, and its status.
type Stands = HashMap<String, (i32, i16)>;

async fn rows(client: &tokio_postgres::Client) -> Stands {
    let sql = "SELECT order_id, coalesce(transition, 1)::int4, status FROM millrace.orders";
    let rows = client.query(sql, &[]).await.expect("the orders");
    rows.iter()
        .map(|row| (row.get::<_, i64>(0).to_string(), (row.get(1), row.get(2))))
        .collect()
}

/// Transitions whose events are not heard.
fn missing(receiver: &Receiver, stands: &Stands) -> usize {
    let taken = receiver.taken();
    let ids: HashSet<&str> = taken.iter().map(|one| one.id.as_str()).collect();
    let wanted = stands
        .iter()
        .flat_map(|(order, (last, _))| (1..=*last).map(move |number| format!("{order}:{number}")));
    wanted.filter(|id| !ids.contains(id.as_str())).count()
}

/// The rows against what was heard.
async fn check(receiver: &Receiver, client: &tokio_postgres::Client, orders: usize) {
    let patience = Duration::from_secs(120)
        + Duration::from_millis(5) * u32::try_from(orders).unwrap_or(u32::MAX);
    let began = Instant::now();
    // The last payments may be matched while the rows are compared: the rows count that stand before and after.
    let mut stands = rows(client).await;
    let heard_by_then = loop {
        while missing(receiver, &stands) > 0 {
            assert!(
                began.elapsed() < patience,
                "{} events are not heard",
                missing(receiver, &stands)
            );
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let heard = receiver.taken();
        let before = std::mem::replace(&mut stands, rows(client).await);
        if before == stands {
            break heard;
        }
    };
    assert_eq!(stands.len(), orders);
    let (mut newest, mut bodies) = (
        HashMap::<String, i32>::new(),
        HashMap::<String, String>::new(),
    );
    let (mut repeats, mut payments) = (0, 0);
    for heard in heard_by_then {
        if heard.kind().starts_with("payment.") {
            payments += 1;
            continue;
        }
        let (order, number) = heard.id.rsplit_once(':').expect("an id");
        let number: i32 = number.parse().expect("a number");
        let (last, status) = stands
            .get(order)
            .unwrap_or_else(|| panic!("invented: {}", heard.id));
        assert!(number <= *last, "invented: {}", heard.id);
        let words = [
            "",
            "pending_payment",
            "paid",
            "cancelled",
            "expired",
            "refund_due",
            "refunded",
        ];
        if number == *last {
            assert_eq!(
                heard.event["data"]["status"],
                words[usize::try_from(*status).expect("a status")]
            );
        }
        let told = bodies
            .entry(heard.id.clone())
            .or_insert_with(|| heard.body.clone());
        assert_eq!(*told, heard.body, "told in two ways");
        let before = newest.entry(order.to_owned()).or_insert(0);
        if number <= *before {
            repeats += 1;
        } else {
            assert_eq!(
                number,
                *before + 1,
                "{order}: heard {number} after {before}"
            );
            *before = number;
        }
    }
    let attempts = receiver.heard().len();
    println!(
        "{orders} orders, {} events heard, {repeats} repeats, {payments} of payments, {attempts} attempts, the last {} ms after",
        bodies.len(),
        began.elapsed().as_millis()
    );
}
