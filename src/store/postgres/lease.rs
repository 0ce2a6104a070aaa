//! The right to write (the node's epoch, our fencing token), and the lease of order ids.

use std::time::Duration;

use tokio_postgres::{Row, Transaction};

use super::{Connected, Database};
use crate::order::UnixMillis;
use crate::order::receipt::Issuer;
use crate::store::{Ledger, StoreError};

/// `application_name` of the session whose lock makes a process the active one.
const GUARD_NAME: &str = "millrace node 0";
/// After its backend was terminated, the lock of a lost session is free within moments.
const UNLOCK_LOOKS: u32 = 20;
const UNLOCK_LOOK: Duration = Duration::from_millis(50);

/// Length of the lease of order ids, in milliseconds. The generator stops at its end, so it bounds how long a
/// database outage may last before ids run out, and how far ids may run ahead of the clock after a crash.
pub const ID_LEASE_MS: u64 = 60_000;

/// The right to write as a node, at one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeLease {
    /// The node, 0 to 63.
    pub node: i16,
    /// The fencing token; rises with every start.
    pub epoch: i64,
    /// The counters of the units that it sells.
    pub ledger: Ledger,
}

impl NodeLease {
    /// Writes out a statement that moves counters: see [`Ledger::sql`].
    pub(in crate::store) fn sql(self, statement: &str) -> String {
        self.ledger.sql(self.node, statement)
    }

    /// The error of a write that found the row of the node with another epoch, and did not look which.
    pub(in crate::store) fn is_lost(self) -> StoreError {
        StoreError::Fenced {
            found: 0,
            ours: self.epoch,
        }
    }
}

/// The result of taking a node over.
#[derive(Debug)]
pub struct Taken {
    /// The right to write.
    pub lease: NodeLease,
    /// All ids of predecessors lie before this moment, which is not in the past.
    pub id_high_water: UnixMillis,
    /// End of our lease of ids.
    pub ids_leased_until: UnixMillis,
    /// Whether an operator has paused every sale.
    pub paused: bool,
    /// The issuer of receipts: this database.
    pub receipts: Issuer,
    /// Holds the advisory lock that keeps a second process away; keep it for the life of the process.
    pub guard: Connected,
}

/// Takes node 0 over with `shards` writers, as the one process that holds `guard`: raises the epoch, waits
/// until writers of an older epoch are gone, leases ids. No leased id lies before `ids_from`, nor before
/// the ids that the database knows of. `ids_from` is the present moment, or a later one if a predecessor
/// has given out ids beyond it.
///
/// # Errors
/// The database's error.
pub async fn take_over(
    mut guard: Connected,
    shards: i16,
    ids_from: UnixMillis,
) -> Result<Taken, StoreError> {
    const NODE: i16 = 0;
    let doing = "taking the node over";
    let transaction = guard
        .transaction()
        .await
        .map_err(StoreError::statement(doing))?;
    // Nodes of a cluster that have left may have given out ids beyond those of this row.
    let of_lanes: Option<i64> = transaction
        .query_one("SELECT max(ids_until_ms) FROM lane", &[])
        .await
        .map_err(StoreError::statement(doing))?
        .get(0);
    let ids_from = ids_from.max(UnixMillis(of_lanes.unwrap_or(0)));
    let Raised {
        lease,
        id_high_water,
        ids_leased_until,
        paused,
    } = raise_epoch(&transaction, NODE, shards, ids_from, Ledger::Sku).await?;
    alone(&transaction, NODE).await?;
    let receipts = issuer(&transaction, id_high_water).await?;
    transaction
        .commit()
        .await
        .map_err(StoreError::statement(doing))?;
    Ok(Taken {
        lease,
        id_high_water,
        ids_leased_until,
        paused,
        receipts,
        guard,
    })
}

/// The issuer of receipts. Version 1 of them holds for orders placed before the first start of a release that knows
/// version 2, in a database that an earlier release created.
pub(in crate::store) async fn issuer(
    transaction: &Transaction<'_>,
    id_high_water: UnixMillis,
) -> Result<Issuer, StoreError> {
    let identity = transaction
        .query_one(
            "UPDATE database_identity
                SET receipts_1_until_ms = coalesce(receipts_1_until_ms, $1)
             RETURNING uuid_send(id), receipts_1_until_ms",
            &[&id_high_water.0],
        )
        .await
        .map_err(StoreError::statement("reading the database's identity"))?;
    Ok(Issuer {
        database: <[u8; 16]>::try_from(identity.get::<_, &[u8]>(0))
            .map_err(|_| StoreError::Data("the database's identity is no UUID".to_owned()))?,
        version_1_until: UnixMillis(identity.get(1)),
    })
}

