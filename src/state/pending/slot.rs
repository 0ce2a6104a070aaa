//! The slot of one order in flight: one compare-and-swap decides between worker and deadline.
//!
//! ```text
//!   Appending ──────────────────► Abandoned
//!      │ append     abandon         ▲
//!      ▼  (deadline, unless recorded) │
//!   Waiting ────────────────────────┘
//!      │    ╲ spill (appender)
//!      │     ╲───────────────────────────────► OnDisk
//!      │ claim (worker)                           ▲ settle (worker, at shutdown, parked)
//!      ▼             settle (worker)              │
//!   Claimed ──────────────────────────────────────┴─ Persisted │ Failed │ Unwritten
//! ```
//!
//! A worker claims an order before it writes it; the deadline abandons an unclaimed one. Both are a
//! compare-and-swap from `Waiting`, so exactly one wins: an abandoned order is never written, and a
//! claimed order is settled by its worker.
//!
//! An order that is to be acknowledged early begins in `Appending`. Once a log may have its record,
//! the order is *recorded*: it can no longer be abandoned, because a restart would write it. Once the
//! log has confirmed the record, the order is *durable* and may be acknowledged.
//!
//! `tests/loom.rs` compiles this file against loom's primitives and explores every interleaving.

use std::sync::Arc;

use crate::sync::{AtomicU64, Guarded, Ordering, Waker};

/// State of an order in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// On the way into a log. It is not known yet whether the record got there.
    Appending,
    /// In the queue and unclaimed.
    Waiting,
    /// A worker is writing it. It is not known yet whether the row is committed.
    Claimed,
    /// The deadline came first. The order is not and will not be written; its stock is released.
    Abandoned,
    /// Its row is committed.
    Persisted,
    /// The database refused its row; a dead letter is committed and its stock is released.
    Failed,
    /// Claimed but not written, because the process stopped or the database refuses its SKU's
    /// counters. There is no row, and its stock is released.
    Unwritten,
    /// Durable in the log or parked in the database, and no longer in memory. Waiting requests
    /// look the order up again.
    OnDisk,
}

impl SlotState {
    /// Whether the state is final.
    pub fn is_final(self) -> bool {
        !matches!(
            self,
            SlotState::Appending | SlotState::Waiting | SlotState::Claimed
        )
    }

    fn from_bits(bits: u64) -> Self {
        match bits & STATE {
            0 => SlotState::Waiting,
            1 => SlotState::Claimed,
            2 => SlotState::Abandoned,
            3 => SlotState::Persisted,
            4 => SlotState::Failed,
            5 => SlotState::Unwritten,
            APPENDING => SlotState::Appending,
            _ => SlotState::OnDisk,
        }
    }
}

/// The outcome that a worker gives a claimed order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The row is committed.
    Persisted = 3,
    /// The database refused the row.
    Failed = 4,
    /// The order was given up unwritten.
    Unwritten = 5,
    /// The order is left to the next process: in the log at shutdown, or parked in the
    /// database.
    OnDisk = 7,
}

const WAITING: u64 = 0;
const CLAIMED: u64 = 1;
const ABANDONED: u64 = 2;
const APPENDING: u64 = 6;
const ON_DISK: u64 = 7;
/// The state, in the low bits.
const STATE: u64 = 0b0000_0111;
/// Set while `others` may hold a waker, so that the lock is taken only if another request waits.
const OTHERS: u64 = 0b0000_1000;
/// A log has, or may have, the order.
const RECORDED: u64 = 0b0001_0000;
/// A log has the order for certain.
const DURABLE: u64 = 0b0010_0000;
/// Lowest bit of the number of the log's span that has, or may have, the record; the number is 0 if
/// there is none.
const SPAN_SHIFT: u32 = 8;

/// A span's number, shifted into its bits.
fn in_place(span: u64) -> u64 {
    // Numbers count from 1; a journal's have 16 digits in the file name, which is 54 bits.
    assert!(
        span >> (u64::BITS - SPAN_SHIFT) == 0,
        "no log has so many spans: {span}"
    );
    span << SPAN_SHIFT
}

/// State machine of one order in flight, with the wakers of the requests that wait for it.
#[derive(Debug)]
pub struct Slot {
    /// State, [`OTHERS`], [`RECORDED`], [`DURABLE`] and the span in one word, because there is
    /// one per order in flight. Every change of state is an `AcqRel` read-modify-write. Release:
    /// earlier effects (the commit, the released stock) are visible to every thread that sees the
    /// new state. Acquire: the changing thread sees the wakers announced before.
    bits: AtomicU64,
    /// Waker of the request that sent the order. Fixed before the slot is shared, so waking needs
    /// no lock. The connection shares it with each of its orders: 8 bytes instead of 16.
    first: Option<Arc<Waker>>,
    /// Wakers of duplicates in flight and long polls.
    #[allow(
        clippy::box_collection,
        reason = "almost no order has any, and each has room for this: 8 bytes instead of 24"
    )]
    others: Guarded<Option<Box<Vec<Waker>>>>,
}

impl Slot {
    /// A slot in `Waiting`. `first` is woken when the order is settled, abandoned or past its
    /// deadline.
    pub fn new(first: Option<Arc<Waker>>) -> Self {
        Slot {
            bits: AtomicU64::new(WAITING),
            first,
            others: Guarded::new(None),
        }
    }

