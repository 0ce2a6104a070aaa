//! The check of standbys, and of commits that wait for them.

use super::Seen;
use super::checks::{Check, LAG_BYTES, Verdict, bytes};
use crate::store::postgres::preflight::remedies;

pub(super) fn check(seen: &Seen<'_>) -> Check {
    let facts = &seen.facts;
    let names = &facts.synchronous_standby_names;
    let Some(standbys) = facts.standbys else {
        let figure = match names.is_empty() {
            true => "no commit waits for a standby; others not known".to_owned(),
            false => format!("commits wait for {names}; not known whether it is there"),
        };
        return Check::new("replication", figure)
            .or(Verdict::Unknown, "let the role see them")
            .sql([remedies::monitor(&facts.role)]);
    };
    if standbys == 0 && names.is_empty() {
        return Check::new("replication", "no standby");
    }
    let (synchronous, awaited) = (facts.standbys_synchronous, facts.standbys_awaited);
    let figure = format!(
        "{standbys} {}, {synchronous} synchronous, at most {} behind",
        if standbys == 1 { "standby" } else { "standbys" },
        bytes(facts.standby_lag_bytes)
    );
    let check = Check::new("replication", figure);
    if names.is_empty() {
        let remedy = "a failover may lose orders that were told 201: set synchronous_standby_names";
        return check.or(Verdict::Warn, remedy);
    }
    if facts.synchronous_commit == "local" {
        let remedy = "synchronous_commit is local, so a failover may lose orders that were told 201: set it to on \
                      for the role, the database and the server";
        return check.or(Verdict::Warn, remedy);
    }
    if synchronous < awaited {
        let remedy = if facts.standbys_catching_up > 0 {
            format!(
                "commits wait for {names}, which is catching up: wait until it has, and repeat the preflight"
            )
        } else if awaited == 1 {
            format!(
                "commits wait for {names}, which is away: bring it back, or take it off synchronous_standby_names"
            )
        } else {
            format!(
                "commits wait for {names}, and {synchronous} of {awaited} are there: bring the others back, or take \
                 them off synchronous_standby_names"
            )
        };
        return check.or(Verdict::Bad, remedy);
    }
    if facts.standby_lag_bytes > LAG_BYTES {
        return check.or(Verdict::Warn, "let the standby catch up before the sale");
    }
    check
}
