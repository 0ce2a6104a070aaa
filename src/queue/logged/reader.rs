//! The reading thread: brings orders back from the log while memory has room.

use std::sync::Arc;
use std::time::Duration;

use super::shared::{ROOM_TICK, Shared};
use crate::faults::crash_point;
use crate::queue::OrderQueue;
use crate::state::pending::PendingOrder;
use crate::sync::Ordering;
use crate::sync::thread;

/// Pause before the next attempt after a failed read.
const READ_RETRY: Duration = Duration::from_secs(1);

/// Runs until the appender has ended and nothing is left in the log, or until the cut.
pub(super) fn read_back(shared: &Shared) {
    let _ = shared.reader.set(thread::current());
    loop {
        let ended = shared.appender_ended.load(Ordering::Acquire);
        let Some(waiting) = shared.spill.oldest() else {
            if ended || shared.cut.load(Ordering::Acquire) {
                return shared.ring.close();
            }
            // The appender or the end of the queue unparks this thread. The timeout covers the
            // moment before the appender knows the thread.
            thread::park_timeout(Duration::from_millis(100));
            continue;
        };
        if shared.cut.load(Ordering::Acquire) {
            return shared.ring.close();
        }
        if shared.ring.depth() >= shared.read_back_max() {
            thread::park_timeout(ROOM_TICK);
            continue;
        }
        match waiting.read(&*shared.log) {
            Ok(orders) => {
                crash_point("journal.read_back");
                let span = waiting.at.span;
                for order in orders {
                    let order = Arc::new(PendingOrder::recovered(order, span));
                    shared.parts.pending.insert(&order);
                    if !shared.push_or_wait(order) {
                        return shared.ring.close();
                    }
                    shared.spill.advance();
                    shared.parts.pending.read_back(1);
                }
                shared.spill.pop();
            }
            // A log that is away comes back; what else stands in the way is told once, and tried again too.
            Err(error) => {
                shared.set_unreadable(&error);
                thread::park_timeout(READ_RETRY);
            }
        }
    }
}
