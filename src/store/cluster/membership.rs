//! The row of a node: joining, renewing, leaving.
//!
//! ```text
//!            join               activate                          leave, nothing left
//!   (no row) ────► joining ─────────────► active ───────────────────────────────► left
//!                     ▲                     │ counter stands still, log fenced      │
//!                     │ join, own home      ▼                                       │ join
//!                     └─────────────────── dead ──► replayed by another ──► left ◄──┘
//! ```
//!
//! A server of another timeline may lack commits, so no right outlives a failover: the first join on it disbands
//! the cluster, and every row is dead until its log is replayed.
//!
//! One active process a database, or the nodes of one cluster: each process of a cluster holds the advisory lock of
//! [`crate::store::postgres::lease`] shared, a single one exclusively.

use tokio_postgres::{Error, Row, Transaction};

use super::disband;
use super::formats::Formats;
use super::lanes::{self, LaneRow};
use super::takeover::{self, DeadNode};
use crate::order::UnixMillis;
use crate::order::receipt::Issuer;
use crate::store::postgres::lease::{self, Raised};
use crate::store::postgres::{Connected, Database, NodeLease};
use crate::store::{Ledger, StoreError};

/// Highest number of a node.
const NODE_MAX: i16 = 63;

/// A process that wants to be a node.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// The id of its `data_dir`, a UUID.
    pub home: &'a str,
    /// The id of its order log, a UUID, if it is durable.
    pub log: Option<&'a str>,
    /// Host and port at which other nodes reach it.
    pub address: &'a str,
    /// The formats of a group that it knows.
    pub formats: Formats,
    /// `cluster.answer_lease_ms`.
    pub answer_lease_ms: u64,
    /// Number of its writers.
    pub shards: i16,
    /// No id may lie before this moment.
    pub ids_from: UnixMillis,
}

/// The row that a process has got.
#[derive(Debug)]
pub struct Joined {
    /// The right to write.
    pub lease: NodeLease,
    /// All ids of earlier processes on this row lie before this moment.
    pub id_high_water: UnixMillis,
    /// End of the lease of ids.
    pub ids_leased_until: UnixMillis,
    /// The lanes of the row, blocked until its log is replayed.
    pub lanes: Vec<LaneRow>,
    /// Where the units of the orders in its log are: a row without a share was that of a process on its own, or of a cluster
    /// that was disbanded.
    pub log_ledger: Ledger,
    /// How long an earlier process on this row may answer from its memory after a contact.
    pub answer_lease_ms: u64,
    /// Whether an operator has paused every sale.
    pub paused: bool,
    /// The issuer of receipts: this database.
    pub receipts: Issuer,
    /// Dead nodes whose logs an earlier process on this row had begun to replay: they have to be replayed now.
    pub inherited: Vec<DeadNode>,
}

/// The outcome of trying to join.
#[derive(Debug)]
pub enum Join {
    /// The process has a row.
    Joined(Joined),
    /// Another node replays the log of the row of this `data_dir`; try again when it has finished.
    BeingReplayed {
        /// The row.
        node: i16,
        /// The node that replays it.
        by: i16,
    },
    /// All 64 rows are taken.
    Full,
}

/// The row of a node, for people and for other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRow {
    /// Its number.
    pub node: i16,
    /// Its epoch.
    pub epoch: i64,
    /// `single`, `joining`, `active`, `dead` or `left`.
    pub state: String,
    /// Moves with every renewal.
    pub renewals: i64,
    /// Where other nodes reach it.
    pub address: Option<String>,
    /// The newest format of a group that it can read.
    pub reads_format: i16,
    /// The node that replays its log.
    pub taken_by: Option<i16>,
    /// The title of its order log.
    pub log: Option<String>,
    /// Whether its order log may hold orders that are not rows yet.
    pub log_in_use: bool,
    /// Whether it is to hand everything over and leave.
    pub drain: bool,
}

impl NodeRow {
    /// Whether it may own lanes: a process has it, or had it a moment ago.
    pub fn is_alive(&self) -> bool {
        matches!(self.state.as_str(), "joining" | "active")
    }

