//! The audit: silent on good data, and each kind of tampering is found by the check that is for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace::order::OrderId;
use millrace::pipeline::admin::audit::audit_in_parts;
use millrace::store::StoreError;
use millrace::store::postgres::audit::{self, PartRows, SESSION};
use millrace::store::postgres::{skus, transitions};

use crate::support::sale::{Sale, count, orders, refs};

const JOURNAL: &str = "the stock log explains every counter";
const COUNTERS: &str = "counters are those of the orders";
const OVERSOLD: &str = "no SKU is oversold";
const KEYS: &str = "no key has two orders";
const KNOWN: &str = "every order is of a known SKU";
const BOTH: &str = "no order is both written and refused";
const BOOKED: &str = "every payment that was reported is booked, and no other";
const PAID: &str = "every paid order is paid by exactly one payment of its amount";
const REFUNDS: &str = "every order whose money has to go back has a payment that has to";

/// A message about a payment of the first order, and that payment, at `state`.
fn payment(state: &str) -> String {
    let reason = if state == "refund_due" {
        "'already_paid'"
    } else {
        "NULL"
    };
    format!(
        "INSERT INTO payment_events (received_at, provider, event_id, kind, body, payment_id)
             VALUES (now(), 'standard', 'e', 'payment.succeeded', '', 'p');
         INSERT INTO payments (received_at, provider, payment_id, order_ref, order_id, amount, currency, state,
                               refund_reason, changed_at, check_at)
             SELECT now(), 'standard', 'p', order_id::text, order_id, amount, currency, '{state}', {reason}, now(), now()
               FROM orders o ORDER BY o.order_id LIMIT 1;"
    )
}

/// Every table in parts of a few rows, and the keys in several shares.
const FEW: PartRows = PartRows {
    first: 2,
    most: 2,
    keys: 3,
};

async fn good() -> Sale {
    let sale = Sale::open(1).await;
    let (a, b) = (sale.sku("A", 10).await, sale.sku("B", 10).await);
    let mut writer = sale.writer(0);
    for _ in 0..2 {
        let mut batch = orders(&a, 2);
        batch.extend(orders(&b, 2));
        writer.write(&refs(&batch)).await.unwrap();
    }
    // The total is changed in the middle of the sale, as an operator does.
    sale.sku("A", 20).await;
    writer.write(&refs(&orders(&a, 1))).await.unwrap();
    sale
}

#[tokio::test]
async fn good_data_passes() {
    let sale = good().await;
    assert_eq!(sale.faults().await, [""; 0]);
    assert_eq!(sale.faults_in_parts(FEW).await, [""; 0]);
    let audit = audit::run(&sale.database).await.unwrap();
    assert_eq!(audit.orders, 9);
    assert_eq!((audit.skus[0].held, audit.skus[0].held_by_orders), (5, 5));
    assert_eq!(audit.skus[0].journal, (20, 5, 0));
}

