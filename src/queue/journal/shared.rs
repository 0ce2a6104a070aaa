//! State shared by the journal's queue and its threads.

use std::sync::Arc;
use std::time::Duration;

use super::mpsc::MpscQueue;
use super::segments::Segments;
use super::space::Permit;
use super::spill::Spill;
use crate::metrics::Metrics;
use crate::order::UnixMillis;
use crate::queue::{OrderQueue, Rejected, RingQueue};
use crate::state::pending::{Pending, PendingOrder};
use crate::sync::thread::{self, Thread};
use crate::sync::{AtomicBool, Mutex, OnceLock, Ordering, Waker};

/// Pause before the next look for room in memory.
pub(super) const ROOM_TICK: Duration = Duration::from_millis(2);

/// Limits, callbacks and shared state that a journal needs to run.
pub struct JournalParts {
    /// Most orders that wait in memory.
    pub capacity: usize,
    /// Most bytes on the disk.
    pub bytes_max: u64,
    /// The epoch of this process.
    pub epoch: i64,
    /// Whether segments wait for [`super::JournalQueue::confirm`] before they are deleted.
    pub retain: bool,
    /// Orders in flight: spilled orders leave it, orders read back enter it.
    pub pending: Arc<Pending>,
    /// Wakes requests that wait for an acknowledgement.
    pub wake_all: Arc<dyn Fn(Vec<Waker>) + Send + Sync>,
    /// Whether this process still holds the right to acknowledge.
    pub may_acknowledge: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Called with the reason if a thread of the journal ends unasked: the process has to stop.
    pub on_end: Arc<dyn Fn(String) + Send + Sync>,
    /// Metrics of the journal.
    pub metrics: Metrics,
}

pub(super) struct Shared {
    pub(super) ring: RingQueue,
    pub(super) capacity: usize,
    pub(super) incoming: MpscQueue<Incoming>,
    pub(super) spill: Spill,
    /// Wakes the reader.
    pub(super) reader: OnceLock<Thread>,
    pub(super) segments: Segments,
    pub(super) parts: JournalParts,
    pub(super) appender_ended: AtomicBool,
    /// Orders on the disk are left to the next process.
    pub(super) cut: AtomicBool,
    /// An order that the appender held when it ended.
    pub(super) never_written: Mutex<Vec<Arc<PendingOrder>>>,
    pub(super) failure: OnceLock<String>,
}

/// An item for the appender to write.
pub(super) enum Incoming {
    Order(Arc<PendingOrder>, Permit),
    Lease(UnixMillis, Permit, tokio::sync::oneshot::Sender<bool>),
}

impl Shared {
    pub(super) fn wake_reader(&self) {
        if let Some(thread) = self.reader.get() {
            thread.unpark();
        }
    }

    pub(super) fn fail(&self, reason: String) {
        let _ = self.failure.set(reason.clone());
        self.parts.metrics.journal_failed.set(1);
        tracing::error!(
            %reason,
            "the journal has failed; respond-async is refused until a restart, waiting orders \
             continue; check the disk, then restart"
        );
    }

    /// Pushes an order into the ring and waits for room. False: the queue ends first.
    pub(super) fn push_or_wait(&self, mut order: Arc<PendingOrder>) -> bool {
        loop {
            match self.ring.push(order) {
                Ok(()) => return true,
                Err(Rejected { closed: true, .. }) => return false,
                Err(Rejected {
                    order: rejected, ..
                }) => order = rejected,
            }
            if self.cut.load(Ordering::Acquire) {
                return false;
            }
            thread::park_timeout(ROOM_TICK);
        }
    }
}
