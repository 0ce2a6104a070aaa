//! Several nodes on one database: the transactions by which PostgreSQL arbitrates between them.
//!
//! * [`membership`]: a node's row: joining, renewing, leaving; [`formats`]: nodes of several releases;
//! * [`lanes`]: which node has which lane, and hand-over;
//! * [`shares`]: units that a node may sell: lending, giving back, wants; [`recall`]: lowering a total;
//! * [`lists`]: orders that wait for units;
//! * [`stock`]: what nodes read of their shares and of the sale as a whole;
//! * [`terms`]: what operators change, and which nodes know it;
//! * [`takeover`]: what becomes of a node that is gone;
//! * [`disband`]: what becomes of all of them, after a failover or if a process on its own takes their place.
//!
//! Rules of every transaction here:
//!
//! 1. It checks the epoch of the node that asks, under a lock on the node's row that excludes raising the epoch.
//!    A node that was taken over can change nothing.
//! 2. It locks in the order node, writer, lane, orders, sku, shares; nodes by number, lanes by number, SKUs by id.
//! 3. A node's `lent` is changed by that node, or by the one that raised its epoch. Nobody else takes units from it.
//! 4. It is safe to repeat after a lost answer: it names the epoch that it expects, or the row tells what happened.
//!
//! [docs/NODES.md](../../../docs/NODES.md) has the protocol. A single node uses nothing of this once it has started.

pub mod disband;
pub mod formats;
pub mod lanes;
pub mod lists;
pub mod membership;
pub mod recall;
pub mod shares;
pub mod stock;
pub mod takeover;
pub mod terms;

use std::time::Duration;

use tokio_postgres::{Client, Error, Transaction};

use super::StoreError;
use super::postgres::{Database, NodeLease};

/// Longest time of a transaction over all orders that wait: a million take some seconds, on a slow machine a minute.
const LONG: Duration = Duration::from_secs(600);

/// Does `work` in a transaction of a node whose lease is in force, and commits it.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub(in crate::store) async fn transact<T>(
    database: &Database,
    lease: NodeLease,
    doing: &'static str,
    work: impl AsyncFnOnce(&Transaction<'_>) -> Result<T, Error>,
) -> Result<T, StoreError> {
    let mut client = database.pooled().await?;
    let done = database
        .timed(doing, commit(&mut client, lease, work))
        .await?;
    done.ok_or_else(|| lease.is_lost())
}

/// The same for work on each order that waits, of which there may be millions.
async fn transact_long<T>(
    database: &Database,
    lease: NodeLease,
    doing: &'static str,
    work: impl AsyncFnOnce(&Transaction<'_>) -> Result<T, Error>,
) -> Result<T, StoreError> {
    let mut client = database.pooled().await?;
    let done = tokio::time::timeout(LONG, commit(&mut client, lease, work)).await;
    let timeout = StoreError::Timeout { doing, after: LONG };
    let done = done.map_err(|_| timeout)?;
    done.map_err(StoreError::statement(doing))?
        .ok_or_else(|| lease.is_lost())
}

/// `None`: the lease is not in force.
async fn commit<T>(
    client: &mut Client,
    lease: NodeLease,
    work: impl AsyncFnOnce(&Transaction<'_>) -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    let transaction = client.transaction().await?;
    if !in_force(&transaction, lease).await? {
        return Ok(None);
    }
    let done = work(&transaction).await?;
    transaction.commit().await?;
    Ok(Some(done))
}

/// Locks the row of a node against raising its epoch, and tells whether the lease is in force: the node was not taken
/// over and has not left. A dead node's lease, which its successor has for the replay, is not in force here.
async fn in_force(transaction: &Transaction<'_>, lease: NodeLease) -> Result<bool, Error> {
    let row = transaction
        .query_opt(
            "SELECT FROM node WHERE node = $1 AND epoch = $2 AND state IN ('single', 'joining', 'active') FOR KEY SHARE",
            &[&lease.node, &lease.epoch],
        )
        .await?;
    Ok(row.is_some())
}
