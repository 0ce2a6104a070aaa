//! Units that come to this node or leave it with lanes: rows have moved them, memory follows.

use std::collections::BTreeMap;

use super::lending::{forget_sold_out, units};
use crate::order::SkuNumber;
use crate::pipeline::orders::parking;
use crate::state::State;
use crate::state::stock::Sku;
use crate::store::cluster::shares::Share;
use crate::store::postgres::parked::ParkedOf;

/// Notes that a lane came to this node, with the units of its unpaid orders, which memory has loaded.
pub fn received(state: &State, held: &[(SkuNumber, i64)]) {
    each(state, held, |sku, units| sku.counter().receive_held(units));
}

/// Notes that a lane left this node, with the units of its unpaid orders.
pub fn given(state: &State, held: &[(SkuNumber, i64)]) {
    each(state, held, |sku, units| sku.counter().give_held(units));
}

/// Notes that the shares of a node that is gone are this one's, with the orders of its lanes that are `parked`: their units are
/// free by the row, and held.
pub fn merged(
    state: &State,
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
        if parked.orders > 0 {
            state.catalogue.set_fault(&sku, parking::FOUND, 1);
            if let Some(parking) = sku.fault().begin_parking() {
                parking.done(parked.orders);
            }
        }
        forget_sold_out(&sku);
    }
}

fn each(state: &State, held: &[(SkuNumber, i64)], change: impl Fn(&Sku, u32)) {
    for (sku, held) in held {
        if let Some(sku) = state.catalogue.by_number(*sku) {
            change(&sku, units(*held));
        }
    }
}
