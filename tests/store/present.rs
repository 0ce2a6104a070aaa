//! Which orders of a list are rows already: looked up by their ids, and known by their contents.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use millrace::order::{Order, OrderId, OrderStatus, PayloadHash, UnixMillis, UserId};
use millrace::pipeline::failover::replay::{Applied, Replayer};
use millrace::store::StoreError;
use millrace::store::batch::BatchWriter;
use millrace::store::postgres;

use crate::support::sale::{Sale, count, orders, refs};

/// Makes rows of the ids 1 to `rows`, and orders for every `step`th of them.
async fn spread(sale: &Sale, rows: i64, step: i64) -> Vec<Order> {
    let sku = sale.sku("A", 100).await;
    sale.sql(&format!(
        "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                expires_at, payload_hash)
         SELECT id, 'u-' || id, 1, 1, 0, 100, 'EUR', 3, now(), now(), id::int8 << 32 FROM generate_series(1, {rows}) id"
    ))
    .await;
    (1..=rows / step)
        .zip(orders(&sku, (rows / step) as usize))
        .map(|(at, order)| Order {
            id: OrderId::from_i64(at * step).unwrap(),
            user_id: UserId::new(&format!("u-{}", at * step)).unwrap(),
            payload: PayloadHash(((at * step) as u64) << 32),
            ..order
        })
        .collect()
}

/// Rows of `orders` that ended sessions have read.
const READ: &str = "SELECT (coalesce(idx_tup_fetch, 0) + coalesce(seq_tup_read, 0))::int8
                      FROM pg_stat_user_tables WHERE relname = 'orders'";

#[tokio::test]
async fn a_look_up_reads_about_as_many_rows_as_it_has_orders_whatever_lies_between() {
    let sale = Sale::open(1).await;
    let wanted = spread(&sale, 200_000, 1_000).await;
    sale.sql("ANALYZE orders; DELETE FROM orders WHERE order_id = 7000")
        .await;
    let before = sale.number(READ).await;
    // A pool of its own: what a session has read is told when it ends.
    let database = sale.with_step(Duration::from_secs(10));
    let present = postgres::orders::present_among(&database, &refs(&wanted))
        .await
        .unwrap();
    let expected = wanted.iter().map(|order| order.id);
    assert_eq!(present, expected.filter(|id| id.get() != 7_000).collect());
    drop(database);
    sale.until(&format!("SELECT ({READ}) >= {}", before + 199))
        .await;
    let read = sale.number(READ).await - before;
    assert!(
        read <= 5 * 200,
        "{read} rows were read to look 200 orders up"
    );
}

#[tokio::test]
async fn orders_that_are_all_rows_are_compared_by_one_value_that_any_difference_changes() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 10_000).await;
    let mut logged = orders(&sku, 5_000);
    for (at, order) in logged.iter_mut().enumerate() {
        // With a sign and without, and buyers of every length.
        order.payload = PayloadHash(order.payload.0.rotate_left(at as u32));
        order.user_id = UserId::new(&format!("{}-{at}", "u\\:".repeat(at % 10))).unwrap();
    }
    sale.writer(0).write(&refs(&logged)).await.unwrap();
    let before = sale.number(READ).await;
    let database = sale.with_step(Duration::from_secs(10));
    let present = postgres::orders::present_among(&database, &refs(&logged)).await;
    assert_eq!(present.unwrap().len(), 5_000);
    drop(database);
    sale.until(&format!("SELECT ({READ}) >= {}", before + 5_000))
        .await;
    let read = sale.number(READ).await - before;
    assert!(read < 5_100, "{read} rows were read to compare 5000 orders");

    logged[4_321].user_id = UserId::new("somebody-else").unwrap();
    let found = postgres::orders::present_among(&sale.database, &refs(&logged)).await;
    assert!(
        matches!(found, Err(StoreError::OtherOrders { count: 1, .. })),
        "{found:?}"
    );
    logged.remove(4_321);
    let present = postgres::orders::present_among(&sale.database, &refs(&logged)).await;
    assert_eq!(present.unwrap().len(), 4_999);
}

