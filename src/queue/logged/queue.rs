//! The queue over the log: the ways of an order to the appender, the workers and the log.
//!
//! ```text
//!             append                        room in memory?
//!   intake ───────────► incoming ─► appender ──── yes ────► ring ─► workers
//!      │                            write, sync,   │          ▲
//!      │                            acknowledge    no         │ reader
//!      │                                           ▼          │
//!      │                                          spill ──────┘
//!      │ push (waiting orders: promised nothing before the commit)
//!      └───────────────────────────────────────────────────► ring
//! ```
//!
//! The appender takes the orders that gathered during its last append: a single order costs one
//! append, a flood shares them. While the spill is not empty, newer orders stay in the log too, which
//! keeps the queue in order.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::appender::Appender;
use super::reader::read_back;
use super::shared::{Incoming, QueueParts, Shared};
use crate::backoff::Backoff;
use crate::faults::{self, Fate};
use crate::order::{Order, OrderId, UnixMillis};
use crate::queue::log::broker::Position;
use crate::queue::log::record::{Record, order_bytes};
use crate::queue::log::{Log, Permit};
use crate::queue::{Batch, Durability, DurableQueue, NotDurable, OrderQueue, Rejected};
use crate::state::pending::PendingOrder;
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Mutex, Ordering};

/// Time limit for writing a lease on order ids.
const LEASE_PATIENCE: Duration = Duration::from_secs(3);
/// Pauses before the next attempt to append to a log that is away: first and longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A durable queue: the ring in memory, over an order log.
pub struct LoggedQueue {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle>>,
}

impl LoggedQueue {
    /// Starts the queue over a log whose orders have all been replayed.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(log: Log, parts: QueueParts) -> io::Result<Self> {
        let Log {
            writer,
            shared: log,
            next_sequence,
        } = log;
        let shared = Arc::new(Shared::new(log, parts));
        let mut threads = Vec::new();
        let mut spawn = |name: &'static str, work: Box<dyn FnOnce() + Send>| {
            let panicking = Arc::clone(&shared);
            thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    let fate = faults::fate(name);
                    // State that a panic left half done is not read afterwards.
                    let work = std::panic::AssertUnwindSafe(|| match fate {
                        None => work(),
                        Some(Fate::End) => {}
                        Some(Fate::Panic) => panic!("a deliberate fault"),
                    });
                    let panicked = std::panic::catch_unwind(work).is_err();
                    if panicked || !panicking.incoming.is_closed() {
                        let how = if panicked {
                            "panicked"
                        } else {
                            "ended without being asked to"
                        };
                        let reason = format!("the thread {name} {how}");
                        (panicking.parts.on_end)(reason.clone());
                        panicking.fail(reason);
                    }
                })
                .map(|thread| threads.push(thread))
        };
        let forgetting = Arc::clone(&shared);
        spawn("log-spans", Box::new(move || forgetting.log.maintain()))?;
        let reading = Arc::clone(&shared);
        spawn("log-reader", Box::new(move || read_back(&reading)))?;
        let appending = Arc::clone(&shared);
        spawn(
            "log-append",
            Box::new(move || {
                let backoff = Backoff::new(RETRY.0, RETRY.1);
                Appender::new(appending, writer, next_sequence, backoff).run();
            }),
        )?;
        Ok(LoggedQueue {
            shared,
            threads: Mutex::new(threads),
        })
    }

    /// Stops the threads. Returns orders that were appended but never written; none was
    /// acknowledged.
    pub fn stop(&self) -> Vec<Arc<PendingOrder>> {
        self.close();
        self.leave_backlog();
        self.shared.log.stop();
        for thread in self.threads.lock().drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the queue panicked");
            }
        }
        let mut left = std::mem::take(&mut *self.shared.never_written.lock());
        while let Some(incoming) = self.shared.incoming.pop() {
            if let Incoming::Order(order, _) = incoming {
                left.push(order);
            }
        }
        left
    }
}

impl OrderQueue for LoggedQueue {
    fn durability(&self) -> Durability {
        self.shared.log.durability()
    }

    fn durable(&self) -> Option<&dyn DurableQueue> {
        Some(self)
    }

    fn push(&self, order: Arc<PendingOrder>) -> Result<(), Rejected> {
        if self.shared.incoming.is_closed() {
            return Err(Rejected {
                order,
                closed: true,
            });
        }
        self.shared.ring.push(order)?;
        self.shared.linger.press();
        Ok(())
    }

    fn take(&self, max: usize) -> Pin<Box<dyn Future<Output = Option<Batch>> + Send + '_>> {
        self.shared.linger.clear();
        self.shared.ring.take(max)
    }

    fn until_pressing(&self, enough: usize) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            // Of a backlog in the log no more is ever in memory.
            let enough = enough.min(self.shared.read_back_max());
            if self.shared.ring.depth() < enough {
                self.shared.linger.until_pressing(enough).await;
            }
        })
    }

    fn is_full(&self) -> bool {
        self.shared.ring.is_full()
    }

    fn depth(&self) -> usize {
        self.shared.ring.depth() + self.shared.incoming.len() + self.shared.spill.orders()
    }

    fn ahead(&self) -> usize {
        // Orders that wait on the disk or for their sync come after an order that is pushed now.
        self.shared.ring.depth()
    }

    fn close(&self) {
        self.shared.incoming.close();
        self.shared.linger.press();
        self.shared.wake_reader();
    }
}

