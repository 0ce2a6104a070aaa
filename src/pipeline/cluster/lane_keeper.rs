//! The lanes of this node: loading and opening those that it gets, closing and handing over those that it gives.
//!
//! ```text
//!   rows of `lane` ─┬─ ours, blocked by a log ─────────► closed, until the log is replayed
//!                   ├─ ours, new or of another epoch ──► ids raised ─► orders loaded ─► opened
//!                   ├─ ours, open ── balance says so ──► closed ─► drained ─► handed over ─► forgotten
//!                   ├─ another's ──────────────────────► closed, forgotten, requests are passed on
//!                   └─ nobody's ───────────────────────► all of them taken, by the lowest node
//! ```
//!
//! Every node computes the same moves from the same rows, and carries out those that begin with itself. The rows are read
//! again after every change of its own, so nothing is done on a picture from before it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::member::Member;
use super::{balance, moved_units};
use crate::metrics::Metrics;
use crate::order::{Lane, LaneSet, SkuId, UnixMillis};
use crate::pipeline::failover::loading;
use crate::pipeline::orders::cancel::Canceller;
use crate::queue::OrderQueue;
use crate::state::State;
use crate::state::lanes::{NodeAddress, NodeLanes, Standing};
use crate::store::StoreError;
use crate::store::cluster::lanes::{self, HandOver, HandedOver, LaneRow, LaneUnits};
use crate::store::cluster::membership;
use crate::store::postgres::lease::ID_LEASE_MS;
use crate::store::postgres::{Database, parked};

/// Longest time for the requests and orders of lanes that are handed over. They open again after it.
const DRAIN_WITHIN: Duration = Duration::from_secs(2);
/// Pause before lanes that did not drain are tried again.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// Interval at which a drain is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Lanes handed over at once: they are closed together, and loaded in one scan.
const AT_ONCE: usize = 8;

/// The other nodes, as far as lanes are concerned.
pub trait Neighbours: Send + Sync {
    /// These are the nodes, this one among them.
    fn are(&self, nodes: &[NodeAddress]);

    /// Tells all that lanes have moved.
    fn lanes_moved(&self);

    /// Tells all that this node wants units of a SKU.
    fn want_left(&self, sku: &SkuId);

    /// Tells all that terms or pauses have changed.
    fn terms_changed(&self);
}

/// The parts of the keeper.
pub struct KeeperParts {
    /// The membership.
    pub member: Arc<Member>,
    /// The state in memory.
    pub state: Arc<State>,
    /// The lanes in it.
    pub lanes: NodeLanes,
    /// The queue: its orders have to be rows before their lane moves.
    pub queue: Arc<dyn OrderQueue>,
    /// Cancellations whose outcome is unknown keep their lane.
    pub canceller: Canceller,
    /// The database.
    pub database: Database,
    /// `orders.idempotency_window_ms`.
    pub window_ms: u64,
    /// The other nodes.
    pub neighbours: Arc<dyn Neighbours>,
    /// Lanes that a start has loaded, each with its epoch.
    pub loaded: BTreeMap<Lane, i64>,
    /// Woken when something about lanes has changed.
    pub changed: Arc<Notify>,
    /// The metrics.
    pub metrics: Metrics,
}

/// The task.
pub struct LaneKeeper {
    parts: KeeperParts,
    /// Lanes whose orders memory has, each with the epoch under which they were loaded.
    loaded: BTreeMap<Lane, i64>,
    /// Lanes that did not drain, and when they may be tried again.
    stuck: BTreeMap<Lane, Instant>,
}

impl LaneKeeper {
    /// The task, not yet running.
    pub fn new(mut parts: KeeperParts) -> Self {
        LaneKeeper {
            loaded: std::mem::take(&mut parts.loaded),
            stuck: BTreeMap::new(),
            parts,
        }
    }

    /// Runs until the future is dropped or this node is taken over.
    pub async fn run(mut self) {
        let changed = Arc::clone(&self.parts.changed);
        let mut seen = self.parts.member.watch();
        loop {
            let more = match self.pass().await {
                Ok(more) => more,
                Err(error @ StoreError::Fenced { .. }) => {
                    self.parts.state.poison.set(error.to_string());
                    return;
                }
                Err(error) => {
                    tracing::warn!(reason = %error, "lanes could not be looked at; retrying");
                    false
                }
            };
            if self.parts.state.poison.is_set() {
                return;
            }
            if more {
                continue;
            }
            let opens_in = self.parts.member.opens_in();
            tokio::select! {
                _ = seen.changed() => {}
                () = changed.notified() => {}
                () = tokio::time::sleep(opens_in.unwrap_or(DRAIN_WITHIN)), if opens_in.is_some() => {}
            }
        }
    }

