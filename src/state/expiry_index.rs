//! When unpaid orders expire: the ids to check in the database, and the time to do so.
//!
//! Orders that expire within the same quarter of a second share an entry of a few id ranges. A
//! batch of thousands therefore costs one access to a small map, and memory does not grow with the
//! number of orders. An id far from the rest is a range of its own ([`Ranges`]). Only the row tells
//! whether an order is still unpaid.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::order::{IdRange, OrderId, UnixMillis};

/// Width of an entry, in milliseconds of expiry time. It bounds the delay of an expiry;
/// `orders.payment_ttl_ms` is a second or more.
pub const GRAIN_MS: i64 = 250;

/// Orders of one entry are placed within a quarter of a second and written within seconds. Ids
/// further apart (1 s of the id clock) have rows of other entries between them.
const ENTRY: Nearness = Nearness {
    apart: 1_000 << 22,
    ranges_max: 64,
};

/// The conditions under which ids share a range.
#[derive(Clone, Copy, Debug)]
pub struct Nearness {
    /// Largest difference between ids that always share a range.
    pub apart: u64,
    /// Number of ranges kept when the nearest ones are merged, which happens at twice as many.
    pub ranges_max: usize,
}

/// Ranges of ids, ascending, without overlap. They cover every id that was inserted, and as few
/// others as their number allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(SmallVec<[IdRange; 1]>);

impl Ranges {
    /// Adds an id.
    pub fn insert(&mut self, id: OrderId, nearness: Nearness) {
        self.insert_range(IdRange { from: id, to: id }, nearness);
    }

    /// Adds a range.
    pub fn insert_range(&mut self, range: IdRange, nearness: Nearness) {
        let near =
            |low: OrderId, high: OrderId| high.get().saturating_sub(low.get()) <= nearness.apart;
        // The ranges from `first` to `end` are merged with the new one.
        let first = self.0.partition_point(|one| !near(one.to, range.from));
        let end = self.0.partition_point(|one| near(range.to, one.from));
        if first >= end {
            self.0.insert(first, range);
            if self.0.len() >= 2 * nearness.ranges_max.max(1) {
                self.merge_nearest(nearness.ranges_max.max(1));
            }
            return;
        }
        let merged = IdRange {
            from: self.0[first].from.min(range.from),
            to: self.0[end - 1].to.max(range.to),
        };
        self.0[first] = merged;
        self.0.drain(first + 1..end);
    }

    /// Removes and returns the first range.
    pub fn pop_first(&mut self) -> Option<IdRange> {
        (!self.0.is_empty()).then(|| self.0.remove(0))
    }

    /// The lowest id.
    pub fn least(&self) -> Option<OrderId> {
        self.0.first().map(|range| range.from)
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn merge_nearest(&mut self, ranges: usize) {
        let gap = |pair: &[IdRange]| pair[1].from.get() - pair[0].to.get();
        let mut gaps: Vec<u64> = self.0.windows(2).map(gap).collect();
        let merges = self.0.len().saturating_sub(ranges);
        if merges == 0 {
            return;
        }
        let (_, widest, _) = gaps.select_nth_unstable(merges - 1);
        let widest = *widest;
        let mut merged: SmallVec<[IdRange; 1]> = SmallVec::new();
        for range in self.0.drain(..) {
            match merged.last_mut() {
                Some(last) if range.from.get() - last.to.get() <= widest => last.to = range.to,
                _ => merged.push(range),
            }
        }
        self.0 = merged;
    }
}

/// Ids whose orders, as far as they are in the index, have all expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// The ids; rows of other orders may lie between them.
    pub ids: IdRange,
    /// The end of their time to pay.
    pub since: UnixMillis,
}

/// Times at which unpaid orders expire.
#[derive(Debug, Default)]
pub struct ExpiryIndex {
    /// By expiry time, in units of [`GRAIN_MS`]. Locked briefly, once per batch.
    entries: Mutex<BTreeMap<i64, Ranges>>,
}

impl ExpiryIndex {
    /// Adds orders with committed rows, each with the end of its time to pay.
    pub fn note(&self, orders: impl IntoIterator<Item = (OrderId, UnixMillis)>) {
        let mut entries = self.entries.lock();
        for (id, expires_at) in orders {
            let grain = expires_at.0.div_euclid(GRAIN_MS);
            entries.entry(grain).or_default().insert(id, ENTRY);
        }
    }

    /// Removes and returns ids of the earliest entry, if all its orders have expired at `now`. The
    /// caller checks their rows, or adds them again.
    pub fn take_due(&self, now: UnixMillis) -> Option<Due> {
        let mut entries = self.entries.lock();
        loop {
            let mut entry = entries.first_entry()?;
            let end = end_of(*entry.key());
            if end > now {
                return None;
            }
            let ids = entry.get_mut().pop_first();
            if entry.get().is_empty() {
                entry.remove();
            }
            if let Some(ids) = ids {
                return Some(Due { ids, since: end });
            }
        }
    }

