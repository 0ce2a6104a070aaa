//! The membership of this process: it renews its row, and sees every other one.
//!
//! ```text
//!   every lease/8:  renew ─► PostgreSQL ─┬─ committed ─► answers may leave, ids are leased, other nodes are watched
//!                                        ├─ away ──────► the order log leases ids; after answer_lease_ms nothing but
//!                                        │               acknowledgements leaves
//!                                        └─ fenced ────► every lane closes, nothing is acknowledged, the process ends
//! ```
//!
//! On a task and a connection of its own, so that no other load can delay a renewal.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::hints::Hints;
use super::watch::{Beat, Watch};
use crate::order::{Lane, LaneSet, UnixMillis};
use crate::pipeline::failover::lease::{AcknowledgeLease, now_ms, waited_ms};
use crate::queue::OrderQueue;
use crate::state::State;
use crate::state::lanes::Lanes;
use crate::state::poison::Poison;
use crate::store::StoreError;
use crate::store::cluster::membership::{self, NodeRow};
use crate::store::cluster::takeover::Suspect;
use crate::store::postgres::lease::{self, ID_LEASE_MS};
use crate::store::postgres::{Connected, Database, NodeLease};

/// Renewals in the time of a lease. A watcher counts anew after a gap of two of them.
const RENEWALS: u64 = 8;
/// A clock that is further from the database's than this is warned of, in milliseconds: orders of its lanes fall due that much
/// earlier or later than at other nodes.
const CLOCK_APART_MS: i64 = 1_000;
/// Pause before a lost connection is established again.
const RECONNECT: Duration = Duration::from_millis(250);

/// What a node has seen with its last renewal.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Every node.
    pub nodes: Vec<NodeRow>,
    /// Those whose counters have stood still for a lease.
    pub suspects: Vec<Suspect>,
}

/// The membership, for everybody in this process.
pub struct Member {
    /// The right to write.
    pub lease: NodeLease,
    /// Which lanes are where.
    pub lanes: Arc<Lanes>,
    /// `cluster.lease_ms`.
    pub lease_ms: u64,
    /// `cluster.answer_lease_ms`.
    pub answer_lease_ms: u64,
    /// The right to acknowledge orders before they are rows.
    pub acknowledge: Arc<AcknowledgeLease>,
    /// Hints to and from other nodes.
    pub hints: Arc<Hints>,
    /// Gives out ids, once there is a state; the log leases them while the database is away.
    ids: OnceLock<(Arc<State>, Arc<dyn OrderQueue>)>,
    seen: watch::Sender<Arc<Seen>>,
    renew_now: Notify,
    /// When the last committed renewal was sent, by [`now_ms`].
    renewed_at_ms: AtomicU64,
    /// How far this node's clock was from the database's at the last renewal, in milliseconds.
    clock_apart_ms: AtomicI64,
    /// Lanes open no earlier, by [`now_ms`]: until then a node that was taken over may answer from its memory.
    opens_from_ms: AtomicU64,
    /// Lanes that came with the share of a dead node and that are not loaded yet.
    taken: Mutex<LaneSet>,
    /// Held from before units move in the rows, with a lane or with the share of a dead node, until memory has them.
    pub moving: Arc<tokio::sync::Mutex<()>>,
}

impl Member {
    /// The membership of a process that has just joined.
    pub fn new(
        lease: NodeLease,
        lanes: Arc<Lanes>,
        lease_ms: u64,
        answer_lease_ms: u64,
        acknowledge: Arc<AcknowledgeLease>,
    ) -> Self {
        Member {
            lease,
            lanes,
            lease_ms,
            answer_lease_ms,
            acknowledge,
            hints: Arc::default(),
            ids: OnceLock::new(),
            seen: watch::Sender::default(),
            renew_now: Notify::new(),
            renewed_at_ms: AtomicU64::new(now_ms()),
            clock_apart_ms: AtomicI64::new(0),
            opens_from_ms: AtomicU64::new(0),
            taken: Mutex::default(),
            moving: Arc::default(),
        }
    }

