//! The order id from which on ids name lanes.

use super::{Database, NodeLease};
use crate::order::{Cutover, OrderId};
use crate::store::StoreError;

/// Records that ids from `first` on name lanes, unless an earlier start has done so. Returns the cutover in force.
/// Every id of a release before lanes must lie below `first`.
///
/// # Errors
/// [`StoreError::Fenced`] if another process has taken the node over.
pub async fn note_cutover(
    database: &Database,
    lease: NodeLease,
    first: OrderId,
) -> Result<Cutover, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "noting from which order id on ids name lanes",
            client.query_opt(
                "UPDATE database_identity SET lanes_from = coalesce(lanes_from, $3)
                  WHERE EXISTS (SELECT FROM node WHERE node = $1 AND epoch = $2) RETURNING lanes_from",
                &[&lease.node, &lease.epoch, &first.as_i64()],
            ),
        )
        .await?;
    let noted: i64 = row.ok_or_else(|| lease.is_lost())?.get(0);
    OrderId::from_i64(noted).map(Cutover).ok_or_else(|| {
        StoreError::Data(format!(
            "database_identity.lanes_from is {noted}, which is no order id"
        ))
    })
}
