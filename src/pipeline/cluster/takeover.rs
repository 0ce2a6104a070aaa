//! Replaying the log of a node that is gone, between the two transactions of
//! [`store::cluster::takeover`](crate::store::cluster::takeover).
//!
//! ```text
//!   fence ─► marker in its log ─► read behind the place ─► write as the dead node, on its share ─► finish
//!            └──────────────────────── replay ───────────────────────────────────────────────┘
//! ```
//!
//! The marker is appended before the log is read, so what is read is all that was ever acknowledged. Everything can be
//! begun again by whoever inherits it: the epoch of the marker rises, and orders that are there are left alone.

use std::sync::Arc;

use crate::order::UnixMillis;
use crate::pipeline::failover::lease::now_ms;
use crate::pipeline::failover::log_replay::{self, LogReplay};
use crate::pipeline::failover::replay::{Applied, Replayer};
use crate::queue::log::broker::reader::ReadError;
use crate::queue::log::broker::{BeforeStart, Broker, Known, Owner, PATIENCE};
use crate::state::orphans::Orphans;
use crate::store::StoreError;
use crate::store::batch::BatchWriter;
use crate::store::cluster::takeover::DeadNode;
use crate::store::postgres::Database;

/// Reasons why a log could not be replayed.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The database refused, or this node or the dead one was taken over by another.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log cannot be read, or acknowledged groups are missing.
    #[error(transparent)]
    Log(#[from] ReadError),
    /// The thread that reads it has ended.
    #[error("reading the log of a node that is gone: {0}")]
    Ended(#[from] tokio::task::JoinError),
}

/// The conditions of a replay.
#[derive(Debug)]
pub struct Replaying<'a> {
    /// The log of the dead node, by a client that has been checked.
    pub broker: Arc<dyn Broker>,
    /// The identity of the database.
    pub identity: [u8; 16],
    /// The dead node's writer that does it.
    pub shard: i16,
    /// Most rows of a transaction.
    pub rows_max: usize,
    /// Orders that payments wait for.
    pub orphans: &'a Orphans,
    /// Orders whose time to pay is over by now are written as expired.
    pub now: UnixMillis,
}

/// A log that was replayed.
#[derive(Clone, Copy, Debug)]
pub struct Replayed {
    /// Its orders.
    pub applied: Applied,
    /// Every id in it lies before this moment; ids that were leased in it too.
    pub id_high_water: UnixMillis,
    /// A moment of [`now_ms`] at which the dead node could no longer acknowledge, nor extend its right to answer. Its
    /// lanes open no earlier than a successor's wait after it.
    pub silent_since_ms: u64,
}

/// Takes the log of a dead node over and writes what the database lacks of it, as the dead node.
///
/// # Errors
/// [`TakeoverError`]; it may be tried again.
pub async fn replay(
    database: &Database,
    dead: &DeadNode,
    with: Replaying<'_>,
) -> Result<Replayed, TakeoverError> {
    let lease = dead.lease;
    let noted = dead.log.as_ref();
    let before = BeforeStart {
        broker: with.broker,
        owner: Owner {
            database: with.identity,
            node: lease.node as u16,
        },
        epoch: lease.epoch as u64,
        known: Known {
            in_use: noted.is_some_and(|noted| noted.in_use),
            place: noted.and_then(|noted| noted.place),
        },
        patience: PATIENCE,
    };
    let writer = BatchWriter::new(database.clone(), lease, with.shard);
    let replayer = Replayer::new(database.clone(), writer, with.rows_max);
    let mut replay = LogReplay::new(database, replayer, with.orphans, with.now).await?;
    let (mut parts, reading) = log_replay::orders_of(move |each| {
        let taken = before.take_over(each)?;
        Ok::<_, ReadError>((taken.id_high_water, now_ms()))
    });
    while let Some(part) = parts.recv().await {
        replay.apply(part).await?;
    }
    let (id_high_water, silent_since_ms) = reading.await??;
    let applied = replay.applied();
    tracing::info!(
        node = lease.node,
        written = applied.written,
        present = applied.present,
        refused = applied.refused,
        "replayed the log of a node that is gone"
    );
    Ok(Replayed {
        applied,
        id_high_water,
        silent_since_ms,
    })
}