    /// Brings this process to what the rows say, then hands over what should move. Returns true if there is more to do.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if this node was taken over; otherwise if the database does not answer.
    pub async fn pass(&mut self) -> Result<bool, StoreError> {
        let nodes = self.parts.member.seen();
        let addresses: BTreeMap<i16, NodeAddress> = nodes
            .nodes
            .iter()
            .filter(|row| row.is_alive())
            .filter_map(|row| {
                let address = NodeAddress {
                    node: u8::try_from(row.node).ok()?,
                    address: row.address.as_deref()?.into(),
                };
                Some((row.node, address))
            })
            .collect();
        let known: Vec<NodeAddress> = addresses.values().cloned().collect();
        self.parts.neighbours.are(&known);
        let rows = lanes::all(&self.parts.database).await?;
        let rows = match self.claim_free(rows).await? {
            Some(rows) => rows,
            None => return Ok(true),
        };
        self.follow(&rows, &addresses).await?;
        self.open(&rows).await?;
        self.give(&rows).await
    }

    /// Takes the lanes that are nobody's, if this is the lowest active node. `None`: it took some; the rows have changed.
    async fn claim_free(&self, rows: Vec<LaneRow>) -> Result<Option<Vec<LaneRow>>, StoreError> {
        let own = self.parts.member.lease.node;
        let is_lowest = self.active().first() == Some(&own);
        if !is_lowest || rows.iter().all(|row| row.node.is_some()) {
            return Ok(Some(rows));
        }
        let taken = lanes::claim_free(&self.parts.database, self.parts.member.lease).await?;
        if taken.is_empty() {
            return Ok(Some(rows));
        }
        tracing::info!(lanes = taken.len(), "took the lanes that were nobody's");
        Ok(None)
    }

    /// Nodes that may be given lanes, ascending.
    fn active(&self) -> Vec<i16> {
        let seen = self.parts.member.seen();
        let active = seen.nodes.iter().filter(|row| row.is_active());
        active.map(|row| row.node).collect()
    }

    /// Closes and forgets what is not ours any more, and learns where it is.
    async fn follow(
        &mut self,
        rows: &[LaneRow],
        addresses: &BTreeMap<i16, NodeAddress>,
    ) -> Result<(), StoreError> {
        let own = self.parts.member.lease.node;
        let lanes = &self.parts.lanes.lanes;
        let mut gone = LaneSet::default();
        for row in rows {
            let is_ours = row.node == Some(own) && row.blocked_by.is_none();
            let epoch = u64::try_from(row.epoch).unwrap_or(0);
            if self
                .loaded
                .get(&row.lane)
                .is_some_and(|known| !is_ours || *known != row.epoch)
            {
                lanes.close(row.lane);
                gone.insert(row.lane);
            }
            let owner = row.node.and_then(|node| addresses.get(&node));
            match owner {
                _ if is_ours => {}
                Some(owner) if row.blocked_by.is_none() => {
                    let elsewhere = Standing::Elsewhere {
                        epoch,
                        owner: owner.clone(),
                    };
                    if lanes.standing(row.lane) != elsewhere {
                        lanes.set_elsewhere(row.lane, epoch, owner.clone());
                    }
                }
                // It is nobody's, its owner is gone, or it waits for a log: open nowhere.
                _ if lanes.standing(row.lane) != Standing::Closed => lanes.close(row.lane),
                _ => {}
            }
        }
        self.forget(gone).await;
        Ok(())
    }

    /// Forgets lanes that are closed here, once nothing of them is under way.
    async fn forget(&mut self, gone: LaneSet) {
        if gone.is_empty() {
            return;
        }
        // What is under way ends by itself: at the writer's fence, or as a row.
        while self.under_way(gone) != LaneSet::default() && !self.parts.state.poison.is_set() {
            tokio::time::sleep(LOOK).await;
        }
        self.loaded.retain(|lane, _| !gone.has(*lane));
        let state = Arc::clone(&self.parts.state);
        // Walks every buyer.
        let _ = tokio::task::spawn_blocking(move || state.forget_lanes(gone)).await;
    }

    /// Those of these closed lanes whose requests are not answered, or whose orders are no rows yet.
    fn under_way(&self, lanes: LaneSet) -> LaneSet {
        let doors = &self.parts.lanes.lanes;
        let passing = lanes.iter().filter(|lane| !doors.is_drained(*lane));
        let mut busy: LaneSet = passing.collect();
        if busy == lanes {
            return busy;
        }
        // An order leaves memory for the log at most once, and comes back at most once.
        busy.extend(self.parts.state.pending.among(lanes).iter());
        let durable = self.parts.queue.durable();
        if durable.is_some_and(|durable| durable.spilled() > 0) {
            return lanes;
        }
        busy.extend(self.parts.state.pending.among(lanes).iter());
        for id in self.parts.canceller.in_doubt() {
            match self.parts.lanes.cutover.lane_of(id) {
                Some(lane) if lanes.has(lane) => busy.insert(lane),
                Some(_) => {}
                None => return lanes,
            }
        }
        busy
    }