/// Makes a node the only one. The units and lanes of nodes that have not left, and are not disbanded, are theirs.
async fn alone(transaction: &Transaction<'_>, node: i16) -> Result<(), StoreError> {
    let doing = "looking for other nodes";
    let others: Option<String> = transaction
        .query_one(
            "SELECT string_agg(node::text, ', ' ORDER BY node) FROM node
              WHERE state IN ('joining', 'active') OR taken_by IS NOT NULL",
            &[],
        )
        .await
        .map_err(StoreError::statement(doing))?
        .get(0);
    if let Some(nodes) = others {
        return Err(StoreError::NodesRemain { nodes });
    }
    transaction
        .execute(
            "UPDATE node SET state = 'single', home = NULL, address = NULL WHERE node = $1 AND state IN ('left', 'dead')",
            &[&node],
        )
        .await
        .map_err(StoreError::statement(doing))?;
    take_unpaid_from(transaction, node)
        .await
        .map_err(StoreError::statement(doing))
}

/// Has a node that takes the lanes that are nobody's look for unpaid orders from where the nodes did that left them.
pub(in crate::store) async fn take_unpaid_from(
    transaction: &Transaction<'_>,
    node: i16,
) -> Result<(), tokio_postgres::Error> {
    transaction
        .execute(
            "WITH others AS (
                 UPDATE node SET unpaid_from = $2 FROM (SELECT node AS of, unpaid_from AS was FROM node) b
                  WHERE node = of AND node <> $1 AND unpaid_from < $2 RETURNING was
             )
             UPDATE node SET unpaid_changes = unpaid_changes + 1, unpaid_from = least(unpaid_from, (SELECT min(was) FROM others))
              WHERE node = $1 AND EXISTS (SELECT FROM others)",
            &[&node, &NOTHING_UNPAID],
        )
        .await
        .map(|_| ())
}

/// `unpaid_from` of a node that left nothing behind.
pub(in crate::store) const NOTHING_UNPAID: i64 = i64::MAX;

/// A node whose epoch was raised.
#[derive(Clone, Copy, Debug)]
pub(in crate::store) struct Raised {
    pub(in crate::store) lease: NodeLease,
    /// As [`Taken::id_high_water`].
    pub(in crate::store) id_high_water: UnixMillis,
    /// As [`Taken::ids_leased_until`].
    pub(in crate::store) ids_leased_until: UnixMillis,
    pub(in crate::store) paused: bool,
}

/// Raises the epoch of a node, whose row need not exist, waits until writers of an older epoch are gone, and leases ids.
pub(in crate::store) async fn raise_epoch(
    transaction: &Transaction<'_>,
    node: i16,
    shards: i16,
    ids_from: UnixMillis,
    ledger: Ledger,
) -> Result<Raised, StoreError> {
    let doing = "raising a node's epoch";
    let row: Option<Row> = transaction
        .query_opt(
            "SELECT ids_leased_until_ms FROM node WHERE node = $1 FOR UPDATE",
            &[&node],
        )
        .await
        .map_err(StoreError::statement(doing))?;
    let high_water = UnixMillis(row.map_or(0, |row| row.get(0))).max(ids_from);
    let leased_until = high_water.plus_ms(ID_LEASE_MS);
    // A pause of every sale is in all rows, also in one that did not exist when it was set.
    let raised = transaction
        .query_one(
            "INSERT INTO node (node, epoch, ids_leased_until_ms, started_at, paused)
             SELECT $1, 1, $2, now(), coalesce(bool_or(paused), false) FROM node WHERE state IN ('single', 'joining', 'active')
             ON CONFLICT (node) DO UPDATE SET epoch = node.epoch + 1,
                 ids_leased_until_ms = excluded.ids_leased_until_ms, started_at = now(), paused = node.paused OR excluded.paused
             RETURNING epoch, paused",
            &[&node, &leased_until.0],
        )
        .await
        .map_err(StoreError::statement(doing))?;
    let (epoch, paused): (i64, bool) = (raised.get(0), raised.get(1));
    // Waits for a predecessor's transactions, which lock their writer's row.
    transaction
        .execute(
            "UPDATE writer SET epoch = $2 WHERE node = $1",
            &[&node, &epoch],
        )
        .await
        .map_err(StoreError::statement(
            "waiting for the writers of an earlier process",
        ))?;
    transaction
        .execute(
            "INSERT INTO writer (node, shard, epoch) SELECT $1, s::int2, $2 FROM generate_series(0, $3::int4 - 1) s
             ON CONFLICT DO NOTHING",
            &[&node, &epoch, &i32::from(shards)],
        )
        .await
        .map_err(StoreError::statement(doing))?;
    Ok(Raised {
        lease: NodeLease {
            node,
            epoch,
            ledger,
        },
        id_high_water: high_water,
        ids_leased_until: leased_until,
        paused,
    })
}