#[tokio::test]
async fn each_kind_of_tampering_is_found_by_its_check() {
    let copy = "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status,
                    created_at, expires_at, key_hash, payload_hash)
                SELECT order_id + 1, user_id, sku, quantity, adjustment, amount, currency, status,
                    created_at, expires_at, key_hash, payload_hash FROM orders LIMIT 1";
    for (tampering, expected) in [
        ("UPDATE sku SET held = held - 1 WHERE sku_id = 'A'", vec![COUNTERS, JOURNAL]),
        ("UPDATE sku SET sold = 1 WHERE sku_id = 'A'", vec![COUNTERS, JOURNAL]),
        ("UPDATE sku SET total = 11 WHERE sku_id = 'B'", vec![JOURNAL]),
        ("DELETE FROM orders WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS]),
        ("UPDATE orders SET quantity = 2 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS]),
        ("UPDATE orders SET status = 2 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS, PAID]),
        ("UPDATE orders SET status = 5 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS, REFUNDS]),
        (&payment("matched"), vec![PAID]),
        (&(payment("orphan") + "DELETE FROM payment_events"), vec![BOOKED]),
        (&(payment("orphan") + "DELETE FROM payments"), vec![BOOKED]),
        (&payment("orphan"), vec![]),
        (&payment("refund_due"), vec![]),
        ("UPDATE orders SET status = 3 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS]),
        (copy, vec![COUNTERS, KEYS]),
        ("UPDATE orders SET quantity = 5000 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![OVERSOLD, COUNTERS]),
        ("UPDATE orders SET sku = 999 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS, KNOWN]),
        ("DELETE FROM stock_log WHERE id = (SELECT max(id) FROM stock_log)", vec![JOURNAL]),
        // The sums still agree: only the chain tells.
        (
            "UPDATE stock_log SET held_after = held_after + 1 WHERE id = (SELECT max(id) FROM stock_log)",
            vec![JOURNAL],
        ),
        (
            "INSERT INTO dead_letters (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at,
                 expires_at, payload_hash, sqlstate, reason)
             SELECT order_id, user_id, sku, quantity, adjustment, amount, currency, created_at, expires_at,
                 payload_hash, '23514', 'x' FROM orders LIMIT 1",
            vec![BOTH],
        ),
    ] {
        let sale = good().await;
        sale.sql(tampering).await;
        assert_eq!(sale.faults().await, expected, "{tampering}");
        assert_eq!(sale.faults_in_parts(FEW).await, expected, "{tampering}");
    }
}

#[tokio::test]
async fn an_edit_that_was_undone_by_hand_is_no_break() {
    let sale = good().await;
    sale.sql("UPDATE sku SET held = held + 1 WHERE sku_id = 'A'; UPDATE sku SET held = held - 1 WHERE sku_id = 'A'")
        .await;
    assert_eq!(sale.faults().await, [""; 0]);
    // One that orders were written upon is.
    let sku = skus::load_all(&sale.database, sale.lease())
        .await
        .unwrap()
        .remove(0);
    sale.sql("UPDATE sku SET held = held + 1 WHERE sku_id = 'A'")
        .await;
    let mut writer = sale.writer(0);
    writer.write(&refs(&orders(&sku, 1))).await.unwrap();
    sale.sql("UPDATE sku SET held = held - 1 WHERE sku_id = 'A'")
        .await;
    assert_eq!(sale.faults().await, [JOURNAL]);
}

#[tokio::test]
async fn a_counter_that_is_wrong_is_explained_by_place_and_units() {
    let sale = good().await;
    sale.sql("UPDATE sku SET held = held - 2 WHERE sku_id = 'A'")
        .await;
    let audit = audit::run(&sale.database).await.unwrap();
    let gap = &audit.skus[0].gaps;
    assert_eq!(gap.len(), 1, "{gap:?}");
    assert!(gap[0].starts_with("after the last entry "), "{gap:?}");
    assert!(gap[0].contains("(orders batch 0/0/"), "{gap:?}");
    assert!(gap[0].contains("held -2"), "{gap:?}");
    // Orders that come upon it put the gap between two entries.
    let sku = skus::load_all(&sale.database, sale.lease())
        .await
        .unwrap()
        .remove(0);
    let mut writer = sale.writer(0);
    writer.write(&refs(&orders(&sku, 1))).await.unwrap();
    let audit = audit::run(&sale.database).await.unwrap();
    let gap = &audit.skus[0].gaps;
    assert_eq!(gap.len(), 1, "{gap:?}");
    assert!(gap[0].starts_with("before entry "), "{gap:?}");
    assert!(gap[0].contains("held -2"), "{gap:?}");
    assert!(audit.skus[1].gaps.is_empty());
}

#[tokio::test]
async fn a_sum_over_orders_that_move_meanwhile_is_neither_false_alarm_nor_exact() {
    let sale = Arc::new(Sale::open(2).await);
    let stop = Arc::new(AtomicBool::new(false));
    let mut selling = Vec::new();
    for shard in 0..2 {
        let sku = sale.sku(&format!("A{shard}"), 1_000_000).await;
        let (sale, stop) = (Arc::clone(&sale), Arc::clone(&stop));
        // Some of the orders of long ago are cancelled while new ones come in: both ends move.
        selling.push(tokio::spawn(async move {
            let mut writer = sale.writer(shard);
            let mut placed: Vec<OrderId> = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let batch = orders(&sku, 3);
                writer.write(&refs(&batch)).await.unwrap();
                placed.extend(batch.iter().map(|order| order.id));
                let id = placed.swap_remove(placed.len() / 7);
                let cancelled = transitions::cancel(
                    &sale.database,
                    sale.lease(),
                    id,
                    None,
                    transitions::Which::Unpaid,
                )
                .await;
                cancelled.unwrap();
            }
        }));
    }
    let rows = PartRows {
        first: 40,
        most: 40,
        ..PartRows::default()
    };
    let (mut audits, mut moving) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while audits < 3 || moving == 0 {
        let audit = audit_in_parts(&sale.database, None, rows).await.unwrap();
        assert!(audit.ok, "{:#?}", audit.checks);
        let undecided = audit.checks.iter().filter(|check| !check.decided);
        moving += undecided.count();
        audits += 1;
        assert!(
            Instant::now() < deadline,
            "nothing moved in {audits} audits"
        );
    }
    // By more than can have moved. A cancelled order, which nobody touches any more.
    sale.sql(
        "UPDATE orders SET status = 1, quantity = 900000
          WHERE order_id = (SELECT min(order_id) FROM orders WHERE status = 3)",
    )
    .await;
    assert!(sale.faults_in_parts(rows).await.contains(&COUNTERS));
    stop.store(true, Ordering::Relaxed);
    for task in selling {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn once_nothing_moves_the_figures_are_exact_however_small_the_parts() {
    let sale = good().await;
    let audit = audit_in_parts(&sale.database, None, FEW).await.unwrap();
    assert!(audit.checks.iter().all(|check| check.ok && check.decided));
    // One unit off is found.
    sale.sql("UPDATE orders SET quantity = 2 WHERE order_id = (SELECT max(order_id) FROM orders)")
        .await;
    assert_eq!(sale.faults_in_parts(FEW).await, [COUNTERS]);
}

/// Memory is compared with the rows if nothing was in flight at both looks. An order that was committed before
/// the first look is in memory as written; a snapshot older than that look would miss its row.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_at_the_first_look_is_in_the_snapshot() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 10).await;
    let mut writer = sale.writer(0);
    let mut looks = 0;
    let look = || {
        looks += 1;
        if looks == 1 {
            let batch = orders(&sku, 3);
            let write = async { writer.write(&refs(&batch)).await.map(drop) };
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(write))
                .unwrap();
        }
        looks
    };
    let (found, looks) = audit::run_watching(&sale.database, PartRows::default(), look)
        .await
        .unwrap();
    assert_eq!(looks, [1, 2]);
    assert_eq!((found.skus[0].held, found.skus[0].held_by_orders), (3, 3));
}

/// Many orders, by hand: `MILLRACE_AUDIT_ORDERS` of them.
#[tokio::test]
async fn no_snapshot_outlives_its_part() {
    let sale = Sale::open(1).await;
    sale.sku("A", 4_000_000_000).await;
    let rows = count("MILLRACE_AUDIT_ORDERS", 60_000);
    sale.sql(&format!(
        "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                expires_at, key_hash, payload_hash)
         SELECT n::int8 << 22, 'u' || n, 1, 1, 0, 100, 'EUR', 1, now(), now() + interval '1 hour', md5(n::text)::uuid, 0
           FROM generate_series(1, {rows}) n;
         WITH moved AS (UPDATE sku SET held = {rows} RETURNING id, total, held, sold)
         INSERT INTO stock_log (sku, cause, reference, held_delta, total_after, held_after, sold_after)
         SELECT id, 'test', 'test', held, total, held, sold FROM moved"
    ))
    .await;
    let watcher = sale.session().await;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let watching = tokio::spawn(async move {
        let mut longest = 0.0_f64;
        while !stopped.load(Ordering::Relaxed) {
            let row = watcher
                .query_one(
                    "SELECT coalesce(extract(epoch FROM max(clock_timestamp() - xact_start)), 0)::float8
                       FROM pg_stat_activity WHERE application_name = $1 AND backend_xmin IS NOT NULL",
                    &[&SESSION],
                )
                .await
                .unwrap();
            longest = longest.max(row.get(0));
        }
        longest
    });
    let parts = PartRows {
        first: 500,
        most: (rows as i64 / 40).max(500),
        ..PartRows::default()
    };
    let started = Instant::now();
    assert_eq!(sale.faults_in_parts(parts).await, [""; 0]);
    let took = started.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let longest = watching.await.unwrap();
    println!("{rows} orders in {took:.2} s, the longest snapshot {longest:.3} s");
    assert!(
        longest < took / 4.0,
        "a snapshot of {longest} s in an audit of {took} s"
    );
}

#[tokio::test]
async fn a_key_may_be_used_again_once_its_window_is_over() {
    let sale = Sale::open(1).await;
    sale.sku("A", 10).await;
    // From the id of 100 s on the window is an hour, from that of 10,000 s on a minute.
    for (at_s, window_ms) in [(100_u64, 3_600_000), (10_000, 60_000)] {
        let since = OrderId::new((at_s * 1_000) << 22).unwrap();
        audit::note_window(&sale.database, sale.lease(), since, window_ms)
            .await
            .unwrap();
    }
    let place = async |user: &str, key: &str, at_ms: i64| {
        // Cancelled ones count as well, and hold nothing.
        sale.sql(&format!(
            "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                    expires_at, key_hash, payload_hash)
             VALUES ({at_ms}::int8 << 22, '{user}', 1, 1, 0, 100, 'EUR', 3, now(), now(), '{key}', 0)"
        ))
        .await;
    };
    let (a, b) = (
        "11111111-1111-1111-1111-111111111111",
        "22222222-2222-2222-2222-222222222222",
    );
    place("u", a, 1).await;
    // Another key, another user, and the same once no window reaches back.
    place("u", b, 2).await;
    place("v", a, 3).await;
    place("u", a, 1_500).await;
    // An hour later under the first window; two minutes later under the second.
    place("u", a, 4_000_000).await;
    place("w", b, 9_999_000).await;
    place("w", b, 10_120_000).await;
    assert_eq!(sale.faults().await, [""; 0]);
    assert_eq!(sale.faults_in_parts(FEW).await, [""; 0]);
    // Within the window that was in force, however many orders lie between; a receipt may have
    // brought the first back with the short form of its key.
    place("x", b, 200_000).await;
    place("x", "22222222-2222-2222-0000-000000000000", 3_799_000).await;
    for rows in [PartRows::default(), FEW] {
        assert_eq!(sale.faults_in_parts(rows).await, [KEYS]);
        let (found, _) = audit::run_watching(&sale.database, rows, || ())
            .await
            .unwrap();
        assert_eq!(found.duplicated_keys, 1);
    }
}

#[tokio::test]
async fn a_second_audit_is_refused_and_the_lock_goes_with_the_session() {
    let sale = good().await;
    let lock = format!(
        "SELECT pg_advisory_lock(hashtextextended('millrace audit:{}', 0))",
        "millrace"
    );
    let other = sale.session().await;
    other.batch_execute(&lock).await.unwrap();
    let impatient = sale.with_step(Duration::from_millis(300));
    let refused = audit::run(&impatient).await.unwrap_err();
    assert!(matches!(refused, StoreError::AuditRunning), "{refused}");
    // One that was given up in the middle leaves nothing behind.
    let waiting =
        tokio::time::timeout(Duration::from_millis(300), audit::run(&sale.database)).await;
    assert!(waiting.is_err());
    drop(other);
    audit::run(&sale.database).await.unwrap();
    sale.until(&format!(
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = '{SESSION}'
                               AND datname = current_database())"
    ))
    .await;
}
