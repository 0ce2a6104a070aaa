//! What becomes of a node that is gone.
//!
//! ```text
//!   1. fence     one transaction: its epoch up, its lanes to the survivor, blocked     it can commit nothing
//!   2.           the survivor appends its marker to the dead node's log                it can acknowledge nothing
//!   3.           the survivor replays the log under the dead node's new epoch          its shares stay its own
//!   4. finish    one transaction: the log is settled, the shares are merged, lanes unblocked
//! ```
//!
//! If the survivor dies in between, whoever fences the survivor inherits the dead node, at a further epoch, and replays
//! its log again: replaying is idempotent.

use std::convert::Infallible;
use std::time::Duration;

use tokio_postgres::{Error, Row, Transaction};

use super::in_force;
use super::lanes::{self, LaneRow};
use super::shares::Share;
use crate::order::log_place::Position;
use crate::order::{SkuNumber, UnixMillis};
use crate::store::postgres::order_log::{self, NotedLog};
use crate::store::postgres::{Connected, Database, NodeLease, lease};
use crate::store::{Ledger, StoreError};

/// Time that backends of the dead node get to end their transactions, before they are terminated.
const PATIENCE: Duration = Duration::from_secs(1);

/// A node that seems to be gone, as it was seen last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspect {
    /// Its number.
    pub node: i16,
    /// Its epoch.
    pub epoch: i64,
    /// Its counter, which has stood still.
    pub renewals: i64,
}

/// A node that can commit nothing any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadNode {
    /// The right to write as the dead node, for its replay.
    pub lease: NodeLease,
    /// Its order log, if it had one.
    pub log: Option<NotedLog>,
    /// Every id that it has leased in the database lies before this moment. Its log may have leased more.
    pub ids_until: UnixMillis,
    /// How long it may answer from its memory after a contact.
    pub answer_lease_ms: u64,
}

/// The result of fencing a suspect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Takeover {
    /// The suspect first, then the dead nodes whose replay it had begun.
    pub dead: Vec<DeadNode>,
    /// The lanes that are the survivor's now, each blocked until the log of its `blocked_by` is replayed.
    pub lanes: Vec<LaneRow>,
}

/// Fences a suspect for the node `by`. `None`: it has renewed meanwhile, or another node was faster; nothing has
/// changed then. Backends that keep a row of the suspect locked are terminated after a second.
///
/// # Errors
/// [`StoreError::Fenced`] if the survivor itself was taken over; otherwise if the database does not answer.
pub async fn fence(
    database: &Database,
    session: &mut Connected,
    by: NodeLease,
    suspect: Suspect,
) -> Result<Option<Takeover>, StoreError> {
    let (doing, nodes) = ("fencing a node", [suspect.node]);
    let fenced = without_blockers(database, session, doing, &nodes, async |session| {
        fence_in(session, by, suspect).await
    });
    match fenced.await? {
        Attempt::NotInForce => Err(by.is_lost()),
        Attempt::NotSuspect => Ok(None),
        Attempt::Done(fenced, rows) => {
            let lanes = rows.iter().map(lanes::lane_row);
            let lanes = lanes.collect::<Result<_, _>>()?;
            Ok(Some(Takeover {
                dead: fenced,
                lanes,
            }))
        }
    }
}

enum Attempt {
    /// The survivor was taken over itself.
    NotInForce,
    /// The suspect is not what it was.
    NotSuspect,
    Done(Vec<DeadNode>, Vec<Row>),
}

