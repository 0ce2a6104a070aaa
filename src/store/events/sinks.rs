//! How far each sink of events is.

use tokio_postgres::Row;

use crate::order::{OrderId, UnixMillis};
use crate::store::StoreError;
use crate::store::postgres::Database;

/// The row of a sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkRow {
    /// Transactions with a lower number, which has its epoch, are delivered.
    pub place_xid: i64,
    /// When the newest delivered change was committed.
    pub place_at: Option<UnixMillis>,
    /// A refill that is due.
    pub refill: Option<Refill>,
    /// Why nothing is delivered to it, if so.
    pub disabled: Option<String>,
}

/// What a sink is to hear again from the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refill {
    /// Rows that this transaction or a later one has written. With its epoch.
    pub from_xid: i64,
    /// Orders and dead letters of orders above this id; 0: all.
    pub after: i64,
}

const COLUMNS: &str =
    "place_xid, (extract(epoch FROM place_at) * 1000)::int8, refill_xid, refill_after,
    CASE WHEN disabled_at IS NOT NULL THEN coalesce(disabled_reason, '') END";

fn from_row(row: &Row) -> SinkRow {
    let refill = row.get::<_, Option<i64>>(2).map(|from_xid| Refill {
        from_xid,
        after: row.get::<_, Option<i64>>(3).unwrap_or(0),
    });
    SinkRow {
        place_xid: row.get(0),
        place_at: row.get::<_, Option<i64>>(1).map(UnixMillis),
        refill,
        disabled: row.get(4),
    }
}

/// The row of a sink, if it has one.
///
/// # Errors
/// If the database does not answer.
pub async fn find(database: &Database, sink: &str) -> Result<Option<SinkRow>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!("SELECT {COLUMNS} FROM event_sinks WHERE sink = $1");
    let row = database
        .timed(
            "reading the place of a sink",
            client.query_opt(&sql, &[&sink]),
        )
        .await?;
    Ok(row.as_ref().map(from_row))
}

async fn change(
    database: &Database,
    doing: &'static str,
    sql: &str,
    parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let changed = database
        .timed(doing, client.execute(sql, parameters))
        .await?;
    Ok(changed > 0)
}

/// Notes the place of a sink. A place that is noted already only rises.
///
/// # Errors
/// If the database does not answer.
pub async fn note_place(
    database: &Database,
    sink: &str,
    xid: i64,
    at: Option<UnixMillis>,
) -> Result<(), StoreError> {
    change(
        database,
        "noting the place of a sink",
        "INSERT INTO event_sinks AS s (sink, place_xid, place_at)
         VALUES ($1, $2, to_timestamp($3::int8 / 1000.0))
         ON CONFLICT (sink) DO UPDATE SET place_xid = greatest(s.place_xid, excluded.place_xid),
                place_at = coalesce(excluded.place_at, s.place_at)",
        &[&sink, &xid, &at.map(|at| at.0)],
    )
    .await
    .map(|_| ())
}

/// Has a sink refilled from its place on, because its slot is gone.
///
/// # Errors
/// If the database does not answer.
pub async fn refill_from_place(database: &Database, sink: &str) -> Result<(), StoreError> {
    change(
        database,
        "noting the refill of a sink",
        "UPDATE event_sinks SET refill_xid = least(refill_xid, place_xid), refill_after = 0 WHERE sink = $1",
        &[&sink],
    )
    .await
    .map(|_| ())
}

/// An operator's wish: refills a sink, from its place on or with every order above `after`, and delivers to it again
/// if it was disabled. Returns false if there is no such sink.
///
/// # Errors
/// If the database does not answer.
pub async fn resync(
    database: &Database,
    sink: &str,
    after: Option<Option<OrderId>>,
) -> Result<bool, StoreError> {
    // 3: the lowest number of an ordinary transaction.
    let (from, after) = match after {
        None => (None, 0),
        Some(after) => (Some(3_i64), after.map_or(0, OrderId::as_i64)),
    };
    change(
        database,
        "noting the refill of a sink",
        "UPDATE event_sinks SET refill_xid = coalesce($2, place_xid), refill_after = $3, disabled_at = NULL,
                disabled_reason = NULL
          WHERE sink = $1",
        &[&sink, &from, &after],
    )
    .await
}

/// A refill is done, and the slot has gone past it.
///
/// # Errors
/// If the database does not answer.
pub async fn refilled(database: &Database, sink: &str, refill: Refill) -> Result<(), StoreError> {
    change(
        database,
        "noting the refill of a sink",
        "UPDATE event_sinks SET refill_xid = NULL, refill_after = NULL
          WHERE sink = $1 AND refill_xid = $2 AND refill_after = $3",
        &[&sink, &refill.from_xid, &refill.after],
    )
    .await
    .map(|_| ())
}

/// Stops deliveries to a sink until an operator asks for a resync.
///
/// # Errors
/// If the database does not answer.
pub async fn disable(database: &Database, sink: &str, reason: &str) -> Result<(), StoreError> {
    change(
        database,
        "disabling a sink",
        "UPDATE event_sinks SET disabled_at = clock_timestamp(), disabled_reason = $2,
                refill_xid = least(refill_xid, place_xid), refill_after = 0
          WHERE sink = $1",
        &[&sink, &reason],
    )
    .await
    .map(|_| ())
}
