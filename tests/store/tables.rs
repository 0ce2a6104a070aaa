//! The schema: made once, checked, in a place of its own, by a role without privileges, and the
//! views that other programs read.

use millrace::order::{OrderStatus, UnixMillis};
use millrace::store::postgres::{self, Connected, Database};
use millrace::store::{StoreError, schema};

use crate::support::postgres::{Cluster, TestDatabase, connect};
use crate::support::sale::{STEP, Sale, order, orders, refs, take_over};

async fn at(config: tokio_postgres::Config, schema: &str) -> (Database, Connected) {
    let database = Database::with_config(config, schema, 2, STEP).unwrap();
    let client = database.connect("test").await.unwrap();
    (database, client)
}

fn refusal<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    match result {
        Err(error @ StoreError::Schema(_)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn migrating_twice_does_nothing_and_everything_lives_in_the_schema() {
    let test = TestDatabase::create().await;
    let (_, mut client) = at(test.config(), "shop_1").await;
    let missing = refusal(schema::check(&mut client, "shop_1").await);
    assert!(missing.contains("does not exist yet") && missing.contains("millrace migrate"));

    assert!(schema::migrate(&mut client, "shop_1").await.unwrap() > 0);
    assert_eq!(schema::migrate(&mut client, "shop_1").await.unwrap(), 0);
    schema::check(&mut client, "shop_1").await.unwrap();

    let elsewhere = client
        .query(
            "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE n.nspname NOT IN ('shop_1', 'pg_catalog', 'information_schema', 'pg_toast')",
            &[],
        )
        .await
        .unwrap();
    let elsewhere: Vec<&str> = elsewhere.iter().map(|row| row.get(0)).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
    let published = client
        .query(
            "SELECT tablename::text FROM pg_publication_tables
              WHERE pubname = 'millrace' AND schemaname = 'shop_1' ORDER BY 1",
            &[],
        )
        .await
        .unwrap();
    let published: Vec<&str> = published.iter().map(|row| row.get(0)).collect();
    assert_eq!(published, ["dead_letters", "orders", "payments", "sku"]);
}

/// Receipts of version 1 are taken for what was placed before the first start of this release, in the
/// database that an earlier one made.
#[tokio::test]
async fn a_database_of_schema_3_gets_an_identity_and_keeps_its_receipts() {
    let test = TestDatabase::create().await;
    let (database, mut client) = at(test.config(), "shop").await;
    let all = schema::print("shop");
    let (until_3, _) = all.split_once("\n-- V4__").unwrap();
    client
        .batch_execute(&format!("{until_3}\nCOMMIT"))
        .await
        .unwrap();
    let leased_until = UnixMillis::now().plus_ms(60_000);
    client
        .execute(
            "INSERT INTO node (node, epoch, ids_leased_until_ms, started_at) VALUES (0, 7, $1, now())",
            &[&leased_until.0],
        )
        .await
        .unwrap();
    assert!(schema::migrate(&mut client, "shop").await.unwrap() > 0);
    let first = take_over(&database, 1).await.unwrap();
    assert_eq!(first.receipts.version_1_until, leased_until);
    assert_eq!(first.lease.epoch, 8);
    drop(first.guard);
    let again = loop {
        match take_over(&database, 1).await {
            Ok(again) => break again,
            // The server has yet to notice that the first has gone.
            Err(StoreError::AlreadyActive(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(again.receipts, first.receipts, "for good");
    let fresh = Sale::open(1).await;
    assert_ne!(fresh.taken.receipts.database, first.receipts.database);
    assert_eq!(fresh.taken.receipts.version_1_until, UnixMillis(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_migrate_together_do_it_once() {
    let test = TestDatabase::create().await;
    let mut processes = Vec::new();
    for _ in 0..4 {
        let (_, mut client) = at(test.config(), "shop").await;
        processes.push(tokio::spawn(async move {
            schema::migrate(&mut client, "shop").await
        }));
    }
    let mut applied = 0;
    for process in processes {
        applied += usize::from(process.await.unwrap().unwrap() > 0);
    }
    assert_eq!(applied, 1);
}

#[tokio::test]
async fn a_schema_of_another_release_is_told_from_ours() {
    let sale = Sale::open(1).await;
    let (_, mut client) = at(sale.config.clone(), "millrace").await;
    sale.sql(
        "INSERT INTO refinery_schema_history VALUES (9999, 'later', '2030-01-01T00:00:00Z', '1')",
    )
    .await;
    let newer = refusal(schema::check(&mut client, "millrace").await);
    assert!(newer.contains("newer"), "{newer}");
    refusal(schema::migrate(&mut client, "millrace").await);
    sale.sql("DELETE FROM refinery_schema_history").await;
    let older = refusal(schema::check(&mut client, "millrace").await);
    assert!(older.contains("older"), "{older}");
}

#[tokio::test]
async fn relations_that_are_not_ours_are_left_alone() {
    let test = TestDatabase::create().await;
    let (_, mut client) = at(test.config(), "shop").await;
    for theirs in [
        "CREATE TABLE shop.orders (id int)",
        "CREATE VIEW shop.v AS SELECT 1",
        "CREATE MATERIALIZED VIEW shop.m AS SELECT 1",
        "CREATE TABLE shop.p (id int) PARTITION BY RANGE (id)",
    ] {
        client
            .batch_execute(&format!("CREATE SCHEMA shop; {theirs}"))
            .await
            .unwrap();
        let refused = refusal(schema::migrate(&mut client, "shop").await);
        assert!(refused.contains("database.schema"), "{refused}");
        let left = client
            .query_one(
                "SELECT count(*) FROM pg_class WHERE relnamespace = 'shop'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')",
                &[],
            )
            .await
            .unwrap();
        assert_eq!(left.get::<_, i64>(0), 1, "{theirs}");
        client
            .batch_execute("DROP SCHEMA shop CASCADE")
            .await
            .unwrap();
    }
    // An empty one will do.
    client.batch_execute("CREATE SCHEMA shop").await.unwrap();
    schema::migrate(&mut client, "shop").await.unwrap();
}

#[tokio::test]
async fn the_printed_sql_makes_what_migrate_would() {
    let (by_hand, by_us) = (TestDatabase::create().await, TestDatabase::create().await);
    by_hand
        .connect()
        .await
        .batch_execute(&schema::print("shop"))
        .await
        .unwrap();
    let (_, mut printed) = at(by_hand.config(), "shop").await;
    let (_, mut migrated) = at(by_us.config(), "shop").await;
    schema::migrate(&mut migrated, "shop").await.unwrap();
    let shape = "SELECT string_agg(concat_ws(' ', table_name, column_name, data_type, is_nullable, column_default), ', '
                        ORDER BY table_name, ordinal_position)
                   FROM information_schema.columns WHERE table_schema = 'shop'";
    let (one, two) = (
        printed.query_one(shape, &[]).await.unwrap(),
        migrated.query_one(shape, &[]).await.unwrap(),
    );
    assert_eq!(one.get::<_, &str>(0), two.get::<_, &str>(0));
    // Whoever ran it by hand goes on as if we had: with `never` and with `auto`.
    schema::check(&mut printed, "shop").await.unwrap();
    assert_eq!(schema::migrate(&mut printed, "shop").await.unwrap(), 0);
}

#[tokio::test]
async fn a_role_without_privileges_suffices() {
    let test = TestDatabase::create().await;
    let name = test.config().get_dbname().unwrap().to_owned();
    let admin = test.connect().await;
    // Roles are shared by every database of the server.
    let (owner, guest) = (format!("owner_{name}"), format!("guest_{name}"));
    admin
        .batch_execute(&format!(
            "CREATE ROLE {owner} LOGIN; CREATE ROLE {guest} LOGIN;
             GRANT CREATE ON DATABASE {name} TO {owner};
             CREATE SCHEMA guests AUTHORIZATION {guest}"
        ))
        .await
        .unwrap();
    // One may make its schema; for the other an administrator has made it.
    for (role, schema, publishes) in [(&owner, "own", true), (&guest, "guests", false)] {
        let mut config = test.config();
        config.user(role);
        let (database, mut client) = at(config, schema).await;
        schema::migrate(&mut client, schema).await.unwrap();
        schema::check(&mut client, schema).await.unwrap();
        let published = client
            .query_one(
                "SELECT EXISTS (SELECT FROM pg_publication_tables WHERE schemaname = $1)",
                &[&schema],
            )
            .await
            .unwrap();
        assert_eq!(published.get::<_, bool>(0), publishes);

        let taken = take_over(&database, 1).await.unwrap();
        let sku = millrace::order::SkuId::new("A").unwrap();
        let terms = millrace::state::stock::SaleTerms {
            title: "A".into(),
            unit_price: 1,
            currency: millrace::order::Currency::new("EUR").unwrap(),
            per_user_limit: None,
            opens_at: None,
            closes_at: None,
            waitlist: millrace::state::stock::WaitlistTerms::default(),
            draw: None,
        };
        let sku = postgres::skus::put(&database, taken.lease, &sku, &terms, 10)
            .await
            .unwrap();
        let mut writer = millrace::store::batch::BatchWriter::new(database.clone(), taken.lease, 0);
        writer.write(&refs(&orders(&sku, 2))).await.unwrap();
        writer
            .write_dead_letter(&order(&sku, 1), "23514", "x")
            .await
            .unwrap();
        assert_eq!(postgres::audit::run(&database).await.unwrap().orders, 2);
    }
    admin
        .batch_execute(&format!(
            "DROP PUBLICATION IF EXISTS millrace; DROP OWNED BY {owner}, {guest}; DROP ROLE {owner}, {guest}"
        ))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_database_in_another_encoding_is_refused_in_one_sentence() {
    let cluster = Cluster::shared().await;
    let postgres = cluster.embedded().config("postgres");
    let admin = connect(&postgres).await;
    admin
        .batch_execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")
        .await
        .unwrap();
    let (_, mut client) = at(cluster.embedded().config("latin"), "millrace").await;
    for refused in [
        refusal(schema::migrate(&mut client, "millrace").await.map(|_| ())),
        refusal(schema::check(&mut client, "millrace").await),
    ] {
        assert!(
            refused.contains("LATIN1") && refused.contains("UTF8"),
            "{refused}"
        );
    }
    cluster.embedded().drop_database("latin").await.unwrap();
}

#[tokio::test]
async fn the_views_say_every_status_and_every_counter_in_words() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let mut writer = sale.writer(0);
    let stored: Vec<OrderStatus> = OrderStatus::ALL
        .into_iter()
        .filter(|status| status.code().is_some())
        .collect();
    let batch = orders(&sku, stored.len());
    writer.write(&refs(&batch)).await.unwrap();
    let failed = order(&sku, 1);
    writer
        .write_dead_letter(&failed, "23514", "x")
        .await
        .unwrap();
    for (order, status) in batch.iter().zip(&stored) {
        let (code, id) = (status.code().unwrap(), order.id);
        sale.sql(&format!(
            "UPDATE orders SET status = {code} WHERE order_id = {id}"
        ))
        .await;
        let found = postgres::orders::find(&sale.database, id)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(found.status, *status);
    }
    let session = sale.session().await;
    let rows = session
        .query("SELECT order_id, status FROM order_list", &[])
        .await
        .unwrap();
    assert_eq!(rows.len(), stored.len() + 1);
    for row in rows {
        let (id, word): (i64, &str) = (row.get(0), row.get(1));
        let at = batch.iter().position(|order| order.id.as_i64() == id);
        let expected = at.map_or(OrderStatus::Failed, |at| stored[at]);
        assert_eq!(word, expected.as_str());
    }
    let mut read = 0;
    postgres::orders::read_all(&sale.database, |_| read += 1)
        .await
        .unwrap();
    assert_eq!(read, stored.len() + 1);

    // A code that no status has is reported, not shown as something else.
    let first = batch[0].id;
    sale.sql(&format!(
        "UPDATE orders SET status = 99 WHERE order_id = {first}"
    ))
    .await;
    let unknown = postgres::orders::find(&sale.database, first).await;
    assert!(matches!(unknown, Err(StoreError::Data(_))), "{unknown:?}");

    sale.sql("UPDATE sku SET sold = 2").await;
    let row = session
        .query_one(
            "SELECT sku_id, title, unit_price, currency, total, free, held, sold, per_user_limit, paused FROM sku_list",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "A");
    assert_eq!(row.get::<_, &str>(1), "A, the best");
    let figures: Vec<i64> = [2, 4, 5, 6, 7].map(|at| row.get(at)).into();
    let held = stored.len() as i64;
    assert_eq!(figures, [100, 100, 98 - held, held, 2]);
    assert_eq!(row.get::<_, &str>(3), "EUR");
    assert_eq!(row.get::<_, Option<i64>>(8), None);
    assert!(!row.get::<_, bool>(9));
}
