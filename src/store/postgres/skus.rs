//! Administration of SKUs. Every change of a counter is entered in the stock log with its cause, in the same
//! transaction.

use tokio_postgres::Transaction;

use super::recovery::{SKU_COLUMNS, sku_from_row};
use super::transitions::fence;
use super::{Database, NodeLease};
use crate::order::SkuId;
use crate::state::stock::{SaleTerms, Sku};
use crate::store::StoreError;

/// Locks the terms and total of a SKU, which need not exist yet, until the transaction ends. Workers, which
/// move its counters, are not blocked.
async fn lock(
    transaction: &Transaction<'_>,
    schema: &str,
    id: &SkuId,
) -> Result<(), tokio_postgres::Error> {
    let name = format!("millrace sku:{schema}:{id}");
    transaction
        .execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
            &[&name],
        )
        .await
        .map(|_| ())
}

impl Database {
    /// Creates a SKU or replaces its terms and total, and returns its new state.
    ///
    /// # Errors
    /// [`StoreError::Statement`] with a CHECK violation if the total would fall below the units that orders
    /// have taken, [`StoreError::Fenced`] if this process may not write any more.
    pub async fn put_sku(
        &self,
        lease: NodeLease,
        id: &SkuId,
        terms: &SaleTerms,
        total: u32,
    ) -> Result<Sku, StoreError> {
        let doing = "storing a SKU";
        let mut client = self.pooled().await?;
        let work = async {
            let transaction = client.transaction().await?;
            if !fence(&transaction, lease).await? {
                return Ok(None);
            }
            lock(&transaction, self.schema(), id).await?;
            let before: i64 = transaction
                .query_opt(
                    "SELECT total FROM sku WHERE sku_id = $1 FOR UPDATE",
                    &[&id.as_str()],
                )
                .await?
                .map_or(0, |row| row.get(0));
            let row = transaction
                .query_one(
                    &format!(
                        "INSERT INTO sku (sku_id, title, unit_price, currency, total, per_user_limit, opens_at, closes_at)
                         VALUES ($1, $2, $3, $4, $5, $6, to_timestamp($7::int8 / 1000.0), to_timestamp($8::int8 / 1000.0))
                         ON CONFLICT (sku_id) DO UPDATE SET title = excluded.title, unit_price = excluded.unit_price,
                             currency = excluded.currency, total = excluded.total, per_user_limit = excluded.per_user_limit,
                             opens_at = excluded.opens_at, closes_at = excluded.closes_at
                         RETURNING {SKU_COLUMNS}"
                    ),
                    &[
                        &id.as_str(),
                        &terms.title,
                        &terms.unit_price,
                        &terms.currency.as_str(),
                        &i64::from(total),
                        &terms.per_user_limit.map(i64::from),
                        &terms.opens_at.map(|at| at.0),
                        &terms.closes_at.map(|at| at.0),
                    ],
                )
                .await?;
            transaction
                .execute(
                    "INSERT INTO stock_log (sku, cause, reference, total_delta, total_after, held_after, sold_after)
                     SELECT id, 'admin', 'put', total - $2, total, held, sold FROM sku WHERE sku_id = $1",
                    &[&id.as_str(), &before],
                )
                .await?;
            transaction.commit().await?;
            Ok(Some(row))
        };
        match self.timed(doing, work).await? {
            Some(row) => sku_from_row(&row),
            None => Err(StoreError::Fenced {
                found: 0,
                ours: lease.epoch,
            }),
        }
    }

