//! A batch and its counters: all or nothing, refused or written, with many writers at once.

use std::time::Duration;

use millrace::order::Order;
use millrace::store::WriteError;
use millrace::store::batch::BatchWriter;
use millrace::store::postgres::transitions;
use rand::seq::SliceRandom;

use crate::support::sale::{NO_SKU, Sale, count, order, orders, refs};

/// Writes `orders` until they are written; how often it had to be tried again.
async fn write_all(writer: &mut BatchWriter, orders: &[Order]) -> usize {
    for retries in 0..100 {
        match writer.write(&refs(orders)).await {
            Ok(()) => return retries,
            Err(WriteError::Retry(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    panic!("tried a hundred times");
}

#[tokio::test]
async fn a_batch_moves_each_counter_once_and_the_journal_says_why() {
    let sale = Sale::open(1).await;
    let (a, b) = (sale.sku("A", 100).await, sale.sku("B", 100).await);
    let mut writer = sale.writer(0);
    writer
        .write(&refs(&[order(&b, 5), order(&a, 1), order(&b, 2)]))
        .await
        .unwrap();
    writer.write(&[&order(&a, 3)]).await.unwrap();
    assert_eq!(
        sale.number("SELECT held FROM sku WHERE sku_id = 'A'").await,
        4
    );
    assert_eq!(
        sale.number("SELECT held FROM sku WHERE sku_id = 'B'").await,
        7
    );
    let of_batch_1 =
        "SELECT count(*) FROM stock_log WHERE cause = 'orders' AND reference = 'batch 0/0/1'";
    assert_eq!(sale.number(of_batch_1).await, 2);
    assert_eq!(sale.number("SELECT batch FROM writer").await, 2);
    sale.assert_audit(None).await;
}

async fn run_writers(sale: &Sale, work: Vec<Vec<Vec<Order>>>) {
    let mut tasks = Vec::new();
    for (shard, batches) in work.into_iter().enumerate() {
        let mut writer = sale.writer(shard as i16);
        tasks.push(tokio::spawn(async move {
            let mut retries = 0;
            for batch in &batches {
                retries += write_all(&mut writer, batch).await;
            }
            retries
        }));
    }
    for task in tasks {
        let retries = tokio::time::timeout(Duration::from_secs(60), task)
            .await
            .expect("in time")
            .unwrap();
        assert_eq!(
            retries, 0,
            "locks are taken in one order: nothing deadlocks"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_one_hot_sku_keep_its_counter_exact() {
    let sale = Sale::open(4).await;
    let sku = sale.sku("A", 1_000_000).await;
    let batches = 25 * count("MILLRACE_ROUNDS", 1) as usize;
    let work = (0..4)
        .map(|_| (0..batches).map(|at| orders(&sku, 1 + at % 7)).collect())
        .collect::<Vec<Vec<Vec<Order>>>>();
    let rows: usize = work.iter().flatten().map(Vec::len).sum();
    run_writers(&sale, work).await;
    assert_eq!(sale.rows().await, rows as i64);
    assert_eq!(sale.number("SELECT held FROM sku").await, rows as i64);
    sale.assert_audit(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_while_batches_are_written_leaves_an_unbroken_journal() {
    let sale = Sale::open(2).await;
    let mut skus = Vec::new();
    for at in 0..8 {
        skus.push(sale.sku(&format!("S{at}"), 1_000_000).await);
    }
    let mut writer = sale.writer(1);
    let cancelled: Vec<Order> = skus.iter().flat_map(|sku| orders(sku, 20)).collect();
    writer.write(&refs(&cancelled)).await.unwrap();
    let work = vec![
        (0..60)
            .map(|_| skus.iter().flat_map(|sku| orders(sku, 2)).collect())
            .collect::<Vec<Vec<Order>>>(),
    ];
    let cancel = async {
        for order in &cancelled {
            let moved = transitions::cancel(
                &sale.database,
                sale.lease(),
                order.id,
                None,
                transitions::Which::Unpaid,
            )
            .await;
            assert!(
                matches!(
                    moved,
                    Ok(millrace::store::postgres::transitions::Transition::Now(_))
                ),
                "{moved:?}"
            );
        }
    };
    tokio::join!(run_writers(&sale, work), cancel);
    sale.assert_audit(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_many_skus_in_opposite_order_never_deadlock() {
    for writers in [2_usize, 4] {
        let sale = Sale::open(writers as i16).await;
        let mut skus = Vec::new();
        for at in 0..12 {
            skus.push(sale.sku(&format!("S{at}"), 1_000_000).await);
        }
        let work = (0..writers)
            .map(|shard| {
                (0..15 * count("MILLRACE_ROUNDS", 1))
                    .map(|_| {
                        let mut batch: Vec<Order> =
                            skus.iter().flat_map(|sku| orders(sku, 2)).collect();
                        match shard {
                            0 => {}
                            1 => batch.reverse(),
                            _ => batch.shuffle(&mut rand::rng()),
                        }
                        batch
                    })
                    .collect()
            })
            .collect::<Vec<Vec<Vec<Order>>>>();
        let each: usize = work.iter().flatten().map(Vec::len).sum::<usize>() / skus.len();
        run_writers(&sale, work).await;
        let wrong = format!("SELECT count(*) FROM sku WHERE held <> {each}");
        assert_eq!(sale.number(&wrong).await, 0);
        sale.assert_audit(None).await;
    }
}

/// Every statement by which a database can refuse the row of buyer `bad`, and what it says.
const REFUSALS: [(&str, &str); 4] = [
    ("ALTER TABLE orders ADD CHECK (user_id <> 'bad')", "23514"),
    (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.user_id = 'bad' THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NEW; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION refuse()",
        "P0001",
    ),
    (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             PERFORM 1 / (NEW.user_id <> 'bad')::int; RETURN NEW; END $$;
         CREATE TRIGGER refuse AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION refuse()",
        "22012",
    ),
    // Refused only at the COMMIT.
    (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.user_id = 'bad' THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION refuse()",
        "P0001",
    ),
];

#[tokio::test]
async fn a_refused_row_takes_its_batch_with_it_and_the_session_goes_on() {
    for (statement, code) in REFUSALS {
        let sale = Sale::open(1).await;
        let sku = sale.sku("A", 100).await;
        sale.sql(statement).await;
        let mut writer = sale.writer(0);
        writer.write(&refs(&orders(&sku, 2))).await.unwrap();
        let session = "SELECT pid::int8 FROM pg_stat_activity
                        WHERE datname = current_database() AND application_name = 'millrace worker 0/0'";
        let backend = sale.number(session).await;

        let mut batch = orders(&sku, 3);
        batch[1].user_id = millrace::order::UserId::new("bad").unwrap();
        let refused = writer.write(&refs(&batch)).await;
        assert!(
            matches!(&refused, Err(WriteError::Row { sqlstate, .. }) if sqlstate == code),
            "{statement}: {refused:?}"
        );
        assert!(!writer.outcome_unknown());
        assert_eq!(sale.rows().await, 2);
        assert_eq!(sale.number("SELECT held FROM sku").await, 2);

        batch.remove(1);
        writer.write(&refs(&batch)).await.unwrap();
        assert_eq!(sale.rows().await, 4);
        assert_eq!(sale.number(session).await, backend, "{statement}");
        sale.assert_audit(None).await;
    }
}

#[tokio::test]
async fn an_id_that_is_there_already_is_a_refused_row() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let mut writer = sale.writer(0);
    let batch = orders(&sku, 3);
    writer.write(&refs(&batch)).await.unwrap();
    let again = [order(&sku, 1), batch[1].clone()];
    let twins = {
        let one = order(&sku, 1);
        [one.clone(), one]
    };
    for bad in [again, twins] {
        let refused = writer.write(&refs(&bad)).await;
        assert!(
            matches!(&refused, Err(WriteError::Row { sqlstate, .. }) if sqlstate == "23505"),
            "{refused:?}"
        );
    }
    assert_eq!(sale.rows().await, 3);
    sale.assert_audit(None).await;
}

#[tokio::test]
async fn a_refused_counter_is_told_from_a_refused_row_and_nothing_is_written() {
    for (statement, code) in [
        // Somebody lowered the total by hand, to just what is held: the CHECK refuses more.
        ("UPDATE sku SET total = 2 WHERE sku_id = 'A'", "23514"),
        (
            "ALTER TABLE sku ADD CHECK (sku_id <> 'A' OR held < 4)",
            "23514",
        ),
        // The journal's NOT NULL.
        ("DELETE FROM sku WHERE sku_id = 'A'", "23502"),
    ] {
        let sale = Sale::open(1).await;
        let (a, b) = (sale.sku("A", 100).await, sale.sku("B", 100).await);
        let mut writer = sale.writer(0);
        writer.write(&refs(&orders(&a, 2))).await.unwrap();
        let journal = sale.number("SELECT count(*) FROM stock_log").await;
        sale.sql(statement).await;
        let mut batch = orders(&b, 3);
        batch.extend(orders(&a, 2));
        // Of several SKUs and of one: each has a statement of its own.
        for batch in [&batch[..], &batch[3..]] {
            let refused = writer.write(&refs(batch)).await;
            assert!(
                matches!(&refused, Err(WriteError::Counter { sqlstate, .. }) if sqlstate == code),
                "{statement}: {refused:?}"
            );
            assert!(!writer.outcome_unknown());
            assert_eq!(sale.rows().await, 2);
            assert_eq!(
                sale.number("SELECT held FROM sku WHERE sku_id = 'B'").await,
                0
            );
            assert_eq!(sale.number("SELECT count(*) FROM stock_log").await, journal);
        }
        writer.write(&refs(&batch[..3])).await.unwrap();
        assert_eq!(sale.rows().await, 5);
    }
}

#[tokio::test]
async fn an_order_of_a_sku_without_a_row_is_a_refused_counter() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let mut lost = order(&sku, 1);
    lost.sku = NO_SKU;
    let mut writer = sale.writer(0);
    for batch in [&[&order(&sku, 1), &lost][..], &[&lost]] {
        let refused = writer.write(batch).await;
        assert!(
            matches!(refused, Err(WriteError::Counter { .. })),
            "{refused:?}"
        );
        assert_eq!(sale.rows().await, 0);
    }
    sale.assert_audit(None).await;
}
