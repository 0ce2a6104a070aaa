//! Orders that a failover has lost and nothing else knows of.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use millrace::order::{Ended, Lane, Order, OrderUnits, UserId};
use millrace::pipeline::failover::restore::{Restorer, Watermarks};
use millrace::pipeline::orders::intake::{Admission, OrderRequest};
use millrace::state::buyers::BuyerOrder;
use millrace::state::effects::Row;
use millrace::state::pending::PendingOrder;

use crate::line::{LONG, Line, all_persisted, request, until};
use crate::support::sale::{Sale, order};

fn restorer(line: &Line) -> (Restorer, Arc<Watermarks>) {
    let watermarks = Arc::new(Watermarks::new(1));
    let restorer = Restorer {
        state: Arc::clone(&line.state),
        queue: Arc::clone(&line.queue) as _,
        database: line.sale.database.clone(),
        lease: line.sale.lease(),
        watermarks: Arc::clone(&watermarks),
        metrics: line.metrics.clone(),
        rows_max: 100,
    };
    (restorer, watermarks)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_unit_and_no_key_is_held_by_an_order_that_is_nowhere() {
    let sale = Sale::open(2).await;
    sale.sku("A", 100).await;
    let database = sale.database.clone();
    let mut line = Line::open(sale, 64).await;
    line.start_worker(database, 8);
    let written = vec![line.place("written", "A", 2, LONG).unwrap()];
    all_persisted(&written).await;
    let sku = line.sku("A");
    let enter = |user: &str| {
        let user_id = UserId::new(user).unwrap();
        let order = Order {
            id: line.state.ids.next(Lane::of(&user_id)).unwrap(),
            user_id,
            ..order(&sku, 3)
        };
        sku.hold(order.quantity).unwrap().commit();
        let buyers = &line.state.buyers;
        buyers.restore(order.user_id.clone(), BuyerOrder::of(&order), false);
        order
    };
    let lost = enter("lost");
    let in_flight = Arc::new(PendingOrder::new(
        enter("in-flight"),
        std::time::Instant::now() + LONG,
        None,
    ));
    line.state.pending.insert(&in_flight);
    let paid = enter("paid");
    let orphans = &line.state.orphans;
    orphans.insert(paid.id, paid.created_at);

    let (restorer, watermarks) = restorer(&line);
    let watching = tokio::spawn(restorer.watch());
    watermarks.report_lost();
    let buyers = &line.state.buyers;
    let known = |order: &Order| buyers.find(&order.user_id, order.id).is_some();
    let was_restored = AtomicBool::new(false);
    until("what is lost is released", || {
        was_restored.store(watermarks.restores() > 0, Ordering::Relaxed);
        !known(&lost) && was_restored.load(Ordering::Relaxed)
    })
    .await;
    assert!(known(&in_flight.order) && known(&paid) && known(&written[0].order));
    assert_eq!(sku.counter().snapshot().held, 2 + 3 + 3);
    // Its payment is to be refunded, for want of a receipt.
    orphans.remove(paid.id);
    until("what is not recovered is released", || !known(&paid)).await;
    assert!(known(&in_flight.order) && known(&written[0].order));
    assert_eq!(sku.counter().snapshot().held, 2 + 3);
    watching.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_comes_back_as_it_had_ended() {
    let sale = Sale::open(2).await;
    sale.sku("A", 100).await;
    let database = sale.database.clone();
    let mut line = Line::open(sale, 64).await;
    line.start_worker(database, 8);
    let place = |user: &str| line.place(user, "A", 1, LONG).unwrap();
    let ends = [
        (Ended::Cancelled, "cancelled"),
        (Ended::Expired, "expired"),
        (Ended::Failed, "failed"),
    ];
    // The database forgets the rows of some, and of others only how they ended.
    let lost = ends.map(|(how, _)| place(&format!("lost-{how:?}")));
    let payable = place("payable");
    let kept = ends[..2]
        .iter()
        .map(|(how, _)| place(&format!("kept-{how:?}")));
    let kept: Vec<_> = kept.collect();
    let all: Vec<_> = lost
        .iter()
        .chain([&payable])
        .chain(&kept)
        .cloned()
        .collect();
    all_persisted(&all).await;
    let sku = line.sku("A");
    let end = |pending: &PendingOrder, how| {
        let order = &pending.order;
        let buyers = &line.state.buyers;
        assert_eq!(buyers.deactivate(&order.user_id, order.id, how), Some(true));
        sku.counter().release(1);
    };
    for (order, (how, _)) in lost.iter().zip(ends).chain(kept.iter().zip(ends)) {
        end(order, how);
    }
    let gone: Vec<String> = lost
        .iter()
        .chain([&payable])
        .map(|pending| pending.order.id.to_string())
        .collect();
    let forget = format!(
        "DELETE FROM orders WHERE order_id IN ({}); UPDATE sku SET held = held - {}",
        gone.join(","),
        gone.len()
    );
    line.sale.sql(&forget).await;

    let (restorer, watermarks) = restorer(&line);
    let watching = tokio::spawn(restorer.watch());
    watermarks.report_lost();
    until("all is restored", || watermarks.restores() > 0).await;
    watching.abort();
    let status = async |pending: &PendingOrder| {
        let sql = format!(
            "SELECT status FROM order_rows WHERE order_id = {}",
            pending.order.id
        );
        let row = line.sale.admin().query_one(&sql, &[]).await.unwrap();
        row.get::<_, String>(0)
    };
    for (order, (_, word)) in lost.iter().zip(ends).chain(kept.iter().zip(ends)) {
        assert_eq!(status(order).await, word);
    }
    assert_eq!(status(&payable).await, "pending_payment");
    assert_eq!(line.sale.number("SELECT held FROM sku").await, 1);
    assert_eq!(sku.counter().snapshot().held, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_that_waited_wait_again_in_their_places_and_an_assignment_that_was_lost_is_made_anew()
 {
    let sale = Sale::open(2).await;
    sale.sku("A", 1).await;
    let database = sale.database.clone();
    let mut line = Line::open(sale, 64).await;
    line.start_worker(database, 8);
    let holder = line.place("holder", "A", 1, LONG).unwrap();
    let join = |user: &str| {
        let request = OrderRequest {
            waitlist: true,
            trace: None,
            ..request(user, "A", 1, LONG)
        };
        match line.intake.admit(&request, None).unwrap() {
            Admission::Placed(pending) => pending,
            Admission::Duplicate { id, .. } => panic!("{user} has order {id} already"),
        }
    };
    let [assigned, lost, cancelled] = ["assigned", "lost", "cancelled"].map(join);
    let all = vec![holder, assigned, lost, cancelled];
    all_persisted(&all).await;
    let [holder, assigned, lost, cancelled] = all.try_into().unwrap();
    let sku = line.sku("A");
    let units = |pending: &PendingOrder| OrderUnits::of(&pending.order);
    let place = |pending: &PendingOrder| sku.waitlist().position(pending.order.id);
    // What memory knows, and the database has forgotten.
    line.state
        .end_unpaid(&units(&holder), Ended::Cancelled, Row::Moved);
    let next = sku.waitlist().select(sku.counter(), false, 10);
    assert_eq!(next, [(assigned.order.id, 1)]);
    let later = assigned.order.created_at.plus_ms(900_000);
    line.state.assigned(&sku, &[assigned.order.id], later);
    line.state
        .end_waiting([&units(&cancelled)], Ended::Cancelled);
    assert_eq!(
        (place(&assigned), place(&lost), place(&cancelled)),
        (None, Some(1), None)
    );
    line.sale
        .sql(&format!(
            "DELETE FROM orders WHERE order_id = {}",
            lost.order.id
        ))
        .await;

    let (restorer, watermarks) = restorer(&line);
    let watching = tokio::spawn(restorer.watch());
    watermarks.report_lost();
    until("all is restored", || watermarks.restores() > 0).await;
    watching.abort();
    assert_eq!(
        (place(&assigned), place(&lost), place(&cancelled)),
        (Some(1), Some(2), None)
    );
    assert_eq!((sku.counter().kept(), sku.counter().free()), (1, 0));
    let next = sku.waitlist().select(sku.counter(), false, 10);
    assert_eq!(next, [(assigned.order.id, 1)]);
    for (pending, status) in [
        (&assigned, "waitlisted"),
        (&lost, "waitlisted"),
        (&cancelled, "cancelled"),
        (&holder, "cancelled"),
    ] {
        let sql = format!(
            "SELECT status FROM order_rows WHERE order_id = {}",
            pending.order.id
        );
        let row = line.sale.admin().query_one(&sql, &[]).await.unwrap();
        assert_eq!(row.get::<_, String>(0), status);
    }
}
