//! Preparations for a sale, as far as the role may make them. Each is safe to repeat.

use std::time::Duration;

use serde::Serialize;

use super::super::{Connected, Database};
use super::{DOING, Facts, is_not_allowed, kept, present, remedies};
use crate::store::StoreError;

/// Longest wait for the checkpoint.
const CHECKPOINT_MAX: Duration = Duration::from_secs(300);
/// Room that WAL segments leave on the disk: PostgreSQL ends if it cannot write a segment.
pub const ROOM_LEFT: u64 = 128 << 20;
/// Rows at the end of `orders` that are read.
const TAIL_ROWS: i64 = 100_000;
/// The same in pages.
const TAIL_PAGES: i64 = 2_000;

/// A preparation.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// `prewarm`, `wal_segments` or `checkpoint`.
    pub name: &'static str,
    /// Whether it was made.
    pub done: bool,
    /// What was done, or why not.
    pub detail: String,
    /// SQL for someone who may, if the role may not.
    pub sql: Vec<String>,
}

/// Most segments that stay ready after a checkpoint: `max_wal_size`, less the current one.
pub fn segments_most(facts: &Facts) -> u64 {
    (facts.max_wal_size / facts.segment_bytes).saturating_sub(1)
}

/// Reads `sku` and the end of `orders` into memory, makes WAL segments until `segments` are ready, and makes the
/// checkpoint that recycles them.
///
/// # Errors
/// If the database does not answer.
pub async fn run(
    database: &Database,
    session: &Connected,
    facts: &Facts,
    segments: u64,
) -> Result<Vec<Step>, StoreError> {
    let prewarmed = prewarm(database, session).await?;
    let mut made = make_segments(database, session, facts, segments).await?;
    let checkpointed = checkpoint(session, facts).await?;
    if let Some((ready, _)) = present(database, session).await? {
        made.detail.push_str(&format!("; {ready} are ready"));
    }
    Ok(vec![prewarmed, made, checkpointed])
}

async fn make_segments(
    database: &Database,
    session: &Connected,
    facts: &Facts,
    wanted: u64,
) -> Result<Step, StoreError> {
    let count = match facts.segments_ready {
        Some(ready) if ready >= wanted => 0,
        _ => segments_to_pass(facts, wanted),
    };
    if count > 0
        && let Some(reason) = obstacle(facts, count)
    {
        return Ok(Step {
            name: "wal_segments",
            done: false,
            detail: reason,
            sql: Vec::new(),
        });
    }
    // An empty segment is not switched, so a record comes first. Switches use up what is ready and make the rest;
    // the checkpoint then recycles all of them but the last ones.
    let switch = "SELECT pg_logical_emit_message(false, 'millrace', ''); SELECT pg_switch_wal()";
    for _ in 0..count {
        match database.timed(DOING, session.batch_execute(switch)).await {
            Err(error) if is_not_allowed(&error) => {
                let mut sql = vec![remedies::segments(count), remedies::CHECKPOINT.to_owned()];
                sql.extend(remedies::may_prepare(&facts.role));
                return Ok(Step {
                    name: "wal_segments",
                    done: false,
                    detail: format!("{count} could not be made: the role may not"),
                    sql,
                });
            }
            switched => switched?,
        }
    }
    let mut detail = match count {
        0 => "enough were ready".to_owned(),
        count => format!("went through {count}"),
    };
    if count > 0 && !kept::followed(database, session).await? {
        detail.push_str("; a standby, a slot or the archive is still behind, so repeat it later");
    }
    Ok(Step {
        name: "wal_segments",
        done: true,
        detail,
        sql: Vec::new(),
    })
}

/// Segments to go through until a checkpoint can recycle `wanted`: those before the last one, less the ones that
/// `wal_keep_size` keeps.
fn segments_to_pass(facts: &Facts, wanted: u64) -> u64 {
    let kept = facts.wal_keep_size.div_ceil(facts.segment_bytes);
    let behind = facts.segments_behind.unwrap_or(0);
    wanted + 2 + kept.saturating_sub(behind.saturating_sub(1))
}

/// The reason why going through `count` segments would harm or be of no use.
fn obstacle(facts: &Facts, count: u64) -> Option<String> {
    let mut stuck = facts.kept.iter().filter(|kept| kept.stuck);
    if let Some(kept) = stuck.next() {
        return Some(format!(
            "{} would keep them all from being recycled: {}",
            kept.holder, kept.remedy
        ));
    }
    let bytes = count.saturating_sub(facts.segments_ready.unwrap_or(0)) * facts.segment_bytes;
    let room = facts.room?;
    (room.wal < bytes + ROOM_LEFT).then(|| {
        format!(
            "they take {} MB of the {} MB that the disk of pg_wal has, and PostgreSQL ends if that is full",
            bytes >> 20,
            room.wal >> 20
        )
    })
}

