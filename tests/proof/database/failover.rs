//! The primary is gone for good, and its standby takes its place.

use std::collections::HashMap;
use std::thread::sleep;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;

use super::fixture::{Fixture, runtime, socket};
use super::{Figures, LONG, Terms};
use crate::checker::{Findings, StoredRows};
use crate::load::{has_journal, retry_some};
use crate::outcome::Why;
use crate::support::standby::{Pair, SLOT, Server};

/// The standby has every commit that was acknowledged: nothing is lost.
pub fn synchronous(terms: Terms<'_>) -> Result<Figures, Why> {
    to_synchronous(terms, Fixture::start)
}

/// The same with buyers who pay.
pub fn paid_synchronous(terms: Terms<'_>) -> Result<Figures, Why> {
    to_synchronous(terms, Fixture::start_paying)
}

fn to_synchronous(
    terms: Terms<'_>,
    start: fn(Runtime, &Server, Terms<'_>) -> Result<Fixture, Why>,
) -> Result<Figures, Why> {
    let runtime = runtime();
    let mut pair = runtime.block_on(Pair::start());
    runtime.block_on(pair.synchronous(true));
    let mut fixture = start(runtime, &pair.primary, terms)?;
    fixture.under_load(|fixture, _| {
        fail_over(fixture, &mut pair);
        Ok(())
    })?;
    let findings = fixture.finish(&pair.standby)?;
    Ok(Figures {
        findings,
        ..Figures::default()
    })
}

/// The standby is away, commits wait for it in vain, and somebody ends the sessions that wait, as
/// Millrace does with its own after a while. A commit that only the primary has must not be
/// acknowledged, whoever was asked about it meanwhile.
pub fn while_commits_wait(terms: Terms<'_>) -> Result<Figures, Why> {
    let runtime = runtime();
    let mut pair = runtime.block_on(Pair::start());
    runtime.block_on(pair.synchronous(true));
    let mut fixture = Fixture::start(runtime, &pair.primary, terms)?;
    fixture.under_load(|fixture, _| {
        fixture.runtime.block_on(pair.part());
        let until = Instant::now() + LONG;
        while Instant::now() < until {
            fixture.runtime.block_on(pair.primary.sql(END_WAITS));
            sleep(LONG / 20);
        }
        fail_over(fixture, &mut pair);
        let words = "canceling the wait for synchronous replication";
        match pair.primary.has_logged(words) {
            true => Ok(()),
            false => Err(Why::Failed("no wait for the standby was given up".into())),
        }
    })?;
    let findings = fixture.finish(&pair.standby)?;
    Ok(Figures {
        findings,
        ..Figures::default()
    })
}

/// Ends the sessions whose commits wait for the standby.
const END_WAITS: &str =
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";

/// The standby lags, and replication does not wait for it. What the journal has acknowledged is
/// there again after the failover; those who waited for the commit may have lost theirs.
pub fn lagging(terms: Terms<'_>) -> Result<Figures, Why> {
    to_lagging(terms, false, false)
}

/// The same while orders are cancelled. Cancellations may be lost as well, but memory and database
/// have to agree afterwards, and no accepted order pays for it.
pub fn lagging_with_cancellations(terms: Terms<'_>) -> Result<Figures, Why> {
    to_lagging(terms, true, false)
}

/// Millrace is killed together with the primary, so that only the journal knows what the standby
/// does not have, in segments whose orders had all been committed.
pub fn lagging_and_killed(terms: Terms<'_>) -> Result<Figures, Why> {
    to_lagging(terms, false, true)
}

fn to_lagging(terms: Terms<'_>, cancels: bool, killed: bool) -> Result<Figures, Why> {
    if !has_journal() {
        return Err(Why::NotRun("this Millrace has no journal".into()));
    }
    let runtime = runtime();
    let mut pair = runtime.block_on(Pair::start());
    // Segments so small that all but the last would be gone if they were not kept for the standby.
    let settings = [
        ("QUEUE__JOURNAL__BYTES_MAX", "1048576"),
        ("QUEUE__JOURNAL__RETAIN_FOR_SLOTS", SLOT),
    ];
    let mut fixture = Fixture::start_apart(runtime, &pair, terms, cancels, &settings)?;
    let (mut before, mut after) = (StoredRows::default(), StoredRows::default());
    fixture.load_while(|fixture, _| {
        fixture.runtime.block_on(pair.part());
        fixture.until_written(1_000)?;
        // The primary's last word, or almost.
        before = fixture.read(&pair.primary);
        pair.primary.stop_immediately();
        if killed {
            kill_process(Pid::from_child(&fixture.served.child), Signal::KILL).expect("kill -9");
        }
        fixture.runtime.block_on(pair.promote());
        after = fixture.read(&pair.standby);
        fixture.proxy.lead_to(&socket(&pair.standby));
        if killed {
            return Ok(());
        }
        fixture.until_written(200)
    })?;
    if killed {
        fixture.start_again()?;
        fixture.under_load(|_, _| Ok(()))?;
    }
    let applied_again = missing(
        &fixture.crowds[1].own(&before),
        &fixture.crowds[1].own(&after),
    );
    if missing(&before, &after) == 0 {
        return Err(Why::Failed("the standby did not lag".into()));
    }
    fixture.until_quiet()?;
    // Only those who did not wait: the others' orders may be gone.
    let mut said = Findings::default();
    let one = &fixture.crowds[1];
    retry_some(fixture.served.data, &one.checker, 30, terms.seed, &mut said);
    let check_both = |fixture: &Fixture, found: &StoredRows| check(fixture, found).0;
    fixture.compare(&pair.standby, said, check_both)?;
    // A process that knows only what is in the database and in the journal sees the same.
    fixture.start_again()?;
    fixture
        .compare(&pair.standby, Findings::default(), check_both)
        .map_err(|why| match why {
            Why::Failed(why) => Why::Failed(format!("{why} (started again)")),
            not_run @ Why::NotRun(_) => not_run,
        })?;
    let mut lost_waiting = 0;
    let findings = fixture.finish_orderly(&pair.standby, |fixture, found| {
        let (findings, lost) = check(fixture, found);
        lost_waiting = lost;
        findings
    })?;
    Ok(Figures {
        findings,
        lost_waiting,
        applied_again,
    })
}

/// Loses the primary, makes the standby one, and leads everybody there.
fn fail_over(fixture: &Fixture, pair: &mut Pair) {
    pair.primary.stop_immediately();
    fixture.runtime.block_on(pair.promote());
    fixture.proxy.lead_to(&socket(&pair.standby));
}

/// How many orders of `before` are not in `after`.
fn missing(before: &StoredRows, after: &StoredRows) -> u64 {
    let there: HashMap<i64, ()> = after.orders.iter().map(|row| (row.order_id, ())).collect();
    let gone = before.orders.iter();
    gone.filter(|row| !there.contains_key(&row.order_id))
        .count() as u64
}

/// The findings, and how many waiting clients have lost their order, which a lagging standby allows. It may
/// also lose a cancellation, which is not in the journal.
fn check(fixture: &Fixture, found: &StoredRows) -> (Findings, u64) {
    let (waiting, respond_async) = (&fixture.crowds[0], &fixture.crowds[1]);
    let own = waiting.own(found);
    let mut all = waiting.checker.check(&own);
    let lost = all.acked - all.present;
    all.acked = all.present;
    // An order that was lost may have been placed anew under its key: two ids, one row.
    let mut rows: HashMap<&str, u64> = HashMap::new();
    for row in &own.orders {
        *rows.entry(&row.user).or_default() += 1;
    }
    all.duplicated = rows.values().map(|count| count - 1).sum();
    let duplicated = all.duplicated > 0;
    all.faults.retain(|fault| {
        !fault.starts_with("acknowledged and lost")
            && (duplicated || !fault.starts_with("more than one order"))
    });
    let one = respond_async.own(found);
    all.add(&respond_async.checker.check(&one));
    let failed = one
        .orders
        .iter()
        .filter(|row| row.status == "failed")
        .count();
    if failed > 0 {
        all.fault(format!(
            "{failed} orders that were told `accepted` have become dead letters"
        ));
    }
    all.faults
        .retain(|fault| !fault.starts_with("its cancellation is lost"));
    (all, lost)
}
