//! The checks of a preflight: a figure each, judged, with its remedy.

use serde::Serialize;

use super::{Latencies, LogProbe, Measured, Sale, Seen, replication, wal};
use crate::order::UnixMillis;
use crate::store::StoreError;
use crate::store::postgres::preflight::{Facts, remedies};

/// WAL bytes of an order in its whole life, its payment or its expiry included. `tests/program/preflight.rs` measures 1,480,
/// and a third is added for attributes, small batches and pages that are written whole after a checkpoint.
pub const WAL_BYTES: u64 = 2_000;
/// Bytes of its rows and their index entries on the disk, likewise; measured are 1,110.
pub const ROW_BYTES: u64 = 1_500;
/// Most rows of a batch that is measured; a larger one commits no more rows a second.
pub(super) const BATCH_ROWS: usize = 5_000;
/// Share of COPY's rate that orders reach: the counters and the stock log are written too (`./x perf`, engine
/// without HTTP against COPY: 0.82 and more).
const ORDERS_OF_COPY: f64 = 0.8;
/// 99 of 100 commits within this are good; above the second bound they are bad. A waiting order waits for the
/// commit before its own, and for its own.
const COMMIT_MS: (f64, f64) = (20.0, 100.0);
/// A larger difference of the clocks is worth a warning, in milliseconds.
const CLOCK_MS: u64 = 1_000;
/// WAL that a standby may lag behind before a warning, in bytes.
pub(super) const LAG_BYTES: u64 = 64 << 20;

/// The verdict of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The sale can come.
    Good,
    /// The sale can come, and would be better with the remedy.
    Warn,
    /// The sale will suffer.
    Bad,
    /// Not known.
    Unknown,
}

/// One check.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Its stable name.
    pub name: &'static str,
    /// The verdict.
    pub verdict: Verdict,
    /// What was found.
    pub figure: String,
    /// What to do, if something is to be done.
    pub remedy: Option<String>,
    /// SQL for someone who may run it.
    pub sql: Vec<String>,
}

impl Check {
    pub(super) fn new(name: &'static str, figure: impl Into<String>) -> Self {
        Check {
            name,
            verdict: Verdict::Good,
            figure: figure.into(),
            remedy: None,
            sql: Vec::new(),
        }
    }

    pub(super) fn or(self, verdict: Verdict, remedy: impl Into<String>) -> Self {
        Check {
            verdict,
            remedy: Some(remedy.into()),
            ..self
        }
    }

    pub(super) fn sql(self, sql: impl IntoIterator<Item = String>) -> Self {
        Check {
            sql: sql.into_iter().collect(),
            ..self
        }
    }
}

/// Orders of the sale.
pub(super) fn orders(facts: &Facts, sale: Sale) -> u64 {
    sale.orders.unwrap_or(facts.units_free)
}

pub(super) fn wal_bytes(facts: &Facts, sale: Sale) -> u64 {
    orders(facts, sale).saturating_mul(WAL_BYTES)
}

/// WAL segments that the sale fills.
pub(super) fn segments_needed(facts: &Facts, sale: Sale) -> u64 {
    wal_bytes(facts, sale).div_ceil(facts.segment_bytes)
}

/// Every check, and the figures.
pub(super) fn all(seen: &Seen<'_>) -> (Vec<Check>, Measured) {
    let mut measured = Measured {
        wal_segments_ready: seen.facts.segments_ready,
        wal_segments_needed: segments_needed(&seen.facts, seen.sale),
        ..Measured::default()
    };
    let checks = vec![
        wal::segments(seen),
        wal::checkpoints(seen),
        commit(seen, &mut measured),
        order_log(seen, &mut measured),
        rate(seen, &mut measured),
        durability(seen),
        autovacuum(seen),
        replication::check(seen),
        wal::kept(seen),
        connections(seen),
        wal::disk(seen),
        clock(seen),
        snapshots(seen),
        pooler(seen),
    ];
    (checks, measured)
}

