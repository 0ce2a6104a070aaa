//! Orders that are read back into memory: all of the idempotency window, and live ones of any age
//! where a purchase limit counts them.
//!
//! There may be many millions, so they are read in parts, each from the id after the last: a part
//! that takes longer than a step may is asked for again as a smaller one.

use std::fmt;
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::Database;
use crate::order::{
    Ended, KeyHash, OrderId, OrderStatus, PayloadHash, Quantity, SkuNumber, UnixMillis, UserId,
};
use crate::state::buyers::{LiveOrder, Remembered};
use crate::store::StoreError;

/// Rows of one part, at most.
const PART_ROWS_MAX: i64 = 50_000;
/// Rows of a part that is not cut any more.
const PART_ROWS_MIN: i64 = 500;
/// Parts that take longer become smaller, those that take a quarter of it larger.
const PART_TAKES: Duration = Duration::from_secs(1);
/// How often progress is told.
const PROGRESS: Duration = Duration::from_secs(1);
/// By how much the database's clock may be ahead of the one that order ids come from, in
/// milliseconds: a day, far more than a start tolerates.
const CLOCKS_DIFFER_MS: i64 = 86_400_000;

/// How far a long read is.
#[derive(Clone, Copy, Debug)]
pub struct ReadProgress {
    /// Rows so far.
    pub rows: u64,
    /// Rows that there are, as the database's planner estimates.
    pub of_about: u64,
    /// Time so far.
    pub elapsed: Duration,
}

impl ReadProgress {
    /// Rows a second so far.
    pub fn rate(&self) -> u64 {
        (self.rows as f64 / self.elapsed.as_secs_f64().max(0.001)) as u64
    }

    /// Seconds that are left, if the estimate holds.
    pub fn seconds_left(&self) -> u64 {
        self.of_about.saturating_sub(self.rows) / self.rate().max(1)
    }
}

impl fmt::Display for ReadProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of about {} rows, {} a second, about {} s left",
            self.rows,
            self.of_about.max(self.rows),
            self.rate(),
            self.seconds_left()
        )
    }
}

/// A long read, part by part.
struct Parts<'a> {
    database: &'a Database,
    doing: &'static str,
    part_rows: i64,
    progress: ReadProgress,
    started: Instant,
    told: Instant,
}

impl<'a> Parts<'a> {
    async fn new(
        database: &'a Database,
        doing: &'static str,
        from: OrderId,
        to: OrderId,
    ) -> Result<Self, StoreError> {
        let client = database.pooled().await?;
        let sql = format!(
            "EXPLAIN (FORMAT JSON) SELECT FROM orders WHERE order_id >= {from} AND order_id <= {to}"
        );
        let plan = database
            .timed(doing, client.query_one(&sql, &[]))
            .await?
            .get::<_, serde_json::Value>(0);
        let estimate = plan.pointer("/0/Plan/Plan Rows");
        Ok(Parts {
            database,
            doing,
            part_rows: PART_ROWS_MAX / 5,
            progress: ReadProgress {
                rows: 0,
                of_about: estimate.and_then(|rows| rows.as_u64()).unwrap_or(0),
                elapsed: Duration::ZERO,
            },
            started: Instant::now(),
            told: Instant::now(),
        })
    }

    /// One part: the rows that `sql` finds for `$1`, an id to begin with, and `$2`, an id to end
    /// with, among the first `$3` rows of that range. Also the most rows that it could be.
    async fn read(
        &mut self,
        sql: &str,
        from: OrderId,
        to: OrderId,
        more: &[&(dyn ToSql + Sync)],
    ) -> Result<(Vec<Row>, i64), StoreError> {
        loop {
            let (from, to, limit) = (from.as_i64(), to.as_i64(), self.part_rows);
            let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&from, &to, &limit];
            parameters.extend(more);
            let client = self.database.pooled().await?;
            let asked = Instant::now();
            let read = client.query(sql, &parameters);
            match self.database.timed(self.doing, read).await {
                Err(StoreError::Timeout { .. }) if limit > PART_ROWS_MIN => {
                    self.part_rows = (limit / 4).max(PART_ROWS_MIN);
                }
                Err(error) => return Err(error),
                Ok(rows) => {
                    if asked.elapsed() > PART_TAKES {
                        self.part_rows = (limit / 2).max(PART_ROWS_MIN);
                    } else if asked.elapsed() < PART_TAKES / 4 {
                        self.part_rows = (limit * 2).min(PART_ROWS_MAX);
                    }
                    return Ok((rows, limit));
                }
            }
        }
    }

    fn tell(&mut self, rows: u64, tell: &mut impl FnMut(ReadProgress)) {
        self.progress.rows += rows;
        if self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            self.progress.elapsed = self.started.elapsed();
            tell(self.progress);
        }
    }
}

