//! Recovery at a start: the order log, the database, and the state in memory rebuilt from both.
//!
//! 1. A journal was read and checked before the database was opened (`order_log`). A broker's log is taken over and
//!    read in step 3.
//! 2. Orders of orphan payments are read, so that an order that was paid in time is payable.
//! 3. The order log is replayed, oldest order first: what the database lacks is written.
//!    So are the logs of nodes whose place a process on its own takes (`gone_nodes`).
//! 4. Memory is rebuilt from the database alone: SKUs, units of parked orders, unpaid orders, the orders of the
//!    idempotency window, and older live orders of SKUs with a purchase limit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::StartError;
use super::joining::JoinedNode;
use super::order_log::OwnedLog;
use super::ownership::Ownership;
use crate::config::{Backend, Config};
use crate::faults::crash_point;
use crate::http::control_plane::ControlPlane;
use crate::order::{IdClock, LaneSet, OrderId};
use crate::pipeline::failover::lease::now_ms;
use crate::pipeline::failover::loading;
use crate::pipeline::failover::log_replay::{self, LogReplay};
use crate::pipeline::failover::replay::{Applied, Replayer};
use crate::state::State;
use crate::state::buyers::Buyers;
use crate::state::expiry_index::ExpiryIndex;
use crate::state::lanes::NodeLanes;
use crate::state::orphans::Orphans;
use crate::state::pending::Pending;
use crate::state::poison::Poison;
use crate::state::progress::Progress;
use crate::state::recent_orders::RecentOrders;
use crate::state::row_changes::RowChanges;
use crate::state::sticky_refusals::StickyRefusals;
use crate::state::stock::Catalogue;
use crate::state::throughput::ThroughputEstimator;
use crate::store::StoreError;
use crate::store::batch::BatchWriter;
use crate::store::cluster::{self, membership};
use crate::store::postgres::lease::ID_LEASE_MS;
use crate::store::postgres::order_log::LogName;
use crate::store::postgres::window::ReadProgress;
use crate::store::postgres::{NodeLease, audit, lanes, skus};

/// Recently written orders that are answered from memory, about 200 bytes each.
const RECENT_ORDERS: usize = 65_536;
/// Interval of progress reports.
const PROGRESS: Duration = Duration::from_secs(1);

/// Replays the order log and rebuilds the memory.
pub(super) async fn state(
    config: &Config,
    ownership: &mut Ownership,
    poison: Arc<Poison>,
    control: &ControlPlane,
) -> Result<Arc<State>, StartError> {
    let (lease, clock) = (ownership.lease, ownership.clock);
    // Before the replay, so that an order that is written late but was paid in time is payable.
    let orphans = Orphans::default();
    loading::load_orphans(&ownership.database, &orphans).await?;
    if let Some((log, name)) = ownership.log.take() {
        let log = replay(config, ownership, (log, &name), &orphans, control).await?;
        ownership.id_high_water = ownership.id_high_water.max(log.id_high_water());
        ownership.log = Some((log, name));
    }
    if let Some(gone) = ownership.gone.take() {
        gone.replay(config, ownership, &orphans, control).await?;
    }
    if let Some(node) = ownership.node.as_ref().filter(|node| node.had_lanes) {
        // From the marker in its log on, an earlier process on this row can answer only as long as its contact lasts.
        node.member
            .wait_for_answers_of(now_ms(), node.answer_lease_ms);
    }
    control.progress("reading the database".to_owned());
    let leased_until = ownership.ids_leased_until;
    let ids = IdClock::going_on(clock, ownership.id_high_water, leased_until);
    let mut node = ownership.node.take();
    let mut lanes = LaneSet::ALL;
    if let Some(node) = &mut node {
        lanes = lanes_of(ownership, node, &ids, &orphans, control).await?;
    }
    let database = &ownership.database;
    // From here on keys are known for this long. Orders of the log belong to an earlier window.
    let window_from = OrderId::floor_of(ids.now());
    let window_ms = config.orders.idempotency_window_ms;
    audit::note_window(database, lease, window_from, window_ms).await?;
    // Not earlier: an earlier release may have leased ids in the log alone.
    let cutover = lanes::note_cutover(database, lease, window_from).await?;
    let of_node = node.as_ref().map(|node| {
        let open = Arc::clone(&node.member.lanes);
        let of_node = NodeLanes {
            lanes: open,
            cutover,
        };
        (of_node, lanes)
    });
    let state = recover(config, ownership, ids, orphans, poison, of_node, control).await?;
    if node.is_some()
        && let Some(least) = state.expiry_index.least()
    {
        cluster::lanes::note_unpaid(&ownership.database, lease, least).await?;
    }
    ownership.node = node;
    state.catalogue.set_paused(ownership.paused);
    let metrics = control.metrics();
    metrics.recovered_orders.set(state.buyers.len() as i64);
    metrics.queue_capacity.set(config.queue.capacity as i64);
    Ok(Arc::new(state))
}

