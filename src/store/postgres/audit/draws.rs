//! Whether units of draws went out by rank.

use std::collections::BTreeSet;

use super::session::Session;
use crate::store::StoreError;

/// SKUs with an entry that waits, although units went to one behind it for which at least as many were needed. Both
/// are reduced to one row for each quantity, so that all entries are read once. An entry of a node's lane for which the units are
/// in the pool is about to have them.
const OVERTAKEN: &str = "
    WITH covered AS MATERIALIZED (
        SELECT e.order_id FROM (SELECT order_id, sku, sum(units) OVER (PARTITION BY sku ORDER BY turn) AS units
                                  FROM waitlist_entries) e
          JOIN sku s ON s.id = e.sku WHERE e.units <= s.total - s.held - s.sold - s.lent
           AND EXISTS (SELECT FROM lane WHERE node IS NOT NULL)
    ), entries AS MATERIALIZED (
        SELECT p.sku, p.order_id, p.place, p.quantity, o.status, o.assigned_at
          FROM draw_places p JOIN orders o ON o.order_id = p.order_id
    ), waiting AS (
        SELECT sku, quantity, min(place) AS first FROM entries
         WHERE status = 7 AND order_id NOT IN (SELECT order_id FROM covered) GROUP BY sku, quantity
    ), served AS (
        SELECT sku, quantity, max(place) AS last FROM entries WHERE assigned_at IS NOT NULL GROUP BY sku, quantity
    )
    SELECT DISTINCT w.sku FROM waiting w JOIN served s ON s.sku = w.sku
     WHERE s.quantity >= w.quantity AND s.last > w.first";

pub(super) async fn overtaken(session: &Session) -> Result<BTreeSet<i32>, StoreError> {
    let rows = session.query(OVERTAKEN, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
