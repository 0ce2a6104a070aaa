//! The writer of a worker: a batch and its counters in one transaction, exactly once.
//!
//! # The conversation
//!
//! ```text
//!   ──► BEGIN; UPDATE writer SET batch = n; COPY orders FROM STDIN     one flush
//!   ◄── ready for rows
//!   ──► the rows; counters; COMMIT                                     one flush
//!   ◄── done
//! ```
//!
//! SKU rows are locked only in the second flush, so a hot SKU is locked only for the length of a commit. If a
//! statement of it fails, the server turns the COMMIT behind it into a ROLLBACK.
//!
//! A user's trigger may drop rows of a COPY without an error. If `orders` has such a trigger, the rows go in a
//! flush of their own, and the counters and COMMIT follow only after the server's row count has been checked.
//!
//! A commit in doubt is resolved by the batch's number, see `fenced`.

use std::collections::{BTreeMap, HashMap};

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use tokio::sync::OnceCell;
use tokio_postgres::types::ToSql;
use tokio_postgres::{CopyInSink, Statement};

use super::cluster::lists;
use super::error::{refuses_row, sqlstate};
use super::fenced::{FENCE, FencedWriter, Resolved, timed};
use super::postgres::{Connected, Database, NodeLease, orders};
use super::{Ledger, StoreError, WriteError, copy};
use crate::faults::{bug, crash_point};
use crate::order::{Order, OrderId, OrderStatus};

/// Moves `held` of each SKU once, locking by id, and writes the stock log. The LEFT JOIN makes an unknown SKU
/// violate NOT NULL, which aborts the transaction. Written out by [`Ledger::sql`](crate::store::Ledger::sql).
const COUNTERS: &str = "
    WITH wanted AS (
        SELECT w.sku, w.units FROM unnest($1::int4[], $2::int8[]) AS w (sku, units)
    ), locked AS (
        SELECT s.@id, w.units FROM @ledger s JOIN wanted w ON w.sku = s.@id@own ORDER BY s.@id FOR UPDATE OF s
    ), moved AS (
        UPDATE @ledger s SET held = s.held + l.units FROM locked l WHERE s.@id = l.@id@own
        RETURNING s.@id, s.@total, s.held, s.sold
    )
    INSERT INTO stock_log (sku, @columncause, reference, held_delta, total_after, held_after, sold_after)
    SELECT w.sku, @node'orders', $3, w.units, m.@total, m.held, m.sold
      FROM wanted w LEFT JOIN moved m ON m.@id = w.sku ORDER BY w.sku";

/// The same for a single SKU, the common case in a sale: the update locks the row, so there is no locking order
/// to keep and nothing to sort or join.
pub const COUNTER: &str = "
    WITH moved AS (
        UPDATE @ledger SET held = held + $2::int8 WHERE @id = $1::int4@own RETURNING @total, held, sold
    )
    INSERT INTO stock_log (sku, @columncause, reference, held_delta, total_after, held_after, sold_after)
    SELECT $1::int4, @node'orders', $3::text, $2::int8, m.@total, m.held, m.sold
      FROM (SELECT) one LEFT JOIN moved m ON true";

/// Sent before [`fence_statement`]: the lock keeps the triggers that it looks for unchanged until the end.
const BEGIN: &str = "BEGIN; LOCK TABLE orders IN ROW EXCLUSIVE MODE";

/// [`FENCE`], which also returns whether a trigger may drop rows of a COPY: one BEFORE INSERT FOR EACH ROW,
/// which is 1 + 2 + 4 in `tgtype`.
fn fence_statement() -> String {
    format!(
        "{FENCE} RETURNING EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'orders'::regclass AND NOT tgisinternal
            AND tgenabled <> 'D' AND tgtype & 7 = 7)"
    )
}

const TAKE_PARKED: &str = "DELETE FROM parked_orders WHERE order_id = ANY ($1)";

