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
use std::time::Duration;

use tokio::sync::Notify;

use super::member::{Member, Seen};
use super::moved_units;
use crate::backoff::Backoff;
use crate::metrics::Metrics;
use crate::order::{ClockReading, SkuNumber, UnixMillis};
use crate::pipeline::failover::lease::now_ms;
use crate::pipeline::failover::loading;
use crate::pipeline::failover::log_replay::{self, LogReplay};
use crate::pipeline::failover::replay::{Applied, Replayer};
use crate::queue::log::broker::reader::ReadError;
use crate::queue::log::broker::{BeforeStart, Broker, Known, Owner, PATIENCE};
use crate::state::State;
use crate::state::orphans::Orphans;
use crate::store::batch::BatchWriter;
use crate::store::cluster::lanes;
use crate::store::cluster::shares::Share;
use crate::store::cluster::takeover::{self, DeadNode, LogEnd, Suspect};
use crate::store::postgres::order_log::{self, NotedLog};
use crate::store::postgres::{Database, NodeLease, parked};
use crate::store::{Ledger, StoreError};

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
    /// The settings of this node do not lead to it.
    #[error("{0}")]
    Unreachable(String),
}

impl TakeoverError {
    /// Whether it is about this dead node or its log alone, so that other takeovers may go on.
    fn is_of_one(&self) -> bool {
        !matches!(self, TakeoverError::Store(error)
            if error.is_transient() || matches!(error, StoreError::Fenced { .. }))
    }
}

/// The conditions of a replay.
#[derive(Debug)]
pub struct Replaying<'a> {
    /// The log of the dead node, by a client that has been checked.
    pub broker: Arc<dyn Broker>,
    /// The identity of the database.
    pub identity: [u8; 16],
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
    /// Where it ends. Every id in it lies before its moment; ids that were leased in it too.
    pub end: LogEnd,
    /// A moment of [`now_ms`] at which the dead node could no longer acknowledge, nor extend its right to answer. Its
    /// lanes open no earlier than a successor's wait after it.
    pub silent_since_ms: u64,
}

/// The writer of a dead node that replays: the one that every node has, whatever the number of its workers.
const SHARD: i16 = 0;

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
    let writer = BatchWriter::new(database.clone(), lease, SHARD);
    let mut replayer = Replayer::new(database.clone(), writer, with.rows_max);
    // Other nodes store payments for its orders meanwhile.
    loading::load_orphans(database, with.orphans).await?;
    let replay = LogReplay::new(database, with.orphans, with.now).await?;
    let (parts, reading) = log_replay::orders_of(move |each| {
        let taken = before.take_over_as(each)?;
        let end = LogEnd {
            ids_until: taken.id_high_water,
            place: Some(taken.marker),
        };
        Ok::<_, ReadError>((end, now_ms()))
    });
    replay.run(&mut replayer, parts, |_| {}).await?;
    let (end, silent_since_ms) = reading.await??;
    let applied = replayer.applied();
    tracing::info!(
        node = lease.node,
        written = applied.written,
        present = applied.present,
        refused = applied.refused,
        "replayed the log of a node that is gone"
    );
    Ok(Replayed {
        applied,
        end,
        silent_since_ms,
    })
}

/// Pauses before a log is read again that could not be.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));

/// Finds the order log of a node: its client, checked, and its name in the database.
pub type FindLog = Arc<dyn Fn(i16) -> Result<(Arc<dyn Broker>, String), String> + Send + Sync>;

/// Whether this node is leaving and another one stays: what comes free is that one's, and would only be closed twice.
fn has_heir(seen: &Seen, own: i16) -> bool {
    let mut nodes = seen.nodes.iter();
    let is_leaving = nodes.any(|row| row.node == own && row.drain);
    let mut others = seen.nodes.iter().filter(|row| row.node != own);
    let is_suspected = |node| seen.suspects.iter().any(|suspect| suspect.node == node);
    is_leaving && others.any(|row| row.is_active() && !is_suspected(row.node))
}

