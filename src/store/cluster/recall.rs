//! Lowering a total while units are lent: lending stops until the free ones are back.

use tokio_postgres::Transaction;

use super::shares::Pool;
use super::transact;
use crate::order::SkuNumber;
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease};

/// How a total is lowered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lowering {
    /// To so many units.
    To(i64),
    /// By so many units, whatever others have made of the total meanwhile.
    By(i64),
}

/// The outcome of lowering a total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lowered {
    /// It is the new total.
    Done,
    /// Free units are still lent; lending has stopped.
    Waiting,
    /// Orders have taken more than the new total; lending goes on.
    Refused {
        /// Units held and sold, in all shares and outside.
        committed: i64,
    },
}

/// Lowers a SKU's total, or takes a step towards it. The first call stops lending, so that free units come back.
/// Called again until it is [`Lowered::Done`], or given up with [`end_recall`]. `reference` and `request_key` are those of
/// its entry in the stock log.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn lower_total(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    lowering: Lowering,
    reference: &str,
    request_key: Option<&str>,
) -> Result<Lowered, StoreError> {
    let work = async |transaction: &Transaction<'_>| {
        let pool = Pool::lock(transaction, sku).await?;
        let row = transaction
            .query_one(
                "SELECT s.held + s.sold + s.lent, s.held + s.sold + coalesce(sum(o.held + o.sold), 0)::int8, s.total
                   FROM sku s LEFT JOIN stock_share o ON o.sku = s.id WHERE s.id = $1 GROUP BY s.id",
                &[&sku.0],
            )
            .await?;
        let (least, committed, before): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        let total = match lowering {
            Lowering::To(total) => total,
            Lowering::By(units) => before - units,
        };
        let lowered = match () {
            () if total >= least && pool.is_some_and(|pool| !pool.is_kept) => Lowered::Done,
            () if total < committed => Lowered::Refused { committed },
            () => Lowered::Waiting,
        };
        let (new, recall) = match lowered {
            Lowered::Done => (Some(total), None),
            Lowered::Waiting => (None, Some(total)),
            Lowered::Refused { .. } => (None, None),
        };
        transaction
            .execute(
                &lease.sql("WITH before AS (
                     SELECT total FROM sku WHERE id = $1
                 ), moved AS (
                     UPDATE sku SET total = coalesce($2, total), recall = $3,
                            waitlist_served = CASE WHEN $2 IS NULL THEN waitlist_served END
                      WHERE id = $1 RETURNING id, total, held, sold
                 )
                 INSERT INTO stock_log (sku, @columncause, reference, total_delta, total_after, held_after, sold_after,
                                            request_key)
                 SELECT m.id, @node'admin', $4, m.total - before.total, m.total, m.held, m.sold, $5
                   FROM moved m, before WHERE $2 IS NOT NULL"),
                &[&sku.0, &new, &recall, &reference, &request_key],
            )
            .await?;
        Ok(lowered)
    };
    transact(database, lease, "lowering a total", work).await
}

/// Gives up lowering a total: lending goes on.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn end_recall(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
) -> Result<(), StoreError> {
    let work = async |transaction: &Transaction<'_>| {
        transaction
            .execute("UPDATE sku SET recall = NULL WHERE id = $1", &[&sku.0])
            .await?;
        Ok(())
    };
    transact(database, lease, "giving a recall up", work).await
}