const DEAD_LETTER: &str = "
    INSERT INTO dead_letters (order_id, user_id, sku, quantity, adjustment, amount, currency,
        created_at, expires_at, key_hash, payload_hash, attributes, sqlstate, reason, traceparent)
    SELECT $1, $2, $3, $4, $5, $6, $7, to_timestamp($8::int8 / 1000.0), to_timestamp($9::int8 / 1000.0),
        encode($10::bytea, 'hex')::uuid, $11, $12, $13, $14, $17
      FROM node WHERE node = $15 AND epoch = $16 FOR SHARE
    ON CONFLICT (order_id) DO NOTHING";

const EPOCH: &str = "SELECT epoch FROM node WHERE node = $1";

/// Outcome for an order whose row was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The order is a dead letter now.
    DeadLettered,
    /// The order exists already.
    AlreadyPresent,
}

/// SQLSTATE of a duplicate key.
const UNIQUE_VIOLATION: &str = "23505";
/// SQLSTATE of a row that a trigger dropped: "no data" of the standard.
const NO_DATA: &str = "02000";

/// The work of one transaction.
#[derive(Clone, Copy, Debug)]
enum Work<'a> {
    /// Orders become rows, and the counters move.
    Write(&'a [(&'a Order, OrderStatus)]),
    /// Orders are parked; counters stay.
    Park(&'a [&'a Order]),
    /// Parked orders become rows, and the counters move.
    Unpark(&'a [(&'a Order, OrderStatus)]),
}

impl Work<'_> {
    fn orders(&self) -> usize {
        match self {
            Work::Write(rows) | Work::Unpark(rows) => rows.len(),
            Work::Park(orders) => orders.len(),
        }
    }
}

/// The writer of one worker.
#[derive(Debug)]
pub struct BatchWriter {
    row: FencedWriter,
    session: Option<Session>,
    buffer: BytesMut,
    traceparents: Traceparents,
}

/// `traceparent` of orders whose requests are traced.
pub type Traceparents = HashMap<OrderId, String>;

#[derive(Debug)]
struct Session {
    client: Connected,
    backend: i32,
    fence: Statement,
    copy: Statement,
    counter: Statement,
    counters: Statement,
    /// Prepared when they are first needed.
    park: OnceCell<Statement>,
    copy_traced: OnceCell<Statement>,
    /// At a node: entries of waiting lists.
    enter: OnceCell<[Statement; 2]>,
}

impl BatchWriter {
    /// The writer of worker `shard`, not connected yet.
    pub fn new(database: Database, lease: NodeLease, shard: i16) -> Self {
        BatchWriter {
            row: FencedWriter::new(database, lease, shard, "worker"),
            session: None,
            buffer: BytesMut::new(),
            traceparents: Traceparents::new(),
        }
    }

    /// What the rows of orders written from now on get.
    pub fn set_traceparents(&mut self, traceparents: Traceparents) {
        self.traceparents = traceparents;
    }

    /// Connects before the first batch, so that no buyer waits for it.
    ///
    /// # Errors
    /// See [`WriteError`]; the first batch tries again.
    pub async fn connect_ahead(&mut self) -> Result<(), WriteError> {
        match &self.session {
            Some(_) => Ok(()),
            None => self.connect().await.map(|_| ()),
        }
    }

    /// Number of commits that the database acknowledged and lost, as found so far.
    pub fn commits_lost(&self) -> u64 {
        self.row.commits_lost()
    }

    /// The number of the last batch known to be committed.
    pub fn committed(&self) -> Option<i64> {
        self.row.committed
    }

    /// Whether the commit of the last batch is in doubt.
    pub fn outcome_unknown(&self) -> bool {
        self.row.unknown.is_some()
    }

    /// Writes `orders` as payable, or as waiting if they wait for units, and moves their SKUs' counters, all or nothing. See
    /// [`BatchWriter::write_as`].
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn write(&mut self, orders: &[&Order]) -> Result<(), WriteError> {
        let rows: Vec<_> = orders
            .iter()
            .map(|order| (*order, order.status_in_time()))
            .collect();
        self.write_as(&rows).await
    }

