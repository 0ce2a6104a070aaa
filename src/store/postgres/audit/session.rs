//! The session of an audit: a connection of its own, the lock that makes it the only one, and
//! tables read in parts.

use std::time::{Duration, Instant};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, IsolationLevel, Row, Statement};

use super::super::{Connected, Database};
use crate::store::StoreError;

/// What the session calls itself in `pg_stat_activity`.
pub const SESSION: &str = "millrace audit";

const DOING: &str = "auditing";
/// What a part should take, and with it how long a snapshot is held.
const PART: Duration = Duration::from_millis(200);
/// How often the audit says how far it is.
const PROGRESS: Duration = Duration::from_secs(5);
/// How often the lock is tried while it is waited for.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// The lock that an audit holds for as long as it lasts and a deletion of old rows for each part;
/// the name is followed by the schema.
pub const LOCK: &str = "millrace audit:";

/// How many rows are read at once, in one short snapshot. Within these limits a part grows and
/// shrinks towards a fifth of a second.
#[derive(Clone, Copy, Debug)]
pub struct PartRows {
    /// At first.
    pub first: i64,
    /// At most.
    pub most: i64,
    /// Hashes of keys that are kept at once, about 35 bytes each.
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

/// Fewest rows of a part; a statement that times out with so few is given up.
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
    /// How many rows of the table they stand for.
    pub(super) count: i64,
    /// Whether nothing is behind it.
    pub(super) is_last: bool,
    /// What `Also` has read.
    pub(super) also: Option<Vec<Row>>,
}

/// What is read in the same snapshot: with every part, or only with the last one.
pub(super) struct Also<'a> {
    pub(super) statement: &'a Statement,
    pub(super) always: bool,
    /// Called immediately before and after.
    pub(super) look: &'a mut (dyn FnMut() + Send),
}

/// How many rows of the table a part's rows stand for.
pub(super) type Count = fn(&[Row]) -> i64;

/// The sum of column `AT`.
pub(super) fn sum<const AT: usize>(rows: &[Row]) -> i64 {
    rows.iter().map(|row| row.get::<_, i64>(AT)).sum()
}

/// Each row for itself.
pub(super) fn each(rows: &[Row]) -> i64 {
    rows.len() as i64
}

impl Session {
    /// Connects and takes the lock. Another holder may be one whose client has just gone: it is
    /// waited for as long as a step may take.
    pub(super) async fn open(database: &Database, rows: PartRows) -> Result<Self, StoreError> {
        let client = database.connect(SESSION).await?;
        // A part is a walk along a key, whatever the statistics of a fresh table make of it. The
        // server ends a statement that takes too long by itself, also if its client has gone. What
        // cannot avoid a sequential scan seems dear enough to be compiled, which takes longer.
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

    /// Rows of one short statement.
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

    /// One part of the table `what`, in a snapshot of its own: `key` are the first parameters of
    /// `statement`, how many rows it may read is the last. A part that takes the server too long is
    /// tried again with fewer rows.
    pub(super) async fn part(
        &mut self,
        what: &'static str,
        statement: &Statement,
        key: &[&(dyn ToSql + Sync)],
        count: Count,
        mut also: Option<Also<'_>>,
    ) -> Result<Part, StoreError> {
        // The server's own timeout comes first; this is for one that has stopped answering.
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
        also: Option<&mut Also<'_>>,
    ) -> Result<Part, Error> {
        let mut parameters = key.to_vec();
        parameters.push(&limit);
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
                (also.look)();
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
        // At most twice as many, so that one part out of the cache does not make the next too large.
        let factor = (PART.as_secs_f64() / took.as_secs_f64().max(1e-6)).min(2.0);
        let rows = (self.rows as f64 * factor) as i64;
        self.rows = rows.clamp(ROWS_MIN.min(self.most), self.most);
    }

    /// Counts what was read, and says now and then how far it is.
    fn progress(&mut self, what: &'static str, rows: i64) {
        self.read += rows;
        if self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            tracing::info!(rows = self.read, reading = what, "auditing");
        }
    }
}
