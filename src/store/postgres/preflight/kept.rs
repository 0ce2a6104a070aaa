//! Holders of WAL: until they let go, a checkpoint recycles nothing behind them, and the disk fills.

use std::time::{Duration, Instant};

use super::super::{Connected, Database};
use super::DOING;
use crate::store::StoreError;

/// Longest wait for standbys, slots and the archive.
const FOLLOWED_MAX: Duration = Duration::from_secs(30);
/// Pause between two looks at them.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A replication slot that keeps WAL, or an archive that does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its description.
    pub holder: String,
    /// WAL that it keeps, if known.
    pub bytes: Option<u64>,
    /// Whether it does not let go by itself.
    pub stuck: bool,
    /// Whether it is the archive, which keeps the WAL of every commit to come.
    pub archive: bool,
    /// The remedy, for an operator.
    pub remedy: String,
}

const KEPT: &str = "
    SELECT format('replication slot %s', slot_name) || CASE WHEN active THEN '' ELSE ', which nobody reads,' END,
           pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8, NOT active, false,
           CASE WHEN active THEN 'let its reader catch up'
                ELSE format('start its reader, or, if that never comes back, SELECT pg_drop_replication_slot(%L)', slot_name)
           END
      FROM pg_replication_slots WHERE restart_lsn IS NOT NULL
    UNION ALL
    SELECT 'the archive, to which archive_command or archive_library copies nothing,', NULL, true, true,
           'mend it (the server''s log has the reason), or turn archive_mode off'
      FROM pg_stat_archiver
     WHERE current_setting('archive_mode') <> 'off'
       AND (last_failed_time > coalesce(last_archived_time, '-infinity')
            OR current_setting('archive_command') = '' AND coalesce(current_setting('archive_library', true), '') = '')";

/// Every holder, as of now.
pub(super) async fn read(
    database: &Database,
    session: &Connected,
) -> Result<Vec<Kept>, StoreError> {
    let rows = database.timed(DOING, session.query(KEPT, &[])).await?;
    let kept = rows.iter().map(|row| Kept {
        holder: row.get(0),
        bytes: row
            .get::<_, Option<i64>>(1)
            .map(|bytes| u64::try_from(bytes).unwrap_or(0)),
        stuck: row.get(2),
        archive: row.get(3),
        remedy: row.get(4),
    });
    Ok(kept.collect())
}

/// Whether standbys, slots that are read, and the archive have all but the last segment.
const FOLLOWED: &str = "
    SELECT greatest(
               (SELECT max(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)) FROM pg_replication_slots WHERE active),
               (SELECT max(pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn)) FROM pg_stat_replication
                 WHERE state IN ('catchup', 'streaming')),
               0) < pg_size_bytes(current_setting('wal_segment_size'))
           AND (current_setting('archive_mode') = 'off' OR coalesce(
               (SELECT last_archived_wal >= pg_walfile_name(pg_current_wal_lsn()
                                          - pg_size_bytes(current_setting('wal_segment_size')))
                  FROM pg_stat_archiver), false))";

/// Waits until they have followed, so that the next checkpoint can recycle, and the next commit need not wait
/// behind WAL on its way to a standby. False: they have not in time.
pub(super) async fn followed(database: &Database, session: &Connected) -> Result<bool, StoreError> {
    let deadline = Instant::now() + FOLLOWED_MAX;
    loop {
        let row = database.timed(DOING, session.query_one(FOLLOWED, &[]));
        if row.await?.get(0) {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
