//! Writes that change an order after its row exists, except cancelling: payments, expiry, recovery from a
//! receipt, refunds. Each writer has one connection, one transaction at a time and its own row of `writer`.
//!
//! # The conversation
//!
//! ```text
//!   ──► BEGIN; UPDATE writer SET batch = n; the work: rows of `orders` locked by id    one flush
//!   ──► what follows from it: rows of `sku` locked by id, counters; COMMIT             one flush
//! ```
//!
//! A hot row of `sku` is locked for the length of the second flush, with no round trip of ours in between.
//! Every transaction locks rows of `orders` by id, then payments, then rows of `sku` by id, so writers and
//! workers cannot deadlock.
//!
//! The effect of a transaction is known before its COMMIT, and its number (`fenced`) tells whether the COMMIT
//! took effect. So an `Err` always means that nothing has changed, and each commit is applied to memory once. A
//! statement that overtakes a failed BEGIN would be a transaction of its own; therefore these sessions are
//! read-only by default.
//!
//! * this file: the writer, and a transaction around a piece of work;
//! * [`payments`]: messages of providers, and the matching of payments to their orders (`matching`);
//! * [`expiry`]: orders that were not paid in time;
//! * [`refunds`]: refunds that an operator records;
//! * [`waitlist`]: orders that wait for units.
//!
//! The pieces of work are functions of their module, with the writer as first parameter:
//! `payments::ingest(writer, …)`, `expiry::end_overdue(writer, …)`.

pub mod expiry;
mod matching;
pub mod payments;
pub mod refunds;
mod statements;
pub mod waitlist;

use std::time::Duration;

use futures_util::future::{join, join_all};
use tokio_postgres::types::ToSql;

use self::statements::{Closing, Sql, Statements};
use super::fenced::{FencedWriter, timed};
use super::postgres::{Connected, Database, NodeLease};
use super::{StoreError, WriteError};
use crate::faults::crash_point;
use crate::order::payment::Verdict;
use crate::order::{Ended, OrderId, OrderUnits, UnixMillis};

/// Longest wait for a row lock, in milliseconds. A callback is answered within a second, so a payment that
/// cannot be matched by then is stored as an orphan and matched later.
const LOCK_TIMEOUT_MS: u32 = 400;
/// Pause between attempts to learn the outcome of a commit.
const RESOLVE_PAUSE: Duration = Duration::from_millis(200);

/// Units of one order that moved in the database and have to move in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitMove {
    /// The order and its units.
    pub units: OrderUnits,
    /// Their new counter.
    pub to: Destination,
}

/// The counter that units moved to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// From held to sold.
    Sold,
    /// From held to free, because the order ended this way.
    Free(Ended),
    /// From sold to free.
    Restocked,
    /// From sold out of the sale: the SKU's total drops by the same number.
    Withdrawn,
    /// At a node: out of the sold units of the sale, which are not those of its share. `swept` sold units have left its
    /// share before.
    Pool {
        /// Units that left the share.
        swept: u32,
        /// Whether the order's units are free in the pool; else they are out of the sale.
        is_free: bool,
    },
    /// Nowhere: only the order's status has changed.
    Nowhere,
}

/// A payment that was matched to its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matched {
    /// The provider's name for the payment.
    pub payment_id: String,
    /// The order.
    pub order_id: OrderId,
    /// The verdict.
    pub verdict: Verdict,
}

/// The effect of a transaction.
#[derive(Debug, Default)]
pub struct Settlement {
    /// Messages that were new.
    pub events: u64,
    /// Payments that were matched.
    pub matched: Vec<Matched>,
    /// The orders of new payments that could not be matched and are orphans, each with the moment at which its
    /// payment counts as made.
    pub orphans: Vec<(OrderId, UnixMillis)>,
    /// New payments that name no order of ours.
    pub without_order: u64,
    /// Units that moved.
    pub moved: Vec<UnitMove>,
}

/// Set-up of each session: read-only outside of a transaction that says otherwise (see above), and plans by
/// index only, because a plan made while a table was small is kept when the table has grown.
const SESSION: &str =
    "SET default_transaction_read_only = on; SET enable_seqscan = off; SET enable_bitmapscan = off";

