//! The queue over the journal: the ways of an order to the appender, the workers and the disk.
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
//! The appender takes the orders that gathered during its last sync: a single order costs one sync,
//! a flood shares them. While the spill is not empty, newer orders go to the disk too, which keeps
//! the queue in order.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::appender::Appender;
use super::mpsc::MpscQueue;
use super::reader::read_back;
use super::record::{GROUP_HEAD, Record, order_bytes};
use super::sector::sectors_of;
use super::segments::Segments;
use super::shared::{Incoming, JournalParts, Shared};
use super::space::Permit;
use super::spill::Spill;
use super::writer::Writer;
use super::{JournalError, Opened};
use crate::faults::{self, Fate};
use crate::order::{Order, OrderId, UnixMillis};
use crate::queue::{Batch, Durability, DurableQueue, NotDurable, OrderQueue, Rejected, RingQueue};
use crate::state::pending::PendingOrder;
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{AtomicBool, Mutex, OnceLock, Ordering};

/// Time limit for writing a lease on order ids.
const LEASE_PATIENCE: Duration = Duration::from_secs(3);
/// `queue.backend = "journal"`.
pub struct JournalQueue {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl JournalQueue {
    /// Starts a journal whose orders have all been replayed. Its old segments are deleted as soon
    /// as permitted.
    ///
    /// # Errors
    /// If its first segment cannot be created, or a thread cannot be started.
    pub fn start(opened: Opened, parts: JournalParts) -> Result<Self, JournalError> {
        let Opened {
            disk,
            identity,
            scanned,
        } = opened;
        let segments_max = (parts.bytes_max / identity.segment_bytes) as usize;
        let (segments, first) = Segments::new(
            disk,
            identity,
            &scanned.segments,
            segments_max,
            parts.retain,
        )
        .map_err(JournalError::io("making the journal's first segment"))?;
        let writer = Writer::new(
            first,
            identity.sectors(),
            super::recovery::session(scanned.last_group) + 1,
            scanned.last_sequence + 1,
            parts.epoch,
        );
        let shared = Arc::new(Shared {
            ring: RingQueue::new(parts.capacity),
            capacity: parts.capacity,
            incoming: MpscQueue::new(parts.capacity),
            spill: Spill::default(),
            reader: OnceLock::new(),
            segments,
            parts,
            appender_ended: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            never_written: Mutex::default(),
            failure: OnceLock::new(),
        });
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
                .map_err(JournalError::io("starting a thread of the journal"))
        };
        let deleting = Arc::clone(&shared);
        spawn("journal-segment", Box::new(move || deleting.segments.run()))?;
        let reading = Arc::clone(&shared);
        spawn("journal-reader", Box::new(move || read_back(&reading)))?;
        let appending = Arc::clone(&shared);
        spawn(
            "journal-append",
            Box::new(move || Appender::new(appending, writer).run()),
        )?;
        Ok(JournalQueue {
            shared,
            threads: Mutex::new(threads),
        })
    }

    /// Writes a lease on order ids, for use while the database is unreachable. True: it is durable.
    pub async fn lease_ids(&self, until: UnixMillis) -> bool {
        let Some(permit) = self.shared.segments.space.take(1) else {
            return false;
        };
        let (done, heard) = tokio::sync::oneshot::channel();
        let lease = Incoming::Lease(until, permit, done);
        if self.shared.failure.get().is_some() || self.shared.incoming.push(lease).is_err() {
            return false;
        }
        // A late success does no harm, and the caller must not wait long for a disk.
        match tokio::time::timeout(LEASE_PATIENCE, heard).await {
            Ok(heard) => heard.unwrap_or(false),
            Err(_) => false,
        }
    }

    /// The reason why the journal stopped acknowledging, if it did.
    pub fn failure(&self) -> Option<&str> {
        self.shared.failure.get().map(String::as_str)
    }

    /// Bytes of its segments on the disk.
    pub fn bytes(&self) -> u64 {
        self.shared.segments.bytes()
    }

    /// Orders that wait on the disk instead of in memory.
    pub fn spilled(&self) -> usize {
        self.shared.spill.orders()
    }

