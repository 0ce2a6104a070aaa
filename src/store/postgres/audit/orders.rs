//! Orders in parts: the units that they hold, and the payments that they need.

use std::collections::BTreeMap;

use super::session::{Also, Session, sum};
use super::stock::{Counters, SKUS, counters};
use crate::store::StoreError;

/// Orders above an id, by SKU. The LATERAL look-ups use an index whatever the statistics say.
const ORDERS: &str = "
    WITH part AS MATERIALIZED (
        SELECT order_id, sku, quantity, status, amount, currency, assigned_at,
               ((order_id >> 22) << 16) | (order_id & 65535) AS turn
          FROM orders WHERE order_id > $1 ORDER BY order_id LIMIT $2
    )
    SELECT part.sku, count(*), max(part.order_id),
           coalesce(sum(quantity) FILTER (WHERE status = 1), 0)::int8,
           coalesce(sum(quantity) FILTER (WHERE status = 2), 0)::int8,
           count(*) FILTER (WHERE status = 2 AND paid.found IS NULL),
           count(*) FILTER (WHERE status = 5 AND due.found IS NULL),
           count(*) FILTER (WHERE status = 7), min(part.turn) FILTER (WHERE status = 7),
           max(part.turn) FILTER (WHERE assigned_at >= coalesce(
               (SELECT s.waitlist_strict_since FROM sku s WHERE s.id = part.sku), '-infinity'))
      FROM part
      LEFT JOIN LATERAL (
          SELECT 1 AS found FROM payments p WHERE part.status = 2 AND p.order_id = part.order_id
             AND p.state = 'matched' AND p.amount = part.amount AND p.currency = part.currency LIMIT 1) paid ON true
      LEFT JOIN LATERAL (
          SELECT 1 AS found FROM payments p WHERE part.status = 5 AND p.order_id = part.order_id
             AND p.state = 'refund_due' LIMIT 1) due ON true
     GROUP BY part.sku";

/// Dead letters above a number.
const DEAD_LETTERS: &str = "
    WITH part AS MATERIALIZED (
        SELECT id, order_id, status FROM dead_letters WHERE id > $1 ORDER BY id LIMIT $2
    )
    SELECT count(*), coalesce(max(part.id), 0), count(row.found),
           count(*) FILTER (WHERE status = 5 AND due.found IS NULL)
      FROM part
      LEFT JOIN LATERAL (SELECT 1 AS found FROM orders o WHERE o.order_id = part.order_id LIMIT 1) row ON true
      LEFT JOIN LATERAL (
          SELECT 1 AS found FROM payments p WHERE part.status = 5 AND p.order_id = part.order_id
             AND p.state = 'refund_due' LIMIT 1) due ON true";

/// Units and rows of one SKU's orders.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Units {
    pub(super) orders: i64,
    pub(super) held: i64,
    pub(super) sold: i64,
    /// Rows that wait for units.
    pub(super) waiting: i64,
    /// The turn of the first of them.
    pub(super) first_waiting: Option<i64>,
    /// The turn of the last order that was assigned units while its list was strict.
    pub(super) last_assigned: Option<i64>,
    /// Whether an order still waits that joined before one that was served.
    pub(super) is_overtaken: bool,
}

/// The sums of the orders, and the counters at the moments at which the first and the last part was read (the
/// same moment if one part was enough).
pub(super) struct Orders<T> {
    pub(super) by_sku: BTreeMap<i32, Units>,
    pub(super) before: BTreeMap<i32, Counters>,
    pub(super) after: BTreeMap<i32, Counters>,
    /// The results of `look` before the snapshot of the last counters was taken, and after they were read.
    pub(super) looks: [T; 2],
    pub(super) orders: i64,
    pub(super) paid_without_payment: i64,
    pub(super) refund_due_without_payment: i64,
    /// The last id and the number of orders of each part, in order.
    pub(super) parts: Vec<(i64, i64)>,
}

