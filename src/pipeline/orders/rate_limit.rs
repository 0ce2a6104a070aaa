//! Rate limits, for each user and overall, by `governor` (the generic cell rate algorithm).

use std::num::NonZeroU32;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, NotUntil, Quota, RateLimiter};

use crate::config::{Rate, RateLimit};
use crate::order::{Refusal, UserId};

/// The configured limits.
#[derive(Debug)]
pub struct RateLimits {
    per_user: Option<DefaultKeyedRateLimiter<UserId>>,
    overall: Option<DefaultDirectRateLimiter>,
    clock: DefaultClock,
}

impl RateLimits {
    /// Limits from the configuration.
    pub fn new(config: &RateLimit) -> Self {
        RateLimits {
            per_user: quota(config.per_user).map(RateLimiter::keyed),
            overall: quota(config.overall).map(RateLimiter::direct),
            clock: DefaultClock::default(),
        }
    }

    /// Counts one request.
    ///
    /// # Errors
    /// [`Refusal::RateLimited`] if it is one too many.
    pub fn check(&self, user_id: &UserId) -> Result<(), Refusal> {
        if let Some(per_user) = &self.per_user {
            per_user
                .check_key(user_id)
                .map_err(|until| self.refusal(&until))?;
        }
        if let Some(overall) = &self.overall {
            overall.check().map_err(|until| self.refusal(&until))?;
        }
        Ok(())
    }

    fn refusal(&self, until: &NotUntil<<DefaultClock as Clock>::Instant>) -> Refusal {
        let wait = until.wait_time_from(self.clock.now());
        Refusal::RateLimited {
            retry_after_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
        }
    }

    /// Drops users whose limit is full again, so that memory follows the number of active users.
    pub fn forget_idle(&self) {
        if let Some(per_user) = &self.per_user {
            per_user.retain_recent();
        }
    }
}

fn quota(rate: Rate) -> Option<Quota> {
    let of = |count: NonZeroU32, per: fn(NonZeroU32) -> Quota| Some(per(count).allow_burst(count));
    match rate {
        Rate::Off => None,
        Rate::PerSecond(count) => of(count, Quota::per_second),
        Rate::PerMinute(count) => of(count, Quota::per_minute),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(per_user: &str, overall: &str) -> RateLimits {
        let rate = |text: &str| Rate::try_from(text.to_owned()).unwrap();
        RateLimits::new(&RateLimit {
            per_user: rate(per_user),
            overall: rate(overall),
        })
    }

    #[test]
    fn off_lets_everything_pass() {
        let limits = limits("off", "off");
        let user = UserId::new("u").unwrap();
        assert!((0..10_000).all(|_| limits.check(&user).is_ok()));
    }

    #[test]
    fn a_user_is_limited_without_the_others() {
        let limits = limits("2/min", "off");
        let (user, other) = (UserId::new("u").unwrap(), UserId::new("v").unwrap());
        assert!(limits.check(&user).is_ok());
        assert!(limits.check(&user).is_ok());
        match limits.check(&user) {
            Err(Refusal::RateLimited { retry_after_ms }) => {
                assert!((1..=30_000).contains(&retry_after_ms))
            }
            other => panic!("{other:?}"),
        }
        assert!(limits.check(&other).is_ok());
    }

    #[test]
    fn the_overall_rate_counts_everybody() {
        let limits = limits("off", "3/min");
        let users = (0..4).map(|n| UserId::new(&format!("u-{n}")).unwrap());
        let passed = users.filter(|user| limits.check(user).is_ok()).count();
        assert_eq!(passed, 3);
    }
}
