//! Refusals that stay under their keys: a retry of what was `sold_out` is told the same, even if a
//! unit has come free meanwhile. Bounded (the least used make room), and gone with a restart.

use quick_cache::Equivalent;
use quick_cache::sync::Cache;

use crate::order::{KeyHash, PayloadHash, Refusal, UserId};

/// Sticky refusals by user and key.
pub struct Refusals {
    told: Cache<(UserId, KeyHash), (PayloadHash, Refusal)>,
}

impl Refusals {
    /// Room for `capacity` refusals.
    pub fn with_capacity(capacity: usize) -> Self {
        Refusals {
            told: Cache::new(capacity),
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
        match self.told.get(&Asked(user_id, key)) {
            None => Ok(()),
            Some((earlier, refusal)) if earlier == payload => Err(refusal),
            Some(_) => Err(Refusal::IdempotencyKeyReused),
        }
    }

    /// Keeps a refusal.
    pub fn remember(&self, user_id: &UserId, key: KeyHash, payload: PayloadHash, refusal: Refusal) {
        self.told.insert((user_id.clone(), key), (payload, refusal));
    }
}

/// A key of [`Refusals::told`], borrowed for a look. It hashes as the tuple does.
#[derive(Hash)]
struct Asked<'a>(&'a UserId, KeyHash);

impl Equivalent<(UserId, KeyHash)> for Asked<'_> {
    fn equivalent(&self, (user_id, key): &(UserId, KeyHash)) -> bool {
        self.0 == user_id && self.1 == *key
    }
}

impl std::fmt::Debug for Refusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refusals")
            .field("told", &self.told.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_stays_under_its_key_and_body() {
        let refusals = Refusals::with_capacity(100);
        let (user, other) = (UserId::new("u").unwrap(), UserId::new("v").unwrap());
        let key = KeyHash([1; 16]);
        let sold_out = Refusal::SoldOut { available: 0 };
        refusals.remember(&user, key, PayloadHash(1), sold_out);
        assert_eq!(refusals.check(&user, key, PayloadHash(1)), Err(sold_out));
        assert_eq!(
            refusals.check(&user, key, PayloadHash(2)),
            Err(Refusal::IdempotencyKeyReused)
        );
        assert_eq!(refusals.check(&other, key, PayloadHash(1)), Ok(()));
        assert_eq!(
            refusals.check(&user, KeyHash([2; 16]), PayloadHash(1)),
            Ok(())
        );
    }

    #[test]
    fn the_set_is_bounded() {
        let refusals = Refusals::with_capacity(100);
        for number in 0..10_000_u32 {
            let user = UserId::new(&format!("u-{number}")).unwrap();
            refusals.remember(
                &user,
                KeyHash([0; 16]),
                PayloadHash(0),
                Refusal::SoldOut { available: 0 },
            );
        }
        assert!(refusals.told.len() <= 100);
    }
}