    /// Loads lanes that are ours and that memory does not have, and opens what may be open.
    async fn open(&mut self, rows: &[LaneRow]) -> Result<(), StoreError> {
        let own = self.parts.member.lease.node;
        let ours: Vec<&LaneRow> = rows
            .iter()
            .filter(|row| row.node == Some(own) && row.blocked_by.is_none())
            .collect();
        if self.parts.member.opens_in().is_some() || self.parts.state.poison.is_set() {
            return Ok(());
        }
        let coming: Vec<&LaneRow> = ours
            .iter()
            .filter(|row| !self.loaded.contains_key(&row.lane))
            .copied()
            .collect();
        let doors = Arc::clone(&self.parts.lanes.lanes);
        doors.set_coming(ours.iter().map(|row| row.lane).collect());
        // The units of a dead node's orders came with its share.
        let taken = self.parts.member.taken();
        let (from_the_dead, given): (Vec<_>, Vec<_>) =
            coming.into_iter().partition(|row| taken.has(row.lane));
        for (coming, is_given) in [(given, true), (from_the_dead, false)] {
            if !coming.is_empty() {
                self.load(&coming, is_given).await?;
            }
        }
        let open = doors.open_here();
        for row in ours {
            if self.loaded.get(&row.lane) == Some(&row.epoch) && !open.has(row.lane) {
                doors.open(row.lane, u64::try_from(row.epoch).unwrap_or(0));
            }
        }
        doors.set_coming(LaneSet::default());
        Ok(())
    }

    async fn load(&mut self, coming: &[&LaneRow], is_given: bool) -> Result<(), StoreError> {
        let parts = &self.parts;
        let (state, lease) = (&parts.state, parts.member.lease);
        let started = Instant::now();
        let _moving = parts.member.moving.lock().await;
        let set: LaneSet = coming.iter().map(|row| row.lane).collect();
        let ids_from = coming.iter().map(|row| row.ids_until).max();
        state.ids.raise(ids_from.unwrap_or(UnixMillis(0)));
        let until = state.ids.now().plus_ms(ID_LEASE_MS);
        membership::lease_ids(&parts.database, lease, until).await?;
        state.ids.extend_lease(until);
        loading::load_orphans(&parts.database, &state.orphans).await?;
        // Limits may have counted orders of them.
        let forgetting = Arc::clone(state);
        let _ = tokio::task::spawn_blocking(move || forgetting.forget_lanes(set)).await;
        let floor = state.ids.window_floor(parts.window_ms);
        let loading = async {
            let loading = loading::load(state, &parts.database, lease, floor, set, |_, _| {});
            let loaded = loading.await?;
            // Before a lane may move on: its units are summed up from there.
            if let Some(least) = state.expiry_index.least() {
                lanes::note_unpaid(&parts.database, lease, least).await?;
            }
            let parked = parked::by_sku(&parts.database, set).await?;
            Ok((loaded, parked))
        };
        let (loaded, parked) = match loading.await {
            Ok(loaded) => loaded,
            Err(error) => {
                // A part of them may be there; begun again from nothing.
                state.forget_lanes(set);
                return Err(error);
            }
        };
        if is_given {
            let came = LaneUnits::joined(loaded.held, parked);
            moved_units::received(state, &parts.metrics, &came);
        }
        parts.member.note_loaded(set);
        tracing::info!(
            lanes = coming.len(),
            orders = loaded.orders,
            ms = started.elapsed().as_millis() as u64,
            "loaded lanes"
        );
        self.loaded
            .extend(coming.iter().map(|row| (row.lane, row.epoch)));
        Ok(())
    }

    /// Hands over the first lanes that should go to one node. Returns true if any went.
    async fn give(&mut self, rows: &[LaneRow]) -> Result<bool, StoreError> {
        let own = self.parts.member.lease.node;
        let now = Instant::now();
        self.stuck.retain(|_, until| *until > now);
        let active = self.active();
        if active.iter().all(|node| *node == own) {
            return Ok(false);
        }
        let (mut movable, mut fixed) = (Vec::new(), Vec::new());
        for row in rows {
            let Some(node) = row.node else { continue };
            let is_open = node != own
                || self.loaded.contains_key(&row.lane) && !self.stuck.contains_key(&row.lane);
            if row.blocked_by.is_none() && is_open {
                movable.push((row.lane, node));
            } else {
                fixed.push(node);
            }
        }
        let moves = balance::moves(&active, &movable, &fixed);
        let mut ours = moves.iter().filter(|step| step.from == own);
        let Some(to) = ours.clone().next().map(|step| step.to) else {
            return Ok(false);
        };
        let set: LaneSet = ours
            .by_ref()
            .filter(|step| step.to == to)
            .map(|step| step.lane)
            .take(AT_ONCE)
            .collect();
        self.hand_over(set, to).await
    }

