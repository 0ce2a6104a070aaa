//! A database of the release before, with a sale in the middle, is taken along.

use tokio_postgres::Client;

use crate::support::postgres::{TestDatabase, connect};
use crate::support::sale::{SCHEMA, Sale};

mod released {
    refinery::embed_migrations!("src/store/migrations");
}

/// The newest version that a release has had.
const RELEASED: i32 = 3;

/// A sale as that release leaves it: one order in each status, a dead letter, and payments of each state.
const SALE: &str = "
    INSERT INTO node (node, epoch, ids_leased_until_ms, started_at, unpaid_from)
    VALUES (0, 7, (extract(epoch FROM now()) * 1000)::int8, now(), 0);
    INSERT INTO writer (node, shard, epoch, batch) VALUES (0, 0, 7, 41), (0, 1, 7, 3);
    INSERT INTO sku (sku_id, title, unit_price, currency, total, held, sold, per_user_limit)
    VALUES ('A', 'A', 100, 'EUR', 10, 1, 1, 2), ('B', 'B', 100, 'EUR', 5, 0, 0, NULL);
    INSERT INTO stock_journal (sku, cause, reference, total_delta, held_delta, sold_delta, total_after, held_after, sold_after)
    SELECT id, 'admin', 'put', total, 0, 0, total, 0, 0 FROM sku ORDER BY id;
    INSERT INTO stock_journal (sku, cause, reference, held_delta, sold_delta, total_after, held_after, sold_after)
    VALUES (1, 'orders', 'batch 0/0/41', 6, 0, 10, 6, 0), (1, 'paid', '2', -1, 1, 10, 5, 1),
           (1, 'cancelled', '3', -1, 0, 10, 4, 1), (1, 'expired', '4', -1, 0, 10, 3, 1),
           (1, 'refund due', '5', -1, 0, 10, 2, 1), (1, 'refund due', '6', -1, 0, 10, 1, 1);
    INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at, expires_at,
                        key_hash, payload_hash, attributes, refund_reason)
    SELECT ((extract(epoch FROM now()) * 1000)::int8 << 22) + status, 'u-' || status, 1, 1, 0, 100, 'EUR', status, now(),
           now() + interval '1 hour', md5('key ' || status)::uuid, status, '{\"a\": 1}',
           CASE WHEN status = 5 THEN 'order_cancelled' END
      FROM generate_series(1, 6) status;
    INSERT INTO dead_letters (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at, expires_at,
                              payload_hash, sqlstate, reason)
    VALUES (8 << 22, 'u-8', 1, 1, 0, 100, 'EUR', now(), now(), 8, '23514', 'refused');
    INSERT INTO payment_events (received_at, provider, event_id, kind, body, payment_id)
    SELECT now(), 'standard', 'e-' || n, 'payment.succeeded', convert_to('body ' || n, 'UTF8'), 'p-' || n FROM generate_series(1, 4) n;
    INSERT INTO payments (received_at, provider, payment_id, order_ref, order_id, amount, currency, state, refund_reason,
                          changed_at, check_at, reference)
    SELECT now(), 'standard', 'p-' || p.n, o.order_id::text, o.order_id, 100, 'EUR', p.state, p.reason, now(), now(), p.reference
      FROM (VALUES (1, 2, 'matched', NULL, NULL), (2, 5, 'refund_due', 'order_cancelled', NULL),
                   (3, 6, 'refunded', NULL, 'R-1')) AS p (n, status, state, reason, reference)
      JOIN orders o ON o.status = p.status;
    INSERT INTO payments (received_at, provider, payment_id, order_ref, amount, currency, state, changed_at, check_at)
    VALUES (now(), 'standard', 'p-4', 'not ours', 100, 'EUR', 'orphan', now(), now());";

async fn rows(client: &Client, of: &str) -> Vec<String> {
    let query = format!("SELECT row_to_json(r)::text FROM ({of}) r ORDER BY 1");
    let rows = client.query(&query, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn a_sale_of_the_release_before_is_taken_along_whole() {
    let test = TestDatabase::create().await;
    let mut client = connect(&test.config()).await;
    let begin = format!("CREATE SCHEMA {SCHEMA}; SET search_path = {SCHEMA}");
    client.batch_execute(&begin).await.unwrap();
    released::migrations::runner()
        .set_target(refinery::Target::Version(RELEASED))
        .set_migration_table_name("refinery_schema_history")
        .run_async(&mut client)
        .await
        .unwrap();
    client.batch_execute(SALE).await.unwrap();
    let kept = [
        "SELECT order_id, user_id, sku_id, quantity, amount, currency, status, created_at, expires_at, attributes,
                refund_reason FROM order_list",
        "SELECT * FROM sku_list",
        "SELECT provider, payment_id, order_ref, order_id, amount, state, refund_reason, reference FROM payment_list",
        "SELECT provider, event_id, kind, body, payment_id, received_at FROM payment_events",
        "SELECT sku, cause, reference, total_delta, held_delta, sold_delta, total_after FROM stock_journal",
    ];
    let mut before = Vec::new();
    for query in kept {
        before.push(rows(&client, query).await);
    }

    let sale = Sale::open_at(test.config(), 2).await;
    for (query, before) in kept.into_iter().zip(before) {
        assert!(!before.is_empty(), "{query}");
        assert_eq!(rows(&client, query).await, before, "{query}");
    }
    sale.assert_audit(None).await;
    assert_eq!(sale.lease().epoch, 8);
    let batch = sale
        .number("SELECT batch FROM writer WHERE node = 0 AND shard = 0")
        .await;
    assert_eq!(batch, 41, "the workers go on counting where they were");
    // Again, as every start does.
    assert_eq!(sale.faults().await, [""; 0]);
}