/// The figure of latencies, and their check.
fn latencies(check: &'static str, latencies: &Latencies, what: &str, remedy: &str) -> Check {
    let Latencies {
        count,
        p50_ms,
        p99_ms,
        p999_ms,
    } = latencies;
    let figure = format!("p50 {p50_ms}, p99 {p99_ms}, p99.9 {p999_ms} ms ({count} {what})");
    let check = Check::new(check, figure);
    let (good, bad) = COMMIT_MS;
    match *p99_ms {
        p99 if p99 > bad => check.or(Verdict::Bad, remedy),
        p99 if p99 > good => check.or(Verdict::Warn, remedy),
        _ => check,
    }
}

/// A measurement in the scratch table that was not made.
fn unmeasured(check: &'static str, seen: &Seen<'_>) -> Check {
    let facts = &seen.facts;
    match &seen.scratch {
        Ok(_) => Check::new(check, "not measured: the role may make no table")
            .or(Verdict::Unknown, "let the role make a scratch table")
            .sql([remedies::create_in_schema(seen.schema, &facts.role)]),
        Err(error @ StoreError::ScratchLeft(_)) => Check::new(check, error.to_string())
            .or(Verdict::Bad, "repeat the preflight, or drop it")
            .sql([remedies::drop_scratch(seen.schema)]),
        Err(error) => Check::new(check, error.to_string()).or(
            Verdict::Bad,
            "mend what the error names; an order would wait likewise",
        ),
    }
}

fn commit(seen: &Seen<'_>, measured: &mut Measured) -> Check {
    let scratch = seen.scratch.as_ref().ok().and_then(Option::as_ref);
    measured.commit = scratch.and_then(|scratch| Latencies::of(scratch.commits.clone()));
    let Some(commit) = &measured.commit else {
        return unmeasured("commit", seen);
    };
    let remedy = "a faster disk for WAL, a nearer server, or a nearer synchronous standby";
    latencies("commit", commit, "commits, 100 a second", remedy)
}

fn order_log(seen: &Seen<'_>, measured: &mut Measured) -> Check {
    let log = match &seen.log {
        Ok(Some(log)) => log,
        Ok(None) => return Check::new("order_log", "none (queue.backend is memory)"),
        Err(error) => {
            let remedy = "mend what the error names; respond-async is refused until then";
            return Check::new("order_log", error.clone()).or(Verdict::Bad, remedy);
        }
    };
    measured.log_append = Some(*log);
    let check = match &seen.settings.log {
        LogProbe::Broker(..) if log.count == 1 => Check::new(
            "order_log",
            format!(
                "its settings were checked in {} ms; nothing was appended",
                log.p50_ms
            ),
        ),
        LogProbe::Broker(..) => {
            let remedy = "a nearer broker, or a faster disk for it";
            latencies(
                "order_log",
                log,
                "groups of this service, each at most",
                remedy,
            )
        }
        LogProbe::Journal(_) | LogProbe::Memory => {
            let remedy = "a faster disk for queue.journal.dir";
            latencies("order_log", log, "appends, 100 a second", remedy)
        }
    };
    if seen.log_warnings.is_empty() {
        return check;
    }
    let weak = seen.log_warnings.join("; ");
    let check = Check {
        figure: format!("{}; {weak}", check.figure),
        ..check
    };
    match check.verdict {
        Verdict::Good => check.or(
            Verdict::Warn,
            "make it stronger, or accept it (docs/QUEUES.md)",
        ),
        _ => check,
    }
}

fn rate(seen: &Seen<'_>, measured: &mut Measured) -> Check {
    let Ok(Some(scratch)) = &seen.scratch else {
        return unmeasured("rate", seen);
    };
    let per_second = scratch.rows_per_second * ORDERS_OF_COPY;
    let orders = orders(&seen.facts, seen.sale);
    let written = orders as f64 / per_second;
    let arrived = seen
        .sale
        .rate
        .map_or(0.0, |rate| orders as f64 / rate.max(1) as f64);
    let wait = (written - arrived).max(0.0);
    measured.copy_rows_per_second = Some(scratch.rows_per_second as u64);
    measured.orders_per_second = Some(per_second as u64);
    measured.wait_ms = Some((wait * 1e3) as u64);
    let arrival = match seen.sale.rate {
        Some(rate) => format!("at {} a second", grouped(rate)),
        None => "at once".to_owned(),
    };
    let figure = format!(
        "COPY {} rows a second: some {} orders; {} orders {arrival} wait {wait:.1} s at most",
        grouped(scratch.rows_per_second as u64),
        grouped(per_second as u64 / 100 * 100),
        grouped(orders),
    );
    let check = Check::new("rate", figure);
    if wait <= seen.settings.order_timeout.as_secs_f64() {
        return check;
    }
    let remedy = "longer than orders.timeout_ms: the rest is refused with 503; let the shop use respond-async";
    match seen.sale.rate {
        Some(_) => check.or(Verdict::Bad, remedy),
        None => check.or(Verdict::Warn, remedy),
    }
}

