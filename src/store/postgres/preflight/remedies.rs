//! SQL for an operator to run, each text complete.

use super::scratch::TABLE;
use crate::store::quoted;

/// Lets `role` see WAL segments, standbys and the data directory.
pub fn monitor(role: &str) -> String {
    format!("GRANT pg_monitor TO {};", quoted(role))
}

/// Lets `role` measure in a scratch table.
pub fn create_in_schema(schema: &str, role: &str) -> String {
    format!(
        "GRANT CREATE ON SCHEMA {} TO {};",
        quoted(schema),
        quoted(role)
    )
}

/// Drops a scratch table that was left.
pub fn drop_scratch(schema: &str) -> String {
    format!("DROP TABLE IF EXISTS {}.{TABLE};", quoted(schema))
}

/// Makes `count` WAL segments.
pub fn segments(count: u64) -> String {
    format!(
        "DO $$ BEGIN FOR i IN 1..{count} LOOP PERFORM pg_logical_emit_message(false, 'millrace', ''); \
         PERFORM pg_switch_wal(); END LOOP; END $$;"
    )
}

/// A checkpoint, which recycles the segments.
pub const CHECKPOINT: &str = "CHECKPOINT;";

/// Lets `role` prepare by itself.
pub fn may_prepare(role: &str) -> [String; 2] {
    [
        format!(
            "GRANT EXECUTE ON FUNCTION pg_switch_wal() TO {};",
            quoted(role)
        ),
        format!("GRANT pg_checkpoint TO {};", quoted(role)),
    ]
}

/// Sets settings of the server, in force after a reload.
pub fn set(settings: &[(&str, String)]) -> Vec<String> {
    let set = settings
        .iter()
        .map(|(name, value)| format!("ALTER SYSTEM SET {name} = '{value}';"));
    set.chain(["SELECT pg_reload_conf();".to_owned()]).collect()
}

/// Vacuums the table of orders now, and so not during the sale.
pub fn vacuum_orders(schema: &str) -> String {
    format!("VACUUM (ANALYZE) {}.orders;", quoted(schema))
}

/// Turns autovacuum of the table of orders on.
pub fn autovacuum_orders(schema: &str) -> String {
    format!(
        "ALTER TABLE {}.orders RESET (autovacuum_enabled);",
        quoted(schema)
    )
}
