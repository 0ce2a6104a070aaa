//! A bounded table of small sets, as a processor's cache is: an entry belongs to one set, which its
//! hash names, and the oldest of that set makes room for it. Whatever is looked up or entered
//! touches one set, under a lock of its own that is held for a few instructions.
//!
//! It forgets by chance a little earlier than a queue of the same size would, and costs a fraction
//! of a cache that has to know what is old in the whole of it.

use crate::sync::Guarded;

/// Sets of `WAYS` entries, 1 or more, each with the newest first and free places last.
pub(super) struct Sets<T, const WAYS: usize> {
    sets: Box<[Guarded<[Option<T>; WAYS]>]>,
}

impl<T: Clone, const WAYS: usize> Sets<T, WAYS> {
    /// Room for `capacity` entries, or for one set where that is less; taken at once.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Sets {
            sets: (0..(capacity / WAYS).max(1))
                .map(|_| Guarded::new([const { None }; WAYS]))
                .collect(),
        }
    }

    /// The entry with this hash that `is` the wanted one.
    pub(super) fn get(&self, hash: u64, is: impl Fn(&T) -> bool) -> Option<T> {
        self.set(hash)?
            .with(|set| set.iter().flatten().find(|entry| is(entry)).cloned())
    }

    /// Enters `entry`, in the place of the one that `is` the same, or of the oldest of its set.
    pub(super) fn put(&self, hash: u64, entry: T, is: impl Fn(&T) -> bool) {
        let replaced = self.set(hash).map(|set| {
            set.with(|set| {
                // The last place has the oldest, or nothing.
                let same = set.iter().position(|known| known.as_ref().is_some_and(&is));
                set[..=same.unwrap_or(WAYS - 1)].rotate_right(1);
                set[0].replace(entry)
            })
        });
        // Not under the lock: what it holds may take its time to go.
        drop(replaced);
    }

    /// Takes out the entry with this hash that `is` the wanted one.
    pub(super) fn remove(&self, hash: u64, is: impl Fn(&T) -> bool) -> Option<T> {
        self.set(hash)?.with(|set| {
            let wanted = set
                .iter()
                .position(|known| known.as_ref().is_some_and(&is))?;
            set[wanted..].rotate_left(1);
            set[WAYS - 1].take()
        })
    }

    /// Every entry.
    pub(super) fn all(&self) -> Vec<T> {
        let entries = |set: &Guarded<[Option<T>; WAYS]>| set.with(|set| set.clone());
        self.sets.iter().flat_map(entries).flatten().collect()
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        let count = |set: &Guarded<[Option<T>; WAYS]>| set.with(|set| set.iter().flatten().count());
        self.sets.iter().map(count).sum()
    }

    fn set(&self, hash: u64) -> Option<&Guarded<[Option<T>; WAYS]>> {
        // The high half of a product spreads a hash evenly over any number of sets.
        let index = (u128::from(hash) * self.sets.len() as u128) >> 64;
        self.sets.get(index as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything is in one set.
    fn put(sets: &Sets<(u32, char), 3>, key: u32, value: char) {
        sets.put(0, (key, value), |entry| entry.0 == key);
    }

    #[test]
    fn the_oldest_makes_room_and_the_same_is_replaced() {
        let sets = Sets::with_capacity(3);
        for (key, value) in [(1, 'a'), (2, 'b'), (3, 'c'), (1, 'd'), (4, 'e')] {
            put(&sets, key, value);
        }
        assert_eq!(sets.all(), [(4, 'e'), (1, 'd'), (3, 'c')]);
        assert_eq!(sets.get(0, |entry| entry.0 == 1), Some((1, 'd')));
        assert_eq!(sets.get(0, |entry| entry.0 == 2), None);
    }

    #[test]
    fn what_is_removed_makes_room_for_another() {
        let sets = Sets::with_capacity(3);
        for (key, value) in [(1, 'a'), (2, 'b'), (3, 'c')] {
            put(&sets, key, value);
        }
        assert_eq!(sets.remove(0, |entry| entry.0 == 2), Some((2, 'b')));
        assert_eq!(sets.remove(0, |entry| entry.0 == 2), None);
        assert_eq!(sets.len(), 2);
        put(&sets, 4, 'd');
        assert_eq!(sets.all(), [(4, 'd'), (3, 'c'), (1, 'a')]);
        sets.remove(0, |entry| entry.0 == 3);
        put(&sets, 1, 'e');
        assert_eq!(sets.len(), 2);
        assert_eq!(sets.get(0, |entry| entry.0 == 1), Some((1, 'e')));
    }

    #[test]
    fn it_is_bounded() {
        let sets = Sets::<u64, 4>::with_capacity(100);
        for number in 0..1_000_u64 {
            sets.put(number << 54, number, |entry| *entry == number);
        }
        assert!(sets.len() <= 100);
        assert_eq!(Sets::<u64, 4>::with_capacity(0).len(), 0);
    }
}
