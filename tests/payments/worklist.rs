//! Expiry goes on, whatever stands in the way of a part of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::{LOOK, PATIENCE, Shop};
use crate::support::block_on;
use crate::support::http::call;
use crate::support::waiting::wait_until;
use crate::support::webhook::Paid;

/// Sends batches of 1,000 orders until it is stopped.
struct Flood {
    stop: Arc<AtomicBool>,
    placed: Arc<AtomicU64>,
    began: Instant,
    senders: Vec<JoinHandle<()>>,
}

impl Flood {
    fn begin(data: SocketAddr, sku: &'static str, senders: usize) -> Self {
        let (stop, placed) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let senders = (0..senders).map(|sender| {
            let (stop, placed) = (Arc::clone(&stop), Arc::clone(&placed));
            std::thread::spawn(move || {
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let line = |n| {
                        format!(
                            "{{\"user_id\":\"flood-{sender}-{round}-{n}\",\"sku_id\":\"{sku}\"}}\n"
                        )
                    };
                    let body: String = (0..1_000).map(line).collect();
                    let fields = [("Content-Type", "application/x-ndjson")];
                    let answer = call(data, "POST", "/v1/orders:batch", &fields, &body);
                    let text = String::from_utf8_lossy(&answer.body);
                    let count = text.matches("\"http_status\":201").count();
                    placed.fetch_add(count as u64, Ordering::Relaxed);
                }
            })
        });
        let senders = senders.collect();
        Flood {
            stop,
            placed,
            began: Instant::now(),
            senders,
        }
    }

    /// Orders a second.
    fn end(self) -> f64 {
        let rate = self.placed.load(Ordering::Relaxed) as f64 / self.began.elapsed().as_secs_f64();
        self.stop.store(true, Ordering::Relaxed);
        for sender in self.senders {
            sender.join().expect("a sender");
        }
        rate
    }
}

/// Orders one unit of C after the other and pays it, for some seconds: the median and the 99th
/// percentile of the callbacks' latencies.
async fn pay_for(shop: &Shop, name: &str, seconds: u64) -> [Duration; 2] {
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut latencies = Vec::new();
    while Instant::now() < end {
        let user = format!("{name}-{}", latencies.len());
        let order = shop.server.order(&user, "C", None).await;
        assert_eq!(order.status, 201, "{order:?}");
        let (paid, began) = (Paid::of(&order.json()), Instant::now());
        shop.pay(&paid).await;
        latencies.push(began.elapsed());
    }
    latencies.sort_unstable();
    [latencies.len() / 2, latencies.len() * 99 / 100].map(|at| latencies[at])
}

