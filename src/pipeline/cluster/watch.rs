//! When another node is suspect.
//!
//! A node renews by moving a counter in PostgreSQL. It is suspect when its counter has stood still for the length of a
//! lease *by the watcher's monotonic clock*. No clock is compared with another one.
//!
//! The watcher counts only while it renews itself: after a gap in its own renewals it starts to count anew. A database
//! that was away, or a watcher that was paused, therefore kills nobody: all counters stood still for the same reason.

use std::collections::BTreeMap;

use crate::store::cluster::takeover::Suspect;

/// A node's row as a renewal of the watcher has read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// The node.
    pub node: i16,
    /// Its epoch.
    pub epoch: i64,
    /// Its counter; negative: it has given its lease up.
    pub renewals: i64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    beat: Beat,
    /// The answer that had this counter first.
    since_ms: u64,
}

/// The counters of all other nodes.
#[derive(Clone, Debug)]
pub struct Watch {
    lease_ms: u64,
    /// When the last committed renewal of our own was sent.
    sent_at_ms: Option<u64>,
    seen: BTreeMap<i16, Seen>,
}

impl Watch {
    /// A watch with leases of `lease_ms`.
    pub fn new(lease_ms: u64) -> Self {
        Watch {
            lease_ms,
            sent_at_ms: None,
            seen: BTreeMap::new(),
        }
    }

    /// Longest time between two renewals of our own that is no gap.
    fn gap_ms(&self) -> u64 {
        self.lease_ms / 4
    }

    /// Notes a *committed* renewal of our own, with the rows of the other nodes that were read with it. The database did
    /// both at some moment from `sent_ms` to `answered_ms`, so neither is taken for that moment in another's disfavour.
    pub fn renewed(&mut self, sent_ms: u64, answered_ms: u64, others: &[Beat]) {
        let is_gap = self
            .sent_at_ms
            .is_none_or(|at_ms| answered_ms.saturating_sub(at_ms) > self.gap_ms());
        self.sent_at_ms = Some(sent_ms);
        let before = std::mem::take(&mut self.seen);
        for beat in others {
            let still = before.get(&beat.node).filter(|seen| seen.beat == *beat);
            let since_ms = match still {
                Some(seen) if !is_gap => seen.since_ms,
                _ => answered_ms,
            };
            let seen = Seen {
                beat: *beat,
                since_ms,
            };
            self.seen.insert(beat.node, seen);
        }
    }

    /// The nodes that are suspect now. None while the watcher itself does not renew.
    pub fn suspects(&self, now_ms: u64) -> Vec<Suspect> {
        let sent_at_ms = match self.sent_at_ms {
            Some(at_ms) if now_ms.saturating_sub(at_ms) <= self.gap_ms() => at_ms,
            _ => return Vec::new(),
        };
        let is_suspect = |seen: &&Seen| {
            seen.beat.renewals < 0 || sent_at_ms.saturating_sub(seen.since_ms) >= self.lease_ms
        };
        let suspects = self.seen.values().filter(is_suspect);
        suspects
            .map(|Seen { beat, .. }| Suspect {
                node: beat.node,
                epoch: beat.epoch,
                renewals: beat.renewals,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE_MS: u64 = 10_000;

    fn beat(renewals: i64) -> Beat {
        Beat {
            node: 2,
            epoch: 7,
            renewals,
        }
    }

    /// A watch that renews once a second from 0 on, up to `until_ms`, while the other's counter is what `counter` says.
    fn watch(until_ms: u64, counter: impl Fn(u64) -> i64) -> Watch {
        let mut watch = Watch::new(LEASE_MS);
        for now_ms in (0..=until_ms).step_by(1_000) {
            watch.renewed(now_ms, now_ms, &[beat(counter(now_ms))]);
        }
        watch
    }

    #[test]
    fn a_node_is_suspect_after_its_counter_has_stood_still_for_a_lease() {
        let lives = watch(60_000, |now_ms| now_ms as i64 / 1_000);
        assert_eq!(lives.suspects(60_000), []);
        let stopped = |until_ms| watch(until_ms, |now_ms| (now_ms as i64 / 1_000).min(5));
        assert_eq!(stopped(14_000).suspects(14_999), []);
        let suspect = Suspect {
            node: 2,
            epoch: 7,
            renewals: 5,
        };
        assert_eq!(stopped(15_000).suspects(15_000), [suspect]);
    }

    #[test]
    fn after_a_gap_of_our_own_everybody_has_a_whole_lease_again() {
        let mut watch = watch(20_000, |now_ms| (now_ms as i64 / 1_000).min(12));
        assert_eq!(watch.suspects(20_000), []);
        // The database was away for a minute: no counter moved.
        assert_eq!(watch.suspects(80_000), [], "we do not renew either");
        watch.renewed(80_000, 80_000, &[beat(12)]);
        assert_eq!(watch.suspects(80_000), []);
        for now_ms in (81_000..=89_000).step_by(1_000) {
            watch.renewed(now_ms, now_ms, &[beat(12)]);
        }
        assert_eq!(watch.suspects(89_999), []);
        watch.renewed(90_000, 90_000, &[beat(12)]);
        assert_eq!(watch.suspects(90_000).len(), 1);
    }

    #[test]
    fn a_quarter_of_a_lease_without_a_renewal_of_our_own_is_no_gap_and_more_is() {
        let mut watch = Watch::new(LEASE_MS);
        for now_ms in (0..=10_000).step_by(2_500) {
            watch.renewed(now_ms, now_ms, &[beat(5)]);
        }
        assert_eq!(watch.suspects(12_500).len(), 1);
        assert_eq!(watch.suspects(12_501), []);
        watch.renewed(12_501, 12_501, &[beat(5)]);
        assert_eq!(watch.suspects(12_501), []);
    }

    #[test]
    fn the_time_that_an_answer_takes_is_never_counted_against_the_other() {
        let mut watch = Watch::new(LEASE_MS);
        for sent_ms in (0..=11_000).step_by(1_000) {
            watch.renewed(sent_ms, sent_ms + 900, &[beat(5)]);
        }
        assert_eq!(
            watch.suspects(11_900).len(),
            1,
            "10,100 ms from the first answer to the last question"
        );
        let mut slow = Watch::new(LEASE_MS);
        for sent_ms in (0..=10_000).step_by(1_000) {
            slow.renewed(sent_ms, sent_ms + 900, &[beat(5)]);
        }
        assert_eq!(slow.suspects(10_900), []);
    }

    #[test]
    fn a_node_that_gives_its_lease_up_is_suspect_at_once() {
        assert_eq!(watch(0, |_| -6).suspects(0).len(), 1);
        assert_eq!(watch(0, |_| 0).suspects(0), [], "it has just begun");
    }

    #[test]
    fn a_node_that_started_again_or_left_is_not_suspect() {
        let mut watch = watch(20_000, |_| 5);
        assert_eq!(watch.suspects(20_000).len(), 1);
        let again = Beat {
            epoch: 8,
            ..beat(5)
        };
        watch.renewed(20_500, 20_500, &[again]);
        assert_eq!(watch.suspects(20_500), []);
        watch.renewed(21_000, 21_000, &[]);
        assert_eq!(watch.suspects(60_000), []);
    }
}
