//! Replication of commits to standbys, the position in the write-ahead log, and holders of old row versions.

use std::time::Duration;

use super::Database;
use crate::store::StoreError;

/// The replication of this database, as far as our role may see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replication {
    /// Connected standbys; also 0 if the role may not see them (it may with `pg_monitor`).
    pub standbys: i64,
    /// The setting of this name: the standbys that commits wait for.
    pub synchronous_standby_names: String,
    /// The setting of this name in our sessions.
    pub synchronous_commit: String,
}

/// A holder of old row versions: vacuum cannot remove them although nothing else needs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Horizon {
    /// Description of the session, prepared transaction, slot or standby.
    pub holder: String,
    /// The oldest transaction it holds (xmin), if known.
    pub xmin: String,
    /// Age in seconds, if known.
    pub seconds: Option<u64>,
    /// The remedy, for an operator.
    pub remedy: String,
}

/// Time that old row versions may be kept from vacuum before a warning: the rows of `sku` and `writer` change
/// with each batch, and each retained version slows the next one.
pub const HORIZON_HELD: Duration = Duration::from_secs(300);

/// Transactions; a slot or standby that is fewer behind holds nothing up.
const BEHIND_MIN: i64 = 10_000;

/// Holders of old row versions of this database, as far as our role may see them: sessions and prepared
/// transactions older than `held`, and slots and standbys of any age, because they report none.
///
/// # Errors
/// If the database does not answer.
pub async fn horizons(database: &Database, held: Duration) -> Result<Vec<Horizon>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "looking for old snapshots",
            client.query(
                "SELECT format('session %s (%s, %s)', pid, coalesce(nullif(application_name, ''), usename), state),
                        coalesce(backend_xmin, backend_xid)::text,
                        extract(epoch FROM clock_timestamp() - xact_start)::int8,
                        format('end its transaction, or SELECT pg_terminate_backend(%s)', pid)
                   FROM pg_stat_activity
                  WHERE datname = current_database() AND backend_type = 'client backend'
                    AND coalesce(backend_xmin, backend_xid) IS NOT NULL
                    AND xact_start < clock_timestamp() - $1::int8 * interval '1 second'
                 UNION ALL
                 SELECT format('prepared transaction %L', gid), transaction::text,
                        extract(epoch FROM clock_timestamp() - prepared)::int8,
                        format('COMMIT PREPARED or ROLLBACK PREPARED %L', gid)
                   FROM pg_prepared_xacts
                  WHERE database = current_database()
                    AND prepared < clock_timestamp() - $1::int8 * interval '1 second'
                 UNION ALL
                 SELECT format('replication slot %s', slot_name), xmin::text, NULL,
                        format('let its standby catch up, or SELECT pg_drop_replication_slot(%L)', slot_name)
                   FROM pg_replication_slots WHERE age(xmin) > $2::int8
                 UNION ALL
                 SELECT format('standby %s of session %s', application_name, pid), backend_xmin::text, NULL,
                        'end the long query there, or turn hot_standby_feedback off'
                   FROM pg_stat_replication WHERE age(backend_xmin) > $2::int8",
                &[&i64::try_from(held.as_secs()).unwrap_or(i64::MAX), &BEHIND_MIN],
            ),
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| Horizon {
            holder: row.get(0),
            xmin: row.get(1),
            seconds: row
                .get::<_, Option<i64>>(2)
                .map(|seconds| u64::try_from(seconds).unwrap_or(0)),
            remedy: row.get(3),
        })
        .collect())
}

/// Reads the replication of this database.
///
/// # Errors
/// If the database does not answer.
pub async fn read(database: &Database) -> Result<Replication, StoreError> {
    let client = database.pooled().await?;
    // Backups and readers of the publication use walsenders too. The state of a walsender is NULL to a role
    // that may not see it.
    let row = database
        .timed(
            "looking at the replication",
            client.query_one(
                "SELECT (SELECT count(*) FROM pg_stat_replication
                          WHERE state IN ('catchup', 'streaming')
                            AND pid NOT IN (SELECT active_pid FROM pg_replication_slots
                                             WHERE slot_type = 'logical' AND active_pid IS NOT NULL)),
                        current_setting('synchronous_standby_names'),
                        current_setting('synchronous_commit')",
                &[],
            ),
        )
        .await?;
    Ok(Replication {
        standbys: row.get(0),
        synchronous_standby_names: row.get::<_, &str>(1).trim().to_owned(),
        synchronous_commit: row.get(2),
    })
}

/// The timeline of the server's write-ahead log, as eight hexadecimal digits. It changes when a
/// standby is promoted.
///
/// # Errors
/// If the database does not answer.
pub async fn timeline(database: &Database) -> Result<String, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "asking for the timeline",
            client.query_one(
                "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)",
                &[],
            ),
        )
        .await?;
    Ok(row.get(0))
}

/// The LSN up to which the write-ahead log is written, and the LSN that the standbys of all `slots` have
/// confirmed, in bytes; `None` if a slot does not exist or has confirmed nothing yet.
///
/// # Errors
/// If the database does not answer.
pub async fn wal_progress(
    database: &Database,
    slots: &[String],
) -> Result<(u64, Option<u64>), StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "asking how far the standbys are",
            client.query_one(
                "SELECT (pg_current_wal_insert_lsn() - '0/0')::int8,
                        (SELECT CASE WHEN count(restart_lsn) = cardinality($1::text[])
                                     THEN (min(restart_lsn) - '0/0')::int8 END
                           FROM pg_replication_slots WHERE slot_name = ANY ($1::text[]))",
                &[&slots],
            ),
        )
        .await?;
    let place = |at: i64| u64::try_from(at).unwrap_or(0);
    Ok((place(row.get(0)), row.get::<_, Option<i64>>(1).map(place)))
}
