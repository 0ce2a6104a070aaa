//! The ring between producers that never wait and consumers that sleep, for any item type.
//!
//! `tests/loom.rs` compiles this file against loom's primitives.

use std::collections::VecDeque;
use std::pin::pin;

use crate::sync::{ArrayQueue, AtomicBool, AtomicUsize, Mutex, Notify, Ordering, fence};

/// A bounded lock-free ring, with a list ahead of it for items that consumers put back.
pub(super) struct MpmcQueue<T> {
    ring: ArrayQueue<T>,
    /// Items that consumers put back, ahead of the ring. Empty except after a consumer's death, so
    /// its length is read before its lock is taken.
    head: Mutex<VecDeque<T>>,
    head_len: AtomicUsize,
    /// Consumers that sleep or are about to.
    idle: AtomicUsize,
    wake: Notify,
    closed: AtomicBool,
}

impl<T> MpmcQueue<T> {
    /// Creates a ring for `capacity` items, at least 1.
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

    /// Appends an item, or returns it if the ring is full.
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
        // One wake-up per item, as in `push`: a woken consumer may take one item only and not
        // return.
        (0..count).for_each(|_| self.wake_one());
    }

    /// Takes up to `max` items without waiting.
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

    /// Wakes a sleeping consumer, if there is one. While every consumer is busy it costs a fence
    /// and a read.
    fn wake_one(&self) {
        // Dekker's protocol with `take`: this thread wrote the ring and now reads `idle`; a
        // consumer writes `idle` and then reads the ring. With a fence on both sides at least one
        // sees the other.
        fence(Ordering::SeqCst);
        if self.idle.load(Ordering::Relaxed) > 0 {
            self.wake.notify_one();
        }
    }

    /// Takes 1 to `max` items, and waits for the first. `None` once the queue is closed and empty.
    pub(super) async fn take(&self, max: usize) -> Option<Vec<T>> {
        loop {
            let items = self.drain(max);
            if !items.is_empty() {
                return Some(items);
            }
            let mut woken = pin!(self.wake.notified());
            let idle = Idle::enter(&self.idle);
            woken.as_mut().enable();
            // The other half of Dekker's protocol, see `wake_one`.
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

    /// Ends every [`MpmcQueue::take`] once the queue is empty.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake.notify_waiters();
    }
}

/// Counts a consumer as idle while it lives; a dropped future is no longer counted.
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