/// 20,000 rows lie between; more with `MILLRACE_LATER_ROWS=20000000`. With `MILLRACE_FLOOD_SECONDS=10`
/// orders are placed as fast as they are taken meanwhile, and callbacks are timed for so long before
/// and after.
#[test]
fn a_dead_letter_of_hours_ago_that_is_revived_keeps_no_other_order_from_expiring() {
    block_on(async {
        let rows = crate::support::sale::count("MILLRACE_LATER_ROWS", 20_000);
        let seconds = crate::support::sale::count("MILLRACE_FLOOD_SECONDS", 0);
        // Orders of B, which are placed before the flood, fall due before any order of it.
        let ttl_ms = 1_500 + 1_000 * seconds;
        let shop = Shop::open(5, |config| config.orders.payment_ttl_ms = ttl_ms).await;
        shop.server.put_sku("B", 5, Value::Null).await;
        // As workers would have written them in the last three hours, and an order that the
        // database had refused before.
        let hours = (3_i64 * 3_600_000) << 22;
        shop.database
            .connect()
            .await
            .batch_execute(&format!(
                "SET search_path = millrace;
                 CREATE TEMP TABLE at AS SELECT (extract(epoch FROM now() - timestamptz '2024-01-01Z') * 1000)::int8 << 22 AS id;
                 INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                                     expires_at, payload_hash)
                 SELECT at.id - {hours} + i * ({hours} / {rows}) - 4194304, 'before-' || i, s.id, 1, 0, 100, 'EUR', 4, now(), now(), 0
                   FROM at, sku s, generate_series(1, {rows}) i WHERE s.sku_id = 'A';
                 INSERT INTO dead_letters (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at,
                                           expires_at, payload_hash, sqlstate, reason)
                 SELECT at.id - {hours}, 'dead', s.id, 1, 0, 100, 'EUR', now(), now(), 0, '22001', 'a test'
                   FROM at, sku s WHERE s.sku_id = 'A'"
            ))
            .await
            .unwrap();
        let before = shop.server.metric("millrace_expiry_rows_total").await;
        let letters = shop.control("GET", "/admin/v1/dead-letters", Value::Null);
        let letters = letters.await.json();
        let letter = letters["dead_letters"][0]["id"].as_i64().expect("one");
        let retry = format!("/admin/v1/dead-letters/{letter}/retry");
        let mut placed = Vec::new();
        for user in ["u", "v", "w"] {
            let answer = shop.server.order(user, "B", None).await;
            assert_eq!(answer.status, 201, "{answer:?}");
            placed.push(answer.json());
        }
        let due = Instant::now() + Duration::from_millis(ttl_ms);
        let mut flood = None;
        if seconds > 0 {
            for sku in ["C", "F"] {
                shop.server.put_sku(sku, 1_000_000_000, Value::Null).await;
            }
            flood = Some(Flood::begin(shop.server.data, "F", 4));
            let [p50, p99] = pay_for(&shop, "before", seconds).await;
            println!("callbacks before: p50 {p50:?}, p99 {p99:?}");
        }
        let answer = shop.control("POST", &retry, Value::Null).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        for order in &placed {
            shop.until(order, "expired").await;
        }
        let deadline = Instant::now() + PATIENCE;
        while shop.server.stock("B").await != (5, 0, 0) {
            assert!(Instant::now() < deadline, "B's units do not come back");
            tokio::time::sleep(LOOK).await;
        }
        println!(
            "{rows} rows between: the units of another SKU were back {:?} after they were due",
            Instant::now().saturating_duration_since(due)
        );
        shop.until_stock((5, 0, 0)).await;
        if let Some(flood) = flood {
            let [p50, p99] = pay_for(&shop, "after", seconds).await;
            let rate = flood.end();
            println!("callbacks after: p50 {p50:?}, p99 {p99:?}; {rate:.0} orders a second");
            assert!(shop.server.stop().await, "something was left over");
            return;
        }
        let read = shop.server.metric("millrace_expiry_rows_total").await - before;
        assert!(read < 1_000.0, "{read} rows were read for 4 orders");
        // An audit of millions of rows takes longer than a request may.
        if rows > 100_000 {
            assert!(shop.server.stop().await, "something was left over");
        } else {
            shop.close().await;
        }
    });
}

#[test]
fn a_sku_that_somebody_holds_for_long_takes_no_part_in_the_expiry_of_others() {
    block_on(async {
        let shop = Shop::open(20, |config| config.orders.payment_ttl_ms = 1_000).await;
        for sku in ["B", "C"] {
            shop.server.put_sku(sku, 20, Value::Null).await;
        }
        let order = async |user: String, sku: &str| {
            let answer = shop.server.order(&user, sku, None).await;
            assert_eq!(answer.status, 201, "{answer:?}");
            answer.json()
        };
        let mut client = shop.database.connect().await;
        let mut held = Vec::new();
        for n in 0..4 {
            held.push(order(format!("first-{n}"), "A").await);
        }
        let transaction = client.transaction().await.unwrap();
        let hold = "SELECT FROM millrace.sku WHERE sku_id = 'A' FOR UPDATE";
        transaction.query(hold, &[]).await.unwrap();
        // Again and again, while A is held; a payment is booked at once each time.
        for round in 0..3 {
            for n in 0..4 {
                order(format!("{round}-{n}"), "B").await;
            }
            let paid = order(format!("{round}-c"), "C").await;
            shop.pay(&Paid::of(&paid)).await;
            shop.until(&paid, "paid").await;
            let deadline = Instant::now() + PATIENCE;
            while shop.server.stock("B").await != (20, 0, 0) {
                assert!(Instant::now() < deadline, "B's units do not come back");
                tokio::time::sleep(LOOK).await;
            }
        }
        wait_until("A is put off", async || {
            shop.server.metric("millrace_expiry_deferred_skus").await == 1.0
        })
        .await;
        assert_eq!(shop.server.stock("A").await, (16, 4, 0));
        transaction.rollback().await.unwrap();
        shop.until_stock((20, 0, 0)).await;
        for order in &held {
            assert_eq!(shop.look(order).await["status"], "expired");
        }
        wait_until("A is put off no more", async || {
            shop.server.metric("millrace_expiry_deferred_skus").await == 0.0
        })
        .await;
        shop.close().await;
    });
}

