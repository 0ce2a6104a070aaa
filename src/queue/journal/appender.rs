//! The writing thread: gathers a group, syncs it, acknowledges it, and passes it to the workers.

use std::sync::Arc;
use std::time::Instant;

use super::record::order_bytes;
use super::segment::GroupAt;
use super::shared::{Incoming, Shared};
use super::spill::Waiting;
use super::writer::Writer;
use crate::faults::{bug, crash_point};
use crate::queue::{OrderQueue, Rejected};
use crate::state::pending::{PendingOrder, SlotState};
use crate::sync::Ordering;

/// The writing thread's state.
pub(super) struct Appender {
    shared: Arc<Shared>,
    writer: Writer,
    /// Orders of the group being gathered.
    orders: Vec<Arc<PendingOrder>>,
    /// Sectors reserved for them.
    reserved: i64,
    /// An item from `incoming` that did not fit into the group.
    held_back: Option<Incoming>,
}

impl Appender {
    pub(super) fn new(shared: Arc<Shared>, writer: Writer) -> Self {
        Appender {
            shared,
            writer,
            orders: Vec::new(),
            reserved: 0,
            held_back: None,
        }
    }

    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        shared.incoming.listen();
        while self.step() {}
    }

    /// Writes one group. False: the queue has ended.
    fn step(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        if shared.failure.get().is_some() {
            return self.pass_on();
        }
        let mut lease = None;
        while let Some(incoming) = self.held_back.take().or_else(|| shared.incoming.pop()) {
            match incoming {
                Incoming::Order(order, permit) => {
                    if !self
                        .writer
                        .fits(order_bytes(order.order.attributes.as_deref()))
                    {
                        self.held_back = Some(Incoming::Order(order, permit));
                        break;
                    }
                    self.writer.push_order(&order.order);
                    self.reserved += i64::from(permit.spend());
                    self.orders.push(order);
                }
                // A lease makes a group of its own, so that a group holds either orders or one
                // lease.
                Incoming::Lease(..) if !self.writer.is_empty() => {
                    self.held_back = Some(incoming);
                    break;
                }
                Incoming::Lease(until, permit, done) => {
                    if !self.writer.fits(64) {
                        self.held_back = Some(Incoming::Lease(until, permit, done));
                        break;
                    }
                    self.writer.push_lease(until);
                    self.reserved += i64::from(permit.spend());
                    lease = Some(done);
                    break;
                }
            }
        }
        if self.writer.is_empty() {
            if self.held_back.is_some() {
                return self.rotate();
            }
            return shared.incoming.wait();
        }
        if bug("ack_before_sync") {
            self.acknowledge_early();
        }
        let started = Instant::now();
        let written = self.writer.commit(self.orders.len() as u64);
        let metrics = &shared.parts.metrics;
        metrics
            .journal_sync_seconds
            .observe(started.elapsed().as_secs_f64());
        match written {
            Ok(at) => {
                metrics.journal_groups.inc();
                metrics.journal_orders.inc_by(self.orders.len() as u64);
                shared
                    .segments
                    .space
                    .give(self.reserved - i64::from(at.sectors));
                self.reserved = 0;
                if let Some(done) = lease {
                    let _ = done.send(true);
                }
                self.hand_over(&at);
                true
            }
            Err(error) => {
                let segment = self.writer.segment().number;
                shared.fail(format!("{}: {error}", super::segment::file_name(segment)));
                true
            }
        }
    }

    fn acknowledge_early(&self) {
        let segment = self.writer.segment().number;
        let mut wakers = Vec::new();
        for order in &self.orders {
            if order.slot.state() == SlotState::Appending {
                order.slot.appended(segment, true);
            }
            order.slot.take_wakers(|waker| wakers.push(waker));
        }
        (self.shared.parts.wake_all)(wakers);
    }

    fn rotate(&mut self) -> bool {
        let left = self.writer.sectors_left();
        match self.shared.segments.next(left) {
            Some(segment) => {
                self.writer.rotate(segment);
                // Every order of the previous segment may be settled already.
                self.shared.segments.look();
                true
            }
            None => false,
        }
    }

    /// Acknowledges a group and passes it to the workers, or leaves it on the disk.
    fn hand_over(&mut self, at: &GroupAt) {
        let shared = &self.shared;
        let segment = at.segment.number;
        let may = (shared.parts.may_acknowledge)();
        let mut wakers = Vec::with_capacity(self.orders.len());
        for order in &self.orders {
            if !bug("ack_before_sync") {
                // If another process has taken over meanwhile, nothing is acknowledged: the order
                // continues as a waiting one and fails at the fencing token.
                order.slot.appended(segment, may);
            }
            order.slot.take_wakers(|waker| wakers.push(waker));
        }
        (shared.parts.wake_all)(wakers);
        crash_point("journal.acknowledged");
        let count = self.orders.len();
        let mut orders = self.orders.drain(..);
        let mut rest = None;
        let mut kept = 0;
        if shared.spill.orders() == 0 {
            for order in orders.by_ref() {
                match shared.ring.push(order) {
                    Ok(()) => kept += 1,
                    Err(Rejected { order, .. }) => {
                        rest = Some(order);
                        break;
                    }
                }
            }
        }
        if kept == count {
            return;
        }
        // The rest of this group, and every later one, waits on the disk.
        shared.parts.pending.spilled(count - kept);
        shared.spill.push(Waiting {
            at: at.clone(),
            skip: kept,
        });
        let mut wakers = Vec::new();
        for order in rest.into_iter().chain(orders) {
            if order.slot.spill() {
                // The reader may have brought the order back already.
                shared.parts.pending.remove_this(&order);
                // The sender has its answer already, unless nothing may be acknowledged.
                if may {
                    order.slot.take_others(|waker| wakers.push(waker));
                } else {
                    order.slot.take_wakers(|waker| wakers.push(waker));
                }
            }
        }
        (shared.parts.wake_all)(wakers);
        shared.wake_reader();
    }

    /// After a failure: treats every order as a waiting one and appends nothing more. The failed
    /// group may be on the disk, so its orders must be written too. False: the queue has ended.
    fn pass_on(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        // The orders gathered here are the failed group.
        let segment = self.writer.segment().number;
        let in_doubt = self.orders.drain(..).map(|order| (order, segment));
        let mut orders: Vec<_> = in_doubt.collect();
        let held_back = self.held_back.take().into_iter();
        let later = held_back.chain(std::iter::from_fn(|| shared.incoming.pop()));
        orders.extend(later.filter_map(|incoming| match incoming {
            Incoming::Order(order, _permit) => Some((order, 0)),
            Incoming::Lease(..) => None,
        }));
        if orders.is_empty() {
            return shared.incoming.wait();
        }
        let mut wakers = Vec::new();
        for (order, segment) in &orders {
            order.slot.appended(*segment, false);
            order.slot.take_wakers(|waker| wakers.push(waker));
        }
        (shared.parts.wake_all)(wakers);
        orders
            .into_iter()
            .all(|(order, _)| shared.push_or_wait(order))
    }
}

impl Drop for Appender {
    /// Runs after a panic too: the reader ends the queue.
    fn drop(&mut self) {
        if let Some(Incoming::Order(order, _)) = self.held_back.take() {
            self.shared.never_written.lock().push(order);
        }
        self.shared.appender_ended.store(true, Ordering::Release);
        self.shared.wake_reader();
    }
}