async fn fence_in(
    session: &mut Connected,
    by: NodeLease,
    suspect: Suspect,
) -> Result<Attempt, Error> {
    let transaction = session.transaction().await?;
    // The step's time limit bounds the wait, and backends in the way are ended meanwhile.
    transaction
        .batch_execute("SET LOCAL lock_timeout = 0")
        .await?;
    // Both rows in order of their numbers, the suspect's for its new epoch.
    if by.node < suspect.node && !in_force(&transaction, by).await? {
        return Ok(Attempt::NotInForce);
    }
    let found = transaction
        .query_opt(
            "SELECT FROM node WHERE node = $1 AND epoch = $2 AND renewals = $3
                AND (state IN ('joining', 'active') OR state = 'dead' AND taken_by IS NULL
                     OR state = 'single' AND journal_in_use) FOR UPDATE",
            &[&suspect.node, &suspect.epoch, &suspect.renewals],
        )
        .await?;
    if by.node >= suspect.node && !in_force(&transaction, by).await? {
        return Ok(Attempt::NotInForce);
    }
    if found.is_none() || by.node == suspect.node {
        return Ok(Attempt::NotSuspect);
    }
    let mut fenced = vec![raise(&transaction, suspect.node, by).await?];
    fenced.extend(inherit(&transaction, suspect.node, by).await?);
    let rows = transaction
        .query(
            &format!(
                "UPDATE lane l SET node = $2, epoch = l.epoch + 1, blocked_by = coalesce(l.blocked_by, $1),
                        ids_until_ms = greatest(l.ids_until_ms, n.ids_leased_until_ms)
                   FROM node n WHERE l.node = $1 AND n.node = $1 RETURNING {}",
                lane_columns()
            ),
            &[&suspect.node, &by.node],
        )
        .await?;
    lanes::share_unpaid_from(&transaction, suspect.node, by.node).await?;
    forget_wants(&transaction, suspect.node).await?;
    transaction.commit().await?;
    Ok(Attempt::Done(fenced, rows))
}

/// The columns of a lane, qualified.
fn lane_columns() -> String {
    let columns = lanes::COLUMNS.split(", ");
    let columns: Vec<String> = columns.map(|column| format!("l.{column}")).collect();
    columns.join(", ")
}

/// Makes a node dead, for `by`: raises its epoch and those of its writers, whose transactions have ended then.
async fn raise(transaction: &Transaction<'_>, node: i16, by: NodeLease) -> Result<DeadNode, Error> {
    transaction
        .execute(
            "SELECT FROM writer WHERE node = $1 ORDER BY shard FOR UPDATE",
            &[&node],
        )
        .await?;
    let row = transaction
        .query_one(
            &format!(
                "UPDATE node SET epoch = epoch + 1, state = 'dead', taken_by = $2, taken_epoch = $3 WHERE node = $1 RETURNING {}",
                dead_columns()
            ),
            &[&node, &by.node, &by.epoch],
        )
        .await?;
    let dead = dead_node(&row);
    transaction
        .execute(
            "UPDATE writer SET epoch = $2 WHERE node = $1",
            &[&node, &dead.lease.epoch],
        )
        .await?;
    Ok(dead)
}

/// Whether a node has a share.
const HAS_SHARE: &str = "EXISTS (SELECT FROM stock_share s WHERE s.node = node.node)";

/// The counters of the orders in the log of a node. Without a share they are those of `sku`: it was a process on its own, or
/// somebody who replayed the log of one and did not get further.
fn ledger_of_log(has_share: bool) -> Ledger {
    if has_share {
        Ledger::Share
    } else {
        Ledger::Sku
    }
}

/// The counters of the orders in the log of a node.
pub(super) async fn log_ledger(transaction: &Transaction<'_>, node: i16) -> Result<Ledger, Error> {
    let sql = format!("SELECT {HAS_SHARE} FROM node WHERE node = $1");
    let row = transaction.query_one(&sql, &[&node]).await?;
    Ok(ledger_of_log(row.get(0)))
}

/// The columns of `node` that [`dead_node`] reads.
fn dead_columns() -> String {
    format!(
        "node.node, epoch, ids_leased_until_ms, {HAS_SHARE}, answer_lease_ms, journal_id IS NOT NULL, {}",
        order_log::COLUMNS
    )
}

