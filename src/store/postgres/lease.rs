//! Who may write, and which order ids are ours to give out.

use std::time::Duration;

use tokio_postgres::Row;

use super::{Connected, Database};
use crate::order::UnixMillis;
use crate::order::receipt::Issuer;
use crate::store::StoreError;

/// The session whose lock makes a process the active one.
const GUARD_NAME: &str = "millrace node 0";
/// Once its backend is told to end, the lock of a session that is lost is free within moments.
const UNLOCK_LOOKS: u32 = 20;
const UNLOCK_LOOK: Duration = Duration::from_millis(50);

/// How far ahead order ids are leased, in milliseconds. The generator stops at its end, so it
/// bounds how long a database outage may last before ids run out, and how far ids may run ahead
/// of the clock after a crash.
pub const ID_LEASE_MS: u64 = 60_000;

/// The right to write as a node, at one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeLease {
    /// The node, 0 to 63.
    pub node: i16,
    /// Rises with every start.
    pub epoch: i64,
}

/// What taking a node over gives.
#[derive(Debug)]
pub struct Taken {
    /// The right to write.
    pub lease: NodeLease,
    /// No id of a predecessor lies beyond this moment, which is not in the past.
    pub id_high_water: UnixMillis,
    /// Ids up to here are ours.
    pub ids_leased_until: UnixMillis,
    /// Whether an operator has paused every sale.
    pub paused: bool,
    /// Whose orders receipts are made of.
    pub receipts: Issuer,
    /// Holds the advisory lock that keeps a second process away; keep it until the end.
    pub guard: Connected,
}

