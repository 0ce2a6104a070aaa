//! Several nodes on one database: the transactions by which PostgreSQL arbitrates between them.
//!
//! * [`membership`]: a node's row: joining, renewing, leaving;
//! * [`lanes`]: which node has which lane, and hand-over;
//! * [`shares`]: units that a node may sell: lending, giving back, wants; [`recall`]: lowering a total;
//! * [`stock`]: what nodes read of their shares and of the sale as a whole;
//! * [`terms`]: what operators change, and which nodes know it;
//! * [`takeover`]: what becomes of a node that is gone.
//!
//! Rules of every transaction here:
//!
//! 1. It checks the epoch of the node that asks, under a lock on the node's row that excludes raising the epoch.
//!    A node that was taken over can change nothing.
//! 2. It locks in the order node, writer, lane, orders, sku, shares; nodes by number, lanes by number, SKUs by id.
//! 3. A node's `lent` is changed by that node, or by the one that raised its epoch. Nobody else takes units from it.
//! 4. It is safe to repeat after a lost answer: it names the epoch that it expects, or the row tells what happened.
//!
//! [docs/NODES.md](../../../docs/NODES.md) has the protocol. A single node uses nothing of this.

pub mod lanes;
pub mod membership;
pub mod recall;
pub mod shares;
pub mod stock;
pub mod takeover;
pub mod terms;

use tokio_postgres::Transaction;

use super::postgres::NodeLease;

/// Locks the row of a node against raising its epoch, and tells whether the lease is in force: the node was not taken
/// over and has not left. A dead node's lease, which its successor has for the replay, is not in force here.
async fn in_force(
    transaction: &Transaction<'_>,
    lease: NodeLease,
) -> Result<bool, tokio_postgres::Error> {
    let row = transaction
        .query_opt(
            "SELECT FROM node WHERE node = $1 AND epoch = $2 AND state IN ('joining', 'active') FOR KEY SHARE",
            &[&lease.node, &lease.epoch],
        )
        .await?;
    Ok(row.is_some())
}