    /// A slot in `Appending`. `first` is woken when it leaves that state.
    pub fn appending(first: Option<Arc<Waker>>) -> Self {
        Slot {
            bits: AtomicU64::new(APPENDING),
            first,
            others: Guarded::new(None),
        }
    }

    /// A slot in `Waiting` for an order that was read back from a log's `span`.
    pub fn recovered(span: u64) -> Self {
        Slot {
            bits: AtomicU64::new(WAITING | RECORDED | DURABLE | in_place(span)),
            first: None,
            others: Guarded::new(None),
        }
    }

    /// The current state. Acquire: pairs with the release of the change.
    pub fn state(&self) -> SlotState {
        SlotState::from_bits(self.bits.load(Ordering::Acquire))
    }

    /// Whether a log has the order for certain.
    pub fn is_durable(&self) -> bool {
        self.bits.load(Ordering::Acquire) & DURABLE != 0
    }

    /// Whether a log has, or may have, the order.
    pub fn is_recorded(&self) -> bool {
        self.bits.load(Ordering::Acquire) & (RECORDED | DURABLE) != 0
    }

    /// Number of the log's span that has, or may have, the record; 0 if there is none.
    pub fn span(&self) -> u64 {
        // Relaxed: stored before the order is passed on, and passing it on publishes the value.
        self.bits.load(Ordering::Relaxed) >> SPAN_SHIFT
    }

    /// Marks an order in `Appending` as recorded, by the appender before it sends the record. False:
    /// the order was abandoned, skip it.
    pub fn send(&self) -> bool {
        self.leave(APPENDING, RECORDED, APPENDING | RECORDED)
    }

    /// Takes [`Slot::send`] back, by the appender: the log has certainly not taken the record.
    pub fn not_sent(&self) {
        // Nobody else changes the state of a recorded order in `Appending`.
        let before = self.bits.fetch_and(!RECORDED, Ordering::AcqRel);
        debug_assert_eq!(SlotState::from_bits(before), SlotState::Appending);
    }

    /// `Appending → Waiting`, by the appender, which then takes the wakers. `span` is the number of
    /// the log's span that has, or may have, the record; 0 for none. `durable`: the log has confirmed
    /// it. Otherwise the record may or may not be there.
    pub fn appended(&self, span: u64, durable: bool) {
        let to = WAITING | RECORDED | if durable { DURABLE } else { 0 } | in_place(span);
        let moved = self.leave(APPENDING, 0, to);
        assert!(moved, "an order was appended twice: {:?}", self.state());
    }

    /// `Waiting → OnDisk`, by the appender, which then takes the wakers. Recorded orders only.
    pub fn spill(&self) -> bool {
        self.is_recorded() && self.leave(WAITING, 0, ON_DISK)
    }

    /// `Waiting → Claimed`, by the worker that will write it. False: it was abandoned, skip it.
    pub fn claim(&self) -> bool {
        self.leave(WAITING, 0, CLAIMED)
    }

    /// `Waiting | Appending → Abandoned`, by the deadline or at shutdown, unless the order is
    /// recorded. True obliges the caller to release its stock and then to wake the waiting requests.
    pub fn abandon(&self) -> bool {
        // In this sequence, because an order only goes from `Appending` to `Waiting`, and is recorded then.
        self.leave(APPENDING, RECORDED, ABANDONED) || self.leave(WAITING, RECORDED, ABANDONED)
    }

    /// Leaves the state `from`, unless a bit of `unless` is set. Bits of `to` beyond the state are
    /// set; none is cleared.
    fn leave(&self, from: u64, unless: u64, to: u64) -> bool {
        self.bits
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
                (bits & (STATE | unless) == from).then_some(bits & !STATE | to)
            })
            .is_ok()
    }

    /// `Claimed → Persisted | Failed | Unwritten | OnDisk`, by the worker that claimed it, which
    /// then takes the wakers.
    ///
    /// # Panics
    /// If the slot is not `Claimed`: the worker would settle an order that it does not own.
    pub fn settle(&self, settled: Settled) {
        let before = self
            .bits
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
                (bits & STATE == CLAIMED).then_some(bits & !STATE | settled as u64)
            });
        assert!(
            before.is_ok(),
            "a slot was settled that is not claimed: {:?}",
            self.state()
        );
    }

    /// Registers `waker` for the next change. The caller reads [`Slot::state`] *after* this call
    /// and before it parks. A change before the registration is thus seen by the caller; a change
    /// after it sees the waker.
    pub fn subscribe(&self, waker: Waker) {
        self.others.with(|others| {
            others.get_or_insert_default().push(waker);
            // Under the lock, so that a taker cannot clear the bit between push and set. AcqRel
            // orders it with the read-modify-write of the change on the same word.
            self.bits.fetch_or(OTHERS, Ordering::AcqRel);
        });
    }

    /// Passes every waker to `wake`: after a change of state, and when a deadline has passed.
    pub fn take_wakers(&self, mut wake: impl FnMut(Waker)) {
        if let Some(first) = &self.first {
            wake(Waker::clone(first));
        }
        self.take_others(wake);
    }

    /// Passes the wakers of all but the sender to `wake`: after a change that the sender need not
    /// see.
    pub fn take_others(&self, wake: impl FnMut(Waker)) {
        if self.bits.load(Ordering::Acquire) & OTHERS != 0 {
            let others = self.others.with(|others| {
                self.bits.fetch_and(!OTHERS, Ordering::AcqRel);
                others.take()
            });
            others.into_iter().flat_map(|others| *others).for_each(wake);
        }
    }
}
