//! Sessions of others whose locks our sessions wait for.

use super::Database;
use crate::store::StoreError;

/// `pg_blocking_pids` locks the server's lock manager for a moment, so it is called only for sessions of ours that have
/// waited for longer than a batch that waits for another one.
const WAITED_MS: i32 = 200;

/// Most sessions that are named.
const NAMED_MAX: i64 = 5;

/// Of a statement its first words and names are shown, and none of its values: `readyz` is open to everyone.
const BEGINNING: &str = r#"^\s*((?:[[:alpha:]_."]+\s+){0,3}[[:alpha:]_."]+)"#;

/// Sessions that hold a lock which sessions of this database's Millrace have waited for, and after them those that wait in
/// between: each with the remedy, for an operator. Empty if none waits.
///
/// # Errors
/// If the database does not answer.
pub async fn blockers(database: &Database) -> Result<Vec<String>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "looking for locks",
            client.query(
                "WITH RECURSIVE ours AS MATERIALIZED (
                     SELECT pid FROM pg_stat_activity
                      WHERE datname = current_database() AND application_name LIKE 'millrace%'
                        AND wait_event_type = 'Lock'
                        AND state_change < clock_timestamp() - $1::int4 * interval '1 ms'
                 ), blocker AS (
                     SELECT unnest(pg_blocking_pids(pid)) AS pid FROM ours
                     UNION
                     SELECT unnest(pg_blocking_pids(pid)) FROM blocker WHERE pid <> 0
                 )
                 SELECT format('session %s (%s) (%s)', b.pid,
                               concat_ws(', ', coalesce(nullif(application_name, ''), usename),
                                         CASE wait_event_type WHEN 'Lock' THEN 'waits for a lock itself' ELSE state END,
                                         'since ' || extract(epoch FROM clock_timestamp() - xact_start)::int8 || ' s',
                                         substring(query FROM $2)),
                               format('end its transaction, or SELECT pg_terminate_backend(%s)', b.pid)),
                        wait_event_type IS NOT DISTINCT FROM 'Lock' AS waits
                   FROM blocker b JOIN pg_stat_activity USING (pid)
                  WHERE application_name NOT LIKE 'millrace%'
                 UNION ALL
                 SELECT 'a prepared transaction (see pg_prepared_xacts)', false FROM blocker WHERE pid = 0
                  ORDER BY waits LIMIT $3",
                &[&WAITED_MS, &BEGINNING, &NAMED_MAX],
            ),
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