    /// From now on renewals lease order ids.
    pub fn lease_ids_of(&self, state: Arc<State>, queue: Arc<dyn OrderQueue>) {
        let _ = self.ids.set((state, queue));
        self.renew_now.notify_one();
    }

    /// Every node, as the last renewal has seen them.
    pub fn seen(&self) -> Arc<Seen> {
        Arc::clone(&self.seen.borrow())
    }

    /// Tells of each renewal.
    pub fn watch(&self) -> watch::Receiver<Arc<Seen>> {
        self.seen.subscribe()
    }

    /// Renews at once.
    pub fn look_now(&self) {
        self.renew_now.notify_one();
    }

    /// Notes a contact to the database or the log that was begun at `sent_ms`, by [`now_ms`]: answers may leave for the
    /// answer lease from then on.
    pub fn contact(&self, sent_ms: u64) {
        self.lanes
            .contact(sent_ms.saturating_add(self.answer_lease_ms));
    }

    /// Milliseconds since the last renewal that was committed.
    pub fn renewed_ago_ms(&self) -> u64 {
        now_ms().saturating_sub(self.renewed_at_ms.load(Ordering::Acquire))
    }

    /// How far this node's clock is from the database's, which it went on from at the start: at least so many milliseconds
    /// ahead, or, if negative, behind.
    pub fn clock_apart_ms(&self) -> i64 {
        self.clock_apart_ms.load(Ordering::Relaxed)
    }

    /// Notes the database's clock, which was read between these two moments of this node's.
    fn compare_clocks(&self, asked: UnixMillis, there: UnixMillis, answered: UnixMillis) {
        let apart_ms = (asked.0 - there.0).max(0) - (there.0 - answered.0).max(0);
        let before_ms = self.clock_apart_ms.swap(apart_ms, Ordering::Relaxed);
        let is_far = |ms: i64| ms.abs() > CLOCK_APART_MS;
        match (is_far(before_ms), is_far(apart_ms)) {
            (false, true) => tracing::warn!(
                apart_ms,
                "this node's clock has gone away from the database's, so its orders fall due at another time than those of other \
                 nodes: start it again, and see to the clocks of both machines"
            ),
            (true, false) => tracing::info!(
                apart_ms,
                "this node's clock agrees with the database's again"
            ),
            _ => {}
        }
    }

    /// Notes that a node can answer from its memory no longer than its answer lease after `silent_since_ms`: no lane opens
    /// here before that is over. Of its lease and this node's own the longer one counts.
    pub fn wait_for_answers_of(&self, silent_since_ms: u64, answer_lease_ms: u64) {
        let lease_ms = answer_lease_ms.max(self.answer_lease_ms);
        let until = silent_since_ms.saturating_add(waited_ms(lease_ms));
        self.opens_from_ms.fetch_max(until, Ordering::AcqRel);
    }

    /// Time until lanes may open; `None`: now.
    pub fn opens_in(&self) -> Option<Duration> {
        let from = self.opens_from_ms.load(Ordering::Acquire);
        let left = from.saturating_sub(now_ms());
        (left > 0).then(|| Duration::from_millis(left))
    }

    /// Notes lanes that came with the share of a dead node.
    pub(super) fn note_taken(&self, lanes: LaneSet) {
        self.taken.lock().extend(lanes.iter());
    }

    /// Those of them that are not loaded yet.
    pub(super) fn taken(&self) -> LaneSet {
        *self.taken.lock()
    }

    pub(super) fn note_loaded(&self, lanes: LaneSet) {
        let mut taken = self.taken.lock();
        *taken = taken.iter().filter(|lane| !lanes.has(*lane)).collect();
    }

    /// Closes everything: this process is no node any more.
    fn lose(&self) {
        Lane::all().for_each(|lane| self.lanes.close(lane));
        self.acknowledge.revoke();
    }
}

/// The task that renews.
pub struct Renewing {
    member: Arc<Member>,
    database: Database,
    session: Option<Connected>,
    poison: Arc<Poison>,
    watch: Watch,
    timeline: Option<String>,
}