/// Replays the order log: writes to the database the orders that only the log has.
async fn replay(
    config: &Config,
    ownership: &Ownership,
    (log, name): (OwnedLog, &LogName),
    orphans: &Orphans,
    control: &ControlPlane,
) -> Result<OwnedLog, StartError> {
    let database = &ownership.database;
    let own = ownership.lease;
    let node = ownership.node.as_ref();
    let lease = NodeLease {
        ledger: node.map_or(own.ledger, |node| node.log_ledger),
        ..own
    };
    let total = log.total();
    if total == Some(0) {
        return Ok(log);
    }
    let title = &name.title;
    let started = Instant::now();
    let (parts, reading) = log_replay::orders_of(move |each| log.records(each));
    let mut replayer = Replayer::new(
        database.clone(),
        BatchWriter::new(database.clone(), lease, ownership.writers.replay()),
        config.workers.batch_rows_max,
    );
    let now = ownership.clock.now();
    let replay = LogReplay::new(database, orphans, now).await?;
    let mut told = Instant::now();
    let mut done = 0;
    let of = total.map_or_else(String::new, |total| format!(" of {total}"));
    let applied = |orders: usize| {
        crash_point("recovery.replayed_part");
        done += orders as u64;
        control.progress(format!("replaying {title}: {done}{of} orders"));
        if told.elapsed() > PROGRESS {
            told = Instant::now();
            let rate = done as f64 / started.elapsed().as_secs_f64();
            let seconds_left =
                total.map(|total| ((total - done) as f64 / rate.max(1.0)).ceil() as u64);
            tracing::info!(
                orders = done,
                of = total,
                rate = rate as u64,
                seconds_left,
                "replaying {title}"
            );
        }
    };
    replay.run(&mut replayer, parts, applied).await?;
    let log = reading
        .await
        .map_err(|panic| StartError::Engine(std::io::Error::other(panic)))??;
    let Applied {
        written,
        present,
        refused,
        parked,
    } = replayer.applied();
    crash_point("recovery.replayed");
    control.metrics().journal_replayed.set(written as i64);
    tracing::info!(
        orders = done,
        written,
        present,
        refused,
        parked,
        ms = started.elapsed().as_millis() as u64,
        "replayed {title}"
    );
    Ok(log)
}

/// Rebuilds the in-memory state from the database.
async fn recover(
    config: &Config,
    ownership: &Ownership,
    ids: IdClock,
    orphans: Orphans,
    poison: Arc<Poison>,
    node: Option<(NodeLanes, LaneSet)>,
    control: &ControlPlane,
) -> Result<State, StoreError> {
    let (database, lease) = (&ownership.database, ownership.lease);
    let workers_hold = config.worker_count() * config.workers.batch_rows_max;
    let before_the_ring = match config.queue.backend {
        Backend::Journal | Backend::Redis | Backend::Kafka | Backend::RocketMq => {
            config.queue.capacity
        }
        Backend::Memory => 0,
    };
    let in_flight_max = before_the_ring + config.queue.capacity + workers_hold;
    let buyers = Buyers::new(
        config.orders.remembered_max,
        config.queue.capacity.min(config.orders.remembered_max),
    );
    let catalogue = Catalogue::default();
    catalogue.add(skus::load_all(database, lease).await?);
    if node.is_some() {
        // Not before: a lane that is given to an active node comes with units, which would be counted twice.
        membership::activate(database, lease, ownership.id_high_water).await?;
    }
    let floor = ids.window_floor(config.orders.idempotency_window_ms);
    let (lanes, loaded) = match node {
        None => (None, LaneSet::ALL),
        Some((lanes, loaded)) => (Some(lanes), loaded),
    };
    let parked = loading::hold_parked(&catalogue, database, lease, floor, loaded).await?;
    control.metrics().orders_parked.set(parked.cast_signed());
    let state = State {
        catalogue,
        buyers,
        sticky_refusals: StickyRefusals::with_capacity(config.orders.sticky_refusals_max),
        recent_orders: RecentOrders::with_capacity(RECENT_ORDERS),
        pending: Arc::new(Pending::with_capacity(in_flight_max)),
        expiry_index: ExpiryIndex::default(),
        orphans,
        lanes,
        row_changes: RowChanges::default(),
        poison,
        ids,
        throughput: ThroughputEstimator::default(),
        progress: Progress::default(),
    };
    if !loaded.is_empty() {
        let tell = |doing: &str, progress| tell(control, doing, progress);
        let started = Instant::now();
        let loaded = loading::load(&state, database, lease, floor, loaded, tell).await?;
        let ms = started.elapsed().as_millis() as u64;
        tracing::info!(
            orders = loaded.orders,
            ms,
            "recovered the idempotency window"
        );
    }
    Ok(state)
}

/// The lanes of a node that starts: nodes that an earlier process on its row had begun to take over are finished, lanes
/// that are nobody's are taken, and the clock of ids is raised above those of earlier owners. Returns those that are to be
/// loaded.
async fn lanes_of(
    ownership: &Ownership,
    node: &mut JoinedNode,
    ids: &IdClock,
    orphans: &Orphans,
    control: &ControlPlane,
) -> Result<LaneSet, StartError> {
    let (database, lease) = (&ownership.database, ownership.lease);
    control.progress("replaying the logs of nodes that were gone".to_owned());
    node.takeovers.finish_begun(orphans).await?;
    cluster::lanes::claim_free(database, lease).await?;
    let rows = cluster::lanes::all(database).await?;
    // Those that its own log has blocked are free of it once this node is active.
    let is_ours = |row: &&cluster::lanes::LaneRow| {
        row.node == Some(lease.node) && row.blocked_by.is_none_or(|by| by == lease.node)
    };
    for row in rows.iter().filter(is_ours) {
        ids.raise(row.ids_until);
        node.loaded.insert(row.lane, row.epoch);
    }
    let until = ids.now().plus_ms(ID_LEASE_MS);
    membership::lease_ids(database, lease, until).await?;
    ids.extend_lease(until);
    Ok(node.loaded.keys().copied().collect())
}

fn tell(control: &ControlPlane, doing: &str, progress: ReadProgress) {
    control.progress(format!("{doing}: {progress}"));
    tracing::info!(
        rows = progress.rows,
        of_about = progress.of_about,
        rate = progress.rate(),
        seconds_left = progress.seconds_left(),
        "{doing}"
    );
}
