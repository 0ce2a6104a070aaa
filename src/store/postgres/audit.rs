//! Every promise that the database can show, recomputed.

use super::Database;
use crate::store::StoreError;

/// What the rows say of one SKU beside what its counters say. All in units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkuAudit {
    /// The SKU.
    pub sku_id: String,
    /// `sku.total`.
    pub total: i64,
    /// `sku.held`.
    pub held: i64,
    /// `sku.sold`.
    pub sold: i64,
    /// Units of orders that are to be paid.
    pub held_by_orders: i64,
    /// Units of orders that are paid.
    pub sold_by_orders: i64,
    /// What the stock journal's changes add up to: total, held, sold.
    pub journal: (i64, i64, i64),
    /// Entries whose counters do not follow from the entry before: somebody edited the row.
    pub journal_breaks: i64,
}

/// What the database says, all from one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseAudit {
    /// Each SKU.
    pub skus: Vec<SkuAudit>,
    /// Rows of `orders`.
    pub orders: i64,
    /// Keys of one user that have more than one order.
    pub duplicated_keys: i64,
    /// Orders of a SKU that does not exist.
    pub orders_without_sku: i64,
    /// Dead letters.
    pub dead_letters: i64,
    /// Orders that are both a row and a dead letter.
    pub both_row_and_dead_letter: i64,
}

impl Database {
    /// Recomputes counters, keys and journal from the rows, in one snapshot. Reads every order.
    ///
    /// # Errors
    /// Where the database does not answer.
    pub async fn audit(&self) -> Result<DatabaseAudit, StoreError> {
        let doing = "auditing";
        let mut client = self.pooled().await?;
        let transaction = client
            .build_transaction()
            .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
            .read_only(true)
            .start()
            .await
            .map_err(StoreError::statement(doing))?;
        let skus = transaction
            .query(
                "WITH by_orders AS (
                     SELECT sku, sum(quantity) FILTER (WHERE status = 1) AS held,
                            sum(quantity) FILTER (WHERE status = 2) AS sold
                       FROM orders GROUP BY sku
                 ), steps AS (
                     SELECT sku, total_delta, held_delta, sold_delta,
                            coalesce(total_after - lag(total_after) OVER w, total_after) <> total_delta
                            OR coalesce(held_after - lag(held_after) OVER w, held_after) <> held_delta
                            OR coalesce(sold_after - lag(sold_after) OVER w, sold_after) <> sold_delta AS broken
                       FROM stock_journal WINDOW w AS (PARTITION BY sku ORDER BY id)
                 ), by_journal AS (
                     SELECT sku, sum(total_delta) AS total, sum(held_delta) AS held, sum(sold_delta) AS sold,
                            count(*) FILTER (WHERE broken) AS breaks
                       FROM steps GROUP BY sku
                 )
                 SELECT s.sku_id, s.total, s.held, s.sold, coalesce(o.held, 0)::int8, coalesce(o.sold, 0)::int8,
                        coalesce(j.total, 0)::int8, coalesce(j.held, 0)::int8, coalesce(j.sold, 0)::int8,
                        coalesce(j.breaks, 0)::int8
                   FROM sku s LEFT JOIN by_orders o ON o.sku = s.id LEFT JOIN by_journal j ON j.sku = s.id
                  ORDER BY s.sku_id",
                &[],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        let counts = transaction
            .query_one(
                "SELECT (SELECT count(*) FROM orders),
                        (SELECT count(*) FROM (SELECT FROM orders WHERE key_hash IS NOT NULL
                                                GROUP BY user_id, key_hash HAVING count(*) > 1) d),
                        (SELECT count(*) FROM orders o WHERE NOT EXISTS (SELECT FROM sku s WHERE s.id = o.sku)),
                        (SELECT count(*) FROM dead_letters),
                        (SELECT count(*) FROM dead_letters d WHERE EXISTS
                            (SELECT FROM orders o WHERE o.order_id = d.order_id))",
                &[],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        transaction
            .commit()
            .await
            .map_err(StoreError::statement(doing))?;
        Ok(DatabaseAudit {
            skus: skus
                .iter()
                .map(|row| SkuAudit {
                    sku_id: row.get(0),
                    total: row.get(1),
                    held: row.get(2),
                    sold: row.get(3),
                    held_by_orders: row.get(4),
                    sold_by_orders: row.get(5),
                    journal: (row.get(6), row.get(7), row.get(8)),
                    journal_breaks: row.get(9),
                })
                .collect(),
            orders: counts.get(0),
            duplicated_keys: counts.get(1),
            orders_without_sku: counts.get(2),
            dead_letters: counts.get(3),
            both_row_and_dead_letter: counts.get(4),
        })
    }
}
