//! The database's part of a preflight: the facts that it tells of itself, the measurements in a scratch table
//! ([`scratch`]), and the preparations that the role may make ([`prepare`]). The texts of SQL that an operator
//! should run are in [`remedies`].

pub mod kept;
pub mod prepare;
pub mod remedies;
pub mod scratch;

use std::path::Path;

use tokio_postgres::error::SqlState;

use super::{Connected, Database};
use crate::order::UnixMillis;
use crate::store::{StoreError, schema};

/// `application_name` of the session.
const SESSION: &str = "millrace preflight";
/// Name of the advisory lock that makes a preflight the only one of its database, followed by the schema.
const LOCK: &str = "millrace preflight:";
const DOING: &str = "looking at the database for a preflight";

/// WAL segments beyond the current one. A commit only has to fill them.
pub const SEGMENTS_READY: &str = "SELECT count(*) FROM pg_ls_waldir()
     WHERE name ~ '^[0-9A-F]{24}$' AND name > pg_walfile_name(pg_current_wal_lsn())";

/// The same, and the others, the current one included.
const SEGMENTS: &str = "SELECT count(*) FILTER (WHERE name > written), count(*) FILTER (WHERE name <= written)
      FROM pg_ls_waldir(), pg_walfile_name(pg_current_wal_lsn()) written WHERE name ~ '^[0-9A-F]{24}$'";

/// Connects and takes the lock; with the process id of the server's session. Drops a scratch table that a killed preflight has left.
///
/// # Errors
/// [`StoreError::PreflightRunning`], [`StoreError::Schema`] if the schema is not this release's, or the
/// database's error.
pub async fn open(database: &Database) -> Result<(Connected, i32), StoreError> {
    let mut session = database.connect(SESSION).await?;
    schema::check(&mut session, database.schema()).await?;
    let name = format!("{LOCK}{}", database.schema());
    let sql = "SELECT pg_try_advisory_lock(hashtextextended($1, 0)), pg_backend_pid()";
    let locked = database
        .timed(DOING, session.query_one(sql, &[&name]))
        .await?;
    if !locked.get::<_, bool>(0) {
        return Err(StoreError::PreflightRunning);
    }
    scratch::drop_table(database, &session).await?;
    Ok((session, locked.get(1)))
}

/// Gives the lock back, so that the next preflight need not wait until the server has noticed the end of the session.
pub async fn close(database: &Database, session: Connected) {
    let released = session.batch_execute("SELECT pg_advisory_unlock_all()");
    // Otherwise the server releases it with the session.
    let _ = database.timed(DOING, released).await;
}

/// Free bytes of the server's file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Of that of the rows.
    pub rows: u64,
    /// Of that of `pg_wal`.
    pub wal: u64,
    /// Whether they are the same one.
    pub shared: bool,
}

impl Room {
    /// The room below `directory`. A `pg_wal` that may not be entered counts as a part of it.
    fn below(directory: &Path) -> Option<Self> {
        let rows = free_bytes(directory)?;
        let wal = directory.join("pg_wal");
        let device = |path: &Path| rustix::fs::stat(path).map(|found| found.st_dev).ok();
        let apart = free_bytes(&wal).filter(|_| device(&wal) != device(directory));
        Some(Room {
            rows,
            wal: apart.unwrap_or(rows),
            shared: apart.is_none(),
        })
    }

    /// The tighter one.
    pub fn least(&self) -> u64 {
        self.rows.min(self.wal)
    }
}

/// What the database tells of itself.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Our role.
    pub role: String,
    /// `wal_segment_size` in bytes.
    pub segment_bytes: u64,
    /// WAL segments beyond the current one that exist already; `None`: the role may not see them.
    pub segments_ready: Option<u64>,
    /// The current one, and those before it that are not recycled yet; likewise.
    pub segments_behind: Option<u64>,
    /// `wal_keep_size` in bytes.
    pub wal_keep_size: u64,
    /// Slots that keep WAL, and an archive that does.
    pub kept: Vec<kept::Kept>,
    /// The setting of this name, in bytes.
    pub max_wal_size: u64,
    /// The setting of this name, in bytes.
    pub min_wal_size: u64,
    /// The setting of this name, in seconds.
    pub checkpoint_timeout_s: u64,
    /// The setting of this name, 0 to 1.
    pub checkpoint_completion_target: f64,
    /// The setting of this name.
    pub fsync: bool,
    /// The setting of this name.
    pub full_page_writes: bool,
    /// The setting of this name that a session of our role begins with.
    pub synchronous_commit: String,
    /// Whether autovacuum is on, for `orders` too.
    pub autovacuum: bool,
    /// Whether `orders` is past a threshold of autovacuum.
    pub orders_due: bool,
    /// The setting of this name: the standbys that commits wait for.
    pub synchronous_standby_names: String,
    /// How many of them a commit waits for.
    pub standbys_awaited: u64,
    /// Connected standbys; `None`: the role may not see them.
    pub standbys: Option<u64>,
    /// Those that commits wait for.
    pub standbys_synchronous: u64,
    /// Those that are still catching up, for which no commit waits yet.
    pub standbys_catching_up: u64,
    /// The most bytes of WAL that one of them has not flushed yet.
    pub standby_lag_bytes: u64,
    /// Connections that our role may have in this database.
    pub connections: u64,
    /// Connections of others.
    pub connections_of_others: u64,
    /// The room for the data, if the server is on this machine and the role may see where they are.
    pub room: Option<Room>,
    /// Free units of every SKU whose sale has not ended.
    pub units_free: u64,
    /// Least difference between this machine's clock and the server's, in milliseconds.
    pub clock_apart_ms: u64,
}

