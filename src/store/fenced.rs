//! A fenced writer. Its row of `writer` numbers its transactions, so that an in-doubt commit is resolved and
//! never guessed.
//!
//! Each transaction raises the number by one. After a connection dies or a step times out, the next connection
//! first locks that row. Getting the lock proves that the old transaction has ended; if the lock is not free in
//! time, the old backend is terminated. The number then tells whether the transaction was committed. The epoch
//! in the same row is the fencing token against a process of an older epoch.

use std::time::Duration;

use super::postgres::{Connected, Database, NodeLease};
use super::{StoreError, WriteError};

/// The statement that raises the number: node, shard, epoch, new number. It changes no row if this process was
/// replaced.
pub(super) const FENCE: &str = "UPDATE writer SET batch = $4::int8 WHERE node = $1 AND shard = $2 AND epoch = $3 AND batch = $4::int8 - 1";

/// A row of `writer`, and this process's knowledge of it.
#[derive(Debug)]
pub(super) struct FencedWriter {
    pub(super) database: Database,
    pub(super) lease: NodeLease,
    pub(super) shard: i16,
    /// The `application_name` of its connections.
    name: String,
    /// The last transaction known to be committed; `None` before the first connection.
    pub(super) committed: Option<i64>,
    /// The transaction in doubt.
    pub(super) unknown: Option<i64>,
    /// The process id of the backend that may still run it.
    pub(super) suspect: Option<i32>,
    commits_lost: u64,
}

/// A new connection, and the outcome of the last transaction.
pub(super) struct Resolved {
    pub(super) client: Connected,
    pub(super) backend: i32,
    /// The transaction in doubt was committed.
    pub(super) was_committed: bool,
}

impl FencedWriter {
    pub(super) fn new(database: Database, lease: NodeLease, shard: i16, what: &str) -> Self {
        FencedWriter {
            name: format!("millrace {what} {}/{shard}", lease.node),
            database,
            lease,
            shard,
            committed: None,
            unknown: None,
            suspect: None,
            commits_lost: 0,
        }
    }

    /// Number of commits that the database acknowledged and lost, as found so far.
    pub(super) fn commits_lost(&self) -> u64 {
        self.commits_lost
    }

    /// Connects and resolves the transaction that the last connection left in doubt.
    pub(super) async fn resolve(&mut self) -> Result<Resolved, WriteError> {
        let NodeLease { node, epoch, .. } = self.lease;
        let client = self
            .database
            .connect(&self.name)
            .await
            .map_err(WriteError::Retry)?;
        let locked = timed("resolving the last batch", self.database.step_timeout(), async {
            client
                .query_opt(
                    "SELECT epoch, batch, pg_backend_pid() FROM writer WHERE node = $1 AND shard = $2 FOR UPDATE",
                    &[&node, &self.shard],
                )
                .await
        })
        .await?;
        let row = match locked {
            Ok(Some(row)) => row,
            Ok(None) => {
                return Err(WriteError::Fatal(StoreError::Data(format!(
                    "writer {} has no row in the table writer",
                    self.shard
                ))));
            }
            Err(source) => {
                // Our row is locked by the old backend, which is still in its transaction.
                self.end_suspect(&client).await?;
                return Err(WriteError::Retry(StoreError::Statement {
                    doing: "resolving the last batch",
                    source,
                }));
            }
        };
        let (found, batch, backend): (i64, i64, i32) = (row.get(0), row.get(1), row.get(2));
        if found != epoch {
            return Err(WriteError::Fatal(StoreError::Fenced { found, ours: epoch }));
        }
        self.suspect = None;
        let unknown = self.unknown.take();
        if let Some(committed) = self.committed.filter(|committed| batch < *committed) {
            let lost = committed.abs_diff(batch);
            self.commits_lost += lost;
            tracing::error!(
                worker = self.shard,
                lost,
                "the database has lost committed batches of this worker, probably by a failover to a standby that \
                 lagged; their orders are restored as far as this process still knows them"
            );
        }
        self.committed = Some(batch);
        Ok(Resolved {
            client,
            backend,
            was_committed: unknown == Some(batch),
        })
    }

    /// Terminates the backend of the abandoned connection, if it still bears our name, because process ids are
    /// reused.
    async fn end_suspect(&self, client: &Connected) -> Result<(), WriteError> {
        let Some(suspect) = self.suspect else {
            return Ok(());
        };
        let ended = timed(
            "terminating the old backend",
            self.database.step_timeout(),
            async {
                client
                    .execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                      WHERE pid = $1 AND application_name = $2 AND pid <> pg_backend_pid()",
                        &[&suspect, &self.name],
                    )
                    .await
            },
        )
        .await?;
        match ended {
            Ok(0) => {}
            Ok(_) => tracing::warn!(
                worker = self.shard,
                backend = suspect,
                "terminated a stalled backend of this worker's last connection"
            ),
            Err(e) => {
                tracing::warn!(worker = self.shard, backend = suspect, reason = %e, "a stalled backend of this worker's last connection could not be terminated; retrying (pg_terminate_backend needs the same role or pg_signal_backend)")
            }
        }
        Ok(())
    }
}

pub(super) async fn timed<T>(
    doing: &'static str,
    after: Duration,
    step: impl Future<Output = T>,
) -> Result<T, WriteError> {
    tokio::time::timeout(after, step)
        .await
        .map_err(|_| WriteError::Retry(StoreError::Timeout { doing, after }))
}
