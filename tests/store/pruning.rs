//! Old rows are deleted in parts, and every sum stays whole.

use std::time::{Duration, Instant};

use millrace::order::{Order, OrderId, UnixMillis};
use millrace::pipeline::admin::audit::audit;
use millrace::pipeline::failover::log_replay::LogReplay;
use millrace::pipeline::failover::replay::{Applied, Replayer};
use millrace::state::orphans::Orphans;
use millrace::state::stock::Sku;
use millrace::store::postgres::pruning::{Part, PrunedPart, Pruner};
use millrace::store::postgres::{self, skus, transitions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;

use crate::support::sale::{Sale, count, order, orders, refs};

const ALL: OrderId = OrderId::MAX;

/// Later than everything that a test does.
fn later() -> UnixMillis {
    UnixMillis::now().plus_ms(3_600_000)
}

/// Prunes a part. An audit that has just returned holds its lock until the server has seen its session end.
async fn run(pruner: &mut Pruner, part: Part, rows: i64) -> (u64, Option<i64>) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match pruner.part(part, rows).await.unwrap() {
            PrunedPart::Done { rows, next } => return (rows, next),
            PrunedPart::AuditRunning => {
                assert!(Instant::now() < deadline, "no audit is running");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

fn all_orders(after: i64) -> Part {
    Part::Orders {
        after,
        below: ALL,
        ended: later(),
    }
}

/// Pays an order as a settlement does: order, counters, journal, message, payment.
async fn pay(sale: &Sale, order: &Order) {
    let id = order.id;
    sale.sql(&format!(
        "BEGIN;
         UPDATE orders SET status = 2 WHERE order_id = {id} AND status = 1;
         WITH moved AS (
             UPDATE sku s SET held = held - {units}, sold = sold + {units} WHERE id = {sku}
             RETURNING s.id, total, held, sold)
         INSERT INTO stock_log (sku, cause, reference, held_delta, sold_delta, total_after, held_after, sold_after)
         SELECT id, 'paid', '{id}', -{units}, {units}, total, held, sold FROM moved;
         COMMIT",
        units = order.quantity.get(),
        sku = order.sku.0,
    ))
    .await;
    payment(sale, order, "matched").await;
}

/// A message and its payment for an order.
async fn payment(sale: &Sale, order: &Order, state: &str) {
    let (id, amount) = (order.id, order.amount);
    sale.sql(&format!(
        "INSERT INTO payment_events (received_at, provider, event_id, kind, body, payment_id)
             VALUES (now(), 'standard', '{state} {id}', 'payment.succeeded', 'the body', '{state} {id}');
         INSERT INTO payments (received_at, provider, payment_id, order_ref, order_id, amount, currency, state,
                               refund_reason, changed_at, check_at)
             VALUES (now(), 'standard', '{state} {id}', '{id}', {id}, {amount}, 'EUR', '{state}',
                     CASE WHEN '{state}' LIKE 'refund%' THEN 'already_paid' END, now(), now())"
    ))
    .await;
}

async fn place(sale: &Sale, sku: &Sku, count: usize) -> Vec<Order> {
    let batch = orders(sku, count);
    sale.writer(0).write(&refs(&batch)).await.unwrap();
    batch
}

#[tokio::test]
async fn an_order_is_deleted_once_nobody_needs_it_and_its_units_stay_counted() {
    let sale = Sale::open(1).await;
    let free = sale.sku("FREE", 100).await;
    let limited = sale.sku_with("LIMITED", 100, Some(1)).await;
    let closed = sale.sku_with("CLOSED", 100, Some(1)).await;
    sale.sql("UPDATE sku SET closes_at = now() - interval '1 day' WHERE sku_id = 'CLOSED'")
        .await;
    let mut stays = Vec::new();
    let mut goes = Vec::new();
    // Unpaid; cancelled; paid.
    stays.extend(place(&sale, &free, 1).await);
    let cancelled = place(&sale, &free, 2).await;
    for order in &cancelled {
        let done = transitions::cancel(
            &sale.database,
            sale.lease(),
            order.id,
            None,
            transitions::Which::Unpaid,
        );
        done.await.unwrap();
    }
    // An orphan may still bring a refund about.
    payment(&sale, &cancelled[1], "orphan").await;
    let paid = place(&sale, &free, 3).await;
    let with_limit = place(&sale, &limited, 1).await;
    let over = place(&sale, &closed, 1).await;
    for order in paid.iter().chain(&with_limit).chain(&over) {
        pay(&sale, order).await;
    }
    // The second payment has to go back; the third order says paid, and no payment says so.
    payment(&sale, &paid[1], "refund_due").await;
    sale.sql(&format!(
        "DELETE FROM payments WHERE payment_id = 'matched {0}';
         DELETE FROM payment_events WHERE payment_id = 'matched {0}'",
        paid[2].id
    ))
    .await;
    goes.extend([cancelled[0].id, paid[0].id, over[0].id]);
    stays.extend([cancelled[1].clone(), paid[1].clone(), paid[2].clone()]);
    stays.extend(with_limit);
    let faults = sale.faults().await;
    assert_eq!(faults.len(), 1, "{faults:?}");

    let mut pruner = Pruner::connect(&sale.database, sale.lease()).await.unwrap();
    let (mut after, mut gone) = (Some(0), 0);
    while let Some(from) = after {
        let (rows, next) = run(&mut pruner, all_orders(from), 2).await;
        gone += rows;
        after = next;
    }
    assert_eq!(gone, goes.len() as u64);
    let mut left: Vec<i64> = stays.iter().map(|order| order.id.as_i64()).collect();
    left.sort_unstable();
    assert_eq!(sale.ids("orders").await, left);
    // The fault is neither hidden nor joined by others, and nothing else has changed.
    assert_eq!(sale.faults().await, faults);
    let audit = audit(&sale.database, None).await.unwrap();
    assert_eq!(audit.orders_pruned, 3);
    assert_eq!(audit.payments.received.count, 6);
    // A row that counts as deleted and is not there is missed.
    sale.sql("UPDATE orders_checkpoint SET sold = sold - 1 WHERE sold > 0")
        .await;
    assert_eq!(sale.faults().await.len(), 2);
}

#[tokio::test]
async fn an_order_log_that_outlasts_a_row_does_not_bring_its_order_back() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let paid = place(&sale, &sku, 1).await;
    let mut waited = order(&sku, 1);
    waited.expires_at = UnixMillis::NEVER;
    sale.writer(0).write(&[&waited]).await.unwrap();
    let open = place(&sale, &sku, 1).await;
    pay(&sale, &paid[0]).await;
    let cancelling = transitions::cancel(
        &sale.database,
        sale.lease(),
        waited.id,
        None,
        transitions::Which::Waiting,
    );
    cancelling.await.unwrap();
    let mut pruner = Pruner::connect(&sale.database, sale.lease()).await.unwrap();
    assert_eq!(run(&mut pruner, all_orders(0), 100).await.0, 2);

    let not_written = orders(&sku, 2);
    let mut logged = paid;
    logged.extend([waited]);
    logged.extend(open.iter().chain(&not_written).cloned());
    let (parts, receiver) = mpsc::channel(logged.len());
    for order in logged {
        parts.try_send(vec![order]).unwrap();
    }
    drop(parts);
    let mut replayer = Replayer::new(sale.database.clone(), sale.writer(0), 100);
    let (orphans, now) = (Orphans::default(), UnixMillis::now());
    let replay = LogReplay::new(&sale.database, &orphans, now).await.unwrap();
    let mut parts = 0;
    let running = replay.run(&mut replayer, receiver, |orders| parts += orders);
    running.await.unwrap();
    assert_eq!(parts, 5);
    let expected = Applied {
        written: 2,
        present: 3,
        ..Applied::default()
    };
    assert_eq!(replayer.applied(), expected);
    let left = open.iter().chain(&not_written);
    let left: Vec<i64> = left.map(|order| order.id.as_i64()).collect();
    assert_eq!(sale.ids("orders").await, left);
    assert_eq!(sale.faults().await, [""; 0]);
}

#[tokio::test]
async fn messages_go_when_they_are_old_but_not_those_about_open_payments() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let placed = place(&sale, &sku, 4).await;
    for order in &placed[..3] {
        pay(&sale, order).await;
    }
    payment(&sale, &placed[3], "orphan").await;
    sale.sql(&format!(
        "UPDATE payment_events SET received_at = received_at - interval '10 days' WHERE payment_id <> 'matched {0}';
         UPDATE payments SET received_at = received_at - interval '10 days' WHERE payment_id <> 'matched {0}'",
        placed[2].id
    ))
    .await;
    let before = UnixMillis(UnixMillis::now().0 - 86_400_000);
    let mut pruner = Pruner::connect(&sale.database, sale.lease()).await.unwrap();
    let first = run(&mut pruner, Part::Events { after: 0, before }, 1).await;
    assert_eq!(first.0, 1);
    let after = first.1.expect("more");
    let rest = run(&mut pruner, Part::Events { after, before }, 100).await;
    assert_eq!(rest, (1, None));
    assert_eq!(sale.number("SELECT count(*) FROM payment_events").await, 2);
    assert_eq!(sale.faults().await, [""; 0]);
    // A payment of later has its message.
    sale.sql(&format!(
        "DELETE FROM payment_events WHERE payment_id = 'matched {}'",
        placed[2].id
    ))
    .await;
    assert_eq!(sale.faults().await.len(), 1);
}

#[tokio::test]
async fn entries_are_folded_up_to_a_gap_and_an_operators_key_stays_known() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let restock = skus::restock(&sale.database, sale.lease(), &sku.id, 5, Some("k"));
    restock.await.unwrap();
    for _ in 0..5 {
        place(&sale, &sku, 2).await;
    }
    let entries = async || sale.number("SELECT count(*) FROM stock_log").await;
    assert_eq!(entries().await, 7);
    let mut pruner = Pruner::connect(&sale.database, sale.lease()).await.unwrap();
    let fold = |before| Part::Entries {
        sku: sku.number,
        before,
    };
    // Nothing is old enough.
    let early = run(&mut pruner, fold(UnixMillis(0)), 100).await;
    assert_eq!(early, (0, None));
    // The first and the restock; the restock's row stays for its key.
    let (gone, next) = run(&mut pruner, fold(later()), 3).await;
    assert_eq!((gone, next.is_some()), (1, true));
    assert_eq!(sale.faults().await, [""; 0]);
    let audit = postgres::audit::run(&sale.database).await.unwrap();
    assert_eq!(audit.skus[0].journal, (105, 10, 0));
    let known = skus::restocked(&sale.database, &sku.id, "k").await.unwrap();
    assert_eq!(known, Some(5));
    // A gap is evidence: nothing behind it is folded, and the audit still tells its place.
    sale.sql("UPDATE sku SET held = held - 3").await;
    place(&sale, &sku, 1).await;
    place(&sale, &sku, 1).await;
    let faults = sale.faults().await;
    assert_eq!(faults.len(), 2, "{faults:?}");
    while run(&mut pruner, fold(later()), 3).await.1.is_some() {}
    assert_eq!(entries().await, 3, "the restock and two behind the gap");
    assert_eq!(sale.faults().await, faults);
    let gaps = &postgres::audit::run(&sale.database).await.unwrap().skus[0].gaps;
    assert!(gaps.len() == 1 && gaps[0].contains("held -3"), "{gaps:?}");
}

