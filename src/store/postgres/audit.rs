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
    /// Where the journal and the counters part: between which entries, and by how many units. At
    /// most [`GAPS_MAX`] of them.
    pub gaps: Vec<String>,
}

/// Gaps that are told of one SKU.
pub const GAPS_MAX: usize = 5;

/// Where counters changed without an entry: before an entry (its counters do not follow from the
/// entry before it), or after the last one (the row has moved on without one).
const GAPS: &str = "
    WITH steps AS (
        SELECT sku, id, at, cause, reference, lag(id) OVER w AS earlier,
               total_after - coalesce(lag(total_after) OVER w, 0) - total_delta AS total,
               held_after - coalesce(lag(held_after) OVER w, 0) - held_delta AS held,
               sold_after - coalesce(lag(sold_after) OVER w, 0) - sold_delta AS sold
          FROM stock_journal WINDOW w AS (PARTITION BY sku ORDER BY id)
    ), newest AS (
        SELECT DISTINCT ON (sku) sku, id, at, cause, reference, total_after, held_after, sold_after
          FROM stock_journal ORDER BY sku, id DESC
    ), gaps AS (
        SELECT sku, id, total, held, sold,
               format('before entry %s (%s %s at %s)', id, cause, reference, at::timestamptz(0)) AS place
          FROM steps WHERE (total, held, sold) <> (0, 0, 0)
        UNION ALL
        SELECT s.id, n.id, s.total - n.total_after, s.held - n.held_after, s.sold - n.sold_after,
               format('after the last entry %s (%s %s at %s)', n.id, n.cause, n.reference, n.at::timestamptz(0))
          FROM sku s JOIN newest n ON n.sku = s.id
         WHERE (s.total, s.held, s.sold) <> (n.total_after, n.held_after, n.sold_after)
    )
    SELECT s.sku_id, format('%s: total %s, held %s, sold %s without an entry', g.place,
                            to_char(g.total, 'FMSG9999999990'), to_char(g.held, 'FMSG9999999990'),
                            to_char(g.sold, 'FMSG9999999990'))
      FROM gaps g JOIN sku s ON s.id = g.sku ORDER BY s.sku_id, g.id";

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
        let gaps = transaction
            .query(GAPS, &[])
            .await
            .map_err(StoreError::statement(doing))?;
        let gaps_of = |sku_id: &str| -> Vec<String> {
            let of_sku = gaps.iter().filter(|row| row.get::<_, &str>(0) == sku_id);
            of_sku.take(GAPS_MAX).map(|row| row.get(1)).collect()
        };
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
                    gaps: gaps_of(row.get(0)),
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
