//! The publication, and the replication slot of a sink.
//!
//! The server streams what was committed since the slot's place, and moves the place on once it is told that what was
//! read is delivered. A crash between the two delivers again and loses nothing.

use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::transactions::Transactions;
use crate::store::pgoutput::Lsn;
use crate::store::postgres::{Connected, Database, ReplicationStream};
use crate::store::{StoreError, quoted};

/// Longest wait for a slot: it begins once every transaction that writes just now has ended.
const MAKING: Duration = Duration::from_secs(60);

/// Takes the lock of a slot, which one session alone has.
const LOCK: &str =
    "SELECT pg_try_advisory_lock(hashtextextended('millrace events:' || $1::text, 0))";

/// Ends the session that has the lock of a slot if it has asked nothing for so many milliseconds.
const END_IDLE: &str = "SELECT pg_terminate_backend(a.pid)
      FROM pg_locks l JOIN pg_stat_activity a USING (pid)
     WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND (l.classid::int8 << 32 | l.objid::int8) = hashtextextended('millrace events:' || $1::text, 0)
       AND a.state = 'idle' AND a.state_change < clock_timestamp() - $2::int8 * interval '1 millisecond'";

/// Name of the publication of a schema.
pub fn publication_of(schema: &str) -> String {
    format!("millrace_{schema}")
}

/// Name of the slot of a sink.
pub fn slot_of(schema: &str, sink: &str) -> String {
    format!("millrace_{schema}_{sink}")
}

/// What a slot looks like from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// `None`: there is no slot, or it has lost its place.
    pub slot: Option<Slot>,
    /// Whether there is one that has lost its place.
    pub is_lost: bool,
}

/// A usable slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Everything before it is delivered.
    pub confirmed: Lsn,
    /// Bytes of WAL that the server keeps for it.
    pub kept_bytes: u64,
    /// What is not delivered was written by this transaction or a later one. With its epoch.
    pub oldest_xid: i64,
    /// Whether a session streams it.
    pub is_read: bool,
}

/// A connection that reads the slot of one sink. It holds a lock, so that one process alone reads it.
#[derive(Debug)]
pub struct SlotReader {
    client: Connected,
    database: Database,
    slot: String,
    publication: String,
}

impl SlotReader {
    /// Connects and takes the lock; `None` if another process has it. A process that runs looks at its slot each second;
    /// one that has asked nothing for `silence_max` is paused, and the lock is taken from it by and by.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn open(
        database: &Database,
        sink: &str,
        silence_max: Duration,
    ) -> Result<Option<Self>, StoreError> {
        let client = database.connect(&format!("millrace events {sink}")).await?;
        let reader = SlotReader {
            slot: slot_of(database.schema(), sink),
            publication: publication_of(database.schema()),
            database: database.clone(),
            client,
        };
        let taken = reader
            .one("locking the slot of a sink", LOCK, &[&reader.slot])
            .await?;
        if taken.get(0) {
            return Ok(Some(reader));
        }
        let doing = "ending the session of a process that is paused";
        let silence_ms = i64::try_from(silence_max.as_millis()).unwrap_or(i64::MAX);
        let parameters: [&(dyn ToSql + Sync); 2] = [&reader.slot, &silence_ms];
        let ending = reader.client.query(END_IDLE, &parameters);
        if !database.timed(doing, ending).await?.is_empty() {
            tracing::warn!(
                slot = reader.slot,
                "the process that has read this slot is paused; its session was ended"
            );
        }
        Ok(None)
    }

    async fn one(
        &self,
        doing: &'static str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<tokio_postgres::Row, StoreError> {
        let asking = self.client.query_one(sql, parameters);
        self.database.timed(doing, asking).await
    }

    /// How the slot is.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn state(&self) -> Result<SlotState, StoreError> {
        let row = self
            .one(
                "looking at a replication slot",
                "SELECT s.slot_name IS NOT NULL, coalesce(s.wal_status = 'lost', false), coalesce(s.active, false),
                        (s.confirmed_flush_lsn - '0/0')::int8, (pg_current_wal_flush_lsn() - s.restart_lsn)::int8,
                        pg_snapshot_xmax(pg_current_snapshot())::text::int8 - age(s.catalog_xmin)
                   FROM (SELECT) one LEFT JOIN pg_replication_slots s
                        ON s.slot_name = $1::text AND s.database = current_database()",
                &[&self.slot],
            )
            .await?;
        let (is_there, is_lost): (bool, bool) = (row.get(0), row.get(1));
        let number = |column| row.get::<_, Option<i64>>(column).unwrap_or(0);
        let slot = Slot {
            confirmed: Lsn(number(3).cast_unsigned()),
            kept_bytes: u64::try_from(number(4)).unwrap_or(0),
            oldest_xid: number(5),
            is_read: row.get(2),
        };
        Ok(SlotState {
            slot: (is_there && !is_lost).then_some(slot),
            is_lost,
        })
    }

    /// Makes the slot. Events begin with the transactions that are committed from then on. On return every
    /// transaction that was at work meanwhile has ended, so that what the slot does not tell can be seen in the rows.
    ///
    /// # Errors
    /// If the server refuses it or does not answer.
    pub async fn make(&self) -> Result<(), StoreError> {
        let doing = "making a replication slot";
        let late = |_| StoreError::Timeout {
            doing,
            after: MAKING,
        };
        let making = async {
            self.client
                .execute(
                    "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput')",
                    &[&self.slot],
                )
                .await?;
            let row = self
                .client
                .query_one(
                    "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8",
                    &[],
                )
                .await?;
            let newest: i64 = row.get(0);
            loop {
                let row = self
                    .client
                    .query_one(
                        "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::int8 >= $1",
                        &[&newest],
                    )
                    .await?;
                if row.get(0) {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let made = tokio::time::timeout(MAKING, making).await.map_err(late)?;
        made.map_err(StoreError::statement(doing))
    }

    /// Drops the slot, if it is there.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn drop_slot(&self) -> Result<(), StoreError> {
        let slots = std::slice::from_ref(&self.slot);
        drop_slots(&self.client, &self.database, slots).await
    }

    /// Streams the transactions from the slot's place on. Whoever else has begun that had the lock before, and is
    /// paused or cut off: its stream is ended.
    ///
    /// # Errors
    /// If the server does not answer, or refuses it.
    pub async fn stream(&self, slot: Slot) -> Result<Transactions, StoreError> {
        let slots = std::slice::from_ref(&self.slot);
        end_streams(&self.client, &self.database, slots).await?;
        let stream = ReplicationStream::start(
            &self.database,
            &self.client,
            &self.slot,
            &self.publication,
            slot.confirmed,
        );
        stream.await.map(Transactions::new)
    }

    /// A place in the write-ahead log that the stream passes after all that is committed now.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn mark(&self) -> Result<Lsn, StoreError> {
        let row = self
            .one(
                "marking a place in the write-ahead log",
                "SELECT (pg_logical_emit_message(true, 'millrace', '') - '0/0')::int8",
                &[],
            )
            .await?;
        Ok(Lsn(row.get::<_, i64>(0).cast_unsigned()))
    }
}

