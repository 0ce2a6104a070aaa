//! The two rights that a process keeps renewing: to give out order ids, and to acknowledge orders
//! before they are rows.
//!
//! Ids are leased ahead, in the database or, while that is away, in the journal. The right to
//! acknowledge is kept by monotonic time: it lasts `queue.journal.lease_ms` from the last moment
//! at which the database said that this process is still the one. A process that was paused for
//! longer finds it gone when it goes on, so it acknowledges nothing that a successor, which has
//! waited for the same time to pass, does not know of.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::ledger::Ledger;
use crate::queue::journal::JournalQueue;
use crate::store::StoreError;
use crate::store::postgres::lease::ID_LEASE_MS;
use crate::store::postgres::{Database, NodeLease};

/// How often both are renewed, at least; more often where the lease is short.
const RENEWAL: Duration = Duration::from_secs(5);

/// The right to acknowledge orders before they are rows.
#[derive(Debug)]
pub struct AcknowledgeLease {
    lease_ms: u64,
    /// By [`now_ms`].
    until_ms: AtomicU64,
}

impl AcknowledgeLease {
    /// A right that begins with its first renewal and lasts `lease_ms` from each.
    pub fn new(lease_ms: u64) -> Self {
        AcknowledgeLease {
            lease_ms,
            until_ms: AtomicU64::new(0),
        }
    }

    /// Whether this process has it now.
    pub fn holds(&self) -> bool {
        now_ms() < self.until_ms.load(Ordering::Acquire)
    }

    /// Renews it, as of a moment that lies before the database was asked.
    pub fn renew(&self, asked_at_ms: u64) {
        self.until_ms
            .fetch_max(asked_at_ms + self.lease_ms, Ordering::AcqRel);
    }

    /// Gives it up for good.
    pub fn revoke(&self) {
        self.until_ms.store(0, Ordering::Release);
    }
}

/// Milliseconds of a clock that never goes back and also counts while the machine sleeps.
pub fn now_ms() -> u64 {
    #[cfg(target_os = "linux")]
    let clock = rustix::time::ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = rustix::time::ClockId::Monotonic;
    let now = rustix::time::clock_gettime(clock);
    let ms = now.tv_sec.saturating_mul(1_000) + now.tv_nsec / 1_000_000;
    u64::try_from(ms).unwrap_or(0)
}

/// What [`keep`] renews.
pub struct Leases {
    /// Where it is renewed.
    pub database: Database,
    /// Who this process is.
    pub lease: NodeLease,
    /// Whose ids they are.
    pub ledger: Arc<Ledger>,
    /// The right to acknowledge.
    pub acknowledge: Arc<AcknowledgeLease>,
    /// The queue, where it is a journal.
    pub journal: Option<Arc<JournalQueue>>,
}

impl Leases {
    /// Renews both once.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] where another process has taken over; what the database says
    /// otherwise, and then the ids are leased in the journal where there is one.
    pub async fn renew(&self) -> Result<(), StoreError> {
        let until = self.ledger.ids.now().plus_ms(ID_LEASE_MS);
        let asked_at = now_ms();
        let renewed = self
            .database
            .renew_lease(self.lease, until, self.acknowledge.lease_ms)
            .await;
        match renewed {
            Ok(()) => {
                self.acknowledge.renew(asked_at);
                self.ledger.ids.extend_lease(until);
                Ok(())
            }
            Err(error @ StoreError::Fenced { .. }) => {
                self.acknowledge.revoke();
                Err(error)
            }
            Err(error) => {
                if let Some(journal) = &self.journal
                    && journal.lease_ids(until).await
                {
                    self.ledger.ids.extend_lease(until);
                }
                Err(error)
            }
        }
    }
}

/// Renews until this process is replaced or the future dropped.
pub async fn keep(leases: Leases) {
    let shortest = Duration::from_millis(leases.acknowledge.lease_ms / 4);
    let mut tick = tokio::time::interval(RENEWAL.min(shortest));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match leases.renew().await {
            Ok(()) => {}
            Err(error @ StoreError::Fenced { .. }) => {
                leases.ledger.poison.set(error.to_string());
                return;
            }
            Err(error) => {
                tracing::warn!(reason = %error, "the leases were not renewed; it is tried again")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_lasts_from_the_moment_of_asking_and_is_gone_when_revoked() {
        let lease = AcknowledgeLease::new(60_000);
        assert!(!lease.holds());
        lease.renew(now_ms().saturating_sub(60_001));
        assert!(!lease.holds(), "a late answer renews nothing");
        lease.renew(now_ms());
        assert!(lease.holds());
        lease.revoke();
        assert!(!lease.holds());
    }
}