    /// Writes orders, each with its status, and moves their SKUs' counters by the orders that hold units, all
    /// or nothing.
    ///
    /// After [`WriteError::Retry`] the next call must pass the same orders: the earlier call may have committed
    /// them, and then this one returns at once.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn write_as(&mut self, rows: &[(&Order, OrderStatus)]) -> Result<(), WriteError> {
        self.transact(Work::Write(rows)).await
    }

    /// Parks orders of SKUs whose counters are refused, all or nothing.
    ///
    /// # Errors
    /// See [`WriteError`]; after [`WriteError::Retry`] as [`BatchWriter::write_as`].
    pub async fn park(&mut self, orders: &[&Order]) -> Result<(), WriteError> {
        self.transact(Work::Park(orders)).await
    }

    /// Turns parked orders into rows, as [`BatchWriter::write_as`] does. All of them must still be parked;
    /// otherwise the result is [`WriteError::Retry`] with no commit in doubt, and the caller tries the orders
    /// that are left.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn unpark(&mut self, rows: &[(&Order, OrderStatus)]) -> Result<(), WriteError> {
        self.transact(Work::Unpark(rows)).await
    }

    async fn transact(&mut self, work: Work<'_>) -> Result<(), WriteError> {
        if self.session.is_none() && self.connect().await? {
            return Ok(());
        }
        let (Some(session), Some(committed)) = (self.session.take(), self.row.committed) else {
            unreachable!("connect() returned without a session or an error");
        };
        let batch = committed + 1;
        // Noted beforehand, so that it also holds if this call is dropped half-way: the backend may still be at
        // work, and the next connection resolves it.
        self.row.suspect = Some(session.backend);
        let written = self.attempt(&session, batch, work).await;
        if matches!(written, Err(WriteError::Retry(_))) {
            return written;
        }
        // The server has decided.
        self.row.unknown = None;
        self.row.suspect = None;
        self.session = Some(session);
        if written.is_ok() {
            self.row.committed = Some(batch);
        }
        written
    }

    /// Opens the transaction, moves the number and opens the COPY, in one flush. Returns the COPY, and
    /// whether its rows have to be counted before the COMMIT.
    async fn begin(
        &self,
        session: &Session,
        batch: i64,
        work: Work<'_>,
    ) -> Result<(CopyInSink<Bytes>, bool), WriteError> {
        let NodeLease { node, epoch, .. } = self.row.lease;
        let client = &session.client;
        let step = self.row.database.step_timeout();
        let fence: [&(dyn ToSql + Sync); 4] = [&node, &self.row.shard, &epoch, &batch];
        let rare = match work {
            Work::Park(_) => Some((&session.park, copy::PARK)),
            _ if !self.traceparents.is_empty() => Some((&session.copy_traced, copy::TRACED)),
            Work::Write(_) | Work::Unpark(_) => None,
        };
        let copy = match rare {
            None => &session.copy,
            Some((statement, sql)) => {
                let prepared = statement.get_or_try_init(|| client.prepare(sql));
                timed("preparing the COPY", step, prepared)
                    .await?
                    .map_err(retry("preparing the COPY"))?
            }
        };
        let parked: Option<Vec<i64>> = match work {
            Work::Unpark(rows) => Some(rows.iter().map(|(order, _)| order.id.as_i64()).collect()),
            Work::Write(_) | Work::Park(_) => None,
        };
        let take_parked = async {
            match &parked {
                Some(ids) => client.execute(TAKE_PARKED, &[ids]).await,
                None => Ok(0),
            }
        };
        let (begun, fenced, taken, sink) = timed("starting a batch", step, async {
            // Unparking needs a round trip of its own before the COPY, and is rare.
            if parked.is_some() {
                let (begun, fenced) = tokio::join!(
                    client.batch_execute(BEGIN),
                    client.query_opt(&session.fence, &fence),
                );
                let taken = take_parked.await;
                return (begun, fenced, taken, client.copy_in(copy).await);
            }
            let (begun, fenced, sink) = tokio::join!(
                client.batch_execute(BEGIN),
                client.query_opt(&session.fence, &fence),
                client.copy_in(copy),
            );
            (begun, fenced, Ok(0), sink)
        })
        .await?;
        begun.map_err(retry("BEGIN"))?;
        let fenced = fenced.map_err(retry("fencing a batch"))?;
        let taken = taken.map_err(retry("taking parked orders"))?;
        let sink = sink.map_err(retry("COPY orders"))?;
        let Some(fenced) = fenced else {
            // Dropping the sink aborts the COPY. Reconnecting tells which process changed our row.
            return Err(WriteError::Retry(StoreError::Data(format!(
                "the row of writer {} has changed since this process last wrote it",
                self.row.shard
            ))));
        };
        if parked.is_some_and(|ids| ids.len() as u64 != taken) {
            return Err(WriteError::Retry(StoreError::Data(
                "parked orders were cancelled meanwhile".to_owned(),
            )));
        }
        Ok((sink, fenced.get(0)))
    }

    async fn attempt(
        &mut self,
        session: &Session,
        batch: i64,
        work: Work<'_>,
    ) -> Result<(), WriteError> {
        let client = &session.client;
        let step = self.row.database.step_timeout();
        let entering = self.entering(session, work).await?;
        let (sink, counted) = self.begin(session, batch, work).await?;
        self.buffer.clear();
        let (skus, units) = match work {
            Work::Write(rows) | Work::Unpark(rows) => {
                let (buffer, all) = (&mut self.buffer, rows.iter().copied());
                match self.traceparents.is_empty() {
                    true => copy::encode(buffer, all),
                    false => copy::encode_traced(buffer, all, &self.traceparents),
                }
                units_by_sku(rows)
            }
            Work::Park(orders) => {
                copy::encode_parked(&mut self.buffer, orders.iter().copied());
                (Vec::new(), Vec::new())
            }
        };
        let rows = self.buffer.split().freeze();
        let node = self.row.lease.node;
        let reference = format!("batch {node}/{}/{batch}", self.row.shard);
        let (counters, skus, units): (_, &(dyn ToSql + Sync), &(dyn ToSql + Sync)) =
            match (&*skus, &*units) {
                ([sku], [units]) => (&session.counter, sku, units),
                _ => (&session.counters, &skus, &units),
            };
        let parameters: [&(dyn ToSql + Sync); 3] = [skus, units, &reference];
        let mut sink = std::pin::pin!(sink);
        let copy = async {
            sink.as_mut().send(rows).await?;
            sink.as_mut().finish().await
        };
        let move_and_commit = async {
            let (entered, moved, committed) = tokio::join!(
                enter(client, &entering),
                client.execute(counters, &parameters),
                client.batch_execute("COMMIT"),
            );
            (entered.and(moved), committed)
        };
        if counted && !matches!(work, Work::Park(_)) {
            let copied = timed("writing a batch", step, copy).await?;
            if copied.as_ref().ok() != Some(&(work.orders() as u64)) {
                // No COMMIT has been sent that would end the transaction.
                timed("ROLLBACK", step, client.batch_execute("ROLLBACK"))
                    .await?
                    .map_err(retry("ROLLBACK"))?;
            }
            let copied = copied.map_err(|source| write_error("COPY orders", source, false))?;
            if copied != work.orders() as u64 {
                return Err(WriteError::Row {
                    sqlstate: NO_DATA.to_owned(),
                    reason: format!(
                        "a trigger on the table orders let only {copied} of {} rows pass",
                        work.orders()
                    ),
                });
            }
            self.row.unknown = Some(batch);
            crash_point("worker.before_commit");
            let (moved, committed) = timed("writing a batch", step, move_and_commit).await?;
            return commit_result(moved, committed);
        }
        // From here on a COMMIT may reach the server. Until here it cannot have.
        self.row.unknown = Some(batch);
        crash_point("worker.before_commit");
        let (copied, (moved, committed)) = timed("writing a batch", step, async {
            tokio::join!(copy, move_and_commit)
        })
        .await?;
        if let Err(source) = copied {
            return Err(write_error("COPY orders", source, false));
        }
        commit_result(moved, committed)
    }

    /// At a node: what enters the orders of a batch that wait into their lists. `None`: none does.
    async fn entering<'a>(
        &self,
        session: &'a Session,
        work: Work<'_>,
    ) -> Result<Option<Entering<'a>>, WriteError> {
        let (Ledger::Share, Work::Write(rows) | Work::Unpark(rows)) = (self.row.lease.ledger, work)
        else {
            return Ok(None);
        };
        let waiting = rows
            .iter()
            .map(|(order, _)| *order)
            .filter(|order| order.waits());
        let (orders, skus): (Vec<i64>, Vec<i32>) = waiting
            .map(|order| (order.id.as_i64(), order.sku.0))
            .unzip();
        if orders.is_empty() {
            return Ok(None);
        }
        let prepare = async || {
            let client = &session.client;
            Ok([
                client.prepare(lists::LOCK).await?,
                client.prepare(lists::ENTER).await?,
            ])
        };
        let (doing, step) = (
            "preparing entries of a list",
            self.row.database.step_timeout(),
        );
        let statements = timed(doing, step, session.enter.get_or_try_init(prepare)).await?;
        let statements = statements.map_err(retry(doing))?;
        Ok(Some(Entering {
            statements,
            skus,
            orders,
        }))
    }

    /// Connects and resolves the batch in doubt. Returns true if it was committed.
    async fn connect(&mut self) -> Result<bool, WriteError> {
        let unknown = self.row.unknown;
        let Resolved {
            client,
            backend,
            was_committed,
        } = self.row.resolve().await?;
        if was_committed || (bug("guess_the_commit") && unknown.is_some()) {
            return Ok(true);
        }
        let step = self.row.database.step_timeout();
        let prepare = |doing: &'static str, sql: String| {
            let client = &client;
            async move {
                let prepared = timed(doing, step, client.prepare(&sql)).await?;
                prepared
                    .map_err(|source| WriteError::Retry(StoreError::Statement { doing, source }))
            }
        };
        let lease = self.row.lease;
        let fence = prepare("preparing the fence", fence_statement()).await?;
        let copy = prepare("preparing the COPY", copy::STATEMENT.to_owned()).await?;
        let counter = prepare("preparing a counter", lease.sql(COUNTER)).await?;
        let counters = prepare("preparing the counters", lease.sql(COUNTERS)).await?;
        self.session = Some(Session {
            client,
            backend,
            fence,
            copy,
            counter,
            counters,
            park: OnceCell::new(),
            copy_traced: OnceCell::new(),
            enter: OnceCell::new(),
        });
        Ok(false)
    }

    /// Dead-letters an order whose row was refused. If the row was refused because the order exists already,
    /// after a failover, nothing is to be done.
    ///
    /// # Errors
    /// As [`BatchWriter::write_dead_letter`]; [`StoreError::OtherOrders`] if another order has its id.
    pub async fn refuse(
        &mut self,
        order: &Order,
        sqlstate: &str,
        reason: &str,
    ) -> Result<Refused, StoreError> {
        let may_be_there = sqlstate == UNIQUE_VIOLATION && !bug("replay_without_looking");
        if may_be_there
            && !orders::present_among(&self.row.database, &[order])
                .await?
                .is_empty()
        {
            return Ok(Refused::AlreadyPresent);
        }
        self.write_dead_letter(order, sqlstate, reason).await?;
        Ok(Refused::DeadLettered)
    }

    /// Stores a refused order as a dead letter, for an operator. Idempotent.
    ///
    /// # Errors
    /// If the dead letter itself could not be stored; [`StoreError::Fenced`] if this process may not write any
    /// more.
    pub async fn write_dead_letter(
        &mut self,
        order: &Order,
        sqlstate: &str,
        reason: &str,
    ) -> Result<(), StoreError> {
        let NodeLease { node, epoch, .. } = self.row.lease;
        let client = self.row.database.pooled().await?;
        let key = order.key.map(|key| key.0.to_vec());
        let parameters: [&(dyn ToSql + Sync); 17] = [
            &order.id.as_i64(),
            &order.user_id.as_str(),
            &order.sku.0,
            &(order.quantity.get() as i32),
            &order.adjustment,
            &order.amount,
            &order.currency.as_str(),
            &order.created_at.0,
            &order.expires_at.0,
            &key,
            &(order.payload.0 as i64),
            &order.attributes.as_deref(),
            &sqlstate,
            &reason,
            &node,
            &epoch,
            &self.traceparents.get(&order.id),
        ];
        let (written, found) = self
            .row
            .database
            .timed("writing a dead letter", async {
                let written = client.execute(DEAD_LETTER, &parameters).await?;
                let found = client.query_opt(EPOCH, &[&node]).await?;
                Ok((written, found.map_or(0, |row| row.get::<_, i64>(0))))
            })
            .await?;
        // No row is written either if the dead letter existed. Our epoch is the proof of that case.
        if written == 0 && found != epoch {
            return Err(StoreError::Fenced { found, ours: epoch });
        }
        Ok(())
    }
}

