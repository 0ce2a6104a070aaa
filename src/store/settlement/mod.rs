//! Everything that happens to an order after its row is there, but for cancelling: payments,
//! expiry, recovery from a receipt, refunds. One connection and one transaction at a time a writer;
//! each of several writers has its own row of `writer`.
//!
//! # The conversation
//!
//! ```text
//!   ──► BEGIN; UPDATE writer SET batch = n; the work: rows of `orders` locked by id    one flush
//!   ──► what follows from it: rows of `sku` locked by id, counters; COMMIT             one flush
//! ```
//!
//! A hot row of `sku` is locked for the length of the second flush, which no answer of ours
//! interrupts. Every transaction locks rows of `orders` by id, then payments, then rows of `sku` by
//! id, so writers and workers never wait for one another in a circle.
//!
//! What a transaction has done is known before its COMMIT, and whether that was carried out is
//! told by its number (`fenced`). So an `Err` always means that nothing has changed, and memory
//! is moved once for what has. A statement that overtook a BEGIN that failed would be a transaction
//! of its own: outside of one that says otherwise, these sessions are read-only.
//!
//! * here: the writer, and a transaction around a piece of work;
//! * [`payments`]: messages of providers, and payments that meet their orders (`matching`);
//! * [`expiry`]: orders that were not paid in time;
//! * [`refunds`]: what a person has done about money that must go back.

pub mod expiry;
mod matching;
pub mod payments;
pub mod refunds;
mod statements;

use std::time::Duration;

use futures_util::future::{join, join_all};
use tokio_postgres::types::ToSql;

use self::statements::{Closing, Sql, Statements};
use super::fenced::{FencedWriter, timed};
use super::postgres::{Connected, Database, NodeLease};
use super::{StoreError, WriteError};
use crate::faults::crash_point;
use crate::order::{Ended, OrderUnits};

/// Longest wait for a row that somebody else holds, in milliseconds. A callback is answered within
/// a second, so a payment that cannot be matched by then is stored as an orphan and matched later.
const LOCK_TIMEOUT_MS: u32 = 400;
/// Pause between attempts to find out what became of a commit.
const SETTLE_PAUSE: Duration = Duration::from_millis(200);

/// Units of one order that have moved in the database and have to move in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitMove {
    /// Whose, and how many.
    pub units: OrderUnits,
    /// Where they went.
    pub to: Destination,
}

/// Where units went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// From held to sold.
    Sold,
    /// From held to free, because the order ended so.
    Free(Ended),
    /// From sold to free.
    Restocked,
    /// From sold out of the sale: the total is less by them.
    Withdrawn,
    /// Nowhere: only the order's status has changed.
    Nowhere,
}

/// How each session begins: as told at the head of this file; and always by an index, because a
/// plan that was made while a table was small is kept when it has grown.
const SESSION: &str =
    "SET default_transaction_read_only = on; SET enable_seqscan = off; SET enable_bitmapscan = off";

/// One writer of all this.
#[derive(Debug)]
pub struct SettlementWriter {
    row: FencedWriter,
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    client: Connected,
    backend: i32,
    statements: Statements,
}

impl SettlementWriter {
    /// The writer `shard`, not connected yet.
    pub fn new(database: Database, lease: NodeLease, shard: i16) -> Self {
        SettlementWriter {
            row: FencedWriter::new(database, lease, shard, "settlement"),
            session: None,
        }
    }

    /// Connects where there is no connection. This is how lost commits are noticed.
    ///
    /// # Errors
    /// Where the database does not answer, or this process may not write any more.
    pub async fn connected(&mut self) -> Result<(), StoreError> {
        match self.session {
            Some(_) => Ok(()),
            None => self.connect().await,
        }
    }

    /// Commits that the database had acknowledged and lost, as found so far.
    pub fn commits_lost(&self) -> u64 {
        self.row.commits_lost()
    }

