//! The two leases that a process keeps renewing: the right to give out order ids, and the right to acknowledge
//! orders before they are rows.
//!
//! Ids are leased ahead, in the database or, while that is away, in the journal. The acknowledge lease runs on
//! monotonic time: it lasts `queue.journal.lease_ms` from the last moment at which the database confirmed that
//! this process owns it. A process that was paused for longer finds its lease expired, so it acknowledges
//! nothing that is unknown to its successor, which waits for longer than the lease ([`waited_ms`]).
//!
//! Both are renewed on a dedicated connection, the one whose lock keeps other processes away from the database.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;

use crate::queue::OrderQueue;
use crate::state::State;
use crate::store::StoreError;
use crate::store::postgres::NodeLease;
use crate::store::postgres::lease::{ID_LEASE_MS, NodeGuard};

/// Longest interval between renewals; shorter if the lease is short.
const RENEWAL: Duration = Duration::from_secs(5);
/// Pause before a lost connection is re-established: without it nothing keeps another process from the
/// database.
const RECONNECT: Duration = Duration::from_millis(250);
/// Time that a process holding the lease may take from checking it to having answered, in addition to the
/// clocks' difference.
const ANSWER_MARGIN_MS: u64 = 1_000;

/// Time in milliseconds that a successor waits until a lease of `lease_ms` is over: a tenth longer, because two
/// clocks need not run at the same rate, and a second for an answer on its way.
pub fn waited_ms(lease_ms: u64) -> u64 {
    lease_ms + lease_ms / 10 + ANSWER_MARGIN_MS
}

/// The right to acknowledge orders before they are rows.
#[derive(Debug)]
pub struct AcknowledgeLease {
    lease_ms: u64,
    /// End of the lease by [`now_ms`], in milliseconds; 0: not held.
    until_ms: AtomicU64,
}

impl AcknowledgeLease {
    /// A lease that begins with its first renewal and lasts `lease_ms` from each.
    pub fn new(lease_ms: u64) -> Self {
        AcknowledgeLease {
            lease_ms,
            until_ms: AtomicU64::new(0),
        }
    }

    /// The right of a node of a cluster, which its log alone limits: whoever takes the node over marks its log first. It
    /// lasts until it is revoked.
    pub fn of_log() -> Self {
        AcknowledgeLease {
            lease_ms: 0,
            until_ms: AtomicU64::new(u64::MAX),
        }
    }

    /// Whether this process holds the lease now.
    pub fn holds(&self) -> bool {
        now_ms() < self.until_ms.load(Ordering::Acquire)
    }

    /// Renews the lease from `asked_at_ms`, a moment before the database was asked.
    pub fn renew(&self, asked_at_ms: u64) {
        self.until_ms
            .fetch_max(asked_at_ms + self.lease_ms, Ordering::AcqRel);
    }

    /// Gives the lease up for good.
    pub fn revoke(&self) {
        self.until_ms.store(0, Ordering::Release);
    }
}

/// Milliseconds of a monotonic clock that also counts while the machine sleeps.
pub fn now_ms() -> u64 {
    crate::clock::since_boot_ms()
}

/// The leases that [`keep`] renews.
pub struct Leases {
    /// The connection that renews them. [`keep`] holds its lock until it is dropped.
    pub guard: Arc<Mutex<NodeGuard>>,
    /// The lease of this process.
    pub lease: NodeLease,
    /// The state in memory, which gives out the ids.
    pub state: Arc<State>,
    /// The right to acknowledge orders before they are rows.
    pub acknowledge: Arc<AcknowledgeLease>,
    /// The order queue: a durable one has its log lease ids while the database is away.
    pub queue: Arc<dyn OrderQueue>,
}

impl Leases {
    /// Renews both once.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if another process has taken over. On any other error of the database the ids are
    /// leased in the order log, if there is one.
    pub async fn renew(&self) -> Result<(), StoreError> {
        self.renew_on(&mut *self.guard.lock().await).await
    }

    async fn renew_on(&self, guard: &mut NodeGuard) -> Result<(), StoreError> {
        let until = self.state.ids.now().plus_ms(ID_LEASE_MS);
        let asked_at = now_ms();
        let others_wait_ms = waited_ms(self.acknowledge.lease_ms);
        let renewed = guard.renew(self.lease, until, others_wait_ms).await;
        match renewed {
            Ok(()) => {
                self.acknowledge.renew(asked_at);
                self.state.ids.extend_lease(until);
                Ok(())
            }
            Err(error @ StoreError::Fenced { .. }) => {
                self.acknowledge.revoke();
                Err(error)
            }
            Err(error) => {
                if let Some(durable) = self.queue.durable()
                    && durable.lease_ids(until).await
                {
                    self.state.ids.extend_lease(until);
                }
                Err(error)
            }
        }
    }
}

/// Renews until this process is replaced or the future is dropped.
pub async fn keep(leases: Leases) {
    let shortest = Duration::from_millis(leases.acknowledge.lease_ms / 4);
    let mut tick = tokio::time::interval(RENEWAL.min(shortest));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut guard = leases.guard.lock().await;
    loop {
        tokio::select! {
            biased;
            _ = tick.tick() => {}
            () = connected_again(&mut guard) => {}
        }
        match leases.renew_on(&mut guard).await {
            Ok(()) => {}
            Err(error @ StoreError::Fenced { .. }) => {
                leases.state.poison.set(error.to_string());
                return;
            }
            Err(error) => {
                tracing::warn!(reason = %error, "the leases could not be renewed; retrying")
            }
        }
    }
}

/// Waits until the connection is lost and established again.
async fn connected_again(guard: &mut NodeGuard) {
    if guard.is_connected() {
        guard.lost().await;
    }
    while let Err(error) = guard.reconnect().await {
        tracing::debug!(reason = %error, "the lock on the database could not be taken yet; retrying");
        tokio::time::sleep(RECONNECT).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_it_to_be_over_waits_longer_than_it_lasts() {
        for lease_ms in [1_000, 600_000, 86_400_000] {
            // A clock that is a twentieth fast.
            assert!(waited_ms(lease_ms) * 20 / 21 > lease_ms, "{lease_ms}");
            assert!(waited_ms(lease_ms) <= lease_ms * 11 / 10 + 1_000);
        }
    }

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