    /// Whether its counter tells if it is gone: it is alive, or nobody replays its log yet.
    pub fn is_watched(&self) -> bool {
        self.is_alive() || self.state == "dead" && self.taken_by.is_none()
    }

    /// Whether it may be given lanes.
    pub fn is_active(&self) -> bool {
        self.state == "active" && !self.drain && self.renewals >= 0
    }
}

/// What a node sees when it renews.
#[derive(Clone, Debug)]
pub struct Look {
    /// Every node, this one too.
    pub nodes: Vec<NodeRow>,
    /// The server's timeline: it changes if a standby is promoted.
    pub timeline: String,
    /// The server's clock.
    pub now: UnixMillis,
}

/// Takes a row: the one that `home` names, else one that nobody needs, else a new one. Raises its epoch, which fences an
/// earlier process on it, and blocks its lanes until its log is replayed.
///
/// # Errors
/// [`StoreError::OtherRelease`] if the others are of a release that does not fit; otherwise if the database does not answer.
pub async fn join(session: &mut Connected, candidate: &Candidate<'_>) -> Result<Join, StoreError> {
    let doing = "joining the cluster";
    let transaction = session
        .transaction()
        .await
        .map_err(StoreError::statement(doing))?;
    let step = StoreError::statement;
    // Processes that join together do so one after the other.
    transaction
        .execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('millrace join:' || current_schema(), 0))",
            &[],
        )
        .await
        .map_err(step(doing))?;
    disband::follow_timeline(&transaction)
        .await
        .map_err(step(doing))?;
    let members = transaction
        .query(
            "SELECT node, reads_format FROM node WHERE state IN ('joining', 'active', 'dead')",
            &[],
        )
        .await
        .map_err(step(doing))?;
    let members = members.iter().map(|row| (row.get(0), row.get(1)));
    candidate.formats.fit(members)?;
    let found = choose(&transaction, candidate).await.map_err(step(doing))?;
    let (node, was_single) = match found {
        Choice::Row { node, was_single } => (node, was_single),
        Choice::BeingReplayed { node, by } => return Ok(Join::BeingReplayed { node, by }),
        Choice::Full => return Ok(Join::Full),
    };
    let Raised {
        lease,
        id_high_water,
        ids_leased_until,
        paused,
    } = lease::raise_epoch(
        &transaction,
        node,
        candidate.shards,
        candidate.ids_from,
        Ledger::Share,
    )
    .await?;
    let joining = async {
        let log_ledger = takeover::log_ledger(&transaction, node).await?;
        let before = transaction
            .query_one(
                "UPDATE node SET state = 'joining', home = $2::text::uuid, address = $3, reads_format = $4,
                        renewals = abs(renewals) + 1, taken_by = NULL, taken_epoch = NULL, drain = false, answer_lease_ms = $5
                   FROM (SELECT answer_lease_ms AS earlier FROM node WHERE node = $1) b WHERE node = $1 RETURNING earlier",
                &[
                    &node,
                    &candidate.home,
                    &candidate.address,
                    &candidate.formats.reads,
                    &i64::try_from(candidate.answer_lease_ms).unwrap_or(i64::MAX),
                ],
            )
            .await?;
        let answer_lease_ms = takeover::milliseconds(&before, 0);
        let inherited = takeover::inherit(&transaction, node, lease).await?;
        fence_single(&transaction, node).await?;
        if was_single {
            // It had all lanes.
            transaction
                .execute(
                    "UPDATE lane SET ids_until_ms = greatest(ids_until_ms, $1)
                       FROM (SELECT lane AS of FROM lane WHERE node IS NULL ORDER BY lane FOR UPDATE) f WHERE lane = f.of",
                    &[&id_high_water.0],
                )
                .await?;
        }
        let blocked = takeover::block(&transaction, node).await?;
        Ok::<_, Error>((log_ledger, answer_lease_ms, inherited, blocked))
    };
    let (log_ledger, answer_lease_ms, inherited, blocked) = joining.await.map_err(step(doing))?;
    let lanes = blocked.iter().map(lanes::lane_row);
    let lanes = lanes.collect::<Result<_, _>>()?;
    let receipts = lease::issuer(&transaction, id_high_water).await?;
    transaction.commit().await.map_err(step(doing))?;
    Ok(Join::Joined(Joined {
        lease,
        id_high_water,
        ids_leased_until,
        lanes,
        log_ledger,
        answer_lease_ms,
        paused,
        receipts,
        inherited,
    }))
}

