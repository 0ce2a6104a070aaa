//! Reads by primary key whose cost depends on the size of their result, not on the size of the table or its
//! statistics.
//!
//! A part of `orders` is read as `order_id >= … ORDER BY order_id LIMIT …`, for which an index scan reads as
//! many rows as the limit says. But if the planner believes that the table has fewer rows, it reads and sorts
//! the whole table, for every part. It believes so after an `ANALYZE` that ran beside the load of millions of
//! rows, which are not counted before their commit: 26 s instead of 5 ms with 5 million of them. So such a read
//! forbids the other plans.

use deadpool_postgres::Object;
use futures_util::future::join3;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::Database;
use crate::store::StoreError;

/// The access path to the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// In key order, from a key on, up to a limit.
    Order,
    /// By a list of keys.
    Keys,
}

/// Reads the rows of `sql` in one step. The server cancels a statement that takes longer, so that it is not
/// still running when a smaller one follows.
///
/// # Errors
/// [`StoreError::Timeout`] if it takes longer, or the database's error.
pub(super) async fn read(
    database: &Database,
    doing: &'static str,
    by: By,
    sql: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Vec<Row>, StoreError> {
    let client = database.pooled().await?;
    let statement = database.timed(doing, client.prepare_cached(sql)).await?;
    let others = match by {
        By::Order => "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off",
        By::Keys => "SET LOCAL enable_seqscan = off",
    };
    // Earlier than the timeout on this side.
    let ends_ms = (database.step_timeout / 10 * 9).as_millis();
    let begin = format!(
        "BEGIN READ ONLY; {others}; SET LOCAL jit = off; SET LOCAL statement_timeout = {ends_ms}"
    );
    // Sent together, in this order, with the first poll: dropping this future leaves no transaction open.
    let reading = async {
        let (begun, rows, ended) = join3(
            client.batch_execute(&begin),
            client.query(&statement, parameters),
            client.batch_execute("ROLLBACK"),
        )
        .await;
        begun?;
        let rows = rows?;
        ended.map(|()| rows)
    };
    match database.timed(doing, reading).await {
        Err(error @ StoreError::Timeout { .. }) => {
            // The next user of this connection would wait for the running statement.
            drop(Object::take(client));
            Err(error)
        }
        Err(StoreError::Statement { source, .. })
            if source.code() == Some(&SqlState::QUERY_CANCELED) =>
        {
            Err(StoreError::Timeout {
                doing,
                after: database.step_timeout,
            })
        }
        read => read,
    }
}
