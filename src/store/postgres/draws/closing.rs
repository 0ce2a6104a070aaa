//! The end of entries at several nodes: each closes the draw for itself.

use tokio_postgres::{Error, Transaction};

use crate::order::SkuNumber;
use crate::store::StoreError;
use crate::store::postgres::transitions::fence;
use crate::store::postgres::{Database, NodeLease};

/// Notes that a node takes no entries any more, and that all that it took are rows.
///
/// # Errors
/// [`StoreError::Fenced`] if this process may not write any more, or the database's error.
pub async fn close(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
) -> Result<(), StoreError> {
    let doing = "closing a draw";
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        if !fence(&transaction, lease).await? {
            return Ok(false);
        }
        transaction
            .execute(
                "UPDATE draws SET closed_at = now() WHERE sku = $1 AND closed_at IS NULL",
                &[&sku.0],
            )
            .await?;
        transaction
            .execute(
                "INSERT INTO draw_closings (sku, node, epoch) VALUES ($1, $2, $3)
                 ON CONFLICT (sku, node) DO UPDATE SET epoch = excluded.epoch",
                &[&sku.0, &lease.node, &lease.epoch],
            )
            .await?;
        transaction.commit().await?;
        Ok(true)
    };
    match database.timed(doing, work).await? {
        true => Ok(()),
        false => Err(lease.is_lost()),
    }
}

/// Whether every node has closed the draw of a SKU under its present epoch, and no log may have an entry that is no row.
const IS_CLOSED_BY_ALL: &str = "
    SELECT NOT EXISTS (SELECT FROM node n WHERE n.state IN ('joining', 'active', 'dead') AND NOT EXISTS
                (SELECT FROM draw_closings c WHERE c.sku = $1 AND c.node = n.node AND c.epoch = n.epoch))
           AND NOT EXISTS (SELECT FROM lane WHERE node IS NULL OR blocked_by IS NOT NULL)";

pub(super) async fn is_closed_by_all(
    transaction: &Transaction<'_>,
    sku: SkuNumber,
) -> Result<bool, Error> {
    let row = transaction.query_one(IS_CLOSED_BY_ALL, &[&sku.0]).await?;
    Ok(row.get(0))
}