/// Makes this process the only active one on this schema, for as long as the returned connection lives.
/// Must come before any change, the schema's included.
///
/// # Errors
/// [`StoreError::AlreadyActive`] if another process is.
pub async fn claim(database: &Database) -> Result<Connected, StoreError> {
    let guard = database.connect(GUARD_NAME).await?;
    if lock_out_others(database, &guard).await? {
        return Ok(guard);
    }
    Err(already_active(database, &guard).await)
}

/// Keeps single processes away from this schema, for as long as the returned connection lives. Other nodes of a cluster
/// may share it.
///
/// # Errors
/// [`StoreError::AlreadyActive`] if a single process is active.
pub async fn share(database: &Database, name: &str) -> Result<Connected, StoreError> {
    let guard = database.connect(name).await?;
    let is_shared: bool = database
        .timed("locking out single processes", async {
            guard
                .query_one(
                    "SELECT pg_try_advisory_lock_shared(hashtextextended($1, 0))",
                    &[&lock_name(database)],
                )
                .await
                .map(|row| row.get(0))
        })
        .await?;
    if is_shared {
        return Ok(guard);
    }
    Err(already_active(database, &guard).await)
}

/// Lets nodes have the lock for `time`, and takes it again: one that is alive and reaches the database has it then.
///
/// # Errors
/// [`StoreError::AlreadyActive`] if one has it.
pub async fn give_way(
    database: &Database,
    guard: &Connected,
    time: Duration,
) -> Result<(), StoreError> {
    database
        .timed(
            "letting other processes have the lock",
            guard.query(
                "SELECT pg_advisory_unlock(hashtextextended($1, 0))",
                &[&lock_name(database)],
            ),
        )
        .await?;
    tokio::time::sleep(time).await;
    if lock_out_others(database, guard).await? {
        return Ok(());
    }
    Err(already_active(database, guard).await)
}

async fn already_active(database: &Database, guard: &Connected) -> StoreError {
    let holder = guard
        .query_opt(
            "SELECT a.client_addr::text, a.backend_start::text FROM pg_locks l JOIN pg_stat_activity a USING (pid)
              WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND (l.classid::int8 << 32 | l.objid::int8) = hashtextextended($1, 0)",
            &[&lock_name(database)],
        )
        .await
        .ok()
        .flatten()
        .map(|row| {
            let from = row.get::<_, Option<String>>(0).unwrap_or_else(|| "this machine".into());
            let since = row.get::<_, Option<String>>(1).unwrap_or_else(|| "?".into());
            format!(" (from {from}, connected since {since})")
        });
    StoreError::AlreadyActive(holder.unwrap_or_default())
}

/// Tries to take the lock for this session. Returns true if it has it.
async fn lock_out_others(database: &Database, session: &Connected) -> Result<bool, StoreError> {
    database
        .timed("locking out other processes", async {
            session
                .query_one(
                    "SELECT pg_try_advisory_lock(hashtextextended($1, 0))",
                    &[&lock_name(database)],
                )
                .await
                .map(|row| row.get(0))
        })
        .await
}

fn lock_name(database: &Database) -> String {
    format!("millrace:{}", database.schema())
}

/// Renews the lease of ids up to `until`, and the right to acknowledge for `acknowledge_ms` from now by the
/// database's clock, on a session of the caller's.
///
/// # Errors
/// [`StoreError::Fenced`] if another process has taken the node over.
pub async fn renew(
    database: &Database,
    client: &Connected,
    lease: NodeLease,
    until: UnixMillis,
    acknowledge_ms: u64,
) -> Result<(), StoreError> {
    let acknowledge_ms = i64::try_from(acknowledge_ms).unwrap_or(i64::MAX);
    let renewed = database
        .timed(
            "renewing the lease on order ids",
            client.execute(
                "UPDATE node SET ids_leased_until_ms = greatest(ids_leased_until_ms, $3),
                        lease_until = clock_timestamp() + $4::int8 * interval '1 millisecond', lease_ms = $4
                  WHERE node = $1 AND epoch = $2",
                &[&lease.node, &lease.epoch, &until.0, &acknowledge_ms],
            ),
        )
        .await?;
    if renewed == 1 {
        return Ok(());
    }
    let found = database
        .timed(
            "reading the node's epoch",
            client.query_opt("SELECT epoch FROM node WHERE node = $1", &[&lease.node]),
        )
        .await?
        .map_or(0, |row| row.get(0));
    Err(StoreError::Fenced {
        found,
        ours: lease.epoch,
    })
}

