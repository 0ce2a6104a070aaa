//! Pruning: deletes rows past their `retention`, in small parts.
//!
//! Each part is one transaction: the fence, the audit's lock, the rows, and the checkpoint that keeps the sums
//! whole. So a part is complete or has no effect, whenever the process ends. A part starts at the row where the
//! last one stopped reading, whatever it could delete.
//!
//! Contradictory rows are never deleted: they are evidence. Nor are rows that may still be needed: an order
//! that has not reached its final state or has an open payment, a paid order that counts toward a purchase
//! limit, a message about an open payment, the entry of an operator's request, whose key has to be known.

use std::time::Duration;

use tokio_postgres::{Row, Transaction};

use super::audit::LOCK;
use super::transitions::fence;
use super::{Connected, Database, NodeLease};
use crate::order::{OrderId, SkuNumber, UnixMillis};
use crate::store::{Ledger, StoreError};

const DOING: &str = "deleting old rows";

/// The advisory lock of the node that deletes, followed by the schema's name.
const NODES: &str = "millrace pruning:";

/// Statement timeout of a part.
const PART_TIMEOUT: Duration = Duration::from_secs(2);

/// Deletes old orders above an id. Locked rows are left for the next time.
const ORDERS: &str = "
    WITH part AS MATERIALIZED (
        SELECT order_id FROM orders WHERE order_id > $1 AND order_id < $2 ORDER BY order_id LIMIT $3
    ), free AS MATERIALIZED (
        SELECT o.order_id FROM orders o
         WHERE o.order_id = ANY (ARRAY (SELECT order_id FROM part)) AND o.status IN (2, 3, 4, 6)
           AND EXISTS (SELECT FROM sku s WHERE s.id = o.sku AND
                       (o.status <> 2 OR s.per_user_limit IS NULL AND s.allocation IS NULL OR s.closes_at < to_timestamp($4::int8 / 1000.0)))
           AND (o.status <> 2 OR EXISTS
               (SELECT FROM payments p WHERE p.order_id = o.order_id AND p.state = 'matched'
                   AND p.amount = o.amount AND p.currency = o.currency))
           AND NOT EXISTS
               (SELECT FROM payments p WHERE p.order_id = o.order_id AND p.state IN ('orphan', 'refund_due'))
         ORDER BY o.order_id FOR UPDATE OF o SKIP LOCKED
    ), gone AS (
        DELETE FROM orders o USING free WHERE o.order_id = free.order_id
        RETURNING o.order_id, o.sku, o.status, o.quantity
    ), marked AS (
        UPDATE payments p SET order_pruned = true FROM gone
         WHERE p.order_id = gone.order_id AND p.state = 'matched'
    ), noted AS (
        INSERT INTO orders_checkpoint AS c (sku, orders, sold)
        SELECT sku, count(*), coalesce(sum(quantity) FILTER (WHERE status = 2), 0) FROM gone GROUP BY sku ORDER BY sku
        ON CONFLICT (sku) DO UPDATE SET orders = c.orders + excluded.orders, sold = c.sold + excluded.sold
    ), marked_below AS (
        INSERT INTO orders_deleted AS d (below) SELECT max(order_id) + 1 FROM gone HAVING count(*) > 0
        ON CONFLICT (single) DO UPDATE SET below = greatest(d.below, excluded.below)
    )
    SELECT (SELECT count(*) FROM part), (SELECT max(order_id) FROM part), (SELECT count(*) FROM gone)";

/// Deletes old messages above a number.
const EVENTS: &str = "
    WITH part AS MATERIALIZED (
        SELECT id, received_at FROM payment_events WHERE id > $1 ORDER BY id LIMIT $2
    ), gone AS (
        DELETE FROM payment_events e USING part
         WHERE e.id = part.id AND part.received_at < to_timestamp($3::int8 / 1000.0)
           AND (e.payment_id IS NULL OR EXISTS
               (SELECT FROM payments p WHERE p.provider = e.provider AND p.payment_id = e.payment_id
                   AND p.state NOT IN ('orphan', 'refund_due')))
        RETURNING e.id
    ), noted AS (
        INSERT INTO payment_events_checkpoint AS c (received_before, events)
        SELECT to_timestamp($3::int8 / 1000.0), count(*) FROM gone HAVING count(*) > 0
        ON CONFLICT (single) DO UPDATE SET received_before = greatest(c.received_before, excluded.received_before),
                                           events = c.events + excluded.events
    )
    SELECT (SELECT count(*) FROM part WHERE received_at < to_timestamp($3::int8 / 1000.0)),
           (SELECT max(id) FROM part), (SELECT count(*) FROM gone)";

/// Reads entries of a SKU beyond its checkpoint, oldest first.
const ENTRIES: &str = "
    SELECT j.id, j.total_delta, j.held_delta, j.sold_delta, j.total_after, j.held_after, j.sold_after,
           j.at < to_timestamp($3::int8 / 1000.0), j.node IS NOT NULL
      FROM stock_log j
     WHERE j.sku = $1 AND j.id > coalesce((SELECT through_id FROM stock_log_checkpoint WHERE sku = $1), 0)
     ORDER BY j.id LIMIT $2";

