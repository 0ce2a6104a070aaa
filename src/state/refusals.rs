//! Refusals that stay under their keys: a retry of what was `sold_out` is told the same, even if a
//! unit has come free meanwhile. Bounded, and gone with a restart.
//!
//! Once the stock is gone this is written for every click, hundreds of times for each order, and
//! almost never read again. So it is a table of small sets, as a processor's cache is: a refusal
//! belongs to one set, and the oldest of that set makes room. Noting one touches two cache lines.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;

use crate::order::{KeyHash, PayloadHash, Refusal, UserId};
use crate::sync::Guarded;

/// Refusals of a set.
const WAYS: usize = 2;

/// One refusal, and to whom it was said. The user is known by a hash that is seeded afresh in each
/// process: 64 bits beside the 128 of the key, compared with what is in one set.
#[derive(Clone, Copy, Debug)]
struct Told {
    user: u64,
    key: KeyHash,
    payload: PayloadHash,
    refusal: Refusal,
}

/// The newest first.
type Set = [Option<Told>; WAYS];

/// Sticky refusals by user and key.
pub struct Refusals {
    sets: Box<[Guarded<Set>]>,
    seed: RandomState,
}

impl Refusals {
    /// Room for `capacity` refusals, 2 or more; taken at once.
    pub fn with_capacity(capacity: usize) -> Self {
        Refusals {
            sets: (0..(capacity / WAYS).max(1))
                .map(|_| Guarded::default())
                .collect(),
            seed: RandomState::default(),
        }
    }

    /// Whether nothing sticky was said to this user under this key.
    ///
    /// # Errors
    /// The earlier refusal, or [`Refusal::IdempotencyKeyReused`] where the key came with another
    /// body then.
    pub fn check(
        &self,
        user_id: &UserId,
        key: KeyHash,
        payload: PayloadHash,
    ) -> Result<(), Refusal> {
        let user = self.seed.hash_one(user_id);
        let told = self.set(user, key).and_then(|set| {
            set.with(|set| {
                let mut told = set.iter().flatten();
                told.find(|told| told.user == user && told.key == key)
                    .copied()
            })
        });
        match told {
            None => Ok(()),
            Some(told) if told.payload == payload => Err(told.refusal),
            Some(_) => Err(Refusal::IdempotencyKeyReused),
        }
    }

    /// Keeps a refusal that [`Refusals::check`] did not find.
    pub fn remember(&self, user_id: &UserId, key: KeyHash, payload: PayloadHash, refusal: Refusal) {
        let user = self.seed.hash_one(user_id);
        let told = Told {
            user,
            key,
            payload,
            refusal,
        };
        if let Some(set) = self.set(user, key) {
            set.with(|set| {
                // Two requests under one key may both have been refused: the later counts.
                let place = set
                    .iter()
                    .position(|known| known.is_some_and(|it| it.user == user && it.key == key))
                    .unwrap_or(WAYS - 1);
                set[..=place].rotate_right(1);
                set[0] = Some(told);
            });
        }
    }

    fn set(&self, user: u64, key: KeyHash) -> Option<&Guarded<Set>> {
        // The high half of a product spreads a hash evenly over any number of sets.
        let hash = u128::from(self.seed.hash_one((user, key)));
        let index = (hash * self.sets.len() as u128) >> 64;
        self.sets.get(index as usize)
    }

    fn len(&self) -> usize {
        let told = |set: &Guarded<Set>| set.with(|set| set.iter().flatten().count());
        self.sets.iter().map(told).sum()
    }
}

impl std::fmt::Debug for Refusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refusals")
            .field("told", &self.len())
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
        let refusals = Refusals::with_capacity(100);
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
        let refusals = Refusals::with_capacity(WAYS);
        let key = KeyHash([1; 16]);
        let later = Refusal::SoldOut { available: 3 };
        refusals.remember(&user(1), key, PayloadHash(1), SOLD_OUT);
        refusals.remember(&user(2), key, PayloadHash(1), SOLD_OUT);
        refusals.remember(&user(1), key, PayloadHash(1), later);
        assert_eq!(refusals.check(&user(1), key, PayloadHash(1)), Err(later));
        assert_eq!(refusals.check(&user(2), key, PayloadHash(1)), Err(SOLD_OUT));
        assert_eq!(refusals.len(), WAYS);
    }

    #[test]
    fn the_set_is_bounded_and_the_newest_stay() {
        let refusals = Refusals::with_capacity(1_000);
        let key = KeyHash([0; 16]);
        for number in 0..10_000 {
            refusals.remember(&user(number), key, PayloadHash(0), SOLD_OUT);
        }
        assert!(refusals.len() <= 1_000, "{}", refusals.len());
        let kept = |number: &u32| refusals.check(&user(*number), key, PayloadHash(0)).is_err();
        assert!(kept(&9_999));
        // By chance some sets had more of them than others.
        let of_the_last = (9_900..10_000).filter(kept).count();
        assert!(of_the_last > 85, "{of_the_last} of the last 100");
        assert_eq!((0..1_000).filter(kept).count(), 0);
    }
}