impl DurableQueue for LoggedQueue {
    fn reserve(&self, attributes: Option<&str>) -> Result<Permit, NotDurable> {
        let shared = &self.shared;
        if shared.failure.get().is_some() {
            return Err(NotDurable::Failed);
        }
        if !(shared.parts.may_acknowledge)() {
            return Err(NotDurable::NoLease);
        }
        if shared.is_away.load(Ordering::Acquire) {
            return Err(NotDurable::Away);
        }
        if shared.incoming.is_full() {
            return Err(NotDurable::Busy);
        }
        let permit = shared.log.reserve(order_bytes(attributes));
        permit.ok_or_else(|| {
            if shared.log.is_full() {
                NotDurable::Full
            } else {
                NotDurable::Busy
            }
        })
    }

    fn append(&self, order: Arc<PendingOrder>, permit: Permit) -> Result<(), Rejected> {
        let shared = &self.shared;
        if shared.incoming.is_closed() {
            return Err(Rejected {
                order,
                closed: true,
            });
        }
        if let Err(Incoming::Order(order, _)) = shared.incoming.push(Incoming::Order(order, permit))
        {
            return Err(Rejected {
                order,
                closed: false,
            });
        }
        Ok(())
    }

    fn may_acknowledge(&self) -> bool {
        (self.shared.parts.may_acknowledge)()
    }

    fn settled(&self, orders: &[Arc<PendingOrder>]) {
        let mut by_span: Vec<(u64, u64)> = Vec::new();
        for order in orders {
            let span = order.slot.span();
            if span == 0 {
                continue;
            }
            match by_span.iter_mut().find(|(number, _)| *number == span) {
                Some((_, count)) => *count += 1,
                None => by_span.push((span, 1)),
            }
        }
        if !by_span.is_empty() {
            self.shared.log.settled(&by_span);
        }
    }

    fn may_hold(&self, id: OrderId) -> bool {
        self.shared.spill.may_hold(id)
    }

    fn find(&self, id: OrderId) -> io::Result<Option<Order>> {
        self.shared.spill.find(&*self.shared.log, id)
    }

    fn lease_ids(&self, until: UnixMillis) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(async move {
            let Some(permit) = self.shared.log.reserve(0) else {
                return false;
            };
            let (done, heard) = tokio::sync::oneshot::channel();
            let lease = Incoming::Lease(until, permit, done);
            if self.shared.failure.get().is_some() || self.shared.incoming.push(lease).is_err() {
                return false;
            }
            // A late success does no harm, and the caller must not wait long for a log.
            match tokio::time::timeout(LEASE_PATIENCE, heard).await {
                Ok(heard) => heard.unwrap_or(false),
                Err(_) => false,
            }
        })
    }

    fn title(&self) -> String {
        self.shared.log.title()
    }

    fn failure(&self) -> Option<String> {
        self.shared.failure.get().cloned()
    }

    fn away(&self) -> Option<String> {
        self.shared.away()
    }

    fn bytes(&self) -> u64 {
        self.shared.log.bytes()
    }

    fn spilled(&self) -> usize {
        self.shared.spill.orders()
    }

    fn outstanding(&self) -> u64 {
        self.shared.log.outstanding()
    }

    fn settled_up_to(&self) -> u64 {
        self.shared.log.settled_up_to()
    }

    fn position_of(&self, span: u64) -> Option<Position> {
        self.shared.log.position_of(span)
    }

    fn note(&self, span: u64) {
        self.shared.log.note(span);
    }

    fn last_position(&self) -> Option<Position> {
        self.shared.log.last_position()
    }

    fn confirm(&self, span: u64) {
        self.shared.log.confirm(span);
    }

    fn read_all(&self, each: &mut dyn FnMut(Order)) -> io::Result<()> {
        self.shared.log.read_all(&mut |span, place, records| {
            let in_memory = self.shared.spill.in_memory_of(span, place);
            for record in records.into_iter().take(in_memory.unwrap_or(usize::MAX)) {
                if let Record::Order(order) = record {
                    each(*order);
                }
            }
        })
    }

    fn look(&self) {
        if self.durability() == Durability::Broker {
            self.shared.look_is_due.store(true, Ordering::Release);
            self.shared.incoming.wake();
        }
    }

    fn leave_backlog(&self) {
        self.shared.cut.store(true, Ordering::Release);
        self.shared.wake_reader();
    }

    fn erase(&self) -> io::Result<()> {
        self.shared.log.erase()
    }

    fn stop(&self) -> Vec<Arc<PendingOrder>> {
        LoggedQueue::stop(self)
    }
}

impl fmt::Debug for LoggedQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoggedQueue")
            .field("depth", &self.depth())
            .field("spilled", &self.spilled())
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}

impl Drop for LoggedQueue {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}
