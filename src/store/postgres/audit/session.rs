//! The session of an audit: a dedicated connection, the lock that makes it the only one, and tables read in
//! parts.

use std::time::{Duration, Instant};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, IsolationLevel, Row, Statement};

use super::super::{Connected, Database};
use crate::store::StoreError;

/// `application_name` of the session.
pub const SESSION: &str = "millrace audit";

const DOING: &str = "auditing";
/// Target time of a part, and so of its snapshot.
const PART: Duration = Duration::from_millis(200);
/// Interval of progress reports.
const PROGRESS: Duration = Duration::from_secs(5);
/// Interval between attempts to take the lock.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// Name of the lock, followed by the schema. An audit holds it for its whole length, a pruning for each part.
pub const LOCK: &str = "millrace audit:";

/// Rows read at once, in one short snapshot. Within these limits a part grows and shrinks towards a fifth of a
/// second.
#[derive(Clone, Copy, Debug)]
pub struct PartRows {
    /// Rows of the first part.
    pub first: i64,
    /// Maximum of rows.
    pub most: i64,
    /// Maximum of hashes of keys in memory, about 35 bytes each.
    pub keys: i64,
}

impl Default for PartRows {
    fn default() -> Self {
        PartRows {
            first: 20_000,
            most: 200_000,
            keys: 1_000_000,
        }
    }
}

/// Minimum of rows of a part; the audit fails if a statement with so few times out.
const ROWS_MIN: i64 = 500;

pub(super) struct Session {
    database: Database,
    client: Connected,
    rows: i64,
    most: i64,
    keys: i64,
    read: i64,
    told: Instant,
}

/// A part of a table.
pub(super) struct Part {
    pub(super) rows: Vec<Row>,
    /// Number of rows of the table that they stand for.
    pub(super) count: i64,
    /// Whether it is the last part.
    pub(super) is_last: bool,
    /// The rows of `Also`, if it was read.
    pub(super) also: Option<Vec<Row>>,
}

/// A statement to run in the same snapshot: with every part, or only with the last one.
pub(super) struct Also<'a> {
    pub(super) statement: &'a Statement,
    pub(super) always: bool,
    /// Called before the snapshot is taken, and after the statement.
    pub(super) look: &'a mut (dyn FnMut() + Send),
}

/// Counts the rows of the table that a part's rows stand for.
pub(super) type Count = fn(&[Row]) -> i64;

/// Sums up column `AT`.
pub(super) fn sum<const AT: usize>(rows: &[Row]) -> i64 {
    rows.iter().map(|row| row.get::<_, i64>(AT)).sum()
}

/// Counts each row as one.
pub(super) fn each(rows: &[Row]) -> i64 {
    rows.len() as i64
}

impl Session {
    /// Connects and takes the lock. Its holder may be a session whose client has just gone, so the lock is
    /// awaited for up to the step timeout.
    pub(super) async fn open(database: &Database, rows: PartRows) -> Result<Self, StoreError> {
        let client = database.connect(SESSION).await?;
        // Forces walks along a key, whatever the statistics of a fresh table say. The server cancels a
        // statement that takes too long by itself, even if its client has gone. JIT is off, because it would
        // compile unavoidable sequential scans, which takes longer than running them.
        let setup = format!(
            "SET statement_timeout = {}; SET enable_seqscan = off; SET enable_bitmapscan = off;
             SET plan_cache_mode = force_custom_plan; SET jit = off",
            database.step_timeout().as_millis()
        );
        database
            .timed("setting up a session", client.batch_execute(&setup))
            .await?;
        let name = format!("{LOCK}{}", database.schema());
        let asked = Instant::now();
        loop {
            let row = database
                .timed(
                    DOING,
                    client.query_one(
                        "SELECT pg_try_advisory_lock(hashtextextended($1, 0))",
                        &[&name],
                    ),
                )
                .await?;
            if row.get(0) {
                break;
            }
            if asked.elapsed() >= database.step_timeout() {
                return Err(StoreError::AuditRunning);
            }
            tokio::time::sleep(LOCK_RETRY).await;
        }
        Ok(Session {
            database: database.clone(),
            client,
            rows: rows.first.min(rows.most),
            most: rows.most,
            keys: rows.keys.max(1),
            read: 0,
            told: Instant::now(),
        })
    }

    pub(super) fn keys_max(&self) -> i64 {
        self.keys
    }

    pub(super) async fn prepare(&self, sql: &str) -> Result<Statement, StoreError> {
        self.database.timed(DOING, self.client.prepare(sql)).await
    }

    /// The rows of one short statement.
    pub(super) async fn query(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        self.client
            .query(sql, parameters)
            .await
            .map_err(StoreError::statement(DOING))
    }

    /// One part of the table `what`, in a snapshot of its own. `key` holds the first parameters of `statement`;
    /// the last is the maximum of rows. A part that times out on the server is retried with fewer rows.
    pub(super) async fn part(
        &mut self,
        what: &'static str,
        statement: &Statement,
        key: &[&(dyn ToSql + Sync)],
        count: Count,
        mut also: Option<Also<'_>>,
    ) -> Result<Part, StoreError> {
        // Longer than the server's own timeout; for a server that has stopped answering.
        let patience = self.database.step_timeout() * 4;
        loop {
            let (started, limit) = (Instant::now(), self.rows);
            let work = self.attempt(statement, key, limit, count, also.as_mut());
            let done =
                tokio::time::timeout(patience, work)
                    .await
                    .map_err(|_| StoreError::Timeout {
                        doing: DOING,
                        after: patience,
                    })?;
            match done {
                Ok(part) => {
                    self.adapt(started.elapsed());
                    self.progress(what, part.count);
                    return Ok(part);
                }
                Err(error)
                    if error.code() == Some(&SqlState::QUERY_CANCELED) && limit > ROWS_MIN =>
                {
                    self.rows = (limit / 4).max(ROWS_MIN);
                }
                Err(error) => return Err(StoreError::statement(DOING)(error)),
            }
        }
    }

    async fn attempt(
        &mut self,
        statement: &Statement,
        key: &[&(dyn ToSql + Sync)],
        limit: i64,
        count: Count,
        mut also: Option<&mut Also<'_>>,
    ) -> Result<Part, Error> {
        let mut parameters = key.to_vec();
        parameters.push(&limit);
        if let Some(also) = also.as_deref_mut() {
            (also.look)();
        }
        // The first statement takes the snapshot that all of them read.
        let transaction = self
            .client
            .build_transaction()
            .isolation_level(IsolationLevel::RepeatableRead)
            .read_only(true)
            .start()
            .await?;
        let rows = transaction.query(statement, &parameters).await?;
        let count = count(&rows);
        let is_last = count < limit;
        let also = match also {
            Some(also) if is_last || also.always => {
                let rows = transaction.query(also.statement, &[]).await?;
                (also.look)();
                Some(rows)
            }
            _ => None,
        };
        transaction.commit().await?;
        Ok(Part {
            rows,
            count,
            is_last,
            also,
        })
    }

    fn adapt(&mut self, took: Duration) {
        // At most doubled, so that one part read from the cache does not make the next too large.
        let factor = (PART.as_secs_f64() / took.as_secs_f64().max(1e-6)).min(2.0);
        let rows = (self.rows as f64 * factor) as i64;
        self.rows = rows.clamp(ROWS_MIN.min(self.most), self.most);
    }

    /// Counts rows read, and logs the progress periodically.
    fn progress(&mut self, what: &'static str, rows: i64) {
        self.read += rows;
        if self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            tracing::info!(rows = self.read, reading = what, "auditing");
        }
    }
}