/// Makes the publication of the schema, or brings it up to date. Before any slot: a slot knows only publications that
/// were there before the changes that it tells.
///
/// # Errors
/// If the role may not, or the database does not answer.
pub async fn publish(database: &Database) -> Result<(), StoreError> {
    let name = publication_of(database.schema());
    let client = database.pooled().await?;
    let there = database
        .timed(
            "looking for the publication",
            client.query_opt("SELECT FROM pg_publication WHERE pubname = $1", &[&name]),
        )
        .await?;
    if there.is_some() {
        return Ok(());
    }
    // Rows that retention deletes are no event.
    let sql = format!(
        "CREATE PUBLICATION {} FOR TABLE orders, dead_letters, payments WITH (publish = 'insert, update')",
        quoted(&name)
    );
    let made = database
        .timed(
            "making the publication of the events (the role needs CREATE on the database)",
            client.batch_execute(&sql),
        )
        .await;
    match made {
        // Another node, which reads another sink, was faster.
        Err(StoreError::Statement { ref source, .. })
            if source.code() == Some(&SqlState::DUPLICATE_OBJECT) =>
        {
            Ok(())
        }
        made => made,
    }
}

/// Drops the slots of all sinks, the publication, and the places of the sinks. What waits for a sink and its dead
/// letters stay. Returns the names of the slots that were dropped.
///
/// # Errors
/// If a slot is being read, or the database does not answer.
pub async fn drop_all(database: &Database, slots_at: &Database) -> Result<Vec<String>, StoreError> {
    // Names of sinks have no underscore, so `shop` does not take the slots of the schema `shop_eu` for its own.
    let prefix = format!("{}_", publication_of(database.schema()));
    let client = slots_at.connect("millrace events drop").await?;
    let rows = slots_at
        .timed(
            "looking for replication slots",
            client.query(
                "SELECT slot_name::text FROM pg_replication_slots
                  WHERE starts_with(slot_name::text, $1) AND strpos(substr(slot_name::text, length($1) + 1), '_') = 0
                    AND plugin = 'pgoutput' AND database = current_database()",
                &[&prefix],
            ),
        )
        .await?;
    let slots: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    for slot in &slots {
        let row = slots_at
            .timed(
                "locking the slot of a sink",
                client.query_one(LOCK, &[slot]),
            )
            .await?;
        if !row.get::<_, bool>(0) {
            return Err(StoreError::Events(format!(
                "the slot {slot} is read by a Millrace that runs; stop it, or take its sinks out of its configuration first"
            )));
        }
    }
    drop_slots(&client, slots_at, &slots).await?;
    let client = database.pooled().await?;
    let sql = format!(
        "DROP PUBLICATION IF EXISTS {}; DELETE FROM event_sinks",
        quoted(&publication_of(database.schema()))
    );
    database
        .timed("dropping the publication", client.batch_execute(&sql))
        .await?;
    Ok(slots)
}