fn durability(seen: &Seen<'_>) -> Check {
    let facts = &seen.facts;
    let word = |on| if on { "on" } else { "off" };
    let figure = format!(
        "fsync {}, full_page_writes {}, synchronous_commit {}",
        word(facts.fsync),
        word(facts.full_page_writes),
        facts.synchronous_commit
    );
    let check = Check::new("durability", figure);
    let on = |name| (name, "on".to_owned());
    let lost = if !facts.fsync {
        vec![on("fsync"), on("full_page_writes")]
    } else if !facts.full_page_writes {
        vec![on("full_page_writes")]
    } else if facts.synchronous_commit == "off" {
        let remedy = "Millrace's sessions turn synchronous_commit on; turn it on for others too";
        let sql = remedies::set(&[on("synchronous_commit")]);
        return check.or(Verdict::Warn, remedy).sql(sql);
    } else {
        return check;
    };
    let remedy = "a crash of the machine loses the database: turn them on";
    check.or(Verdict::Bad, remedy).sql(remedies::set(&lost))
}

fn autovacuum(seen: &Seen<'_>) -> Check {
    let facts = &seen.facts;
    if !facts.autovacuum {
        let sql = [remedies::autovacuum_orders(seen.schema)];
        let sql = remedies::set(&[
            ("autovacuum", "on".to_owned()),
            ("track_counts", "on".to_owned()),
        ])
        .into_iter()
        .chain(sql);
        return Check::new("autovacuum", "off, or off for orders")
            .or(Verdict::Bad, "turn it on")
            .sql(sql);
    }
    if facts.orders_due {
        return Check::new(
            "autovacuum",
            "on; orders is due, so it may run during the sale",
        )
        .or(Verdict::Warn, "vacuum it now")
        .sql([remedies::vacuum_orders(seen.schema)]);
    }
    Check::new("autovacuum", "on; orders is not due")
}

fn connections(seen: &Seen<'_>) -> Check {
    let (facts, needed) = (&seen.facts, seen.settings.connections);
    let free = facts
        .connections
        .saturating_sub(facts.connections_of_others);
    let figure = format!(
        "{free} of {} for Millrace, which opens up to {needed}",
        facts.connections
    );
    let check = Check::new("connections", figure);
    match free >= needed {
        true => check,
        false => check.or(
            Verdict::Bad,
            "raise max_connections or the role's limit, or lower workers.count and database.pool_size",
        ),
    }
}

fn clock(seen: &Seen<'_>) -> Check {
    let apart = seen.facts.clock_apart_ms;
    let check = Check::new(
        "clock",
        format!("{apart} ms apart, at {}", UnixMillis::of_machine()),
    );
    let remedy = "synchronize the clocks of this machine and of the server (NTP)";
    match apart {
        apart if apart > seen.settings.clock_difference_max_ms => check.or(Verdict::Bad, remedy),
        apart if apart > CLOCK_MS => check.or(Verdict::Warn, remedy),
        _ => check,
    }
}

fn snapshots(seen: &Seen<'_>) -> Check {
    let held = seen.horizons.iter();
    let told: Vec<String> = held
        .clone()
        .map(|horizon| match horizon.seconds {
            Some(seconds) => format!("{}, for {seconds} s", horizon.holder),
            None => horizon.holder.clone(),
        })
        .collect();
    if told.is_empty() {
        return Check::new("snapshots", "none old");
    }
    let remedies: Vec<&str> = held.clone().map(|horizon| &*horizon.remedy).collect();
    let check = Check::new("snapshots", told.join("; "));
    // A slot or standby reports no age.
    match held.clone().any(|horizon| horizon.seconds.is_some()) {
        true => check.or(Verdict::Bad, remedies.join("; ")),
        false => check.or(Verdict::Warn, remedies.join("; ")),
    }
}

