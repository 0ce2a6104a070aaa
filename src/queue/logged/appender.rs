//! The writing thread: gathers a group, appends it, acknowledges it, and passes it to the workers.

use std::collections::VecDeque;
use std::sync::Arc;

use super::shared::{Incoming, Shared};
use super::spill::Waiting;
use crate::backoff::Backoff;
use crate::clock;
use crate::faults::{bug, crash_point};
use crate::queue::log::record::{GroupBytes, order_bytes};
use crate::queue::log::{AppendError, GroupAt, LogWriter, Permit};
use crate::queue::{OrderQueue, Rejected, RingQueue};
use crate::state::pending::{PendingOrder, SlotState};
use crate::sync::{Ordering, thread};

/// Longest record of a lease, in bytes.
const LEASE_BYTES: usize = 64;

/// The writing thread's state.
pub(super) struct Appender {
    shared: Arc<Shared>,
    writer: Box<dyn LogWriter>,
    next_sequence: u64,
    group: GroupBytes,
    /// Room of the group, in bytes.
    room: usize,
    /// Orders of the group.
    orders: Vec<(Arc<PendingOrder>, Permit)>,
    /// Who waits for the lease that is the group.
    lease: Option<(tokio::sync::oneshot::Sender<bool>, Permit)>,
    /// Items that are gathered before those of `incoming`, the next one last: an item that did not fit into the
    /// group, and orders of a group that the log did not take.
    held_back: Vec<Incoming>,
    backoff: Backoff,
    /// When the group was sent first, by the clock of the contact.
    sent_at_ms: Option<u64>,
}

/// What a step of the thread came to.
enum Step {
    Next,
    Ended,
}

impl Appender {
    pub(super) fn new(
        shared: Arc<Shared>,
        writer: Box<dyn LogWriter>,
        next_sequence: u64,
        backoff: Backoff,
    ) -> Self {
        Appender {
            shared,
            writer,
            next_sequence,
            group: GroupBytes::default(),
            room: 0,
            orders: Vec::new(),
            lease: None,
            held_back: Vec::new(),
            backoff,
            sent_at_ms: None,
        }
    }

    pub(super) fn run(mut self) {
        self.shared.incoming.listen();
        while matches!(self.step(), Step::Next) {}
    }

    /// Appends one group.
    fn step(&mut self) -> Step {
        let shared = Arc::clone(&self.shared);
        if shared.failure.get().is_some() {
            return self.pass_on();
        }
        if let Step::Ended = self.gather() {
            return Step::Ended;
        }
        if self.group.is_empty() {
            if shared.is_away.load(Ordering::Acquire) {
                return match self.pause() {
                    Step::Next => self.ask(|writer| writer.probe().map(|()| true)),
                    Step::Ended => Step::Ended,
                };
            }
            if shared.look_is_due.load(Ordering::Acquire) {
                return self.ask(|writer| writer.look());
            }
            return next_if(shared.incoming.wait());
        }
        if bug("ack_before_sync") {
            self.acknowledge_early();
        }
        match self.append() {
            Ok(at) => {
                self.appended();
                self.hand_over(&at);
                Step::Next
            }
            Err(AppendError::NotNow(reason)) => {
                shared.set_away(reason);
                self.take_back();
                self.pause()
            }
            Err(AppendError::Unknown(reason)) => {
                shared.parts.metrics.log_unknown.inc();
                shared.set_away(reason);
                self.settle_doubt()
            }
            Err(AppendError::Final(reason)) => {
                shared.fail(reason);
                Step::Next
            }
        }
    }

    /// Asks a log whether it is there and whole; `false` if there is more to ask. Groups that come meanwhile go before that. While
    /// the log is away nobody is let in.
    fn ask(
        &mut self,
        question: impl FnOnce(&mut dyn LogWriter) -> Result<bool, AppendError>,
    ) -> Step {
        let shared = Arc::clone(&self.shared);
        if shared.incoming.is_closed() && shared.incoming.len() == 0 {
            return Step::Ended;
        }
        match question(&mut *self.writer) {
            Ok(false) => return Step::Next,
            Ok(true) => {
                self.backoff.reset();
                shared.set_back();
            }
            Err(AppendError::NotNow(reason) | AppendError::Unknown(reason)) => {
                shared.set_away(reason)
            }
            Err(AppendError::Final(reason)) => shared.fail(reason),
        }
        shared.look_is_due.store(false, Ordering::Release);
        Step::Next
    }

