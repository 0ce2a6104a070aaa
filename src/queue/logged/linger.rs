//! Lets acknowledged orders gather: nobody waits for their rows, so a worker may rest until there are enough for a
//! batch.
//!
//! ```text
//!   sender: push into the ring ─► fence ─► pressing? no ─► pressing = true ─► notify
//!   worker: pressing = false   ─► fence ─► take from the ring … rest until pressing
//! ```
//!
//! Dekker's protocol: either the worker takes the order, or its sender sees the mark cleared and sets it again.

use std::pin::pin;

use crate::sync::{AtomicBool, AtomicUsize, Notify, Ordering, fence};

/// Whether the next batch presses.
pub(super) struct Linger {
    /// A sender waits for an order that may be in the ring, the ring holds `enough`, or the queue is closed.
    pressing: AtomicBool,
    /// Orders that are worth a batch; `usize::MAX` before anybody has rested.
    enough: AtomicUsize,
    wake: Notify,
}

impl Linger {
    pub(super) fn new() -> Self {
        Linger {
            pressing: AtomicBool::new(false),
            enough: AtomicUsize::new(usize::MAX),
            wake: Notify::new(),
        }
    }

    /// Ends a rest, now or the next one. Call after the push, which ends with a sequentially consistent fence. While
    /// it presses anyway this costs a read.
    pub(super) fn press(&self) {
        if !self.pressing.load(Ordering::Relaxed) && !self.pressing.swap(true, Ordering::SeqCst) {
            self.wake.notify_one();
        }
    }

    /// The ring holds `orders`, for which nobody waits.
    pub(super) fn holds(&self, orders: usize) {
        // Relaxed: a rest that has just begun may miss it, and ends by its own time.
        if orders >= self.enough.load(Ordering::Relaxed) {
            self.press();
        }
    }

    /// Before a worker takes a batch: what is pushed from here on presses anew.
    pub(super) fn clear(&self) {
        self.pressing.store(false, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Returns once it presses, or the ring holds `enough`. May return for nothing.
    pub(super) async fn until_pressing(&self, enough: usize) {
        self.enough.store(enough, Ordering::Relaxed);
        let mut woken = pin!(self.wake.notified());
        woken.as_mut().enable();
        if !self.pressing.load(Ordering::SeqCst) {
            woken.await;
        }
    }
}
