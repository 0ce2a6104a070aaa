//! Orders that come from many at once, and the one that the database refuses.

use std::sync::Arc;
use std::time::Duration;

use millrace::order::Refusal;
use millrace::pipeline::orders::intake::Admission;
use millrace::state::pending::{PendingOrder, SlotState};
use millrace::store::postgres::orders;

use crate::line::{LONG, Line, all_persisted, key_hash, outcome, outcomes, request, tally};
use crate::support::sale::{Sale, count};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_order_placed_by_many_at_once_becomes_one_row() {
    const BUYERS: usize = 8;
    let each = 500 * count("MILLRACE_ROUNDS", 1) as usize;
    let sale = Sale::open(3).await;
    // A sells out, B nearly does, C has plenty.
    let stock = [
        ("A", 300),
        ("B", (BUYERS * each / 3) as u32),
        ("C", 1_000_000),
    ];
    for (name, total) in stock {
        sale.sku(name, total).await;
    }
    let database = sale.database.clone();
    // A small ring and small batches: it fills up, and workers pass each other.
    let mut line = Line::open(sale, 256).await;
    for _ in 0..3 {
        line.start_worker(database.clone(), 100);
    }
    let line = Arc::new(line);
    let mut buyers = Vec::new();
    for buyer in 0..BUYERS {
        let line = Arc::clone(&line);
        buyers.push(tokio::spawn(async move {
            let mut placed: Vec<Arc<PendingOrder>> = Vec::new();
            let mut sold_out = 0;
            for at in 0..each {
                let user = format!("u-{buyer}-{at}");
                let (sku, _) = stock[at % 3];
                let units = 1 + (at % 2) as u32;
                loop {
                    match line.place(&user, sku, units, LONG) {
                        Ok(pending) => {
                            // A double click finds the order that is there.
                            let again = line.intake.admit(&request(&user, sku, units, LONG), None);
                            assert!(
                                matches!(&again, Ok(Admission::Duplicate { id, .. }) if *id == pending.order.id),
                                "{again:?}"
                            );
                            placed.push(pending);
                        }
                        Err(Refusal::Overloaded | Refusal::Backlogged { .. }) => {
                            // The ring is full.
                            tokio::time::sleep(Duration::from_millis(1)).await;
                            continue;
                        }
                        Err(Refusal::SoldOut { .. }) => sold_out += 1,
                        Err(refusal) => panic!("{refusal:?}"),
                    }
                    break;
                }
            }
            all_persisted(&placed).await;
            (placed, sold_out)
        }));
    }
    let (mut placed, mut sold_out) = (Vec::new(), 0);
    for buyer in buyers {
        let (more, refused) = buyer.await.unwrap();
        placed.extend(more);
        sold_out += refused;
    }
    assert_eq!(placed.len() + sold_out, BUYERS * each);
    assert!(line.sku("A").counter().free() < 2, "A is sold out");
    assert_eq!(line.metrics.rows_written.get(), placed.len() as u64);
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_row_among_thousands_is_a_dead_letter_and_its_neighbours_are_written() {
    const ORDERS: usize = 5_000;
    let sale = Sale::open(1).await;
    sale.sku_with("A", 100_000, Some(1)).await;
    sale.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.user_id = 'u-3141' THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NEW; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    .await;
    let database = sale.database.clone();
    let mut line = Line::open(sale, ORDERS).await;
    let placed: Vec<_> = (0..ORDERS)
        .map(|at| line.place(&format!("u-{at}"), "A", 1, LONG).unwrap())
        .collect();
    // All of them are one batch.
    line.start_worker(database, ORDERS);
    let states = outcomes(&placed).await;
    assert_eq!(states[3_141], SlotState::Failed);
    assert_eq!(tally(&states, SlotState::Persisted), ORDERS - 1);
    line.check(&placed).await;
    let found = orders::find(&line.sale.database, placed[3_141].order.id).await;
    assert_eq!(
        found.unwrap().unwrap().status,
        millrace::order::OrderStatus::Failed
    );
    assert_eq!(line.metrics.dead_letters.get(), 1);
    // Found by halving: two parts a level, thirteen levels.
    assert!(line.metrics.batches.get() <= 26);

    // The key is taken, the limit is not.
    let again = line.intake.admit(&request("u-3141", "A", 1, LONG), None);
    assert!(
        matches!(&again, Ok(Admission::Duplicate { id, .. }) if *id == placed[3_141].order.id),
        "{again:?}"
    );
    line.sale.sql("DROP TRIGGER refuse ON orders").await;
    let fresh = |user| {
        let mut fresh = request(user, "A", 1, LONG);
        fresh.key = Some(key_hash("another"));
        line.intake.admit(&fresh, None)
    };
    let Ok(Admission::Placed(second)) = fresh("u-3141") else {
        panic!("it is the buyer's only live order");
    };
    assert_eq!(outcome(&second).await, SlotState::Persisted);
    assert_eq!(
        fresh("u-1").unwrap_err(),
        Refusal::PurchaseLimit { limit: 1, taken: 1 }
    );
}
