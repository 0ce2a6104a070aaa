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

async fn migrate(client: &mut Client, version: i32) {
    let path = format!("SET search_path = {SCHEMA}");
    client.batch_execute(&path).await.unwrap();
    released::migrations::runner()
        .set_target(refinery::Target::Version(version))
        .set_migration_table_name("refinery_schema_history")
        .run_async(client)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_sale_of_the_release_before_is_taken_along_whole() {
    let test = TestDatabase::create().await;
    let mut client = connect(&test.config()).await;
    client
        .batch_execute(&format!("CREATE SCHEMA {SCHEMA}"))
        .await
        .unwrap();
    migrate(&mut client, RELEASED).await;
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
        let query = query.replace("stock_journal", "stock_log");
        assert_eq!(rows(&client, &query).await, before, "{query}");
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

/// Version 9 renames `stock_journal` and its checkpoints. A process of the release before has
/// prepared statements with the old names, and prepares more of them.
#[tokio::test]
async fn a_process_of_the_release_before_goes_on_with_the_old_names_of_the_stock_log() {
    const WRITE: &str = "
        WITH moved AS (UPDATE sku SET held = held + 1 WHERE id = 1 RETURNING id, total, held, sold)
        INSERT INTO stock_journal (sku, cause, reference, held_delta, total_after, held_after, sold_after, request_key)
        SELECT id, 'orders', 'batch', 1, total, held, sold, $1 FROM moved";
    const PRUNE: &str = "
        WITH gone AS (DELETE FROM stock_journal WHERE sku = 1 AND id <= $1 AND request_key IS NULL RETURNING id)
        INSERT INTO stock_journal_checkpoint AS c (sku, through_id, entries, total, held, sold)
        SELECT 1, $1, count(*), 10, 1, 1 FROM gone
            ON CONFLICT (sku) DO UPDATE SET through_id = excluded.through_id, entries = c.entries + excluded.entries";
    let test = TestDatabase::create().await;
    let (mut old, mut new) = (test.connect().await, test.connect().await);
    new.batch_execute(&format!("CREATE SCHEMA {SCHEMA}"))
        .await
        .unwrap();
    migrate(&mut old, 8).await;
    old.batch_execute(SALE).await.unwrap();
    let write = old.prepare(WRITE).await.unwrap();
    let prune = old.prepare(PRUNE).await.unwrap();
    old.execute(&write, &[&None::<&str>]).await.unwrap();
    old.execute(&prune, &[&3_i64]).await.unwrap();

    migrate(&mut new, 9).await;
    old.execute(&write, &[&Some("key")]).await.unwrap();
    old.execute(WRITE, &[&None::<&str>]).await.unwrap();
    old.execute(&prune, &[&4_i64]).await.unwrap();
    old.execute(PRUNE, &[&5_i64]).await.unwrap();
    let again = old.execute(&write, &[&Some("key")]).await.unwrap_err();
    let code = again.code().map(tokio_postgres::error::SqlState::code);
    assert_eq!(code, Some("23505"), "{again}");

    let checkpoint =
        "SELECT through_id, entries FROM stock_journal_checkpoint WHERE sku = 1 FOR UPDATE";
    let of_old = old.query_one(checkpoint, &[]).await.unwrap();
    assert_eq!((of_old.get(0), of_old.get(1)), (5_i64, 4_i64));
    let entries =
        "SELECT id, held_after, request_key FROM stock_log WHERE cause = 'orders' AND id > 6";
    assert_eq!(
        rows(&new, entries).await,
        [
            "{\"id\":10,\"held_after\":3,\"request_key\":\"key\"}",
            "{\"id\":11,\"held_after\":4,\"request_key\":null}",
            "{\"id\":9,\"held_after\":2,\"request_key\":null}",
        ]
    );
    let left = "SELECT relname FROM pg_class
                 WHERE relname LIKE 'stock_journal%' AND relkind <> 'v' AND relnamespace = current_schema()::regnamespace";
    assert_eq!(
        rows(&new, left).await,
        [""; 0],
        "nothing but the views has the old name"
    );
}
