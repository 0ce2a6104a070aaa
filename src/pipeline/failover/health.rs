//! How the database does, as seen by a look in the background, so that asking for it costs nothing and
//! waits for nobody: `readyz` is open to everyone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use crate::store::StoreError;
use crate::store::postgres::Database;
use crate::store::postgres::replication::{Horizon, Replication};

/// How often the database is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A look that is older says nothing any more: the database does not answer, or nobody looks.
pub const STALE: Duration = Duration::from_secs(5);
/// How long old rows may be kept from being removed before it is worth a warning: the rows of `sku` and
/// `writer` change with each batch, and each version that has to stay makes the next one slower.
const HORIZON_HELD: Duration = Duration::from_secs(300);

/// What one look has found.
#[derive(Clone, Debug)]
pub struct Look {
    /// When it began.
    pub at: Instant,
    /// Why the database did not answer, where it did not.
    pub failure: Option<String>,
    /// What may cost something later, by name.
    pub warnings: Vec<(&'static str, String)>,
}

/// The last look, for everyone.
#[derive(Debug, Default)]
pub struct Health {
    last: ArcSwapOption<Look>,
}

impl Health {
    /// The last look, if there was one.
    pub fn last(&self) -> Option<Arc<Look>> {
        self.last.load_full()
    }
}

/// Looks at the database again and again, on connections of its own.
pub struct Looker {
    database: Database,
    health: Arc<Health>,
    held_since: HeldSince,
}

impl Looker {
    /// One that tells `health`. Nobody else may use the pool of `database`.
    pub fn new(database: Database, health: Arc<Health>) -> Self {
        Looker {
            database,
            health,
            held_since: HeldSince::default(),
        }
    }

    /// Looks once.
    pub async fn look(&mut self) {
        let at = Instant::now();
        let look = match self.ask().await {
            Ok(warnings) => Look {
                at,
                failure: None,
                warnings,
            },
            Err(error) => Look {
                at,
                failure: Some(error.to_string()),
                warnings: Vec::new(),
            },
        };
        self.health.last.store(Some(Arc::new(look)));
    }

    async fn ask(&mut self) -> Result<Vec<(&'static str, String)>, StoreError> {
        self.database.ping().await?;
        // A role that may not look at them gets no warning.
        let replication = self.database.replication().await;
        let horizons = self.database.horizons(HORIZON_HELD).await;
        let mut warnings = Vec::new();
        warnings.extend(replication.ok().and_then(|seen| asynchronous(&seen)));
        let now = Instant::now();
        warnings.extend(self.held_since.warning(horizons.unwrap_or_default(), now));
        Ok(warnings)
    }
}

/// What holds old rows by a transaction number and does not say since when: the number, and when it was
/// first seen.
#[derive(Debug, Default)]
struct HeldSince(HashMap<String, (String, Instant)>);

impl HeldSince {
    /// What keeps old rows for longer than [`HORIZON_HELD`], as of `now`.
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

/// What a failover to a standby may cost, where there is one and commits do not wait for it.
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

/// Looks until it is dropped.
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
        // What tells its age is believed at once.
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
