//! The bytes of request bodies that all connections together may hold.
//!
//! A connection's limit bounds one client, and 20,000 clients at that limit are more than a machine
//! has. So the length that a head declares is reserved before any of its body is read, and given
//! back when the request is answered or its connection ends. What fits the buffer that each
//! connection has anyway is not counted, so that a usual order touches nothing that is shared.
//!
//! Callbacks come from strangers, orders from whoever showed a token: each has a share of its own,
//! so that neither starves the other.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The part of the budget that is for callbacks: one in so many bytes.
const CALLBACKS_PART: usize = 4;

/// The two shares.
pub(super) struct BodyBudget {
    callbacks: Share,
    others: Share,
}

struct Share {
    bytes_max: usize,
    // A sum that orders nothing else: relaxed throughout.
    reserved: AtomicUsize,
}

impl BodyBudget {
    /// A budget of so many bytes.
    pub(super) fn new(bytes_total_max: usize) -> Self {
        let callbacks = bytes_total_max / CALLBACKS_PART;
        let share = |bytes_max| Share {
            bytes_max,
            reserved: AtomicUsize::new(0),
        };
        BodyBudget {
            callbacks: share(callbacks),
            others: share(bytes_total_max - callbacks),
        }
    }

    /// Takes `bytes` for as long as the reservation lives; none where they are not left.
    pub(super) fn reserve(&self, is_callback: bool, bytes: usize) -> Option<Reservation<'_>> {
        let share = if is_callback {
            &self.callbacks
        } else {
            &self.others
        };
        let fits = |reserved: usize| Some(reserved + bytes).filter(|sum| *sum <= share.bytes_max);
        share
            .reserved
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .ok()
            .map(|_| Reservation { share, bytes })
    }
}

/// Bytes of a share; they are back when this is dropped.
pub(super) struct Reservation<'b> {
    share: &'b Share,
    bytes: usize,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.share.reserved.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_given_out_to_its_last_byte_comes_back_and_is_not_the_others() {
        let budget = BodyBudget::new(400);
        let first = budget.reserve(true, 60).expect("room");
        assert!(budget.reserve(true, 41).is_none());
        let _second = budget.reserve(true, 40).expect("room");
        assert!(budget.reserve(true, 1).is_none());
        assert!(budget.reserve(false, 301).is_none());
        let _others = budget.reserve(false, 300).expect("a share of its own");
        drop(first);
        assert!(budget.reserve(true, 61).is_none());
        assert!(budget.reserve(true, 60).is_some());
    }
}