/// Ends the rights of a process on its own that has lost the lock, and maybe does not know it. One whose log may hold orders is
/// taken over instead.
async fn fence_single(transaction: &Transaction<'_>, joining: i16) -> Result<(), Error> {
    let fenced = transaction
        .query(
            "UPDATE node SET state = 'left', epoch = epoch + 1
              WHERE state = 'single' AND NOT journal_in_use AND node <> $1 RETURNING node, epoch",
            &[&joining],
        )
        .await?;
    for row in fenced {
        let (node, epoch): (i16, i64) = (row.get(0), row.get(1));
        let raise = "UPDATE writer SET epoch = $2 WHERE node = $1";
        transaction.execute(raise, &[&node, &epoch]).await?;
    }
    Ok(())
}

enum Choice {
    Row { node: i16, was_single: bool },
    BeingReplayed { node: i16, by: i16 },
    Full,
}

/// The row stays as it is until the end of the transaction: whoever fences it has done so, or finds another epoch.
async fn choose(transaction: &Transaction<'_>, candidate: &Candidate<'_>) -> Result<Choice, Error> {
    let home = transaction
        .query_opt(
            "SELECT node, taken_by FROM node WHERE home = $1::text::uuid FOR UPDATE",
            &[&candidate.home],
        )
        .await?;
    if let Some(row) = home {
        let node = row.get(0);
        return Ok(match row.get(1) {
            Some(by) => Choice::BeingReplayed { node, by },
            None => Choice::Row {
                node,
                was_single: false,
            },
        });
    }
    // The row of a single node belongs to whoever has its log. A log that may hold orders is nobody else's.
    let unused = transaction
        .query_opt(
            "SELECT node, state = 'single' FROM node
              WHERE (state = 'left' AND NOT journal_in_use)
                 OR (state = 'single' AND (NOT journal_in_use OR journal_id = $1::text::uuid))
              ORDER BY state = 'single' DESC, node LIMIT 1 FOR UPDATE",
            &[&candidate.log],
        )
        .await?;
    if let Some(row) = unused {
        return Ok(Choice::Row {
            node: row.get(0),
            was_single: row.get(1),
        });
    }
    let new: Option<i16> = transaction
        .query_one(
            "SELECT min(n)::int2 FROM generate_series(0, $1::int4) n WHERE NOT EXISTS (SELECT FROM node WHERE node = n)",
            &[&i32::from(NODE_MAX)],
        )
        .await?
        .get(0);
    Ok(new.map_or(Choice::Full, |node| Choice::Row {
        node,
        was_single: false,
    }))
}

/// Makes a node active after its own log was replayed: its lanes are blocked no longer. Every id in the log lies before
/// `ids_until`.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn activate(
    database: &Database,
    lease: NodeLease,
    ids_until: UnixMillis,
) -> Result<(), StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        // A pause of every sale that was being stored when the row was made is committed: joining waits for changes of terms.
        let changed = transaction
            .execute(
                "UPDATE node SET state = 'active', paused = paused OR EXISTS (
                        SELECT FROM node o WHERE o.paused AND o.state IN ('single', 'joining', 'active'))
                  WHERE node = $1 AND epoch = $2 AND state IN ('joining', 'active')",
                &[&lease.node, &lease.epoch],
            )
            .await?;
        if changed == 0 {
            return Ok(false);
        }
        transaction
            .execute(
                "UPDATE lane SET blocked_by = NULL WHERE node = $1 AND blocked_by = $1",
                &[&lease.node],
            )
            .await?;
        takeover::raise_ids_of_free(&transaction, ids_until).await?;
        transaction.commit().await?;
        Ok(true)
    };
    match database.timed("becoming an active node", work).await? {
        true => Ok(()),
        false => Err(lease.is_lost()),
    }
}