fn dead_node(row: &Row) -> DeadNode {
    DeadNode {
        lease: NodeLease {
            node: row.get(0),
            epoch: row.get(1),
            ledger: ledger_of_log(row.get(3)),
        },
        log: row.get::<_, bool>(5).then(|| order_log::noted_log(row, 6)),
        ids_until: UnixMillis(row.get(2)),
        answer_lease_ms: milliseconds(row, 4),
    }
}

pub(super) fn milliseconds(row: &Row, at: usize) -> u64 {
    u64::try_from(row.get::<_, i64>(at)).unwrap_or(0)
}

/// What `by` has begun and not finished, by the rows: nodes that it has fenced or inherited, and its lanes that wait for their
/// logs. They tell what became of a [`fence`] whose answer was lost.
///
/// # Errors
/// If the database does not answer.
pub async fn begun(database: &Database, by: NodeLease) -> Result<Takeover, StoreError> {
    let client = database.pooled().await?;
    let dead = format!(
        "SELECT {} FROM node WHERE state = 'dead' AND taken_by IS NOT DISTINCT FROM $1
                AND taken_epoch IS NOT DISTINCT FROM $2 ORDER BY node",
        dead_columns()
    );
    let lanes = format!(
        "SELECT {} FROM lane WHERE node = $1 AND blocked_by <> $1 ORDER BY lane",
        lanes::COLUMNS
    );
    let reading = async {
        let dead = client.query(&dead, &[&taker(by).0, &taker(by).1]).await?;
        let lanes = client.query(&lanes, &[&by.node]).await?;
        Ok((dead, lanes))
    };
    let (dead, lanes) = database
        .timed("reading which nodes are taken over", reading)
        .await?;
    Ok(Takeover {
        dead: dead.iter().map(dead_node).collect(),
        lanes: lanes
            .iter()
            .map(lanes::lane_row)
            .collect::<Result<_, _>>()?,
    })
}

/// Takes over the dead nodes whose logs `from` was replaying.
pub(super) async fn inherit(
    transaction: &Transaction<'_>,
    from: i16,
    by: NodeLease,
) -> Result<Vec<DeadNode>, Error> {
    let dead = transaction
        .query(
            "SELECT node FROM node WHERE taken_by = $1 AND node <> $1 ORDER BY node FOR UPDATE",
            &[&from],
        )
        .await?;
    let mut fenced = Vec::with_capacity(dead.len());
    for row in &dead {
        fenced.push(raise(transaction, row.get(0), by).await?);
    }
    Ok(fenced)
}

/// Ends what a process of this node wanted, and its answers to others: orders that were in its memory alone are gone, so units
/// may be free that it had none of.
pub(super) async fn forget_wants(transaction: &Transaction<'_>, node: i16) -> Result<(), Error> {
    transaction
        .execute("DELETE FROM stock_want WHERE node = $1", &[&node])
        .await?;
    transaction
        .execute(
            "UPDATE stock_share SET answered = 0 WHERE node = $1 AND answered > 0",
            &[&node],
        )
        .await
        .map(|_| ())
}

/// Blocks the lanes of a node that starts again, until its own log is replayed. Returns all its lanes.
pub(super) async fn block(transaction: &Transaction<'_>, node: i16) -> Result<Vec<Row>, Error> {
    forget_wants(transaction, node).await?;
    transaction
        .query(
            &format!(
                "UPDATE lane SET epoch = epoch + 1, blocked_by = coalesce(blocked_by, $1) WHERE node = $1 RETURNING {}",
                lanes::COLUMNS
            ),
            &[&node],
        )
        .await
}