#[tokio::test]
async fn nothing_is_deleted_while_an_audit_runs_nor_by_a_process_that_was_replaced() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 10).await;
    let placed = place(&sale, &sku, 1).await;
    pay(&sale, &placed[0]).await;
    let mut pruner = Pruner::connect(&sale.database, sale.lease()).await.unwrap();
    let other = sale.session().await;
    let lock = "hashtextextended('millrace audit:millrace', 0)";
    other
        .batch_execute(&format!("SELECT pg_advisory_lock({lock})"))
        .await
        .unwrap();
    let done = pruner.part(all_orders(0), 10).await.unwrap();
    assert_eq!(done, PrunedPart::AuditRunning);
    drop(other);
    sale.until(&format!("SELECT pg_try_advisory_xact_lock({lock})"))
        .await;
    sale.sql("UPDATE node SET epoch = epoch + 1").await;
    pruner.part(all_orders(0), 10).await.unwrap_err();
    assert_eq!(sale.rows().await, 1);
}

/// `MILLRACE_PRUNING_STEPS`: how many steps of a random life.
#[tokio::test]
async fn whatever_happens_in_whatever_sequence_the_audit_stays_content() {
    let seed = count("MILLRACE_SEED", rand::random::<u32>().into());
    println!("seed={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let sale = Sale::open(1).await;
    let skus = [sale.sku("A", 10_000).await, sale.sku("B", 10_000).await];
    let mut open: Vec<Order> = Vec::new();
    let mut pruner = Pruner::connect(&sale.database, sale.lease()).await.unwrap();
    let mut gone = 0;
    for step in 0..count("MILLRACE_PRUNING_STEPS", 120) {
        match random.random_range(0..8) {
            0 | 1 => {
                let sku = &skus[random.random_range(0..2)];
                let mut batch = orders(sku, random.random_range(1..4));
                batch.push(order(sku, 3));
                sale.writer(0).write(&refs(&batch)).await.unwrap();
                open.extend(batch);
            }
            2 if !open.is_empty() => {
                let order = open.swap_remove(random.random_range(0..open.len()));
                pay(&sale, &order).await;
                if random.random_bool(0.2) {
                    payment(&sale, &order, "refund_due").await;
                }
            }
            3 if !open.is_empty() => {
                let order = open.swap_remove(random.random_range(0..open.len()));
                let done = transitions::cancel(
                    &sale.database,
                    sale.lease(),
                    order.id,
                    None,
                    transitions::Which::Unpaid,
                );
                done.await.unwrap();
            }
            4..8 => {
                let part = match random.random_range(0..3) {
                    0 => all_orders(0),
                    1 => Part::Events {
                        after: 0,
                        before: later(),
                    },
                    _ => Part::Entries {
                        sku: skus[random.random_range(0..2)].number,
                        before: later(),
                    },
                };
                let rows = random.random_range(2..40);
                if random.random_bool(0.3) {
                    // The process ends somewhere in the middle.
                    let moment = Duration::from_micros(random.random_range(0..8_000));
                    let _ = tokio::time::timeout(moment, pruner.part(part, rows)).await;
                    pruner = Pruner::connect(&sale.database, sale.lease()).await.unwrap();
                } else {
                    // The one before may not have noticed yet that nobody listens.
                    loop {
                        match pruner.part(part, rows).await.unwrap() {
                            PrunedPart::Done { rows, .. } => break gone += rows,
                            PrunedPart::AuditRunning => tokio::task::yield_now().await,
                        }
                    }
                }
            }
            _ => {}
        }
        if step % 8 == 0 {
            let faults = sale.faults().await;
            assert_eq!(faults, [""; 0], "seed={seed} step={step}");
        }
    }
    assert_eq!(sale.faults().await, [""; 0], "seed={seed}");
    assert!(gone > 0, "seed={seed}");
}
