//! Units that come to this node or leave it with lanes: rows have moved them, memory follows.

use std::collections::BTreeMap;

use super::lending::{forget_sold_out, units};
use crate::metrics::Metrics;
use crate::order::SkuNumber;
use crate::pipeline::orders::parking;
use crate::state::State;
use crate::state::stock::Sku;
use crate::store::cluster::lanes::LaneUnits;
use crate::store::cluster::shares::Share;
use crate::store::postgres::parked::ParkedOf;

/// Notes that a lane came to this node, with the units of its orders, which memory has loaded.
pub fn received(state: &State, metrics: &Metrics, came: &[LaneUnits]) {
    each(state, came, |sku, of| {
        sku.counter().receive_held(units(of.lent()));
        note_parked(state, metrics, sku, of.parked);
    });
}

/// Notes that a lane left this node, with the units of its orders.
pub fn given(state: &State, metrics: &Metrics, went: &[LaneUnits]) {
    each(state, went, |sku, of| {
        sku.counter().give_held(units(of.lent()));
        metrics
            .orders_parked
            .add(sku.fault().unparked(of.parked.orders));
    });
}

/// Notes that the shares of a node that is gone are this one's, with the orders of its lanes that are `parked`: their units are
/// free by the row, and held.
pub fn merged(
    state: &State,
    metrics: &Metrics,
    shares: &[(SkuNumber, Share)],
    parked: &BTreeMap<SkuNumber, ParkedOf>,
) {
    for (sku, share) in shares {
        let parked = parked.get(sku).copied().unwrap_or_default();
        let Some(sku) = state.catalogue.by_number(*sku) else {
            continue;
        };
        let counter = sku.counter();
        // Taken before it is free: nobody can hold a unit that is not.
        let taken = share.held + share.sold + parked.units.cast_signed();
        counter.receive_held(units(taken));
        counter.sell(units(share.sold));
        counter.lend(units((share.lent - taken).max(0)));
        sku.fault().lack(units((taken - share.lent).max(0)));
        note_parked(state, metrics, &sku, parked);
        forget_sold_out(&sku);
    }
}

/// Adds new SKUs, of which lanes of this node have `parked` orders.
pub fn add(
    state: &State,
    metrics: &Metrics,
    new: Vec<Sku>,
    parked: &BTreeMap<SkuNumber, ParkedOf>,
) {
    let hold = |sku: &Sku| {
        let parked = *parked.get(&sku.number)?;
        // Before anybody can hold them.
        sku.counter()
            .hold_regardless(units(parked.units.cast_signed()));
        Some((sku.number, parked))
    };
    let held: Vec<_> = new.iter().filter_map(hold).collect();
    state.catalogue.add(new);
    for (sku, parked) in held {
        if let Some(sku) = state.catalogue.by_number(sku) {
            note_parked(state, metrics, &sku, parked);
        }
    }
}

/// Parked orders came, whose units memory holds: their SKU is not sold until they are rows.
fn note_parked(state: &State, metrics: &Metrics, sku: &Sku, parked: ParkedOf) {
    if parked.orders == 0 {
        return;
    }
    state.catalogue.set_fault(sku, parking::FOUND, 1);
    if let Some(parking) = sku.fault().begin_parking() {
        parking.done(parked.orders);
        metrics.orders_parked.add(parked.orders.cast_signed());
    }
}

fn each(state: &State, moved: &[LaneUnits], change: impl Fn(&Sku, &LaneUnits)) {
    for of in moved {
        if let Some(sku) = state.catalogue.by_number(of.sku) {
            change(&sku, of);
        }
    }
}
