//! Reading orders back into memory: all orders of the idempotency window, and live orders of any age if a
//! purchase limit counts them.
//!
//! There may be many millions, so they are read in parts; a part that times out is read again as a smaller one.
//! Several parts are read at once, so that the server works while rows of another part are stored in memory: a
//! full part leaves the rest of its range, and while there are fewer ranges than connections the rest is cut in
//! two.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, ToSql, Type};

use super::Database;
use super::by_key::{self, By};
use crate::clock;
use crate::order::{
    Ended, KeyHash, LaneSet, OrderId, OrderStatus, PayloadHash, Quantity, SkuNumber, UnixMillis,
    UserId,
};
use crate::state::buyers::{BuyerOrder, LiveOrder};
use crate::store::StoreError;
use crate::store::cluster::lanes::{is_of, numbers};

/// Maximum of rows of a part.
const PART_ROWS_MAX: i64 = 50_000;
/// Minimum of rows of a part.
const PART_ROWS_MIN: i64 = 500;
/// Target time of a part. Longer parts become smaller, parts below a quarter of it larger.
const PART_TAKES: Duration = Duration::from_secs(1);
/// Parts read at once at a start, if the pool has twice as many connections.
const AT_ONCE_MAX: usize = 4;
/// Interval of progress reports.
const PROGRESS: Duration = Duration::from_secs(1);
/// Maximum by which the database's clock may be ahead of the clock of order ids, in milliseconds: a day, far
/// more than a start tolerates.
const CLOCKS_DIFFER_MS: i64 = 86_400_000;

/// Progress of a long read.
#[derive(Clone, Copy, Debug)]
pub struct ReadProgress {
    /// Rows read so far.
    pub rows: u64,
    /// Estimate of all rows: from the planner's statistics, or from the share of ids that were read if there
    /// are no statistics or more rows than they say.
    pub of_about: u64,
    /// Time elapsed.
    pub elapsed: Duration,
}

impl ReadProgress {
    /// Rows a second so far.
    pub fn rate(&self) -> u64 {
        (self.rows as f64 / self.elapsed.as_secs_f64().max(0.001)) as u64
    }

    /// Estimated seconds left.
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

/// State of a long read.
struct Course {
    rows: u64,
    /// Estimate of all rows, if the planner has statistics.
    estimate: Option<u64>,
    /// The first and the last existing id.
    ends: Option<(OrderId, OrderId)>,
    /// Number of ids between them that were read, with or without a row.
    ids: u64,
    started: Instant,
    told: Instant,
}

impl Course {
    fn of_about(&self) -> u64 {
        if let Some(estimate) = self.estimate.filter(|estimate| *estimate > self.rows) {
            return estimate;
        }
        let ids = self.ends.map_or(0, |(first, last)| width(first, last));
        let share = self.ids as f64 / ids.max(1) as f64;
        (self.rows as f64 / share.clamp(f64::MIN_POSITIVE, 1.0)) as u64
    }

    /// Records that all ids from `from` to `to` were read, with `rows` rows.
    fn note(&mut self, rows: i64, from: OrderId, to: OrderId) {
        self.rows += u64::try_from(rows).unwrap_or(0);
        if let Some((first, last)) = self.ends {
            let (from, to) = (from.max(first), to.min(last));
            if from <= to {
                self.ids += width(from, to);
            }
        }
    }

    fn tell(&mut self, tell: &mut impl FnMut(ReadProgress)) {
        if clock::since(self.told) >= PROGRESS {
            self.told = clock::now();
            tell(ReadProgress {
                rows: self.rows,
                of_about: self.of_about(),
                elapsed: clock::since(self.started),
            });
        }
    }
}

/// Number of ids from `from` to `to`, both included.
fn width(from: OrderId, to: OrderId) -> u64 {
    to.get().saturating_sub(from.get()).saturating_add(1)
}

/// A long read, part by part.
struct Parts<'a> {
    database: &'a Database,
    doing: &'static str,
    at_once: usize,
    /// Maximum of rows of the next part.
    rows: AtomicI64,
}

/// The rows of a part of the ids from `from` to `to`.
struct Part {
    from: OrderId,
    to: OrderId,
    rows: Vec<Row>,
    /// The maximum of rows that it was read with.
    most: i64,
}

impl<'a> Parts<'a> {
    fn new(database: &'a Database, doing: &'static str, at_once: usize) -> Self {
        Parts {
            database,
            doing,
            // Leaves half of the connections to others.
            at_once: at_once.min(database.pool.status().max_size / 2).max(1),
            rows: AtomicI64::new(PART_ROWS_MAX / 5),
        }
    }

