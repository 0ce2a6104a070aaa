//! Counters that the database refuses.

use std::time::Duration;

use millrace::order::Refusal;
use millrace::pipeline::worker::WorkerError;
use millrace::state::pending::SlotState;
use millrace::store::StoreError;

use crate::line::{LONG, Line, all_persisted, claimed, outcome, outcomes, tally, until};
use crate::support::sale::Sale;

/// A line with one worker on the SKUs `A`, `B` and `C`, of which the database refuses A's and C's
/// counters.
async fn faulty() -> Line {
    let sale = Sale::open(1).await;
    for name in ["A", "B", "C"] {
        sale.sku(name, 100).await;
    }
    let database = sale.database.clone();
    let mut line = Line::open(sale, 1_024).await;
    let rows_max = 8;
    line.sale
        .sql("UPDATE sku SET total = 0 WHERE sku_id IN ('A', 'C')")
        .await;
    line.start_worker(database, rows_max);
    line
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_counter_pauses_its_sale_and_no_other_until_it_is_mended() {
    let line = faulty().await;
    let mut placed = Vec::new();
    for at in 0..10 {
        placed.push(line.place(&format!("a-{at}"), "A", 1, LONG).unwrap());
        placed.push(line.place(&format!("b-{at}"), "B", 2, LONG).unwrap());
    }
    for of_b in placed.iter().filter(|p| p.order.sku_id.as_str() == "B") {
        assert_eq!(outcome(of_b).await, SlotState::Persisted);
    }
    until("A is paused", || line.sku("A").is_faulted()).await;
    until("A's orders are parked", || {
        line.metrics.orders_parked.get() == 10
    })
    .await;
    let refused = line.place("a-late", "A", 1, LONG);
    assert_eq!(refused.unwrap_err(), Refusal::SalePaused);
    assert!(!line.sku("B").is_faulted());
    let last = line.place("b-late", "B", 1, LONG).unwrap();
    assert_eq!(outcome(&last).await, SlotState::Persisted);
    placed.push(last);
    assert!(line.ledger.poison.reason().is_none());

    let batches = line.metrics.batches.get();
    line.sale.sql("UPDATE sku SET total = 100").await;
    all_persisted(&placed).await;
    until("A is sold again", || !line.sku("A").is_faulted()).await;
    assert_eq!(line.metrics.orders_parked.get(), 0);
    assert_eq!(
        line.metrics.batches.get() - batches,
        2,
        "ten orders, eight at once"
    );
    placed.push(line.place("a-late", "A", 1, LONG).unwrap());
    outcomes(&placed).await;
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parked_orders_are_given_back_when_the_queue_is_closed() {
    let mut line = faulty().await;
    let mut placed = Vec::new();
    for at in 0..5 {
        placed.push(line.place(&format!("a-{at}"), "A", 1, LONG).unwrap());
        placed.push(line.place(&format!("c-{at}"), "C", 3, LONG).unwrap());
    }
    line.queue.close();
    let ended = line.workers_end().await;
    assert!(
        matches!(ended[..], [Err(WorkerError::Cut(10))]),
        "{ended:?}"
    );
    let states = outcomes(&placed).await;
    assert_eq!(tally(&states, SlotState::Unwritten), 10);
    line.sale
        .sql("UPDATE sku SET total = 100 WHERE sku_id IN ('A', 'C')")
        .await;
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parked_orders_are_given_back_when_the_worker_is_fenced() {
    // By the batch that comes next, or by the next attempt to write what is parked.
    for next_batch in [true, false] {
        let mut line = faulty().await;
        let mut placed = Vec::new();
        for at in 0..5 {
            placed.push(line.place(&format!("a-{at}"), "A", 1, LONG).unwrap());
            placed.push(line.place(&format!("c-{at}"), "C", 3, LONG).unwrap());
        }
        until("they are parked", || line.metrics.orders_parked.get() == 10).await;
        line.sale.sql("UPDATE writer SET epoch = epoch + 1").await;
        if next_batch {
            placed.push(line.place("b", "B", 1, LONG).unwrap());
        }
        let ended = line.workers_end().await;
        assert!(
            matches!(
                ended[..],
                [Err(WorkerError::Fatal(StoreError::Fenced { .. }))]
            ),
            "{ended:?}"
        );
        let states: Vec<SlotState> = placed.iter().map(|p| p.slot.state()).collect();
        assert_eq!(
            tally(&states, SlotState::Unwritten),
            placed.len(),
            "{states:?}"
        );
        assert_eq!(line.metrics.orders_parked.get(), 0);
        line.sale
            .sql("UPDATE sku SET total = 100 WHERE sku_id IN ('A', 'C')")
            .await;
        line.check(&placed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_that_cannot_be_stored_is_tried_again() {
    let sale = Sale::open(1).await;
    sale.sku("A", 100).await;
    sale.sql(
        "ALTER TABLE orders ADD CHECK (user_id <> 'bad'); ALTER TABLE dead_letters RENAME TO elsewhere",
    )
    .await;
    let database = sale.with_step(Duration::from_millis(500));
    let mut line = Line::open(sale, 16).await;
    line.start_worker(database, 100);
    let mut placed = vec![line.place("bad", "A", 1, LONG).unwrap()];
    claimed(&placed[0]).await;
    placed.push(line.place("good", "A", 1, LONG).unwrap());
    line.sale
        .sql("ALTER TABLE elsewhere RENAME TO dead_letters")
        .await;
    let states = outcomes(&placed).await;
    assert_eq!(states, [SlotState::Failed, SlotState::Persisted]);

    // Nor does one that hangs hold the worker for good.
    let mut holder = line.sale.session().await;
    let held = holder.transaction().await.unwrap();
    held.batch_execute("LOCK TABLE dead_letters").await.unwrap();
    let second = {
        let mut second = crate::line::request("bad", "A", 1, LONG);
        second.key = None;
        match line.intake.admit(&second, None).unwrap() {
            millrace::pipeline::intake::Admission::Placed(pending) => pending,
            duplicate => panic!("{duplicate:?}"),
        }
    };
    claimed(&second).await;
    line.cut.send_replace(true);
    let ended = line.workers_end().await;
    assert!(matches!(ended[..], [Err(WorkerError::Cut(1))]), "{ended:?}");
    assert_eq!(outcome(&second).await, SlotState::Unwritten);
    drop(held);
    placed.push(second);
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_serialization_failure_is_tried_again() {
    let sale = Sale::open(1).await;
    sale.sku("A", 100).await;
    let database = sale.database.clone();
    let mut line = Line::open(sale, 1_024).await;
    // Sequences do not roll back: the first two attempts fail, and the third does not.
    line.sale
        .sql(
            "CREATE SEQUENCE millrace.attempts;
             CREATE FUNCTION millrace.conflict() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF nextval('millrace.attempts') <= 2 THEN
                     RAISE EXCEPTION 'not now' USING ERRCODE = 'serialization_failure';
                 END IF;
                 RETURN NULL; END $$;
             CREATE TRIGGER conflict AFTER INSERT ON millrace.orders
                 FOR EACH STATEMENT EXECUTE FUNCTION millrace.conflict()",
        )
        .await;
    line.start_worker(database, 8);
    let order = line.place("u", "A", 1, LONG).unwrap();
    assert_eq!(outcome(&order).await, SlotState::Persisted);
    assert_eq!(line.metrics.batch_retries.totals()["transient"], 2);
    line.sale.assert_audit(Some(&line.ledger)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_a_deadlock_takes_back_is_tried_again_whole() {
    let sale = Sale::open(1).await;
    for name in ["A", "B"] {
        sale.sku(name, 100).await;
    }
    let database = sale.database.clone();
    let mut line = Line::open(sale, 1_024).await;
    // Another session takes the rows of the SKUs in the other order. Who waited first looks for a
    // deadlock first, and is the one that gives in: the worker.
    let session = line.sale.session().await;
    let lock = |name: &str| format!("SELECT FROM millrace.sku WHERE sku_id = '{name}' FOR UPDATE");
    session.batch_execute("BEGIN").await.unwrap();
    session.batch_execute(&lock("B")).await.unwrap();
    let placed = ["A", "B"].map(|sku| line.place(&format!("u-{sku}"), sku, 1, LONG).unwrap());
    line.start_worker(database, 8);
    line.sale
        .until(
            "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()
                AND application_name LIKE 'millrace worker%' AND wait_event_type = 'Lock'",
        )
        .await;
    session.batch_execute(&lock("A")).await.unwrap();
    session.batch_execute("COMMIT").await.unwrap();
    all_persisted(&placed).await;
    assert!(
        line.metrics.batch_retries.totals()["transient"] > 0,
        "a deadlock"
    );
    line.sale.assert_audit(Some(&line.ledger)).await;
}
