//! Health of the database, checked in the background, so that reading it costs nothing and waits for nothing:
//! `readyz` is open to everyone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use crate::store::StoreError;
use crate::store::postgres::Database;
use crate::store::postgres::blockers::blockers;
use crate::store::postgres::replication::{self, HORIZON_HELD, Horizon, Replication};

/// Interval between two checks.
const LOOK: Duration = Duration::from_secs(1);
/// Age at which a check is stale: the database does not answer, or the checks have stopped.
pub const STALE: Duration = Duration::from_secs(5);

/// Result of one check.
#[derive(Clone, Debug)]
pub struct Look {
    /// Begin of the check.
    pub at: Instant,
    /// The error, if the database did not answer.
    pub failure: Option<String>,
    /// Warnings of later trouble, as name and detail.
    pub warnings: Vec<(&'static str, String)>,
    /// Sessions of others whose locks ours wait for, or waited for a moment ago: between two attempts none waits.
    pub blockers: Option<String>,
}

/// The last check, shared with its readers.
#[derive(Debug, Default)]
pub struct Health {
    last: ArcSwapOption<Look>,
}

impl Health {
    /// The last check, if there was one.
    pub fn last(&self) -> Option<Arc<Look>> {
        self.last.load_full()
    }
}

/// Checks the database periodically, on connections of its own.
pub struct Looker {
    database: Database,
    health: Arc<Health>,
    held_since: HeldSince,
    /// The last blockers that were seen, and when.
    blockers: Option<(Instant, String)>,
}

impl Looker {
    /// A looker that publishes to `health`. It needs the pool of `database` to itself.
    pub fn new(database: Database, health: Arc<Health>) -> Self {
        Looker {
            database,
            health,
            held_since: HeldSince::default(),
            blockers: None,
        }
    }

    /// Checks once.
    pub async fn look(&mut self) {
        let at = Instant::now();
        let (failure, warnings) = match self.ask().await {
            Ok(warnings) => (None, warnings),
            Err(error) => (Some(error.to_string()), Vec::new()),
        };
        self.blockers = self.blockers.take().filter(|(seen, _)| at - *seen < STALE);
        let look = Look {
            at,
            failure,
            warnings,
            blockers: self.blockers.as_ref().map(|(_, names)| names.clone()),
        };
        self.health.last.store(Some(Arc::new(look)));
    }

    async fn ask(&mut self) -> Result<Vec<(&'static str, String)>, StoreError> {
        self.database.ping().await?;
        // A role without access to these views gets no warning.
        let replication = replication::read(&self.database).await;
        let horizons = replication::horizons(&self.database, HORIZON_HELD).await;
        let blocked_by = blockers(&self.database).await.unwrap_or_default();
        if !blocked_by.is_empty() {
            self.blockers = Some((Instant::now(), blocked_by.join("; ")));
        }
        let mut warnings = Vec::new();
        warnings.extend(replication.ok().and_then(|seen| asynchronous(&seen)));
        let now = Instant::now();
        warnings.extend(self.held_since.warning(horizons.unwrap_or_default(), now));
        Ok(warnings)
    }
}

/// Holders of old row versions that report a transaction number (xmin) but no age: the number, and when it was
/// first seen.
#[derive(Debug, Default)]
struct HeldSince(HashMap<String, (String, Instant)>);

impl HeldSince {
    /// The warning about holders of old rows for longer than [`HORIZON_HELD`], as of `now`.
    fn warning(&mut self, horizons: Vec<Horizon>, now: Instant) -> Option<(&'static str, String)> {
        self.0.retain(|holder, (xmin, _)| {
            horizons
                .iter()
                .any(|horizon| horizon.holder == *holder && horizon.xmin == *xmin)
        });
        let mut details = Vec::new();
        for horizon in horizons {
            let Horizon {
                holder,
                xmin,
                seconds,
                remedy,
            } = horizon;
            let seconds = match seconds {
                Some(seconds) => seconds,
                None => {
                    let seen = self.0.entry(holder.clone()).or_insert((xmin, now));
                    now.duration_since(seen.1).as_secs()
                }
            };
            if seconds >= HORIZON_HELD.as_secs() {
                details.push(format!("{holder}, for {seconds} s ({remedy})"));
            }
        }
        (!details.is_empty()).then(|| {
            let detail = format!(
                "old row versions cannot be removed, and every batch becomes slower; kept by {}",
                details.join("; ")
            );
            ("old_snapshot", detail)
        })
    }
}

/// The warning about commits that a failover may lose, if there are standbys and commits do not wait for them.
fn asynchronous(replication: &Replication) -> Option<(&'static str, String)> {
    let cause = if replication.standbys == 0 {
        return None;
    } else if replication.synchronous_standby_names.is_empty() {
        "synchronous_standby_names is empty".to_owned()
    } else if matches!(&*replication.synchronous_commit, "off" | "local") {
        format!("synchronous_commit is {}", replication.synchronous_commit)
    } else {
        return None;
    };
    let detail = format!(
        "standbys are connected ({}) and {cause}: a failover may lose the last orders that were \
         told 201, cancellations and payments",
        replication.standbys
    );
    Some(("replication", detail))
}

/// Checks until the future is dropped.
pub async fn keep(mut looker: Looker) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        looker.look().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn horizon(holder: &str, xmin: &str, seconds: Option<u64>) -> Horizon {
        Horizon {
            holder: holder.to_owned(),
            xmin: xmin.to_owned(),
            seconds,
            remedy: "let go".to_owned(),
        }
    }

    #[test]
    fn a_snapshot_is_worth_a_warning_once_it_is_old_and_no_longer_once_it_moves() {
        let (mut held, start) = (HeldSince::default(), Instant::now());
        let slot = |xmin| vec![horizon("replication slot s", xmin, None)];
        assert_eq!(
            held.warning(slot("700"), start),
            None,
            "it is seen for the first time"
        );
        let late = start + HORIZON_HELD;
        let (name, detail) = held.warning(slot("700"), late).expect("it has not moved");
        assert_eq!(name, "old_snapshot");
        assert!(
            detail.contains("replication slot s, for 300 s (let go)"),
            "{detail}"
        );
        assert_eq!(held.warning(slot("701"), late), None, "it has moved");
        assert_eq!(held.warning(slot("701"), late + HORIZON_HELD / 2), None);
        // A reported age is believed at once.
        let session = vec![
            horizon("session 7", "9", Some(301)),
            horizon("session 8", "9", Some(2)),
        ];
        let (_, detail) = held.warning(session, late).expect("an old session");
        assert!(
            detail.contains("session 7") && !detail.contains("session 8"),
            "{detail}"
        );
    }
}