const CHECKPOINT: &str =
    "SELECT total, held, sold FROM stock_log_checkpoint WHERE sku = $1 FOR UPDATE";

const FOLD: &str = "
    WITH gone AS (
        DELETE FROM stock_log WHERE sku = $1 AND id <= $2 AND request_key IS NULL RETURNING id
    ), noted AS (
        INSERT INTO stock_log_checkpoint AS c (sku, through_id, entries, total, held, sold)
        SELECT $1, $2, $3, $4, $5, $6
        ON CONFLICT (sku) DO UPDATE SET through_id = excluded.through_id, entries = c.entries + excluded.entries,
            total = excluded.total, held = excluded.held, sold = excluded.sold
    )
    SELECT count(*) FROM gone";

const OLDEST: &str = "
    SELECT (SELECT min(order_id) FROM orders),
           (SELECT (extract(epoch FROM received_at) * 1000)::int8 FROM payment_events ORDER BY id LIMIT 1),
           (SELECT (extract(epoch FROM min(j.at)) * 1000)::int8
              FROM sku s LEFT JOIN stock_log_checkpoint c ON c.sku = s.id
             CROSS JOIN LATERAL (SELECT at FROM stock_log WHERE sku = s.id AND id > coalesce(c.through_id, 0)
                                  ORDER BY id LIMIT 1) j)";

/// Orders with lower ids may have been deleted. One whose row was missing at a look before this one was written, and has
/// come to its end.
///
/// # Errors
/// If the database does not answer.
pub async fn deleted_below(database: &Database) -> Result<i64, StoreError> {
    let sql = "SELECT below FROM orders_deleted";
    let doing = "reading which orders may be deleted";
    let rows = database.query_prepared(doing, sql, &[]).await?;
    Ok(rows.first().map_or(0, |row| row.get(0)))
}

/// Whether a payment has paid this order, which was deleted.
///
/// # Errors
/// If the database does not answer.
pub async fn was_paid(database: &Database, id: OrderId) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let sql = "SELECT EXISTS (SELECT FROM payments WHERE order_id = $1 AND state = 'matched' AND order_pruned)";
    let doing = "reading whether a deleted order was paid";
    let row = database
        .timed(doing, client.query_one(sql, &[&id.as_i64()]))
        .await?;
    Ok(row.get(0))
}

/// A part of the rows to delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Finished orders with ids above `after` and below `below`. Paid orders of a SKU with a purchase limit
    /// count toward it unless its sale closed before `ended`.
    Orders {
        /// The last id already read.
        after: i64,
        /// The lowest id to keep.
        below: OrderId,
        /// Latest close of a sale whose paid orders may be deleted.
        ended: UnixMillis,
    },
    /// Messages with numbers above `after`, received before `before`.
    Events {
        /// The last number already read.
        after: i64,
        /// Messages received from this moment on are kept.
        before: UnixMillis,
    },
    /// Entries of a SKU from before `before`, folded into its checkpoint up to the first that does not follow
    /// from its predecessor. The newest entry stays.
    Entries {
        /// The SKU.
        sku: SkuNumber,
        /// Entries from this moment on are kept.
        before: UnixMillis,
    },
}

/// The result of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrunedPart {
    /// Rows were deleted.
    Done {
        /// Rows deleted.
        rows: u64,
        /// The last number read, where the next part starts; `None` if this was the last part.
        next: Option<i64>,
    },
    /// Nothing was done, because an audit is running.
    AuditRunning,
}

/// The moment of the oldest row of each table, in Unix milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OldestRows {
    /// Of `orders`.
    pub order: Option<UnixMillis>,
    /// Of `payment_events`.
    pub event: Option<UnixMillis>,
    /// Of `stock_log`, kept entries of operators' requests apart.
    pub entry: Option<UnixMillis>,
}

/// A connection for deleting old rows.
#[derive(Debug)]
pub struct Pruner {
    database: Database,
    client: Connected,
    lease: NodeLease,
}

impl Pruner {
    /// Connects.
    ///
    /// # Errors
    /// If no connection can be made.
    pub async fn connect(database: &Database, lease: NodeLease) -> Result<Self, StoreError> {
        let client = database.connect("millrace pruning").await?;
        // Forces a walk along a key, whatever the statistics say: see `by_key`.
        let setup = format!(
            "SET statement_timeout = {}; SET enable_seqscan = off; SET enable_bitmapscan = off",
            PART_TIMEOUT.as_millis()
        );
        database
            .timed("setting up a session", client.batch_execute(&setup))
            .await?;
        Ok(Pruner {
            database: database.clone(),
            client,
            lease,
        })
    }

