//! Look-up of the orders of a list that exist already. The work is bounded by the length of the list, whatever
//! lies between its ids: a journal that spans days has few acknowledged orders among millions of rows.

use std::collections::HashSet;

use foldhash::fast::RandomState;
use sha2::{Digest as _, Sha256};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::super::Database;
use super::super::by_key::{self, By};
use crate::order::{Order, OrderId, PayloadHash};
use crate::store::StoreError;

/// Orders in one statement, at first and, after timeouts, at least.
const LOOK_UP_MAX: usize = 2_000;
const LOOK_UP_MIN: usize = 50;
/// Rows read for each order of the list before its ids are looked up one by one instead. Reading a range costs
/// a fifth of that if the list is most of it.
const ROWS_FOR_ONE: usize = 2;
/// Digests are asked for while [`LookUp::whole`] is above this.
const WHOLE_MIN: isize = -3;
/// Maximum of ids in an error text.
const NAMED_MAX: usize = 10;

/// SHA-256 of the orders of a range of ids, of no more than $3. A log whose orders are rows already, with nothing of others
/// between them, is compared without reading its rows back.
const DIGEST: &str = r"
    SELECT sha256(string_agg(int8send(order_id) || int8send(payload_hash) || textsend(user_id), '\x00'::bytea))
      FROM (SELECT order_id, user_id, payload_hash FROM orders
             WHERE order_id BETWEEN $1 AND $2 ORDER BY order_id LIMIT $3) in_order";

/// Rows of a range of ids, up to $3 of each table. With a list of ids for the tables that are nearly always
/// empty, 2,000 orders took 6 ms instead of 2.5.
const RANGE: &str = "
    (SELECT order_id, user_id, payload_hash, 0 FROM orders
      WHERE order_id BETWEEN $1 AND $2 ORDER BY order_id LIMIT $3)
    UNION ALL (SELECT order_id, user_id, payload_hash, 1 FROM dead_letters
      WHERE order_id BETWEEN $1 AND $2 ORDER BY order_id LIMIT $3)
    UNION ALL (SELECT order_id, user_id, payload_hash, 2 FROM parked_orders
      WHERE order_id BETWEEN $1 AND $2 ORDER BY order_id LIMIT $3)";

const IDS: &str = "
    SELECT order_id, user_id, payload_hash FROM orders WHERE order_id = ANY ($1)
    UNION ALL SELECT order_id, user_id, payload_hash FROM dead_letters WHERE order_id = ANY ($1)
    UNION ALL SELECT order_id, user_id, payload_hash FROM parked_orders WHERE order_id = ANY ($1)";

/// The orders of a call, found so far, and size and kind of its statements, adapted as it goes.
struct LookUp<'a> {
    database: &'a Database,
    /// Orders in one statement.
    at_once: usize,
    /// How much more often all orders of a statement were rows, with nothing between them, than not.
    whole: isize,
    /// Whether ranges of ids hold too many other rows.
    is_sparse: bool,
    /// Those that exist.
    present: OrderIds,
    /// Those whose row is another order.
    others: Vec<OrderId>,
}

/// Whether the row with an order's id is that order.
fn is_row_of(row: &Row, order: &Order) -> bool {
    let payload = PayloadHash(row.get::<_, i64>(2) as u64);
    row.get::<_, &str>(1) == order.user_id.as_str() && payload.matches(order.payload)
}

/// Ids of orders.
pub type OrderIds = HashSet<OrderId, RandomState>;

/// Those of `orders` that exist as rows, as dead letters or parked. An order is identified by its id, its
/// buyer and the hash of its request.
///
/// # Errors
/// [`StoreError::OtherOrders`] if a row has the id of one of them and is another order; otherwise if the
/// database does not answer.
pub async fn present_among(database: &Database, orders: &[&Order]) -> Result<OrderIds, StoreError> {
    let mut sorted = orders.to_vec();
    sorted.sort_unstable_by_key(|order| order.id);
    let mut look_up = LookUp {
        database,
        at_once: LOOK_UP_MAX,
        whole: 0,
        is_sparse: false,
        present: OrderIds::with_capacity_and_hasher(orders.len(), RandomState::default()),
        others: Vec::new(),
    };
    look_up.all(&sorted).await?;
    let LookUp {
        present, others, ..
    } = look_up;
    if others.is_empty() {
        return Ok(present);
    }
    let named = others.iter().take(NAMED_MAX).map(ToString::to_string);
    let mut ids = named.collect::<Vec<_>>().join(", ");
    if others.len() > NAMED_MAX {
        ids.push_str(", …");
    }
    Err(StoreError::OtherOrders {
        count: others.len(),
        ids,
    })
}

