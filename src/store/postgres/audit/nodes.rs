//! Whether the share of each node holds the units of its lanes' orders, and their waiting lists were served in turn.

use std::collections::{BTreeMap, BTreeSet};

use super::session::{Session, sum};
use crate::store::StoreError;

/// Unpaid units above an id, by SKU and by the node whose share holds them: the owner of the buyer's lane, or a dead node
/// whose log the lane waits for.
const HELD: &str = "
    WITH part AS MATERIALIZED (
        SELECT order_id, sku, quantity, status, user_id FROM orders WHERE order_id > $1 ORDER BY order_id LIMIT $2
    )
    SELECT part.sku, coalesce(l.blocked_by, l.node), count(*), max(part.order_id),
           coalesce(sum(part.quantity) FILTER (WHERE part.status = 1), 0)::int8
      FROM part JOIN lane l ON l.lane = get_byte(sha256(convert_to(part.user_id, 'UTF8')), 0) >> 2
     GROUP BY 1, 2";

/// While nodes sell: SKUs whose first entry still waits, although a later one was served while nobody might be passed over, and although the
/// pool has not the units for it, which were there then.
const OVERTAKEN: &str = "
    SELECT s.id FROM sku s, LATERAL (
        SELECT units FROM waitlist_entries e WHERE e.sku = s.id AND e.turn < s.waitlist_served ORDER BY turn LIMIT 1) first
     WHERE first.units > s.total - s.held - s.sold - s.lent AND EXISTS (SELECT FROM lane WHERE node IS NOT NULL)";

pub(super) async fn overtaken(session: &Session) -> Result<Vec<i32>, StoreError> {
    let rows = session.query(OVERTAKEN, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// What may not change meanwhile: the shares, and which node has which lane.
const STANDING: &str = "
    SELECT sku, node, held, (SELECT sum(epoch)::int8 FROM lane),
           EXISTS (SELECT FROM lane WHERE node IS NULL)
      FROM stock_share ORDER BY sku, node";

/// A share that holds other units than the orders of its lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misplaced {
    /// The node.
    pub node: i16,
    /// Units that its share holds.
    pub held: i64,
    /// Units of unpaid orders of its lanes.
    pub held_by_orders: i64,
}

type Held = BTreeMap<(i32, i16), i64>;

/// The shares that are wrong, by SKU. `None`: something moved meanwhile, or lanes have no owner.
pub(super) async fn misplaced(
    session: &mut Session,
) -> Result<Option<Vec<(i32, Misplaced)>>, StoreError> {
    let Some((before, epochs)) = standing(session).await? else {
        return Ok(None);
    };
    let statement = session.prepare(HELD).await?;
    let mut by_orders = Held::new();
    let mut above = 0_i64;
    loop {
        let part = session
            .part("orders", &statement, &[&above], sum::<2>, None)
            .await?;
        for row in &part.rows {
            above = above.max(row.get(3));
            *by_orders.entry((row.get(0), row.get(1))).or_default() += row.get::<_, i64>(4);
        }
        if part.is_last {
            break;
        }
    }
    if standing(session).await? != Some((before.clone(), epochs)) {
        return Ok(None);
    }
    let both: BTreeSet<_> = before.keys().chain(by_orders.keys()).collect();
    let of = |all: &Held, key| all.get(key).copied().unwrap_or(0);
    let wrong = both.into_iter().filter_map(|key| {
        let (held, held_by_orders) = (of(&before, key), of(&by_orders, key));
        let (sku, node) = *key;
        let misplaced = Misplaced {
            node,
            held,
            held_by_orders,
        };
        (held != held_by_orders).then_some((sku, misplaced))
    });
    Ok(Some(wrong.collect()))
}

/// What each share holds, and the sum of the lanes' epochs; `None` if lanes have no owner, or there are no shares.
async fn standing(session: &Session) -> Result<Option<(Held, i64)>, StoreError> {
    let rows = session.query(STANDING, &[]).await?;
    let Some(first) = rows.first().filter(|row| !row.get::<_, bool>(4)) else {
        return Ok(None);
    };
    let epochs = first.get(3);
    let held = rows
        .iter()
        .map(|row| ((row.get(0), row.get(1)), row.get(2)));
    Ok(Some((held.collect(), epochs)))
}