fn pooler(seen: &Seen<'_>) -> Check {
    match &seen.pooling {
        Ok(()) => Check::new("pooler", "sessions are Millrace's alone"),
        Err(error @ StoreError::SharedSessions) => {
            Check::new("pooler", "shares sessions").or(Verdict::Bad, error.to_string())
        }
        Err(error) => Check::new("pooler", format!("not known: {error}"))
            .or(Verdict::Unknown, "repeat the preflight"),
    }
}

/// Bytes for people.
pub(super) fn bytes(bytes: u64) -> String {
    const GIB: u64 = 1 << 30;
    match bytes {
        GIB.. => format!("{:.1} GB", bytes as f64 / GIB as f64),
        _ => format!("{} MB", bytes.div_ceil(1 << 20)),
    }
}

/// A number with a comma before each thousand.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pipeline::admin::preflight::Settings;
    use crate::store::postgres::preflight::kept::Kept;
    use crate::store::postgres::preflight::{Room, scratch};

    /// A good database, 1 GB of `max_wal_size` and 60 segments ready, and a sale of 10,000 orders.
    fn seen(settings: &Settings) -> Seen<'_> {
        Seen {
            settings,
            schema: "millrace",
            sale: Sale {
                orders: Some(10_000),
                rate: None,
            },
            facts: Facts::good(),
            scratch: Ok(Some(scratch::Measured {
                commits: vec![Duration::from_millis(2); 500],
                rows_per_second: 10_000.0,
            })),
            log: Ok(None),
            log_warnings: Vec::new(),
            horizons: Vec::new(),
            pooling: Ok(()),
        }
    }

    fn settings() -> Settings {
        Settings {
            embedded: false,
            connections: 29,
            batch_rows_max: 5_000,
            order_timeout: Duration::from_secs(7),
            clock_difference_max_ms: 120_000,
            log: LogProbe::Memory,
        }
    }

    fn verdicts(change: impl FnOnce(&mut Seen<'_>)) -> Vec<(&'static str, Verdict)> {
        let settings = settings();
        let mut seen = seen(&settings);
        change(&mut seen);
        let (checks, _) = all(&seen);
        let other = checks.iter().filter(|check| check.verdict != Verdict::Good);
        other.map(|check| (check.name, check.verdict)).collect()
    }

    #[test]
    fn each_fault_is_found_by_its_own_check() {
        let not_known = ("disk", Verdict::Unknown);
        let found = |fault: Option<(&'static str, Verdict)>| {
            let mut all: Vec<_> = fault.into_iter().collect();
            all.push(not_known);
            all.sort_by_key(|(name, _)| *name);
            all
        };
        let judged = |change: fn(&mut Seen<'_>)| {
            let mut all = verdicts(change);
            all.sort_by_key(|(name, _)| *name);
            all
        };
        type Case = (&'static str, Verdict, fn(&mut Seen<'_>));
        let cases: [Case; 20] = [
            ("wal_segments", Verdict::Bad, |s| {
                s.facts.segments_ready = Some(0)
            }),
            ("checkpoints", Verdict::Warn, |s| {
                s.facts.min_wal_size = 16 << 20
            }),
            ("commit", Verdict::Warn, |s| slow(s, 30)),
            ("commit", Verdict::Bad, |s| slow(s, 300)),
            ("order_log", Verdict::Bad, |s| {
                s.log = Err("no room".to_owned())
            }),
            ("rate", Verdict::Warn, |s| rows(s, 1_000.0, None)),
            ("rate", Verdict::Bad, |s| rows(s, 1_000.0, Some(5_000))),
            ("durability", Verdict::Bad, |s| {
                s.facts.full_page_writes = false
            }),
            ("durability", Verdict::Warn, |s| {
                s.facts.synchronous_commit = "off".to_owned();
            }),
            ("autovacuum", Verdict::Bad, |s| s.facts.autovacuum = false),
            ("autovacuum", Verdict::Warn, |s| s.facts.orders_due = true),
            ("replication", Verdict::Warn, |s| s.facts.standbys = Some(1)),
            ("replication", Verdict::Bad, |s| {
                // FIRST 2 (a, b), and b is away.
                s.facts.synchronous_standby_names = "FIRST 2 (a, b)".to_owned();
                s.facts.standbys_awaited = 2;
                (s.facts.standbys, s.facts.standbys_synchronous) = (Some(1), 1);
            }),
            ("wal_kept", Verdict::Warn, |s| keeps(s, true, false)),
            ("wal_kept", Verdict::Bad, |s| keeps(s, true, true)),
            ("wal_kept", Verdict::Warn, |s| keeps(s, false, false)),
            ("order_log", Verdict::Warn, |s| {
                s.log_warnings = vec!["1 replica".to_owned()];
                s.log = Ok(Latencies::of(vec![Duration::from_millis(1)]));
            }),
            ("connections", Verdict::Bad, |s| s.facts.connections = 30),
            ("clock", Verdict::Warn, |s| s.facts.clock_apart_ms = 1_001),
            ("pooler", Verdict::Bad, |s| {
                s.pooling = Err(StoreError::SharedSessions)
            }),
        ];
        assert_eq!(judged(|_| {}), found(None));
        for (name, verdict, change) in cases {
            assert_eq!(judged(change), found(Some((name, verdict))), "{name}");
        }
        // At the rate at which the database takes them nobody waits.
        assert_eq!(judged(|s| rows(s, 1_000.0, Some(800))), found(None));
    }

    fn keeps(seen: &mut Seen<'_>, stuck: bool, archive: bool) {
        seen.facts.kept = vec![Kept {
            holder: "somebody".to_owned(),
            bytes: Some(LAG_BYTES + 1),
            stuck,
            archive,
            remedy: "stop it".to_owned(),
        }];
    }

    #[test]
    fn a_full_disk_is_found_on_either_file_system_and_no_advice_fills_it() {
        let room = |rows: u64, wal: u64, shared| {
            move |s: &mut Seen<'_>| {
                s.facts.room = Some(Room { rows, wal, shared });
                // 10,000 orders take 15 MB of rows and 2 segments.
                s.facts.segments_ready = Some(0);
            }
        };
        let disk = |change: &dyn Fn(&mut Seen<'_>)| {
            let all = verdicts(change);
            let found = all.iter().find(|(name, _)| *name == "disk");
            found.map(|(_, verdict)| *verdict)
        };
        let (little, much) = (20 << 20, 1 << 30);
        assert_eq!(disk(&room(much, much, true)), None);
        assert_eq!(disk(&room(little, little, true)), Some(Verdict::Bad));
        assert_eq!(disk(&room(much, little, false)), Some(Verdict::Bad));
        assert_eq!(disk(&room(little, much, false)), Some(Verdict::Warn));
        // More orders than anybody has: it is said to be too much, and nothing overflows.
        let most = |s: &mut Seen<'_>| {
            room(much, much, true)(s);
            s.sale.orders = Some(u64::MAX);
        };
        assert_eq!(disk(&most), Some(Verdict::Bad));

        let settings = settings();
        let mut seen = seen(&settings);
        seen.sale.orders = Some(10_000_000);
        seen.facts.room = Some(Room {
            rows: much,
            wal: much,
            shared: true,
        });
        let found = wal::checkpoints(&seen);
        assert_eq!(
            (found.verdict, found.sql.len()),
            (Verdict::Warn, 0),
            "{found:?}"
        );
        seen.facts.room = None;
        assert_eq!(wal::checkpoints(&seen).sql.len(), 3);
    }

    fn slow(seen: &mut Seen<'_>, ms: u64) {
        if let Ok(Some(scratch)) = &mut seen.scratch {
            // Six of 500 are more than one in a hundred.
            scratch.commits[..6].fill(Duration::from_millis(ms));
        }
    }

    fn rows(seen: &mut Seen<'_>, per_second: f64, rate: Option<u64>) {
        seen.sale.rate = rate;
        if let Ok(Some(scratch)) = &mut seen.scratch {
            scratch.rows_per_second = per_second;
        }
    }

    #[test]
    fn the_advice_on_wal_is_as_large_as_the_sale() {
        let settings = settings();
        let mut seen = seen(&settings);
        seen.sale.orders = Some(10_000_000);
        let sql = wal::checkpoints(&seen).sql;
        assert_eq!(
            sql[..2],
            [
                "ALTER SYSTEM SET max_wal_size = '36GB';",
                "ALTER SYSTEM SET min_wal_size = '19GB';"
            ],
            "20 GB, and 1.9 times as much until a checkpoint is due at nine tenths"
        );
        // The 61 segments that are there need no room.
        let grows = (36 << 30) - 61 * (16 << 20);
        for (wal, statements) in [(grows, 3), (grows - 1, 0)] {
            seen.facts.room = Some(Room {
                rows: 0,
                wal,
                shared: false,
            });
            assert_eq!(wal::checkpoints(&seen).sql.len(), statements);
        }
    }

    #[test]
    fn segments_are_prepared_unless_that_is_in_vain() {
        let advice = |orders: u64, wal: u64| {
            let settings = settings();
            let mut seen = seen(&settings);
            seen.sale.orders = Some(orders);
            seen.facts.segments_ready = Some(1);
            seen.facts.room = Some(Room {
                rows: 0,
                wal,
                shared: false,
            });
            wal::segments(&seen).remedy.unwrap_or_default()
        };
        // 10,000 orders fill two segments of 16 MB, of which one is ready; 128 MB stay free.
        assert!(advice(10_000, 144 << 20).starts_with("millrace preflight --prepare"));
        assert!(advice(10_000, (144 << 20) - 1).starts_with("make room"));
        // Of 64 segments of max_wal_size one is in use.
        let segments = |segments: u64| segments * (16 << 20) / WAL_BYTES;
        assert!(advice(segments(63), 1 << 40).starts_with("millrace preflight --prepare"));
        assert!(advice(segments(64), 1 << 40).starts_with("raise max_wal_size, which keeps 63"));
    }

    #[test]
    fn the_rate_is_that_of_copy_and_the_wait_what_arrives_faster() {
        let settings = settings();
        let mut seen = seen(&settings);
        let mut waits = |rate| {
            rows(&mut seen, 1_000.0, rate);
            let (_, measured) = all(&seen);
            assert_eq!(measured.orders_per_second, Some(800));
            measured.wait_ms
        };
        // 10,000 orders are written in 12.5 s.
        assert_eq!(waits(None), Some(12_500));
        assert_eq!(waits(Some(1_000)), Some(2_500));
        assert_eq!(waits(Some(800)), Some(0));
    }

    #[test]
    fn a_bound_itself_is_good() {
        assert_eq!(verdicts(|s| slow(s, 20)), verdicts(|_| {}));
        assert!(verdicts(|s| slow(s, 100)).contains(&("commit", Verdict::Warn)));
        let clock = |apart| verdicts(move |s| s.facts.clock_apart_ms = apart);
        assert_eq!(clock(1_000), verdicts(|_| {}));
        assert!(clock(1_001).contains(&("clock", Verdict::Warn)));
        assert!(clock(120_000).contains(&("clock", Verdict::Warn)));
        assert!(clock(120_001).contains(&("clock", Verdict::Bad)));
    }

    #[test]
    fn a_standby_that_commits_wait_for_is_named_with_its_reason() {
        let advice = |awaited, synchronous, catching_up, lag| {
            let settings = settings();
            let mut seen = seen(&settings);
            seen.facts.synchronous_standby_names = "ANY 1 (a, b)".to_owned();
            seen.facts.standbys = Some(2);
            seen.facts.standbys_awaited = awaited;
            seen.facts.standbys_synchronous = synchronous;
            seen.facts.standbys_catching_up = catching_up;
            seen.facts.standby_lag_bytes = lag;
            replication::check(&seen).remedy
        };
        let told = |remedy: Option<String>, part: &str| remedy.is_some_and(|it| it.contains(part));
        assert!(told(advice(1, 0, 1, 0), "is catching up"));
        assert!(told(advice(1, 0, 0, 0), "is away"));
        assert!(told(advice(2, 1, 0, 0), "1 of 2 are there"));
        assert_eq!(advice(1, 1, 0, LAG_BYTES), None);
        assert!(told(advice(1, 1, 0, LAG_BYTES + 1), "catch up"));
    }

    #[test]
    fn figures_are_for_people() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(123_456), "123,456");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(bytes(1), "1 MB");
        assert_eq!(bytes(3 << 29), "1.5 GB");
    }
}