/// Raises the epoch of a dead node, whose log has later ones than its row: PostgreSQL has forgotten them in a failover. Returns
/// the right to write as the dead node.
///
/// # Errors
/// [`StoreError::Fenced`] if either was taken over, or the takeover was inherited by another node; otherwise if the database
/// does not answer.
pub async fn raise_to(
    database: &Database,
    by: NodeLease,
    dead: NodeLease,
    epoch: u64,
) -> Result<NodeLease, StoreError> {
    let raised = NodeLease {
        epoch: i64::try_from(epoch).unwrap_or(i64::MAX),
        ..dead
    };
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        if !lock_begun(&transaction, by, dead).await? {
            return Ok(None);
        }
        for table in ["writer", "node"] {
            transaction
                .execute(
                    &format!("UPDATE {table} SET epoch = $2 WHERE node = $1"),
                    &[&raised.node, &raised.epoch],
                )
                .await?;
        }
        transaction.commit().await?;
        Ok(Some(raised))
    };
    let raised = database
        .timed("raising the epoch of a node that is gone", work)
        .await?;
    raised.ok_or_else(|| by.is_lost())
}

/// Locks the row of a dead node for `by`, which takes it over. False: either was taken over, or the takeover has ended.
async fn lock_begun(
    transaction: &Transaction<'_>,
    by: NodeLease,
    dead: NodeLease,
) -> Result<bool, Error> {
    if by.node < dead.node && !in_force(transaction, by).await? {
        return Ok(false);
    }
    let row = transaction
        .query_opt(
            &format!("{IS_BEGUN} FOR UPDATE"),
            &[&dead.node, &dead.epoch, &taker(by).0, &taker(by).1],
        )
        .await?;
    Ok(row.is_some() && (by.node < dead.node || in_force(transaction, by).await?))
}

/// The end of a dead node's log, after it was replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogEnd {
    /// Every id that the node has leased lies before this moment.
    pub ids_until: UnixMillis,
    /// The place up to which every order in it is settled, if it was read.
    pub place: Option<Position>,
}

/// Ends the takeover of `dead` by `by`, after its log was replayed to `end`: the log is settled, the lanes that waited for it
/// are unblocked, its shares become the survivor's.
///
/// If the dead node had no lane, nobody has its buyers, and its units go back to `sku`. Returns the shares that became the
/// survivor's.
///
/// # Errors
/// [`StoreError::Fenced`] if either was taken over, or the takeover was inherited by another node.
pub async fn finish(
    database: &Database,
    by: NodeLease,
    dead: NodeLease,
    end: LogEnd,
) -> Result<Vec<(SkuNumber, Share)>, StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        if !lock_begun(&transaction, by, dead).await? {
            return Ok(None);
        }
        let unblocked = transaction
            .execute(
                "UPDATE lane SET blocked_by = NULL, ids_until_ms = greatest(ids_until_ms, $2) WHERE blocked_by = $1",
                &[&dead.node, &end.ids_until.0],
            )
            .await?;
        raise_ids_of_free(&transaction, end.ids_until).await?;
        let merged = if unblocked == 0 {
            dissolve(&transaction, dead.node).await?;
            Vec::new()
        } else {
            merge(&transaction, dead.node, by.node).await?
        };
        let [epoch, number, offset] = order_log::columns(end.place);
        transaction
            .execute(
                "UPDATE node SET state = 'left', taken_by = NULL, taken_epoch = NULL, journal_in_use = false,
                        unpaid_from = CASE WHEN $2 THEN $3 ELSE unpaid_from END, log_epoch = coalesce($4, log_epoch),
                        log_number = coalesce($5, log_number), log_offset = coalesce($6, log_offset) WHERE node = $1",
                &[
                    &dead.node,
                    &(unblocked > 0),
                    &lease::NOTHING_UNPAID,
                    &epoch,
                    &number,
                    &offset,
                ],
            )
            .await?;
        transaction.commit().await?;
        Ok(Some(merged))
    };
    let merged = database.timed("ending a takeover", work).await?;
    merged.ok_or_else(|| by.is_lost())
}