/// A fenced writer of settlements.
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

    /// Connects if there is no connection. Connecting is also how lost commits are noticed.
    ///
    /// # Errors
    /// If the database does not answer, or this process may not write any more.
    pub async fn connected(&mut self) -> Result<(), StoreError> {
        match self.session {
            Some(_) => Ok(()),
            None => self.connect().await,
        }
    }

    fn node(&self) -> i16 {
        self.row.lease.node
    }

    /// Number of commits that the database acknowledged and lost, as found so far.
    pub fn commits_lost(&self) -> u64 {
        self.row.commits_lost()
    }

    /// Runs `work` in one numbered transaction, then the statements that it leaves for the end together with
    /// the COMMIT. Returns the value of `work` once it is committed.
    ///
    /// # Errors
    /// On an error nothing has changed. [`StoreError::Fenced`] where this process may not write any more.
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
        // Noted beforehand, so that it also holds if this call is dropped half-way.
        self.row.suspect = Some(session.backend);
        let attempt = tokio::time::timeout(step, self.attempt(&session, number, work));
        let (done, closing) = match attempt.await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => {
                self.roll_back(session, step).await;
                return Err(match error {
                    Attempt::Moved => StoreError::Data(format!(
                        "the row of writer {} has changed since this process last wrote it",
                        self.row.shard
                    )),
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
        let NodeLease { node, epoch, .. } = self.row.lease;
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
            // Reconnecting tells which process moved our row.
            return Err(Attempt::Moved);
        }
        let (done, closing) = worked?;
        for sql in closing.statements() {
            session.statements.of(&session.client, sql).await?;
        }
        Ok((done, closing))
    }

    /// Reads, in a transaction that the server itself cancels after half a step.
    ///
    /// # Errors
    /// The database's error; [`StoreError::is_overlong`] if it took too long.
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
            // The connection is dropped too; the server cancels the statement by itself.
            Err(_) => return Err(StoreError::Timeout { doing, after: step }),
        };
        self.roll_back(session, step).await;
        read
    }

    /// Keeps the connection for the next transaction if it still answers.
    async fn roll_back(&mut self, session: Session, step: Duration) {
        let rolled_back = timed("ROLLBACK", step, session.client.batch_execute("ROLLBACK")).await;
        if let Ok(Ok(())) = rolled_back {
            self.row.suspect = None;
            self.session = Some(session);
        }
    }

    /// Whether a COMMIT whose answer was lost took effect. Retries until the database answers.
    async fn find_out(&mut self, failed: &StoreError) -> Result<bool, StoreError> {
        tracing::warn!(reason = %failed, "the answer to a commit of payments or expiries was lost; asking the database whether it took effect");
        loop {
            match self.row.resolve().await {
                Ok(resolved) => return Ok(resolved.was_committed),
                Err(WriteError::Retry(_)) => tokio::time::sleep(RESOLVE_PAUSE).await,
                Err(other) => return Err(fatal(other)),
            }
        }
    }

    async fn connect(&mut self) -> Result<(), StoreError> {
        let resolved = self.row.resolve().await.map_err(fatal)?;
        let (doing, step) = ("setting up a session", self.row.database.step_timeout());
        timed(doing, step, resolved.client.batch_execute(SESSION))
            .await
            .map_err(fatal)?
            .map_err(StoreError::statement(doing))?;
        self.session = Some(Session {
            client: resolved.client,
            backend: resolved.backend,
            statements: Statements::new(self.row.lease),
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
    // Polled, and therefore sent, in this order.
    let (done, committed) = join(join_all(last), session.client.batch_execute("COMMIT")).await;
    for done in done {
        if let Err(error) = done {
            // The server refused this statement and all after it: the COMMIT was a ROLLBACK.
            return Err(match error.as_db_error() {
                Some(_) => Closed::RolledBack(error),
                None => Closed::Unknown(error),
            });
        }
    }
    committed.map_err(Closed::Unknown)
}

/// Reason why a COMMIT did not succeed.
enum Closed {
    /// It was rolled back.
    RolledBack(tokio_postgres::Error),
    /// Unknown; the transaction's number tells.
    Unknown(tokio_postgres::Error),
}

/// Reason why the work of a transaction was not done.
enum Attempt {
    /// Our row of `writer` has another number or epoch than we left it with.
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