    /// The state for reading the orders from `from` to `to`.
    async fn course(&self, from: OrderId, to: OrderId) -> Result<Course, StoreError> {
        let ids: [&(dyn ToSql + Sync); 2] = [&from.as_i64(), &to.as_i64()];
        let found = by_key::read(self.database, self.doing, By::Order, ENDS, &ids).await?;
        let id = |row: &Row, at| row.get::<_, Option<i64>>(at).and_then(OrderId::from_i64);
        let row = found.first();
        let mut course = Course {
            rows: 0,
            estimate: None,
            ends: row.and_then(|row| Some((id(row, 0)?, id(row, 1)?))),
            ids: 0,
            started: clock::now(),
            told: clock::now(),
        };
        if row.is_some_and(|row| row.get(2)) {
            let sql = format!(
                "EXPLAIN (FORMAT JSON) SELECT FROM orders WHERE order_id >= {from} AND order_id <= {to}"
            );
            let client = self.database.pooled().await?;
            let plan = client.query_one(&sql, &[]);
            let plan: serde_json::Value = self.database.timed(self.doing, plan).await?.get(0);
            let estimate = plan.pointer("/0/Plan/Plan Rows");
            course.estimate = estimate.and_then(serde_json::Value::as_u64);
        }
        Ok(course)
    }

    /// Reads ranges of ids: the rows that `sql` finds from id `$1` to id `$2` among the first `$3` rows of that
    /// range. `remember` takes the rows of a part and returns their number and the last id; `note` is told of
    /// the ids that are done.
    async fn read(
        &self,
        sql: &str,
        mut ranges: Vec<(OrderId, OrderId)>,
        more: &[&(dyn ToSql + Sync)],
        mut remember: impl FnMut(&[Row]) -> Result<(i64, Option<OrderId>), StoreError>,
        mut note: impl FnMut(i64, OrderId, OrderId),
    ) -> Result<(), StoreError> {
        let mut running = FuturesUnordered::new();
        loop {
            while running.len() < self.at_once
                && let Some((from, to)) = ranges.pop()
            {
                running.push(self.part(sql, from, to, more));
            }
            let Some(part) = running.next().await else {
                return Ok(());
            };
            let part = part?;
            let (rows, last) = remember(&part.rows)?;
            let rest = last
                .filter(|_| rows == part.most)
                .and_then(next)
                .filter(|rest| *rest <= part.to);
            let Some((last, rest)) = last.zip(rest) else {
                note(rows, part.from, part.to);
                continue;
            };
            note(rows, part.from, last);
            let middle = OrderId::new(rest.get() + (part.to.get() - rest.get()) / 2);
            match middle.and_then(|middle| Some((middle, next(middle)?))) {
                Some((middle, after)) if running.len() + 1 < self.at_once && middle < part.to => {
                    ranges.extend([(after, part.to), (rest, middle)]);
                }
                _ => ranges.push((rest, part.to)),
            }
        }
    }

    async fn part(
        &self,
        sql: &str,
        from: OrderId,
        to: OrderId,
        more: &[&(dyn ToSql + Sync)],
    ) -> Result<Part, StoreError> {
        let (first, last) = (from.as_i64(), to.as_i64());
        loop {
            let most = self.rows.load(Ordering::Relaxed);
            let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&first, &last, &most];
            parameters.extend(more);
            let asked = clock::now();
            let read = by_key::read(self.database, self.doing, By::Order, sql, &parameters).await;
            match read {
                Err(StoreError::Timeout { .. }) if most > PART_ROWS_MIN => {
                    self.resize(most, most / 4);
                }
                Err(error) => return Err(error),
                Ok(rows) => {
                    if clock::since(asked) > PART_TAKES {
                        self.resize(most, most / 2);
                    } else if clock::since(asked) < PART_TAKES / 4 {
                        self.resize(most, most * 2);
                    }
                    return Ok(Part {
                        from,
                        to,
                        rows,
                        most,
                    });
                }
            }
        }
    }

    /// Changes the size of parts from `most` to `rows`, unless another part has changed it.
    fn resize(&self, most: i64, rows: i64) {
        let rows = rows.clamp(PART_ROWS_MIN, PART_ROWS_MAX);
        let _ = self
            .rows
            .compare_exchange(most, rows, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// The first and the last order of a range of ids, and whether the planner has statistics of the table.
const ENDS: &str = "
    SELECT (SELECT order_id FROM orders WHERE order_id >= $1 AND order_id <= $2 ORDER BY order_id LIMIT 1),
           (SELECT order_id FROM orders WHERE order_id >= $1 AND order_id <= $2 ORDER BY order_id DESC LIMIT 1),
           EXISTS (SELECT FROM pg_stats
                    WHERE schemaname = current_schema() AND tablename = 'orders' AND attname = 'order_id')";

/// The bytes of a `uuid`.
struct Uuid([u8; 16]);

impl<'a> FromSql<'a> for Uuid {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Uuid(raw.try_into()?))
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::UUID
    }
}

