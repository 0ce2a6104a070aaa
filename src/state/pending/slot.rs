//! The slot of one order in flight: the one compare-and-swap that decides.
//!
//! ```text
//!   Appending ──────────────────► Abandoned
//!      │ append   refuse (shutdown) ▲
//!      ▼                            │ abandon (deadline, unless recorded)
//!   Waiting ────────────────────────┘
//!      │    ╲ spill (appender)
//!      │     ╲───────────────────────────────► OnDisk
//!      │ claim (worker)                           ▲ settle (worker, at shutdown, parked)
//!      ▼             settle (worker)              │
//!   Claimed ──────────────────────────────────────┴─ Persisted │ Failed │ Unwritten
//! ```
//!
//! A worker claims an order before it writes it; the deadline abandons one that nobody claimed.
//! Both are a compare-and-swap from `Waiting`, so exactly one wins and there is no third case: an
//! abandoned order is never written, a claimed one is settled by its worker.
//!
//! An order that is to be acknowledged at once begins in `Appending`. Once its record is in a
//! journal, or may be, it is *recorded*: it can no longer be abandoned, because a restart would
//! write it. Once the sync that covers it has returned it is *durable*, and may be acknowledged.
//!
//! `tests/loom.rs` compiles this file against loom's primitives and runs through every
//! interleaving.

use std::sync::Arc;

use crate::sync::{AtomicU64, Guarded, Ordering, Waker};

/// Where an order in flight stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// On its way into a journal; whether it got there is not known yet.
    Appending,
    /// In the queue; nobody has claimed it.
    Waiting,
    /// A worker is writing it; whether it became a row is not known yet.
    Claimed,
    /// The deadline came first. It is not and will not be written; its stock is back.
    Abandoned,
    /// Its row is committed.
    Persisted,
    /// The database refused its row; a dead letter is committed and its stock is back.
    Failed,
    /// Claimed, but not written, because the process stopped or the database refuses its SKU's
    /// counters: there is no row and its stock is back.
    Unwritten,
    /// Durable in the journal, or parked in the database, and no longer in memory: whoever waits for
    /// it looks for it again.
    OnDisk,
}

impl SlotState {
    /// Whether nothing will change any more in this slot.
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

/// What a worker settles a claimed order as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The row is committed.
    Persisted = 3,
    /// The database refused the row.
    Failed = 4,
    /// Given up unwritten.
    Unwritten = 5,
    /// Left to the next process, at shutdown: the journal has it; or parked in the database.
    OnDisk = 7,
}

const WAITING: u64 = 0;
const CLAIMED: u64 = 1;
const ABANDONED: u64 = 2;
const APPENDING: u64 = 6;
const ON_DISK: u64 = 7;
/// The low bits hold the state.
const STATE: u64 = 0b0000_0111;
/// Set while `others` may hold a waker. It only saves the lock where nobody else waits.
const OTHERS: u64 = 0b0000_1000;
/// A journal has, or may have, the order.
const RECORDED: u64 = 0b0001_0000;
/// A journal has it, and the sync that covers it has returned.
const DURABLE: u64 = 0b0010_0000;
/// From here on upwards: the number of the journal's segment that has its record, or may have it; 0
/// where there is none.
const SEGMENT_SHIFT: u32 = 8;

/// A segment's number in its place.
fn in_place(segment: u64) -> u64 {
    // It counts from 1 and has 16 digits in the name of its file, which is 54 bits.
    assert!(
        segment >> (u64::BITS - SEGMENT_SHIFT) == 0,
        "no journal has so many segments: {segment}"
    );
    segment << SEGMENT_SHIFT
}

/// The state machine of one order in flight and those who wait for it.
#[derive(Debug)]
pub struct Slot {
    /// State, [`OTHERS`] and what a journal has of it, its segment included: one word, because there
    /// is one for each order in flight. Every change of state is an `AcqRel` read-modify-write:
    /// release, so that what the changer did before (the commit, the stock given back) is visible to
    /// whoever sees the new state; acquire, so that it sees wakers announced before.
    bits: AtomicU64,
    /// Whoever sent the order. Fixed before the slot is shared, so waking it needs no lock. Lent by
    /// the connection to each of its orders: 8 bytes instead of 16.
    first: Option<Arc<Waker>>,
    /// Duplicates in flight and long polls.
    #[allow(
        clippy::box_collection,
        reason = "almost no order has any, and each has room for this: 8 bytes instead of 24"
    )]
    others: Guarded<Option<Box<Vec<Waker>>>>,
}