#[cfg(test)]
impl Facts {
    /// Those of a good database, with 1 GB of `max_wal_size` and 60 segments ready.
    pub(crate) fn good() -> Self {
        Facts {
            role: "shop".to_owned(),
            segment_bytes: 16 << 20,
            segments_ready: Some(60),
            segments_behind: Some(1),
            wal_keep_size: 0,
            kept: Vec::new(),
            max_wal_size: 1 << 30,
            min_wal_size: 1 << 30,
            checkpoint_timeout_s: 300,
            checkpoint_completion_target: 0.9,
            fsync: true,
            full_page_writes: true,
            synchronous_commit: "on".to_owned(),
            autovacuum: true,
            orders_due: false,
            synchronous_standby_names: String::new(),
            standbys_awaited: 0,
            standbys: Some(0),
            standbys_synchronous: 0,
            standbys_catching_up: 0,
            standby_lag_bytes: 0,
            connections: 97,
            connections_of_others: 3,
            room: None,
            units_free: 500,
            clock_apart_ms: 3,
        }
    }
}

const FACTS: &str = "
    WITH orders_table AS (
        SELECT greatest(c.reltuples, 0) AS rows, s.n_dead_tup, s.n_ins_since_vacuum, age(c.relfrozenxid) AS age,
               coalesce(c.reloptions && ARRAY['autovacuum_enabled=false', 'autovacuum_enabled=off'], false) AS excepted
          FROM pg_class c LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid WHERE c.oid = 'orders'::regclass
    ), setting AS (
        SELECT name, setting::float8 AS number FROM pg_settings WHERE vartype IN ('integer', 'real')
    ), backends AS (
        SELECT (SELECT sum(numbackends) FROM pg_stat_database) AS everybodys,
               (SELECT count(*) FROM pg_stat_activity
                 WHERE application_name LIKE 'millrace%' AND datname = current_database()) AS ours
    ), standby AS (
        SELECT count(*) AS connected, count(*) FILTER (WHERE sync_state IN ('sync', 'quorum')) AS synchronous,
               count(*) FILTER (WHERE state = 'catchup') AS catching_up,
               max(pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn)) AS lag
          FROM pg_stat_replication
         WHERE state IN ('catchup', 'streaming')
           -- Readers of a publication use walsenders too.
           AND pid NOT IN (SELECT active_pid FROM pg_replication_slots
                            WHERE slot_type = 'logical' AND active_pid IS NOT NULL)
    )
    SELECT current_user::text,
           pg_size_bytes(current_setting('wal_segment_size')),
           pg_size_bytes(current_setting('max_wal_size')),
           pg_size_bytes(current_setting('min_wal_size')),
           (SELECT number::int8 FROM setting WHERE name = 'checkpoint_timeout'),
           (SELECT number FROM setting WHERE name = 'checkpoint_completion_target'),
           current_setting('fsync')::bool,
           current_setting('full_page_writes')::bool,
           -- Our own sessions turn it on if it is off.
           (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit'),
           current_setting('autovacuum')::bool AND current_setting('track_counts')::bool AND NOT o.excepted,
           coalesce(o.n_dead_tup > current_setting('autovacuum_vacuum_threshold')::float8
                       + current_setting('autovacuum_vacuum_scale_factor')::float8 * o.rows, false)
               OR coalesce(current_setting('autovacuum_vacuum_insert_threshold')::float8 >= 0
                       AND o.n_ins_since_vacuum > current_setting('autovacuum_vacuum_insert_threshold')::float8
                       + current_setting('autovacuum_vacuum_insert_scale_factor')::float8 * o.rows, false)
               OR o.age > current_setting('autovacuum_freeze_max_age')::float8,
           trim(current_setting('synchronous_standby_names')),
           CASE WHEN pg_has_role('pg_read_all_stats', 'USAGE') THEN standby.connected END,
           standby.synchronous,
           coalesce(standby.lag, 0)::int8,
           -- The settings name the connections that are kept for superusers and, from 16 on, for others.
           least((SELECT sum(CASE name WHEN 'max_connections' THEN number ELSE -number END)::int8 FROM setting
                   WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')),
                 (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user AND NOT rolsuper),
                 (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())),
           greatest(backends.everybodys - backends.ours, 0)::int8,
           CASE WHEN inet_server_addr() IS NOT DISTINCT FROM inet_client_addr()
                THEN (SELECT setting FROM pg_settings WHERE name = 'data_directory') END,
           -- What the orders of nodes have taken is in their shares.
           (SELECT coalesce(sum(s.total - s.held - s.sold - coalesce(h.taken, 0)), 0)::int8
              FROM sku s LEFT JOIN (SELECT sku, sum(held + sold) AS taken FROM stock_share GROUP BY sku) h ON h.sku = s.id
             WHERE s.closes_at IS NULL OR s.closes_at > now()),
           (extract(epoch FROM clock_timestamp()) * 1000)::int8,
           pg_backend_pid(),
           pg_size_bytes(current_setting('wal_keep_size')),
           standby.catching_up
      FROM orders_table o, backends, standby";

/// Reads the facts.
///
/// # Errors
/// If the database does not answer.
pub async fn read(database: &Database, session: &Connected) -> Result<Facts, StoreError> {
    let segments = present(database, session).await?;
    let kept = kept::read(database, session).await?;
    let statement = database.timed(DOING, session.prepare(FACTS)).await?;
    let asked = UnixMillis::of_machine();
    let row = database.timed(DOING, session.query_one(&statement, &[]));
    let row = row.await?;
    let answered = UnixMillis::of_machine();
    let natural = |at: usize| u64::try_from(row.get::<_, i64>(at)).unwrap_or(0);
    // The server read its clock between the two readings.
    let there = row.get::<_, i64>(19);
    let apart = (asked.0 - there).max(there - answered.0);
    let directory = row
        .get::<_, Option<String>>(17)
        .filter(|_| runs_here(row.get(20)));
    let names: String = row.get(11);
    Ok(Facts {
        role: row.get(0),
        segment_bytes: natural(1).max(1),
        segments_ready: segments.map(|(ready, _)| ready),
        segments_behind: segments.map(|(_, behind)| behind),
        wal_keep_size: natural(21),
        kept,
        max_wal_size: natural(2),
        min_wal_size: natural(3),
        checkpoint_timeout_s: natural(4),
        checkpoint_completion_target: row.get(5),
        fsync: row.get(6),
        full_page_writes: row.get(7),
        synchronous_commit: row.get(8),
        autovacuum: row.get(9),
        orders_due: row.get(10),
        standbys_awaited: awaited(&names),
        synchronous_standby_names: names,
        standbys: row.get::<_, Option<i64>>(12).map(i64::unsigned_abs),
        standbys_synchronous: natural(13),
        standbys_catching_up: natural(22),
        standby_lag_bytes: natural(14),
        connections: natural(15),
        connections_of_others: natural(16),
        room: directory.and_then(|directory| Room::below(Path::new(&directory))),
        units_free: natural(18),
        clock_apart_ms: u64::try_from(apart).unwrap_or(0),
    })
}

/// Bytes that are free for others than root on the file system of `path`; `None` if it may not be entered.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(path).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Whether the process of a backend is one of this machine. Addresses alone do not tell: a pooler has its own.
fn runs_here(backend: i32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{backend}/comm"));
    name.is_ok_and(|name| name.trim_end() == "postgres")
}

/// The number of standbys that each commit waits for with these `synchronous_standby_names`: `FIRST 2 (a, b)`,
/// `ANY 2 (a, b)`, `2 (a, b)`, or a list, which means one.
fn awaited(names: &str) -> u64 {
    if names.is_empty() {
        return 0;
    }
    let number = names.split_once('(').and_then(|(before, _)| {
        let last = before.split_whitespace().next_back()?;
        last.parse().ok()
    });
    number.unwrap_or(1)
}

/// Segments ahead of the current one, and the others; `None`: the role may not look.
async fn present(
    database: &Database,
    session: &Connected,
) -> Result<Option<(u64, u64)>, StoreError> {
    match database
        .timed(DOING, session.query_one(SEGMENTS, &[]))
        .await
    {
        Ok(row) => {
            let natural = |at: usize| u64::try_from(row.get::<_, i64>(at)).unwrap_or(0);
            Ok(Some((natural(0), natural(1))))
        }
        Err(error) if is_not_allowed(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the role lacks a right.
fn is_not_allowed(error: &StoreError) -> bool {
    matches!(error, StoreError::Statement { source, .. }
        if source.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_waits_for_as_many_standbys_as_the_setting_says() {
        for (names, number) in [
            ("", 0),
            ("*", 1),
            ("a, b", 1),
            ("\"2 (x\"", 1),
            ("FIRST 2 (a, b)", 2),
            ("any 3(a, b, c)", 3),
            ("2 (a, b)", 2),
            ("ANY 1 (*)", 1),
        ] {
            assert_eq!(awaited(names), number, "{names}");
        }
    }
}