    /// Does `work` in one numbered transaction, and what it leaves to be done together with the
    /// COMMIT. Returns what it returned, once it is committed.
    ///
    /// # Errors
    /// Nothing has changed then. [`StoreError::Fenced`] where this process may not write any more.
    async fn transact<'a, T>(
        &mut self,
        doing: &'static str,
        work: impl AsyncFnOnce(
            &Connected,
            &Statements,
        ) -> Result<(T, Closing<'a>), tokio_postgres::Error>,
    ) -> Result<T, StoreError> {
        if self.session.is_none() {
            self.connect().await?;
        }
        let (Some(session), Some(committed)) = (self.session.take(), self.row.committed) else {
            unreachable!("connect() returned without a session or an error");
        };
        let number = committed + 1;
        let step = self.row.database.step_timeout();
        // Noted beforehand, so that it also holds where this call is given up half-way.
        self.row.suspect = Some(session.backend);
        let attempt = tokio::time::timeout(step, self.attempt(&session, number, work));
        let (done, closing) = match attempt.await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => {
                self.roll_back(session, step).await;
                return Err(match error {
                    Attempt::Moved => {
                        StoreError::Data(format!("the row of writer {} was moved", self.row.shard))
                    }
                    Attempt::Statement(source) => StoreError::Statement { doing, source },
                });
            }
            Err(_) => return Err(StoreError::Timeout { doing, after: step }),
        };
        // From here on a COMMIT may reach the server.
        self.row.unknown = Some(number);
        crash_point("settlement.before_commit");
        let failed = match timed(doing, step, close(&session, &closing)).await {
            Ok(Ok(())) => {
                crash_point("settlement.committed");
                self.row.unknown = None;
                self.row.suspect = None;
                self.row.committed = Some(number);
                self.session = Some(session);
                return Ok(done);
            }
            Ok(Err(Closed::RolledBack(source))) => {
                self.row.unknown = None;
                self.roll_back(session, step).await;
                return Err(StoreError::Statement { doing, source });
            }
            Ok(Err(Closed::Unknown(source))) => StoreError::Statement { doing, source },
            Err(WriteError::Retry(error)) => error,
            Err(other) => StoreError::Data(other.to_string()),
        };
        drop(session);
        if self.find_out(&failed).await? {
            Ok(done)
        } else {
            Err(failed)
        }
    }

    async fn attempt<'a, T>(
        &self,
        session: &Session,
        number: i64,
        work: impl AsyncFnOnce(
            &Connected,
            &Statements,
        ) -> Result<(T, Closing<'a>), tokio_postgres::Error>,
    ) -> Result<(T, Closing<'a>), Attempt> {
        let NodeLease { node, epoch } = self.row.lease;
        let fence: [&(dyn ToSql + Sync); 4] = [&node, &self.row.shard, &epoch, &number];
        let move_number = session.statements.of(&session.client, Sql::Fence).await?;
        let begin = format!("BEGIN READ WRITE; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}");
        let (begun, fenced, worked) = tokio::join!(
            session.client.batch_execute(&begin),
            session.client.execute(move_number, &fence),
            work(&session.client, &session.statements),
        );
        begun?;
        if fenced? != 1 {
            // Connecting again tells who moved our row.
            return Err(Attempt::Moved);
        }
        let (done, closing) = worked?;
        for sql in closing.statements() {
            session.statements.of(&session.client, sql).await?;
        }
        Ok((done, closing))
    }

    /// Reads, in a transaction that the server itself ends after half a step.
    ///
    /// # Errors
    /// What the database says; [`StoreError::is_overlong`] where it took too long.
    async fn read<T>(
        &mut self,
        doing: &'static str,
        work: impl AsyncFnOnce(&Connected, &Statements) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, StoreError> {
        if self.session.is_none() {
            self.connect().await?;
        }
        let Some(session) = self.session.take() else {
            unreachable!("connect() returned without a session or an error");
        };
        let step = self.row.database.step_timeout();
        let limit = (step / 2).as_millis();
        let begin = format!("BEGIN READ ONLY; SET LOCAL statement_timeout = {limit}");
        let reading = async {
            let (begun, read) = tokio::join!(
                session.client.batch_execute(&begin),
                work(&session.client, &session.statements),
            );
            begun.and(read)
        };
        let read = match timed(doing, step, reading).await {
            Ok(read) => read.map_err(StoreError::statement(doing)),
            // The connection is given up with it; the server ends its work by itself.
            Err(_) => return Err(StoreError::Timeout { doing, after: step }),
        };
        self.roll_back(session, step).await;
        read
    }

    /// Keeps the connection for the next transaction, where it still answers.
    async fn roll_back(&mut self, session: Session, step: Duration) {
        let rolled_back = timed("ROLLBACK", step, session.client.batch_execute("ROLLBACK")).await;
        if let Ok(Ok(())) = rolled_back {
            self.row.suspect = None;
            self.session = Some(session);
        }
    }

    /// What became of a COMMIT whose answer was lost. Takes as long as the database does.
    async fn find_out(&mut self, failed: &StoreError) -> Result<bool, StoreError> {
        tracing::warn!(reason = %failed, "whether payments or expiries were committed is not known; it is found out");
        loop {
            match self.row.settle().await {
                Ok(settled) => return Ok(settled.was_committed),
                Err(WriteError::Retry(_)) => tokio::time::sleep(SETTLE_PAUSE).await,
                Err(other) => return Err(fatal(other)),
            }
        }
    }

    async fn connect(&mut self) -> Result<(), StoreError> {
        let settled = self.row.settle().await.map_err(fatal)?;
        let (doing, step) = ("setting up a session", self.row.database.step_timeout());
        timed(doing, step, settled.client.batch_execute(SESSION))
            .await
            .map_err(fatal)?
            .map_err(StoreError::statement(doing))?;
        self.session = Some(Session {
            client: settled.client,
            backend: settled.backend,
            statements: Statements::default(),
        });
        Ok(())
    }
}

