//! The checker of `millrace::loadgen::checker`, with rows that are read from PostgreSQL.

use std::time::{Duration, Instant};

pub use millrace::loadgen::checker::*;

use crate::support::postgres::connect;

/// Compares with the database as it is now.
pub async fn compare(checker: &Checker, config: &tokio_postgres::Config) -> Findings {
    checker.check(&read_rows(config).await)
}

/// The same until nothing is wrong or `patience` is over, for a server that may still be writing orders that
/// it accepted.
pub async fn compare_until(
    checker: &Checker,
    config: &tokio_postgres::Config,
    patience: Duration,
) -> Findings {
    let deadline = Instant::now() + patience;
    loop {
        let findings = compare(checker, config).await;
        if findings.holds() || Instant::now() >= deadline {
            return findings;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Reads the three views.
pub async fn read_rows(config: &tokio_postgres::Config) -> StoredRows {
    let client = connect(config).await;
    client
        .batch_execute(
            "SET search_path = millrace; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        )
        .await
        .expect("begin");
    let rows = client
        .query(
            "SELECT order_id, user_id, sku_id, quantity, adjustment, amount, status, attributes, \
                    refund_reason FROM order_list",
            &[],
        )
        .await
        .expect("read order_list");
    let skus = client
        .query("SELECT sku_id, total, held, sold FROM sku_list", &[])
        .await
        .expect("read sku_list");
    let payments = client
        .query(
            "SELECT id, payment_id, order_ref, amount, currency, state, refund_reason FROM payment_list",
            &[],
        )
        .await
        .expect("read payment_list");
    let payment = |row: &tokio_postgres::Row| PaymentRow {
        id: row.get(0),
        payment: row.get(1),
        order: row.get(2),
        amount: row.get(3),
        currency: row.get(4),
        state: row.get(5),
        refund_reason: row.get(6),
    };
    let row = |row: &tokio_postgres::Row| OrderRow {
        order_id: row.get(0),
        user: row.get(1),
        sku: row.get(2),
        quantity: row.get::<_, i32>(3).into(),
        adjustment: row.get(4),
        amount: row.get(5),
        status: row.get(6),
        attributes: row
            .get::<_, Option<&str>>(7)
            .map(|text| serde_json::from_str(text).unwrap_or_default()),
        refund_reason: row.get(8),
    };
    let counters = |row: &tokio_postgres::Row| {
        let (total, held, sold) = (row.get(1), row.get(2), row.get(3));
        (row.get(0), SkuRow { total, held, sold })
    };
    StoredRows {
        orders: rows.iter().map(row).collect(),
        payments: payments.iter().map(payment).collect(),
        skus: skus.iter().map(counters).collect(),
    }
}
