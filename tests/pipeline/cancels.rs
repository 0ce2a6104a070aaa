//! Cancellations whose answer is lost.

use std::sync::Arc;
use std::time::Duration;

use millrace::order::OrderId;
use millrace::pipeline::orders::cancel::{CancelError, Canceller, Unresolved, Which};
use millrace::state::pending::PendingOrder;

use crate::line::{LONG, Line, all_persisted, until};
use crate::support::sale::Sale;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancellation_of_unknown_outcome_is_seen_through_and_too_many_are_refused_unsent() {
    let sale = Sale::open(1).await;
    sale.sku("A", 100).await;
    let impatient = sale.with_step(Duration::from_millis(300));
    let database = sale.database.clone();
    let mut line = Line::open(sale, 64).await;
    line.start_worker(database, 8);
    let placed: Vec<Arc<PendingOrder>> = (0..3)
        .map(|at| line.place(&format!("u-{at}"), "A", 1, LONG).unwrap())
        .collect();
    all_persisted(&placed).await;
    let ids: Vec<OrderId> = placed.iter().map(|pending| pending.order.id).collect();
    let unresolved = Arc::new(Unresolved::with_room(2));
    let canceller = Canceller::new(Arc::clone(&line.state), impatient, line.sale.lease())
        .with_unresolved(Arc::clone(&unresolved));

    let mut holder = line.sale.session().await;
    let held = holder.transaction().await.unwrap();
    held.batch_execute("SELECT FROM orders FOR UPDATE")
        .await
        .unwrap();
    for id in &ids[..2] {
        let unknown = canceller.cancel(*id, Which::Unpaid).await;
        assert!(matches!(unknown, Err(CancelError::Store(_))), "{unknown:?}");
    }
    let refused = canceller.cancel(ids[2], Which::Unpaid).await;
    assert!(matches!(refused, Err(CancelError::Busy)), "{refused:?}");
    // Asked for again it takes no more room.
    let unknown = canceller.cancel(ids[0], Which::Unpaid).await;
    assert!(matches!(unknown, Err(CancelError::Store(_))), "{unknown:?}");
    assert_eq!(unresolved.lost(), 2);
    let resolving = tokio::spawn(canceller.clone().resolve_lost());

    held.rollback().await.unwrap();
    until("both are settled", || unresolved.lost() == 0).await;
    let cancelled = line
        .sale
        .number("SELECT count(*) FROM orders WHERE status = 3");
    assert_eq!(cancelled.await, 2);
    assert_eq!(line.sku("A").counter().snapshot().held, 1);
    canceller.cancel(ids[2], Which::Unpaid).await.unwrap();
    assert_eq!(line.sku("A").counter().snapshot().held, 0);
    line.sale.assert_audit(Some(&line.state)).await;
    resolving.abort();
}