    /// The lowest id of any order in the index.
    pub fn least(&self) -> Option<OrderId> {
        let entries = self.entries.lock();
        entries.values().filter_map(Ranges::least).min()
    }

    /// The moment at which the whole earliest entry has expired.
    pub fn next_due(&self) -> Option<UnixMillis> {
        let entries = self.entries.lock();
        entries.first_key_value().map(|(grain, _)| end_of(*grain))
    }
}

/// The moment at which every order of a grain has expired.
fn end_of(grain: i64) -> UnixMillis {
    UnixMillis(grain.saturating_add(1).saturating_mul(GRAIN_MS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(value: u64) -> OrderId {
        OrderId::new(value).unwrap()
    }

    fn range(from: u64, to: u64) -> IdRange {
        IdRange {
            from: id(from),
            to: id(to),
        }
    }

    #[test]
    fn orders_fall_due_with_their_grain_and_not_before() {
        let unpaid = ExpiryIndex::default();
        unpaid.note([(id(7), UnixMillis(1_000)), (id(3), UnixMillis(1_100))]);
        unpaid.note([(id(9), UnixMillis(1_300))]);
        assert_eq!(unpaid.take_due(UnixMillis(1_249)), None);
        assert_eq!(unpaid.least(), Some(id(3)));
        let due = unpaid.take_due(UnixMillis(1_250)).unwrap();
        assert_eq!((due.ids, due.since), (range(3, 7), UnixMillis(1_250)));
        assert_eq!(unpaid.take_due(UnixMillis(1_499)), None);
        assert_eq!(unpaid.next_due(), Some(UnixMillis(1_500)));
        assert_eq!(unpaid.take_due(UnixMillis(1_500)).unwrap().ids, range(9, 9));
    }

    #[test]
    fn what_is_noted_while_an_entry_is_worked_on_is_not_lost() {
        let unpaid = ExpiryIndex::default();
        unpaid.note([(id(7), UnixMillis(0))]);
        assert!(unpaid.take_due(UnixMillis(1_000)).is_some());
        unpaid.note([(id(8), UnixMillis(1))]);
        let next = unpaid.take_due(UnixMillis(1_000));
        assert_eq!(next.unwrap().ids, range(8, 8));
    }

    #[test]
    fn an_id_far_from_the_rest_does_not_widen_their_range() {
        let unpaid = ExpiryIndex::default();
        let hours = (3 * 3_600_000) << 22;
        let now = 4 * hours;
        let until = UnixMillis(1_000);
        unpaid.note((0..5_000).map(|n| (id(now + n), until)));
        unpaid.note([(id(now - hours), until)]);
        unpaid.note((5_000..9_000).map(|n| (id(now + n), until)));
        let taken: Vec<_> = std::iter::from_fn(|| unpaid.take_due(UnixMillis(2_000))).collect();
        let ids: Vec<_> = taken.iter().map(|due| due.ids).collect();
        assert_eq!(
            ids,
            [range(now - hours, now - hours), range(now, now + 8_999)]
        );
    }

    #[test]
    fn ranges_cover_what_was_inserted_and_stay_few() {
        let nearness = Nearness {
            apart: 2,
            ranges_max: 4,
        };
        let mut ranges = Ranges::default();
        // Every other order of a permutation of 0..1000.
        let ids: Vec<u64> = (0..500).map(|n| n * 377 % 1_000 + 1).collect();
        for value in &ids {
            ranges.insert(id(*value * 10), nearness);
            assert!(ranges.len() < 8, "{}", ranges.len());
        }
        let mut all = Vec::new();
        while let Some(one) = ranges.pop_first() {
            assert!(one.from <= one.to);
            assert!(all.last().is_none_or(|last: &IdRange| last.to < one.from));
            all.push(one);
        }
        for value in ids {
            let holds = |one: &&IdRange| one.from <= id(value * 10) && id(value * 10) <= one.to;
            assert!(all.iter().any(|one| holds(&one)), "{value}");
        }
    }

    #[test]
    fn the_nearest_ranges_are_merged_first() {
        let nearness = Nearness {
            apart: 0,
            ranges_max: 2,
        };
        let mut ranges = Ranges::default();
        for value in [10, 1_000, 20, 1_100] {
            ranges.insert(id(value), nearness);
        }
        assert_eq!(ranges.len(), 2);
        let (first, second) = (ranges.pop_first(), ranges.pop_first());
        assert_eq!(
            (first, second, ranges.len()),
            (Some(range(10, 20)), Some(range(1_000, 1_100)), 0)
        );
    }
}