    /// Stores whether a SKU is paused. Returns false if there is no such SKU.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn set_sku_paused(&self, id: &SkuId, paused: bool) -> Result<bool, StoreError> {
        let mut client = self.pooled().await?;
        let work = async {
            let transaction = client.transaction().await?;
            let changed = transaction
                .execute(
                    "UPDATE sku SET paused = $2 WHERE sku_id = $1",
                    &[&id.as_str(), &paused],
                )
                .await?;
            transaction.commit().await?;
            Ok(changed == 1)
        };
        self.timed("pausing a SKU", work).await
    }

    /// A SKU's row. Waits for earlier changes of its terms or total that are under way.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn committed_sku(&self, id: &SkuId) -> Result<Option<Sku>, StoreError> {
        let mut client = self.pooled().await?;
        let work = async {
            let transaction = client.transaction().await?;
            lock(&transaction, self.schema(), id).await?;
            let row = transaction
                .query_opt(
                    &format!("SELECT {SKU_COLUMNS} FROM sku WHERE sku_id = $1"),
                    &[&id.as_str()],
                )
                .await?;
            transaction.commit().await?;
            Ok(row)
        };
        let row = self.timed("looking a SKU up", work).await?;
        row.as_ref().map(sku_from_row).transpose()
    }

    /// Stores whether every sale is paused.
    ///
    /// # Errors
    /// If the database does not answer; [`StoreError::Fenced`] if this process may not write any more.
    pub async fn set_all_paused(&self, lease: NodeLease, paused: bool) -> Result<(), StoreError> {
        let mut client = self.pooled().await?;
        let work = async {
            let transaction = client.transaction().await?;
            let changed = transaction
                .execute(
                    "UPDATE node SET paused = $2 WHERE node = $1 AND epoch = $3",
                    &[&lease.node, &paused, &lease.epoch],
                )
                .await?;
            transaction.commit().await?;
            Ok(changed)
        };
        let changed = self.timed("pausing every sale", work).await?;
        if changed == 1 {
            return Ok(());
        }
        Err(StoreError::Fenced {
            found: 0,
            ours: lease.epoch,
        })
    }

    /// Changes a SKU's total by `units`, at most once for each `request_key`.
    ///
    /// # Errors
    /// A CHECK violation if the total would fall below the units that orders have taken, or the database's
    /// error.
    pub async fn restock(
        &self,
        lease: NodeLease,
        id: &SkuId,
        units: i64,
        request_key: Option<&str>,
    ) -> Result<(), StoreError> {
        let mut client = self.pooled().await?;
        let work = async {
            let transaction = client.transaction().await?;
            if !fence(&transaction, lease).await? {
                return Ok(false);
            }
            lock(&transaction, self.schema(), id).await?;
            transaction
                .execute(
                    "WITH moved AS (
                         UPDATE sku SET total = total + $2 WHERE sku_id = $1 RETURNING id, total, held, sold
                     )
                     INSERT INTO stock_log (sku, cause, reference, total_delta, total_after, held_after, sold_after,
                                                request_key)
                     SELECT id, 'admin', 'restock', $2, total, held, sold, $3 FROM moved",
                    &[&id.as_str(), &units, &request_key],
                )
                .await?;
            transaction.commit().await?;
            Ok(true)
        };
        match self.timed("restocking", work).await? {
            true => Ok(()),
            false => Err(StoreError::Fenced {
                found: 0,
                ours: lease.epoch,
            }),
        }
    }

    /// The change of a SKU's total by an earlier request under this key, if there was one.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn restocked(
        &self,
        id: &SkuId,
        request_key: &str,
    ) -> Result<Option<i64>, StoreError> {
        let client = self.pooled().await?;
        let row = self
            .timed(
                "looking a restock up",
                client.query_opt(
                    "SELECT j.total_delta FROM stock_log j JOIN sku s ON s.id = j.sku
                      WHERE s.sku_id = $1 AND j.request_key = $2",
                    &[&id.as_str(), &request_key],
                ),
            )
            .await?;
        Ok(row.map(|row| row.get(0)))
    }

    /// A SKU's total in the database.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn total_of(&self, id: &SkuId) -> Result<Option<u32>, StoreError> {
        let client = self.pooled().await?;
        let row = self
            .timed(
                "reading a total",
                client.query_opt("SELECT total FROM sku WHERE sku_id = $1", &[&id.as_str()]),
            )
            .await?;
        Ok(row.and_then(|row| u32::try_from(row.get::<_, i64>(0)).ok()))
    }
}
