//! The appender's input: it takes the items that gathered while it wrote, and sleeps if there are
//! none.
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use super::parker::Parker;
use crate::faults::bug;
use crate::sync::{ArrayQueue, AtomicBool, Ordering};

/// A bounded queue of many senders and one receiver that sleeps while it is empty.
pub(super) struct MpscQueue<T> {
    items: ArrayQueue<T>,
    parker: Parker,
    closed: AtomicBool,
}

impl<T> MpscQueue<T> {
    /// Creates a queue for `capacity` items, at least 1.
    pub(super) fn new(capacity: usize) -> Self {
        MpscQueue {
            items: ArrayQueue::new(capacity.max(1)),
            parker: Parker::new(),
            closed: AtomicBool::new(false),
        }
    }

    /// Appends an item and wakes the receiver. Returns the item if the queue is full.
    pub(super) fn push(&self, item: T) -> Result<(), T> {
        self.items.push(item)?;
        if !bug("lost_wake_up") {
            self.parker.unpark();
        }
        Ok(())
    }

    /// Makes the current thread the receiver; call once, before its first [`MpscQueue::wait`].
    pub(super) fn listen(&self) {
        self.parker.listen();
    }

    /// Takes the oldest item.
    pub(super) fn pop(&self) -> Option<T> {
        self.items.pop()
    }

    /// Sleeps while the queue is empty; may wake spuriously. False: it is closed, and every item
    /// pushed before has been taken.
    pub(super) fn wait(&self) -> bool {
        // Read first, so that items pushed before the close are seen.
        let closed = self.is_closed();
        if !self.items.is_empty() {
            return true;
        }
        if closed {
            return false;
        }
        self.parker
            .park_unless(|| !self.items.is_empty() || self.is_closed());
        true
    }

    /// Wakes the receiver for something else than an item.
    pub(super) fn wake(&self) {
        self.parker.unpark();
    }

    /// Whether [`MpscQueue::close`] was called.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Lets the receiver end once it is empty.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.parker.unpark();
    }

    pub(super) fn is_full(&self) -> bool {
        self.items.is_full()
    }

    /// Items in it now.
    pub(super) fn len(&self) -> usize {
        self.items.len()
    }
}
