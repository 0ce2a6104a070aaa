//! The slot of one order in flight: the one compare-and-swap that decides.
//!
//! ```text
//!                 claim (worker)            settle (worker)
//!   Waiting ───────────────────► Claimed ───────────────────► Persisted │ Failed │ Unwritten
//!      │
//!      └──────────────────────► Abandoned
//!           abandon (deadline)
//! ```
//!
//! A worker claims an order before it writes it; the deadline abandons one that nobody claimed.
//! Both are a compare-and-swap from `Waiting`, so exactly one wins and there is no third case: an
//! abandoned order is never written, a claimed one is settled by its worker.
//!
//! `tests/loom.rs` compiles this file against loom's primitives and runs through every
//! interleaving.

use super::sync::{AtomicU8, Guarded, Ordering, Waker};

/// Where an order in flight stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
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
    /// Claimed, but the process stopped before it could be written: there is no row and its
    /// stock is back.
    Unwritten,
}

impl SlotState {
    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        !matches!(self, SlotState::Waiting | SlotState::Claimed)
    }

    fn from_bits(bits: u8) -> Self {
        match bits & STATE {
            0 => SlotState::Waiting,
            1 => SlotState::Claimed,
            2 => SlotState::Abandoned,
            3 => SlotState::Persisted,
            4 => SlotState::Failed,
            _ => SlotState::Unwritten,
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
    /// Given up unwritten, at shutdown.
    Unwritten = 5,
}

const WAITING: u8 = 0;
const CLAIMED: u8 = 1;
const ABANDONED: u8 = 2;
/// The low bits hold the state.
const STATE: u8 = 0b0111;
/// Set while `others` may hold a waker. It only saves the lock where nobody else waits.
const OTHERS: u8 = 0b1000;

/// The state machine of one order in flight and those who wait for it.
#[derive(Debug)]
pub struct Slot {
    /// State and [`OTHERS`] bit. Every change of state is an `AcqRel` read-modify-write: release,
    /// so that what the changer did before (the commit, the stock given back) is visible to
    /// whoever sees the new state; acquire, so that it sees wakers announced before.
    bits: AtomicU8,
    /// Whoever sent the order. Fixed before the slot is shared, so waking it needs no lock.
    first: Option<Waker>,
    /// Duplicates in flight and long polls.
    others: Guarded<Vec<Waker>>,
}

impl Slot {
    /// A slot in `Waiting`; `first` is woken when it is settled, abandoned or past its deadline.
    pub fn new(first: Option<Waker>) -> Self {
        Slot {
            bits: AtomicU8::new(WAITING),
            first,
            others: Guarded::new(Vec::new()),
        }
    }

    /// Where it stands now. Acquire: pairs with the release of whoever moved it there.
    pub fn state(&self) -> SlotState {
        SlotState::from_bits(self.bits.load(Ordering::Acquire))
    }

    /// `Waiting → Claimed`, by the worker that will write it. False: it was abandoned; skip it.
    pub fn claim(&self) -> bool {
        self.leave_waiting(CLAIMED)
    }

    /// `Waiting → Abandoned`, by the deadline. True obliges the caller to give its stock back and
    /// then to wake those who wait.
    pub fn abandon(&self) -> bool {
        self.leave_waiting(ABANDONED)
    }

    fn leave_waiting(&self, to: u8) -> bool {
        self.bits
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
                (bits & STATE == WAITING).then_some(bits & !STATE | to)
            })
            .is_ok()
    }

    /// `Claimed → Persisted | Failed | Unwritten`, by the worker that claimed it, which then takes
    /// the wakers.
    ///
    /// # Panics
    /// Where the slot is not `Claimed`: the worker would settle what it does not own.
    pub fn settle(&self, settled: Settled) {
        let before = self
            .bits
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
                (bits & STATE == CLAIMED).then_some(bits & !STATE | settled as u8)
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
            others.push(waker);
            // Under the lock, so that a taker cannot clear the bit between push and set.
            // AcqRel orders it with the changer's read-modify-write of the same word.
            self.bits.fetch_or(OTHERS, Ordering::AcqRel);
        });
    }

    /// Hands every waker to `wake`: after a change of state, and when a deadline has passed.
    pub fn take_wakers(&self, mut wake: impl FnMut(Waker)) {
        if let Some(first) = &self.first {
            wake(first.clone());
        }
        if self.bits.load(Ordering::Acquire) & OTHERS != 0 {
            let others = self.others.with(|others| {
                self.bits.fetch_and(!OTHERS, Ordering::AcqRel);
                std::mem::take(others)
            });
            others.into_iter().for_each(wake);
        }
    }
}