/// Sends the last statements and the COMMIT behind them in one flush.
async fn close(session: &Session, closing: &Closing<'_>) -> Result<(), Closed> {
    let mut last = Vec::new();
    for (sql, parameters) in closing.iter() {
        let statement = session.statements.of(&session.client, sql).await;
        let statement = statement.map_err(Closed::Unknown)?;
        last.push(async move {
            let parameters: Vec<&(dyn ToSql + Sync)> =
                parameters.iter().map(|one| &**one as _).collect();
            session.client.execute(statement, &parameters).await
        });
    }
    // Polled in this order, and so sent in it.
    let (done, committed) = join(join_all(last), session.client.batch_execute("COMMIT")).await;
    for done in done {
        if let Err(error) = done {
            // The server has refused it, and everything after it: the COMMIT was a ROLLBACK.
            return Err(match error.as_db_error() {
                Some(_) => Closed::RolledBack(error),
                None => Closed::Unknown(error),
            });
        }
    }
    committed.map_err(Closed::Unknown)
}

/// Why a transaction was not committed.
enum Closed {
    /// It was rolled back.
    RolledBack(tokio_postgres::Error),
    /// Its number tells whether it was.
    Unknown(tokio_postgres::Error),
}

/// Why a transaction's work was not done.
enum Attempt {
    /// Our row of `writer` is not where we left it.
    Moved,
    /// A statement failed.
    Statement(tokio_postgres::Error),
}

impl From<tokio_postgres::Error> for Attempt {
    fn from(error: tokio_postgres::Error) -> Self {
        Attempt::Statement(error)
    }
}

fn fatal(error: WriteError) -> StoreError {
    match error {
        WriteError::Retry(error) | WriteError::Fatal(error) => error,
        other @ (WriteError::Row { .. } | WriteError::Counter { .. }) => {
            StoreError::Data(other.to_string())
        }
    }
}
