//! The bytes of request bodies that all connections together may hold.
//!
//! A connection's limit bounds one client, and 20,000 clients at that limit hold more than a machine
//! has. So the length that a head declares is reserved before any of its body is read, and released
//! when the request is answered or its connection ends. A body that fits the buffer which each
//! connection has anyway is not counted, so that a usual request touches nothing that is shared.
//!
//! Anonymous bodies ([`BodyRule::is_anonymous`](crate::http::server::limits::BodyRule)) come from
//! strangers, the others from clients with a token: each kind has a share of its own, so that
//! neither starves the other.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The part of the budget that is for anonymous bodies: one in so many bytes.
const ANONYMOUS_PART: usize = 4;

/// The two shares.
pub(super) struct BodyBudget {
    anonymous: Share,
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
        let anonymous = bytes_total_max / ANONYMOUS_PART;
        let share = |bytes_max| Share {
            bytes_max,
            reserved: AtomicUsize::new(0),
        };
        BodyBudget {
            anonymous: share(anonymous),
            others: share(bytes_total_max - anonymous),
        }
    }

    /// Takes `bytes` for as long as the reservation lives; `None` if they are not left.
    pub(super) fn reserve(&self, is_anonymous: bool, bytes: usize) -> Option<Reservation<'_>> {
        let share = if is_anonymous {
            &self.anonymous
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