async fn checkpoint(session: &Connected, facts: &Facts) -> Result<Step, StoreError> {
    let checkpoint = session.batch_execute(remedies::CHECKPOINT);
    let made = tokio::time::timeout(CHECKPOINT_MAX, checkpoint).await;
    let made = made.map_err(|_| StoreError::Timeout {
        doing: "making a checkpoint",
        after: CHECKPOINT_MAX,
    })?;
    let (done, detail, sql) = match made.map_err(StoreError::statement("making a checkpoint")) {
        Err(error) if is_not_allowed(&error) => {
            let [_, grant] = remedies::may_prepare(&facts.role);
            let sql = vec![remedies::CHECKPOINT.to_owned(), grant];
            (false, "the role may not", sql)
        }
        made => {
            made?;
            (true, "made", Vec::new())
        }
    };
    Ok(Step {
        name: "checkpoint",
        done,
        detail: detail.to_owned(),
        sql,
    })
}

/// With `pg_prewarm` if the extension is there, else by reading.
async fn prewarm(database: &Database, session: &Connected) -> Result<Step, StoreError> {
    let doing = "reading tables into memory";
    let extension = "SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
                      WHERE e.extname = 'pg_prewarm'";
    let schema = database.timed(doing, session.query_opt(extension, &[]));
    let (sql, how) = match schema.await? {
        Some(row) => {
            let prewarm = format!("{}.pg_prewarm", row.get::<_, &str>(0));
            let tail = |table: &str| {
                format!(
                    "CASE WHEN pg_relation_size('{table}') = 0 THEN 0 ELSE {prewarm}('{table}', 'buffer', 'main',
                         greatest(pg_relation_size('{table}') / current_setting('block_size')::int8 - {TAIL_PAGES}, 0))
                     END"
                )
            };
            let sql = format!(
                "SELECT {prewarm}('sku') + {prewarm}('sku_pkey') + {} + {}",
                tail("orders"),
                tail("orders_pkey")
            );
            (sql, "pages by pg_prewarm")
        }
        None => {
            // The sums have the rows themselves read, not only their index.
            let sql = format!(
                "SELECT (SELECT count(held + sold) FROM sku)
                      + (SELECT count(amount)
                           FROM (SELECT amount FROM orders ORDER BY order_id DESC LIMIT {TAIL_ROWS}) tail)"
            );
            (sql, "rows by reading them")
        }
    };
    let read = database.timed(doing, session.query_one(&sql, &[]));
    Ok(Step {
        name: "prewarm",
        done: true,
        detail: format!(
            "sku and the end of orders: {} {how}",
            read.await?.get::<_, i64>(0)
        ),
        sql: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Room;
    use super::super::kept::Kept;
    use super::*;

    #[test]
    fn segments_are_passed_until_the_kept_ones_are_behind() {
        let mut facts = Facts::good();
        facts.segments_ready = Some(0);
        assert_eq!(segments_to_pass(&facts, 6), 8);
        facts.wal_keep_size = 32 * facts.segment_bytes;
        facts.segments_behind = Some(3);
        assert_eq!(segments_to_pass(&facts, 6), 38);
        facts.segments_behind = Some(40);
        assert_eq!(segments_to_pass(&facts, 6), 8);
        facts.segments_behind = None;
        assert_eq!(segments_to_pass(&facts, 6), 40);
    }

    #[test]
    fn no_segment_is_made_that_the_disk_does_not_hold_or_nobody_recycles() {
        let mut facts = Facts::good();
        facts.segments_ready = Some(2);
        assert_eq!(obstacle(&facts, 10), None, "nothing is known of the disk");
        let new = 8 * facts.segment_bytes;
        let room = |wal: u64| Room {
            rows: 1 << 40,
            wal,
            shared: false,
        };
        facts.room = Some(room(new + ROOM_LEFT));
        assert_eq!(obstacle(&facts, 10), None);
        facts.room = Some(room(new + ROOM_LEFT - 1));
        let reason = obstacle(&facts, 10).expect("a reason");
        assert!(reason.contains("they take 128 MB"), "{reason}");
        facts.room = None;
        let slot = |stuck| Kept {
            holder: "replication slot gone".to_owned(),
            bytes: Some(0),
            stuck,
            archive: false,
            remedy: "drop it".to_owned(),
        };
        facts.kept = vec![slot(false)];
        assert_eq!(obstacle(&facts, 10), None, "it is read");
        facts.kept.push(slot(true));
        let reason = obstacle(&facts, 10).expect("a reason");
        assert!(
            reason.contains("slot gone") && reason.contains("drop it"),
            "{reason}"
        );
    }
}