fn next(id: OrderId) -> Option<OrderId> {
    OrderId::new(id.get() + 1)
}

fn live_codes() -> Vec<i16> {
    OrderStatus::ALL
        .into_iter()
        .filter(|status| status.is_live())
        .filter_map(OrderStatus::code)
        .collect()
}

fn unexpected(raw: i64, what: impl fmt::Display) -> StoreError {
    StoreError::Data(format!("order {raw}: {what}"))
}

fn order_id(raw: i64) -> Result<OrderId, StoreError> {
    OrderId::from_i64(raw).ok_or_else(|| unexpected(raw, "not an order id"))
}

/// Id, buyer, SKU and units: the first four columns of a row.
fn live_order(row: &Row) -> Result<(UserId, LiveOrder), StoreError> {
    let raw: i64 = row.get(0);
    let user_id =
        UserId::new(row.get(1)).map_err(|error| unexpected(raw, format!("user_id {error}")))?;
    let quantity = u32::try_from(row.get::<_, i32>(3))
        .ok()
        .and_then(Quantity::new)
        .ok_or_else(|| unexpected(raw, "quantity"))?;
    let order = LiveOrder {
        order_id: order_id(raw)?,
        sku: SkuNumber(row.get(2)),
        quantity,
    };
    Ok((user_id, order))
}

/// By the status in the seventh column, which a dead letter has not.
fn how_it_ended(row: &Row) -> Result<Option<Ended>, StoreError> {
    let code: Option<i16> = row.get(6);
    let of_code = |status: &OrderStatus| status.code() == code;
    let status = match code {
        None => Some(OrderStatus::Failed),
        Some(_) => OrderStatus::ALL.into_iter().find(of_code),
    };
    let status = status.ok_or_else(|| unexpected(row.get(0), "status"))?;
    Ok(Ended::of(status))
}

impl Database {
    /// Hands every order from `floor` on, dead letters included, and every parked one to `remember`, so that keys and
    /// limits hold over a restart; with the moment until which it is to be paid, where it is.
    /// `tell` hears of it about once a second. Returns how many orders there were.
    ///
    /// # Errors
    /// Where a row cannot be one of ours, and what the database says.
    pub async fn load_window(
        &self,
        floor: OrderId,
        mut remember: impl FnMut(UserId, Remembered, Option<UnixMillis>),
        mut tell: impl FnMut(ReadProgress),
    ) -> Result<u64, StoreError> {
        let doing = "reading the idempotency window";
        let mut parts = Parts::new(self, doing, floor, OrderId::MAX).await?;
        let columns = "order_id, user_id, sku, quantity, uuid_send(key_hash), payload_hash";
        let range = "WHERE order_id >= $1 AND order_id <= $2 ORDER BY order_id LIMIT $3";
        let orders = format!(
            "SELECT {columns}, status, CASE WHEN status = 1 THEN (extract(epoch FROM expires_at) * 1000)::int8 END
               FROM orders {range}"
        );
        let dead_letters =
            format!("SELECT {columns}, NULL::int2, NULL::int8 FROM dead_letters {range}");
        let parked = format!("SELECT {columns}, 1::int2, NULL::int8 FROM parked_orders {range}");
        for (sql, from) in [
            (orders, floor),
            (dead_letters, floor),
            (parked, OrderId::MIN),
        ] {
            let mut from = Some(from);
            while let Some(first) = from {
                let (rows, most) = parts.read(&sql, first, OrderId::MAX, &[]).await?;
                let mut last = None;
                for row in &rows {
                    let (user_id, order) = live_order(row)?;
                    let key = row
                        .get::<_, Option<&[u8]>>(4)
                        .and_then(|bytes| bytes.try_into().ok())
                        .map(KeyHash);
                    let remembered = Remembered {
                        order_id: order.order_id,
                        key,
                        payload: PayloadHash(row.get::<_, i64>(5) as u64),
                        sku: order.sku,
                        quantity: order.quantity,
                        ended: how_it_ended(row)?,
                    };
                    let payable_until = row.get::<_, Option<i64>>(7).map(UnixMillis);
                    remember(user_id, remembered, payable_until);
                    last = Some(order.order_id);
                }
                parts.tell(rows.len() as u64, &mut tell);
                from = last.filter(|_| rows.len() as i64 == most).and_then(next);
            }
        }
        Ok(parts.progress.rows)
    }

