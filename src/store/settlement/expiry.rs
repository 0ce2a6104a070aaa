//! Orders that were not paid in time.

use super::statements::{Change, Changes, Sql};
use super::{Moved, MovedTo, SettlementWriter};
use crate::faults::bug;
use crate::order::{OrderId, SkuNumber, UnixMillis};
use crate::store::StoreError;

impl SettlementWriter {
    /// Expires the unpaid orders of the ids `from` to `to` that are past their time at `now`, at
    /// most `limit` of them, the oldest first, and gives their units back. `with_orphans`: some
    /// of them may have been paid in time, by payments that still wait for their order. `sku`: of
    /// this one only.
    ///
    /// # Errors
    /// Nothing has changed then.
    pub async fn expire(
        &mut self,
        from: OrderId,
        to: OrderId,
        now: UnixMillis,
        limit: i64,
        with_orphans: bool,
        sku: Option<SkuNumber>,
    ) -> Result<Vec<Moved>, StoreError> {
        let with_orphans = with_orphans && !bug("expire_what_is_paid");
        self.transact("expiring orders", async |client, statements| {
            let rows = client
                .query(
                    statements.of(client, Sql::Expire).await?,
                    &[
                        &from.as_i64(),
                        &to.as_i64(),
                        &now.0,
                        &limit,
                        &with_orphans,
                        &sku.map(|sku| sku.0),
                    ],
                )
                .await?;
            let (mut changes, mut moved) = (Changes::default(), Vec::with_capacity(rows.len()));
            for row in &rows {
                let (sku, quantity) = (SkuNumber(row.get(2)), row.get::<_, i32>(3));
                changes.add(
                    sku,
                    Change {
                        held: -i64::from(quantity),
                        ..Change::default()
                    },
                );
                if let Some(order_id) = OrderId::from_i64(row.get(0)) {
                    moved.push(Moved {
                        order_id,
                        user_id: row.get(1),
                        sku,
                        quantity: u32::try_from(quantity).unwrap_or(0),
                        to: MovedTo::Free,
                    });
                }
            }
            moved.sort_unstable_by_key(|moved| moved.order_id);
            let reference = format!("{} orders from {from}", moved.len());
            statements
                .move_counters(client, &[("expired", changes)], &reference)
                .await?;
            Ok(moved)
        })
        .await
    }
}