    fn hold_back(&mut self, lanes: LaneSet) {
        let until = Instant::now() + TRY_AGAIN;
        self.stuck.extend(lanes.iter().map(|lane| (lane, until)));
    }

    async fn hand_over(&mut self, going: LaneSet, to: i16) -> Result<bool, StoreError> {
        let doors = Arc::clone(&self.parts.lanes.lanes);
        let started = Instant::now();
        going.iter().for_each(|lane| doors.close(lane));
        let mut busy = self.under_way(going);
        while !busy.is_empty() && started.elapsed() < DRAIN_WITHIN {
            tokio::time::sleep(LOOK).await;
            busy = self.under_way(going);
        }
        let drained: LaneSet = going.iter().filter(|lane| !busy.has(*lane)).collect();
        self.hold_back(busy);
        self.reopen(busy);
        if drained.is_empty() {
            return Ok(false);
        }
        let (database, lease) = (self.parts.database.clone(), self.parts.member.lease);
        // Also of orders that were parked before they were drained.
        let units = match lanes::units_of(&database, lease, drained).await {
            Ok(units) => units,
            Err(error) => {
                self.reopen(drained);
                return Err(error);
            }
        };
        let moving = Arc::clone(&self.parts.member.moving);
        let _moving = moving.lock().await;
        // Beyond every id that was given out here.
        let ids_until = self.parts.state.ids.now().plus_ms(1);
        let (mut gone, mut failed) = (LaneSet::default(), None);
        for lane in drained.iter() {
            let Some(epoch) = self.loaded.get(&lane).copied() else {
                continue;
            };
            let over = HandOver {
                lane,
                epoch,
                to,
                ids_until,
                units: units.get(&lane).map_or(&[], Vec::as_slice),
            };
            match lanes::hand_over(&database, lease, &over).await {
                Ok(HandedOver::Yes { .. }) => {}
                Ok(HandedOver::No) => continue,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
            gone.insert(lane);
        }
        if let Some(error) = failed {
            // The answer to one was lost: the rows say what became of it, before anything is open again.
            let unknown: LaneSet = drained.iter().filter(|lane| !gone.has(*lane)).collect();
            let went = self.settle_unknown(unknown, &database, error).await?;
            gone.extend(went.iter());
            self.hold_back(unknown.iter().filter(|lane| !went.has(*lane)).collect());
        }
        self.reopen(drained.iter().filter(|lane| !gone.has(*lane)).collect());
        if gone.is_empty() {
            return Ok(false);
        }
        self.loaded.retain(|lane, _| !gone.has(*lane));
        for of_lane in gone.iter().filter_map(|lane| units.get(&lane)) {
            moved_units::given(&self.parts.state, &self.parts.metrics, of_lane);
        }
        let state = Arc::clone(&self.parts.state);
        let _ = tokio::task::spawn_blocking(move || state.forget_lanes(gone)).await;
        self.parts.neighbours.lanes_moved();
        self.parts
            .metrics
            .cluster
            .lanes_given
            .inc_by(gone.len() as u64);
        tracing::info!(
            lanes = gone.len(),
            to,
            ms = started.elapsed().as_millis() as u64,
            "handed lanes over"
        );
        Ok(true)
    }

    /// Those of these lanes that went, after an answer was lost. Waits for the database: until it answers they stay
    /// closed.
    async fn settle_unknown(
        &self,
        unknown: LaneSet,
        database: &Database,
        error: StoreError,
    ) -> Result<LaneSet, StoreError> {
        if error.is_final() {
            return Err(error);
        }
        tracing::warn!(reason = %error, "the outcome of a hand-over is unknown; looking it up");
        loop {
            // A transaction of the lost connection has ended once its lock is free.
            match lanes::locked(database, unknown).await {
                Ok(rows) => {
                    let is_here = |row: &LaneRow| self.loaded.get(&row.lane) == Some(&row.epoch);
                    let gone = rows.iter().filter(|row| !is_here(row));
                    return Ok(gone.map(|row| row.lane).collect());
                }
                Err(error) if error.is_final() => return Err(error),
                Err(_) if self.parts.state.poison.is_set() => return Err(error),
                Err(_) => tokio::time::sleep(TRY_AGAIN).await,
            }
        }
    }

    /// Opens lanes again that were closed to be handed over.
    fn reopen(&self, lanes: LaneSet) {
        for lane in lanes.iter() {
            if let Some(epoch) = self.loaded.get(&lane) {
                let epoch = u64::try_from(*epoch).unwrap_or(0);
                self.parts.lanes.lanes.open(lane, epoch);
            }
        }
    }
}
