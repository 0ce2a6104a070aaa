//! Which share has the units of a row, and what moves with a lane.

use crate::db::{Db, Lane, NodeId, Order, Standing};

/// Who answers for the units of an order that is found in a log.
pub fn charged(db: &Db, order: &Order) -> NodeId {
    db.lanes[order.lane()].home()
}

pub fn insert(db: &mut Db, order: &Order, blindly: bool) {
    let node = charged(db, order);
    let row = &mut db.lanes[order.lane()];
    row.ids_until = row.ids_until.max(order.id / crate::db::LANES as u64);
    if db.orders.insert(order.id, order.clone()).is_none() || blindly {
        let replayed = db.all_replayed();
        let share = &mut db.shares[node];
        share.held += order.units;
        if !replayed {
            // The failover has lost the loan too.
            share.lent = share.lent.max(share.held);
        }
    }
}

/// Free units of a dead node that has not asserted: it may have given them back before the failover. What its log has
/// is added when it is read.
pub fn drop_unasserted(db: &mut Db) {
    for node in 0..db.nodes.len() {
        let row = &db.nodes[node];
        if row.asserted != db.timeline && row.standing != Standing::Active {
            db.shares[node].lent = needed(db, node);
        }
    }
}

/// What a node's rows need, and those rows of its lanes that a failover has lost from another's log.
pub fn needed(db: &Db, node: NodeId) -> u64 {
    let lost = |(lane, row): (Lane, &crate::db::LaneRow)| match row.home() == node {
        true => row.units.saturating_sub(db.units_of(lane)),
        false => 0,
    };
    db.shares[node].held + db.lanes.iter().enumerate().map(lost).sum::<u64>()
}

/// A lane and its units change their owner. `units`: what it had, if a failover may have lost some of its rows.
pub fn move_lane(db: &mut Db, lane: Lane, to: NodeId, epoch: u64, units: u64) {
    let (rows, from) = (db.units_of(lane), db.lanes[lane].home());
    let units = units.max(rows);
    let share = &mut db.shares[from];
    (share.lent, share.held) = (
        share.lent.saturating_sub(rows),
        share.held.saturating_sub(rows),
    );
    let share = &mut db.shares[to];
    (share.lent, share.held) = (share.lent + units, share.held + rows);
    let row = &mut db.lanes[lane];
    (row.owner, row.epoch, row.blocked_by, row.units) = (to, epoch, None, units);
}