impl Renewing {
    /// The task, which goes on with the session that holds the cluster's share of the lock.
    pub fn new(
        member: Arc<Member>,
        database: Database,
        session: Connected,
        poison: Arc<Poison>,
    ) -> Self {
        Renewing {
            watch: Watch::new(member.lease_ms),
            member,
            database,
            session: Some(session),
            poison,
            timeline: None,
        }
    }

    /// Renews until this node is taken over, or the future is dropped.
    pub async fn run(mut self) {
        let every = Duration::from_millis(self.member.lease_ms / RENEWALS);
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut is_away = false;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.member.renew_now.notified() => {}
            }
            match self.renew().await {
                Ok(()) => {
                    if std::mem::take(&mut is_away) {
                        tracing::info!("the membership of this node is renewed again");
                    }
                }
                Err(error @ StoreError::Fenced { .. }) => {
                    self.member.lose();
                    self.poison.set(error.to_string());
                    tracing::error!(
                        node = self.member.lease.node,
                        "this node was taken over by another: it renewed nothing for cluster.lease_ms. It answers and \
                         acknowledges nothing any more, and ends; start it again"
                    );
                    // The process ends; the session, and with it the share of the lock, stays until then.
                    std::future::pending::<()>().await;
                }
                Err(error) => {
                    if !std::mem::replace(&mut is_away, true) {
                        tracing::warn!(reason = %error, "the membership of this node could not be renewed; retrying");
                    }
                    self.lease_in_log().await;
                    tokio::time::sleep(RECONNECT.min(every)).await;
                    tick.reset_immediately();
                }
            }
        }
    }

    async fn renew(&mut self) -> Result<(), StoreError> {
        let member = Arc::clone(&self.member);
        let session = match self.session.take() {
            Some(session) => session,
            None => lease::share(&self.database, &session_name(member.lease)).await?,
        };
        let until = self.ids_until();
        let clock = || member.ids.get().map(|(state, _)| state.ids.real_now());
        let (asked_ms, asked) = (now_ms(), clock());
        let looked =
            membership::renew_and_look(&self.database, &session, member.lease, until).await;
        if let Err(error) = &looked
            && !matches!(error, StoreError::Fenced { .. })
        {
            return looked.map(drop);
        }
        self.session = Some(session);
        let look = looked?;
        let answered_ms = now_ms();
        member.renewed_at_ms.fetch_max(asked_ms, Ordering::AcqRel);
        member.contact(asked_ms);
        if let Some((state, _)) = member.ids.get() {
            state.ids.extend_lease(until);
        }
        if let Some((asked, answered)) = asked.zip(clock()) {
            member.compare_clocks(asked, look.now, answered);
        }
        if let Some(before) = self.timeline.replace(look.timeline.clone())
            && before != look.timeline
        {
            member.lose();
            self.poison.set(format!(
                "the database was failed over to a standby (timeline {before}, now {}): rights that were committed there may \
                 be lost, so this node starts again and reads its log",
                look.timeline
            ));
        }
        let others: Vec<Beat> = look
            .nodes
            .iter()
            .filter(|row| row.node != member.lease.node && row.is_watched())
            .map(|row| Beat {
                node: row.node,
                epoch: row.epoch,
                renewals: row.renewals,
            })
            .collect();
        self.watch.renewed(asked_ms, answered_ms, &others);
        let suspects = self.watch.suspects(now_ms());
        member.seen.send_replace(Arc::new(Seen {
            nodes: look.nodes,
            suspects,
        }));
        Ok(())
    }

    fn ids_until(&self) -> UnixMillis {
        let ids = self.member.ids.get();
        // Before there is a state, the lease of joining lasts.
        ids.map_or(UnixMillis(0), |(state, _)| {
            state.ids.now().plus_ms(ID_LEASE_MS)
        })
    }

    /// Leases ids in the order log, while the database is away.
    async fn lease_in_log(&self) {
        if let Some((state, queue)) = self.member.ids.get()
            && let Some(durable) = queue.durable()
        {
            let until = state.ids.now().plus_ms(ID_LEASE_MS);
            if durable.lease_ids(until).await {
                state.ids.extend_lease(until);
            }
        }
    }
}

/// The `application_name` of the session of a node that renews.
pub fn session_name(lease: NodeLease) -> String {
    format!("millrace node {}", lease.node)
}
