//! A row of `writer`: it numbers its owner's transactions, so that a commit of unknown outcome is
//! settled and never guessed.
//!
//! Each transaction moves the number by one. When a connection dies or a step times out, the next
//! connection first takes the lock on that row: whoever gets it knows that the old transaction has
//! ended. If it does not get it, the old backend is terminated. The number then tells whether the
//! transaction was committed. The same row is the fence against a process of an older epoch.

use std::time::Duration;

use super::postgres::{Connected, Database, NodeLease};
use super::{StoreError, WriteError};

/// The statement that moves the number: node, shard, epoch, the new number. It changes no row
/// where this process was replaced.
pub(super) const FENCE: &str = "UPDATE writer SET batch = $4::int8 WHERE node = $1 AND shard = $2 AND epoch = $3 AND batch = $4::int8 - 1";

/// One row of `writer`, and what is known of it.
#[derive(Debug)]
pub(super) struct FencedWriter {
    pub(super) database: Database,
    pub(super) lease: NodeLease,
    pub(super) shard: i16,
    /// What its connections call themselves.
    name: String,
    /// The last transaction that is known to be committed; `None` before the first connection.
    pub(super) committed: Option<i64>,
    /// The transaction whose outcome is not known.
    pub(super) unknown: Option<i64>,
    /// The backend that may still be at it.
    pub(super) suspect: Option<i32>,
    commits_lost: u64,
}

/// A new connection, and what became of the last transaction.
pub(super) struct Settled {
    pub(super) client: Connected,
    pub(super) backend: i32,
    /// The transaction of unknown outcome was committed.
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

    /// Commits that the database had acknowledged and lost, as found so far.
    pub(super) fn commits_lost(&self) -> u64 {
        self.commits_lost
    }

    /// Makes a connection and settles what the last one left open.
    pub(super) async fn settle(&mut self) -> Result<Settled, WriteError> {
        let NodeLease { node, epoch } = self.lease;
        let client = self
            .database
            .connect(&self.name)
            .await
            .map_err(WriteError::Retry)?;
        let locked = timed("settling the last batch", self.database.step_timeout(), async {
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
                    "writer {} has no row",
                    self.shard
                ))));
            }
            Err(source) => {
                // Somebody holds our row: the old backend, still in its transaction.
                self.end_suspect(&client).await?;
                return Err(WriteError::Retry(StoreError::Statement {
                    doing: "settling the last batch",
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
                "the database has lost batches that it had committed: it was probably failed over to a standby \
                 that lagged; the rows in them are gone"
            );
        }
        self.committed = Some(batch);
        Ok(Settled {
            client,
            backend,
            was_committed: unknown == Some(batch),
        })
    }

    /// Terminates the backend of the connection that was given up. Only one that still bears our
    /// name: process ids are used again.
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
                "terminated a backend that had stalled"
            ),
            Err(e) => {
                tracing::warn!(worker = self.shard, backend = suspect, reason = %e, "could not terminate a stalled backend")
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