    /// Orders that are not yet settled in the database.
    pub fn outstanding(&self) -> u64 {
        let segments = self.shared.segments.segments();
        segments.iter().map(|segment| segment.outstanding()).sum()
    }

    /// Number of the newest segment of which every order is settled, with all segments before it.
    pub fn settled_up_to(&self) -> u64 {
        let segments = self.shared.segments.segments();
        segments
            .iter()
            .take_while(|segment| segment.is_done())
            .last()
            .map_or(0, |segment| segment.number)
    }

    /// Permits deletion of segments up to `number`, if the journal retains them.
    pub fn confirm(&self, number: u64) {
        self.shared.segments.confirm(number);
    }

    /// Passes every order still in the journal to `each`, oldest first, from this process and
    /// earlier ones. Excluded are orders that wait on the disk: they are yet to be written.
    ///
    /// # Errors
    /// If the disk fails or the content is damaged.
    pub fn read_all(&self, each: &mut dyn FnMut(Order)) -> Result<(), JournalError> {
        let segments = self.shared.segments.segments();
        super::recovery::read_segments(&segments, |segment, place, records| {
            let in_memory = self.shared.spill.in_memory_of(segment, place);
            for record in records.into_iter().take(in_memory.unwrap_or(usize::MAX)) {
                if let Record::Order(order) = record {
                    each(*order);
                }
            }
        })
    }

    /// Leaves orders that wait on the disk to the next process: the queue ends once the orders in
    /// memory are taken.
    pub fn leave_backlog(&self) {
        self.shared.cut.store(true, Ordering::Release);
        self.shared.wake_reader();
    }

    /// Deletes all segments after [`JournalQueue::stop`], once every order is settled: another
    /// journal may then take its place.
    ///
    /// # Errors
    /// If the disk fails. The remaining segments are a sound journal.
    pub fn erase(&self) -> io::Result<()> {
        self.shared.segments.erase()
    }

    /// Stops the threads. Returns orders that were appended but never written; none was
    /// acknowledged.
    pub fn stop(&self) -> Vec<Arc<PendingOrder>> {
        self.close();
        self.leave_backlog();
        self.shared.segments.stop();
        for thread in self.threads.lock().drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the journal panicked");
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

impl OrderQueue for JournalQueue {
    fn durability(&self) -> Durability {
        Durability::Machine
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
        self.shared.ring.push(order)
    }

    fn take(&self, max: usize) -> Pin<Box<dyn Future<Output = Option<Batch>> + Send + '_>> {
        self.shared.ring.take(max)
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
        self.shared.wake_reader();
    }
}

impl DurableQueue for JournalQueue {
    fn reserve(&self, attributes: Option<&str>) -> Result<Permit, NotDurable> {
        let shared = &self.shared;
        if shared.failure.get().is_some() {
            return Err(NotDurable::Failed);
        }
        if !(shared.parts.may_acknowledge)() {
            return Err(NotDurable::NoLease);
        }
        if shared.incoming.is_full() {
            return Err(NotDurable::Busy);
        }
        let sectors = sectors_of(GROUP_HEAD + order_bytes(attributes)) as u32;
        let permit = shared.segments.space.take(sectors);
        permit.ok_or_else(|| {
            if shared.segments.is_full() {
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
        let mut by_segment: Vec<(u64, u64)> = Vec::new();
        for order in orders {
            let segment = order.slot.segment();
            if segment == 0 {
                continue;
            }
            match by_segment.iter_mut().find(|(number, _)| *number == segment) {
                Some((_, count)) => *count += 1,
                None => by_segment.push((segment, 1)),
            }
        }
        if !by_segment.is_empty() {
            self.shared.segments.settled(&by_segment);
        }
    }

    fn may_hold(&self, id: OrderId) -> bool {
        self.shared.spill.may_hold(id)
    }

    fn find(&self, id: OrderId) -> io::Result<Option<Order>> {
        self.shared.spill.find(id)
    }
}

impl fmt::Debug for JournalQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JournalQueue")
            .field("depth", &self.depth())
            .field("spilled", &self.spilled())
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}

impl Drop for JournalQueue {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}
