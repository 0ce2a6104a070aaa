//! When unpaid orders fall due: which ids to look at in the database, and when.
//!
//! Orders that expire within the same quarter of a second share an entry, which holds nothing but
//! the range of their ids: a batch of thousands costs one look at a small map, and memory does not
//! grow with the number of orders. Whether an order is still unpaid only its row knows.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::order::{OrderId, UnixMillis};

/// Orders that expire within so many milliseconds share an entry. It bounds how late an order is
/// expired; `orders.payment_ttl_ms` is a second or more.
pub const GRAIN_MS: i64 = 250;

/// Ids of orders that expire in the same [`GRAIN_MS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// Which entry it is.
    grain: i64,
    /// The least of the ids.
    pub from: OrderId,
    /// The greatest of the ids.
    pub to: OrderId,
}

/// When which unpaid orders fall due.
#[derive(Debug, Default)]
pub struct Unpaid {
    /// By the end of their time, in grains. A lock for a moment, once a batch.
    entries: Mutex<BTreeMap<i64, (OrderId, OrderId)>>,
}

impl Unpaid {
    /// Notes orders whose rows are to be paid until the moment beside each.
    pub fn note(&self, orders: impl IntoIterator<Item = (OrderId, UnixMillis)>) {
        let mut entries = self.entries.lock();
        for (id, expires_at) in orders {
            let grain = expires_at.0.div_euclid(GRAIN_MS);
            let (from, to) = entries.entry(grain).or_insert((id, id));
            *from = id.min(*from);
            *to = id.max(*to);
        }
    }

    /// The earliest entry of which every order has fallen due at `now`. It stays until it is
    /// [done](Unpaid::done).
    pub fn due(&self, now: UnixMillis) -> Option<Due> {
        let entries = self.entries.lock();
        let (grain, (from, to)) = entries.first_key_value()?;
        let end = grain.saturating_add(1).saturating_mul(GRAIN_MS);
        (end <= now.0).then_some(Due {
            grain: *grain,
            from: *from,
            to: *to,
        })
    }

    /// Every order of an entry was looked at, up to `looked_at`. What was noted meanwhile stays.
    pub fn done(&self, due: Due) {
        let mut entries = self.entries.lock();
        if entries.get(&due.grain) == Some(&(due.from, due.to)) {
            entries.remove(&due.grain);
        }
    }

    /// The least id of any order in it.
    pub fn least(&self) -> Option<OrderId> {
        let entries = self.entries.lock();
        entries.values().map(|(from, _)| *from).min()
    }

    /// Since when the earliest entry has been due, in milliseconds; 0 where none is.
    pub fn backlog_ms(&self, now: UnixMillis) -> i64 {
        let entries = self.entries.lock();
        let first = entries.first_key_value();
        first.map_or(0, |(grain, _)| {
            (now.0 - grain.saturating_add(1).saturating_mul(GRAIN_MS)).max(0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(value: u64) -> OrderId {
        OrderId::new(value).unwrap()
    }

    #[test]
    fn orders_fall_due_with_their_grain_and_not_before() {
        let unpaid = Unpaid::default();
        unpaid.note([(id(7), UnixMillis(1_000)), (id(3), UnixMillis(1_100))]);
        unpaid.note([(id(9), UnixMillis(1_300))]);
        assert_eq!(unpaid.due(UnixMillis(1_249)), None);
        let due = unpaid.due(UnixMillis(1_250)).unwrap();
        assert_eq!((due.from, due.to), (id(3), id(7)));
        assert_eq!(unpaid.least(), Some(id(3)));
        unpaid.done(due);
        assert_eq!(unpaid.due(UnixMillis(1_499)), None);
        assert_eq!(unpaid.backlog_ms(UnixMillis(1_600)), 100);
        assert_eq!(unpaid.due(UnixMillis(1_500)).unwrap().from, id(9));
    }

    #[test]
    fn what_is_noted_while_an_entry_is_worked_on_is_not_lost() {
        let unpaid = Unpaid::default();
        unpaid.note([(id(7), UnixMillis(0))]);
        let due = unpaid.due(UnixMillis(1_000)).unwrap();
        unpaid.note([(id(8), UnixMillis(1))]);
        unpaid.done(due);
        assert_eq!(unpaid.due(UnixMillis(1_000)).unwrap().to, id(8));
    }
}