impl Database {
    /// Takes node 0 over with `shards` writers, as the one process that holds `guard`: raises the
    /// epoch, waits until writers of an older epoch are gone, leases ids. None lies before
    /// `ids_from`, nor before what the database knows of. `ids_from` is the present moment, or what a
    /// predecessor has given out beyond it.
    ///
    /// # Errors
    /// What the database says.
    pub async fn take_over(
        &self,
        mut guard: Connected,
        shards: i16,
        ids_from: UnixMillis,
    ) -> Result<Taken, StoreError> {
        const NODE: i16 = 0;
        let transaction = guard
            .transaction()
            .await
            .map_err(StoreError::statement("taking the node over"))?;
        let doing = "taking the node over";
        let row: Option<Row> = transaction
            .query_opt(
                "SELECT ids_leased_until_ms, paused FROM node WHERE node = $1 FOR UPDATE",
                &[&NODE],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        let paused = row.as_ref().is_some_and(|row| row.get(1));
        let high_water = UnixMillis(row.map_or(0, |row| row.get(0))).max(ids_from);
        let leased_until = high_water.plus_ms(ID_LEASE_MS);
        let epoch: i64 = transaction
            .query_one(
                "INSERT INTO node (node, epoch, ids_leased_until_ms, started_at) VALUES ($1, 1, $2, now())
                 ON CONFLICT (node) DO UPDATE SET epoch = node.epoch + 1,
                     ids_leased_until_ms = excluded.ids_leased_until_ms, started_at = now()
                 RETURNING epoch",
                &[&NODE, &leased_until.0],
            )
            .await
            .map_err(StoreError::statement(doing))?
            .get(0);
        // Waits for a predecessor's transactions: they hold their writer's row.
        transaction
            .execute(
                "UPDATE writer SET epoch = $2 WHERE node = $1",
                &[&NODE, &epoch],
            )
            .await
            .map_err(StoreError::statement(
                "waiting for the writers of an earlier process",
            ))?;
        transaction
            .execute(
                "INSERT INTO writer (node, shard, epoch) SELECT $1, s::int2, $2 FROM generate_series(0, $3::int4 - 1) s
                 ON CONFLICT DO NOTHING",
                &[&NODE, &epoch, &i32::from(shards)],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        // Whatever was placed before this start, in a database that an earlier release made.
        let identity = transaction
            .query_one(
                "UPDATE database_identity
                    SET receipts_1_until_ms = coalesce(receipts_1_until_ms, $1)
                 RETURNING uuid_send(id), receipts_1_until_ms",
                &[&high_water.0],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        let receipts = Issuer {
            database: <[u8; 16]>::try_from(identity.get::<_, &[u8]>(0))
                .map_err(|_| StoreError::Data("the database's identity is no UUID".to_owned()))?,
            version_1_until: UnixMillis(identity.get(1)),
        };
        transaction
            .commit()
            .await
            .map_err(StoreError::statement(doing))?;
        Ok(Taken {
            lease: NodeLease { node: NODE, epoch },
            id_high_water: high_water,
            ids_leased_until: leased_until,
            paused,
            receipts,
            guard,
        })
    }

    /// Makes this the one process that is active on this schema, for as long as the returned
    /// connection lives. Comes before anything is changed, the schema included.
    ///
    /// # Errors
    /// [`StoreError::AlreadyActive`] if another process is.
    pub async fn claim(&self) -> Result<Connected, StoreError> {
        let guard = self.connect(GUARD_NAME).await?;
        if self.lock_out_others(&guard).await? {
            return Ok(guard);
        }
        let holder = guard
            .query_opt(
                "SELECT a.client_addr::text, a.backend_start::text FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                  WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    AND (l.classid::int8 << 32 | l.objid::int8) = hashtextextended($1, 0)",
                &[&self.lock_name()],
            )
            .await
            .ok()
            .flatten()
            .map(|row| {
                let from = row.get::<_, Option<String>>(0).unwrap_or_else(|| "this machine".into());
                let since = row.get::<_, Option<String>>(1).unwrap_or_else(|| "?".into());
                format!(" (from {from}, connected since {since})")
            });
        Err(StoreError::AlreadyActive(holder.unwrap_or_default()))
    }

    /// Takes the lock for this session, without waiting. True: it has it.
    async fn lock_out_others(&self, session: &Connected) -> Result<bool, StoreError> {
        self.timed("locking out other processes", async {
            session
                .query_one(
                    "SELECT pg_try_advisory_lock(hashtextextended($1, 0))",
                    &[&self.lock_name()],
                )
                .await
                .map(|row| row.get(0))
        })
        .await
    }

    fn lock_name(&self) -> String {
        format!("millrace:{}", self.schema())
    }

    /// Leases ids up to `until`, and the right to acknowledge for `acknowledge_ms` from now, by
    /// the database's clock. Asked on a session of the caller's own.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if another process has taken the node over.
    pub async fn renew_lease(
        &self,
        client: &Connected,
        lease: NodeLease,
        until: UnixMillis,
        acknowledge_ms: u64,
    ) -> Result<(), StoreError> {
        let acknowledge_ms = i64::try_from(acknowledge_ms).unwrap_or(i64::MAX);
        let renewed = self
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
        let found = self
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

    /// Gives back, at a clean stop, what was leased beyond `used`; or notes it, where ids were
    /// leased in the journal while the database was away.
    ///
    /// # Errors
    /// If the database does not answer; the next process then starts its ids a little later.
    pub async fn return_lease(&self, lease: NodeLease, used: UnixMillis) -> Result<(), StoreError> {
        let client = self.pooled().await?;
        let used = used.plus_ms(1_000);
        self.timed(
            "giving the lease on order ids back",
            client.execute(
                "UPDATE node SET ids_leased_until_ms = $3 WHERE node = $1 AND epoch = $2",
                &[&lease.node, &lease.epoch, &used.0],
            ),
        )
        .await
        .map(|_| ())
    }
}

/// The session that keeps other processes away from the database, and on which the leases are renewed.
/// Nobody else uses it, so nothing that others do to the database's connections can stop a renewal. One
/// that is lost is made again, with its lock.
#[derive(Debug)]
pub struct NodeGuard {
    database: Database,
    session: Option<Connected>,
    /// That of the session that has the lock, or had it last.
    mark: i64,
    locked: bool,
}

impl NodeGuard {
    /// Keeps `session`, which has the lock: that of [`Taken::guard`].
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

    /// Waits until the session is lost; for ever where there is none.
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

    /// Makes the session again where it is lost, and takes its lock. Without the lock another process
    /// is about to take over; the epoch then decides, so it is no error.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn reconnect(&mut self) -> Result<(), StoreError> {
        if self.session.is_none() {
            let session = self.database.connect(GUARD_NAME).await?;
            self.locked = false;
            let free = self.database.lock_out_others(&session).await?;
            self.locked = free || self.replace_own(&session).await?;
            if self.locked {
                self.mark = mark(&self.database, &session).await?;
            } else {
                tracing::warn!(
                    "another process holds the lock on this database, taken while our connection was lost: \
                     it is about to take over, or a command runs that needs the database to itself"
                );
            }
            self.session = Some(session);
        }
        Ok(())
    }

    /// Ends our own lost session, where the server does not know yet that it is lost, and takes the
    /// lock from it. True: it has it.
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
            if self.database.lock_out_others(session).await? {
                return Ok(true);
            }
            tokio::time::sleep(UNLOCK_LOOK).await;
        }
        Ok(false)
    }

    /// Renews as [`Database::renew_lease`] does, on this session, which is made again where it was lost
    /// and taken for lost where it fails.
    ///
    /// # Errors
    /// As there.
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
            if !self.locked && self.database.lock_out_others(session).await? {
                self.locked = true;
                self.mark = mark(&self.database, session).await?;
                tracing::info!("the lock on this database is ours again");
            }
            self.database
                .renew_lease(session, lease, until, acknowledge_ms)
                .await
        };
        let renewed = renewing.await;
        if !matches!(renewed, Ok(()) | Err(StoreError::Fenced { .. })) {
            self.session = None;
        }
        renewed
    }
}

/// Takes one more lock for `session`, which nobody else asks for: whichever session of the server has it
/// is this one, also behind a pooler that lends the same one to others afterwards.
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
