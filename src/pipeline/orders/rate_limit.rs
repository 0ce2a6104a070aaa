//! Rate limits, for each user and overall, by `governor` (the generic cell rate algorithm).

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, NotUntil, Quota, RateLimiter};

use crate::config::{Rate, RateLimit};
use crate::order::{Lane, Refusal, UserId};
use crate::state::lanes::Lanes;
use crate::sync::Guarded;

/// The configured limits.
#[derive(Debug)]
pub struct RateLimits {
    per_user: Option<DefaultKeyedRateLimiter<UserId>>,
    overall: Option<Overall>,
    clock: DefaultClock,
}

/// The limit of the whole sale. Each node enforces the part of its lanes, so all of them together never let more pass,
/// whatever moves.
#[derive(Debug)]
struct Overall {
    rate: Rate,
    limiter: ArcSwap<DefaultDirectRateLimiter>,
    /// That of the lanes for which it is.
    version: AtomicU64,
    /// How many of them are open here; 0 before the first request of a node.
    lanes: Guarded<usize>,
}

impl Overall {
    fn new(rate: Rate) -> Option<Self> {
        Some(Overall {
            rate,
            limiter: ArcSwap::from_pointee(RateLimiter::direct(quota(rate, Lane::COUNT)?)),
            version: AtomicU64::new(0),
            lanes: Guarded::default(),
        })
    }

    /// Follows the lanes that are open here. What comes with one has been used up elsewhere, for all that is known.
    fn follow(&self, lanes: &Lanes) {
        let version = lanes.version();
        // Relaxed: a request that is late by a lane is counted by the part before.
        if self.version.load(Ordering::Relaxed) == version {
            return;
        }
        self.lanes.with(|before| {
            let open = lanes.open_here().len();
            self.version.store(version, Ordering::Relaxed);
            if open == *before {
                return;
            }
            if let Some(quota) = quota(self.rate, open) {
                let limiter = RateLimiter::direct(quota);
                if *before > 0 {
                    let _ = limiter.check_n(quota.burst_size());
                }
                self.limiter.store(Arc::new(limiter));
            }
            *before = open;
        });
    }
}

impl RateLimits {
    /// Limits from the configuration.
    pub fn new(config: &RateLimit) -> Self {
        RateLimits {
            per_user: quota(config.per_user, Lane::COUNT).map(RateLimiter::keyed),
            overall: Overall::new(config.overall),
            clock: DefaultClock::default(),
        }
    }

    /// Counts one request. `lanes`: those of a node.
    ///
    /// # Errors
    /// [`Refusal::RateLimited`] if it is one too many.
    pub fn check(&self, user_id: &UserId, lanes: Option<&Lanes>) -> Result<(), Refusal> {
        if let Some(per_user) = &self.per_user {
            per_user
                .check_key(user_id)
                .map_err(|until| self.refusal(&until))?;
        }
        if let Some(overall) = &self.overall {
            if let Some(lanes) = lanes {
                overall.follow(lanes);
            }
            let limiter = overall.limiter.load();
            limiter.check().map_err(|until| self.refusal(&until))?;
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

/// The part of a rate that is for this many lanes.
fn quota(rate: Rate, lanes: usize) -> Option<Quota> {
    let (count, per) = match rate {
        Rate::Off => return None,
        Rate::PerSecond(count) => (count, Duration::from_secs(1)),
        Rate::PerMinute(count) => (count, Duration::from_secs(60)),
    };
    let lanes = u32::try_from(lanes.clamp(1, Lane::COUNT)).unwrap_or(1);
    let all = Lane::COUNT as u32;
    let burst = u64::from(count.get()) * u64::from(lanes) / u64::from(all);
    let burst = u32::try_from(burst).ok().and_then(NonZeroU32::new);
    let each = per * all / lanes / count.get();
    let quota = Quota::with_period(each.max(Duration::from_nanos(1)))?;
    Some(quota.allow_burst(burst.unwrap_or(NonZeroU32::MIN)))
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
        assert!((0..10_000).all(|_| limits.check(&user, None).is_ok()));
    }

    #[test]
    fn a_user_is_limited_without_the_others() {
        let limits = limits("2/min", "off");
        let (user, other) = (UserId::new("u").unwrap(), UserId::new("v").unwrap());
        assert!(limits.check(&user, None).is_ok());
        assert!(limits.check(&user, None).is_ok());
        match limits.check(&user, None) {
            Err(Refusal::RateLimited { retry_after_ms }) => {
                assert!((1..=30_000).contains(&retry_after_ms))
            }
            other => panic!("{other:?}"),
        }
        assert!(limits.check(&other, None).is_ok());
    }

    #[test]
    fn the_overall_rate_counts_everybody() {
        let limits = limits("off", "3/min");
        let users = (0..4).map(|n| UserId::new(&format!("u-{n}")).unwrap());
        let passed = users
            .filter(|user| limits.check(user, None).is_ok())
            .count();
        assert_eq!(passed, 3);
    }

    /// Orders of 1,000 users that pass at once at a node with these lanes.
    fn passed(limits: &RateLimits, lanes: &Lanes) -> usize {
        let users = (0..1_000).map(|n| UserId::new(&format!("u-{n}")).unwrap());
        users
            .filter(|user| limits.check(user, Some(lanes)).is_ok())
            .count()
    }

    #[test]
    fn nodes_share_the_overall_rate_by_their_lanes() {
        let [one, two] = [limits("off", "128/min"), limits("off", "128/min")];
        let [of_one, of_two] = [Lanes::new(), Lanes::new()];
        for lane in Lane::all() {
            let lanes = if lane.get() < 16 { &of_one } else { &of_two };
            lanes.open(lane, 1);
        }
        assert_eq!((passed(&one, &of_one), passed(&two, &of_two)), (32, 96));
        // The lanes of the second are the first one's: it has a rate for them from now on, and nothing saved.
        for lane in Lane::all().filter(|lane| lane.get() >= 16) {
            of_two.close(lane);
            of_one.open(lane, 2);
        }
        assert!(passed(&one, &of_one) <= 2);
        let users = (0..500).map(|n| UserId::new(&format!("u-{n}")).unwrap());
        let waits = users.filter_map(|user| one.check(&user, Some(&of_one)).err());
        let is_of_the_whole_rate = |refusal: Refusal| match refusal {
            Refusal::RateLimited { retry_after_ms } => retry_after_ms <= 60_000 / 128 + 1,
            _ => false,
        };
        assert!(waits.into_iter().all(is_of_the_whole_rate));
    }

    #[test]
    fn a_rate_below_the_number_of_lanes_is_the_part_of_each_node_all_the_same() {
        let quota = quota(Rate::PerMinute(NonZeroU32::new(8).unwrap()), 1).unwrap();
        assert_eq!(quota.burst_size(), NonZeroU32::MIN);
        assert_eq!(quota.replenish_interval(), Duration::from_secs(8 * 60));
    }
}
