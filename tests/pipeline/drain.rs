//! The end of a worker: with a database and without.

use std::sync::Arc;
use std::time::Duration;

use millrace::pipeline::orders::worker::WorkerError;
use millrace::state::pending::{PendingOrder, SlotState};
use millrace::store::postgres::Database;

use crate::line::{LONG, Line, claimed, outcome, outcomes, tally, until};
use crate::support::proxy::{Cut, Proxy};
use crate::support::sale::{SCHEMA, STEP, Sale};

async fn filled(orders: usize) -> (Line, Vec<Arc<PendingOrder>>) {
    let sale = Sale::open(3).await;
    sale.sku("A", 10_000).await;
    let line = Line::open(sale, orders).await;
    let placed = (0..orders)
        .map(|at| line.place(&format!("u-{at}"), "A", 2, LONG).unwrap())
        .collect();
    (line, placed)
}

fn states(placed: &[Arc<PendingOrder>]) -> Vec<SlotState> {
    placed.iter().map(|p| p.slot.state()).collect()
}

/// What the application does with orders that nobody claimed.
fn abandon_rest(line: &Line) {
    for pending in line.state.pending.all() {
        line.state.abandon(&pending);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_queue_is_run_empty() {
    let (mut line, placed) = filled(1_000).await;
    line.queue.close();
    assert!(line.place("late", "A", 1, LONG).is_err());
    for _ in 0..3 {
        line.start_worker(line.sale.database.clone(), 64);
    }
    let ended = line.workers_end().await;
    assert!(ended.iter().all(Result::is_ok), "{ended:?}");
    assert_eq!(
        tally(&states(&placed), SlotState::Persisted),
        placed.len(),
        "each is settled when its worker ends"
    );
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_database_what_was_claimed_is_given_back_at_the_cut() {
    let (mut line, placed) = filled(50).await;
    let mut nowhere = tokio_postgres::Config::new();
    nowhere.host("127.0.0.1").port(1).user("x").dbname("x");
    let nowhere = Database::with_config(nowhere, SCHEMA, 1, STEP).unwrap();
    line.start_worker(nowhere, 20);
    claimed(&placed[19]).await;
    line.queue.close();
    line.cut.send_replace(true);
    let ended = line.workers_end().await;
    assert!(
        matches!(ended[..], [Err(WorkerError::Cut(20))]),
        "{ended:?}"
    );
    abandon_rest(&line);
    let states = outcomes(&placed).await;
    assert_eq!(tally(&states, SlotState::Unwritten), 20);
    assert_eq!(tally(&states, SlotState::Abandoned), 30);
    while let Some(rest) = line.queue.take(50).await {
        rest.ack();
    }
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_was_never_sent_is_given_back_also_on_a_broken_connection() {
    let sale = Sale::open(1).await;
    sale.sku("A", 100).await;
    let proxy = Proxy::start(&sale.config).await;
    let database = sale.through(&proxy, STEP);
    let mut line = Line::open(sale, 64).await;
    line.start_worker(database, 20);
    let mut placed = vec![line.place("first", "A", 1, LONG).unwrap()];
    assert_eq!(outcome(&placed[0]).await, SlotState::Persisted);
    // The database goes while the worker is idle.
    proxy.close();
    line.sale
        .sql(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
              WHERE application_name = 'millrace worker 0/0' AND datname = current_database()",
        )
        .await;
    placed.push(line.place("second", "A", 1, LONG).unwrap());
    until("it was tried", || {
        line.metrics.batch_retries.totals()["transient"] > 0
    })
    .await;
    line.cut.send_replace(true);
    let ended = line.workers_end().await;
    assert!(matches!(ended[..], [Err(WorkerError::Cut(1))]), "{ended:?}");
    assert_eq!(placed[1].slot.state(), SlotState::Unwritten);
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_unknown_outcome_stays_undecided_at_the_cut() {
    for (cut, rows) in [(Cut::Before, 0), (Cut::After, 20)] {
        let (mut line, placed) = filled(50).await;
        let proxy = Proxy::start(&line.sale.config).await;
        proxy.cut_and_close(cut);
        let database = line.sale.through(&proxy, Duration::from_secs(2));
        line.start_worker(database, 20);
        until("the connection is cut", || proxy.has_cut()).await;
        line.queue.close();
        line.cut.send_replace(true);
        let ended = line.workers_end().await;
        assert!(matches!(ended[..], [Err(WorkerError::Cut(_))]), "{ended:?}");
        abandon_rest(&line);
        let states = states(&placed);
        assert_eq!(
            tally(&states[..20], SlotState::Claimed),
            20,
            "nobody may say what became of them"
        );
        assert_eq!(tally(&states[20..], SlotState::Abandoned), 30);
        // Their units stay held: they may be rows.
        assert_eq!(line.sku("A").counter().free(), 10_000 - 40);
        assert_eq!(line.sale.rows().await, rows);
    }
}
