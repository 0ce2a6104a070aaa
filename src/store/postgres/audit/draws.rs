//! Whether units of draws went out by rank.

use std::collections::BTreeSet;

use super::session::Session;
use crate::store::StoreError;

/// SKUs with an entry that waits, although units went to one behind it for which at least as many were needed. Both
/// are reduced to one row for each quantity, so that all entries are read once.
const OVERTAKEN: &str = "
    WITH entries AS MATERIALIZED (
        SELECT p.sku, p.place, p.quantity, o.status, o.assigned_at
          FROM draw_places p JOIN orders o ON o.order_id = p.order_id
    ), waiting AS (
        SELECT sku, quantity, min(place) AS first FROM entries WHERE status = 7 GROUP BY sku, quantity
    ), served AS (
        SELECT sku, quantity, max(place) AS last FROM entries WHERE assigned_at IS NOT NULL GROUP BY sku, quantity
    )
    SELECT DISTINCT w.sku FROM waiting w JOIN served s ON s.sku = w.sku
     WHERE s.quantity >= w.quantity AND s.last > w.first";

pub(super) async fn overtaken(session: &Session) -> Result<BTreeSet<i32>, StoreError> {
    let rows = session.query(OVERTAKEN, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
