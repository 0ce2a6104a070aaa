//! Whether what was committed is on a standby as well.

use super::Database;
use crate::store::StoreError;

/// How this database replicates, as far as our role may see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replication {
    /// Standbys that are connected; 0 also where the role may not see them (it can with
    /// `pg_monitor`).
    pub standbys: i64,
    /// The setting: the standbys that commits wait for.
    pub synchronous_standby_names: String,
    /// The setting, as our sessions have it.
    pub synchronous_commit: String,
}

impl Database {
    /// Looks at what replicates from this database.
    ///
    /// # Errors
    /// Where the database does not answer.
    pub async fn replication(&self) -> Result<Replication, StoreError> {
        let client = self.pooled().await?;
        // Backups and readers of the publication come through walsenders too; the state of one is
        // NULL to a role that may not see it.
        let row = self
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
}
