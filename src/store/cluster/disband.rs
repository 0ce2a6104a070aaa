//! Taking a cluster apart: every right of every node ends, as if all had left in the middle of their work. Rows are dead until
//! their logs are replayed, lanes are nobody's, and so are units.
//!
//! After a failover, in the transaction of the first join on the new timeline; and before a process on its own takes the place
//! of nodes that are gone.

use tokio_postgres::{Error, Row, Transaction};

use super::takeover::{self, milliseconds};
use crate::store::StoreError;
use crate::store::postgres::order_log::{self, NotedLog};
use crate::store::postgres::{Connected, Database};

/// A node that has not left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remaining {
    /// Its number.
    pub node: i16,
    /// Whether it may be running: nobody has fenced it, and it has not given its lease up.
    pub may_run: bool,
    /// Its order log, if that may hold orders that are not rows yet.
    pub log: Option<NotedLog>,
    /// The newest format of a group that it can read.
    pub reads_format: i16,
    /// How long it may answer from its memory after a contact.
    pub answer_lease_ms: u64,
}

/// The nodes that have not left.
///
/// # Errors
/// If the database does not answer.
pub async fn remaining(
    database: &Database,
    session: &Connected,
) -> Result<Vec<Remaining>, StoreError> {
    let sql = format!(
        "SELECT node, state <> 'dead' AND renewals >= 0, reads_format, answer_lease_ms, journal_in_use AND journal_id IS NOT NULL, {}
           FROM node WHERE state IN ('joining', 'active', 'dead') ORDER BY node",
        order_log::COLUMNS
    );
    let rows = database
        .timed("looking for other nodes", session.query(&sql, &[]))
        .await?;
    let of = |row: &Row| Remaining {
        node: row.get(0),
        may_run: row.get(1),
        reads_format: row.get(2),
        answer_lease_ms: milliseconds(row, 3),
        log: row.get::<_, bool>(4).then(|| order_log::noted_log(row, 5)),
    };
    Ok(rows.iter().map(of).collect())
}

/// Ends every right of these nodes, all that have not left, for a process on its own: `session` has the lock that keeps nodes
/// away. Backends that keep a row of theirs locked are terminated after a second.
///
/// # Errors
/// If the database does not answer.
pub async fn disband_gone(
    database: &Database,
    session: &mut Connected,
    nodes: &[i16],
) -> Result<(), StoreError> {
    let doing = "disbanding the nodes that are gone";
    takeover::without_blockers(database, session, doing, nodes, async |session| {
        let transaction = session.transaction().await?;
        transaction
            .batch_execute("SET LOCAL lock_timeout = 0")
            .await?;
        disband(&transaction).await?;
        transaction.commit().await
    })
    .await
}

/// Disbands the cluster if the server has another timeline than at the last join.
pub(super) async fn follow_timeline(transaction: &Transaction<'_>) -> Result<(), Error> {
    let row = transaction
        .query_one(
            "SELECT timeline, left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) FROM database_identity",
            &[],
        )
        .await?;
    let (noted, now): (Option<String>, String) = (row.get(0), row.get(1));
    if noted.as_ref() == Some(&now) {
        return Ok(());
    }
    if let Some(noted) = noted {
        tracing::warn!(
            before = noted,
            now,
            "the database was failed over: every node starts again, and lanes open once all logs are replayed"
        );
        disband(transaction).await?;
    }
    transaction
        .execute("UPDATE database_identity SET timeline = $1", &[&now])
        .await
        .map(|_| ())
}

/// Ends every right: rows are dead until their own processes or survivors have replayed their logs, lanes are nobody's, and
/// so are units.
async fn disband(transaction: &Transaction<'_>) -> Result<(), Error> {
    const NODES: &str = "SELECT node FROM node WHERE state IN ('joining', 'active', 'dead') ORDER BY node FOR UPDATE";
    let nodes = transaction.query(NODES, &[]).await?;
    let nodes: Vec<i16> = nodes.iter().map(|row| row.get(0)).collect();
    for statement in [
        "SELECT FROM writer WHERE node = ANY ($1) ORDER BY node, shard FOR UPDATE",
        "UPDATE node SET state = 'dead', taken_by = NULL, taken_epoch = NULL, epoch = epoch + 1 WHERE node = ANY ($1)",
        "UPDATE writer w SET epoch = n.epoch FROM node n WHERE n.node = w.node AND n.node = ANY ($1)",
        "SELECT FROM lane WHERE node = ANY ($1) ORDER BY lane FOR UPDATE",
        "UPDATE lane SET node = NULL, blocked_by = NULL, epoch = epoch + 1,
                ids_until_ms = greatest(ids_until_ms, (SELECT max(ids_leased_until_ms) FROM node)) WHERE node = ANY ($1)",
    ] {
        transaction.execute(statement, &[&nodes]).await?;
    }
    for node in nodes {
        takeover::dissolve(transaction, node).await?;
    }
    transaction
        .batch_execute(
            "DELETE FROM stock_want; UPDATE sku SET recall = NULL WHERE recall IS NOT NULL",
        )
        .await
}