/// Those of these ids that belong to no row, no dead letter and no parked order.
///
/// # Errors
/// If the database does not answer.
pub async fn absent_among(
    database: &Database,
    ids: &[OrderId],
) -> Result<Vec<OrderId>, StoreError> {
    let mut ids: Vec<i64> = ids.iter().map(|id| id.as_i64()).collect();
    ids.sort_unstable();
    let mut absent = Vec::new();
    for part in ids.chunks(LOOK_UP_MAX) {
        let client = database.pooled().await?;
        let rows = database
            .timed(
                "looking which orders are there",
                client.query(
                    "SELECT id FROM unnest($1::int8[]) id
                      WHERE NOT EXISTS (SELECT FROM orders WHERE order_id = id)
                        AND NOT EXISTS (SELECT FROM dead_letters WHERE order_id = id)
                        AND NOT EXISTS (SELECT FROM parked_orders WHERE order_id = id)",
                    &[&part],
                ),
            )
            .await?;
        absent.extend(rows.iter().filter_map(|row| OrderId::from_i64(row.get(0))));
    }
    Ok(absent)
}

impl LookUp<'_> {
    /// Looks these sorted orders up in as many steps as needed.
    async fn all(&mut self, orders: &[&Order]) -> Result<(), StoreError> {
        let mut left = orders;
        while !left.is_empty() {
            let (part, rest) = left.split_at(self.at_once.min(left.len()));
            match self.part(part).await {
                Ok(()) => left = rest,
                Err(StoreError::Timeout { after, .. }) if self.at_once > LOOK_UP_MIN => {
                    self.at_once = (self.at_once / 4).max(LOOK_UP_MIN);
                    tracing::warn!(
                        orders = part.len(),
                        at_once = self.at_once,
                        after_ms = after.as_millis() as u64,
                        "looking up which orders are rows already took too long; asking for fewer at once"
                    );
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Looks these sorted orders up: as if all were rows and nothing lay between them while that is so more often than not,
    /// else by their range, unless too much lies between.
    async fn part(&mut self, orders: &[&Order]) -> Result<(), StoreError> {
        let doing = "looking which orders are rows already";
        let ids: Vec<i64> = orders.iter().map(|order| order.id.as_i64()).collect();
        let (Some(low), Some(high)) = (ids.first(), ids.last()) else {
            return Ok(());
        };
        if self.whole > WHOLE_MIN {
            // Among so many rows there is the last order only if nothing lies between.
            let limit = ids.len() as i64;
            let parameters: [&(dyn ToSql + Sync); 3] = [low, high, &limit];
            let rows = by_key::read(self.database, doing, By::Order, DIGEST, &parameters).await?;
            let found: Option<&[u8]> = rows.first().and_then(|row| row.get(0));
            if found == Some(&digest(orders)) {
                self.whole += 1;
                self.present.extend(orders.iter().map(|order| order.id));
                return Ok(());
            }
            self.whole -= 1;
        }
        if !self.is_sparse {
            let limit = ids.len() * ROWS_FOR_ONE;
            let parameters: [&(dyn ToSql + Sync); 3] = [low, high, &(limit as i64)];
            let rows = by_key::read(self.database, doing, By::Order, RANGE, &parameters).await?;
            let mut of_table = [0; 3];
            for row in &rows {
                of_table[row.get::<_, i32>(3) as usize] += 1;
            }
            if of_table.into_iter().all(|rows| rows < limit) {
                self.add(orders, &rows);
                return Ok(());
            }
            self.is_sparse = true;
        }
        let rows = by_key::read(self.database, doing, By::Keys, IDS, &[&ids]).await?;
        self.add(orders, &rows);
        Ok(())
    }

    fn add(&mut self, orders: &[&Order], rows: &[Row]) {
        for row in rows {
            let id: i64 = row.get(0);
            let Ok(at) = orders.binary_search_by_key(&id, |order| order.id.as_i64()) else {
                continue;
            };
            let id = orders[at].id;
            if is_row_of(row, orders[at]) {
                self.present.insert(id);
            } else {
                self.others.push(id);
            }
        }
    }
}

/// What [`DIGEST`] is if exactly these orders are there.
fn digest(orders: &[&Order]) -> [u8; 32] {
    let mut digest = Sha256::new();
    for (at, order) in orders.iter().enumerate() {
        if at > 0 {
            digest.update([0]);
        }
        digest.update(order.id.as_i64().to_be_bytes());
        digest.update(order.payload.0.to_be_bytes());
        digest.update(order.user_id.as_str());
    }
    digest.finalize().into()
}