#[test]
fn an_order_whose_row_somebody_holds_expires_afterwards_and_keeps_no_other_waiting() {
    block_on(async {
        let shop = Shop::open(5, |config| config.orders.payment_ttl_ms = 1_000).await;
        let mut client = shop.database.connect().await;
        let (held, free) = (shop.order("u").await, shop.order("v").await);
        let id: i64 = held["order_id"].as_str().unwrap().parse().unwrap();
        let transaction = client.transaction().await.unwrap();
        let hold = "SELECT FROM millrace.orders WHERE order_id = $1 FOR UPDATE";
        transaction.query(hold, &[&id]).await.unwrap();
        shop.until(&free, "expired").await;
        shop.until_stock((4, 1, 0)).await;
        transaction.rollback().await.unwrap();
        shop.until_stock((5, 0, 0)).await;
        shop.close().await;
    });
}

/// The place where the next start begins to look for unpaid orders.
async fn unpaid_from(shop: &Shop) -> i64 {
    let client = shop.database.connect().await;
    let sql = "SELECT unpaid_from FROM millrace.node";
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[test]
fn a_start_finds_an_order_that_was_revived_below_where_unpaid_orders_began() {
    block_on(async {
        let shop = Shop::open(5, |config| {
            config.orders.payment_ttl_ms = 8_000;
            config.orders.idempotency_window_ms = 1_000;
        })
        .await;
        shop.database
            .connect()
            .await
            .batch_execute(
                "SET search_path = millrace;
                 INSERT INTO dead_letters (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at,
                                           expires_at, payload_hash, sqlstate, reason)
                 SELECT 4194304, 'dead', id, 1, 0, 100, 'EUR', now(), now(), 0, '22001', 'a test' FROM sku",
            )
            .await
            .unwrap();
        // The mark is raised above it.
        let deadline = Instant::now() + PATIENCE;
        while unpaid_from(&shop).await <= 4_194_304 {
            assert!(Instant::now() < deadline, "the mark is not raised");
            tokio::time::sleep(LOOK).await;
        }
        let letters = shop.control("GET", "/admin/v1/dead-letters", Value::Null);
        let letters = letters.await.json();
        let letter = letters["dead_letters"][0]["id"].as_i64().expect("one");
        let retry = format!("/admin/v1/dead-letters/{letter}/retry");
        let answer = shop.control("POST", &retry, Value::Null).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let order = json!({ "order_id": "4194304" });
        assert_eq!(unpaid_from(&shop).await, 4_194_304);
        let Shop { database, server } = shop;
        assert!(server.stop().await);
        let server = crate::support::server::TestServer::start(&database, |config| {
            config.payments.standard.secret.0 = vec![crate::support::webhook::SECRET.to_owned()];
            config.orders.idempotency_window_ms = 1_000;
        })
        .await;
        let shop = Shop { database, server };
        shop.until(&order, "expired").await;
        shop.until_stock((5, 0, 0)).await;
        shop.close().await;
    });
}
