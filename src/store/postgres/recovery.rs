//! What start-up reads back into memory.

use futures_util::{StreamExt, pin_mut};

use super::Database;
use crate::order::{
    Currency, KeyHash, OrderId, OrderStatus, PayloadHash, Quantity, SkuId, SkuNumber, UnixMillis,
    UserId,
};
use crate::state::buyers::Remembered;
use crate::state::stock::{SaleTerms, Sku, StockCounter};
use crate::store::StoreError;

fn data(what: impl std::fmt::Display) -> StoreError {
    StoreError::Data(what.to_string())
}

/// A SKU's row as it stands in the database. See `V1__orders_and_stock.sql`.
pub(super) const SKU_COLUMNS: &str = "id, sku_id, title, unit_price, currency, total, held, sold, per_user_limit,
    (extract(epoch FROM opens_at) * 1000)::int8, (extract(epoch FROM closes_at) * 1000)::int8, paused";

pub(super) fn sku_from_row(row: &tokio_postgres::Row) -> Result<Sku, StoreError> {
    let name: &str = row.get(1);
    let units = |index: usize| -> Result<u32, StoreError> {
        u32::try_from(row.get::<_, i64>(index))
            .map_err(|_| data(format!("sku {name}: a counter is out of range")))
    };
    let (total, held, sold) = (units(5)?, units(6)?, units(7)?);
    if held.checked_add(sold).is_none_or(|taken| taken > total) {
        return Err(data(format!(
            "sku {name}: held {held} + sold {sold} exceed total {total}"
        )));
    }
    let terms = SaleTerms {
        title: row.get(2),
        unit_price: row.get(3),
        currency: Currency::new(row.get(4))
            .map_err(|e| data(format!("sku {name}: currency {e}")))?,
        per_user_limit: row
            .get::<_, Option<i64>>(8)
            .and_then(|limit| u32::try_from(limit).ok()),
        opens_at: row.get::<_, Option<i64>>(9).map(UnixMillis),
        closes_at: row.get::<_, Option<i64>>(10).map(UnixMillis),
    };
    let id = SkuId::new(name).map_err(|e| data(format!("sku {name}: {e}")))?;
    Ok(Sku::new(
        id,
        SkuNumber(row.get(0)),
        terms,
        StockCounter::new(total, held, sold),
        row.get(11),
    ))
}

impl Database {
    /// Every SKU with its counters.
    ///
    /// # Errors
    /// Where a row contradicts itself, and what the database says.
    pub async fn load_skus(&self) -> Result<Vec<Sku>, StoreError> {
        let client = self.pooled().await?;
        let rows = client
            .query(&format!("SELECT {SKU_COLUMNS} FROM sku ORDER BY id"), &[])
            .await
            .map_err(StoreError::statement("reading the SKUs"))?;
        rows.iter().map(sku_from_row).collect()
    }

    /// Hands every order from `floor` on, dead letters and parked ones included, to `remember`, so that keys and
    /// limits hold over a restart; with the moment until which it is to be paid, where it is.
    /// Returns how many there were.
    ///
    /// # Errors
    /// Where a row cannot be one of ours, and what the database says.
    pub async fn load_window(
        &self,
        floor: OrderId,
        mut remember: impl FnMut(UserId, Remembered, Option<UnixMillis>),
    ) -> Result<u64, StoreError> {
        let client = self.pooled().await?;
        let live = OrderStatus::ALL
            .into_iter()
            .filter(|status| status.is_live())
            .filter_map(OrderStatus::code)
            .collect::<Vec<i16>>();
        let rows = client
            .query_raw(
                "SELECT order_id, user_id, sku, quantity, decode(replace(key_hash::text, '-', ''), 'hex'), payload_hash,
                        status = ANY ($2::int2[]),
                        CASE WHEN status = 1 THEN (extract(epoch FROM expires_at) * 1000)::int8 END
                   FROM orders WHERE order_id >= $1
                 UNION ALL
                 SELECT order_id, user_id, sku, quantity, decode(replace(key_hash::text, '-', ''), 'hex'), payload_hash,
                        false, NULL
                   FROM dead_letters WHERE order_id >= $1
                 UNION ALL
                 SELECT order_id, user_id, sku, quantity, decode(replace(key_hash::text, '-', ''), 'hex'), payload_hash,
                        true, NULL
                   FROM parked_orders",
                [&floor.as_i64() as &(dyn tokio_postgres::types::ToSql + Sync), &live],
            )
            .await
            .map_err(StoreError::statement("reading the idempotency window"))?;
        pin_mut!(rows);
        let mut count = 0;
        while let Some(row) = rows.next().await {
            let row = row.map_err(StoreError::statement("reading the idempotency window"))?;
            let raw: i64 = row.get(0);
            let order_id = OrderId::from_i64(raw).ok_or_else(|| data(format!("order id {raw}")))?;
            let user_id =
                UserId::new(row.get(1)).map_err(|e| data(format!("order {raw}: user_id {e}")))?;
            let quantity = u32::try_from(row.get::<_, i32>(3))
                .ok()
                .and_then(Quantity::new)
                .ok_or_else(|| data(format!("order {raw}: quantity")))?;
            let key = row
                .get::<_, Option<&[u8]>>(4)
                .and_then(|bytes| bytes.try_into().ok())
                .map(KeyHash);
            remember(
                user_id,
                Remembered {
                    order_id,
                    key,
                    payload: PayloadHash(row.get::<_, i64>(5) as u64),
                    sku: SkuNumber(row.get(2)),
                    quantity,
                    live: row.get(6),
                },
                row.get::<_, Option<i64>>(7).map(UnixMillis),
            );
            count += 1;
        }
        Ok(count)
    }
}
