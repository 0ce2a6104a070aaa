//! State shared by the durable queue and its threads.

use std::sync::Arc;
use std::time::Duration;

use super::linger::Linger;
use super::mpsc::MpscQueue;
use super::spill::Spill;
use crate::metrics::Metrics;
use crate::order::UnixMillis;
use crate::queue::log::{OrderLog, Permit};
use crate::queue::{Durability, OrderQueue, Rejected, RingQueue};
use crate::state::pending::{Pending, PendingOrder};
use crate::sync::thread::{self, Thread};
use crate::sync::{AtomicBool, Mutex, OnceLock, Ordering, Waker};

/// Pause before the next look for room in memory.
pub(super) const ROOM_TICK: Duration = Duration::from_millis(2);

/// Limits, callbacks and shared state that a durable queue needs to run.
pub struct QueueParts {
    /// Most orders that wait in memory.
    pub capacity: usize,
    /// The epoch of this process.
    pub epoch: i64,
    /// Orders in flight: spilled orders leave it, orders read back enter it.
    pub pending: Arc<Pending>,
    /// Wakes requests that wait for an acknowledgement.
    pub wake_all: Arc<dyn Fn(Vec<Waker>) + Send + Sync>,
    /// Whether this process still holds the right to acknowledge.
    pub may_acknowledge: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Called with the reason if a thread of the queue ends unasked: the process has to stop.
    pub on_end: Arc<dyn Fn(String) + Send + Sync>,
    /// Takes groups as signs of contact to the log, at a node of a cluster.
    pub contact: Option<LogContact>,
    /// The metrics.
    pub metrics: Metrics,
}

/// Whoever counts each group that is durable as a contact to the log. A contact is as old as the first sending of its
/// group: a group that the log has already may have a marker behind it.
#[derive(Clone)]
pub struct LogContact {
    /// The clock, in milliseconds; it must not stand still while the machine sleeps.
    pub now_ms: fn() -> u64,
    /// Called with the moment of the first sending.
    pub note: Arc<dyn Fn(u64) + Send + Sync>,
}

pub(super) struct Shared {
    pub(super) ring: RingQueue,
    pub(super) capacity: usize,
    pub(super) linger: Linger,
    pub(super) incoming: MpscQueue<Incoming>,
    pub(super) spill: Spill,
    /// Wakes the reader.
    pub(super) reader: OnceLock<Thread>,
    pub(super) log: Arc<dyn OrderLog>,
    pub(super) parts: QueueParts,
    pub(super) appender_ended: AtomicBool,
    /// Orders in the log are left to the next process.
    pub(super) cut: AtomicBool,
    /// Orders that the appender held when it ended.
    pub(super) never_written: Mutex<Vec<Arc<PendingOrder>>>,
    pub(super) failure: OnceLock<String>,
    /// Whether the log takes no groups at the moment.
    pub(super) is_away: AtomicBool,
    away: Mutex<Option<String>>,
    /// Whether the appender is to look at the log even if it has nothing to append.
    pub(super) look_is_due: AtomicBool,
}

/// An item for the appender to write.
pub(super) enum Incoming {
    Order(Arc<PendingOrder>, Permit),
    Lease(UnixMillis, Permit, tokio::sync::oneshot::Sender<bool>),
}

impl Shared {
    pub(super) fn new(log: Arc<dyn OrderLog>, parts: QueueParts) -> Self {
        Shared {
            ring: RingQueue::new(parts.capacity),
            capacity: parts.capacity,
            linger: Linger::new(),
            incoming: MpscQueue::new(parts.capacity),
            spill: Spill::default(),
            reader: OnceLock::new(),
            log,
            parts,
            appender_ended: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            never_written: Mutex::default(),
            failure: OnceLock::new(),
            is_away: AtomicBool::new(false),
            away: Mutex::default(),
            look_is_due: AtomicBool::new(false),
        }
    }

    pub(super) fn wake_reader(&self) {
        if let Some(thread) = self.reader.get() {
            thread.unpark();
        }
    }

    pub(super) fn fail(&self, reason: String) {
        let _ = self.failure.set(reason.clone());
        self.parts.metrics.journal_failed.set(1);
        let log = self.log.title();
        tracing::error!(
            %reason,
            "{log} has failed; respond-async is refused until a restart, waiting orders continue; mend it, then \
             restart"
        );
    }

    /// Notes that the log does not take groups at the moment: `respond-async` is refused until it does.
    pub(super) fn set_away(&self, reason: String) {
        let mut away = self.away.lock();
        if !self.is_away.swap(true, Ordering::AcqRel) {
            self.parts.metrics.log_away.set(1);
            let log = self.log.title();
            tracing::error!(
                %reason,
                "{log} takes no orders; respond-async is refused with 503 queue_unavailable until it does, waiting \
                 orders continue; retrying"
            );
        }
        *away = Some(reason);
    }

    /// Notes that the log takes groups.
    pub(super) fn set_back(&self) {
        if self.is_away.load(Ordering::Acquire) {
            *self.away.lock() = None;
            self.is_away.store(false, Ordering::Release);
            self.parts.metrics.log_away.set(0);
            tracing::info!("{} takes orders again", self.log.title());
        }
    }

    /// Why the log takes no groups at the moment, if that is so.
    pub(super) fn away(&self) -> Option<String> {
        self.away.lock().clone()
    }

    /// Notes that acknowledged orders cannot be read back at the moment.
    pub(super) fn set_unreadable(&self, error: &std::io::Error) {
        if self.log.durability() == Durability::Machine && self.failure.get().is_none() {
            self.fail(format!("cannot read acknowledged orders back: {error}"));
        } else {
            self.set_away(format!("cannot read acknowledged orders back: {error}"));
            // The appender finds out what is missing.
            self.incoming.wake();
        }
    }

    /// Most orders that are read back into the ring: half of it stays free for waiting orders.
    pub(super) fn read_back_max(&self) -> usize {
        (self.capacity / 2).max(1)
    }

    /// Pushes an order into the ring and waits for room. False: the queue ends first.
    pub(super) fn push_or_wait(&self, mut order: Arc<PendingOrder>) -> bool {
        loop {
            match self.ring.push(order) {
                Ok(()) => {
                    self.linger.holds(self.ring.depth());
                    return true;
                }
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
