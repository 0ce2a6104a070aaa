//! Recovery at a start: the order log, the database, and the state in memory rebuilt from both.
//!
//! 1. A journal was read and checked before the database was opened (`order_log`). A broker's log is taken over and
//!    read in step 3.
//! 2. Orders of orphan payments are read, so that an order that was paid in time is payable.
//! 3. The order log is replayed, oldest order first: what the database lacks is written.
//! 4. Memory is rebuilt from the database alone: SKUs, units of parked orders, unpaid orders, the orders of the
//!    idempotency window, and older live orders of SKUs with a purchase limit.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::StartError;
use super::order_log::OwnedLog;
use super::ownership::Ownership;
use crate::config::{Backend, Config};
use crate::faults::{bug, crash_point};
use crate::http::control_plane::ControlPlane;
use crate::order::{ClockReading, IdClock, OrderId, SkuNumber, UnixMillis};
use crate::pipeline::failover::log_replay::{self, LogReplay};
use crate::pipeline::failover::replay::{Applied, Replayer};
use crate::pipeline::orders::parking;
use crate::state::State;
use crate::state::buyers::Buyers;
use crate::state::expiry_index::ExpiryIndex;
use crate::state::orphans::Orphans;
use crate::state::pending::Pending;
use crate::state::poison::Poison;
use crate::state::progress::Progress;
use crate::state::recent_orders::RecentOrders;
use crate::state::sticky_refusals::StickyRefusals;
use crate::state::stock::Catalogue;
use crate::state::throughput::ThroughputEstimator;
use crate::store::StoreError;
use crate::store::batch::BatchWriter;
use crate::store::postgres::order_log::LogName;
use crate::store::postgres::window::{self, ReadProgress};
use crate::store::postgres::{
    Database, NodeLease, audit, draws, lanes, orders, parked, payments, skus,
};

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
    let (database, lease, clock) = (&ownership.database, ownership.lease, ownership.clock);
    let orphans = orphans(database).await?;
    let mut high_water = ownership.id_high_water;
    if let Some((log, name)) = ownership.log.take() {
        let log = replay(
            config,
            database,
            lease,
            (log, &name),
            &orphans,
            clock,
            control,
        )
        .await?;
        high_water = high_water.max(log.id_high_water());
        ownership.log = Some((log, name));
    }
    control.progress("reading the database".to_owned());
    let leased_until = ownership.ids_leased_until;
    let ids = IdClock::going_on(clock, high_water, leased_until);
    // From here on keys are known for this long. Orders of the log belong to an earlier window.
    let window_from = OrderId::floor_of(ids.now());
    let window_ms = config.orders.idempotency_window_ms;
    audit::note_window(database, lease, window_from, window_ms).await?;
    // Not earlier: an earlier release may have leased ids in the log alone.
    lanes::note_cutover(database, lease, window_from).await?;
    let state = recover(config, database, lease, ids, orphans, poison, control).await?;
    state.catalogue.set_paused(ownership.paused);
    let metrics = control.metrics();
    metrics.recovered_orders.set(state.buyers.len() as i64);
    metrics.queue_capacity.set(config.queue.capacity as i64);
    Ok(Arc::new(state))
}

