//! Which orders of a list are rows already: looked up by their ids, and known by their contents.

use std::time::Duration;

use millrace::order::{Order, OrderId, OrderStatus, PayloadHash, UserId};
use millrace::pipeline::replay::Replayer;
use millrace::store::StoreError;

use crate::support::sale::{Sale, orders, refs};

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

#[tokio::test]
async fn a_look_up_reads_about_as_many_rows_as_it_has_orders_whatever_lies_between() {
    let sale = Sale::open(1).await;
    let wanted = spread(&sale, 200_000, 1_000).await;
    sale.sql("ANALYZE orders; DELETE FROM orders WHERE order_id = 7000")
        .await;
    let read =
        "SELECT coalesce(idx_tup_fetch, 0)::int8 FROM pg_stat_user_tables WHERE relname = 'orders'";
    let before = sale.number(read).await;
    // A pool of its own: what a session has read is told when it ends.
    let database = sale.with_step(Duration::from_secs(10));
    let present = database.present_among(&refs(&wanted)).await.unwrap();
    let expected = wanted.iter().map(|order| order.id);
    assert_eq!(present, expected.filter(|id| id.get() != 7_000).collect());
    drop(database);
    sale.until(&format!("SELECT ({read}) >= {}", before + 199))
        .await;
    let read = sale.number(read).await - before;
    assert!(
        read <= 4 * 200,
        "{read} rows were read to look 200 orders up"
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
    let present = sale.database.present_among(&refs(&wanted)).await.unwrap();
    let expected = wanted.iter().map(|order| order.id);
    let is_there = |id: &OrderId| !(101..=1_100).contains(&id.get());
    assert_eq!(present, expected.filter(is_there).collect());
    assert!(sale.database.present_among(&[]).await.unwrap().is_empty());
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
    let present = sale.database.present_among(&refs(&known)).await.unwrap();
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
