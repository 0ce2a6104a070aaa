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
    /// Payments by state, currency and reason of a refund.
    pub payments: Vec<PaymentSum>,
    /// What contradicts itself among payments.
    pub payment_faults: PaymentFaults,
}

/// Payments of one state, currency and reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaymentSum {
    /// Where they stand.
    pub state: String,
    /// In which currency they are.
    pub currency: String,
    /// Why they have to go back, or went back.
    pub reason: Option<String>,
    /// How many.
    pub count: i64,
    /// Their sum in minor units, in decimal digits.
    pub amount: i128,
}

/// What contradicts itself among payments, each a number of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PaymentFaults {
    /// Messages that report a payment which is not there.
    pub events_without_payment: i64,
    /// Payments that no message reports.
    pub payments_without_event: i64,
    /// Orders that are paid, without exactly one matched payment of their amount.
    pub paid_without_payment: i64,
    /// Matched payments whose order is not paid.
    pub matched_without_paid_order: i64,
    /// Orders whose money has to go back, without a payment that has to.
    pub refund_due_without_payment: i64,
}

const PAYMENT_SUMS: &str = "
    SELECT state, currency, CASE WHEN state = 'orphan' OR state = 'matched' THEN NULL ELSE refund_reason END,
           count(*), sum(amount)::text
      FROM payments GROUP BY 1, 2, 3 ORDER BY 1, 2, 3";

const PAYMENT_FAULTS: &str = "
    SELECT (SELECT count(*) FROM payment_events e WHERE e.payment_id IS NOT NULL AND NOT EXISTS
               (SELECT FROM payments p WHERE (p.provider, p.payment_id) = (e.provider, e.payment_id))),
           (SELECT count(*) FROM payments p WHERE NOT EXISTS
               (SELECT FROM payment_events e WHERE (e.provider, e.payment_id) = (p.provider, p.payment_id))),
           (SELECT count(*) FROM orders o WHERE o.status = 2 AND 1 <> (SELECT count(*) FROM payments p
               WHERE p.order_id = o.order_id AND p.state = 'matched' AND p.amount = o.amount AND p.currency = o.currency)),
           (SELECT count(*) FROM payments p WHERE p.state = 'matched' AND NOT EXISTS
               (SELECT FROM orders o WHERE o.order_id = p.order_id AND o.status = 2)),
           (SELECT count(*) FROM order_rows o WHERE o.status = 'refund_due' AND NOT EXISTS
               (SELECT FROM payments p WHERE p.order_id = o.order_id AND p.state = 'refund_due'))";

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
        let sums = transaction
            .query(PAYMENT_SUMS, &[])
            .await
            .map_err(StoreError::statement(doing))?;
        let faults = transaction
            .query_one(PAYMENT_FAULTS, &[])
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
            payments: sums
                .iter()
                .map(|row| PaymentSum {
                    state: row.get(0),
                    currency: row.get(1),
                    reason: row.get(2),
                    count: row.get(3),
                    amount: row.get::<_, &str>(4).parse().unwrap_or_default(),
                })
                .collect(),
            payment_faults: PaymentFaults {
                events_without_payment: faults.get(0),
                payments_without_event: faults.get(1),
                paid_without_payment: faults.get(2),
                matched_without_paid_order: faults.get(3),
                refund_due_without_payment: faults.get(4),
            },
        })
    }
}
