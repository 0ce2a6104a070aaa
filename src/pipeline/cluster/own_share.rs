//! What the lending task of a node knows of the node's share of a SKU.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::store::cluster::shares::Want;
use crate::store::cluster::stock::Books;

/// Samples of a share's use, a second together.
const SAMPLES: usize = 10;

/// Interval at which a want that stands is answered again: a takeover or a lane may have brought units.
const ANSWER: Duration = Duration::from_millis(250);

/// What this task knows of a share.
#[derive(Debug, Default)]
pub(super) struct OwnShare {
    /// What memory has of it.
    pub(super) books: Books,
    /// Units that are out of memory, and not known to be out of the row.
    pub(super) returning: u32,
    /// Whether the answer to a transaction was lost.
    pub(super) is_in_doubt: bool,
    /// The want of this node that stands.
    pub(super) want: Option<Want>,
    /// Since when its own want stands so that orders may be the first to wait: every node keeps what comes free.
    pub(super) opened_at: Option<Instant>,
    /// The newest want of another node that was answered, and when one was answered last.
    pub(super) answered: Option<(i64, Instant)>,
    pub(super) is_lent_ahead: bool,
    /// When a total was first seen to be lowered, while it is.
    pub(super) recalled_since: Option<Instant>,
    /// Units in the pool when they were read last.
    pub(super) pool: u32,
    /// Units taken so far, as seen every tenth of a second.
    taken: VecDeque<i64>,
}

impl OwnShare {
    /// With what memory has of it.
    pub(super) fn of(books: Books) -> Self {
        OwnShare {
            books,
            ..OwnShare::default()
        }
    }

    /// Notes the units that were taken so far; to be called every tenth of a second.
    pub(super) fn note_taken(&mut self, taken: i64) {
        self.taken.push_back(taken);
        if self.taken.len() > SAMPLES {
            self.taken.pop_front();
        }
    }

    /// Whether a want of another node is new, or has to be answered again.
    pub(super) fn is_due(&self, want: &Want) -> bool {
        let is_answered =
            |(newest, at): (i64, Instant)| want.number <= newest && at.elapsed() < ANSWER;
        !self.answered.is_some_and(is_answered)
    }

    /// Units that were taken within the last second.
    pub(super) fn used(&self) -> u32 {
        let (Some(first), Some(last)) = (self.taken.front(), self.taken.back()) else {
            return 0;
        };
        u32::try_from(last - first).unwrap_or(0)
    }
}
