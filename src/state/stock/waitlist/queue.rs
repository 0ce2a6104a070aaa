//! The orders of a waiting list in their sequence.

use std::collections::{HashMap, VecDeque};

use crate::faults::bug;
use crate::order::OrderId;

/// Orders in a block of the queue; a block is split at twice as many. Finding a position costs a step for each
/// block before it.
const BLOCK: usize = 512;

/// State of an order on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its row is not written yet.
    Joining,
    /// Its row is committed.
    Waiting,
    /// A transaction that assigns units to it is under way.
    Assigning,
}

/// An order on the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// The list is sorted by it: the turn of its id; after a draw the place of an entry in it, which is below every turn.
    key: u64,
    pub(super) id: OrderId,
    pub(super) units: u32,
    pub(super) stage: Stage,
}

/// Entries by key, in blocks, so that inserting, removing and ranking are cheap anywhere.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// None is empty.
    blocks: VecDeque<Vec<Entry>>,
    /// After a draw, the places of its entries. They stay when an entry leaves: it may come back.
    pub(super) places: HashMap<OrderId, u32, foldhash::fast::RandomState>,
    /// After a draw, an id that no entry is below.
    pub(super) least: Option<OrderId>,
}

impl Queue {
    fn key(&self, id: OrderId) -> u64 {
        self.places
            .get(&id)
            .map_or(id.turn(), |place| (*place).into())
    }

    fn block_of(&self, key: u64) -> usize {
        let before = |block: &Vec<Entry>| block.last().is_some_and(|last| last.key < key);
        self.blocks.partition_point(before)
    }

    /// Puts the entries of a draw, and all that come back, in the order of their places, before all others.
    pub(super) fn take_places(&mut self, places: impl IntoIterator<Item = (OrderId, u32)>) {
        if bug("rank_by_arrival") {
            return;
        }
        self.places.extend(places);
        let mut entries: Vec<Entry> = self.blocks.drain(..).flatten().collect();
        for entry in &mut entries {
            entry.key = self.key(entry.id);
        }
        entries.sort_unstable_by_key(|entry| entry.key);
        self.least = self.places.keys().min().copied();
        self.blocks = entries.chunks(BLOCK).map(<[Entry]>::to_vec).collect();
    }

    /// Block and index of an entry.
    pub(super) fn find(&self, id: OrderId) -> Option<(usize, usize)> {
        let key = self.key(id);
        let at = self.block_of(key);
        let found = self
            .blocks
            .get(at)?
            .binary_search_by_key(&key, |one| one.key);
        found.ok().map(|index| (at, index))
    }

    /// Number of entries before this one.
    pub(super) fn rank(&self, id: OrderId) -> Option<usize> {
        let (at, index) = self.find(id)?;
        Some(self.blocks.iter().take(at).map(Vec::len).sum::<usize>() + index)
    }

    /// Adds an entry unless it is there.
    pub(super) fn insert(&mut self, id: OrderId, units: u32, stage: Stage) -> bool {
        let entry = Entry {
            key: self.key(id),
            id,
            units,
            stage,
        };
        let at = self.block_of(entry.key);
        let last = self.blocks.len().saturating_sub(1);
        let Some(block) = self.blocks.get_mut(at.min(last)) else {
            self.blocks.push_back(vec![entry]);
            return true;
        };
        let Err(index) = block.binary_search_by_key(&entry.key, |one| one.key) else {
            return false;
        };
        if at > last && block.len() >= BLOCK {
            // At the end, where nearly all come: full blocks are left as they are.
            self.blocks.push_back(vec![entry]);
            return true;
        }
        block.insert(index, entry);
        if block.len() >= 2 * BLOCK {
            let upper = block.split_off(BLOCK);
            self.blocks.insert(at.min(last) + 1, upper);
        }
        true
    }

    pub(super) fn remove(&mut self, id: OrderId) -> Option<Entry> {
        let (at, index) = self.find(id)?;
        let block = self.blocks.get_mut(at)?;
        let entry = block.remove(index);
        if block.is_empty() {
            self.blocks.remove(at);
        }
        if bug("forget_the_place") {
            self.places.remove(&id);
        }
        Some(entry)
    }

    pub(super) fn get_mut(&mut self, id: OrderId) -> Option<&mut Entry> {
        let (at, index) = self.find(id)?;
        self.blocks.get_mut(at)?.get_mut(index)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.blocks.iter().flatten()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.blocks.iter_mut().flatten()
    }
}