/// A `timestamptz`, which counts microseconds since 2000.
struct Moment(UnixMillis);

impl<'a> FromSql<'a> for Moment {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        let ms = i64::from_be_bytes(raw.try_into()?)
            .saturating_add(500)
            .div_euclid(1_000);
        Ok(Moment(UnixMillis(ms.saturating_add(946_684_800_000))))
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::TIMESTAMPTZ
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

/// Reads id, buyer, SKU and units, the first four columns of a row.
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

/// Reads the end of an order from the status in the seventh column, which is NULL for a dead letter.
fn how_it_ended(row: &Row) -> Result<Option<Ended>, StoreError> {
    let code: Option<i16> = row.get(6);
    let status = code.map_or(Some(OrderStatus::Failed), OrderStatus::from_code);
    let status = status.ok_or_else(|| unexpected(row.get(0), "status"))?;
    Ok(Ended::of(status))
}

/// Passes every order of these lanes from `floor` on, dead letters included, and every parked order of theirs to `remember`,
/// so that keys and limits survive a restart, with the payment deadline if the order is open; an order that waits for
/// units has none ([`UnixMillis::NEVER`]). `tell` gets the
/// progress about once a second. Returns the number of orders.
///
/// # Errors
/// If a row is not one of ours, or the database's error.
pub async fn load(
    database: &Database,
    floor: OrderId,
    lanes: LaneSet,
    mut remember: impl FnMut(UserId, BuyerOrder, Option<UnixMillis>),
    mut tell: impl FnMut(ReadProgress),
) -> Result<u64, StoreError> {
    let parts = Parts::new(database, "reading the idempotency window", AT_ONCE_MAX);
    let mut course = parts.course(floor, OrderId::MAX).await?;
    let columns = "order_id, user_id, sku, quantity, key_hash, payload_hash";
    let orders =
        format!("{columns}, status, CASE WHEN status IN (1, 7) THEN expires_at END FROM orders");
    let dead_letters = format!("{columns}, NULL::int2, NULL::timestamptz FROM dead_letters");
    let parked = format!("{columns}, 1::int2, NULL::timestamptz FROM parked_orders");
    let numbers = numbers(lanes);
    let some: [&(dyn ToSql + Sync); 1] = [&numbers];
    let more: &[&(dyn ToSql + Sync)] = if lanes == LaneSet::ALL { &[] } else { &some };
    // The ids beyond the last order are a range of their own, so that both halves of a cut range have rows.
    let mut ranges = vec![(floor, OrderId::MAX)];
    if let Some((_, last)) = course.ends
        && let Some(after) = next(last)
    {
        ranges = vec![(after, OrderId::MAX), (floor, last)];
    }
    let mut found = 0;
    for (from, ranges) in [
        (orders, ranges),
        (dead_letters, vec![(floor, OrderId::MAX)]),
        (parked, vec![(OrderId::MIN, OrderId::MAX)]),
    ] {
        let sql = part_of(&from, lanes);
        let remember = |rows: &[Row]| {
            let mut end = (rows.len() as i64, None);
            for row in rows {
                let raw: i64 = row.get(0);
                end.1 = Some(order_id(raw)?);
                if lanes != LaneSet::ALL {
                    end.0 = row.get(8);
                    if !row.get::<_, bool>(9) {
                        continue;
                    }
                }
                found += 1;
                let (user_id, order) = live_order(row)?;
                let remembered = BuyerOrder {
                    order_id: order.order_id,
                    key: row.get::<_, Option<Uuid>>(4).map(|key| KeyHash(key.0)),
                    payload: PayloadHash(row.get::<_, i64>(5) as u64),
                    sku: order.sku,
                    quantity: order.quantity,
                    ended: how_it_ended(row)?,
                };
                let open_until = row.get::<_, Option<Moment>>(7);
                remember(user_id, remembered, open_until.map(|until| until.0));
            }
            Ok(end)
        };
        let note = |rows, from, to| {
            course.note(rows, from, to);
            course.tell(&mut tell);
        };
        parts.read(&sql, ranges, more, remember, note).await?;
    }
    Ok(found)
}

/// The rows of a part, all of `from` or, of some lanes ($4), those and the last row of a full part, which says with its number
/// where the next one begins. The server reads past the others: an index that names lanes would be one more for every order
/// to enter.
fn part_of(from: &str, lanes: LaneSet) -> String {
    let range = "WHERE order_id >= $1 AND order_id <= $2 ORDER BY order_id LIMIT $3";
    if lanes == LaneSet::ALL {
        return format!("SELECT {from} {range}");
    }
    let (columns, table) = from.split_once(" FROM ").unwrap_or((from, ""));
    let is_wanted = is_of("$4");
    format!(
        "SELECT * FROM (SELECT *, {is_wanted} AS is_wanted
                          FROM (SELECT {columns}, row_number() OVER (ORDER BY order_id) AS number FROM {table} {range}) part) rows
          WHERE is_wanted OR number = $3"
    )
}