async fn end_streams(
    client: &tokio_postgres::Client,
    database: &Database,
    slots: &[String],
) -> Result<(), StoreError> {
    let longest_ms = i64::try_from(database.step_timeout().as_millis() / 2).unwrap_or(i64::MAX);
    let parameters: [&(dyn ToSql + Sync); 2] = [&slots, &longest_ms];
    let ending = client.execute(
        "SELECT pg_terminate_backend(active_pid, $2) FROM pg_replication_slots
          WHERE slot_name::text = ANY ($1) AND active_pid IS NOT NULL",
        &parameters,
    );
    let ended = database.timed("ending the stream of a slot", ending).await;
    ended.map(|_| ())
}

async fn drop_slots(
    client: &tokio_postgres::Client,
    database: &Database,
    slots: &[String],
) -> Result<(), StoreError> {
    end_streams(client, database, slots).await?;
    database
        .timed(
            "dropping a replication slot",
            client.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
                  WHERE slot_name::text = ANY ($1)",
                &[&slots],
            ),
        )
        .await
        .map(|_| ())
}

/// Checks that the publication is there, or that the role may make it.
///
/// # Errors
/// [`StoreError::Events`] with the remedy.
pub async fn check_publication(database: &Database) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    let name = publication_of(database.schema());
    let row = database
        .timed(
            "looking for the publication",
            client.query_one(
                "SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)
                        OR has_database_privilege(current_database(), 'CREATE'), current_database()::text",
                &[&name],
            ),
        )
        .await?;
    let (may, in_database): (bool, &str) = (row.get(0), row.get(1));
    if may {
        return Ok(());
    }
    Err(StoreError::Events(format!(
        "the role of database.url may not make the publication of the events: GRANT CREATE ON DATABASE {} to it, or make it: \
         CREATE PUBLICATION {name} FOR TABLE {schema}.orders, {schema}.dead_letters, {schema}.payments WITH (publish = \
         'insert, update')",
        quoted(in_database),
        schema = quoted(database.schema()),
    )))
}

/// Checks that events can be read here: the server's settings, the role's rights, a slot and a sender that are free. Makes
/// a slot that ends with the session.
///
/// # Errors
/// [`StoreError::Events`] with the remedy.
pub async fn check(database: &Database) -> Result<(), StoreError> {
    let client = database.connect("millrace config check").await?;
    let row = database
        .timed(
            "looking at the server's settings",
            client.query_one(
                "SELECT current_setting('wal_level'), pg_is_in_recovery(), current_setting('max_replication_slots')",
                &[],
            ),
        )
        .await?;
    let (level, is_standby, slots_max): (&str, bool, &str) = (row.get(0), row.get(1), row.get(2));
    if is_standby {
        return Err(StoreError::Events(
            "events.database_url leads to a standby; events are read from the primary".to_owned(),
        ));
    }
    if level != "logical" {
        return Err(StoreError::Events(format!(
            "events need wal_level = logical, and the server has {level}: set it and restart the server (a managed \
             service has a switch for it, such as rds.logical_replication or cloudsql.logical_decoding)"
        )));
    }
    let name = format!("millrace_check_{}", std::process::id());
    let made = tokio::time::timeout(
        MAKING,
        client.execute(
            "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput', true)",
            &[&name],
        ),
    )
    .await
    .map_err(|_| {
        StoreError::Events(
            "a replication slot could not be made within a minute: a transaction that has written stays open; end it \
             (pg_stat_activity, pg_prepared_xacts)"
                .to_owned(),
        )
    })?;
    made.map_err(|error| match error.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => StoreError::Events(
            "the role may not make replication slots: ALTER ROLE … REPLICATION, or the managed service's role for it \
             (such as rds_replication); or name another role in events.database_url"
                .to_owned(),
        ),
        Some(&SqlState::CONFIGURATION_LIMIT_EXCEEDED) => StoreError::Events(format!(
            "all {slots_max} replication slots of the server are in use: raise max_replication_slots, or drop those that \
             nobody needs (pg_replication_slots)"
        )),
        _ => StoreError::statement("making a replication slot")(error),
    })?;
    // The slot ends with its session.
    let stream = ReplicationStream::connect(database, &client).await;
    stream.map(|_| ()).map_err(|error| {
        StoreError::Events(format!(
            "the server streams no changes ({error}): each sink needs one of its max_wal_senders, and events.database_url has \
             to lead to the server itself, not to a pooler"
        ))
    })
}
