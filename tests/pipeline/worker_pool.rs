//! Workers that help one another.

use std::sync::Arc;
use std::time::Duration;

use millrace::state::pending::{PendingOrder, SlotState};

use crate::line::{LONG, Line, all_persisted, claimed, outcome};
use crate::support::proxy::Proxy;
use crate::support::sale::Sale;

/// Places orders, each once the one before it is written.
async fn written_one_by_one(line: &Line, sku: &str) -> Vec<Arc<PendingOrder>> {
    let mut placed = Vec::new();
    for at in 0..50 {
        let pending = line.place(&format!("u-{at}"), sku, 1, LONG).unwrap();
        assert_eq!(outcome(&pending).await, SlotState::Persisted);
        placed.push(pending);
    }
    placed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_first_worker_hangs_the_second_writes() {
    let sale = Sale::open(2).await;
    sale.sku("A", 1_000).await;
    sale.sku("B", 1_000).await;
    let proxy = Proxy::start(&sale.config).await;
    let (first, second) = (
        sale.through(&proxy, Duration::from_secs(60)),
        sale.database.clone(),
    );
    let mut line = Line::open(sale, 4_096).await;
    line.start_worker(first, 100);
    let before = line.place("u-before", "A", 1, LONG).unwrap();
    assert_eq!(outcome(&before).await, SlotState::Persisted);

    // Its batch begins to wait before it has touched a row.
    proxy.freeze(true);
    let stuck = line.place("u-stuck", "A", 1, LONG).unwrap();
    claimed(&stuck).await;
    line.start_worker(second, 100);
    let mut placed = written_one_by_one(&line, "B").await;
    assert_eq!(stuck.slot.state(), SlotState::Claimed);

    proxy.freeze(false);
    placed.extend([before, stuck]);
    all_persisted(&placed).await;
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_first_worker_is_gone_the_second_needs_no_call() {
    let sale = Sale::open(2).await;
    sale.sku("A", 1_000).await;
    let database = sale.database.clone();
    let mut line = Line::open(sale, 4_096).await;
    line.start_worker(database.clone(), 100);
    line.start_worker(database, 100);
    // As if it had panicked.
    line.end_worker(0).await;
    let placed = vec![
        line.place("u-1", "A", 1, LONG).unwrap(),
        line.place("u-2", "A", 1, LONG).unwrap(),
    ];
    all_persisted(&placed).await;
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_first_worker_cannot_bury_a_row_the_second_writes() {
    let sale = Sale::open(2).await;
    sale.sku("A", 1_000).await;
    sale.sql("ALTER TABLE orders ADD CHECK (user_id <> 'bad')")
        .await;
    let database = sale.with_step(Duration::from_millis(500));
    let mut line = Line::open(sale, 4_096).await;
    let mut holder = line.sale.session().await;
    let held = holder.transaction().await.unwrap();
    held.batch_execute("LOCK TABLE dead_letters").await.unwrap();
    line.start_worker(database.clone(), 100);
    let bad = line.place("bad", "A", 1, LONG).unwrap();
    claimed(&bad).await;
    line.start_worker(database, 100);
    let mut placed = written_one_by_one(&line, "A").await;
    assert_eq!(bad.slot.state(), SlotState::Claimed);

    held.rollback().await.unwrap();
    assert_eq!(outcome(&bad).await, SlotState::Failed);
    placed.push(bad);
    line.check(&placed).await;
}