    /// Whether this process deletes for all nodes, as long as it is connected. None does while the log of a dead node waits
    /// for its replay, which must find the rows that it has already.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn is_chosen(&self) -> Result<bool, StoreError> {
        if self.lease.ledger == Ledger::Sku {
            return Ok(true);
        }
        let name = format!("{NODES}{}", self.database.schema());
        let sql = "SELECT NOT EXISTS (SELECT FROM node WHERE state = 'dead')
                          AND pg_try_advisory_lock(hashtextextended($1, 0))";
        let row = self
            .database
            .timed(DOING, self.client.query_one(sql, &[&name]))
            .await?;
        Ok(row.get(0))
    }

    /// The database's clock.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn now(&self) -> Result<UnixMillis, StoreError> {
        let now = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8";
        let row = self
            .database
            .timed(DOING, self.client.query_one(now, &[]))
            .await?;
        Ok(UnixMillis(row.get(0)))
    }

    /// The age of the oldest rows.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn oldest(&self) -> Result<OldestRows, StoreError> {
        let row = self
            .database
            .timed(DOING, self.client.query_one(OLDEST, &[]))
            .await?;
        let order = row.get::<_, Option<i64>>(0).and_then(OrderId::from_i64);
        Ok(OldestRows {
            order: order.map(OrderId::millis),
            event: row.get::<_, Option<i64>>(1).map(UnixMillis),
            entry: row.get::<_, Option<i64>>(2).map(UnixMillis),
        })
    }

    /// Deletes one part, reading at most `rows` rows (at least 2).
    ///
    /// # Errors
    /// If the part fails; nothing was deleted, unless the answer to the commit was lost. Repeating is safe.
    pub async fn part(&mut self, part: Part, rows: i64) -> Result<PrunedPart, StoreError> {
        let (ours, patience) = (self.lease.epoch, self.database.step_timeout() * 2);
        let done = tokio::time::timeout(patience, self.attempt(part, rows))
            .await
            .map_err(|_| StoreError::Timeout {
                doing: DOING,
                after: patience,
            })?;
        done.map_err(StoreError::statement(DOING))?
            .ok_or(StoreError::Fenced { found: 0, ours })
    }

    /// `None`: this process may not write any more.
    async fn attempt(
        &mut self,
        part: Part,
        rows: i64,
    ) -> Result<Option<PrunedPart>, tokio_postgres::Error> {
        let name = format!("{LOCK}{}", self.database.schema());
        let transaction = self.client.transaction().await?;
        if !fence(&transaction, self.lease).await? {
            return Ok(None);
        }
        let free: bool = transaction
            .query_one(
                "SELECT pg_try_advisory_xact_lock(hashtextextended($1, 0))",
                &[&name],
            )
            .await?
            .get(0);
        if !free {
            return Ok(Some(PrunedPart::AuditRunning));
        }
        let done = match part {
            Part::Orders {
                after,
                below,
                ended,
            } => {
                let row = transaction
                    .query_one(ORDERS, &[&after, &below.as_i64(), &rows, &ended.0])
                    .await?;
                progress(&row, rows)
            }
            Part::Events { after, before } => {
                let row = transaction
                    .query_one(EVENTS, &[&after, &rows, &before.0])
                    .await?;
                progress(&row, rows)
            }
            Part::Entries { sku, before } => fold(&transaction, sku, before, rows).await?,
        };
        transaction.commit().await?;
        Ok(Some(done))
    }
}

async fn fold(
    transaction: &Transaction<'_>,
    sku: SkuNumber,
    before: UnixMillis,
    rows: i64,
) -> Result<PrunedPart, tokio_postgres::Error> {
    let triple =
        |row: &Row, at: usize| -> [i64; 3] { [row.get(at), row.get(at + 1), row.get(at + 2)] };
    let base = transaction.query_opt(CHECKPOINT, &[&sku.0]).await?;
    let mut sum = base.map_or([0; 3], |row| triple(&row, 0));
    let entries = transaction
        .query(ENTRIES, &[&sku.0, &rows, &before.0])
        .await?;
    let (mut through, mut folded) = (None, 0_i64);
    // The last entry read may be the newest of all, which stays.
    let earlier = entries.split_last().map_or(&[][..], |(_, earlier)| earlier);
    for row in earlier {
        let (change, after) = (triple(row, 1), triple(row, 4));
        let next = [0, 1, 2].map(|at| sum[at] + change[at]);
        // A node's entry has the counters of its share, which change without entries too.
        let follows = next == after || row.get(8);
        if !follows || !row.get::<_, bool>(7) {
            break;
        }
        (sum, through) = (next, Some(row.get::<_, i64>(0)));
        folded += 1;
    }
    let Some(through) = through else {
        return Ok(PrunedPart::Done {
            rows: 0,
            next: None,
        });
    };
    let [total, held, sold] = sum;
    let gone: i64 = transaction
        .query_one(FOLD, &[&sku.0, &through, &folded, &total, &held, &sold])
        .await?
        .get(0);
    Ok(PrunedPart::Done {
        rows: u64::try_from(gone).unwrap_or(0),
        next: (folded == rows - 1).then_some(through),
    })
}

/// Reads the result: rows read, the last number, rows deleted.
fn progress(row: &Row, limit: i64) -> PrunedPart {
    let (looked_at, last): (i64, Option<i64>) = (row.get(0), row.get(1));
    PrunedPart::Done {
        rows: u64::try_from(row.get::<_, i64>(2)).unwrap_or(0),
        next: last.filter(|_| looked_at == limit),
    }
}
