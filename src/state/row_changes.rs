//! Changes of rows that memory follows once they are committed.
//!
//! Between its COMMIT and the update of memory, a change is in the rows alone. Whoever compares the two asks here
//! before and after: they may be compared if nothing was under way at either moment and nothing has begun between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Changes under way in the lower half, changes begun so far in the upper one, where they may wrap. All accesses are
/// sequentially consistent: a change costs a round trip to the database, so their price does not matter.
#[derive(Debug, Default)]
pub struct RowChanges(Arc<AtomicU64>);

const BEGUN: u64 = 1 << 32;

impl RowChanges {
    /// Begins a change, before the first of both sides moves. Drop the guard once rows and memory agree again, or it
    /// is known that neither has moved.
    pub fn begin(&self) -> RowChange {
        self.0.fetch_add(BEGUN + 1, Ordering::SeqCst);
        RowChange(Arc::clone(&self.0))
    }

    /// The number of changes begun so far, if none is under way.
    pub fn at_rest(&self) -> Option<u64> {
        let word = self.0.load(Ordering::SeqCst);
        word.is_multiple_of(BEGUN).then_some(word / BEGUN)
    }
}

/// A change under way.
#[derive(Debug)]
#[must_use = "dropping it says that rows and memory agree"]
pub struct RowChange(Arc<AtomicU64>);

impl RowChange {
    /// Nothing has moved: it does not count as begun.
    pub fn undo(self) {
        self.0.fetch_sub(BEGUN, Ordering::SeqCst);
    }
}

impl Drop for RowChange {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_while_it_lasts_and_told_by_the_number_afterwards() {
        let changes = RowChanges::default();
        let before = changes.at_rest();
        assert!(before.is_some());
        let (one, other) = (changes.begin(), changes.begin());
        drop(one);
        assert_eq!(changes.at_rest(), None);
        drop(other);
        let after = changes.at_rest();
        assert!(after.is_some() && after != before);
        changes.begin().undo();
        assert_eq!(changes.at_rest(), after);
    }
}
