//! Orders that a failover has lost and nothing else knows of.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use millrace::order::{Order, UserId};
use millrace::pipeline::restore::{Restorer, Watermarks};
use millrace::state::buyers::Remembered;
use millrace::state::pending::PendingOrder;

use crate::line::{LONG, Line, all_persisted, until};
use crate::support::sale::{Sale, order};

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
        let order = Order {
            id: line.ledger.ids.next().unwrap(),
            user_id: UserId::new(user).unwrap(),
            ..order(&sku, 3)
        };
        sku.hold(order.quantity).unwrap().keep();
        let buyers = &line.ledger.buyers;
        buyers.restore(order.user_id.clone(), Remembered::of(&order), false);
        order
    };
    let lost = enter("lost");
    let in_flight = Arc::new(PendingOrder::new(
        enter("in-flight"),
        std::time::Instant::now() + LONG,
        None,
    ));
    line.ledger.pending.insert(&in_flight);
    let paid = enter("paid");
    let orphans = &line.ledger.orphans;
    orphans.insert(paid.id, paid.created_at);

    let watermarks = Arc::new(Watermarks::new(1));
    let restorer = Restorer {
        ledger: Arc::clone(&line.ledger),
        journal: None,
        database: line.sale.database.clone(),
        lease: line.sale.lease(),
        watermarks: Arc::clone(&watermarks),
        pruned_below: Default::default(),
        metrics: line.metrics.clone(),
        rows_max: 100,
    };
    let watching = tokio::spawn(restorer.watch());
    watermarks.report_lost();
    let buyers = &line.ledger.buyers;
    let known = |order: &Order| buyers.find(&order.user_id, order.id).is_some();
    let was_restored = AtomicBool::new(false);
    until("what is lost is released", || {
        was_restored.store(watermarks.restores() > 0, Ordering::Relaxed);
        !known(&lost) && was_restored.load(Ordering::Relaxed)
    })
    .await;
    assert!(known(&in_flight.order) && known(&paid) && known(&written[0].order));
    assert_eq!(sku.counter().snapshot().held, 2 + 3 + 3);
    watching.abort();
}