    /// Gathers a group from the items that came during the last append.
    fn gather(&mut self) -> Step {
        self.group
            .begin(self.shared.parts.epoch, self.next_sequence);
        while let Some(incoming) = self.held_back.pop().or_else(|| self.shared.incoming.pop()) {
            let bytes = match &incoming {
                Incoming::Order(order, _) => order_bytes(order.order.attributes.as_deref()),
                Incoming::Lease(..) => LEASE_BYTES,
            };
            if self.group.is_empty() {
                let head = self.group.as_bytes().len();
                match self.writer.room(head + bytes) {
                    Some(room) => self.room = room,
                    None => {
                        self.held_back.push(incoming);
                        return Step::Ended;
                    }
                }
            }
            // A lease makes a group of its own, so that a group holds either orders or one lease.
            let alone = matches!(incoming, Incoming::Lease(..));
            if !self.group.fits(bytes, self.room) || (alone && !self.group.is_empty()) {
                self.held_back.push(incoming);
                break;
            }
            match incoming {
                Incoming::Order(order, permit) => {
                    // An order whose deadline has passed meanwhile is left out.
                    if order.slot.send() {
                        self.group.push_order(&order.order);
                        self.orders.push((order, permit));
                    }
                }
                Incoming::Lease(until, permit, done) => {
                    self.group.push_lease(until);
                    self.lease = Some((done, permit));
                    break;
                }
            }
        }
        Step::Next
    }

    /// Appends the group that is gathered.
    fn append(&mut self) -> Result<GroupAt, AppendError> {
        let leased = self.lease.iter().map(|(_, permit)| permit);
        let permits = self.orders.iter().map(|(_, permit)| permit).chain(leased);
        let reserved = permits.map(Permit::sectors).sum();
        let started = clock::now();
        if let Some(contact) = &self.shared.parts.contact {
            self.sent_at_ms.get_or_insert_with(contact.now_ms);
        }
        let appended = self.writer.append(&self.group.group(), reserved);
        let metrics = &self.shared.parts.metrics;
        metrics
            .journal_sync_seconds
            .observe(clock::since(started).as_secs_f64());
        appended
    }

    /// The group is durable.
    fn appended(&mut self) {
        let group = self.group.group();
        self.next_sequence += u64::from(group.records);
        let metrics = &self.shared.parts.metrics;
        metrics.journal_groups.inc();
        metrics.journal_orders.inc_by(group.orders.into());
        self.backoff.reset();
        self.shared.set_back();
        if let (Some(contact), Some(sent_at_ms)) =
            (&self.shared.parts.contact, self.sent_at_ms.take())
        {
            (contact.note)(sent_at_ms);
        }
        if let Some((done, permit)) = self.lease.take() {
            permit.spend();
            let _ = done.send(true);
        }
    }

    fn acknowledge_early(&self) {
        let span = self.writer.span();
        let mut wakers = Vec::new();
        for (order, _) in &self.orders {
            if order.slot.state() == SlotState::Appending {
                order.slot.appended(span, true);
            }
            order.slot.take_wakers(|waker| wakers.push(waker));
        }
        (self.shared.parts.wake_all)(wakers);
    }

    /// Acknowledges a group and passes it to the workers, or leaves it in the log.
    fn hand_over(&mut self, at: &GroupAt) {
        let shared = &self.shared;
        let may = (shared.parts.may_acknowledge)();
        let mut wakers = Vec::with_capacity(self.orders.len());
        for (order, _) in &self.orders {
            if !bug("ack_before_sync") {
                // If another process has taken over meanwhile, nothing is acknowledged: the order
                // continues as a waiting one and fails at the fencing token.
                order.slot.appended(at.span, may);
            }
            order.slot.take_wakers(|waker| wakers.push(waker));
        }
        (shared.parts.wake_all)(wakers);
        crash_point("journal.acknowledged");
        let mut rest: VecDeque<_> = self
            .orders
            .drain(..)
            .map(|(order, permit)| {
                permit.spend();
                order
            })
            .collect();
        let count = rest.len();
        if shared.spill.orders() == 0 {
            push_what_fits(&shared.ring, &mut rest);
            shared.linger.holds(shared.ring.depth());
        }
        self.leave_in_log(at, count, rest, may);
    }

    /// Leaves the last orders of a group of `count` in the log, where the reader finds them. `told`: their senders
    /// have their answer.
    fn leave_in_log(
        &self,
        at: &GroupAt,
        count: usize,
        rest: VecDeque<Arc<PendingOrder>>,
        told: bool,
    ) {
        if rest.is_empty() {
            return;
        }
        let shared = &self.shared;
        shared.parts.pending.spilled(rest.len());
        shared.spill.push(Waiting {
            at: *at,
            skip: count - rest.len(),
        });
        let mut wakers = Vec::new();
        for order in rest {
            if order.slot.spill() {
                // The reader may have brought the order back already.
                shared.parts.pending.remove_this(&order);
                if told {
                    order.slot.take_others(|waker| wakers.push(waker));
                } else {
                    order.slot.take_wakers(|waker| wakers.push(waker));
                }
            }
        }
        (shared.parts.wake_all)(wakers);
        shared.wake_reader();
    }

