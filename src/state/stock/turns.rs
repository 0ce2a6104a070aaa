//! The sequence of a waiting list over several nodes, as it was read last.

use std::collections::HashMap;

use crate::order::OrderId;

/// The turn of an order, with its id if it is of this node.
pub type Turn = (u64, Option<OrderId>);

/// The turns of all orders that wait, and which of them are those of this node's orders.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Ascending.
    all: Vec<u64>,
    own: HashMap<OrderId, u64, foldhash::fast::RandomState>,
}

impl Turns {
    /// Adds orders, ascending, behind those that are known.
    pub(super) fn extend(&mut self, entries: &[Turn]) {
        let own = entries
            .iter()
            .filter_map(|(turn, id)| Some(((*id)?, *turn)));
        self.own.extend(own);
        self.all.extend(entries.iter().map(|(turn, _)| *turn));
    }

    /// The last turn.
    pub(super) fn last(&self) -> u64 {
        self.all.last().copied().unwrap_or(0)
    }

    /// Orders that have a turn.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Orders before one of this node's; `None`: it had no turn yet.
    pub(super) fn ahead(&self, id: OrderId) -> Option<usize> {
        let turn = self.own.get(&id)?;
        Some(self.all.partition_point(|other| other < turn))
    }
}
