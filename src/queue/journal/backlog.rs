//! Orders that wait on the disk, because there is no room for them in memory. They are read back
//! in the order in which they were written.

use std::collections::VecDeque;
use std::io;

use super::record::Record;
use super::segment::GroupAt;
use crate::order::{Order, OrderId};
use crate::sync::{AtomicUsize, Mutex, Ordering};

/// A group of which some orders wait on the disk.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub(super) at: GroupAt,
    /// Records at its beginning that do not: they went to memory at once.
    pub(super) skip: usize,
}

impl Waiting {
    /// Reads its orders.
    pub(super) fn read(&self) -> io::Result<Vec<Order>> {
        let group = self.at.segment.read(&self.at)?;
        let waiting = group.records.into_iter().skip(self.skip);
        let orders = waiting.filter_map(|record| match record {
            Record::Order(order) => Some(*order),
            Record::Lease(_) => None,
        });
        Ok(orders.collect())
    }

    fn may_hold(&self, id: OrderId) -> bool {
        self.at
            .ids
            .is_some_and(|(low, high)| low <= id && id <= high)
    }
}

/// What waits on the disk: a few words a group, nothing an order.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    groups: Mutex<VecDeque<Waiting>>,
    /// Orders in them, kept beside the lock for those who only ask whether there are any.
    orders: AtomicUsize,
}

impl Backlog {
    /// Orders that wait.
    pub(super) fn orders(&self) -> usize {
        self.orders.load(Ordering::Acquire)
    }

    /// Adds the newest group.
    pub(super) fn push(&self, waiting: Waiting) {
        let orders = waiting.at.records as usize - waiting.skip;
        let mut groups = self.groups.lock();
        groups.push_back(waiting);
        self.orders.fetch_add(orders, Ordering::AcqRel);
    }

    /// The oldest group; it stays until [`Backlog::pop`].
    pub(super) fn oldest(&self) -> Option<Waiting> {
        self.groups.lock().front().cloned()
    }

    /// One more order of the oldest group is in memory now.
    pub(super) fn advance(&self) {
        if let Some(oldest) = self.groups.lock().front_mut() {
            oldest.skip += 1;
            self.orders.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Forgets the oldest group, whose orders are all in memory now.
    pub(super) fn pop(&self) {
        if let Some(waiting) = self.groups.lock().pop_front() {
            let orders = waiting.at.records as usize - waiting.skip;
            self.orders.fetch_sub(orders, Ordering::AcqRel);
        }
    }

    /// How many orders of the group that begins at this place are not waiting here; `None` where
    /// none of it is.
    pub(super) fn in_memory_of(&self, segment: u64, place: u64) -> Option<usize> {
        let groups = self.groups.lock();
        let waiting = groups
            .iter()
            .find(|waiting| waiting.at.segment.number == segment && waiting.at.place == place);
        waiting.map(|waiting| waiting.skip)
    }

    /// Whether an order with this id may wait here.
    pub(super) fn may_hold(&self, id: OrderId) -> bool {
        self.orders() > 0
            && self
                .groups
                .lock()
                .iter()
                .any(|waiting| waiting.may_hold(id))
    }

    /// The order with this id, where it waits here. Reads from the disk.
    pub(super) fn find(&self, id: OrderId) -> io::Result<Option<Order>> {
        if self.orders() == 0 {
            return Ok(None);
        }
        let candidates: Vec<Waiting> = {
            let groups = self.groups.lock();
            groups.iter().filter(|w| w.may_hold(id)).cloned().collect()
        };
        for waiting in candidates {
            if let Some(order) = waiting.read()?.into_iter().find(|order| order.id == id) {
                return Ok(Some(order));
            }
        }
        Ok(None)
    }
}