/// The parts of whoever takes dead nodes over.
pub struct TakeoverParts {
    /// The membership.
    pub member: Arc<Member>,
    /// The database.
    pub database: Database,
    /// Finds order logs. Blocks.
    pub find_log: FindLog,
    /// The identity of the database.
    pub identity: [u8; 16],
    /// Most rows of a transaction.
    pub rows_max: usize,
    /// The clock of this process.
    pub clock: ClockReading,
    /// Woken when lanes have come.
    pub changed: Arc<Notify>,
    /// The metrics.
    pub metrics: Metrics,
}

/// Takes dead nodes over, one after the other. The rows say which it has begun with, also after an answer was lost.
pub struct Takeovers {
    parts: TakeoverParts,
}

impl Takeovers {
    /// The task, not yet running.
    pub fn new(parts: TakeoverParts) -> Self {
        Takeovers { parts }
    }

    /// Finishes what an earlier process on this row had begun, before memory has any share. A log that cannot be read stays
    /// for [`Takeovers::run`].
    ///
    /// # Errors
    /// If the database does not answer, or this node was taken over.
    pub async fn finish_begun(&self, orphans: &Orphans) -> Result<(), TakeoverError> {
        let TakeoverParts {
            member, database, ..
        } = &self.parts;
        for dead in takeover::begun(database, member.lease).await?.dead {
            let node = dead.lease.node;
            match self.replay(dead, orphans).await {
                Ok((dead, end)) => drop(self.finish(dead, end).await?),
                Err(error) if error.is_of_one() => tell_stuck(node, &error),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Finishes every takeover for a process on its own, which has the lock and has disbanded the nodes: their logs are replayed,
    /// and once none of them can answer from its memory any more, they have left.
    ///
    /// # Errors
    /// The first that cannot be ended; it may be tried again, from the start.
    pub async fn finish_disbanded(&self, orphans: &Orphans) -> Result<(), TakeoverError> {
        let TakeoverParts {
            member, database, ..
        } = &self.parts;
        let mut replayed = Vec::new();
        for dead in takeover::begun(database, member.lease).await?.dead {
            replayed.push(self.read_log(dead, orphans).await?);
        }
        self.wait_for_answers().await;
        for (dead, end) in replayed {
            drop(self.finish(dead, end).await?);
        }
        Ok(())
    }

    /// Goes on with every takeover that was begun. One that cannot be ended keeps no other waiting.
    async fn settle_begun(&self, state: &State) -> Result<(), TakeoverError> {
        let TakeoverParts {
            member, database, ..
        } = &self.parts;
        let begun = takeover::begun(database, member.lease).await?;
        member.note_taken(begun.lanes.iter().map(|row| row.lane).collect());
        let mut failed = None;
        for dead in begun.dead {
            let node = dead.lease.node;
            let settled = match self.replay(dead, &state.orphans).await {
                Ok((dead, end)) => self.merge(state, dead, end).await.map_err(Into::into),
                Err(error) => Err(error),
            };
            match settled {
                Ok(()) => {}
                Err(error) if error.is_of_one() => {
                    tell_stuck(node, &error);
                    failed = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn merge(&self, state: &State, dead: NodeLease, end: LogEnd) -> Result<(), StoreError> {
        let TakeoverParts {
            member, database, ..
        } = &self.parts;
        let moving = member.moving.lock().await;
        let rows = lanes::all(database).await?;
        let of_dead = rows.iter().filter(|row| row.blocked_by == Some(dead.node));
        let parked = parked::by_sku(database, of_dead.map(|row| row.lane).collect()).await?;
        let merged = self.finish(dead, end).await?;
        moved_units::merged(state, &self.parts.metrics, &merged, &parked);
        drop(moving);
        self.parts.changed.notify_one();
        Ok(())
    }

    /// Runs until the future is dropped or this node is taken over itself.
    pub async fn run(self, state: Arc<State>) {
        let mut seen = self.parts.member.watch();
        let own = self.parts.member.lease.node;
        let mut backoff = AGAIN;
        loop {
            let now = Arc::clone(&seen.borrow_and_update());
            let mut has_begun = now.nodes.iter().any(|row| row.taken_by == Some(own));
            let mut step = Ok(());
            let mut suspects = match has_heir(&now, own) {
                true => Vec::new(),
                false => now.suspects.clone(),
            };
            match self.gone_single(&now).await {
                Ok(gone) => suspects.extend(gone),
                Err(error) => step = Err(error),
            }
            for suspect in suspects {
                match self.fence(suspect).await {
                    Ok(fenced) => has_begun |= fenced,
                    Err(error) => step = Err(error),
                }
            }
            if has_begun {
                step = step.and(self.settle_begun(&state).await);
            }
            match step {
                Ok(()) => backoff.reset(),
                Err(TakeoverError::Store(error @ StoreError::Fenced { .. })) => {
                    // It is this node, or another has inherited the dead one meanwhile; its own renewal knows.
                    tracing::warn!(reason = %error, "a takeover was given up");
                    self.parts.member.look_now();
                }
                Err(error) => {
                    if !error.is_of_one() {
                        tracing::error!(
                            reason = %error,
                            "a node that is gone could not be taken over; its lanes stay closed; retrying"
                        );
                    }
                    tokio::time::sleep(backoff.pause()).await;
                    continue;
                }
            }
            if state.poison.is_set() || seen.changed().await.is_err() {
                return;
            }
        }
    }

    /// The row of a process on its own that is gone, and whose log this node can read: nobody gets a lane before that. This
    /// node's share of the lock shows that none runs. The lowest active node does it.
    async fn gone_single(&self, seen: &Seen) -> Result<Option<Suspect>, TakeoverError> {
        let TakeoverParts {
            member, database, ..
        } = &self.parts;
        let mut nodes = seen.nodes.iter();
        let is_lowest = nodes
            .find(|row| row.is_active())
            .is_some_and(|row| row.node == member.lease.node);
        let mut nodes = seen.nodes.iter();
        let gone = nodes.find(|row| row.state == "single" && row.log_in_use);
        let Some(row) = gone.filter(|_| is_lowest) else {
            return Ok(None);
        };
        let client = database.pooled().await?;
        let Some(log) = order_log::noted(database, &client, row.node).await? else {
            return Ok(None);
        };
        if let Err(error) = self.find_log(row.node, &log).await {
            tell_stuck(row.node, &error);
            return Err(error);
        }
        Ok(Some(Suspect {
            node: row.node,
            epoch: row.epoch,
            renewals: row.renewals,
        }))
    }

    /// Fences a suspect. False: there was nothing to do.
    async fn fence(&self, suspect: Suspect) -> Result<bool, TakeoverError> {
        let TakeoverParts {
            member, database, ..
        } = &self.parts;
        let mut session = database
            .connect(&format!("millrace takeover {}", member.lease.node))
            .await?;
        let fenced = takeover::fence(database, &mut session, member.lease, suspect).await?;
        let Some(taken) = fenced else {
            return Ok(false);
        };
        tracing::warn!(
            node = suspect.node,
            lanes = taken.lanes.len(),
            gave_up = suspect.renewals < 0,
            "a node is gone: fenced it; its lanes are ours once its log is replayed"
        );
        self.parts.metrics.cluster.takeovers.inc();
        Ok(true)
    }

    /// Replays the log of a dead node, if it may hold orders, so that its takeover can be ended. Returns the right to write as
    /// the dead node from then on, and where its log ends.
    async fn replay(
        &self,
        dead: DeadNode,
        orphans: &Orphans,
    ) -> Result<(NodeLease, LogEnd), TakeoverError> {
        let (dead, end) = self.read_log(dead, orphans).await?;
        if dead.ledger == Ledger::Sku {
            // Lanes that are nobody's may go to another node at once, which does not know.
            self.wait_for_answers().await;
        }
        Ok((dead, end))
    }

    async fn wait_for_answers(&self) {
        while let Some(left) = self.parts.member.opens_in() {
            tokio::time::sleep(left).await;
        }
    }

    async fn read_log(
        &self,
        mut dead: DeadNode,
        orphans: &Orphans,
    ) -> Result<(NodeLease, LogEnd), TakeoverError> {
        let TakeoverParts {
            member, database, ..
        } = &self.parts;
        let (mut end, silent_since_ms) = loop {
            let Some(log) = dead.log.as_ref().filter(|log| log.in_use) else {
                // Nothing is acknowledged before its row then, and the row's writers are fenced.
                break (LogEnd::default(), now_ms());
            };
            let with = Replaying {
                broker: self.find_log(dead.lease.node, log).await?,
                identity: self.parts.identity,
                rows_max: self.parts.rows_max,
                orphans,
                now: self.parts.clock.now(),
            };
            match replay(database, &dead, with).await {
                Ok(replayed) => break (replayed.end, replayed.silent_since_ms),
                Err(TakeoverError::Log(ReadError::LaterEpoch(epoch))) => {
                    let (by, of) = (member.lease, dead.lease);
                    dead.lease = takeover::raise_to(database, by, of, epoch).await?;
                }
                Err(error) => return Err(error),
            }
        };
        end.ids_until = end.ids_until.max(dead.ids_until);
        // Before its lanes are unblocked: whoever looks then finds that they have to wait.
        member.wait_for_answers_of(silent_since_ms, dead.answer_lease_ms);
        Ok((dead.lease, end))
    }

    async fn find_log(&self, node: i16, log: &NotedLog) -> Result<Arc<dyn Broker>, TakeoverError> {
        let find = Arc::clone(&self.parts.find_log);
        let found = tokio::task::spawn_blocking(move || find(node)).await?;
        let (broker, name) = found.map_err(TakeoverError::Unreachable)?;
        if name == log.name {
            return Ok(broker);
        }
        Err(TakeoverError::Unreachable(format!(
            "the log of node {node} is {} ({}), and the settings of this node lead to {}: give all nodes the same queue \
             settings",
            log.title,
            log.name,
            broker.title()
        )))
    }

    /// Ends a takeover. Returns the shares that became this node's.
    async fn finish(
        &self,
        dead: NodeLease,
        end: LogEnd,
    ) -> Result<Vec<(SkuNumber, Share)>, StoreError> {
        let (database, by) = (&self.parts.database, self.parts.member.lease);
        let shares = takeover::shares_of(database, dead).await?;
        let merged = match takeover::finish(database, by, dead, end).await {
            Err(error) if error.is_transient() => {
                tracing::warn!(reason = %error, "the outcome of a takeover is unknown; looking it up");
                if !self.is_finished(dead).await? {
                    return Err(error);
                }
                shares
            }
            ended => ended?,
        };
        tracing::warn!(node = dead.node, "took over a node that is gone");
        Ok(merged)
    }

    /// Waits for the database: until it answers, nobody knows whose the shares are.
    async fn is_finished(&self, dead: NodeLease) -> Result<bool, StoreError> {
        let mut backoff = AGAIN;
        loop {
            let found =
                takeover::is_finished(&self.parts.database, self.parts.member.lease, dead).await;
            match found {
                Err(error) if error.is_transient() => tokio::time::sleep(backoff.pause()).await,
                found => return found,
            }
        }
    }
}

fn tell_stuck(node: i16, error: &TakeoverError) {
    tracing::error!(
        node,
        reason = %error,
        "the takeover of a node that is gone cannot be ended; the lanes that wait for it stay closed; retrying (millrace queue \
         abandon gives up a log that is lost)"
    );
}
