//! The ring between producers that never wait and consumers that sleep, whatever is in it.
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use std::collections::VecDeque;
use std::pin::pin;

use crate::sync::{ArrayQueue, AtomicBool, AtomicUsize, Mutex, Notify, Ordering, fence};

/// A bounded lock-free ring, with a place before it for what consumers gave up.
pub(super) struct MpmcQueue<T> {
    ring: ArrayQueue<T>,
    /// What consumers gave up, ahead of the ring. Empty but after a consumer's death, so its
    /// count is looked at before its lock.
    head: Mutex<VecDeque<T>>,
    head_len: AtomicUsize,
    /// Consumers that sleep or are about to.
    idle: AtomicUsize,
    wake: Notify,
    closed: AtomicBool,
}

impl<T> MpmcQueue<T> {
    /// A ring for `capacity` items, 1 or more.
    pub(super) fn new(capacity: usize) -> Self {
        MpmcQueue {
            ring: ArrayQueue::new(capacity.max(1)),
            head: Mutex::new(VecDeque::new()),
            head_len: AtomicUsize::new(0),
            idle: AtomicUsize::new(0),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
        }
    }

    /// Whether [`MpmcQueue::close`] was called.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Appends an item, or gives it back where there is no room.
    pub(super) fn push(&self, item: T) -> Result<(), T> {
        self.ring.push(item)?;
        self.wake_one();
        Ok(())
    }

    /// Puts items at the head of the line.
    pub(super) fn put_back(&self, items: Vec<T>) {
        let count = items.len();
        let mut head = self.head.lock();
        for item in items.into_iter().rev() {
            head.push_front(item);
        }
        self.head_len.store(head.len(), Ordering::Release);
        drop(head);
        // As a producer wakes once an item: the consumer that is woken may take but one of them
        // and not come back.
        (0..count).for_each(|_| self.wake_one());
    }

    /// Takes what is there without waiting.
    fn drain(&self, max: usize) -> Vec<T> {
        let mut items = Vec::new();
        if self.head_len.load(Ordering::Acquire) > 0 {
            let mut head = self.head.lock();
            let count = head.len().min(max);
            items.extend(head.drain(..count));
            self.head_len.store(head.len(), Ordering::Release);
        }
        let available = self.ring.len().min(max - items.len());
        items.reserve(available);
        while items.len() < max {
            match self.ring.pop() {
                Some(item) => items.push(item),
                None => break,
            }
        }
        items
    }

    /// Wakes a sleeping consumer, where there is one. Costs a producer one fence and one read
    /// while every consumer is busy.
    fn wake_one(&self) {
        // Dekker with `take`: we wrote the ring and now read `idle`; a consumer writes `idle` and
        // then reads the ring. With a fence on both sides at least one sees the other.
        fence(Ordering::SeqCst);
        if self.idle.load(Ordering::Relaxed) > 0 {
            self.wake.notify_one();
        }
    }

    /// Takes what is there, 1 to `max` items, waiting for the first; `None` once it is closed and
    /// empty.
    pub(super) async fn take(&self, max: usize) -> Option<Vec<T>> {
        loop {
            let items = self.drain(max);
            if !items.is_empty() {
                return Some(items);
            }
            let mut woken = pin!(self.wake.notified());
            let idle = Idle::enter(&self.idle);
            woken.as_mut().enable();
            // The other half of Dekker, see `wake_one`.
            fence(Ordering::SeqCst);
            let closed = self.closed.load(Ordering::Acquire);
            let items = self.drain(max);
            if !items.is_empty() {
                return Some(items);
            }
            if closed {
                return None;
            }
            woken.await;
            drop(idle);
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.ring.is_full()
    }

    /// Items in it now.
    pub(super) fn depth(&self) -> usize {
        self.ring.len() + self.head_len.load(Ordering::Relaxed)
    }

    pub(super) fn capacity(&self) -> usize {
        self.ring.capacity()
    }

    /// Ends every [`MpmcQueue::take`] once it is empty.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake.notify_waiters();
    }
}

/// Counts a consumer as idle for as long as it lives, also when its future is dropped.
struct Idle<'a>(&'a AtomicUsize);

impl<'a> Idle<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Idle(count)
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