    /// The log has certainly not taken the group: its orders are gathered again, unless their deadlines pass.
    fn take_back(&mut self) {
        self.sent_at_ms = None;
        if let Some((done, _permit)) = self.lease.take() {
            let _ = done.send(false);
        }
        for (order, permit) in self.orders.drain(..).rev() {
            order.slot.not_sent();
            self.held_back.push(Incoming::Order(order, permit));
        }
    }

    /// It is unknown whether the log has the group. Its orders continue as waiting ones, because a restart may
    /// find them. Nothing else is appended until the same group is there for certain. A full ring does not hold that up:
    /// orders without room stay in the log.
    fn settle_doubt(&mut self) -> Step {
        let shared = Arc::clone(&self.shared);
        let span = self.writer.span();
        let orders: Vec<_> = self
            .orders
            .iter()
            .map(|(order, _)| (Arc::clone(order), span))
            .collect();
        let count = orders.len();
        let mut rest = self.mark_as_waiting(orders.into_iter());
        loop {
            push_what_fits(&shared.ring, &mut rest);
            if let Step::Ended = self.pause() {
                return Step::Ended;
            }
            match self.append() {
                Ok(at) => {
                    self.appended();
                    let settled = self.orders.drain(..);
                    settled.for_each(|(_, permit)| _ = permit.spend());
                    self.leave_in_log(&at, count, rest, false);
                    return Step::Next;
                }
                // Once unknown, only presence decides: that this attempt came to nothing says nothing about
                // those before.
                Err(AppendError::NotNow(reason) | AppendError::Unknown(reason)) => {
                    shared.set_away(reason);
                }
                Err(AppendError::Final(reason)) => {
                    shared.fail(reason);
                    // Passed on here.
                    self.orders.clear();
                    return next_if(rest.into_iter().all(|order| shared.push_or_wait(order)));
                }
            }
        }
    }

    /// Waits before the next attempt. The queue's end is waited for as long as an attempt may take.
    fn pause(&mut self) -> Step {
        let until = clock::now() + self.backoff.pause();
        while let Some(left) = until.checked_duration_since(clock::now()) {
            if self.shared.cut.load(Ordering::Acquire) {
                return Step::Ended;
            }
            thread::park_timeout(left.min(super::shared::ROOM_TICK * 10));
        }
        Step::Next
    }

    /// After a failure: treats every order as a waiting one and appends nothing more. The failed
    /// group may be in the log, so its orders must be written too.
    fn pass_on(&mut self) -> Step {
        let shared = Arc::clone(&self.shared);
        self.lease = None;
        // The orders gathered here are the failed group.
        let span = self.writer.span();
        let in_doubt = self.orders.drain(..).map(|(order, _)| (order, span));
        let mut orders: Vec<_> = in_doubt.collect();
        let held_back = std::mem::take(&mut self.held_back).into_iter().rev();
        let later = held_back.chain(std::iter::from_fn(|| shared.incoming.pop()));
        orders.extend(later.filter_map(|incoming| match incoming {
            Incoming::Order(order, _permit) => order.slot.send().then_some((order, 0)),
            Incoming::Lease(..) => None,
        }));
        if orders.is_empty() {
            return next_if(shared.incoming.wait());
        }
        let mut orders = self.mark_as_waiting(orders.into_iter()).into_iter();
        next_if(orders.all(|order| shared.push_or_wait(order)))
    }

    /// Marks orders as not acknowledged, each with the span that may have its record, and wakes their senders.
    fn mark_as_waiting(
        &self,
        orders: impl Iterator<Item = (Arc<PendingOrder>, u64)>,
    ) -> VecDeque<Arc<PendingOrder>> {
        let mut wakers = Vec::new();
        let orders = orders
            .map(|(order, span)| {
                order.slot.appended(span, false);
                order.slot.take_wakers(|waker| wakers.push(waker));
                order
            })
            .collect();
        (self.shared.parts.wake_all)(wakers);
        orders
    }
}

/// Pushes orders into the ring, in order, as long as it has room.
fn push_what_fits(ring: &RingQueue, orders: &mut VecDeque<Arc<PendingOrder>>) {
    while let Some(order) = orders.pop_front() {
        if let Err(Rejected { order, .. }) = ring.push(order) {
            return orders.push_front(order);
        }
    }
}

fn next_if(goes_on: bool) -> Step {
    if goes_on { Step::Next } else { Step::Ended }
}

impl Drop for Appender {
    /// Runs after a panic too: the reader ends the queue.
    fn drop(&mut self) {
        for incoming in self.held_back.drain(..) {
            if let Incoming::Order(order, _) = incoming {
                self.shared.never_written.lock().push(order);
            }
        }
        self.shared.appender_ended.store(true, Ordering::Release);
        self.shared.wake_reader();
    }
}
