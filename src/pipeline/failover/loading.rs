//! Reading orders back into memory: at a start, and when a node gets lanes of another.
//!
//! What is read of a lane: its unpaid orders and those that wait for units, the orders of the idempotency window, older
//! live orders of SKUs with a purchase limit. Counters are not touched: they are those of the database.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use crate::faults::bug;
use crate::order::{LaneSet, OrderId, SkuNumber, UnixMillis};
use crate::pipeline::orders::parking;
use crate::state::State;
use crate::state::orphans::Orphans;
use crate::state::stock::Catalogue;
use crate::store::cluster::lists;
use crate::store::postgres::window::{self, ReadProgress};
use crate::store::postgres::{Database, NodeLease, draws, orders, parked, payments};
use crate::store::{Ledger, StoreError};

/// Orders that were read.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Orders of the idempotency window.
    pub orders: u64,
    /// Units of unpaid orders by SKU, those of parked orders left out.
    pub held: BTreeMap<SkuNumber, i64>,
}

/// Reads the orders of some lanes. None of them may be open here, and memory must have nothing of them. `floor` is the
/// lowest id of the idempotency window; `tell` gets the progress about once a second.
///
/// Ids go on above those that are read, whatever was leased: the place of a dead node's log may have overtaken a lease in it.
///
/// # Errors
/// If a row is not one of ours, or the database's error. Memory may have a part of the lanes then.
pub async fn load(
    state: &State,
    database: &Database,
    lease: NodeLease,
    floor: OrderId,
    lanes: LaneSet,
    mut tell: impl FnMut(&str, ReadProgress),
) -> Result<Loaded, StoreError> {
    let mut loaded = Loaded::default();
    let mut waiting: Vec<(SkuNumber, OrderId, u32)> = Vec::new();
    for open in orders::open_below(database, lease, floor, lanes).await? {
        let units = &open.units;
        if open.waits() {
            waiting.push((units.sku, units.order_id, units.quantity));
        } else {
            *loaded.held.entry(units.sku).or_default() += i64::from(units.quantity);
            state.expiry_index.note([(units.order_id, open.expires_at)]);
        }
    }
    let (limited, others): (Vec<_>, Vec<_>) = state.catalogue.all().into_iter().partition(|sku| {
        sku.terms().need_units(state.ids.real_now()) || state.buyers.is_counting(sku.number)
    });
    let limited: HashSet<_> = limited.iter().map(|sku| sku.number).collect();
    let others = others.iter().map(|sku| sku.number);
    state.buyers.note_incomplete(others);
    let mut newest = None;
    window::load(
        database,
        floor,
        lanes,
        |user, order, open_until| {
            loaded.orders += 1;
            newest = newest.max(Some(order.order_id));
            if open_until == Some(UnixMillis::NEVER) {
                waiting.push((order.sku, order.order_id, order.quantity.get()));
            } else if let Some(until) = open_until {
                *loaded.held.entry(order.sku).or_default() += i64::from(order.quantity.get());
                state.expiry_index.note([(order.order_id, until)]);
            }
            let limited = order.is_live() && limited.contains(&order.sku);
            state.buyers.restore(user, order, limited);
        },
        |progress| tell("reading the idempotency window", progress),
    )
    .await?;
    if let Some(newest) = newest {
        state.ids.raise(newest.millis().plus_ms(1));
    }
    if !limited.is_empty() {
        count_older(state, database, limited, floor, lanes, tell).await?;
    }
    if lease.ledger == Ledger::Share {
        let mut skus: Vec<SkuNumber> = waiting.iter().map(|(sku, ..)| *sku).collect();
        skus.sort_unstable();
        skus.dedup();
        let ids: Vec<OrderId> = waiting.iter().map(|(_, id, _)| *id).collect();
        lists::restore(database, lease, &skus, &ids).await?;
    }
    // The sequence of several nodes is that of the entries of the list.
    let all = state.catalogue.all().into_iter();
    for sku in all.filter(|_| lease.ledger == Ledger::Sku) {
        if sku.draw().is_some_and(|draw| draw.is_drawn()) {
            let places = draws::waiting_places(database, sku.number).await?;
            sku.waitlist().take_places(places);
        }
    }
    wait_again(&state.catalogue, waiting);
    Ok(loaded)
}

/// Reads which orders have payments that wait for them.
///
/// # Errors
/// If the database does not answer.
pub async fn load_orphans(database: &Database, orphans: &Orphans) -> Result<(), StoreError> {
    for (id, paid_at) in payments::orphaned_orders(database).await? {
        orphans.insert(id, paid_at);
    }
    Ok(())
}

/// Holds the units of parked orders of these lanes. Their SKUs' rows do not count them and may be wrong, so the held units are
/// summed up from the orders. Returns the number of orders.
///
/// # Errors
/// If the database does not answer.
pub async fn hold_parked(
    catalogue: &Catalogue,
    database: &Database,
    lease: NodeLease,
    floor: OrderId,
    lanes: LaneSet,
) -> Result<u64, StoreError> {
    let parked = parked::by_sku(database, lanes).await?;
    if parked.is_empty() || bug("sell_what_is_parked") {
        return Ok(0);
    }
    let skus: Vec<SkuNumber> = parked.keys().copied().collect();
    let by_rows = orders::held_units(database, lease, floor, lanes, &skus).await?;
    let mut orders = 0;
    for (number, parked) in parked {
        let Some(sku) = catalogue.by_number(number) else {
            continue;
        };
        orders += parked.orders;
        let held = by_rows.get(&number).copied().unwrap_or(0) + parked.units;
        let units = u32::try_from(held)
            .map_err(|_| StoreError::Data(format!("sku {}: its orders hold {held}", sku.id)))?;
        sku.counter().release(sku.counter().snapshot().held);
        let total = sku.counter().snapshot().total;
        sku.counter().hold_regardless(units);
        if sku.shared().is_some() {
            sku.fault().lack(sku.counter().snapshot().total - total);
        }
        catalogue.set_fault(&sku, parking::FOUND, 1);
        sku.fault().set_parked(parked.orders);
        tracing::error!(
            sku_id = %sku.id, orders = parked.orders, units = parked.units,
            "orders of this SKU are parked, because the database refused its counters: its sale is paused until the database \
             accepts them (see the audit)"
        );
    }
    Ok(orders)
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

/// Loads live orders older than the window, which purchase limits count.
async fn count_older(
    state: &State,
    database: &Database,
    limited: HashSet<SkuNumber>,
    floor: OrderId,
    lanes: LaneSet,
    mut tell: impl FnMut(&str, ReadProgress),
) -> Result<(), StoreError> {
    let limited: Vec<_> = limited.into_iter().collect();
    let started = Instant::now();
    let mut orders = 0_u64;
    window::load_live_orders(
        database,
        &limited,
        floor,
        lanes,
        |user, order| {
            orders += 1;
            state.buyers.restore_live(user, order);
        },
        |progress| tell("reading the older orders that limits count", progress),
    )
    .await?;
    let ms = started.elapsed().as_millis() as u64;
    tracing::info!(orders, ms, "recovered the older orders that limits count");
    Ok(())
}