/// Renews: moves the counter and leases ids up to `ids_until`. Returns the counter.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over.
pub async fn renew(
    database: &Database,
    session: &Connected,
    lease: NodeLease,
    ids_until: UnixMillis,
) -> Result<i64, StoreError> {
    let row = database
        .timed(
            "renewing the membership",
            session.query_opt(
                "UPDATE node SET renewals = renewals + 1, ids_leased_until_ms = greatest(ids_leased_until_ms, $3)
                  WHERE node = $1 AND epoch = $2 AND state IN ('joining', 'active') RETURNING renewals",
                &[&lease.node, &lease.epoch, &ids_until.0],
            ),
        )
        .await?;
    row.map(|row| row.get(0)).ok_or_else(|| lease.is_lost())
}

/// Renews as [`renew`] does, and looks at every node.
///
/// # Errors
/// Those of [`renew`].
pub async fn renew_and_look(
    database: &Database,
    session: &Connected,
    lease: NodeLease,
    ids_until: UnixMillis,
) -> Result<Look, StoreError> {
    renew(database, session, lease, ids_until).await?;
    let looking = async {
        tokio::try_join!(
            session.query(NODES, &[]),
            session.query_one(
                "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), (extract(epoch FROM clock_timestamp()) * 1000)::int8",
                &[]
            ),
        )
    };
    let (nodes, server) = database.timed("looking at the nodes", looking).await?;
    Ok(Look {
        nodes: nodes.iter().map(node_row).collect(),
        timeline: server.get(0),
        now: UnixMillis(server.get(1)),
    })
}

/// Leases ids up to `until`, without moving the counter.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over.
pub async fn lease_ids(
    database: &Database,
    lease: NodeLease,
    until: UnixMillis,
) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    let leased = database
        .timed(
            "leasing order ids",
            client.execute(
                "UPDATE node SET ids_leased_until_ms = greatest(ids_leased_until_ms, $3)
                  WHERE node = $1 AND epoch = $2 AND state IN ('joining', 'active')",
                &[&lease.node, &lease.epoch, &until.0],
            ),
        )
        .await?;
    if leased == 1 {
        Ok(())
    } else {
        Err(lease.is_lost())
    }
}

/// Asks a node to hand everything over and leave. False: there is no such node that is active.
///
/// # Errors
/// If the database does not answer.
pub async fn ask_to_leave(database: &Database, node: i16) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let asked = database
        .timed(
            "asking a node to leave",
            client.execute(
                "UPDATE node SET drain = true WHERE node = $1 AND state IN ('joining', 'active')",
                &[&node],
            ),
        )
        .await?;
    Ok(asked == 1)
}