/// An `ANALYZE` that runs beside a load does not count what is not committed, so the planner takes the
/// table to be small afterwards. With the rows of five days:
/// `MILLRACE_REPLAY_ROWS=20000000 cargo test --release --test store replay_among -- --nocapture`.
#[tokio::test]
async fn a_replay_among_the_rows_of_days_reads_few_of_them_right_after_they_were_loaded() {
    const SPAN_MS: i64 = 5 * 86_400_000;
    let rows = count("MILLRACE_REPLAY_ROWS", 100_000) as i64;
    let wanted = (rows / 500).min(2_000);
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", u32::MAX).await;
    let first = OrderId::floor_of(UnixMillis(UnixMillis::now().0 - SPAN_MS)).as_i64() >> 22;
    // As far apart as the rows allow, under ids that none of them has.
    let spread: Vec<Order> = (0..wanted)
        .zip(orders(&sku, wanted as usize))
        .map(|(at, order)| Order {
            id: OrderId::from_i64((first + at * (SPAN_MS / wanted)) << 22 | 4_000_000).unwrap(),
            ..order
        })
        .collect();
    let there: Vec<&Order> = spread.iter().step_by(2).collect();
    sale.writer(0).write(&there).await.unwrap();
    let load = sale.database.connect("load").await.unwrap();
    load.batch_execute(&format!(
        "BEGIN;
         INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                             expires_at, key_hash, payload_hash)
         SELECT ({first} + i * {SPAN_MS} / {rows}) << 22 | i % 1000, 'before-' || i, {}, 1, 0, 100, 'EUR', 3, now(), now(),
                md5(i::text)::uuid, i
           FROM generate_series(1, {rows}::int8) i",
        sku.number.0
    ))
    .await
    .unwrap();
    sale.sql("ANALYZE orders").await;
    load.batch_execute("COMMIT").await.unwrap();
    let plan = sale
        .admin()
        .query_one(
            &format!(
                "EXPLAIN (FORMAT JSON) SELECT order_id, user_id, payload_hash FROM millrace.orders
                  WHERE order_id BETWEEN {} AND {} ORDER BY order_id LIMIT {}",
                spread[0].id,
                OrderId::MAX,
                wanted * 2
            ),
            &[],
        )
        .await
        .unwrap()
        .get::<_, serde_json::Value>(0);
    println!(
        "the planner's own choice: {}",
        plan.pointer("/0/Plan/Plans/0/Node Type").unwrap()
    );
    let before = sale.number(READ).await;
    let apply: Vec<_> = spread
        .into_iter()
        .map(|order| (order, OrderStatus::PendingPayment))
        .collect();
    // As patient as the service is.
    let database = sale.with_step(Duration::from_secs(5));
    let writer = BatchWriter::new(database.clone(), sale.lease(), 0);
    let mut replayer = Replayer::new(database.clone(), writer, 5_000);
    let started = Instant::now();
    replayer.apply(&apply).await.unwrap();
    println!(
        "{wanted} orders among {rows} rows: {} ms",
        started.elapsed().as_millis()
    );
    let half = wanted as u64 / 2;
    let expected = Applied {
        written: half,
        present: half,
        ..Applied::default()
    };
    assert_eq!(replayer.applied(), expected);
    // What a session has read is told when it ends.
    drop((database, replayer));
    sale.until(&format!("SELECT ({READ}) >= {}", before + wanted / 2))
        .await;
    let read = sale.number(READ).await - before;
    assert!(
        read <= 8 * wanted,
        "{read} rows were read for {wanted} orders"
    );
}

#[tokio::test]
async fn what_lies_close_together_is_found_too_in_any_sequence_and_among_the_dead() {
    let sale = Sale::open(1).await;
    let mut wanted = spread(&sale, 5_000, 1).await;
    let mut writer = sale.writer(0);
    for order in &wanted[2_000..2_010] {
        sale.sql(&format!("DELETE FROM orders WHERE order_id = {}", order.id))
            .await;
        writer.write_dead_letter(order, "23514", "x").await.unwrap();
    }
    sale.sql("DELETE FROM orders WHERE order_id BETWEEN 101 AND 1100")
        .await;
    wanted.reverse();
    let present = postgres::orders::present_among(&sale.database, &refs(&wanted))
        .await
        .unwrap();
    let expected = wanted.iter().map(|order| order.id);
    let is_there = |id: &OrderId| !(101..=1_100).contains(&id.get());
    assert_eq!(present, expected.filter(is_there).collect());
    assert!(
        postgres::orders::present_among(&sale.database, &[])
            .await
            .unwrap()
            .is_empty()
    );
}

/// Writes what is logged.
struct Logged(Arc<Mutex<Vec<u8>>>);

impl io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_look_up_that_takes_too_long_asks_for_fewer_at_once_and_says_so() {
    let sale = Sale::open(1).await;
    let wanted = spread(&sale, 1_500, 1).await;
    // Each row takes a millisecond, so that all of them take longer than a step may.
    sale.sql(
        "ALTER TABLE orders RENAME TO real_orders;
         CREATE VIEW orders AS SELECT * FROM real_orders WHERE pg_sleep(0.001) IS NOT NULL;",
    )
    .await;
    let impatient = sale.with_step(Duration::from_secs(1));
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = Arc::clone(&log);
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || Logged(Arc::clone(&writer)))
        .with_ansi(false)
        .finish();
    let logging = tracing::subscriber::set_default(subscriber);
    let present = postgres::orders::present_among(&impatient, &refs(&wanted))
        .await
        .unwrap();
    drop(logging);
    assert_eq!(present.len(), 1_500);
    let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    assert!(
        log.contains("took too long") && log.contains("orders=1500 at_once=500"),
        "{log}"
    );
}

#[tokio::test]
async fn another_order_under_the_same_id_is_named_and_nothing_is_written() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let written = orders(&sku, 4);
    sale.writer(0).write(&refs(&written[..3])).await.unwrap();
    let mut known = written.clone();
    // As an order that was recovered from a short receipt is stored.
    known[0].payload = PayloadHash(known[0].payload.0 & !0 << 32);
    let present = postgres::orders::present_among(&sale.database, &refs(&known))
        .await
        .unwrap();
    assert_eq!(present.len(), 3);

    known[1].user_id = UserId::new("somebody-else").unwrap();
    known[2].payload = PayloadHash(known[2].payload.0 ^ 1 << 40);
    let apply: Vec<_> = known
        .iter()
        .map(|order| (order.clone(), OrderStatus::PendingPayment))
        .collect();
    let mut replayer = Replayer::new(sale.database.clone(), sale.writer(0), 100);
    let refused = replayer.apply(&apply).await.unwrap_err();
    assert!(refused.is_final() && !refused.is_transient());
    let text = refused.to_string();
    assert!(
        matches!(refused, StoreError::OtherOrders { count: 2, .. }),
        "{text}"
    );
    assert!(
        text.contains(&known[1].id.to_string()) && text.contains(&known[2].id.to_string()),
        "{text}"
    );
    assert_eq!(sale.rows().await, 3);

    // A worker that comes upon it does not take it for its own either.
    let refused = sale.writer(0).refuse(&known[1], "23505", "there").await;
    assert!(
        matches!(refused, Err(StoreError::OtherOrders { count: 1, .. })),
        "{refused:?}"
    );
}
