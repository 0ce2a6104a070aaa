//! Counters that the database refuses.

use std::sync::Arc;
use std::time::Duration;

use millrace::order::{Lane, Order, Refusal, UserId};
use millrace::pipeline::orders::parking::{Parking, ParkingHandle};
use millrace::pipeline::orders::worker::WorkerError;
use millrace::state::buyers::BuyerOrder;
use millrace::state::pending::{PendingOrder, SlotState};
use millrace::store::StoreError;
use millrace::store::postgres::dead_letters;

use crate::line::{LONG, Line, all_persisted, claimed, outcome, outcomes, tally, until};
use crate::support::sale::{Sale, order};

/// A line with one worker on the SKUs `A`, `B` and `C`, of which the database refuses A's and C's
/// counters, and with the retry of parked orders.
async fn faulty() -> (Line, ParkingHandle) {
    let sale = Sale::open(2).await;
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
    let (handle, parking) = Parking::new(
        Arc::clone(&line.state),
        line.sale.database.clone(),
        line.sale.lease(),
        line.sale.writer(1),
        line.metrics.clone(),
    );
    tokio::spawn(parking.run());
    (line, handle)
}

/// Puts an order into the queue that a journal has: it was acknowledged.
fn accepted(line: &Line, user: &str, sku: &str) -> Arc<PendingOrder> {
    let sku = line.sku(sku);
    let user_id = UserId::new(user).unwrap();
    let order = Order {
        id: line.state.ids.next(Lane::of(&user_id)).unwrap(),
        user_id,
        ..order(&sku, 1)
    };
    sku.hold(order.quantity).unwrap().commit();
    let buyers = &line.state.buyers;
    buyers.restore(order.user_id.clone(), BuyerOrder::of(&order), false);
    let pending = Arc::new(PendingOrder::recovered(order, 1));
    line.state.pending.insert(&pending);
    line.queue.push(Arc::clone(&pending)).unwrap();
    pending
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_counter_pauses_its_sale_and_no_other_until_it_is_mended() {
    let (line, _handle) = faulty().await;
    let (mut placed, mut parked) = (Vec::new(), Vec::new());
    for at in 0..10 {
        placed.push(line.place(&format!("b-{at}"), "B", 2, LONG).unwrap());
        parked.push(accepted(&line, &format!("a-{at}"), "A"));
    }
    for of_b in &placed {
        assert_eq!(outcome(of_b).await, SlotState::Persisted);
    }
    let states = outcomes(&parked).await;
    assert_eq!(tally(&states, SlotState::OnDisk), 10);
    assert_eq!(line.sale.ids("parked_orders").await.len(), 10);
    assert_eq!(line.metrics.orders_parked.get(), 10);
    assert_eq!(line.state.pending.len(), 0, "memory keeps nothing of them");
    let refused = line.place("a-late", "A", 1, LONG);
    assert_eq!(refused.unwrap_err(), Refusal::SalePaused);
    assert!(!line.sku("B").is_faulted());
    let last = line.place("b-late", "B", 1, LONG).unwrap();
    assert_eq!(outcome(&last).await, SlotState::Persisted);
    placed.push(last);
    // What is on its way to a worker already is parked too, without another attempt.
    let failed = line.metrics.batches.get();
    parked.push(accepted(&line, "a-more", "A"));
    assert_eq!(outcome(&parked[10]).await, SlotState::OnDisk);
    assert_eq!(line.metrics.batches.get(), failed);
    assert!(line.state.poison.reason().is_none());

    line.sale.sql("UPDATE sku SET total = 100").await;
    until("A is sold again", || !line.sku("A").is_faulted()).await;
    assert_eq!(line.metrics.orders_parked.get(), 0);
    let rows = line.sale.ids("orders").await;
    assert!(parked.iter().all(|p| rows.contains(&p.order.id.as_i64())));
    assert_eq!(line.sku("A").counter().snapshot().held, 11);
    placed.push(line.place("a-late", "A", 1, LONG).unwrap());
    all_persisted(&placed).await;
    line.sale.assert_audit(Some(&line.state)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_a_refused_counter_is_given_back_at_once() {
    let (line, handle) = faulty().await;
    let mut placed = Vec::new();
    for at in 0..5 {
        placed.push(line.place(&format!("a-{at}"), "A", 1, LONG).unwrap());
        placed.push(line.place(&format!("c-{at}"), "C", 3, LONG).unwrap());
    }
    let states = outcomes(&placed).await;
    assert_eq!(tally(&states, SlotState::Unwritten), 10);
    until("both are paused", || {
        line.sku("A").is_faulted() && line.sku("C").is_faulted()
    })
    .await;
    // An operator asks, and is told why; then does something about it.
    let a = line.sku("A").number;
    let refused = handle.retry_now(a).await.unwrap().unwrap();
    assert_eq!(refused.parked, 0);
    assert!(refused.reason.contains("sku_not_oversold"), "{refused:?}");
    line.sale.sql("UPDATE sku SET total = 100").await;
    assert_eq!(handle.retry_now(a).await.unwrap(), None);
    assert!(!line.sku("A").is_faulted());
    until("so is C by itself", || !line.sku("C").is_faulted()).await;
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_parked_is_left_to_the_next_process() {
    let (mut line, _handle) = faulty().await;
    line.sale
        .sql("ALTER TABLE parked_orders RENAME TO elsewhere")
        .await;
    let parked = accepted(&line, "a", "A");
    until("it is tried", || line.sku("A").is_faulted()).await;
    line.sale.sql("UPDATE writer SET epoch = epoch + 1").await;
    let ended = line.workers_end().await;
    assert!(
        matches!(
            ended[..],
            [Err(WorkerError::Fatal(StoreError::Fenced { .. }))]
        ),
        "{ended:?}"
    );
    assert_eq!(parked.slot.state(), SlotState::OnDisk);
    assert!(line.state.pending.get(parked.order.id).is_some());
    assert_eq!(line.metrics.orders_parked.get(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trigger_that_leaves_a_row_out_makes_it_a_dead_letter_and_no_order() {
    let sale = Sale::open(1).await;
    sale.sku("A", 100).await;
    let database = sale.database.clone();
    let mut line = Line::open(sale, 1_024).await;
    line.start_worker(database, 100);
    let first = line.place("before", "A", 1, LONG).unwrap();
    assert_eq!(outcome(&first).await, SlotState::Persisted);
    // While the worker's session is there already.
    line.sale
        .sql(
            "CREATE FUNCTION millrace.swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 RETURN CASE WHEN NEW.user_id = 'swallowed' THEN NULL ELSE NEW END; END $$;
             CREATE TRIGGER swallow BEFORE INSERT ON millrace.orders
                 FOR EACH ROW EXECUTE FUNCTION millrace.swallow()",
        )
        .await;
    let users = ["u-1", "u-2", "swallowed", "u-3"];
    let mut placed: Vec<_> = users
        .iter()
        .map(|user| line.place(user, "A", 1, LONG).unwrap())
        .collect();
    let states = outcomes(&placed).await;
    assert_eq!(tally(&states, SlotState::Persisted), 3);
    assert_eq!(states[2], SlotState::Failed);
    let letter = dead_letters::list(&line.sale.database, false, 10)
        .await
        .unwrap();
    assert_eq!(letter[0].sqlstate, "02000");
    assert!(letter[0].reason.contains("trigger"), "{letter:?}");
    placed.push(first);
    line.check(&placed).await;
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
            millrace::pipeline::orders::intake::Admission::Placed(pending) => pending,
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
    line.sale.assert_audit(Some(&line.state)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_a_deadlock_takes_back_is_tried_again_whole() {
    let sale = Sale::open(1).await;
    for name in ["A", "B"] {
        sale.sku(name, 100).await;
    }
    let database = sale.database.clone();
    let mut line = Line::open(sale, 1_024).await;
    // Another session takes the rows of the SKUs in the other order. The worker is the one that looks for
    // a deadlock and gives in: it looks after 5 s of waiting, the other session not at all.
    let session = line.sale.session().await;
    let lock = |name: &str| format!("SELECT FROM millrace.sku WHERE sku_id = '{name}' FOR UPDATE");
    session
        .batch_execute(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET deadlock_timeout = 5000', current_database()); END $$;
             SET deadlock_timeout = '1h'; BEGIN",
        )
        .await
        .unwrap();
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
    line.sale.assert_audit(Some(&line.state)).await;
}