/// Leaves. A node that still has lanes, or whose log may hold orders, only gives its counter up, so that another takes
/// over at once; returns false then. The last node of a cluster leaves its lanes to nobody, with its units. Every id
/// that the node has given out lies before `used`.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn leave(
    database: &Database,
    lease: NodeLease,
    used: UnixMillis,
) -> Result<bool, StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        let row = transaction
            .query_opt(
                "SELECT journal_in_use, EXISTS (SELECT FROM node o WHERE o.node <> $1 AND o.state IN ('joining', 'active', 'dead'))
                   FROM node WHERE node = $1 AND epoch = $2 AND state IN ('joining', 'active') FOR UPDATE",
                &[&lease.node, &lease.epoch],
            )
            .await?;
        let Some(row) = row else {
            return Ok(None);
        };
        let (log_in_use, has_others): (bool, bool) = (row.get(0), row.get(1));
        let lanes = transaction
            .query(
                "SELECT blocked_by IS NOT NULL FROM lane WHERE node = $1 ORDER BY lane FOR UPDATE",
                &[&lease.node],
            )
            .await?;
        let is_blocked = lanes.iter().any(|row| row.get::<_, bool>(0));
        if log_in_use || is_blocked || (has_others && !lanes.is_empty()) {
            transaction
                .execute(
                    "UPDATE node SET renewals = -abs(renewals) - 1 WHERE node = $1",
                    &[&lease.node],
                )
                .await?;
            transaction.commit().await?;
            return Ok(Some(false));
        }
        transaction
            .execute(
                "UPDATE lane SET node = NULL, ids_until_ms = greatest(ids_until_ms, $2) WHERE node = $1",
                &[&lease.node, &used.0],
            )
            .await?;
        takeover::forget_wants(&transaction, lease.node).await?;
        takeover::dissolve(&transaction, lease.node).await?;
        // The epoch too, so that nothing of the process that leaves comes behind.
        transaction
            .execute(
                "UPDATE node SET state = 'left', epoch = epoch + 1, ids_leased_until_ms = $2,
                        unpaid_from = CASE WHEN $3 THEN unpaid_from ELSE $4 END WHERE node = $1",
                &[
                    &lease.node,
                    &used.0,
                    &!lanes.is_empty(),
                    &lease::NOTHING_UNPAID,
                ],
            )
            .await?;
        transaction
            .execute(
                "UPDATE writer SET epoch = epoch + 1 WHERE node = $1",
                &[&lease.node],
            )
            .await?;
        transaction.commit().await?;
        Ok(Some(true))
    };
    let left = database.timed("leaving the cluster", work).await?;
    left.ok_or_else(|| lease.is_lost())
}

/// Every node.
///
/// # Errors
/// If the database does not answer.
pub async fn nodes(database: &Database) -> Result<Vec<NodeRow>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed("reading the nodes", client.query(NODES, &[]))
        .await?;
    Ok(rows.iter().map(node_row).collect())
}

/// A node, and what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Its row.
    pub node: NodeRow,
    /// Its lanes.
    pub lanes: i64,
    /// Of these, those that wait for a log.
    pub lanes_blocked: i64,
    /// Units of all SKUs that are lent to it.
    pub units_lent: i64,
    /// Of these, units of unpaid orders that are rows.
    pub units_held: i64,
}

/// Every node of a cluster, with what it has.
///
/// # Errors
/// If the database does not answer.
pub async fn holdings(database: &Database) -> Result<Vec<Holdings>, StoreError> {
    let client = database.pooled().await?;
    let sql = "
        SELECT n.node, n.epoch, n.state, n.renewals, n.address, n.reads_format, n.taken_by, n.log_title, n.journal_in_use, n.drain,
               l.lanes, l.blocked, s.lent, s.held
          FROM node n,
               LATERAL (SELECT count(*) AS lanes, count(blocked_by) AS blocked FROM lane WHERE node = n.node) l,
               LATERAL (SELECT coalesce(sum(lent), 0)::int8 AS lent, coalesce(sum(held), 0)::int8 AS held
                          FROM stock_share WHERE node = n.node) s
         WHERE n.state <> 'single' ORDER BY n.node";
    let rows = database
        .timed("reading what the nodes have", client.query(sql, &[]))
        .await?;
    let of = |row: &Row| Holdings {
        node: node_row(row),
        lanes: row.get(10),
        lanes_blocked: row.get(11),
        units_lent: row.get(12),
        units_held: row.get(13),
    };
    Ok(rows.iter().map(of).collect())
}

const NODES: &str = "
    SELECT node, epoch, state, renewals, address, reads_format, taken_by, log_title, journal_in_use, drain
      FROM node ORDER BY node";

fn node_row(row: &Row) -> NodeRow {
    NodeRow {
        node: row.get(0),
        epoch: row.get(1),
        state: row.get(2),
        renewals: row.get(3),
        address: row.get(4),
        reads_format: row.get(5),
        taken_by: row.get(6),
        log: row.get(7),
        log_in_use: row.get(8),
        drain: row.get(9),
    }
}
