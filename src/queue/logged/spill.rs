//! Orders that wait in the log because memory has no room. They are read back in the order of
//! writing.

use std::collections::VecDeque;
use std::io;

use crate::order::{Order, OrderId};
use crate::queue::log::record::Record;
use crate::queue::log::{GroupAt, OrderLog};
use crate::sync::{AtomicUsize, Mutex, Ordering};

/// A group with orders that wait in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) at: GroupAt,
    /// Records at its beginning that do not wait, because they are in memory.
    pub(super) skip: usize,
}

impl Waiting {
    /// Reads its orders that wait.
    pub(super) fn read(&self, log: &dyn OrderLog) -> io::Result<Vec<Order>> {
        let records = log.read(&self.at)?.into_iter();
        let orders = records.skip(self.skip).filter_map(|record| match record {
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

/// Orders that wait in the log: a few words per group, nothing per order.
#[derive(Debug, Default)]
pub(super) struct Spill {
    groups: Mutex<Groups>,
    /// Orders in the groups, readable without the lock.
    orders: AtomicUsize,
}

/// The groups, oldest first. Ids are almost in sequence, so the groups that may hold an id are
/// adjacent and found by two binary searches.
#[derive(Debug, Default)]
struct Groups {
    /// Each with the highest id in it and in all groups before it; never decreases.
    groups: VecDeque<(Waiting, u64)>,
    /// Number of the first of them, counted since the start.
    first: u64,
    /// Groups whose lowest id is below that of every later group: number and that id, both
    /// ascending.
    least: VecDeque<(u64, u64)>,
}

impl Groups {
    fn push(&mut self, waiting: Waiting) {
        let (low, high) = match waiting.at.ids {
            Some((low, high)) => (low.get(), high.get()),
            None => (u64::MAX, 0),
        };
        let number = self.first + self.groups.len() as u64;
        while self.least.back().is_some_and(|(_, least)| *least >= low) {
            self.least.pop_back();
        }
        self.least.push_back((number, low));
        let before = self.groups.back().map_or(0, |(_, high)| *high);
        self.groups.push_back((waiting, high.max(before)));
    }

    fn pop(&mut self) -> Option<Waiting> {
        let (waiting, _) = self.groups.pop_front()?;
        if self
            .least
            .front()
            .is_some_and(|(number, _)| *number == self.first)
        {
            self.least.pop_front();
        }
        self.first += 1;
        Some(waiting)
    }

    /// The groups that may have this id, oldest first.
    fn of(&self, id: OrderId) -> impl Iterator<Item = &Waiting> {
        let from = self.groups.partition_point(|(_, high)| *high < id.get());
        // After the last group whose lowest id is not above `id`, all ids are above it.
        let lower = self.least.partition_point(|(_, least)| *least <= id.get());
        let last = lower.checked_sub(1).and_then(|at| self.least.get(at));
        let to = last.map_or(0, |(number, _)| (number - self.first + 1) as usize);
        let groups = self.groups.range(from.min(to)..to);
        groups
            .map(|(waiting, _)| waiting)
            .filter(move |waiting| waiting.may_hold(id))
    }
}

impl Spill {
    /// Orders that wait.
    pub(super) fn orders(&self) -> usize {
        self.orders.load(Ordering::Acquire)
    }

    /// Adds the newest group.
    pub(super) fn push(&self, waiting: Waiting) {
        let orders = waiting.at.records as usize - waiting.skip;
        let mut groups = self.groups.lock();
        groups.push(waiting);
        self.orders.fetch_add(orders, Ordering::AcqRel);
    }

    /// The oldest group; it remains until [`Spill::pop`].
    pub(super) fn oldest(&self) -> Option<Waiting> {
        let groups = self.groups.lock();
        groups.groups.front().map(|(waiting, _)| *waiting)
    }

    /// Counts one more order of the oldest group as in memory.
    pub(super) fn advance(&self) {
        if let Some((oldest, _)) = self.groups.lock().groups.front_mut() {
            oldest.skip += 1;
            self.orders.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Removes the oldest group, whose orders are all in memory.
    pub(super) fn pop(&self) {
        if let Some(waiting) = self.groups.lock().pop() {
            let orders = waiting.at.records as usize - waiting.skip;
            self.orders.fetch_sub(orders, Ordering::AcqRel);
        }
    }

    /// Orders of the group at this place that do not wait here; `None` if the group is not here.
    pub(super) fn in_memory_of(&self, span: u64, place: u64) -> Option<usize> {
        let groups = self.groups.lock();
        let place_of = |(waiting, _): &(Waiting, u64)| (waiting.at.span, waiting.at.place);
        let at = groups.groups.binary_search_by_key(&(span, place), place_of);
        let waiting = at.ok().and_then(|at| groups.groups.get(at));
        waiting.map(|(waiting, _)| waiting.skip)
    }

    /// Whether an order with this id may wait here.
    pub(super) fn may_hold(&self, id: OrderId) -> bool {
        self.orders() > 0 && self.groups.lock().of(id).next().is_some()
    }

    /// The order with this id, if it waits here. Reads from the log without holding the lock.
    pub(super) fn find(&self, log: &dyn OrderLog, id: OrderId) -> io::Result<Option<Order>> {
        if self.orders() == 0 {
            return Ok(None);
        }
        let candidates: Vec<Waiting> = self.groups.lock().of(id).copied().collect();
        for waiting in candidates {
            let orders = match waiting.read(log) {
                // Its orders have been settled meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                orders => orders?,
            };
            if let Some(order) = orders.into_iter().find(|order| order.id == id) {
                return Ok(Some(order));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(place: u64, ids: Option<(u64, u64)>) -> Waiting {
        let id = |id| OrderId::new(id).unwrap();
        Waiting {
            at: GroupAt {
                span: 1,
                place,
                length: 1,
                group: place,
                records: 2,
                ids: ids.map(|(low, high)| (id(low), id(high))),
            },
            skip: 0,
        }
    }

    /// `tests/shuttle` compiles this file too, with locks that work in its own models only.
    fn is_under_shuttle() -> bool {
        !module_path!().starts_with("millrace::")
    }

    #[test]
    fn the_groups_of_an_id_are_those_of_a_walk_through_all() {
        if is_under_shuttle() {
            return;
        }
        let (spill, mut all) = (Spill::default(), VecDeque::new());
        let (mut random, mut next) = (7_u64, 0);
        for place in 0..3_000_u64 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Almost in sequence: some groups begin slightly below the end of the group before
            // them.
            let low = (10 * place + 1).saturating_sub((random >> 40) % 40).max(1);
            let high = low + 1 + (random >> 50) % 30;
            let ids = ((random >> 33) % 50 > 0).then_some((low, high));
            spill.push(group(place, ids));
            all.push_back((place, ids));
            if random >> 62 == 0 {
                spill.pop();
                all.pop_front();
            }
            next = high;
        }
        for id in (1..next + 50).step_by(3) {
            let id = OrderId::new(id).unwrap();
            let walked: Vec<u64> = all
                .iter()
                .filter(|(_, ids)| ids.is_some_and(|(low, high)| (low..=high).contains(&id.get())))
                .map(|(place, _)| *place)
                .collect();
            let groups = spill.groups.lock();
            let found: Vec<u64> = groups.of(id).map(|waiting| waiting.at.place).collect();
            assert_eq!(found, walked, "{id}");
            drop(groups);
            assert_eq!(spill.may_hold(id), !walked.is_empty());
        }
        let (first, last) = (all[0].0, all[all.len() - 1].0);
        for place in first..=last {
            assert_eq!(spill.in_memory_of(1, place), Some(0));
        }
        assert_eq!(spill.in_memory_of(1, last + 1), None);
        spill.advance();
        assert_eq!(spill.in_memory_of(1, first), Some(1));
        assert_eq!(spill.orders(), 2 * all.len() - 1);
        spill.push(Waiting {
            skip: 1,
            ..group(last + 1, None)
        });
        assert_eq!(spill.orders(), 2 * all.len());
        for _ in first..=last + 1 {
            spill.pop();
        }
        assert_eq!(spill.orders(), 0);
        let groups = spill.groups.lock();
        assert!(groups.groups.is_empty() && groups.least.is_empty());
    }

    #[test]
    fn a_look_up_looks_at_a_few_groups_of_many() {
        if is_under_shuttle() {
            return;
        }
        let spill = Spill::default();
        for place in 0..50_000 {
            spill.push(group(place, Some((2 * place + 1, 2 * place + 2))));
        }
        let groups = spill.groups.lock();
        let id = OrderId::new(60_001).unwrap();
        let from = groups.groups.partition_point(|(_, high)| *high < id.get());
        assert_eq!(from, 30_000);
        assert_eq!(groups.of(id).count(), 1);
        assert_eq!(
            groups.least.len(),
            50_000,
            "each is the least of what follows"
        );
    }
}
