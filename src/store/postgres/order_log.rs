//! The database's record of the order log: the log that may hold acknowledged orders which are not rows yet, the
//! place up to which they are settled, the end of its process's right to acknowledge, and the progress of workers.

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::{Connected, Database, NodeLease};
use crate::order::log_place::{Place, Position};
use crate::store::StoreError;

/// A renewal of the right to acknowledge, distinguishable from every other renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// The epoch of the process that renewed it, and its end by the database's clock. That clock may be set
    /// meanwhile, so the end is only compared for equality, never with the time.
    of: (i64, String),
    /// Its length in milliseconds; `None`: the process was of an earlier release, which did not record it.
    pub lease_ms: Option<u64>,
}

/// The name of an order log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogName {
    /// 32 hexadecimal digits.
    pub id: String,
    /// For people, as in: the Redis stream `…`.
    pub title: String,
}

/// The order log recorded in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotedLog {
    /// Its id, as 32 hexadecimal digits.
    pub name: String,
    /// Its name for people.
    pub title: String,
    /// Whether it may hold orders that are not rows yet.
    pub in_use: bool,
    /// The place up to which every order in it is settled, if it is a broker's.
    pub place: Option<Position>,
    /// The last renewal of its process's right to acknowledge; `None` if there was none.
    pub renewal: Option<Renewal>,
}

/// The recorded log of a node.
///
/// # Errors
/// If the database does not answer.
pub async fn noted(
    database: &Database,
    client: &Client,
    node: i16,
) -> Result<Option<NotedLog>, StoreError> {
    let row = database
        .timed(
            "reading which order log is in use",
            client.query_opt(
                &format!("SELECT {COLUMNS} FROM node WHERE node = $1 AND journal_id IS NOT NULL"),
                &[&node],
            ),
        )
        .await?;
    Ok(row.map(|row| noted_log(&row, 0)))
}

/// The columns of `node` that [`noted_log`] reads.
pub(in crate::store) const COLUMNS: &str =
    "replace(journal_id::text, '-', ''), journal_in_use, epoch, lease_until::text, lease_ms,
    coalesce(log_title, 'the journal'), log_epoch, log_number, log_offset";

/// The log in a row with [`COLUMNS`], from its column `at` on. Its `journal_id` must not be NULL.
pub(in crate::store) fn noted_log(row: &Row, at: usize) -> NotedLog {
    let unsigned = |at: i64| u64::try_from(at).unwrap_or(0);
    NotedLog {
        name: row.get(at),
        title: row.get(at + 5),
        in_use: row.get(at + 1),
        place: row.get::<_, Option<i64>>(at + 6).map(|epoch| Position {
            place: Place {
                epoch: unsigned(epoch),
                number: unsigned(row.get::<_, Option<i64>>(at + 7).unwrap_or(0)),
            },
            offset: unsigned(row.get::<_, Option<i64>>(at + 8).unwrap_or(0)),
        }),
        renewal: row.get::<_, Option<String>>(at + 3).map(|until| Renewal {
            of: (row.get(at + 2), until),
            lease_ms: row
                .get::<_, Option<i64>>(at + 4)
                .and_then(|ms| u64::try_from(ms).ok()),
        }),
    }
}

/// Records that `log` is in use by the holder of `lease`, before it acknowledges anything. `place`:
/// every order up to there is settled.
///
/// # Errors
/// [`StoreError::Fenced`] if another process has taken the node over.
pub async fn note(
    database: &Database,
    lease: NodeLease,
    log: &LogName,
    place: Option<Position>,
) -> Result<(), StoreError> {
    let [epoch, number, offset] = columns(place);
    set(
        database,
        lease,
        "UPDATE node SET journal_id = $3::text::uuid, journal_in_use = true, log_title = $4, log_epoch = $5,
                log_number = $6, log_offset = $7
          WHERE node = $1 AND epoch = $2",
        &[&log.id, &log.title, &epoch, &number, &offset],
    )
    .await
}

/// Records the place up to which every order in a broker's log is settled, on the server of this timeline.
///
/// # Errors
/// [`StoreError::Fenced`] if another process has taken the node over, or the server has another timeline.
pub async fn note_place(
    database: &Database,
    lease: NodeLease,
    place: Position,
    timeline: &str,
) -> Result<(), StoreError> {
    let [epoch, number, offset] = columns(Some(place));
    set(
        database,
        lease,
        "UPDATE node SET log_epoch = $3, log_number = $4, log_offset = $5
          WHERE node = $1 AND epoch = $2 AND left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) = $6",
        &[&epoch, &number, &offset, &timeline],
    )
    .await
}