/// Orders that enter their waiting lists.
struct Entering<'a> {
    statements: &'a [Statement; 2],
    skus: Vec<i32>,
    orders: Vec<i64>,
}

/// Enters orders into their lists, after their rows are written.
async fn enter(
    client: &Connected,
    entering: &Option<Entering<'_>>,
) -> Result<u64, tokio_postgres::Error> {
    let Some(entering) = entering else {
        return Ok(0);
    };
    let [lock, enter] = entering.statements;
    let (skus, orders): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 1]) =
        ([&entering.skus], [&entering.orders]);
    let (locked, entered) =
        tokio::join!(client.execute(lock, &skus), client.execute(enter, &orders));
    locked.and(entered)
}

/// Classifies the end of a transaction. If the counters were moved, the COMMIT was no disguised ROLLBACK. A
/// deferred constraint may refuse the data only here. Any other failure leaves the commit in doubt: the server
/// may have committed and then stopped.
fn commit_result(
    moved: Result<u64, tokio_postgres::Error>,
    committed: Result<(), tokio_postgres::Error>,
) -> Result<(), WriteError> {
    if let Err(source) = moved {
        return Err(write_error("moving the stock counters", source, true));
    }
    committed.map_err(|source| write_error("COMMIT", source, false))
}

/// The units of each SKU in a batch, by id, so that every transaction locks in the same order.
fn units_by_sku(rows: &[(&Order, OrderStatus)]) -> (Vec<i32>, Vec<i64>) {
    let mut units = BTreeMap::new();
    for (order, _) in rows.iter().filter(|(_, status)| status.holds_units()) {
        *units.entry(order.sku.0).or_insert(0_i64) += i64::from(order.quantity.get());
    }
    units.into_iter().unzip()
}

fn retry(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> WriteError {
    move |source| WriteError::Retry(StoreError::Statement { doing, source })
}

/// Classifies the failure of a statement. If the server refused the data, it has rolled back and the session
/// can be reused.
fn write_error(doing: &'static str, source: tokio_postgres::Error, counters: bool) -> WriteError {
    if !refuses_row(&source) {
        return WriteError::Retry(StoreError::Statement { doing, source });
    }
    let (sqlstate, reason) = (sqlstate(&source).to_owned(), super::error::chain(&source));
    if counters {
        WriteError::Counter { sqlstate, reason }
    } else {
        WriteError::Row { sqlstate, reason }
    }
}
