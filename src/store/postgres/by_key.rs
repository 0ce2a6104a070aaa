//! Reads by the primary key that take as long as their result is long, however large the table is and
//! whatever its statistics say.
//!
//! A part of `orders` is read as `order_id >= … ORDER BY order_id LIMIT …`, of which the index reads as many
//! rows as the limit says. But the planner may believe that there are fewer than that, and then it reads
//! the whole table and sorts it, for every part. It does so after an `ANALYZE` that
//! ran beside the load of millions of rows, which it does not count before their commit: 26 s instead of 5 ms with 5 million of
//! them. So such a read forbids the other plans.

use deadpool_postgres::Object;
use futures_util::future::join3;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::Database;
use crate::store::StoreError;

/// How rows are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// In the order of their keys, from one on, up to a limit.
    Order,
    /// By keys that are listed.
    Keys,
}

impl Database {
    /// The rows that `sql` finds in one step. The server ends a statement that takes longer, so that
    /// it is not still at work when a smaller one is asked instead.
    ///
    /// # Errors
    /// [`StoreError::Timeout`] if it takes longer, and what the database says.
    pub(super) async fn read_by_key(
        &self,
        doing: &'static str,
        by: By,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let client = self.pooled().await?;
        let statement = self.timed(doing, client.prepare_cached(sql)).await?;
        let others = match by {
            By::Order => "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off",
            By::Keys => "SET LOCAL enable_seqscan = off",
        };
        // Sooner than this side gives it up.
        let ends_ms = (self.step_timeout / 10 * 9).as_millis();
        let begin = format!(
            "BEGIN READ ONLY; {others}; SET LOCAL jit = off; SET LOCAL statement_timeout = {ends_ms}"
        );
        // Sent together, in this order, with the first poll: nothing is left open where this is dropped.
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
        match self.timed(doing, reading).await {
            Err(error @ StoreError::Timeout { .. }) => {
                // The next user of this connection would wait for what it is still at.
                drop(Object::take(client));
                Err(error)
            }
            Err(StoreError::Statement { source, .. })
                if source.code() == Some(&SqlState::QUERY_CANCELED) =>
            {
                Err(StoreError::Timeout {
                    doing,
                    after: self.step_timeout,
                })
            }
            read => read,
        }
    }
}