impl Slot {
    /// A slot in `Waiting`; `first` is woken when it is settled, abandoned or past its deadline.
    pub fn new(first: Option<Arc<Waker>>) -> Self {
        Slot {
            bits: AtomicU64::new(WAITING),
            first,
            others: Guarded::new(None),
        }
    }

    /// A slot in `Appending`; `first` is woken when it leaves that state.
    pub fn appending(first: Option<Arc<Waker>>) -> Self {
        Slot {
            bits: AtomicU64::new(APPENDING),
            first,
            others: Guarded::new(None),
        }
    }

    /// A slot in `Waiting` of an order that was read back from `segment` of a journal.
    pub fn recovered(segment: u64) -> Self {
        Slot {
            bits: AtomicU64::new(WAITING | RECORDED | DURABLE | in_place(segment)),
            first: None,
            others: Guarded::new(None),
        }
    }

    /// Where it stands now. Acquire: pairs with the release of whoever moved it there.
    pub fn state(&self) -> SlotState {
        SlotState::from_bits(self.bits.load(Ordering::Acquire))
    }

    /// Whether a journal has the order for certain.
    pub fn is_durable(&self) -> bool {
        self.bits.load(Ordering::Acquire) & DURABLE != 0
    }

    /// Whether a journal has, or may have, the order.
    pub fn is_recorded(&self) -> bool {
        self.bits.load(Ordering::Acquire) & (RECORDED | DURABLE) != 0
    }

    /// The number of the journal's segment that has its record, or may have it; 0 where there is
    /// none.
    pub fn segment(&self) -> u64 {
        // Relaxed: noted before the order is handed on, and the hand-off publishes it.
        self.bits.load(Ordering::Relaxed) >> SEGMENT_SHIFT
    }

    /// `Appending → Waiting`, by the appender, which then takes the wakers. `segment`: where its
    /// record is or may be; 0 for nowhere. `durable`: the sync that covers the order has returned;
    /// otherwise its record may or may not be there.
    pub fn appended(&self, segment: u64, durable: bool) {
        let to = WAITING | RECORDED | if durable { DURABLE } else { 0 } | in_place(segment);
        let moved = self.leave(APPENDING, 0, to);
        assert!(moved, "an order was appended twice: {:?}", self.state());
    }

    /// `Appending → Abandoned`: it never got as far as the journal. True obliges the caller as
    /// [`Slot::abandon`] does.
    pub fn refuse(&self) -> bool {
        self.leave(APPENDING, 0, ABANDONED)
    }

    /// `Waiting → OnDisk`, by the appender, which then takes the wakers. Only a recorded order.
    pub fn spill(&self) -> bool {
        self.is_recorded() && self.leave(WAITING, 0, ON_DISK)
    }

    /// `Waiting → Claimed`, by the worker that will write it. False: it was abandoned; skip it.
    pub fn claim(&self) -> bool {
        self.leave(WAITING, 0, CLAIMED)
    }

    /// `Waiting → Abandoned`, by the deadline, unless the order is recorded. True obliges the
    /// caller to give its stock back and then to wake those who wait.
    pub fn abandon(&self) -> bool {
        self.leave(WAITING, RECORDED, ABANDONED)
    }

    /// Moves on from `from`, unless a bit of `unless` is set. Bits of `to` beyond the state are
    /// set, none is cleared.
    fn leave(&self, from: u64, unless: u64, to: u64) -> bool {
        self.bits
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
                (bits & (STATE | unless) == from).then_some(bits & !STATE | to)
            })
            .is_ok()
    }

    /// `Claimed → Persisted | Failed | Unwritten | OnDisk`, by the worker that claimed it, which then takes
    /// the wakers.
    ///
    /// # Panics
    /// Where the slot is not `Claimed`: the worker would settle what it does not own.
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

    /// Announces that `waker` wants to know of the next change. The caller looks at
    /// [`Slot::state`] *after* this and before it parks: the change was either before the
    /// announcement, and then it is seen, or after it, and then the changer sees the waker.
    pub fn subscribe(&self, waker: Waker) {
        self.others.with(|others| {
            others.get_or_insert_default().push(waker);
            // Under the lock, so that a taker cannot clear the bit between push and set.
            // AcqRel orders it with the changer's read-modify-write of the same word.
            self.bits.fetch_or(OTHERS, Ordering::AcqRel);
        });
    }

    /// Hands every waker to `wake`: after a change of state, and when a deadline has passed.
    pub fn take_wakers(&self, mut wake: impl FnMut(Waker)) {
        if let Some(first) = &self.first {
            wake(Waker::clone(first));
        }
        self.take_others(wake);
    }

    /// Hands the wakers of all but the sender to `wake`: after a change that the sender need not
    /// hear of.
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
