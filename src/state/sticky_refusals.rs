//! Sticky refusals: a retry of a `sold_out` order gets the same answer, even if a unit has become
//! free meanwhile. Bounded, and gone after a restart.
//!
//! After the stock is gone a refusal is written for every click, hundreds of times for each order,
//! and almost never read. Writing one touches two cache lines.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};

use foldhash::quality::RandomState;

use super::set_associative::Sets;
use crate::order::{KeyHash, PayloadHash, Refusal, UserId};

/// User and key. The user is a hash seeded afresh in each process: 64 bits beside the 128 of the
/// key, compared within one set only.
type UserKey = (u64, KeyHash);

/// One refusal, with the hash of the refused request's body.
#[derive(Clone, Copy, Debug)]
struct StoredRefusal {
    payload: PayloadHash,
    refusal: Refusal,
}

/// Sticky refusals by user and key.
pub struct StickyRefusals {
    refusals: Sets<UserKey, StoredRefusal, 2>,
    /// Whether there has been any. Until then placing an order need not look for one.
    any: AtomicBool,
    seed: RandomState,
}

impl StickyRefusals {
    /// Creates room for `capacity` refusals, at least 2; allocated at once.
    pub fn with_capacity(capacity: usize) -> Self {
        StickyRefusals {
            refusals: Sets::with_capacity(capacity),
            any: AtomicBool::new(false),
            seed: RandomState::default(),
        }
    }

    /// Checks that there is no sticky refusal for this user under this key.
    ///
    /// # Errors
    /// The earlier refusal, or [`Refusal::IdempotencyKeyReused`] if the key came with another body
    /// then.
    pub fn check(
        &self,
        user_id: &UserId,
        key: KeyHash,
        payload: PayloadHash,
    ) -> Result<(), Refusal> {
        // Acquire and Release: a refusal before this request is found.
        if !self.any.load(Ordering::Acquire) {
            return Ok(());
        }
        match self.refusals.get(&self.user_key(user_id, key)) {
            None => Ok(()),
            Some(stored) if stored.payload == payload => Err(stored.refusal),
            Some(_) => Err(Refusal::IdempotencyKeyReused),
        }
    }

    /// Stores a refusal that [`StickyRefusals::check`] did not find.
    pub fn remember(&self, user_id: &UserId, key: KeyHash, payload: PayloadHash, refusal: Refusal) {
        // Two requests under one key may both have been refused: the later one counts.
        let stored = StoredRefusal { payload, refusal };
        self.refusals.put(self.user_key(user_id, key), stored);
        if !self.any.load(Ordering::Relaxed) {
            self.any.store(true, Ordering::Release);
        }
    }

    /// Removes the refusal: the key has an order.
    pub fn withdraw(&self, user_id: &UserId, key: KeyHash) {
        self.refusals.remove(&self.user_key(user_id, key));
    }

    fn user_key(&self, user_id: &UserId, key: KeyHash) -> UserKey {
        (self.seed.hash_one(user_id), key)
    }
}

impl std::fmt::Debug for StickyRefusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StickyRefusals")
            .field("refusals", &self.refusals.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOLD_OUT: Refusal = Refusal::SoldOut { available: 0 };

    fn user(number: u32) -> UserId {
        UserId::new(&format!("u-{number}")).unwrap()
    }

    #[test]
    fn a_refusal_stays_under_its_key_and_body() {
        let refusals = StickyRefusals::with_capacity(100);
        let key = KeyHash([1; 16]);
        refusals.remember(&user(1), key, PayloadHash(1), SOLD_OUT);
        let check = |number, key, payload| refusals.check(&user(number), key, PayloadHash(payload));
        assert_eq!(check(1, key, 1), Err(SOLD_OUT));
        assert_eq!(check(1, key, 2), Err(Refusal::IdempotencyKeyReused));
        assert_eq!(check(2, key, 1), Ok(()));
        assert_eq!(check(1, KeyHash([2; 16]), 1), Ok(()));
    }

    #[test]
    fn the_later_of_two_under_one_key_counts_and_takes_one_place() {
        let refusals = StickyRefusals::with_capacity(2);
        let key = KeyHash([1; 16]);
        let later = Refusal::SoldOut { available: 3 };
        refusals.remember(&user(1), key, PayloadHash(1), SOLD_OUT);
        refusals.remember(&user(2), key, PayloadHash(1), SOLD_OUT);
        refusals.remember(&user(1), key, PayloadHash(1), later);
        assert_eq!(refusals.check(&user(1), key, PayloadHash(1)), Err(later));
        assert_eq!(refusals.check(&user(2), key, PayloadHash(1)), Err(SOLD_OUT));
        assert_eq!(refusals.refusals.len(), 2);
    }

    #[test]
    fn the_set_is_bounded_and_the_newest_stay() {
        let refusals = StickyRefusals::with_capacity(1_000);
        let key = KeyHash([0; 16]);
        for number in 0..10_000 {
            refusals.remember(&user(number), key, PayloadHash(0), SOLD_OUT);
        }
        assert!(
            refusals.refusals.len() <= 1_000,
            "{}",
            refusals.refusals.len()
        );
        let kept = |number: &u32| refusals.check(&user(*number), key, PayloadHash(0)).is_err();
        assert!(kept(&9_999));
        // By chance some sets had more of them than others.
        let of_the_last = (9_900..10_000).filter(kept).count();
        assert!(of_the_last > 85, "{of_the_last} of the last 100");
        assert_eq!((0..1_000).filter(kept).count(), 0);
    }
}