/// The shares that [`finish`] merges into the survivor's: those of the dead node, if a lane waits for its log. Nothing
/// changes them once it is replayed.
///
/// # Errors
/// If the database does not answer.
pub async fn shares_of(
    database: &Database,
    dead: NodeLease,
) -> Result<Vec<(SkuNumber, Share)>, StoreError> {
    let client = database.pooled().await?;
    let sql = "SELECT sku, lent, held, sold FROM stock_share
                WHERE node = $1 AND EXISTS (SELECT FROM lane WHERE blocked_by = $1)";
    let rows = database
        .timed(
            "reading the shares of a node that is gone",
            client.query(sql, &[&dead.node]),
        )
        .await?;
    Ok(rows.iter().map(share_row).collect())
}

/// Whether `by` has ended the takeover of `dead`, once no transaction of its own can do so any more: after an answer to
/// [`finish`] was lost.
///
/// # Errors
/// [`StoreError::Fenced`] if `by` was taken over, and whoever did that has inherited `dead`; otherwise if the database does
/// not answer, or the lost transaction has not ended.
pub async fn is_finished(
    database: &Database,
    by: NodeLease,
    dead: NodeLease,
) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let looking = async {
        // The lost transaction has this row locked.
        let begun = client
            .query_opt(
                &format!("{IS_BEGUN} FOR SHARE"),
                &[&dead.node, &dead.epoch, &taker(by).0, &taker(by).1],
            )
            .await?;
        // Whoever inherits the dead node raises this epoch in the same transaction.
        let in_force = client
            .query_opt(
                "SELECT FROM node WHERE node = $1 AND epoch = $2 AND state IN ('single', 'joining', 'active')",
                &[&by.node, &by.epoch],
            )
            .await?;
        Ok(in_force.map(|_| begun.is_none()))
    };
    let finished = database
        .timed("looking up the end of a takeover", looking)
        .await?;
    finished.ok_or_else(|| by.is_lost())
}

/// The row of the dead node $1, at the epoch $2, whose takeover by [`taker`] $3 and $4 has not ended.
const IS_BEGUN: &str = "
    SELECT FROM node WHERE node = $1 AND epoch = $2 AND state = 'dead'
       AND taken_by IS NOT DISTINCT FROM $3 AND taken_epoch IS NOT DISTINCT FROM $4";

/// What the row of a dead node says of whoever takes it over: the node and its epoch, and nothing of a process on its own. If
/// that one dies, nobody inherits the row: whoever comes next, its own process among them, takes it.
fn taker(by: NodeLease) -> (Option<i16>, Option<i64>) {
    match by.ledger {
        Ledger::Sku => (None, None),
        Ledger::Share => (Some(by.node), Some(by.epoch)),
    }
}

fn share_row(row: &Row) -> (SkuNumber, Share) {
    let share = Share {
        lent: row.get(1),
        held: row.get(2),
        sold: row.get(3),
    };
    (SkuNumber(row.get(0)), share)
}

/// Whoever takes the lanes that are nobody's gives out no id of a log that was replayed meanwhile.
pub(super) async fn raise_ids_of_free(
    transaction: &Transaction<'_>,
    ids_until: UnixMillis,
) -> Result<(), Error> {
    transaction
        .execute(
            "UPDATE lane SET ids_until_ms = $1 WHERE node IS NULL AND ids_until_ms < $1",
            &[&ids_until.0],
        )
        .await
        .map(|_| ())
}

/// The SKUs of a node's shares, locked.
const LOCK_SKUS: &str = "
    SELECT FROM sku WHERE id IN (SELECT sku FROM stock_share WHERE node = $1) ORDER BY id FOR UPDATE";