/// Records that every order of the log `name` is settled, up to `place`, and that nothing more is acknowledged;
/// on the server of this timeline.
///
/// # Errors
/// [`StoreError::Fenced`] if another process has taken the node over, or the server has another timeline.
pub async fn release(
    database: &Database,
    lease: NodeLease,
    name: &str,
    place: Option<Position>,
    timeline: &str,
) -> Result<(), StoreError> {
    let [epoch, number, offset] = columns(place);
    set(
        database,
        lease,
        "UPDATE node SET journal_in_use = false, lease_until = clock_timestamp(), log_epoch = $5, log_number = $6,
                log_offset = $7
          WHERE node = $1 AND epoch = $2 AND journal_id = $3::text::uuid
            AND left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) = $4",
        &[&name, &timeline, &epoch, &number, &offset],
    )
    .await
}

async fn set(
    database: &Database,
    lease: NodeLease,
    sql: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<(), StoreError> {
    let of: [&(dyn ToSql + Sync); 2] = [&lease.node, &lease.epoch];
    let values: Vec<_> = of.iter().chain(values).copied().collect();
    let client = database.pooled().await?;
    let changed = database
        .timed(
            "noting which order log is in use",
            client.execute(sql, &values),
        )
        .await?;
    if changed == 1 {
        return Ok(());
    }
    Err(lease.is_lost())
}

/// Gives up the orders that the recorded log may still hold, at an operator's decision, and fences its
/// process. Runs on the connection of [`lease::claim`](super::lease::claim). Returns false, with nothing changed, if the
/// right to acknowledge was renewed since `noted` was read.
///
/// # Errors
/// If the database does not answer.
pub async fn abandon(
    database: &Database,
    guard: &Connected,
    noted: &NotedLog,
) -> Result<bool, StoreError> {
    let of = noted.renewal.as_ref().map(|renewal| &renewal.of);
    let (epoch, until) = (of.map(|of| of.0), of.map(|of| of.1.as_str()));
    database.timed(
        "abandoning the order log",
        guard.execute(
            "UPDATE node SET journal_in_use = false, epoch = epoch + 1, log_epoch = NULL, log_number = NULL,
                    log_offset = NULL
              WHERE node = 0 AND lease_until IS NOT DISTINCT FROM $2::text::timestamptz
                AND epoch = coalesce($1, epoch)",
            &[&epoch, &until],
        ),
    )
    .await
    .map(|changed| changed == 1)
}

/// Gives up the orders that the log of a node may still hold, at an operator's decision: that of a dead node while others run,
/// where whoever takes it over goes on without the log; or, if `nobody_runs`, that of any node that has not left. Returns
/// false, with nothing changed, if there is no such node with a log in use.
///
/// # Errors
/// If the database does not answer.
pub async fn abandon_of(
    database: &Database,
    node: i16,
    nobody_runs: bool,
) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let changed = database
        .timed(
            "abandoning the order log of a node",
            client.execute(
                "UPDATE node SET journal_in_use = false, epoch = epoch + $2::bool::int, log_epoch = NULL, log_number = NULL,
                        log_offset = NULL
                  WHERE node = $1 AND journal_in_use AND (state = 'dead' OR $2 AND state IN ('joining', 'active'))",
                &[&node, &nobody_runs],
            ),
        )
        .await?;
    Ok(changed == 1)
}

/// The number of each worker's last batch, by worker.
///
/// # Errors
/// If the database does not answer.
pub async fn worker_batches(
    database: &Database,
    lease: NodeLease,
) -> Result<Vec<(i16, i64)>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "reading the workers' batch numbers",
            client.query(
                "SELECT shard, batch FROM writer WHERE node = $1",
                &[&lease.node],
            ),
        )
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// A place as the columns of `node` have it: epoch, number, offset.
pub(in crate::store) fn columns(place: Option<Position>) -> [Option<i64>; 3] {
    let signed = |at: u64| i64::try_from(at).unwrap_or(i64::MAX);
    match place {
        None => [None; 3],
        Some(Position { place, offset }) => {
            [place.epoch, place.number, offset].map(|at| Some(signed(at)))
        }
    }
}