/// Replays the order log: writes to the database the orders that only the log has.
async fn replay(
    config: &Config,
    database: &Database,
    lease: NodeLease,
    (log, name): (OwnedLog, &LogName),
    orphans: &Orphans,
    clock: ClockReading,
    control: &ControlPlane,
) -> Result<OwnedLog, StartError> {
    let total = log.total();
    if total == Some(0) {
        return Ok(log);
    }
    let title = &name.title;
    let started = Instant::now();
    let (mut parts, reading) = log_replay::orders_of(move |each| log.records(each));
    let shard = i16::try_from(config.worker_count()).unwrap_or(i16::MAX);
    let replayer = Replayer::new(
        database.clone(),
        BatchWriter::new(database.clone(), lease, shard),
        config.workers.batch_rows_max,
    );
    let mut replay = LogReplay::new(database, replayer, orphans, clock.now()).await?;
    let mut told = Instant::now();
    let mut done = 0;
    while let Some(part) = parts.recv().await {
        done += part.len() as u64;
        replay.apply(part).await?;
        crash_point("recovery.replayed_part");
        let of = total.map_or_else(String::new, |total| format!(" of {total}"));
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
    }
    let log = reading
        .await
        .map_err(|panic| StartError::Engine(std::io::Error::other(panic)))??;
    let Applied {
        written,
        present,
        refused,
        parked,
    } = replay.applied();
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

/// The orders that payments wait for. They are read before the replay, so that an order that is written late
/// but was paid in time is payable.
async fn orphans(database: &Database) -> Result<Orphans, StoreError> {
    let orphans = Orphans::default();
    for (id, received_at) in payments::orphaned_orders(database).await? {
        orphans.insert(id, received_at);
    }
    Ok(orphans)
}

/// Rebuilds the in-memory state from the database.
async fn recover(
    config: &Config,
    database: &Database,
    lease: NodeLease,
    ids: IdClock,
    orphans: Orphans,
    poison: Arc<Poison>,
    control: &ControlPlane,
) -> Result<State, StoreError> {
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
    let floor = ids.window_floor(config.orders.idempotency_window_ms);
    if !bug("sell_what_is_parked") {
        hold_parked(&catalogue, database, lease, floor).await?;
    }
    let expiry_index = ExpiryIndex::default();
    let mut waiting: Vec<(SkuNumber, OrderId, u32)> = Vec::new();
    for open in orders::open_below(database, lease, floor).await? {
        let units = &open.units;
        if open.waits() {
            waiting.push((units.sku, units.order_id, units.quantity));
        } else {
            expiry_index.note([(units.order_id, open.expires_at)]);
        }
    }
    let (limited, others): (Vec<_>, Vec<_>) = catalogue
        .all()
        .into_iter()
        .partition(|sku| sku.terms().need_units(ids.real_now()));
    let limited: HashSet<_> = limited.iter().map(|sku| sku.number).collect();
    buyers.note_incomplete(others.iter().map(|sku| sku.number));
    let started = Instant::now();
    let restored = window::load(
        database,
        floor,
        |user, order, open_until| {
            if open_until == Some(UnixMillis::NEVER) {
                waiting.push((order.sku, order.order_id, order.quantity.get()));
            } else {
                expiry_index.note(open_until.map(|until| (order.order_id, until)));
            }
            let limited = order.is_live() && limited.contains(&order.sku);
            buyers.restore(user, order, limited);
        },
        |progress| tell(control, "reading the idempotency window", progress),
    )
    .await?;
    let ms = started.elapsed().as_millis() as u64;
    tracing::info!(orders = restored, ms, "recovered the idempotency window");
    if !limited.is_empty() {
        count_older(database, limited, &buyers, floor, control).await?;
    }
    for sku in catalogue.all() {
        if sku.draw().is_some_and(|draw| draw.is_drawn()) {
            let places = draws::waiting_places(database, sku.number).await?;
            sku.waitlist().take_places(places);
        }
    }
    wait_again(&catalogue, waiting);
    Ok(State {
        catalogue,
        buyers,
        sticky_refusals: StickyRefusals::with_capacity(config.orders.sticky_refusals_max),
        recent_orders: RecentOrders::with_capacity(RECENT_ORDERS),
        pending: Arc::new(Pending::with_capacity(in_flight_max)),
        expiry_index,
        orphans,
        poison,
        ids,
        throughput: ThroughputEstimator::default(),
        progress: Progress::default(),
    })
}

/// Puts orders that wait for units back on their lists. Units that are free are kept for them.
fn wait_again(catalogue: &Catalogue, mut waiting: Vec<(SkuNumber, OrderId, u32)>) {
    waiting.sort_unstable();
    for orders in waiting.chunk_by(|one, next| one.0 == next.0) {
        let Some(sku) = orders.first().and_then(|one| catalogue.by_number(one.0)) else {
            continue;
        };
        for (_, id, units) in orders {
            sku.waitlist().restore(sku.counter(), *id, *units);
        }
        if let Some(draw) = sku.draw() {
            draw.note_entry();
        }
        tracing::info!(sku_id = %sku.id, orders = orders.len(), "orders wait for units of this SKU");
    }
}

/// Holds the units of parked orders. Their SKUs' rows do not count them and may be wrong, so the held units are
/// summed up from the orders.
async fn hold_parked(
    catalogue: &Catalogue,
    database: &Database,
    lease: NodeLease,
    floor: OrderId,
) -> Result<(), StoreError> {
    let parked = parked::by_sku(database).await?;
    if parked.is_empty() {
        return Ok(());
    }
    let skus: Vec<SkuNumber> = parked.keys().copied().collect();
    let by_rows = orders::held_units(database, lease, floor, &skus).await?;
    for (number, parked) in parked {
        let Some(sku) = catalogue.by_number(number) else {
            continue;
        };
        let held = by_rows.get(&number).copied().unwrap_or(0) + parked.units;
        let units = u32::try_from(held)
            .map_err(|_| StoreError::Data(format!("sku {}: its orders hold {held}", sku.id)))?;
        sku.counter().release(sku.counter().snapshot().held);
        sku.counter().hold_regardless(units);
        catalogue.set_fault(&sku, parking::FOUND, 1);
        sku.fault().set_parked(parked.orders);
        tracing::error!(
            sku_id = %sku.id, orders = parked.orders, units = parked.units,
            "orders of this SKU are parked, because the database refused its counters: its sale is paused until the database \
             accepts them (see the audit)"
        );
    }
    Ok(())
}

/// Loads live orders older than the window, which purchase limits count.
async fn count_older(
    database: &Database,
    limited: HashSet<SkuNumber>,
    buyers: &Buyers,
    floor: OrderId,
    control: &ControlPlane,
) -> Result<(), StoreError> {
    let limited: Vec<_> = limited.into_iter().collect();
    let started = Instant::now();
    let mut orders = 0_u64;
    window::load_live_orders(
        database,
        &limited,
        floor,
        |user, order| {
            orders += 1;
            buyers.restore_live(user, order);
        },
        |progress| {
            tell(
                control,
                "reading the older orders that limits count",
                progress,
            )
        },
    )
    .await?;
    let ms = started.elapsed().as_millis() as u64;
    tracing::info!(orders, ms, "recovered the older orders that limits count");
    Ok(())
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