/// Makes the shares of one node those of another. Units that were free in them are news to every want.
async fn merge(
    transaction: &Transaction<'_>,
    from: i16,
    to: i16,
) -> Result<Vec<(SkuNumber, Share)>, Error> {
    transaction.execute(LOCK_SKUS, &[&from]).await?;
    let rows = transaction
        .query(
            "DELETE FROM stock_share WHERE node = $1 RETURNING sku, lent, held, sold",
            &[&from],
        )
        .await?;
    let column = |at: usize| -> Vec<i64> { rows.iter().map(|row| row.get(at)).collect() };
    let skus: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    transaction
        .execute(
            "INSERT INTO stock_share (sku, node, lent, held, sold)
             SELECT w.sku, $1, w.lent, w.held, w.sold
               FROM unnest($2::int4[], $3::int8[], $4::int8[], $5::int8[]) AS w (sku, lent, held, sold)
             ON CONFLICT (sku, node) DO UPDATE
                SET lent = stock_share.lent + excluded.lent, held = stock_share.held + excluded.held,
                    sold = stock_share.sold + excluded.sold, answered = 0",
            &[&to, &skus, &column(1), &column(2), &column(3)],
        )
        .await?;
    Ok(rows.iter().map(share_row).collect())
}

/// Takes a node's shares apart: free units go to the pool, held and sold ones to `sku`.
pub(super) async fn dissolve(transaction: &Transaction<'_>, node: i16) -> Result<(), Error> {
    transaction.execute(LOCK_SKUS, &[&node]).await?;
    let rows = transaction
        .query(
            "DELETE FROM stock_share WHERE node = $1 RETURNING sku, held, sold",
            &[&node],
        )
        .await?;
    let column = |at: usize| -> Vec<i64> { rows.iter().map(|row| row.get(at)).collect() };
    let skus: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    transaction
        .execute(
            "UPDATE sku s SET held = s.held + w.held, sold = s.sold + w.sold
               FROM unnest($1::int4[], $2::int8[], $3::int8[]) AS w (sku, held, sold) WHERE s.id = w.sku",
            &[&skus, &column(1), &column(2)],
        )
        .await
        .map(|_| ())
}

/// Does `work` on a session, and meanwhile terminates the backends of these nodes that are in its way: nobody is there who
/// would end their transactions.
pub(super) async fn without_blockers<T>(
    database: &Database,
    session: &mut Connected,
    doing: &'static str,
    nodes: &[i16],
    work: impl AsyncFnOnce(&mut Connected) -> Result<T, Error>,
) -> Result<T, StoreError> {
    let backend: i32 = database
        .timed(
            "asking for our backend",
            session.query_one("SELECT pg_backend_pid()", &[]),
        )
        .await?
        .get(0);
    tokio::select! {
        done = database.timed(doing, work(session)) => done,
        never = keep_ending(database, backend, nodes) => match never {},
    }
}

/// Ends blockers once every [`PATIENCE`], until it is dropped.
async fn keep_ending(database: &Database, backend: i32, nodes: &[i16]) -> Infallible {
    loop {
        tokio::time::sleep(PATIENCE).await;
        if let Err(error) = end_blockers(database, backend, nodes).await {
            tracing::warn!(
                ?nodes, reason = %error,
                "backends of a node that is gone could not be terminated; retrying (pg_terminate_backend needs the same role \
                 or pg_signal_backend)"
            );
        }
    }
}

/// Terminates the backends that `backend` waits for, if they are those of dead nodes, or of their takeovers of others. Only
/// those bear their numbers; another process that fences the same node is left alone.
async fn end_blockers(database: &Database, backend: i32, nodes: &[i16]) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    let ended = database
        .timed(
            "ending the backends of a node that is gone",
            client.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                  WHERE pid = ANY (pg_blocking_pids($1))
                    AND substring(application_name FROM '^millrace [a-z]+ ([0-9]+)(?:/[0-9]+)?$')
                        IN (SELECT node::text FROM node WHERE node = ANY ($2) OR taken_by = ANY ($2))",
                &[&backend, &nodes],
            ),
        )
        .await?;
    if ended > 0 {
        tracing::warn!(?nodes, ended, "terminated backends of a node that is gone");
    }
    Ok(())
}