/// At a clean stop, returns the leased ids beyond `used`; or records `used` if ids were leased in the
/// journal while the database was away.
///
/// # Errors
/// If the database does not answer; the next process then starts its ids a little later.
pub async fn give_back(
    database: &Database,
    lease: NodeLease,
    used: UnixMillis,
) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    let used = used.plus_ms(1_000);
    database
        .timed(
            "giving the lease on order ids back",
            client.execute(
                "UPDATE node SET ids_leased_until_ms = $3 WHERE node = $1 AND epoch = $2",
                &[&lease.node, &lease.epoch, &used.0],
            ),
        )
        .await
        .map(|_| ())
}

/// The session that keeps other processes away from the database and renews the leases. Nothing else uses it,
/// so no other load on the database's connections can delay a renewal. A lost session is re-established, with
/// its lock.
#[derive(Debug)]
pub struct NodeGuard {
    database: Database,
    session: Option<Connected>,
    /// The mark of the session that has the lock, or had it last; see [`mark`].
    mark: i64,
    locked: bool,
}

impl NodeGuard {
    /// Keeps `session`, which has the lock ([`Taken::guard`]).
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn keep(database: Database, session: Connected) -> Result<Self, StoreError> {
        let mark = mark(&database, &session).await?;
        Ok(NodeGuard {
            database,
            session: Some(session),
            mark,
            locked: true,
        })
    }

    /// Waits until the session is lost; for ever if there is none.
    pub async fn lost(&mut self) {
        match &mut self.session {
            Some(session) => {
                session.ended().await;
                self.session = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Whether there is a session.
    pub fn is_connected(&self) -> bool {
        self.session.is_some()
    }

    /// Re-establishes a lost session and takes its lock. Without the lock another process is about to take
    /// over; the epoch then decides, so this is no error.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn reconnect(&mut self) -> Result<(), StoreError> {
        if self.session.is_none() {
            let session = self.database.connect(GUARD_NAME).await?;
            self.locked = false;
            let free = lock_out_others(&self.database, &session).await?;
            self.locked = free || self.replace_own(&session).await?;
            if self.locked {
                self.mark = mark(&self.database, &session).await?;
            } else {
                tracing::warn!(
                    "another process took the lock on this database while our connection was lost: it is about to \
                     take over, or a command is running that needs the database to itself; retrying"
                );
            }
            self.session = Some(session);
        }
        Ok(())
    }

    /// Terminates our own lost session, if the server has not noticed the loss, and takes the lock from it.
    /// Returns true if it has it.
    async fn replace_own(&self, session: &Connected) -> Result<bool, StoreError> {
        let ended = self
            .database
            .timed(
                "ending a session that was lost",
                session.query(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks
                      WHERE locktype = 'advisory' AND granted AND objsubid = 1
                        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                        AND (classid::int8 << 32 | objid::int8) = $1",
                    &[&self.mark],
                ),
            )
            .await?;
        if ended.is_empty() {
            return Ok(false);
        }
        for _ in 0..UNLOCK_LOOKS {
            if lock_out_others(&self.database, session).await? {
                return Ok(true);
            }
            tokio::time::sleep(UNLOCK_LOOK).await;
        }
        Ok(false)
    }

    /// Renews as [`renew`] does, on this session. A lost session is re-established first; a failed renewal
    /// counts as a lost session.
    ///
    /// # Errors
    /// Those of [`renew`].
    pub async fn renew(
        &mut self,
        lease: NodeLease,
        until: UnixMillis,
        acknowledge_ms: u64,
    ) -> Result<(), StoreError> {
        self.reconnect().await?;
        let Some(session) = &self.session else {
            return Ok(());
        };
        let renewing = async {
            if !self.locked && lock_out_others(&self.database, session).await? {
                self.locked = true;
                self.mark = mark(&self.database, session).await?;
                tracing::info!("this process holds the lock on the database again");
            }
            renew(&self.database, session, lease, until, acknowledge_ms).await
        };
        let renewed = renewing.await;
        if !matches!(renewed, Ok(()) | Err(StoreError::Fenced { .. })) {
            self.session = None;
        }
        renewed
    }
}

/// Takes a second, random lock for `session`. The server session that holds it is this one, even if a pooler
/// lends it to other clients later.
async fn mark(database: &Database, session: &Connected) -> Result<i64, StoreError> {
    let mark: i64 = rand::random();
    database
        .timed(
            "marking a session",
            session.execute("SELECT pg_advisory_lock($1)", &[&mark]),
        )
        .await?;
    Ok(mark)
}
