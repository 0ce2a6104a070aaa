//! Holding lanes: whoever moves an order of a lane holds it from before the transaction until memory is updated, so that it
//! is not handed over in between.

use std::collections::HashMap;

use crate::faults::bug;
use crate::order::{Lane, LaneSet, OrderId};
use crate::state::lanes::{LanePass, NodeLanes, Standing};
use crate::store::StoreError;
use crate::store::cluster::lanes;
use crate::store::postgres::Database;

/// The lanes of some orders that are open here, held until this is dropped.
pub struct HeldLanes<'a> {
    _passes: Vec<LanePass<'a>>,
}

/// Holds the lanes of these orders, as far as they are open here. Returns the orders of these; then those of lanes that are
/// open nowhere, or that are about to open here. A process on its own has all.
///
/// # Errors
/// If an id is from before lanes, and the database does not tell whose the order is.
pub async fn hold<'a>(
    of: Option<&'a NodeLanes>,
    database: &Database,
    ids: Vec<OrderId>,
) -> Result<(HeldLanes<'a>, Vec<OrderId>, Vec<OrderId>), StoreError> {
    let Some(of) = of else {
        let held = HeldLanes {
            _passes: Vec::new(),
        };
        return Ok((held, ids, Vec::new()));
    };
    let old: Vec<OrderId> = ids
        .iter()
        .copied()
        .filter(|id| of.cutover.lane_of(*id).is_none())
        .collect();
    let old = match old.is_empty() {
        true => HashMap::new(),
        false => lanes::of_rows(database, &old).await?,
    };
    let lane_of = |id: &OrderId| of.cutover.lane_of(*id).or_else(|| old.get(id).copied());
    let wanted: LaneSet = ids.iter().filter_map(lane_of).collect();
    // Before the doors: a lane that is not coming any more is open, or was.
    let coming = of.lanes.coming();
    let (held, passes) = of.lanes.enter_among(wanted);
    let is_later = |lane: &Lane| match of.lanes.standing(*lane) {
        Standing::Closed | Standing::Here { .. } => !held.has(*lane),
        Standing::Elsewhere { .. } => {
            coming.has(*lane) && !bug("forget_what_falls_due_while_loading")
        }
    };
    let closed: LaneSet = wanted.iter().filter(is_later).collect();
    let among = |set: LaneSet| {
        let is_in = move |id: &&OrderId| lane_of(id).is_some_and(|lane| set.has(lane));
        ids.iter().filter(is_in).copied().collect::<Vec<_>>()
    };
    let (here, later) = (among(held), among(closed));
    Ok((HeldLanes { _passes: passes }, here, later))
}