pub(super) async fn read<T: Send>(
    session: &mut Session,
    mut look: impl FnMut() -> T + Send,
) -> Result<Orders<T>, StoreError> {
    let statement = session.prepare(ORDERS).await?;
    let skus = session.prepare(SKUS).await?;
    let mut by_sku: BTreeMap<i32, Units> = BTreeMap::new();
    let mut before: Option<BTreeMap<i32, Counters>> = None;
    let mut parts = Vec::new();
    let (mut paid_without_payment, mut refund_due_without_payment) = (0, 0);
    let mut above = 0_i64;
    let mut looks = Vec::new();
    loop {
        looks.clear();
        let also = Also {
            statement: &skus,
            always: before.is_none(),
            look: &mut || looks.push(look()),
        };
        let part = session
            .part("orders", &statement, &[&above], sum::<1>, Some(also))
            .await?;
        for row in &part.rows {
            let units = by_sku.entry(row.get(0)).or_default();
            units.orders += row.get::<_, i64>(1);
            above = above.max(row.get(2));
            units.held += row.get::<_, i64>(3);
            units.sold += row.get::<_, i64>(4);
            units.waiting += row.get::<_, i64>(7);
            units.first_waiting = units.first_waiting.or(row.get(8));
            units.last_assigned = units.last_assigned.max(row.get(9));
            paid_without_payment += row.get::<_, i64>(5);
            refund_due_without_payment += row.get::<_, i64>(6);
        }
        parts.push((above, part.count));
        let found = part.also.as_deref().map(counters);
        if let (true, Some(after)) = (part.is_last, &found) {
            let (Some(later), Some(earlier)) = (looks.pop(), looks.pop()) else {
                unreachable!("it looks before and after it reads the counters");
            };
            note_overtaken(session, &mut by_sku).await?;
            return Ok(Orders {
                orders: by_sku.values().map(|units| units.orders).sum(),
                by_sku,
                before: before.unwrap_or_else(|| after.clone()),
                after: after.clone(),
                looks: [earlier, later],
                paid_without_payment,
                refund_due_without_payment,
                parts,
            });
        }
        before = before.or(found);
    }
}

/// Whether the first waiting order of a SKU still waits, although a later one was served. An earlier part may have
/// read it before it was served itself.
const STILL_WAITS: &str = "
    SELECT FROM orders WHERE order_id BETWEEN ($1::int8 >> 16) << 22 AND (($1::int8 >> 16) << 22) + 4194303
       AND (order_id & 65535) = ($1::int8 & 65535) AND sku = $2 AND status = 7";

async fn note_overtaken(
    session: &Session,
    by_sku: &mut BTreeMap<i32, Units>,
) -> Result<(), StoreError> {
    for (sku, units) in by_sku {
        if let Some(first) = units
            .first_waiting
            .filter(|_| units.first_waiting < units.last_assigned)
        {
            units.is_overtaken = !session.query(STILL_WAITS, &[&first, sku]).await?.is_empty();
        }
    }
    Ok(())
}

/// The sums of the dead letters.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DeadLetters {
    pub(super) count: i64,
    pub(super) also_rows: i64,
    pub(super) refund_due_without_payment: i64,
}

pub(super) async fn read_dead_letters(session: &mut Session) -> Result<DeadLetters, StoreError> {
    let statement = session.prepare(DEAD_LETTERS).await?;
    let mut all = DeadLetters::default();
    let mut above = 0_i64;
    loop {
        let part = session
            .part("dead letters", &statement, &[&above], sum::<0>, None)
            .await?;
        for row in &part.rows {
            above = above.max(row.get(1));
            all.also_rows += row.get::<_, i64>(2);
            all.refund_due_without_payment += row.get::<_, i64>(3);
        }
        all.count += part.count;
        if part.is_last {
            return Ok(all);
        }
    }
}
