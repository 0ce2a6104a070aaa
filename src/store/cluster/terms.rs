//! What operators change at one node and every node has to know: terms of SKUs, totals, pauses. The changes are numbered in
//! the order of their commits, and each node says which one it has taken over last.

use tokio_postgres::{Error, GenericClient};

use crate::store::postgres::{Database, NodeLease};
use crate::store::{Ledger, StoreError};

/// Numbers a change, in its transaction. A single node has nobody to tell.
pub(in crate::store) async fn note(
    transaction: &impl GenericClient,
    lease: NodeLease,
) -> Result<(), Error> {
    if lease.ledger == Ledger::Share {
        let sql = "UPDATE database_identity SET terms = terms + 1";
        transaction.execute(sql, &[]).await?;
    }
    Ok(())
}

/// The last change that is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Its number.
    pub number: i64,
    /// Whether an operator has paused every sale.
    pub is_paused: bool,
}

/// The last change that is committed.
///
/// # Errors
/// If the database does not answer.
pub async fn last(database: &Database) -> Result<Changes, StoreError> {
    let sql =
        "SELECT terms, EXISTS (SELECT FROM node WHERE paused AND state IN ('joining', 'active'))
                 FROM database_identity";
    let doing = "looking for changes of terms";
    let rows = database.query_prepared(doing, sql, &[]).await?;
    let row = rows
        .first()
        .ok_or_else(|| StoreError::Data("the database has no identity".to_owned()))?;
    Ok(Changes {
        number: row.get(0),
        is_paused: row.get(1),
    })
}

/// Notes that the node has taken over every change up to this one.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn note_seen(
    database: &Database,
    lease: NodeLease,
    number: i64,
) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    let noted = database
        .timed(
            "noting the terms that are in force",
            client.execute(
                "UPDATE node SET terms_seen = $3 WHERE node = $1 AND epoch = $2",
                &[&lease.node, &lease.epoch, &number],
            ),
        )
        .await?;
    if noted == 1 {
        return Ok(());
    }
    Err(lease.is_lost())
}

/// The other nodes that have not taken over every change up to this one.
///
/// # Errors
/// If the database does not answer.
pub async fn unreached(
    database: &Database,
    lease: NodeLease,
    number: i64,
) -> Result<Vec<i16>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "asking which nodes know a change",
            client.query(
                "SELECT node FROM node WHERE state = 'active' AND node <> $1 AND terms_seen < $2 ORDER BY node",
                &[&lease.node, &number],
            ),
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
