//! The thread that reads: it brings back from the disk as many orders as memory has room for.

use std::sync::Arc;
use std::time::Duration;

use super::shared::{ROOM_TICK, Shared};
use crate::faults::crash_point;
use crate::queue::OrderQueue;
use crate::state::pending::PendingOrder;
use crate::sync::Ordering;
use crate::sync::thread;

/// Pause before the disk is read again after it has failed.
const READ_RETRY: Duration = Duration::from_secs(1);

/// Works until the appender has ended and nothing is left on the disk, or until the cut.
pub(super) fn read_back(shared: &Shared) {
    let _ = shared.reader.set(thread::current());
    loop {
        let ended = shared.appender_ended.load(Ordering::Acquire);
        let Some(waiting) = shared.spill.oldest() else {
            if ended || shared.cut.load(Ordering::Acquire) {
                return shared.ring.close();
            }
            // Woken by the appender, or by the end; the tick is for the moment before it
            // knows this thread.
            thread::park_timeout(Duration::from_millis(100));
            continue;
        };
        if shared.cut.load(Ordering::Acquire) {
            return shared.ring.close();
        }
        // Half of the memory stays free for orders that wait.
        if shared.ring.depth() >= (shared.capacity / 2).max(1) {
            thread::park_timeout(ROOM_TICK);
            continue;
        }
        match waiting.read() {
            Ok(orders) => {
                crash_point("journal.read_back");
                let segment = waiting.at.segment.number;
                for order in orders {
                    let order = Arc::new(PendingOrder::recovered(order, segment));
                    shared.parts.pending.insert(&order);
                    if !shared.push_or_wait(order) {
                        return shared.ring.close();
                    }
                    shared.spill.advance();
                    shared.parts.pending.read_back(1);
                }
                shared.spill.pop();
            }
            Err(error) => {
                if shared.failure.get().is_none() {
                    shared.fail(format!("cannot read acknowledged orders back: {error}"));
                }
                thread::park_timeout(READ_RETRY);
            }
        }
    }
}
