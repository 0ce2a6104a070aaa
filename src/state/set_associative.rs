//! A bounded set-associative table, like a processor's cache. The hash of a key selects one small
//! set; a new entry replaces the oldest of its set. Each operation touches one set, under a lock of
//! its own that is held for a few instructions.
//!
//! Evictions are slightly less fair than in a queue of the same size, at a fraction of the cost of
//! a cache with a global order.

use std::hash::{BuildHasher, Hash};

use foldhash::quality::RandomState;

use crate::sync::Guarded;

/// Newest first, empty places last.
type Set<K, V, const WAYS: usize> = Guarded<[Option<(K, V)>; WAYS]>;

/// Entries by key, in sets of `WAYS` entries, at least 1.
pub(super) struct Sets<K, V, const WAYS: usize> {
    sets: Box<[Set<K, V, WAYS>]>,
    seed: RandomState,
}

impl<K: Hash + Eq, V: Clone, const WAYS: usize> Sets<K, V, WAYS> {
    /// Creates room for `capacity` entries, at least one set; allocated at once.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Sets {
            sets: (0..(capacity / WAYS).max(1))
                .map(|_| Guarded::new([const { None }; WAYS]))
                .collect(),
            seed: RandomState::default(),
        }
    }

    /// The value under `key`.
    pub(super) fn get(&self, key: &K) -> Option<V> {
        self.set(key)?.with(|set| {
            let mut entries = set.iter().flatten();
            entries
                .find(|entry| entry.0 == *key)
                .map(|entry| entry.1.clone())
        })
    }

    /// Stores `value` under `key`, in place of the existing entry or of the oldest of its set.
    pub(super) fn put(&self, key: K, value: V) {
        let replaced = self.set(&key).map(|set| {
            set.with(|set| {
                // The last place holds the oldest entry, or none.
                let place = place_of(set, &key).unwrap_or(WAYS - 1);
                set[..=place].rotate_right(1);
                set[0].replace((key, value))
            })
        });
        // Not under the lock: dropping the value may take time.
        drop(replaced);
    }

    /// Removes the value under `key`.
    pub(super) fn remove(&self, key: &K) -> Option<V> {
        self.set(key)?.with(|set| {
            let place = place_of(set, key)?;
            set[place..].rotate_left(1);
            set[WAYS - 1].take().map(|entry| entry.1)
        })
    }

    /// Every value.
    pub(super) fn all(&self) -> Vec<V> {
        let mut all = Vec::new();
        for set in &self.sets {
            set.with(|set| all.extend(set.iter().flatten().map(|entry| entry.1.clone())));
        }
        all
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        let count = |set: &Set<K, V, WAYS>| set.with(|set| set.iter().flatten().count());
        self.sets.iter().map(count).sum()
    }

    fn set(&self, key: &K) -> Option<&Set<K, V, WAYS>> {
        // The high half of a product spreads a hash evenly over any number of sets.
        let index = (u128::from(self.seed.hash_one(key)) * self.sets.len() as u128) >> 64;
        self.sets.get(index as usize)
    }
}

fn place_of<K: Eq, V>(set: &[Option<(K, V)>], key: &K) -> Option<usize> {
    set.iter()
        .position(|entry| entry.as_ref().is_some_and(|entry| entry.0 == *key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room_and_the_same_is_replaced() {
        // Everything is in one set.
        let sets = Sets::<u32, char, 3>::with_capacity(3);
        for (key, value) in [(1, 'a'), (2, 'b'), (3, 'c'), (1, 'd'), (4, 'e')] {
            sets.put(key, value);
        }
        assert_eq!(sets.all(), ['e', 'd', 'c']);
        assert_eq!(sets.get(&1), Some('d'));
        assert_eq!(sets.get(&2), None);
    }

    #[test]
    fn what_is_removed_makes_room_for_another() {
        let sets = Sets::<u32, char, 3>::with_capacity(3);
        for (key, value) in [(1, 'a'), (2, 'b'), (3, 'c')] {
            sets.put(key, value);
        }
        assert_eq!(sets.remove(&2), Some('b'));
        assert_eq!(sets.remove(&2), None);
        assert_eq!(sets.len(), 2);
        sets.put(4, 'd');
        assert_eq!(sets.all(), ['d', 'c', 'a']);
        sets.remove(&3);
        sets.put(1, 'e');
        assert_eq!(sets.len(), 2);
        assert_eq!(sets.get(&1), Some('e'));
    }

    #[test]
    fn it_is_bounded() {
        let sets = Sets::<u64, (), 4>::with_capacity(100);
        (0..1_000).for_each(|number| sets.put(number, ()));
        assert!(sets.len() <= 100);
        assert_eq!(Sets::<u64, (), 4>::with_capacity(0).len(), 0);
    }
}
