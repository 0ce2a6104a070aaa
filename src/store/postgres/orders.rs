//! Look-ups of single orders.

use super::Database;
use crate::order::{OrderId, OrderStatus, UnixMillis};
use crate::store::StoreError;

/// An order as it stands in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredOrder {
    /// Its id.
    pub id: OrderId,
    /// Who bought.
    pub user_id: String,
    /// What was bought.
    pub sku_id: String,
    /// How many units.
    pub quantity: u32,
    /// What the shop added or took off, in minor units.
    pub adjustment: i64,
    /// The amount in minor units.
    pub amount: i64,
    /// Its currency.
    pub currency: String,
    /// Where it stands.
    pub status: OrderStatus,
    /// When it was admitted.
    pub created_at: UnixMillis,
    /// When it stops being payable.
    pub expires_at: UnixMillis,
    /// The shop's own object.
    pub attributes: Option<String>,
}

impl Database {
    /// The order with this id, dead letters included.
    ///
    /// # Errors
    /// Where the database does not answer.
    pub async fn find_order(&self, id: OrderId) -> Result<Option<StoredOrder>, StoreError> {
        let client = self.pooled().await?;
        let statement = client
            .prepare_cached(
                "SELECT user_id, sku_id, quantity, adjustment, amount, currency, status,
                        (extract(epoch FROM created_at) * 1000)::int8, (extract(epoch FROM expires_at) * 1000)::int8,
                        attributes
                   FROM order_list WHERE order_id = $1",
            )
            .await
            .map_err(StoreError::statement("looking an order up"))?;
        let id_column = id.as_i64();
        let row = self
            .timed(
                "looking an order up",
                client.query_opt(&statement, &[&id_column]),
            )
            .await?;
        let Some(row) = row else { return Ok(None) };
        let word: Option<&str> = row.get(6);
        let status = word
            .and_then(OrderStatus::from_word)
            .ok_or_else(|| StoreError::Data(format!("order {id} has the status {word:?}")))?;
        Ok(Some(StoredOrder {
            id,
            user_id: row.get(0),
            sku_id: row.get(1),
            quantity: u32::try_from(row.get::<_, i32>(2)).unwrap_or(0),
            adjustment: row.get(3),
            amount: row.get(4),
            currency: row.get(5),
            status,
            created_at: UnixMillis(row.get(7)),
            expires_at: UnixMillis(row.get(8)),
            attributes: row.get(9),
        }))
    }
}
