//! Who may write, and which order ids are ours to give out.

use tokio_postgres::Row;

use super::{Connected, Database};
use crate::order::UnixMillis;
use crate::store::StoreError;

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
    /// No id of a predecessor lies beyond this moment.
    pub id_high_water: UnixMillis,
    /// Ids up to here are ours.
    pub ids_leased_until: UnixMillis,
    /// Whether an operator has paused every sale.
    pub paused: bool,
    /// Holds the advisory lock that keeps a second process away; keep it until the end.
    pub guard: Connected,
}

impl Database {
    /// Takes node 0 over with `shards` writers, as the one process that holds `guard`: raises the
    /// epoch, waits until writers of an older epoch are gone, leases ids. None lies before
    /// `ids_from`, nor before what the database knows of.
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
        let leased_until = high_water.max(UnixMillis::now()).plus_ms(ID_LEASE_MS);
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
        transaction
            .commit()
            .await
            .map_err(StoreError::statement(doing))?;
        Ok(Taken {
            lease: NodeLease { node: NODE, epoch },
            id_high_water: high_water,
            ids_leased_until: leased_until,
            paused,
            guard,
        })
    }

    /// Makes this the one process that is active on this schema, for as long as the returned
    /// connection lives. Comes before anything is changed, the schema included.
    ///
    /// # Errors
    /// [`StoreError::AlreadyActive`] where another process is.
    pub async fn claim(&self) -> Result<Connected, StoreError> {
        let guard = self.connect("millrace node 0").await?;
        let name = format!("millrace:{}", self.schema());
        let taken: bool = self
            .timed("locking out other processes", async {
                guard
                    .query_one(
                        "SELECT pg_try_advisory_lock(hashtextextended($1, 0))",
                        &[&name],
                    )
                    .await
                    .map(|row| row.get(0))
            })
            .await?;
        if taken {
            return Ok(guard);
        }
        let holder = guard
            .query_opt(
                "SELECT a.client_addr::text, a.backend_start::text FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                  WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    AND (l.classid::int8 << 32 | l.objid::int8) = hashtextextended($1, 0)",
                &[&name],
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

    /// Leases ids up to `until`, and the right to acknowledge for `acknowledge_ms` from now, by
    /// the database's clock.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] where another process has taken the node over.
    pub async fn renew_lease(
        &self,
        lease: NodeLease,
        until: UnixMillis,
        acknowledge_ms: u64,
    ) -> Result<(), StoreError> {
        let acknowledge_ms = i64::try_from(acknowledge_ms).unwrap_or(i64::MAX);
        let client = self.pooled().await?;
        let renewed = self
            .timed(
                "renewing the lease on order ids",
                client.execute(
                    "UPDATE node SET ids_leased_until_ms = greatest(ids_leased_until_ms, $3),
                            lease_until = clock_timestamp() + $4::int8 * interval '1 millisecond'
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
    /// Where the database does not answer; the next process then starts its ids a little later.
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