    /// Hands every live order of these SKUs with an id below `below` to `count`. It reads whatever
    /// was ordered since the first of the SKUs was made; `tell` hears of it about once a second.
    ///
    /// # Errors
    /// Where a row cannot be one of ours, and what the database says.
    pub async fn load_live_orders(
        &self,
        skus: &[SkuNumber],
        below: OrderId,
        mut count: impl FnMut(UserId, LiveOrder),
        mut tell: impl FnMut(ReadProgress),
    ) -> Result<(), StoreError> {
        let doing = "reading the orders that a purchase limit counts";
        let skus: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
        let mut from = self.first_order_of(&skus).await?;
        let Some(to) = OrderId::new(below.get() - 1) else {
            return Ok(());
        };
        let mut parts = Parts::new(self, doing, from.unwrap_or(to), to).await?;
        let live = live_codes();
        // Parked ones first: they may become rows meanwhile, but rows are not parked.
        let parked = "SELECT order_id, user_id, sku, quantity FROM parked_orders
                       WHERE order_id >= $1 AND order_id <= $2 AND sku = ANY ($4) ORDER BY order_id LIMIT $3";
        let mut first_parked = Some(OrderId::MIN);
        while let Some(first) = first_parked.filter(|first| *first <= to) {
            let (rows, most) = parts.read(parked, first, to, &[&skus]).await?;
            first_parked = None;
            for row in &rows {
                let (user_id, order) = live_order(row)?;
                first_parked = next(order.order_id).filter(|_| rows.len() as i64 == most);
                count(user_id, order);
            }
        }
        // The last row says where the part ends; nobody buys in it.
        let sql = "WITH part AS MATERIALIZED (
                       SELECT order_id, user_id, sku, quantity, status FROM orders
                        WHERE order_id >= $1 AND order_id <= $2 ORDER BY order_id LIMIT $3
                   )
                   SELECT order_id, user_id, sku, quantity FROM part WHERE sku = ANY ($4) AND status = ANY ($5::int2[])
                   UNION ALL
                   SELECT max(order_id), NULL, NULL, count(*)::int4 FROM part";
        while let Some(first) = from.filter(|first| *first <= to) {
            let (rows, most) = parts.read(sql, first, to, &[&skus, &live]).await?;
            from = None;
            for row in &rows {
                if row.get::<_, Option<&str>>(1).is_some() {
                    let (user_id, order) = live_order(row)?;
                    count(user_id, order);
                    continue;
                }
                let of_part: i32 = row.get(3);
                parts.tell(u64::try_from(of_part).unwrap_or(0), &mut tell);
                if i64::from(of_part) == most {
                    let last = row.get::<_, Option<i64>>(0).map(order_id).transpose()?;
                    from = last.and_then(next);
                }
            }
        }
        Ok(())
    }

    /// An id that no order of these SKUs is below; `None` where there are no SKUs.
    async fn first_order_of(&self, skus: &[i32]) -> Result<Option<OrderId>, StoreError> {
        let client = self.pooled().await?;
        let sql = "SELECT (extract(epoch FROM coalesce(created_at, to_timestamp(0))) * 1000)::int8
                     FROM sku WHERE id = ANY ($1)";
        let made = self
            .timed("reading when SKUs were made", client.query(sql, &[&skus]))
            .await?;
        let first = made.iter().map(|row| row.get::<_, i64>(0)).min();
        Ok(first.map(|first| OrderId::floor_of(UnixMillis(first - CLOCKS_DIFFER_MS))))
    }
}