/// Passes every live order of these SKUs and lanes with an id below `below` to `count`. Reads all orders since the
/// first of the SKUs was created; `tell` gets the progress about once a second.
///
/// # Errors
/// If a row is not one of ours, or the database's error.
pub async fn load_live_orders(
    database: &Database,
    skus: &[SkuNumber],
    below: OrderId,
    lanes: LaneSet,
    mut count: impl FnMut(UserId, LiveOrder),
    mut tell: impl FnMut(ReadProgress),
) -> Result<(), StoreError> {
    let doing = "reading the orders that a purchase limit counts";
    let skus: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
    let from = first_order_of(database, &skus).await?;
    let (Some(from), Some(to)) = (from, OrderId::new(below.get() - 1)) else {
        return Ok(());
    };
    // One part at a time, because orders may be placed meanwhile.
    let parts = Parts::new(database, doing, 1);
    // Parked orders first: they may become rows meanwhile, but rows are never parked.
    let numbers = numbers(lanes);
    let of_lanes = is_of("$5");
    let parked = format!(
        "SELECT order_id, user_id, sku, quantity FROM parked_orders
          WHERE order_id >= $1 AND order_id <= $2 AND sku = ANY ($4) AND {of_lanes} ORDER BY order_id LIMIT $3"
    );
    let remember = |rows: &[Row]| {
        let mut last = None;
        for row in rows {
            let (user_id, order) = live_order(row)?;
            last = Some(order.order_id);
            count(user_id, order);
        }
        Ok((rows.len() as i64, last))
    };
    let all_parked = vec![(OrderId::MIN, to)];
    parts
        .read(
            &parked,
            all_parked,
            &[&skus, &numbers],
            remember,
            |_, _, _| {},
        )
        .await?;
    if from > to {
        return Ok(());
    }
    let mut course = parts.course(from, to).await?;
    // The last row, which has no buyer, gives the end of the part.
    let sql = format!(
        "WITH part AS MATERIALIZED (
             SELECT order_id, user_id, sku, quantity, status FROM orders
              WHERE order_id >= $1 AND order_id <= $2 ORDER BY order_id LIMIT $3
         )
         SELECT order_id, user_id, sku, quantity FROM part
          WHERE sku = ANY ($4) AND {of_lanes} AND status = ANY ($6::int2[])
         UNION ALL
         SELECT max(order_id), NULL, NULL, count(*)::int4 FROM part"
    );
    let remember = |rows: &[Row]| {
        let mut end = (0, None);
        for row in rows {
            if row.get::<_, Option<&str>>(1).is_some() {
                let (user_id, order) = live_order(row)?;
                count(user_id, order);
                continue;
            }
            let last = row.get::<_, Option<i64>>(0).map(order_id).transpose()?;
            end = (i64::from(row.get::<_, i32>(3)), last);
        }
        Ok(end)
    };
    let note = |rows, from, to| {
        course.note(rows, from, to);
        course.tell(&mut tell);
    };
    parts
        .read(
            &sql,
            vec![(from, to)],
            &[&skus, &numbers, &live_codes()],
            remember,
            note,
        )
        .await
}

/// A lower bound of the ids of these SKUs' orders; `None` if there are no SKUs.
async fn first_order_of(database: &Database, skus: &[i32]) -> Result<Option<OrderId>, StoreError> {
    let client = database.pooled().await?;
    let sql = "SELECT (extract(epoch FROM coalesce(created_at, to_timestamp(0))) * 1000)::int8
                 FROM sku WHERE id = ANY ($1)";
    let made = database
        .timed("reading when SKUs were made", client.query(sql, &[&skus]))
        .await?;
    let first = made.iter().map(|row| row.get::<_, i64>(0)).min();
    Ok(first.map(|first| OrderId::floor_of(UnixMillis(first - CLOCKS_DIFFER_MS))))
}
