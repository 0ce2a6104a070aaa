//! Reading SKUs back into memory at start-up. Orders are read by `window`.

use super::Database;
use crate::order::{Currency, SkuId, SkuNumber, UnixMillis};
use crate::state::stock::{SaleTerms, Sku, StockCounter};
use crate::store::StoreError;

fn data(what: impl std::fmt::Display) -> StoreError {
    StoreError::Data(what.to_string())
}

/// The columns of a SKU's row. See `V1__orders_and_stock.sql`.
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
    /// If a row contradicts itself, or the database's error.
    pub async fn load_skus(&self) -> Result<Vec<Sku>, StoreError> {
        let client = self.pooled().await?;
        let rows = client
            .query(&format!("SELECT {SKU_COLUMNS} FROM sku ORDER BY id"), &[])
            .await
            .map_err(StoreError::statement("reading the SKUs"))?;
        rows.iter().map(sku_from_row).collect()
    }
}
